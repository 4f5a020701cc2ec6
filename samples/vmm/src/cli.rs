// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The command line.

use std::path::PathBuf;
use std::str::FromStr;

use clap::Parser;

/// Boots a Linux guest with devices made of eBPF programs.
///
/// The guest's console is standard output; the VMM itself writes to standard
/// error. On SIGUSR1 the files of all --bpf devices are read again and their
/// programs replaced while the guest runs.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Args {
    /// Guest kernel, a 64-bit bzImage.
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,

    /// Guest initramfs.
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,

    /// Added to the kernel command line "console=ttyS0 reboot=k panic=-1".
    #[arg(long, value_name = "TEXT", default_value = "")]
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
    #[arg(long, value_name = "DEVICE.o@ADDR")]
    pub bpf: Vec<At>,

    /// A device that this program serves; the one there is: regbank (repeatable).
    #[arg(long, value_name = "NAME@ADDR")]
    pub userspace: Vec<At>,

    /// Write the counts of exits to FILE as JSON, instead of a summary to standard error.
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
}

/// Something at a guest-physical address: `WHAT@ADDR`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct At {
    /// A file or a name.
    pub what: String,
    /// First guest-physical address.
    pub addr: u64,
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
        let parsed = match addr.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16),
            None => addr.parse(),
        };
        Ok(At {
            what: what.to_string(),
            addr: parsed.map_err(|error| format!("address {addr:?}: {error}"))?,
        })
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
        assert_eq!((at.what.as_str(), at.addr), ("dir/a@b.o", 0xd000_0000));
        let at: At = "regbank@4096".parse().unwrap();
        assert_eq!((at.what.as_str(), at.addr), ("regbank", 4096));
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
    fn devices_repeat() {
        let args = parse(&["--bpf", "a@1", "--bpf", "b@2", "--userspace", "regbank@3"]).unwrap();
        assert_eq!((args.bpf.len(), args.userspace.len()), (2, 1));
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
