// SPDX-License-Identifier: Apache-2.0 OR MIT

//! There are no regions of ports where there are no ports.

use kvm_bpf::uapi::{KVM_DEV_BPF_ATTR_GROUP_PIO, KVM_DEV_BPF_MAX_REGIONS};
use kvm_bpf_selftests::device::{Device, NO_REGION, region};
use kvm_bpf_selftests::guest::Guest;
use kvm_bpf_selftests::programs::answer;

use super::{ADDR, SIZE, assert_errno};

tests!(there_are_none);

fn there_are_none() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let prog = answer(0);
    let ports = region(0x2f8, 8, Some(&prog), None);
    for index in [0, KVM_DEV_BPF_MAX_REGIONS - 1] {
        assert_errno("set", device.try_set_ports(index, &ports), libc::ENXIO);
        let unset = device.try_set_ports(index, &NO_REGION);
        assert_errno("unregister", unset, libc::ENXIO);
        assert_errno("get", device.ports(index), libc::ENXIO);
        let has = device.has_attr(KVM_DEV_BPF_ATTR_GROUP_PIO, index);
        assert_errno("has", has, libc::ENXIO);
    }
    // Whatever the pointer, and the index is free for what there is.
    let set = device.set_attr(KVM_DEV_BPF_ATTR_GROUP_PIO, 0, 0);
    assert_errno("a bad pointer", set, libc::ENXIO);
    device.set_region(0, &region(ADDR, SIZE, Some(&prog), None));
}
