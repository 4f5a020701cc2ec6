// SPDX-License-Identifier: GPL-2.0-only

//! What user space can learn about a device.
//!
//! By an attribute, and for those who may trace the process by `/proc/PID/fdinfo`. Programs are
//! told by the numbers and hashes that `bpf(2)` has for them, as their file descriptors may be
//! closed.

use super::{
    BpfDevice,
    IRQS,
    MEMS,
    REGIONS,
    WORKS, //
};
use kernel::{
    bpf::{
        Prog,
        ProgType, //
    },
    fmt,
    kvm::{
        io::Bus,
        Vm, //
    },
    seq_file::SeqFile,
    seq_print,
    uapi, //
};

/// What names a program.
#[derive(Clone, Copy)]
pub(crate) struct Program {
    id: u32,
    tag: [u8; 8],
    sleeps: bool,
}

impl<T: ProgType> From<&Prog<T>> for Program {
    fn from(prog: &Prog<T>) -> Self {
        Self {
            id: prog.id(),
            tag: prog.tag(),
            sleeps: prog.is_sleepable(),
        }
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:016x}", self.id, u64::from_be_bytes(self.tag))?;
        if self.sleeps {
            f.write_str(" sleeps")?;
        }
        Ok(())
    }
}

/// A region.
struct Region {
    bus: Bus,
    start: u64,
    size: u64,
    read: Option<Program>,
    write: Option<Program>,
}

impl BpfDevice {
    fn region_info(&self, index: usize) -> Option<Region> {
        self.with_slot(index, |slot| {
            slot.as_ref().map(|region| {
                let range = region.range();

                region.with_handler(|programs| Region {
                    bus: range.bus(),
                    start: range.start(),
                    size: range.size(),
                    read: programs.read.as_ref().map(|prog| (&***prog).into()),
                    write: programs.write.as_ref().map(|prog| (&***prog).into()),
                })
            })
        })
        .flatten()
    }

    /// Returns what user space gets to know of a region; [`None`] if there is none.
    pub(crate) fn info(&self, index: usize) -> Option<uapi::kvm_bpf_info> {
        let region = self.region_info(index)?;
        let sleeps = |program: Option<Program>, flag| match program {
            Some(Program { sleeps: true, .. }) => flag,
            _ => 0,
        };
        let id = |program: Option<Program>| program.map_or(0, |program| program.id);
        let tag = |program: Option<Program>| program.map_or([0; 8], |program| program.tag);

        Some(uapi::kvm_bpf_info {
            addr: region.start,
            size: region.size,
            kind: match region.bus {
                Bus::Mmio => uapi::KVM_DEV_BPF_ATTR_GROUP_REGION,
                Bus::Pio => uapi::KVM_DEV_BPF_ATTR_GROUP_PIO,
            },
            read_id: id(region.read),
            write_id: id(region.write),
            flags: sleeps(region.read, uapi::KVM_BPF_INFO_READ_SLEEPS)
                | sleeps(region.write, uapi::KVM_BPF_INFO_WRITE_SLEEPS),
            read_tag: tag(region.read),
            write_tag: tag(region.write),
        })
    }

    /// Prints all that the device has.
    pub(crate) fn show(&self, vm: &Vm, m: &SeqFile) {
        // CAST: All limits are small.
        for index in 0..REGIONS as usize {
            let Some(region) = self.region_info(index) else {
                continue;
            };
            let kind = match region.bus {
                Bus::Mmio => "mmio",
                Bus::Pio => "pio",
            };
            seq_print!(
                m,
                "region:\t{index} {kind} {:#x} {:#x}",
                region.start,
                region.size
            );
            for (what, program) in [("read", region.read), ("write", region.write)] {
                if let Some(program) = program {
                    seq_print!(m, " {what} {program}");
                }
            }
            seq_print!(m, "\n");
        }
        for index in (0..IRQS as usize).filter(|&index| self.irqs.is_set(index)) {
            seq_print!(m, "irq:\t{index}\n");
        }
        for index in 0..MEMS as usize {
            let Some(window) = self.mem.get(index) else {
                continue;
            };
            let right = |right, text| {
                if window.rights() & right != 0 {
                    text
                } else {
                    ""
                }
            };
            seq_print!(
                m,
                "mem:\t{index} {:#x} {:#x} {}{}\n",
                window.start(),
                window.size(),
                right(uapi::KVM_BPF_MEM_READ, "r"),
                right(uapi::KVM_BPF_MEM_WRITE, "w")
            );
        }
        for index in 0..WORKS as usize {
            let Some(work) = self.works.info(index) else {
                continue;
            };
            let eventfd = if work.has_eventfd { " eventfd" } else { "" };
            seq_print!(m, "work:\t{index} {}{eventfd}\n", work.program);
        }
        let perms = self.perms.lock().to_user();
        seq_print!(m, "allow:\t{:#x}\n", perms.allow);
        seq_print!(m, "require:\t{:#x}\n", perms.require);
        seq_print!(m, "sealed:\t{}\n", u32::from(vm.is_bpf_sealed()));
    }
}
