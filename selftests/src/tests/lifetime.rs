// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What is freed, when: devices closed under load, references, the module.

use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::{env, io, thread};

use kvm_bpf::Programs;
use kvm_bpf::uapi::{KVM_BPF_MEM_READ, KVM_DEV_TYPE_BPF, kvm_bpf_user_mem, kvm_bpf_user_region};
use kvm_bpf_selftests::bpf::{Census, LOADERS, Map, Prog, ProgType};
use kvm_bpf_selftests::device::{Answer, Device, NO_REGION, region, test_create};
use kvm_bpf_selftests::guest::{Args, Guest, Routine, Vcpu, vms};
use kvm_bpf_selftests::harness::{Errno, Victim, meanwhile, number_from_env, skip, wait_for};
use kvm_bpf_selftests::programs::{Recorder, ret, slow_insns, test_image};
use vmm_sys_util::eventfd::EventFd;

use super::{ADDR, SIZE, assert_errno, element};

tests!(
    close_while_vcpus_run,
    close_while_vcpus_are_inside,
    unregister_while_vcpus_run,
    unregister_while_vcpus_are_inside,
    swap_while_vcpus_are_inside,
    vm_closed_under_running_vcpus,
    killed_process,
    references_are_given_back,
    closing_waits_once,
    getting_does_not_wait,
    region_holds_programs,
    module_is_held_by_devices,
    module_unloads_and_loads,
);

/// Rounds in which a program is most of the time that a vCPU takes for an access.
const LONG: i32 = 50;

/// Accesses of all vCPUs that are counted, and how many of them user space saw.
struct Accesses {
    all: AtomicU64,
    exits: AtomicU64,
    /// The most that are made, but not counted.
    under_way: u64,
}

impl Accesses {
    /// Waits for so many more that begin after this.
    #[track_caller]
    fn wait_for_more(&self, more: u64) {
        let enough = self.all.load(SeqCst) + self.under_way + more;
        wait_for("more accesses", true, || self.all.load(SeqCst) >= enough);
    }
}

/// Lets vCPUs write while `action` lasts, in batches, so that the guest does little else.
fn while_vcpus_write(
    vcpus: impl IntoIterator<Item = Vcpu>,
    action: impl FnOnce(&Accesses),
) -> Accesses {
    let batch = Args {
        addr: ADDR,
        count: 10,
        ..Default::default()
    };
    let vcpus: Vec<_> = vcpus.into_iter().collect();
    let accesses = Accesses {
        all: AtomicU64::new(0),
        exits: AtomicU64::new(0),
        under_way: batch.count * vcpus.len() as u64,
    };
    let workers = vcpus.into_iter().map(|mut vcpu| {
        let accesses = &accesses;
        move || {
            let (_, exits) = vcpu.call(Routine::WriteLoop, batch);
            accesses.exits.fetch_add(exits.len() as u64, SeqCst);
            accesses.all.fetch_add(batch.count, SeqCst);
        }
    });
    meanwhile(workers, || action(&accesses));
    accesses
}

/// What takes a program away.
#[derive(Clone, Copy, Debug)]
enum End {
    Close,
    Unregister,
    Swap,
}

/// When the call that takes a program away returns, no vCPU is inside it, and none enters it any
/// more; each access runs one program once or reaches user space.
#[track_caller]
fn end_under_load(end: End, rounds: i32) {
    const REPETITIONS: u32 = 3;

    for load in LOADERS {
        let census = Census::now();
        let guest = Guest::new();
        let mut runs = 0;
        let accesses = while_vcpus_write((0..2).map(|id| guest.vcpu(id)), |accesses| {
            for repetition in 0..REPETITIONS {
                let (before, after) = (Map::new(1, 2), Map::new(1, 2));
                let mut device = Some(Device::new(guest.vm()));
                let set = |device: &Option<Device>, region: &kvm_bpf_user_region| {
                    device.as_ref().expect("not closed").set_region(0, region);
                };
                let set_program = |device: &Option<Device>, counts: &Map| {
                    let prog = load(ProgType::WRITE, &slow_insns(counts, rounds));
                    set(device, &region(ADDR, SIZE, None, Some(&prog)));
                };
                set_program(&device, &before);
                accesses.wait_for_more(10);

                match end {
                    End::Close => device = None,
                    End::Unregister => set(&device, &NO_REGION),
                    End::Swap => set_program(&device, &after),
                }
                let at_end = before.get(0);
                assert!(at_end[0] > 0, "wanted the program to have run, got 0 runs");
                assert_got!(
                    at_end[1],
                    at_end[0],
                    "runs that ended, {end:?} {repetition}"
                );
                accesses.wait_for_more(10);
                assert_got!(before.get(0), at_end, "runs, {end:?} {repetition}");

                drop(device);
                runs += at_end[0] + after.get(0)[0];
            }
        });
        let exits = accesses.exits.into_inner();
        assert_got!(runs + exits, accesses.all.into_inner(), "runs and exits");
        census.wait_for_newer(0, 0);
    }
}

fn close_while_vcpus_run() {
    end_under_load(End::Close, 1);
}

/// The program takes most of a vCPU's time, so the close finds it at work.
fn close_while_vcpus_are_inside() {
    end_under_load(End::Close, LONG);
}

fn unregister_while_vcpus_run() {
    end_under_load(End::Unregister, 1);
}

fn unregister_while_vcpus_are_inside() {
    end_under_load(End::Unregister, LONG);
}

fn swap_while_vcpus_are_inside() {
    end_under_load(End::Swap, LONG);
}

/// vCPUs and a device keep the VM when its own fd is closed.
fn vm_closed_under_running_vcpus() {
    let census = Census::now();
    let vms = vms();
    let guest = Guest::new();
    let recorder = Recorder::new();
    let device = Device::new(guest.vm());
    device.set_region(0, &region(ADDR, SIZE, None, Some(&recorder.writes(0))));
    let vcpus: Vec<_> = (0..2).map(|id| guest.vcpu(id)).collect();
    let accesses = while_vcpus_write(vcpus, |accesses| {
        accesses.wait_for_more(10);
        drop(guest);
        accesses.wait_for_more(100);
    });
    assert_got!(accesses.exits.into_inner(), 0, "exits");
    assert_got!(
        recorder.count(),
        accesses.all.into_inner(),
        "writes that the program saw"
    );
    drop((device, recorder));
    census.wait_for_newer(0, 0);
    wait_for("virtual machines", vms, self::vms);
}

/// A process with devices, regions, vCPUs inside programs and a swap under way is killed.
fn killed_process() {
    let (census, vms) = (Census::now(), vms());
    let victim = Victim::new("swap::hot_swap", "KVM_BPF_SWAPS", "1000000000");
    // Both pairs and their maps are there when the swaps begin; every fifteenth has new ones.
    wait_for("programs and maps of the process", true, || {
        let (programs, maps) = census.newer();
        programs >= 5 && maps >= 2
    });
    victim.kill();
    census.wait_for_newer(0, 0);
    wait_for("virtual machines", vms, self::vms);
}

fn references_are_given_back() {
    let (census, vms) = (Census::now(), vms());
    for _ in 0..10 {
        let guest = Guest::new();
        let mut vcpu = guest.vcpu(0);
        let device = Device::new(guest.vm());
        let recorder = Recorder::new();
        for index in 0..8 {
            // Set, swapped, swapped back, and left to the close.
            for round in 0..3 {
                let (read, write) = (recorder.reads(round, 0), recorder.writes(0));
                let addr = ADDR + index * SIZE;
                device.set_region(index, &region(addr, SIZE, Some(&read), Some(&write)));
                assert_got!(vcpu.read(addr, 8).value, round);
            }
        }
    }
    census.wait_for_newer(0, 0);
    wait_for("virtual machines", vms, self::vms);
}

/// Calls of a function of the kernel while this lives, counted by a kprobe.
pub(super) struct Calls;

impl Calls {
    const EVENTS: &str = "/sys/kernel/tracing/kprobe_events";
    const NAME: &str = "kvm_bpf_test";

    pub(super) fn of(function: &str) -> Self {
        let event = format!("p:{0}/{0} {function}\n", Self::NAME);
        fs::write(Self::EVENTS, event).expect("a kprobe");
        let enable = format!("/sys/kernel/tracing/events/{0}/{0}/enable", Self::NAME);
        fs::write(enable, "1").expect("enabling a kprobe");
        Calls
    }

    pub(super) fn count(&self) -> u64 {
        let profile = fs::read_to_string("/sys/kernel/tracing/kprobe_profile").expect("profile");
        let mut words = profile
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>())
            .find(|words| words.first() == Some(&Self::NAME))
            .expect("the kprobe's line")
            .into_iter();
        words
            .nth(1)
            .and_then(|hits| hits.parse().ok())
            .expect("hits")
    }
}

impl Drop for Calls {
    fn drop(&mut self) {
        let enable = format!("/sys/kernel/tracing/events/{0}/{0}/enable", Self::NAME);
        let _ = fs::write(enable, "0");
        let _ = fs::write(Self::EVENTS, format!("-:{0}/{0}\n", Self::NAME));
    }
}

/// One grace period for all regions of a device, as for one of them.
fn closing_waits_once() {
    const REGIONS: u64 = 200;

    let guest = Guest::new();
    let prog = Prog::load(ProgType::READ, &ret(0));
    let waits = Calls::of("synchronize_srcu_expedited");
    let count = |regions| {
        let device = Device::new(guest.vm());
        for index in 0..regions {
            let range = region(ADDR + 16 * index, 16, Some(&prog), None);
            device.set_region(index, &range);
        }
        let before = waits.count();
        drop(device);
        waits.count() - before
    };
    assert_got!([0, 1, REGIONS].map(count), [0, 1, 1], "waits for readers");
}

/// A program that waits for the test to open a gate.
struct Gate(Programs);

impl Gate {
    /// Its two words.
    fn words(&self) -> [u32; 2] {
        let value = element(&self.0, "gate");
        let word = |at: usize| u32::from_ne_bytes(value[at..at + 4].try_into().expect("4 bytes"));
        [word(0), word(4)]
    }

    fn open(&self) {
        let map = self.0.map("gate").expect("the program's map");
        let value = [0_u32, 1].map(u32::to_ne_bytes).concat();
        map.update(&[0; 4], &value).expect("BPF_MAP_UPDATE_ELEM");
    }
}

/// While a program runs on and on, calls wait for it that have to. No other call does.
fn getting_does_not_wait() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let device = Device::new(guest.vm());
    let gate = Gate(test_image("gate").load().expect("the gate to load"));
    let prog = Prog::load(ProgType::READ, &ret(0));
    let slow = kvm_bpf_user_region {
        bpf_readfd: gate.0.read_program().expect("its program").as_raw_fd(),
        ..region(ADDR, SIZE, None, None)
    };
    let fast = |index: u64| region(ADDR + index * SIZE, SIZE, Some(&prog), None);
    let window = kvm_bpf_user_mem {
        addr: 0,
        size: SIZE,
        flags: KVM_BPF_MEM_READ,
        pad: 0,
    };
    let waits = Calls::of("synchronize_srcu_expedited");
    device.set_mem(0, &window);
    device.set_mem(1, &window);
    device.set_region(0, &slow);
    device.set_region(1, &fast(1));
    device.set_region(2, &fast(2));

    thread::scope(|scope| {
        let access = scope.spawn(|| vcpu.read(ADDR, 8).exits);
        wait_for("an access inside", 1, || gate.words()[0]);
        let before = waits.count();
        let replace = scope.spawn(|| device.set_region(0, &fast(0)));
        let remove = scope.spawn(|| device.set_region(1, &NO_REGION));
        let close = scope.spawn(|| device.set_mem(0, &kvm_bpf_user_mem::default()));
        wait_for("calls that wait", before + 3, || waits.count());
        // The range is free before the wait.
        assert_got!(device.region(1).map(drop), Err(Errno(libc::ENOENT)));
        device.set_region(3, &fast(1));
        assert_got!(device.region(0).map(|region| region.addr), Ok(ADDR));
        assert_got!(device.region(3).map(|region| region.addr), Ok(ADDR + SIZE));
        assert_got!(device.mem(0).map(drop), Err(Errno(libc::ENOENT)));
        assert_got!(device.mem(1), Ok(window));
        assert_got!(device.info(0).map(|info| info.addr), Ok(ADDR));
        assert_got!(device.perms().require, 0);
        device.set_irq(0, EventFd::new(0).expect("eventfd").as_raw_fd());

        let calls = [replace, remove, close];
        let waiting = calls.each_ref().map(|call| !call.is_finished());
        assert_got!(gate.words()[0], 1, "accesses inside");
        assert_got!(waiting, [true; 3], "calls that wait");
        gate.open();
        for call in calls {
            call.join().expect("a call that waits");
        }
        assert_got!(access.join().expect("the access"), []);
    });
}

/// A region is all that a program needs to live; the VMM may close its fds.
fn region_holds_programs() {
    let census = Census::now();
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let device = Device::new(guest.vm());
    {
        let recorder = Recorder::new();
        let (read, write) = (recorder.reads(7, 0), recorder.writes(0));
        device.set_region(0, &region(ADDR, SIZE, Some(&read), Some(&write)));
    }
    for _ in 0..20 {
        assert_got!(vcpu.read(ADDR, 4).value, 7);
        assert_got!(vcpu.write(ADDR, 4, 1), []);
        assert_got!(census.newer(), (2, 1), "programs and maps");
    }
    device.set_region(0, &NO_REGION);
    census.wait_for_newer(0, 0);
}

const MODULE: &str = "/sys/module/kvm_bpf";

/// References to the module, as the kernel counts them.
fn module_references() -> u64 {
    match fs::read_to_string(format!("{MODULE}/refcnt")) {
        Ok(text) => text.trim().parse().expect("a number in refcnt"),
        Err(_) => skip("kvm_bpf is built into this kernel"),
    }
}

fn delete_module() -> Answer {
    // SAFETY: the name is a C string.
    let result = unsafe {
        libc::syscall(
            libc::SYS_delete_module,
            c"kvm_bpf".as_ptr(),
            libc::O_NONBLOCK,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(Errno::last()),
    }
}

fn module_is_held_by_devices() {
    let before = module_references();
    let guest = Guest::new();
    for _ in 0..3 {
        let first = Device::new(guest.vm());
        let second = Device::new(guest.vm());
        assert_got!(module_references(), before + 2, "with two devices");
        assert_errno("unloading with two devices", delete_module(), libc::EAGAIN);
        drop(first);
        assert_errno("unloading with one device", delete_module(), libc::EAGAIN);
        drop(second);
        assert_got!(module_references(), before, "references after closing");
    }
    assert!(Path::new(MODULE).exists(), "wanted {MODULE}, got nothing");
}

/// The time in which the module is not loaded; it is again when this is dropped.
pub(super) struct Unloaded {
    path: String,
    file: File,
}

impl Unloaded {
    /// Unloads the module, which no device may hold.
    ///
    /// `KVM_BPF_MODULE` names the file to load again.
    #[track_caller]
    pub(super) fn new() -> Self {
        module_references();
        let Ok(path) = env::var("KVM_BPF_MODULE") else {
            skip("KVM_BPF_MODULE does not name kvm_bpf.ko");
        };
        let file = File::open(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        assert_got!(delete_module(), Ok(()), "unloading without a device");
        Unloaded { path, file }
    }
}

impl Drop for Unloaded {
    fn drop(&mut self) {
        let no_arguments = CString::default();
        // SAFETY: the fd is open, the string a C string.
        let result = unsafe {
            libc::syscall(
                libc::SYS_finit_module,
                self.file.as_raw_fd(),
                no_arguments.as_ptr(),
                0,
            )
        };
        // In a test that fails already, the next one will say so.
        assert!(
            result == 0 || thread::panicking(),
            "{}: {}",
            self.path,
            io::Error::last_os_error()
        );
    }
}

fn module_unloads_and_loads() {
    let guest = Guest::new();
    for _ in 0..number_from_env("KVM_BPF_MODULE_LOADS", 3) {
        let unloaded = Unloaded::new();
        let answer = test_create(guest.vm(), KVM_DEV_TYPE_BPF);
        assert_errno(
            "KVM_CREATE_DEVICE_TEST without the module",
            answer,
            libc::ENODEV,
        );
        drop(unloaded);
        drop(Device::new(guest.vm()));
    }
}
