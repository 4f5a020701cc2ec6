// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A VMM without privileges, whose guest has a clock made of eBPF programs.
//!
//! It takes the programs from `kvm-bpf-manager`, cannot call bpf(2), and each of its threads can do
//! what it is for: see README.md. It uses nothing of the library but what needs no C.

mod guest;
mod jail;

use std::error::Error;
use std::io::{self, BufRead, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::thread::JoinHandleExt;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_bpf::perms::{self, Allow};
use kvm_bpf::{Abi, Device, ImageDevice, OnLoss, Permissions, Place, Programs, State};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use guest::{CLOCK, Memory};
use jail::{Filters, Phase};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const USAGE: &str = "usage: kvm-bpf-jailed-vmm MANAGER NAME

Runs a guest whose clock the programs of object file NAME are, as kvm-bpf-manager has it, which listens
at the path MANAGER. Commands come on standard input, one in each line: status, swap NAME,
save-restore NAME, another, new-vm, alarm SECONDS, quiet, busy, wait, forbidden, quit.

       kvm-bpf-jailed-vmm --rules

Prints the system calls that each phase is allowed.
";

const KVM_CREATE_VM: libc::c_ulong = 0xae01;

/// The signal that gets a vCPU out of `KVM_RUN`.
const KICK: libc::c_int = libc::SIGUSR1;

// --- the device part begins
/// Asks the manager for programs; they replace `running`, where there are such.
fn ask(manager: &UnixStream, request: &str, running: Option<&Programs>) -> Result<Programs> {
    let mut stream = manager;
    let sent = writeln!(stream, "{request}");
    if let (Ok(()), Some(running)) = (&sent, running) {
        running.send(manager)?;
    }
    // Where it does not listen, it may say why.
    let answer = line(stream).map_err(|error| sent.err().map_or(error, Into::into))?;
    if let Some(why) = answer.strip_prefix("error ") {
        return Err(format!("the manager refuses \"{request}\": {why}").into());
    }
    Ok(Programs::recv(manager)?)
}

/// Puts the clock into a VM.
fn plug(vm: &VmFd, abi: &Abi, programs: Programs, irq: &EventFd) -> Result<ImageDevice> {
    let builder = ImageDevice::builder(Device::with_abi(vm, abi)?, programs);
    Ok(builder.irq(0, irq)?.plug(Place::Memory(CLOCK))?)
}

/// Has other programs be the clock while the vCPU runs.
fn swap(manager: &UnixStream, name: &str, clock: &mut ImageDevice) -> Result<String> {
    let new = ask(manager, &format!("replace {name}"), Some(clock.programs()))?;
    let changes = clock.swap(new, OnLoss::Refuse, |_| ())?;
    Ok(changes.to_string())
}

/// Saves the clock of a VM that stands still.
fn save(clock: &ImageDevice) -> Result<State> {
    Ok(clock.save()?)
}

/// Has the clock of a new VM go on where the other one was.
fn restore(clock: &mut ImageDevice, state: &State) -> Result<()> {
    Ok(clock.restore(state)?)
}
// --- the device part ends

/// Gives up what the clock does not need: its programs may signal interrupts, set timers and sleep,
/// and be replaced by such; it has no other programs and no guest memory; and there is no other
/// device.
fn lock_down(vm: &VmFd, clock: &Device) -> Result<()> {
    let programs = Allow::IRQ | Allow::ASYNC | Allow::SLEEP;
    let vmm = Allow::REPLACE | Allow::SET_WORK | Allow::RUN;
    clock.restrict(Permissions::new(programs | vmm))?;
    Ok(perms::seal(vm)?)
}

/// Reads a line of the manager's, and nothing behind it: there come file descriptors.
fn line(mut stream: impl Read) -> Result<String> {
    const MAX: usize = 2000;

    let mut line = Vec::new();
    let mut byte = [0];
    while line.len() < MAX {
        stream.read_exact(&mut byte)?;
        if byte == *b"\n" {
            return Ok(String::from_utf8(line)?);
        }
        line.extend(byte);
    }
    Err("the manager's answer does not end".into())
}

/// What a vCPU thread and the others know of each other.
#[derive(Debug, Default)]
struct Running {
    stop: AtomicBool,
    /// Accesses of the clock that no program has handled.
    exits: AtomicU64,
}

/// A VM with its vCPU's thread.
struct Machine {
    /// The first to go: the device outlives no VM.
    clock: ImageDevice,
    vm: VmFd,
    running: Arc<Running>,
    thread: Option<JoinHandle<Result<VcpuFd>>>,
    /// What stands still.
    vcpu: Option<VcpuFd>,
}

impl Machine {
    /// What `vmm` has makes a VM, with these programs as its clock.
    fn new(vmm: &Vmm, programs: Programs) -> Result<Self> {
        let kvm = &vmm.kvm;
        // Of 40 bits: kvm-ioctls' default is all that an arm64 host has.
        let vm = kvm.create_vm_with_type(0)?;
        vmm.memory.give(&vm)?;
        let vcpu = guest::vcpu(kvm, &vm)?;
        let clock = plug(&vm, &vmm.abi, programs, &vmm.irq)?;
        lock_down(&vm, clock.device())?;
        Ok(Machine {
            clock,
            vm,
            running: Arc::default(),
            thread: None,
            vcpu: Some(vcpu),
        })
    }

    fn start(&mut self, filters: &Filters) {
        if let Some(mut vcpu) = self.vcpu.take() {
            let running = Arc::clone(&self.running);
            self.running.stop.store(false, SeqCst);
            let work = move || run(&mut vcpu, &running).map(|()| vcpu);
            self.thread = Some(filters.start(Phase::Run, work));
        }
    }

    fn stop(&mut self) -> Result<()> {
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        self.running.stop.store(true, SeqCst);
        // One kick may come before `KVM_RUN`.
        while !thread.is_finished() {
            // SAFETY: the thread has not been joined, and the signal has a handler.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), KICK) };
            thread::sleep(Duration::from_millis(1));
        }
        let vcpu = thread.join().map_err(|_| "the vCPU's thread panicked")?;
        self.vcpu = Some(vcpu?);
        Ok(())
    }
}

/// The vCPU stops before the guest's memory goes.
impl Drop for Machine {
    fn drop(&mut self) {
        // Nobody is left who could use its error.
        let _ = self.stop();
    }
}

/// Runs a vCPU until it is to stop.
fn run(vcpu: &mut VcpuFd, running: &Running) -> Result<()> {
    while !running.stop.load(SeqCst) {
        match vcpu.run() {
            Ok(VcpuExit::MmioRead(_, data)) => {
                data.fill(0xff);
                running.exits.fetch_add(1, SeqCst);
            }
            Ok(VcpuExit::MmioWrite(..)) => {
                running.exits.fetch_add(1, SeqCst);
            }
            Ok(exit) => return Err(format!("the guest ended: {exit:?}").into()),
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

extern "C" fn on_kick(_signal: libc::c_int) {}

/// Has the signal end `KVM_RUN`, and nothing else.
fn handle_kicks() -> io::Result<()> {
    // SAFETY: the handler does nothing; without SA_RESTART system calls end with EINTR.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_kick as *const () as usize;
        libc::sigaction(KICK, &action, std::ptr::null_mut())
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Waits for the clock's interrupt.
fn poll(irq: &EventFd, seconds: i64) -> io::Result<bool> {
    let time = libc::timespec {
        tv_sec: seconds,
        tv_nsec: 0,
    };
    let mut poll = libc::pollfd {
        fd: irq.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one structure, a time, and no mask of signals.
    match unsafe { libc::ppoll(&mut poll, 1, &time, std::ptr::null()) } {
        -1 => Err(io::Error::last_os_error()),
        count => Ok(count == 1),
    }
}

/// The VMM: what it has from before it is in the jail, and the VM.
struct Vmm {
    filters: Filters,
    kvm: Kvm,
    abi: Abi,
    manager: UnixStream,
    memory: Arc<Memory>,
    irq: EventFd,
}

impl Vmm {
    /// Has the manager load a file, and makes a VM with it: on a thread that may.
    fn machine(&self, name: &str) -> Result<Machine> {
        self.filters.run(Phase::SetUp, || {
            let programs = ask(&self.manager, &format!("load {name}"), None)?;
            Machine::new(self, programs)
        })
    }

    /// Has a new VM take the place of one that stands still. On an error that can go on.
    fn renew(&self, name: &str, machine: &mut Machine) -> Result<()> {
        let clock = &machine.clock;
        // It resumes the clock itself where it fails.
        let state = self.filters.run(Phase::Save, || save(clock))?;
        let new = self.machine(name).and_then(|mut new| {
            let clock = &mut new.clock;
            self.filters
                .run(Phase::Restore, || restore(clock, &state))?;
            Ok(new)
        });
        match new {
            Ok(new) => *machine = new,
            Err(error) => {
                let resumed = self.filters.run(Phase::Restore, || Ok(clock.resume()?));
                return Err(match resumed {
                    Ok(()) => error,
                    Err(other) => {
                        let (error, other) = (chain(error.as_ref()), chain(other.as_ref()));
                        format!("{error}; and the clock cannot go on: {other}").into()
                    }
                });
            }
        }
        Ok(())
    }

    /// Does what a line of the input says; nothing where there is no more to do.
    fn command(&self, command: &str, machine: &mut Machine) -> Result<Option<String>> {
        let shared = self.memory.shared();
        let words: Vec<_> = command.split_whitespace().collect();
        Ok(Some(match words[..] {
            ["status"] => format!(
                "reads {} exits {} backwards {} interrupt {}",
                shared.reads.load(SeqCst),
                machine.running.exits.load(SeqCst),
                shared.backwards.load(SeqCst),
                poll(&self.irq, 0)?,
            ),
            ["swap", name] => {
                let before = shared.reads.load(SeqCst);
                let swapped = || swap(&self.manager, name, &mut machine.clock);
                let changes = self.filters.run(Phase::Swap, swapped)?;
                let during = shared.reads.load(SeqCst).wrapping_sub(before);
                format!("during {during} reads: {changes}")
            }
            ["save-restore", name] => {
                machine.stop()?;
                let renewed = self.renew(name, machine);
                // The old one, where there is no new one.
                machine.start(&self.filters);
                renewed?;
                "in a new VM".to_string()
            }
            ["another"] => {
                let vm = &machine.vm;
                let another = || Ok(Device::with_abi(vm, &self.abi).map(drop)?);
                self.filters.run(Phase::SetUp, another)?;
                "there is another device".to_string()
            }
            // A new VM has no seal: only the filters keep it away.
            ["new-vm"] => {
                // Itself: kvm-ioctls' function makes a call behind it that is forbidden, too.
                // SAFETY: it takes a number.
                let new = || Ok(unsafe { libc::ioctl(self.kvm.as_raw_fd(), KVM_CREATE_VM, 0) });
                format!("returned {}", self.filters.run(Phase::Swap, new)?)
            }
            ["alarm", seconds] => match shared.arm(seconds.parse()?) {
                true => format!("in {seconds} s"),
                false => return Err("the guest does not arm it".into()),
            },
            [mood @ ("quiet" | "busy")] => match shared.set_quiet(mood == "quiet") {
                true => "the guest knows".to_string(),
                false => return Err("the guest does not run".into()),
            },
            ["wait"] => match poll(&self.irq, 60)? {
                true => format!("interrupts {}", self.irq.read()?),
                false => return Err("no interrupt within a minute".into()),
            },
            ["forbidden"] => {
                // SAFETY: no command of bpf(2) has this number.
                let result = unsafe { libc::syscall(libc::SYS_bpf, -1, 0, 0) };
                return Err(format!("bpf(2) returned {result}").into());
            }
            ["quit"] => {
                machine.stop()?;
                return Ok(None);
            }
            _ => return Err(format!("what is {command:?}?").into()),
        }))
    }
}

fn vmm(manager: &str, name: &str) -> Result<()> {
    handle_kicks()?;
    let kvm = Kvm::new()?;
    println!("privileges: {}", jail::drop_privileges()?);
    let manager = UnixStream::connect(manager)?;
    let abi = Abi::from_running_kernel()?;
    let filters = Filters::new()?;
    let memory = Arc::new(Memory::new()?);
    let irq = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
    filters.enter()?;

    let vmm = Vmm {
        filters,
        kvm,
        abi,
        manager,
        memory,
        irq,
    };
    let mut machine = vmm.machine(name)?;
    machine.start(&vmm.filters);
    println!("running: {name}");
    for command in io::stdin().lock().lines() {
        let command = command?;
        let first = command.split_whitespace().next().unwrap_or_default();
        match vmm.command(&command, &mut machine) {
            Ok(Some(answer)) => println!("{first}: {answer}"),
            Ok(None) => break,
            Err(error) => println!("{first}: error: {}", chain(error.as_ref())),
        }
    }
    machine.stop()
}

/// An error and its causes.
fn chain(error: &(dyn Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    let texts: Vec<_> = causes.map(|error| error.to_string()).collect();
    texts.join(": ")
}

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args().skip(1).collect();
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["--rules"] => {
            print!("{}", jail::table());
            return ExitCode::SUCCESS;
        }
        [manager, name] => vmm(manager, name),
        _ => {
            eprint!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kvm-bpf-jailed-vmm: {}", chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_device_part_is_as_short_as_the_readme_says() {
        let source = include_str!("main.rs");
        let (_, part) = source.split_once("--- the device part begins\n").unwrap();
        let (part, _) = part.split_once("// --- the device part ends\n").unwrap();
        let is_code = |line: &&str| !line.trim().is_empty() && !line.trim().starts_with("//");
        let lines = part.lines().filter(is_code).count();
        let readme = include_str!("../README.md");
        assert!(readme.contains(&format!("{lines} lines")), "{lines} lines");
    }
}
