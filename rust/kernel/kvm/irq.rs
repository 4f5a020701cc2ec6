// SPDX-License-Identifier: GPL-2.0

//! Interrupts of devices that BPF programs signal.
//!
//! C header: [`include/linux/kvm_bpf.h`](srctree/include/linux/kvm_bpf.h).
//!
//! A device has [`Irqs`], numbered from 0. Each may have an eventfd, which user space wires to
//! the VM's interrupt controller with `KVM_IRQFD`, or waits for itself. A program signals one of
//! its own device with the kfunc `bpf_kvm_irq_signal()`. Where it has no context, as in a timer's
//! callback, it uses one that it has kept: `struct bpf_kvm_irq`, with the kfuncs
//! `bpf_kvm_irq_acquire()`, `bpf_kvm_irq_signal_kept()` and `bpf_kvm_irq_release()`.

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
    mem::offset_of,
    ptr::{
        self,
        NonNull, //
    },
};

/// How many interrupts a device has.
pub const MAX_IRQS: usize = uapi::KVM_DEV_BPF_MAX_IRQS as usize;

/// An interrupt; what programs know as `struct bpf_kvm_irq`.
///
/// # Invariants
///
/// `eventfd` is null or came from [`EventFd::into_raw()`]; whoever takes it out drops the reference
/// only when no RCU reader uses it: after a grace period that began when it was taken out, or when
/// `closed` was set. It is element `index` of an [`Irqs`].
#[repr(C)]
struct Irq {
    eventfd: Atomic<*mut bindings::eventfd_ctx>,
    index: u32,
}

static_assert!(size_of::<Irq>() == size_of::<bindings::bpf_kvm_irq>());
static_assert!(offset_of!(Irq, eventfd) == offset_of!(bindings::bpf_kvm_irq, eventfd));
static_assert!(offset_of!(Irq, index) == offset_of!(bindings::bpf_kvm_irq, index));

/// The interrupts of a device.
///
/// References are counted, and the last one's memory is freed after an RCU grace period, because
/// programs use interrupts that they find in a map under RCU alone.
pub struct Irqs {
    refs: Refcount,
    rcu: Opaque<bindings::callback_head>,
    /// Set by [`Self::close()`]; no interrupt is signalled after that.
    closed: Atomic<bool>,
    irqs: [Irq; MAX_IRQS],
}

// SAFETY: All fields but `rcu`, which is not used before the last reference has gone, may be used
// on any thread.
unsafe impl Send for Irqs {}
// SAFETY: As above.
unsafe impl Sync for Irqs {}

// SAFETY: `Irqs` come into being in `Irqs::new()` only, with one reference.
unsafe impl AlwaysRefCounted for Irqs {
    fn inc_ref(&self) {
        self.refs.inc();
    }

    // Not inlined, as RCU would call a copy of `free()` in a module that may have unloaded.
    #[inline(never)]
    unsafe fn dec_ref(obj: NonNull<Self>) {
        let irqs = obj.as_ptr();

        // SAFETY: The caller has a reference.
        if unsafe { (*irqs).refs.dec_and_test() } {
            // SAFETY: It was the last one, so `rcu` is ours. No reader outlives the grace period.
            unsafe { bindings::call_rcu(Opaque::cast_into(&raw const (*irqs).rcu), Some(free)) };
        }
    }
}

/// Frees [`Irqs`].
///
/// # Safety
///
/// `rcu` must be that of an [`Irqs`] without references or readers.
unsafe extern "C" fn free(rcu: *mut bindings::callback_head) {
    let rcu: *const Opaque<_> = Opaque::cast_from(rcu);
    // SAFETY: By the safety requirements it is the `rcu` of an `Irqs`.
    let irqs = unsafe { crate::container_of!(rcu, Irqs, rcu) };

    // SAFETY: There is no other reference, and `Irqs::new()` has made it in a `KBox`.
    drop(unsafe { KBox::from_raw(irqs.cast_mut()) });
}

/// An eventfd that an interrupt had.
///
/// Dropping it waits, for an RCU grace period, until no reader signals it.
///
/// # Invariants
///
/// It came from [`EventFd::into_raw()`], and out of an [`Irqs`].
#[must_use]
pub struct Unset(NonNull<bindings::eventfd_ctx>);

impl Drop for Unset {
    fn drop(&mut self) {
        rcu::synchronize_rcu();
        // SAFETY: By the type invariants. Nobody else has taken this pointer out, and the readers
        // that might have loaded it are gone.
        drop(unsafe { EventFd::from_raw(self.0.as_ptr()) });
    }
}

impl Irqs {
    /// Creates interrupts without eventfds.
    pub fn new() -> Result<ARef<Self>> {
        let irqs = KBox::init(
            // INVARIANT: All pointers are null.
            init!(Self {
                refs: Refcount::new(1),
                rcu: Opaque::uninit(),
                closed: Atomic::new(false),
                // CAST: There are few.
                irqs <- pin_init::init_array_from_fn(|index| Irq {
                    eventfd: Atomic::new(ptr::null_mut()),
                    index: index as u32,
                }),
            }),
            GFP_KERNEL_ACCOUNT,
        )?;

        // SAFETY: The one reference is this one.
        Ok(unsafe { ARef::from_raw(NonNull::from(KBox::leak(irqs))) })
    }

    /// User space, or even the guest, has chosen the number.
    fn slot(&self, index: usize) -> Option<&Atomic<*mut bindings::eventfd_ctx>> {
        let irq = self.irqs.get(nospec::array_index(index, MAX_IRQS)?)?;

        Some(&irq.eventfd)
    }

    /// Sets or removes the eventfd of an interrupt, and returns the one it had.
    ///
    /// Does nothing if there is no such interrupt.
    pub fn set(&self, index: usize, eventfd: Option<EventFd>) -> Option<Unset> {
        let slot = self.slot(index)?;
        let new = eventfd.map_or(ptr::null_mut(), EventFd::into_raw);

        // INVARIANT: Taken out just now.
        NonNull::new(slot.xchg(new, Full)).map(Unset)
    }

    /// Whether an interrupt has an eventfd.
    pub fn is_set(&self, index: usize) -> bool {
        self.slot(index)
            .is_some_and(|slot| !slot.load(Relaxed).is_null())
    }

    /// Drops all eventfds for good.
    ///
    /// No eventfd is signalled after this returns. Sleeps for an RCU grace period.
    pub fn close(&self) {
        self.closed.store(true, Relaxed);
        rcu::synchronize_rcu();
        for irq in &self.irqs {
            // SAFETY: By the type invariants. Nobody else takes this pointer out; the readers that
            // might have loaded it are gone, and later ones see `closed` and load none.
            drop(unsafe { EventFd::from_raw(irq.eventfd.xchg(ptr::null_mut(), Full)) });
        }
    }

    /// Signals an interrupt's eventfd.
    ///
    /// Context: as [`EventFd::signal()`].
    ///
    /// # Errors
    ///
    /// - `ENOENT`: no eventfd is set for `index`, or there is no such interrupt, or the device is
    ///   closed.
    /// - Those of [`EventFd::signal()`].
    pub fn signal(&self, index: usize) -> Result {
        let slot = self.slot(index).ok_or(ENOENT)?;
        let _guard = rcu::read_lock();

        if self.closed.load(Relaxed) {
            return Err(ENOENT);
        }
        let eventfd = slot.load(Acquire);
        // SAFETY: By the type invariants, whoever takes the pointer out waits for RCU readers
        // before it drops the reference. We are one, and have not seen `closed`.
        let eventfd = unsafe { EventFd::borrow_raw(&eventfd) };

        eventfd.ok_or(ENOENT)?.signal()
    }

    /// Returns an interrupt as programs keep it; null if there is no such one.
    fn as_irq(&self, index: usize) -> *mut bindings::bpf_kvm_irq {
        let Some(index) = nospec::array_index(index, MAX_IRQS) else {
            return ptr::null_mut();
        };

        // From `self`, not from the element, as `from_irq()` goes back.
        //
        // SAFETY: `self` is valid, and `index` is in bounds.
        unsafe {
            (&raw const (*ptr::from_ref(self)).irqs)
                .cast::<Irq>()
                .add(index)
                .cast_mut()
                .cast()
        }
    }

    /// Returns what [`Self::as_irq()`] was called on, and the index.
    ///
    /// # Safety
    ///
    /// `irq` must come from `as_irq()`, and what that was called on must be valid.
    unsafe fn from_irq(irq: *mut bindings::bpf_kvm_irq) -> (NonNull<Self>, usize) {
        let irq = irq.cast::<Irq>();
        // SAFETY: By the safety requirements. CAST: `usize` has 64 bits where this is built.
        let index = unsafe { (*irq).index } as usize;
        // SAFETY: By the type invariants it is element `index` of an array in an `Irqs`.
        let irqs = unsafe {
            let first = irq.sub(index).cast::<[Irq; MAX_IRQS]>();
            crate::container_of!(first, Self, irqs)
        };

        // SAFETY: Not null, as it points into memory.
        (unsafe { NonNull::new_unchecked(irqs) }, index)
    }
}

impl Drop for Irqs {
    fn drop(&mut self) {
        for irq in &self.irqs {
            // SAFETY: By the type invariants; with `&mut self` there is no reader.
            drop(unsafe { EventFd::from_raw(irq.eventfd.load(Acquire)) });
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
    index: u32,
) -> c_int {
    // SAFETY: By the safety requirements and the type invariants of `Context` and `Binding`.
    let irqs = unsafe { &*(*(*ctx).binding).irqs.cast::<Irqs>() };

    // CAST: `usize` has 64 bits where this is built.
    from_result(|| irqs.signal(index as usize).map(|()| 0))
}

/// What the kfunc `bpf_kvm_irq_acquire()` does.
///
/// # Safety
///
/// `ctx` must be what a program is being run on, that is, a [`Context`](super::prog::Context).
#[export]
pub unsafe extern "C" fn kvm_bpf_irq_acquire(
    ctx: *const bindings::bpf_kvm_io_ctx_kern,
    index: u32,
) -> *mut bindings::bpf_kvm_irq {
    // SAFETY: By the safety requirements and the type invariants of `Context` and `Binding`.
    let irqs = unsafe { &*(*(*ctx).binding).irqs.cast::<Irqs>() };
    // CAST: `usize` has 64 bits where this is built.
    let irq = irqs.as_irq(index as usize);

    if !irq.is_null() {
        irqs.inc_ref();
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
    unsafe { Irqs::dec_ref(Irqs::from_irq(irq).0) };
}

/// What the kfunc `bpf_kvm_irq_signal_kept()` does.
///
/// # Safety
///
/// `irq` must come from [`kvm_bpf_irq_acquire()`], and not be released before this returns, or be
/// used in the RCU read-side section in which it was found.
#[export]
pub unsafe extern "C" fn kvm_bpf_irq_signal_kept(irq: *mut bindings::bpf_kvm_irq) -> c_int {
    // SAFETY: By the safety requirements.
    let (irqs, index) = unsafe { Irqs::from_irq(irq) };
    // SAFETY: As above, they are valid until we return.
    let irqs = unsafe { irqs.as_ref() };

    from_result(|| irqs.signal(index).map(|()| 0))
}
