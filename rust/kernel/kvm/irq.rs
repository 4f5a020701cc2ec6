// SPDX-License-Identifier: GPL-2.0

//! Interrupts of devices that BPF programs raise.
//!
//! C header: [`include/linux/kvm_bpf.h`](srctree/include/linux/kvm_bpf.h).
//!
//! A device has [`Lines`], numbered from 0. Each may have an eventfd, which user space wires to
//! the VM's interrupt controller with `KVM_IRQFD`, or waits for itself. A program signals a line of
//! its own device with the kfunc `bpf_kvm_irq_signal()`.

use crate::{
    bindings,
    error::from_result,
    eventfd::EventFd,
    macros::export,
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Full, //
        },
        rcu, //
    },
    uapi,
};
use core::{
    mem::ManuallyDrop,
    ptr, //
};

/// How many lines a device has.
pub const MAX_LINES: usize = uapi::KVM_DEV_BPF_MAX_IRQS as usize;

/// The interrupt lines of a device.
///
/// # Invariants
///
/// Each pointer is null or came from [`EventFd::into_raw()`]; whoever takes it out waits for RCU
/// readers before it drops the reference.
pub struct Lines {
    eventfds: [Atomic<*mut bindings::eventfd_ctx>; MAX_LINES],
}

impl Lines {
    /// Creates lines without eventfds.
    pub fn new() -> impl Init<Self> {
        // INVARIANT: All pointers are null.
        init!(Self {
            eventfds <- pin_init::init_array_from_fn(|_| Atomic::new(ptr::null_mut())),
        })
    }

    /// Sets or removes the eventfd of a line, and returns the one it had.
    ///
    /// Does nothing if there is no such line.
    ///
    /// When this returns, nobody signals the old one any more. Sleeps for an RCU grace period if
    /// there was one.
    pub fn set(&self, line: usize, eventfd: Option<EventFd>) -> Option<EventFd> {
        let slot = self.eventfds.get(line)?;
        let new = eventfd.map_or(ptr::null_mut(), EventFd::into_raw);
        let old = slot.xchg(new, Full);

        if !old.is_null() {
            rcu::synchronize_rcu();
        }
        // SAFETY: By the type invariants. Nobody else has taken this pointer out, and the readers
        // that might have loaded it are gone.
        unsafe { EventFd::from_raw(old) }
    }

    /// Signals a line's eventfd.
    ///
    /// Context: as [`EventFd::signal()`].
    ///
    /// # Errors
    ///
    /// - `ENOENT`: no eventfd is set for `line`, or there is no such line.
    /// - Those of [`EventFd::signal()`].
    pub fn signal(&self, line: usize) -> Result {
        let slot = self.eventfds.get(line).ok_or(ENOENT)?;
        let _guard = rcu::read_lock();

        // SAFETY: By the type invariants, whoever takes the pointer out waits for us; and we leave
        // the reference to them.
        let eventfd = unsafe { EventFd::from_raw(slot.load(Acquire)) }.map(ManuallyDrop::new);
        eventfd.ok_or(ENOENT)?.signal()
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        for slot in &self.eventfds {
            // SAFETY: By the type invariants; with `&mut self` there is no reader.
            drop(unsafe { EventFd::from_raw(slot.load(Acquire)) });
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
