// SPDX-License-Identifier: GPL-2.0

//! Event counters that user space waits on.
//!
//! C header: [`include/linux/eventfd.h`](srctree/include/linux/eventfd.h).
//!
//! An [`EventFd`] is signalled by the kernel, and a [`Consumer`] takes what anybody signals.
//!
//! Not covered: waiting for the counter.

use crate::{
    bindings,
    error::{
        from_err_ptr,
        to_result,
        Result, //
    },
    fs::LocalFile,
    module::{
        ModuleMetadata,
        ModuleRef, //
    },
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{
            Atomic,
            Relaxed, //
        }, //
    },
    task::TASK_NORMAL,
    types::Opaque,
};
use core::{
    mem::ManuallyDrop,
    ptr::{
        self,
        NonNull, //
    },
};

/// A reference to an eventfd. Two are equal if they refer to the same counter.
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
#[derive(PartialEq, Eq)]
#[repr(transparent)]
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

    /// Takes the reference that [`Self::into_raw()`] has given up; [`None`] for null.
    ///
    /// # Safety
    ///
    /// `ptr` must be null or come from `into_raw()`, and be taken once only.
    #[inline]
    pub unsafe fn from_raw(ptr: *mut bindings::eventfd_ctx) -> Option<Self> {
        // INVARIANT: By the safety requirements.
        NonNull::new(ptr).map(|ptr| Self { ptr })
    }

    /// Borrows the reference that [`Self::into_raw()`] has given up; [`None`] for null.
    ///
    /// # Safety
    ///
    /// `*ptr` must be null or come from `into_raw()`, and [`Self::from_raw()`] must not have taken
    /// it, nor take it before `'a` ends.
    #[inline]
    pub unsafe fn borrow_raw<'a>(ptr: &'a *mut bindings::eventfd_ctx) -> Option<&'a Self> {
        // SAFETY: `Self` is `repr(transparent)` over `NonNull`, so `Option<Self>` has the layout of
        // the pointer, and null is `None`. By the safety requirements, the type invariants hold for
        // anything else.
        unsafe { &*ptr::from_ref(ptr).cast::<Option<Self>>() }.as_ref()
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

/// Takes what is signalled to an eventfd.
pub trait Consume: Send + Sync + 'static {
    /// The module whose code this is, `crate::LocalModule`. The module stays while the consumer
    /// exists.
    type OwnerModule: ModuleMetadata;

    /// `count`, at least 1, has been taken from the counter.
    ///
    /// Context: any but NMI, with interrupts off and under the eventfd's lock. Must not signal an
    /// eventfd.
    fn signalled(&self, count: u64);
}

/// What is on an eventfd's wait queue.
struct Waiter<T: Consume> {
    entry: Opaque<bindings::wait_queue_entry>,
    eventfd: EventFd,
    /// There is more in the counter, as it is one of a semaphore, which gives one at a time.
    rest: Atomic<bool>,
    consume: T,
}

/// The consumer of an eventfd: other waiters of the eventfd are not woken up.
///
/// Dropping it gives the eventfd back. What has been signalled until then and not been taken is
/// lost.
///
/// # Invariants
///
/// The waiter is on the wait queue `queue` of its eventfd.
pub struct Consumer<T: Consume> {
    waiter: KBox<Waiter<T>>,
    queue: NonNull<bindings::wait_queue_head>,
    // Last, so that it is dropped last.
    _module: ModuleRef,
}

// SAFETY: Any thread may leave the queue, which has a lock of its own; `T` is `Send` and `Sync`.
unsafe impl<T: Consume> Send for Consumer<T> {}
// SAFETY: As above.
unsafe impl<T: Consume> Sync for Consumer<T> {}

/// For the time of a call of `vfs_poll()`.
#[repr(C)]
struct Table {
    table: bindings::poll_table_struct,
    entry: *mut bindings::wait_queue_entry,
    queue: *mut bindings::wait_queue_head,
    ret: c_int,
}

impl<T: Consume> Consumer<T> {
    /// Has `consume` take what is signalled to the eventfd behind file descriptor `fd` of the
    /// current process, and what its counter has already.
    ///
    /// It may be called before this returns.
    ///
    /// # Errors
    ///
    /// - `EBADF`: `fd` is not open.
    /// - `EBUSY`: the eventfd has a consumer, which may also be an irqfd of KVM.
    /// - `EINVAL`: `fd` is not an eventfd.
    /// - `ENODEV`: the module is being unloaded.
    pub fn new(fd: c_int, consume: T) -> Result<Self> {
        let module = ModuleRef::new::<T::OwnerModule>()?;
        // CAST: Negative numbers become ones that are never open.
        let file: ARef<LocalFile> = LocalFile::fget(fd as u32)?;
        // SAFETY: The file is valid.
        let eventfd = from_err_ptr(unsafe { bindings::eventfd_ctx_fileget(file.as_ptr()) })?;

        let waiter = KBox::new(
            Waiter {
                entry: Opaque::new(bindings::wait_queue_entry {
                    func: Some(Self::wake),
                    ..pin_init::zeroed()
                }),
                // INVARIANT: The pointer is no error, so it is valid and comes with a reference.
                eventfd: EventFd {
                    ptr: NonNull::new(eventfd).ok_or(EINVAL)?,
                },
                rest: Atomic::new(false),
                consume,
            },
            GFP_KERNEL_ACCOUNT,
        )?;
        let mut table = Table {
            table: bindings::poll_table_struct {
                _qproc: Some(Self::enqueue),
                _key: bindings::POLLIN,
            },
            entry: waiter.entry.get(),
            queue: ptr::null_mut(),
            ret: 0,
        };

        // SAFETY: The file is valid, and so is the table, which only `enqueue()` looks into. The
        // waiter stays where it is until it is off the queue.
        let events = unsafe { bindings::vfs_poll(file.as_ptr(), &raw mut table.table) };

        to_result(table.ret)?;
        // INVARIANT: `enqueue()` has put it there.
        let this = Self {
            waiter,
            queue: NonNull::new(table.queue).ok_or(EINVAL)?,
            _module: module,
        };
        if events & bindings::POLLIN != 0 {
            this.wake_up();
        }
        Ok(this)
    }

    /// Returns who takes what is signalled.
    #[inline]
    pub fn get(&self) -> &T {
        &self.waiter.consume
    }

    /// Whether it is the consumer of `eventfd`.
    #[inline]
    pub fn is_of(&self, eventfd: &EventFd) -> bool {
        self.waiter.eventfd == *eventfd
    }

    /// Has the consumer take more from the counter, where some is left.
    ///
    /// Only the counter of a semaphore (`EFD_SEMAPHORE`) leaves some. To be called when what the
    /// consumer was told of has been done, from process context.
    #[inline]
    pub fn take_rest(&self) {
        if self.waiter.rest.load(Relaxed) {
            self.wake_up();
        }
    }

    fn wake_up(&self) {
        // SAFETY: By the type invariants; the eventfd, which we have a reference to, keeps the
        // queue. The key is a mask of events. CAST: For `__wake_up()` they are a pointer.
        unsafe {
            bindings::__wake_up(
                self.queue.as_ptr(),
                TASK_NORMAL,
                1,
                bindings::POLLIN as usize as *mut c_void,
            )
        };
    }

    /// # Safety
    ///
    /// `table` must be that of a [`Table`] whose `entry` is that of a [`Waiter<T>`], and `queue`
    /// the wait queue of the waiter's eventfd.
    unsafe extern "C" fn enqueue(
        _file: *mut bindings::file,
        queue: *mut bindings::wait_queue_head,
        table: *mut bindings::poll_table_struct,
    ) {
        let table: *mut Table = table.cast();

        // SAFETY: By the safety requirements; `table` is the first field of `Table`.
        unsafe {
            (*table).ret = bindings::add_wait_queue_priority_exclusive(queue, (*table).entry);
            (*table).queue = queue;
        }
    }

    /// # Safety
    ///
    /// `entry` must be that of a [`Waiter<T>`] on its eventfd's queue, whose lock is held.
    unsafe extern "C" fn wake(
        entry: *mut bindings::wait_queue_entry,
        _mode: c_uint,
        _flags: c_int,
        key: *mut c_void,
    ) -> c_int {
        // CAST: For wait queues of files, the pointer is a mask of events.
        if key as usize as c_uint & bindings::POLLIN == 0 {
            return 0;
        }
        let entry: *const Opaque<_> = Opaque::cast_from(entry);
        // SAFETY: By the safety requirements.
        let waiter = unsafe { &*crate::container_of!(entry, Waiter<T>, entry) };
        let mut count = 0;
        let mut more = 0;

        // Of a semaphore the first call takes 1. Then the second one takes another, if there is.
        //
        // SAFETY: The eventfd is valid, and its lock is held.
        unsafe {
            bindings::eventfd_ctx_do_read(waiter.eventfd.ptr.as_ptr(), &mut count);
            bindings::eventfd_ctx_do_read(waiter.eventfd.ptr.as_ptr(), &mut more);
        }
        waiter.rest.store(more != 0, Relaxed);
        if count != 0 {
            waiter.consume.signalled(count + more);
        }
        1
    }
}

impl<T: Consume> Drop for Consumer<T> {
    fn drop(&mut self) {
        let mut lost = 0;

        // SAFETY: By the type invariants. Nothing calls `wake()` after this returns.
        unsafe {
            bindings::eventfd_ctx_remove_wait_queue(
                self.waiter.eventfd.ptr.as_ptr(),
                self.waiter.entry.get(),
                &mut lost,
            )
        };
    }
}
