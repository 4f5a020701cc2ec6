// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The table of the guest's accesses and where each was handled.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;

/// What is wanted of the VMM's report.
#[derive(Debug, Deserialize)]
pub struct Report {
    devices: Vec<Device>,
    vcpus: Vec<Vcpu>,
}

#[derive(Debug, Deserialize)]
struct Device {
    name: String,
    server: String,
    addr: u64,
    size: u64,
    exits: u64,
    registers: Vec<Register>,
}

/// Accesses that went to user space.
#[derive(Debug, Deserialize)]
struct Register {
    offset: u64,
    direction: String,
    exits: usize,
}

#[derive(Debug, Deserialize)]
struct Vcpu {
    id: usize,
    uclamp_min: u32,
    uclamp_max: u32,
}

/// An access of a bank, as the guest tells it.
#[derive(Debug)]
struct Access {
    addr: u64,
    bits: String,
    direction: String,
    value: String,
}

impl Access {
    fn new(line: &str) -> Option<Self> {
        let words: Vec<_> = line.split_whitespace().collect();
        let ["ACCESS", addr, bits, direction, value] = words.as_slice() else {
            return None;
        };
        Some(Access {
            addr: hex(addr)?,
            bits: bits.to_string(),
            direction: direction.to_string(),
            value: value.to_lowercase(),
        })
    }
}

/// What a line says after two words.
fn fact(line: &str) -> Option<(String, String)> {
    let mut words = line.splitn(3, ' ');
    let (kind, name, rest) = (words.next()?, words.next()?, words.next()?);
    ["RTC", "HOST"]
        .contains(&kind)
        .then(|| (format!("{kind} {name}"), rest.to_string()))
}

/// A number with 0x before it.
pub fn hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

/// All that is known at the end; its text is what the demo shows.
#[derive(Debug)]
pub struct Table {
    report: Report,
    accesses: Vec<Access>,
    facts: BTreeMap<String, String>,
    frequencies: Vec<String>,
    counts: BTreeMap<u64, u64>,
    is_done: bool,
}

impl Table {
    /// Of the VMM's report, what the guest's console has, and how many accesses the programs of the
    /// devices at those addresses handled.
    pub fn new(report: Report, console: &[String], counts: BTreeMap<u64, u64>) -> Self {
        let lines = || console.iter().map(String::as_str);
        let frequency = |line: &str| Some(line.strip_prefix("CPUFREQ ")?.to_string());
        Table {
            report,
            accesses: lines().filter_map(Access::new).collect(),
            facts: lines().filter_map(fact).collect(),
            frequencies: lines().filter_map(frequency).collect(),
            counts,
            is_done: lines().any(|line| line.starts_with("DONE")),
        }
    }

    /// Whether the guest has come to its end.
    pub fn is_whole(&self) -> bool {
        self.is_done && !self.accesses.is_empty()
    }

    /// Those of a device that the guest tells one by one.
    fn accesses_of(&self, device: &Device) -> impl Iterator<Item = (u64, &Access)> {
        let range = device.addr..device.addr + device.size;
        let here = self.accesses.iter();
        here.filter(move |access| range.contains(&access.addr))
            .map(|access| (access.addr - device.addr, access))
    }

    fn clock(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fact = |name| self.facts.get(name).map_or("none", String::as_str);
        let mut alarm = fact("RTC alarm").split_whitespace();
        let mut alarm = || alarm.next().unwrap_or("none");
        writeln!(f, "  guest driver  {}", fact("RTC driver"))?;
        writeln!(f, "  hwclock       {}", fact("RTC hwclock"))?;
        writeln!(
            f,
            "  time          {} in the guest, {} on the host",
            fact("RTC since_epoch"),
            fact("HOST since_epoch")
        )?;
        writeln!(
            f,
            "  alarm         for {}, interrupt at {}, interrupts: {}",
            alarm(),
            alarm(),
            alarm()
        )
    }

    fn frequency(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let title = ["CPU", "governor", "current", "highest"];
        writeln!(f, "{}  (kHz)", frequency_row(title))?;
        for line in &self.frequencies {
            let mut words = line.split_whitespace();
            let row = [(); 4].map(|()| words.next().unwrap_or("none"));
            writeln!(f, "{}", frequency_row(row))?;
        }
        writeln!(f)?;
        for vcpu in &self.report.vcpus {
            writeln!(
                f,
                "  at the end, vCPU {} had its utilization clamped to {} to {} of 1024",
                vcpu.id, vcpu.uclamp_min, vcpu.uclamp_max
            )?;
        }
        Ok(())
    }

    fn registers(&self, device: &Device, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "  {:<8}  {:<6}  {:<6}  {:>4}  {:<18}  handled in",
            "register", "offset", "access", "bits", "value"
        )?;
        for (offset, access) in self.accesses_of(device) {
            writeln!(
                f,
                "  {:<8}  0x{:<4x}  {:<6}  {:>4}  {:<18}  {}",
                name(offset),
                offset,
                access.direction,
                access.bits,
                access.value,
                self.place(device, offset, &access.direction)
            )?;
        }
        Ok(())
    }

    /// Where accesses of a register in one direction were handled.
    fn place(&self, device: &Device, offset: u64, direction: &str) -> String {
        let accesses = self.accesses_of(device);
        let alike = accesses.filter(|(at, it)| *at == offset && it.direction == direction);
        let exits = device
            .registers
            .iter()
            .find(|it| it.offset == offset && it.direction == direction)
            .map_or(0, |it| it.exits);
        match (exits, alike.count()) {
            (0, _) => "kernel".to_string(),
            (exits, all) if exits == all => "user space".to_string(),
            (exits, all) => format!("user space, {exits} of {all}"),
        }
    }

    fn summary(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\n{:<24}  {:<13}  {:>8}  exits to user space",
            "device", "served by", "accesses"
        )?;
        for device in &self.report.devices {
            // What drivers do is not listed, but counted where programs do it.
            let counted = self.counts.get(&device.addr).map(u64::to_string);
            let accesses = match self.accesses_of(device).count() {
                0 => counted.unwrap_or_else(|| "-".to_string()),
                count => count.to_string(),
            };
            writeln!(
                f,
                "{:<24}  {:<13}  {accesses:>8}  {}",
                device.name,
                device.served_by(),
                device.exits
            )?;
        }
        Ok(())
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for device in &self.report.devices {
            let (name, by) = (&device.name, device.served_by());
            writeln!(f, "\n{name} at {:#x}, served by {by}\n", device.addr)?;
            if name.contains("pl031") {
                self.clock(f)?;
            } else if name.contains("vcpufreq") {
                self.frequency(f)?;
            } else {
                self.registers(device, f)?;
            }
        }
        self.summary(f)
    }
}

impl Device {
    fn served_by(&self) -> &str {
        match self.server.as_str() {
            "bpf" => "eBPF programs",
            _ => "the VMM",
        }
    }
}

fn frequency_row([cpu, governor, current, highest]: [&str; 4]) -> String {
    format!("  {cpu:<4}  {governor:<12}  {current:>12}  {highest:>12}")
}

/// What is at an offset of a bank.
fn name(offset: u64) -> &'static str {
    match offset {
        0x00 => "ID",
        0x04 => "VERSION",
        0x08..0x10 => "SCRATCH",
        0x10..0x18 => "COUNT",
        0x18..0x20 => "TIME",
        0x20..0x24 => "IRQ",
        _ => "(none)",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = r#"{
        "end": "reset",
        "devices": [
            {
                "name": "/devices/pl031.bpf.o", "server": "bpf", "addr": 150994944, "size": 4096,
                "exits": 0, "registers": []
            },
            {
                "name": "/devices/vcpufreq.bpf.o", "server": "bpf", "addr": 151060480, "size": 4096,
                "exits": 0, "registers": []
            },
            {
                "name": "regbank", "server": "userspace", "addr": 3489660928, "size": 4096,
                "exits": 3, "registers": [
                    { "offset": 0, "direction": "read", "exits": 1 },
                    { "offset": 8, "direction": "write", "exits": 1 }
                ]
            }
        ],
        "vcpus": [{ "id": 0, "uclamp_min": 256, "uclamp_max": 512 }]
    }"#;

    const CONSOLE: [&str; 12] = [
        "[    0.7] a message of the kernel",
        "ACCESS 0xd0000000 32 read 0x4B425042",
        "ACCESS 0xd0000008 64 write 0x1122334455667788",
        "ACCESS 0xd0000008 8 write 0xaa",
        "ACCESS 0xd0000028 16 read 0x0000",
        "RTC driver rtc-pl031 9010000.device",
        "RTC hwclock Sat Nov 28 06:54:04 2026  0.000000 seconds",
        "RTC since_epoch 1795848844",
        "HOST since_epoch 1795848845",
        "RTC alarm 1795848846 1795848847 1",
        "CPUFREQ cpu0 performance 2000000 2000000",
        "DONE",
    ];

    const TABLE: &str = "
/devices/pl031.bpf.o at 0x9000000, served by eBPF programs

  guest driver  rtc-pl031 9010000.device
  hwclock       Sat Nov 28 06:54:04 2026  0.000000 seconds
  time          1795848844 in the guest, 1795848845 on the host
  alarm         for 1795848846, interrupt at 1795848847, interrupts: 1

/devices/vcpufreq.bpf.o at 0x9010000, served by eBPF programs

  CPU   governor           current       highest  (kHz)
  cpu0  performance        2000000       2000000

  at the end, vCPU 0 had its utilization clamped to 256 to 512 of 1024

regbank at 0xd0000000, served by the VMM

  register  offset  access  bits  value               handled in
  ID        0x0     read      32  0x4b425042          user space
  SCRATCH   0x8     write     64  0x1122334455667788  user space, 1 of 2
  SCRATCH   0x8     write      8  0xaa                user space, 1 of 2
  (none)    0x28    read      16  0x0000              kernel

device                    served by      accesses  exits to user space
/devices/pl031.bpf.o      eBPF programs        16  0
/devices/vcpufreq.bpf.o   eBPF programs         -  0
regbank                   the VMM               4  3
";

    fn table(console: &[&str]) -> Table {
        let console: Vec<_> = console.iter().map(|line| line.to_string()).collect();
        let counts = BTreeMap::from([(0x900_0000, 16)]);
        Table::new(serde_json::from_str(REPORT).unwrap(), &console, counts)
    }

    #[test]
    fn shows_every_device() {
        assert_eq!(table(&CONSOLE).to_string(), TABLE);
    }

    #[test]
    fn is_whole_at_the_guests_end() {
        assert!(table(&CONSOLE).is_whole());
        assert!(!table(&CONSOLE[..11]).is_whole());
        assert!(!table(&CONSOLE[5..]).is_whole());
    }
}
