// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `kvm-bpf inspect PID`: the devices of a process, from outside.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use kvm_bpf::perms::Allow;
use kvm_bpf::uapi;

mod bpf;
mod fdinfo;
mod process;

use bpf::{Counter, Map};
use fdinfo::Device;

/// Entries of a map that are shown.
const MAX_ENTRIES: u32 = 16;

/// What a program's result says, where it is 0 and where it is not.
const OF_AN_ACCESS: [&str; 2] = ["handled", "declined"];
const OF_WORK: [&str; 2] = ["finished", "more to do"];

#[derive(Debug, Parser)]
#[command(
    name = "kvm-bpf",
    about = "Devices made of eBPF programs, from outside"
)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the devices of a process: regions, programs, maps, interrupts, permissions.
    ///
    /// What the kernel tells of a process is for those who may trace it; names of programs and what
    /// is in maps are for root.
    Inspect {
        /// The process, a VMM.
        pid: u32,
        /// Count for so long, or until the process ends, how many accesses each program handled, and
        /// how many it declined; of a WORK program, how often it finished, and had more to do.
        /// Otherwise nothing is counted.
        #[arg(long = "for", value_name = "SECONDS")]
        seconds: Option<f64>,
    },
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("process {0}: {1}")]
    Process(u32, io::Error),
    #[error("process {0} has no device made of eBPF programs")]
    NoDevice(u32),
    #[error("--for takes a number of seconds from 0 to 86400")]
    Seconds,
    #[error("--for is for root: the kernel does not tell of program {0}")]
    Unknown(u32),
    #[error("counting for {0}: {1}")]
    Count(String, io::Error),
    #[error(transparent)]
    Output(#[from] io::Error),
}

fn main() -> ExitCode {
    let Command::Inspect { pid, seconds } = Args::parse().command;
    match inspect(pid, seconds, &mut io::stdout().lock()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kvm-bpf: {error}");
            ExitCode::FAILURE
        }
    }
}

fn inspect(pid: u32, seconds: Option<f64>, out: &mut impl Write) -> Result<(), Error> {
    let wait = match seconds {
        Some(seconds) if !(0.0..=86400.0).contains(&seconds) => return Err(Error::Seconds),
        seconds => seconds.map(Duration::from_secs_f64),
    };
    let devices = fdinfo::devices(pid).map_err(|error| Error::Process(pid, error))?;
    if devices.is_empty() {
        return Err(Error::NoDevice(pid));
    }
    let command = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let ids: Vec<u32> = devices
        .iter()
        .flat_map(|(_, device)| device.programs())
        .map(|(_, program)| program.id)
        .collect();
    let programs = bpf::Program::with_ids(&ids);
    let programs: BTreeMap<u32, _> = programs
        .iter()
        .map(|program| (program.id(), program))
        .collect();
    let counters = match wait {
        None => None,
        Some(wait) => {
            if let Some(&id) = ids.iter().find(|id| !programs.contains_key(id)) {
                return Err(Error::Unknown(id));
            }
            let countable = programs.values().filter(|program| program.has_types());
            let counters = countable.map(|program| match Counter::new(program) {
                Ok(counter) => Ok((program.id(), counter)),
                Err(error) => Err(Error::Count(program.name.clone(), error)),
            });
            let counters = counters.collect::<Result<BTreeMap<_, _>, _>>()?;
            process::wait(pid, wait).map_err(|error| Error::Process(pid, error))?;
            Some(counters)
        }
    };
    for (number, device) in &devices {
        writeln!(
            out,
            "process {pid} ({}), file descriptor {number}",
            command.trim_end().escape_debug()
        )?;
        show(device, &programs, counters.as_ref(), out)?;
    }
    Ok(())
}

fn show(
    device: &Device,
    programs: &BTreeMap<u32, &bpf::Program>,
    counters: Option<&BTreeMap<u32, Counter>>,
    out: &mut impl Write,
) -> Result<(), Error> {
    let show_program =
        |out: &mut dyn Write, what: &str, program: &fdinfo::Program, results: [&str; 2]| {
            let known = programs.get(&program.id);
            let name = known.map_or("", |known| known.name.as_str());
            let sleeps = if program.sleeps { ", may sleep" } else { "" };
            write!(
                out,
                "    {what}: {name} (program {}, tag {}{sleeps})",
                program.id, program.tag
            )?;
            if let Some(counters) = counters {
                match counters.get(&program.id) {
                    Some(counter) => {
                        let [zero, other] = counter.get()?;
                        let [if_zero, if_other] = results;
                        write!(out, ": {if_zero} {zero}, {if_other} {other}")?;
                    }
                    None => write!(out, ": not counted: it has no BTF")?,
                }
            } else if let Some(known) = known
                && known.run_cnt > 0
            {
                write!(
                    out,
                    ": ran {} times, {} ns",
                    known.run_cnt, known.run_time_ns
                )?;
            }
            writeln!(out)
        };
    for region in &device.regions {
        let kind = if region.is_pio { "ports" } else { "MMIO" };
        writeln!(
            out,
            "  region {}: {kind} {:#x}, {:#x} bytes",
            region.index, region.addr, region.size
        )?;
        for (what, program) in [("reads", &region.read), ("writes", &region.write)] {
            match program {
                Some(program) => show_program(out, what, program, OF_AN_ACCESS)?,
                None => writeln!(out, "    {what}: user space")?,
            }
        }
    }
    for work in &device.works {
        let by = if work.has_eventfd {
            "an eventfd or the VMM"
        } else {
            "the VMM"
        };
        writeln!(out, "  work {}: run by {by}", work.index)?;
        show_program(out, "program", &work.program, OF_WORK)?;
    }
    if !device.irqs.is_empty() {
        let irqs: Vec<_> = device.irqs.iter().map(u32::to_string).collect();
        writeln!(out, "  interrupts: {}", irqs.join(", "))?;
    }
    for window in &device.windows {
        let rights = match window.rights.as_str() {
            "r" => "read",
            "w" => "write",
            _ => "read and write",
        };
        writeln!(
            out,
            "  window {}: {:#x}, {:#x} bytes, to {rights}",
            window.index, window.addr, window.size
        )?;
    }
    show_maps(device, programs, out)?;
    writeln!(out, "  allowed: {}", allowed(device.allow))?;
    let extensible = if device.require & uapi::KVM_BPF_REQUIRE_NOT_EXTENSIBLE == 0 {
        "may"
    } else {
        "must not"
    };
    writeln!(out, "  programs {extensible} be extended")?;
    let more = if device.is_sealed { "no more" } else { "more" };
    writeln!(out, "  the VM can get {more} devices of this kind")?;
    Ok(())
}

fn show_maps(
    device: &Device,
    programs: &BTreeMap<u32, &bpf::Program>,
    out: &mut impl Write,
) -> Result<(), Error> {
    let own = device.programs();
    let maps: BTreeSet<u32> = own
        .iter()
        .filter_map(|(_, program)| programs.get(&program.id))
        .flat_map(|program| program.map_ids.iter().copied())
        .collect();
    for id in maps {
        // It may be gone by now, and may be one that nobody can read.
        let Ok(map) = Map::with_id(id) else {
            continue;
        };
        writeln!(out, "  {}", map.describe())?;
        match map.entries(MAX_ENTRIES) {
            Ok(entries) => {
                for entry in entries {
                    writeln!(out, "    {entry}")?;
                }
            }
            Err(error) => writeln!(out, "    not shown: {error}")?,
        }
    }
    Ok(())
}

/// What is allowed, or what is not, whichever is shorter.
fn allowed(allow: u64) -> String {
    let left = Allow::from_bits(allow);
    let lost = Allow::ALL.without(left);
    match lost {
        Allow::NONE => "all".to_string(),
        _ if lost.bits().count_ones() < allow.count_ones() => format!("all but {lost}"),
        _ => left.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_in_words() {
        assert_eq!(allowed(0xff_07ff), "all");
        assert_eq!(allowed(0), "nothing");
        assert_eq!(allowed(0x1_0001), "IRQ, NEW_REGION");
        assert_eq!(allowed(0xff_07ff & !0x40), "all but SLEEP");
    }
}
