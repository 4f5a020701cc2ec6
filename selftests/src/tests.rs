// SPDX-License-Identifier: Apache-2.0 OR MIT

//! All tests, by topic.

use std::io::ErrorKind;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::process::Command;
use std::{env, fs};

use kvm_bpf::{Note, Programs};
use kvm_bpf_selftests::bpf::{Prog, Refused};
use kvm_bpf_selftests::guest::Vcpu;
use kvm_bpf_selftests::harness::Errno;
use kvm_bpf_vmm::userspace;
use libtest_mimic::Trial;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Lists the functions of a topic that are tests, as `topic::function`. One that is in a file of its
/// own is listed as `file::function`, which does not change its name.
macro_rules! tests {
    ($($(#[$attribute:meta])? $test:ident $(::$in_file:ident)?),+ $(,)?) => {
        pub(super) fn all() -> Vec<libtest_mimic::Trial> {
            [$($(#[$attribute])? kvm_bpf_selftests::harness::trial(
                concat!(module_path!(), "::", function!($test $($in_file)?))
                    .trim_start_matches("kvm_bpf_selftests::tests::"),
                $test $(::$in_file)?,
            )),+]
            .into()
        }
    };
}

/// The name of a function in a list of tests, whatever its file.
macro_rules! function {
    ($function:ident) => {
        stringify!($function)
    };
    ($file:ident $function:ident) => {
        stringify!($function)
    };
}

/// Fails unless the first value equals the second; says what of, wanted and got.
macro_rules! assert_got {
    ($got:expr, $wanted:expr $(,)?) => {
        assert_got!($got, $wanted, stringify!($got))
    };
    ($got:expr, $wanted:expr, $what:literal) => {
        assert_got!($got, $wanted, format_args!($what))
    };
    ($got:expr, $wanted:expr, $what:literal, $($arg:expr),+ $(,)?) => {
        assert_got!($got, $wanted, format_args!($what, $($arg),+))
    };
    ($got:expr, $wanted:expr, $what:expr $(,)?) => {
        match (&$got, &$wanted) {
            (got, wanted) => assert!(
                got == wanted,
                "{}: wanted {wanted:x?}, got {got:x?}",
                $what
            ),
        }
    };
}

pub use doorbell::be_the_peer;

mod access;
mod bell;
mod bpftool;
mod builder;
mod bus;
mod charged;
mod context;
mod device;
mod doorbell;
mod fault;
mod fuzz;
mod info;
mod inspect;
mod irq;
mod kfunc;
mod lifetime;
mod mem;
mod object;
mod page;
mod perms;
#[cfg(target_arch = "x86_64")]
mod pio;
#[cfg(not(target_arch = "x86_64"))]
#[path = "tests/no_pio.rs"]
mod pio;
mod pl031;
mod pl061;
mod programs;
mod regbank;
mod region;
mod replace;
mod rights;
mod state;
mod stress;
mod swap;
#[cfg(target_arch = "x86_64")]
mod uart16550;
mod vcpufreq;
mod verifier;
mod virtio;
mod virtio_regs;
mod work;

/// Where most tests have their region.
const ADDR: u64 = 0xd000_0000;
/// And its size.
const SIZE: u64 = 0x1000;

/// A value whose bytes all differ and whose every half has its sign bit set.
const PATTERN: u64 = 0xf8e7_d6c5_b4a3_9281;

/// Every test; the first says whether this is the right kernel at all.
pub fn all() -> Vec<Trial> {
    [
        device::all(),
        programs::all(),
        builder::all(),
        bell::all(),
        bpftool::all(),
        region::all(),
        bus::all(),
        rights::all(),
        perms::all(),
        info::all(),
        inspect::all(),
        charged::all(),
        access::all(),
        pio::all(),
        context::all(),
        swap::all(),
        object::all(),
        replace::all(),
        state::all(),
        state::slow(),
        page::all(),
        lifetime::all(),
        irq::all(),
        kfunc::all(),
        work::all(),
        mem::all(),
        virtio::all(),
        virtio_regs::all(),
        doorbell::all(),
        fault::all(),
        stress::all(),
        fuzz::all(),
        verifier::all(),
        regbank::all(),
        pl031::all(),
        pl061::all(),
        vcpufreq::all(),
        #[cfg(target_arch = "x86_64")]
        uart16550::all(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Fails unless an ioctl returned so.
#[track_caller]
fn assert_errno<T: std::fmt::Debug>(what: &str, got: Result<T, Errno>, wanted: i32) {
    let wanted = Errno(wanted);
    match got {
        Err(errno) if errno == wanted => {}
        Err(errno) => panic!("{what}: wanted {wanted:?}, got {errno:?}"),
        Ok(value) => panic!("{what}: wanted {wanted:?}, got {value:?}"),
    }
}

/// Fails unless the verifier refused a program and its log has the reason.
#[track_caller]
fn assert_refused(what: &str, got: Result<Prog, Refused>, reason: &str) {
    match got {
        Err(refused) if refused.log.contains(reason) => {}
        Err(refused) => panic!("{what}: wanted {reason:?}, got {refused}"),
        Ok(_) => panic!("{what}: wanted {reason:?}, but it loads"),
    }
}

/// Fails unless the model in user space says of itself what the note does.
#[track_caller]
fn assert_described(name: &str, note: &Note) {
    let description = userspace::describe(name).expect("the model's description");
    assert_got!(note.mmio_size, description.size, "{name}: size");
    assert_got!(note.nr_irqs, description.nr_irqs, "{name}: interrupts");
    assert_got!(
        note.compatible,
        description.compatible,
        "{name}: compatible"
    );
}

/// A program of the kernel tree, which `scripts/userspace` puts beside this one.
fn beside_this_program(name: &str) -> Command {
    let this = env::current_exe().expect("the path of this program");
    Command::new(this.with_file_name(name))
}

/// Element 0 of a program's array.
fn element(image: &Programs, map: &str) -> Vec<u8> {
    let map = image.map(map).expect("the program's map");
    map.lookup(&[0; 4])
        .expect("BPF_MAP_LOOKUP_ELEM")
        .expect("element 0")
}

/// A system call that returns a file descriptor.
fn system_call(name: &str, number: libc::c_long, args: [usize; 5]) -> OwnedFd {
    let [a, b, c, d, e] = args;
    // SAFETY: those here take numbers and strings only.
    let fd = unsafe { libc::syscall(number, a, b, c, d, e) };
    assert!(fd >= 0, "{name}: {:?}", Errno::last());
    // SAFETY: the kernel has just given it to us.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

/// A file descriptor that another process has open, by its number there.
fn fd_of(process: u32, number: RawFd) -> OwnedFd {
    let args = [process as usize, 0, 0, 0, 0];
    let process = system_call("pidfd_open", libc::SYS_pidfd_open, args);
    let args = [process.as_raw_fd() as usize, number as usize, 0, 0, 0];
    system_call("pidfd_getfd", libc::SYS_pidfd_getfd, args)
}

/// How many files this process has open.
fn open_files() -> usize {
    let fds = fs::read_dir("/proc/self/fd").expect("/proc/self/fd");
    fds.count()
}

/// An eventfd that does not block.
#[track_caller]
fn eventfd() -> EventFd {
    EventFd::new(EFD_NONBLOCK).expect("eventfd")
}

/// Takes what was signalled so far; 0 if nothing was. The eventfd must not block.
fn taken(eventfd: &EventFd) -> u64 {
    match eventfd.read() {
        Ok(count) => count,
        Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
        Err(error) => panic!("reading an eventfd: {error}"),
    }
}

/// Accesses in and around a register of 4 bytes that are none to all of it, and to nothing
/// else: reads give 0, and none leaves the kernel. That writes are ignored is for the
/// caller to look at.
fn other_accesses_of(vcpu: &mut Vcpu, register: u64) {
    let mut other = vec![(0, 1), (1, 1), (3, 1), (0, 2), (2, 2)];
    if register.is_multiple_of(8) {
        other.push((0, 8));
    }
    // On arm64 these do not reach KVM: a guest without MMU takes a fault.
    if cfg!(target_arch = "x86_64") {
        other.extend([(1, 4), (2, 4), (1, 2)]);
    }
    for (offset, width) in other {
        let addr = register + offset;
        let exits = vcpu.write(addr, width, u64::MAX);
        assert_got!(exits, [], "{width}-byte write at {addr:#x}");
        let read = vcpu.read(addr, width);
        let got = (read.value, read.exits);
        assert_got!(got, (0, vec![]), "{width}-byte read at {addr:#x}");
    }
}
