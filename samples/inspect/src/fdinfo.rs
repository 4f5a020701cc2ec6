// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the kernel tells of a device in `/proc/PID/fdinfo`.

use std::path::PathBuf;
use std::{fs, io};

/// What a process's file descriptors of devices link to.
const LINK: &str = "anon_inode:kvm-bpf";

/// A program of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// The number that bpf(2) knows it by.
    pub id: u32,
    /// The hash of its instructions.
    pub tag: String,
    /// It may sleep.
    pub sleeps: bool,
}

/// A region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    pub index: u32,
    /// Of ports.
    pub is_pio: bool,
    pub addr: u64,
    pub size: u64,
    pub read: Option<Program>,
    pub write: Option<Program>,
}

impl Region {
    fn program(&mut self, is_read: bool) -> &mut Option<Program> {
        if is_read {
            &mut self.read
        } else {
            &mut self.write
        }
    }
}

/// A window of guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    pub index: u32,
    pub addr: u64,
    pub size: u64,
    /// "r", "w" or both.
    pub rights: String,
}

/// A program that runs without a guest's access.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Work {
    pub index: u32,
    pub program: Program,
    /// An eventfd runs it, too.
    pub has_eventfd: bool,
}

/// A device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Device {
    pub regions: Vec<Region>,
    pub irqs: Vec<u32>,
    pub windows: Vec<Window>,
    pub works: Vec<Work>,
    /// `KVM_BPF_ALLOW_*`.
    pub allow: u64,
    /// `KVM_BPF_REQUIRE_*`.
    pub require: u64,
    /// The VM gets no more devices.
    pub is_sealed: bool,
}

impl Device {
    /// All its programs: what each is for.
    pub fn programs(&self) -> Vec<(String, &Program)> {
        let regions = self.regions.iter().flat_map(|region| {
            let read = region.read.as_ref().map(|program| ("reads", program));
            let write = region.write.as_ref().map(|program| ("writes", program));
            let of_region = |(what, program)| (format!("region {} {what}", region.index), program);
            read.into_iter().chain(write).map(of_region)
        });
        let works = self.works.iter();
        let works = works.map(|work| (format!("work {}", work.index), &work.program));
        regions.chain(works).collect()
    }

    /// Reads the lines that are the device's; the first that is not as it should be is the error.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut device = Device::default();
        for line in text.lines() {
            let Some((name, rest)) = line.split_once(":\t") else {
                continue;
            };
            let mut words = Words(rest.split(' '));
            device
                .add(name, &mut words)
                .ok_or_else(|| line.to_string())?;
        }
        Ok(device)
    }

    fn add(&mut self, name: &str, words: &mut Words<'_>) -> Option<()> {
        match name {
            "region" => {
                let mut region = Region {
                    index: words.number()?,
                    is_pio: match words.next()? {
                        "mmio" => false,
                        "pio" => true,
                        _ => return None,
                    },
                    addr: words.hex()?,
                    size: words.hex()?,
                    read: None,
                    write: None,
                };
                let mut is_read = false;
                while let Some(word) = words.next() {
                    match word {
                        "read" | "write" => {
                            is_read = word == "read";
                            *region.program(is_read) = Some(words.program()?);
                        }
                        "sleeps" => region.program(is_read).as_mut()?.sleeps = true,
                        // A later kernel says more.
                        _ => {}
                    }
                }
                self.regions.push(region);
            }
            "irq" => self.irqs.push(words.number()?),
            "mem" => self.windows.push(Window {
                index: words.number()?,
                addr: words.hex()?,
                size: words.hex()?,
                rights: words.next()?.to_string(),
            }),
            "work" => {
                let mut work = Work {
                    index: words.number()?,
                    program: words.program()?,
                    has_eventfd: false,
                };
                while let Some(word) = words.next() {
                    work.program.sleeps |= word == "sleeps";
                    work.has_eventfd |= word == "eventfd";
                }
                self.works.push(work);
            }
            "allow" => self.allow = words.hex()?,
            "require" => self.require = words.hex()?,
            "sealed" => self.is_sealed = words.next()? == "1",
            // Those of every file.
            _ => {}
        }
        Some(())
    }
}

struct Words<'a>(std::str::Split<'a, char>);

impl<'a> Words<'a> {
    fn next(&mut self) -> Option<&'a str> {
        self.0.next()
    }

    fn number(&mut self) -> Option<u32> {
        self.next()?.parse().ok()
    }

    fn hex(&mut self) -> Option<u64> {
        u64::from_str_radix(self.next()?.strip_prefix("0x")?, 16).ok()
    }

    fn program(&mut self) -> Option<Program> {
        Some(Program {
            id: self.number()?,
            tag: self.next()?.to_string(),
            sleeps: false,
        })
    }
}

/// The devices of a process, by the numbers of their file descriptors.
pub fn devices(pid: u32) -> io::Result<Vec<(u32, Device)>> {
    let proc = PathBuf::from(format!("/proc/{pid}"));
    let mut devices = Vec::new();
    for entry in fs::read_dir(proc.join("fd"))? {
        let entry = entry?;
        // It may be closed by now.
        let is_one = fs::read_link(entry.path()).is_ok_and(|link| link.as_os_str() == LINK);
        let number = entry.file_name().to_string_lossy().parse();
        let (true, Ok(number)) = (is_one, number) else {
            continue;
        };
        let Ok(text) = fs::read_to_string(proc.join("fdinfo").join(entry.file_name())) else {
            continue;
        };
        let device = Device::parse(&text).map_err(|line| {
            let why = format!("file descriptor {number}: the kernel says {line:?}");
            io::Error::new(io::ErrorKind::InvalidData, why)
        })?;
        devices.push((number, device));
    }
    devices.sort_by_key(|&(number, _)| number);
    Ok(devices)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(id: u32, sleeps: bool) -> Program {
        Program {
            id,
            tag: "00112233445566aa".to_string(),
            sleeps,
        }
    }

    #[test]
    fn a_device_with_all() {
        let text = "pos:\t0\nflags:\t02000002\nmnt_id:\t15\nino:\t1059\n\
            region:\t0 mmio 0xd0000000 0x1000 read 12 00112233445566aa\n\
            region:\t2 pio 0x3f8 0x8 read 12 00112233445566aa sleeps write 13 00112233445566aa later 7\n\
            region:\t3 mmio 0x0 0x10 write 14 00112233445566aa sleeps\n\
            irq:\t0\nirq:\t255\nmem:\t31 0x1000 0x10 rw\n\
            work:\t0 15 00112233445566aa\nwork:\t15 16 00112233445566aa sleeps eventfd\n\
            allow:\t0xff07ff\nrequire:\t0x1\nsealed:\t1\nlater:\tx\n";
        let device = Device::parse(text).unwrap();
        let region = |index, is_pio, addr, size, read, write| Region {
            index,
            is_pio,
            addr,
            size,
            read,
            write,
        };
        let regions = [
            region(
                0,
                false,
                0xd000_0000,
                0x1000,
                Some(program(12, false)),
                None,
            ),
            region(
                2,
                true,
                0x3f8,
                8,
                Some(program(12, true)),
                Some(program(13, false)),
            ),
            region(3, false, 0, 0x10, None, Some(program(14, true))),
        ];
        assert_eq!(device.regions, regions);
        assert_eq!(device.irqs, [0, 255]);
        let window = Window {
            index: 31,
            addr: 0x1000,
            size: 0x10,
            rights: "rw".to_string(),
        };
        assert_eq!(device.windows, [window]);
        let work = |index, program, has_eventfd| Work {
            index,
            program,
            has_eventfd,
        };
        let works = [
            work(0, program(15, false), false),
            work(15, program(16, true), true),
        ];
        assert_eq!(device.works, works);
        assert_eq!(
            (device.allow, device.require, device.is_sealed),
            (0xff_07ff, 1, true)
        );
        let programs: Vec<_> = device
            .programs()
            .iter()
            .map(|(_, program)| program.id)
            .collect();
        assert_eq!(programs, [12, 12, 13, 14, 15, 16]);
    }

    #[test]
    fn lines_that_are_not_as_they_should_be() {
        for line in [
            "region:\t0",
            "region:\tx mmio 0x0 0x1",
            "region:\t0 isa 0x0 0x1",
            "region:\t0 mmio 0 0x1",
            "region:\t0 mmio 0x0 0x1 read",
            "region:\t0 mmio 0x0 0x1 read 12",
            "region:\t0 mmio 0x0 0x1 sleeps",
            "irq:\t-1",
            "mem:\t0 0x0 0x0",
            "work:\t0 7",
            "allow:\t12",
        ] {
            assert_eq!(Device::parse(line), Err(line.to_string()));
        }
    }
}
