// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The kernel's user ABI, as far as `kvm-bindings` does not have it yet.
//!
//! Names and layouts are those of `include/uapi/linux/kvm.h` and
//! `include/uapi/linux/bpf.h` with the series applied.

#![allow(non_camel_case_types)]

/// Device type for `KVM_CREATE_DEVICE`: a device made of eBPF programs.
pub const KVM_DEV_TYPE_BPF: u32 = 17;

/// Attribute group: one MMIO region per index, [`kvm_bpf_user_region`].
pub const KVM_DEV_BPF_ATTR_GROUP_REGION: u32 = 1;
/// Attribute group: one interrupt per index, [`kvm_bpf_user_irq`].
pub const KVM_DEV_BPF_ATTR_GROUP_IRQ: u32 = 2;
/// Attribute group, on x86: one region of ports per index, [`kvm_bpf_user_region`]. No index is
/// in use in both groups of regions.
pub const KVM_DEV_BPF_ATTR_GROUP_PIO: u32 = 3;
/// Attribute group: one window of guest memory per index, [`kvm_bpf_user_mem`].
pub const KVM_DEV_BPF_ATTR_GROUP_MEM: u32 = 4;
/// Attribute group: one program per index that runs without a guest's access,
/// [`kvm_bpf_user_work`]. Its indices are its own.
pub const KVM_DEV_BPF_ATTR_GROUP_WORK: u32 = 5;
/// Attribute group: runs the WORK program of that index once, [`kvm_bpf_user_run`].
pub const KVM_DEV_BPF_ATTR_GROUP_RUN: u32 = 6;

/// Attribute group: what the device's programs may contain and user space may do with it,
/// [`kvm_bpf_user_perms`]. Its only index is 0.
pub const KVM_DEV_BPF_ATTR_GROUP_PERMS: u32 = 7;
/// Attribute group: what serves the region of that index, [`kvm_bpf_info`]. It is only read.
pub const KVM_DEV_BPF_ATTR_GROUP_INFO: u32 = 8;

/// Capability of a VM: `KVM_ENABLE_CAP` with 1 as its first argument refuses it all further
/// devices of type [`KVM_DEV_TYPE_BPF`], for good.
pub const KVM_CAP_BPF_SEAL: u32 = 252;

/// In [`kvm_bpf_user_perms::allow`]: programs call `bpf_kvm_irq_*()`.
pub const KVM_BPF_ALLOW_IRQ: u64 = 0x1;
/// In [`kvm_bpf_user_perms::allow`]: programs call `bpf_get_cpu_*()`.
pub const KVM_BPF_ALLOW_HOST_CPU: u64 = 0x2;
/// In [`kvm_bpf_user_perms::allow`]: programs call `bpf_set_current_uclamp()`.
pub const KVM_BPF_ALLOW_UCLAMP: u64 = 0x4;
/// In [`kvm_bpf_user_perms::allow`]: programs call `bpf_kvm_mem_read*()`.
pub const KVM_BPF_ALLOW_MEM_R: u64 = 0x8;
/// In [`kvm_bpf_user_perms::allow`]: programs call `bpf_kvm_mem_write*()`.
pub const KVM_BPF_ALLOW_MEM_W: u64 = 0x10;
/// In [`kvm_bpf_user_perms::allow`]: programs have maps with timers, work queues or task work.
pub const KVM_BPF_ALLOW_ASYNC: u64 = 0x20;
/// In [`kvm_bpf_user_perms::allow`]: programs may sleep.
pub const KVM_BPF_ALLOW_SLEEP: u64 = 0x40;
/// In [`kvm_bpf_user_perms::allow`]: programs do tail calls.
pub const KVM_BPF_ALLOW_TAIL_CALL: u64 = 0x80;
/// In [`kvm_bpf_user_perms::allow`]: programs have maps of maps.
pub const KVM_BPF_ALLOW_INNER_MAPS: u64 = 0x100;
/// In [`kvm_bpf_user_perms::allow`]: programs have arenas.
pub const KVM_BPF_ALLOW_ARENA: u64 = 0x200;
/// In [`kvm_bpf_user_perms::allow`]: programs call kfuncs that have no permission of their own.
pub const KVM_BPF_ALLOW_OTHER_KFUNC: u64 = 0x400;
/// In [`kvm_bpf_user_perms::allow`]: user space registers regions.
pub const KVM_BPF_ALLOW_NEW_REGION: u64 = 0x1_0000;
/// In [`kvm_bpf_user_perms::allow`]: user space replaces the programs of regions.
pub const KVM_BPF_ALLOW_REPLACE: u64 = 0x2_0000;
/// In [`kvm_bpf_user_perms::allow`]: user space removes regions.
pub const KVM_BPF_ALLOW_REMOVE: u64 = 0x4_0000;
/// In [`kvm_bpf_user_perms::allow`]: user space sets interrupts.
pub const KVM_BPF_ALLOW_SET_IRQ: u64 = 0x8_0000;
/// In [`kvm_bpf_user_perms::allow`]: user space sets windows.
pub const KVM_BPF_ALLOW_SET_MEM: u64 = 0x10_0000;
/// In [`kvm_bpf_user_perms::allow`]: user space sets regions of ports.
pub const KVM_BPF_ALLOW_SET_PIO: u64 = 0x20_0000;
/// In [`kvm_bpf_user_perms::allow`]: user space sets WORK programs.
pub const KVM_BPF_ALLOW_SET_WORK: u64 = 0x40_0000;
/// In [`kvm_bpf_user_perms::allow`]: user space runs WORK programs.
pub const KVM_BPF_ALLOW_RUN: u64 = 0x80_0000;
/// In [`kvm_bpf_user_perms::require`]: no program of the device is extended by another.
pub const KVM_BPF_REQUIRE_NOT_EXTENSIBLE: u64 = 0x1;

/// In [`kvm_bpf_info::flags`]: the program that handles reads may sleep.
pub const KVM_BPF_INFO_READ_SLEEPS: u32 = 0x1;
/// In [`kvm_bpf_info::flags`]: the program that handles writes may sleep.
pub const KVM_BPF_INFO_WRITE_SLEEPS: u32 = 0x2;

/// How many regions a device has: indices 0 to one below this.
pub const KVM_DEV_BPF_MAX_REGIONS: u64 = 256;
/// How many interrupts a device has: indices 0 to one below this.
pub const KVM_DEV_BPF_MAX_IRQS: u64 = 256;
/// How many windows a device has: indices 0 to one below this.
pub const KVM_DEV_BPF_MAX_MEMS: u64 = 32;
/// In [`kvm_bpf_user_mem::flags`]: programs may read.
pub const KVM_BPF_MEM_READ: u32 = 1;
/// In [`kvm_bpf_user_mem::flags`]: programs may write.
pub const KVM_BPF_MEM_WRITE: u32 = 2;
/// How many WORK programs a device has: indices 0 to one below this.
pub const KVM_DEV_BPF_MAX_WORKS: u64 = 16;

/// Program type of read handlers.
pub const BPF_PROG_TYPE_KVM_IO_READ: u32 = 33;
/// Program type of write handlers.
pub const BPF_PROG_TYPE_KVM_IO_WRITE: u32 = 34;
/// Program type of programs that run without a guest's access.
pub const BPF_PROG_TYPE_KVM_IO_WORK: u32 = 35;

/// `struct kvm_bpf_user_region`: a range of guest-physical addresses, or ports, and its programs.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct kvm_bpf_user_region {
    /// First guest-physical address, or port.
    pub addr: u64,
    /// Length in bytes; 0 with both fds -1 unregisters.
    pub size: u64,
    /// Program of type [`BPF_PROG_TYPE_KVM_IO_READ`], or -1: reads exit to the VMM.
    pub bpf_readfd: i32,
    /// Program of type [`BPF_PROG_TYPE_KVM_IO_WRITE`], or -1: writes exit to the VMM.
    pub bpf_writefd: i32,
}

/// None: what unregisters.
impl Default for kvm_bpf_user_region {
    fn default() -> Self {
        kvm_bpf_user_region {
            addr: 0,
            size: 0,
            bpf_readfd: -1,
            bpf_writefd: -1,
        }
    }
}

/// `struct kvm_bpf_user_irq`: the eventfd that an interrupt of the device signals.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct kvm_bpf_user_irq {
    /// An eventfd, or -1 to detach.
    pub eventfd: i32,
    /// Must be 0.
    pub flags: u32,
}

/// None: what detaches.
impl Default for kvm_bpf_user_irq {
    fn default() -> Self {
        kvm_bpf_user_irq {
            eventfd: -1,
            flags: 0,
        }
    }
}

/// `struct kvm_bpf_user_mem`: guest memory that the device's programs may access.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct kvm_bpf_user_mem {
    /// First guest-physical address.
    pub addr: u64,
    /// Length in bytes; 0, without flags, removes.
    pub size: u64,
    /// [`KVM_BPF_MEM_READ`], [`KVM_BPF_MEM_WRITE`] or both.
    pub flags: u32,
    /// Must be 0.
    pub pad: u32,
}

/// `struct kvm_bpf_user_work`: a program that runs without a guest's access.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct kvm_bpf_user_work {
    /// Program of type [`BPF_PROG_TYPE_KVM_IO_WORK`], or -1 to remove the index's.
    pub bpf_fd: i32,
    /// An eventfd whose signals run it too, or -1: it runs by [`KVM_DEV_BPF_ATTR_GROUP_RUN`] alone.
    pub eventfd: i32,
    /// Must be 0.
    pub flags: u32,
    /// Must be 0.
    pub pad: u32,
}

/// None: what removes.
impl Default for kvm_bpf_user_work {
    fn default() -> Self {
        kvm_bpf_user_work {
            bpf_fd: -1,
            eventfd: -1,
            flags: 0,
            pad: 0,
        }
    }
}

/// `struct kvm_bpf_user_run`: one run of a WORK program.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct kvm_bpf_user_run {
    /// What the program finds in the context's `buf`.
    pub arg: u64,
}

/// `struct kvm_bpf_user_perms`: the permissions of a device, which only ever become fewer.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct kvm_bpf_user_perms {
    /// `KVM_BPF_ALLOW_*`: can only lose bits.
    pub allow: u64,
    /// `KVM_BPF_REQUIRE_*`: can only gain bits.
    pub require: u64,
}

/// `struct kvm_bpf_info`: a region and the programs that serve it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct kvm_bpf_info {
    /// First guest-physical address, or port.
    pub addr: u64,
    /// Length in bytes.
    pub size: u64,
    /// [`KVM_DEV_BPF_ATTR_GROUP_REGION`] or [`KVM_DEV_BPF_ATTR_GROUP_PIO`].
    pub kind: u32,
    /// The number by which bpf(2) knows the program that handles reads; 0 for none.
    pub read_id: u32,
    /// The same for writes.
    pub write_id: u32,
    /// `KVM_BPF_INFO_*`.
    pub flags: u32,
    /// The tag of the program that handles reads, as bpf(2) returns it; zeroes for none.
    pub read_tag: [u8; 8],
    /// The same for writes.
    pub write_tag: [u8; 8],
}
