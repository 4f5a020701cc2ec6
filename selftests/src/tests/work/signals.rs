// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Runs that an eventfd asks for: no signal is lost, whoever sends it.

use std::os::fd::AsRawFd;
use std::thread;
use std::time::Duration;

use Reg::{R1, R2};
use kvm_bpf::uapi::KVM_DEV_BPF_MAX_WORKS;
use kvm_bpf_selftests::bpf::{LOADERS, Load, Map, Prog, ProgType, Reg, load, mov_imm};
use kvm_bpf_selftests::device::{Device, NO_WORK, region, work};
use kvm_bpf_selftests::guest::{Args, Guest, Routine};
use kvm_bpf_selftests::harness::{in_a_thread, meanwhile, set_scheduler, stay_on, wait_for};
use kvm_bpf_selftests::programs::{CTX_BUF, only_return, ret};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EFD_SEMAPHORE, EventFd};

use super::super::irq::call_with_context;
use super::super::{ADDR, SIZE, assert_errno, eventfd, taken};
use super::{ROUNDS, Record, Recorder, THREAD, countdown, signal, slow, threads};

pub(super) fn signals_are_counted() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    for load in LOADERS {
        let recorder = Recorder::new();
        let eventfd = eventfd();
        device.set_work(2, &work(Some(&recorder.prog(load)), Some(&eventfd)));
        assert_got!(recorder.record(), Record::default());
        for (runs, count) in (1..).zip([1, 7, 1 << 40, u64::MAX - 1]) {
            let before = recorder.record().sum;
            signal(&eventfd, count);
            wait_for("a run", runs, || recorder.record().runs);
            let record = recorder.record();
            assert_got!((record.last, record.index), (count, 2));
            assert_got!(record.sum, before.wrapping_add(count));
        }
        // Nobody else gets them.
        assert_got!(taken(&eventfd), 0);
        device.set_work(2, &NO_WORK);
        signal(&eventfd, 5);
        assert_got!(taken(&eventfd), 5);
    }
}

pub(super) fn signals_from_before() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let recorder = Recorder::new();
    let eventfd = eventfd();
    signal(&eventfd, 9);
    device.set_work(0, &work(Some(&recorder.prog(Prog::load)), Some(&eventfd)));
    wait_for("the sum of signals", 9, || recorder.record().sum);
    assert_got!(recorder.record().runs, 1);
    assert_got!(taken(&eventfd), 0);
}

/// The thread that is there already looks before the eventfd is set, and has to look again: it takes
/// the CPU from the one who sets the eventfd as soon as it is woken.
pub(super) fn signals_from_before_the_next_eventfd() {
    const ROUNDS: u64 = 100;

    in_a_thread(|| {
        stay_on(0);
        let guest = Guest::new();
        let device = Device::new(guest.vm());
        let recorder = Recorder::new();
        let prog = recorder.prog(Prog::load);
        let keeps_the_thread = eventfd();
        device.set_work(1, &work(Some(&prog), Some(&keeps_the_thread)));
        // The device's thread stays what this one was.
        set_scheduler(libc::SCHED_IDLE, 0);
        for round in 1..=ROUNDS {
            let eventfd = eventfd();
            signal(&eventfd, 1);
            device.set_work(0, &work(Some(&prog), Some(&eventfd)));
            wait_for("the sum of signals", round, || recorder.record().sum);
            device.set_work(0, &work(None, None));
        }
    });
}

/// Its counter gives one at a time.
pub(super) fn signals_of_a_semaphore() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let recorder = Recorder::new();
    let eventfd = EventFd::new(EFD_NONBLOCK | EFD_SEMAPHORE).expect("eventfd");
    signal(&eventfd, 4);
    device.set_work(0, &work(Some(&recorder.prog(Prog::load)), Some(&eventfd)));
    wait_for("the sum of signals", 4, || recorder.record().sum);
    signal(&eventfd, 5);
    signal(&eventfd, 1);
    wait_for("the sum of signals", 10, || recorder.record().sum);
    assert_got!(taken(&eventfd), 0);
}

pub(super) fn no_signal_is_lost() {
    const SIGNALS: u64 = 50_000;

    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let recorder = Recorder::new();
    let eventfd = eventfd();
    device.set_work(0, &work(Some(&recorder.prog(Prog::load)), Some(&eventfd)));
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| (0..SIGNALS).for_each(|_| signal(&eventfd, 1)));
        }
    });
    wait_for("the sum of signals", 2 * SIGNALS, || recorder.record().sum);
    let runs = recorder.record().runs;
    assert!(
        runs <= 2 * SIGNALS,
        "wanted a run per signal at most, got {runs}"
    );
}

/// Nor when a program with more to do is replaced: the new one does it.
pub(super) fn no_signal_is_lost_in_a_swap() {
    const SWAPS: usize = 300;

    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let recorders = [Recorder::new(), Recorder::new()];
    let progs = recorders
        .each_ref()
        .map(|recorder| recorder.prog(Prog::load));
    let eventfd = eventfd();
    let mut signalled = 0;
    device.set_work(0, &work(Some(&progs[0]), Some(&eventfd)));
    meanwhile(
        [|| {
            signal(&eventfd, 1);
            signalled += 1;
        }],
        || {
            for prog in progs.iter().cycle().take(SWAPS) {
                device.set_work(0, &work(Some(prog), Some(&eventfd)));
            }
        },
    );
    let sum = || recorders.iter().map(|recorder| recorder.record().sum).sum();
    wait_for("the sum of signals", signalled, sum);

    let counts = Map::new(1, 2);
    counts.set(0, &[u64::MAX, 0]);
    device.set_work(0, &work(Some(&countdown(&counts)), Some(&eventfd)));
    signal(&eventfd, 1);
    wait_for("many runs", true, || counts.get(0)[1] > 10);
    let before = recorders[0].record().runs;
    device.set_work(0, &work(Some(&progs[0]), Some(&eventfd)));
    let after = counts.get(0);
    wait_for("a run of the new one", before + 1, || {
        recorders[0].record().runs
    });
    assert_got!(counts.get(0), after, "runs of the old one");
}

pub(super) fn another_eventfd_drops_signals() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let counts = Map::new(1, 2);
    let recorder = Recorder::new();
    let (first, second) = (eventfd(), eventfd());
    for next in [Some(&second), None] {
        counts.set(0, &[u64::MAX, 0]);
        device.set_work(0, &work(Some(&countdown(&counts)), Some(&first)));
        signal(&first, 1);
        wait_for("many runs", true, || counts.get(0)[1] > 10);
        // The program has more to do, and more signals come.
        let before = recorder.record();
        signal(&first, 1);
        device.set_work(0, &work(Some(&recorder.prog(Prog::load)), next));
        let after = counts.get(0);
        thread::sleep(Duration::from_millis(20));
        assert_got!(recorder.record(), before);
        assert_got!(counts.get(0), after);
        // The first one is free again.
        signal(&first, 5);
        assert_got!(taken(&first), 5);
    }
}

pub(super) fn eventfd_has_one_consumer() {
    let guest = Guest::with_irqchip();
    // Without one there are no irqfds on arm64.
    let vcpu = guest.vcpu_with_interrupts();
    let (device, other) = (Device::new(guest.vm()), Device::new(guest.vm()));
    let prog = only_return(ProgType::WORK, 0);
    let eventfd = eventfd();
    device.set_work(0, &work(Some(&prog), Some(&eventfd)));
    for (what, device, index) in [("index", &device, 1), ("device", &other, 0)] {
        let answer = device.try_set_work(index, &work(Some(&prog), Some(&eventfd)));
        assert_errno(what, answer, libc::EBUSY);
        assert_errno("running it", device.run(index, 0), libc::ENOENT);
    }
    let irqfd = guest.vm().register_irqfd(&eventfd, 5);
    assert_got!(irqfd.expect_err("an irqfd").errno(), libc::EBUSY);
    device.set_work(0, &NO_WORK);
    guest.vm().register_irqfd(&eventfd, 5).expect("an irqfd");
    let answer = device.try_set_work(0, &work(Some(&prog), Some(&eventfd)));
    assert_errno("the eventfd of an irqfd", answer, libc::EBUSY);
    guest.vm().unregister_irqfd(&eventfd, 5).expect("no irqfd");
    other.set_work(0, &work(Some(&prog), Some(&eventfd)));
    drop(vcpu);
}

/// A program that always asks to be run again keeps neither others nor the device's end away.
pub(super) fn more_work_leaves_room() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let counts = Map::new(1, 2);
    let recorders: Vec<_> = (0..KVM_DEV_BPF_MAX_WORKS - 1)
        .map(|_| Recorder::new())
        .collect();
    let busy = eventfd();
    counts.set(0, &[u64::MAX, 0]);
    device.set_work(7, &work(Some(&countdown(&counts)), Some(&busy)));
    signal(&busy, 1);
    for (recorder, index) in recorders.iter().zip((0..).filter(|&index| index != 7)) {
        let eventfd = eventfd();
        device.set_work(
            index,
            &work(Some(&recorder.prog(Prog::load)), Some(&eventfd)),
        );
        signal(&eventfd, 1);
        wait_for("a run", 1, || recorder.record().runs);
        let before = counts.get(0)[1];
        wait_for("more runs", true, || counts.get(0)[1] > before);
        // Whoever asks on a thread of his own has his turn too.
        assert_errno("a run in between", device.run(7, 0), libc::EAGAIN);
    }
    assert_got!(threads(THREAD).len(), 1);
    drop(device);
    let after = counts.get(0);
    thread::sleep(Duration::from_millis(20));
    assert_got!(counts.get(0), after, "runs after the close");
}

/// Signals that are more than a counter holds are not none.
pub(super) fn count_has_an_end() {
    let guest = Guest::new();
    // Unless the thread is as fast as the signals are.
    for _ in 0..100 {
        let device = Device::new(guest.vm());
        let counts = Map::new(1, 4);
        let (busy, many) = (eventfd(), eventfd());
        let recorder = Recorder::new();
        device.set_work(
            0,
            &work(Some(&slow(Prog::load, &counts, ROUNDS)), Some(&busy)),
        );
        device.set_work(1, &work(Some(&recorder.prog(Prog::load)), Some(&many)));
        signal(&busy, 1);
        signal(&many, 1 << 63);
        signal(&many, 1 << 63);
        wait_for("a run for them", true, || recorder.record().runs > 0);
        if recorder.record().last == u64::MAX {
            return;
        }
    }
    panic!("the thread has run the program between two signals, always");
}

/// A program that signals the interrupt that it finds in `buf`.
fn signals_irq(load_prog: Load) -> Prog {
    let mut insns = vec![load(4, R2, R1, CTX_BUF)];
    insns.extend(call_with_context("bpf_kvm_irq_signal"));
    insns.extend(ret(0));
    load_prog(ProgType::WORK, &insns)
}

pub(super) fn interrupts_are_signalled() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let (irq, wake) = (eventfd(), eventfd());
    device.set_irq(5, irq.as_raw_fd());
    for load in LOADERS {
        device.set_work(0, &work(Some(&signals_irq(load)), Some(&wake)));
        assert_got!(device.run(0, 5), Ok(()));
        assert_got!(taken(&irq), 1);
        assert_got!(device.run(0, 4), Ok(()));
        assert_got!(taken(&irq), 0);
        signal(&wake, 5);
        wait_for("the interrupt", 1, || taken(&irq));
    }
}

/// An interrupt of one device, by a guest's write, runs the work of another VM's.
pub(super) fn doorbell_of_another_vm() {
    let (guest, peer) = (Guest::new(), Guest::new());
    let (device, served) = (Device::new(guest.vm()), Device::new(peer.vm()));
    let recorder = Recorder::new();
    let doorbell = eventfd();
    let mut insns = vec![mov_imm(R2, 0)];
    insns.extend(call_with_context("bpf_kvm_irq_signal"));
    insns.extend(ret(0));
    let rings = Prog::load(ProgType::WRITE, &insns);
    device.set_irq(0, doorbell.as_raw_fd());
    device.set_region(0, &region(ADDR, SIZE, None, Some(&rings)));
    served.set_work(0, &work(Some(&recorder.prog(Prog::load)), Some(&doorbell)));
    // The number is all that they need.
    drop(doorbell);
    let mut vcpu = guest.vcpu(0);
    let writes = Args {
        addr: ADDR,
        count: 1_000,
        ..Default::default()
    };
    let (_, exits) = vcpu.call(Routine::WriteLoop, writes);
    assert_got!(exits, []);
    wait_for("the sum of signals", 1_000, || recorder.record().sum);
}
