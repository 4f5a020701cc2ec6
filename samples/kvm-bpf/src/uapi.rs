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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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

/// `struct kvm_bpf_user_irq`: the eventfd that an interrupt of the device signals.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct kvm_bpf_user_irq {
    /// An eventfd, or -1 to detach.
    pub eventfd: i32,
    /// Must be 0.
    pub flags: u32,
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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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

/// `struct kvm_bpf_user_run`: one run of a WORK program.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct kvm_bpf_user_run {
    /// What the program finds in the context's `buf`.
    pub arg: u64,
}
