// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The host: its clock, and what it is.

use std::time::{Duration, Instant};
use std::{env, fs, mem, thread};

use kvm_bpf_selftests::guest::ticks;
use kvm_bpf_selftests::harness::set_scheduler;

/// What `scripts/boot` says of the machine.
const MACHINE: &str = "KVM_BPF_MACHINE";
/// What `scripts/boot` says of the kernel's options.
const OPTIONS: &str = "KVM_BPF_OPTIONS";

/// Options that change what an access costs.
const TELLING: [&str; 13] = [
    "CC_OPTIMIZE_FOR_PERFORMANCE",
    "CC_OPTIMIZE_FOR_SIZE",
    "JUMP_LABEL",
    "CPU_MITIGATIONS",
    "PREEMPT",
    "PREEMPT_LAZY",
    "PREEMPT_VOLUNTARY",
    "FUNCTION_TRACER",
    "STACKPROTECTOR_STRONG",
    "PARAVIRT",
    "LOCKDEP",
    "KASAN",
    "DEBUG_ATOMIC_SLEEP",
];

/// Whether the clock counts instructions.
pub fn counts_instructions() -> bool {
    env::var(MACHINE).is_ok_and(|machine| machine.split(',').any(|word| word == "icount"))
}

/// A clock that counts instructions where there is one, else nanoseconds.
#[derive(Debug)]
pub enum Clock {
    Instructions,
    Time(Instant),
}

impl Clock {
    pub fn new() -> Self {
        if counts_instructions() {
            Clock::Instructions
        } else {
            Clock::Time(Instant::now())
        }
    }

    pub fn now(&self) -> u64 {
        match self {
            Clock::Instructions => ticks(),
            Clock::Time(start) => start.elapsed().as_nanos() as u64,
        }
    }
}

pub fn unit() -> &'static str {
    if counts_instructions() {
        "instructions of the host"
    } else {
        "nanoseconds"
    }
}

/// Few where rounds repeat to the instruction.
pub fn default_accesses() -> u64 {
    if counts_instructions() { 100 } else { 20_000 }
}

/// Waits for what the kernel has put off until later: what it frees, for instance, of the guest
/// before this one.
pub fn settle() {
    thread::sleep(Duration::from_millis(500));
}

/// Gives the calling thread precedence over all that have no such need.
pub fn run_at_once() {
    set_scheduler(libc::SCHED_FIFO, 1);
}

/// Has the calling thread share the processor, as all do at first.
pub fn run_in_turn() {
    set_scheduler(libc::SCHED_OTHER, 0);
}

/// Has the calling thread not take the processor from another one when it wakes.
pub fn run_when_idle() {
    set_scheduler(libc::SCHED_BATCH, 0);
}

/// How often a thread of this process, or of another one, was switched away from.
pub fn switches(other: Option<u32>) -> u64 {
    // SAFETY: the structure is plain data, and the kernel fills it.
    let own = unsafe {
        let mut usage: libc::rusage = mem::zeroed();
        assert_eq!(libc::getrusage(libc::RUSAGE_SELF, &mut usage), 0);
        (usage.ru_nvcsw + usage.ru_nivcsw) as u64
    };
    own + other.map_or(0, switches_of)
}

/// The same of another process, whose threads stay.
fn switches_of(pid: u32) -> u64 {
    let path = format!("/proc/{pid}/task");
    let threads = fs::read_dir(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    threads
        .map(|thread| {
            let path = thread.expect("a thread").path().join("status");
            let status = fs::read_to_string(&path);
            let status = status.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            status
                .lines()
                .filter(|line| line.contains("ctxt_switches:"))
                .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
                .sum::<u64>()
        })
        .sum()
}

/// The first lines of a table.
pub fn head() {
    let version = fs::read_to_string("/proc/version").unwrap_or_default();
    println!("# kernel   {}", version.trim());
    println!("# options  {}", options());
    println!(
        "# machine  {}",
        env::var(MACHINE)
            .ok()
            .or_else(processor)
            .unwrap_or("unknown".to_string())
    );
}

/// Those of [`TELLING`] that are set, where that can be known.
fn options() -> String {
    if let Ok(options) = env::var(OPTIONS) {
        return options.replace(',', " ");
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let Ok(config) = fs::read_to_string(format!("/boot/config-{}", release.trim())) else {
        return "unknown".to_string();
    };
    let set: Vec<&str> = config
        .lines()
        .filter_map(|line| line.strip_prefix("CONFIG_")?.strip_suffix("=y"))
        .filter(|name| TELLING.contains(name))
        .collect();
    set.join(" ")
}

fn processor() -> Option<String> {
    let info = fs::read_to_string("/proc/cpuinfo").ok()?;
    let model = info.lines().find(|line| line.starts_with("model name"))?;
    Some(model.split(':').nth(1)?.trim().to_string())
}
