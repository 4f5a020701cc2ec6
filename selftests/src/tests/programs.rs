// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Programs that one process has loaded, and another one uses: over a socket, and pinned.
//!
//! The manager is a process of root's. The VMM is one of nobody's, without capabilities; what must do
//! without bpf(2) runs where the kernel kills a process that calls it.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::chown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use kvm_bpf::device::Error;
use kvm_bpf::{
    Abi, Builder, Device, ImageDevice, OnLoss, Place, Programs, State, image, programs, transfer,
};
use kvm_bpf_selftests::guest::{Guest, Vcpu};
use kvm_bpf_selftests::harness::{
    Errno, forbid_bpf, set_capabilities, status_of_a_process, unpaused, wait_for,
};
use kvm_bpf_selftests::programs::{loaded, plug, sample, test_image};
use kvm_ioctls::Kvm;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::{ADDR, PATTERN};

tests!(
    the_kernel_tells_its_numbers,
    a_device_by_its_descriptor,
    eventfds_are_the_devices_own,
    maps_are_listed,
    runs_are_counted,
    of_a_manager_that_ends,
    timers_outlive_the_manager,
    replaced_by_the_manager,
    another_map_is_no_replacement,
    not_what_is_described,
    pinned,
    pinned_as_a_whole_or_not,
    parameters_are_given,
    parameters_that_are_refused,
    parameters_in_a_state,
    parameters_go_over,
    parameters_of_a_replacement,
    without_proc,
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

/// The VMM may close its own at once, and one that the device has is given to no other.
fn eventfds_are_the_devices_own() {
    const IRQ: u64 = 0x20;

    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let line = EventFd::new(EFD_NONBLOCK).expect("eventfd");
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
    let (ours, theirs) = UnixStream::pair().expect("socketpair");
    for end in [&ours, &theirs] {
        end.set_read_timeout(Some(LIMIT)).expect("a limit");
    }
    let kvm = Kvm::new().expect("open /dev/kvm");
    let vmm = || {
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

/// Tells the VMM who the manager is.
fn say_id(stream: &mut UnixStream) {
    let id = std::process::id();
    stream.write_all(&id.to_ne_bytes()).expect("its id sent");
}

fn id_of_the_manager(stream: &mut UnixStream) -> i32 {
    let mut id = [0; 4];
    stream.read_exact(&mut id).expect("the manager's id");
    i32::from_ne_bytes(id)
}

fn wait_for_the_end_of(manager: i32) {
    wait_for("the manager's end", libc::ESRCH, || {
        // SAFETY: signal 0 is none.
        match unsafe { libc::kill(manager, 0) } {
            0 => 0,
            _ => Errno::last().0,
        }
    });
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

fn json(state: &State) -> serde_json::Value {
    let mut json = serde_json::to_value(state).expect("JSON");
    json["clock"].take();
    json
}

/// A device has all that it had where it was loaded: it saves and restores.
fn of_a_manager_that_ends() {
    let manager = |mut stream: UnixStream| {
        let guest = Guest::new();
        let programs = loaded(test_image("state"));
        programs.fill("raw", [[5; 12]]).expect("values");
        programs.send(&stream).expect("the programs sent");
        say_id(&mut stream);
        let device = plugged(&guest, programs);
        let state = device.save().expect("its state").to_json();
        let state = state.expect("its JSON");
        stream
            .write_all(&(state.len() as u32).to_ne_bytes())
            .and_then(|()| stream.write_all(&state))
            .expect("its state sent");
    };
    between(manager, |mut stream, kvm| {
        let guest = Guest::on(kvm);
        without_bpf();
        let programs = received(&stream);
        assert_got!(
            programs.note().compatible,
            ["kvm-bpf,state", "kvm-bpf,test"]
        );
        let manager = id_of_the_manager(&mut stream);
        let (mut len, mut state) = ([0; 4], Vec::new());
        stream.read_exact(&mut len).expect("a length");
        state.resize(u32::from_ne_bytes(len) as usize, 0);
        stream.read_exact(&mut state).expect("the state");
        wait_for_the_end_of(manager);
        let saved = State::from_json(&state).expect("the state");

        let mut device = plugged(&guest, programs);
        assert_got!(json(&device.save().expect("a state")), json(&saved));
        // As in a new device.
        let preset = device.programs().map(".data").expect("the map").value(0);
        assert_got!(preset.expect("a value")[..8], 7_u64.to_ne_bytes());
        device.programs().fill("raw", [[6; 12]]).expect("values");
        device.restore(&saved).expect("the state restored");
        let raw = device.programs().map("raw").expect("the map").value(0);
        assert_got!(raw, Some(vec![5; 12]));
    });
}

/// Timers are a map's, and last as long as somebody has it.
fn timers_outlive_the_manager() {
    let manager = |mut stream: UnixStream| {
        let programs = loaded(test_image("work_timer"));
        programs.send(&stream).expect("the programs sent");
        say_id(&mut stream);
        stream.read_exact(&mut [0]).expect("the VMM's word");
    };
    between(manager, |mut stream, kvm| {
        let guest = Guest::on(kvm);
        without_bpf();
        let programs = received(&stream);
        let manager = id_of_the_manager(&mut stream);
        let device = plugged(&guest, programs);
        let callbacks = || {
            let progress = device.programs().map("progress").expect("the map");
            let begun = progress.value(0).expect("a value")[..4].try_into();
            u32::from_ne_bytes(begun.expect("four bytes"))
        };
        device.resume().expect("starting the timer");
        wait_for("callbacks", true, || callbacks() > 2);
        stream.write_all(&[0]).expect("a word to the manager");
        wait_for_the_end_of(manager);
        let before = callbacks();
        wait_for("callbacks afterwards", true, || callbacks() > before + 2);
    });
}

/// The VMM sends what runs, and takes what comes back.
fn replaced_by_the_manager() {
    let manager = |stream: UnixStream| {
        let programs = loaded(sample("regbank"));
        programs.send(&stream).expect("the programs sent");
        drop(programs);
        let running = received(&stream);
        let mut next = test_image("regbank_v2");
        let changes = next.reuse_maps(&running, OnLoss::Refuse).expect("its maps");
        assert_got!(
            (changes.carried.is_empty(), changes.needs_pause()),
            (false, false)
        );
        loaded(next).send(&stream).expect("the next programs sent");
    };
    between(manager, |stream, kvm| {
        let guest = Guest::on(kvm);
        let mut vcpu = guest.vcpu(0);
        without_bpf();
        let mut device = plugged(&guest, received(&stream));
        assert_got!(vcpu.write(ADDR + 8, 8, PATTERN), []);
        let mut state = || (vcpu.read(ADDR + 4, 4), vcpu.read(ADDR + 8, 8));
        let (version, scratch) = state();
        assert_got!((version.value, scratch.value), (1, PATTERN));
        assert_got!((version.exits, scratch.exits), (vec![], vec![]));
        device.programs().send(&stream).expect("the programs sent");
        let next = received(&stream);
        let changes = device.changes(&next, OnLoss::Refuse).expect("a successor");
        let done = device
            .swap(next, OnLoss::Refuse, unpaused)
            .expect("the swap");
        assert_got!(done, changes, "what became of the maps");
        let (version, scratch) = state();
        assert_got!((version.value, scratch.value), (2, PATTERN));
        assert_got!((version.exits, scratch.exits), (vec![], vec![]));
    });
}

/// A successor that the manager has made without the running maps would lose what is in them.
fn another_map_is_no_replacement() {
    let manager = |stream: UnixStream| {
        for image in [sample("regbank"), test_image("regbank_v2")] {
            loaded(image).send(&stream).expect("the programs sent");
        }
    };
    between(manager, |stream, kvm| {
        let guest = Guest::on(kvm);
        without_bpf();
        let mut device = plugged(&guest, received(&stream));
        match device.swap(received(&stream), OnLoss::Refuse, unpaused) {
            Err(Error::Programs(programs::Error::LostMap { why, .. })) => {
                assert_got!(why, "the new programs have another map of that name");
            }
            other => panic!("wanted LostMap, got {other:?}"),
        }
        let version = guest.vcpu(0).read(ADDR + 4, 4);
        assert_got!((version.value, version.exits), (1, vec![]));
    });
}

/// What `/proc` says of a file descriptor must be what is described.
fn not_what_is_described() {
    let programs = loaded(sample("regbank"));
    // As a description would have it, but with the file descriptors in another order.
    let (one, other) = UnixStream::pair().expect("socketpair");
    other.set_read_timeout(Some(LIMIT)).expect("a limit");
    programs.send(&one).expect("the programs sent");
    let fds = fs::read_dir("/proc/self/fd").expect("/proc").count();
    drop(received(&other));
    assert_got!(
        fs::read_dir("/proc/self/fd").expect("/proc").count(),
        fds,
        "open files"
    );

    let read: OwnedFd = programs
        .map(".bss")
        .or_else(|| programs.maps().next())
        .map(|map| map.try_clone().expect("a map"))
        .map(|map| std::os::fd::AsFd::as_fd(&map).try_clone_to_owned())
        .expect("a map")
        .expect("a file descriptor");
    let mut note = programs.note().clone();
    note.works.clear();
    note.doorbells.clear();
    note.read_pages.clear();
    let wrong = Programs::from_fds(note, Some(read), None, [], Vec::new());
    wrong
        .expect("nothing is asked yet")
        .send(&one)
        .expect("sent");
    match Programs::recv(&other) {
        Err(transfer::Error::NotProgram(name)) if name == "read" => {}
        other => panic!("wanted NotProgram, got {other:?}"),
    }
    assert_got!(
        fs::read_dir("/proc/self/fd").expect("/proc").count(),
        fds,
        "open files"
    );
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

fn pinned() {
    let pins = Pins::new();
    loaded(sample("regbank")).pin(&pins.0).expect("the pins");
    let (path, all) = (pins.0.clone(), pins.all());
    // Search permission to get there is root's matter.
    fs::set_permissions(
        "/sys/fs/bpf",
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .expect("a file system that others may look into");
    let kvm = Kvm::new().expect("open /dev/kvm");
    let status = status_of_a_process(move || {
        become_nobody();
        match Programs::from_pinned(&path) {
            Err(transfer::Error::Open { source, .. }) => {
                assert_got!(source.raw_os_error(), Some(libc::EACCES));
            }
            other => panic!("wanted no way in, got {other:?}"),
        }
        drop(kvm);
    });
    assert_got!(status, 0, "a VMM that was not let in");

    for file in all.iter().chain([&pins.0]) {
        chown(file, Some(NOBODY), None).expect("chown");
    }
    let (path, kvm) = (pins.0.clone(), Kvm::new().expect("open /dev/kvm"));
    let status = status_of_a_process(move || {
        become_nobody();
        let programs = Programs::from_pinned(&path).expect("the programs");
        let guest = Guest::on(kvm);
        let device = plugged(&guest, programs);
        assert_got!(vcpu_write(&guest), PATTERN);
        device.save().expect("its state");
    });
    assert_got!(status, 0, "a VMM that was let in");
    // The programs are pinned still, and have what the VMM left.
    let again = Programs::from_pinned(&pins.0).expect("the programs");
    let guest = Guest::new();
    let _device = plugged(&guest, again);
    let scratch = guest.vcpu(0).read(ADDR + 8, 8);
    assert_got!((scratch.value, scratch.exits), (PATTERN, vec![]));
}

fn pinned_as_a_whole_or_not() {
    let pins = Pins::new();
    let programs = loaded(sample("regbank"));
    programs.pin(&pins.0).expect("the pins");
    let before = pins.all().len();
    match programs.pin(&pins.0) {
        Err(transfer::Error::Pin { path, source }) => {
            assert_got!(path, pins.0);
            assert_got!(source.raw_os_error(), Some(libc::EEXIST));
        }
        other => panic!("wanted the directory to be there, got {other:?}"),
    }
    assert_got!(pins.all().len(), before, "pins");
    // No bpf file system.
    let elsewhere = Path::new("/tmp/kvm_bpf_programs");
    match programs.pin(elsewhere) {
        Err(transfer::Error::Pin { path, .. }) => assert!(path.starts_with(elsewhere), "{path:?}"),
        other => panic!("wanted no pins there, got {other:?}"),
    }
    assert!(!elsewhere.exists(), "something is left");
    // A part is missing.
    fs::remove_file(pins.0.join("read")).expect("unpinning");
    match Programs::from_pinned(&pins.0) {
        Err(transfer::Error::Open { path, source }) => {
            assert_got!(path, pins.0.join("read"));
            assert_got!(source.raw_os_error(), Some(libc::ENOENT));
        }
        other => panic!("wanted a pin to be missing, got {other:?}"),
    }
}

/// Writes the register bank's scratch register, and returns what it then holds.
#[track_caller]
fn vcpu_write(guest: &Guest) -> u64 {
    let mut vcpu = guest.vcpu(0);
    assert_got!(vcpu.write(ADDR + 8, 8, PATTERN), []);
    let read = vcpu.read(ADDR + 8, 8);
    assert_got!(read.exits, []);
    read.value
}

/// The parameters of `params.bpf.c`, in the order in which the guest reads them.
const PARAMS: [&str; 5] = ["bytes", "halves", "words", "longs", "mapped"];

fn builder_of(guest: &Guest, programs: Programs) -> Builder {
    let device = Device::new(guest.vm()).expect("KVM_CREATE_DEVICE");
    ImageDevice::builder(device, programs)
}

/// The three values of a parameter.
#[track_caller]
fn param(vcpu: &mut Vcpu, number: u64) -> [u64; 3] {
    [0, 1, 2].map(|index| {
        let read = vcpu.read(ADDR + 0x100 * number + 8 * index, 8);
        assert_got!(read.exits, [], "value {index} of parameter {number}");
        read.value
    })
}

#[track_caller]
fn assert_missing(plugged: Result<ImageDevice, Error>, wanted: &str) {
    match plugged {
        Err(Error::Programs(programs::Error::MissingParam(name))) => assert_got!(name, wanted),
        other => panic!("wanted parameter {wanted} to be missing, got {other:?}"),
    }
}

fn parameters_are_given() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let builder = || builder_of(&guest, loaded(test_image("params")));
    // What is required is missing, and then it is no more.
    assert_missing(builder().plug(Place::Memory(ADDR)), "longs");
    let given = builder().param("longs", [1]).expect("values");
    assert_missing(given.plug(Place::Memory(ADDR)), "mapped");
    assert_got!(vcpu.read(ADDR, 8).exits.len(), 1, "exits without a device");

    let largest = [u8::MAX.into(), u16::MAX.into(), u32::MAX.into(), u64::MAX];
    let mut all = builder();
    for (name, largest) in PARAMS.iter().zip(largest.iter().chain([&largest[2]])) {
        all = all.param(name, [7, *largest]).expect("values");
    }
    let device = all.plug(Place::Memory(ADDR)).expect("plugging it in");
    for (number, largest) in (0..).zip(largest.iter().chain([&largest[2]])) {
        assert_got!(param(&mut vcpu, number), [7, *largest, 0], "of {number}");
    }
    // Those of a running device, in memory and not: what is behind the new values is gone.
    for (number, name) in (0..).zip(PARAMS) {
        device.programs().param(name, [3]).expect("a value");
        assert_got!(param(&mut vcpu, number), [3, 0, 0], "{name}");
    }
    drop(device);

    // Only the required ones, one of them with the bytes of its map.
    let filled = builder().fill("longs", [[1; 8]]).expect("bytes");
    let few = filled.param("mapped", []).expect("no values");
    let _device = few.plug(Place::Memory(ADDR)).expect("plugging it in");
    assert_got!(param(&mut vcpu, 3), [0x0101_0101_0101_0101, 0, 0]);
    assert_got!(param(&mut vcpu, 0), [0, 0, 0]);
}

fn parameters_that_are_refused() {
    let programs = loaded(test_image("params"));
    for name in PARAMS {
        programs.param(name, [1, 2, 3]).expect("values");
    }
    let contents = || {
        let value = |name, index: u32| {
            let map = programs.map(name).expect("the map");
            map.lookup(&index.to_ne_bytes()).expect("a value")
        };
        PARAMS.map(|name| [0, 1, 2].map(|index| value(name, index)))
    };
    let before = contents();
    for (name, values, wanted) in [
        (
            "byte",
            vec![9],
            "the device has no parameter byte, only bytes, halves, words, longs, mapped",
        ),
        (
            "longs",
            vec![9; 4],
            "more than 3 values for parameter longs, which has no room for them",
        ),
        (
            "mapped",
            vec![9, 9, 1 << 32],
            "value 2 of parameter mapped, 4294967296, does not fit into 4 bytes",
        ),
        (
            "words",
            vec![9, 1 << 32],
            "value 1 of parameter words, 4294967296, does not fit into 4 bytes",
        ),
        (
            "bytes",
            vec![256],
            "value 0 of parameter bytes, 256, does not fit into 1 bytes",
        ),
        (
            "halves",
            vec![9, 9, 9, 9],
            "more than 3 values for parameter halves, which has no room for them",
        ),
    ] {
        let error = programs.param(name, values).expect_err(wanted);
        assert_got!(error.to_string(), wanted);
        assert_got!(contents(), before, "values after {error}");
    }
    let none = loaded(sample("regbank")).param("x", [1]).expect_err("none");
    assert_got!(
        none.to_string(),
        "the device has no parameter x, it has none"
    );

    for (file, wanted) in [
        (
            "params_absent",
            "map absent cannot be a parameter: there is no such map",
        ),
        (
            "params_hash",
            "map hash cannot be a parameter: it is no array, but of type 1",
        ),
    ] {
        match test_image(file).load() {
            Err(image::Error::Programs(error @ programs::Error::Param { .. })) => {
                assert_got!(error.to_string(), wanted);
            }
            other => panic!("wanted {wanted}, got {other:?}"),
        }
    }
}

/// A map that user space can map is state, and the state has the parameter's values.
fn parameters_in_a_state() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let builder = || builder_of(&guest, loaded(test_image("params")));
    let given = builder().param("longs", [1]).expect("values");
    let given = given.param("mapped", [1, 2, 3]).expect("values");
    let device = given.plug(Place::Memory(ADDR)).expect("plugging it in");
    let state = device.save().expect("its state");
    let maps: Vec<_> = state.maps.keys().collect();
    assert_got!(maps, ["mapped"], "maps of the state");
    drop(device);

    let restored = || builder().state(&state).expect("the state");
    // The other one is no state.
    assert_missing(restored().plug(Place::Memory(ADDR)), "longs");
    let given = restored().param("longs", [4]).expect("a value");
    let device = given.plug(Place::Memory(ADDR)).expect("plugging it in");
    assert_got!(param(&mut vcpu, 4), [1, 2, 3], "those of the state");
    assert_got!(param(&mut vcpu, 3), [4, 0, 0]);
    drop(device);

    // What comes last counts.
    let given = restored().param("longs", [4]).expect("a value");
    let given = given.param("mapped", [9]).expect("a value");
    let device = given.plug(Place::Memory(ADDR)).expect("plugging it in");
    assert_got!(param(&mut vcpu, 4), [9, 0, 0], "those of the VMM");
    drop(device);
    let given = builder().param("mapped", [9]).expect("a value");
    let given = given.param("longs", [4]).expect("a value");
    let given = given.state(&state).expect("the state");
    let _device = given.plug(Place::Memory(ADDR)).expect("plugging it in");
    assert_got!(param(&mut vcpu, 4), [1, 2, 3], "those of the state");
}

/// What the manager has given, the VMM need not, and mostly cannot. One that it can map it can give.
fn parameters_go_over() {
    let manager = |stream: UnixStream| {
        for longs in [false, true] {
            let programs = loaded(test_image("params"));
            if longs {
                programs.param("longs", [5, 6]).expect("values");
            }
            programs.send(&stream).expect("the programs sent");
        }
    };
    between(manager, |stream, kvm| {
        let guest = Guest::on(kvm);
        let mut vcpu = guest.vcpu(0);
        without_bpf();
        let without = builder_of(&guest, received(&stream));
        let without = without.param("mapped", [7]).expect("a value in memory");
        assert_missing(without.plug(Place::Memory(ADDR)), "longs");
        let programs = received(&stream);
        programs.param("mapped", [7]).expect("a value in memory");
        let _device = plugged(&guest, programs);
        assert_got!(param(&mut vcpu, 3), [5, 6, 0]);
        assert_got!(param(&mut vcpu, 4), [7, 0, 0]);
    });
    let pins = Pins::new();
    let programs = loaded(test_image("params"));
    programs.param("longs", [8]).expect("a value");
    programs.pin(&pins.0).expect("the pins");
    let again = Programs::from_pinned(&pins.0).expect("the programs");
    let guest = Guest::new();
    assert_missing(
        builder_of(&guest, again).plug(Place::Memory(ADDR)),
        "mapped",
    );
}

/// A map that goes on has its values; what is new has to be given before the swap.
fn parameters_of_a_replacement() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let given = builder_of(&guest, loaded(test_image("params")));
    let given = given.param("longs", [1]).expect("values");
    let given = given.param("mapped", [2]).expect("values");
    let mut device = given.plug(Place::Memory(ADDR)).expect("plugging it in");
    device
        .replace(test_image("params"), OnLoss::Refuse, unpaused)
        .expect("the same again");
    let load = |device: &ImageDevice| {
        let loaded = device.load(test_image("params_v2"), OnLoss::Refuse);
        loaded.expect("a new file")
    };
    let new = load(&device);
    let swapped = device.swap(new, OnLoss::Refuse, unpaused);
    assert_missing(swapped.map(|_| unreachable!("a swap")), "added");
    let added = |vcpu: &mut Vcpu| vcpu.read(ADDR + 0x500, 8).value;
    assert_got!(added(&mut vcpu), u64::MAX, "the old programs' answer");
    let new = load(&device);
    new.param("added", [11]).expect("a value");
    device
        .swap(new, OnLoss::Refuse, unpaused)
        .expect("the new programs");
    assert_got!(added(&mut vcpu), 11);
    assert_got!(param(&mut vcpu, 3), [1, 0, 0]);
    assert_got!(param(&mut vcpu, 4), [2, 0, 0]);
}

/// Takes `/proc` away from a process.
fn unmount_proc() {
    // SAFETY: the process has one thread, and the strings end in NUL.
    let results = unsafe {
        [
            libc::unshare(libc::CLONE_NEWNS),
            libc::mount(
                std::ptr::null(),
                c"/".as_ptr(),
                std::ptr::null(),
                libc::MS_REC | libc::MS_PRIVATE,
                std::ptr::null(),
            ),
            libc::umount2(c"/proc".as_ptr(), libc::MNT_DETACH),
        ]
    };
    assert_got!(results, [0; 3], "/proc unmounted: {:?}", Errno::last());
    assert!(!Path::new("/proc/self").exists(), "/proc is there still");
}

/// Sends programs with the description and the file descriptors that `change` makes of theirs.
fn send_changed(
    stream: &UnixStream,
    programs: &Programs,
    change: impl FnOnce(&str, &mut [RawFd]) -> String,
) {
    let (one, other) = UnixStream::pair().expect("socketpair");
    programs.send(&one).expect("the programs sent");
    drop(one);
    let mut bytes = vec![0; 0x1_0000];
    let mut fds = [-1; 64];
    let mut parts = [libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: 16,
    }];
    // SAFETY: the buffer has the room that is said.
    let received = unsafe { other.recv_with_fds(&mut parts, &mut fds) };
    let (len, count) = received.expect("the header");
    assert_got!(len, 16, "bytes of a header");
    let mut json = String::new();
    (&other).read_to_string(&mut json).expect("a description");
    let before = fds;
    let changed = change(&json, &mut fds[..count]);
    assert!(
        changed != json || fds != before,
        "nothing has changed: {json}"
    );
    bytes.truncate(12);
    bytes.extend((changed.len() as u32).to_le_bytes());
    let fds = &fds[..count];
    stream.send_with_fds(&[&bytes[..]], fds).expect("a header");
    (&*stream)
        .write_all(changed.as_bytes())
        .expect("a description");
}

/// Without `/proc` no map is taken, but by who may ask with bpf(2).
fn without_proc() {
    // A value that is larger than described would be copied behind the memory that is for it.
    let smaller = |json: &str, _: &mut [RawFd]| {
        let at = json.find(r#""name":"longs""#).expect("the map");
        let (before, map) = json.split_at(at);
        format!(
            "{before}{}",
            map.replacen(r#""value_size":8"#, r#""value_size":4"#, 1)
        )
    };
    let manager = |stream: UnixStream| {
        let good = loaded(test_image("params"));
        good.param("longs", [5]).expect("a value");
        for _ in 0..2 {
            good.send(&stream).expect("the programs sent");
        }
        // Any length of a vCPU's memory can be mapped, and behind its pages is a SIGBUS.
        let guest = Guest::new();
        let vcpu = guest.vm().create_vcpu(0).expect("KVM_CREATE_VCPU");
        let not_maps = |json: &str, fds: &mut [RawFd]| {
            let maps = fds.len() - good.maps().count();
            fds[maps..].fill(vcpu.as_raw_fd());
            json.to_string()
        };
        send_changed(&stream, &good, not_maps);
        for _ in 0..2 {
            send_changed(&stream, &loaded(test_image("params")), smaller);
        }
    };
    let assert_unconfirmed = |result: Result<Programs, _>, wanted| match result {
        Err(transfer::Error::Unconfirmed { source, .. }) => assert_got!(source.kind(), wanted),
        other => panic!("wanted Unconfirmed, got {other:?}"),
    };
    let assert_other_sizes = |result| match result {
        Err(transfer::Error::Map { name, why }) => {
            assert_got!(name, "longs");
            assert!(why.contains("described as"), "{why}");
        }
        other => panic!("wanted an error of the map, got {other:?}"),
    };
    let vmm = |stream: UnixStream, kvm: Kvm| {
        let guest = Guest::on(kvm);
        let mut vcpu = guest.vcpu(0);
        let none = Programs::recv(&stream);
        assert_unconfirmed(none, std::io::ErrorKind::NotFound);
        let programs = Programs::recv_with_bpf(&stream).expect("the programs");
        programs.param("mapped", [7]).expect("a value");
        let error = programs.stats().expect_err("counts");
        assert_got!(error.kind(), std::io::ErrorKind::NotFound);
        let text = error.to_string();
        assert!(text.starts_with("/proc/self/fdinfo/"), "{text}");
        let value = programs.map("longs").expect("the map").lookup(&[0; 4]);
        assert_got!(value.expect("a value"), Some(5_u64.to_ne_bytes().to_vec()));
        let device = plugged(&guest, programs);
        assert_got!(param(&mut vcpu, 3), [5, 0, 0]);
        assert_got!(param(&mut vcpu, 4), [7, 0, 0]);
        device.save().expect("its state");

        let not_maps = Programs::recv_with_bpf(&stream);
        assert_unconfirmed(not_maps, std::io::ErrorKind::InvalidInput);
        assert_other_sizes(Programs::recv_with_bpf(&stream));
    };
    // Without rights it cannot unmount: so before it gives them up.
    let (ours, theirs) = UnixStream::pair().expect("socketpair");
    for end in [&ours, &theirs] {
        end.set_read_timeout(Some(LIMIT)).expect("a limit");
    }
    let kvm = Kvm::new().expect("open /dev/kvm");
    let (checked, checks) = (theirs.try_clone().expect("dup"), ours);
    let statuses = thread::scope(|scope| {
        let manager = scope.spawn(|| status_of_a_process(|| manager(checks)));
        let vmm = scope.spawn(|| {
            status_of_a_process(|| {
                unmount_proc();
                become_nobody();
                vmm(theirs, kvm);
            })
        });
        (
            manager.join().expect("the manager"),
            vmm.join().expect("the VMM"),
        )
    });
    assert_got!(statuses, (0, 0), "the manager's and the VMM's status");
    // With `/proc`, the second of them is refused likewise.
    assert_other_sizes(Programs::recv(&checked));
}
