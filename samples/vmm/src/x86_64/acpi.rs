// SPDX-License-Identifier: Apache-2.0 OR MIT

//! ACPI tables: CPUs, IOAPIC, console, power, and the devices.
//!
//! The hardware-reduced kind, as there is no chipset. A device is found by its
//! device-tree `compatible` string, as on arm64: Linux matches a `PRP0001`
//! object by the string in its `_DSD`, with or without `CONFIG_OF`. (A device
//! tree in `setup_data` is the other way. But where Linux finds a device tree
//! and no ACPI tables, it looks for the APICs in the tree as well, and knows
//! only those of one Intel board; and a device there could have no interrupt.)

use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt as Descriptor, Name, Package, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, gas};
use kvm_bpf::Place;
use kvm_bpf::acpi::{Error, Interrupt, Object};
use kvm_bpf::note::Space;

use super::{
    COM1_GSI, COM1_PORT, IOAPIC_ADDR, LOCAL_APIC_ADDR, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT,
    SLEEP_TYPE_OFF,
};
use crate::vm::GuestDevice;

const OEM: [u8; 6] = *b"KVMBPF";
const TABLE: [u8; 8] = *b"KVMBPFVM";
const REVISION: u32 = 1;

/// Boot architecture flags: there is neither VGA nor a CMOS clock.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_RTC: u16 = 1 << 5;

/// All tables as one block for the guest-physical address `base`; the RSDP comes first.
pub fn tables(base: u64, cpus: u8, devices: &[GuestDevice]) -> Result<Vec<u8>, Error> {
    let mut block = vec![0; Rsdp::len()];
    let mut place = |table: &dyn Aml| {
        block.resize(block.len().next_multiple_of(16), 0);
        let addr = base + block.len() as u64;
        table.to_aml_bytes(&mut block);
        addr
    };

    let dsdt = place(&dsdt(devices)?);
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    xsdt.add_entry(place(&fadt(dsdt)));
    xsdt.add_entry(place(&madt(cpus)));
    let xsdt = place(&xsdt);

    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    block[..rsdp.len()].copy_from_slice(&rsdp);
    Ok(block)
}

fn fadt(dsdt: u64) -> impl Aml {
    let port = |port: u16| {
        GAS::new(
            gas::AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            port.into(),
        )
    };
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_RTC).into();
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    fadt.finalize()
}

fn madt(cpus: u8) -> impl Aml {
    let local = LocalInterruptController::Address(LOCAL_APIC_ADDR as u32);
    let mut madt = MADT::new(OEM, TABLE, REVISION, local);
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(cpus, IOAPIC_ADDR as u32, 0));
    madt
}

fn dsdt(devices: &[GuestDevice]) -> Result<impl Aml + use<>, Error> {
    let mut aml = Vec::new();
    let off = Package::new(vec![&SLEEP_TYPE_OFF]);
    Name::new("_S5_".into(), &off).to_aml_bytes(&mut aml);
    Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            "COM1".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &0u8),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &Descriptor::new(true, true, false, false, COM1_GSI),
                        &IO::new(COM1_PORT, COM1_PORT, 0, 8),
                    ]),
                ),
            ],
        )],
    )
    .to_aml_bytes(&mut aml);
    for (index, device) in devices.iter().enumerate() {
        append_device(&mut aml, index, device)?;
    }

    // 2: integers have 64 bits.
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, TABLE, REVISION);
    dsdt.append_slice(&aml);
    Ok(Bytes(dsdt.as_slice().to_vec()))
}

fn append_device(aml: &mut Vec<u8>, index: usize, device: &GuestDevice) -> Result<(), Error> {
    let range = &device.range;
    let place = match range.space {
        Space::Memory => Place::Memory(range.addr),
        Space::Ports => Place::Port(range.addr as u16),
    };
    let name = format!("D{index:03X}");
    // COM1 is 0 among its kind.
    let uid = index as u32 + 1;
    let mut object = Object::new(&name, uid, &device.compatible, place, range.size)?;
    let interrupts = device.gsis.iter().enumerate();
    object.interrupts = interrupts
        .map(|(index, &gsi)| Interrupt {
            gsi,
            is_level: device.is_level && index == 0,
        })
        .collect();
    aml.extend(Scope::raw("_SB_".into(), object.to_aml()));
    Ok(())
}

/// A table that is bytes already.
struct Bytes(Vec<u8>);

impl Aml for Bytes {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::Range;

    const BASE: u64 = 0xe0000;

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// The table at an address, by the length in its header, with its checksum checked.
    fn table(block: &[u8], addr: u64) -> &[u8] {
        let table = &block[(addr - BASE) as usize..];
        let len = u32::from_le_bytes(table[4..8].try_into().unwrap()) as usize;
        let sum = table[..len].iter().fold(0u8, |sum, &b| sum.wrapping_add(b));
        assert_eq!(sum, 0, "checksum of {:?}", &table[..4]);
        &table[..len]
    }

    fn device(addr: u64) -> GuestDevice {
        GuestDevice {
            range: Range::new("bank", addr, 0x1000),
            compatible: vec!["kvm-bpf,regbank".into(), "second".into()],
            gsis: vec![5],
            is_level: false,
            uio: None,
        }
    }

    #[test]
    fn ports_are_announced() {
        let of_ports = |size, compatible: &str| GuestDevice {
            range: Range::of_ports("uart", 0x2f8, size),
            compatible: vec![compatible.into()],
            gsis: vec![5],
            is_level: false,
            uio: None,
        };
        let devices = [
            of_ports(8, "ns16550a"),
            of_ports(8, "other"),
            of_ports(0x400, "long"),
        ];
        let mut uart = Vec::new();
        append_device(&mut uart, 0, &devices[0]).unwrap();
        let has = |aml: &[u8], bytes: &[u8]| aml.windows(bytes.len()).any(|part| part == bytes);
        // The EISA id, and a descriptor of ports: decodes 10 bits, from, to, alignment, length.
        let hid = 0x0105_d041_u32.to_le_bytes();
        let io = [0x47, 1, 0xf8, 2, 0xf8, 2, 0, 8];
        assert!(has(&uart, &hid) && has(&uart, &io), "{uart:x?}");
        assert!(!has(&uart, b"PRP0001"));
        let mut other = Vec::new();
        append_device(&mut other, 1, &devices[1]).unwrap();
        assert!(has(&other, &io) && has(&other, b"PRP0001") && has(&other, b"other\0"));
        let mut long = Vec::new();
        append_device(&mut long, 2, &devices[2]).unwrap();
        assert!(!has(&long, &[0x47, 1]));
        assert!(tables(BASE, 1, &devices).unwrap().len() < 0x1000);
    }

    #[test]
    fn the_first_interrupt_may_be_a_level() {
        let mut held = device(0xd000_0000);
        held.gsis = vec![5, 6];
        held.is_level = true;
        let mut aml = Vec::new();
        append_device(&mut aml, 0, &held).unwrap();
        // Descriptors of one interrupt each: bit 1 of the flags is set for an edge.
        for descriptor in [
            [0x89, 6, 0, 1, 1, 5, 0, 0, 0],
            [0x89, 6, 0, 3, 1, 6, 0, 0, 0],
        ] {
            assert!(aml.windows(9).any(|part| part == descriptor), "{aml:x?}");
        }
    }

    #[test]
    fn tables_lead_to_each_other() {
        let devices = [device(0xd000_0000), device(0x10_0000_0000)];
        let block = tables(BASE, 3, &devices).unwrap();
        assert_eq!(&block[..8], b"RSD PTR ");
        let xsdt = table(&block, u64_at(&block, 24));
        assert_eq!(&xsdt[..4], b"XSDT");
        assert_eq!(xsdt.len(), 36 + 2 * 8);

        let fadt = table(&block, u64_at(xsdt, 36));
        assert_eq!(&fadt[..4], b"FACP");
        let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
        assert_eq!(flags, 1 << 20);

        let dsdt = table(&block, u64_at(fadt, 140));
        assert_eq!(&dsdt[..4], b"DSDT");
        for text in [
            &b"PRP0001\0"[..],
            b"kvm-bpf,regbank\0",
            b"second\0",
            b"D001",
        ] {
            assert!(dsdt.windows(text.len()).any(|window| window == text));
        }

        let madt = table(&block, u64_at(xsdt, 44));
        assert_eq!(&madt[..4], b"APIC");
        assert_eq!(madt.len(), 44 + 3 * 8 + 12);
        // The last CPU's processor and APIC ids, then the IOAPIC.
        assert_eq!(madt[44 + 16..44 + 24], [0, 8, 2, 2, 1, 0, 0, 0]);
        assert_eq!(madt[44 + 24..44 + 28], [1, 12, 3, 0]);
    }
}
