// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A device's object in ACPI's namespace.
//!
//! The note says what the device is; where it is, which interrupts it has and what the object is
//! called, is the VMM's choice:
//!
//! ```
//! use acpi_tables::aml::Scope;
//! use kvm_bpf::acpi::{Interrupt, Object};
//! use kvm_bpf::{Note, Place};
//!
//! # fn aml(note: &Note) -> Result<Vec<u8>, Box<dyn std::error::Error>> {
//! let mut object = Object::of_note(note, "CLK0", 1, Place::Memory(0xd000_0000))?;
//! object.interrupts = vec![Interrupt::edge(5)];
//! let aml = Scope::raw("_SB_".into(), object.to_aml());
//! # Ok(aml)
//! # }
//! ```
//!
//! Linux finds a driver for it as on a machine with a device tree, by `compatible`: it matches a
//! `PRP0001` object by the string in its `_DSD`, with or without `CONFIG_OF`.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt as Descriptor,
    Memory32Fixed, Name, Package, PackageBuilder, Path, ResourceTemplate, Uuid,
};

use crate::Place;
use crate::note::{Note, Space};

/// UUID of `_DSD` data that are properties.
const DSD_PROPERTIES: &str = "daffd814-6eba-4d8c-8a91-bc9bbf4aa301";

/// `compatible` of a serial port that Linux knows at ports only by an id of its own.
const UART: &str = "ns16550a";
const UART_ID: &str = "PNP0501";

/// Ports that a descriptor of the short kind has room for.
const MAX_SHORT: u64 = 0xff;

/// Why there is no object.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The device has several ranges, or one of another kind than its place.
    #[error("an ACPI object is for a device of one range, of the kind of its place")]
    NotOneRange,
    /// The range ends past the last address or port, or is longer than ACPI can say: of 65536 ports.
    #[error("a range of {size:#x} at {place} ends past the last address or port, or is too long")]
    TooLong {
        /// Where it is to begin.
        place: Place,
        /// Its length in bytes.
        size: u64,
    },
    /// The name is none of ACPI's.
    #[error("{0:?} is no name: four of A to Z, 0 to 9 and _, and no digit first")]
    BadName(String),
}

/// An interrupt of a device, which is active high and its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interrupt {
    /// Its global system interrupt.
    pub gsi: u32,
    /// It is there as long as the device wants it (an irqfd with a resample fd), and not once per
    /// signal.
    pub is_level: bool,
}

impl Interrupt {
    /// One that is there once per signal.
    pub fn edge(gsi: u32) -> Self {
        Interrupt {
            gsi,
            is_level: false,
        }
    }

    /// One that is there as long as the device wants it.
    pub fn level(gsi: u32) -> Self {
        Interrupt {
            gsi,
            is_level: true,
        }
    }
}

/// A device's object: a `Device` for a scope such as `\_SB`.
///
/// A 16550 at ports has the id that Linux knows it by, since no driver takes it by its string there.
#[derive(Clone, Debug)]
pub struct Object<'a> {
    name: &'a str,
    uid: u32,
    compatible: &'a [String],
    place: Place,
    size: u64,
    /// Its interrupts; interrupt 0 is the first.
    pub interrupts: Vec<Interrupt>,
}

impl<'a> Object<'a> {
    /// The object of a device at that place, without interrupts so far. [`Self::new`] says what
    /// `name` and `uid` are.
    pub fn of_note(note: &'a Note, name: &'a str, uid: u32, place: Place) -> Result<Self, Error> {
        match note.regions()[..] {
            [range] if range.space == place.space() => {
                Self::new(name, uid, &note.compatible, place, range.size)
            }
            _ => Err(Error::NotOneRange),
        }
    }

    /// The object of a device with these `compatible` strings and so many bytes, without interrupts
    /// so far.
    ///
    /// `name` is that of no other object of the scope, and `uid` is no other's among the objects of
    /// the same id: `PRP0001`, or `PNP0501` for a 16550 at ports.
    pub fn new(
        name: &'a str,
        uid: u32,
        compatible: &'a [String],
        place: Place,
        size: u64,
    ) -> Result<Self, Error> {
        let is_letter = |byte: u8| byte.is_ascii_uppercase() || byte == b'_';
        let is_name = matches!(name.as_bytes(), [first, rest @ ..]
            if rest.len() == 3 && is_letter(*first)
                && rest.iter().all(|&byte| is_letter(byte) || byte.is_ascii_digit()));
        if !is_name {
            return Err(Error::BadName(name.to_string()));
        }
        let last = match place.space() {
            Space::Memory => u64::MAX,
            Space::Ports => u16::MAX.into(),
        };
        // A descriptor's length is as wide as its addresses.
        if size == 0 || size > last || size - 1 > last - place.addr() {
            return Err(Error::TooLong { place, size });
        }
        Ok(Object {
            name,
            uid,
            compatible,
            place,
            size,
            interrupts: Vec::new(),
        })
    }

    fn range(&self) -> Box<dyn Aml> {
        let last = self.place.addr() + (self.size - 1);
        match self.place {
            // What is longer is a bridge's in ACPI's terms.
            Place::Port(port) if self.size <= MAX_SHORT => {
                Box::new(IO::new(port, port, 0, self.size as u8))
            }
            Place::Port(port) => Box::new(AddressSpace::new_io(port, last as u16, None)),
            Place::Memory(addr) => match (u32::try_from(addr), u32::try_from(self.size)) {
                (Ok(addr), Ok(size)) if u32::try_from(last).is_ok() => {
                    Box::new(Memory32Fixed::new(true, addr, size))
                }
                _ => Box::new(AddressSpace::new_memory(
                    AddressSpaceCacheable::NotCacheable,
                    true,
                    addr,
                    last,
                    None,
                )),
            },
        }
    }

    /// Returns the object as AML, of which tables and scopes are made.
    pub fn to_aml(&self) -> Vec<u8> {
        let range = self.range();
        let interrupts: Vec<_> = (self.interrupts.iter())
            .map(|irq| Descriptor::new(true, !irq.is_level, false, false, irq.gsi))
            .collect();
        let mut resources: Vec<&dyn Aml> = vec![range.as_ref()];
        resources.extend(interrupts.iter().map(|interrupt| interrupt as &dyn Aml));

        let is_uart =
            self.place.space() == Space::Ports && self.compatible.iter().any(|own| own == UART);
        let uart = EISAName::new(UART_ID);
        let id: &dyn Aml = match is_uart {
            true => &uart,
            false => &"PRP0001",
        };
        let id = Name::new("_HID".into(), id);
        let uid = Name::new("_UID".into(), &self.uid);
        let resources = Name::new("_CRS".into(), &ResourceTemplate::new(resources));
        let mut parts: Vec<&dyn Aml> = vec![&id, &uid, &resources];

        let mut compatible = PackageBuilder::new();
        for string in self.compatible {
            compatible.add_element(string);
        }
        let strings = Package::new(vec![&"compatible", &compatible]);
        let properties = Package::new(vec![&strings]);
        let uuid = Uuid::new(DSD_PROPERTIES);
        let properties = Name::new("_DSD".into(), &Package::new(vec![&uuid, &properties]));
        if !is_uart {
            parts.push(&properties);
        }
        let mut aml = Vec::new();
        Device::new(Path::new(self.name), parts).to_aml_bytes(&mut aml);
        aml
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::note::Range;

    fn names(compatible: &[&str]) -> Vec<String> {
        compatible.iter().map(|name| name.to_string()).collect()
    }

    fn has(aml: &[u8], bytes: &[u8]) -> bool {
        aml.windows(bytes.len()).any(|part| part == bytes)
    }

    #[test]
    fn an_object_has_what_note_and_vmm_say() {
        let note = Note {
            mmio_size: 0x1000,
            nr_irqs: 2,
            compatible: names(&["a,b", "c"]),
            ..Note::default()
        };
        let place = Place::Memory(0xd000_0000);
        let mut object = Object::of_note(&note, "DEV_", 3, place).unwrap();
        object.interrupts = vec![Interrupt::level(5), Interrupt::edge(6)];
        let mut wanted = vec![0x5b, 0x82, 0x4f, 0x06]; // DeviceOp of 0x6f bytes
        wanted.extend(*b"DEV_");
        wanted.extend(*b"\x08_HID\x0dPRP0001\0");
        wanted.extend(*b"\x08_UID\x0a\x03");
        wanted.extend(*b"\x08_CRS\x11\x23\x0a\x20"); // a buffer of 0x20 bytes
        wanted.extend([0x86, 9, 0, 1, 0, 0, 0, 0xd0, 0, 0x10, 0, 0]); // fixed memory
        wanted.extend([0x89, 6, 0, 1, 1, 5, 0, 0, 0]); // level, active high
        wanted.extend([0x89, 6, 0, 3, 1, 6, 0, 0, 0]); // edge
        wanted.extend([0x79, 0]);
        wanted.extend(*b"\x08_DSD\x12\x33\x02"); // of two: UUID, properties
        wanted.extend([
            0x11, 0x13, 0x0a, 0x10, 0x14, 0xd8, 0xff, 0xda, 0xba, 0x6e, 0x8c, 0x4d,
        ]);
        wanted.extend([0x8a, 0x91, 0xbc, 0x9b, 0xbf, 0x4a, 0xa3, 0x01]);
        wanted.extend(*b"\x12\x1c\x01\x12\x19\x02\x0dcompatible\0\x12\x0a\x02\x0da,b\0\x0dc\0");
        let got = object.to_aml();
        assert_eq!(got[4..], wanted[4..], "{got:x?}");
        // Its length counts from the byte behind the opcode, with the two bytes it has.
        wanted.truncate(4);
        assert_eq!(got[..2], wanted[..2]);
        let len = usize::from(got[2] & 0xf) | usize::from(got[3]) << 4;
        assert_eq!((got[2] >> 6, len), (1, got.len() - 2));
    }

    #[test]
    fn serial_ports_have_their_own_id() {
        let uart = names(&["ns16550a"]);
        let at_ports = Object::new("UART", 1, &uart, Place::Port(0x2f8), 8)
            .unwrap()
            .to_aml();
        assert!(
            has(&at_ports, &0x0105_d041_u32.to_le_bytes()),
            "{at_ports:x?}"
        );
        assert!(has(&at_ports, &[0x47, 1, 0xf8, 2, 0xf8, 2, 0, 8]));
        assert!(!has(&at_ports, b"PRP0001"));
        let in_memory = Object::new("UART", 1, &uart, Place::Memory(0x1000), 8)
            .unwrap()
            .to_aml();
        assert!(has(&in_memory, b"PRP0001") && has(&in_memory, b"ns16550a\0"));
    }

    #[test]
    fn what_is_no_object_is_refused() {
        let none = names(&[]);
        for name in ["", "DEV", "DEVIC", "0DEV", "dev0", "D.V0", "\\DEV"] {
            let object = Object::new(name, 1, &none, Place::Memory(0), 1);
            assert!(matches!(object, Err(Error::BadName(_))), "{object:?}");
        }
        let last = Place::Memory(u64::MAX);
        for (place, size, fits) in [
            (last, 1, true),
            (last, 2, false),
            (Place::Port(0xfff8), 8, true),
            (Place::Port(0xfff8), 9, false),
            (Place::Port(0), 0xffff, true),
            (Place::Port(0), 0x1_0000, false),
            (Place::Memory(0), 0, false),
            (Place::Memory(0), u64::MAX, true),
        ] {
            let object = Object::new("DEV0", 1, &none, place, size);
            assert_eq!(object.is_ok(), fits, "{object:?}");
            if let Ok(object) = object {
                object.to_aml();
            }
        }
    }

    #[test]
    fn a_length_that_has_33_bits_is_no_0() {
        let none = names(&[]);
        let whole = Object::new("DEV0", 1, &none, Place::Memory(0), 1 << 32)
            .unwrap()
            .to_aml();
        assert!(has(&whole, &(1_u64 << 32).to_le_bytes()), "{whole:x?}");
    }

    #[test]
    fn a_device_of_another_place_has_no_object() {
        let mut note = Note {
            mmio_size: 0,
            nr_irqs: 0,
            compatible: names(&["a"]),
            ranges: vec![Range {
                space: Space::Ports,
                region: 0,
                size: 8,
            }],
            ..Note::default()
        };
        assert!(Object::of_note(&note, "DEV0", 1, Place::Port(8)).is_ok());
        let in_memory = Object::of_note(&note, "DEV0", 1, Place::Memory(0x1000));
        assert!(matches!(in_memory, Err(Error::NotOneRange)));
        note.mmio_size = 0x1000;
        let of_two = Object::of_note(&note, "DEV0", 1, Place::Port(8));
        assert!(matches!(of_two, Err(Error::NotOneRange)));
    }
}
