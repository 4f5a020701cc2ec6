// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The order in which a bus is searched, which no patch of the series may change for others:
//! ioeventfds that overlap, against a model of KVM's rule.

use kvm_bpf_selftests::guest::{Guest, Vcpu};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

use super::{ADDR, eventfd, taken};

tests!(writes_go_where_the_model_says);

/// What a write must be for an ioeventfd to take it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Match {
    Any,
    U32(u32),
    U64(u64),
}

/// A range on the bus.
#[derive(Clone, Copy, Debug)]
struct Range {
    addr: u64,
    r#match: Match,
}

impl Range {
    /// In bytes, as the bus has it.
    fn len(&self) -> u64 {
        match self.r#match {
            Match::Any => 0,
            Match::U32(_) => 4,
            Match::U64(_) => 8,
        }
    }

    /// Whether KVM refuses `self` beside `other`.
    fn collides(&self, other: &Range) -> bool {
        self.addr == other.addr
            && (self.len() == 0 || other.len() == 0 || self.r#match == other.r#match)
    }

    fn takes(&self, addr: u64, len: u64, value: u64) -> bool {
        addr == self.addr
            && match self.r#match {
                Match::Any => true,
                Match::U32(wanted) => len == 4 && value == u64::from(wanted),
                Match::U64(wanted) => len == 8 && value == wanted,
            }
    }
}

/// How a range, or a write, compares with a range of the bus: not symmetric, and equal if the one
/// is inside the other.
fn compare(addr1: u64, len1: u64, addr2: u64, len2: u64) -> i32 {
    if addr1 < addr2 {
        return -1;
    }
    let (end1, end2) = match len2 {
        0 => (addr1, addr2),
        _ => (addr1 + len1, addr2 + len2),
    };
    i32::from(end1 > end2)
}

/// Ranges in the bus's order, each with the number of its eventfd.
#[derive(Default)]
struct Bus(Vec<(Range, usize)>);

impl Bus {
    fn register(&mut self, new: Range, eventfd: usize) {
        let before = |range: &Range| {
            compare(range.addr, range.len(), new.addr, new.len()) > 0
                || range.addr > new.addr && range.addr - new.addr >= new.len()
        };
        let at = self.0.iter().position(|(range, _)| before(range));
        self.0.insert(at.unwrap_or(self.0.len()), (new, eventfd));
    }

    /// Whether none of the ranges overlap, but for those that are equal: then KVM searches by their
    /// starts, and must find the same.
    fn is_disjoint(&self) -> bool {
        self.0.windows(2).all(|pair| {
            let [(prev, _), (next, _)] = pair else {
                return true;
            };
            prev.addr + prev.len().max(1) <= next.addr
                || (prev.addr, prev.len()) == (next.addr, next.len())
        })
    }

    /// Which eventfd a write signals.
    fn write(&self, addr: u64, len: u64, value: u64) -> Option<usize> {
        let order = |at: usize| {
            let range = self.0[at].0;
            compare(addr, len, range.addr, range.len())
        };
        let (mut base, mut count) = (0, self.0.len());
        let mut found = loop {
            if count == 0 {
                return None;
            }
            let pivot = base + count / 2;
            match order(pivot) {
                0 => break pivot,
                1 => {
                    base = pivot + 1;
                    count -= 1;
                }
                _ => {}
            }
            count /= 2;
        };
        while found > 0 && order(found - 1) == 0 {
            found -= 1;
        }
        (found..self.0.len())
            .take_while(|&at| order(at) == 0)
            .find(|&at| self.0[at].0.takes(addr, len, value))
            .map(|at| self.0[at].1)
    }
}

fn set(vm: &VmFd, range: Range, eventfd: &EventFd) -> Result<(), errno::Error> {
    let addr = IoEventAddress::Mmio(range.addr);
    match range.r#match {
        Match::Any => vm.register_ioevent(eventfd, &addr, NoDatamatch),
        Match::U32(value) => vm.register_ioevent(eventfd, &addr, value),
        Match::U64(value) => vm.register_ioevent(eventfd, &addr, value),
    }
}

/// A number below `limit`, the next of a sequence that is always the same.
fn next(state: &mut u64, limit: u64) -> u64 {
    *state = state
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) % limit
}

fn writes_go_where_the_model_says() {
    const ROUNDS: u64 = 24;
    const SLOTS: u64 = 6;

    let mut state = 1;
    let (mut signalled, mut shadowed) = (0, 0);
    // How many buses there were whose ranges overlap, and whose do not.
    let mut buses = [0, 0];
    for round in 0..ROUNDS {
        let guest = Guest::new();
        let mut vcpu = guest.vcpu(0);
        let mut bus = Bus::default();
        let mut eventfds = Vec::new();
        let apart = round % 2 == 1;
        // Those at one address have one length where none may overlap another.
        let kinds: Vec<_> = (0..SLOTS).map(|_| next(&mut state, 3)).collect();
        for _ in 0..16 {
            let slot = next(&mut state, SLOTS);
            let (kind, width) = match apart {
                true => (kinds[slot as usize], 8),
                false => (next(&mut state, 3), 4),
            };
            let value = 1 + next(&mut state, 2);
            let range = Range {
                addr: ADDR + width * slot,
                r#match: match kind {
                    0 => Match::Any,
                    1 => Match::U32(value as u32),
                    _ => Match::U64(value),
                },
            };
            let eventfd = eventfd();
            let collides = bus.0.iter().any(|(other, _)| range.collides(other));
            let answer = set(guest.vm(), range, &eventfd);
            assert_got!(answer.is_ok(), !collides, "round {round}: {range:?}");
            if !collides {
                bus.register(range, eventfds.len());
                eventfds.push(eventfd);
            }
        }
        buses[usize::from(bus.is_disjoint())] += 1;
        for word in 0..=2 * SLOTS {
            for (len, value) in [(1, 1), (2, 1), (4, 1), (4, 2), (8, 1), (8, 2)] {
                let addr = ADDR + 4 * word;
                let wanted = bus.write(addr, len, value);
                signalled += u64::from(wanted.is_some());
                let there = bus.0.iter().any(|(range, _)| range.takes(addr, len, value));
                shadowed += u64::from(wanted.is_none() && there);
                assert_write(&mut vcpu, &eventfds, addr, len, value, wanted);
            }
        }
    }
    // The search is by halves, which ranges that overlap are not made for.
    assert!(signalled > 200, "wanted more than {signalled} signals");
    assert!(shadowed > 0, "wanted a range that is not found, got none");
    assert!(
        buses.iter().all(|&count| count >= ROUNDS / 3),
        "wanted buses of both kinds, got {buses:?}"
    );
}

#[track_caller]
fn assert_write(
    vcpu: &mut Vcpu,
    eventfds: &[EventFd],
    addr: u64,
    len: u64,
    value: u64,
    wanted: Option<usize>,
) {
    let exits = vcpu.write(addr, len as usize, value).len();
    let got: Vec<_> = (0..eventfds.len())
        .filter(|&index| taken(&eventfds[index]) > 0)
        .collect();
    let what = format!("{len} bytes, {value}, at {addr:#x}");
    assert_got!(got, Vec::from_iter(wanted), "{what}: eventfds signalled");
    assert_got!(exits, usize::from(wanted.is_none()), "{what}: exits");
}
