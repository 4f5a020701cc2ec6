// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What this process may do: no privileges, and system calls by what it is at.
//!
//! Documentation/privileges.md has the table that [`table`] prints, and a test compares them.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use caps::CapSet;
use libc::{c_int, c_long};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// What a thread is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It takes programs from the manager, and makes a VM, a vCPU and the device.
    SetUp,
    /// It runs the vCPU.
    Run,
    /// It takes other programs, and swaps them while the vCPU runs.
    Swap,
    /// It saves the device's state.
    Save,
    /// It has the device go on with a saved state.
    Restore,
    /// It takes commands, and starts the threads that do the rest.
    Command,
}

use Phase::{Command, Restore, Run, Save, SetUp, Swap};

impl Phase {
    const ALL: [Phase; 6] = [SetUp, Run, Swap, Save, Restore, Command];

    fn name(self) -> &'static str {
        match self {
            SetUp => "set-up",
            Run => "run",
            Swap => "hot swap",
            Save => "save",
            Restore => "restore",
            Command => "commands",
        }
    }
}

/// Which calls of that number are allowed.
#[derive(Clone, Copy, Debug)]
enum Only {
    All,
    /// ioctl(2) with this request.
    Request(u32),
    /// An argument, by its number, has this value.
    Value(u8, u64),
    /// None: it fails with ENOSYS, as on an older kernel.
    Missing,
    /// The memory is not executable: neither mmap(2)'s nor mprotect(2)'s argument 2 says so.
    NoExec,
}

#[derive(Clone, Copy, Debug)]
struct Rule {
    call: c_long,
    text: &'static str,
    only: Only,
    phases: &'static [Phase],
}

const fn rule(call: c_long, text: &'static str, only: Only, phases: &'static [Phase]) -> Rule {
    Rule {
        call,
        text,
        only,
        phases,
    }
}

const fn any(call: c_long, text: &'static str, phases: &'static [Phase]) -> Rule {
    rule(call, text, Only::All, phases)
}

const fn kvm(text: &'static str, request: u32, phases: &'static [Phase]) -> Rule {
    rule(libc::SYS_ioctl, text, Only::Request(request), phases)
}

/// What any thread does: allocates memory, waits for another, says something, ends.
const ANY: &[Phase] = &Phase::ALL;

/// All that is allowed, on all architectures.
const RULES: &[Rule] = &[
    kvm("KVM_RUN", 0xae80, &[Run]),
    kvm(
        "KVM_SET_DEVICE_ATTR",
        0x4018_aee1,
        &[SetUp, Swap, Save, Restore],
    ),
    kvm("KVM_HAS_DEVICE_ATTR", 0x4018_aee3, &[SetUp, Swap]),
    kvm("KVM_CREATE_DEVICE", 0xc00c_aee0, &[SetUp]),
    kvm("KVM_ENABLE_CAP", 0x4068_aea3, &[SetUp]),
    kvm("KVM_CREATE_VM", 0xae01, &[SetUp]),
    kvm("KVM_GET_VCPU_MMAP_SIZE", 0xae04, &[SetUp]),
    kvm("KVM_SET_USER_MEMORY_REGION", 0x4020_ae46, &[SetUp]),
    kvm("KVM_CREATE_VCPU", 0xae41, &[SetUp]),
    any(libc::SYS_sendmsg, "sendmsg", &[Swap]),
    any(libc::SYS_sendto, "sendto", &[SetUp, Swap]),
    any(libc::SYS_recvmsg, "recvmsg", &[SetUp, Swap]),
    any(libc::SYS_recvfrom, "recvfrom", &[SetUp, Swap]),
    rule(
        libc::SYS_openat,
        "openat",
        Only::Value(2, READ_ONLY),
        &[SetUp, Swap],
    ),
    any(libc::SYS_statx, "statx", &[SetUp, Swap]),
    any(libc::SYS_read, "read", &[SetUp, Swap, Command]),
    any(libc::SYS_close, "close", &[SetUp, Swap, Command]),
    rule(
        libc::SYS_fcntl,
        "fcntl",
        Only::Value(1, DUPLICATE),
        &[SetUp],
    ),
    any(libc::SYS_rt_sigreturn, "rt_sigreturn", &[Run]),
    any(libc::SYS_ppoll, "ppoll", &[Command]),
    // A filter cannot see its flags, which are in memory. The C library takes clone(2) then.
    rule(libc::SYS_clone3, "clone3", Only::Missing, &[Command]),
    rule(libc::SYS_clone, "clone", Only::Value(0, THREAD), &[Command]),
    any(libc::SYS_getpid, "getpid", &[Command]),
    any(libc::SYS_tgkill, "tgkill", &[Command]),
    any(libc::SYS_clock_nanosleep, "clock_nanosleep", &[Command]),
    rule(
        libc::SYS_prctl,
        "prctl",
        Only::Value(0, NO_NEW_PRIVS),
        &[Command],
    ),
    any(libc::SYS_seccomp, "seccomp", &[Command]),
    any(libc::SYS_write, "write", ANY),
    any(libc::SYS_brk, "brk", ANY),
    rule(libc::SYS_mmap, "mmap", Only::NoExec, ANY),
    rule(libc::SYS_mprotect, "mprotect", Only::NoExec, ANY),
    any(libc::SYS_mremap, "mremap", ANY),
    any(libc::SYS_munmap, "munmap", ANY),
    any(libc::SYS_madvise, "madvise", ANY),
    any(libc::SYS_futex, "futex", ANY),
    any(libc::SYS_gettid, "gettid", &[Command]),
    any(libc::SYS_clock_gettime, "clock_gettime", ANY),
    any(libc::SYS_rt_sigprocmask, "rt_sigprocmask", ANY),
    any(libc::SYS_sigaltstack, "sigaltstack", ANY),
    any(libc::SYS_set_robust_list, "set_robust_list", &[Command]),
    any(libc::SYS_rseq, "rseq", &[Command]),
    any(libc::SYS_sched_getaffinity, "sched_getaffinity", &[Command]),
    any(libc::SYS_exit, "exit", ANY),
    any(libc::SYS_exit_group, "exit_group", ANY),
];

/// How std opens a file to read.
const READ_ONLY: u64 = (libc::O_RDONLY | libc::O_CLOEXEC) as u64;
const DUPLICATE: u64 = libc::F_DUPFD_CLOEXEC as u64;
/// What pthread_create(3) of the GNU C library asks for where there is no clone3(2).
const THREAD: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u64;
const NO_NEW_PRIVS: u64 = libc::PR_SET_NO_NEW_PRIVS as u64;

/// What differs by architecture: how vCPUs get their registers.
const OF_X86_64: &[Rule] = &[
    kvm("KVM_GET_SREGS", 0x8138_ae83, &[SetUp]),
    kvm("KVM_SET_SREGS", 0x4138_ae84, &[SetUp]),
    kvm("KVM_SET_REGS", 0x4090_ae82, &[SetUp]),
];
const OF_AARCH64: &[Rule] = &[
    kvm("KVM_ARM_PREFERRED_TARGET", 0x8020_aeaf, &[SetUp]),
    kvm("KVM_ARM_VCPU_INIT", 0x4020_aeae, &[SetUp]),
    kvm("KVM_SET_ONE_REG", 0x4010_aeac, &[SetUp]),
];

/// What is allowed here.
fn rules() -> impl Iterator<Item = &'static Rule> {
    let own = match cfg!(target_arch = "x86_64") {
        true => OF_X86_64,
        false => OF_AARCH64,
    };
    RULES.iter().chain(own)
}

impl Rule {
    /// The rule in words.
    fn describe(&self, place: &str) -> String {
        let text = self.text;
        match self.only {
            Only::All => format!("`{text}`"),
            Only::Request(request) => format!("ioctl `{text}` (`{request:#x}`{place})"),
            Only::Value(argument, value) => {
                format!("`{text}`, argument {argument} is `{value:#x}`")
            }
            Only::Missing => format!("`{text}`, fails with `ENOSYS`"),
            Only::NoExec => format!("`{text}` without `PROT_EXEC`"),
        }
    }
}

/// The table of what is allowed when, as Markdown.
pub fn table() -> String {
    let mut text = String::from("| system call |");
    for phase in Phase::ALL {
        _ = write!(text, " {} |", phase.name());
    }
    text.push_str("\n| --- |");
    text.push_str(&" --- |".repeat(Phase::ALL.len()));
    text.push('\n');
    for (place, rules) in [
        ("", RULES),
        (", x86-64", OF_X86_64),
        (", arm64", OF_AARCH64),
    ] {
        for rule in rules {
            _ = write!(text, "| {} |", rule.describe(place));
            for phase in Phase::ALL {
                let mark = match rule.phases.contains(&phase) {
                    true => " x |",
                    false => " |",
                };
                text.push_str(mark);
            }
            text.push('\n');
        }
    }
    text
}

/// The filter of some phases: what is not allowed traps.
fn filter(phases: &[Phase]) -> Result<BpfProgram> {
    let mut allowed: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut always = Vec::new();
    for rule in rules() {
        if !rule.phases.iter().any(|phase| phases.contains(phase)) {
            continue;
        }
        let condition = match rule.only {
            // Of two filters the stricter one decides: that of `missing()`.
            Only::All | Only::Missing => {
                always.push(rule.call);
                continue;
            }
            Only::Request(request) => compare(1, SeccompCmpOp::Eq, request.into())?,
            Only::Value(argument, value) => compare(argument, SeccompCmpOp::Eq, value)?,
            Only::NoExec => compare(2, SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64), 0)?,
        };
        let rules = allowed.entry(rule.call).or_default();
        rules.push(SeccompRule::new(vec![condition])?);
    }
    // No condition at all is any.
    allowed.extend(always.into_iter().map(|call| (call, Vec::new())));
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let filter = SeccompFilter::new(allowed, SeccompAction::Trap, SeccompAction::Allow, arch)?;
    Ok(filter.try_into()?)
}

/// The filter that has calls fail which are to be missing: a filter has one answer to what it matches.
fn missing() -> Result<BpfProgram> {
    let calls = rules().filter(|rule| matches!(rule.only, Only::Missing));
    let answer = SeccompAction::Errno(libc::ENOSYS as u32);
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let calls = calls.map(|rule| (rule.call, Vec::new())).collect();
    let filter = SeccompFilter::new(calls, SeccompAction::Allow, answer, arch)?;
    Ok(filter.try_into()?)
}

fn compare(argument: u8, op: SeccompCmpOp, value: u64) -> Result<SeccompCondition> {
    Ok(SeccompCondition::new(
        argument,
        SeccompCmpArgLen::Dword,
        op,
        value,
    )?)
}

/// Filters that are made before there is one: to make them takes memory, not rights.
#[derive(Clone, Debug)]
pub struct Filters(Vec<(Phase, BpfProgram)>);

impl Filters {
    /// The filters of all phases.
    pub fn new() -> Result<Self> {
        let each = Phase::ALL
            .iter()
            .map(|&phase| Ok((phase, filter(&[phase])?)));
        Ok(Filters(each.collect::<Result<_>>()?))
    }

    /// Has this process do no more than its threads may.
    pub fn enter(&self) -> Result<()> {
        // With the first thread the C library sets up what it wants for all of them.
        thread::spawn(|| ())
            .join()
            .map_err(|_| "a thread panicked")?;
        // SAFETY: the handler calls nothing but write(2) and _exit(2).
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_sigsys as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            if libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut()) != 0 {
                return Err(std::io::Error::last_os_error().into());
            }
        }
        apply_filter(&missing()?)?;
        Ok(apply_filter(&filter(&Phase::ALL)?)?)
    }

    /// Starts a thread that can do what the phase needs, and nothing else.
    pub fn start<T: Send + 'static>(
        &self,
        phase: Phase,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> JoinHandle<Result<T>> {
        let own = self.0.iter().find(|(own, _)| *own == phase);
        let program = own.map(|(_, program)| program.clone()).unwrap_or_default();
        thread::spawn(move || {
            apply_filter(&program)?;
            work()
        })
    }

    /// Does something on a thread of its phase.
    pub fn run<T: Send>(&self, phase: Phase, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let own = self.0.iter().find(|(own, _)| *own == phase);
        let program = own
            .map(|(_, program)| program.as_slice())
            .unwrap_or_default();
        let (sender, receiver) = mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(move || {
                let applied = apply_filter(program).map_err(Into::into);
                _ = sender.send(applied.and_then(|()| work()));
            });
        });
        receiver.recv()?
    }
}

/// Says which system call was forbidden, and ends the process.
extern "C" fn on_sigsys(_signal: c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    /// Where the structure has the number of the call: behind `si_code`, and an address.
    const NUMBER: usize = 24;

    // SAFETY: the kernel gives the handler such a structure, which for this signal has the number
    // there.
    let number = unsafe { info.cast::<c_int>().byte_add(NUMBER).read() };
    let mut text = *b"kvm-bpf-jailed-vmm: forbidden system call      \n";
    let (mut at, mut rest) = (text.len() - 2, number.unsigned_abs());
    while rest > 0 && text[at] == b' ' {
        text[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        at -= 1;
    }
    // SAFETY: the text is there; the process ends at once.
    unsafe {
        libc::write(2, text.as_ptr().cast(), text.len());
        libc::_exit(128 + libc::SIGSYS);
    }
}

/// Gives up all privileges for good, and says what is left.
pub fn drop_privileges() -> Result<String> {
    const NOBODY: libc::uid_t = 65534;

    // The bounding set while this still may change it.
    if caps::has_cap(None, CapSet::Effective, caps::Capability::CAP_SETPCAP)? {
        caps::clear(None, CapSet::Bounding)?;
    }
    let check = |result: c_int| match result {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    };
    // SAFETY: no pointers but an empty list. There are no other threads so far.
    unsafe {
        if libc::geteuid() == 0 {
            check(libc::setgroups(0, std::ptr::null()))?;
            check(libc::setresgid(NOBODY, NOBODY, NOBODY))?;
            check(libc::setresuid(NOBODY, NOBODY, NOBODY))?;
        }
    }
    for set in [
        CapSet::Ambient,
        CapSet::Inheritable,
        CapSet::Effective,
        CapSet::Permitted,
    ] {
        caps::clear(None, set)?;
    }
    // SAFETY: no pointers.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
    let status = fs::read_to_string("/proc/self/status")?;
    let wanted = ["Uid:", "CapPrm:", "CapEff:", "CapBnd:", "NoNewPrivs:"];
    let lines = status
        .lines()
        .filter(|line| wanted.iter().any(|name| line.starts_with(name)));
    let words: Vec<_> = lines.flat_map(str::split_whitespace).collect();
    Ok(words.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_documentation() {
        let document = include_str!("../../../Documentation/privileges.md");
        let table = table();
        assert!(document.contains(&table), "wanted this in it:\n{table}");
    }

    /// The system calls that threads make by themselves. One that is forbidden ends this process.
    #[test]
    fn every_phase_has_what_a_thread_needs() {
        let filters = Filters::new().unwrap();
        for phase in Phase::ALL {
            let bytes = filters.run(phase, || {
                eprintln!("{phase:?}");
                Ok(vec![1_u8; 1 << 20].len())
            });
            assert_eq!(bytes.unwrap(), 1 << 20);
            let started = filters.start(phase, || Ok(String::from("it ran")));
            assert_eq!(started.join().unwrap().unwrap(), "it ran");
        }
    }

    /// Does something in a process of its own, which ends with status 0 behind that; returns how it
    /// ended.
    fn status_of(work: impl FnOnce()) -> c_int {
        // SAFETY: the child does this and ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            // SAFETY: the process ends.
            unsafe { libc::_exit(done.is_err().into()) };
        }
        let mut status = 0;
        // SAFETY: the child is ours, and the status a local.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        status
    }

    #[test]
    fn what_is_no_rule_is_forbidden() {
        let status = status_of(|| {
            apply_filter(&filter(&Phase::ALL).unwrap()).unwrap();
            // SAFETY: no command of bpf(2) has this number.
            unsafe { libc::syscall(libc::SYS_bpf, -1, 0, 0) };
        });
        assert!(libc::WIFSIGNALED(status), "{status:#x}");
        assert_eq!(libc::WTERMSIG(status), libc::SIGSYS);
    }

    /// clone3(2) could make more than a thread; threads start without.
    #[test]
    fn threads_are_all_that_is_started() {
        let status = status_of(|| {
            let filters = Filters::new().unwrap();
            filters.enter().unwrap();
            // SAFETY: without arguments it starts nothing.
            let result = unsafe { libc::syscall(libc::SYS_clone3, 0, 0) };
            let error = std::io::Error::last_os_error().raw_os_error();
            assert_eq!((result, error), (-1, Some(libc::ENOSYS)));
            assert_eq!(filters.run(Phase::Run, || Ok(1)).unwrap(), 1);
        });
        assert_eq!(status, 0, "{status:#x}");
        let status = status_of(|| {
            Filters::new().unwrap().enter().unwrap();
            // SAFETY: as fork(2); parent and child end at once.
            unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
        });
        // The handler says so and ends the process.
        assert!(libc::WIFEXITED(status), "{status:#x}");
        assert_eq!(libc::WEXITSTATUS(status), 128 + libc::SIGSYS);
    }
}
