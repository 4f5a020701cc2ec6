// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The way of an access, and which function belongs to which part of it.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use crate::Result;
use crate::counts::{Output, Place, lines};

/// A part of the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    Entry,
    Mitigations,
    Emulation,
    Bus,
    Glue,
    Runner,
    Program,
    Eventfd,
    User,
    Other,
}

impl Phase {
    pub const ALL: [Phase; 10] = [
        Phase::Entry,
        Phase::Mitigations,
        Phase::Emulation,
        Phase::Bus,
        Phase::Glue,
        Phase::Runner,
        Phase::Program,
        Phase::Eventfd,
        Phase::User,
        Phase::Other,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Phase::Entry => "exit and entry",
            Phase::Mitigations => "mitigations",
            Phase::Emulation => "fetch and emulation",
            Phase::Bus => "bus",
            Phase::Glue => "glue",
            Phase::Runner => "runner",
            Phase::Program => "program",
            Phase::Eventfd => "eventfd",
            Phase::User => "user space",
            Phase::Other => "other",
        }
    }

    /// What is in it, for those who read the table.
    fn what(self) -> &'static str {
        match self {
            Phase::Entry => "the guest's loop, the exit, KVM's loop, the entry",
            Phase::Mitigations => "return and indirect thunks, SPEC_CTRL",
            Phase::Emulation => "what the access is: fetch, decode, registers",
            Phase::Bus => "which device it is",
            Phase::Glue => "kvm_bpf: the context of the program",
            Phase::Runner => "RCU, migration off, run context",
            Phase::Program => "the eBPF program and what it calls",
            Phase::Eventfd => "the signal of an eventfd",
            Phase::User => "the system call's end and begin, and user space",
            Phase::Other => "the clock's tick, for instance",
        }
    }

    /// Which one a place belongs to.
    pub fn of(place: &Place) -> Self {
        let symbol = match place {
            Place::Guest => return Phase::Entry,
            Place::User => return Phase::User,
            Place::Kernel(symbol) => symbol,
        };
        let (name, module) = symbol
            .rsplit_once(" [")
            .map_or((symbol.as_str(), ""), |(name, module)| {
                (name, module.trim_end_matches(']'))
            });
        // What the compiler has split from a function is still its.
        let plain = ["[clone", ".isra", ".constprop", ".part", ".cold"]
            .iter()
            .fold(name, |name, suffix| {
                name.split(suffix).next().unwrap_or(name)
            })
            .trim();
        if module == "bpf" {
            return Phase::Program;
        }
        if module == "kvm_bpf" || plain.contains("kvm_bpf::") || plain.contains("kernel::kvm::io") {
            return Phase::Glue;
        }
        let plain = plain.strip_prefix("__pi_").unwrap_or(plain);
        let by_name = RULES.iter().find(|(_, patterns)| {
            patterns
                .iter()
                .any(|pattern| match pattern.strip_suffix('*') {
                    Some(start) => plain.starts_with(start),
                    None => plain == *pattern,
                })
        });
        match (by_name, module) {
            (Some((phase, _)), _) => *phase,
            (None, "kvm" | "kvm_amd" | "kvm_intel") => Phase::Entry,
            (None, _) if plain.starts_with("kvm_") || plain.starts_with("__kvm_") => Phase::Entry,
            _ => Phase::Other,
        }
    }
}

/// Names of functions, or with a star their beginnings, of both architectures; the first that
/// matches counts.
const RULES: &[(Phase, &[&str])] = &[
    (
        Phase::Mitigations,
        &[
            "retbleed_*",
            "srso_*",
            "entry_untrain_ret",
            "__x86_indirect_thunk*",
            "__x86_return_thunk",
            "x86_virt_spec_ctrl",
            "its_return_thunk",
            "clear_bhb_loop",
        ],
    ),
    (Phase::Glue, &["rust_helper_*"]),
    (
        Phase::Runner,
        &[
            "bpf_prog_run_in_task",
            "__rcu_read_lock",
            "__rcu_read_unlock",
            "migrate_disable",
            "migrate_enable",
            "rcu_read_lock_trace*",
            "rcu_read_unlock_trace*",
            "__bpf_prog_enter*",
            "__bpf_prog_exit*",
        ],
    ),
    (
        Phase::Program,
        &[
            "bpf_*",
            "kvm_copy_guest",
            "kvm_copy_pages",
            "array_map_*",
            "htab_*",
            "__htab_map_*",
            "lookup_nulls_elem_raw",
            "jhash",
        ],
    ),
    (
        Phase::Eventfd,
        &[
            "ioeventfd_*",
            "eventfd_*",
            "_raw_spin_lock_irqsave",
            "_raw_spin_unlock_irqrestore",
            "__wake_up*",
        ],
    ),
    (
        Phase::Bus,
        &[
            "kvm_io_bus_*",
            "__kvm_io_bus_*",
            "bsearch",
            "vcpu_mmio_read",
            "vcpu_mmio_write",
            "kernel_pio",
            "kvm_iodevice_*",
        ],
    ),
    (
        Phase::User,
        &[
            "entry_SYSCALL*",
            "entry_SYSRETQ*",
            "syscall_return_via_sysret",
            "do_syscall_64",
            "x64_sys_call",
            "__x64_sys_*",
            "__arm64_sys_*",
            "el0_svc*",
            "do_el0_svc",
            "invoke_syscall",
            "el0t_64_sync*",
            "ret_to_user",
            "syscall_*",
            "fdget",
            "fput",
            "ksys_*",
            "kvm_vcpu_ioctl",
            "kvm_arch_vcpu_unlocked_ioctl",
            "kvm_arch_vcpu_load",
            "kvm_arch_vcpu_put",
            "vcpu_load",
            "vcpu_put",
            "svm_vcpu_load",
            "svm_vcpu_put",
            "kvm_set_user_return_msr",
            "preempt_notifier_*",
            "kvm_sigset_*",
            "kvm_mmu_post_init_vm",
            "fpu_swap_kvm_fpstate",
            "restore_fpregs_from_fpstate",
            "save_fpregs_to_fpstate",
            "fpregs_mark_activate",
            "__local_bh_enable_ip",
            "mutex_lock*",
            "mutex_unlock",
            "kfree",
            "kvm_prepare_emulated_mmio_exit",
            "kvm_timer_vcpu_load*",
            "kvm_timer_vcpu_put*",
            "kvm_vgic_load",
            "kvm_vgic_put",
            "vgic_v3_load",
            "vgic_v3_put",
            "fpsimd_*",
            "kvm_arch_vcpu_*_fp",
            "kvm_vcpu_load_vhe",
            "kvm_vcpu_put_vhe",
            "kvm_vcpu_load_debug",
            "kvm_vcpu_put_debug",
            "kvm_vcpu_pmu_restore_*",
        ],
    ),
    (
        Phase::Emulation,
        &[
            "x86_*",
            "emulator_*",
            "decode_*",
            "__decode_*",
            "paging64_*",
            "paging32_*",
            "nonpaging_*",
            "linearize",
            "segmented_*",
            "read_emulated",
            "writeback*",
            "fetch_register_operand",
            "init_decode_cache",
            "init_emulate_ctxt",
            "em_*",
            "kvm_fetch_guest_virt",
            "__do_insn_fetch_bytes",
            "kvm_vcpu_read_guest_page",
            "__kvm_read_guest_page",
            "gfn_to_hva_memslot_prot",
            "kvm_vcpu_gfn_to_memslot",
            "__check_object_size*",
            "check_stack_object",
            "__check_heap_object",
            "__virt_addr_valid",
            "is_vmalloc_addr",
            "rep_movs_alternative",
            "memcpy",
            "memcpy_orig",
            "__get_user_8",
            "mmio_info_in_cache",
            "vcpu_is_mmio_gpa",
            "svm_get_segment",
            "svm_seg",
            "svm_get_cs_db_l_bits",
            "svm_get_cpl",
            "svm_get_rflags",
            "svm_set_rflags",
            "kvm_get_rflags",
            "__kvm_set_rflags",
            "kvm_mmu_page_fault",
            "svm_check_emulate_instruction",
            "svm_get_interrupt_shadow",
            "__kvm_mmu_refresh_passthrough_bits",
            "is_ibt_instruction",
            "kvm_pmu_*",
            "complete_emulated_mmio",
            "handle_mmio_page_fault",
            // arm64
            "io_mem_abort",
            "kvm_handle_guest_abort",
            "kvm_handle_mmio_return",
            "kvm_mmio_*",
            "gfn_to_memslot*",
            "gfn_to_hva*",
            "kvm_skip_instr*",
            "vcpu_*_reg",
        ],
    ),
    (
        Phase::Entry,
        &[
            // arm64: the timer's interrupt, system registers, RCU's notes.
            "mtree_load",
            "irq_set_irqchip_state",
            "__irq_*",
            "gic_*",
            "get_timer_map",
            "vcpu_read_sys_reg",
            "vcpu_has_nv",
            "locate_register",
            "locate_direct_register",
            "___ctxt_sys_reg",
            "handle_hvc",
            "rcu_qs",
            "rcu_preempt_need_deferred_qs",
            "svm_*",
            "__svm_*",
            "npf_interception",
            "__srcu_read_*",
            "rcu_note_context_switch",
            "rcu_preempt_deferred_qs",
            "msr_write_intercepted",
            // arm64
            "__guest_*",
            "__fpsimd_*",
            "el1_*",
            "el1h_*",
            "handle_exit*",
            "fixup_guest_exit*",
            "__hyp_*",
            "hyp_*",
            "__sysreg_*",
            "sysreg_*",
            "vgic_*",
            "__vgic_*",
            "timer_*",
            "arch_timer_*",
            "check_vcpu_requests",
            "check_nested_*",
            "context_tracking_*",
            "ct_*",
            "xfer_to_guest_*",
            "ktime_get*",
            "arm_smccc_*",
            "__activate_*",
            "__deactivate_*",
            "__debug_*",
            "has_cntpoff",
        ],
    ),
];

/// Instructions per access from which on a function is part of the way.
const OFTEN: f64 = 0.5;

/// Instructions per access, by place.
#[derive(Debug)]
pub struct Profile(BTreeMap<Place, f64>);

impl Profile {
    pub fn read(counts: &Path, output: &Path) -> Result<Self> {
        let output = Output::read(output)?;
        let mut places = BTreeMap::new();
        for (address, count) in lines(counts, "insn", 1)? {
            *places.entry(output.place(address[0])).or_default() += count / output.accesses;
        }
        Ok(Profile(places))
    }

    /// Which phase a place's instructions are counted in: those of now and then are no part of
    /// the way. Locks and RCU are also used on the way out of the guest and back, which is what
    /// they are for where nothing is signalled, or no program runs.
    fn phase(&self, place: &Place, count: f64) -> Phase {
        if count < OFTEN {
            return Phase::Other;
        }
        let has = |is: &dyn Fn(&Place) -> bool| {
            let mut often = self.0.iter().filter(|(_, count)| **count >= OFTEN);
            often.any(|(place, _)| is(place))
        };
        let signals = |place: &Place| matches!(place, Place::Kernel(symbol) if symbol.starts_with("eventfd_signal"));
        match Phase::of(place) {
            Phase::Eventfd if !has(&signals) => Phase::Entry,
            Phase::Runner if !has(&|place| Phase::of(place) == Phase::Program) => Phase::Entry,
            phase => phase,
        }
    }

    /// Instructions per access of each phase.
    pub fn phases(&self) -> BTreeMap<Phase, f64> {
        let mut phases = BTreeMap::new();
        for (place, count) in &self.0 {
            *phases.entry(self.phase(place, *count)).or_default() += count;
        }
        phases
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let phases = self.phases();
        writeln!(f, "instructions per access, by phase")?;
        for (phase, count) in &phases {
            writeln!(f, "{count:>9.1}  {:<20} {}", phase.name(), phase.what())?;
        }
        writeln!(f, "{:>9.1}  all", phases.values().sum::<f64>())?;
        for phase in phases.keys() {
            writeln!(f, "\n{}, by function", phase.name())?;
            let mut rest = 0.0;
            let mut places: Vec<_> = self
                .0
                .iter()
                .filter(|(place, count)| self.phase(place, **count) == *phase)
                .collect();
            places.sort_by(|a, b| b.1.total_cmp(a.1));
            for (place, count) in places {
                if *count < OFTEN {
                    rest += count;
                } else {
                    writeln!(f, "{count:>9.1}  {place}")?;
                }
            }
            if rest.abs() >= 0.05 {
                writeln!(f, "{rest:>9.1}  (now and then)")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(symbol: &str) -> Phase {
        Phase::of(&Place::Kernel(symbol.to_string()))
    }

    #[test]
    fn phases_of_symbols() {
        assert_eq!(
            of("bpf_prog_59f4a931744dcdc6_kvm_bpf_test [bpf]"),
            Phase::Program
        );
        assert_eq!(of("bpf_prog_run_in_task"), Phase::Runner);
        assert_eq!(
            of("<kernel::kvm::io::IoVTable<kvm_bpf::Programs>>::write [kvm_bpf]"),
            Phase::Glue
        );
        assert_eq!(of("linearize.isra.0 [kvm]"), Phase::Emulation);
        assert_eq!(of("kvm_arch_vcpu_ioctl_run [kvm]"), Phase::Entry);
        assert_eq!(of("kvm_io_bus_write [kvm]"), Phase::Bus);
        assert_eq!(of("delay_tsc"), Phase::Other);
        assert_eq!(Phase::of(&Place::User), Phase::User);
    }

    #[test]
    fn locks_are_the_eventfds_where_there_is_one() {
        let phases = |symbols: &[&str]| {
            let places = symbols.iter().map(|name| Place::Kernel(name.to_string()));
            Profile(places.map(|place| (place, 1.0)).collect()).phases()
        };
        let (lock, rcu) = ("_raw_spin_lock_irqsave", "__rcu_read_lock");
        assert_eq!(
            phases(&[lock, rcu, "handle_hvc"]),
            BTreeMap::from([(Phase::Entry, 3.0)])
        );
        assert_eq!(
            phases(&[lock, rcu, "eventfd_signal_mask", "bpf_prog_1_x [bpf]"]),
            BTreeMap::from([
                (Phase::Eventfd, 2.0),
                (Phase::Runner, 1.0),
                (Phase::Program, 1.0)
            ])
        );
    }
}
