// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Which ports a region may have, and what else has ports.

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_bpf::uapi::{KVM_DEV_BPF_ATTR_GROUP_PIO, KVM_DEV_BPF_MAX_REGIONS, kvm_bpf_user_region};
use kvm_bpf_selftests::bpf::{Census, ProgType};
use kvm_bpf_selftests::device::{Device, NO_REGION, region};
use kvm_bpf_selftests::guest::Guest;
use kvm_bpf_selftests::harness::Errno;
use kvm_bpf_selftests::programs::{Recorder, answer, only_return};
use kvm_ioctls::{IoEventAddress, NoDatamatch};
use vmm_sys_util::eventfd::EventFd;

use super::super::{ADDR, PATTERN, SIZE, assert_errno, eventfd, taken};
use super::{PORT, PORTS, assert_in, assert_in_exits, assert_out_exits, ports};

/// An index that is in use for memory is not free for ports, and the other way round; not even
/// where the numbers are the same.
pub(super) fn indices_are_shared() {
    /// Both an address and a port.
    const BOTH: u64 = 0xc000;

    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let device = Device::new(guest.vm());
    let (old, new) = (answer(1), answer(2));
    let range = region(BOTH, 8, Some(&new), None);
    let free = region(BOTH + 8, 8, Some(&new), None);

    device.set_ports(0, &region(BOTH, 8, Some(&old), None));
    let set = device.try_set_region(0, &range);
    assert_errno("memory at an index of ports", set, libc::EEXIST);
    let set = device.try_set_region(0, &free);
    assert_errno("other memory", set, libc::EEXIST);
    let unset = device.try_set_region(0, &NO_REGION);
    assert_errno("unregister as memory", unset, libc::ENOENT);
    assert_errno("get as memory", device.region(0), libc::ENOENT);
    // The kernel has no fds to give back.
    assert_got!(device.ports(0), Ok(region(BOTH, 8, None, None)));
    assert_in(&mut vcpu, BOTH as u16, 4, 1);

    device.set_region(1, &region(ADDR, SIZE, Some(&old), None));
    let set = device.try_set_ports(1, &free);
    assert_errno("ports at an index of memory", set, libc::EEXIST);
    let unset = device.try_set_ports(1, &NO_REGION);
    assert_errno("unregister as ports", unset, libc::ENOENT);
    assert_errno("get as ports", device.ports(1), libc::ENOENT);
    assert_got!(device.region(1), Ok(region(ADDR, SIZE, None, None)));
    assert_got!(vcpu.read(ADDR, 8).value, 1);
    device.set_region(2, &range);
    let set = device.try_set_ports(2, &range);
    assert_errno("the same numbers as memory's", set, libc::EEXIST);

    // One field away: an index that is free, and these when they are.
    device.set_ports(3, &free);
    device.set_ports(0, &NO_REGION);
    device.set_region(0, &region(BOTH + 16, 8, Some(&old), None));
    device.set_region(1, &NO_REGION);
    device.set_ports(1, &range);
    assert_in(&mut vcpu, BOTH as u16, 4, 2);
    assert_errno("a free index", device.ports(4), libc::ENOENT);
    let unset = device.try_set_ports(4, &NO_REGION);
    assert_errno("unregister a free index", unset, libc::ENOENT);
}

pub(super) fn bad_ranges() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let prog = answer(0);
    for (what, addr, size) in [
        ("the last port and one more", 0xffff, 2),
        ("behind the last", 0x1_0000, 1),
        ("more ports than there are", 0, 0x1_0001),
        ("the upper half of the address", 1 << 32 | 0x2f8, 8),
        ("the upper half of the size", 0x2f8, 1 << 32 | 8),
        ("wraps around", u64::MAX, 1),
        ("wraps around to a port", u64::MAX - 7, 16),
        ("the largest size", 0x2f8, u64::MAX),
        ("an address of memory", ADDR, SIZE),
    ] {
        let set = device.try_set_ports(0, &region(addr, size, Some(&prog), None));
        assert_errno(what, set, libc::ERANGE);
        assert_errno(what, device.ports(0), libc::ENOENT);
    }
    device.set_ports(0, &region(0xffff, 1, Some(&prog), None));
    device.set_ports(1, &region(0, 0xffff, Some(&prog), None));
}

pub(super) fn bad_arguments() {
    const CLOSED_FD: i32 = 9999;

    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let device = Device::new(guest.vm());
    let census = Census::now();
    let (read, write) = (answer(PATTERN), only_return(ProgType::WRITE, 0));
    let valid = ports(PORT, PORTS, Some(&read), Some(&write));
    device.set_ports(1, &valid);
    // On a free index, and as a swap, which leaves the programs there.
    for (index, addr) in [(0, u64::from(PORT) + PORTS), (1, PORT.into())] {
        let valid = kvm_bpf_user_region { addr, ..valid };
        let (reader, writer) = (valid.bpf_readfd, valid.bpf_writefd);
        for (what, size, bpf_readfd, bpf_writefd, errno) in [
            (
                "a write program to read",
                PORTS,
                writer,
                writer,
                libc::EINVAL,
            ),
            (
                "a read program to write",
                PORTS,
                reader,
                reader,
                libc::EINVAL,
            ),
            ("a closed fd to read", PORTS, CLOSED_FD, writer, libc::EBADF),
            (
                "a closed fd to write",
                PORTS,
                reader,
                CLOSED_FD,
                libc::EBADF,
            ),
            ("no program", PORTS, -1, -1, libc::EINVAL),
            ("size 0 with a read program", 0, reader, -1, libc::EINVAL),
            ("size 0 with a write program", 0, -1, writer, libc::EINVAL),
        ] {
            let bad = kvm_bpf_user_region {
                size,
                bpf_readfd,
                bpf_writefd,
                ..valid
            };
            assert_errno(what, device.try_set_ports(index, &bad), errno);
            assert_in(&mut vcpu, PORT, 4, PATTERN);
            assert_got!(vcpu.port_out(PORT, 4, 0), [], "after {what}");
        }
        for pointer in [0, 1, u64::MAX - 7] {
            let what = format!("index {index}, pointer {pointer:#x}");
            let set = device.set_attr(KVM_DEV_BPF_ATTR_GROUP_PIO, index, pointer);
            assert_errno(&what, set, libc::EFAULT);
        }
    }
    for (addr, size) in [(PORT + 1, PORTS), (PORT, PORTS - 1), (PORT + 64, PORTS)] {
        let other = ports(addr, size, Some(&read), Some(&write));
        let set = device.try_set_ports(1, &other);
        assert_errno("another range", set, libc::EEXIST);
    }
    for index in [KVM_DEV_BPF_MAX_REGIONS, 1 << 32, u64::MAX] {
        let set = device.try_set_ports(index, &valid);
        assert_errno("no such index", set, libc::ENXIO);
        assert_errno("no such index", device.ports(index), libc::ENXIO);
    }
    for index in 0..KVM_DEV_BPF_MAX_REGIONS {
        let has = device.has_attr(KVM_DEV_BPF_ATTR_GROUP_PIO, index);
        assert_got!(has, Ok(()), "index {index}");
    }
    drop((read, write));
    drop(device);
    census.wait_for_newer(0, 0);
}

pub(super) fn every_port_there_is() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let device = Device::new(guest.vm());
    let recorder = Recorder::new();
    // Only reads: the guest says with a write that it is done.
    let read = recorder.reads(PATTERN, 0);
    device.set_ports(0, &region(0, 0x1_0000, Some(&read), None));
    for port in [0, 1, 0x20, 0x64, 0x3f8, 0xcf8, 0xfffc] {
        assert_in(&mut vcpu, port, 4, PATTERN);
        assert_got!(recorder.of_len(4).offset, u64::from(port));
    }
    assert_in(&mut vcpu, 0xffff, 1, PATTERN);
    assert_out_exits(&mut vcpu, 0xffff, 1);
    // The last address that the region has is the last port.
    assert_in_exits(&mut vcpu, 0xffff, 2);
}

/// The bus of the guest has `PORT..PORT + PORTS`: regions beside it are fine, over it not.
pub(super) fn overlap_with_other_regions() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let devices = [Device::new(guest.vm()), Device::new(guest.vm())];
    let prog = answer(PATTERN);
    devices[0].set_ports(0, &ports(PORT, PORTS, Some(&prog), None));
    for (what, first, size) in [
        ("the same", PORT, PORTS),
        ("inside", PORT + 2, 2),
        ("around", PORT - 8, 3 * PORTS),
        ("the first port", PORT - 1, 2),
        ("the last port", PORT + 7, PORTS),
        ("one port", PORT + 4, 1),
    ] {
        for device in &devices {
            let set = device.try_set_ports(1, &ports(first, size, Some(&prog), None));
            assert_errno(what, set, libc::EEXIST);
        }
    }
    devices[0].set_ports(1, &ports(PORT - 8, 8, Some(&prog), None));
    devices[1].set_ports(1, &ports(PORT + 8, 8, Some(&prog), None));
    for port in (PORT - 8..PORT + 16).step_by(4) {
        assert_in(&mut vcpu, port, 4, PATTERN);
    }
}

/// The buses of ports and of memory have room of their own.
pub(super) fn bus_full() {
    /// `NR_IOBUS_DEVS` of the kernel.
    const BUS: u64 = 1000;
    const PER_DEVICE: u64 = KVM_DEV_BPF_MAX_REGIONS - 1;

    let guest = Guest::new();
    let prog = answer(PATTERN);
    let devices: Vec<_> = (0..=BUS / PER_DEVICE)
        .map(|_| Device::new(guest.vm()))
        .collect();
    let set = |number: u64| {
        let (device, index) = (
            &devices[(number / PER_DEVICE) as usize],
            number % PER_DEVICE,
        );
        device.try_set_ports(index, &region(0x1000 + number, 1, Some(&prog), None))
    };
    let got = (0..=BUS).find(|&number| set(number) == Err(Errno(libc::ENOSPC)));
    assert_got!(got, Some(BUS), "regions on the bus when it was full");
    devices[0].set_region(PER_DEVICE, &region(ADDR, SIZE, Some(&prog), None));
    // A swap needs no room; one less makes room for one.
    assert_got!(set(0), Ok(()));
    devices[0].set_ports(0, &NO_REGION);
    assert_got!(set(BUS), Ok(()));
    assert_in(&mut guest.vcpu(0), 0x1000 + BUS as u16, 1, PATTERN);
}

/// Something of the kernel's at some ports: a region over one of them is refused when it is there
/// already, and it is when a region is.
fn assert_exclusive(guest: &mut Guest, taken: &[u16], mut add: impl FnMut(&mut Guest) -> Errnos) {
    let device = Device::new(guest.vm());
    let prog = answer(PATTERN);
    for &port in taken {
        device.set_ports(0, &ports(port, 1, Some(&prog), None));
        assert_errno(&format!("over port {port:#x}"), add(guest), libc::EEXIST);
        assert_got!(device.ports(0), Ok(ports(port, 1, None, None)));
        device.set_ports(0, &NO_REGION);
    }
    assert_got!(add(guest), Ok(()), "without a region");
    let around = taken.iter().flat_map(|&port| [port - 1, port, port + 1]);
    for port in around {
        let set = device.try_set_ports(0, &ports(port, 1, Some(&prog), None));
        if taken.contains(&port) {
            assert_errno(&format!("a region at port {port:#x}"), set, libc::EEXIST);
        } else {
            assert_got!(set, Ok(()), "a region at port {port:#x}");
            device.set_ports(0, &NO_REGION);
        }
    }
}

type Errnos = Result<(), Errno>;

pub(super) fn pic_and_elcr() {
    let mut guest = Guest::new();
    let ports = [0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1];
    assert_exclusive(&mut guest, &ports, Guest::try_add_irqchip);
}

/// Also: a VM whose timer was refused can have it when the region is gone.
pub(super) fn pit_and_speaker() {
    const PIT: [u16; 4] = [0x40, 0x41, 0x42, 0x43];
    const SPEAKER: [u16; 4] = [0x61, 0x62, 0x63, 0x64];

    for (flags, ports) in [
        (0, PIT.to_vec()),
        (KVM_PIT_SPEAKER_DUMMY, [PIT, SPEAKER].concat()),
    ] {
        assert_exclusive(&mut Guest::with_irqchip(), &ports, |guest| {
            let config = kvm_pit_config {
                flags,
                ..Default::default()
            };
            let created = guest.vm().create_pit2(config);
            created.map_err(|error| Errno(error.errno()))
        });
    }
}

/// `KVM_IOEVENTFD` for writes of so many bytes, 0 for any.
fn ioeventfd(guest: &Guest, eventfd: &EventFd, port: u64, len: u64, there: bool) -> Errnos {
    let (vm, at) = (guest.vm(), IoEventAddress::Pio(port));
    let result = match (len, there) {
        (0, true) => vm.register_ioevent(eventfd, &at, NoDatamatch),
        (0, false) => vm.unregister_ioevent(eventfd, &at, NoDatamatch),
        (1, true) => vm.register_ioevent(eventfd, &at, 1_u8),
        (1, false) => vm.unregister_ioevent(eventfd, &at, 1_u8),
        (2, true) => vm.register_ioevent(eventfd, &at, 1_u16),
        (2, false) => vm.unregister_ioevent(eventfd, &at, 1_u16),
        (_, true) => vm.register_ioevent(eventfd, &at, 1_u32),
        (_, false) => vm.unregister_ioevent(eventfd, &at, 1_u32),
    };
    result.map_err(|error| Errno(error.errno()))
}

/// What takes `len` ports, and a region of `PORTS`: in both orders, and side by side.
fn assert_apart(guest: &Guest, what: &str, len: u64, set: impl Fn(u64, bool) -> Errnos) {
    let device = Device::new(guest.vm());
    let prog = answer(PATTERN);
    let first = u64::from(PORT);
    let range = ports(PORT, PORTS, Some(&prog), None);

    device.set_ports(0, &range);
    for port in first - len + 1..first + PORTS {
        assert_errno(
            &format!("{what} at {port:#x}"),
            set(port, true),
            libc::EEXIST,
        );
    }
    for port in [first - len, first + PORTS] {
        assert_got!(set(port, true), Ok(()), "{what} at {port:#x}");
        device.set_ports(0, &NO_REGION);
        device.set_ports(0, &range);
        assert_got!(set(port, false), Ok(()), "{what} at {port:#x}");
    }
    device.set_ports(0, &NO_REGION);

    for port in first - len + 1..first + PORTS {
        assert_got!(set(port, true), Ok(()), "{what} at {port:#x}");
        let over = device.try_set_ports(0, &range);
        assert_errno(&format!("over {what} at {port:#x}"), over, libc::EEXIST);
        assert_got!(set(port, false), Ok(()), "{what} at {port:#x}");
    }
    device.set_ports(0, &range);
}

pub(super) fn ioeventfds() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let eventfd = eventfd();
    for len in [0, 1, 2, 4] {
        let what = format!("an ioeventfd of {len} bytes");
        assert_apart(&guest, &what, len.max(1), |port, there| {
            ioeventfd(&guest, &eventfd, port, len, there)
        });
        // Each is found on the bus beside the other.
        let device = Device::new(guest.vm());
        let write = only_return(ProgType::WRITE, 0);
        device.set_ports(0, &ports(PORT, 8, None, Some(&write)));
        let bell = u64::from(PORT) + 8;
        assert_got!(ioeventfd(&guest, &eventfd, bell, len, true), Ok(()));
        let width = len.max(1) as usize;
        assert_got!(vcpu.port_out(bell as u16, width, 1), [], "{what}");
        assert_got!(taken(&eventfd), 1, "{what}");
        assert_got!(vcpu.port_out(PORT + 7, 1, 1), [], "beside {what}");
        assert_got!(taken(&eventfd), 0, "beside {what}");
        assert_got!(ioeventfd(&guest, &eventfd, bell, len, false), Ok(()));
    }
}

pub(super) fn coalesced_zones() {
    let guest = Guest::new();
    for len in [1, 4, 16] {
        let what = format!("a zone of {len} ports");
        assert_apart(&guest, &what, len, |port, there| {
            let at = IoEventAddress::Pio(port);
            let result = match there {
                true => guest.vm().register_coalesced_mmio(at, len as u32),
                false => guest.vm().unregister_coalesced_mmio(at, len as u32),
            };
            result.map_err(|error| Errno(error.errno()))
        });
    }
}
