// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Kernel functions for cpufreq and the scheduler: results, bad arguments, and
//! where they may not be called.

use std::fs;

use Reg::{R0, R1, R2, R6};
use kvm_bpf::ImageDevice;
use kvm_bpf_selftests::bpf::{
    Index, Insn, LOADERS, Load, LoadOptions, Map, Prog, ProgType, Reg, call_kfunc, kfunc, load,
    lookup, mov, mov_signed32, store,
};
use kvm_bpf_selftests::device::{Device, region};
use kvm_bpf_selftests::guest::{Guest, Vcpu};
use kvm_bpf_selftests::harness::{in_a_thread, skip, stay_on, wait_for};
use kvm_bpf_selftests::programs::{plug, ret, test_image};
use kvm_bpf_vmm::userspace::uclamp::{self, SchedAttr};

use super::lifetime::Calls;
use super::{ADDR, SIZE, assert_refused, element};

tests!(
    frequency,
    no_frequency_of_other_cpus,
    highest_frequency,
    scale,
    bad_cpus,
    frequencies_in_a_timer,
    uclamp_takes_effect,
    uclamp_not_of_a_deadline_task,
    uclamp_bad_arguments,
    uclamp_needs_a_sleepable_program,
    clamping_is_on_before_programs_are,
    uclamp_not_from_a_timer,
    uclamp_not_from_a_work_queue,
    no_task_for_task_work,
);

const FREQ: &str = "bpf_get_cpu_freq";
const MAX_HW_FREQ: &str = "bpf_get_cpu_max_hw_freq";
const SCALE: &str = "bpf_get_cpu_scale";
const UCLAMP: &str = "bpf_set_current_uclamp";

const EINVAL: i64 = -(libc::EINVAL as i64);
const EPERM: i64 = -(libc::EPERM as i64);
/// What `freq_timer.bpf.c` takes for the CPU that the timer runs on.
const THIS_CPU: u32 = u32::MAX - 1;

/// BTF id of a kfunc that the series promises.
#[track_caller]
pub(super) fn required(name: &str) -> i32 {
    kfunc(name).unwrap_or_else(|| panic!("wanted {name} in the kernel's BTF, got nothing"))
}

/// A guest whose accesses call a kfunc.
struct Setup {
    vcpu: Vcpu,
    _device: Device,
    kind: ProgType,
    /// What the kfunc returned, and its arguments.
    map: Map,
}

impl Setup {
    fn new(name: &str, kind: ProgType, load_prog: Load) -> Self {
        let guest = Guest::new();
        let map = Map::new(1, 3);
        let prog = load_prog(kind, &call_insns(name, &map));
        let device = Device::new(guest.vm());
        let (read, write) = match kind {
            ProgType::READ => (Some(&prog), None),
            _ => (None, Some(&prog)),
        };
        device.set_region(0, &region(ADDR, SIZE, read, write));
        Setup {
            vcpu: guest.vcpu(0),
            _device: device,
            kind,
            map,
        }
    }

    /// One that may call the kfunc that sleeps.
    fn uclamp() -> Self {
        Self::new(UCLAMP, ProgType::WRITE, Prog::load_sleepable)
    }

    fn call(&mut self, first: u32, second: u32) -> i64 {
        self.map.set(0, &[0x5555, first.into(), second.into()]);
        let exits = match self.kind {
            ProgType::READ => self.vcpu.read(ADDR, 8).exits,
            _ => self.vcpu.write(ADDR, 8, 0),
        };
        assert_got!(exits, []);
        self.map.get(0)[0] as i64
    }
}

/// Programs of both types, of the sort that may sleep and the other, that call a kfunc.
fn each_sort(name: &str, test: impl Fn(&mut Setup)) {
    for kind in [ProgType::READ, ProgType::WRITE] {
        for load_prog in LOADERS {
            test(&mut Setup::new(name, kind, load_prog));
        }
    }
}

fn call_insns(name: &str, map: &Map) -> Vec<Insn> {
    let mut insns = lookup(map, Index::Imm(0));
    insns.extend([
        mov(R6, R0),
        load(8, R1, R6, 8),
        load(8, R2, R6, 16),
        call_kfunc(required(name)),
        // An `int` has no more than 32 bits; the others return all 64.
        match name {
            UCLAMP => mov_signed32(R0, R0),
            _ => mov(R0, R0),
        },
        store(8, R6, 0, R0),
    ]);
    insns.extend(ret(0));
    insns
}

fn number_in(path: &str) -> Option<i64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn cpu_file(file: &str) -> Option<i64> {
    number_in(&format!("/sys/devices/system/cpu/cpu0/{file}"))
}

#[track_caller]
fn assert_frequency(got: i64) {
    match cpu_file("cpufreq/scaling_cur_freq") {
        // It may change between the two looks.
        Some(_) => assert!(got > 0, "{FREQ}(0): wanted a frequency, got {got}"),
        None => assert_got!(got, 0, "{FREQ}(0) without a cpufreq driver"),
    }
}

#[track_caller]
fn assert_highest_frequency(got: i64) {
    let wanted = cpu_file("cpufreq/cpuinfo_max_freq").unwrap_or(0);
    assert_got!(got, wanted, "{MAX_HW_FREQ}(0)");
}

#[track_caller]
fn assert_scale(got: i64) {
    assert!(
        (1..=1024).contains(&got),
        "{SCALE}(0): wanted 1 to 1024, got {got}"
    );
    let wanted = cpu_file("cpu_capacity").unwrap_or(1024);
    assert_got!(got, wanted, "{SCALE}(0)");
}

fn frequency() {
    in_a_thread(|| {
        stay_on(0);
        each_sort(FREQ, |setup| assert_frequency(setup.call(0, 0)));
    });
}

/// It tells what other tenants do.
fn no_frequency_of_other_cpus() {
    let last = last_cpu();
    if last == 0 {
        skip("this host has one CPU");
    }
    in_a_thread(move || {
        stay_on(0);
        each_sort(FREQ, |setup| {
            assert_got!(setup.call(last, 0), EPERM, "{FREQ}({last}) on CPU 0");
        });
    });
}

fn highest_frequency() {
    each_sort(MAX_HW_FREQ, |setup| {
        assert_highest_frequency(setup.call(0, 0))
    });
}

fn scale() {
    each_sort(SCALE, |setup| assert_scale(setup.call(0, 0)));
}

/// The number of the last possible CPU.
fn last_cpu() -> u32 {
    let possible = fs::read_to_string("/sys/devices/system/cpu/possible").expect("possible CPUs");
    possible
        .trim()
        .rsplit(['-', ','])
        .next()
        .and_then(|last| last.parse().ok())
        .unwrap_or_else(|| panic!("wanted a list of CPUs, got {possible:?}"))
}

fn bad_cpus() {
    let last = last_cpu();
    for name in [FREQ, MAX_HW_FREQ, SCALE] {
        each_sort(name, |setup| {
            let answer = setup.call(last, 0);
            let other_cpu = name == FREQ && answer == EPERM;
            assert!(answer >= 0 || other_cpu, "{name}({last}): got {answer}");
            for cpu in [last + 1, 8191, 1 << 16, 1 << 31, u32::MAX] {
                assert_got!(setup.call(cpu, 0), EINVAL, "{name}({cpu})");
            }
        });
    }
}

/// In a softirq, on whatever task it interrupts: they need no more than RCU.
fn frequencies_in_a_timer() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let device = plug(guest.vm(), ADDR, test_image("freq_timer"));
    let mut answers = |cpu: u32| {
        assert_got!(vcpu.write(ADDR, 4, cpu.into()), []);
        wait_for("the timer", 1, || word(&device, "answers", 3));
        [0, 1, 2].map(|index| word(&device, "answers", index))
    };
    let [freq, max, scale] = answers(THIS_CPU);
    assert_frequency(freq);
    assert_highest_frequency(max);
    assert_scale(scale);
    assert_got!(answers(u32::MAX), [EINVAL; 3], "of a CPU that there is not");
}

/// A 64-bit word in element 0 of a device's map.
fn word(device: &ImageDevice, map: &str, index: usize) -> i64 {
    let value = element(device.programs(), map);
    let bytes = value[8 * index..][..8].try_into().expect("8 bytes");
    i64::from_ne_bytes(bytes)
}

/// The calling thread's scheduling attributes; it is the vCPU's in these tests.
fn sched_attr() -> SchedAttr {
    uclamp::sched_attr(0).expect("sched_getattr")
}

/// All else stays as it is, also where it is not what threads start with.
fn uclamp_takes_effect() {
    let usual = SchedAttr::default();
    let cases = [
        usual,
        SchedAttr { nice: 5, ..usual },
        SchedAttr {
            policy: libc::SCHED_BATCH as u32,
            nice: -3,
            // The thread's slice, in ns.
            runtime: 5_000_000,
            ..usual
        },
        SchedAttr {
            policy: libc::SCHED_IDLE as u32,
            ..usual
        },
        SchedAttr {
            policy: libc::SCHED_FIFO as u32,
            priority: 10,
            ..usual
        },
        SchedAttr {
            policy: libc::SCHED_RR as u32,
            priority: 1,
            flags: RESET_ON_FORK,
            ..usual
        },
        SchedAttr {
            nice: 5,
            flags: RESET_ON_FORK,
            ..usual
        },
    ];
    for case in cases {
        with_sched_attr(case, |setup, before| {
            for (min, max) in [(100, 900), (0, 1024), (512, 512), (0, 0), (1024, 1024)] {
                assert_got!(setup.call(min, max), 0, "{UCLAMP}({min}, {max})");
                let wanted = SchedAttr {
                    util_min: min,
                    util_max: max,
                    ..before
                };
                assert_got!(sched_attr(), wanted, "after {UCLAMP}({min}, {max})");
            }
        });
    }
}

fn uclamp_not_of_a_deadline_task() {
    let deadline = SchedAttr {
        policy: libc::SCHED_DEADLINE as u32,
        runtime: 50_000_000,
        deadline: 100_000_000,
        period: 200_000_000,
        ..Default::default()
    };
    with_sched_attr(deadline, |setup, before| {
        for (min, max) in [(100, 900), (0, 1024)] {
            assert_got!(setup.call(min, max), EINVAL, "{UCLAMP}({min}, {max})");
            assert_got!(sched_attr(), before, "after {UCLAMP}({min}, {max})");
        }
    });
}

/// `SCHED_FLAG_RESET_ON_FORK`.
const RESET_ON_FORK: u64 = 1;

/// Gives a vCPU's thread scheduling attributes and hands them to the test as they then are.
///
/// The thread is one of its own, since they stay with it.
fn with_sched_attr(attr: SchedAttr, test: impl FnOnce(&mut Setup, SchedAttr) + Send + 'static) {
    in_a_thread(move || {
        let mut setup = Setup::uclamp();
        // What KVM forks at a vCPU's first run, a deadline task could not.
        assert_got!(setup.call(0, 1024), 0);
        uclamp::set_sched_attr(&attr).unwrap_or_else(|error| panic!("{attr:?}: {error}"));
        let before = sched_attr();
        let asked = |attr: SchedAttr| (attr.policy, attr.nice, attr.priority, attr.flags);
        assert_got!(asked(before), asked(attr), "sched_setattr");
        if attr.runtime != 0 {
            assert_got!(before.runtime, attr.runtime, "sched_setattr");
        }
        test(&mut setup, before);
    });
}

fn uclamp_bad_arguments() {
    in_a_thread(|| {
        let mut setup = Setup::uclamp();
        assert_got!(setup.call(10, 20), 0);
        let before = sched_attr();
        for (min, max) in [
            (20, 10),
            (0, 1025),
            (1025, 1025),
            (u32::MAX, 20),
            (10, u32::MAX),
            (u32::MAX, u32::MAX),
            (1 << 31, 1 << 31),
        ] {
            assert_got!(setup.call(min, max), EINVAL, "{UCLAMP}({min}, {max})");
            assert_got!(sched_attr(), before, "after {UCLAMP}({min}, {max})");
        }
    });
}

fn uclamp_needs_a_sleepable_program() {
    let map = Map::new(1, 3);
    let insns = call_insns(UCLAMP, &map);
    let answer = Prog::try_load(ProgType::WRITE, &insns, LoadOptions::default());
    let what = "in a program that may not sleep";
    assert_refused(what, answer, "program must be sleepable");
}

/// A program must not be the one that switches it on, as that waits for the CPUs. The call that sets
/// the region does, also where it looks as if it were on: another thread may be about to.
fn clamping_is_on_before_programs_are() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let sleeps = Prog::load_sleepable(ProgType::READ, &ret(0));
    let does_not = Prog::load(ProgType::READ, &ret(0));
    let switches = Calls::of("static_key_enable");
    let mut regions = 0;
    let mut count = |prog| {
        let before = switches.count();
        let range = region(ADDR + regions * SIZE, SIZE, Some(prog), None);
        device.set_region(regions, &range);
        regions += 1;
        switches.count() - before
    };
    let counts = [count(&sleeps), count(&sleeps), count(&does_not)];
    assert_got!(counts, [1, 1, 0], "times that it was switched on");
}

fn uclamp_not_from_a_timer() {
    let image = test_image("uclamp_timer");
    match image.load() {
        Ok(_) => panic!("{UCLAMP} in a timer's callback: wanted a refusal"),
        Err(error) => {
            let error = format!("{error:#?}");
            assert!(
                error.contains("sleepable"),
                "wanted the reason, got {error}"
            );
        }
    }
}

/// The verifier lets sleepable kfuncs into work callbacks, which run in a kernel thread.
fn uclamp_not_from_a_work_queue() {
    uclamp_not_from_callback("uclamp_wq", "bpf_wq_init");
}

/// And into task work, which may be any task's: but programs are given no task.
fn no_task_for_task_work() {
    let error = match test_image("uclamp_task_work").load() {
        Ok(_) => panic!("a program that takes its task: wanted a refusal"),
        Err(error) => format!("{error:#?}"),
    };
    assert!(
        error.contains("cannot use helper bpf_get_current_task_btf"),
        "wanted the reason, got {error}"
    );
}

/// A device whose writes schedule a callback with `scheduler`, a kfunc.
fn uclamp_not_from_callback(program: &str, scheduler: &str) {
    if kfunc(scheduler).is_none() {
        skip(format!("this kernel has no {scheduler}"));
    }
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let device = plug(guest.vm(), ADDR, test_image(program));
    let before = sched_attr();
    assert_got!(vcpu.write(ADDR, 4, 1), []);
    let answer = || word(&device, "answer", 0);
    wait_for("the callback to run", true, || answer() != 1);
    assert_got!(answer(), -i64::from(libc::EPERM), "{UCLAMP} in a callback");
    assert_got!(sched_attr(), before, "after {UCLAMP} in a callback");
}
