// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The device's ioctls as they are: every call gives the kernel's answer.

use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

use kvm_bindings::{KVM_CREATE_DEVICE_TEST, kvm_create_device, kvm_device_attr};
use kvm_bpf::uapi::{
    KVM_DEV_BPF_ATTR_GROUP_INFO, KVM_DEV_BPF_ATTR_GROUP_IRQ, KVM_DEV_BPF_ATTR_GROUP_MEM,
    KVM_DEV_BPF_ATTR_GROUP_PERMS, KVM_DEV_BPF_ATTR_GROUP_PIO, KVM_DEV_BPF_ATTR_GROUP_REGION,
    KVM_DEV_BPF_ATTR_GROUP_RUN, KVM_DEV_BPF_ATTR_GROUP_WORK, KVM_DEV_TYPE_BPF, kvm_bpf_info,
    kvm_bpf_user_irq, kvm_bpf_user_mem, kvm_bpf_user_perms, kvm_bpf_user_region, kvm_bpf_user_run,
    kvm_bpf_user_work,
};
use kvm_ioctls::{DeviceFd, VmFd};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{_IOC_READ, _IOC_WRITE, ioctl_expr, ioctl_with_mut_ref};

use crate::bpf::Prog;
use crate::harness::Errno;

/// `KVM_CREATE_DEVICE`, which kvm-ioctls keeps to itself.
const KVM_CREATE_DEVICE: libc::c_ulong = ioctl_expr(
    _IOC_READ | _IOC_WRITE,
    kvm_bindings::KVMIO,
    0xe0,
    size_of::<kvm_create_device>() as u32,
);

/// What is done with an attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// `KVM_SET_DEVICE_ATTR`.
    Set,
    /// `KVM_GET_DEVICE_ATTR`.
    Get,
    /// `KVM_HAS_DEVICE_ATTR`.
    Has,
}

/// An errno, or nothing.
pub type Answer = Result<(), Errno>;

fn answer(result: Result<(), errno::Error>) -> Answer {
    result.map_err(|error| Errno(error.errno()))
}

/// Asks whether the kernel has a type of device, without creating one.
///
/// kvm-ioctls would take the 0 in the answer for an fd of its own.
pub fn test_create(vm: &VmFd, type_: u32) -> Answer {
    let mut request = kvm_create_device {
        type_,
        fd: 0,
        flags: KVM_CREATE_DEVICE_TEST,
    };
    // SAFETY: the kernel reads and writes no more than the structure.
    match unsafe { ioctl_with_mut_ref(vm, KVM_CREATE_DEVICE, &mut request) } {
        0 => Ok(()),
        _ => Err(Errno::last()),
    }
}

/// A region; `None` leaves that direction to user space.
pub fn region(
    addr: u64,
    size: u64,
    read: Option<&Prog>,
    write: Option<&Prog>,
) -> kvm_bpf_user_region {
    let fd = |prog: Option<&Prog>| prog.map_or(-1, AsRawFd::as_raw_fd);
    kvm_bpf_user_region {
        addr,
        size,
        bpf_readfd: fd(read),
        bpf_writefd: fd(write),
    }
}

/// What unregisters a region.
pub const NO_REGION: kvm_bpf_user_region = kvm_bpf_user_region {
    addr: 0,
    size: 0,
    bpf_readfd: -1,
    bpf_writefd: -1,
};

/// A program that runs without an access, and what signals it.
pub fn work(prog: Option<&Prog>, eventfd: Option<&EventFd>) -> kvm_bpf_user_work {
    kvm_bpf_user_work {
        bpf_fd: prog.map_or(-1, AsRawFd::as_raw_fd),
        eventfd: eventfd.map_or(-1, AsRawFd::as_raw_fd),
        flags: 0,
        pad: 0,
    }
}

/// What removes such a program.
pub const NO_WORK: kvm_bpf_user_work = kvm_bpf_user_work {
    bpf_fd: -1,
    eventfd: -1,
    flags: 0,
    pad: 0,
};

/// A device; dropping it closes its fd.
#[allow(missing_debug_implementations)]
pub struct Device(DeviceFd);

impl AsRawFd for Device {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// One that another process has created.
impl From<OwnedFd> for Device {
    fn from(fd: OwnedFd) -> Self {
        // SAFETY: it is open, and nobody else's from here.
        Device(unsafe { DeviceFd::from_raw_fd(fd.into_raw_fd()) })
    }
}

impl Device {
    /// Creates one that must come into being.
    #[track_caller]
    pub fn new(vm: &VmFd) -> Self {
        match Self::try_new(vm) {
            Ok(device) => device,
            Err(errno) => panic!("wanted KVM_CREATE_DEVICE to work, got {errno:?}"),
        }
    }

    /// Creates one, or gives the kernel's answer.
    pub fn try_new(vm: &VmFd) -> Result<Self, Errno> {
        let mut request = kvm_create_device {
            type_: KVM_DEV_TYPE_BPF,
            fd: 0,
            flags: 0,
        };
        match vm.create_device(&mut request) {
            Ok(fd) => Ok(Device(fd)),
            Err(error) => Err(Errno(error.errno())),
        }
    }

    /// `KVM_{SET,GET,HAS}_DEVICE_ATTR` of a region, with flags.
    pub fn with_flags(
        &self,
        index: u64,
        region: &mut kvm_bpf_user_region,
        flags: u32,
    ) -> [Answer; 3] {
        let mut attr = kvm_device_attr {
            group: KVM_DEV_BPF_ATTR_GROUP_REGION,
            attr: index,
            addr: (&raw mut *region) as u64,
            flags,
        };
        [
            answer(self.0.set_device_attr(&attr)),
            // SAFETY: the kernel writes one region to the address.
            answer(unsafe { self.0.get_device_attr(&mut attr) }),
            answer(self.0.has_device_attr(&attr)),
        ]
    }

    /// `KVM_SET_DEVICE_ATTR` with any pointer.
    pub fn set_attr(&self, group: u32, attr: u64, addr: u64) -> Answer {
        answer(self.0.set_device_attr(&kvm_device_attr {
            group,
            attr,
            addr,
            flags: 0,
        }))
    }

    /// `KVM_HAS_DEVICE_ATTR`.
    pub fn has_attr(&self, group: u32, attr: u64) -> Answer {
        answer(self.0.has_device_attr(&kvm_device_attr {
            group,
            attr,
            ..Default::default()
        }))
    }

    /// Sets, swaps or unregisters a region.
    pub fn try_set_region(&self, index: u64, region: &kvm_bpf_user_region) -> Answer {
        let addr = (&raw const *region) as u64;
        self.set_attr(KVM_DEV_BPF_ATTR_GROUP_REGION, index, addr)
    }

    /// The same, and the kernel must agree.
    #[track_caller]
    pub fn set_region(&self, index: u64, region: &kvm_bpf_user_region) {
        let answer = self.try_set_region(index, region);
        assert_eq!(answer, Ok(()), "setting region {index} to {region:x?}");
    }

    /// `KVM_GET_DEVICE_ATTR` of a region.
    pub fn region(&self, index: u64) -> Result<kvm_bpf_user_region, Errno> {
        self.range(KVM_DEV_BPF_ATTR_GROUP_REGION, index)
    }

    /// Sets, swaps or unregisters a region of ports.
    pub fn try_set_ports(&self, index: u64, region: &kvm_bpf_user_region) -> Answer {
        let addr = (&raw const *region) as u64;
        self.set_attr(KVM_DEV_BPF_ATTR_GROUP_PIO, index, addr)
    }

    /// The same, and the kernel must agree.
    #[track_caller]
    pub fn set_ports(&self, index: u64, region: &kvm_bpf_user_region) {
        let answer = self.try_set_ports(index, region);
        assert_eq!(answer, Ok(()), "setting ports {index} to {region:x?}");
    }

    /// Gives up permissions.
    pub fn try_set_perms(&self, allow: u64, require: u64) -> Answer {
        let perms = kvm_bpf_user_perms { allow, require };
        self.set_attr(KVM_DEV_BPF_ATTR_GROUP_PERMS, 0, (&raw const perms) as u64)
    }

    /// The same, and the kernel must agree.
    #[track_caller]
    pub fn set_perms(&self, allow: u64, require: u64) {
        let answer = self.try_set_perms(allow, require);
        assert_eq!(answer, Ok(()), "permissions {allow:#x}, {require:#x}");
    }

    /// The permissions that are left.
    #[track_caller]
    pub fn perms(&self) -> kvm_bpf_user_perms {
        let mut perms = kvm_bpf_user_perms::default();
        let addr = (&raw mut perms) as u64;
        // SAFETY: the kernel writes the permissions to the address.
        let answer = unsafe { self.get_attr(KVM_DEV_BPF_ATTR_GROUP_PERMS, 0, addr) };
        assert_eq!(answer, Ok(()), "KVM_GET_DEVICE_ATTR of the permissions");
        perms
    }

    /// What serves a region.
    pub fn info(&self, index: u64) -> Result<kvm_bpf_info, Errno> {
        let mut info = kvm_bpf_info::default();
        let addr = (&raw mut info) as u64;
        // SAFETY: the kernel writes one such structure to the address.
        unsafe { self.get_attr(KVM_DEV_BPF_ATTR_GROUP_INFO, index, addr) }.map(|()| info)
    }

    /// `KVM_GET_DEVICE_ATTR` of a region of ports.
    pub fn ports(&self, index: u64) -> Result<kvm_bpf_user_region, Errno> {
        self.range(KVM_DEV_BPF_ATTR_GROUP_PIO, index)
    }

    fn range(&self, group: u32, index: u64) -> Result<kvm_bpf_user_region, Errno> {
        let mut region = kvm_bpf_user_region::default();
        let addr = (&raw mut region) as u64;
        // SAFETY: the kernel writes one region to the address.
        unsafe { self.get_attr(group, index, addr) }.map(|()| region)
    }

    /// `KVM_GET_DEVICE_ATTR` with any pointer.
    ///
    /// # Safety
    ///
    /// Where the kernel can write an attribute of the group to, nothing else may be.
    pub unsafe fn get_attr(&self, group: u32, attr: u64, addr: u64) -> Answer {
        let mut attr = kvm_device_attr {
            group,
            attr,
            addr,
            flags: 0,
        };
        // SAFETY: the caller's promise.
        answer(unsafe { self.0.get_device_attr(&mut attr) })
    }

    /// Any call with any arguments.
    ///
    /// # Safety
    ///
    /// Where the kernel can write an attribute of the group to, nothing else may be.
    pub unsafe fn call(&self, call: Call, group: u32, attr: u64, addr: u64, flags: u32) -> Answer {
        let mut attr = kvm_device_attr {
            group,
            attr,
            addr,
            flags,
        };
        answer(match call {
            Call::Set => self.0.set_device_attr(&attr),
            // SAFETY: the caller's promise.
            Call::Get => unsafe { self.0.get_device_attr(&mut attr) },
            Call::Has => self.0.has_device_attr(&attr),
        })
    }

    /// Sets or detaches (-1) an interrupt's eventfd.
    pub fn try_set_irq(&self, index: u64, irq: &kvm_bpf_user_irq) -> Answer {
        let addr = (&raw const *irq) as u64;
        self.set_attr(KVM_DEV_BPF_ATTR_GROUP_IRQ, index, addr)
    }

    /// The same, and the kernel must agree.
    #[track_caller]
    pub fn set_irq(&self, index: u64, eventfd: RawFd) {
        let irq = kvm_bpf_user_irq { eventfd, flags: 0 };
        let answer = self.try_set_irq(index, &irq);
        assert_eq!(answer, Ok(()), "setting irq {index} to fd {eventfd}");
    }

    /// Sets, replaces or (of size 0) removes a window of guest memory.
    pub fn try_set_mem(&self, index: u64, mem: &kvm_bpf_user_mem) -> Answer {
        let addr = (&raw const *mem) as u64;
        self.set_attr(KVM_DEV_BPF_ATTR_GROUP_MEM, index, addr)
    }

    /// The same, and the kernel must agree.
    #[track_caller]
    pub fn set_mem(&self, index: u64, mem: &kvm_bpf_user_mem) {
        let answer = self.try_set_mem(index, mem);
        assert_eq!(answer, Ok(()), "setting window {index} to {mem:x?}");
    }

    /// `KVM_GET_DEVICE_ATTR` of a window of guest memory.
    pub fn mem(&self, index: u64) -> Result<kvm_bpf_user_mem, Errno> {
        // It is to write all of it.
        let mut mem = kvm_bpf_user_mem {
            pad: 7,
            ..Default::default()
        };
        let addr = (&raw mut mem) as u64;
        // SAFETY: the kernel writes one window to the address.
        unsafe { self.get_attr(KVM_DEV_BPF_ATTR_GROUP_MEM, index, addr) }.map(|()| mem)
    }

    /// Sets, swaps or removes a program that runs without an access.
    pub fn try_set_work(&self, index: u64, work: &kvm_bpf_user_work) -> Answer {
        let addr = (&raw const *work) as u64;
        self.set_attr(KVM_DEV_BPF_ATTR_GROUP_WORK, index, addr)
    }

    /// The same, and the kernel must agree.
    #[track_caller]
    pub fn set_work(&self, index: u64, work: &kvm_bpf_user_work) {
        let answer = self.try_set_work(index, work);
        assert_eq!(answer, Ok(()), "setting work {index} to {work:?}");
    }

    /// Runs such a program once, with that in `buf`.
    pub fn run(&self, index: u64, arg: u64) -> Answer {
        let run = kvm_bpf_user_run { arg };
        self.set_attr(KVM_DEV_BPF_ATTR_GROUP_RUN, index, (&raw const run) as u64)
    }
}
