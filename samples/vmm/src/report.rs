// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What came to user space: exits per device, and per register and direction.

use std::collections::BTreeMap;
use std::fmt;

use kvm_bpf::note::Space;
use serde::Serialize;

use crate::bus::Range;

/// Registers counted one by one; what goes beyond is in the device's total only.
///
/// The guest chooses the offsets, so without a bound it would choose the VMM's
/// memory use too.
const MAX_REGISTERS: usize = 1024;

/// Direction of an access, as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    Read,
    Write,
}

/// Exits of one device.
#[derive(Debug, Default)]
pub struct Exits {
    total: u64,
    by_register: BTreeMap<(u64, Direction), u64>,
}

impl Exits {
    /// Counts one exit.
    pub fn count(&mut self, offset: u64, direction: Direction) {
        self.total += 1;
        let room = self.by_register.len() < MAX_REGISTERS;
        match self.by_register.get_mut(&(offset, direction)) {
            Some(count) => *count += 1,
            None if room => drop(self.by_register.insert((offset, direction), 1)),
            None => (),
        }
    }
}

/// Who serves a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Server {
    /// Programs in the host kernel.
    Bpf,
    /// This process.
    Userspace,
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Server::Bpf => "eBPF",
            Server::Userspace => "user space",
        })
    }
}

/// A device's part of the report.
#[derive(Debug, Serialize)]
pub struct Device {
    name: String,
    server: Server,
    space: Space,
    addr: u64,
    size: u64,
    exits: u64,
    registers: Vec<Register>,
    read_pages: Vec<ReadPage>,
    /// Of a disk, how many this process has served.
    #[serde(skip_serializing_if = "Option::is_none")]
    requests: Option<u64>,
}

/// A page of a device's registers whose loads have no side effect.
#[derive(Debug, Serialize)]
pub struct ReadPage {
    /// Where the guest has it.
    pub addr: u64,
    /// Its bytes.
    pub size: u64,
    /// The guest reads it itself, through a memory slot; nobody counts its loads.
    pub slot: bool,
    /// Why it does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why_not: Option<String>,
}

/// Exits that one register caused.
#[derive(Debug, Serialize)]
struct Register {
    offset: u64,
    direction: Direction,
    exits: u64,
}

impl Device {
    /// Says where a device is and which exits it caused.
    pub fn new(range: &Range, server: Server, exits: &Exits) -> Self {
        let registers = exits
            .by_register
            .iter()
            .map(|(&(offset, direction), &exits)| Register {
                offset,
                direction,
                exits,
            })
            .collect();
        Device {
            name: range.name.clone(),
            server,
            space: range.space,
            addr: range.addr,
            size: range.size,
            exits: exits.total,
            registers,
            read_pages: Vec::new(),
            requests: None,
        }
    }

    /// Whether it is the one there.
    pub fn is_at(&self, space: Space, addr: u64) -> bool {
        (self.space, self.addr) == (space, addr)
    }

    /// Says how many requests a thread of this process has served.
    pub fn set_requests(&mut self, requests: u64) {
        self.requests = Some(requests);
    }

    /// Says what became of its read pages.
    pub fn set_read_pages(&mut self, pages: Vec<ReadPage>) {
        self.read_pages = pages;
    }
}

/// A vCPU's thread as it was when the guest ended.
#[derive(Debug, Serialize)]
pub struct Vcpu {
    /// KVM's number of the vCPU.
    pub id: usize,
    /// Bounds of the utilization that the scheduler assumes, 0 to 1024.
    pub uclamp_min: u32,
    /// The upper one.
    pub uclamp_max: u32,
}

impl Vcpu {
    /// Whether nobody has set the bounds; a host kernel without them says that both are 0.
    fn is_unclamped(&self) -> bool {
        matches!((self.uclamp_min, self.uclamp_max), (0, 0 | 1024))
    }
}

/// What the VMM tells at the end of a run.
#[derive(Debug, Serialize)]
pub struct Report {
    /// How the guest ended.
    pub end: &'static str,
    /// How often programs were replaced while the guest ran.
    pub reloads: u64,
    /// How often the guest was started again.
    pub reboots: u64,
    /// Exits for addresses that no device has; ports are not among them.
    pub unclaimed_exits: u64,
    /// Bytes of the guest's console and of its serial ports that nobody took.
    pub console_bytes_lost: u64,
    /// The devices, by address; those at ports last.
    pub devices: Vec<Device>,
    /// The vCPUs.
    pub vcpus: Vec<Vcpu>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "guest ended: {}", self.end)?;
        if self.reloads > 0 {
            write!(f, "\nreloads: {}", self.reloads)?;
        }
        if self.reboots > 0 {
            write!(f, "\nreboots: {}", self.reboots)?;
        }
        for device in &self.devices {
            let port = match device.space {
                Space::Memory => "",
                Space::Ports => "port ",
            };
            write!(
                f,
                "\n{} at {port}{:#x}, served by {}: {} exits to user space",
                device.name, device.addr, device.server, device.exits
            )?;
            if let Some(requests) = device.requests {
                write!(f, ", {requests} requests")?;
            }
            for page in &device.read_pages {
                match &page.why_not {
                    None => write!(
                        f,
                        "\n  loads of {:#x} bytes at {:#x}: the guest's own, not counted",
                        page.size, page.addr
                    )?,
                    Some(why) => write!(
                        f,
                        "\n  loads of {:#x} bytes at {:#x}: by a program, as {why}",
                        page.size, page.addr
                    )?,
                }
            }
        }
        if self.unclaimed_exits > 0 {
            write!(
                f,
                "\nno device: {} exits to user space",
                self.unclaimed_exits
            )?;
        }
        if self.console_bytes_lost > 0 {
            write!(f, "\nconsole: {} bytes lost", self.console_bytes_lost)?;
        }
        for vcpu in self.vcpus.iter().filter(|vcpu| !vcpu.is_unclamped()) {
            write!(
                f,
                "\nvCPU {}: utilization clamped to {} to {}",
                vcpu.id, vcpu.uclamp_min, vcpu.uclamp_max
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let mut exits = Exits::default();
        for offset in [8, 0, 8] {
            exits.count(offset, Direction::Read);
        }
        exits.count(8, Direction::Write);
        Report {
            end: "reset",
            reloads: 0,
            reboots: 2,
            unclaimed_exits: 0,
            console_bytes_lost: 0,
            devices: vec![
                Device::new(&Range::new("bank", 0x1000, 16), Server::Userspace, &exits),
                Device::new(
                    &Range::of_ports("uart", 0x2f8, 8),
                    Server::Bpf,
                    &Exits::default(),
                ),
            ],
            vcpus: [(0, 1024), (512, 512), (0, 0)]
                .into_iter()
                .enumerate()
                .map(|(id, (uclamp_min, uclamp_max))| Vcpu {
                    id,
                    uclamp_min,
                    uclamp_max,
                })
                .collect(),
        }
    }

    #[test]
    fn counts_by_register_and_direction() {
        let json = serde_json::to_value(report()).unwrap();
        let device = &json["devices"][0];
        assert_eq!(device["server"], "userspace");
        assert_eq!(device["space"], "memory");
        assert_eq!(json["devices"][1]["space"], "ports");
        assert_eq!(device["exits"], 4);
        let registers = device["registers"].as_array().unwrap();
        assert_eq!(registers.len(), 3);
        assert_eq!(registers[1]["offset"], 8);
        assert_eq!(registers[1]["direction"], "read");
        assert_eq!(registers[1]["exits"], 2);
        assert_eq!(json["vcpus"][1]["id"], 1);
        assert_eq!(json["vcpus"][0]["uclamp_max"], 1024);
    }

    #[test]
    fn reads_well() {
        let text = report().to_string();
        assert_eq!(
            text,
            "guest ended: reset\n\
             reboots: 2\n\
             bank at 0x1000, served by user space: 4 exits to user space\n\
             uart at port 0x2f8, served by eBPF: 0 exits to user space\n\
             vCPU 1: utilization clamped to 512 to 512"
        );
    }

    #[test]
    fn requests_are_told() {
        let mut report = report();
        report.devices[0].set_requests(2);
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["devices"][0]["requests"], 2);
        assert!(json["devices"][1].get("requests").is_none());
        let line = "user space: 4 exits to user space, 2 requests\n";
        assert!(report.to_string().contains(line));
    }

    #[test]
    fn read_pages_are_told() {
        let mut report = report();
        let page = |addr, why_not: Option<&str>| ReadPage {
            addr,
            size: 0x1000,
            slot: why_not.is_none(),
            why_not: why_not.map(str::to_string),
        };
        let device = &mut report.devices[1];
        assert!(device.is_at(Space::Ports, 0x2f8) && !device.is_at(Space::Memory, 0x2f8));
        device.set_read_pages(vec![page(0x1000, None), page(0x2000, Some("it rains"))]);
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(
            json["devices"][0]["read_pages"].as_array().unwrap().len(),
            0
        );
        let pages = &json["devices"][1]["read_pages"];
        assert_eq!(
            (&pages[0]["slot"], &pages[1]["slot"]),
            (&true.into(), &false.into())
        );
        assert!(pages[0].get("why_not").is_none());
        assert_eq!(pages[1]["why_not"], "it rains");
        assert!(report.to_string().contains(
            "0 exits to user space\n  \
             loads of 0x1000 bytes at 0x1000: the guest's own, not counted\n  \
             loads of 0x1000 bytes at 0x2000: by a program, as it rains\n"
        ));
    }

    #[test]
    fn memory_is_bounded() {
        let mut exits = Exits::default();
        for offset in 0..2 * MAX_REGISTERS as u64 {
            exits.count(offset, Direction::Read);
        }
        exits.count(0, Direction::Read);
        assert_eq!(exits.by_register.len(), MAX_REGISTERS);
        assert_eq!(exits.by_register[&(0, Direction::Read)], 2);
        assert_eq!(exits.total, 2 * MAX_REGISTERS as u64 + 1);
    }
}
