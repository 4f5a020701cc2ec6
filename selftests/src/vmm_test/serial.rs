// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The guest's own driver of 16550s, with the one at ports (x86-64).

use std::fmt::Write;
use std::fs;
use std::path::Path;

use kvm_bpf_selftests::vmm::{Vmm, assert_between, number};
use libtest_mimic::Trial;
use vmm_sys_util::tempdir::TempDir;

use super::{ARM64, serial_port};

pub fn all() -> Vec<Trial> {
    if ARM64 {
        return Vec::new();
    }
    tests!(
        guest_writes_to_a_serial_port,
        serial_port_shares_the_console
    )
}

/// Fails unless the file has what the guest's first process sends: each byte, and a thousand lines.
#[track_caller]
pub fn assert_sent(file: &Path) {
    let mut lines = String::new();
    for line in 1..=1000 {
        writeln!(lines, "{line}").expect("memory");
    }
    let mut wanted: Vec<u8> = (0..=255).collect();
    wanted.extend(lines.bytes());
    let got = fs::read(file).expect("the output of the port");
    let same = got.iter().zip(&wanted).take_while(|(a, b)| a == b).count();
    assert!(
        got == wanted,
        "wanted {} bytes, got {}, of which the first {same} are right",
        wanted.len(),
        got.len()
    );
}

/// Driven by its interrupt: every byte arrives, and none of its accesses is for the VMM.
fn guest_writes_to_a_serial_port() {
    let directory = TempDir::new().expect("a directory");
    let serial = directory.as_path().join("serial");
    let got = Vmm::new()
        .bpf(format!("{},output={}", serial_port(), serial.display()))
        .append("serial=ttyS1")
        .run();
    got.assert_well();
    assert_sent(&serial);
    got.assert_no_exits(1);
    assert_eq!(got.devices()[0]["space"], "ports", "where it is");
    let [kind, port, interrupts] = got.fields("SERIAL ttyS1");
    // 4 is a 16550A.
    assert_eq!([kind, port], ["4", "0x2F8"], "what the driver has found");
    assert_between("interrupts", 1, number(interrupts), 100_000);
}

/// Without a file it goes to the console, between its own lines.
fn serial_port_shares_the_console() {
    let got = Vmm::new().bpf(serial_port()).append("serial=ttyS1").run();
    got.assert_well();
    let is_number = |text: &str| text.bytes().all(|digit| digit.is_ascii_digit());
    let numbers = got
        .lines
        .iter()
        .filter(|it| !it.text.is_empty() && is_number(&it.text));
    assert_between("lines", 999, numbers.count() as i64, 1001);
}
