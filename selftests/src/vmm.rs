// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The VMM with a Linux guest, as a process: what it prints, and what it reports at the end.
//!
//! The environment may set `VMM`, the VMM to test; `KERNEL` and `INITRD`, those of the guest, below
//! `/guest` by default; `KVM_BPF_DEVICES` and `KVM_BPF_PROGS` as for the selftests.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use libtest_mimic::Trial;
use vmm_sys_util::tempdir::TempDir;

use crate::harness::trial_within;
use crate::programs::{sample_path, test_path};

pub use process::{Finished, Line, Running, all_said, feed, make_fifo};
pub use text::{assert_between, fields, is_like, number};

mod process;
mod text;

/// How long a test may take; all that it waits for has a limit of its own, which is shorter.
const TEST_LIMIT: Duration = Duration::from_secs(1200);

/// How long a guest has for its next step.
pub const STEP: Duration = Duration::from_secs(120);

/// How long a guest has for all that it does, if a test does not say otherwise.
pub const GUEST: Duration = Duration::from_secs(240);

/// Makes a test of a function that panics when it fails: then all is shown that its processes
/// have printed.
pub fn trial(name: &'static str, test: impl FnOnce() + Send + 'static) -> Trial {
    trial_within(name, TEST_LIMIT, move || {
        let _show = process::show_if_failed();
        test();
    })
}

/// The object file of a device of `samples/devices`.
pub fn sample(name: &str) -> String {
    sample_path(name).display().to_string()
}

/// The object file of a device of `selftests/progs`.
pub fn program(name: &str) -> String {
    test_path(name).display().to_string()
}

/// The guest's kernel.
pub fn kernel() -> PathBuf {
    env::var_os("KERNEL").map_or_else(|| "/guest/kernel".into(), PathBuf::from)
}

/// The guest's files.
pub fn initrd() -> PathBuf {
    env::var_os("INITRD").map_or_else(|| "/guest/initramfs".into(), PathBuf::from)
}

/// A VMM to be.
#[derive(Debug)]
pub struct Vmm {
    command: Command,
    directory: TempDir,
}

impl Default for Vmm {
    fn default() -> Self {
        Vmm::new()
    }
}

impl Vmm {
    /// With the guest's kernel and files.
    pub fn new() -> Self {
        Vmm::booting(&kernel(), &initrd())
    }

    /// With others.
    pub fn booting(kernel: &Path, initrd: &Path) -> Self {
        Vmm::without_guest()
            .args(["--kernel".as_ref(), kernel.as_os_str()])
            .args(["--initrd".as_ref(), initrd.as_os_str()])
    }

    /// Without either.
    pub fn without_guest() -> Self {
        let this = env::current_exe().expect("the path of this program");
        let beside = || this.with_file_name("kvm-bpf-vmm");
        let program = env::var_os("VMM").map_or_else(beside, PathBuf::from);
        let directory = TempDir::new().expect("a directory");
        let mut command = Command::new(program);
        command
            .arg("--report")
            .arg(directory.as_path().join("report"));
        Vmm { command, directory }
    }

    /// With more of the command line.
    pub fn args(mut self, args: impl IntoIterator<Item: AsRef<OsStr>>) -> Self {
        self.command.args(args);
        self
    }

    /// With a device of programs: `FILE@ADDRESS`, and what may follow it.
    pub fn bpf(self, device: impl AsRef<str>) -> Self {
        self.args(["--bpf", device.as_ref()])
    }

    /// With what the guest is to do (`selftests/src/guest_init`).
    pub fn append(self, words: &str) -> Self {
        self.args(["--append", &format!("quiet {words}")])
    }

    /// Starts it.
    #[track_caller]
    pub fn start(self) -> Running {
        Running::start(self.command, Some(self.directory))
    }

    /// Runs it to its end, for the usual time at most.
    #[track_caller]
    pub fn run(self) -> Finished {
        self.run_within(GUEST)
    }

    /// The same within another time.
    #[track_caller]
    pub fn run_within(self, limit: Duration) -> Finished {
        self.start().finish(limit)
    }

    /// As a command, whose output goes elsewhere; and the directory with its report.
    pub fn into_command(self) -> (Command, TempDir) {
        (self.command, self.directory)
    }

    /// Fails unless it ends with status 1 within half a minute and prints so many lines (any, if
    /// none is named), the first of which has each of the words.  Returns that line.
    #[track_caller]
    pub fn refuses(self, lines: Option<usize>, words: &[&str]) -> String {
        let got = self.run_within(Duration::from_secs(30));
        assert_eq!(got.status, Some(1), "the VMM's status");
        if let Some(lines) = lines {
            assert_eq!(got.lines.len(), lines, "lines");
        }
        let first = got.lines.first().expect("a line").text.clone();
        for word in words {
            assert!(first.contains(word), "wanted {word:?} in {first:?}");
        }
        first
    }
}
