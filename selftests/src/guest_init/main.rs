// SPDX-License-Identifier: Apache-2.0 OR MIT

//! First process of a Linux guest: does what words of the kernel's command line say, one after the
//! other, tells what it sees, and resets the machine.
//!
//! A word is "name=value", with commas in values that have several parts; [`TASKS`] has the names,
//! and each function there says what its values are and which lines it prints. `DONE` is the last
//! line. An address is that of a register in guest-physical memory.

use std::path::Path;
use std::{fs, io};

use kvm_bpf_selftests::harness::stay_on;
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::sys::reboot::RebootMode;

use system::{fact, mount};

mod clocks;
mod disks;
mod lines;
mod moves;
mod registers;
mod system;

/// What a word has the guest do, with the parts of its value.
type Task = fn(&[&str]) -> io::Result<()>;

const TASKS: [(&str, Task); 25] = [
    ("bank", registers::bank),
    ("watch", registers::watch),
    ("access", registers::access),
    ("perf", registers::perf),
    ("rtc", clocks::rtc),
    ("rtctest", clocks::rtctest),
    ("cpufreq", clocks::cpufreq),
    ("irqs", lines::irqs),
    ("gpio", lines::gpio),
    ("uio", lines::uio),
    ("serial", lines::serial),
    ("flood", lines::flood),
    ("hwrng", disks::hwrng),
    ("disk", disks::disk),
    ("image", disks::image),
    ("files", disks::files),
    ("io", disks::io),
    ("shared", disks::shared),
    ("reads", disks::reads),
    ("goes-on", moves::goes_on),
    ("io-moves", moves::io_moves),
    ("level", moves::level),
    ("writes", moves::writes),
    ("reboots", moves::reboots),
    ("busy", moves::busy),
];

/// Modules that the kernel has no drivers without, one a line, in the order to load them.
const MODULES: &str = "/modules/order";

fn main() {
    if let Err(error) = begin() {
        println!("init: {error}");
    }
    // All on one CPU: a bank's COUNT is kept per vCPU.
    stay_on(0);
    for word in fact("/proc/cmdline").split_whitespace() {
        let Some((name, value)) = word.split_once('=') else {
            continue;
        };
        if let Some((_, task)) = TASKS.iter().find(|(own, _)| *own == name) {
            let parts: Vec<_> = value.split(',').collect();
            if let Err(error) = task(&parts) {
                println!("{word}: {error}");
            }
        }
    }
    println!("DONE");
    system::end(RebootMode::RB_AUTOBOOT);
}

/// Mounts what the tasks need, and loads modules: then there is a line "KERNEL release".
fn begin() -> io::Result<()> {
    for (kind, at) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        fs::create_dir_all(at)?;
        // The kernel may have mounted /dev; what lacks /proc fails below.
        let _ = mount(kind, kind, at, false);
    }
    // The kernel's messages would break our lines apart.
    fs::write("/proc/sys/kernel/printk", "1")?;
    if !Path::new(MODULES).exists() {
        return Ok(());
    }
    for module in fs::read_to_string(MODULES)?.lines() {
        finit_module(fs::File::open(module)?, c"", ModuleInitFlags::empty())?;
    }
    println!("KERNEL {}", fact("/proc/sys/kernel/osrelease"));
    Ok(())
}
