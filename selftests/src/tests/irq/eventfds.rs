// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Eventfds of interrupts: set, replaced, closed and held.

use std::os::fd::AsRawFd;

use kvm_bpf::uapi::{KVM_DEV_BPF_ATTR_GROUP_IRQ, KVM_DEV_BPF_MAX_IRQS, kvm_bpf_user_irq};
use kvm_bpf_selftests::bpf::Map;
use kvm_bpf_selftests::device::Device;
use kvm_bpf_selftests::guest::Guest;
use kvm_bpf_selftests::harness::wait_for;

use super::super::{PATTERN, assert_errno, eventfd, taken};
use super::{Setup, id_of, is_free, with_each_loader};

/// A call that is refused changes nothing: an index keeps the eventfd that it has.
pub(super) fn bad_arguments() {
    let setup = Setup::new();
    let Setup { guest, device, .. } = &setup;
    let mut vcpu = guest.vcpu(0);
    let (before, eventfd) = (eventfd(), eventfd());
    let map = Map::new(1, 1);
    let good = kvm_bpf_user_irq {
        eventfd: eventfd.as_raw_fd(),
        flags: 0,
    };
    let cases = [
        ("a flag", good.eventfd, 1, libc::EINVAL),
        ("the last flag", good.eventfd, 1 << 31, libc::EINVAL),
        ("a flag to detach", -1, 1, libc::EINVAL),
        ("a closed fd", 9999, 0, libc::EBADF),
        ("-2", -2, 0, libc::EBADF),
        ("a map", map.as_raw_fd(), 0, libc::EINVAL),
        ("the VM", guest.vm().as_raw_fd(), 0, libc::EINVAL),
    ];
    for index in [0, KVM_DEV_BPF_MAX_IRQS - 1] {
        let irq = index as u32;
        for (what, eventfd, flags, errno) in cases {
            let bad = kvm_bpf_user_irq { eventfd, flags };
            assert_errno(what, device.try_set_irq(index, &bad), errno);
        }
        let answer = setup.signal(&mut vcpu, irq);
        assert_got!(answer, -i64::from(libc::ENOENT), "irq {irq}, never set");

        device.set_irq(index, before.as_raw_fd());
        for (what, eventfd, flags, errno) in cases {
            let bad = kvm_bpf_user_irq { eventfd, flags };
            assert_errno(what, device.try_set_irq(index, &bad), errno);
            assert_got!(setup.signal(&mut vcpu, irq), 0, "irq {irq} after {what}");
            assert_got!(taken(&before), 1, "irq {irq} after {what}");
        }
        assert_got!(device.try_set_irq(index, &good), Ok(()));
        assert_got!(setup.signal(&mut vcpu, irq), 0);
        assert_got!((taken(&before), taken(&eventfd)), (0, 1), "irq {irq}");
    }
    assert_errno(
        "an index past the last",
        device.try_set_irq(KVM_DEV_BPF_MAX_IRQS, &good),
        libc::ENXIO,
    );
}

/// There is no number for an eventfd that another process may have set.
pub(super) fn get_returns_no_eventfd() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let eventfd = eventfd();
    device.set_irq(1, eventfd.as_raw_fd());
    for index in [0, 1, KVM_DEV_BPF_MAX_IRQS] {
        let mut there = [PATTERN; 2];
        let addr = (&raw mut there) as u64;
        // SAFETY: there is room for an attribute.
        let answer = unsafe { device.get_attr(KVM_DEV_BPF_ATTR_GROUP_IRQ, index, addr) };
        assert_errno("KVM_GET_DEVICE_ATTR", answer, libc::ENXIO);
        assert_got!(there, [PATTERN; 2], "irq {index}");
    }
}

pub(super) fn eventfd_polled_without_irqchip() {
    with_each_loader(|setup| {
        let mut vcpu = setup.guest.vcpu(0);
        let eventfd = eventfd();
        setup.device.set_irq(0, eventfd.as_raw_fd());
        assert_got!(taken(&eventfd), 0, "before any signal");
        for count in [1, 5, 20] {
            for _ in 0..count {
                assert_got!(setup.signal(&mut vcpu, 0), 0);
            }
            assert_got!(taken(&eventfd), count);
        }
    });
}

pub(super) fn every_irq_has_its_eventfd() {
    let setup = Setup::new();
    let mut vcpu = setup.guest.vcpu(0);
    let eventfds: Vec<_> = (0..KVM_DEV_BPF_MAX_IRQS).map(|_| eventfd()).collect();
    for (index, eventfd) in (0..).zip(&eventfds) {
        setup.device.set_irq(index, eventfd.as_raw_fd());
    }
    for irq in 0..KVM_DEV_BPF_MAX_IRQS as u32 {
        assert_got!(setup.signal(&mut vcpu, irq), 0, "irq {irq}");
        assert_got!(taken(&eventfds[irq as usize]), 1, "irq {irq}");
    }
    let others: u64 = eventfds.iter().map(taken).sum();
    assert_got!(others, 0, "signals that nobody asked for");
}

pub(super) fn irq_without_eventfd() {
    with_each_loader(|setup| {
        let mut vcpu = setup.guest.vcpu(0);
        for irq in [0, 1, 255, 256, 1 << 16, u32::MAX] {
            let answer = setup.signal(&mut vcpu, irq);
            assert_got!(answer, -i64::from(libc::ENOENT), "irq {irq}");
        }
    });
}

pub(super) fn detached_and_replaced() {
    with_each_loader(detach_and_replace);
}

fn detach_and_replace(setup: Setup) {
    let mut vcpu = setup.guest.vcpu(0);
    let (first, second) = (eventfd(), eventfd());
    setup.device.set_irq(3, first.as_raw_fd());
    assert_got!(setup.signal(&mut vcpu, 3), 0);
    setup.device.set_irq(3, second.as_raw_fd());
    assert_got!(setup.signal(&mut vcpu, 3), 0);
    assert_got!((taken(&first), taken(&second)), (1, 1));

    setup.device.set_irq(3, -1);
    let detach = kvm_bpf_user_irq {
        eventfd: -1,
        flags: 0,
    };
    let again = setup.device.try_set_irq(3, &detach);
    assert_errno("detaching again", again, libc::ENOENT);
    assert_got!(setup.signal(&mut vcpu, 3), -i64::from(libc::ENOENT));
    assert_got!((taken(&first), taken(&second)), (0, 0));

    setup.device.set_irq(3, first.as_raw_fd());
    assert_got!(setup.signal(&mut vcpu, 3), 0);
    assert_got!(taken(&first), 1);
}

pub(super) fn one_eventfd_for_two_irqs() {
    let setup = Setup::new();
    let mut vcpu = setup.guest.vcpu(0);
    let eventfd = eventfd();
    setup.device.set_irq(0, eventfd.as_raw_fd());
    setup.device.set_irq(1, eventfd.as_raw_fd());
    assert_got!(setup.signal(&mut vcpu, 0), 0);
    assert_got!(setup.signal(&mut vcpu, 1), 0);
    assert_got!(taken(&eventfd), 2);
    setup.device.set_irq(0, -1);
    assert_got!(setup.signal(&mut vcpu, 1), 0);
    assert_got!(taken(&eventfd), 1);
}

/// The device holds the eventfd, whatever becomes of the VMM's fd.
pub(super) fn closed_by_the_vmm() {
    let setup = Setup::new();
    let mut vcpu = setup.guest.vcpu(0);
    let eventfd = eventfd();
    let id = id_of(&eventfd);
    setup.device.set_irq(0, eventfd.as_raw_fd());
    drop(eventfd);
    for _ in 0..10 {
        assert_got!(setup.signal(&mut vcpu, 0), 0);
        assert_got!(is_free(id), false, "the eventfd is free");
    }
}

/// Every reference that the device took is put, and none that it did not take.
pub(super) fn eventfd_outlives_the_device() {
    let eventfd = eventfd();
    let id = id_of(&eventfd);
    for _ in 0..10 {
        let setup = Setup::new();
        let mut vcpu = setup.guest.vcpu(0);
        for index in [0, 0, 1, 255] {
            setup.device.set_irq(index, eventfd.as_raw_fd());
        }
        setup.device.set_irq(1, -1);
        assert_got!(setup.signal(&mut vcpu, 255), 0);
        drop(setup);
        assert_got!(taken(&eventfd), 1);
        eventfd.write(3).expect("the VMM's eventfd");
        assert_got!(taken(&eventfd), 3);
        assert_got!(is_free(id), false, "the VMM's eventfd is free");
    }
    drop(eventfd);
    wait_for("the eventfd to be free", true, || is_free(id));
}

/// Each reference goes with what took it: an index that is detached or set anew, or the device.
pub(super) fn eventfd_is_held_as_long_as_it_is_set() {
    let guest = Guest::new();
    let other = eventfd();
    let detach = -1;
    for (what, instead) in [
        ("detached", Some(detach)),
        ("replaced", Some(other.as_raw_fd())),
        ("closed", None),
    ] {
        let device = Device::new(guest.vm());
        let eventfd = eventfd();
        let id = id_of(&eventfd);
        // The second time, index 0 gives up the reference of the first.
        for index in [0, 0, 255] {
            device.set_irq(index, eventfd.as_raw_fd());
        }
        drop(eventfd);
        let device = if let Some(instead) = instead {
            for index in [0, 255] {
                assert_got!(is_free(id), false, "free before {index} is {what}");
                device.set_irq(index, instead);
            }
            Some(device)
        } else {
            assert_got!(is_free(id), false, "free before the device is {what}");
            drop(device);
            None
        };
        wait_for(what, true, || is_free(id));
        drop(device);
        // One reference given up too many, and it would be.
        assert_got!(is_free(id_of(&other)), false, "the VMM's eventfd is free");
    }
}
