// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A VM, and what threads do to it and its devices.

use std::fs;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_bpf::uapi::{
    KVM_BPF_ALLOW_RUN, KVM_BPF_MEM_READ, KVM_BPF_MEM_WRITE, KVM_DEV_BPF_ATTR_GROUP_PIO,
    KVM_DEV_BPF_ATTR_GROUP_REGION, kvm_bpf_user_irq, kvm_bpf_user_mem, kvm_bpf_user_region,
};
use kvm_bpf_selftests::device::{Device, NO_REGION, NO_WORK, work};
use kvm_bpf_selftests::guest::{Guest, SharedMemory};
use kvm_bpf_selftests::harness::{Errno, Random};
use kvm_ioctls::{IoEventAddress, NoDatamatch};
use vmm_sys_util::eventfd::EventFd;

use super::super::perms::{ALL, seal};
use super::super::{ADDR, SIZE};
use super::programs::{Choice, Pool};
use super::tally::Tally;
use super::{DEVICES, EVENTFDS, INDICES, MEM, PORT};

/// A device of all threads.
pub(super) struct Shared {
    device: Device,
    /// What it does not allow any more is not here: bits go once the call has returned.
    allow: AtomicU64,
}

const EACCES: (i32, &str) = (libc::EACCES, "EACCES");
const EAGAIN: (i32, &str) = (libc::EAGAIN, "EAGAIN");
const EBUSY: (i32, &str) = (libc::EBUSY, "EBUSY");
const EEXIST: (i32, &str) = (libc::EEXIST, "EEXIST");
const EINVAL: (i32, &str) = (libc::EINVAL, "EINVAL");
const ENOENT: (i32, &str) = (libc::ENOENT, "ENOENT");
const EPERM: (i32, &str) = (libc::EPERM, "EPERM");

/// A VM, and all that threads share of it.
pub(super) struct World<'a> {
    /// Nothing once its file descriptor is closed.
    pub(super) guest: Mutex<Option<Arc<Guest>>>,
    pub(super) devices: [Mutex<Option<Arc<Shared>>>; DEVICES as usize],
    pub(super) eventfds: [EventFd; EVENTFDS as usize],
    pub(super) memory: &'a SharedMemory,
    pub(super) pool: &'a Pool,
    pub(super) tally: &'a Tally,
    /// Held by the thread that has the region at [`OWN`].
    pub(super) own: Mutex<()>,
    /// The VM may be sealed from now on.
    pub(super) may_seal: AtomicBool,
    pub(super) sealed: AtomicBool,
}

/// Ranges of which some overlap, and one is where the memory may be.
fn range(random: &mut Random) -> (u64, u64) {
    match random.below(6) {
        0 => (MEM, SIZE),
        n => (ADDR + (n - 1) * SIZE / 2, SIZE / (1 + random.below(2))),
    }
}

fn ports(random: &mut Random) -> (u64, u64) {
    (PORT + 4 * random.below(4), 4 * (1 + random.below(2)))
}

fn window(random: &mut Random) -> kvm_bpf_user_mem {
    let flags = [
        KVM_BPF_MEM_READ,
        KVM_BPF_MEM_WRITE,
        KVM_BPF_MEM_READ | KVM_BPF_MEM_WRITE,
    ];
    kvm_bpf_user_mem {
        addr: MEM,
        size: 8 << random.below(3),
        flags: flags[random.below(3) as usize],
        pad: 0,
    }
}

impl World<'_> {
    pub(super) fn guest(&self) -> Option<Arc<Guest>> {
        self.guest.lock().expect("no thread has panicked").clone()
    }

    fn device(&self, random: &mut Random) -> Option<Arc<Shared>> {
        let slot = &self.devices[random.below(DEVICES) as usize];
        slot.lock().expect("no thread has panicked").clone()
    }

    fn eventfd(&self, random: &mut Random) -> &EventFd {
        &self.eventfds[random.below(EVENTFDS) as usize]
    }

    /// Does one thing.
    ///
    /// All random numbers of a thing are drawn before the first result is looked at, from a
    /// generator of its own: what the thread does next does not depend on what came of it.
    pub(super) fn step(&self, random: &mut Random) {
        let random = &mut Random::new(random.next());
        match random.below(64) {
            0..=1 => self.create(random),
            2 => self.close(random),
            3..=21 => self.set_region(random),
            22..=23 => self.remove_region(random),
            24..=27 => self.irq(random),
            28..=30 => self.mem(random),
            31..=37 => self.set_work(random),
            38..=41 => {
                let written = self.eventfd(random).write(1 + random.below(3));
                written.expect("signalling an eventfd");
            }
            42..=46 => self.run(random),
            47..=48 => self.give_up(random),
            49..=55 => self.get(random),
            56..=58 => self.fdinfo(random),
            59..=60 => self.slot(random),
            61 => self.ioeventfd(random),
            _ => self.seal(random),
        }
    }

    fn create(&self, random: &mut Random) {
        let slot = &self.devices[random.below(DEVICES) as usize];
        let Some(guest) = self.guest() else {
            return;
        };
        let was_sealed = self.sealed.load(SeqCst);
        let device = Device::try_new(guest.vm());
        let errnos: &[_] = if self.may_seal.load(SeqCst) {
            &[EPERM]
        } else {
            &[]
        };
        let Some(device) = self.tally.check("create", device, errnos) else {
            return;
        };
        assert!(!was_sealed, "a device of a VM that was sealed before");
        let shared = Shared {
            device,
            allow: ALL.into(),
        };
        let mut slot = slot.lock().expect("no thread has panicked");
        // The other one is closed when the slot is free for other threads again.
        let old = slot.replace(Arc::new(shared));
        drop(slot);
        drop(old);
    }

    fn close(&self, random: &mut Random) {
        let slot = &self.devices[random.below(DEVICES) as usize];
        let old = slot.lock().expect("no thread has panicked").take();
        if old.is_some() {
            self.tally.count("close", "ok");
        }
        drop(old);
    }

    fn set_region(&self, random: &mut Random) {
        let Some(shared) = self.device(random) else {
            return;
        };
        let is_pio = cfg!(target_arch = "x86_64") && random.below(3) == 0;
        let (addr, size) = if is_pio { ports(random) } else { range(random) };
        // Most often an index that has the range, if it has one.
        let index = match random.below(4) {
            0 => random.below(INDICES),
            _ => addr / if is_pio { 4 } else { SIZE / 2 } % INDICES,
        };
        let directions = 1 + random.below(3);
        let mut choose = |choices: &[Choice], bit| {
            let choice = &choices[random.below(choices.len() as u64) as usize];
            match directions & bit {
                0 => -1,
                _ => choice.prog.as_raw_fd(),
            }
        };
        let region = kvm_bpf_user_region {
            addr,
            size,
            bpf_readfd: choose(&self.pool.reads, 1),
            bpf_writefd: choose(&self.pool.writes, 2),
        };
        let (what, answer) = if is_pio {
            ("set ports", shared.device.try_set_ports(index, &region))
        } else {
            ("set region", shared.device.try_set_region(index, &region))
        };
        self.tally.check(what, answer, &[EACCES, EEXIST]);
    }

    fn remove_region(&self, random: &mut Random) {
        let Some(shared) = self.device(random) else {
            return;
        };
        let index = random.below(INDICES);
        let answer = shared.device.try_set_region(index, &NO_REGION);
        self.tally.check("remove region", answer, &[EACCES, ENOENT]);
        if cfg!(target_arch = "x86_64") {
            let answer = shared.device.try_set_ports(index, &NO_REGION);
            self.tally.check("remove ports", answer, &[EACCES, ENOENT]);
        }
    }

    fn irq(&self, random: &mut Random) {
        let Some(shared) = self.device(random) else {
            return;
        };
        let index = random.below(INDICES);
        let detach = random.below(3) == 0;
        let eventfd = self.eventfd(random).as_raw_fd();
        let irq = kvm_bpf_user_irq {
            eventfd: if detach { -1 } else { eventfd },
            flags: 0,
        };
        let answer = shared.device.try_set_irq(index, &irq);
        if detach {
            self.tally.check("detach irq", answer, &[EACCES, ENOENT]);
        } else {
            self.tally.check("set irq", answer, &[EACCES]);
        }
    }

    fn mem(&self, random: &mut Random) {
        let Some(shared) = self.device(random) else {
            return;
        };
        let index = random.below(INDICES);
        if random.below(3) == 0 {
            let none = kvm_bpf_user_mem::default();
            let answer = shared.device.try_set_mem(index, &none);
            self.tally.check("remove window", answer, &[EACCES, ENOENT]);
        } else {
            let answer = shared.device.try_set_mem(index, &window(random));
            self.tally.check("set window", answer, &[EACCES]);
        }
    }

    fn set_work(&self, random: &mut Random) {
        let Some(shared) = self.device(random) else {
            return;
        };
        let index = random.below(INDICES);
        if random.below(4) == 0 {
            let answer = shared.device.try_set_work(index, &NO_WORK);
            self.tally.check("remove work", answer, &[EACCES, ENOENT]);
            return;
        }
        let works = &self.pool.works;
        let prog = &works[random.below(works.len() as u64) as usize].prog;
        let eventfd = self.eventfd(random);
        let eventfd = (random.below(3) > 0).then_some(eventfd);
        let answer = shared
            .device
            .try_set_work(index, &work(Some(prog), eventfd));
        // Another index or another device has the eventfd.
        let errnos: &[_] = match eventfd {
            Some(_) => &[EACCES, EBUSY],
            None => &[EACCES],
        };
        self.tally.check("set work", answer, errnos);
    }

    fn run(&self, random: &mut Random) {
        let Some(shared) = self.device(random) else {
            return;
        };
        let allowed = shared.allow.load(SeqCst) & KVM_BPF_ALLOW_RUN != 0;
        let answer = shared.device.run(random.below(INDICES), random.next());
        let ran = matches!(answer, Ok(()) | Err(Errno(libc::EAGAIN)));
        assert!(allowed || !ran, "RUN without its permission: {answer:?}");
        self.tally.check("run", answer, &[EACCES, EAGAIN, ENOENT]);
    }

    /// Gives up few permissions, so that devices are good for a while.
    fn give_up(&self, random: &mut Random) {
        let Some(shared) = self.device(random) else {
            return;
        };
        let bits: Vec<u64> = (0..64)
            .map(|bit| 1 << bit & ALL)
            .filter(|&b| b != 0)
            .collect();
        let bit = bits[random.below(bits.len() as u64) as usize];
        let is_strict = random.below(4) == 0;
        if random.below(2) == 0 {
            return;
        }
        let now = shared.device.perms();
        assert_got!(now.allow & !ALL, 0, "permissions");
        let require = now.require | u64::from(is_strict);
        let allow = now.allow & !bit;
        let answer = shared.device.try_set_perms(allow, require);
        // Another thread has given up more meanwhile.
        let errnos = [EBUSY, EPERM];
        if self.tally.check("give up", answer, &errnos).is_some() {
            shared.allow.fetch_and(allow, SeqCst);
        }
        let later = shared.device.perms();
        let back = later.allow & !now.allow;
        assert_got!(back, 0, "permissions that have come back");
        assert_got!(
            now.require & !later.require,
            0,
            "what is not required any more"
        );
    }

    fn get(&self, random: &mut Random) {
        let Some(shared) = self.device(random) else {
            return;
        };
        let index = random.below(INDICES);
        match random.below(4) {
            0 => {
                let region = shared.device.region(index);
                if let Some(region) = self.tally.check("get region", region, &[ENOENT]) {
                    let is_known =
                        region.addr == MEM || (ADDR..ADDR + 3 * SIZE).contains(&region.addr);
                    assert!(is_known, "a region that nobody has set: {region:x?}");
                    assert!([SIZE, SIZE / 2].contains(&region.size), "{region:x?}");
                    assert_got!((region.bpf_readfd, region.bpf_writefd), (-1, -1));
                }
            }
            1 if cfg!(target_arch = "x86_64") => {
                let ports = shared.device.ports(index);
                if let Some(ports) = self.tally.check("get ports", ports, &[ENOENT]) {
                    let is_known = (PORT..PORT + 16).contains(&ports.addr);
                    assert!(is_known && [4, 8].contains(&ports.size), "{ports:x?}");
                }
            }
            2 => {
                let window = shared.device.mem(index);
                if let Some(window) = self.tally.check("get window", window, &[ENOENT]) {
                    let is_known = window.addr == MEM && [8, 16, 32].contains(&window.size);
                    assert!(
                        is_known && window.flags != 0 && window.pad == 0,
                        "{window:x?}"
                    );
                }
            }
            _ => {
                // Programs that need more cannot be there: they go before a permission does.
                let allow = shared.allow.load(SeqCst);
                let info = shared.device.info(index);
                let Some(info) = self.tally.check("info", info, &[ENOENT]) else {
                    return;
                };
                let kinds = [KVM_DEV_BPF_ATTR_GROUP_REGION, KVM_DEV_BPF_ATTR_GROUP_PIO];
                assert!(kinds.contains(&info.kind), "{info:x?}");
                assert!(info.read_id != 0 || info.write_id != 0, "{info:x?}");
                for id in [info.read_id, info.write_id] {
                    self.assert_allowed(id, allow, "info");
                }
            }
        }
    }

    #[track_caller]
    fn assert_allowed(&self, id: u32, allow: u64, where_: &str) {
        if id == 0 {
            return;
        }
        let needs = self.pool.needs.get(&id);
        let needs = needs.unwrap_or_else(|| panic!("{where_}: program {id}, which nobody has set"));
        assert_got!(
            needs & !allow,
            0,
            "{where_}: what program {id} needs of what is given up"
        );
    }

    fn fdinfo(&self, random: &mut Random) {
        let Some(shared) = self.device(random) else {
            return;
        };
        let allow = shared.allow.load(SeqCst);
        let path = format!("/proc/self/fdinfo/{}", shared.device.as_raw_fd());
        let text = fs::read_to_string(path).expect("fdinfo of an open device");
        self.tally.count("fdinfo", "ok");
        for line in text.lines() {
            let words: Vec<_> = line.split_whitespace().collect();
            let ids = match words.first() {
                Some(&"region:") => words
                    .windows(2)
                    .filter(|pair| ["read", "write"].contains(&pair[0]))
                    .map(|pair| pair[1])
                    .collect(),
                Some(&"work:") => vec![words[2]],
                _ => vec![],
            };
            for id in ids {
                let id = id.parse().unwrap_or_else(|_| panic!("fdinfo: {line:?}"));
                self.assert_allowed(id, allow, line);
            }
        }
    }

    /// Adds, moves or takes away the memory.
    fn slot(&self, random: &mut Random) {
        let Some(guest) = self.guest() else {
            return;
        };
        let (size, moved) = (random.below(3), random.below(2));
        let slot = kvm_userspace_memory_region {
            slot: 3,
            flags: 0,
            guest_phys_addr: MEM + moved * SIZE,
            memory_size: if size == 0 { 0 } else { SIZE },
            userspace_addr: (&raw const *self.memory.word(0)) as u64,
        };
        // SAFETY: the memory outlives the VM, and all accesses of it are atomic.
        let answer = unsafe { guest.vm().set_user_memory_region(slot) };
        let answer = answer.map_err(|error| Errno(error.errno()));
        // There is none to take away.
        self.tally.check("memory slot", answer, &[EINVAL]);
    }

    fn ioeventfd(&self, random: &mut Random) {
        let Some(guest) = self.guest() else {
            return;
        };
        let eventfd = self.eventfd(random);
        let addr = IoEventAddress::Mmio(ADDR + 4 * SIZE / 2 + 8 * random.below(2));
        let (what, answer, errno) = match random.below(2) {
            0 => (
                "set ioeventfd",
                guest.vm().register_ioevent(eventfd, &addr, NoDatamatch),
                EEXIST,
            ),
            _ => (
                "remove ioeventfd",
                guest.vm().unregister_ioevent(eventfd, &addr, NoDatamatch),
                ENOENT,
            ),
        };
        let answer = answer.map_err(|error| Errno(error.errno()));
        self.tally.check(what, answer, &[errno]);
    }

    fn seal(&self, random: &mut Random) {
        let wants = random.below(20) == 0;
        if !wants || !self.may_seal.load(SeqCst) {
            return;
        }
        let Some(guest) = self.guest() else {
            return;
        };
        assert_got!(seal(guest.vm(), 1, 0), Ok(()), "KVM_ENABLE_CAP of the seal");
        self.tally.count("seal", "ok");
        self.sealed.store(true, SeqCst);
    }
}
