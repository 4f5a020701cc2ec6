// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The device's thread: whose it is, and what it may use of the CPU.

use std::fs;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use kvm_bpf_selftests::bpf::{Prog, ProgType};
use kvm_bpf_selftests::cgroup::Cgroup;
use kvm_bpf_selftests::device::{Device, work};
use kvm_bpf_selftests::guest::Guest;
use kvm_bpf_selftests::harness::{Victim, in_a_process, in_a_thread, stay_on, wait_for};
use kvm_bpf_selftests::programs::only_return;
use kvm_bpf_vmm::userspace::uclamp;

use super::super::{assert_errno, eventfd};
use super::{Recorder, THREAD, VARIABLE, keep_busy, signal, threads, threads_of};

pub(super) fn thread_is_the_vmms() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let prog = only_return(ProgType::WORK, 0);
    device.set_work(0, &work(Some(&prog), None));
    assert_got!(threads(THREAD).len(), 0, "threads without an eventfd");
    for index in 0..3 {
        device.set_work(index, &work(Some(&prog), Some(&eventfd())));
        assert_got!(threads(THREAD).len(), 1, "threads with an eventfd");
    }
    let thread = threads(THREAD)[0];
    let read = |file: &str, thread: i32| {
        let path = format!("/proc/self/task/{thread}/{file}");
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
    };
    for file in ["cgroup", "limits", "oom_score_adj"] {
        // SAFETY: no arguments.
        let this = unsafe { libc::gettid() };
        assert_got!(read(file, thread), read(file, this), "{file}");
    }
    let second = Device::new(guest.vm());
    second.set_work(0, &work(Some(&prog), Some(&eventfd())));
    assert_got!(threads(THREAD).len(), 2, "threads of two devices");
    drop(second);
    wait_for("threads of one device", vec![thread], || threads(THREAD));
    drop(device);
    wait_for("threads of none", vec![], || threads(THREAD));
}

/// Clamps of the thread that made it are those of a vCPU, say.
pub(super) fn thread_is_not_clamped() {
    in_a_thread(|| {
        let guest = Guest::new();
        let device = Device::new(guest.vm());
        let recorder = Recorder::new();
        let eventfd = eventfd();
        let free = uclamp::of_thread(0).expect("sched_getattr()");
        uclamp::set_current(300, 600).expect("sched_setattr()");
        device.set_work(0, &work(Some(&recorder.prog(Prog::load)), Some(&eventfd)));
        signal(&eventfd, 1);
        wait_for("a run", 1, || recorder.record().runs);
        let thread = threads(THREAD)[0];
        assert_got!(uclamp::of_thread(thread).expect("sched_getattr()"), free);
        assert_got!(uclamp::of_thread(0).expect("sched_getattr()"), (300, 600));
    });
}

/// As one of the process's, which may have no more; without privilege.
pub(super) fn thread_counts() {
    const NOBODY: u32 = 65534;

    let guest = Guest::new();
    let prog = only_return(ProgType::WORK, 0);
    in_a_process(|| {
        // A VM is its creator's, so one of the child's own.
        let guest = Guest::new();
        let device = Device::new(guest.vm());
        let eventfd = eventfd();
        let limit = |threads| {
            let limit = libc::rlimit {
                rlim_cur: threads,
                rlim_max: 1_000,
            };
            // SAFETY: the limit is a local.
            let set = unsafe { libc::setrlimit(libc::RLIMIT_NPROC, &limit) };
            assert_eq!(set, 0, "setrlimit: {}", io::Error::last_os_error());
        };
        limit(1_000);
        // SAFETY: no pointers; this process has a single thread.
        let set = unsafe { libc::setresuid(NOBODY, NOBODY, NOBODY) };
        assert_eq!(set, 0, "setresuid: {}", io::Error::last_os_error());
        limit(1);
        let answer = device.try_set_work(0, &work(Some(&prog), Some(&eventfd)));
        assert_errno("one thread too many", answer, libc::EAGAIN);
        assert_errno("running it", device.run(0, 0), libc::ENOENT);
        limit(1_000);
        device.set_work(0, &work(Some(&prog), Some(&eventfd)));
    });
    drop(guest);
}

/// How long the threads of a cgroup have run, in microseconds.
fn used_by(cgroup: &Cgroup) -> u64 {
    cgroup.number("cpu.stat", "usage_usec")
}

/// The thread of a device goes with its process into a cgroup: what that allows of a CPU holds for
/// it, and it stops when the cgroup does.
pub(super) fn thread_is_in_the_vmms_cgroup() {
    const TEST: &str = "work::thread_is_in_the_vmms_cgroup";

    if let Some(what) = std::env::var_os(VARIABLE) {
        stay_on(0);
        if what == "spin" {
            loop {
                std::hint::spin_loop();
            }
        }
        let guest = Guest::new();
        let device = Device::new(guest.vm());
        keep_busy(&device);
        loop {
            thread::park();
        }
    }
    let cgroups = ["vmm", "other"].map(|name| Cgroup::new(&format!("kvm-bpf-{name}"), "cpu"));
    let [vmm, other] = &cgroups;
    let victims = ["work", "spin"].map(|what| Victim::new(TEST, VARIABLE, what));
    let [worker, _] = &victims;
    let worker = worker.id().to_string();
    wait_for("the device's thread", 1, || {
        threads_of(&worker, THREAD).len()
    });
    for (cgroup, victim) in cgroups.iter().zip(&victims) {
        cgroup.write("cgroup.procs", victim.id());
    }
    let thread = threads_of(&worker, THREAD)[0].to_string();
    let members = vmm.read("cgroup.threads");
    assert!(members.lines().any(|member| member == thread), "{members}");

    // Both always have something to do, on one CPU: nearly all of it is for the greater weight.
    for (weights, wanted) in [([1, 10_000], 0..10), ([10_000, 1], 91..101)] {
        for (cgroup, weight) in cgroups.iter().zip(weights) {
            cgroup.write("cpu.weight", weight);
        }
        let used = || cgroups.each_ref().map(used_by);
        let before = used();
        wait_for("two seconds of CPU", true, || {
            used().iter().sum::<u64>() > before.iter().sum::<u64>() + 2_000_000
        });
        let [work, spin] = [0, 1].map(|which| used()[which] - before[which]);
        let percent = 100 * work / (work + spin);
        assert!(
            wanted.contains(&percent),
            "weights {weights:?}: wanted {wanted:?} percent for the device, got {percent}"
        );
    }

    // Nor is it more than a quota, however great the weight.
    let throttled = || vmm.number("cpu.stat", "nr_throttled");
    let throttled_before = throttled();
    vmm.write("cpu.max", "20000 100000");
    wait_for("the thread to be throttled", true, || {
        throttled() > throttled_before
    });
    let (before, start) = (used_by(vmm), Instant::now());
    thread::sleep(Duration::from_secs(2));
    let percent = 100 * u128::from(used_by(vmm) - before) / start.elapsed().as_micros();
    assert!(
        (10..30).contains(&percent),
        "wanted the device to have 20 percent of a CPU, got {percent}"
    );
    vmm.write("cpu.max", "max");

    vmm.write("cgroup.freeze", 1);
    wait_for("the cgroup to stop", true, || {
        vmm.read("cgroup.events").contains("frozen 1")
    });
    let before = used_by(vmm);
    thread::sleep(Duration::from_millis(300));
    assert_got!(used_by(vmm), before, "what a stopped thread has run");
    vmm.write("cgroup.freeze", 0);
    wait_for("the thread to go on", true, || {
        used_by(vmm) > before + 50_000
    });

    drop(victims);
    for cgroup in [vmm, other] {
        wait_for("an empty cgroup", true, || {
            cgroup.read("cgroup.procs").is_empty()
        });
    }
}
