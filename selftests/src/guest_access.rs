// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Accesses a device from a process of a Linux guest, in ways that a driver's compiler does not:
//! with instructions that KVM cannot emulate, or only in parts.
//!
//! The argument is the guest-physical address. For each way a line says what came of it:
//! "GUEST-ACCESS way ok" or, if a signal ended it, "GUEST-ACCESS way signal NUMBER".

use std::arch::asm;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::{env, io, ptr};

const PAGE: u64 = 0x1000;

/// A way to access 16 bytes of a device.
type Way = (&'static str, unsafe fn(*mut u8));

/// Each has more registers than the one that the syndrome of an abort can name, or writes back.
#[cfg(target_arch = "aarch64")]
const WAYS: [Way; 4] = [
    ("pair", |at| {
        // SAFETY: the caller's promise.
        unsafe { asm!("ldp {}, {}, [{}]", out(reg) _, out(reg) _, in(reg) at) }
    }),
    ("vector", |at| {
        // SAFETY: the caller's promise.
        unsafe { asm!("str q0, [{}]", in(reg) at, out("v0") _) }
    }),
    ("post-index", |at| {
        // SAFETY: the caller's promise.
        unsafe { asm!("str wzr, [{0}], #4", inout(reg) at => _) }
    }),
    ("plain", |at| {
        // SAFETY: the caller's promise.
        unsafe { asm!("ldr {}, [{}]", out(reg) _, in(reg) at) }
    }),
];

#[cfg(target_arch = "x86_64")]
const WAYS: [Way; 4] = [
    ("sse", |at| {
        // SAFETY: the caller's promise.
        unsafe { asm!("movups xmm0, [{}]", in(reg) at, out("xmm0") _) }
    }),
    ("avx", |at| {
        // SAFETY: the caller's promise.
        unsafe { asm!("vmovups ymm0, [{}]", in(reg) at, out("ymm0") _) }
    }),
    ("locked", |at| {
        // SAFETY: the caller's promise.
        unsafe { asm!("lock inc dword ptr [{}]", in(reg) at) }
    }),
    ("plain", |at| {
        // SAFETY: the caller's promise.
        unsafe { asm!("mov {}, [{}]", out(reg) _, in(reg) at) }
    }),
];

fn main() -> io::Result<()> {
    let usage = || io::Error::other("usage: kvm-bpf-guest-access ADDRESS");
    let text = env::args().nth(1).ok_or_else(usage)?;
    let hex = text.strip_prefix("0x").ok_or_else(usage)?;
    let addr = u64::from_str_radix(hex, 16).map_err(|_| usage())?;

    let memory = File::options().read(true).write(true).open("/dev/mem")?;
    // SAFETY: a new mapping; that of a device has no Rust object in it.
    let page = unsafe {
        libc::mmap(
            ptr::null_mut(),
            PAGE as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            memory.as_raw_fd(),
            (addr & !(PAGE - 1)) as libc::off_t,
        )
    };
    if page == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let at = page.cast::<u8>().wrapping_add((addr % PAGE) as usize);
    for (name, way) in WAYS {
        // SAFETY: there is no other thread. The access may be a signal, which ends the child only.
        let status = unsafe {
            let child = libc::fork();
            if child == 0 {
                way(at);
                libc::_exit(0);
            }
            let mut status = 0;
            libc::waitpid(child, &mut status, 0);
            status
        };
        match libc::WIFSIGNALED(status) {
            true => println!("GUEST-ACCESS {name} signal {}", libc::WTERMSIG(status)),
            false => println!("GUEST-ACCESS {name} ok"),
        }
    }
    Ok(())
}
