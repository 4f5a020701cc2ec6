// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The demo, on arm64 with two CPUs: every register access of the guest, and where it was handled.

use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use kvm_bpf_selftests::vmm::{Finished, Running, fields, number};
use libtest_mimic::Trial;

pub fn all() -> Vec<Trial> {
    tests!(guest_is_served_by_the_kernel)
}

/// One run of it, for all who look at what its guest said.
#[track_caller]
pub fn demo() -> &'static Finished {
    static DEMO: OnceLock<Finished> = OnceLock::new();
    let got = DEMO.get_or_init(|| {
        Running::start(Command::new("kvm-bpf-demo"), None).finish(Duration::from_secs(300))
    });
    got.show();
    got.assert_well();
    got
}

/// The accesses of a device and its exits to user space, as the table at the end has them.
#[track_caller]
pub fn row(device: &str, served_by: &str) -> [i64; 2] {
    let counts = demo().lines.iter().find_map(|line| {
        let (name, counts) = line.text.split_once(served_by)?;
        let number = |word: &str| word.parse::<i64>().is_ok();
        (name.contains(device) && counts.split_whitespace().all(number) && !counts.is_empty())
            .then_some(counts)
    });
    let counts = counts.unwrap_or_else(|| panic!("no row of {device}, served by {served_by}"));
    fields::<2>(counts).map(number)
}

fn guest_is_served_by_the_kernel() {
    assert_eq!(row("regbank", "eBPF programs"), [10, 0]);
    assert_eq!(row("regbank", "the VMM"), [10, 10]);
}
