// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A small VMM that boots a Linux guest with devices made of eBPF programs.

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod boot;
mod bus;
mod cli;
mod console;
mod disk;
#[cfg(all(test, not(target_arch = "aarch64")))]
#[path = "aarch64/fdt.rs"]
mod fdt;
mod input;
mod output;
mod provide;
mod report;
mod serial;
mod snapshot;
mod virtio;
mod vm;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "aarch64")]
use aarch64 as arch;
#[cfg(target_arch = "x86_64")]
use x86_64 as arch;

use std::error::Error;
use std::fs;
use std::io::{self, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc::{self, Sender};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;
use std::{iter, mem, ptr, thread};

use clap::Parser;
use kvm_bpf_vmm::userspace;
use libbpf_rs::PrintLevel;
use vmm_sys_util::errno;
use vmm_sys_util::signal::block_signal;

use crate::cli::Args;
use crate::output::Output;
use crate::vm::{Event, Taker, Vm};

/// What libbpf had to say since the last error; it knows reasons that its errno does not tell.
static LIBBPF_WARNINGS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Standard error, once its thread has started.
static MESSAGES: Mutex<Option<Output>> = Mutex::new(None);

fn main() -> ExitCode {
    let code = match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            print_error("error", error.as_ref());
            ExitCode::FAILURE
        }
    };
    if let Some(messages) = &*lock(&MESSAGES) {
        messages.finish();
    }
    code
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    libbpf_rs::set_print(Some((PrintLevel::Warn, |_, warning| {
        lock(&LIBBPF_WARNINGS).push(warning);
    })));

    let (sender, events) = mpsc::channel();
    wait_for_signals(args.save.is_some(), sender.clone())?;
    let messages = Output::new("messages", io::stderr()).map_err(vm::Error::Thread)?;
    *lock(&MESSAGES) = Some(messages);
    let vm = Vm::new(args)?;
    let listener = args.hand_over.as_deref();
    let listener = listener
        .map(|path| Listener::new(path, sender.clone()))
        .transpose()?;
    let result = vm.run(sender, events);
    drop(listener);
    let report = result?;
    match &args.report {
        Some(path) => {
            let json = serde_json::to_string_pretty(&report)?;
            fs::write(path, json + "\n").map_err(|error| format!("{}: {error}", path.display()))?;
        }
        None => say(&report.to_string()),
    }
    Ok(())
}

/// Turns SIGUSR1 into events, and SIGUSR2 if `save`, from a thread that waits for them.
///
/// Call it before other threads start: they inherit that the signals are blocked.
fn wait_for_signals(save: bool, sender: Sender<Event>) -> Result<(), vm::Error> {
    let mut signals = vec![libc::SIGUSR1];
    if save {
        signals.push(libc::SIGUSR2);
    }
    for &signal in &signals {
        block_signal(signal).map_err(|_| vm::Error::Signal(errno::Error::last()))?;
    }
    let wait = move || {
        // SAFETY: a signal set is plain bits, and sigemptyset() sets them all;
        // the calls only read and write this thread's variables.
        let wait_once = || unsafe {
            let mut set = mem::zeroed();
            libc::sigemptyset(&mut set);
            for &signal in &signals {
                libc::sigaddset(&mut set, signal);
            }
            libc::sigwaitinfo(&set, ptr::null_mut())
        };
        loop {
            let event = match wait_once() {
                libc::SIGUSR1 => Event::Reload,
                libc::SIGUSR2 => Event::Save,
                _ => continue,
            };
            if sender.send(event).is_err() {
                break;
            }
        }
    };
    thread::Builder::new()
        .name("signals".to_string())
        .spawn(wait)
        .map_err(vm::Error::Thread)?;
    Ok(())
}

/// Waits at a socket for processes that want the guest. The socket's file goes with it.
struct Listener<'a>(&'a Path);

impl<'a> Listener<'a> {
    fn new(path: &'a Path, sender: Sender<Event>) -> Result<Self, vm::Error> {
        let failed = |error| vm::Error::Listen(path.to_path_buf(), error);
        let socket = UnixListener::bind(path).map_err(failed)?;
        let listener = Listener(path);
        let wait = move || {
            for stream in socket.incoming() {
                let Ok(stream) = stream else {
                    // There are too many files, say.
                    thread::sleep(Duration::from_millis(100));
                    continue;
                };
                // One after the other: the others wait in the socket.
                let (_waiting, served) = mpsc::channel();
                if sender
                    .send(Event::HandOver(Taker { stream, _waiting }))
                    .is_err()
                {
                    break;
                }
                let _ = served.recv();
            }
        };
        thread::Builder::new()
            .name("hand-over".to_string())
            .spawn(wait)
            .map_err(vm::Error::Thread)?;
        Ok(listener)
    }
}

impl Drop for Listener<'_> {
    fn drop(&mut self) {
        // Another may have removed it.
        let _ = fs::remove_file(self.0);
    }
}

/// Locks, also after a thread panicked: what is behind the locks of this program is usable at any
/// time.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Prints a line on standard error, if someone takes it.
fn say(line: &str) {
    match &mut *lock(&MESSAGES) {
        // It never fails.
        Some(messages) => drop(writeln!(messages, "{line}")),
        None => eprintln!("{line}"),
    }
}

/// Has errors from here on named by later warnings only.
fn forget_warnings() {
    lock(&LIBBPF_WARNINGS).clear();
}

/// Prints an error and its causes in one line; below it, the verifier's log if there is one.
fn print_error(what: &str, error: &(dyn Error + 'static)) {
    let chain = || iter::successors(Some(error), |&error| error.source());
    let mut parts: Vec<String> = chain().map(|error| error.to_string()).collect();
    parts.dedup();
    let log = chain().find_map(verifier_log);
    let warnings = mem::take(&mut *lock(&LIBBPF_WARNINGS));
    if log.is_none()
        && let Some(warning) = warnings.first()
    {
        parts.push(warning.trim_end().to_string());
    }
    say(&format!("kvm-bpf-vmm: {what}: {}", parts.join(": ")));
    if let Some(log) = log {
        say(log.trim_end());
    }
}

fn verifier_log<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a str> {
    match error.downcast_ref()? {
        kvm_bpf::device::Error::Image(kvm_bpf::image::Error::Verifier { log, .. }) => Some(log),
        _ => None,
    }
}
