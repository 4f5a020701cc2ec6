// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a device made of eBPF programs cannot know by itself, put into its maps.
//!
//! | `compatible` | map, an array | content |
//! | --- | --- | --- |
//! | `arm,pl031` | `clock`, one 64-bit number | nanoseconds to add to the time since boot for the time of day |
//! | `qemu,virtual-cpufreq` | `perf_table`, 64 numbers of 32 bits | frequencies in kHz, ascending; 0 ends them |
//!
//! A device of that name without the map, or with one of another shape, needs nothing.

use std::fs;
use std::io;

use kvm_bpf::Programs;
use kvm_bpf::clock::time_of_day_offset_ns;

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

/// What goes into the maps, the same as long as the VM lives.
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

    /// Fills the maps that want it. On an error, the map's name comes with it.
    pub fn fill(&self, programs: &Programs) -> Result<(), (&'static str, io::Error)> {
        let compatible = &programs.note().compatible;
        let map = |device, name, value_size, entries| {
            compatible
                .iter()
                .any(|own| own == device)
                .then(|| programs.map(name))
                .flatten()
                .filter(|map| {
                    map.is_array() && map.value_size() == value_size && map.max_entries() == entries
                })
        };
        if let Some(map) = map("arm,pl031", "clock", 8, 1) {
            let offset = self.clock_offset_ns.to_ne_bytes();
            map.fill([offset]).map_err(|error| ("clock", error))?;
        }
        if let Some(map) = map(
            "qemu,virtual-cpufreq",
            "perf_table",
            4,
            PERF_TABLE_MAX as u32,
        ) {
            let table = self.perf_table.iter().map(|khz| khz.to_ne_bytes());
            map.fill(table).map_err(|error| ("perf_table", error))?;
        }
        Ok(())
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
