// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The ELF note that describes a device.
//!
//! An object file with a device has a section [`SECTION`] of type `SHT_NOTE`.
//! In it, the note with owner [`OWNER`] and type [`TYPE`] holds, little
//! endian:
//!
//! | bytes | meaning |
//! | --- | --- |
//! | 4 | version of this layout, [`VERSION`] |
//! | 4 | number of interrupts, at most 256 |
//! | 8 | bytes of MMIO space, which is region 0: 1 to `i32::MAX`, or 0 where the next note has a range |
//! | rest | device-tree `compatible` strings, each ending in NUL, at least one |
//!
//! Notes of type [`TYPE_ITEMS`], any number of them, may say more, before or behind it. Each is a
//! list of items, every one at a multiple of 4 bytes, with zeroes in between and behind; together
//! they are one list, with at most 256 items of a kind:
//!
//! | bytes | meaning |
//! | --- | --- |
//! | 2 | kind, one of [`kind`]; with bit 15, [`REQUIRED`], a reader that does not know it refuses the device, without it skips the item |
//! | 2 | bytes of what follows |
//! | rest | what the kind says |
//!
//! [`kind::MMIO_RANGE`] and [`kind::PORT_RANGE`] have 16 bytes: the index of the region (4 bytes,
//! below 256), flags (4, 0 so far) and the size in bytes (8; of ports, at most 65536). Where a range
//! goes is the VMM's choice. No index is there twice, region 0 of the first note included.
//!
//! [`kind::READ_PAGE`] has 32 bytes: the index of a region of memory (4 bytes), flags (4, 0 so far),
//! where in the region the page begins (8, a multiple of 4096), and the name of the map that holds
//! it (16, at most 15 and zeroes). The map's size is the page's.
//!
//! [`kind::WORK_NAME`] has 24 bytes: the index of a WORK program (4 bytes, below 16), flags (4, 0 so
//! far) and its name (16, with zeroes behind it: 1 to 15 of `a` to `z`, `0` to `9` and `_`). The
//! program is in section `kvm_io_work/NAME`. No index and no name is there twice.
//!
//! [`kind::WINDOW`], at most once, has 4 bytes: the device accesses guest memory, to read it (1), to
//! write to it (2), or both (3). Which memory it may access is the VMM's choice.
//!
//! [`kind::DOORBELL`] has 8 bytes: an index that programs signal as they do interrupts (4 bytes, not
//! below their number and below 256), and the index of the WORK program that this runs (4). No index
//! and no WORK program is there twice.
//!
//! [`kind::STATE_VERSION`], at most once, has 8 bytes: the version of the device's state (4 bytes),
//! and the oldest whose state it can load (4, not above the version).
//!
//! [`kind::PARAM`] has 20 bytes: the name of an array map that the VMM fills before the guest sees the
//! device (16 bytes, at most 15 and zeroes), and flags (4, 0 so far). With [`REQUIRED`] the device
//! cannot work until the VMM has filled it. No name is there twice.
//!
//! `samples/devices/kvm_bpf.h` writes it from C.

use object::elf::{EM_BPF, FileHeader64};
use object::read::elf::{FileHeader, SectionHeader};
use object::{Endianness, elf};

use crate::uapi::{KVM_DEV_BPF_MAX_IRQS, KVM_DEV_BPF_MAX_REGIONS, KVM_DEV_BPF_MAX_WORKS};

/// Section that holds the note.
pub const SECTION: &str = ".note.kvm-bpf.mmio-device";
/// Owner name of the note.
pub const OWNER: &str = "kvm-bpf";
/// Type of the note.
pub const TYPE: u32 = 1;
/// The newest layout this crate reads.
pub const VERSION: u32 = 1;
/// Type of the notes with a list of items.
pub const TYPE_ITEMS: u32 = 2;

/// Kinds of items.
pub mod kind {
    /// A range of guest-physical addresses.
    pub const MMIO_RANGE: u16 = 1;
    /// A range of ports.
    pub const PORT_RANGE: u16 = 2;
    /// A page whose reads have no side effect.
    pub const READ_PAGE: u16 = 3;
    /// An eventfd that is no interrupt: it runs a WORK program.
    pub const DOORBELL: u16 = 4;
    /// The device accesses guest memory.
    pub const WINDOW: u16 = 5;
    /// A program that runs without a guest's access.
    pub const WORK_NAME: u16 = 6;
    /// Version of the device's state.
    pub const STATE_VERSION: u16 = 7;
    /// A map that the VMM fills.
    pub const PARAM: u16 = 8;
}
/// In an item's kind: who does not know it cannot serve the device.
pub const REQUIRED: u16 = 1 << 15;

/// The most items of a kind, and `compatible` strings: more than any device has.
const MAX_ITEMS: usize = 256;
/// Bytes before the `compatible` strings.
const FIXED_LEN: usize = 16;
/// Bytes of an item before what its kind says, and of what a range says.
const ITEM_LEN: usize = 4;
const RANGE_LEN: usize = 16;
/// Bytes that the name of a WORK program has room in, and what an item with it says.
const NAME_LEN: usize = 16;
const WORK_LEN: usize = 8 + NAME_LEN;
/// Bytes of what windows and doorbells say.
const WINDOW_LEN: usize = 4;
const DOORBELL_LEN: usize = 8;
/// Bytes of what a version of the state says.
const STATE_VERSION_LEN: usize = 8;
/// Bytes of what a parameter says.
const PARAM_LEN: usize = NAME_LEN + 4;
/// Bytes of what a read page says.
const READ_PAGE_LEN: usize = 32;
/// The smallest page that a host has.
pub const MIN_PAGE: u64 = 0x1000;
/// Ports that there are.
const MAX_PORTS: u64 = 0x1_0000;

/// Where a region is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
pub enum Space {
    /// At guest-physical addresses.
    Memory,
    /// At ports.
    Ports,
}

/// A region of the device, without its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
#[non_exhaustive]
pub struct Range {
    /// Memory or ports.
    pub space: Space,
    /// Index of the region, which programs see.
    pub region: u32,
    /// Bytes or ports: 1 to `i32::MAX` or to 65536.
    pub size: u64,
}

impl Range {
    /// A region of that index, with so many bytes or ports.
    pub fn new(space: Space, region: u32, size: u64) -> Self {
        Range {
            space,
            region,
            size,
        }
    }
}

/// Bytes of a region that the guest may read from a map: no load of them has a side effect.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
#[non_exhaustive]
pub struct ReadPage {
    /// Index of the region, which is one of memory.
    pub region: u32,
    /// Where in the region they begin, a multiple of [`MIN_PAGE`].
    pub offset: u64,
    /// Name of the map, 1 to 15 bytes; its size is that of the page.
    pub map: String,
}

impl ReadPage {
    /// What the map of that name has, at so many bytes from the beginning of a region.
    pub fn new(region: u32, offset: u64, map: &str) -> Self {
        ReadPage {
            region,
            offset,
            map: map.to_string(),
        }
    }
}

/// A program that runs without a guest's access.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
#[non_exhaustive]
pub struct WorkName {
    /// Its index in the device, 0 to 15.
    pub index: u32,
    /// Its name, which says what it is for.
    pub name: String,
}

impl WorkName {
    /// The program of that index and name.
    pub fn new(index: u32, name: &str) -> Self {
        WorkName {
            index,
            name: name.to_string(),
        }
    }
}

/// How a device accesses guest memory; in one way at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct Rights {
    /// It reads it.
    pub read: bool,
    /// It writes to it.
    pub write: bool,
}

/// What a program signals to have a WORK program run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct Doorbell {
    /// Its index among those of interrupts, which it is none of.
    pub irq: u32,
    /// Index of the WORK program.
    pub work: u32,
}

/// Which states of a device another of its kind can load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct StateVersion {
    /// Version of the state that this device saves.
    pub version: u32,
    /// The oldest version that it can load, at most `version`.
    pub oldest: u32,
}

/// Values that programs cannot find out: an array map that the VMM fills.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
#[non_exhaustive]
pub struct Param {
    /// Name of the map, 1 to 15 bytes, which says what the values are.
    pub name: String,
    /// The device cannot work without.
    pub required: bool,
}

impl Param {
    /// The parameter whose map has that name.
    pub fn new(name: &str, required: bool) -> Self {
        Param {
            name: name.to_string(),
            required,
        }
    }
}

/// What the note says about a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "Unchecked"))]
#[non_exhaustive]
pub struct Note {
    /// Bytes of guest-physical address space that region 0 has, 1 to `i32::MAX`; 0 if `ranges` are
    /// all there is.
    pub mmio_size: u64,
    /// Number of interrupts; indices are 0 to one below this.
    pub nr_irqs: u32,
    /// Device-tree `compatible` strings, most specific first; at least one.
    pub compatible: Vec<String>,
    /// The ranges of the lists, in their order.
    pub ranges: Vec<Range>,
    /// The read pages of the lists, in their order.
    pub read_pages: Vec<ReadPage>,
    /// The WORK programs of the lists, in their order.
    pub works: Vec<WorkName>,
    /// How it accesses guest memory, where it does.
    pub window: Option<Rights>,
    /// The doorbells of the lists, in their order.
    pub doorbells: Vec<Doorbell>,
    /// Versions of the state, where the lists have them.
    pub state_version: Option<StateVersion>,
    /// The parameters of the lists, in their order.
    // A reader that knows none refuses the field, so it is there only where it says something.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Vec::is_empty"))]
    pub params: Vec<Param>,
}

/// Why a file has no usable note.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The bytes are no 64-bit ELF file.
    #[error("not a 64-bit ELF file")]
    NotElf,
    /// The file is for big-endian eBPF.
    #[error("a big-endian object; devices are little endian (clang --target=bpfel)")]
    BigEndian,
    /// The file is for another machine than eBPF.
    #[error("not an eBPF object (ELF machine {0})")]
    NotBpf(u16),
    /// The file's headers or sections reach outside of it.
    #[error("damaged ELF file: {0}")]
    BadElf(String),
    /// There is no note that describes a device.
    #[error("no device note (section {SECTION}, owner {OWNER}, type {TYPE})")]
    NoNote,
    /// The note's layout is newer than this crate.
    #[error("the device note has version {found}, newer than the supported {supported}")]
    FutureVersion {
        /// Version in the file.
        found: u32,
        /// [`VERSION`].
        supported: u32,
    },
    /// The note's content is wrong.
    #[error("bad device note: {0}")]
    BadNote(String),
    /// A list has something that this crate does not know and must.
    #[error("the device needs what this does not know: kind {0:#x} of its note")]
    UnknownKind(u16),
}

fn damaged(error: object::read::Error) -> Error {
    Error::BadElf(error.to_string())
}

impl Note {
    /// Finds and reads the note in the bytes of an object file.
    pub fn from_elf(file: &[u8]) -> Result<Self, Error> {
        let header = FileHeader64::<Endianness>::parse(file).map_err(|_| Error::NotElf)?;
        let endian = header.endian().map_err(damaged)?;
        if endian == Endianness::Big {
            return Err(Error::BigEndian);
        }
        let machine = header.e_machine(endian);
        if machine != EM_BPF {
            return Err(Error::NotBpf(machine));
        }

        let sections = header.sections(endian, file).map_err(damaged)?;
        let Some((_, section)) = sections.section_by_name(endian, SECTION.as_bytes()) else {
            return Err(Error::NoNote);
        };
        if section.sh_type(endian) != elf::SHT_NOTE {
            return Err(Error::NoNote);
        }
        let notes = section.notes(endian, file).map_err(damaged)?;
        let mut notes = notes.ok_or(Error::NoNote)?;
        let (mut device, mut lists) = (None, Vec::new());
        while let Some(note) = notes.next().map_err(damaged)? {
            match note.n_type(endian) {
                _ if note.name() != OWNER.as_bytes() => {}
                TYPE if device.is_some() => {
                    return Err(Error::BadNote(format!("two of type {TYPE}")));
                }
                TYPE => device = Some(note.desc()),
                TYPE_ITEMS => lists.push(note.desc()),
                _ => {}
            }
        }
        let mut note = Self::from_desc(device.ok_or(Error::NoNote)?)?;
        for list in lists {
            note.add_items(list)?;
        }
        note.check()?;
        Ok(note)
    }

    /// Checks what the parts say of each other.
    fn check(&self) -> Result<(), Error> {
        // First: below, each is compared with each.
        self.check_lens()?;
        self.check_regions()?;
        self.check_read_pages()?;
        self.check_works()?;
        self.check_doorbells()?;
        match first_twice(&self.params, |a, b| a.name == b.name) {
            Some(param) => Err(Error::BadNote(format!("parameter {:?} twice", param.name))),
            None => Ok(()),
        }
    }

    /// Whether both describe the same device to a guest and want the same guest memory. What programs
    /// there are besides its handlers, what runs them, which state they can load, and what they must be
    /// told, may differ.
    pub fn is_same_device(&self, other: &Self) -> bool {
        let seen = |note: &Self| Note {
            works: Vec::new(),
            doorbells: Vec::new(),
            state_version: None,
            params: Vec::new(),
            ..note.clone()
        };
        seen(self) == seen(other)
    }

    /// Whether the device can go on with the state of the one that `other` describes, though its
    /// types may be others.
    pub fn loads_state_of(&self, other: &Self) -> bool {
        let saved = other.state_version.unwrap_or_default().version;
        self.state_version
            .is_some_and(|own| (own.oldest..=own.version).contains(&saved))
    }

    /// The index of the WORK program of that name, if there is one.
    pub fn work_index(&self, name: &str) -> Option<u32> {
        let work = self.works.iter().find(|work| work.name == name)?;
        Some(work.index)
    }

    /// The parameter of that name, if there is one.
    pub fn param(&self, name: &str) -> Option<&Param> {
        self.params.iter().find(|param| param.name == name)
    }

    /// All regions.
    pub fn regions(&self) -> Vec<Range> {
        let first = (self.mmio_size != 0).then_some(Range {
            space: Space::Memory,
            region: 0,
            size: self.mmio_size,
        });
        first
            .into_iter()
            .chain(self.ranges.iter().copied())
            .collect()
    }

    fn check_lens(&self) -> Result<(), Error> {
        for (what, len) in [
            ("compatible strings", self.compatible.len()),
            ("ranges", self.ranges.len()),
            ("read pages", self.read_pages.len()),
            ("WORK programs", self.works.len()),
            ("doorbells", self.doorbells.len()),
            ("parameters", self.params.len()),
        ] {
            if len > MAX_ITEMS {
                let reason = format!("{len} {what}, more than {MAX_ITEMS}");
                return Err(Error::BadNote(reason));
            }
        }
        Ok(())
    }

    fn check_regions(&self) -> Result<(), Error> {
        let regions = self.regions();
        if regions.is_empty() {
            return Err(Error::BadNote("MMIO size 0 and no other range".to_string()));
        }
        match first_twice(&regions, |a, b| a.region == b.region) {
            Some(range) => Err(Error::BadNote(format!("region {} twice", range.region))),
            None => Ok(()),
        }
    }

    fn check_read_pages(&self) -> Result<(), Error> {
        let bad = |page: &ReadPage, why: &str| {
            let ReadPage { region, offset, .. } = page;
            let what = format!("read page at {offset:#x} of region {region}");
            Err(Error::BadNote(format!("{what}{why}")))
        };
        let regions = self.regions();
        for page in &self.read_pages {
            match regions.iter().find(|range| range.region == page.region) {
                None => return bad(page, ": no such region"),
                Some(range) if range.space == Space::Ports => {
                    return bad(page, ": ports have no pages");
                }
                Some(range) if page.offset >= range.size => {
                    return bad(page, &format!(", which has {:#x} bytes", range.size));
                }
                Some(_) => {}
            }
        }
        let same = |a: &ReadPage, b: &ReadPage| (a.region, a.offset) == (b.region, b.offset);
        match first_twice(&self.read_pages, same) {
            Some(page) => bad(page, " twice"),
            None => Ok(()),
        }
    }

    fn check_works(&self) -> Result<(), Error> {
        let bad = |reason| Err(Error::BadNote(reason));
        if let Some(work) = first_twice(&self.works, |a, b| a.index == b.index) {
            return bad(format!("WORK index {} twice", work.index));
        }
        match first_twice(&self.works, |a, b| a.name == b.name) {
            Some(work) => bad(format!("WORK name {:?} twice", work.name)),
            None => Ok(()),
        }
    }

    fn check_doorbells(&self) -> Result<(), Error> {
        let bad = |reason| Err(Error::BadNote(reason));
        for &Doorbell { irq, work } in &self.doorbells {
            if irq < self.nr_irqs || u64::from(irq) >= KVM_DEV_BPF_MAX_IRQS {
                return bad(format!(
                    "doorbell {irq}, an interrupt or not below {KVM_DEV_BPF_MAX_IRQS}"
                ));
            }
            if !self.works.iter().any(|other| other.index == work) {
                return bad(format!(
                    "doorbell {irq} of WORK program {work}, which is not there"
                ));
            }
        }
        if let Some(bell) = first_twice(&self.doorbells, |a, b| a.irq == b.irq) {
            return bad(format!("doorbell {} twice", bell.irq));
        }
        match first_twice(&self.doorbells, |a, b| a.work == b.work) {
            Some(bell) => bad(format!("two doorbells of WORK program {}", bell.work)),
            None => Ok(()),
        }
    }

    /// Reads the descriptor, the part of the note after owner and type.
    fn from_desc(desc: &[u8]) -> Result<Self, Error> {
        let bad = |reason: String| Err(Error::BadNote(reason));

        let Some(version) = desc.first_chunk() else {
            return bad(format!("{} bytes have no room for a version", desc.len()));
        };
        let version = u32::from_le_bytes(*version);
        if version > VERSION {
            return Err(Error::FutureVersion {
                found: version,
                supported: VERSION,
            });
        }
        if version == 0 {
            return bad("version 0".to_string());
        }

        let Some((fixed, strings)) = desc.split_at_checked(FIXED_LEN) else {
            return bad(format!("{} bytes, at least {FIXED_LEN} needed", desc.len()));
        };
        let (nr_irqs, mmio_size) = (u32_at(fixed, 4), u64_at(fixed, 8));
        check_fixed(nr_irqs, mmio_size).map_err(Error::BadNote)?;

        let Some((&0, strings)) = strings.split_last() else {
            return bad("no compatible string that ends in NUL".to_string());
        };
        let mut compatible = Vec::new();
        for string in strings.split(|&byte| byte == 0) {
            match str::from_utf8(string) {
                Ok("") => return bad("an empty compatible string".to_string()),
                Ok(string) => compatible.push(string.to_string()),
                Err(_) => return bad("a compatible string that is not UTF-8".to_string()),
            }
        }

        Ok(Note {
            mmio_size,
            nr_irqs,
            compatible,
            ranges: Vec::new(),
            read_pages: Vec::new(),
            works: Vec::new(),
            window: None,
            doorbells: Vec::new(),
            state_version: None,
            params: Vec::new(),
        })
    }

    /// Reads a list of items.
    fn add_items(&mut self, desc: &[u8]) -> Result<(), Error> {
        let bad = |reason: String| Err(Error::BadNote(reason));

        let mut at = 0;
        while at < desc.len() {
            let start = at + ITEM_LEN;
            let Some(head) = desc.get(at..start) else {
                return bad(format!(
                    "item at {at}: {} bytes have no room for one",
                    desc.len() - at
                ));
            };
            let [kind, len] = [0, 2].map(|at| u16::from_le_bytes(array_at(head, at)));
            let end = start + usize::from(len);
            let Some(payload) = desc.get(start..end) else {
                return bad(format!(
                    "item at {at}: {len} bytes, {} are there",
                    desc.len() - start
                ));
            };
            let added = match kind & !REQUIRED {
                kind::MMIO_RANGE => add(&mut self.ranges, parse_range(Space::Memory, payload)),
                kind::PORT_RANGE => add(&mut self.ranges, parse_range(Space::Ports, payload)),
                kind::READ_PAGE => add(&mut self.read_pages, parse_read_page(payload)),
                kind::WORK_NAME => add(&mut self.works, parse_work(payload)),
                kind::WINDOW => add_once(&mut self.window, parse_window(payload), "window"),
                kind::DOORBELL => add(&mut self.doorbells, parse_doorbell(payload)),
                kind::STATE_VERSION => add_once(
                    &mut self.state_version,
                    parse_state_version(payload),
                    "version of the state",
                ),
                kind::PARAM => {
                    let required = kind & REQUIRED != 0;
                    add(&mut self.params, parse_param(payload, required))
                }
                _ if kind & REQUIRED != 0 => return Err(Error::UnknownKind(kind)),
                0 => Err("kind 0".to_string()),
                _ => Ok(()),
            };
            if let Err(reason) = added {
                return bad(format!("item at {at}: {reason}"));
            }
            at = end.next_multiple_of(4);
            // The last one may end without.
            let padding = &desc[end..at.min(desc.len())];
            if padding.iter().any(|&byte| byte != 0) {
                return bad(format!("not 0 between items, at {end}"));
            }
        }
        Ok(())
    }
}

/// A note that somebody has written down, of which nothing is known.
#[cfg(feature = "serde")]
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Unchecked {
    mmio_size: u64,
    nr_irqs: u32,
    compatible: Vec<String>,
    #[serde(default)]
    ranges: Vec<Range>,
    #[serde(default)]
    read_pages: Vec<ReadPage>,
    #[serde(default)]
    works: Vec<WorkName>,
    #[serde(default)]
    window: Option<Rights>,
    #[serde(default)]
    doorbells: Vec<Doorbell>,
    #[serde(default)]
    state_version: Option<StateVersion>,
    #[serde(default)]
    params: Vec<Param>,
}

#[cfg(feature = "serde")]
impl TryFrom<Unchecked> for Note {
    type Error = Error;

    /// What holds for the note of a file holds for it.
    fn try_from(from: Unchecked) -> Result<Self, Error> {
        let note = Note {
            mmio_size: from.mmio_size,
            nr_irqs: from.nr_irqs,
            compatible: from.compatible,
            ranges: from.ranges,
            read_pages: from.read_pages,
            works: from.works,
            window: from.window,
            doorbells: from.doorbells,
            state_version: from.state_version,
            params: from.params,
        };
        note.check_lens()?;
        note.check_parts().map_err(Error::BadNote)?;
        note.check()?;
        Ok(note)
    }
}

#[cfg(feature = "serde")]
impl Note {
    /// Checks each part for itself, as those of a file are while they are read.
    fn check_parts(&self) -> Result<(), String> {
        check_fixed(self.nr_irqs, self.mmio_size)?;
        let is_string = |string: &String| !string.is_empty() && !string.contains('\0');
        if self.compatible.is_empty() || !self.compatible.iter().all(is_string) {
            return Err("an empty compatible string, or none".to_string());
        }
        self.ranges.iter().try_for_each(check_range)?;
        for page in &self.read_pages {
            check_page_offset(page.offset)?;
            check_map_name("read page", &page.map)?;
        }
        for param in &self.params {
            check_map_name("parameter", &param.name)?;
        }
        for work in &self.works {
            check_work_index(work.index)?;
            check_work_name(&work.name)?;
        }
        if let Some(Rights { read, write }) = self.window {
            check_rights(u32::from(read) | u32::from(write) << 1)?;
        }
        self.state_version.iter().try_for_each(check_state_version)
    }
}

fn add<T>(items: &mut Vec<T>, item: Result<T, String>) -> Result<(), String> {
    items.push(item?);
    Ok(())
}

fn add_once<T>(place: &mut Option<T>, item: Result<T, String>, what: &str) -> Result<(), String> {
    match place.replace(item?) {
        None => Ok(()),
        Some(_) => Err(format!("a second {what}")),
    }
}

/// The first item that is the same as one before it.
fn first_twice<T>(items: &[T], same: impl Fn(&T, &T) -> bool) -> Option<&T> {
    let is_again = |&at: &usize| items[..at].iter().any(|other| same(other, &items[at]));
    (0..items.len()).find(is_again).map(|at| &items[at])
}

fn check_fixed(nr_irqs: u32, mmio_size: u64) -> Result<(), String> {
    if mmio_size > i32::MAX as u64 {
        return Err(format!(
            "MMIO size {mmio_size:#x}, more than {:#x}",
            i32::MAX
        ));
    }
    if u64::from(nr_irqs) > KVM_DEV_BPF_MAX_IRQS {
        return Err(format!(
            "{nr_irqs} interrupts, more than {KVM_DEV_BPF_MAX_IRQS}"
        ));
    }
    Ok(())
}

fn parse_range(space: Space, payload: &[u8]) -> Result<Range, String> {
    check_len("range", payload, RANGE_LEN)?;
    let range = Range {
        space,
        region: u32_at(payload, 0),
        size: u64_at(payload, 8),
    };
    check_range(&range)?;
    check_flags("range", payload)?;
    Ok(range)
}

fn check_range(range: &Range) -> Result<(), String> {
    let Range {
        space,
        region,
        size,
    } = *range;
    let max = match space {
        Space::Memory => i32::MAX as u64,
        Space::Ports => MAX_PORTS,
    };
    if size == 0 || size > max {
        return Err(format!("range of size {size:#x}, not 1 to {max:#x}"));
    }
    if u64::from(region) >= KVM_DEV_BPF_MAX_REGIONS {
        return Err(format!(
            "region {region}, not below {KVM_DEV_BPF_MAX_REGIONS}"
        ));
    }
    Ok(())
}

fn check_page_offset(offset: u64) -> Result<(), String> {
    match offset.is_multiple_of(MIN_PAGE) {
        true => Ok(()),
        false => Err(format!("read page at {offset:#x}, in the middle of a page")),
    }
}

/// Checks the name of a map that an item is about.
fn check_map_name(what: &str, name: &str) -> Result<(), String> {
    match (1..NAME_LEN).contains(&name.len()) && !name.contains('\0') {
        true => Ok(()),
        false => Err(format!(
            "a {what} without a map's name, 1 to 15 bytes and zeroes"
        )),
    }
}

fn check_work_index(index: u32) -> Result<(), String> {
    match u64::from(index) < KVM_DEV_BPF_MAX_WORKS {
        true => Ok(()),
        false => Err(format!(
            "WORK index {index}, not below {KVM_DEV_BPF_MAX_WORKS}"
        )),
    }
}

fn check_work_name(name: &str) -> Result<(), String> {
    let is_good = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_');
    match (1..NAME_LEN).contains(&name.len()) && name.bytes().all(is_good) {
        true => Ok(()),
        false => Err(format!(
            "WORK name {name:?}, not 1 to {} of a to z, 0 to 9 and _",
            NAME_LEN - 1
        )),
    }
}

fn check_rights(rights: u32) -> Result<(), String> {
    match (1..=3).contains(&rights) {
        true => Ok(()),
        false => Err(format!("rights {rights:#x} of a window, not 1 to 3")),
    }
}

fn check_state_version(state: &StateVersion) -> Result<(), String> {
    let StateVersion { version, oldest } = state;
    match oldest <= version {
        true => Ok(()),
        false => Err(format!(
            "version {version} of the state loads none older than {oldest}"
        )),
    }
}

fn parse_read_page(payload: &[u8]) -> Result<ReadPage, String> {
    check_len("read page", payload, READ_PAGE_LEN)?;
    check_flags("read page", payload)?;
    let offset = u64_at(payload, 8);
    check_page_offset(offset)?;
    Ok(ReadPage {
        region: u32_at(payload, 0),
        offset,
        map: map_name("read page", &payload[16..])?,
    })
}

fn parse_param(payload: &[u8], required: bool) -> Result<Param, String> {
    check_len("parameter", payload, PARAM_LEN)?;
    let (name, flags) = payload.split_at(NAME_LEN);
    match u32_at(flags, 0) {
        0 => Ok(Param {
            name: map_name("parameter", name)?,
            required,
        }),
        flags => Err(format!("unknown flags {flags:#x} of a parameter")),
    }
}

/// The name of a map that an item is about.
fn map_name(what: &str, bytes: &[u8]) -> Result<String, String> {
    let name = name_in(bytes).and_then(|name| str::from_utf8(name).ok());
    let name = name.unwrap_or_default().to_string();
    check_map_name(what, &name)?;
    Ok(name)
}

fn parse_work(payload: &[u8]) -> Result<WorkName, String> {
    check_len("WORK program", payload, WORK_LEN)?;
    let index = u32_at(payload, 0);
    check_work_index(index)?;
    check_flags("WORK program", payload)?;
    // What is no text, or has zeroes in between, is no name either.
    let name = String::from_utf8_lossy(&payload[8..]);
    let name = name.trim_end_matches('\0').to_string();
    check_work_name(&name)?;
    Ok(WorkName { index, name })
}

fn parse_window(payload: &[u8]) -> Result<Rights, String> {
    check_len("window", payload, WINDOW_LEN)?;
    let rights = u32_at(payload, 0);
    check_rights(rights)?;
    Ok(Rights {
        read: rights & 1 != 0,
        write: rights & 2 != 0,
    })
}

fn parse_doorbell(payload: &[u8]) -> Result<Doorbell, String> {
    check_len("doorbell", payload, DOORBELL_LEN)?;
    let (irq, work) = (u32_at(payload, 0), u32_at(payload, 4));
    Ok(Doorbell { irq, work })
}

fn parse_state_version(payload: &[u8]) -> Result<StateVersion, String> {
    check_len("version of the state", payload, STATE_VERSION_LEN)?;
    let state = StateVersion {
        version: u32_at(payload, 0),
        oldest: u32_at(payload, 4),
    };
    check_state_version(&state)?;
    Ok(state)
}

fn check_len(what: &str, payload: &[u8], wanted: usize) -> Result<(), String> {
    match payload.len() {
        len if len == wanted => Ok(()),
        len => Err(format!("a {what} of {len} bytes, not {wanted}")),
    }
}

/// Checks the flags of an item that has them, behind an index.
fn check_flags(what: &str, payload: &[u8]) -> Result<(), String> {
    match u32_at(payload, 4) {
        0 => Ok(()),
        flags => Err(format!("unknown flags {flags:#x} of a {what}")),
    }
}

/// A name with at least one zero behind it, and nothing else.
fn name_in(bytes: &[u8]) -> Option<&[u8]> {
    let len = bytes.iter().position(|&byte| byte == 0)?;
    let (name, rest) = bytes.split_at(len);
    (len != 0 && rest.iter().all(|&byte| byte == 0)).then_some(name)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

/// Bytes that are there: who calls this has checked the length.
fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    *bytes[at..].first_chunk().expect("the length is checked")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One ELF note, padded to 4 bytes as in the file.
    fn note(owner: &[u8], r#type: u32, desc: &[u8]) -> Vec<u8> {
        let mut note = Vec::new();
        note.extend((owner.len() as u32).to_le_bytes());
        note.extend((desc.len() as u32).to_le_bytes());
        note.extend(r#type.to_le_bytes());
        for part in [owner, desc] {
            note.extend(part);
            note.resize(note.len().next_multiple_of(4), 0);
        }
        note
    }

    fn desc(version: u32, nr_irqs: u32, mmio_size: u64, compatible: &[u8]) -> Vec<u8> {
        let mut desc = Vec::new();
        desc.extend(version.to_le_bytes());
        desc.extend(nr_irqs.to_le_bytes());
        desc.extend(mmio_size.to_le_bytes());
        desc.extend(compatible);
        desc
    }

    /// A little-endian eBPF object with one section of the given name and type.
    fn elf_with(section: &str, sh_type: u32, content: &[u8]) -> Vec<u8> {
        const HEADER_LEN: usize = 64;
        let mut names = vec![0];
        names.extend(section.as_bytes());
        names.push(0);
        let content_at = HEADER_LEN;
        let names_at = content_at + content.len();
        let sections_at = (names_at + names.len()).next_multiple_of(8);

        let mut file = Vec::new();
        file.extend(b"\x7fELF\x02\x01\x01");
        file.resize(16, 0);
        file.extend(1u16.to_le_bytes()); // ET_REL
        file.extend(EM_BPF.to_le_bytes());
        file.extend(1u32.to_le_bytes()); // version
        file.extend([0; 16]); // entry, program headers
        file.extend((sections_at as u64).to_le_bytes());
        file.extend([0; 4]); // flags
        for half in [HEADER_LEN as u16, 0, 0, 64, 3, 2] {
            file.extend(half.to_le_bytes());
        }
        file.extend(content);
        file.extend(&names);
        file.resize(sections_at, 0);

        file.extend([0; 64]); // the null section
        let mut header = |name: u32, sh_type: u32, at: usize, len: usize, align: u64| {
            file.extend(name.to_le_bytes());
            file.extend(sh_type.to_le_bytes());
            file.extend([0; 16]); // flags, address
            file.extend((at as u64).to_le_bytes());
            file.extend((len as u64).to_le_bytes());
            file.extend([0; 8]); // link, info
            file.extend(align.to_le_bytes());
            file.extend([0; 8]); // entry size
        };
        header(1, sh_type, content_at, content.len(), 4);
        header(0, elf::SHT_STRTAB, names_at, names.len(), 1);
        file
    }

    fn elf(content: &[u8]) -> Vec<u8> {
        elf_with(SECTION, elf::SHT_NOTE, content)
    }

    fn parse_desc(desc: &[u8]) -> Result<Note, Error> {
        Note::from_elf(&elf(&note(b"kvm-bpf\0", TYPE, desc)))
    }

    #[track_caller]
    fn assert_refused(parsed: Result<Note, Error>, wanted: &str) {
        match parsed {
            Err(Error::BadNote(reason)) => {
                assert!(reason.contains(wanted), "wanted {wanted:?}, got {reason:?}")
            }
            other => panic!("wanted a bad note ({wanted}), got {other:?}"),
        }
    }

    #[track_caller]
    fn assert_bad(desc: &[u8], wanted: &str) {
        assert_refused(parse_desc(desc), wanted);
    }

    /// As `include_bytes!` puts it anywhere.
    #[test]
    fn a_file_may_lie_at_any_address() {
        let file = elf(&note(b"kvm-bpf\0", TYPE, &desc(1, 2, 0x1000, b"a,b\0")));
        let wanted = Note::from_elf(&file).unwrap();
        for shift in 1..8 {
            let moved = [vec![0; shift], file.clone()].concat();
            assert_eq!(Note::from_elf(&moved[shift..]).unwrap(), wanted, "{shift}");
        }
    }

    #[test]
    fn reads_a_note() {
        let parsed = parse_desc(&desc(1, 2, 0x1000, b"a,b\0c\0")).unwrap();
        assert_eq!(
            parsed,
            Note {
                mmio_size: 0x1000,
                nr_irqs: 2,
                compatible: vec!["a,b".into(), "c".into()],
                ranges: vec![],
                read_pages: vec![],
                works: vec![],
                window: None,
                doorbells: vec![],
                state_version: None,
                params: vec![],
            }
        );
    }

    #[test]
    fn reads_every_padding() {
        for compatible in ["a", "ab", "abc", "abcd"] {
            let parsed = parse_desc(&desc(1, 0, 1, format!("{compatible}\0").as_bytes())).unwrap();
            assert_eq!(parsed.compatible, [compatible]);
        }
    }

    #[test]
    fn finds_the_note_behind_others() {
        let desc = desc(1, 0, 8, b"x\0");
        let mut notes = note(b"GNU\0", TYPE, b"12345");
        notes.extend(note(b"kvm-bpf\0", TYPE + 2, &desc));
        assert_eq!(Note::from_elf(&elf(&notes)), Err(Error::NoNote));
        notes.extend(note(b"kvm-bpf\0", TYPE, &desc));
        assert_eq!(Note::from_elf(&elf(&notes)).unwrap().mmio_size, 8);
    }

    #[test]
    fn refuses_other_owners_and_sections() {
        let desc = desc(1, 0, 8, b"x\0");
        for owner in [&b"kvm-bpg\0"[..], b"kvm-bp\0", b"kvm-bpf2\0", b""] {
            let file = elf(&note(owner, TYPE, &desc));
            assert_eq!(Note::from_elf(&file), Err(Error::NoNote));
        }
        let good = note(b"kvm-bpf\0", TYPE, &desc);
        let file = elf_with(".note.other", elf::SHT_NOTE, &good);
        assert_eq!(Note::from_elf(&file), Err(Error::NoNote));
        let file = elf_with(SECTION, elf::SHT_PROGBITS, &good);
        assert_eq!(Note::from_elf(&file), Err(Error::NoNote));
    }

    #[test]
    fn refuses_other_files() {
        let good = elf(&note(b"kvm-bpf\0", TYPE, &desc(1, 0, 8, b"x\0")));

        assert_eq!(Note::from_elf(b""), Err(Error::NotElf));
        assert_eq!(Note::from_elf(b"#!/bin/sh\n"), Err(Error::NotElf));

        let mut x86 = good.clone();
        x86[18..20].copy_from_slice(&elf::EM_X86_64.to_le_bytes());
        assert_eq!(Note::from_elf(&x86), Err(Error::NotBpf(elf::EM_X86_64)));

        let mut elf32 = good.clone();
        elf32[4] = 1;
        assert_eq!(Note::from_elf(&elf32), Err(Error::NotElf));

        let mut big = good;
        big[5] = 2;
        assert_eq!(Note::from_elf(&big), Err(Error::BigEndian));
        assert!(Error::BigEndian.to_string().contains("little endian"));
    }

    #[test]
    fn refuses_the_future_before_reading_on() {
        let future = Error::FutureVersion {
            found: 2,
            supported: 1,
        };
        assert_eq!(parse_desc(&2u32.to_le_bytes()), Err(future.clone()));
        assert_eq!(parse_desc(&desc(2, 999, 0, b"")), Err(future));
    }

    #[test]
    fn refuses_bad_fields() {
        assert_bad(&[1, 0, 0], "version");
        assert_bad(&desc(0, 0, 8, b"x\0"), "version 0");
        assert_bad(&desc(1, 0, 8, b"x\0")[..FIXED_LEN - 1], "at least");
        assert_bad(&desc(1, 0, 0, b"x\0"), "MMIO size 0 and no other range");
        assert_bad(&desc(1, 0, 0x8000_0000, b"x\0"), "MMIO size");
        assert_bad(&desc(1, 257, 8, b"x\0"), "interrupts");
        assert_bad(&desc(1, 0, 8, b""), "NUL");
        assert_bad(&desc(1, 0, 8, b"x"), "NUL");
        assert_bad(&desc(1, 0, 8, b"\0"), "empty");
        assert_bad(&desc(1, 0, 8, b"x\0\0y\0"), "empty");
        assert_bad(&desc(1, 0, 8, b"\xff\0"), "UTF-8");

        assert!(parse_desc(&desc(1, 256, 0x7fff_ffff, b"x\0")).is_ok());
    }

    #[test]
    fn refuses_every_truncation() {
        let file = elf(&note(b"kvm-bpf\0", TYPE, &desc(1, 1, 0x1000, b"a,b\0")));
        assert!(Note::from_elf(&file).is_ok());
        // The last section header's entry size is the last thing in the file.
        for len in 0..file.len() {
            assert!(Note::from_elf(&file[..len]).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn refuses_every_truncated_note() {
        let notes = note(b"kvm-bpf\0", TYPE, &desc(1, 1, 0x1000, b"a,b\0"));
        for len in 0..notes.len() {
            assert!(Note::from_elf(&elf(&notes[..len])).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn survives_every_flipped_byte() {
        let mut notes = note(b"kvm-bpf\0", TYPE, &desc(1, 1, 0x1000, b"a,b\0"));
        let items = [
            range(kind::PORT_RANGE, 1, 0, 8),
            item(UNKNOWN, b"odd"),
            range(kind::MMIO_RANGE, 2, 0, 8),
        ];
        notes.extend(note(b"kvm-bpf\0", TYPE_ITEMS, &items.concat()));
        let file = elf(&notes);
        assert!(Note::from_elf(&file).is_ok());
        for at in 0..file.len() {
            for value in [0x00, 0x7f, 0x80, 0xff] {
                let mut file = file.clone();
                file[at] = value;
                // Either answer will do; a panic will not.
                let _ = Note::from_elf(&file);
            }
        }
    }

    /// A kind that there is not.
    const UNKNOWN: u16 = 9;

    /// An item, padded to 4 bytes.
    fn item(kind: u16, payload: &[u8]) -> Vec<u8> {
        let mut item = Vec::new();
        item.extend(kind.to_le_bytes());
        item.extend((payload.len() as u16).to_le_bytes());
        item.extend(payload);
        item.resize(item.len().next_multiple_of(4), 0);
        item
    }

    fn range(kind: u16, region: u32, flags: u32, size: u64) -> Vec<u8> {
        let mut payload = Vec::new();
        payload.extend(region.to_le_bytes());
        payload.extend(flags.to_le_bytes());
        payload.extend(size.to_le_bytes());
        item(kind, &payload)
    }

    /// A read page, whose map has that name and zeroes.
    fn read_page(region: u32, flags: u32, offset: u64, map: &[u8]) -> Vec<u8> {
        let mut payload = Vec::new();
        payload.extend(region.to_le_bytes());
        payload.extend(flags.to_le_bytes());
        payload.extend(offset.to_le_bytes());
        payload.extend(map);
        payload.resize(READ_PAGE_LEN.max(payload.len()), 0);
        item(kind::READ_PAGE, &payload)
    }

    /// A device without memory of its own, and these items.
    fn parse_items_of(items: &[u8]) -> Result<Note, Error> {
        let mut notes = note(b"kvm-bpf\0", TYPE, &desc(1, 0, 0, b"x\0"));
        notes.extend(note(b"kvm-bpf\0", TYPE_ITEMS, items));
        Note::from_elf(&elf(&notes))
    }

    #[track_caller]
    fn assert_bad_items(items: &[u8], wanted: &str) {
        assert_refused(parse_items_of(items), wanted);
    }

    #[test]
    fn reads_ranges() {
        let items = [
            range(kind::PORT_RANGE, 3, 0, 8),
            range(kind::MMIO_RANGE, 255, 0, 0x7fff_ffff),
            range(kind::PORT_RANGE | REQUIRED, 0, 0, 0x1_0000),
        ];
        let wanted = [
            (Space::Ports, 3, 8),
            (Space::Memory, 255, 0x7fff_ffff),
            (Space::Ports, 0, 0x1_0000),
        ]
        .map(|(space, region, size)| Range {
            space,
            region,
            size,
        });
        let parsed = parse_items_of(&items.concat()).unwrap();
        assert_eq!((parsed.mmio_size, &parsed.ranges[..]), (0, &wanted[..]));
        assert_eq!(parsed.regions(), wanted);

        // With the memory of the first note, and before it.
        let mut notes = note(b"kvm-bpf\0", TYPE_ITEMS, &items[..2].concat());
        notes.extend(note(b"kvm-bpf\0", TYPE, &desc(1, 0, 64, b"x\0")));
        let parsed = Note::from_elf(&elf(&notes)).unwrap();
        let first = Range {
            space: Space::Memory,
            region: 0,
            size: 64,
        };
        assert_eq!(parsed.regions(), [first, wanted[0], wanted[1]]);
    }

    fn work(index: u32, flags: u32, name: &[u8]) -> Vec<u8> {
        let mut payload = [index, flags].map(u32::to_le_bytes).concat();
        payload.extend(name);
        payload.resize(WORK_LEN, 0);
        item(kind::WORK_NAME, &payload)
    }

    fn version(version: u32, oldest: u32) -> Vec<u8> {
        let payload = [version, oldest].map(u32::to_le_bytes).concat();
        item(kind::STATE_VERSION, &payload)
    }

    fn named(index: u32, name: &str) -> WorkName {
        WorkName {
            index,
            name: name.to_string(),
        }
    }

    #[test]
    fn reads_names_and_versions() {
        let ports = range(kind::PORT_RANGE, 0, 0, 8);
        let items = [
            ports.clone(),
            work(15, 0, b"save"),
            version(7, 3),
            work(0, 0, b"a_name_of_15_ch"),
        ];
        let parsed = parse_items_of(&items.concat()).unwrap();
        let wanted = [named(15, "save"), named(0, "a_name_of_15_ch")];
        assert_eq!(parsed.works, wanted);
        let wanted = StateVersion {
            version: 7,
            oldest: 3,
        };
        assert_eq!(parsed.state_version, Some(wanted));
        assert_eq!(parsed.ranges.len(), 1);

        // They are no part of what a guest sees.
        let without = parse_items_of(&ports).unwrap();
        assert!(!without.loads_state_of(&without) && !without.loads_state_of(&parsed));
        assert!(parsed.loads_state_of(&parsed));
        assert!(without.is_same_device(&parsed));
        let other = parse_items_of(&range(kind::PORT_RANGE, 0, 0, 16)).unwrap();
        assert!(!other.is_same_device(&parsed));
        for zero in [version(0, 0), version(u32::MAX, u32::MAX)] {
            assert!(parse_items_of(&[ports.clone(), zero].concat()).is_ok());
        }
    }

    /// As the macros write them: each has a list of its own.
    #[test]
    fn puts_lists_together() {
        let lists = [
            work(1, 0, b"reset"),
            range(kind::PORT_RANGE, 3, 0, 8),
            version(1, 0),
            Vec::new(),
            work(2, 0, b"save"),
        ];
        let whole = parse_items_of(&lists.concat()).unwrap();
        let mut notes = Vec::new();
        for (at, list) in lists.iter().enumerate() {
            if at == 2 {
                notes.extend(note(b"kvm-bpf\0", TYPE, &desc(1, 0, 0, b"x\0")));
            }
            notes.extend(note(b"kvm-bpf\0", TYPE_ITEMS, list));
        }
        assert_eq!(Note::from_elf(&elf(&notes)), Ok(whole));
        // What is wrong in the last of them is wrong.
        notes.extend(note(b"kvm-bpf\0", TYPE_ITEMS, &work(1, 0, b"input")));
        let refused = Note::from_elf(&elf(&notes)).unwrap_err().to_string();
        assert!(refused.contains("WORK index 1 twice"), "{refused}");
    }

    #[test]
    fn refuses_bad_names_and_versions() {
        assert_bad_items(&work(16, 0, b"save"), "WORK index 16, not below 16");
        assert_bad_items(&work(0, 1, b"save"), "flags 0x1 of a WORK");
        for name in [
            &b""[..],
            b"sixteen_letters_",
            b"Save",
            b"sa-ve",
            b"sa ve",
            b"sa\xffve",
            b"sa\0ve",
            b"\0save",
            b".save",
            b"/",
        ] {
            assert_bad_items(&work(0, 0, name), "WORK name");
        }
        for len in [0, 8, 23, 25, 28] {
            let wanted = format!("WORK program of {len} bytes, not 24");
            assert_bad_items(&item(kind::WORK_NAME, &vec![b'a'; len]), &wanted);
        }
        let save = work(3, 0, b"save");
        let same = [save.clone(), work(3, 0, b"reset")];
        assert_bad_items(
            &[range(1, 0, 0, 8), same.concat()].concat(),
            "index 3 twice",
        );
        let same = [save, work(4, 0, b"save")];
        assert_bad_items(
            &[range(1, 0, 0, 8), same.concat()].concat(),
            "\"save\" twice",
        );

        assert_bad_items(&version(1, 2), "none older than 2");
        for len in [0, 4, 7, 9, 12] {
            let wanted = format!("state of {len} bytes, not 8");
            assert_bad_items(&item(kind::STATE_VERSION, &vec![0; len]), &wanted);
        }
        let twice = [version(1, 1), version(1, 1)].concat();
        assert_bad_items(&twice, "item at 12: a second version");
    }

    fn window(rights: u32) -> Vec<u8> {
        item(kind::WINDOW | REQUIRED, &rights.to_le_bytes())
    }

    fn doorbell(irq: u32, work: u32) -> Vec<u8> {
        let payload = [irq, work].map(u32::to_le_bytes).concat();
        item(kind::DOORBELL | REQUIRED, &payload)
    }

    #[test]
    fn reads_windows_and_doorbells() {
        let ports = range(kind::PORT_RANGE, 0, 0, 8);
        for (rights, read, write) in [(1, true, false), (2, false, true), (3, true, true)] {
            let items = [
                doorbell(255, 3),
                ports.clone(),
                window(rights),
                work(3, 0, b"queues"),
                doorbell(0, 4),
                work(4, 0, b"more"),
            ];
            let parsed = parse_items_of(&items.concat()).unwrap();
            assert_eq!(parsed.window, Some(Rights { read, write }));
            let wanted = [(255, 3), (0, 4)].map(|(irq, work)| Doorbell { irq, work });
            assert_eq!(parsed.doorbells, wanted);

            // The VMM has to know the one, and not the other.
            let without = [window(rights), ports.clone()].concat();
            assert!(parse_items_of(&without).unwrap().is_same_device(&parsed));
            assert!(!parse_items_of(&ports).unwrap().is_same_device(&parsed));
        }
    }

    #[test]
    fn refuses_bad_windows_and_doorbells() {
        let ports = range(kind::PORT_RANGE, 0, 0, 8);
        for rights in [0, 4, 1 << 31 | 1] {
            assert_bad_items(&window(rights), "not 1 to 3");
        }
        assert_bad_items(
            &[window(1), window(1)].concat(),
            "item at 8: a second window",
        );
        for len in [0, 3, 5, 8] {
            let wanted = format!("window of {len} bytes, not 4");
            assert_bad_items(&item(kind::WINDOW, &vec![1; len]), &wanted);
        }
        for len in [0, 4, 7, 9, 12] {
            let wanted = format!("doorbell of {len} bytes, not 8");
            assert_bad_items(&item(kind::DOORBELL, &vec![1; len]), &wanted);
        }
        let (one, two) = (work(1, 0, b"one"), work(2, 0, b"two"));
        let all = |doorbells: &[Vec<u8>]| {
            [ports.clone(), one.clone(), two.clone(), doorbells.concat()].concat()
        };
        assert_bad_items(
            &all(&[doorbell(256, 1)]),
            "doorbell 256, an interrupt or not",
        );
        assert_bad_items(&all(&[doorbell(0, 3)]), "WORK program 3, which is not");
        let same_irq = all(&[doorbell(5, 1), doorbell(5, 2)]);
        assert_bad_items(&same_irq, "doorbell 5 twice");
        let same_work = all(&[doorbell(5, 1), doorbell(6, 1)]);
        assert_bad_items(&same_work, "two doorbells of WORK program 1");

        // An index that is an interrupt's.
        let mut notes = note(b"kvm-bpf\0", TYPE, &desc(1, 2, 8, b"x\0"));
        let items = [one, doorbell(1, 1)].concat();
        notes.extend(note(b"kvm-bpf\0", TYPE_ITEMS, &items));
        let refused = Note::from_elf(&elf(&notes)).unwrap_err().to_string();
        assert!(refused.contains("doorbell 1, an interrupt"), "{refused}");
    }

    /// A parameter of 16 bytes of name, and these flags.
    fn param(kind: u16, name: &[u8], flags: u32) -> Vec<u8> {
        let mut payload = name.to_vec();
        payload.resize(NAME_LEN, 0);
        payload.extend(flags.to_le_bytes());
        item(kind, &payload)
    }

    #[test]
    fn reads_parameters() {
        let ports = range(kind::PORT_RANGE, 0, 0, 8);
        let items = [
            param(kind::PARAM | REQUIRED, b"clock", 0),
            ports.clone(),
            param(kind::PARAM, b"a_name_of_15_ch", 0),
        ];
        let parsed = parse_items_of(&items.concat()).unwrap();
        let wanted = [("clock", true), ("a_name_of_15_ch", false)];
        let wanted = wanted.map(|(name, required)| Param {
            name: name.to_string(),
            required,
        });
        assert_eq!(parsed.params, wanted);
        assert_eq!(parsed.param("clock"), Some(&wanted[0]));
        assert_eq!(parsed.param("clocks"), None);
        // They are no part of what a guest sees.
        assert!(parse_items_of(&ports).unwrap().is_same_device(&parsed));
    }

    #[test]
    fn refuses_bad_parameters() {
        for name in [
            &b""[..],
            b"\0clock",
            b"clo\0ck",
            b"\xff",
            b"sixteen_bytes_xx",
        ] {
            for kind in [kind::PARAM, kind::PARAM | REQUIRED] {
                assert_bad_items(&param(kind, name, 0), "a parameter without a map's name");
            }
        }
        assert_bad_items(&param(kind::PARAM, b"clock", 1), "flags 0x1 of a parameter");
        for len in [0, 16, 19, 21, 24] {
            let wanted = format!("a parameter of {len} bytes, not 20");
            assert_bad_items(&item(kind::PARAM, &vec![0; len]), &wanted);
        }
        let twice = [
            range(kind::PORT_RANGE, 0, 0, 8),
            param(kind::PARAM, b"clock", 0),
            param(kind::PARAM | REQUIRED, b"clock", 0),
        ];
        assert_bad_items(&twice.concat(), "parameter \"clock\" twice");
    }

    #[test]
    fn skips_unknown_kinds() {
        let good = range(kind::PORT_RANGE, 0, 0, 8);
        let wanted = parse_items_of(&good).unwrap();
        for kind in [UNKNOWN, REQUIRED - 1] {
            for payload in [&b""[..], b"1", b"four", b"padded"] {
                let unknown = item(kind, payload);
                for items in [
                    [unknown.clone(), good.clone()],
                    [good.clone(), unknown.clone()],
                ] {
                    assert_eq!(parse_items_of(&items.concat()), Ok(wanted.clone()));
                }
                let needed = [good.clone(), item(kind | REQUIRED, payload)].concat();
                let refused = Err(Error::UnknownKind(kind | REQUIRED));
                assert_eq!(parse_items_of(&needed), refused, "kind {kind:#x}");
            }
        }
        let message = Error::UnknownKind(0x8003).to_string();
        assert!(message.contains("kind 0x8003"), "{message}");
        // It is skipped, and what is left is nothing.
        assert_bad_items(&item(UNKNOWN, b""), "no other range");
        assert_bad_items(b"", "no other range");
    }

    #[test]
    fn refuses_bad_items() {
        for kind in [kind::MMIO_RANGE, kind::PORT_RANGE] {
            assert_bad_items(&range(kind, 0, 0, 0), "size 0x0");
            assert_bad_items(&range(kind, 0, 0, 1 << 32 | 8), "size 0x100000008");
            assert_bad_items(&range(kind, 256, 0, 8), "region 256");
            assert_bad_items(&range(kind, 0, 1, 8), "flags 0x1");
            for len in [0, 1, 4, 15, 17, 20] {
                let wanted = format!("{len} bytes, not 16");
                assert_bad_items(&item(kind, &vec![0; len]), &wanted);
            }
        }
        assert_bad_items(&range(kind::MMIO_RANGE, 0, 0, 0x8000_0000), "size");
        assert_bad_items(&range(kind::PORT_RANGE, 0, 0, 0x1_0001), "size");
        assert_bad_items(&item(0, b""), "kind 0");
        let at_20 = [range(kind::PORT_RANGE, 0, 0, 8), item(0, b"")].concat();
        assert_bad_items(&at_20, "item at 20");
        let mut padded = item(UNKNOWN, b"1");
        padded[6] = 1;
        assert_bad_items(&padded, "not 0");
    }

    /// Names are compared with each other, so there must not be any number of them.
    #[test]
    fn refuses_more_items_than_a_device_has() {
        let ports = range(kind::PORT_RANGE, 0, 0, 8);
        let params = |count: u32| {
            let param = |number: u32| {
                let mut payload = format!("{number}").into_bytes();
                payload.resize(PARAM_LEN, 0);
                item(kind::PARAM, &payload)
            };
            let params = (0..count).map(param);
            [ports.clone()]
                .into_iter()
                .chain(params)
                .collect::<Vec<_>>()
        };
        assert!(parse_items_of(&params(256).concat()).is_ok());
        assert_bad_items(&params(257).concat(), "257 parameters, more than 256");
        // Far more would take minutes to compare.
        let many = params(200_000).concat();
        assert_bad_items(&many, "200000 parameters, more than 256");
        let strings = b"x\0".repeat(257);
        assert_bad(&desc(1, 0, 8, &strings), "257 compatible strings");
    }

    #[test]
    fn refuses_duplicates() {
        let ports = |region| range(kind::PORT_RANGE, region, 0, 8);
        let memory = |region| range(kind::MMIO_RANGE, region, 0, 8);
        assert_bad_items(&[ports(1), memory(2), ports(1)].concat(), "region 1 twice");
        assert_bad_items(&[ports(7), memory(7)].concat(), "region 7 twice");
        assert!(parse_items_of(&[ports(7), memory(8)].concat()).is_ok());

        let first = note(b"kvm-bpf\0", TYPE, &desc(1, 0, 8, b"x\0"));
        let items = |region| note(b"kvm-bpf\0", TYPE_ITEMS, &ports(region));
        let refused = |notes: &[Vec<u8>], wanted: &str| {
            assert_refused(Note::from_elf(&elf(&notes.concat())), wanted);
        };
        // The first note's memory is region 0.
        refused(&[first.clone(), items(0)], "region 0 twice");
        refused(&[first.clone(), items(1), items(1)], "region 1 twice");
        refused(&[first.clone(), first.clone()], "two of type 1");
        // A list alone is no device.
        assert_eq!(Note::from_elf(&elf(&items(1))), Err(Error::NoNote));
    }

    #[test]
    fn puts_the_items_of_all_lists_together() {
        let first = note(b"kvm-bpf\0", TYPE, &desc(1, 0, 0x3000, b"x\0"));
        let list = |items: &[u8]| note(b"kvm-bpf\0", TYPE_ITEMS, items);
        let notes = [
            list(&read_page(0, 0, 0x2000, b"fifteen_bytes_x")),
            first,
            list(&range(kind::PORT_RANGE, 3, 0, 8)),
            list(
                &[
                    range(kind::MMIO_RANGE, 1, 0, 0x1000),
                    read_page(1, 0, 0, b"p"),
                ]
                .concat(),
            ),
            list(b""),
        ];
        let parsed = Note::from_elf(&elf(&notes.concat())).unwrap();
        let regions: Vec<_> = parsed.regions().iter().map(|range| range.region).collect();
        assert_eq!(regions, [0, 3, 1]);
        let page = |region, offset, map: &str| ReadPage {
            region,
            offset,
            map: map.to_string(),
        };
        let wanted = [page(0, 0x2000, "fifteen_bytes_x"), page(1, 0, "p")];
        assert_eq!(parsed.read_pages, wanted);
    }

    #[test]
    fn refuses_bad_read_pages() {
        let memory = range(kind::MMIO_RANGE, 1, 0, 0x2000);
        let ports = range(kind::PORT_RANGE, 2, 0, 0x1000);
        let refused = |pages: &[Vec<u8>], wanted: &str| {
            assert_bad_items(&[&memory[..], &ports, &pages.concat()].concat(), wanted);
        };
        refused(&[read_page(1, 1, 0, b"page")], "unknown flags 0x1");
        refused(&[read_page(1, 0, 0x800, b"page")], "middle of a page");
        refused(
            &[read_page(1, 0, 0x2000, b"page")],
            "which has 0x2000 bytes",
        );
        refused(&[read_page(0, 0, 0, b"page")], "no such region");
        refused(&[read_page(2, 0, 0, b"page")], "ports have no pages");
        let page = read_page(1, 0, 0x1000, b"page");
        let other = read_page(1, 0, 0x1000, b"other");
        refused(&[page.clone(), other], "0x1000 of region 1 twice");
        for name in [&b""[..], b"\0x", b"a\0b", b"\xff", b"sixteen_bytes_xx"] {
            refused(&[read_page(1, 0, 0, name)], "without a map's name");
        }
        for len in [0, 16, 31, 33, 36] {
            let wanted = format!("{len} bytes, not 32");
            refused(&[item(kind::READ_PAGE, &vec![0; len])], &wanted);
        }
        // A page that is needed is one that is known.
        let mut needed = page;
        needed[1] |= 0x80;
        assert!(parse_items_of(&[memory, needed].concat()).is_ok());
    }

    #[test]
    fn refuses_every_truncated_list() {
        let items = [
            range(kind::PORT_RANGE, 0, 0, 8),
            item(UNKNOWN, b"12345"),
            range(kind::MMIO_RANGE, 1, 0, 8),
        ];
        let (list, ends) = (items.concat(), [20, 30, 29, 31, 32, 52]);
        for len in 0..=list.len() {
            let parsed = parse_items_of(&list[..len]);
            // What ends behind an item, and its padding or a part of that, is a list.
            assert_eq!(parsed.is_ok(), ends.contains(&len), "{len}: {parsed:?}");
        }
        // Within the second note; the first alone is whole.
        let first = note(b"kvm-bpf\0", TYPE, &desc(1, 0, 8, b"x\0"));
        let range = range(kind::PORT_RANGE, 1, 0, 8);
        let notes = [first.clone(), note(b"kvm-bpf\0", TYPE_ITEMS, &range)].concat();
        for len in first.len() + 1..notes.len() {
            assert!(Note::from_elf(&elf(&notes[..len])).is_err(), "{len} bytes");
        }
    }

    #[cfg(feature = "serde")]
    #[test]
    fn json_is_checked_like_a_file() {
        let text = r#"{"mmio_size":4096,"nr_irqs":2,"compatible":["a,b"],
            "ranges":[{"space":"ports","region":1,"size":8}],
            "read_pages":[{"region":0,"offset":0,"map":"page"}],
            "works":[{"index":3,"name":"save"}],"window":{"read":true,"write":false},
            "doorbells":[{"irq":2,"work":3}],"state_version":{"version":2,"oldest":1},
            "params":[{"name":"clock","required":true},{"name":"table","required":false}]}"#;
        let note: Note = serde_json::from_str(text).unwrap();
        assert_eq!((note.nr_irqs, note.work_index("save")), (2, Some(3)));
        let again = serde_json::to_string(&note).unwrap();
        assert_eq!(serde_json::from_str::<Note>(&again).unwrap(), note);
        let least = r#"{"mmio_size":1,"nr_irqs":0,"compatible":["a"]}"#;
        let least: Note = serde_json::from_str(least).unwrap();
        // Who knows no parameters can read it.
        let text_of_least = serde_json::to_string(&least).unwrap();
        assert!(!text_of_least.contains("params"), "{text_of_least}");
        for (good, bad) in [
            ("\"mmio_size\":4096", "\"mmio_size\":2147483648"),
            ("\"nr_irqs\":2", "\"nr_irqs\":257"),
            ("[\"a,b\"]", "[]"),
            ("[\"a,b\"]", "[\"\"]"),
            ("[\"a,b\"]", "[\"a\\u0000b\"]"),
            ("\"size\":8", "\"size\":0"),
            ("\"size\":8", "\"size\":65537"),
            ("\"region\":1", "\"region\":256"),
            ("\"region\":1", "\"region\":0"),
            ("\"offset\":0", "\"offset\":1"),
            ("\"offset\":0", "\"offset\":4096"),
            ("\"page\"", "\"\""),
            ("\"page\"", "\"sixteen_letters_\""),
            ("\"index\":3", "\"index\":16"),
            ("\"save\"", "\"Save\""),
            ("\"save\"", "\"sixteen_letters_\""),
            ("\"read\":true", "\"read\":false"),
            ("\"irq\":2", "\"irq\":1"),
            ("\"irq\":2", "\"irq\":256"),
            ("\"work\":3", "\"work\":4"),
            ("\"oldest\":1", "\"oldest\":3"),
            ("\"window\"", "\"windows\""),
            ("\"clock\"", "\"\""),
            ("\"clock\"", "\"c\\u0000k\""),
            ("\"clock\"", "\"sixteen_letters_\""),
            ("\"clock\"", "\"table\""),
            ("\"required\":true", "\"required\":1"),
        ] {
            assert!(text.contains(good), "{good}");
            let other = text.replacen(good, bad, 1);
            assert!(serde_json::from_str::<Note>(&other).is_err(), "{bad}");
        }
        let many = text.replace("[\"a,b\"]", &format!("[{}\"a\"]", "\"a\",".repeat(256)));
        let error = serde_json::from_str::<Note>(&many).unwrap_err();
        assert!(error.to_string().contains("257 compatible"), "{error}");
    }
}
