// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Runs on the host kernel: boots a guest with one register bank served by eBPF programs and one
//! served by the VMM, and says at the end where each access was handled. On arm64, where Linux has
//! drivers for them, there are also a clock and a virtual cpufreq device of eBPF programs. The
//! guest's side is `selftests/src/guest_init`.
//!
//! From the environment, with their defaults: `VMM`, `KERNEL` and `INITRD` of the guest, `DEVICE`
//! (the bank's object file), `DEVICES` (where the other ones are), `CPUS` (2 on arm64, else 1).

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, sleep};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use std::{env, fs};

use vmm_sys_util::tempdir::TempDir;

use table::Table;

mod table;

/// Whether Linux has drivers for a clock and a virtual cpufreq device.
const ARM64: bool = cfg!(target_arch = "aarch64");

/// Where the banks are.
const BPF: u64 = 0xd000_0000;
const USERSPACE: u64 = 0xd001_0000;

/// How long the VMM may take.
const LIMIT: Duration = Duration::from_secs(240);
/// The status of one that took longer, which timeout(1) has for it.
const TIMED_OUT: u8 = 124;

fn main() -> ExitCode {
    match demo() {
        Ok(status) => status.into(),
        Err(error) => {
            eprintln!("demo: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Returns the VMM's status.
fn demo() -> io::Result<u8> {
    let directory = TempDir::new()?;
    let report = directory.as_path().join("report");
    let mut vmm = vmm(&report.display().to_string())?;
    let pid = vmm.id();
    let output = vmm.stdout.take().expect("a pipe");
    let ended = AtomicBool::new(false);
    let (begins, begun) = mpsc::channel();
    let (status, console, counts) = thread::scope(|scope| {
        let console = scope.spawn(|| show(output, begins));
        let counts = scope.spawn(|| count(pid, begun, &ended));
        let status = wait(&mut vmm);
        ended.store(true, SeqCst);
        let join = "a thread of the demo";
        let (console, counts) = (console.join().expect(join), counts.join().expect(join));
        io::Result::Ok((status?, console?, counts))
    })?;
    if status != 0 {
        return Ok(status);
    }
    let report = serde_json::from_str(&fs::read_to_string(report)?)?;
    let table = Table::new(report, &console, counts);
    if !table.is_whole() {
        return Err(io::Error::other("the guest did not finish"));
    }
    print!("{table}");
    Ok(0)
}

/// Starts the VMM, whose console is a pipe.
fn vmm(report: &str) -> io::Result<Child> {
    let from_env = |name, default: &str| env::var(name).unwrap_or_else(|_| default.to_string());
    let devices = from_env("DEVICES", "/devices");
    let bank = from_env("DEVICE", &format!("{devices}/regbank.bpf.o"));
    let cpus = from_env("CPUS", if ARM64 { "2" } else { "1" });
    let mut append = format!("quiet bank={BPF:#x} bank={USERSPACE:#x}");
    let mut command = Command::new(from_env("VMM", "/bin/kvm-bpf-vmm"));
    command
        .args(["--kernel", &from_env("KERNEL", "/guest/kernel")])
        .args(["--initrd", &from_env("INITRD", "/guest/initramfs")])
        .args(["--cpus", &cpus, "--report", report])
        .args(["--bpf", &format!("{bank}@{BPF:#x}")])
        .args(["--userspace", &format!("regbank@{USERSPACE:#x}")]);
    if ARM64 {
        command
            .args(["--bpf", &format!("{devices}/pl031.bpf.o@0x9010000")])
            .args(["--bpf", &format!("{devices}/vcpufreq.bpf.o@0x9020000")])
            .args(["--perf-table", "500000,1000000,1500000,2000000"]);
        append += " rtc=rtc0";
        let cpus: usize = cpus.parse().map_err(io::Error::other)?;
        for cpu in 0..cpus {
            append += &format!(" cpufreq=cpu{cpu}");
        }
    }
    command.args(["--append", &append]);
    command.stdout(Stdio::piped()).spawn()
}

/// Waits for the VMM's end, which it comes to in time.
fn wait(vmm: &mut Child) -> io::Result<u8> {
    let start = Instant::now();
    loop {
        if let Some(status) = vmm.try_wait()? {
            // A signal has none.
            return Ok(status.code().map_or(1, |status| status as u8));
        }
        if start.elapsed() >= LIMIT {
            vmm.kill()?;
            vmm.wait()?;
            return Ok(TIMED_OUT);
        }
        sleep(Duration::from_millis(50));
    }
}

/// Shows the guest's console as it comes, with the host's time of day where the guest tells its own.
/// Returns its lines, and theirs.
fn show(console: impl Read, begins: Sender<()>) -> io::Result<Vec<String>> {
    let mut console = BufReader::new(console);
    let mut shown = io::stdout();
    let mut lines = Vec::new();
    let mut bytes = Vec::new();
    while console.read_until(b'\n', &mut bytes)? > 0 {
        // Nobody may want to know.
        let _ = begins.send(());
        shown.write_all(&bytes)?;
        // It ends lines with a carriage return as well.
        let line = String::from_utf8_lossy(&bytes).trim_end().to_string();
        let tells_time = line.starts_with("RTC since_epoch");
        lines.push(line);
        if tells_time {
            let line = format!("HOST since_epoch {}", now());
            writeln!(shown, "{line}")?;
            lines.push(line);
        }
        shown.flush()?;
        bytes.clear();
    }
    Ok(lines)
}

/// Seconds since 1970.
fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}

/// What programs handle leaves no trace: they are counted from outside, from the guest's first word,
/// when the VMM has set its devices up, until it ends. Returns the accesses by the device's address.
fn count(vmm: u32, begun: Receiver<()>, ended: &AtomicBool) -> BTreeMap<u64, u64> {
    if begun.recv().is_err() {
        return BTreeMap::new();
    }
    loop {
        let inspected = Command::new("kvm-bpf")
            .args(["inspect", &vmm.to_string(), "--for", "300"])
            .output();
        match inspected {
            Ok(output) if output.status.success() => {
                return counts(&String::from_utf8_lossy(&output.stdout));
            }
            _ if ended.load(SeqCst) => return BTreeMap::new(),
            _ => sleep(Duration::from_millis(200)),
        }
    }
}

/// The accesses that programs handled or declined, by address, of what `kvm-bpf inspect` says.
fn counts(inspected: &str) -> BTreeMap<u64, u64> {
    let mut counts = BTreeMap::new();
    let mut addr = None;
    for line in inspected.lines() {
        if let Some(region) = line.trim_start().strip_prefix("region ") {
            addr = region.split([' ', ',']).nth(2).and_then(table::hex);
        }
        let results = line.rsplit_once(": handled ").and_then(|(_, results)| {
            let (handled, declined) = results.split_once(", declined ")?;
            Some(handled.parse::<u64>().ok()? + declined.parse::<u64>().ok()?)
        });
        if let (Some(addr), Some(count)) = (addr, results) {
            *counts.entry(addr).or_default() += count;
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_by_address() {
        let inspected = "\
process 70 (kvm-bpf-vmm), file descriptor 21
  region 0: MMIO 0x9010000, 0x1000 bytes
    reads: pl031_read (program 3, tag 0123456789abcdef): handled 12, declined 1
    writes: pl031_write (program 4, tag 0123456789abcdef): handled 3, declined 0
  work 0: run by an eventfd or the VMM
    program: pl031_reset (program 5, tag 0123456789abcdef): finished 1, more to do 0
process 70 (kvm-bpf-vmm), file descriptor 22
  region 0: MMIO 0xd0000000, 0x1000 bytes
    reads: user space
    writes: regbank_write (program 7, tag 0123456789abcdef): handled 0, declined 2
";
        let counts: Vec<_> = counts(inspected).into_iter().collect();
        assert_eq!(counts, [(0x901_0000, 16), (0xd000_0000, 2)]);
    }
}
