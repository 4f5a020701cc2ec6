// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Interrupts: eventfds that programs signal, polled by the VMM or wired to a guest.

use std::cmp::Ordering;
use std::fs;
use std::os::fd::AsRawFd;

use Reg::{R0, R1, R2, R7};
use kvm_bpf_selftests::bpf::{
    Index, Insn, LOADERS, Load, Map, Prog, ProgType, Reg, atomic_add, call_kfunc, jump_if_ne, load,
    lookup, mov, mov_imm, mov_signed32, store,
};
use kvm_bpf_selftests::device::{Device, region};
use kvm_bpf_selftests::guest::{Guest, Vcpu};
use kvm_bpf_selftests::programs::{CTX_BUF, ret};
use vmm_sys_util::eventfd::EventFd;

use super::kfunc::required;
use super::{ADDR, SIZE, eventfd};

mod eventfds;
mod kept;
mod lines;
mod signals;

tests!(
    eventfds::bad_arguments,
    eventfds::get_returns_no_eventfd,
    eventfds::eventfd_polled_without_irqchip,
    eventfds::every_irq_has_its_eventfd,
    eventfds::irq_without_eventfd,
    eventfds::detached_and_replaced,
    eventfds::one_eventfd_for_two_irqs,
    eventfds::closed_by_the_vmm,
    eventfds::eventfd_outlives_the_device,
    eventfds::eventfd_is_held_as_long_as_it_is_set,
    signals::signalled_by_reads,
    signals::one_program_in_two_devices,
    signals::signalled_after_the_region_is_gone,
    signals::replaced_while_signalled,
    signals::only_our_programs_may_signal,
    signals::context_cannot_be_forged,
    lines::guest_takes_edge,
    #[cfg(target_arch = "aarch64")]
    lines::protected_guest_takes_edge,
    lines::guest_takes_level,
    lines::guest_takes_msi,
    lines::each_irq_has_its_line,
    kept::kept_irq_is_signalled,
    kept::kept_irq_is_signalled_by_a_timer,
    kept::kept_irq_and_a_state_that_is_restored,
    kept::kept_irq_that_there_is_not,
    kept::kept_irq_outlives_the_device,
    kept::kept_irq_outlives_the_module,
    kept::kept_irq_is_released,
    kept::kept_irq_must_be_released,
    kept::kept_irq_cannot_be_forged,
    kept::kept_irq_is_not_for_sleepable_programs,
    kept::acquired_irq_is_signalled,
);

const SIGNAL: &str = "bpf_kvm_irq_signal";
const ACQUIRE: &str = "bpf_kvm_irq_acquire";
const SIGNAL_KEPT: &str = "bpf_kvm_irq_signal_kept";
const RELEASE: &str = "bpf_kvm_irq_release";

/// The kernel's number of an eventfd: the lowest that no other has.
fn id_of(eventfd: &EventFd) -> u32 {
    let path = format!("/proc/self/fdinfo/{}", eventfd.as_raw_fd());
    let info = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    info.lines()
        .find_map(|line| line.strip_prefix("eventfd-id:")?.trim().parse().ok())
        .unwrap_or_else(|| panic!("wanted an eventfd-id, got {info:?}"))
}

/// Whether nobody has a reference to the eventfd of that number any more: a new one gets it.
fn is_free(id: u32) -> bool {
    // Those with lower numbers are kept open, so that the next one gets a higher.
    let mut lower = Vec::new();
    loop {
        let next = eventfd();
        match id_of(&next).cmp(&id) {
            Ordering::Less => lower.push(next),
            order => return order == Ordering::Equal,
        }
    }
}

/// Calls a kfunc that takes the kernel's context and `r2`; `r1` is the program's context.
pub(super) fn call_with_context(kfunc: &str) -> [Insn; 5] {
    [
        mov(R7, R2),
        call_kfunc(required("bpf_cast_to_kern_ctx")),
        mov(R1, R0),
        mov(R2, R7),
        call_kfunc(required(kfunc)),
    ]
}

/// Signals the irq in `r2` and keeps what the kfunc returns; `r1` is the context.
fn signal_insns(results: &Map) -> Vec<Insn> {
    let mut insns = call_with_context(SIGNAL).to_vec();
    insns.push(mov_signed32(R7, R0));
    insns.extend(lookup(results, Index::Imm(0)));
    insns.extend([
        store(8, R0, 0, R7),
        mov_imm(R1, 1),
        jump_if_ne(R7, 0, 1),
        atomic_add(8, R0, 8, R1),
    ]);
    insns.extend(ret(0));
    insns
}

/// A guest with a device whose writes signal the irq that was written.
struct Setup {
    guest: Guest,
    device: Device,
    write: Prog,
    /// What the kfunc returned last; how often it was 0.
    results: Map,
}

impl Setup {
    fn new() -> Self {
        Self::on(Guest::new(), Prog::load)
    }

    fn on(guest: Guest, load_prog: Load) -> Self {
        let results = Map::new(1, 2);
        let mut insns = vec![load(4, R2, R1, CTX_BUF)];
        insns.extend(signal_insns(&results));
        let write = load_prog(ProgType::WRITE, &insns);
        let device = Device::new(guest.vm());
        device.set_region(0, &region(ADDR, SIZE, None, Some(&write)));
        Setup {
            guest,
            device,
            write,
            results,
        }
    }

    /// Has the guest signal an irq; says what the kfunc returned.
    fn signal(&self, vcpu: &mut Vcpu, irq: u32) -> i64 {
        self.signal_at(vcpu, ADDR, irq)
    }

    /// The same where the program has another region.
    fn signal_at(&self, vcpu: &mut Vcpu, addr: u64, irq: u32) -> i64 {
        self.results.set(0, &[0x5555, 0]);
        assert_got!(vcpu.write(addr, 4, irq.into()), []);
        self.results.get(0)[0] as i64
    }
}

/// A test for programs of either sort.
fn with_each_loader(test: impl Fn(Setup)) {
    for load_prog in LOADERS {
        test(Setup::on(Guest::new(), load_prog));
    }
}
