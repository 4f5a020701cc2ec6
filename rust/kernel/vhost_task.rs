// SPDX-License-Identifier: GPL-2.0

//! Kernel threads that belong to a user process.
//!
//! C header: [`include/linux/sched/vhost_task.h`](srctree/include/linux/sched/vhost_task.h).
//!
//! Such a thread is one of the process that was current when it was made: it has its memory, its
//! cgroups, its limits and its credentials, is listed among its threads, and ends with it. What
//! decides when it runs (policy, priority, affinity) is inherited from the thread that made it.

use crate::{
    bindings,
    error::from_err_ptr,
    module::{
        ModuleMetadata,
        ModuleRef, //
    },
    prelude::*,
    str::CStr,
    sync::atomic::{
        Atomic,
        Full, //
    },
};
use core::ptr::{
    self,
    NonNull, //
};

/// What a thread does when it is woken up.
pub trait Work: Send + Sync + 'static {
    /// The module whose code this is, `crate::LocalModule`. The module stays while the thread
    /// exists.
    type OwnerModule: ModuleMetadata;

    /// Does some of the work. Returns whether to call it again.
    ///
    /// In between, the thread looks at signals and gives way to others.
    ///
    /// Context: process context, on the thread, may sleep.
    fn work(&self) -> bool;
}

struct Shared<T: Work> {
    woken: Atomic<bool>,
    work: T,
}

/// A thread of the process that was current when it was made.
///
/// Dropping it waits for the thread to finish what it is at, and must not be done by the thread
/// itself. When the process is killed, the thread ends, and waking it up has no effect.
///
/// # Invariants
///
/// `task` is valid, and its data is a [`Shared<T>`] that `shared` keeps.
pub struct VhostTask<T: Work> {
    task: NonNull<bindings::vhost_task>,
    shared: KBox<Shared<T>>,
    // Last, so that it is dropped last.
    _module: ModuleRef,
}

// SAFETY: Any thread may wake up and stop a task, and `T` is `Send` and `Sync`.
unsafe impl<T: Work> Send for VhostTask<T> {}
// SAFETY: As above.
unsafe impl<T: Work> Sync for VhostTask<T> {}

impl<T: Work> VhostTask<T> {
    /// Starts a thread of the current process with that name, which waits to be woken up.
    ///
    /// # Errors
    ///
    /// - Those of clone(2): `EAGAIN` if the process or its user may have no more threads, `ENOMEM`.
    /// - `ENODEV`: the module is being unloaded.
    pub fn new(name: &CStr, work: T) -> Result<Self> {
        let module = ModuleRef::new::<T::OwnerModule>()?;
        let shared = KBox::new(
            Shared {
                woken: Atomic::new(false),
                work,
            },
            GFP_KERNEL_ACCOUNT,
        )?;

        // SAFETY: The functions are called with `shared`, which is valid as long as the thread is.
        // The name is copied.
        let task = from_err_ptr(unsafe {
            bindings::vhost_task_create(
                Some(Self::run),
                Some(Self::killed),
                ptr::from_ref(&*shared).cast_mut().cast(),
                name.as_char_ptr(),
            )
        })?;
        let task = NonNull::new(task).ok_or(ENOMEM)?;

        // SAFETY: It has been created and not been started.
        unsafe { bindings::vhost_task_start(task.as_ptr()) };

        // INVARIANT: Created just now, for `shared`.
        Ok(Self {
            task,
            shared,
            _module: module,
        })
    }

    /// Has the thread call [`Work::work()`], at least once from now on.
    ///
    /// Context: any but NMI.
    #[inline]
    pub fn wake(&self) {
        // Fully ordered, so that the thread sees what was done before. If it has yet to look at
        // an earlier call, it will see this one too.
        if !self.shared.woken.xchg(true, Full) {
            // SAFETY: By the type invariants.
            unsafe { bindings::vhost_task_wake(self.task.as_ptr()) };
        }
    }

    /// # Safety
    ///
    /// To be called by the thread with its data, a [`Shared<T>`].
    unsafe extern "C" fn run(data: *mut c_void) -> bool {
        // SAFETY: By the safety requirements.
        let shared = unsafe { &*data.cast::<Shared<T>>() };

        // It is as good as asleep here: a wake-up from now on has it called again.
        if !shared.woken.xchg(false, Full) {
            return false;
        }
        // SAFETY: It only acts on the current thread.
        unsafe { bindings::__set_current_state(bindings::TASK_RUNNING) };
        if shared.work.work() {
            shared.woken.xchg(true, Full);
        }
        // SAFETY: The thread may sleep.
        unsafe { bindings::cond_resched() };
        true
    }

    /// # Safety
    ///
    /// None: it does nothing. Who wakes up a thread that has ended does not need to know.
    unsafe extern "C" fn killed(_data: *mut c_void) {}
}

impl<T: Work> Drop for VhostTask<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariants; and the thread does not touch its data when
        // this returns.
        unsafe { bindings::vhost_task_stop(self.task.as_ptr()) };
    }
}
