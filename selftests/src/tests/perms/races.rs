// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Permissions given up while another thread uses them.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::Barrier;
use std::time::Duration;
use std::{hint, thread};

use kvm_bpf::uapi::{
    KVM_BPF_ALLOW_IRQ, KVM_BPF_ALLOW_NEW_REGION, KVM_BPF_ALLOW_REMOVE, KVM_BPF_ALLOW_REPLACE,
    KVM_BPF_ALLOW_SET_IRQ, KVM_BPF_ALLOW_SET_MEM, KVM_BPF_ALLOW_SET_WORK, KVM_BPF_ALLOW_SLEEP,
    KVM_DEV_BPF_ATTR_GROUP_PIO, kvm_bpf_user_irq, kvm_bpf_user_mem,
};
use kvm_bpf_selftests::bpf::{Prog, ProgType, program_id};
use kvm_bpf_selftests::device::{Answer, Device, NO_REGION, region, work};
use kvm_bpf_selftests::guest::Guest;
use kvm_bpf_selftests::harness::{Errno, Random, number_from_env};
use kvm_bpf_selftests::programs::{answer, only_return, ret};
use vmm_sys_util::eventfd::EventFd;

use super::super::info::fdinfo;
use super::super::{ADDR, SIZE};
use super::contents::containing;
use super::{ALL, DENIED, WINDOW, fd_region, set_up};

/// What is attached while the permission that it needs is given up.
struct Race<'a> {
    what: &'static str,
    bit: u64,
    /// Before both.
    prepare: &'a dyn Fn(&Device, u64),
    /// Attaches it to the device, which is the only one at that place.
    attach: &'a (dyn Fn(&Device, u64) -> Answer + Sync),
    is_there: &'a dyn Fn(&Device) -> bool,
}

/// How many devices there are before they are closed: each is at a place of its own. A device that
/// closes waits; many that close at once wait as long as one.
const PLACES_OF_RACES: usize = 100;

fn close_at_once(devices: &mut Vec<Device>) {
    thread::scope(|scope| {
        for device in devices.drain(..) {
            scope.spawn(|| drop(device));
        }
    });
}

/// Has two threads begin at the same time, each after up to so many turns of a loop.
fn at_once<A: Send, B>(
    random: &mut Random,
    turns: u64,
    other: impl FnOnce() -> A + Send,
    this: impl FnOnce() -> B,
) -> (A, B) {
    let delays = [random.below(turns), random.below(turns)];
    let start = Barrier::new(2);
    let wait = |delay| {
        start.wait();
        (0..delay).for_each(|_| hint::spin_loop());
    };
    thread::scope(|scope| {
        let other = scope.spawn(|| {
            wait(delays[0]);
            other()
        });
        wait(delays[1]);
        let result = this();
        (other.join().expect("the other thread"), result)
    })
}

/// Either the program is there and the permission with it, or neither.
pub(super) fn no_program_slips_through_a_race() {
    let rounds = number_from_env("KVM_BPF_RACES", 200);
    let guest = Guest::new();
    let image = containing(1, 0);
    let read = image.read_program();
    let work_sleeps = Prog::load_sleepable(ProgType::WORK, &ret(0));
    let port_sleeps = Prog::load_sleepable(ProgType::WRITE, &ret(0));
    let harmless = answer(1);
    let signal = EventFd::new(0).expect("eventfd");
    let has_region = |device: &Device| device.info(0).is_ok();
    let has_work = |device: &Device| device.run(0, 0).is_ok();
    let nothing = |_: &Device, _: u64| {};
    let ports = |at| region(0x1000 + 0x10 * at, 8, None, Some(&port_sleeps));
    let races = [
        Race {
            what: "a region",
            bit: KVM_BPF_ALLOW_IRQ,
            prepare: &nothing,
            attach: &|device, at| device.try_set_region(0, &fd_region(at, read, None)),
            is_there: &has_region,
        },
        Race {
            what: "a region's new program",
            bit: KVM_BPF_ALLOW_IRQ,
            prepare: &|device, at| {
                device.set_region(0, &fd_region(at, Some(harmless.as_fd()), None));
            },
            attach: &|device, at| device.try_set_region(0, &fd_region(at, read, None)),
            is_there: &|device| {
                let now = device.info(0).expect("a region").read_id;
                now == program_id(read.expect("its program").as_raw_fd())
            },
        },
        Race {
            what: "a region of ports",
            bit: KVM_BPF_ALLOW_SLEEP,
            prepare: &nothing,
            attach: &|device, at| device.try_set_ports(0, &ports(at)),
            is_there: &has_region,
        },
        Race {
            what: "a WORK program",
            bit: KVM_BPF_ALLOW_SLEEP,
            prepare: &nothing,
            attach: &|device, _| device.try_set_work(0, &work(Some(&work_sleeps), None)),
            is_there: &has_work,
        },
        Race {
            what: "a WORK program in place of another",
            bit: KVM_BPF_ALLOW_SLEEP,
            prepare: &|device, _| {
                // It asks to be run again: running it fails.
                let again = only_return(ProgType::WORK, 1);
                device.set_work(0, &work(Some(&again), None));
            },
            attach: &|device, _| device.try_set_work(0, &work(Some(&work_sleeps), None)),
            is_there: &has_work,
        },
        Race {
            // Its thread is made meanwhile.
            what: "a WORK program with an eventfd",
            bit: KVM_BPF_ALLOW_SLEEP,
            prepare: &nothing,
            attach: &|device, _| {
                let work = work(Some(&work_sleeps), Some(&signal));
                device.try_set_work(0, &work)
            },
            is_there: &has_work,
        },
    ];
    let has_ports = Device::new(guest.vm())
        .has_attr(KVM_DEV_BPF_ATTR_GROUP_PIO, 0)
        .is_ok();
    for race in races {
        if race.what == "a region of ports" && !has_ports {
            continue;
        }
        // An eventfd has one consumer: each device closes before the next one.
        let (rounds, places) = match race.what.contains("eventfd") {
            true => (rounds / 10, 1),
            false => (rounds, PLACES_OF_RACES),
        };
        let mut random = Random::new(rounds);
        let mut outcomes = [0; 2];
        let mut devices = Vec::new();
        for round in 0..rounds {
            let device = Device::new(guest.vm());
            let at = devices.len() as u64;
            (race.prepare)(&device, at);
            let (attached, shrunk) = at_once(
                &mut random,
                2000,
                || (race.attach)(&device, at),
                || device.try_set_perms(ALL & !race.bit, 0),
            );
            let there = (race.is_there)(&device);
            let wanted = match there {
                true => (Ok(()), Err(Errno(libc::EBUSY))),
                false => (DENIED, Ok(())),
            };
            let what = race.what;
            assert_got!(
                (attached, shrunk),
                wanted,
                "{what}, round {round}, there: {there}"
            );
            outcomes[usize::from(there)] += 1;
            devices.push(device);
            if devices.len() == places {
                close_at_once(&mut devices);
            }
        }
        println!(
            "{}: refused {}, attached {}",
            race.what, outcomes[0], outcomes[1]
        );
        assert!(
            outcomes.iter().all(|&rounds| rounds > 0),
            "{}: no race: {outcomes:?}",
            race.what
        );
    }
}

/// What user space does to a device for the n-th time. The device is at an address.
type Repeated<'a> = &'a (dyn Fn(&Device, u64, u64) -> Answer + Sync);

/// When the call that gives a permission up has returned, nothing changes that it was for.
pub(super) fn no_call_slips_through_a_race() {
    let rounds = number_from_env("KVM_BPF_RACES", 200) / 10;
    let guest = Guest::new();
    let eventfd = EventFd::new(0).expect("eventfd");
    let programs = [1, 2].map(answer);
    let works = [0, 0].map(|value| only_return(ProgType::WORK, value));
    let of = |n: u64| (n % 2) as usize;
    let calls: [(&str, u64, Repeated<'_>); 6] = [
        ("interrupts", KVM_BPF_ALLOW_SET_IRQ, &|device, _, n| {
            let eventfd = if n.is_multiple_of(2) {
                eventfd.as_raw_fd()
            } else {
                -1
            };
            device.try_set_irq(1, &kvm_bpf_user_irq { eventfd, flags: 0 })
        }),
        ("windows", KVM_BPF_ALLOW_SET_MEM, &|device, _, n| {
            let window = kvm_bpf_user_mem {
                size: 1 + n,
                ..WINDOW
            };
            device.try_set_mem(0, &window)
        }),
        ("WORK programs", KVM_BPF_ALLOW_SET_WORK, &|device, _, n| {
            device.try_set_work(0, &work(Some(&works[of(n)]), None))
        }),
        ("programs", KVM_BPF_ALLOW_REPLACE, &|device, addr, n| {
            device.try_set_region(0, &region(addr, SIZE, Some(&programs[of(n)]), None))
        }),
        (
            "new regions",
            KVM_BPF_ALLOW_NEW_REGION,
            &|device, addr, n| {
                let at = addr + SIZE + 0x10 * n;
                device.try_set_region(1 + n, &region(at, 0x10, Some(&programs[0]), None))
            },
        ),
        ("removed regions", KVM_BPF_ALLOW_REMOVE, &|device, _, n| {
            device.try_set_region(1 + n, &NO_REGION)
        }),
    ];
    for (what, bit, call) in calls {
        let mut random = Random::new(rounds);
        let mut devices = Vec::new();
        let mut calls_before = 0;
        let mut rounds_with_calls = 0;
        for round in 0..rounds {
            let index = devices.len() as u64;
            let addr = ADDR + index * 4 * SIZE;
            let device = set_up(guest.vm(), index, &eventfd, 0);
            let most = match bit {
                KVM_BPF_ALLOW_NEW_REGION => 40,
                KVM_BPF_ALLOW_REMOVE => 20,
                _ => 1000,
            };
            if bit == KVM_BPF_ALLOW_REMOVE {
                for n in 0..most {
                    let at = addr + SIZE + 0x10 * n;
                    device.set_region(1 + n, &region(at, 0x10, Some(&programs[0]), None));
                }
            }
            let repeat = || {
                for n in 0..most {
                    match call(&device, addr, n) {
                        // Emulated processors take turns: the other thread's is when this one
                        // holds no lock.
                        Ok(()) => thread::sleep(Duration::from_micros(1)),
                        DENIED => return n,
                        other => panic!("{what}: wanted success or EACCES, got {other:?}"),
                    }
                }
                most
            };
            let give_up = || {
                device.set_perms(ALL & !bit, 0);
                fdinfo(&device)
            };
            let (calls, then) = at_once(&mut random, 20_000, repeat, give_up);
            let now = fdinfo(&device);
            assert_got!(now, then, "{what}, round {round}, after {calls} calls");
            calls_before += calls;
            rounds_with_calls += u64::from(calls > 0 && calls < most);
            devices.push(device);
            // A VM has 1000 ranges.
            if devices.len() == 20 {
                close_at_once(&mut devices);
            }
        }
        println!("{what}: {calls_before} calls, a race in {rounds_with_calls} of {rounds} rounds");
        assert!(rounds_with_calls > 0, "{what}: no race");
    }
}
