// SPDX-License-Identifier: Apache-2.0 OR MIT

//! First process of the host kernel: runs the job that the kernel's command line names after "--"
//! and powers off.
//!
//! | job | what |
//! | --- | --- |
//! | `selftests [ARG...]` | the test program, with its arguments |
//! | `kselftests` | tests of the kernel's own that are in `/in` |
//! | `bench [ARG...]` | the benchmark |
//! | `vmm [ARG...]` | the tests of the VMM with a Linux guest |
//! | `jail [ARG...]` | those of the one without privileges |
//! | `move [ARG...]` | those of guests that go on in another VMM |
//! | `save`, `restore` | those of one that goes on on another host |
//! | `distribution` | those with a distribution's kernel as guest |
//! | `demo` | what `scripts/run` shows |
//! | `run COMMAND...` | a command of the initramfs |
//! | `shell` | a shell on the console |
//!
//! Words of the form `NAME=VALUE` before the job are put into its environment.
//!
//! Kernel messages have the first console, and the job's status is the last of them:
//! "KVM-BPF-STATUS: N". The job has hvc0 for itself.

use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;
use std::{env, io};

use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::termios::{OutputFlags, SetArg, tcgetattr, tcsetattr};
use nix::sys::wait::{WaitStatus, wait};
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout};

/// Kinds of file systems and where they are; not every kernel has all of them.
const MOUNTS: [(&str, &str); 11] = [
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("tmpfs", "/tmp"),
    ("tmpfs", "/run"),
    ("debugfs", "/sys/kernel/debug"),
    ("tracefs", "/sys/kernel/tracing"),
    ("bpf", "/sys/fs/bpf"),
    ("cgroup2", "/sys/fs/cgroup"),
    ("devpts", "/dev/pts"),
    ("tmpfs", "/dev/shm"),
];

/// Of the job, and of all before it.
const ENVIRONMENT: [(&str, &str); 8] = [
    ("PATH", "/bin"),
    ("HOME", "/root"),
    ("TERM", "linux"),
    ("KVM_BPF_PROGS", "/progs"),
    ("KVM_BPF_DEVICES", "/devices"),
    ("KERNEL", "/guest/kernel"),
    ("INITRD", "/guest/initramfs"),
    ("DEVICE", "/devices/regbank.bpf.o"),
];

/// The status of a host without KVM.
const NO_KVM: i32 = 254;
/// And of a job that is none.
const NO_JOB: i32 = 2;
/// And of one that cannot be started.
const NOT_STARTED: i32 = 127;

const KMSG: &str = "/dev/kmsg";
const KMEMLEAK: &str = "/sys/kernel/debug/kmemleak";

fn main() {
    let status = run().unwrap_or_else(|error| {
        println!("init: {error}");
        NOT_STARTED
    });
    let _ = tell_leaks();
    let _ = fs::write(KMSG, format!("KVM-BPF-STATUS: {status}\n"));
    // A pause to let the last of the job's output out of the console.
    sleep(Duration::from_secs(1));
    let Err(error) = reboot(RebootMode::RB_POWER_OFF);
    panic!("reboot(2): {error}");
}

/// Returns the status of the job.
fn run() -> io::Result<i32> {
    command("/bin/busybox", &["--install", "-s", "/bin"])?;
    fs::create_dir_all("/root")?;
    for (kind, at) in MOUNTS {
        let _ = fs::create_dir_all(at);
        let _ = mount(Some(kind), at, Some(kind), MsFlags::empty(), None::<&str>);
    }
    // Not every kernel has that, either.
    command("ifconfig", &["lo", "up"])?;

    let words: Vec<_> = env::args().skip(1).collect();
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    let settings = words.iter().take_while(|word| word.contains('='));
    let (settings, words) = words.split_at(settings.count());
    take_console(words != ["shell"])?;

    let module = load_modules()?;
    if !Path::new("/dev/kvm").exists() {
        println!("the host has no /dev/kvm");
        return Ok(NO_KVM);
    }
    let Some(mut job) = job(words) else {
        println!("no such job: '{}'", words.join(" "));
        return Ok(NO_JOB);
    };
    job.envs(ENVIRONMENT);
    job.envs(module.map(|file| ("KVM_BPF_MODULE", file)));
    job.envs(settings.iter().filter_map(|word| word.split_once('=')));
    match job.spawn() {
        Ok(child) => status_of(child.id()),
        Err(error) => {
            println!("{}: {error}", job.get_program().display());
            Ok(NOT_STARTED)
        }
    }
}

/// The command of a job.
fn job(words: &[&str]) -> Option<Command> {
    let (&job, args) = words.split_first()?;
    let (program, args) = match job {
        "selftests" => ("kvm-bpf-selftests", args),
        "kselftests" => ("kvm-bpf-kselftests", args),
        "bench" => ("kvm-bpf-bench", args),
        "vmm" | "jail" | "move" | "save" | "restore" | "distribution" => {
            ("kvm-bpf-vmm-test", words)
        }
        "demo" => ("kvm-bpf-demo", args),
        "run" => (*args.first()?, &args[1..]),
        // Not cttyhack: the console that it would take is the kernel's.
        "shell" => ("setsid", &["-c", "sh", "-l"][..]),
        _ => return None,
    };
    let mut command = Command::new(program);
    command.args(args);
    Some(command)
}

/// Runs a command to its end, however that is.
fn command(program: &str, args: &[&str]) -> io::Result<()> {
    let mut command = Command::new(program);
    let status = command.args(args).envs(ENVIRONMENT).status();
    status.map_err(|error| io::Error::other(format!("{program}: {error}")))?;
    Ok(())
}

/// Has hvc0 for input and output; lines of a job end as it ends them.
fn take_console(is_raw: bool) -> io::Result<()> {
    let mut options = File::options();
    options.read(true).write(true).custom_flags(libc::O_NOCTTY);
    // Its device tells the kernel of it, which may have come so far before.
    let mut tries = 0..1000;
    let console = loop {
        match options.open("/dev/hvc0") {
            Err(_) if tries.next().is_some() => sleep(Duration::from_millis(10)),
            opened => break opened?,
        }
    };
    if is_raw {
        let mut settings = tcgetattr(&console)?;
        settings.output_flags.remove(OutputFlags::ONLCR);
        tcsetattr(&console, SetArg::TCSANOW, &settings)?;
    }
    dup2_stdin(&console)?;
    dup2_stdout(&console)?;
    dup2_stderr(&console)?;
    Ok(())
}

/// Loads KVM's; returns the file of the device's. Where KVM is built in there is nothing to load.
fn load_modules() -> io::Result<Option<PathBuf>> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let directory = Path::new("/lib/modules").join(release.trim());
    let Ok(modules) = fs::read_to_string(directory.join("modules.dep")) else {
        return Ok(None);
    };
    let processor = fs::read_to_string("/proc/cpuinfo")?;
    for (flag, module) in [("svm", "kvm_amd"), ("vmx", "kvm_intel")] {
        if processor.split_whitespace().any(|word| word == flag) {
            command("modprobe", &[module])?;
        }
    }
    command("modprobe", &["kvm_bpf"])?;
    // "FILE: FILES that it needs", from there on.
    let mut files = modules.lines().filter_map(|line| line.split(':').next());
    let file = files.find(|file| file.contains("/kvm_bpf.ko"));
    Ok(file.map(|file| directory.join(file)))
}

/// Waits for the job's end, and for that of all whose parents have left them to this process.
/// Returns the job's status, as a shell has it.
fn status_of(job: u32) -> io::Result<i32> {
    loop {
        match wait()? {
            WaitStatus::Exited(id, status) if id.as_raw() as u32 == job => return Ok(status),
            WaitStatus::Signaled(id, signal, _) if id.as_raw() as u32 == job => {
                return Ok(128 + signal as i32);
            }
            _ => {}
        }
    }
}

/// What leaked shows up in the kernel's log, where the runner looks.
fn tell_leaks() -> io::Result<()> {
    if !Path::new(KMEMLEAK).exists() {
        return Ok(());
    }
    fs::write(KMEMLEAK, "scan")?;
    sleep(Duration::from_secs(6));
    fs::write(KMEMLEAK, "scan")?;
    // A line is a message.
    for line in fs::read_to_string(KMEMLEAK)?.lines() {
        fs::write(KMSG, format!("{line}\n"))?;
    }
    Ok(())
}
