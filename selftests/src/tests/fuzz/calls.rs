// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Calls of user space on two devices of one VM, good and bad, against a model of the ABI.
//!
//! The model knows which reasons there are for a call to fail: without one it must succeed, and with
//! some it must fail with one of their errnos and have changed nothing. In which order the kernel
//! looks for reasons is not part of the ABI.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::fd::AsRawFd;

use kvm_bpf::uapi::{
    KVM_BPF_ALLOW_NEW_REGION, KVM_BPF_ALLOW_REMOVE, KVM_BPF_ALLOW_REPLACE, KVM_BPF_ALLOW_RUN,
    KVM_BPF_ALLOW_SET_IRQ, KVM_BPF_ALLOW_SET_MEM, KVM_BPF_ALLOW_SET_PIO, KVM_BPF_ALLOW_SET_WORK,
    KVM_BPF_INFO_READ_SLEEPS, KVM_BPF_INFO_WRITE_SLEEPS, KVM_BPF_MEM_READ, KVM_BPF_MEM_WRITE,
    KVM_DEV_BPF_ATTR_GROUP_INFO, KVM_DEV_BPF_ATTR_GROUP_IRQ, KVM_DEV_BPF_ATTR_GROUP_PIO,
    KVM_DEV_BPF_ATTR_GROUP_REGION, KVM_DEV_BPF_ATTR_GROUP_RUN, KVM_DEV_BPF_ATTR_GROUP_WORK,
    kvm_bpf_info, kvm_bpf_user_mem, kvm_bpf_user_perms, kvm_bpf_user_region,
};
use kvm_bpf_selftests::bpf::{Census, ProgType, program_id, program_tag};
use kvm_bpf_selftests::device::{Answer, Call, Device};
use kvm_bpf_selftests::guest::Guest;
use kvm_bpf_selftests::harness::{Errno, Random};

use super::super::perms::ALL;
use super::{for_a_while, seed};
use files::{Arena, Files, Kind};
use steps::{Step, What, limit};

mod files;
mod steps;

const PAGE: usize = 0x1000;
const NOT_EXTENSIBLE: u64 = 1;
const HAS_PORTS: bool = cfg!(target_arch = "x86_64");
/// How many steps a device lives: most of its permissions are gone then.
const LIFE: u64 = 120;

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
