// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Kernel functions for cpufreq and the scheduler: answers, bad arguments, and
//! where they may not be called.

use std::fs;

use Reg::{R0, R1, R2, R6, R7};
use kvm_bpf::MmioDevice;
use kvm_bpf_selftests::bpf::{
    Index, Insn, LoadOptions, Map, Prog, ProgType, Reg, call_kfunc, kfunc, load, lookup, mov,
    mov_signed32, store,
};
use kvm_bpf_selftests::device::{Device, region};
use kvm_bpf_selftests::guest::{Guest, Vcpu};
use kvm_bpf_selftests::harness::{in_a_thread, skip, wait_for};
use kvm_bpf_selftests::programs::{CTX_BUF, ret, test_image};
use kvm_bpf_vmm::userspace::uclamp::{self, SchedAttr};

use super::{ADDR, SIZE};

tests!(
    frequency,
    highest_frequency,
    scale,
    bad_cpus,
    uclamp_takes_effect,
    uclamp_bad_arguments,
    uclamp_needs_a_sleepable_program,
    uclamp_not_from_a_timer,
    uclamp_not_from_a_work_queue,
);

const FREQ: &str = "bpf_get_cpu_freq";
const MAX_HW_FREQ: &str = "bpf_get_cpu_max_hw_freq";
const SCALE: &str = "bpf_get_cpu_scale";
const UCLAMP: &str = "bpf_set_current_uclamp";

const EINVAL: i64 = -(libc::EINVAL as i64);

/// BTF id of a kfunc that the series promises.
#[track_caller]
pub(super) fn required(name: &str) -> i32 {
    kfunc(name).unwrap_or_else(|| panic!("wanted {name} in the kernel's BTF, got nothing"))
}

/// A guest whose writes call a kfunc with the two halves of what they write.
struct Setup {
    vcpu: Vcpu,
    _device: Device,
    answer: Map,
}

impl Setup {
    fn new(name: &str) -> Self {
        let guest = Guest::new();
        let answer = Map::new(1, 1);
        let write = Prog::load_sleepable(ProgType::WRITE, &call_insns(name, &answer));
        let device = Device::new(guest.vm());
        device.set_region(0, &region(ADDR, SIZE, None, Some(&write)));
        Setup {
            vcpu: guest.vcpu(0),
            _device: device,
            answer,
        }
    }

    fn call(&mut self, first: u32, second: u32) -> i64 {
        let value = u64::from(second) << 32 | u64::from(first);
        assert_got!(self.vcpu.write(ADDR, 8, value), []);
        self.answer.get(0)[0] as i64
    }
}

fn call_insns(name: &str, answer: &Map) -> Vec<Insn> {
    let mut insns = vec![
        mov(R6, R1),
        load(4, R1, R6, CTX_BUF),
        load(4, R2, R6, CTX_BUF + 4),
        call_kfunc(required(name)),
        // Enough for an `int`, and for any frequency in kHz.
        mov_signed32(R7, R0),
    ];
    insns.extend(lookup(answer, Index::Imm(0)));
    insns.push(store(8, R0, 0, R7));
    insns.extend(ret(0));
    insns
}

fn number_in(path: &str) -> Option<i64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn cpu_file(file: &str) -> Option<i64> {
    number_in(&format!("/sys/devices/system/cpu/cpu0/{file}"))
}

fn frequency() {
    let got = Setup::new(FREQ).call(0, 0);
    match cpu_file("cpufreq/scaling_cur_freq") {
        // It may change between the two looks.
        Some(_) => assert!(got > 0, "{FREQ}(0): wanted a frequency, got {got}"),
        None => assert_got!(got, 0, "{FREQ}(0) without a cpufreq driver"),
    }
}

fn highest_frequency() {
    let got = Setup::new(MAX_HW_FREQ).call(0, 0);
    let wanted = cpu_file("cpufreq/cpuinfo_max_freq").unwrap_or(0);
    assert_got!(got, wanted, "{MAX_HW_FREQ}(0)");
}

fn scale() {
    let got = Setup::new(SCALE).call(0, 0);
    assert!(
        (1..=1024).contains(&got),
        "{SCALE}(0): wanted 1 to 1024, got {got}"
    );
    let wanted = cpu_file("cpu_capacity").unwrap_or(1024);
    assert_got!(got, wanted, "{SCALE}(0)");
}

fn bad_cpus() {
    let possible = fs::read_to_string("/sys/devices/system/cpu/possible").expect("possible CPUs");
    let last: u32 = possible
        .trim()
        .rsplit(['-', ','])
        .next()
        .and_then(|last| last.parse().ok())
        .unwrap_or_else(|| panic!("wanted a list of CPUs, got {possible:?}"));
    for name in [FREQ, MAX_HW_FREQ, SCALE] {
        let mut setup = Setup::new(name);
        assert!(setup.call(last, 0) >= 0, "{name} of the last possible CPU");
        for cpu in [last + 1, 8191, 1 << 16, 1 << 31, u32::MAX] {
            assert_got!(setup.call(cpu, 0), EINVAL, "{name}({cpu})");
        }
    }
}

/// The calling thread's scheduling attributes; it is the vCPU's in these tests.
fn sched_attr() -> SchedAttr {
    uclamp::sched_attr(0).expect("sched_getattr")
}

fn uclamp_takes_effect() {
    // On a thread of its own: the clamps stay with the thread.
    in_a_thread(|| {
        let before = sched_attr();
        let mut setup = Setup::new(UCLAMP);
        for (min, max) in [(100, 900), (0, 1024), (512, 512), (0, 0), (1024, 1024)] {
            assert_got!(setup.call(min, max), 0, "{UCLAMP}({min}, {max})");
            let wanted = SchedAttr {
                util_min: min,
                util_max: max,
                flags: sched_attr().flags,
                ..before
            };
            assert_got!(sched_attr(), wanted, "after {UCLAMP}({min}, {max})");
        }
    });
}

fn uclamp_bad_arguments() {
    in_a_thread(|| {
        let mut setup = Setup::new(UCLAMP);
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
    let answer = Map::new(1, 1);
    let insns = call_insns(UCLAMP, &answer);
    match Prog::try_load(ProgType::WRITE, &insns, LoadOptions::default()) {
        Ok(_) => panic!("{UCLAMP} in a non-sleepable program: wanted a refusal"),
        Err(refused) => assert!(
            refused.log.contains("sleepable"),
            "wanted the verifier to say that it must be sleepable, got {refused}"
        ),
    }
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
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let device = match MmioDevice::new(guest.vm(), ADDR, test_image("uclamp_wq")) {
        Ok(device) => device,
        Err(error) if format!("{error:?}").contains("bpf_wq") => {
            skip(format!("this kernel has no bpf_wq: {error}"))
        }
        Err(error) => panic!("wanted the device to load, got {error:#?}"),
    };
    let answer = || {
        let map = device.image().map("answer").expect("the program's map");
        let value = libbpf_rs::MapCore::lookup(&map, &[0; 4], libbpf_rs::MapFlags::ANY)
            .expect("BPF_MAP_LOOKUP_ELEM")
            .expect("element 0");
        i64::from_ne_bytes(value[..8].try_into().expect("8 bytes"))
    };
    assert_got!(vcpu.write(ADDR, 4, 1), []);
    wait_for("the callback to run", true, || answer() != 1);
    let answer = answer();
    assert!(
        answer < 0,
        "{UCLAMP} in a kernel thread: wanted an errno, got {answer}"
    );
}
