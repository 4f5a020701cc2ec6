// SPDX-License-Identifier: GPL-2.0

//! Event counters that user space waits on.
//!
//! C header: [`include/linux/eventfd.h`](srctree/include/linux/eventfd.h).
//!
//! Not covered: reading the counter, waiting for it.

use crate::{
    bindings,
    error::{
        from_err_ptr,
        Result, //
    },
    prelude::*, //
};
use core::{
    mem::ManuallyDrop,
    ptr::NonNull, //
};

/// A reference to an eventfd.
///
/// # Examples
///
/// ```
/// use kernel::eventfd::EventFd;
///
/// // No such file.
/// assert_eq!(EventFd::from_fd(-1).err(), Some(EBADF));
/// # Ok::<(), Error>(())
/// ```
///
/// # Invariants
///
/// `ptr` is valid, and `self` owns a reference to it.
pub struct EventFd {
    ptr: NonNull<bindings::eventfd_ctx>,
}

// SAFETY: The counter has a lock of its own, and any thread may drop the last reference.
unsafe impl Send for EventFd {}
// SAFETY: The counter has a lock of its own.
unsafe impl Sync for EventFd {}

impl EventFd {
    /// Takes a reference to the eventfd behind file descriptor `fd` of the current process.
    ///
    /// # Errors
    ///
    /// - `EBADF`: `fd` is not open.
    /// - `EINVAL`: `fd` is not an eventfd.
    pub fn from_fd(fd: c_int) -> Result<Self> {
        // SAFETY: No requirements on the arguments.
        let ptr = from_err_ptr(unsafe { bindings::eventfd_ctx_fdget(fd) })?;

        // INVARIANT: The pointer is not an error, so it is valid and comes with a reference.
        Ok(Self {
            ptr: NonNull::new(ptr).ok_or(EINVAL)?,
        })
    }

    /// Gives up the reference as a pointer, for [`Self::from_raw()`] to take.
    #[inline]
    pub fn into_raw(self) -> *mut bindings::eventfd_ctx {
        ManuallyDrop::new(self).ptr.as_ptr()
    }

    /// Takes a reference that [`Self::into_raw()`] has given up; [`None`] for null.
    ///
    /// # Safety
    ///
    /// `ptr` must be null or come from `into_raw()`, and be taken once only; or the result must not
    /// be dropped and not be used for longer than somebody else keeps the reference.
    #[inline]
    pub unsafe fn from_raw(ptr: *mut bindings::eventfd_ctx) -> Option<Self> {
        // INVARIANT: By the safety requirements.
        NonNull::new(ptr).map(|ptr| Self { ptr })
    }

    /// Adds 1 to the counter and wakes up who waits for it.
    ///
    /// Context: any but NMI; on PREEMPT_RT, preemptible.
    ///
    /// # Errors
    ///
    /// `EDEADLK` if called by what an eventfd has woken up.
    pub fn signal(&self) -> Result {
        // SAFETY: No requirements.
        if !unsafe { bindings::eventfd_signal_allowed() } {
            return Err(EDEADLK);
        }
        // SAFETY: By the type invariants. The mask adds nothing to `EPOLLIN`.
        unsafe { bindings::eventfd_signal_mask(self.ptr.as_ptr(), 0) };
        Ok(())
    }
}

impl Drop for EventFd {
    fn drop(&mut self) {
        // SAFETY: By the type invariants; this is our own reference.
        unsafe { bindings::eventfd_ctx_put(self.ptr.as_ptr()) };
    }
}
