// SPDX-License-Identifier: GPL-2.0

//! Guest memory of devices that BPF programs access.
//!
//! C headers: [`include/linux/kvm_bpf.h`](srctree/include/linux/kvm_bpf.h),
//! [`include/linux/kvm_host.h`](srctree/include/linux/kvm_host.h).
//!
//! A device has [`Windows`]: ranges of guest-physical addresses, numbered from 0, that its programs
//! may read, write or both with the kfuncs `bpf_kvm_mem_*()`, as an IOMMU lets hardware. Without a
//! window they access nothing.

use super::{
    published::{
        Published,
        Replaced, //
    },
    Vm, //
};
use crate::{
    bindings, new_mutex, nospec,
    prelude::*,
    sync::{
        aref::ARef,
        Mutex, //
    },
    uapi,
};

/// How many windows a device has.
pub const MAX_WINDOWS: usize = uapi::KVM_DEV_BPF_MAX_MEMS as usize;

/// A range of guest-physical addresses that a device's programs may access.
///
/// # Invariants
///
/// `size` is at least 1, and `start + size` does not overflow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    start: u64,
    size: u64,
    /// `KVM_BPF_MEM_*`, at least one.
    rights: u32,
}

impl Window {
    /// The `size` bytes from `start` on, with rights of `KVM_BPF_MEM_*`.
    ///
    /// # Errors
    ///
    /// - `EINVAL`: no right, or one that there is not.
    /// - `ERANGE`: the range is empty or wraps around.
    pub const fn new(start: u64, size: u64, rights: u32) -> Result<Self> {
        const ALL: u32 = uapi::KVM_BPF_MEM_READ | uapi::KVM_BPF_MEM_WRITE;

        if rights == 0 || rights & !ALL != 0 {
            return Err(EINVAL);
        }
        if size == 0 || start.checked_add(size).is_none() {
            return Err(ERANGE);
        }
        // INVARIANT: Just checked.
        Ok(Self {
            start,
            size,
            rights,
        })
    }

    /// Returns the first address.
    #[inline]
    pub const fn start(&self) -> u64 {
        self.start
    }

    /// Returns the length in bytes.
    #[inline]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Returns the rights, `KVM_BPF_MEM_*`.
    #[inline]
    pub const fn rights(&self) -> u32 {
        self.rights
    }

    #[inline]
    const fn allows(&self, gpa: u64, len: u64, right: u32) -> bool {
        gpa >= self.start
            && gpa - self.start <= self.size
            && len <= self.size - (gpa - self.start)
            && self.rights & right != 0
    }
}

/// Windows by index.
pub type List = [Option<Window>; MAX_WINDOWS];

/// The windows of a device.
#[repr(C)]
#[pin_data]
pub struct Windows {
    kern: bindings::kvm_bpf_mem,
    /// By index.
    list: Published<List>,
    vm: ARef<Vm>,
    /// Held by who changes the list.
    #[pin]
    changing: Mutex<()>,
}

impl Windows {
    /// No windows, for a device of `vm`.
    // Inlined, as what it points to calls KVM, which may be a module.
    #[inline]
    pub fn new(vm: &Vm) -> impl PinInit<Self, Error> + '_ {
        try_pin_init!(Self {
            kern: bindings::kvm_bpf_mem {
                copy: Some(Self::copy),
            },
            list: Published::new(KBox::new([None; MAX_WINDOWS], GFP_KERNEL_ACCOUNT)?),
            vm: vm.into(),
            changing <- new_mutex!(()),
        })
    }

    #[inline]
    pub(super) fn as_raw(&self) -> *const bindings::kvm_bpf_mem {
        &raw const self.kern
    }

    #[inline]
    pub(super) fn vm(&self) -> &Vm {
        &self.vm
    }

    /// Returns a window.
    pub fn get(&self, index: usize) -> Option<Window> {
        let _guard = self.changing.lock();

        // SAFETY: Only who has the lock replaces the list.
        let list = unsafe { self.list.get() };

        list.get(nospec::array_index(index, MAX_WINDOWS)?)
            .copied()
            .flatten()
    }

    /// Sets or removes a window.
    ///
    /// Dropping what this returns waits until no program uses the one that was there before.
    ///
    /// # Errors
    ///
    /// - `ENOENT`: there is no window to remove.
    /// - `ENOMEM`: out of memory.
    /// - `ENXIO`: there is no such index.
    // Inlined, as references to a VM are KVM's.
    #[inline]
    pub fn set(&self, index: usize, window: Option<Window>) -> Result<Replaced<List>> {
        let index = nospec::array_index(index, MAX_WINDOWS).ok_or(ENXIO)?;
        let _guard = self.changing.lock();
        // SAFETY: Only who has the lock replaces the list.
        let mut new = KBox::new(*unsafe { self.list.get() }, GFP_KERNEL_ACCOUNT)?;
        let slot = new.get_mut(index).ok_or(ENXIO)?;

        if core::mem::replace(slot, window).is_none() && window.is_none() {
            return Err(ENOENT);
        }
        // SAFETY: Programs look at the list in read-side sections of this VM's SRCU.
        Ok(unsafe { self.list.replace(&self.vm, new) })
    }

    /// What `copy` of `kern` does.
    ///
    /// # Safety
    ///
    /// `ctx` must be that of a [`Context`](super::prog::Context) or
    /// [`WorkContext`](super::prog::WorkContext) that a program is run on, and `mem` that of its
    /// binding. `buf` must be valid for reads and writes of `len` bytes.
    #[inline]
    unsafe extern "C" fn copy(
        ctx: *const bindings::bpf_kvm_io_ctx_kern,
        gpa: u64,
        buf: *mut c_void,
        len: u32,
        flags: u32,
        mem: *const bindings::kvm_bpf_mem,
    ) -> c_int {
        // SAFETY: By the safety requirements; `kern` is the first field.
        let (windows, vcpu) = unsafe { (&*mem.cast::<Self>(), (*ctx).vcpu) };
        let vm = windows.vm.as_raw();
        let right = if flags & bindings::KVM_COPY_TO_GUEST != 0 {
            uapi::KVM_BPF_MEM_WRITE
        } else {
            uapi::KVM_BPF_MEM_READ
        };

        // An access is in a read-side section of the SRCU of its vCPU's VM.
        //
        // SAFETY: By the safety requirements; which VM a vCPU is of does not change.
        if !vcpu.is_null() && unsafe { (*vcpu).kvm } != vm {
            return EACCES.to_errno();
        }
        // SAFETY: `windows` lives and this is in a read-side section of its VM's SRCU, as just seen
        // and by the safety requirements.
        let mut list = unsafe { windows.list.get() }.iter().flatten();

        if !list.any(|window| window.allows(gpa, len.into(), right)) {
            return EACCES.to_errno();
        }
        // SAFETY: By the safety requirements, and `vm` is valid.
        unsafe { bindings::kvm_copy_guest(vm, gpa, buf, len as usize, flags) }
    }
}

#[cfg(CONFIG_RUST_KVM_KUNIT_TEST)]
#[macros::kunit_tests(rust_kvm_mem)]
mod tests {
    use super::*;

    const READ: u32 = uapi::KVM_BPF_MEM_READ;
    const WRITE: u32 = uapi::KVM_BPF_MEM_WRITE;

    #[test]
    fn windows_that_there_cannot_be() {
        assert_eq!(Window::new(0, 1, 0), Err(EINVAL));
        assert_eq!(Window::new(0, 1, 4 | READ), Err(EINVAL));
        assert_eq!(Window::new(0, 0, READ), Err(ERANGE));
        assert_eq!(Window::new(1, u64::MAX, READ), Err(ERANGE));
        assert!(Window::new(1, u64::MAX - 1, READ | WRITE).is_ok());
    }

    #[test]
    fn accesses_lie_inside() -> Result {
        let window = Window::new(0x1000, 0x10, READ)?;

        assert!(window.allows(0x1000, 0x10, READ));
        assert!(window.allows(0x100f, 1, READ));
        assert!(window.allows(0x1010, 0, READ));
        assert!(!window.allows(0x1000, 0x10, WRITE));
        assert!(!window.allows(0xfff, 2, READ));
        assert!(!window.allows(0xfff, 0, READ));
        assert!(!window.allows(0x1000, 0x11, READ));
        assert!(!window.allows(0x1010, 1, READ));
        assert!(!window.allows(0x1011, 0, READ));
        assert!(!window.allows(u64::MAX, u64::MAX, READ));

        let window = Window::new(0, u64::MAX, WRITE)?;
        assert!(window.allows(0, u64::MAX, WRITE));
        assert!(window.allows(u64::MAX, 0, WRITE));
        assert!(!window.allows(u64::MAX, 1, WRITE));
        assert!(!window.allows(1, u64::MAX, WRITE));
        Ok(())
    }
}
