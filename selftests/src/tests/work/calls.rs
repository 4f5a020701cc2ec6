// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What user space may set, and the runs that it asks for.

use std::fs;
use std::os::fd::AsRawFd;
use std::thread;

use Reg::{R0, R1, R2};
use kvm_bpf::uapi::{
    KVM_DEV_BPF_ATTR_GROUP_RUN, KVM_DEV_BPF_ATTR_GROUP_WORK, KVM_DEV_BPF_MAX_WORKS,
    kvm_bpf_user_run, kvm_bpf_user_work,
};
use kvm_bpf_selftests::bpf::{
    LOADERS, LoadOptions, Map, Prog, ProgType, Reg, call_kfunc, exit, load, mov_imm,
};
use kvm_bpf_selftests::device::{Device, NO_WORK, region, work};
use kvm_bpf_selftests::guest::Guest;
use kvm_bpf_selftests::harness::{meanwhile, wait_for};
use kvm_bpf_selftests::programs::{CTX_BUF, only_return, ret};

use super::super::kfunc::required;
use super::super::{ADDR, PATTERN, SIZE, assert_errno, assert_refused, eventfd, taken};
use super::{ROUNDS, Record, Recorder, THREAD, countdown, signal, slow, threads};

pub(super) fn bad_arguments() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let prog = only_return(ProgType::WORK, 0);
    let eventfd = eventfd();
    let good = work(Some(&prog), Some(&eventfd));
    let file = fs::File::open("/proc/self/exe").expect("a file");
    let read = only_return(ProgType::READ, 0);

    for (what, index, bad, wanted) in [
        ("index", KVM_DEV_BPF_MAX_WORKS, good, libc::ENXIO),
        ("index of 33 bits", 1 << 32, good, libc::ENXIO),
        (
            "flags",
            0,
            kvm_bpf_user_work { flags: 1, ..good },
            libc::EINVAL,
        ),
        ("pad", 0, kvm_bpf_user_work { pad: 1, ..good }, libc::EINVAL),
        (
            "fd of a program that is not open",
            0,
            kvm_bpf_user_work {
                bpf_fd: 1 << 20,
                ..good
            },
            libc::EBADF,
        ),
        (
            "negative fd of a program",
            0,
            kvm_bpf_user_work { bpf_fd: -2, ..good },
            libc::EBADF,
        ),
        (
            "file for a program",
            0,
            kvm_bpf_user_work {
                bpf_fd: file.as_raw_fd(),
                ..good
            },
            libc::EINVAL,
        ),
        (
            "program that handles reads",
            0,
            work(Some(&read), None),
            libc::EINVAL,
        ),
        (
            "fd of an eventfd that is not open",
            0,
            kvm_bpf_user_work {
                eventfd: 1 << 20,
                ..good
            },
            libc::EBADF,
        ),
        (
            "negative fd of an eventfd",
            0,
            kvm_bpf_user_work {
                eventfd: -2,
                ..good
            },
            libc::EBADF,
        ),
        (
            "file for an eventfd",
            0,
            kvm_bpf_user_work {
                eventfd: file.as_raw_fd(),
                ..good
            },
            libc::EINVAL,
        ),
        (
            "eventfd without a program",
            0,
            work(None, Some(&eventfd)),
            libc::EINVAL,
        ),
        ("removing from a free index", 0, NO_WORK, libc::ENOENT),
    ] {
        assert_errno(what, device.try_set_work(index, &bad), wanted);
    }
    for index in 0..KVM_DEV_BPF_MAX_WORKS {
        assert_errno("running a free index", device.run(index, 0), libc::ENOENT);
        assert_got!(device.has_attr(KVM_DEV_BPF_ATTR_GROUP_WORK, index), Ok(()));
        assert_got!(device.has_attr(KVM_DEV_BPF_ATTR_GROUP_RUN, index), Ok(()));
    }
    for group in [KVM_DEV_BPF_ATTR_GROUP_WORK, KVM_DEV_BPF_ATTR_GROUP_RUN] {
        let answer = device.has_attr(group, KVM_DEV_BPF_MAX_WORKS);
        assert_errno("asking past the last", answer, libc::ENXIO);
        assert_errno("bad pointer", device.set_attr(group, 0, 8), libc::EFAULT);
    }
    let answer = device.run(KVM_DEV_BPF_MAX_WORKS, 0);
    assert_errno("running past the last", answer, libc::ENXIO);
    // None of them has made a thread, or taken the eventfd.
    assert_got!(threads(THREAD).len(), 0);
    signal(&eventfd, 3);
    assert_got!(taken(&eventfd), 3);

    // As all others, the program of a type may be given to it and to no other group.
    let range = region(ADDR, SIZE, Some(&prog), None);
    assert_errno(
        "a region's program",
        device.try_set_region(0, &range),
        libc::EINVAL,
    );
}

/// What is set goes on as it was.
pub(super) fn failed_calls_change_nothing() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let recorder = Recorder::new();
    let other = only_return(ProgType::WORK, 1);
    let (first, taken) = (eventfd(), eventfd());
    device.set_work(1, &work(Some(&other), Some(&taken)));
    device.set_work(0, &work(Some(&recorder.prog(Prog::load)), Some(&first)));

    for bad in [
        work(Some(&other), Some(&taken)),
        kvm_bpf_user_work {
            flags: 1,
            ..work(Some(&other), None)
        },
        kvm_bpf_user_work {
            eventfd: 1 << 20,
            ..work(Some(&other), None)
        },
    ] {
        device.try_set_work(0, &bad).expect_err("a bad argument");
        let before = recorder.record();
        assert_got!(device.run(0, 5), Ok(()));
        signal(&first, 1);
        wait_for("a run", before.runs + 2, || recorder.record().runs);
    }
}

pub(super) fn get_returns_nothing() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    device.set_work(0, &work(Some(&only_return(ProgType::WORK, 0)), None));
    let mut run = kvm_bpf_user_run::default();
    for group in [KVM_DEV_BPF_ATTR_GROUP_WORK, KVM_DEV_BPF_ATTR_GROUP_RUN] {
        // SAFETY: the kernel writes nothing, and if it did, there is room.
        let answer = unsafe { device.get_attr(group, 0, (&raw mut run) as u64) };
        assert_errno("KVM_GET_DEVICE_ATTR", answer, libc::ENXIO);
    }
}

pub(super) fn results_are_0_and_1() {
    for load in LOADERS {
        for result in [0, 1] {
            load(ProgType::WORK, &ret(result));
        }
    }
    for result in [2, -1, i32::MIN] {
        let loaded = Prog::try_load(ProgType::WORK, &ret(result), LoadOptions::default());
        assert_refused("a result", loaded, "At program exit the register R0 has");
    }
    let insns = [load(8, R0, R1, CTX_BUF), exit()];
    let loaded = Prog::try_load(ProgType::WORK, &insns, LoadOptions::default());
    assert_refused("any result", loaded, "At program exit the register R0 has");
}

/// They are of the thread, which is no vCPU's here.
pub(super) fn clamps_are_refused() {
    let mut insns = vec![
        mov_imm(R1, 0),
        mov_imm(R2, 512),
        call_kfunc(required("bpf_set_current_uclamp")),
    ];
    insns.extend(ret(0));
    let options = LoadOptions {
        sleepable: true,
        ..Default::default()
    };
    let loaded = Prog::try_load(ProgType::WORK, &insns, options);
    assert_refused("a clamp", loaded, "bpf_set_current_uclamp is not allowed");
    Prog::load_sleepable(ProgType::WRITE, &insns);
}

pub(super) fn run_has_argument_and_index() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    for (load, index) in LOADERS.into_iter().zip([0, KVM_DEV_BPF_MAX_WORKS - 1]) {
        let recorder = Recorder::new();
        device.set_work(index, &work(Some(&recorder.prog(load)), None));
        assert_got!(recorder.record(), Record::default());
        for (runs, arg) in (1..).zip([PATTERN, 0, u64::MAX]) {
            assert_got!(device.run(index, arg), Ok(()));
            let record = recorder.record();
            assert_got!(record.runs, runs);
            assert_got!((record.last, record.index), (arg, index));
        }
    }
    assert_got!(threads(THREAD).len(), 0);
}

pub(super) fn run_asks_for_more() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let counts = Map::new(1, 2);
    device.set_work(3, &work(Some(&countdown(&counts)), None));
    counts.set(0, &[2, 0]);
    assert_errno("a run with more to do", device.run(3, 0), libc::EAGAIN);
    assert_errno("a run with more to do", device.run(3, 0), libc::EAGAIN);
    assert_got!(device.run(3, 0), Ok(()));
    // Nobody else has run it.
    assert_got!(counts.get(0), [0, 3]);
}

/// Nor that another thread has anything to do with vCPUs.
pub(super) fn run_needs_no_vcpu() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let recorder = Recorder::new();
    device.set_work(0, &work(Some(&recorder.prog(Prog::load)), None));
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..100 {
                    assert_got!(device.run(0, 1), Ok(()));
                }
            });
        }
    });
    assert_got!(recorder.record().sum, 400);
}

pub(super) fn runs_of_one_index_follow_each_other() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let counts = Map::new(1, 4);
    let eventfd = eventfd();
    device.set_work(
        0,
        &work(Some(&slow(Prog::load, &counts, ROUNDS)), Some(&eventfd)),
    );
    meanwhile([|| signal(&eventfd, 1)], || {
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| (0..20).for_each(|_| assert_got!(device.run(0, 0), Ok(()))));
            }
        });
        // These may be over before the device's thread has had its first turn.
        wait_for("runs by signals too", true, || counts.get(0)[0] > 40);
    });
    device.set_work(0, &NO_WORK);
    let words = counts.get(0);
    assert_got!(
        words[1..],
        [words[0], 0, 0],
        "ends, inside now, inside together"
    );

    // The indices of a device do not wait for each other.
    let both = Map::new(1, 4);
    for index in [0, 1] {
        device.set_work(index, &work(Some(&slow(Prog::load, &both, ROUNDS)), None));
    }
    wait_for("runs side by side", true, || {
        thread::scope(|scope| {
            for index in [0, 1] {
                let device = &device;
                scope
                    .spawn(move || (0..20).for_each(|_| assert_got!(device.run(index, 0), Ok(()))));
            }
        });
        both.get(0)[3] > 0
    });
}
