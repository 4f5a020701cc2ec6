// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Skips with a reason, a time limit per test, and waiting with an end.

use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{env, fmt, io, mem, process};

use libtest_mimic::{Completion, Trial};

/// What a system call failed with.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

impl Errno {
    /// Of the calling thread's last system call.
    pub fn last() -> Self {
        Errno(io::Error::last_os_error().raw_os_error().unwrap_or(0))
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", io::Error::from_raw_os_error(self.0))
    }
}

/// How long a test may take before the whole run is given up, where it is not told to do more.
const TEST_LIMIT: Duration = Duration::from_secs(900);

/// How long a test waits for what the kernel does later, such as freeing after RCU.
const WAIT_LIMIT: Duration = Duration::from_secs(60);

/// Carries a reason from [`skip`] to the runner.
struct Skip(String);

/// Ends the test as ignored; for what the host lacks, never for what the series promises.
pub fn skip(reason: impl Into<String>) -> ! {
    resume_unwind(Box::new(Skip(reason.into())))
}

/// Makes a test of a function that panics when it fails.
pub fn trial(name: &'static str, test: fn()) -> Trial {
    // What the variables ask for, and as much again.
    let seconds = |name, share: u64| number_from_env(name, 0) / share;
    let more = seconds("KVM_BPF_ACCESSES", 50)
        + seconds("KVM_BPF_STRESS_MS", 500)
        + seconds("KVM_BPF_FUZZ_MS", 500)
        + seconds("KVM_BPF_LOADS", 10)
        + seconds("KVM_BPF_MODULE_LOADS", 1)
        + seconds("KVM_BPF_RACES", 3);
    trial_within(name, TEST_LIMIT + Duration::from_secs(more), test)
}

/// The same with another time limit.
pub fn trial_within(
    name: &'static str,
    limit: Duration,
    test: impl FnOnce() + Send + 'static,
) -> Trial {
    Trial::ignorable_test(name, move || {
        let _limit = Limit::new(name, limit);
        match catch_unwind(AssertUnwindSafe(test)) {
            Ok(()) => Ok(Completion::Completed),
            Err(payload) => match payload.downcast::<Skip>() {
                Ok(reason) => Ok(Completion::ignored_with(reason.0)),
                Err(panic) => resume_unwind(panic),
            },
        }
    })
}

/// Ends the process if it lives longer than the limit: a thread that hangs in
/// the kernel cannot be made to return.
struct Limit {
    sender: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Limit {
    fn new(name: &'static str, limit: Duration) -> Self {
        let (sender, receiver) = mpsc::channel::<()>();
        let thread = thread::spawn(move || {
            if receiver.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                println!("\ntest {name} is not done after {limit:?}: giving up");
                process::exit(124);
            }
        });
        Limit {
            sender: Some(sender),
            thread: Some(thread),
        }
    }
}

impl Drop for Limit {
    /// Waits for the thread: the next test may count threads.
    fn drop(&mut self) {
        self.sender = None;
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// The capability that loading programs needs.
pub const CAP_BPF: u32 = 39;

/// Leaves the calling thread those capabilities and no others.
#[track_caller]
pub fn set_capabilities(capabilities: &[u32]) {
    /// `_LINUX_CAPABILITY_VERSION_3`, whose sets have two words each.
    const VERSION: u32 = 0x2008_0522;

    let mask = capabilities
        .iter()
        .fold(0_u64, |mask, &cap| mask | 1 << cap);
    let (low, high) = (mask as u32, (mask >> 32) as u32);
    let header = [VERSION, 0];
    // Effective, permitted, inheritable: the low words, then the high ones.
    let sets = [low, low, 0, high, high, 0];
    // SAFETY: the raw system call reads both arrays and changes this thread alone.
    let result = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) };
    assert_eq!(result, 0, "capset to {capabilities:?}: {:?}", Errno::last());
}

/// Has the kernel kill this process when it calls bpf(2); whether there are such filters at all.
pub fn forbid_bpf() -> Result<(), Errno> {
    let instruction = |code: u32, jt, jf, k| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let mut filter = [
        // The number of the system call.
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        instruction(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            0,
            1,
            libc::SYS_bpf as u32,
        ),
        instruction(
            libc::BPF_RET | libc::BPF_K,
            0,
            0,
            libc::SECCOMP_RET_KILL_PROCESS,
        ),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the kernel reads the program and copies it.
    let result = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const program,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(Errno::last()),
    }
}

/// For a replacement that needs no pause: fails where vCPUs were to stop.
#[track_caller]
pub fn unpaused(_: &mut dyn FnMut()) {
    panic!("wanted the vCPUs to run on, got a pause");
}

/// Polls until a value is the wanted one; fails when it does not become so.
#[track_caller]
pub fn wait_for<T: PartialEq + fmt::Debug>(what: &str, wanted: T, mut get: impl FnMut() -> T) {
    let start = Instant::now();
    loop {
        let got = get();
        if got == wanted {
            return;
        }
        assert!(
            start.elapsed() < WAIT_LIMIT,
            "{what}: wanted {wanted:?} within {WAIT_LIMIT:?}, got {got:?}"
        );
        thread::sleep(Duration::from_millis(5));
    }
}

/// Runs on a thread that ends: for what stays with a thread, such as its credentials.
pub fn in_a_thread(body: impl FnOnce() + Send + 'static) {
    if let Err(panic) = thread::spawn(body).join() {
        resume_unwind(panic);
    }
}

/// Keeps the calling thread on a CPU.
#[track_caller]
pub fn stay_on(cpu: usize) {
    // SAFETY: a set of CPUs is plain bits, and the calls only read and write this one.
    let result = unsafe {
        let mut set: libc::cpu_set_t = mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &set)
    };
    assert_eq!(
        result,
        0,
        "sched_setaffinity to CPU {cpu}: {:?}",
        Errno::last()
    );
}

/// Gives the calling thread a policy of the scheduler, and a priority there.
#[track_caller]
pub fn set_scheduler(policy: libc::c_int, sched_priority: libc::c_int) {
    let param = libc::sched_param { sched_priority };
    // SAFETY: the parameter is a local.
    let result = unsafe { libc::sched_setscheduler(0, policy, &param) };
    assert_eq!(
        result,
        0,
        "sched_setscheduler to {policy}: {:?}",
        Errno::last()
    );
}

/// Runs in a child process that ends: for what a process with a single thread may do alone.
#[track_caller]
pub fn in_a_process(body: impl FnOnce()) {
    assert_eq!(status_of_a_process(body), 0, "a child process failed");
}

/// The same, for a process that may be killed: returns what waitpid(2) says.
#[track_caller]
pub fn status_of_a_process(body: impl FnOnce()) -> i32 {
    // SAFETY: the other threads of this process hold no locks that the child needs: they wait.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "fork: {:?}", Errno::last());
    if child == 0 {
        let result = catch_unwind(AssertUnwindSafe(body));
        // SAFETY: ends the process, and nothing of its parent's.
        unsafe { libc::_exit(result.is_err().into()) };
    }
    let mut status = 0;
    // SAFETY: the child is ours, and the status a local.
    let waited = unsafe { libc::waitpid(child, &mut status, 0) };
    assert_eq!(waited, child, "waitpid: {:?}", Errno::last());
    status
}

/// Repeats each of the workers on a thread of its own until `action` ends, well or not.
pub fn meanwhile<W: FnMut() + Send, R>(
    workers: impl IntoIterator<Item = W>,
    action: impl FnOnce() -> R,
) -> R {
    struct SetOnDrop<'a>(&'a AtomicBool);
    impl Drop for SetOnDrop<'_> {
        fn drop(&mut self) {
            self.0.store(true, SeqCst);
        }
    }

    // All of them, before one runs: protected KVM takes no vCPU later.
    let workers: Vec<W> = workers.into_iter().collect();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let end = SetOnDrop(&stop);
        let spawn = |mut worker: W| {
            let stop = &stop;
            scope.spawn(move || {
                while !stop.load(SeqCst) {
                    worker();
                }
            })
        };
        let threads: Vec<_> = workers.into_iter().map(spawn).collect();
        let result = action();
        drop(end);
        for thread in threads {
            thread.join().unwrap_or_else(|panic| resume_unwind(panic));
        }
        result
    })
}

/// A process that runs a test of this program, which finds in a variable what it is to do.
///
/// Killed when dropped: no other test is to meet it.
#[derive(Debug)]
pub struct Victim(Child);

impl Victim {
    /// Starts it.
    pub fn new(test: &str, variable: &str, value: &str) -> Self {
        let child = Command::new("/proc/self/exe")
            .args(["--exact", test])
            .env(variable, value)
            .stdout(Stdio::null())
            .spawn();
        Victim(child.expect("this program again"))
    }

    /// Its PID.
    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// Ends it, which nothing else has.
    pub fn kill(mut self) {
        self.0.kill().expect("SIGKILL");
        let status = self.0.wait().expect("waiting for the process");
        assert_eq!(
            status.signal(),
            Some(libc::SIGKILL),
            "how the process ended"
        );
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A number from the environment, for what takes long under emulation.
pub fn number_from_env(name: &str, default: u64) -> u64 {
    match env::var(name) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("wanted a number in {name}, got {text:?}")),
        Err(_) => default,
    }
}

/// Numbers that look random and depend on the seed only (xorshift64*).
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// The sequence of a seed.
    pub fn new(seed: u64) -> Self {
        // The state must not be 0; small seeds are spread over all bits.
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    /// A number from 0 up to, not with, a limit.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}
