// SPDX-License-Identifier: GPL-2.0

//! Devices that user space creates with `KVM_CREATE_DEVICE`.
//!
//! C header: [`include/linux/kvm_host.h`](srctree/include/linux/kvm_host.h).
//!
//! Implement [`Device`], and declare the module with [`module_kvm_device!`]. The module stays while
//! one of its devices exists.
//!
//! [`module_kvm_device!`]: crate::module_kvm_device
//!
//! A device lives as long as its file descriptor, which keeps its VM alive. Not covered: devices
//! that live as long as the VM (`destroy`), ioctls other than attributes, `mmap`.

use super::Vm;
use crate::{
    bindings,
    error::{
        from_result,
        to_result,
        VTABLE_DEFAULT_ERROR, //
    },
    module::this_module,
    prelude::*,
    seq_file::SeqFile,
    str::CStr,
    transmute::{
        AsBytes,
        FromBytes, //
    },
    types::ForeignOwnable,
    uaccess::{
        UserPtr,
        UserSlice, //
    },
    uapi,
};
use core::marker::PhantomData;

/// A device attribute, as `KVM_{SET,GET,HAS}_DEVICE_ATTR` name it.
pub struct Attr<'a>(&'a bindings::kvm_device_attr);

impl Attr<'_> {
    /// Returns the group.
    #[inline]
    pub fn group(&self) -> u32 {
        self.0.group
    }

    /// Returns which attribute of the group it is.
    #[inline]
    pub fn index(&self) -> u64 {
        self.0.attr
    }

    /// Copies the attribute's value from user space.
    ///
    /// # Errors
    ///
    /// `EFAULT` if the address that user space has given is bad.
    #[inline]
    pub fn read<T: FromBytes>(&self) -> Result<T> {
        self.user(size_of::<T>()).reader().read()
    }

    /// Copies the attribute's value to user space.
    ///
    /// # Errors
    ///
    /// `EFAULT` if the address that user space has given is bad.
    #[inline]
    pub fn write<T: AsBytes>(&self, value: &T) -> Result {
        self.user(size_of::<T>()).writer().write(value)
    }

    #[inline]
    fn user(&self, len: usize) -> UserSlice {
        // CAST: The address is as wide as a pointer on the architectures that have this.
        UserSlice::new(UserPtr::from_addr(self.0.addr as usize), len)
    }
}

// SAFETY: Any bytes make a valid value.
unsafe impl FromBytes for uapi::kvm_bpf_user_region {}
// SAFETY: It has no padding.
unsafe impl AsBytes for uapi::kvm_bpf_user_region {}
// SAFETY: Any bytes make a valid value.
unsafe impl FromBytes for uapi::kvm_bpf_user_irq {}
// SAFETY: Any bytes make a valid value.
unsafe impl FromBytes for uapi::kvm_bpf_user_mem {}
// SAFETY: It has no padding.
unsafe impl AsBytes for uapi::kvm_bpf_user_mem {}
// SAFETY: Any bytes make a valid value.
unsafe impl FromBytes for uapi::kvm_bpf_user_work {}
// SAFETY: Any bytes make a valid value.
unsafe impl FromBytes for uapi::kvm_bpf_user_run {}
// SAFETY: Any bytes make a valid value.
unsafe impl FromBytes for uapi::kvm_bpf_user_perms {}
// SAFETY: It has no padding.
unsafe impl AsBytes for uapi::kvm_bpf_user_perms {}
// SAFETY: It has no padding.
unsafe impl AsBytes for uapi::kvm_bpf_info {}

/// A device.
#[vtable]
pub trait Device: Sized + Send + Sync + 'static {
    /// Which device it is, one of `enum kvm_device_type`.
    const TYPE: u32;

    /// The name of the device's file, as `/proc/PID/fd` shows it.
    const NAME: &'static CStr;

    /// Creates a device for `vm`. Called with `kvm->lock` held.
    fn create(vm: &Vm) -> impl PinInit<Self, Error>;

    /// Sets an attribute. No lock is held, so calls may overlap.
    fn set_attr(&self, vm: &Vm, attr: &Attr<'_>) -> Result;

    /// Returns an attribute's value. No lock is held, so calls may overlap.
    fn get_attr(&self, _vm: &Vm, _attr: &Attr<'_>) -> Result {
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// Stops what the device does, and waits for that. Called before the device is dropped, which
    /// is with `kvm->lock` held, as this is not. Other functions of this trait are called neither
    /// meanwhile nor later.
    fn quiesce(&self) {
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// Whether there is such an attribute; if not, why, usually `ENXIO`.
    fn has_attr(&self, vm: &Vm, attr: &Attr<'_>) -> Result;

    /// Says what there is to know about the device, for `/proc/PID/fdinfo`. No lock is held, so
    /// calls may overlap with all others.
    ///
    /// Whoever may trace the process reads it, so no address of the kernel's belongs there.
    fn show_fdinfo(&self, _vm: &Vm, _m: &SeqFile) {
        build_error!(VTABLE_DEFAULT_ERROR)
    }
}

/// Declares a kernel module that provides one type of device.
///
/// # Examples
///
/// A device, of a type that is made up, that counts how often its attribute 0 is set. It is not
/// built, as KVM may be a module:
///
/// ```ignore
/// use kernel::{
///     kvm::{
///         device::{Attr, Device},
///         Vm,
///     },
///     prelude::*,
///     sync::atomic::{Atomic, Relaxed},
///     uapi,
/// };
///
/// kernel::module_kvm_device! {
///     type: Counter,
///     name: "kvm_counter",
///     description: "A KVM device that counts",
///     license: "GPL",
/// }
///
/// struct Counter {
///     count: Atomic<u64>,
/// }
///
/// #[vtable]
/// impl Device for Counter {
///     const TYPE: u32 = uapi::kvm_device_type_KVM_DEV_TYPE_COUNTER;
///     const NAME: &'static CStr = c"kvm-counter";
///
///     fn create(_vm: &Vm) -> impl PinInit<Self, Error> {
///         Ok(Self {
///             count: Atomic::new(0),
///         })
///     }
///
///     fn set_attr(&self, vm: &Vm, attr: &Attr<'_>) -> Result {
///         self.has_attr(vm, attr)?;
///         self.count.fetch_add(1, Relaxed);
///         Ok(())
///     }
///
///     fn get_attr(&self, vm: &Vm, attr: &Attr<'_>) -> Result {
///         self.has_attr(vm, attr)?;
///         attr.write(&self.count.load(Relaxed))
///     }
///
///     fn has_attr(&self, _vm: &Vm, attr: &Attr<'_>) -> Result {
///         match (attr.group(), attr.index()) {
///             (0, 0) => Ok(()),
///             _ => Err(ENXIO),
///         }
///     }
/// }
/// ```
#[macro_export]
macro_rules! module_kvm_device {
    (type: $type:ty, $($info:tt)*) => {
        struct DeviceModule {
            _type: $crate::kvm::device::Registration<$type>,
        }

        impl $crate::Module for DeviceModule {
            fn init(_module: &'static $crate::ThisModule) -> $crate::error::Result<Self> {
                Ok(Self {
                    // SAFETY: `module!` calls `init` first, of which this is the last step, and
                    // drops the result before the module goes. Any other call fails, as the type
                    // is registered then.
                    _type: unsafe { $crate::kvm::device::Registration::new() }?,
                })
            }
        }

        $crate::prelude::module! {
            type: DeviceModule,
            $($info)*
        }
    };
}

/// The registration of a device type; [`module_kvm_device!`] makes one.
///
/// [`module_kvm_device!`]: crate::module_kvm_device
///
/// # Invariants
///
/// KVM creates devices of the type `T::TYPE` with `DeviceVTable::<T>`.
pub struct Registration<T: Device>(PhantomData<T>);

impl<T: Device> Registration<T> {
    /// Allows user space to create devices of type `T`.
    ///
    /// # Safety
    ///
    /// The result must be dropped before the module goes, and the module's initialisation must not
    /// fail after this. Otherwise KVM calls code that has gone.
    ///
    /// # Errors
    ///
    /// - `ENOEXEC` if KVM does not belong to this kernel.
    /// - `EEXIST` if KVM has a device of the type `T::TYPE` already.
    pub unsafe fn new() -> Result<Self> {
        super::prog::check_layout()?;
        // SAFETY: The table is valid for as long as the module is, and dropping `Self` unregisters
        // it, which by the safety requirements comes first.
        to_result(unsafe {
            bindings::kvm_register_device_ops(DeviceVTable::<T>::build(), T::TYPE)
        })?;
        // INVARIANT: Registered just now.
        Ok(Self(PhantomData))
    }
}

impl<T: Device> Drop for Registration<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariants this is our own registration.
        unsafe { bindings::kvm_unregister_device_ops(T::TYPE) };
    }
}

struct DeviceVTable<T: Device>(PhantomData<T>);

impl<T: Device> DeviceVTable<T> {
    /// # Safety
    ///
    /// `dev` must be a device that is being created.
    unsafe extern "C" fn create(dev: *mut bindings::kvm_device, _type: u32) -> c_int {
        // SAFETY: KVM has set `kvm`, and creates the device by an ioctl of that VM.
        let vm = unsafe { Vm::from_raw((*dev).kvm) };

        from_result(|| {
            let device = KBox::pin_init(T::create(vm), GFP_KERNEL_ACCOUNT)?;

            // SAFETY: `private` is the device's own, from `create` to `release`.
            unsafe { (*dev).private = device.into_foreign() };
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// `dev` must be a device that [`Self::create()`] has set up and whose file is gone.
    unsafe extern "C" fn release(dev: *mut bindings::kvm_device) {
        // SAFETY: From `into_foreign()` in `create()`; with its file, all other users are gone.
        drop(unsafe { Pin::<KBox<T>>::from_foreign((*dev).private) });
        // SAFETY: `release` frees the device, which KVM has allocated with `kzalloc()`.
        unsafe { bindings::kfree(dev.cast()) };
    }

    /// # Safety
    ///
    /// `dev` must be a device that [`Self::create()`] has set up and whose file is gone, before
    /// [`Self::release()`].
    unsafe extern "C" fn quiesce(dev: *mut bindings::kvm_device) {
        // SAFETY: By the safety requirements. `create()` has set `private`.
        unsafe { Pin::<KBox<T>>::borrow((*dev).private) }.quiesce();
    }

    /// # Safety
    ///
    /// As for [`Self::set_attr()`].
    unsafe fn with(
        dev: *mut bindings::kvm_device,
        attr: *mut bindings::kvm_device_attr,
        f: impl FnOnce(&T, &Vm, &Attr<'_>) -> Result,
    ) -> c_int {
        // SAFETY: By the safety requirements. `create()` has set `private`, and `release()` comes
        // after all ioctls.
        let device = unsafe { Pin::<KBox<T>>::borrow((*dev).private) };
        // SAFETY: By the safety requirements; the device's file pins the VM.
        let vm = unsafe { Vm::from_raw((*dev).kvm) };
        // SAFETY: By the safety requirements.
        let attr = Attr(unsafe { &*attr });

        // KVM itself does not look at the flags, of which there are none yet.
        if attr.0.flags != 0 {
            return EINVAL.to_errno();
        }
        from_result(|| f(device.get_ref(), vm, &attr).map(|()| 0))
    }

    /// # Safety
    ///
    /// `dev` must be a device that [`Self::create()`] has set up, during an ioctl on its file.
    /// `attr` must be valid for reads.
    unsafe extern "C" fn set_attr(
        dev: *mut bindings::kvm_device,
        attr: *mut bindings::kvm_device_attr,
    ) -> c_int {
        // SAFETY: By the safety requirements.
        unsafe { Self::with(dev, attr, T::set_attr) }
    }

    /// # Safety
    ///
    /// As for [`Self::set_attr()`].
    unsafe extern "C" fn get_attr(
        dev: *mut bindings::kvm_device,
        attr: *mut bindings::kvm_device_attr,
    ) -> c_int {
        // SAFETY: By the safety requirements.
        unsafe { Self::with(dev, attr, T::get_attr) }
    }

    /// # Safety
    ///
    /// As for [`Self::set_attr()`].
    unsafe extern "C" fn has_attr(
        dev: *mut bindings::kvm_device,
        attr: *mut bindings::kvm_device_attr,
    ) -> c_int {
        // SAFETY: By the safety requirements.
        unsafe { Self::with(dev, attr, T::has_attr) }
    }

    /// # Safety
    ///
    /// `dev` must be a device that [`Self::create()`] has set up and whose file is open, `m` what
    /// its `show_fdinfo` writes to.
    unsafe extern "C" fn show_fdinfo(dev: *mut bindings::kvm_device, m: *mut bindings::seq_file) {
        // SAFETY: By the safety requirements. `create()` has set `private`, and `release()` comes
        // after the file's last use.
        let device = unsafe { Pin::<KBox<T>>::borrow((*dev).private) };
        // SAFETY: By the safety requirements; the device's file pins the VM.
        let vm = unsafe { Vm::from_raw((*dev).kvm) };

        // SAFETY: By the safety requirements.
        device
            .get_ref()
            .show_fdinfo(vm, unsafe { SeqFile::from_raw(m) });
    }

    const VTABLE: bindings::kvm_device_ops = bindings::kvm_device_ops {
        name: crate::str::as_char_ptr_in_const_context(T::NAME),
        owner: this_module::<T::OwnerModule>().as_ptr(),
        create: Some(Self::create),
        quiesce: if T::HAS_QUIESCE {
            Some(Self::quiesce)
        } else {
            None
        },
        release: Some(Self::release),
        set_attr: Some(Self::set_attr),
        get_attr: if T::HAS_GET_ATTR {
            Some(Self::get_attr)
        } else {
            None
        },
        has_attr: Some(Self::has_attr),
        show_fdinfo: if T::HAS_SHOW_FDINFO {
            Some(Self::show_fdinfo)
        } else {
            None
        },
        ..pin_init::zeroed()
    };

    const fn build() -> &'static bindings::kvm_device_ops {
        &Self::VTABLE
    }
}
