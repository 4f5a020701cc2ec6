// SPDX-License-Identifier: GPL-2.0

//! Guest memory of devices that BPF programs access.
//!
//! C headers: [`include/linux/kvm_bpf.h`](srctree/include/linux/kvm_bpf.h),
//! [`include/linux/kvm_host.h`](srctree/include/linux/kvm_host.h).
//!
//! A device has [`Windows`]: ranges of guest-physical addresses, numbered from 0, that its programs
//! may read, write or both with the kfuncs `bpf_kvm_mem_*()`, as an IOMMU lets hardware. Without a
//! window they access nothing.

use super::Vm;
use crate::{
    bindings,
    error::{
        from_result,
        to_result, //
    },
    new_mutex,
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Full, //
        },
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

type List = KVec<Window>;

/// The windows of a device.
///
/// # Invariants
///
/// - `vm` is the VM that the device is of, and valid as long as one of its SRCU's readers is.
/// - `list` came from a [`KBox`]; whoever takes it out waits for that SRCU's readers before he
///   frees it.
#[repr(C)]
#[pin_data(PinnedDrop)]
pub struct Windows {
    kern: bindings::kvm_bpf_mem,
    vm: *mut bindings::kvm,
    /// Those that there are, for programs.
    list: Atomic<*mut List>,
    /// By index.
    #[pin]
    windows: Mutex<[Option<Window>; MAX_WINDOWS]>,
}

// SAFETY: `vm` may be used on any thread, under its SRCU, as may the list.
unsafe impl Send for Windows {}
// SAFETY: As above.
unsafe impl Sync for Windows {}

#[pinned_drop]
impl PinnedDrop for Windows {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariants, and the last reference to `self` has gone, so no reader
        // is left.
        drop(unsafe { KBox::from_raw(self.list.load(Acquire)) });
    }
}

impl Windows {
    /// No windows, for a device of `vm`.
    // Inlined, as what it points to calls KVM, which may be a module.
    #[inline]
    pub fn new(vm: &Vm) -> impl PinInit<Self, Error> {
        let vm = vm.as_raw();

        try_pin_init!(Self {
            kern: bindings::kvm_bpf_mem {
                copy: Some(Self::copy),
            },
            vm,
            // INVARIANT: From a `KBox`.
            list: Atomic::new(KBox::into_raw(KBox::new(List::new(), GFP_KERNEL_ACCOUNT)?)),
            windows <- new_mutex!([None; MAX_WINDOWS]),
        })
    }

    #[inline]
    pub(super) fn as_raw(&self) -> *const bindings::kvm_bpf_mem {
        &raw const self.kern
    }

    /// Returns a window.
    pub fn get(&self, index: usize) -> Option<Window> {
        self.windows.lock().get(index).copied().flatten()
    }

    /// Sets or removes a window of `vm`, the VM that they are of, and returns the one that there
    /// was.
    ///
    /// When this returns, no program uses that one any more. It waits for those that run.
    ///
    /// # Errors
    ///
    /// - `ENOMEM`: out of memory.
    /// - `ENXIO`: there is no such index.
    #[inline]
    pub fn set(&self, vm: &Vm, index: usize, window: Option<Window>) -> Result<Option<Window>> {
        let (old, list) = self.publish(index, window)?;

        vm.srcu().synchronize_expedited();
        drop(list);
        Ok(old)
    }

    /// Has programs see a window, or see it no more. Returns what they saw before, which some may
    /// be using.
    fn publish(&self, index: usize, window: Option<Window>) -> Result<(Option<Window>, Old)> {
        let mut windows = self.windows.lock();
        let mut new = List::with_capacity(MAX_WINDOWS, GFP_KERNEL_ACCOUNT)?;
        let mut changed = *windows;
        let slot = changed.get_mut(index).ok_or(ENXIO)?;
        let old = core::mem::replace(slot, window);

        for window in changed.iter().flatten() {
            new.push_within_capacity(*window)?;
        }
        let new = KBox::new(new, GFP_KERNEL_ACCOUNT)?;
        *windows = changed;

        // INVARIANT: From a `KBox`, here and there.
        Ok((old, Old(self.list.xchg(KBox::into_raw(new), Full))))
    }

    /// What `copy` of `kern` does.
    ///
    /// # Safety
    ///
    /// `mem` must be that of a [`Windows`], in a read-side section of its VM's SRCU, on a thread
    /// with the VM's memory. `buf` must be valid for reads and writes of `len` bytes.
    #[inline]
    unsafe extern "C" fn copy(
        mem: *const bindings::kvm_bpf_mem,
        gpa: u64,
        buf: *mut c_void,
        len: u32,
        flags: u32,
    ) -> c_int {
        // SAFETY: By the safety requirements; `kern` is the first field.
        let windows = unsafe { &*mem.cast::<Self>() };
        // SAFETY: By the type invariants, whoever takes the list out waits for us.
        let list = unsafe { &*windows.list.load(Acquire) };
        let right = if flags & bindings::KVM_COPY_TO_GUEST != 0 {
            uapi::KVM_BPF_MEM_WRITE
        } else {
            uapi::KVM_BPF_MEM_READ
        };

        from_result(|| {
            if !list
                .iter()
                .any(|window| window.allows(gpa, len.into(), right))
            {
                return Err(EACCES);
            }
            // SAFETY: By the safety requirements, and `vm` is valid by the type invariants.
            to_result(unsafe {
                bindings::kvm_copy_guest(windows.vm, gpa, buf, len as usize, flags)
            })
            .map(|()| 0)
        })
    }
}

/// A list that programs do not see any more, and may still be using.
struct Old(*mut List);

impl Drop for Old {
    fn drop(&mut self) {
        // SAFETY: `Windows::set()` has waited for the readers that might have loaded it.
        drop(unsafe { KBox::from_raw(self.0) });
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
