// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A row for QEMU's plugin: so many accesses in the first phase, twice as many in the second.

use std::fs;
use std::process::ExitCode;

use kvm_bpf_selftests::marker::{Marker, mark};

use crate::host;
use crate::rows::Row;

/// Enough that what happens once in a while is less than an instruction.
const ACCESSES: u64 = 2000;

pub fn profile(row: &Row, accesses: Option<u64>) -> ExitCode {
    let mut case = match row.set_up(1) {
        Ok(case) => case,
        Err(why) => {
            eprintln!("{}: {why}", row.name);
            return ExitCode::FAILURE;
        }
    };
    let target = &mut case.loops[0];
    let accesses = target.whole_rounds(accesses.unwrap_or(ACCESSES));
    host::settle();
    mark(Marker::Watch);
    target.run(accesses);
    mark(Marker::First);
    target.run(accesses);
    mark(Marker::Second);
    target.run(2 * accesses);
    mark(Marker::End);
    println!("accesses {accesses}");
    symbols();
    ExitCode::SUCCESS
}

/// The kernel's symbols, of modules and programs too.
pub fn symbols() {
    let symbols = fs::read_to_string("/proc/kallsyms").expect("/proc/kallsyms");
    let mut lines = String::new();
    for line in symbols.lines() {
        lines.push_str("symbol ");
        lines.push_str(line);
        lines.push('\n');
    }
    print!("{lines}");
}
