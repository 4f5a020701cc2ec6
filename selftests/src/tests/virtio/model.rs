// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the sample devices do with whatever a driver puts into its ring, in a copy of the guest's
//! memory: which requests they serve, what they write, and when they need a reset.

use std::ops::Range;

use super::{
    AVAIL, CHANGED, DESC, DRIVER_OK, END, FEATURES_OK, FLUSH, GET_ID, IN, INDIRECT, IOERR,
    NEEDS_RESET, NEXT, OK, OUT, PAGE, RING, SECTOR, SECTORS, UNSUPP, USED, WRITE, good_status,
};
use crate::tests::mem::START;

/// The most descriptors of a request, without the one that points to a table.
const MOST_DESCRIPTORS: u32 = 256;
/// The most bytes of a request of random numbers, and how many are written at once.
const MOST_RANDOM: u32 = 4096;
const CHUNK: u32 = 64;
/// The most bytes of a request to a disk.
const MOST_DATA: u32 = 128 * 1024;
/// In the ring of the driver: it wants no interrupts.
const NO_INTERRUPT: u16 = 1;

/// Why a request is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// The driver has broken the rules.
    Bad,
    /// It depends on random numbers.
    Unknown,
}

/// What the device does has come to depend on random numbers: nothing can be said any more.
#[derive(Debug)]
pub(super) struct Unknown;

/// What a disk has.
#[derive(Debug)]
pub(super) struct Disk {
    pub data: Vec<u8>,
    pub id: [u8; 20],
}

impl Disk {
    pub(super) fn new(id: [u8; 20]) -> Self {
        Disk {
            data: vec![0; SECTORS as usize * SECTOR],
            id,
        }
    }
}

/// A device with a ring that a driver has set up.
#[derive(Debug)]
pub(super) struct Model {
    /// All of the guest's memory.
    pub memory: Vec<u8>,
    /// Where there are random numbers.
    random: Vec<Range<usize>>,
    /// None for a source of random numbers.
    pub disk: Option<Disk>,
    num: u16,
    tables: bool,
    /// How many requests it has served.
    pub served: u16,
    status: u32,
    needs_reset: bool,
}

#[derive(Clone, Copy, Debug)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// The descriptors of one request.
struct Chain {
    table: u64,
    size: u32,
    next: Option<u16>,
    tables: bool,
    count: u32,
}

impl Chain {
    /// The next one, if there is one.
    fn next(&mut self, model: &Model) -> Result<Option<Descriptor>, Stop> {
        let Some(next) = self.next else {
            return Ok(None);
        };
        if u32::from(next) >= self.size || self.count == MOST_DESCRIPTORS {
            return Err(Stop::Bad);
        }
        self.count += 1;
        let mut found = model.descriptor(self.table, next)?;
        if found.flags & INDIRECT != 0 {
            let is_table = found.len > 0 && found.len.is_multiple_of(16);
            if !self.tables || !is_table || found.flags & NEXT != 0 {
                return Err(Stop::Bad);
            }
            self.tables = false;
            self.table = found.addr;
            self.size = found.len / 16;
            found = model.descriptor(self.table, 0)?;
            if found.flags & INDIRECT != 0 {
                return Err(Stop::Bad);
            }
        }
        self.next = (found.flags & NEXT != 0).then_some(found.next);
        Ok(Some(found))
    }
}

impl Model {
    pub(super) fn new(disk: Option<Disk>) -> Self {
        Model {
            memory: Vec::new(),
            random: Vec::new(),
            disk,
            num: 0,
            tables: false,
            served: 0,
            status: 0,
            needs_reset: false,
        }
    }

    /// A driver sets up the ring, with tables of descriptors or without.
    pub(super) fn start(&mut self, num: u16, tables: bool) {
        self.num = num;
        self.tables = tables;
        self.served = 0;
        self.status = good_status();
        self.needs_reset = false;
    }

    /// What the register has.
    pub(super) fn status(&self) -> u32 {
        let needs_reset = if self.needs_reset { NEEDS_RESET } else { 0 };
        self.status | needs_reset
    }

    /// The driver writes the register, but no 0, before it notifies.
    pub(super) fn set_status(&mut self, value: u32) {
        self.status = value & 0xff & !NEEDS_RESET;
        if self.status & FEATURES_OK == 0 {
            self.status &= !DRIVER_OK;
        }
    }

    /// Serves a notification to its end, with this memory; returns what it interrupts for.
    pub(super) fn notify(&mut self, memory: Vec<u8>) -> Result<u32, Unknown> {
        self.memory = memory;
        self.random.clear();
        if self.needs_reset || self.status & DRIVER_OK == 0 {
            return Ok(0);
        }
        let index = self.half(AVAIL + 2);
        let mut interrupts = 0;
        let before = self.served;
        self.needs_reset = index.wrapping_sub(self.served) > self.num;
        while !self.needs_reset && self.served != index {
            let slot = usize::from(self.served % self.num);
            let head = self.half(AVAIL + 4 + 2 * slot);
            match self.request(head) {
                Ok(len) => {
                    let used = USED + 4 + 8 * slot;
                    self.memory[used..used + 4].copy_from_slice(&u32::from(head).to_le_bytes());
                    self.memory[used + 4..used + 8].copy_from_slice(&len.to_le_bytes());
                    self.served = self.served.wrapping_add(1);
                }
                Err(Stop::Bad) => self.needs_reset = true,
                Err(Stop::Unknown) => return Err(Unknown),
            }
        }
        if self.served != before {
            self.memory[USED + 2..USED + 4].copy_from_slice(&self.served.to_le_bytes());
            if self.half(AVAIL) & NO_INTERRUPT == 0 {
                interrupts |= RING;
            }
        }
        if self.needs_reset {
            interrupts |= CHANGED;
        }
        Ok(interrupts)
    }

    /// Whether memory is what it is to be, but for the random numbers in it.
    pub(super) fn is_like(&self, mut memory: Vec<u8>) -> bool {
        for range in &self.random {
            memory[range.clone()].copy_from_slice(&self.memory[range.clone()]);
        }
        memory == self.memory
    }

    /// Serves a request; returns the bytes written.
    fn request(&mut self, head: u16) -> Result<u32, Stop> {
        let mut chain = Chain {
            table: START + DESC as u64,
            size: self.num.into(),
            next: Some(head),
            tables: self.tables,
            count: 0,
        };
        match self.disk.take() {
            Some(mut disk) => {
                let result = self.access(&mut chain, &mut disk);
                self.disk = Some(disk);
                result
            }
            None => self.fill(&mut chain),
        }
    }

    /// Random numbers, until a buffer is not full or has an odd length.
    fn fill(&mut self, chain: &mut Chain) -> Result<u32, Stop> {
        let mut filled = 0;
        while let Some(buffer) = chain.next(self)? {
            if buffer.flags & WRITE == 0 {
                return Err(Stop::Bad);
            }
            let len = buffer.len.min(MOST_RANDOM - filled);
            for at in (0..len).step_by(CHUNK as usize) {
                let size = CHUNK.min(len - at) as usize;
                let addr = buffer.addr.wrapping_add(at.into());
                let range = inside(addr, size)?;
                self.random.push(range);
            }
            filled += len;
            if len % CHUNK != 0 || len < buffer.len {
                break;
            }
        }
        Ok(filled)
    }

    /// A request to a disk: a header, data, and a byte for the result.
    fn access(&mut self, chain: &mut Chain, disk: &mut Disk) -> Result<u32, Stop> {
        let first = chain.next(self)?.ok_or(Stop::Bad)?;
        if first.flags & WRITE != 0 || first.len != 16 {
            return Err(Stop::Bad);
        }
        let header = self.read(first.addr, 16)?;
        let kind = u32::from_le_bytes(header[..4].try_into().expect("4 bytes"));
        let mut sector = u64::from_le_bytes(header[8..].try_into().expect("8 bytes"));
        let (mut status, mut written, mut bytes) = (OK, 0, 0);
        let last = loop {
            let buffer = chain.next(self)?.ok_or(Stop::Bad)?;
            if chain.next.is_none() {
                break buffer;
            }
            if status != OK {
                continue;
            }
            status = match kind {
                IN | OUT => self.transfer(disk, kind == IN, &mut sector, buffer, &mut bytes)?,
                GET_ID => {
                    let fits = buffer.flags & WRITE != 0 && buffer.len >= 20;
                    if fits && self.write(buffer.addr, &disk.id).is_ok() {
                        written += 20;
                        OK
                    } else {
                        IOERR
                    }
                }
                _ => UNSUPP,
            };
            if kind == IN && status == OK {
                written += buffer.len;
            }
        };
        if last.len != 1 || last.flags & WRITE == 0 {
            return Err(Stop::Bad);
        }
        if status == OK && ![IN, OUT, GET_ID, FLUSH].contains(&kind) {
            status = UNSUPP;
        }
        self.write(last.addr, &[status])?;
        Ok(written + 1)
    }

    /// The data of one buffer, to the guest or from it; returns its status.
    fn transfer(
        &mut self,
        disk: &mut Disk,
        to_guest: bool,
        sector: &mut u64,
        buffer: Descriptor,
        bytes: &mut u32,
    ) -> Result<u8, Stop> {
        let sectors = u64::from(buffer.len) / SECTOR as u64;
        let is_writable = buffer.flags & WRITE != 0;
        if to_guest != is_writable
            || !buffer.len.is_multiple_of(SECTOR as u32)
            || buffer.len > MOST_DATA - *bytes
            || *sector > SECTORS
            || sectors > SECTORS - *sector
        {
            return Ok(IOERR);
        }
        *bytes += buffer.len;
        // Whole pages at once, where disk and buffer allow it.
        let is_paged = sector.is_multiple_of(8) && buffer.len.is_multiple_of(PAGE as u32);
        let step = if is_paged { PAGE } else { SECTOR };
        let start = *sector as usize * SECTOR;
        for at in (0..buffer.len as usize).step_by(step) {
            let part = &mut disk.data[start + at..start + at + step];
            let addr = buffer.addr.wrapping_add(at as u64);
            let result = match to_guest {
                true => self.write(addr, part),
                false => self.read(addr, step).map(|data| part.copy_from_slice(data)),
            };
            match result {
                Ok(()) => {}
                Err(Stop::Bad) => {
                    // What cannot be read leaves zeroes.
                    if !to_guest {
                        part.fill(0);
                    }
                    return Ok(IOERR);
                }
                Err(Stop::Unknown) => return Err(Stop::Unknown),
            }
        }
        *sector += sectors;
        Ok(OK)
    }

    fn descriptor(&self, table: u64, index: u16) -> Result<Descriptor, Stop> {
        let bytes = self.read(table.wrapping_add(16 * u64::from(index)), 16)?;
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Ok(Descriptor {
            addr: u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")),
            len: u32::from_le_bytes(bytes[8..12].try_into().expect("4 bytes")),
            flags: half(12),
            next: half(14),
        })
    }

    fn half(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.memory[at], self.memory[at + 1]])
    }

    fn read(&self, addr: u64, len: usize) -> Result<&[u8], Stop> {
        let range = inside(addr, len)?;
        let overlaps = |random: &Range<usize>| random.start < range.end && range.start < random.end;
        if self.random.iter().any(overlaps) {
            return Err(Stop::Unknown);
        }
        Ok(&self.memory[range])
    }

    fn write(&mut self, addr: u64, bytes: &[u8]) -> Result<(), Stop> {
        let range = inside(addr, bytes.len())?;
        self.memory[range].copy_from_slice(bytes);
        Ok(())
    }
}

/// Where it is in memory, if all of it is inside of the window.
fn inside(addr: u64, len: usize) -> Result<Range<usize>, Stop> {
    let start = addr.checked_sub(START).ok_or(Stop::Bad)?;
    let start = usize::try_from(start).map_err(|_| Stop::Bad)?;
    let end = start.checked_add(len).ok_or(Stop::Bad)?;
    if start < PAGE || end > END {
        return Err(Stop::Bad);
    }
    Ok(start..end)
}
