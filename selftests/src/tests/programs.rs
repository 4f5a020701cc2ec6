// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Programs that one process has loaded, and another one uses: over a socket, and pinned.
//!
//! The manager is a process of root's. The VMM is one of nobody's, without capabilities; what must do
//! without bpf(2) runs where the kernel kills a process that calls it.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use kvm_bpf::device::Error;
use kvm_bpf::note::Space;
use kvm_bpf::{Abi, Device, ImageDevice, OnLoss, Place, Programs};
use kvm_bpf_selftests::guest::Guest;
use kvm_bpf_selftests::harness::{Errno, forbid_bpf, set_capabilities, status_of_a_process};
use kvm_bpf_selftests::programs::{loaded, plug, sample, test_image};
use kvm_ioctls::Kvm;

use super::{ADDR, PATTERN, SIZE, eventfd};

mod manager;
mod params;
mod pins;
mod proc;

tests!(
    the_kernel_tells_its_numbers,
    a_device_by_its_descriptor,
    a_region_comes_and_goes,
    eventfds_are_the_devices_own,
    maps_are_listed,
    runs_are_counted,
    manager::of_a_manager_that_ends,
    manager::timers_outlive_the_manager,
    manager::replaced_by_the_manager,
    manager::another_map_is_no_replacement,
    manager::not_what_is_described,
    pins::pinned,
    pins::pinned_as_a_whole_or_not,
    params::parameters_are_given,
    params::parameters_that_are_refused,
    params::parameters_in_a_state,
    params::parameters_go_over,
    params::parameters_of_a_replacement,
    proc::without_proc,
);

const NOBODY: u32 = 65534;
const LIMIT: Duration = Duration::from_secs(60);

fn the_kernel_tells_its_numbers() {
    let abi = Abi::from_running_kernel().expect("the kernel's BTF");
    assert_got!(abi, Abi::default(), "numbers of types");
    let guest = Guest::new();
    kvm_bpf::Device::is_supported(guest.vm(), &abi).expect("KVM_CREATE_DEVICE_TEST");
    let mut other = abi;
    other.device_type = 0xffff;
    match Device::with_abi(guest.vm(), &other) {
        Err(error @ Error::Unsupported) => {
            let text = error.to_string();
            assert!(text.contains("modprobe kvm_bpf"), "{text}");
        }
        other => panic!("wanted Unsupported, got {other:?}"),
    }
}

/// As somebody else may have created it.
fn a_device_by_its_descriptor() {
    let guest = Guest::new();
    let created = Device::new(guest.vm()).expect("KVM_CREATE_DEVICE");
    let fd = OwnedFd::from(created);
    let number = fd.as_raw_fd();
    let device = Device::from_fd(fd);
    assert_got!(device.as_raw_fd(), number, "its descriptor");
    assert_got!(device.as_fd().as_raw_fd(), number, "borrowed");
    let device = ImageDevice::builder(device, loaded(sample("regbank")))
        .plug(Place::Memory(ADDR))
        .expect("plugging it in");
    let mut vcpu = guest.vcpu(0);
    assert_got!(vcpu.read(ADDR, 4).exits, [], "exits of a read");
    drop(device);
    assert_got!(vcpu.read(ADDR, 4).exits.len(), 1, "without the device");
}

/// Without an `ImageDevice`: the VMM has the programs, and sets and removes regions.
fn a_region_comes_and_goes() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let device = Device::new(guest.vm()).expect("KVM_CREATE_DEVICE");
    let programs = loaded(sample("regbank"));
    let (read, write) = (programs.read_program(), programs.write_program());
    let set = device.set_region(3, Place::Memory(ADDR), SIZE, read, write);
    set.expect("a region");
    assert_got!(vcpu.read(ADDR, 4).exits, [], "exits of a read");
    device.unset_region(Space::Memory, 3).expect("its end");
    assert_got!(vcpu.read(ADDR, 4).exits.len(), 1, "without the region");
    match device.unset_region(Space::Memory, 3) {
        Err(Error::UnsetRegion { index: 3, source }) => {
            assert_got!(source.raw_os_error(), Some(libc::ENOENT));
        }
        other => panic!("wanted UnsetRegion, got {other:?}"),
    }
}

/// The VMM may close its own at once, and one that the device has is given to no other.
fn eventfds_are_the_devices_own() {
    const IRQ: u64 = 0x20;

    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let line = eventfd();
    let seen = line.try_clone().expect("dup");
    let device = Device::new(guest.vm()).expect("KVM_CREATE_DEVICE");
    let builder = ImageDevice::builder(device, loaded(sample("regbank")));
    let mut device = builder
        .irq(0, &line)
        .and_then(|builder| builder.plug(Place::Memory(ADDR)))
        .expect("plugging it in");
    drop(line);
    vcpu.write(ADDR + IRQ, 4, 0);
    assert_got!(seen.read().expect("a signal"), 1);
    device
        .replace(sample("regbank"), OnLoss::Refuse, |swap| swap())
        .expect("other programs");
    vcpu.write(ADDR + IRQ, 4, 0);
    vcpu.write(ADDR + IRQ, 4, 0);
    assert_got!(seen.read().expect("signals"), 2, "of other programs");
}

fn maps_are_listed() {
    let programs = loaded(test_image("state"));
    let mut names: Vec<_> = programs.maps().map(|map| map.name()).collect();
    names.sort();
    let wanted = [
        ".bss",
        ".data",
        ".data.own",
        ".rodata",
        "changing",
        "kinds",
        "raw",
        "scratch",
    ];
    assert_got!(names, wanted);
    let raw = programs.map("raw").expect("the map");
    assert!(raw.is_array(), "{raw:?}");
    assert_got!(
        (raw.key_size(), raw.value_size(), raw.max_entries()),
        (4, 12, 2)
    );
    let value: Vec<u8> = (1..=12).collect();
    raw.update(&1_u32.to_ne_bytes(), &value)
        .expect("BPF_MAP_UPDATE_ELEM");
    assert_got!(raw.value(1), Some(value));
    assert_got!(raw.value(0), Some(vec![0; 12]));
    assert_got!(raw.value(2), None);
    // In memory as with bpf(2).
    programs.fill("raw", [[7; 12], [9; 12]]).expect("values");
    let second = raw.lookup(&1_u32.to_ne_bytes()).expect("a value");
    assert_got!(second, Some(vec![9; 12]));
    let scratch = programs.map("scratch").expect("the map");
    assert_got!((scratch.words().is_some(), scratch.value(0)), (false, None));
    programs.fill("scratch", [[3; 8]]).expect("a value");
    assert_got!(scratch.lookup(&[0; 4]).expect("a value"), Some(vec![3; 8]));

    for (map, values, wanted) in [
        ("none", vec![vec![0; 8]], "there is no map none"),
        ("scratch", vec![vec![0; 4]], "cannot access map scratch"),
        ("raw", vec![vec![0; 12]; 3], "cannot access map raw"),
    ] {
        let error = programs.fill(map, values).expect_err("values");
        assert_got!(error.to_string(), wanted);
    }
}

fn runs_are_counted() {
    const SWITCH: &str = "/proc/sys/kernel/bpf_stats_enabled";

    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let device = plug(guest.vm(), ADDR, sample("regbank"));
    let counts = || {
        let stats = device.programs().stats().expect("/proc/self/fdinfo");
        let one = |name| {
            let found = stats.iter().find(|one| one.name == name);
            let found = found.expect("a program");
            assert!(found.id != 0 && found.verified_insns != 0, "{found:?}");
            (found.run_count, found.run_time_ns)
        };
        (one("read"), one("write"))
    };
    assert_got!(vcpu.read(ADDR + 8, 8).exits, []);
    assert_got!(counts(), ((0, 0), (0, 0)), "runs that nobody counts");
    fs::write(SWITCH, "1").expect("counting runs");
    for _ in 0..10 {
        assert_got!(vcpu.read(ADDR + 8, 8).exits, []);
    }
    assert_got!(vcpu.write(ADDR + 8, 8, PATTERN), []);
    fs::write(SWITCH, "0").expect("counting no runs");
    let (read, write) = counts();
    assert_got!((read.0, write.0), (10, 1), "runs");
    assert!(read.1 > 0 && write.1 > 0, "{read:?}, {write:?}");
}

/// Runs both ends, each in a process of its own. The VMM has no rights, and may open `/dev/kvm` no
/// more: it has it.
#[track_caller]
fn between(manager: impl FnOnce(UnixStream) + Send, vmm: impl FnOnce(UnixStream, Kvm) + Send) {
    between_ends(ends(), || (), manager, vmm);
}

/// The manager's end and the VMM's.
fn ends() -> (UnixStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("socketpair");
    for end in [&ours, &theirs] {
        end.set_read_timeout(Some(LIMIT)).expect("a limit");
    }
    (ours, theirs)
}

/// The same with these ends, and with what the VMM does while it has rights.
#[track_caller]
fn between_ends(
    (ours, theirs): (UnixStream, UnixStream),
    with_rights: impl FnOnce() + Send,
    manager: impl FnOnce(UnixStream) + Send,
    vmm: impl FnOnce(UnixStream, Kvm) + Send,
) {
    let kvm = Kvm::new().expect("open /dev/kvm");
    let vmm = || {
        with_rights();
        become_nobody();
        vmm(theirs, kvm);
    };
    let (manager, vmm) = thread::scope(|scope| {
        let manager = scope.spawn(|| status_of_a_process(|| manager(ours)));
        let vmm = scope.spawn(|| status_of_a_process(vmm));
        (manager.join(), vmm.join())
    });
    let statuses = (manager.expect("the manager"), vmm.expect("the VMM"));
    assert_got!(statuses, (0, 0), "the manager's and the VMM's status");
}

/// Gives up all rights, for good.
fn become_nobody() {
    // SAFETY: the raw system call changes this thread alone, and a process that is new has no other.
    let result = unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) };
    assert_got!(result, 0, "setresuid to nobody");
    set_capabilities(&[]);
}

/// From here on bpf(2) kills the process, where the kernel has such filters.
fn without_bpf() {
    if let Err(error) = forbid_bpf() {
        assert_got!(error, Errno(libc::EINVAL), "a seccomp filter");
    }
}

fn plugged(guest: &Guest, programs: Programs) -> ImageDevice {
    let device = Device::new(guest.vm()).expect("KVM_CREATE_DEVICE");
    let builder = ImageDevice::builder(device, programs);
    builder
        .plug(Place::Memory(ADDR))
        .unwrap_or_else(|error| panic!("wanted it plugged, got {error:#?}"))
}

#[track_caller]
fn received(stream: &UnixStream) -> Programs {
    Programs::recv(stream).unwrap_or_else(|error| panic!("wanted programs, got {error:#?}"))
}

/// A directory of pins, gone when this is dropped.
struct Pins(PathBuf);

impl Pins {
    fn new() -> Self {
        Pins("/sys/fs/bpf/kvm_bpf_programs".into())
    }

    fn all(&self) -> Vec<PathBuf> {
        let pins = fs::read_dir(&self.0).expect("the pins").flatten();
        pins.map(|pin| pin.path()).collect()
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
