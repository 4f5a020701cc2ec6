// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Ranges of guest-physical addresses and of ports: who has which, and where an access that left
//! the kernel goes.

use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bpf::note::Space;

use crate::lock;
use crate::report::{self, Direction, Exits, Server};
use crate::userspace::MmioDevice;

/// The last port.
const LAST_PORT: u64 = 0xffff;

/// A named range of guest-physical addresses, or of ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Range {
    /// What is there.
    pub name: String,
    /// Which of both.
    pub space: Space,
    /// First address or port.
    pub addr: u64,
    /// Length in bytes, not 0.
    pub size: u64,
}

impl Range {
    /// A range with that name, address and size.
    pub fn new(name: &str, addr: u64, size: u64) -> Self {
        Range {
            name: name.to_string(),
            space: Space::Memory,
            addr,
            size,
        }
    }

    /// The same with ports.
    pub fn of_ports(name: &str, port: u16, size: u64) -> Self {
        Range {
            space: Space::Ports,
            ..Range::new(name, port.into(), size)
        }
    }

    /// The last address, or none if the range wraps around.
    fn last(&self) -> Option<u64> {
        self.addr.checked_add(self.size - 1)
    }

    fn overlaps(&self, other: &Range) -> bool {
        match (self.last(), other.last()) {
            _ if self.space != other.space => false,
            (Some(last), Some(other_last)) => self.addr <= other_last && other.addr <= last,
            _ => true,
        }
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let last = self.addr.wrapping_add(self.size - 1);
        let ports = match self.space {
            Space::Memory => "",
            Space::Ports => "ports ",
        };
        write!(f, "{} ({ports}{:#x} to {last:#x})", self.name, self.addr)
    }
}

/// Two things want the same addresses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Conflict {
    /// The range goes past the last address there is.
    #[error("{0} goes past the end of the address space")]
    Wraps(Range),
    /// The range has addresses of another.
    #[error("{0} overlaps {1}")]
    Overlap(Range, Range),
    /// The range goes past the last address that the guest's CPUs have.
    #[error("{0} goes past the guest's last address, {last:#x} ({1} bits)", last = last_address(*.1))]
    OutOfReach(Range, u8),
    /// The range goes past the last port there is.
    #[error("{0} goes past the last port, {LAST_PORT:#x}")]
    NoSuchPort(Range),
}

/// The last of the addresses that have so many bits.
fn last_address(bits: u8) -> u64 {
    u64::MAX.checked_shr(64 - u32::from(bits)).unwrap_or(0)
}

/// Checks that CPUs whose addresses have so many bits reach each of the ranges.
pub fn check_reach<'a>(
    ranges: impl IntoIterator<Item = &'a Range>,
    bits: u8,
) -> Result<(), Conflict> {
    let reached = |range: &Range| {
        range.space == Space::Ports || range.last().is_some_and(|last| last <= last_address(bits))
    };
    match ranges.into_iter().find(|range| !reached(range)) {
        Some(range) => Err(Conflict::OutOfReach(range.clone(), bits)),
        None => Ok(()),
    }
}

/// Checks that `devices` overlap neither each other nor what is `taken`.
pub fn check_ranges(taken: &[Range], devices: &[Range]) -> Result<(), Conflict> {
    for (index, device) in devices.iter().enumerate() {
        if device.space == Space::Ports && device.last().is_none_or(|last| last > LAST_PORT) {
            return Err(Conflict::NoSuchPort(device.clone()));
        }
        if device.last().is_none() {
            return Err(Conflict::Wraps(device.clone()));
        }
        let others = taken.iter().chain(&devices[..index]);
        if let Some(other) = others.into_iter().find(|other| device.overlaps(other)) {
            return Err(Conflict::Overlap(device.clone(), other.clone()));
        }
    }
    Ok(())
}

/// A device as the bus sees it.
struct Slot {
    range: Range,
    server: Server,
    /// Takes the accesses that come here: all, or what programs in the kernel pass on. None: they
    /// are for nobody.
    model: Option<Mutex<Box<dyn MmioDevice>>>,
    exits: Mutex<Exits>,
}

/// Takes the exits of all vCPUs for memory, or for ports.
#[derive(Default)]
pub struct Bus {
    slots: Vec<Slot>,
    unclaimed: AtomicU64,
}

impl Bus {
    /// Adds a device; its range overlaps no other one.
    pub fn add(&mut self, range: Range, server: Server, model: Option<Box<dyn MmioDevice>>) {
        self.slots.push(Slot {
            range,
            server,
            model: model.map(Mutex::new),
            exits: Mutex::default(),
        });
        self.slots.sort_by_key(|slot| slot.range.addr);
    }

    /// Has a read handled; it gives all ones, as on a bus, where nobody takes it.
    pub fn read(&self, vcpu: usize, addr: u64, data: &mut [u8]) {
        match self.find(addr, data.len(), Direction::Read) {
            Some((model, offset)) => lock(model).read(vcpu, offset, data),
            None => data.fill(0xff),
        }
    }

    /// Hands on a write, or drops it where nobody takes it.
    pub fn write(&self, vcpu: usize, addr: u64, data: &[u8]) {
        if let Some((model, offset)) = self.find(addr, data.len(), Direction::Write) {
            lock(model).write(vcpu, offset, data);
        }
    }

    /// Counts an access and finds the model that serves it, with the offset into its range. One that
    /// is only partly in a range is no device's, as in KVM.
    fn find(
        &self,
        addr: u64,
        len: usize,
        direction: Direction,
    ) -> Option<(&Mutex<Box<dyn MmioDevice>>, u64)> {
        let is_in = |range: &Range| {
            let room = range.size.checked_sub(addr - range.addr);
            room.is_some_and(|room| len as u64 <= room)
        };
        let after = self.slots.partition_point(|slot| slot.range.addr <= addr);
        let slot = after.checked_sub(1).map(|index| &self.slots[index]);
        match slot.filter(|slot| is_in(&slot.range)) {
            Some(slot) => {
                let offset = addr - slot.range.addr;
                lock(&slot.exits).count(offset, direction);
                slot.model.as_ref().map(|model| (model, offset))
            }
            None => {
                self.unclaimed.fetch_add(1, Ordering::Relaxed);
                None
            }
        }
    }

    /// How many exits had an address that no device has.
    pub fn unclaimed(&self) -> u64 {
        self.unclaimed.load(Ordering::Relaxed)
    }

    /// The devices' exits so far.
    pub fn report(&self) -> Vec<report::Device> {
        let device =
            |slot: &Slot| report::Device::new(&slot.range, slot.server, &lock(&slot.exits));
        self.slots.iter().map(device).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;

    use super::*;

    #[test]
    fn neighbours_are_no_conflict() {
        let taken = [Range::new("RAM", 0, 0x1000)];
        let devices = [
            Range::new("a", 0x1000, 0x10),
            Range::new("b", 0x1010, 1),
            Range::new("c", u64::MAX, 1),
        ];
        assert_eq!(check_ranges(&taken, &devices), Ok(()));
    }

    #[test]
    fn overlaps_name_both() {
        let ram = Range::new("RAM", 0, 0x1000);
        for (addr, size) in [(0xfff, 1), (0, 1), (0x800, 0x1000), (0, 0x2000)] {
            let device = Range::new("a", addr, size);
            let conflict = check_ranges(from_ref(&ram), from_ref(&device)).unwrap_err();
            assert_eq!(conflict, Conflict::Overlap(device, ram.clone()));
        }
        let (a, b) = (
            Range::new("a.o", 0x1000, 0x1000),
            Range::new("b.o", 0x1fff, 1),
        );
        let conflict = check_ranges(&[], &[a, b]).unwrap_err();
        assert_eq!(
            conflict.to_string(),
            "b.o (0x1fff to 0x1fff) overlaps a.o (0x1000 to 0x1fff)"
        );
    }

    #[test]
    fn addresses_end_where_the_cpus_do() {
        let last = Range::new("a", 0xff_ffff_f000, 0x1000);
        assert_eq!(check_reach([&last], 40), Ok(()));
        assert_eq!(check_reach([&last], 64), Ok(()));
        for (addr, size) in [(0xff_ffff_f000, 0x1001), (1 << 40, 1), (1 << 63, 1 << 63)] {
            let device = Range::new("a", addr, size);
            let conflict = check_reach([&last, &device], 40);
            assert_eq!(conflict, Err(Conflict::OutOfReach(device, 40)));
        }
        assert_eq!(
            check_reach([&last], 39).unwrap_err().to_string(),
            "a (0xfffffff000 to 0xffffffffff) goes past the guest's last address, 0x7fffffffff \
             (39 bits)"
        );
        let end = Range::new("a", u64::MAX, 1);
        assert_eq!(check_reach([&end], 64), Ok(()));
    }

    #[test]
    fn ports_are_apart_from_memory() {
        let taken = [
            Range::new("RAM", 0, 0x1000_0000),
            Range::of_ports("COM1", 0x3f8, 8),
        ];
        let fine = [
            Range::of_ports("a", 0x3f0, 8),
            Range::of_ports("b", 0x400, 8),
            Range::of_ports("c", 0xffff, 1),
        ];
        assert_eq!(check_ranges(&taken, &fine), Ok(()));
        assert_eq!(check_reach(&fine, 4), Ok(()));
        for (port, size) in [(0x3f8, 8), (0x3ff, 1), (0x3f1, 8), (0, 0x1_0000)] {
            let device = Range::of_ports("a", port, size);
            let conflict = check_ranges(&taken, from_ref(&device)).unwrap_err();
            assert_eq!(conflict, Conflict::Overlap(device, taken[1].clone()));
        }
        assert_eq!(
            check_ranges(&taken, &[Range::of_ports("a", 0x3fc, 8)])
                .unwrap_err()
                .to_string(),
            "a (ports 0x3fc to 0x403) overlaps COM1 (ports 0x3f8 to 0x3ff)"
        );
        let device = Range::of_ports("a", 0xfff9, 8);
        let conflict = check_ranges(&[], from_ref(&device));
        assert_eq!(conflict, Err(Conflict::NoSuchPort(device)));
    }

    #[test]
    fn wrapping_is_a_conflict() {
        let device = Range::new("a", u64::MAX, 2);
        assert_eq!(
            check_ranges(&[], from_ref(&device)),
            Err(Conflict::Wraps(device))
        );
    }

    /// Reads give the offset; the last write is remembered.
    struct Echo(std::sync::mpsc::Sender<(usize, u64, Vec<u8>)>);

    impl MmioDevice for Echo {
        fn read(&mut self, _vcpu: usize, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&mut self, vcpu: usize, offset: u64, data: &[u8]) {
            self.0.send((vcpu, offset, data.to_vec())).unwrap();
        }
    }

    #[test]
    fn accesses_find_their_device() {
        let (sender, writes) = std::sync::mpsc::channel();
        let mut bus = Bus::default();
        let echo = || Box::new(Echo(sender.clone()));
        let range = Range::new("bpf", 0x2000, 0x1000);
        bus.add(range, Server::Bpf, None);
        let range = Range::new("echo", 0x1000, 0x100);
        bus.add(range, Server::Userspace, Some(echo()));
        // Programs serve it, and what they pass on is echoed.
        let range = Range::new("both", 0x4000, 0x1000);
        bus.add(range, Server::Bpf, Some(echo()));

        let mut data = [0; 2];
        bus.read(0, 0x10fe, &mut data);
        assert_eq!(data, [0xfe; 2]);
        bus.read(0, 0x1001, &mut data);
        assert_eq!(data, [1; 2]);
        bus.write(3, 0x1010, &[9]);
        assert_eq!(writes.recv().unwrap(), (3, 0x10, vec![9]));
        assert_eq!(bus.unclaimed(), 0);

        bus.read(0, 0x2004, &mut data);
        assert_eq!(data, [0xff; 2]);
        bus.read(0, 0x4008, &mut data);
        assert_eq!(data, [8; 2]);
        bus.write(1, 0x4ffe, &[1, 2]);
        assert_eq!(writes.recv().unwrap(), (1, 0xffe, vec![1, 2]));
        // The last ones begin or end in a device.
        for hole in [0, 0xffe, 0x1100, 0x3000, 0xfff, 0x10ff, 0x4fff] {
            bus.read(0, hole, &mut data);
            assert_eq!(data, [0xff; 2], "{hole:#x}");
            bus.write(0, hole, &data);
        }
        assert!(writes.try_recv().is_err());
        assert_eq!(bus.unclaimed(), 14);

        let report = serde_json::to_value(bus.report()).unwrap();
        assert_eq!(report[0]["name"], "echo");
        assert_eq!(report[0]["exits"], 3);
        assert_eq!(report[1]["server"], "bpf");
        assert_eq!(report[1]["registers"][0]["offset"], 4);
        assert_eq!(report[2]["server"], "bpf");
        assert_eq!(report[2]["exits"], 2);
    }
}
