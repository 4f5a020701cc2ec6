// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The virtual cpufreq device, which arm64's Linux has a driver for.
//!
//! Of the table that the demo gives, each CPU's last request is the lowest frequency, a quarter of
//! the highest.  All requests come from one CPU.

use libtest_mimic::Trial;

use super::ARM64;
use super::demo::{demo, row};

pub fn all() -> Vec<Trial> {
    if !ARM64 {
        return Vec::new();
    }
    tests!(
        guest_sets_the_frequency_of_cpu0,
        frequency_is_a_clamp_of_vcpu0,
        guest_sets_the_frequency_of_cpu1,
        frequency_is_a_clamp_of_vcpu1,
        frequency_is_served_by_the_kernel,
    )
}

fn guest_sets_the_frequency_of_cpu0() {
    frequency_of(0);
}

fn guest_sets_the_frequency_of_cpu1() {
    frequency_of(1);
}

fn frequency_is_a_clamp_of_vcpu0() {
    clamp_of(0);
}

fn frequency_is_a_clamp_of_vcpu1() {
    clamp_of(1);
}

#[track_caller]
fn frequency_of(cpu: u32) {
    for (governor, wanted) in [
        ("performance", "2000000 2000000"),
        ("powersave", "500000 2000000"),
    ] {
        let got = demo().said(&format!("CPUFREQ cpu{cpu} {governor}"));
        assert_eq!(got, wanted, "frequencies in kHz, by {governor}");
    }
}

#[track_caller]
fn clamp_of(vcpu: u32) {
    demo().assert_has(&format!("*vCPU {vcpu} * clamped to 256 to 256 *"));
}

fn frequency_is_served_by_the_kernel() {
    let [accesses, exits] = row("vcpufreq", "eBPF programs");
    assert!(accesses > 0, "wanted accesses");
    assert_eq!(exits, 0, "exits");
}
