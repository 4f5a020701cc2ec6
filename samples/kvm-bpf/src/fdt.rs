// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A device's node in a device tree.
//!
//! The note says what the device is; where it is, and which interrupts and which clock it has, is
//! the VMM's choice:
//!
//! ```
//! use kvm_bpf::Note;
//! use kvm_bpf::fdt::{Node, Trigger, gic_spi};
//! use vm_fdt::FdtWriter;
//!
//! # fn tree(note: &Note, clock: u32) -> Result<Vec<u8>, Box<dyn std::error::Error>> {
//! let mut fdt = FdtWriter::new()?;
//! let root = fdt.begin_node("")?;
//! fdt.property_u32("#address-cells", 2)?;
//! fdt.property_u32("#size-cells", 2)?;
//! // Of a device with one interrupt, shared interrupt 7 of the GIC.
//! let mut node = Node::of_note(note, 0x901_0000)?;
//! node.interrupts = gic_spi(7, Trigger::EdgeRising).to_vec();
//! node.clock = Some(clock);
//! let device = fdt.begin_node(&node.full_name())?;
//! for (name, value) in node.properties()? {
//!     fdt.property(name, &value)?;
//! }
//! fdt.end_node(device)?;
//! fdt.end_node(root)?;
//! # Ok(fdt.finish()?)
//! # }
//! ```
//!
//! Bindings are those of Documentation/devicetree/bindings in the kernel tree.

use std::ffi::CString;

use crate::note::{Note, Space};

/// First cell of an interrupt of the GIC that all CPUs share.
const SPI: u32 = 0;

/// `compatible` of devices whose drivers ask for a clock, `apb_pclk`.
const PRIMECELL: &str = "arm,primecell";
/// `compatible` of one that has lines, and interrupts of them.
const GPIO: &str = "arm,pl061";

/// Why there is no node.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The node of a device has one range of memory.
    #[error("a device tree's node is for a device of one range of memory, which this has not")]
    NotOneRange,
    /// Drivers of the device do without no clock.
    #[error("a device that is {PRIMECELL} needs a clock")]
    NoClock,
    /// A `compatible` string ends early, at a NUL.
    #[error("{0:?} is no compatible string: it has a NUL")]
    BadCompatible(String),
}

/// When an interrupt is there.
///
/// A line that an irqfd without a resample fd raises has edges, whatever hardware of that name has:
/// KVM on arm64 raises it and never lowers it, so that a level would stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// Once per signal.
    EdgeRising,
    /// As long as the device wants it: an irqfd with a resample fd.
    LevelHigh,
}

/// The cells that name shared interrupt `number` of a GIC; GSI `number` is this one.
pub fn gic_spi(number: u32, trigger: Trigger) -> [u32; 3] {
    let trigger = match trigger {
        Trigger::EdgeRising => 1,
        Trigger::LevelHigh => 4,
    };
    [SPI, number, trigger]
}

/// A device's node: what its driver finds and is told.
#[derive(Clone, Debug)]
pub struct Node<'a> {
    /// Its name, which `@` and the address follow.
    pub name: &'a str,
    /// `compatible` strings, most specific first. With none of them no driver finds it.
    pub compatible: &'a [String],
    /// First guest-physical address.
    pub addr: u64,
    /// Bytes of its registers.
    pub size: u64,
    /// Its interrupts, one behind the other, each in as many cells as the interrupt parent wants:
    /// see [`gic_spi`]. Interrupt 0 is the first.
    pub interrupts: Vec<u32>,
    /// Phandle of what takes the interrupts, where the parent node does not say it.
    pub interrupt_parent: Option<u32>,
    /// Phandle of a clock without cells, for drivers that ask for one. Others are not told of it.
    pub clock: Option<u32>,
}

impl<'a> Node<'a> {
    /// The node of a device at that guest-physical address, without interrupts and clock so far.
    pub fn of_note(note: &'a Note, addr: u64) -> Result<Self, Error> {
        match note.regions()[..] {
            [range] if range.space == Space::Memory => Ok(Node {
                name: "device",
                compatible: &note.compatible,
                addr,
                size: range.size,
                interrupts: Vec::new(),
                interrupt_parent: None,
                clock: None,
            }),
            _ => Err(Error::NotOneRange),
        }
    }

    /// Returns the name of the node, with the address.
    pub fn full_name(&self) -> String {
        format!("{}@{:x}", self.name, self.addr)
    }

    /// Returns the properties of the node: the name of each, and its value as the tree has it.
    ///
    /// The parent's children have addresses and sizes of two cells.
    pub fn properties(&self) -> Result<Vec<(&'static str, Vec<u8>)>, Error> {
        let is_a = |own| self.compatible.iter().any(|name| name == own);
        let clock = match (is_a(PRIMECELL), self.clock) {
            (true, None) => return Err(Error::NoClock),
            (is_primecell, clock) => clock.filter(|_| is_primecell),
        };
        let mut compatible = Vec::new();
        for string in self.compatible {
            let string =
                CString::new(string.as_str()).map_err(|_| Error::BadCompatible(string.clone()))?;
            compatible.extend(string.into_bytes_with_nul());
        }
        let reg = [self.addr, self.size].map(u64::to_be_bytes);

        let mut properties = Vec::new();
        if !compatible.is_empty() {
            properties.push(("compatible", compatible));
        }
        properties.push(("reg", reg.concat()));
        if !self.interrupts.is_empty() {
            properties.push(("interrupts", cells(&self.interrupts)));
        }
        if let Some(parent) = self.interrupt_parent {
            properties.push(("interrupt-parent", cells(&[parent])));
        }
        if is_a(GPIO) {
            properties.push(("gpio-controller", Vec::new()));
            properties.push(("#gpio-cells", cells(&[2])));
            properties.push(("interrupt-controller", Vec::new()));
            properties.push(("#interrupt-cells", cells(&[2])));
        }
        if let Some(clock) = clock {
            properties.push(("clocks", cells(&[clock])));
            properties.push(("clock-names", b"apb_pclk\0".to_vec()));
        }
        Ok(properties)
    }
}

/// Numbers as a tree has them.
fn cells(values: &[u32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_be_bytes())
        .collect()
}

#[cfg(test)]
mod tests {
    use vm_fdt::FdtWriter;

    use super::*;
    use crate::note::Range;

    fn note(compatible: &[&str]) -> Note {
        Note {
            mmio_size: 0x1000,
            nr_irqs: 2,
            compatible: compatible.iter().map(|name| name.to_string()).collect(),
            ..Note::default()
        }
    }

    /// A tree with that node only, or with what `write` puts there.
    fn tree(write: impl FnOnce(&mut FdtWriter)) -> Vec<u8> {
        let mut fdt = FdtWriter::new().unwrap();
        let root = fdt.begin_node("").unwrap();
        write(&mut fdt);
        fdt.end_node(root).unwrap();
        fdt.finish().unwrap()
    }

    fn write(node: &Node<'_>) -> Vec<u8> {
        tree(|fdt| {
            let begun = fdt.begin_node(&node.full_name()).unwrap();
            for (name, value) in node.properties().unwrap() {
                fdt.property(name, &value).unwrap();
            }
            fdt.end_node(begun).unwrap();
        })
    }

    #[test]
    fn a_node_has_what_note_and_vmm_say() {
        let note = note(&["arm,pl061", "arm,primecell"]);
        let mut node = Node::of_note(&note, 0x1_0903_0000).unwrap();
        node.name = "gpio";
        node.interrupts = [
            gic_spi(7, Trigger::LevelHigh),
            gic_spi(8, Trigger::EdgeRising),
        ]
        .concat();
        node.interrupt_parent = Some(1);
        node.clock = Some(2);
        let wanted = tree(|fdt| {
            let node = fdt.begin_node("gpio@109030000").unwrap();
            fdt.property("compatible", b"arm,pl061\0arm,primecell\0")
                .unwrap();
            let reg = [1, 0x0903_0000, 0, 0x1000];
            fdt.property_array_u32("reg", &reg).unwrap();
            let interrupts = [0, 7, 4, 0, 8, 1];
            fdt.property_array_u32("interrupts", &interrupts).unwrap();
            fdt.property_u32("interrupt-parent", 1).unwrap();
            fdt.property_null("gpio-controller").unwrap();
            fdt.property_u32("#gpio-cells", 2).unwrap();
            fdt.property_null("interrupt-controller").unwrap();
            fdt.property_u32("#interrupt-cells", 2).unwrap();
            fdt.property_u32("clocks", 2).unwrap();
            fdt.property_string("clock-names", "apb_pclk").unwrap();
            fdt.end_node(node).unwrap();
        });
        assert_eq!(write(&node), wanted);
    }

    #[test]
    fn what_is_not_asked_for_is_not_there() {
        let note = note(&["a,b"]);
        let mut node = Node::of_note(&note, 0x1000).unwrap();
        node.clock = Some(2);
        let wanted = tree(|fdt| {
            let node = fdt.begin_node("device@1000").unwrap();
            fdt.property("compatible", b"a,b\0").unwrap();
            fdt.property_array_u64("reg", &[0x1000, 0x1000]).unwrap();
            fdt.end_node(node).unwrap();
        });
        assert_eq!(write(&node), wanted);
    }

    #[test]
    fn a_primecell_without_a_clock_is_refused() {
        let note = note(&["arm,pl031", "arm,primecell"]);
        let node = Node::of_note(&note, 0x1000).unwrap();
        assert!(matches!(node.properties(), Err(Error::NoClock)));
    }

    #[test]
    fn a_string_that_ends_early_is_refused() {
        let note = note(&["a,b", "c\0d"]);
        let node = Node::of_note(&note, 0x1000).unwrap();
        let bad = node.properties();
        assert!(
            matches!(&bad, Err(Error::BadCompatible(bad)) if bad == "c\0d"),
            "{bad:?}"
        );
    }

    #[test]
    fn ports_and_several_ranges_have_no_node() {
        let range = |space, region| Range {
            space,
            region,
            size: 8,
        };
        let mut ports = note(&["a,b"]);
        ports.mmio_size = 0;
        ports.ranges = vec![range(Space::Ports, 0)];
        let mut two = note(&["a,b"]);
        two.ranges = vec![range(Space::Memory, 1)];
        for note in [ports, two] {
            let node = Node::of_note(&note, 0x1000);
            assert!(matches!(node, Err(Error::NotOneRange)), "{node:?}");
        }
    }
}
