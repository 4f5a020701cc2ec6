// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Programs that run without a guest's access: by a call, or when an eventfd is signalled.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::thread;
use std::time::{Duration, Instant};

use Reg::{R0, R1, R2, R6, R7};
use kvm_bpf::uapi::{
    KVM_DEV_BPF_ATTR_GROUP_RUN, KVM_DEV_BPF_ATTR_GROUP_WORK, KVM_DEV_BPF_MAX_WORKS,
    kvm_bpf_user_run, kvm_bpf_user_work,
};
use kvm_bpf_selftests::bpf::{
    Census, Index, Insn, LOADERS, Load, LoadOptions, Map, Prog, ProgType, Reg, add_imm, atomic_add,
    call_kfunc, exit, jump_if_eq, jump_if_ne, load, lookup, mov, mov_imm, store,
};
use kvm_bpf_selftests::cgroup::Cgroup;
use kvm_bpf_selftests::device::{Device, NO_WORK, region, work};
use kvm_bpf_selftests::guest::{Args, Guest, Routine};
use kvm_bpf_selftests::harness::{
    Victim, in_a_process, in_a_thread, meanwhile, set_scheduler, stay_on, wait_for,
};
use kvm_bpf_selftests::programs::{CTX_BUF, CTX_REGION, only_return, plug, ret, test_image};
use kvm_bpf_vmm::userspace::uclamp;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EFD_SEMAPHORE, EventFd};

use super::irq::call_with_context;
use super::kfunc::required;
use super::{ADDR, SIZE, assert_errno, assert_refused, element, fd_of, taken};

tests!(
    bad_arguments,
    failed_calls_change_nothing,
    get_returns_nothing,
    results_are_0_and_1,
    clamps_are_refused,
    run_has_argument_and_index,
    run_asks_for_more,
    run_needs_no_vcpu,
    signals_are_counted,
    signals_from_before,
    signals_from_before_the_next_eventfd,
    signals_of_a_semaphore,
    no_signal_is_lost,
    no_signal_is_lost_in_a_swap,
    another_eventfd_drops_signals,
    eventfd_has_one_consumer,
    more_work_leaves_room,
    runs_of_one_index_follow_each_other,
    count_has_an_end,
    removal_waits,
    close_waits,
    closed_in_every_order,
    interrupts_are_signalled,
    doorbell_of_another_vm,
    callback_on_another_cpu_ends_before_a_save,
    thread_is_the_vmms,
    thread_is_not_clamped,
    thread_counts,
    thread_is_in_the_vmms_cgroup,
    killed_process,
    references_are_given_back,
);

/// What a [`Recorder`]'s program saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Record {
    runs: u64,
    /// The sum of all `buf`, and the last one.
    sum: u64,
    last: u64,
    /// `region` of the last run.
    index: u64,
}

/// A map in which a program writes down what it is told.
struct Recorder(Map);

impl Recorder {
    fn new() -> Self {
        Recorder(Map::new(1, 4))
    }

    fn record(&self) -> Record {
        let words = self.0.get(0);
        Record {
            runs: words[0],
            sum: words[1],
            last: words[2],
            index: words[3],
        }
    }

    /// Records and returns 0.
    fn insns(&self) -> Vec<Insn> {
        let mut insns = vec![mov(R6, R1)];
        insns.extend(lookup(&self.0, Index::Imm(0)));
        insns.extend([
            mov_imm(R1, 1),
            load(8, R2, R6, CTX_BUF),
            load(4, R7, R6, CTX_REGION),
            store(8, R0, 16, R2),
            store(8, R0, 24, R7),
            atomic_add(8, R0, 8, R2),
            // Last, for who looks at it alone.
            atomic_add(8, R0, 0, R1),
        ]);
        insns.extend(ret(0));
        insns
    }

    fn prog(&self, load: Load) -> Prog {
        load(ProgType::WORK, &self.insns())
    }
}

/// Counts itself in a map when it starts and when it ends, and works for a while between. What
/// runs beside it is counted too.
fn slow(load_prog: Load, counts: &Map, rounds: i32) -> Prog {
    let mut insns = lookup(counts, Index::Imm(0));
    insns.extend([
        mov(R7, R0),
        mov_imm(R1, 1),
        atomic_add(8, R7, 0, R1),
        // How many are inside.
        atomic_add(8, R7, 16, R1),
        load(8, R1, R7, 16),
        jump_if_eq(R1, 1, 2),
        mov_imm(R1, 1),
        atomic_add(8, R7, 24, R1),
        mov_imm(R6, rounds),
    ]);
    // Much in each round, as the verifier limits jumps.
    insns.extend([mov(R2, R6); 20]);
    insns.extend([
        add_imm(R6, -1),
        jump_if_ne(R6, 0, -22),
        mov_imm(R1, -1),
        atomic_add(8, R7, 16, R1),
        mov_imm(R1, 1),
        atomic_add(8, R7, 8, R1),
    ]);
    insns.extend(ret(0));
    load_prog(ProgType::WORK, &insns)
}

/// Long enough to be found at work, short enough for the verifier, which goes through it.
const ROUNDS: i32 = 5_000;

/// Asks to be run again as often as the map's first word says, and counts its runs in the second.
fn countdown(counts: &Map) -> Prog {
    let mut insns = lookup(counts, Index::Imm(0));
    insns.extend([
        mov_imm(R1, 1),
        atomic_add(8, R0, 8, R1),
        load(8, R1, R0, 0),
        jump_if_ne(R1, 0, 2),
        mov_imm(R0, 0),
        exit(),
        add_imm(R1, -1),
        store(8, R0, 0, R1),
        mov_imm(R0, 1),
        exit(),
    ]);
    Prog::load(ProgType::WORK, &insns)
}

fn eventfd() -> EventFd {
    EventFd::new(EFD_NONBLOCK).expect("eventfd")
}

fn signal(eventfd: &EventFd, count: u64) {
    eventfd.write(count).expect("signalling an eventfd");
}

/// Gives a device's thread more to do than it can.
fn keep_busy(device: &Device) {
    let counts = Map::new(1, 2);
    let eventfd = eventfd();
    counts.set(0, &[u64::MAX, 0]);
    device.set_work(0, &work(Some(&countdown(&counts)), Some(&eventfd)));
    signal(&eventfd, 1);
}

/// Threads of this process by that name.
fn threads(name: &str) -> Vec<i32> {
    threads_of("self", name)
}

/// The same of another process, while it is there.
fn threads_of(process: &str, name: &str) -> Vec<i32> {
    let tasks = fs::read_dir(format!("/proc/{process}/task"));
    tasks
        .expect("the process's threads")
        .flatten()
        .filter(|task| {
            fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim() == name)
        })
        .filter_map(|task| task.file_name().to_str()?.parse().ok())
        .collect()
}

const THREAD: &str = "kvm-bpf";

fn bad_arguments() {
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
fn failed_calls_change_nothing() {
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

fn get_returns_nothing() {
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

fn results_are_0_and_1() {
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
fn clamps_are_refused() {
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

fn run_has_argument_and_index() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    for (load, index) in LOADERS.into_iter().zip([0, KVM_DEV_BPF_MAX_WORKS - 1]) {
        let recorder = Recorder::new();
        device.set_work(index, &work(Some(&recorder.prog(load)), None));
        assert_got!(recorder.record(), Record::default());
        for (runs, arg) in (1..).zip([super::PATTERN, 0, u64::MAX]) {
            assert_got!(device.run(index, arg), Ok(()));
            let record = recorder.record();
            assert_got!(record.runs, runs);
            assert_got!((record.last, record.index), (arg, index));
        }
    }
    assert_got!(threads(THREAD).len(), 0);
}

fn run_asks_for_more() {
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
fn run_needs_no_vcpu() {
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

fn signals_are_counted() {
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

fn signals_from_before() {
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
fn signals_from_before_the_next_eventfd() {
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
fn signals_of_a_semaphore() {
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

fn no_signal_is_lost() {
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
fn no_signal_is_lost_in_a_swap() {
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

fn another_eventfd_drops_signals() {
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

fn eventfd_has_one_consumer() {
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
fn more_work_leaves_room() {
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

fn runs_of_one_index_follow_each_other() {
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

/// Signals and calls run a slow program while `end` takes it away.
#[track_caller]
fn end_under_load(end: impl Fn(Device) -> Option<Device>) {
    // RCU waits for a program that does not sleep, too.
    for load_prog in LOADERS.into_iter().cycle().take(6) {
        let census = Census::now();
        let guest = Guest::new();
        let device = Device::new(guest.vm());
        let counts = Map::new(1, 4);
        let eventfd = eventfd();
        device.set_work(
            0,
            &work(Some(&slow(load_prog, &counts, ROUNDS)), Some(&eventfd)),
        );
        meanwhile([|| signal(&eventfd, 1)], || {
            wait_for("runs", true, || counts.get(0)[0] > 2);
            let device = end(device);
            let words = counts.get(0);
            assert_got!(words[1], words[0], "runs that ended");
            thread::sleep(Duration::from_millis(10));
            assert_got!(counts.get(0), words, "runs");
            // They are the eventfd's own again.
            wait_for("signals", true, || taken(&eventfd) > 0);
            drop(device);
        });
        drop(guest);
        drop(counts);
        census.wait_for_newer(0, 0);
    }
}

/// Signals that are more than a counter holds are not none.
fn count_has_an_end() {
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

fn removal_waits() {
    end_under_load(|device| {
        device.set_work(0, &NO_WORK);
        Some(device)
    });
}

fn close_waits() {
    end_under_load(|device| {
        drop(device);
        None
    });
}

fn closed_in_every_order() {
    #[derive(Clone, Copy, PartialEq)]
    enum Part {
        Device,
        Eventfd,
        Guest,
        Prog,
    }
    const PARTS: [Part; 4] = [Part::Device, Part::Eventfd, Part::Guest, Part::Prog];
    let is_order = |order: &[Part; 4]| PARTS.iter().all(|part| order.contains(part));
    // Each digit of a number is a part.
    let orders = (0..256).map(|number| [0, 2, 4, 6].map(|shift| PARTS[number >> shift & 3]));
    let orders: Vec<_> = orders.filter(is_order).collect();
    assert_got!(orders.len(), 24);
    let census = Census::now();
    for order in orders {
        let recorder = Recorder::new();
        let mut guest = Some(Guest::new());
        let mut device = guest.as_ref().map(|guest| Device::new(guest.vm()));
        let mut prog = Some(recorder.prog(Prog::load));
        let mut eventfd = Some(eventfd());
        // Whoever has the device's interrupt may signal what user space has closed.
        if let (Some(device), Some(eventfd)) = (&device, &eventfd) {
            device.set_irq(0, eventfd.as_raw_fd());
            device.set_work(0, &work(prog.as_ref(), Some(eventfd)));
        }
        for what in order {
            if let Some(eventfd) = &eventfd {
                let before = recorder.record().sum;
                signal(eventfd, 1);
                if device.is_some() {
                    wait_for("a run", before + 1, || recorder.record().sum);
                }
            }
            match what {
                Part::Device => drop(device.take()),
                Part::Eventfd => drop(eventfd.take()),
                Part::Guest => drop(guest.take()),
                Part::Prog => drop(prog.take()),
            }
        }
    }
    census.wait_for_newer(0, 0);
}

/// A program that signals the interrupt that it finds in `buf`.
fn signals_irq(load_prog: Load) -> Prog {
    let mut insns = vec![load(4, R2, R1, CTX_BUF)];
    insns.extend(call_with_context("bpf_kvm_irq_signal"));
    insns.extend(ret(0));
    load_prog(ProgType::WORK, &insns)
}

fn interrupts_are_signalled() {
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
fn doorbell_of_another_vm() {
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

/// What a timer does is done, or not begun, when the state is read: and so it stays.
fn callback_on_another_cpu_ends_before_a_save() {
    in_a_thread(|| {
        let guest = Guest::new();
        let device = plug(guest.vm(), ADDR, test_image("work_timer"));
        let progress = || {
            let value = element(device.programs(), "progress");
            let word = |at: usize| u32::from_ne_bytes(value[at..at + 4].try_into().expect("4"));
            [word(0), word(8)]
        };
        for round in 0..30 {
            // The callbacks come where the timer has been started.
            stay_on(0);
            device.resume().expect("going on");
            stay_on(1);
            let [before, _] = progress();
            wait_for("callbacks", true, || progress()[0] > before + 2);
            let state = device.save().expect("saving");
            let [begun, ended] = progress();
            assert_got!(ended, begun, "callbacks that have ended, {round}");
            thread::sleep(Duration::from_millis(5));
            assert_got!(
                progress(),
                [begun, ended],
                "callbacks after the save, {round}"
            );
            let saved = serde_json::to_value(&state).expect("JSON");
            let saved = &saved["maps"][0]["values"][0]["ended"][0];
            assert_got!(saved.as_u64(), Some(ended.into()));
        }
    });
}

fn thread_is_the_vmms() {
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
fn thread_is_not_clamped() {
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
fn thread_counts() {
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

/// What a victim is to do, in that process.
const VARIABLE: &str = "KVM_BPF_WORK_VICTIM";

/// How long the threads of a cgroup have run, in microseconds.
fn used_by(cgroup: &Cgroup) -> u64 {
    cgroup.number("cpu.stat", "usage_usec")
}

/// The thread of a device goes with its process into a cgroup: what that allows of a CPU holds for
/// it, and it stops when the cgroup does.
fn thread_is_in_the_vmms_cgroup() {
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

/// A process whose thread always has more to do, and others that run it, is killed. What another one
/// has of it then does nothing any more, and keeps nobody waiting.
fn killed_process() {
    /// The process's device and an eventfd of it.
    const NUMBERS: [RawFd; 2] = [100, 101];

    if std::env::var_os(VARIABLE).is_some() {
        let guest = Guest::new();
        let device = Device::new(guest.vm());
        keep_busy(&device);
        let slow_counts = Map::new(1, 4);
        let wake = eventfd_of(&device);
        for (fd, number) in [device.as_raw_fd(), wake.as_raw_fd()].iter().zip(NUMBERS) {
            // SAFETY: no pointers, and the numbers are free.
            let duplicate = unsafe { libc::dup2(*fd, number) };
            assert_eq!(duplicate, number, "dup2: {}", io::Error::last_os_error());
        }
        device.set_work(
            1,
            &work(Some(&slow(Prog::load, &slow_counts, ROUNDS)), Some(&wake)),
        );
        thread::scope(|scope| {
            for index in [0, 0, 1, 1] {
                let device = &device;
                scope.spawn(move || {
                    loop {
                        let _ = device.run(index, 0);
                    }
                });
            }
        });
    }
    for is_held in [false, true] {
        let census = Census::now();
        let victim = Victim::new("work::killed_process", VARIABLE, "work");
        let task = format!("/proc/{}/task", victim.id());
        wait_for("programs and threads of the process", true, || {
            let tasks = fs::read_dir(&task).map_or(0, Iterator::count);
            census.newer().0 == 2 && tasks >= 7
        });
        let held = is_held.then(|| NUMBERS.map(|number| fd_of(victim.id(), number)));
        thread::sleep(Duration::from_millis(50));
        victim.kill();
        if let Some([device, wake]) = held {
            let start = Instant::now();
            let device = Device::from(device);
            let wake = File::from(wake);
            let signal = |count: u64| (&wake).write(&count.to_ne_bytes()).expect("a signal");
            signal(1);
            // It is the VM's creator's, whoever has the descriptor.
            assert_errno("running it", device.run(0, 0), libc::EIO);
            assert_errno("running it", device.run(1, 0), libc::EIO);
            let removed = device.try_set_work(1, &NO_WORK);
            assert_errno("removing it", removed, libc::EIO);
            signal(1);
            assert_got!(census.newer().0, 2, "programs of a device that is held");
            drop(device);
            signal(1);
            let took = start.elapsed();
            assert!(took < Duration::from_secs(5), "all that took {took:?}");
        }
        census.wait_for_newer(0, 0);
    }
}

/// An eventfd that a device's interrupt signals.
fn eventfd_of(device: &Device) -> EventFd {
    let eventfd = eventfd();
    device.set_irq(0, eventfd.as_raw_fd());
    eventfd
}

fn references_are_given_back() {
    let census = Census::now();
    for _ in 0..10 {
        let guest = Guest::new();
        let device = Device::new(guest.vm());
        let eventfds = [eventfd(), eventfd()];
        for index in 0..KVM_DEV_BPF_MAX_WORKS {
            let recorder = Recorder::new();
            let free = eventfd();
            let next = [Some(&free), None, Some(&free), None];
            // Set, swapped, swapped back, and left to the close.
            for (load, eventfd) in LOADERS.into_iter().cycle().zip(next) {
                device.set_work(index, &work(Some(&recorder.prog(load)), eventfd));
            }
            if let Some(eventfd) = eventfds.get(index as usize) {
                device.set_work(
                    index,
                    &work(Some(&recorder.prog(Prog::load)), Some(eventfd)),
                );
                signal(eventfd, 1);
            }
        }
    }
    census.wait_for_newer(0, 0);
}
