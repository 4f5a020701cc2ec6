// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The utilization that the scheduler assumes for a thread, from 0 to 1024.
//!
//! glibc has no wrapper for the system calls, and `libc` no type for their argument.

use std::{io, mem, ptr};

/// `struct sched_attr` of the kernel's `linux/sched/types.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct SchedAttr {
    pub size: u32,
    pub policy: u32,
    pub flags: u64,
    pub nice: i32,
    pub priority: u32,
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
    pub util_min: u32,
    pub util_max: u32,
}

/// `SCHED_FLAG_*`: leave all but the clamps as it is.
const KEEP_ALL: u64 = 0x08 | 0x10;
const UTIL_CLAMP: u64 = 0x20 | 0x40;

/// How a thread is scheduled; 0 is the calling thread.
///
/// A kernel without `CONFIG_UCLAMP_TASK` leaves `util_min` and `util_max` at 0.
pub fn sched_attr(tid: libc::pid_t) -> io::Result<SchedAttr> {
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
        0 => Ok(attr),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The clamps that a thread has asked for, lowest and highest; 0 is the calling thread.
pub fn of_thread(tid: libc::pid_t) -> io::Result<(u32, u32)> {
    sched_attr(tid).map(|attr| (attr.util_min, attr.util_max))
}

/// Clamps the calling thread.
///
/// `EINVAL` if `min` is above `max` or `max` above 1024, `EOPNOTSUPP` from a kernel without
/// `CONFIG_UCLAMP_TASK`, `EPERM` if the process may not.
pub fn set_current(min: u32, max: u32) -> io::Result<()> {
    set_sched_attr(&SchedAttr {
        flags: KEEP_ALL | UTIL_CLAMP,
        util_min: min,
        util_max: max,
        ..Default::default()
    })
}

/// Sets how the calling thread is scheduled, whatever `size` says.
pub fn set_sched_attr(attr: &SchedAttr) -> io::Result<()> {
    let attr = SchedAttr {
        size: mem::size_of::<SchedAttr>() as u32,
        ..*attr
    };
    // SAFETY: the kernel reads as much as `attr.size` says, which is all of it.
    match unsafe { libc::syscall(libc::SYS_sched_setattr, 0, ptr::from_ref(&attr), 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
