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
//! | 8 | bytes of MMIO space, 1 to `i32::MAX` |
//! | rest | device-tree `compatible` strings, each ending in NUL, at least one |
//!
//! `samples/devices/kvm_bpf.h` writes it from C.

use object::elf::{EM_BPF, FileHeader64};
use object::read::elf::{FileHeader, SectionHeader};
use object::{Endianness, elf};

use crate::uapi::KVM_DEV_BPF_MAX_IRQS;

/// Section that holds the note.
pub const SECTION: &str = ".note.kvm-bpf.mmio-device";
/// Owner name of the note.
pub const OWNER: &str = "kvm-bpf";
/// Type of the note.
pub const TYPE: u32 = 1;
/// The newest layout this crate reads.
pub const VERSION: u32 = 1;

/// Bytes before the `compatible` strings.
const FIXED_LEN: usize = 16;

/// What the note says about a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Bytes of guest-physical address space, 1 to `i32::MAX`.
    pub mmio_size: u64,
    /// Number of interrupts; indices are 0 to one below this.
    pub nr_irqs: u32,
    /// Device-tree `compatible` strings, most specific first; at least one.
    pub compatible: Vec<String>,
}

/// Why a file has no usable note.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
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
}

impl From<object::read::Error> for Error {
    fn from(error: object::read::Error) -> Self {
        Error::BadElf(error.to_string())
    }
}

impl Note {
    /// Finds and reads the note in the bytes of an object file.
    pub fn from_elf(file: &[u8]) -> Result<Self, Error> {
        let header = FileHeader64::<Endianness>::parse(file).map_err(|_| Error::NotElf)?;
        let endian = header.endian()?;
        if endian == Endianness::Big {
            return Err(Error::BigEndian);
        }
        let machine = header.e_machine(endian);
        if machine != EM_BPF {
            return Err(Error::NotBpf(machine));
        }

        let sections = header.sections(endian, file)?;
        let Some((_, section)) = sections.section_by_name(endian, SECTION.as_bytes()) else {
            return Err(Error::NoNote);
        };
        if section.sh_type(endian) != elf::SHT_NOTE {
            return Err(Error::NoNote);
        }
        let mut notes = section.notes(endian, file)?.ok_or(Error::NoNote)?;
        while let Some(note) = notes.next()? {
            if note.name() == OWNER.as_bytes() && note.n_type(endian) == TYPE {
                return Self::from_desc(note.desc());
            }
        }
        Err(Error::NoNote)
    }

    /// Reads the descriptor, the part of the note after owner and type.
    fn from_desc(desc: &[u8]) -> Result<Self, Error> {
        let bad = |reason: String| Err(Error::BadNote(reason));

        let Some(version) = read_u32(desc, 0) else {
            return bad(format!("{} bytes have no room for a version", desc.len()));
        };
        if version > VERSION {
            return Err(Error::FutureVersion {
                found: version,
                supported: VERSION,
            });
        }
        if version == 0 {
            return bad("version 0".to_string());
        }

        let (Some(nr_irqs), Some(mmio_size), Some(strings)) =
            (read_u32(desc, 4), read_u64(desc, 8), desc.get(FIXED_LEN..))
        else {
            return bad(format!("{} bytes, at least {FIXED_LEN} needed", desc.len()));
        };
        if mmio_size == 0 || mmio_size > i32::MAX as u64 {
            return bad(format!(
                "MMIO size {mmio_size:#x}, not 1 to {:#x}",
                i32::MAX
            ));
        }
        if u64::from(nr_irqs) > KVM_DEV_BPF_MAX_IRQS {
            return bad(format!(
                "{nr_irqs} interrupts, more than {KVM_DEV_BPF_MAX_IRQS}"
            ));
        }

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
        })
    }
}

fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at + 4)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

fn read_u64(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at + 8)?;
    Some(u64::from_le_bytes(bytes.try_into().ok()?))
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
    fn assert_bad(desc: &[u8], wanted: &str) {
        match parse_desc(desc) {
            Err(Error::BadNote(reason)) => {
                assert!(reason.contains(wanted), "wanted {wanted:?}, got {reason:?}")
            }
            other => panic!("wanted a bad note ({wanted}), got {other:?}"),
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
        notes.extend(note(b"kvm-bpf\0", TYPE + 1, &desc));
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
        assert_bad(&desc(1, 0, 0, b"x\0"), "MMIO size");
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
        let file = elf(&note(b"kvm-bpf\0", TYPE, &desc(1, 1, 0x1000, b"a,b\0")));
        for at in 0..file.len() {
            for value in [0x00, 0x7f, 0x80, 0xff] {
                let mut file = file.clone();
                file[at] = value;
                // Either answer will do; a panic will not.
                let _ = Note::from_elf(&file);
            }
        }
    }
}
