// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Calls of user space on two devices of one VM, good and bad, against a model of the ABI.
//!
//! The model knows which reasons there are for a call to fail: without one it must succeed, and with
//! some it must fail with one of their errnos and have changed nothing. In which order the kernel
//! looks for reasons is not part of the ABI.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::ptr;

use kvm_bpf::uapi::{
    KVM_BPF_ALLOW_IRQ, KVM_BPF_ALLOW_NEW_REGION, KVM_BPF_ALLOW_REMOVE, KVM_BPF_ALLOW_REPLACE,
    KVM_BPF_ALLOW_RUN, KVM_BPF_ALLOW_SET_IRQ, KVM_BPF_ALLOW_SET_MEM, KVM_BPF_ALLOW_SET_PIO,
    KVM_BPF_ALLOW_SET_WORK, KVM_BPF_ALLOW_SLEEP, KVM_BPF_INFO_READ_SLEEPS,
    KVM_BPF_INFO_WRITE_SLEEPS, KVM_BPF_MEM_READ, KVM_BPF_MEM_WRITE, KVM_DEV_BPF_ATTR_GROUP_INFO,
    KVM_DEV_BPF_ATTR_GROUP_IRQ, KVM_DEV_BPF_ATTR_GROUP_MEM, KVM_DEV_BPF_ATTR_GROUP_PERMS,
    KVM_DEV_BPF_ATTR_GROUP_PIO, KVM_DEV_BPF_ATTR_GROUP_REGION, KVM_DEV_BPF_ATTR_GROUP_RUN,
    KVM_DEV_BPF_ATTR_GROUP_WORK, KVM_DEV_BPF_MAX_IRQS, KVM_DEV_BPF_MAX_MEMS,
    KVM_DEV_BPF_MAX_REGIONS, KVM_DEV_BPF_MAX_WORKS, kvm_bpf_info, kvm_bpf_user_irq,
    kvm_bpf_user_mem, kvm_bpf_user_perms, kvm_bpf_user_region, kvm_bpf_user_work,
};
use kvm_bpf_selftests::bpf::{Census, Map, Prog, ProgType, mov_imm, program_id, program_tag};
use kvm_bpf_selftests::device::{Answer, Call, Device};
use kvm_bpf_selftests::guest::Guest;
use kvm_bpf_selftests::harness::{Errno, Random};
use kvm_bpf_selftests::programs::ret;
use vmm_sys_util::eventfd::EventFd;

use super::super::irq::call_with_context;
use super::super::perms::ALL;
use super::super::{ADDR, SIZE};
use super::{for_a_while, one_of, seed};

const PAGE: usize = 0x1000;
const NOT_EXTENSIBLE: u64 = 1;
const HAS_PORTS: bool = cfg!(target_arch = "x86_64");
/// How many steps a device lives: most of its permissions are gone then.
const LIFE: u64 = 120;

/// What a file descriptor is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    None,
    NotOpen,
    /// A program, by its place among those of the test.
    Prog(usize),
    /// An eventfd, likewise.
    Eventfd(usize),
    Other,
}

/// A program, what a device must allow for it, and what else is told of it.
struct Program {
    prog: Prog,
    kind: ProgType,
    needs: u64,
    sleeps: bool,
    result: i32,
}

/// All file descriptors that calls get.
struct Files {
    programs: Vec<Program>,
    eventfds: Vec<EventFd>,
    others: Vec<i32>,
    _map: Map,
    _null: File,
}

impl Files {
    fn new(guest: &Guest) -> Self {
        let mut programs = Vec::new();
        for kind in [ProgType::READ, ProgType::WRITE, ProgType::WORK] {
            for (sleeps, signals, result) in [
                (false, false, 0),
                (false, false, 1),
                (true, false, 0),
                (false, true, 0),
            ] {
                let mut insns = Vec::new();
                if signals {
                    insns.push(mov_imm(kvm_bpf_selftests::bpf::Reg::R2, 0));
                    insns.extend(call_with_context("bpf_kvm_irq_signal"));
                }
                insns.extend(ret(result));
                let load = if sleeps {
                    Prog::load_sleepable
                } else {
                    Prog::load
                };
                let mut needs = 0;
                if sleeps {
                    needs |= KVM_BPF_ALLOW_SLEEP;
                }
                if signals {
                    needs |= KVM_BPF_ALLOW_IRQ;
                }
                programs.push(Program {
                    prog: load(kind, &insns),
                    kind,
                    needs,
                    sleeps,
                    result,
                });
            }
        }
        let map = Map::new(1, 1);
        let null = File::open("/dev/null").expect("/dev/null");
        Files {
            programs,
            eventfds: (0..3).map(|_| EventFd::new(0).expect("eventfd")).collect(),
            others: vec![map.as_raw_fd(), null.as_raw_fd(), guest.vm().as_raw_fd()],
            _map: map,
            _null: null,
        }
    }

    fn fd(&self, kind: Kind, random: &mut Random) -> i32 {
        match kind {
            Kind::None => -1,
            Kind::NotOpen => one_of(random, &[-2, i32::MIN, i32::MAX, 100_000, -100]),
            Kind::Prog(n) => self.programs[n].prog.as_raw_fd(),
            Kind::Eventfd(n) => self.eventfds[n].as_raw_fd(),
            Kind::Other => one_of(random, &self.others),
        }
    }

    /// A program of the type, most often.
    fn program(&self, kind: ProgType, random: &mut Random) -> Kind {
        match random.below(10) {
            0 => Kind::NotOpen,
            1 => Kind::Other,
            2 => Kind::Eventfd(0),
            3 => Kind::Prog(random.below(self.programs.len() as u64) as usize),
            4 => Kind::None,
            _ => {
                let of_kind: Vec<_> = (0..self.programs.len())
                    .filter(|&n| self.programs[n].kind == kind)
                    .collect();
                Kind::Prog(one_of(random, &of_kind))
            }
        }
    }

    fn eventfd(&self, random: &mut Random) -> Kind {
        match random.below(9) {
            0 => Kind::NotOpen,
            1 => Kind::Other,
            2 => Kind::Prog(0),
            3..=4 => Kind::None,
            _ => Kind::Eventfd(random.below(self.eventfds.len() as u64) as usize),
        }
    }

    /// Why a file descriptor is not a program of the type.
    fn refuse_program(&self, kind: Kind, wanted: ProgType) -> Option<i32> {
        match kind {
            Kind::None => None,
            Kind::NotOpen => Some(libc::EBADF),
            Kind::Prog(n) if self.programs[n].kind == wanted => None,
            _ => Some(libc::EINVAL),
        }
    }

    fn refuse_eventfd(kind: Kind) -> Option<i32> {
        match kind {
            Kind::None | Kind::Eventfd(_) => None,
            Kind::NotOpen => Some(libc::EBADF),
            _ => Some(libc::EINVAL),
        }
    }

    fn needs(&self, kind: Kind) -> u64 {
        match kind {
            Kind::Prog(n) => self.programs[n].needs,
            _ => 0,
        }
    }
}

/// A structure of the user ABI, in a page behind which nothing is.
struct Arena(*mut u8);

impl Arena {
    fn new() -> Self {
        // SAFETY: new mappings touch no other memory; the second page of ours goes again.
        let pages = unsafe {
            let pages = libc::mmap(
                ptr::null_mut(),
                2 * PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            assert_ne!(pages, libc::MAP_FAILED, "mmap");
            let behind = pages.cast::<u8>().add(PAGE).cast();
            assert_eq!(libc::mprotect(behind, PAGE, libc::PROT_NONE), 0, "mprotect");
            pages
        };
        Arena(pages.cast())
    }

    /// Puts a structure where it ends `beyond` bytes behind the page; returns its address.
    fn put<T: Copy>(&self, value: T, beyond: usize) -> u64 {
        let size = size_of::<T>();
        let at = self.0.wrapping_add(PAGE + beyond - size);
        // SAFETY: so many bytes of it are in the page.
        unsafe { ptr::copy_nonoverlapping((&raw const value).cast::<u8>(), at, size - beyond) };
        at as u64
    }

    fn get<T: Copy>(&self) -> T {
        let at = self.0.wrapping_add(PAGE - size_of::<T>());
        // SAFETY: all of it is in the page, and each sequence of bytes is one of these structures.
        unsafe { at.cast::<T>().read_unaligned() }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: both pages are ours.
        unsafe { libc::munmap(self.0.cast(), 2 * PAGE) };
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Region {
    is_pio: bool,
    addr: u64,
    size: u64,
    read: Kind,
    write: Kind,
}

impl Region {
    fn overlaps(&self, other: &Self) -> bool {
        self.is_pio == other.is_pio
            && self.addr < other.addr + other.size
            && other.addr < self.addr + self.size
    }
}

/// What the model knows of a device.
struct Model {
    regions: BTreeMap<u64, Region>,
    irqs: BTreeSet<u64>,
    mems: BTreeMap<u64, (u64, u64, u32)>,
    /// The program, and the eventfd that runs it.
    works: BTreeMap<u64, (Kind, Kind)>,
    allow: u64,
    require: u64,
}

impl Model {
    fn new() -> Self {
        Model {
            regions: BTreeMap::new(),
            irqs: BTreeSet::new(),
            mems: BTreeMap::new(),
            works: BTreeMap::new(),
            allow: ALL,
            require: 0,
        }
    }

    fn lacks(&self, bits: u64) -> bool {
        self.allow & bits != bits
    }

    fn programs(&self) -> impl Iterator<Item = Kind> + '_ {
        let regions = self.regions.values();
        regions
            .flat_map(|region| [region.read, region.write])
            .chain(self.works.values().map(|&(prog, _)| prog))
    }
}

/// A call, and what the model takes its structure for.
#[derive(Clone, Copy, Debug)]
struct Step {
    call: Call,
    group: u32,
    index: u64,
    flags: u32,
    what: What,
    /// How many bytes of the structure cannot be accessed.
    beyond: usize,
}

#[derive(Clone, Copy)]
enum What {
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
fn limit(group: u32) -> u64 {
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
    fn random(files: &Files, model: &Model, random: &mut Random) -> Self {
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

    fn put(&self, arena: &Arena, beyond: usize) -> u64 {
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

/// Two devices of a VM, as they are and as the model has them.
struct Bench<'a> {
    files: &'a Files,
    guest: &'a Guest,
    arena: &'a Arena,
    devices: [Device; 2],
    models: [Model; 2],
}

impl Bench<'_> {
    /// The reasons for a call to fail.
    fn reasons(&self, which: usize, step: &Step) -> Vec<i32> {
        let model = &self.models[which];
        let mut reasons = Vec::new();
        let mut refuse = |condition: bool, errno: i32| {
            if condition {
                reasons.push(errno);
            }
        };
        refuse(step.flags != 0, libc::EINVAL);
        if step.index >= limit(step.group) {
            refuse(true, libc::ENXIO);
            return reasons;
        }
        if step.call == Call::Has {
            return reasons;
        }
        let set = step.call == Call::Set;
        let has = |there: bool| match there {
            true => None,
            false => Some(libc::ENOENT),
        };
        let never = match step.group {
            KVM_DEV_BPF_ATTR_GROUP_INFO => set,
            KVM_DEV_BPF_ATTR_GROUP_IRQ
            | KVM_DEV_BPF_ATTR_GROUP_WORK
            | KVM_DEV_BPF_ATTR_GROUP_RUN => !set,
            _ => false,
        };
        if never {
            refuse(true, libc::ENXIO);
            return reasons;
        }
        refuse(step.beyond > 0, libc::EFAULT);
        let there = match step.what {
            What::Region(..) => {
                let is_pio = step.group == KVM_DEV_BPF_ATTR_GROUP_PIO;
                let region = model.regions.get(&step.index);
                region.is_some_and(|region| region.is_pio == is_pio)
            }
            What::Irq(..) => model.irqs.contains(&step.index),
            What::Mem(..) => model.mems.contains_key(&step.index),
            What::Work(..) | What::Run(_) => model.works.contains_key(&step.index),
            What::Perms(_) => true,
            What::Info => model.regions.contains_key(&step.index),
        };
        if !set {
            reasons.extend(has(there));
            return reasons;
        }
        match step.what {
            What::Region(region, read, write) => {
                reasons.extend(self.region_reasons(which, step, region, read, write));
            }
            What::Irq(irq, eventfd) => {
                refuse(irq.flags != 0, libc::EINVAL);
                refuse(model.lacks(KVM_BPF_ALLOW_SET_IRQ), libc::EACCES);
                refuse(eventfd == Kind::None && !there, libc::ENOENT);
                reasons.extend(Files::refuse_eventfd(eventfd));
            }
            What::Mem(mem) => {
                refuse(model.lacks(KVM_BPF_ALLOW_SET_MEM), libc::EACCES);
                refuse(mem.pad != 0, libc::EINVAL);
                if mem.size == 0 {
                    refuse(mem.flags != 0, libc::EINVAL);
                    refuse(!there, libc::ENOENT);
                } else {
                    let all = KVM_BPF_MEM_READ | KVM_BPF_MEM_WRITE;
                    let bad = mem.flags == 0 || mem.flags & !all != 0;
                    refuse(bad, libc::EINVAL);
                    refuse(mem.addr.checked_add(mem.size).is_none(), libc::ERANGE);
                }
            }
            What::Work(work, prog, eventfd) => {
                refuse(model.lacks(KVM_BPF_ALLOW_SET_WORK), libc::EACCES);
                refuse(work.flags != 0 || work.pad != 0, libc::EINVAL);
                if prog == Kind::None {
                    // One that is not open is no reason of its own.
                    refuse(eventfd != Kind::None, libc::EINVAL);
                    refuse(!there, libc::ENOENT);
                } else {
                    let needs = self.files.needs(prog);
                    refuse(model.lacks(needs), libc::EACCES);
                    refuse(self.is_taken(which, step.index, eventfd), libc::EBUSY);
                    reasons.extend(self.files.refuse_program(prog, ProgType::WORK));
                    reasons.extend(Files::refuse_eventfd(eventfd));
                }
            }
            What::Run(_) => {
                refuse(model.lacks(KVM_BPF_ALLOW_RUN), libc::EACCES);
                refuse(!there, libc::ENOENT);
                let again = model.works.get(&step.index).is_some_and(|&(prog, _)| {
                    matches!(prog, Kind::Prog(n) if self.files.programs[n].result == 1)
                });
                refuse(again, libc::EAGAIN);
            }
            What::Perms(perms) => {
                refuse(perms.require & !NOT_EXTENSIBLE != 0, libc::EINVAL);
                let gains = perms.allow & !model.allow != 0 || model.require & !perms.require != 0;
                refuse(gains, libc::EPERM);
                let mut needs = model.programs().map(|prog| self.files.needs(prog));
                refuse(needs.any(|needs| needs & !perms.allow != 0), libc::EBUSY);
            }
            What::Info => {}
        }
        reasons
    }

    fn region_reasons(
        &self,
        which: usize,
        step: &Step,
        region: kvm_bpf_user_region,
        read: Kind,
        write: Kind,
    ) -> Vec<i32> {
        let model = &self.models[which];
        let is_pio = step.group == KVM_DEV_BPF_ATTR_GROUP_PIO;
        let ports = if is_pio { KVM_BPF_ALLOW_SET_PIO } else { 0 };
        let old = model.regions.get(&step.index);
        let mut reasons = Vec::new();
        let mut refuse = |condition: bool, errno: i32| {
            if condition {
                reasons.push(errno);
            }
        };
        if region.size == 0 {
            refuse((read, write) != (Kind::None, Kind::None), libc::EINVAL);
            refuse(old.is_none_or(|old| old.is_pio != is_pio), libc::ENOENT);
            refuse(model.lacks(KVM_BPF_ALLOW_REMOVE | ports), libc::EACCES);
            return reasons;
        }
        refuse((read, write) == (Kind::None, Kind::None), libc::EINVAL);
        let end = region.addr.checked_add(region.size);
        let fits = match is_pio {
            true => end.is_some_and(|end| end <= 0x1_0000),
            false => region.size <= i32::MAX as u64 && end.is_some_and(|end| end <= u64::MAX - 7),
        };
        refuse(!fits, libc::ERANGE);
        let needs = self.files.needs(read) | self.files.needs(write);
        refuse(model.lacks(needs | ports), libc::EACCES);
        let new = Region {
            is_pio,
            addr: region.addr,
            size: region.size,
            read,
            write,
        };
        match old {
            Some(old) => {
                let same = (old.is_pio, old.addr, old.size) == (is_pio, new.addr, new.size);
                refuse(!same, libc::EEXIST);
                refuse(same && model.lacks(KVM_BPF_ALLOW_REPLACE), libc::EACCES);
            }
            None => {
                let mut others = self.models.iter().flat_map(|model| model.regions.values());
                let overlaps = fits && others.any(|other| other.overlaps(&new));
                refuse(overlaps, libc::EEXIST);
                refuse(model.lacks(KVM_BPF_ALLOW_NEW_REGION), libc::EACCES);
            }
        }
        reasons.extend(self.files.refuse_program(read, ProgType::READ));
        reasons.extend(self.files.refuse_program(write, ProgType::WRITE));
        reasons
    }

    /// Whether the eventfd runs another index.
    fn is_taken(&self, which: usize, index: u64, eventfd: Kind) -> bool {
        matches!(eventfd, Kind::Eventfd(_))
            && self.models.iter().enumerate().any(|(device, model)| {
                let mut works = model.works.iter();
                works.any(|(&other, &(_, taken))| {
                    taken == eventfd && (device, other) != (which, index)
                })
            })
    }

    /// Has the model do what the call has done.
    fn apply(&mut self, which: usize, step: &Step) {
        let model = &mut self.models[which];
        let index = step.index;
        match step.what {
            What::Region(region, ..) if region.size == 0 => {
                model.regions.remove(&index);
            }
            What::Region(region, read, write) => {
                let is_pio = step.group == KVM_DEV_BPF_ATTR_GROUP_PIO;
                let region = Region {
                    is_pio,
                    addr: region.addr,
                    size: region.size,
                    read,
                    write,
                };
                model.regions.insert(index, region);
            }
            What::Irq(_, Kind::None) => {
                model.irqs.remove(&index);
            }
            What::Irq(..) => {
                model.irqs.insert(index);
            }
            What::Mem(mem) if mem.size == 0 => {
                model.mems.remove(&index);
            }
            What::Mem(mem) => {
                model.mems.insert(index, (mem.addr, mem.size, mem.flags));
            }
            What::Work(_, Kind::None, _) => {
                model.works.remove(&index);
            }
            What::Work(_, prog, eventfd) => {
                model.works.insert(index, (prog, eventfd));
            }
            What::Perms(perms) => (model.allow, model.require) = (perms.allow, perms.require),
            What::Run(_) | What::Info => {}
        }
    }

    fn program(&self, kind: Kind) -> (u32, [u8; 8], bool) {
        match kind {
            Kind::Prog(n) => {
                let program = &self.files.programs[n];
                let fd = program.prog.as_raw_fd();
                (program_id(fd), program_tag(fd), program.sleeps)
            }
            _ => (0, [0; 8], false),
        }
    }

    fn info(&self, region: &Region) -> kvm_bpf_info {
        let (read_id, read_tag, read_sleeps) = self.program(region.read);
        let (write_id, write_tag, write_sleeps) = self.program(region.write);
        let mut flags = 0;
        if read_sleeps {
            flags |= KVM_BPF_INFO_READ_SLEEPS;
        }
        if write_sleeps {
            flags |= KVM_BPF_INFO_WRITE_SLEEPS;
        }
        kvm_bpf_info {
            addr: region.addr,
            size: region.size,
            kind: match region.is_pio {
                true => KVM_DEV_BPF_ATTR_GROUP_PIO,
                false => KVM_DEV_BPF_ATTR_GROUP_REGION,
            },
            read_id,
            write_id,
            flags,
            read_tag,
            write_tag,
        }
    }

    /// What a call has returned in memory is what the model has.
    fn assert_returned(&self, which: usize, step: &Step, context: &str) {
        let model = &self.models[which];
        let region = model.regions.get(&step.index);
        match step.what {
            What::Region(..) => {
                let region = region.expect("the model has it");
                let wanted = kvm_bpf_user_region {
                    addr: region.addr,
                    size: region.size,
                    bpf_readfd: -1,
                    bpf_writefd: -1,
                };
                assert_got!(self.arena.get::<kvm_bpf_user_region>(), wanted, "{context}");
            }
            What::Mem(_) => {
                let (addr, size, flags) = model.mems[&step.index];
                let wanted = kvm_bpf_user_mem {
                    addr,
                    size,
                    flags,
                    pad: 0,
                };
                assert_got!(self.arena.get::<kvm_bpf_user_mem>(), wanted, "{context}");
            }
            What::Perms(_) => {
                let wanted = kvm_bpf_user_perms {
                    allow: model.allow,
                    require: model.require,
                };
                assert_got!(self.arena.get::<kvm_bpf_user_perms>(), wanted, "{context}");
            }
            What::Info => {
                let wanted = self.info(region.expect("the model has it"));
                assert_got!(self.arena.get::<kvm_bpf_info>(), wanted, "{context}");
            }
            _ => unreachable!("there is nothing to get"),
        }
    }

    fn step(&mut self, random: &mut Random, number: u64) {
        let which = random.below(2) as usize;
        let step = Step::random(self.files, &self.models[which], random);
        let context = format!(
            "KVM_BPF_SEED={} step {number}: device {which} {step:x?}",
            seed()
        );
        let reasons = self.reasons(which, &step);
        let addr = step.what.put(self.arena, step.beyond);
        // SAFETY: what the address points to is nobody else's.
        let answer: Answer = unsafe {
            self.devices[which].call(step.call, step.group, step.index, addr, step.flags)
        };
        match answer {
            Ok(()) => assert!(
                reasons.is_empty(),
                "{context}: wanted {reasons:?}, got success"
            ),
            Err(Errno(errno)) => assert!(
                reasons.contains(&errno),
                "{context}: wanted {reasons:?}, got {:?}",
                Errno(errno)
            ),
        }
        match (answer, step.call) {
            (Ok(()), Call::Set) => self.apply(which, &step),
            (Ok(()), Call::Get) => self.assert_returned(which, &step, &context),
            _ => {}
        }
    }

    /// All that the kernel tells of a device, in words and by calls, is what the model has.
    fn assert_same(&self, which: usize, context: &str) {
        let (device, model) = (&self.devices[which], &self.models[which]);
        let words = |kind| {
            let (id, tag, sleeps) = self.program(kind);
            let sleeps = if sleeps { " sleeps" } else { "" };
            format!("{id} {:016x}{sleeps}", u64::from_be_bytes(tag))
        };
        let mut wanted = Vec::new();
        for (index, region) in &model.regions {
            let bus = if region.is_pio { "pio" } else { "mmio" };
            let mut line = format!(
                "region:\t{index} {bus} {:#x} {:#x}",
                region.addr, region.size
            );
            for (what, kind) in [("read", region.read), ("write", region.write)] {
                if kind != Kind::None {
                    line += &format!(" {what} {}", words(kind));
                }
            }
            wanted.push(line);
            assert_got!(
                device.info(*index),
                Ok(self.info(region)),
                "{context}: INFO {index}"
            );
        }
        wanted.extend(model.irqs.iter().map(|index| format!("irq:\t{index}")));
        for (index, (addr, size, flags)) in &model.mems {
            let rights = ["", "r", "w", "rw"][*flags as usize];
            wanted.push(format!("mem:\t{index} {addr:#x} {size:#x} {rights}"));
        }
        for (index, &(prog, eventfd)) in &model.works {
            let eventfd = if eventfd == Kind::None {
                ""
            } else {
                " eventfd"
            };
            wanted.push(format!("work:\t{index} {}{eventfd}", words(prog)));
        }
        wanted.push(format!("allow:\t{:#x}", model.allow));
        wanted.push(format!("require:\t{:#x}", model.require));
        wanted.push("sealed:\t0".to_string());

        let path = format!("/proc/self/fdinfo/{}", device.as_raw_fd());
        let text = fs::read_to_string(path).expect("fdinfo");
        let ours = |line: &&str| {
            let names = [
                "region:", "irq:", "mem:", "work:", "allow:", "require:", "sealed:",
            ];
            names.iter().any(|name| line.starts_with(name))
        };
        let got: Vec<_> = text.lines().filter(ours).collect();
        assert_got!(got, wanted, "{context}: fdinfo of device {which}");
    }

    /// Closes one of the devices, and has a new one in its place.
    fn replace(&mut self, which: usize) {
        self.devices[which] = Device::new(self.guest.vm());
        self.models[which] = Model::new();
    }
}

pub(super) fn calls() {
    let census = Census::now();
    {
        let guest = Guest::new();
        let files = Files::new(&guest);
        let arena = Arena::new();
        let mut bench = Bench {
            files: &files,
            guest: &guest,
            arena: &arena,
            devices: [Device::new(guest.vm()), Device::new(guest.vm())],
            models: [Model::new(), Model::new()],
        };
        let mut random = Random::new(seed());
        for_a_while("calls", |number| {
            bench.step(&mut random, number);
            if number % (LIFE / 2) == LIFE / 2 - 1 {
                let context = format!("KVM_BPF_SEED={} after step {number}", seed());
                bench.assert_same(0, &context);
                bench.assert_same(1, &context);
                bench.replace((number / (LIFE / 2) % 2) as usize);
            }
        });
    }
    census.wait_for_newer(0, 0);
}
