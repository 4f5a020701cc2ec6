// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a device made of eBPF programs cannot know by itself: the parameters that this VMM knows.
//!
//! | parameter | values |
//! | --- | --- |
//! | `clock` | one: nanoseconds to add to the host's time since boot for the time of day |
//! | `perf_table` | frequencies in kHz, ascending; 0 ends them where there is room for more |
//!
//! The command line gives others, or other values.

use std::fs;

use kvm_bpf::clock::time_of_day_offset_ns;
use kvm_bpf::{Programs, programs};

use crate::cli::Param;

const CLOCK: &str = "clock";
const PERF_TABLE: &str = "perf_table";

/// Entries of a table of frequencies.
pub const PERF_TABLE_MAX: usize = 64;

/// What the frequency is said to be where the host does not tell its own.
const NO_CPUFREQ_KHZ: u32 = 1_000_000;

/// How many CPUs a guest with the device may have, where the device limits it.
///
/// Linux's driver for `qemu,virtual-cpufreq` accesses a page per possible CPU, whatever the size
/// of the device.
pub fn max_cpus(compatible: &[String], size: u64) -> Option<u64> {
    const PAGE: u64 = 0x1000;

    compatible
        .iter()
        .any(|own| own == "qemu,virtual-cpufreq")
        .then_some(size / PAGE)
}

/// What this VMM knows, the same as long as the VM lives.
pub struct Provided {
    /// Frequencies in kHz, ascending.
    pub perf_table: Vec<u32>,
    /// Nanoseconds from the host's boot to the time of day's epoch, the other way round.
    clock_offset_ns: u64,
}

impl Provided {
    /// With that table, or the host's.
    pub fn new(perf_table: Option<&[u32]>) -> Self {
        Provided {
            perf_table: perf_table.map_or_else(default_perf_table, Vec::from),
            clock_offset_ns: time_of_day_offset_ns(),
        }
    }

    /// Gives a device the parameters that it has, those of the command line last.
    pub fn give(&self, programs: &Programs, own: &[Param]) -> Result<(), programs::Error> {
        let has = |name| programs.note().param(name).is_some();
        if has(CLOCK) {
            programs.param(CLOCK, [self.clock_offset_ns])?;
        }
        if has(PERF_TABLE) {
            programs.param(PERF_TABLE, self.perf_table.iter().copied().map(u64::from))?;
        }
        own.iter()
            .try_for_each(|param| programs.param(&param.name, param.values.iter().copied()))
    }
}

/// The table of a host that is not asked for another: the highest frequency of any CPU.
fn default_perf_table() -> Vec<u32> {
    let cpus = fs::read_dir("/sys/devices/system/cpu")
        .into_iter()
        .flatten();
    let max = cpus
        .flatten()
        .filter_map(|cpu| fs::read_to_string(cpu.path().join("cpufreq/cpuinfo_max_freq")).ok())
        .filter_map(|text| text.trim().parse().ok())
        .max()
        .filter(|&khz| khz != 0);
    vec![max.unwrap_or(NO_CPUFREQ_KHZ)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_per_cpu() {
        let names = |name: &str| vec!["x,y".to_string(), name.to_string()];
        assert_eq!(max_cpus(&names("qemu,virtual-cpufreq"), 0x8000), Some(8));
        assert_eq!(max_cpus(&names("arm,pl031"), 0x1000), None);
    }

    #[test]
    fn there_is_a_default_table() {
        let table = default_perf_table();
        assert_eq!(table.len(), 1);
        assert_ne!(table[0], 0);
    }
}
