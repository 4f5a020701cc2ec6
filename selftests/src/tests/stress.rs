// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Everything at once: threads that change devices and the VM in ways that are random, against
//! vCPUs that access them.
//!
//! What each thread decides follows from `KVM_BPF_SEED` alone; how they interleave does not.
//! `KVM_BPF_STRESS_MS` sets for how long. Each call may fail only with what the ABI has for it in
//! some interleaving, each access has to give what some program that may be attached gives, and at
//! the end nothing is left.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use Reg::{R0, R1, R2, R3, R4, R6, R7, R10};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_bpf::uapi::{
    KVM_BPF_ALLOW_IRQ, KVM_BPF_ALLOW_MEM_R, KVM_BPF_ALLOW_MEM_W, KVM_BPF_ALLOW_RUN,
    KVM_BPF_ALLOW_SLEEP, KVM_BPF_MEM_READ, KVM_BPF_MEM_WRITE, KVM_DEV_BPF_ATTR_GROUP_PIO,
    KVM_DEV_BPF_ATTR_GROUP_REGION, kvm_bpf_user_irq, kvm_bpf_user_mem, kvm_bpf_user_region,
};
use kvm_bpf_selftests::bpf::{
    Census, Index, Insn, Map, Prog, ProgType, Reg, add_imm, and, atomic_add, call_helper,
    call_kfunc, exit, jump_if_ne, load, lookup, mov, mov_imm, mov_imm64, program_id, store,
    store_imm,
};
use kvm_bpf_selftests::device::{Device, NO_REGION, NO_WORK, work};
#[cfg(target_arch = "x86_64")]
use kvm_bpf_selftests::guest::PortExit;
use kvm_bpf_selftests::guest::{Args, Exit, Guest, Routine, SharedMemory, USER_ANSWER, Vcpu, mask};
use kvm_bpf_selftests::harness::{Errno, Random, meanwhile, number_from_env, wait_for};
use kvm_bpf_selftests::programs::{CTX_BUF, answer_insns, ret};
use kvm_ioctls::{IoEventAddress, NoDatamatch};
use libbpf_rs::libbpf_sys as sys;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::irq::call_with_context;
use super::kfunc::required;
use super::perms::seal;
use super::{ADDR, SIZE};

tests!(everything_at_once);

fn duration() -> Duration {
    Duration::from_millis(number_from_env("KVM_BPF_STRESS_MS", 6000))
}

/// How many VMs follow each other.
const LIVES: u32 = 3;
const VCPUS: u32 = 2;
const CONTROLS: u64 = 3;
const DEVICES: u64 = 3;
/// Indices that are used, of each group: few, so that threads meet.
const INDICES: u64 = 4;
const EVENTFDS: u64 = 4;

/// Where the memory is that comes and goes.
const MEM: u64 = 0xc000_0000;
/// Where the region is of a device that one thread has alone.
const OWN: u64 = 0xd100_0000;
const PORT: u64 = 0x500;
/// What the memory has, whoever writes to it: any part of it looks the same.
const MEM_VALUE: u64 = 0x7777_7777_7777_7777;
const ANSWERS: [u64; 4] = [
    0x1111_1111_1111_1111,
    0x2222_2222_2222_2222,
    0x3333_3333_3333_3333,
    0x4444_4444_4444_4444,
];

/// All that this kernel knows.
const ALL: u64 = 0xff_07ff;

/// A program, and what a device must allow for it.
struct Choice {
    prog: Prog,
    needs: u64,
}

/// Programs that devices get.
struct Pool {
    reads: Vec<Choice>,
    writes: Vec<Choice>,
    works: Vec<Choice>,
    /// What each needs, by its number.
    needs: HashMap<u32, u64>,
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
    fn new() -> Self {
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

/// A device of all threads.
struct Shared {
    device: Device,
    /// What it does not allow any more is not here: bits go once the call has returned.
    allow: AtomicU64,
}

/// Counts results by call.
#[derive(Default)]
struct Tally(Mutex<BTreeMap<(&'static str, &'static str), u64>>);

impl Tally {
    fn count(&self, what: &'static str, how: &'static str) {
        let mut counts = self.0.lock().expect("no thread has panicked");
        *counts.entry((what, how)).or_default() += 1;
    }

    fn of(&self, what: &'static str, how: &'static str) -> u64 {
        let counts = self.0.lock().expect("no thread has panicked");
        counts.get(&(what, how)).copied().unwrap_or(0)
    }

    /// The result of a call, which may fail with these only.
    #[track_caller]
    fn check<T>(
        &self,
        what: &'static str,
        result: Result<T, Errno>,
        errnos: &[(i32, &'static str)],
    ) -> Option<T> {
        match result {
            Ok(value) => {
                self.count(what, "ok");
                Some(value)
            }
            Err(Errno(errno)) => {
                let known = errnos.iter().find(|&&(known, _)| known == errno);
                let Some(&(_, name)) = known else {
                    panic!("{what}: wanted success or one of {errnos:?}, got {errno}");
                };
                self.count(what, name);
                None
            }
        }
    }
}

const EACCES: (i32, &str) = (libc::EACCES, "EACCES");
const EAGAIN: (i32, &str) = (libc::EAGAIN, "EAGAIN");
const EBUSY: (i32, &str) = (libc::EBUSY, "EBUSY");
const EEXIST: (i32, &str) = (libc::EEXIST, "EEXIST");
const EINVAL: (i32, &str) = (libc::EINVAL, "EINVAL");
const ENOENT: (i32, &str) = (libc::ENOENT, "ENOENT");
const EPERM: (i32, &str) = (libc::EPERM, "EPERM");

/// A VM, and all that threads share of it.
struct World<'a> {
    /// Nothing once its file descriptor is closed.
    guest: Mutex<Option<Arc<Guest>>>,
    devices: [Mutex<Option<Arc<Shared>>>; DEVICES as usize],
    eventfds: [EventFd; EVENTFDS as usize],
    memory: &'a SharedMemory,
    pool: &'a Pool,
    tally: &'a Tally,
    /// Held by the thread that has the region at [`OWN`].
    own: Mutex<()>,
    /// The VM may be sealed from now on.
    may_seal: AtomicBool,
    sealed: AtomicBool,
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
    fn guest(&self) -> Option<Arc<Guest>> {
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
    fn step(&self, random: &mut Random) {
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

/// What a vCPU does.
struct Player<'a> {
    vcpu: Vcpu,
    random: Random,
    tally: &'a Tally,
}

impl Player<'_> {
    fn step(&mut self) {
        let random = &mut Random::new(self.random.next());
        let width = 1 << random.below(4);
        let addr = match random.below(6) {
            0 => MEM + random.below(3) * SIZE / 2,
            1..=2 => OWN,
            _ => ADDR + random.below(6) * SIZE / 2,
        } + 8 * random.below(2);
        // Most of the time inside the programs that others take away.
        if random.below(4) == 0 {
            return self.write_often(OWN);
        }
        match random.below(if cfg!(target_arch = "x86_64") { 6 } else { 4 }) {
            0..=1 => self.read(addr, width),
            2 => self.write(addr, width),
            3 => self.write_often(addr),
            #[cfg(target_arch = "x86_64")]
            4 => self.port_in(random),
            #[cfg(target_arch = "x86_64")]
            _ => self.port_out(random),
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("four things"),
        }
    }

    /// What a program or the memory gives.
    #[track_caller]
    fn assert_known(&self, value: u64, width: usize, what: &str) {
        let known = ANSWERS.iter().chain(&[MEM_VALUE, 0]);
        let mut known = known.map(|value| value & mask(width));
        let is_known = known.any(|known| known == value & mask(width));
        assert!(
            is_known,
            "{what}: wanted what some program gives, got {value:#x}"
        );
    }

    fn read(&mut self, addr: u64, width: usize) {
        let read = self.vcpu.read(addr, width);
        let what = format!("{width}-byte read at {addr:#x}");
        if read.exits.is_empty() {
            self.assert_known(read.value, width, &what);
            self.tally.count("read", "handled");
        } else {
            assert_got!(read.exits, [Exit::Read(addr, width)], "{what}");
            assert_got!(read.value, USER_ANSWER & mask(width), "{what}, exited");
            self.tally.count("read", "exit");
        }
    }

    /// Writes what the memory has anyway.
    fn write(&mut self, addr: u64, width: usize) {
        let exits = self.vcpu.write(addr, width, MEM_VALUE);
        if exits.is_empty() {
            self.tally.count("write", "handled");
        } else {
            let exit = Exit::Write(addr, width, MEM_VALUE & mask(width));
            assert_got!(exits, [exit], "{width}-byte write at {addr:#x}");
            self.tally.count("write", "exit");
        }
    }

    fn write_often(&mut self, addr: u64) {
        let args = Args {
            value: MEM_VALUE,
            addr,
            count: 20,
            ..Default::default()
        };
        let (results, exits) = self.vcpu.call(Routine::WriteLoop, args);
        assert_got!(results.count, 0, "writes that are left");
        let exit = Exit::Write(addr, 4, MEM_VALUE & mask(4));
        let is_known = exits.len() <= 20 && exits.iter().all(|&got| got == exit);
        assert!(is_known, "20 writes at {addr:#x}: got {exits:x?}");
        self.tally.count("write", "loop");
    }

    #[cfg(target_arch = "x86_64")]
    fn port_in(&mut self, random: &mut Random) {
        let width = 1 << random.below(3);
        let port = (PORT + 4 * random.below(6)) as u16;
        let (register, exits) = self.vcpu.port_in(port, width);
        let what = format!("in of {width} bytes from {port:#x}");
        if exits.is_empty() {
            self.assert_known(register & mask(width), width, &what);
            self.tally.count("in", "handled");
        } else {
            assert_got!(exits, [PortExit::In(port, width, 1)], "{what}");
            self.tally.count("in", "exit");
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn port_out(&mut self, random: &mut Random) {
        let width = 1 << random.below(3);
        let port = (PORT + 4 * random.below(6)) as u16;
        let exits = self.vcpu.port_out(port, width, MEM_VALUE);
        if exits.is_empty() {
            self.tally.count("out", "handled");
        } else {
            let exit = PortExit::Out(port, width, vec![0x77; width]);
            assert_got!(exits, [exit], "out of {width} bytes to {port:#x}");
            self.tally.count("out", "exit");
        }
    }
}

/// Counts itself when it begins and when it ends, and takes its time.
struct Slow {
    counts: Map,
    write: Prog,
    work: Prog,
}

impl Slow {
    fn new() -> Self {
        let counts = Map::new(1, 2);
        let mut insns = lookup(&counts, Index::Imm(0));
        insns.extend([
            mov(R7, R0),
            mov_imm(R1, 1),
            atomic_add(8, R7, 0, R1),
            mov_imm(R6, 1000),
            call_helper(sys::BPF_FUNC_ktime_get_ns),
            add_imm(R6, -1),
            jump_if_ne(R6, 0, -3),
            mov_imm(R1, 1),
            atomic_add(8, R7, 8, R1),
        ]);
        insns.extend(ret(0));
        Slow {
            write: Prog::load(ProgType::WRITE, &insns),
            work: Prog::load(ProgType::WORK, &insns),
            counts,
        }
    }

    fn region(&self) -> kvm_bpf_user_region {
        kvm_bpf_user_region {
            addr: OWN,
            size: SIZE,
            bpf_readfd: -1,
            bpf_writefd: self.write.as_raw_fd(),
        }
    }

    /// None of its programs runs.
    #[track_caller]
    fn assert_over(&self, what: &str) {
        let counts = self.counts.get(0);
        assert_got!(counts[1], counts[0], "runs that have ended, {what}");
    }

    /// Whether one of them does.
    fn is_running(&self) -> bool {
        let counts = self.counts.get(0);
        counts[1] != counts[0]
    }

    fn runs(&self) -> u64 {
        self.counts.get(0)[0]
    }
}

/// What a thread does that changes things.
struct Control<'a> {
    world: &'a World<'a>,
    random: Random,
    /// For devices that no other thread has.
    slow: &'a [Slow; 2],
}

impl Control<'_> {
    fn step(&mut self) {
        if self.random.below(10) == 0 {
            let random = &mut Random::new(self.random.next());
            self.own_device(random);
        } else {
            self.world.step(&mut self.random);
        }
    }

    /// A device of its own: when a call has taken programs away, none of them runs.
    fn own_device(&self, random: &mut Random) {
        let [first, second] = self.slow;
        let signal = EventFd::new(EFD_NONBLOCK).expect("eventfd");
        let by_region = random.below(2) == 0;
        // A run by a signal is over soon, while vCPUs begin one after the other.
        let longest = if by_region { 8000 } else { 300 };
        let pause = Duration::from_micros(random.below(longest));
        let (swaps, removes) = (random.below(2) == 0, random.below(2) == 0);

        let Ok(_own) = self.world.own.try_lock() else {
            return;
        };
        let Some(guest) = self.world.guest() else {
            return;
        };
        // Sealed, perhaps.
        let Ok(device) = Device::try_new(guest.vm()) else {
            assert!(
                self.world.may_seal.load(SeqCst),
                "wanted a device, got none"
            );
            return;
        };
        let set = |slow: &Slow| {
            if by_region {
                device.set_region(0, &slow.region());
            } else {
                device.set_work(0, &work(Some(&slow.work), Some(&signal)));
                signal.write(1).expect("signalling an eventfd");
            }
            thread::sleep(pause);
        };
        let count = |slow: &Slow, what| {
            let how = if slow.is_running() { "inside" } else { "idle" };
            self.world.tally.count(what, how);
        };
        set(first);
        if swaps {
            count(first, "own swap");
            set(second);
            first.assert_over("swapped");
        }
        let last = if swaps { second } else { first };
        count(last, if removes { "own remove" } else { "own close" });
        if removes && by_region {
            device.set_region(0, &NO_REGION);
        } else if removes {
            device.set_work(0, &NO_WORK);
        }
        if removes {
            first.assert_over("removed");
            second.assert_over("removed");
        }
        drop(device);
        first.assert_over("closed");
        second.assert_over("closed");
        self.world.tally.count("own device", "ok");
    }
}

/// A VM from its beginning to its end.
fn life(
    number: u32,
    seed: u64,
    memory: &SharedMemory,
    pool: &Pool,
    slow: &[[Slow; 2]],
    tally: &Tally,
) {
    let mut random = Random::new(seed ^ u64::from(number) << 32);
    let guest = Guest::new();
    let vcpus: Vec<_> = (0..VCPUS).map(|id| guest.vcpu(id)).collect();
    let world = World {
        guest: Mutex::new(Some(Arc::new(guest))),
        devices: Default::default(),
        eventfds: [(); EVENTFDS as usize].map(|()| EventFd::new(EFD_NONBLOCK).expect("eventfd")),
        memory,
        pool,
        tally,
        own: Mutex::new(()),
        may_seal: false.into(),
        sealed: false.into(),
    };
    let mut workers: Vec<Box<dyn FnMut() + Send + '_>> = Vec::new();
    for vcpu in vcpus {
        let mut player = Player {
            vcpu,
            random: Random::new(random.next()),
            tally,
        };
        workers.push(Box::new(move || player.step()));
    }
    for slow in slow {
        let mut control = Control {
            world: &world,
            random: Random::new(random.next()),
            slow,
        };
        workers.push(Box::new(move || control.step()));
    }
    let (vm_first, devices_first) = (random.below(2) == 0, random.below(2) == 0);
    let whole = duration() / LIVES;
    meanwhile(workers, || {
        thread::sleep(whole / 2);
        world.may_seal.store(true, SeqCst);
        thread::sleep(whole / 4);
        // The VM lives on, in its vCPUs and devices.
        if vm_first {
            *world.guest.lock().expect("no thread has panicked") = None;
        }
        thread::sleep(whole / 8);
        if devices_first {
            for slot in &world.devices {
                let device = slot.lock().expect("no thread has panicked").take();
                drop(device);
            }
        }
        thread::sleep(whole / 8);
    });
}

fn entries(directory: &str) -> usize {
    let entries = fs::read_dir(Path::new(directory));
    entries.expect("a directory of this process").count()
}

/// How many calls have taken a program away while it ran.
fn inside(tally: &Tally) -> u64 {
    let calls = ["own swap", "own remove", "own close"];
    calls.iter().map(|what| tally.of(what, "inside")).sum()
}

fn everything_at_once() {
    let seed = number_from_env("KVM_BPF_SEED", 1);
    println!("KVM_BPF_SEED={seed}");
    let before = [entries("/proc/self/fd"), entries("/proc/self/task")];
    let census = Census::now();
    let tally = Tally::default();
    let runs;
    {
        let memory = SharedMemory::new(1);
        for word in 0..SIZE as usize / 4 {
            memory.word(word).store(MEM_VALUE as u32, SeqCst);
        }
        let pool = Pool::new();
        // The verifier follows each of their rounds.
        let slow: Vec<_> = (0..CONTROLS).map(|_| [Slow::new(), Slow::new()]).collect();
        // And more if no call has met a program inside.
        for number in 0..10 * LIVES {
            if number >= LIVES && inside(&tally) > 0 {
                break;
            }
            life(number, seed, &memory, &pool, &slow, &tally);
        }
        runs = slow.iter().flatten().map(Slow::runs).sum::<u64>();
        // Nobody has written anything else.
        for word in 0..SIZE as usize / 4 {
            let got = memory.word(word).load(SeqCst);
            assert_got!(got, MEM_VALUE as u32, "word {word} of the memory");
        }
    }

    let counts = tally.0.lock().expect("no thread has panicked").clone();
    let mut text = format!("runs of slow programs {runs}");
    let mut last = "";
    for ((what, how), count) in &counts {
        if *what != last {
            text += &format!("\n  {what}:");
            last = what;
        }
        text += &format!(" {how} {count}");
    }
    println!("{text}");
    // It was not idle.
    for what in [
        "create",
        "close",
        "set region",
        "set work",
        "set window",
        "give up",
        "set irq",
        "run",
        "memory slot",
        "seal",
        "own device",
    ] {
        assert!(tally.of(what, "ok") > 0, "{what}: wanted one to succeed");
    }
    for what in ["read", "write"] {
        assert!(tally.of(what, "handled") > 0, "{what}: none was handled");
        assert!(tally.of(what, "exit") > 0, "{what}: none has exited");
    }
    assert!(runs > 0, "wanted slow programs to run, got no run");
    assert!(
        inside(&tally) > 0,
        "wanted a call to take a program away while it runs, got none"
    );

    census.wait_for_newer(0, 0);
    wait_for("open files and threads", before, || {
        [entries("/proc/self/fd"), entries("/proc/self/task")]
    });
}
