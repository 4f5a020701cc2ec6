// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Programs that run without a guest's access: by a call, or when an eventfd is signalled.

use std::fs;

use Reg::{R0, R1, R2, R6, R7};
use kvm_bpf_selftests::bpf::{
    Index, Insn, Load, Map, Prog, ProgType, Reg, add_imm, atomic_add, exit, jump_if_eq, jump_if_ne,
    load, lookup, mov, mov_imm, store,
};
use kvm_bpf_selftests::device::{Device, work};
use kvm_bpf_selftests::programs::{CTX_BUF, CTX_REGION, ret};
use vmm_sys_util::eventfd::EventFd;

use super::eventfd;

mod calls;
mod ends;
mod signals;
mod thread;

tests!(
    calls::bad_arguments,
    calls::failed_calls_change_nothing,
    calls::get_returns_nothing,
    calls::results_are_0_and_1,
    calls::clamps_are_refused,
    calls::run_has_argument_and_index,
    calls::run_asks_for_more,
    calls::run_needs_no_vcpu,
    signals::signals_are_counted,
    signals::signals_from_before,
    signals::signals_from_before_the_next_eventfd,
    signals::signals_of_a_semaphore,
    signals::no_signal_is_lost,
    signals::no_signal_is_lost_in_a_swap,
    signals::another_eventfd_drops_signals,
    signals::eventfd_has_one_consumer,
    signals::more_work_leaves_room,
    calls::runs_of_one_index_follow_each_other,
    signals::count_has_an_end,
    ends::removal_waits,
    ends::close_waits,
    ends::closed_in_every_order,
    signals::interrupts_are_signalled,
    signals::doorbell_of_another_vm,
    ends::callback_on_another_cpu_ends_before_a_save,
    thread::thread_is_the_vmms,
    thread::thread_is_not_clamped,
    thread::thread_counts,
    thread::thread_is_in_the_vmms_cgroup,
    ends::killed_process,
    ends::references_are_given_back,
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

/// What a victim is to do, in that process.
const VARIABLE: &str = "KVM_BPF_WORK_VICTIM";
