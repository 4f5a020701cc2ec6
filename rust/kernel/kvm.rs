// SPDX-License-Identifier: GPL-2.0

//! Virtual devices for KVM.
//!
//! C headers: [`include/linux/kvm_host.h`](srctree/include/linux/kvm_host.h),
//! [`include/kvm/iodev.h`](srctree/include/kvm/iodev.h).
//!
//! - [`device`]: what user space creates with `KVM_CREATE_DEVICE`.
//! - [`io`]: what handles a guest's accesses of a range of addresses.
//! - [`prog`]: BPF programs as such handlers.
//! - [`irq`]: interrupts that such programs signal.
//! - [`mem`]: guest memory that they access.
//!
//! Not covered: vCPU state, irqchips, buses other than those for MMIO and ports.
//!
//! KVM may be a module, and then this crate, which is part of the kernel image, must not refer to
//! KVM's symbols: each function here that calls KVM is generic or `#[inline]`, so that its code is
//! generated in the module that uses it.

use crate::{
    bindings,
    sync::{
        aref::AlwaysRefCounted,
        Mutex,
        Srcu, //
    },
    types::Opaque,
};
use core::ptr::NonNull;

pub mod device;
pub mod io;
pub mod irq;
pub mod mem;
pub mod prog;
mod published;

/// A virtual machine.
///
/// Wraps the kernel's `struct kvm`.
#[repr(transparent)]
pub struct Vm(Opaque<bindings::kvm>);

// SAFETY: `struct kvm` is shared by the threads of its vCPUs, and any thread may drop the last
// reference.
unsafe impl Send for Vm {}
// SAFETY: `struct kvm` is shared by the threads of its vCPUs.
unsafe impl Sync for Vm {}

// SAFETY: A `struct kvm` is freed when the count that these functions maintain drops to zero.
unsafe impl AlwaysRefCounted for Vm {
    #[inline]
    fn inc_ref(&self) {
        // SAFETY: By the existence of `&self` the count is not zero.
        unsafe { bindings::kvm_get_kvm(self.as_raw()) };
    }

    #[inline]
    unsafe fn dec_ref(obj: NonNull<Self>) {
        // SAFETY: The caller gives up a reference of its own.
        unsafe { bindings::kvm_put_kvm(obj.cast().as_ptr()) };
    }
}

impl Vm {
    /// Borrows a `struct kvm`.
    ///
    /// # Safety
    ///
    /// `ptr` must be valid, with a reference held, for `'a`.
    #[inline]
    unsafe fn from_raw<'a>(ptr: *mut bindings::kvm) -> &'a Self {
        // SAFETY: By the safety requirements; `Vm` is `repr(transparent)` over `struct kvm`.
        unsafe { &*ptr.cast() }
    }

    #[inline]
    fn as_raw(&self) -> *mut bindings::kvm {
        self.0.get()
    }

    /// Returns the lock under which the VM's memory slots and buses change.
    ///
    /// Nests inside `kvm->lock`; must not be taken in a read-side section of [`Self::srcu()`].
    #[inline]
    fn slots_lock(&self) -> &Mutex<()> {
        // SAFETY: `slots_lock` is initialised by `kvm_create_vm()` and lives as long as the VM.
        unsafe { Mutex::from_raw(&raw mut (*self.as_raw()).slots_lock) }
    }

    /// Whether user space has given up that the VM gets more devices of type `KVM_DEV_TYPE_BPF`.
    ///
    /// In [`device::Device::create()`], where `kvm->lock` is held, this does not change.
    #[inline]
    pub fn is_bpf_sealed(&self) -> bool {
        // SAFETY: The VM is valid. Others set it with `kvm->lock` held, once.
        unsafe { (&raw const (*self.as_raw()).bpf_sealed).read_volatile() }
    }

    /// Returns the SRCU domain that protects the VM's memory slots and buses.
    #[inline]
    fn srcu(&self) -> &Srcu {
        // SAFETY: `srcu` is initialised by `kvm_create_vm()` and lives as long as the VM; `Srcu`
        // is `repr(transparent)` over `struct srcu_struct`.
        unsafe { &*(&raw const (*self.as_raw()).srcu).cast() }
    }
}

/// A virtual CPU.
///
/// Wraps the kernel's `struct kvm_vcpu`. Only ever borrowed, by what its thread calls.
#[repr(transparent)]
pub struct Vcpu(Opaque<bindings::kvm_vcpu>);

impl Vcpu {
    /// Borrows a `struct kvm_vcpu`.
    ///
    /// # Safety
    ///
    /// `ptr` must be valid for `'a`, and the caller must be the thread that runs it.
    #[inline]
    unsafe fn from_raw<'a>(ptr: *mut bindings::kvm_vcpu) -> &'a Self {
        // SAFETY: By the safety requirements; `Vcpu` is `repr(transparent)`.
        unsafe { &*ptr.cast() }
    }

    #[inline]
    fn as_raw(&self) -> *mut bindings::kvm_vcpu {
        self.0.get()
    }
}
