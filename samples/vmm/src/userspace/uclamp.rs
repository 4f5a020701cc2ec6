// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The utilisation that the scheduler assumes for a thread, from 0 to 1024.

use std::{io, mem, ptr};

/// `struct sched_attr` of the kernel's `linux/sched/types.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
    util_min: u32,
    util_max: u32,
}

/// `SCHED_FLAG_*`: leave all but the clamps as it is.
const KEEP_ALL: u64 = 0x08 | 0x10;
const UTIL_CLAMP: u64 = 0x20 | 0x40;

/// The clamps that a thread has asked for, lowest and highest; 0 is the calling thread.
///
/// A kernel without `CONFIG_UCLAMP_TASK` answers 0 for both.
pub fn of_thread(tid: libc::pid_t) -> io::Result<(u32, u32)> {
    let mut attr = SchedAttr::default();
    // SAFETY: the kernel writes no more than the size that it is told, that of `attr`.
    let result = unsafe {
        libc::syscall(
            libc::SYS_sched_getattr,
            tid,
            ptr::from_mut(&mut attr),
            mem::size_of::<SchedAttr>(),
            0,
        )
    };
    match result {
        0 => Ok((attr.util_min, attr.util_max)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Clamps the calling thread.
///
/// `EINVAL` if `min` is above `max` or `max` above 1024, `EOPNOTSUPP` from a kernel without
/// `CONFIG_UCLAMP_TASK`, `EPERM` if the process may not.
pub fn set_current(min: u32, max: u32) -> io::Result<()> {
    let attr = SchedAttr {
        size: mem::size_of::<SchedAttr>() as u32,
        flags: KEEP_ALL | UTIL_CLAMP,
        util_min: min,
        util_max: max,
        ..Default::default()
    };
    // SAFETY: the kernel reads as much as `attr.size` says, which is all of it.
    match unsafe { libc::syscall(libc::SYS_sched_setattr, 0, ptr::from_ref(&attr), 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
