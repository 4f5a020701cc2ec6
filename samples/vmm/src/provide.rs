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

use kvm_bpf::Image;
use kvm_bpf_vmm::userspace::host_clock;
use libbpf_rs::{Map, MapCore, MapFlags, MapType};

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

/// Fills the maps that want it; those that have been filled before stay as they are.
///
/// The latter are carried over from programs that these replace. On an error, the map's name
/// comes with it.
pub fn fill(image: &Image, perf_table: &[u32]) -> Result<(), (&'static str, libbpf_rs::Error)> {
    let compatible = &image.note().compatible;
    let map = |device, name, value_size, entries| {
        compatible
            .iter()
            .any(|own| own == device)
            .then(|| image.map(name))
            .flatten()
            .filter(|map| {
                map.map_type() == MapType::Array
                    && map.value_size() == value_size
                    && map.max_entries() == entries
            })
    };
    if let Some(map) = map("arm,pl031", "clock", 8, 1) {
        let offset = clock_offset_ns().to_ne_bytes();
        fill_map(&map, &[offset]).map_err(|error| ("clock", error))?;
    }
    if let Some(map) = map(
        "qemu,virtual-cpufreq",
        "perf_table",
        4,
        PERF_TABLE_MAX as u32,
    ) {
        let table: Vec<_> = perf_table.iter().map(|khz| khz.to_ne_bytes()).collect();
        fill_map(&map, &table).map_err(|error| ("perf_table", error))?;
    }
    Ok(())
}

/// Puts values into the first entries of an array, the first of which is 0 before.
fn fill_map<const N: usize>(map: &Map<'_>, values: &[[u8; N]]) -> Result<(), libbpf_rs::Error> {
    let first = map.lookup(&0u32.to_ne_bytes(), MapFlags::ANY)?;
    if first.is_some_and(|first| first.iter().any(|&byte| byte != 0)) {
        return Ok(());
    }
    for (index, value) in (0u32..).zip(values) {
        map.update(&index.to_ne_bytes(), value, MapFlags::ANY)?;
    }
    Ok(())
}

/// Nanoseconds from the host's boot to the time of day's epoch, the other way round.
///
/// As this process sees them: a time namespace of its own would make the clock wrong.
fn clock_offset_ns() -> u64 {
    clock_ns(libc::CLOCK_REALTIME).wrapping_sub(clock_ns(libc::CLOCK_BOOTTIME))
}

fn clock_ns(clock: libc::clockid_t) -> u64 {
    host_clock(clock).as_nanos() as u64
}

/// The table of a host that is not asked for another: the highest frequency of any CPU.
pub fn default_perf_table() -> Vec<u32> {
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
    fn the_offset_leads_to_the_time_of_day() {
        let sum = clock_ns(libc::CLOCK_BOOTTIME).wrapping_add(clock_offset_ns());
        let off = clock_ns(libc::CLOCK_REALTIME).abs_diff(sum);
        assert!(off < 1_000_000_000, "{off} ns off");
    }

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
