// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The guest's memory map, and the device tree that tells the guest of it.
//!
//! | from | what |
//! | --- | --- |
//! | `0x0000_0000` | free for devices, but for the console |
//! | `0x0900_0000` | the console |
//! | `0x2000_0000` | the interrupt controller: distributor, then a redistributor per CPU |
//! | `0x2201_0000` | free for devices |
//! | `0x4000_0000` | RAM |
//! | end of RAM | free for devices |
//!
//! Bindings are those of Documentation/devicetree/bindings in the kernel tree.

use kvm_bpf::fdt::{self, Node, Trigger, gic_spi};
use vm_fdt::FdtWriter;

use crate::bus::Range;
use crate::vm::GuestDevice;

/// First address of RAM.
pub const RAM_START: u64 = 0x4000_0000;

/// The console's registers and its interrupt.
pub const SERIAL_ADDR: u64 = 0x0900_0000;
pub const SERIAL_SIZE: u64 = 0x1000;
pub const SERIAL_GSI: u32 = 0;

/// The interrupt controller's registers, which KVM serves.
pub const GIC_DIST_ADDR: u64 = 0x2000_0000;
pub const GIC_DIST_SIZE: u64 = 0x1_0000;
pub const GIC_REDIST_ADDR: u64 = GIC_DIST_ADDR + GIC_DIST_SIZE;
/// Of one CPU.
pub const GIC_REDIST_SIZE: u64 = 0x2_0000;

/// What other nodes refer to.
const PHANDLE_GIC: u32 = 1;
const PHANDLE_CLOCK: u32 = 2;
/// The first of devices, which have one each.
const PHANDLE_DEVICES: u32 = 16;

/// `compatible` of a device with lines that are interrupts, and how many it has.
const GPIO: &str = "arm,pl061";
const GPIO_LINES: u32 = 8;

/// First and last cell of an interrupt that each CPU has for itself.
const PPI: u32 = 1;
const LEVEL_HIGH: u32 = 4;

/// Private interrupts of the architected timer: secure, non-secure, virtual, hypervisor.
///
/// KVM raises the second and third at these numbers if it is not told others.
const TIMER_PPIS: [u32; 4] = [13, 14, 11, 10];

/// Why there is no device tree.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Device(#[from] fdt::Error),
    #[error("cannot write the device tree")]
    Write(#[from] vm_fdt::Error),
}

/// What the device tree is to say.
#[derive(Debug)]
pub struct Machine<'a> {
    /// Kernel command line.
    pub cmdline: &'a str,
    /// Bytes of RAM.
    pub memory_size: u64,
    /// First address of the initramfs, and its size.
    pub initrd: Option<(u64, u64)>,
    /// Number of CPUs.
    pub cpus: u8,
    /// The devices.
    pub devices: &'a [GuestDevice],
}

/// Ranges that no device may have, apart from RAM.
pub fn reserved_ranges() -> Vec<Range> {
    let cpus = u64::from(u8::MAX) + 1;
    vec![
        Range::new("the console", SERIAL_ADDR, SERIAL_SIZE),
        Range::new(
            "the interrupt controller",
            GIC_DIST_ADDR,
            GIC_DIST_SIZE + cpus * GIC_REDIST_SIZE,
        ),
    ]
}

/// Writes the device tree.
pub fn build(machine: &Machine<'_>) -> Result<Vec<u8>, Error> {
    let mut fdt = FdtWriter::new()?;
    let root = fdt.begin_node("")?;
    fdt.property_string("compatible", "linux,dummy-virt")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_u32("interrupt-parent", PHANDLE_GIC)?;

    let chosen = fdt.begin_node("chosen")?;
    fdt.property_string("bootargs", machine.cmdline)?;
    fdt.property_string("stdout-path", &format!("/serial@{SERIAL_ADDR:x}"))?;
    if let Some((start, size)) = machine.initrd {
        fdt.property_u64("linux,initrd-start", start)?;
        fdt.property_u64("linux,initrd-end", start + size)?;
    }
    fdt.end_node(chosen)?;

    let memory = fdt.begin_node(&format!("memory@{RAM_START:x}"))?;
    fdt.property_string("device_type", "memory")?;
    fdt.property_array_u64("reg", &[RAM_START, machine.memory_size])?;
    fdt.end_node(memory)?;

    cpus(&mut fdt, machine.cpus)?;
    platform(&mut fdt, machine.cpus)?;
    for (info, phandle) in machine.devices.iter().zip(PHANDLE_DEVICES..) {
        device(&mut fdt, info, phandle)?;
    }
    fdt.end_node(root)?;
    Ok(fdt.finish()?)
}

fn cpus(fdt: &mut FdtWriter, count: u8) -> Result<(), Error> {
    let cpus = fdt.begin_node("cpus")?;
    fdt.property_u32("#address-cells", 1)?;
    fdt.property_u32("#size-cells", 0)?;
    for id in 0..count {
        let mpidr = mpidr(id);
        let cpu = fdt.begin_node(&format!("cpu@{mpidr:x}"))?;
        fdt.property_string("device_type", "cpu")?;
        fdt.property_string("compatible", "arm,armv8")?;
        fdt.property_string("enable-method", "psci")?;
        fdt.property_u32("reg", mpidr)?;
        fdt.end_node(cpu)?;
    }
    fdt.end_node(cpus)?;

    let psci = fdt.begin_node("psci")?;
    let compatible = ["arm,psci-1.0", "arm,psci-0.2"].map(String::from);
    fdt.property_string_list("compatible", compatible.into())?;
    fdt.property_string("method", "hvc")?;
    Ok(fdt.end_node(psci)?)
}

/// Affinity of a vCPU, as KVM sets it (`kvm_calculate_mpidr()`): clusters of 16.
pub fn mpidr(id: u8) -> u32 {
    let id = u32::from(id);
    id >> 4 << 8 | id & 0xf
}

/// What is there whatever the command line says.
fn platform(fdt: &mut FdtWriter, cpus: u8) -> Result<(), Error> {
    let timer = fdt.begin_node("timer")?;
    fdt.property_string("compatible", "arm,armv8-timer")?;
    let interrupts = TIMER_PPIS.map(|ppi| [PPI, ppi, LEVEL_HIGH]);
    fdt.property_array_u32("interrupts", interrupts.as_flattened())?;
    fdt.property_null("always-on")?;
    fdt.end_node(timer)?;

    let gic = fdt.begin_node(&format!("interrupt-controller@{GIC_DIST_ADDR:x}"))?;
    fdt.property_string("compatible", "arm,gic-v3")?;
    fdt.property_null("interrupt-controller")?;
    fdt.property_u32("#interrupt-cells", 3)?;
    fdt.property_u32("#address-cells", 0)?;
    let redist_size = u64::from(cpus) * GIC_REDIST_SIZE;
    let reg = [GIC_DIST_ADDR, GIC_DIST_SIZE, GIC_REDIST_ADDR, redist_size];
    fdt.property_array_u64("reg", &reg)?;
    fdt.property_phandle(PHANDLE_GIC)?;
    fdt.end_node(gic)?;

    // Drivers of the AMBA bus ask for a clock, and nothing here has one.
    let clock = fdt.begin_node("apb-pclk")?;
    fdt.property_string("compatible", "fixed-clock")?;
    fdt.property_u32("#clock-cells", 0)?;
    fdt.property_u32("clock-frequency", 24_000_000)?;
    fdt.property_phandle(PHANDLE_CLOCK)?;
    fdt.end_node(clock)?;

    let serial = fdt.begin_node(&format!("serial@{SERIAL_ADDR:x}"))?;
    fdt.property_string("compatible", "ns16550a")?;
    fdt.property_array_u64("reg", &[SERIAL_ADDR, SERIAL_SIZE])?;
    let interrupt = gic_spi(SERIAL_GSI, Trigger::EdgeRising);
    fdt.property_array_u32("interrupts", &interrupt)?;
    // Of a PC's, 115200 baud at divisor 1; output takes no time anyway.
    fdt.property_u32("clock-frequency", 1_843_200)?;
    Ok(fdt.end_node(serial)?)
}

/// Whether a device's lines are interrupts, and that is one of them.
pub fn has_line(device: &GuestDevice, line: u32) -> bool {
    device.compatible.iter().any(|name| name == GPIO) && line < GPIO_LINES
}

fn device(fdt: &mut FdtWriter, info: &GuestDevice, phandle: u32) -> Result<(), Error> {
    let trigger = |index| match info.is_level && index == 0 {
        true => Trigger::LevelHigh,
        false => Trigger::EdgeRising,
    };
    let interrupts = (info.gsis.iter().enumerate())
        .flat_map(|(index, &gsi)| gic_spi(gsi, trigger(index)))
        .collect();
    let node = Node {
        name: "device",
        compatible: &info.compatible,
        addr: info.range.addr,
        size: info.range.size,
        interrupts,
        interrupt_parent: None,
        clock: Some(PHANDLE_CLOCK),
    };
    let begun = fdt.begin_node(&node.full_name())?;
    for (name, value) in node.properties()? {
        fdt.property(name, &value)?;
    }
    let Some(line) = info.uio else {
        return Ok(fdt.end_node(begun)?);
    };
    fdt.property_phandle(phandle)?;
    fdt.end_node(begun)?;

    // There is no binding: the driver is told this name on the command line.
    let uio = fdt.begin_node(&format!("uio-{phandle}"))?;
    fdt.property_string("compatible", "generic-uio")?;
    fdt.property_u32("interrupt-parent", phandle)?;
    fdt.property_array_u32("interrupts", &[line, LEVEL_HIGH])?;
    Ok(fdt.end_node(uio)?)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// Reads a tree back: the bytes of each property, by the path of its node and its name.
    fn parse(fdt: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let word = |at: usize| u32::from_be_bytes(fdt[at..at + 4].try_into().unwrap()) as usize;
        let text = |at: usize| {
            let len = fdt[at..].iter().position(|&byte| byte == 0).unwrap();
            std::str::from_utf8(&fdt[at..at + len]).unwrap().to_string()
        };
        assert_eq!(word(0), 0xd00d_feed);
        assert_eq!(word(4), fdt.len());
        let (mut at, strings) = (word(8), word(12));
        let mut path = Vec::new();
        let mut properties = BTreeMap::new();
        loop {
            let token = word(at);
            at += 4;
            match token {
                1 => {
                    let name = text(at);
                    at += (name.len() + 1).next_multiple_of(4);
                    path.push(name);
                }
                2 => drop(path.pop().unwrap()),
                3 => {
                    let (len, name) = (word(at), text(strings + word(at + 4)));
                    let key = format!("{}/{name}", path.join("/"));
                    let value = fdt[at + 8..at + 8 + len].to_vec();
                    assert_eq!(properties.insert(key, value), None);
                    at += 8 + len.next_multiple_of(4);
                }
                9 => break,
                other => panic!("token {other} at {at}"),
            }
        }
        assert!(path.is_empty());
        properties
    }

    fn cells(values: &[u32]) -> Vec<u8> {
        values
            .iter()
            .flat_map(|value| value.to_be_bytes())
            .collect()
    }

    fn device(addr: u64, size: u64, compatible: &[&str], gsis: &[u32]) -> GuestDevice {
        GuestDevice {
            range: Range::new("a device", addr, size),
            compatible: compatible.iter().map(|name| name.to_string()).collect(),
            gsis: gsis.to_vec(),
            is_level: false,
            uio: None,
        }
    }

    fn tree(cpus: u8, devices: &[GuestDevice]) -> BTreeMap<String, Vec<u8>> {
        let machine = Machine {
            cmdline: "console=ttyS0",
            memory_size: 0x1000_0000,
            initrd: Some((0x4f00_0000, 0x12_3456)),
            cpus,
            devices,
        };
        parse(&build(&machine).unwrap())
    }

    #[test]
    fn the_kernel_finds_what_it_boots_with() {
        let tree = tree(1, &[]);
        assert_eq!(tree["/chosen/bootargs"], b"console=ttyS0\0");
        assert_eq!(tree["/chosen/stdout-path"], b"/serial@9000000\0");
        assert!(tree.contains_key("/serial@9000000/reg"));
        assert_eq!(tree["/chosen/linux,initrd-start"], cells(&[0, 0x4f00_0000]));
        assert_eq!(tree["/chosen/linux,initrd-end"], cells(&[0, 0x4f12_3456]));
        assert_eq!(
            tree["/memory@40000000/reg"],
            cells(&[0, 0x4000_0000, 0, 0x1000_0000])
        );
        assert_eq!(tree["/psci/method"], b"hvc\0");
        let gic = &tree["/interrupt-controller@20000000/phandle"];
        assert_eq!(&tree["/interrupt-parent"], gic);
    }

    #[test]
    fn every_cpu_is_there() {
        let tree = tree(18, &[]);
        let count = tree.keys().filter(|key| key.contains("/cpu@")).count();
        assert_eq!(count, 18 * 4);
        assert_eq!(tree["/cpus/cpu@f/reg"], cells(&[0xf]));
        assert_eq!(tree["/cpus/cpu@101/reg"], cells(&[0x101]));
        let reg = &tree["/interrupt-controller@20000000/reg"];
        assert_eq!(reg[24..], cells(&[0, 18 * 0x2_0000]));
    }

    #[test]
    fn devices_are_as_their_notes_say() {
        let devices = [
            device(0x901_0000, 0x1000, &["arm,pl031", "arm,primecell"], &[1]),
            device(0x902_0000, 0x8000, &["qemu,virtual-cpufreq"], &[]),
            device(0x1_2345_6000, 0x10, &["a,b"], &[2, 3]),
            device(0xd000_0000, 0x10, &[], &[]),
        ];
        let tree = tree(1, &devices);
        let rtc = |name| &tree[&format!("/device@9010000/{name}")];
        assert_eq!(rtc("compatible"), b"arm,pl031\0arm,primecell\0");
        assert_eq!(*rtc("reg"), cells(&[0, 0x901_0000, 0, 0x1000]));
        assert_eq!(*rtc("interrupts"), cells(&[0, 1, 1]));
        assert_eq!(rtc("clocks"), &tree["/apb-pclk/phandle"]);
        assert_eq!(rtc("clock-names"), b"apb_pclk\0");

        assert!(tree.contains_key("/device@9020000/reg"));
        assert!(!tree.contains_key("/device@9020000/interrupts"));
        assert!(!tree.contains_key("/device@9020000/clocks"));
        let reg = &tree["/device@123456000/reg"];
        assert_eq!(*reg, cells(&[1, 0x2345_6000, 0, 0x10]));
        let interrupts = &tree["/device@123456000/interrupts"];
        assert_eq!(*interrupts, cells(&[0, 2, 1, 0, 3, 1]));
        assert!(!tree.contains_key("/device@d0000000/compatible"));
    }

    #[test]
    fn gpio_lines_have_a_controller() {
        let mut gpio = device(0x903_0000, 0x1000, &["arm,pl061", "arm,primecell"], &[1, 2]);
        gpio.is_level = true;
        let tree = tree(1, &[gpio]);
        let property = |name| &tree[&format!("/device@9030000/{name}")];
        // The first one is high as long as it is wanted.
        assert_eq!(*property("interrupts"), cells(&[0, 1, 4, 0, 2, 1]));
        for controller in ["gpio-controller", "interrupt-controller"] {
            assert!(property(controller).is_empty());
        }
        for count in ["#gpio-cells", "#interrupt-cells"] {
            assert_eq!(*property(count), cells(&[2]));
        }
        assert_eq!(property("clock-names"), b"apb_pclk\0");
    }

    #[test]
    fn a_line_interrupts_a_program() {
        let mut gpio = device(0x903_0000, 0x1000, &["arm,pl061", "arm,primecell"], &[1]);
        assert!(has_line(&gpio, 7) && !has_line(&gpio, 8));
        gpio.uio = Some(3);
        let tree = tree(1, &[device(0xd000_0000, 0x10, &["a,b"], &[]), gpio]);
        let phandle = &tree["/device@9030000/phandle"];
        assert_eq!(tree["/uio-17/interrupt-parent"], *phandle);
        assert_eq!(tree["/uio-17/interrupts"], cells(&[3, 4]));
        assert!(!tree.contains_key("/device@d0000000/phandle"));
        assert!(!has_line(&device(0, 0x10, &["a,b"], &[]), 0));
    }

    #[test]
    fn fixed_ranges_are_apart() {
        let mut ranges = reserved_ranges();
        ranges.push(Range::new("guest RAM", RAM_START, 3072 << 20));
        assert_eq!(crate::bus::check_ranges(&[], &ranges), Ok(()));
    }
}
