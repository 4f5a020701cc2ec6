// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The command line.

use std::path::PathBuf;
use std::str::FromStr;

use clap::Parser;
use kvm_bpf::Place;

use crate::provide::PERF_TABLE_MAX;
use crate::{arch, userspace};

/// Boots a Linux guest with devices made of eBPF programs.
///
/// The guest's console is standard output; the VMM itself writes to standard
/// error. Output that nobody reads is dropped. On SIGUSR1 the files of all
/// --bpf devices are read again and their programs replaced while the guest runs.
///
/// A guest goes on elsewhere with --save and --restore, or in another process on
/// the same host with --hand-over and --take-over: there with the same CPUs,
/// memory and --bpf devices, and without --kernel.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Args {
    /// Guest kernel: a 64-bit bzImage for x86-64, an Image for arm64.
    #[arg(long, value_name = "FILE", required_unless_present_any = ["restore", "take_over"],
          conflicts_with_all = ["restore", "take_over"])]
    pub kernel: Option<PathBuf>,

    /// Guest initramfs.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["restore", "take_over"])]
    pub initrd: Option<PathBuf>,

    // Its help says what it is added to.
    #[arg(long, value_name = "TEXT", default_value = "",
          conflicts_with_all = ["restore", "take_over"],
          help = format!("Added to the kernel command line {:?}", arch::CMDLINE))]
    pub append: String,

    /// Guest memory in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 256,
          value_parser = clap::value_parser!(u64).range(32..=3072))]
    pub memory: u64,

    /// Number of vCPUs.
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u8).range(1..=254))]
    pub cpus: u8,

    /// A device that the kernel serves from an object file (repeatable).
    ///
    /// What its programs do not handle is for the device NAME of --userspace; without one, reads
    /// give all ones and writes are dropped. On x86-64, pio:PORT instead of ADDR is for a device at
    /// ports. A ring buffer "output" of a device ns16550a is written to standard output, or to FILE.
    /// Lines "LINE LEVEL" of a pipe or regular FILE drive the inputs of a device with a WORK program
    /// "input". The first interrupt of a device with a WORK program "resample" is level-triggered. With
    /// map=MAP:FILE (repeatable) the device's map MAP is the one that is pinned at FILE, on a file system
    /// of type bpf: others may use it too, and it is not saved. With param=NAME:VALUE[:VALUE...]
    /// (repeatable) the device's parameter NAME has these values, decimal or 0x..., and zeroes behind
    /// them; by itself this VMM gives "clock" and "perf_table". They are not saved: a guest that goes on
    /// elsewhere has those of that command line. With uio=LINE an arm64 guest has line LINE of a GPIO
    /// controller as the level-triggered interrupt of a device "generic-uio".
    #[arg(
        long,
        value_name = "DEVICE.o@ADDR[,fallback=NAME][,output=FILE][,input=FILE][,map=MAP:FILE][,param=NAME:VALUE...][,uio=LINE]"
    )]
    pub bpf: Vec<Bpf>,

    /// On SIGUSR1 take a new file even where the device loses state.
    ///
    /// Maps that cannot be carried over then start anew. If the new file has no program for reads,
    /// or none for writes, these are as those that no program handles.
    #[arg(long)]
    pub reload_fresh: bool,

    // Its help lists the names.
    #[arg(long, value_name = "NAME@ADDR",
          help = format!("A device that this program serves: {} (repeatable)",
                         userspace::NAMES.join(", ")))]
    pub userspace: Vec<At>,

    /// A virtio disk on FILE, whose requests a thread of this program serves (repeatable).
    ///
    /// FILE is a regular file that can be written; what is beyond its last whole sector is not part of
    /// the disk. A request on its own makes three exits to user space: one for its notification, two
    /// for its interrupt. With notify=ioeventfd the kernel takes the notification; with registers= the
    /// programs of that file, virtio_regs.bpf.o, serve all three registers.
    #[arg(long, value_name = "FILE@ADDR[,notify=ioeventfd|,registers=DEVICE.o]")]
    pub disk: Vec<Disk>,

    /// Frequencies in kHz that a virtual cpufreq device offers, ascending, up to 64.
    ///
    /// Default: the highest one of the host's CPUs, or 1000000 where the host does not tell.
    #[arg(long, value_name = "KHZ,...")]
    pub perf_table: Option<PerfTable>,

    /// When the guest resets, start it again.
    ///
    /// Memory, CPUs and interrupt controller are as at first, and kernel and initramfs are read again.
    /// A device of programs runs its WORK program "reset"; one without it goes on with its maps as they
    /// were. The guest ends when it switches itself off.
    #[arg(long, conflicts_with_all = ["restore", "take_over"])]
    pub reboot: bool,

    /// On SIGUSR2 stop the guest, save it to FILE and end.
    ///
    /// If that fails the guest goes on.
    #[arg(long, value_name = "FILE")]
    pub save: Option<PathBuf>,

    /// Go on with the guest that --save has saved to FILE.
    #[arg(long, value_name = "FILE", conflicts_with = "take_over")]
    pub restore: Option<PathBuf>,

    /// Give the guest to the process that connects to SOCKET with --take-over, and end.
    ///
    /// The guest's memory is not copied. If that fails the guest goes on here.
    #[arg(long, value_name = "SOCKET")]
    pub hand_over: Option<PathBuf>,

    /// Go on with the guest of the process that listens at SOCKET with --hand-over.
    #[arg(long, value_name = "SOCKET")]
    pub take_over: Option<PathBuf>,

    /// Write the counts of exits to FILE as JSON, instead of a summary to standard error.
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
}

impl Args {
    /// Whether the guest comes from elsewhere or goes there.
    pub fn moves(&self) -> bool {
        [&self.save, &self.restore, &self.hand_over, &self.take_over]
            .iter()
            .any(|path| path.is_some())
    }
}

/// Something at a guest-physical address, `WHAT@ADDR`, or at a port, `WHAT@pio:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct At {
    /// A file or a name.
    pub what: String,
    /// Where it begins.
    pub place: Place,
}

impl FromStr for At {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (what, addr) = text
            .rsplit_once('@')
            .ok_or("no @ADDR at its end".to_string())?;
        if what.is_empty() {
            return Err("nothing before @ADDR".to_string());
        }
        let port = |text| {
            if !cfg!(target_arch = "x86_64") {
                return Err("there are no ports but on x86-64".to_string());
            }
            u16::try_from(number(text)?).map_err(|_| "there are ports 0 to 0xffff".to_string())
        };
        let place = match addr.strip_prefix("pio:") {
            Some(text) => port(text).map(Place::Port),
            None => number(addr).map(Place::Memory),
        };
        Ok(At {
            what: what.to_string(),
            place: place.map_err(|error| format!("address {addr:?}: {error}"))?,
        })
    }
}

/// A number, decimal or `0x...`.
fn number(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|error| error.to_string())
}

/// Splits `WHAT@ADDR[,OPTION...]`.
fn split_options(text: &str) -> (&str, impl Iterator<Item = &str>) {
    // The options are behind the address; a file's name may have commas.
    let options = text
        .rfind('@')
        .and_then(|at| text[at..].find(',')?.checked_add(at));
    let (at, options) = match options {
        Some(comma) => (&text[..comma], Some(&text[comma + 1..])),
        None => (text, None),
    };
    let options = options.into_iter().flat_map(|options| options.split(','));
    (at, options)
}

/// Values of a device's parameter: `NAME:VALUE[:VALUE...]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Param {
    /// The parameter.
    pub name: String,
    /// Its first values.
    pub values: Vec<u64>,
}

impl FromStr for Param {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split(':');
        let name = words.next().filter(|name| !name.is_empty());
        let values = words.map(|word| number(word).map_err(|error| format!("{word:?}: {error}")));
        let values: Vec<_> = values.collect::<Result<_, _>>()?;
        match name {
            Some(name) if !values.is_empty() => Ok(Param {
                name: name.to_string(),
                values,
            }),
            _ => Err("it is not param=NAME:VALUE[:VALUE...]".to_string()),
        }
    }
}

/// A device of eBPF programs: `FILE@ADDR`, and options, each `,NAME=VALUE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bpf {
    /// File and address.
    pub at: At,
    /// The user-space device that takes what no program handles.
    pub fallback: Option<String>,
    /// Where its output goes, if not to standard output.
    pub output: Option<PathBuf>,
    /// What drives its inputs.
    pub input: Option<PathBuf>,
    /// Its maps that others use too, and where these are pinned.
    pub maps: Vec<(String, PathBuf)>,
    /// Its line that interrupts a program in the guest.
    pub uio: Option<u32>,
    /// Its parameters, as far as they are not this VMM's own.
    pub params: Vec<Param>,
}

impl FromStr for Bpf {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (at, options) = split_options(text);
        let mut bpf = Bpf {
            at: at.parse()?,
            fallback: None,
            output: None,
            input: None,
            maps: Vec::new(),
            uio: None,
            params: Vec::new(),
        };
        let map = |text: &str| {
            let (name, file) = text.split_once(':')?;
            (!name.is_empty() && !file.is_empty()).then(|| (name.to_string(), file.into()))
        };
        for option in options {
            let twice = match option.split_once('=') {
                Some(("fallback", name)) if !name.is_empty() => {
                    bpf.fallback.replace(name.to_string()).is_some()
                }
                Some(("output", file)) if !file.is_empty() => {
                    bpf.output.replace(file.into()).is_some()
                }
                Some(("input", file)) if !file.is_empty() => {
                    bpf.input.replace(file.into()).is_some()
                }
                Some(("map", text)) => {
                    let wrong = || format!("{option:?} is not map=MAP:FILE");
                    let (name, file) = map(text).ok_or_else(wrong)?;
                    let twice = bpf.maps.iter().any(|(other, _)| *other == name);
                    bpf.maps.push((name, file));
                    twice
                }
                Some(("uio", line)) => {
                    let line = line
                        .parse()
                        .map_err(|_| format!("{option:?} is not uio=LINE"))?;
                    bpf.uio.replace(line).is_some()
                }
                Some(("param", text)) => {
                    let param = text.parse::<Param>();
                    let param = param.map_err(|error| format!("{option:?}: {error}"))?;
                    let twice = bpf.params.iter().any(|other| other.name == param.name);
                    bpf.params.push(param);
                    twice
                }
                _ => {
                    return Err(format!(
                        "{option:?} is not fallback=NAME, output=FILE, input=FILE, map=MAP:FILE, \
                         param=NAME:VALUE or uio=LINE"
                    ));
                }
            };
            if twice {
                return Err(format!("{option:?}: a second time"));
            }
        }
        Ok(bpf)
    }
}

/// Who serves the three registers of a virtio device that are accessed for each request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Registers {
    /// This process.
    Userspace,
    /// This process, but for notifications.
    Ioeventfd,
    /// The programs of that file.
    Programs(String),
}

/// A disk of this process: `FILE@ADDR[,notify=ioeventfd|,registers=DEVICE.o]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// File and address.
    pub at: At,
    /// Who serves registers.
    pub registers: Registers,
}

impl FromStr for Disk {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (at, mut options) = split_options(text);
        let at = at.parse()?;
        let option = options.next();
        let registers = match option.map(|option| option.split_once('=')) {
            None => Registers::Userspace,
            Some(Some(("notify", "ioeventfd"))) => Registers::Ioeventfd,
            Some(Some(("registers", file))) if !file.is_empty() => {
                Registers::Programs(file.to_string())
            }
            Some(_) => {
                let option = option.unwrap_or_default();
                return Err(format!(
                    "{option:?} is not notify=ioeventfd or registers=DEVICE.o"
                ));
            }
        };
        match options.next() {
            Some(option) => Err(format!("{option:?}: one option is the most")),
            None => Ok(Disk { at, registers }),
        }
    }
}

/// A table of frequencies: `KHZ[,KHZ...]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PerfTable(pub Vec<u32>);

impl FromStr for PerfTable {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let table = text
            .split(',')
            .map(|khz| khz.parse().map_err(|error| format!("{khz:?}: {error}")))
            .collect::<Result<Vec<u32>, _>>()?;
        if table.len() > PERF_TABLE_MAX {
            return Err(format!("more than {PERF_TABLE_MAX} frequencies"));
        }
        if table.first() == Some(&0) || !table.is_sorted_by(|a, b| a < b) {
            return Err("frequencies are to ascend from above 0".to_string());
        }
        Ok(PerfTable(table))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Args, clap::Error> {
        let always = ["kvm-bpf-vmm", "--kernel", "k"];
        Args::try_parse_from(always.iter().chain(args))
    }

    #[test]
    fn addresses_are_hex_or_decimal() {
        let at: At = "dir/a@b.o@0xd0000000".parse().unwrap();
        let place = Place::Memory(0xd000_0000);
        assert_eq!((at.what.as_str(), at.place), ("dir/a@b.o", place));
        let at: At = "regbank@4096".parse().unwrap();
        assert_eq!(
            (at.what.as_str(), at.place),
            ("regbank", Place::Memory(4096))
        );
        for bad in [
            "",
            "a.o",
            "@1",
            "a.o@",
            "a.o@x",
            "a.o@-1",
            "a.o@0x10000000000000000",
        ] {
            assert!(bad.parse::<At>().is_err(), "{bad}");
        }
    }

    #[test]
    fn devices_have_options() {
        let bpf: Bpf = "a,b@c.o@0x1000,fallback=regbank".parse().unwrap();
        let place = Place::Memory(0x1000);
        assert_eq!((bpf.at.what.as_str(), bpf.at.place), ("a,b@c.o", place));
        assert_eq!(bpf.fallback.as_deref(), Some("regbank"));
        let bpf: Bpf = "a,fallback=x@7".parse().unwrap();
        let place = Place::Memory(7);
        assert_eq!(
            (bpf.at.what.as_str(), bpf.at.place),
            ("a,fallback=x", place)
        );
        assert_eq!((bpf.fallback, bpf.output, bpf.input), (None, None, None));
        let bpf: Bpf = "a.o@1,output=/tmp/x,input=/tmp/y,fallback=b"
            .parse()
            .unwrap();
        assert_eq!(bpf.input.as_deref(), Some("/tmp/y".as_ref()));
        assert_eq!(bpf.fallback.as_deref(), Some("b"));
        assert_eq!(bpf.output.as_deref(), Some("/tmp/x".as_ref()));
        let bpf: Bpf = "a.o@1,map=disk:/b:c,map=.bss:d".parse().unwrap();
        let maps = [("disk", "/b:c"), (".bss", "d")];
        let maps = maps.map(|(name, file)| (name.to_string(), file.into()));
        assert_eq!(bpf.maps, maps);
        let bpf: Bpf = "a.o@1,uio=7".parse().unwrap();
        assert_eq!(bpf.uio, Some(7));
        let bpf: Bpf = "a.o@1,param=clock:7,param=table:0x10:18446744073709551615"
            .parse()
            .unwrap();
        let params = [("clock", vec![7]), ("table", vec![16, u64::MAX])];
        let params = params.map(|(name, values)| Param {
            name: name.to_string(),
            values,
        });
        assert_eq!(bpf.params, params);
        for bad in [
            "a.o@1,param=clock",
            "a.o@1,param=clock:",
            "a.o@1,param=:1",
            "a.o@1,param=clock:x",
            "a.o@1,param=clock:-1",
            "a.o@1,param=clock:1:",
            "a.o@1,param=clock:18446744073709551616",
            "a.o@1,param=clock:1,param=clock:2",
            "a.o@1,",
            "a.o@1,uio=",
            "a.o@1,uio=-1",
            "a.o@1,uio=1,uio=2",
            "a.o@1,map=disk",
            "a.o@1,map=disk:",
            "a.o@1,map=:x",
            "a.o@1,map=disk:x,map=disk:y",
            "a.o@1,fallback",
            "a.o@1,fallback=",
            "a.o@1,x=y",
            "a.o@1,output=",
            "a.o@1,output=a,output=b",
            "a.o@1,input=",
            "a.o@1,input=a,input=a",
            "a.o@1,fallback=a,,output=b",
            "a.o,x@",
        ] {
            assert!(bad.parse::<Bpf>().is_err(), "{bad}");
        }
    }

    #[test]
    fn disks_have_one_option() {
        let registers = |text: &str| text.parse::<Disk>().map(|disk| disk.registers);
        assert_eq!(registers("a,notify=ioeventfd@1"), Ok(Registers::Userspace));
        assert_eq!(registers("a@1,notify=ioeventfd"), Ok(Registers::Ioeventfd));
        let programs = Registers::Programs("b.o".to_string());
        assert_eq!(registers("a@1,registers=b.o"), Ok(programs));
        for bad in [
            "a",
            "a@1,",
            "a@1,notify",
            "a@1,notify=x",
            "a@1,registers=",
            "a@1,registers=b.o,notify=ioeventfd",
            "a@1,notify=ioeventfd,notify=ioeventfd",
        ] {
            assert!(registers(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ports_are_x86s() {
        let parse = |text: &str| text.parse::<At>().map(|at| at.place);
        if cfg!(target_arch = "x86_64") {
            assert_eq!(parse("a@pio:0x2f8"), Ok(Place::Port(0x2f8)));
            assert_eq!(parse("a@pio:760"), Ok(Place::Port(760)));
            assert_eq!(parse("a@pio:0xffff"), Ok(Place::Port(0xffff)));
            assert!(parse("a@pio:0x10000").is_err_and(|error| error.contains("0xffff")));
        } else {
            assert!(parse("a@pio:0x2f8").is_err_and(|error| error.contains("no ports")));
        }
        for bad in ["a@pio:", "a@pio", "a@pio:x", "@pio:1", "a@pio:-1"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn devices_repeat() {
        let args = parse(&["--bpf", "a@1", "--bpf", "b@2", "--userspace", "regbank@3"]).unwrap();
        assert_eq!((args.bpf.len(), args.userspace.len()), (2, 1));
    }

    #[test]
    fn tables_ascend() {
        let table: PerfTable = "400000,800000,1600000".parse().unwrap();
        assert_eq!(table.0, [400_000, 800_000, 1_600_000]);
        let many = |count: u32| (1..=count).map(|khz| khz.to_string()).collect::<Vec<_>>();
        assert!(many(64).join(",").parse::<PerfTable>().is_ok());
        assert!(many(65).join(",").parse::<PerfTable>().is_err());
        for bad in [
            "",
            "0",
            "0,1",
            "1,",
            "2,1",
            "1,1",
            "-1",
            "4294967296",
            "1 2",
        ] {
            assert!(bad.parse::<PerfTable>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_guest_comes_from_one_place() {
        let parse = |args: &[&str]| Args::try_parse_from([&["kvm-bpf-vmm"], args].concat());
        assert!(!parse(&["--kernel", "k", "--reboot"]).unwrap().moves());
        for good in [
            &["--kernel", "k", "--save", "f"][..],
            &["--restore", "f", "--save", "f"],
            &["--take-over", "s", "--hand-over", "t", "--save", "f"],
        ] {
            assert!(parse(good).unwrap().moves(), "{good:?}");
        }
        for bad in [
            &["--save", "f"][..],
            &["--hand-over", "s"],
            &["--restore", "f", "--take-over", "s"],
            &["--restore", "f", "--kernel", "k"],
            &["--restore", "f", "--initrd", "i"],
            &["--take-over", "s", "--kernel", "k"],
            &["--restore", "f", "--append", "quiet"],
            &["--take-over", "s", "--append", "quiet"],
            &["--restore", "f", "--reboot"],
            &["--take-over", "s", "--reboot"],
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn defaults_and_bounds() {
        let args = parse(&[]).unwrap();
        assert_eq!((args.memory, args.cpus), (256, 1));
        for bad in [
            ["--memory", "31"],
            ["--memory", "4096"],
            ["--cpus", "0"],
            ["--cpus", "255"],
        ] {
            assert!(parse(&bad).is_err(), "{bad:?}");
        }
        assert!(Args::try_parse_from(["kvm-bpf-vmm"]).is_err());
    }
}
