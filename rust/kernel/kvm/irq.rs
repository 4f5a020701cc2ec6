// SPDX-License-Identifier: GPL-2.0

//! Interrupts of devices that BPF programs raise.
//!
//! C header: [`include/linux/kvm_bpf.h`](srctree/include/linux/kvm_bpf.h).
//!
//! A device has [`Lines`], numbered from 0. Each may have an eventfd, which user space wires to
//! the VM's interrupt controller with `KVM_IRQFD`, or waits for itself. A program signals a line of
//! its own device with the kfunc `bpf_kvm_irq_signal()`. Where it has no context, as in a timer's
//! callback, it uses a line that it has put aside: `struct bpf_kvm_irq`, with the kfuncs
//! `bpf_kvm_irq_acquire()`, `bpf_kvm_irq_raise()` and `bpf_kvm_irq_release()`.

use crate::{
    bindings,
    error::from_result,
    eventfd::EventFd,
    macros::export,
    nospec,
    prelude::*,
    sync::{
        aref::{
            ARef,
            AlwaysRefCounted, //
        },
        atomic::{
            Acquire,
            Atomic,
            Full,
            Relaxed, //
        },
        rcu,
        Refcount, //
    },
    types::Opaque,
    uapi,
};
use core::{
    mem::{
        offset_of,
        ManuallyDrop, //
    },
    ptr::{
        self,
        NonNull, //
    },
};

/// How many lines a device has.
pub const MAX_LINES: usize = uapi::KVM_DEV_BPF_MAX_IRQS as usize;

/// A line; what programs know as `struct bpf_kvm_irq`.
///
/// # Invariants
///
/// `eventfd` is null or came from [`EventFd::into_raw()`]; whoever takes it out drops the reference
/// only when no RCU reader uses it: after a grace period that began when it was taken out, or when
/// `closed` was set. The line is element `index` of a [`Lines`].
#[repr(C)]
struct Line {
    eventfd: Atomic<*mut bindings::eventfd_ctx>,
    index: u32,
}

static_assert!(size_of::<Line>() == size_of::<bindings::bpf_kvm_irq>());
static_assert!(offset_of!(Line, eventfd) == offset_of!(bindings::bpf_kvm_irq, eventfd));
static_assert!(offset_of!(Line, index) == offset_of!(bindings::bpf_kvm_irq, index));

/// The interrupt lines of a device.
///
/// References are counted, and the last one's memory is freed after an RCU grace period, because
/// programs use lines that they find in a map under RCU alone.
pub struct Lines {
    refs: Refcount,
    rcu: Opaque<bindings::callback_head>,
    /// Nobody is signalled any more.
    closed: Atomic<bool>,
    lines: [Line; MAX_LINES],
}

// SAFETY: All fields but `rcu`, which is not used before the last reference has gone, may be used
// on any thread.
unsafe impl Send for Lines {}
// SAFETY: As above.
unsafe impl Sync for Lines {}

// SAFETY: `Lines` come into being in `Lines::new()` only, with one reference.
unsafe impl AlwaysRefCounted for Lines {
    fn inc_ref(&self) {
        self.refs.inc();
    }

    // Not inlined, as RCU would call a copy of `free()` in a module that may be gone by then.
    #[inline(never)]
    unsafe fn dec_ref(obj: NonNull<Self>) {
        let lines = obj.as_ptr();

        // SAFETY: The caller has a reference.
        if unsafe { (*lines).refs.dec_and_test() } {
            // SAFETY: It was the last one, so `rcu` is ours. No reader outlives the grace period.
            unsafe { bindings::call_rcu(Opaque::cast_into(&raw const (*lines).rcu), Some(free)) };
        }
    }
}

/// Frees [`Lines`].
///
/// # Safety
///
/// `rcu` must be that of a [`Lines`] without references or readers.
unsafe extern "C" fn free(rcu: *mut bindings::callback_head) {
    let rcu: *const Opaque<_> = Opaque::cast_from(rcu);
    // SAFETY: By the safety requirements it is the `rcu` of a `Lines`.
    let lines = unsafe { crate::container_of!(rcu, Lines, rcu) };

    // SAFETY: It is nobody else's any more, and `Lines::new()` has made it in a `KBox`.
    drop(unsafe { KBox::from_raw(lines.cast_mut()) });
}

impl Lines {
    /// Creates lines without eventfds.
    pub fn new() -> Result<ARef<Self>> {
        let lines = KBox::init(
            // INVARIANT: All pointers are null.
            init!(Self {
                refs: Refcount::new(1),
                rcu: Opaque::uninit(),
                closed: Atomic::new(false),
                // CAST: There are few lines.
                lines <- pin_init::init_array_from_fn(|index| Line {
                    eventfd: Atomic::new(ptr::null_mut()),
                    index: index as u32,
                }),
            }),
            GFP_KERNEL_ACCOUNT,
        )?;

        // SAFETY: The one reference is this one.
        Ok(unsafe { ARef::from_raw(NonNull::from(KBox::leak(lines))) })
    }

    /// User space, or even the guest, has chosen the number.
    fn slot(&self, line: usize) -> Option<&Atomic<*mut bindings::eventfd_ctx>> {
        let line = self.lines.get(nospec::array_index(line, MAX_LINES)?)?;

        Some(&line.eventfd)
    }

    /// Sets or removes the eventfd of a line, and returns the one it had.
    ///
    /// Does nothing if there is no such line.
    ///
    /// When this returns, nobody signals the old one any more. Sleeps for an RCU grace period if
    /// there was one.
    pub fn set(&self, line: usize, eventfd: Option<EventFd>) -> Option<EventFd> {
        let slot = self.slot(line)?;
        let new = eventfd.map_or(ptr::null_mut(), EventFd::into_raw);
        let old = slot.xchg(new, Full);

        if !old.is_null() {
            rcu::synchronize_rcu();
        }
        // SAFETY: By the type invariants. Nobody else has taken this pointer out, and the readers
        // that might have loaded it are gone.
        unsafe { EventFd::from_raw(old) }
    }

    /// Lets go of all eventfds for good.
    ///
    /// When this returns, nobody is signalled any more. Sleeps for an RCU grace period.
    pub fn close(&self) {
        self.closed.store(true, Relaxed);
        rcu::synchronize_rcu();
        for line in &self.lines {
            // SAFETY: By the type invariants. Nobody else takes this pointer out; the readers that
            // might have loaded it are gone, and later ones see `closed` and load none.
            drop(unsafe { EventFd::from_raw(line.eventfd.xchg(ptr::null_mut(), Full)) });
        }
    }

    /// Signals a line's eventfd.
    ///
    /// Context: as [`EventFd::signal()`].
    ///
    /// # Errors
    ///
    /// - `ENOENT`: no eventfd is set for `line`, or there is no such line, or the lines are closed.
    /// - Those of [`EventFd::signal()`].
    pub fn signal(&self, line: usize) -> Result {
        let slot = self.slot(line).ok_or(ENOENT)?;
        let _guard = rcu::read_lock();

        if self.closed.load(Relaxed) {
            return Err(ENOENT);
        }
        // SAFETY: By the type invariants, whoever takes the pointer out waits for us, who have not
        // seen `closed`; and we leave the reference to them.
        let eventfd = unsafe { EventFd::from_raw(slot.load(Acquire)) }.map(ManuallyDrop::new);
        eventfd.ok_or(ENOENT)?.signal()
    }

    /// Returns a line as programs keep it; null if there is no such line.
    fn as_irq(&self, line: usize) -> *mut bindings::bpf_kvm_irq {
        let Some(line) = nospec::array_index(line, MAX_LINES) else {
            return ptr::null_mut();
        };

        // From `self`, not from the element, as `from_irq()` goes back.
        //
        // SAFETY: `self` is valid, and `line` is in bounds.
        unsafe {
            (&raw const (*ptr::from_ref(self)).lines)
                .cast::<Line>()
                .add(line)
                .cast_mut()
                .cast()
        }
    }

    /// Returns the lines that [`Self::as_irq()`] was called on, and the index.
    ///
    /// # Safety
    ///
    /// `irq` must come from `as_irq()`, and the lines must be valid.
    unsafe fn from_irq(irq: *mut bindings::bpf_kvm_irq) -> (NonNull<Self>, usize) {
        let line = irq.cast::<Line>();
        // SAFETY: By the safety requirements. CAST: `usize` has 64 bits where this is built.
        let index = unsafe { (*line).index } as usize;
        // SAFETY: By the type invariants it is element `index` of an array in a `Lines`.
        let lines = unsafe {
            let first = line.sub(index).cast::<[Line; MAX_LINES]>();
            crate::container_of!(first, Self, lines)
        };

        // SAFETY: Not null, as it points into memory.
        (unsafe { NonNull::new_unchecked(lines) }, index)
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        for line in &self.lines {
            // SAFETY: By the type invariants; with `&mut self` there is no reader.
            drop(unsafe { EventFd::from_raw(line.eventfd.load(Acquire)) });
        }
    }
}

/// What the kfunc `bpf_kvm_irq_signal()` does.
///
/// # Safety
///
/// `ctx` must be what a program is being run on, that is, a [`Context`](super::prog::Context).
#[export]
pub unsafe extern "C" fn kvm_bpf_irq_signal(
    ctx: *const bindings::bpf_kvm_io_ctx_kern,
    irq: u32,
) -> c_int {
    // SAFETY: By the safety requirements and the type invariants of `Context`.
    let lines = unsafe { &*(*ctx).irqs.cast::<Lines>() };

    // CAST: `usize` has 64 bits where this is built.
    from_result(|| lines.signal(irq as usize).map(|()| 0))
}

/// What the kfunc `bpf_kvm_irq_acquire()` does.
///
/// # Safety
///
/// `ctx` must be what a program is being run on, that is, a [`Context`](super::prog::Context).
#[export]
pub unsafe extern "C" fn kvm_bpf_irq_acquire(
    ctx: *const bindings::bpf_kvm_io_ctx_kern,
    irq: u32,
) -> *mut bindings::bpf_kvm_irq {
    // SAFETY: By the safety requirements and the type invariants of `Context`.
    let lines = unsafe { &*(*ctx).irqs.cast::<Lines>() };
    // CAST: `usize` has 64 bits where this is built.
    let irq = lines.as_irq(irq as usize);

    if !irq.is_null() {
        lines.inc_ref();
    }
    irq
}

/// What the kfunc `bpf_kvm_irq_release()` does.
///
/// # Safety
///
/// `irq` must come from [`kvm_bpf_irq_acquire()`], and be released once only.
#[export]
pub unsafe extern "C" fn kvm_bpf_irq_release(irq: *mut bindings::bpf_kvm_irq) {
    // SAFETY: By the safety requirements there is a reference, and this gives it up.
    unsafe { Lines::dec_ref(Lines::from_irq(irq).0) };
}

/// What the kfunc `bpf_kvm_irq_raise()` does.
///
/// # Safety
///
/// `irq` must come from [`kvm_bpf_irq_acquire()`], and not be released before this returns, or be
/// used in the RCU read-side section in which it was found.
#[export]
pub unsafe extern "C" fn kvm_bpf_irq_raise(irq: *mut bindings::bpf_kvm_irq) -> c_int {
    // SAFETY: By the safety requirements.
    let (lines, index) = unsafe { Lines::from_irq(irq) };
    // SAFETY: As above, the lines are valid until we return.
    let lines = unsafe { lines.as_ref() };

    from_result(|| lines.signal(index).map(|()| 0))
}
