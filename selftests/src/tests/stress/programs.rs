// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The programs that devices get, and what the memory has that they and the guests access.

use std::collections::HashMap;
use std::os::fd::AsRawFd;

use Reg::{R0, R1, R2, R3, R4, R6, R10};
use kvm_bpf::uapi::{
    KVM_BPF_ALLOW_IRQ, KVM_BPF_ALLOW_MEM_R, KVM_BPF_ALLOW_MEM_W, KVM_BPF_ALLOW_SLEEP,
    kvm_bpf_user_region,
};
use kvm_bpf_selftests::bpf::{
    Insn, Map, Prog, ProgType, Reg, add_imm, and, call_helper, call_kfunc, exit, load, mov,
    mov_imm, mov_imm64, program_id, store, store_imm,
};
use kvm_bpf_selftests::programs::{CTX_BUF, answer_insns, ret, slow_insns};
use libbpf_rs::libbpf_sys as sys;

use super::super::SIZE;
use super::super::irq::call_with_context;
use super::super::kfunc::required;
use super::{MEM, OWN};

/// What the memory has, whoever writes to it: any part of it looks the same.
pub(super) const MEM_VALUE: u64 = 0x7777_7777_7777_7777;
pub(super) const ANSWERS: [u64; 4] = [
    0x1111_1111_1111_1111,
    0x2222_2222_2222_2222,
    0x3333_3333_3333_3333,
    0x4444_4444_4444_4444,
];

/// A program, and what a device must allow for it.
pub(super) struct Choice {
    pub(super) prog: Prog,
    needs: u64,
}

/// Programs that devices get.
pub(super) struct Pool {
    pub(super) reads: Vec<Choice>,
    pub(super) writes: Vec<Choice>,
    pub(super) works: Vec<Choice>,
    /// What each needs, by its number.
    pub(super) needs: HashMap<u32, u64>,
}

/// Calls a kfunc for guest memory, for the first 8 bytes of the memory that comes and goes, with
/// what is on the stack; `r1` is the context, and then in `r6`.
fn mem_insns(kfunc: &str) -> Vec<Insn> {
    let mut insns = vec![mov(R6, R1)];
    insns.extend(mov_imm64(R1, MEM_VALUE));
    insns.extend([
        store(8, R10, -8, R1),
        mov(R1, R6),
        call_kfunc(required("bpf_cast_to_kern_ctx")),
        mov(R1, R0),
    ]);
    insns.extend(mov_imm64(R2, MEM));
    insns.extend([
        mov(R3, R10),
        add_imm(R3, -8),
        mov_imm(R4, 8),
        call_kfunc(required(kfunc)),
    ]);
    insns
}

/// Signals one of the first interrupts; `r1` is the context, and then in `r6`.
fn signal_insns(irq: i32) -> Vec<Insn> {
    let mut insns = vec![mov(R6, R1), mov_imm(R2, irq)];
    insns.extend(call_with_context("bpf_kvm_irq_signal"));
    insns.push(mov(R1, R6));
    insns
}

/// As many zeroes as ones.
fn random_result() -> Vec<Insn> {
    vec![
        call_helper(sys::BPF_FUNC_get_prandom_u32),
        mov_imm(R1, 1),
        and(R0, R1),
        exit(),
    ]
}

impl Pool {
    pub(super) fn new() -> Self {
        let plain = |kind, insns: &[Insn], needs| Choice {
            prog: Prog::load(kind, insns),
            needs,
        };
        let sleepable = |kind, insns: &[Insn], needs| Choice {
            prog: Prog::load_sleepable(kind, insns),
            needs: needs | KVM_BPF_ALLOW_SLEEP,
        };
        let then = |mut insns: Vec<Insn>, more: &[Insn]| {
            insns.extend(more);
            insns
        };

        let read = ProgType::READ;
        // Zeroes where it could not read.
        let of_memory = then(
            mem_insns("bpf_kvm_mem_read_nofault"),
            &[load(8, R1, R10, -8), store(8, R6, CTX_BUF, R1)],
        );
        let reads = vec![
            plain(read, &answer_insns(ANSWERS[0]), 0),
            plain(read, &answer_insns(ANSWERS[1]), 0),
            sleepable(read, &answer_insns(ANSWERS[2]), 0),
            plain(
                read,
                &then(signal_insns(0), &answer_insns(ANSWERS[3])),
                KVM_BPF_ALLOW_IRQ,
            ),
            plain(read, &then(of_memory, &ret(0)), KVM_BPF_ALLOW_MEM_R),
            plain(read, &ret(0), 0),
            plain(read, &then(vec![store_imm(1, R1, CTX_BUF, 1)], &ret(1)), 0),
        ];

        let write = ProgType::WRITE;
        let to_memory = |kfunc| then(mem_insns(kfunc), &ret(0));
        let writes = vec![
            plain(write, &ret(0), 0),
            plain(write, &ret(1), 0),
            sleepable(write, &ret(0), 0),
            plain(write, &then(signal_insns(1), &ret(0)), KVM_BPF_ALLOW_IRQ),
            plain(
                write,
                &to_memory("bpf_kvm_mem_write_nofault"),
                KVM_BPF_ALLOW_MEM_W,
            ),
            sleepable(write, &to_memory("bpf_kvm_mem_write"), KVM_BPF_ALLOW_MEM_W),
            plain(write, &random_result(), 0),
        ];

        let work = ProgType::WORK;
        let works = vec![
            plain(work, &ret(0), 0),
            plain(work, &random_result(), 0),
            plain(work, &then(signal_insns(2), &ret(0)), KVM_BPF_ALLOW_IRQ),
            sleepable(work, &to_memory("bpf_kvm_mem_write"), KVM_BPF_ALLOW_MEM_W),
            sleepable(work, &to_memory("bpf_kvm_mem_read"), KVM_BPF_ALLOW_MEM_R),
        ];

        let choices = [&reads, &writes, &works].into_iter().flatten();
        let needs = choices
            .map(|choice| (program_id(choice.prog.as_raw_fd()), choice.needs))
            .collect();
        Pool {
            reads,
            writes,
            works,
            needs,
        }
    }
}

/// Counts itself when it begins and when it ends, and takes its time.
pub(super) struct Slow {
    counts: Map,
    write: Prog,
    pub(super) work: Prog,
}

impl Slow {
    pub(super) fn new() -> Self {
        let counts = Map::new(1, 2);
        let insns = slow_insns(&counts, 50);
        Slow {
            write: Prog::load(ProgType::WRITE, &insns),
            work: Prog::load(ProgType::WORK, &insns),
            counts,
        }
    }

    pub(super) fn region(&self) -> kvm_bpf_user_region {
        kvm_bpf_user_region {
            addr: OWN,
            size: SIZE,
            bpf_readfd: -1,
            bpf_writefd: self.write.as_raw_fd(),
        }
    }

    /// None of its programs runs.
    #[track_caller]
    pub(super) fn assert_over(&self, what: &str) {
        let counts = self.counts.get(0);
        assert_got!(counts[1], counts[0], "runs that have ended, {what}");
    }

    /// Whether one of them does.
    pub(super) fn is_running(&self) -> bool {
        let counts = self.counts.get(0);
        counts[1] != counts[0]
    }

    pub(super) fn runs(&self) -> u64 {
        self.counts.get(0)[0]
    }
}
