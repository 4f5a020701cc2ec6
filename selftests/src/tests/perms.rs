// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Permissions: what programs may contain, what user space may do, and that none come back.

use std::os::fd::{AsRawFd, BorrowedFd};

use kvm_bindings::{KVMIO, kvm_enable_cap};
use kvm_bpf::uapi::{
    KVM_BPF_MEM_READ, KVM_BPF_REQUIRE_NOT_EXTENSIBLE, KVM_CAP_BPF_SEAL,
    KVM_DEV_BPF_ATTR_GROUP_PERMS, kvm_bpf_user_mem, kvm_bpf_user_perms, kvm_bpf_user_region,
};
use kvm_bpf_selftests::bpf::ProgType;
use kvm_bpf_selftests::device::{Answer, Device, region, work};
use kvm_bpf_selftests::guest::Guest;
use kvm_bpf_selftests::harness::Errno;
use kvm_bpf_selftests::programs::{answer, only_return};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_WRITE, ioctl_expr, ioctl_with_ref, ioctl_with_val};

use super::{ADDR, SIZE};

mod calls;
mod contents;
mod extensions;
mod races;

tests!(
    a_new_device_has_all,
    they_only_become_fewer,
    contents::each_call_wherever_it_is,
    contents::hardened_code,
    contents::what_is_never_reached_is_not_there,
    contents::maps_and_tail_calls,
    contents::timers_of_inner_maps,
    contents::programs_that_sleep,
    contents::work_programs_too,
    contents::a_program_that_is_attached_holds_its_permission,
    calls::what_user_space_may_do,
    calls::ports,
    extensions::programs_are_not_extended,
    extensions::an_extended_program_is_refused,
    extensions::one_of_two_extensions,
    each_device_has_its_own,
    races::no_program_slips_through_a_race,
    races::no_call_slips_through_a_race,
    sealed,
    another_vm_is_the_hole,
);

/// All that this kernel knows.
pub(super) const ALL: u64 = 0xff_07ff;
const DENIED: Answer = Err(Errno(libc::EACCES));
const EXTENDED: Answer = Err(Errno(libc::EBUSY));

/// A region of programs of an object file, at the place of that index.
pub(super) fn fd_region(
    index: u64,
    read: Option<BorrowedFd<'_>>,
    write: Option<BorrowedFd<'_>>,
) -> kvm_bpf_user_region {
    let raw = |fd: Option<BorrowedFd<'_>>| fd.map_or(-1, |fd| fd.as_raw_fd());
    kvm_bpf_user_region {
        addr: ADDR + index * SIZE,
        size: SIZE,
        bpf_readfd: raw(read),
        bpf_writefd: raw(write),
    }
}

fn a_new_device_has_all() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let all = kvm_bpf_user_perms {
        allow: ALL,
        require: 0,
    };
    assert_got!(device.perms(), all);
    assert_got!(device.has_attr(KVM_DEV_BPF_ATTR_GROUP_PERMS, 0), Ok(()));
    let none = Err(Errno(libc::ENXIO));
    assert_got!(device.has_attr(KVM_DEV_BPF_ATTR_GROUP_PERMS, 1), none);
    let addr = (&raw const all) as u64;
    assert_got!(device.set_attr(KVM_DEV_BPF_ATTR_GROUP_PERMS, 1, addr), none);
    let fault = Err(Errno(libc::EFAULT));
    assert_got!(device.set_attr(KVM_DEV_BPF_ATTR_GROUP_PERMS, 0, 8), fault);
    // SAFETY: nothing is there to be written to.
    let got = unsafe { device.get_attr(KVM_DEV_BPF_ATTR_GROUP_PERMS, 0, 8) };
    assert_got!(got, fault, "getting them at a bad address");
    // To keep all is no change.
    device.set_perms(ALL, 0);
    assert_got!(device.perms(), all, "after a change of nothing");
}

fn they_only_become_fewer() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let eperm = Err(Errno(libc::EPERM));
    let mut left = ALL;
    for bit in (0..64).map(|n| 1 << n) {
        if ALL & bit == 0 {
            let got = device.try_set_perms(left | bit, 0);
            assert_got!(got, eperm, "a bit that the kernel does not know, {bit:#x}");
            continue;
        }
        left &= !bit;
        device.set_perms(left, 0);
        for wanted in [left | bit, bit, ALL] {
            assert_got!(
                device.try_set_perms(wanted, 0),
                eperm,
                "{wanted:#x} of {left:#x}"
            );
        }
        assert_got!(device.perms().allow, left, "after errors");
    }
    assert_got!(left, 0, "all are gone");

    for bit in (1..64).map(|n| 1 << n) {
        let got = device.try_set_perms(0, bit | KVM_BPF_REQUIRE_NOT_EXTENSIBLE);
        assert_got!(got, Err(Errno(libc::EINVAL)), "to require {bit:#x}");
    }
    assert_got!(device.perms().require, 0, "after errors");
    device.set_perms(0, KVM_BPF_REQUIRE_NOT_EXTENSIBLE);
    assert_got!(device.try_set_perms(0, 0), eperm, "to require it no more");
    assert_got!(device.perms().require, KVM_BPF_REQUIRE_NOT_EXTENSIBLE);
}

/// A device with a region, an interrupt, a window and a WORK program, which has given up `bits`.
fn set_up(vm: &VmFd, index: u64, eventfd: &EventFd, bits: u64) -> Device {
    let device = Device::new(vm);
    device.set_region(
        0,
        &region(ADDR + index * 4 * SIZE, SIZE, Some(&answer(1)), None),
    );
    device.set_irq(0, eventfd.as_raw_fd());
    device.set_mem(0, &WINDOW);
    device.set_work(0, &work(Some(&only_return(ProgType::WORK, 0)), None));
    device.set_perms(ALL & !bits, 0);
    device
}

pub(super) const WINDOW: kvm_bpf_user_mem = kvm_bpf_user_mem {
    addr: 0,
    size: 0x1000,
    flags: KVM_BPF_MEM_READ,
    pad: 0,
};

fn each_device_has_its_own() {
    let guest = Guest::new();
    let first = Device::new(guest.vm());
    let second = Device::new(guest.vm());
    first.set_perms(0, KVM_BPF_REQUIRE_NOT_EXTENSIBLE);
    let all = kvm_bpf_user_perms {
        allow: ALL,
        require: 0,
    };
    assert_got!(second.perms(), all, "those of the other device");
    second.set_region(0, &region(ADDR, SIZE, Some(&answer(1)), None));
    assert_got!(
        Device::new(guest.vm()).perms(),
        all,
        "those of a new device"
    );
}

/// Those of a VM, which kvm-ioctls has for the capabilities alone that it knows.
const KVM_CHECK_EXTENSION: libc::c_ulong = ioctl_expr(_IOC_NONE, KVMIO, 0x03, 0);
const KVM_ENABLE_CAP: libc::c_ulong =
    ioctl_expr(_IOC_WRITE, KVMIO, 0xa3, size_of::<kvm_enable_cap>() as u32);

pub(super) fn seal(vm: &VmFd, arg: u64, flags: u32) -> Answer {
    let mut cap = kvm_enable_cap {
        cap: KVM_CAP_BPF_SEAL,
        flags,
        ..Default::default()
    };
    cap.args[0] = arg;
    // SAFETY: the kernel reads the structure.
    match unsafe { ioctl_with_ref(vm, KVM_ENABLE_CAP, &cap) } {
        0 => Ok(()),
        _ => Err(Errno::last()),
    }
}

fn sealed() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let device = Device::new(guest.vm());
    let einval = Err(Errno(libc::EINVAL));
    for (arg, flags) in [(0, 0), (2, 0), (1, 1), (u64::MAX, 0)] {
        assert_got!(
            seal(guest.vm(), arg, flags),
            einval,
            "argument {arg}, flags {flags}"
        );
    }
    drop(Device::new(guest.vm()));
    // SAFETY: it takes a number.
    let has = unsafe { ioctl_with_val(guest.vm(), KVM_CHECK_EXTENSION, KVM_CAP_BPF_SEAL.into()) };
    assert_got!(has, 1, "KVM_CHECK_EXTENSION");
    assert_got!(seal(guest.vm(), 1, 0), Ok(()));
    let refused = || Device::try_new(guest.vm()).map(drop);
    let eperm = Err(Errno(libc::EPERM));
    assert_got!(refused(), eperm, "a new device");
    // What was there does all it could.
    device.set_region(0, &region(ADDR, SIZE, Some(&answer(1)), None));
    device.set_region(0, &region(ADDR, SIZE, Some(&answer(2)), None));
    assert_got!(vcpu.read(ADDR, 8).value, 2);
    assert_got!(seal(guest.vm(), 1, 0), Ok(()), "sealing it again");
    assert_got!(seal(guest.vm(), 0, 0), einval, "opening it again");
    drop(device);
    assert_got!(refused(), eperm, "in place of a device that was closed");
}

/// Who can make another VM is not stopped: that is for the VMM to see to.
fn another_vm_is_the_hole() {
    let guest = Guest::new();
    assert_got!(seal(guest.vm(), 1, 0), Ok(()));
    let other = Guest::new();
    let device = Device::new(other.vm());
    device.set_region(0, &region(ADDR, SIZE, Some(&answer(1)), None));
    assert_got!(other.vcpu(0).read(ADDR, 8).value, 1, "in another VM");
}
