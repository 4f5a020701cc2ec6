// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of the VMM, and of the one without privileges.  Run as root on the host kernel; takes which
//! tests, and then the arguments of an ordinary Rust test (`--list`, a filter).
//!
//! | first argument | tests |
//! | --- | --- |
//! | `vmm` | with a Linux guest |
//! | `jail` | of the VMM without privileges |
//! | `move` | of guests that go on in another VMM of this host |
//! | `save` | of one that is saved, to `KVM_BPF_OUT`, |
//! | `restore` | and goes on with `/in` on another host |
//! | `distribution` | with the guest of `scripts/distribution`, which is `/in` |
//!
//! The environment may set what [`kvm_bpf_selftests::vmm`] says, and `KVM_BPF_MODULE`, the file of
//! `kvm_bpf.ko`, to test a host without it.

use std::env;
use std::process::ExitCode;

use kvm_bpf_selftests::vmm::{Vmm, sample};
use libtest_mimic::{Arguments, Trial};

/// Lists functions that are tests, as `vmm::function`, or with another topic.
macro_rules! tests {
    ($topic:literal: $($test:ident),+ $(,)?) => {
        vec![$(kvm_bpf_selftests::vmm::trial(concat!($topic, "::", stringify!($test)), $test)),+]
    };
    ($($test:ident),+ $(,)?) => {
        tests!("vmm": $($test),+)
    };
}

mod boot;
mod clock;
mod demo;
mod disk;
mod disk_file;
mod distribution;
mod frequency;
mod input;
mod jail;
mod module;
mod moves;
mod reboot;
mod refusal;
mod registers;
mod reload;
mod serial;

/// Where most tests have their device.
const AT: u64 = 0xd000_0000;
/// And where a second one.
const AT2: u64 = 0xd000_1000;

/// What `scripts/boot --in` has brought.
const BROUGHT: &str = "/in";

/// Whether guests are arm64's; its Linux has drivers for clocks, GPIO lines and frequencies.
const ARM64: bool = cfg!(target_arch = "aarch64");

/// A device of programs, as the command line has it.
fn at(file: &str, addr: u64) -> String {
    format!("{file}@{addr:#x}")
}

/// The register bank at its usual place.
fn bank() -> String {
    at(&sample("regbank"), AT)
}

/// A device of 16550s at the ports of `ttyS1`.
fn serial_port() -> String {
    format!("{}@pio:0x2f8", sample("uart16550"))
}

/// A guest that accesses every register of the bank there.
fn accessing(device: &str) -> Vmm {
    Vmm::new().bpf(device).append(&format!("bank={AT:#x}"))
}

fn all() -> Vec<Trial> {
    [
        refusal::all(),
        boot::all(),
        module::all(),
        demo::all(),
        clock::all(),
        frequency::all(),
        registers::all(),
        input::all(),
        serial::all(),
        disk::all(),
        disk_file::all(),
        reboot::all(),
        reload::all(),
        clock::slow(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn main() -> ExitCode {
    let mut words = env::args();
    let program = words.next().unwrap_or_default();
    let tests = match words.next().as_deref() {
        Some("vmm") => all(),
        Some("jail") => jail::all(),
        Some("move") => moves::here(),
        Some("save") => moves::save(),
        Some("restore") => moves::restore(),
        Some("distribution") => distribution::all(),
        _ => {
            eprintln!("usage: {program} vmm|jail|move|save|restore|distribution [ARG...]");
            return ExitCode::from(2);
        }
    };
    let mut args = Arguments::from_iter([program].into_iter().chain(words));
    // Most of them take all processors of the host.
    args.test_threads = args.test_threads.or(Some(1));
    let wanted = |test: &Trial| test.name() == clock::SLOW && !args.is_filtered_out(test);
    if !args.list && tests.iter().any(wanted) {
        clock::start_slow();
    }
    libtest_mimic::run(&args, tests).exit_code()
}
