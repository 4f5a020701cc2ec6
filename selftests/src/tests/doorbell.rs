// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The sample `doorbell`, with another process behind it: values go to it in one map, and what
//! the guest reads comes from it in another.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::Ordering::{Acquire, Release};
use std::thread;
use std::time::Duration;

use kvm_bpf::ImageDevice;
use kvm_bpf_selftests::guest::{Args, Guest, Routine, SharedMemory, Vcpu, mask};
use kvm_bpf_selftests::harness::{number_from_env, set_capabilities, wait_for};
use kvm_bpf_selftests::peer::{self, Peer};
use kvm_bpf_selftests::programs::{plug, sample};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{ADDR, PATTERN, eventfd, taken};

tests!(
    another_process_sees_every_value,
    other_accesses_do_nothing,
    signals_become_one_count,
    who_sees_the_count_sees_the_value,
    values_without_an_eventfd,
    guest_outlives_the_process,
);

const DOORBELLS: usize = 64;

/// The doorbell whose completion is the number of signals so far.
const COUNT: usize = DOORBELLS - 1;

/// What the other process does: waits, and completes each value by its complement.
const SERVE: &str = "serve";
/// Tells count and first value whenever it is asked.
const LOOK: &str = "look";
/// Compares each count with the values.
const COMPARE: &str = "compare";

/// Who makes the eventfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Maker {
    Vmm,
    Peer,
}

/// A guest with doorbells.
struct Setup {
    vcpus: [Vcpu; 2],
    device: ImageDevice,
    _guest: Guest,
}

impl Setup {
    fn new() -> Self {
        let guest = Guest::new();
        let device = plug(guest.vm(), ADDR, sample("doorbell"));
        Setup {
            vcpus: [0, 1].map(|id| guest.vcpu(id)),
            device,
            _guest: guest,
        }
    }

    /// Starts the other process, and connects all doorbells with its eventfd.
    #[track_caller]
    fn start(&self, role: &str, maker: Maker, flags: i32) -> Peer {
        match maker {
            Maker::Vmm => {
                let bell = EventFd::new(flags).expect("an eventfd");
                self.connect(&bell);
                self.start_with(role, Some(&bell))
            }
            Maker::Peer => {
                let peer = self.start_with(role, None);
                let [bell] = peer::receive_fds(peer.socket())
                    .expect("a message of the other process")
                    .try_into()
                    .expect("one fd");
                self.connect(&peer::eventfd(bell));
                peer
            }
        }
    }

    fn connect(&self, bell: &EventFd) {
        for index in 0..DOORBELLS as u32 {
            let device = self.device.device();
            device.set_irq(index, bell).expect("KVM_BPF_IRQ");
        }
    }

    fn start_with(&self, role: &str, bell: Option<&EventFd>) -> Peer {
        let image = self.device.programs();
        let map = |name| image.map(name).expect("a map").as_fd().as_raw_fd();
        let mut fds = vec![map("values"), map("completions")];
        fds.extend(bell.map(AsRawFd::as_raw_fd));
        let peer = Peer::new(role, &fds);
        let limit = Some(Duration::from_secs(100));
        let set = peer.socket().set_read_timeout(limit);
        set.expect("a limit");
        peer
    }

    #[track_caller]
    fn write(&mut self, doorbell: usize, width: usize, value: u64) {
        let exits = self.vcpus[0].write(ADDR + 8 * doorbell as u64, width, value);
        assert_got!(exits, [], "writing doorbell {doorbell}");
    }

    #[track_caller]
    fn read(&mut self, doorbell: usize) -> u64 {
        let read = self.vcpus[0].read(ADDR + 8 * doorbell as u64, 8);
        assert_got!(read.exits, [], "reading doorbell {doorbell}");
        read.value
    }
}

/// Asks a process that looks for the count since the last time, and the value of doorbell 0.
#[track_caller]
fn look(peer: &Peer) -> (u64, u64) {
    peer.socket().send(&[0]).expect("a question");
    let mut answer = [0; 16];
    let len = peer.socket().recv(&mut answer).expect("an answer");
    assert_got!(len, answer.len(), "bytes of an answer");
    let [count, value] = [0, 8].map(|at| {
        let bytes = answer[at..at + 8].try_into().expect("8 bytes");
        u64::from_ne_bytes(bytes)
    });
    (count, value)
}

/// The other process.
pub fn be_the_peer(role: &str) -> io::Result<()> {
    // All that it may is what it was sent.
    set_capabilities(&[]);
    let (socket, mut fds) = peer::connect()?;
    let mut page = || fds.next().map(|file| SharedMemory::of(file, 1));
    let (Some(values), Some(completions)) = (page(), page()) else {
        return Err(io::Error::other("wanted two maps"));
    };
    let bell = match fds.next() {
        Some(file) => peer::eventfd(file),
        None => {
            let flags = if role == LOOK { EFD_NONBLOCK } else { 0 };
            let bell = EventFd::new(flags)?;
            peer::send_fds(&socket, &[bell.as_raw_fd()])?;
            bell
        }
    };
    let value = |doorbell| values.double_word(doorbell).load(Acquire);
    let complete = |doorbell, value| completions.double_word(doorbell).store(value, Release);
    let mut count = 0;
    match role {
        SERVE => loop {
            count += bell.read()?;
            for doorbell in 0..COUNT {
                complete(doorbell, !value(doorbell));
            }
            complete(COUNT, count);
        },
        LOOK => loop {
            socket.recv(&mut [0])?;
            let mut answer = taken(&bell).to_ne_bytes().to_vec();
            answer.extend(value(0).to_ne_bytes());
            socket.send(&answer)?;
        },
        COMPARE => {
            let mut all = [0; 8];
            socket.recv(&mut all)?;
            let all = u64::from_ne_bytes(all);
            let mut reads = 0_u64;
            while count < all {
                let more = taken(&bell);
                count += more;
                // Each doorbell's values count its writes.
                let written = value(0) + value(1);
                if written < count {
                    let message = format!("{count} signals, but the values are of {written}");
                    return Err(io::Error::other(message));
                }
                reads += u64::from(more != 0);
            }
            socket.send(&reads.to_ne_bytes())?;
            Ok(())
        }
        _ => Err(io::Error::other("no such role")),
    }
}

fn another_process_sees_every_value() {
    for maker in [Maker::Vmm, Maker::Peer] {
        let mut setup = Setup::new();
        for doorbell in 0..DOORBELLS {
            assert_got!(setup.read(doorbell), 0, "doorbell {doorbell}, {maker:?}");
        }
        let _peer = setup.start(SERVE, maker, 0);
        let mut writes = 0;
        // Each doorbell, with every width; then one of them, again and again.
        let each = (0..COUNT).map(|doorbell| (doorbell, 1 << (doorbell % 4)));
        for (doorbell, width) in each.chain((0..100).map(|_| (5, 8))) {
            let value = PATTERN.rotate_left(writes);
            setup.write(doorbell, width, value);
            writes += 1;
            let wanted = (!(value & mask(width)), u64::from(writes));
            wait_for("completion, count", wanted, || {
                (setup.read(doorbell), setup.read(COUNT))
            });
        }
    }
}

fn other_accesses_do_nothing() {
    let mut setup = Setup::new();
    let peer = setup.start(LOOK, Maker::Vmm, EFD_NONBLOCK);
    setup.write(0, 8, PATTERN);
    assert_got!(look(&peer), (1, PATTERN));
    for (offset, width) in [(1, 1), (2, 2), (4, 4), (7, 1)] {
        let addr = ADDR + offset;
        assert_got!(setup.vcpus[0].write(addr, width, u64::MAX), []);
        let read = setup.vcpus[0].read(addr, width);
        assert_got!((read.value, read.exits), (0, vec![]), "at {offset}");
    }
    assert_got!(look(&peer), (0, PATTERN));
}

fn signals_become_one_count() {
    for maker in [Maker::Vmm, Maker::Peer] {
        let mut setup = Setup::new();
        let peer = setup.start(LOOK, maker, EFD_NONBLOCK);
        for writes in 1..20 {
            for value in 1..=writes {
                setup.write(0, 8, value << 32 | writes);
            }
            assert_got!(look(&peer), (writes, writes << 32 | writes), "{maker:?}");
            assert_got!(look(&peer), (0, writes << 32 | writes), "{maker:?}");
        }
    }
}

/// Two vCPUs write, each its own doorbell, and the other process looks all the time: never is
/// there a signal whose value is not there yet. It asks for the count again and again, or waits.
fn who_sees_the_count_sees_the_value() {
    let writes = number_from_env("KVM_BPF_ACCESSES", 100_000) / 2;
    for (maker, flags) in [(Maker::Vmm, EFD_NONBLOCK), (Maker::Peer, 0)] {
        let setup = Setup::new();
        let peer = setup.start(COMPARE, maker, flags);
        let all = (2 * writes).to_ne_bytes();
        peer.socket().send(&all).expect("how many");
        thread::scope(|scope| {
            for (doorbell, mut vcpu) in (0..).zip(setup.vcpus) {
                scope.spawn(move || {
                    let args = Args {
                        value: 1,
                        addr: ADDR + 8 * doorbell,
                        count: writes,
                        ..Default::default()
                    };
                    assert_got!(vcpu.call(Routine::Increase, args).1, []);
                });
            }
        });
        let mut reads = [0; 8];
        let len = peer.socket().recv(&mut reads).expect("an answer");
        assert_got!(len, reads.len(), "bytes of the answer, {maker:?}");
        let reads = u64::from_ne_bytes(reads);
        println!(
            "{maker:?}, flags {flags:#x}: {} signals in {reads} reads",
            2 * writes
        );
    }
}

fn values_without_an_eventfd() {
    let mut setup = Setup::new();
    let bell = eventfd();
    let peer = setup.start_with(LOOK, Some(&bell));
    setup.write(0, 8, PATTERN);
    assert_got!(look(&peer), (0, PATTERN), "never connected");
    setup.connect(&bell);
    setup.write(0, 8, !PATTERN);
    assert_got!(look(&peer), (1, !PATTERN), "connected");
    let device = setup.device.device();
    device.unset_irq(0).expect("KVM_BPF_IRQ");
    setup.write(0, 8, 1);
    assert_got!(look(&peer), (0, 1), "not any more");
}

fn guest_outlives_the_process() {
    for maker in [Maker::Vmm, Maker::Peer] {
        let mut setup = Setup::new();
        let bell = eventfd();
        let start = |setup: &Setup| match maker {
            Maker::Vmm => {
                setup.connect(&bell);
                setup.start_with(LOOK, Some(&bell))
            }
            Maker::Peer => setup.start(LOOK, maker, 0),
        };
        let peer = start(&setup);
        setup.write(0, 8, 1);
        assert_got!(look(&peer), (1, 1), "{maker:?}");
        drop(peer);
        let args = Args {
            value: 2,
            addr: ADDR,
            count: 1000,
            ..Default::default()
        };
        let (results, exits) = setup.vcpus[0].call(Routine::Increase, args);
        assert_got!((results.count, exits), (0, vec![]), "{maker:?}");
        assert_got!(setup.read(0), 0, "{maker:?}");
        // The next one finds the value, and the signals if the eventfd is still the same.
        let peer = start(&setup);
        let signals = if maker == Maker::Vmm { 1000 } else { 0 };
        assert_got!(look(&peer), (signals, 1001), "{maker:?}");
        setup.write(0, 8, 7);
        assert_got!(look(&peer), (1, 7), "{maker:?}");
    }
}
