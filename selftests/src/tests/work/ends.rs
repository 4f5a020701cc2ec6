// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Removal, close, and the end of the process: each waits for what runs, and leaves nothing.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::thread;
use std::time::{Duration, Instant};

use kvm_bpf::uapi::KVM_DEV_BPF_MAX_WORKS;
use kvm_bpf_selftests::bpf::{Census, LOADERS, Map, Prog};
use kvm_bpf_selftests::device::{Device, NO_WORK, work};
use kvm_bpf_selftests::guest::Guest;
use kvm_bpf_selftests::harness::{Victim, in_a_thread, meanwhile, stay_on, wait_for};
use kvm_bpf_selftests::programs::{plug, test_image};
use vmm_sys_util::eventfd::EventFd;

use super::super::{ADDR, assert_errno, element, eventfd, fd_of, taken};
use super::{ROUNDS, Recorder, VARIABLE, keep_busy, signal, slow};

/// Signals and calls run a slow program while `end` takes it away.
#[track_caller]
fn end_under_load(end: impl Fn(Device) -> Option<Device>) {
    // RCU waits for a program that does not sleep, too.
    for load_prog in LOADERS.into_iter().cycle().take(6) {
        let census = Census::now();
        let guest = Guest::new();
        let device = Device::new(guest.vm());
        let counts = Map::new(1, 4);
        let eventfd = eventfd();
        device.set_work(
            0,
            &work(Some(&slow(load_prog, &counts, ROUNDS)), Some(&eventfd)),
        );
        meanwhile([|| signal(&eventfd, 1)], || {
            wait_for("runs", true, || counts.get(0)[0] > 2);
            let device = end(device);
            let words = counts.get(0);
            assert_got!(words[1], words[0], "runs that ended");
            thread::sleep(Duration::from_millis(10));
            assert_got!(counts.get(0), words, "runs");
            // They are the eventfd's own again.
            wait_for("signals", true, || taken(&eventfd) > 0);
            drop(device);
        });
        drop(guest);
        drop(counts);
        census.wait_for_newer(0, 0);
    }
}

pub(super) fn removal_waits() {
    end_under_load(|device| {
        device.set_work(0, &NO_WORK);
        Some(device)
    });
}

pub(super) fn close_waits() {
    end_under_load(|device| {
        drop(device);
        None
    });
}

pub(super) fn closed_in_every_order() {
    #[derive(Clone, Copy, PartialEq)]
    enum Part {
        Device,
        Eventfd,
        Guest,
        Prog,
    }
    const PARTS: [Part; 4] = [Part::Device, Part::Eventfd, Part::Guest, Part::Prog];
    let is_order = |order: &[Part; 4]| PARTS.iter().all(|part| order.contains(part));
    // Each digit of a number is a part.
    let orders = (0..256).map(|number| [0, 2, 4, 6].map(|shift| PARTS[number >> shift & 3]));
    let orders: Vec<_> = orders.filter(is_order).collect();
    assert_got!(orders.len(), 24);
    let census = Census::now();
    for order in orders {
        let recorder = Recorder::new();
        let mut guest = Some(Guest::new());
        let mut device = guest.as_ref().map(|guest| Device::new(guest.vm()));
        let mut prog = Some(recorder.prog(Prog::load));
        let mut eventfd = Some(eventfd());
        // Whoever has the device's interrupt may signal what user space has closed.
        if let (Some(device), Some(eventfd)) = (&device, &eventfd) {
            device.set_irq(0, eventfd.as_raw_fd());
            device.set_work(0, &work(prog.as_ref(), Some(eventfd)));
        }
        for what in order {
            if let Some(eventfd) = &eventfd {
                let before = recorder.record().sum;
                signal(eventfd, 1);
                if device.is_some() {
                    wait_for("a run", before + 1, || recorder.record().sum);
                }
            }
            match what {
                Part::Device => drop(device.take()),
                Part::Eventfd => drop(eventfd.take()),
                Part::Guest => drop(guest.take()),
                Part::Prog => drop(prog.take()),
            }
        }
    }
    census.wait_for_newer(0, 0);
}

/// What a timer does is done, or not begun, when the state is read: and so it stays.
pub(super) fn callback_on_another_cpu_ends_before_a_save() {
    in_a_thread(|| {
        let guest = Guest::new();
        let device = plug(guest.vm(), ADDR, test_image("work_timer"));
        let progress = || {
            let value = element(device.programs(), "progress");
            let word = |at: usize| u32::from_ne_bytes(value[at..at + 4].try_into().expect("4"));
            [word(0), word(8)]
        };
        for round in 0..30 {
            // The callbacks come where the timer has been started.
            stay_on(0);
            device.resume().expect("going on");
            stay_on(1);
            let [before, _] = progress();
            wait_for("callbacks", true, || progress()[0] > before + 2);
            let state = device.save().expect("saving");
            let [begun, ended] = progress();
            assert_got!(ended, begun, "callbacks that have ended, {round}");
            thread::sleep(Duration::from_millis(5));
            assert_got!(
                progress(),
                [begun, ended],
                "callbacks after the save, {round}"
            );
            let saved = serde_json::to_value(&state).expect("JSON");
            let saved = &saved["maps"][0]["values"][0]["ended"][0];
            assert_got!(saved.as_u64(), Some(ended.into()));
        }
    });
}

/// A process whose thread always has more to do, and others that run it, is killed. What another one
/// has of it then does nothing any more, and keeps nobody waiting.
pub(super) fn killed_process() {
    /// The process's device and an eventfd of it.
    const NUMBERS: [RawFd; 2] = [100, 101];

    if std::env::var_os(VARIABLE).is_some() {
        let guest = Guest::new();
        let device = Device::new(guest.vm());
        keep_busy(&device);
        let slow_counts = Map::new(1, 4);
        let wake = eventfd_of(&device);
        for (fd, number) in [device.as_raw_fd(), wake.as_raw_fd()].iter().zip(NUMBERS) {
            // SAFETY: no pointers, and the numbers are free.
            let duplicate = unsafe { libc::dup2(*fd, number) };
            assert_eq!(duplicate, number, "dup2: {}", io::Error::last_os_error());
        }
        device.set_work(
            1,
            &work(Some(&slow(Prog::load, &slow_counts, ROUNDS)), Some(&wake)),
        );
        thread::scope(|scope| {
            for index in [0, 0, 1, 1] {
                let device = &device;
                scope.spawn(move || {
                    loop {
                        let _ = device.run(index, 0);
                    }
                });
            }
        });
    }
    for is_held in [false, true] {
        let census = Census::now();
        let victim = Victim::new("work::killed_process", VARIABLE, "work");
        let task = format!("/proc/{}/task", victim.id());
        wait_for("programs and threads of the process", true, || {
            let tasks = fs::read_dir(&task).map_or(0, Iterator::count);
            census.newer().0 == 2 && tasks >= 7
        });
        let held = is_held.then(|| NUMBERS.map(|number| fd_of(victim.id(), number)));
        thread::sleep(Duration::from_millis(50));
        victim.kill();
        if let Some([device, wake]) = held {
            let start = Instant::now();
            let device = Device::from(device);
            let wake = File::from(wake);
            let signal = |count: u64| (&wake).write(&count.to_ne_bytes()).expect("a signal");
            signal(1);
            // It is the VM's creator's, whoever has the descriptor.
            assert_errno("running it", device.run(0, 0), libc::EIO);
            assert_errno("running it", device.run(1, 0), libc::EIO);
            let removed = device.try_set_work(1, &NO_WORK);
            assert_errno("removing it", removed, libc::EIO);
            signal(1);
            assert_got!(census.newer().0, 2, "programs of a device that is held");
            drop(device);
            signal(1);
            let took = start.elapsed();
            assert!(took < Duration::from_secs(5), "all that took {took:?}");
        }
        census.wait_for_newer(0, 0);
    }
}

/// An eventfd that a device's interrupt signals.
fn eventfd_of(device: &Device) -> EventFd {
    let eventfd = eventfd();
    device.set_irq(0, eventfd.as_raw_fd());
    eventfd
}

pub(super) fn references_are_given_back() {
    let census = Census::now();
    for _ in 0..10 {
        let guest = Guest::new();
        let device = Device::new(guest.vm());
        let eventfds = [eventfd(), eventfd()];
        for index in 0..KVM_DEV_BPF_MAX_WORKS {
            let recorder = Recorder::new();
            let free = eventfd();
            let next = [Some(&free), None, Some(&free), None];
            // Set, swapped, swapped back, and left to the close.
            for (load, eventfd) in LOADERS.into_iter().cycle().zip(next) {
                device.set_work(index, &work(Some(&recorder.prog(load)), eventfd));
            }
            if let Some(eventfd) = eventfds.get(index as usize) {
                device.set_work(
                    index,
                    &work(Some(&recorder.prog(Prog::load)), Some(eventfd)),
                );
                signal(eventfd, 1);
            }
        }
    }
    census.wait_for_newer(0, 0);
}
