// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A vCPU, which runs routines and writes down what reaches user space.

use std::fs::File;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Once};
use std::time::Duration;
use std::{mem, ptr};

use kvm_bindings::{KVM_EXIT_INTERNAL_ERROR, kvm_stats_desc, kvm_stats_header};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::ioctl::{_IOC_NONE, ioctl, ioctl_expr};

use super::memory::{Ram, SharedMemory};
use super::routine::{Args, Results, Routine};
use super::{CODE, PRESET, USER_ANSWER, arch};
use crate::harness::Errno;

/// How long a routine may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// An access that reached user space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Address and width of a read.
    Read(u64, usize),
    /// Address, width and value of a write.
    Write(u64, usize, u64),
}

/// What reached user space of the accesses of a port: an element, or several of a string.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortExit {
    /// Port, bytes of an element, and the number of elements.
    In(u16, usize, usize),
    /// Port, bytes of an element, and the data.
    Out(u16, usize, Vec<u8>),
}

/// What user space gives for byte `at` of a read from a port.
#[cfg(target_arch = "x86_64")]
pub fn user_byte(at: usize) -> u8 {
    0xe1 ^ at as u8
}

/// An access that user space has to serve.
#[derive(Debug)]
pub enum Access<'a> {
    /// Address, and where the answer goes.
    Read(u64, &'a mut [u8]),
    /// Address and data.
    Write(u64, &'a [u8]),
    /// Port, bytes of an element, and where the data goes.
    #[cfg(target_arch = "x86_64")]
    In(u16, usize, &'a mut [u8]),
    /// Port, bytes of an element, and data.
    #[cfg(target_arch = "x86_64")]
    Out(u16, usize, &'a [u8]),
}

/// What a read gave.
#[derive(Debug)]
pub struct Read {
    /// The bytes read.
    pub value: u64,
    /// The whole register, which held [`PRESET`] before.
    pub register: u64,
    /// The accesses that user space saw.
    pub exits: Vec<Exit>,
}

/// All bits of so many bytes.
pub fn mask(width: usize) -> u64 {
    u64::MAX >> (64 - 8 * width)
}

/// `KVM_GET_STATS_FD`, which kvm-ioctls does not have.
const KVM_GET_STATS_FD: libc::c_ulong = ioctl_expr(_IOC_NONE, kvm_bindings::KVMIO, 0xce, 0);

/// A number of KVM's own about a vCPU.
fn statistic(vcpu: &VcpuFd, name: &str) -> u64 {
    // SAFETY: makes a file descriptor, which is ours.
    let file = unsafe {
        let fd = ioctl(vcpu, KVM_GET_STATS_FD);
        assert!(fd >= 0, "KVM_GET_STATS_FD: {:?}", Errno::last());
        File::from_raw_fd(fd)
    };
    let bytes = |at: u32, len: usize| {
        let mut bytes = vec![0; len];
        let read = file.read_exact_at(&mut bytes, at.into());
        read.expect("a read of KVM's statistics");
        bytes
    };
    let word = |bytes: &[u8], at: usize| {
        let word = bytes[at..at + 4].try_into().expect("four bytes");
        u32::from_ne_bytes(word)
    };
    // The fields of struct kvm_stats_header.
    let header = bytes(0, size_of::<kvm_stats_header>());
    let [_, name_size, count, _, descriptors, data] =
        std::array::from_fn(|field| word(&header, 4 * field));
    let before_name = size_of::<kvm_stats_desc>();
    let size = before_name + name_size as usize;
    for descriptor in bytes(descriptors, count as usize * size).chunks(size) {
        let found = descriptor[before_name..].split(|&byte| byte == 0).next();
        if found == Some(name.as_bytes()) {
            // Its offset is behind flags, exponent and size.
            let value = bytes(data + word(descriptor, 8), 8);
            return u64::from_ne_bytes(value.try_into().expect("eight bytes"));
        }
    }
    panic!("KVM has no statistic {name}")
}

/// A vCPU; dropping it closes its fd.
#[allow(missing_debug_implementations)]
pub struct Vcpu {
    pub(super) fd: VcpuFd,
    pub(super) _ram: Arc<Ram>,
    pub(super) _shared: Option<Arc<SharedMemory>>,
    pub(super) has_run: Arc<AtomicBool>,
}

impl Vcpu {
    /// Reads 1, 2, 4 or 8 bytes.
    pub fn read(&mut self, addr: u64, width: usize) -> Read {
        let args = Args {
            value: PRESET,
            addr,
            ..Default::default()
        };
        let (results, exits) = self.run(Routine::Read, width.ilog2().into(), args);
        Read {
            value: results.value & mask(width),
            register: results.value,
            exits,
        }
    }

    /// Writes the low 1, 2, 4 or 8 bytes of a value.  Returns what user space saw.
    pub fn write(&mut self, addr: u64, width: usize, value: u64) -> Vec<Exit> {
        let args = Args {
            value,
            addr,
            ..Default::default()
        };
        self.run(Routine::Write, width.ilog2().into(), args).1
    }

    /// `in` of 1, 2 or 4 bytes.  Returns the register, which held [`PRESET`], and what user space saw.
    #[cfg(target_arch = "x86_64")]
    pub fn port_in(&mut self, port: u16, width: usize) -> (u64, Vec<PortExit>) {
        let args = Args {
            value: PRESET,
            addr: port.into(),
            ..Default::default()
        };
        let (results, exits) = self.ports(Routine::In, width, args);
        (results.value, exits)
    }

    /// `out` of the low 1, 2 or 4 bytes of a value.
    #[cfg(target_arch = "x86_64")]
    pub fn port_out(&mut self, port: u16, width: usize, value: u64) -> Vec<PortExit> {
        let args = Args {
            value,
            addr: port.into(),
            ..Default::default()
        };
        self.ports(Routine::Out, width, args).1
    }

    /// Runs a routine that accesses ports, `width` bytes at a time.
    #[cfg(target_arch = "x86_64")]
    pub fn ports(
        &mut self,
        routine: Routine,
        width: usize,
        args: Args,
    ) -> (Results, Vec<PortExit>) {
        let mut exits = Vec::new();
        let variant = width.ilog2().into();
        let results = self.run_and_serve(routine, variant, args, |access| match access {
            Access::In(port, width, data) => {
                exits.push(PortExit::In(port, width, data.len() / width));
                for (at, byte) in data.iter_mut().enumerate() {
                    *byte = user_byte(at);
                }
            }
            Access::Out(port, width, data) => {
                exits.push(PortExit::Out(port, width, data.to_vec()));
            }
            other => panic!("{routine:?} {args:x?}: wanted ports, got {other:x?}"),
        });
        (results, exits)
    }

    /// Has a protected guest give the host access to a page of its memory.
    #[cfg(target_arch = "aarch64")]
    #[track_caller]
    pub fn share_page(&mut self, addr: u64) {
        self.hypercall(arch::MEM_SHARE, addr);
    }

    /// And take it back.
    #[cfg(target_arch = "aarch64")]
    #[track_caller]
    pub fn unshare_page(&mut self, addr: u64) {
        self.hypercall(arch::MEM_UNSHARE, addr);
    }

    #[cfg(target_arch = "aarch64")]
    #[track_caller]
    fn hypercall(&mut self, value: u64, addr: u64) {
        let args = Args {
            value,
            addr,
            ..Default::default()
        };
        let (results, exits) = self.call(Routine::Call, args);
        let got = (results.value as i64, exits);
        assert_eq!(got, (0, vec![]), "call {value:#x} with {addr:#x}");
    }

    /// How often the vCPU has left the guest so far, for whatever reason.
    pub fn exits(&self) -> u64 {
        statistic(&self.fd, "exits")
    }

    /// Has `KVM_RUN` prepare all that it does before a guest's first instruction.
    pub fn try_prepare_run(&mut self) -> Result<(), Errno> {
        self.fd.set_kvm_immediate_exit(1);
        let errno = self.fd.run().map(drop).map_err(|error| error.errno());
        self.fd.set_kvm_immediate_exit(0);
        match errno {
            Err(libc::EINTR) => Ok(()),
            Err(errno) => Err(Errno(errno)),
            Ok(()) => panic!("KVM_RUN with immediate_exit: wanted EINTR, got none"),
        }
    }

    /// Runs a loop.
    pub fn call(&mut self, routine: Routine, args: Args) -> (Results, Vec<Exit>) {
        self.run(routine, 0, args)
    }

    /// Runs a loop whose accesses, where they reach user space, are served there.
    pub fn serve(
        &mut self,
        routine: Routine,
        args: Args,
        serve: impl FnMut(Access<'_>),
    ) -> Results {
        self.run_and_serve(routine, 0, args, serve)
    }

    fn run(&mut self, routine: Routine, variant: u64, args: Args) -> (Results, Vec<Exit>) {
        let mut exits = Vec::new();
        let results = self.run_and_serve(routine, variant, args, |access| match access {
            Access::Read(addr, data) => {
                exits.push(Exit::Read(addr, data.len()));
                data.copy_from_slice(&USER_ANSWER.to_le_bytes()[..data.len()]);
            }
            Access::Write(addr, data) => {
                let mut value = [0; 8];
                value[..data.len()].copy_from_slice(data);
                exits.push(Exit::Write(addr, data.len(), u64::from_le_bytes(value)));
            }
            #[cfg(target_arch = "x86_64")]
            other => panic!("{routine:?} {args:x?}: wanted no ports, got {other:x?}"),
        });
        (results, exits)
    }

    fn run_and_serve(
        &mut self,
        routine: Routine,
        variant: u64,
        args: Args,
        serve: impl FnMut(Access<'_>),
    ) -> Results {
        self.run_until(routine, variant, args, serve, arch::is_done)
    }

    /// Runs a routine that KVM cannot go on with; returns what `KVM_RUN` says.
    #[cfg(target_arch = "aarch64")]
    #[track_caller]
    pub fn errno_of(&mut self, routine: Routine, args: Args) -> Errno {
        arch::set_registers(&self.fd, CODE + routine.offset(), &args);
        self.has_run.store(true, Ordering::Relaxed);
        match self.fd.run() {
            Err(error) => Errno(error.errno()),
            Ok(exit) => panic!("{routine:?} {args:x?}: wanted no exit, got {exit:?}"),
        }
    }

    /// Runs a routine that ends in an error of KVM's own; returns which.
    #[cfg(target_arch = "x86_64")]
    pub fn internal_error_of(&mut self, routine: Routine, args: Args) -> u32 {
        self.run_until(
            routine,
            0,
            args,
            |_| (),
            |exit| matches!(exit, VcpuExit::InternalError),
        );
        // SAFETY: the exit was `KVM_EXIT_INTERNAL_ERROR`, for which KVM fills this member.
        unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal.suberror }
    }

    fn run_until(
        &mut self,
        routine: Routine,
        variant: u64,
        args: Args,
        mut serve: impl FnMut(Access<'_>),
        is_end: impl Fn(&VcpuExit<'_>) -> bool,
    ) -> Results {
        let pc = CODE + routine.offset() + 64 * variant;
        arch::set_registers(&self.fd, pc, &args);
        self.has_run.store(true, Ordering::Relaxed);

        let alarm = Alarm::new();
        loop {
            match self.fd.run() {
                Ok(exit) if is_end(&exit) => break,
                Ok(VcpuExit::MmioRead(addr, data)) => serve(Access::Read(addr, data)),
                Ok(VcpuExit::MmioWrite(addr, data)) => serve(Access::Write(addr, data)),
                #[cfg(target_arch = "x86_64")]
                Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => {
                    serve(arch::port_access(&mut self.fd));
                }
                Ok(other) => {
                    panic!("{routine:?} {args:x?}: wanted an MMIO exit or the end, got {other:?}")
                }
                Err(error) if error.errno() == libc::EINTR => panic!(
                    "{routine:?} {args:x?}: not done after {PATIENCE:?}, at {:#x}",
                    arch::pc(&self.fd) - CODE
                ),
                Err(error) => panic!("{routine:?} {args:x?}: KVM_RUN: {error}"),
            }
        }
        drop(alarm);

        // KVM finishes the last instruction when it is entered again.
        let internal_error = self.fd.get_kvm_run().exit_reason == KVM_EXIT_INTERNAL_ERROR;
        if !internal_error {
            assert_eq!(
                self.try_prepare_run(),
                Ok(()),
                "KVM_RUN with immediate_exit"
            );
        }
        arch::results(&self.fd)
    }
}

/// Interrupts the thread's `KVM_RUN` with a signal when [`PATIENCE`] is over.
struct Alarm(libc::timer_t);

impl Alarm {
    fn new() -> Self {
        static HANDLER: Once = Once::new();
        extern "C" fn do_nothing(_signal: libc::c_int) {}
        // SAFETY: the handler does nothing, so it may run at any point.
        HANDLER.call_once(|| unsafe {
            let mut action: libc::sigaction = mem::zeroed();
            action.sa_sigaction = do_nothing as *const () as usize;
            libc::sigaction(libc::SIGUSR1, &action, ptr::null_mut());
        });

        // Again every second, should the first signal come just before KVM_RUN.
        let second = libc::timespec {
            tv_sec: 1,
            tv_nsec: 0,
        };
        let times = libc::itimerspec {
            it_interval: second,
            it_value: libc::timespec {
                tv_sec: PATIENCE.as_secs() as libc::time_t,
                tv_nsec: 0,
            },
        };
        // SAFETY: plain system calls on local structures.
        unsafe {
            let mut event: libc::sigevent = mem::zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = libc::SIGUSR1;
            event.sigev_notify_thread_id = libc::gettid();
            let mut timer = ptr::null_mut();
            assert_eq!(
                libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer),
                0,
                "timer_create"
            );
            assert_eq!(
                libc::timer_settime(timer, 0, &times, ptr::null_mut()),
                0,
                "timer_settime"
            );
            Alarm(timer)
        }
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        // SAFETY: the timer is ours.
        unsafe { libc::timer_delete(self.0) };
    }
}
