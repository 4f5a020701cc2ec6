// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Programs that signal: which may, in what devices, and with what context.

use std::os::fd::AsRawFd;

use Reg::{R0, R1, R2, R6, R10};
use kvm_bpf_selftests::bpf::{
    Index, Insn, LOADERS, LoadOptions, Map, Prog, ProgType, Reg, add_imm, call_kfunc, load, lookup,
    mov, mov_imm, store_imm,
};
use kvm_bpf_selftests::device::{Device, NO_REGION, region};
use kvm_bpf_selftests::guest::Guest;
use kvm_bpf_selftests::harness::{meanwhile, wait_for};
use kvm_bpf_selftests::programs::{CTX_BUF, ret};

use super::super::kfunc::required;
use super::super::{ADDR, SIZE, assert_refused, eventfd, taken};
use super::{ACQUIRE, SIGNAL, Setup, call_with_context, with_each_loader};

pub(super) fn signalled_by_reads() {
    for load_prog in LOADERS {
        let guest = Guest::new();
        let mut vcpu = guest.vcpu(0);
        let device = Device::new(guest.vm());
        let eventfd = eventfd();
        device.set_irq(9, eventfd.as_raw_fd());

        // The context must still be good for a store after the call.
        let mut insns = vec![mov(R6, R1), mov_imm(R2, 9)];
        insns.extend(call_with_context(SIGNAL));
        insns.push(store_imm(4, R6, CTX_BUF, 0x77));
        insns.extend(ret(0));
        let read = load_prog(ProgType::READ, &insns);
        device.set_region(0, &region(ADDR, SIZE, Some(&read), None));
        assert_got!(vcpu.read(ADDR, 4).value, 0x77);
        assert_got!(taken(&eventfd), 1);
    }
}

/// The interrupt is one of the device that was accessed, whatever other devices run the program.
pub(super) fn one_program_in_two_devices() {
    with_each_loader(|setup| {
        const OTHER: u64 = ADDR + SIZE;

        let mut vcpu = setup.guest.vcpu(0);
        let device = Device::new(setup.guest.vm());
        device.set_region(0, &region(OTHER, SIZE, None, Some(&setup.write)));
        let (first, second) = (eventfd(), eventfd());
        setup.device.set_irq(0, first.as_raw_fd());
        let alone = setup.signal_at(&mut vcpu, OTHER, 0);
        assert_got!(alone, -i64::from(libc::ENOENT), "the other has no eventfd");

        device.set_irq(0, second.as_raw_fd());
        for _ in 0..3 {
            for (addr, wanted) in [(ADDR, (1, 0)), (OTHER, (0, 1))] {
                assert_got!(setup.signal_at(&mut vcpu, addr, 0), 0);
                assert_got!((taken(&first), taken(&second)), wanted, "by {addr:#x}");
            }
        }
        drop(setup.device);
        assert_got!(vcpu.write(OTHER, 4, 0), []);
        assert_got!((taken(&first), taken(&second)), (0, 1), "one is closed");
    });
}

/// Regions and irqs come and go without each other.
pub(super) fn signalled_after_the_region_is_gone() {
    let setup = Setup::new();
    let mut vcpu = setup.guest.vcpu(0);
    let eventfd = eventfd();
    setup.device.set_irq(0, eventfd.as_raw_fd());
    setup.device.set_region(0, &NO_REGION);
    assert_got!(vcpu.write(ADDR, 4, 0).len(), 1, "exits without a region");
    assert_got!(taken(&eventfd), 0);
    let again = Setup::on(setup.guest, Prog::load);
    assert_got!(again.signal(&mut vcpu, 0), -i64::from(libc::ENOENT));
    assert_got!(taken(&eventfd), 0, "signals of another device's irq 0");
}

/// Each signal for which the kfunc returned 0 reached one of the eventfds, once; and none reaches
/// one that is not set any more.
pub(super) fn replaced_while_signalled() {
    with_each_loader(replace_while_signalled);
}

fn replace_while_signalled(setup: Setup) {
    let eventfds = [eventfd(), eventfd()];
    let signalled = || setup.results.get(0)[1];
    let mut before = 0;
    let workers = (0..2).map(|id| {
        let mut vcpu = setup.guest.vcpu(id);
        move || assert_got!(vcpu.write(ADDR, 4, 0), [])
    });
    meanwhile(workers, || {
        for round in 0..100 {
            let (old, new) = (&eventfds[round % 2], &eventfds[(round + 1) % 2]);
            if round % 4 == 3 {
                setup.device.set_irq(0, -1);
                before += taken(old);
            }
            setup.device.set_irq(0, new.as_raw_fd());
            if round % 4 != 3 {
                before += taken(old);
            }
            // By both vCPUs: neither can still be at a signal of then.
            let enough = signalled() + 10;
            wait_for("more signals", true, || signalled() >= enough);
            assert_got!(taken(old), 0, "signals of what was replaced");
        }
    });
    let after: u64 = eventfds.iter().map(taken).sum();
    assert_got!(before + after, signalled(), "signals taken");
}

pub(super) fn only_our_programs_may_signal() {
    // The one takes what only our programs have, the others nothing that a program of any type lacks.
    for kfunc in [SIGNAL, "bpf_get_cpu_scale", "bpf_set_current_uclamp"] {
        let id = required(kfunc);
        // Socket filter, tc, XDP, tracepoint, raw tracepoint, and a sleepable one: syscall.
        for kind in [1, 3, 6, 5, 17, 31] {
            let mut insns = vec![mov_imm(R2, 0)];
            if kfunc != SIGNAL {
                insns.push(mov_imm(R1, 0));
            }
            insns.push(call_kfunc(id));
            insns.extend(ret(0));
            let options = LoadOptions {
                sleepable: kind == 31,
                ..Default::default()
            };
            let answer = Prog::try_load(ProgType(kind), &insns, options);
            let reason = format!("calling kernel function {kfunc} is not allowed");
            assert_refused(&format!("program type {kind}"), answer, &reason);
        }
    }
}

/// Neither memory of the program, nor what it sees as its context, nor a part of the kernel's is the
/// kernel's context.
pub(super) fn context_cannot_be_forged() {
    let map = Map::new(1, 4);
    let stack = (0..4)
        .map(|word| store_imm(8, R10, -8 * (word + 1), 0))
        .chain([mov(R1, R10), add_imm(R1, -32)])
        .collect();
    let mut value = lookup(&map, Index::Imm(0));
    value.push(mov(R1, R0));
    let kernels = || vec![call_kfunc(required("bpf_cast_to_kern_ctx")), mov(R1, R0)];
    let mut part = kernels();
    part.push(add_imm(R1, 8));
    let mut pointer = kernels();
    pointer.push(load(8, R1, R1, 16));
    let mut cast_part = vec![add_imm(R1, 8)];
    cast_part.extend(kernels());
    let cases: [(&str, Vec<Insn>, &str); 7] = [
        (
            "the stack",
            stack,
            "is fp expected STRUCT bpf_kvm_io_ctx_kern",
        ),
        (
            "a map's value",
            value,
            "is map_value expected STRUCT bpf_kvm_io_ctx_kern",
        ),
        (
            "a number",
            vec![mov_imm(R1, 4096)],
            "is scalar expected STRUCT bpf_kvm_io_ctx_kern",
        ),
        (
            "the program's context",
            Vec::new(),
            "is ctx expected STRUCT bpf_kvm_io_ctx_kern",
        ),
        (
            "the program's context + 8",
            cast_part,
            "dereference of modified ctx ptr",
        ),
        (
            "the kernel's context + 8",
            part,
            "expected pointer to STRUCT bpf_kvm_io_ctx_kern",
        ),
        (
            "a pointer out of the kernel's context",
            pointer,
            "access is allowed only to CAP_PERFMON and CAP_SYS_ADMIN",
        ),
    ];
    for kind in [ProgType::READ, ProgType::WRITE] {
        for kfunc in [SIGNAL, ACQUIRE] {
            for (what, start, reason) in &cases {
                let mut insns = start.clone();
                insns.extend([mov_imm(R2, 0), call_kfunc(required(kfunc))]);
                insns.extend(ret(0));
                let answer = Prog::try_load(kind, &insns, LoadOptions::default());
                assert_refused(&format!("{what} as {kind:?}'s context"), answer, reason);
            }
        }
    }
}
