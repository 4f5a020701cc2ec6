// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the guest's kernel tells, other programs, and the end.

use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;
use std::{fs, io};

use nix::mount::MsFlags;
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::termios::tcdrain;

/// An error that names what is not as it should be.
pub fn wrong(what: impl AsRef<str>) -> io::Error {
    io::Error::other(format!("wrong: {}", what.as_ref()))
}

/// The parts of a value, which are to be so many.
pub fn parts<'a, const N: usize>(parts: &[&'a str]) -> io::Result<[&'a str; N]> {
    let wanted = || wrong(format!("{} parts, not {N}", parts.len()));
    parts.try_into().map_err(|_| wanted())
}

/// A number, as 10 or 0xa.
pub fn number(text: &str) -> io::Result<u64> {
    let number = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    number.map_err(|_| wrong(text))
}

/// What a file of the kernel's says, or "none".
pub fn fact(path: impl AsRef<Path>) -> String {
    match fs::read_to_string(path) {
        Ok(text) if !text.trim().is_empty() => text.trim().to_string(),
        _ => "none".to_string(),
    }
}

/// How many interrupts came, on all CPUs, for those whose last word, the driver's or device's name,
/// is as wanted.
pub fn interrupts(is_wanted: impl Fn(&str) -> bool) -> u64 {
    let all = fact("/proc/interrupts");
    let wanted = all.lines().filter(|line| {
        let name = line.split_whitespace().next_back();
        name.is_some_and(&is_wanted)
    });
    let counts = wanted.flat_map(|line| {
        let words = line.split_whitespace().skip(1);
        words.map_while(|word| word.parse::<u64>().ok())
    });
    counts.sum()
}

/// " HW:COUNT" of each virtio device, on one CPU: where its interrupt enters the interrupt
/// controller, and how many came.
pub fn virtio_interrupts() -> String {
    let mut said = String::new();
    for line in fact("/proc/interrupts").lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        if let [_, count, _, hw, .., name] = words.as_slice()
            && name.starts_with("virtio")
        {
            let hw = hw.split('-').next().unwrap_or_default();
            said += &format!(" {hw}:{count}");
        }
    }
    said
}

/// Looks so often, with pauses between, whether something holds; says whether it did at last.
pub fn wait_until(times: u32, pause: Duration, mut holds: impl FnMut() -> bool) -> bool {
    for _ in 0..times {
        if holds() {
            return true;
        }
        sleep(pause);
    }
    holds()
}

/// A program in /bin.
pub fn program(name: &str, args: &[&str]) -> Command {
    let mut command = Command::new(format!("/bin/{name}"));
    command.args(args);
    command
}

/// One of busybox's, whose output nobody wants; an error if it fails.
pub fn busybox(args: &[&str]) -> io::Result<()> {
    let mut command = program("busybox", args);
    let status = command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()?;
    match status.success() {
        true => Ok(()),
        false => Err(io::Error::other(format!("{}: {status}", args.join(" ")))),
    }
}

/// Runs a program; its status, as a shell has it.
pub fn status(mut command: Command) -> io::Result<i32> {
    let status = command.status()?;
    status
        .code()
        .ok_or_else(|| io::Error::other(format!("{command:?}: {status}")))
}

pub fn mount(kind: &str, what: &str, at: &str, read_only: bool) -> io::Result<()> {
    let flags = match read_only {
        true => MsFlags::MS_RDONLY,
        false => MsFlags::empty(),
    };
    nix::mount::mount(Some(what), at, Some(kind), flags, None::<&str>)?;
    Ok(())
}

/// Ends the guest, when the console has all that was printed.
pub fn end(how: RebootMode) -> ! {
    let _ = tcdrain(io::stdout());
    let Err(error) = reboot(how);
    panic!("reboot(2): {error}");
}
