// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Random calls, good and bad.

use std::fmt;

use kvm_bpf::uapi::{
    KVM_DEV_BPF_ATTR_GROUP_INFO, KVM_DEV_BPF_ATTR_GROUP_IRQ, KVM_DEV_BPF_ATTR_GROUP_MEM,
    KVM_DEV_BPF_ATTR_GROUP_PERMS, KVM_DEV_BPF_ATTR_GROUP_PIO, KVM_DEV_BPF_ATTR_GROUP_REGION,
    KVM_DEV_BPF_ATTR_GROUP_RUN, KVM_DEV_BPF_ATTR_GROUP_WORK, KVM_DEV_BPF_MAX_IRQS,
    KVM_DEV_BPF_MAX_MEMS, KVM_DEV_BPF_MAX_REGIONS, KVM_DEV_BPF_MAX_WORKS, kvm_bpf_info,
    kvm_bpf_user_irq, kvm_bpf_user_mem, kvm_bpf_user_perms, kvm_bpf_user_region, kvm_bpf_user_work,
};
use kvm_bpf_selftests::bpf::ProgType;
use kvm_bpf_selftests::device::Call;
use kvm_bpf_selftests::harness::Random;

use super::super::one_of;
use super::files::{Arena, Files, Kind};
use super::{HAS_PORTS, Model};
use crate::tests::perms::ALL;
use crate::tests::{ADDR, SIZE};

/// A call, and what the model takes its structure for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    pub(super) call: Call,
    pub(super) group: u32,
    pub(super) index: u64,
    pub(super) flags: u32,
    pub(super) what: What,
    /// How many bytes of the structure cannot be accessed.
    pub(super) beyond: usize,
}

#[derive(Clone, Copy)]
pub(super) enum What {
    Region(kvm_bpf_user_region, Kind, Kind),
    Irq(kvm_bpf_user_irq, Kind),
    Mem(kvm_bpf_user_mem),
    Work(kvm_bpf_user_work, Kind, Kind),
    Run(u64),
    Perms(kvm_bpf_user_perms),
    Info,
}

impl fmt::Debug for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            What::Region(region, read, write) => write!(f, "{region:x?} {read:?} {write:?}"),
            What::Irq(irq, eventfd) => write!(f, "{irq:x?} {eventfd:?}"),
            What::Mem(mem) => write!(f, "{mem:x?}"),
            What::Work(work, prog, eventfd) => write!(f, "{work:x?} {prog:?} {eventfd:?}"),
            What::Run(arg) => write!(f, "run {arg:#x}"),
            What::Perms(perms) => write!(f, "{perms:x?}"),
            What::Info => write!(f, "info"),
        }
    }
}

const GROUPS: [u32; 8] = [
    KVM_DEV_BPF_ATTR_GROUP_REGION,
    KVM_DEV_BPF_ATTR_GROUP_IRQ,
    KVM_DEV_BPF_ATTR_GROUP_PIO,
    KVM_DEV_BPF_ATTR_GROUP_MEM,
    KVM_DEV_BPF_ATTR_GROUP_WORK,
    KVM_DEV_BPF_ATTR_GROUP_RUN,
    KVM_DEV_BPF_ATTR_GROUP_PERMS,
    KVM_DEV_BPF_ATTR_GROUP_INFO,
];

/// How many indices a group has; 0 where there is no such group.
pub(super) fn limit(group: u32) -> u64 {
    match group {
        KVM_DEV_BPF_ATTR_GROUP_REGION | KVM_DEV_BPF_ATTR_GROUP_INFO => KVM_DEV_BPF_MAX_REGIONS,
        KVM_DEV_BPF_ATTR_GROUP_PIO if HAS_PORTS => KVM_DEV_BPF_MAX_REGIONS,
        KVM_DEV_BPF_ATTR_GROUP_IRQ => KVM_DEV_BPF_MAX_IRQS,
        KVM_DEV_BPF_ATTR_GROUP_MEM => KVM_DEV_BPF_MAX_MEMS,
        KVM_DEV_BPF_ATTR_GROUP_WORK | KVM_DEV_BPF_ATTR_GROUP_RUN => KVM_DEV_BPF_MAX_WORKS,
        KVM_DEV_BPF_ATTR_GROUP_PERMS => 1,
        _ => 0,
    }
}

impl Step {
    pub(super) fn random(files: &Files, model: &Model, random: &mut Random) -> Self {
        let call = one_of(
            random,
            &[Call::Set, Call::Set, Call::Set, Call::Get, Call::Has],
        );
        let group = match random.below(40) {
            0 => one_of(random, &[0, 9, 10, u32::MAX, 1 << 31 | 1]),
            // Without it, the others soon have nothing to do.
            1..=6 => KVM_DEV_BPF_ATTR_GROUP_REGION,
            7..=9 => KVM_DEV_BPF_ATTR_GROUP_WORK,
            _ => one_of(random, &GROUPS),
        };
        let limit = limit(group);
        let index = match random.below(12) {
            0 => one_of(random, &[limit, 1 << 32, u64::MAX, 1 << 63, limit + 1]),
            1 => limit.saturating_sub(1),
            _ if limit == 1 => 0,
            _ => random.below(5),
        };
        let flags = match random.below(20) {
            0 => one_of(random, &[1, 2, 1 << 31, u32::MAX]),
            _ => 0,
        };
        let what = What::random(group, files, model, random);
        let beyond = match random.below(16) {
            0 => 1 + random.below(what.size() as u64) as usize,
            _ => 0,
        };
        Step {
            call,
            group,
            index,
            flags,
            what,
            beyond,
        }
    }
}

impl What {
    fn random(group: u32, files: &Files, model: &Model, random: &mut Random) -> Self {
        match group {
            KVM_DEV_BPF_ATTR_GROUP_IRQ => {
                let eventfd = files.eventfd(random);
                let irq = kvm_bpf_user_irq {
                    eventfd: files.fd(eventfd, random),
                    flags: one_of(random, &[0, 0, 0, 0, 0, 0, 1, 1 << 31]),
                };
                What::Irq(irq, eventfd)
            }
            KVM_DEV_BPF_ATTR_GROUP_MEM => What::Mem(kvm_bpf_user_mem {
                addr: one_of(random, &[0, 1, 0x1000, 1 << 40, u64::MAX - 0xfff, u64::MAX]),
                size: one_of(random, &[0, 0, 1, 0x1000, 0xfff, 1 << 40, u64::MAX]),
                flags: one_of(random, &[0, 1, 1, 2, 3, 3, 4, 1 << 31]),
                pad: one_of(random, &[0, 0, 0, 0, 0, 0, 0, 1, 1 << 31]),
            }),
            KVM_DEV_BPF_ATTR_GROUP_WORK => {
                let prog = match random.below(4) {
                    0 => Kind::None,
                    _ => files.program(ProgType::WORK, random),
                };
                // Most removals are good ones.
                let eventfd = match prog {
                    Kind::None if random.below(4) > 0 => Kind::None,
                    _ => files.eventfd(random),
                };
                let work = kvm_bpf_user_work {
                    bpf_fd: files.fd(prog, random),
                    eventfd: files.fd(eventfd, random),
                    flags: one_of(random, &[0, 0, 0, 0, 0, 0, 0, 0, 1]),
                    pad: one_of(random, &[0, 0, 0, 0, 0, 0, 0, 0, 1]),
                };
                What::Work(work, prog, eventfd)
            }
            KVM_DEV_BPF_ATTR_GROUP_RUN => What::Run(random.next()),
            KVM_DEV_BPF_ATTR_GROUP_PERMS => What::Perms(kvm_bpf_user_perms {
                allow: match random.below(8) {
                    0 => random.next(),
                    1 => ALL,
                    2 => model.allow | 1 << 11,
                    _ => model.allow & !(1 << random.below(24)),
                },
                require: one_of(random, &[0, 0, 0, 0, model.require, model.require, 1, 2]),
            }),
            KVM_DEV_BPF_ATTR_GROUP_INFO => What::Info,
            _ => {
                let is_pio = group == KVM_DEV_BPF_ATTR_GROUP_PIO;
                let (addrs, sizes): (&[u64], &[u64]) = if is_pio {
                    (
                        &[
                            0x500,
                            0x504,
                            0x508,
                            0x510,
                            0xfff8,
                            0xffff,
                            0x1_0000,
                            u64::MAX,
                        ],
                        &[4, 4, 8, 8, 1, 0x1_0000, 0x1_0001, u64::MAX],
                    )
                } else {
                    (
                        &[
                            ADDR,
                            ADDR + SIZE / 2,
                            ADDR + SIZE,
                            ADDR + 2 * SIZE,
                            ADDR + 3 * SIZE,
                            0,
                            1 << 52,
                            u64::MAX - SIZE + 1,
                            u64::MAX - SIZE,
                            u64::MAX,
                        ],
                        &[
                            SIZE,
                            SIZE,
                            SIZE,
                            SIZE / 2,
                            1,
                            i32::MAX as u64,
                            1 << 31,
                            1 << 32,
                            (1 << 32) + SIZE,
                            u64::MAX,
                        ],
                    )
                };
                let (mut addr, mut size) = (one_of(random, addrs), one_of(random, sizes));
                // Often one that is there.
                if random.below(3) == 0 && !model.regions.is_empty() {
                    let known: Vec<_> = model.regions.values().copied().collect();
                    (addr, size) = {
                        let region = one_of(random, &known);
                        (region.addr, region.size)
                    };
                }
                let removes = random.below(4) == 0;
                let (read, write) = match (removes, random.below(8)) {
                    (true, 1..) => (Kind::None, Kind::None),
                    _ => (
                        files.program(ProgType::READ, random),
                        files.program(ProgType::WRITE, random),
                    ),
                };
                let region = kvm_bpf_user_region {
                    addr,
                    size: if removes { 0 } else { size },
                    bpf_readfd: files.fd(read, random),
                    bpf_writefd: files.fd(write, random),
                };
                What::Region(region, read, write)
            }
        }
    }

    fn size(&self) -> usize {
        match self {
            What::Region(..) => size_of::<kvm_bpf_user_region>(),
            What::Irq(..) => size_of::<kvm_bpf_user_irq>(),
            What::Mem(..) => size_of::<kvm_bpf_user_mem>(),
            What::Work(..) => size_of::<kvm_bpf_user_work>(),
            What::Run(..) => size_of::<u64>(),
            What::Perms(..) => size_of::<kvm_bpf_user_perms>(),
            What::Info => size_of::<kvm_bpf_info>(),
        }
    }

    pub(super) fn put(&self, arena: &Arena, beyond: usize) -> u64 {
        match *self {
            What::Region(region, ..) => arena.put(region, beyond),
            What::Irq(irq, _) => arena.put(irq, beyond),
            What::Mem(mem) => arena.put(mem, beyond),
            What::Work(work, ..) => arena.put(work, beyond),
            What::Run(arg) => arena.put(arg, beyond),
            What::Perms(perms) => arena.put(perms, beyond),
            What::Info => arena.put(kvm_bpf_info::default(), beyond),
        }
    }
}
