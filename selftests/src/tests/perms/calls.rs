// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What user space does, and which permission each call takes.

use std::os::fd::AsRawFd;

use kvm_bpf::uapi::{
    KVM_BPF_ALLOW_NEW_REGION, KVM_BPF_ALLOW_REMOVE, KVM_BPF_ALLOW_REPLACE, KVM_BPF_ALLOW_RUN,
    KVM_BPF_ALLOW_SET_IRQ, KVM_BPF_ALLOW_SET_MEM, KVM_BPF_ALLOW_SET_PIO, KVM_BPF_ALLOW_SET_WORK,
    KVM_DEV_BPF_ATTR_GROUP_PIO, kvm_bpf_user_irq,
};
use kvm_bpf_selftests::device::{Answer, Device, NO_REGION, NO_WORK, region};
use kvm_bpf_selftests::guest::Guest;
use kvm_bpf_selftests::harness::skip;
use kvm_bpf_selftests::programs::answer;
use vmm_sys_util::eventfd::EventFd;

use super::super::{ADDR, SIZE};
use super::{ALL, DENIED, WINDOW, set_up};

/// What user space does to a device at an address.
type Call = fn(&Device, u64, &EventFd) -> Answer;

pub(super) fn what_user_space_may_do() {
    let guest = Guest::new();
    let eventfd = EventFd::new(0).expect("eventfd");
    let calls: [(&str, u64, Call); 8] = [
        (
            "a new region",
            KVM_BPF_ALLOW_NEW_REGION,
            |device, addr, _| {
                device.try_set_region(1, &region(addr + SIZE, SIZE, Some(&answer(1)), None))
            },
        ),
        (
            "a region's new program",
            KVM_BPF_ALLOW_REPLACE,
            |device, addr, _| device.try_set_region(0, &region(addr, SIZE, Some(&answer(2)), None)),
        ),
        (
            "a new interrupt",
            KVM_BPF_ALLOW_SET_IRQ,
            |device, _, eventfd| {
                let eventfd = eventfd.as_raw_fd();
                device.try_set_irq(1, &kvm_bpf_user_irq { eventfd, flags: 0 })
            },
        ),
        (
            "one interrupt less",
            KVM_BPF_ALLOW_SET_IRQ,
            |device, _, _| {
                device.try_set_irq(
                    0,
                    &kvm_bpf_user_irq {
                        eventfd: -1,
                        flags: 0,
                    },
                )
            },
        ),
        ("a window", KVM_BPF_ALLOW_SET_MEM, |device, _, _| {
            device.try_set_mem(0, &WINDOW)
        }),
        ("running", KVM_BPF_ALLOW_RUN, |device, _, _| {
            device.run(0, 0)
        }),
        (
            "a WORK program less",
            KVM_BPF_ALLOW_SET_WORK,
            |device, _, _| device.try_set_work(0, &NO_WORK),
        ),
        ("a region less", KVM_BPF_ALLOW_REMOVE, |device, _, _| {
            device.try_set_region(0, &NO_REGION)
        }),
    ];
    for (index, (what, bit, call)) in (0..).zip(calls) {
        let addr = ADDR + index * 4 * SIZE;
        let device = set_up(guest.vm(), index, &eventfd, bit);
        let before = (device.info(0), device.info(1), device.mem(0));
        assert_got!(
            call(&device, addr, &eventfd),
            DENIED,
            "{what} without its permission"
        );
        let after = (device.info(0), device.info(1), device.mem(0));
        assert_got!(after, before, "after {what} was refused");
        // All others are there.
        for (other, other_bit, call) in calls {
            if other_bit != bit {
                let got = call(&device, addr, &eventfd);
                assert_got!(got, Ok(()), "{other} after giving up {what}");
            }
            if other_bit == KVM_BPF_ALLOW_NEW_REGION && other_bit != bit {
                let region = region(addr + SIZE, SIZE, Some(&answer(1)), None);
                assert_got!(device.region(1).map(|got| got.addr), Ok(region.addr));
            }
        }
    }
}

pub(super) fn ports() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    if device.has_attr(KVM_DEV_BPF_ATTR_GROUP_PIO, 0).is_err() {
        skip("this architecture has no ports");
    }
    let [first, second] = [1, 2].map(answer);
    let at = |port, prog| region(port, 8, Some(prog), None);
    device.set_ports(0, &at(0x600, &first));
    device.set_perms(ALL & !KVM_BPF_ALLOW_SET_PIO, 0);
    for (what, index, ports) in [
        ("replacing programs", 0, at(0x600, &second)),
        ("removing ports", 0, NO_REGION),
        ("new ports", 1, at(0x700, &first)),
    ] {
        assert_got!(device.try_set_ports(index, &ports), DENIED, "{what}");
    }
    device.set_region(1, &region(ADDR, SIZE, Some(&first), None));

    let device = Device::new(guest.vm());
    device.set_perms(KVM_BPF_ALLOW_SET_PIO, 0);
    let got = device.try_set_ports(1, &at(0x700, &first));
    assert_got!(got, DENIED, "new ports without new regions");
}
