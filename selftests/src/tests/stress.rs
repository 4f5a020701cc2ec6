// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Everything at once: threads that change devices and the VM in ways that are random, against
//! vCPUs that access them.
//!
//! What each thread decides follows from `KVM_BPF_SEED` alone; how they interleave does not.
//! `KVM_BPF_STRESS_MS` sets for how long. Each call may fail only with what the ABI has for it in
//! some interleaving, each access has to give what some program that may be attached gives, and at
//! the end nothing is left.

use std::fs;
use std::path::Path;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use kvm_bpf_selftests::bpf::Census;
use kvm_bpf_selftests::device::{Device, NO_REGION, NO_WORK, work};
use kvm_bpf_selftests::guest::{Guest, SharedMemory};
use kvm_bpf_selftests::harness::{Random, meanwhile, number_from_env, wait_for};

use super::{SIZE, eventfd};
use player::Player;
use programs::{MEM_VALUE, Pool, Slow};
use tally::Tally;
use world::World;

mod player;
mod programs;
mod tally;
mod world;

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
        let signal = eventfd();
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
        eventfds: [(); EVENTFDS as usize].map(|()| eventfd()),
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
