// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Regions: set, swapped, unregistered; every error, each one field away from
//! a call that works and leaving everything as it was.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::thread;

use Reg::{R0, R1, R2, R6};
use kvm_bpf::uapi::{
    KVM_DEV_BPF_ATTR_GROUP_INFO, KVM_DEV_BPF_ATTR_GROUP_IRQ, KVM_DEV_BPF_ATTR_GROUP_PERMS,
    KVM_DEV_BPF_ATTR_GROUP_PIO, KVM_DEV_BPF_ATTR_GROUP_REGION, KVM_DEV_BPF_MAX_IRQS,
    KVM_DEV_BPF_MAX_REGIONS, kvm_bpf_user_region,
};
use kvm_bpf_selftests::bpf::{Census, Index, LOADERS, Map, ProgType, Reg, load, lookup, store};
use kvm_bpf_selftests::device::{Device, NO_REGION, region};
use kvm_bpf_selftests::guest::{Exit, Guest, IRQCHIP_ADDR, mask};
use kvm_bpf_selftests::harness::{Errno, meanwhile, wait_for};
use kvm_bpf_selftests::programs::{CTX_BUF, CTX_REGION, Recorder, answer, only_return, ret};
use kvm_ioctls::{IoEventAddress, NoDatamatch};
use vmm_sys_util::eventfd::EventFd;

use super::{ADDR, PATTERN, SIZE, assert_errno, eventfd, taken};

tests!(
    set_and_unregister,
    get_returns_the_range,
    has_attr_is_true_for_what_can_be_set,
    unknown_groups_and_indices,
    bad_flags,
    bad_pointers,
    bad_programs,
    bad_ranges,
    largest_range,
    index_in_use_keeps_its_range,
    programs_see_the_index,
    overlap_with_other_regions,
    overlap_with_ioeventfd,
    overlap_with_coalesced_mmio,
    overlap_with_the_irqchip,
    errors_hold_no_program,
    every_index_at_once,
    bus_full,
    nothing_registers_over_a_region,
    layout_of_virtio_mmio,
    the_irqchip_does_not_register_over_a_region,
    appears_while_a_vcpu_runs,
    set_by_several_threads,
);

/// The call is refused, and the index stays as it was.
#[track_caller]
fn assert_refused(
    what: &str,
    device: &Device,
    index: u64,
    region: &kvm_bpf_user_region,
    errno: i32,
) {
    let before = device.region(index);
    assert_errno(what, device.try_set_region(index, region), errno);
    assert_got!(device.region(index), before, "{what}: region {index} after");
}

fn set_and_unregister() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let device = Device::new(guest.vm());
    for round in 0..3 {
        let wanted = PATTERN + round;
        device.set_region(7, &region(ADDR, SIZE, Some(&answer(wanted)), None));
        let read = vcpu.read(ADDR, 8);
        assert_got!((read.value, read.exits), (wanted, vec![]), "round {round}");

        device.set_region(7, &NO_REGION);
        assert_got!(vcpu.read(ADDR, 8).exits, [Exit::Read(ADDR, 8)]);
        assert_refused("a free index", &device, 7, &NO_REGION, libc::ENOENT);
    }
}

fn get_returns_the_range() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let prog = answer(0);
    assert_errno("a free index", device.region(5), libc::ENOENT);
    device.set_region(5, &region(ADDR, SIZE, Some(&prog), None));
    // The kernel has no fds to give back.
    assert_got!(device.region(5), Ok(region(ADDR, SIZE, None, None)));
    assert_errno("its neighbour", device.region(6), libc::ENOENT);
    assert_errno(
        "past the last",
        device.region(KVM_DEV_BPF_MAX_REGIONS),
        libc::ENXIO,
    );
}

const BAD_ATTRS: [(u32, u64); 15] = [
    (0, 0),
    (KVM_DEV_BPF_ATTR_GROUP_INFO + 1, 0),
    (u32::MAX, 0),
    (KVM_DEV_BPF_ATTR_GROUP_REGION, KVM_DEV_BPF_MAX_REGIONS),
    (KVM_DEV_BPF_ATTR_GROUP_REGION, u64::MAX),
    (KVM_DEV_BPF_ATTR_GROUP_REGION, 1 << 32),
    (KVM_DEV_BPF_ATTR_GROUP_IRQ, KVM_DEV_BPF_MAX_IRQS),
    (KVM_DEV_BPF_ATTR_GROUP_IRQ, u64::MAX),
    (KVM_DEV_BPF_ATTR_GROUP_IRQ, 1 << 32),
    (KVM_DEV_BPF_ATTR_GROUP_PIO, KVM_DEV_BPF_MAX_REGIONS),
    (KVM_DEV_BPF_ATTR_GROUP_PIO, u64::MAX),
    (KVM_DEV_BPF_ATTR_GROUP_PIO, 1 << 32),
    (KVM_DEV_BPF_ATTR_GROUP_PERMS, 1),
    (KVM_DEV_BPF_ATTR_GROUP_PERMS, 1 << 32),
    (KVM_DEV_BPF_ATTR_GROUP_INFO, KVM_DEV_BPF_MAX_REGIONS),
];

fn has_attr_is_true_for_what_can_be_set() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    for index in 0..KVM_DEV_BPF_MAX_REGIONS {
        let got = device.has_attr(KVM_DEV_BPF_ATTR_GROUP_REGION, index);
        assert_got!(got, Ok(()), "region {index}");
        let got = device.has_attr(KVM_DEV_BPF_ATTR_GROUP_PIO, index);
        let wanted = match cfg!(target_arch = "x86_64") {
            true => Ok(()),
            false => Err(Errno(libc::ENXIO)),
        };
        assert_got!(got, wanted, "ports {index}");
    }
    for index in 0..KVM_DEV_BPF_MAX_IRQS {
        let got = device.has_attr(KVM_DEV_BPF_ATTR_GROUP_IRQ, index);
        assert_got!(got, Ok(()), "irq {index}");
    }
    for (group, attr) in BAD_ATTRS {
        let what = format!("group {group} attr {attr:#x}");
        assert_errno(&what, device.has_attr(group, attr), libc::ENXIO);
    }
}

fn unknown_groups_and_indices() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let prog = answer(0);
    let valid = region(ADDR, SIZE, Some(&prog), None);
    for (group, attr) in BAD_ATTRS {
        let what = format!("group {group} attr {attr:#x}");
        let got = device.set_attr(group, attr, (&raw const valid) as u64);
        assert_errno(&what, got, libc::ENXIO);
    }
    device.set_region(KVM_DEV_BPF_MAX_REGIONS - 1, &valid);
}

/// Of the attribute itself, in all three calls, each of which works without.
fn bad_flags() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let prog = answer(0);
    let mut value = region(ADDR, SIZE, Some(&prog), None);
    for flags in [1, 1 << 31] {
        let got = device.with_flags(0, &mut value, flags);
        assert_got!(got, [Err(Errno(libc::EINVAL)); 3], "flags {flags:#x}");
    }
    assert_errno("the region", device.region(0), libc::ENOENT);
    assert_got!(device.with_flags(0, &mut value, 0), [Ok(()); 3]);
}

fn bad_pointers() {
    const BAD_POINTERS: [u64; 3] = [0, 1, u64::MAX - 7];

    let guest = Guest::new();
    let device = Device::new(guest.vm());
    for group in [KVM_DEV_BPF_ATTR_GROUP_REGION, KVM_DEV_BPF_ATTR_GROUP_IRQ] {
        for pointer in BAD_POINTERS {
            let what = format!("group {group}, pointer {pointer:#x}");
            assert_errno(&what, device.set_attr(group, 0, pointer), libc::EFAULT);
        }
    }
    assert_errno("the region", device.region(0), libc::ENOENT);

    let prog = answer(0);
    let set = region(ADDR, SIZE, Some(&prog), None);
    device.set_region(0, &set);
    for pointer in BAD_POINTERS {
        let what = format!("pointer {pointer:#x}, with a region");
        let answer = device.set_attr(KVM_DEV_BPF_ATTR_GROUP_REGION, 0, pointer);
        assert_errno(&what, answer, libc::EFAULT);
        // SAFETY: nothing can be written there.
        let answer = unsafe { device.get_attr(KVM_DEV_BPF_ATTR_GROUP_REGION, 0, pointer) };
        assert_errno(&what, answer, libc::EFAULT);
    }
    assert_got!(device.region(0), Ok(region(ADDR, SIZE, None, None)));
}

fn bad_programs() {
    const SOCKET_FILTER: ProgType = ProgType(1);
    const CLOSED_FD: i32 = 9999;

    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let recorder = Recorder::new();
    let (read, write) = (answer(PATTERN), recorder.writes(0));
    let other = only_return(SOCKET_FILTER, 0);
    let map = Map::new(1, 1);
    let eventfd = EventFd::new(0).expect("eventfd");

    let valid = region(ADDR, SIZE, Some(&read), Some(&write));
    let cases = [
        (
            "a write program to read",
            true,
            write.as_raw_fd(),
            libc::EINVAL,
        ),
        (
            "a read program to write",
            false,
            read.as_raw_fd(),
            libc::EINVAL,
        ),
        (
            "another type to read",
            true,
            other.as_raw_fd(),
            libc::EINVAL,
        ),
        (
            "another type to write",
            false,
            other.as_raw_fd(),
            libc::EINVAL,
        ),
        ("a map to read", true, map.as_raw_fd(), libc::EINVAL),
        (
            "an eventfd to write",
            false,
            eventfd.as_raw_fd(),
            libc::EINVAL,
        ),
        ("a closed fd to read", true, CLOSED_FD, libc::EBADF),
        ("a closed fd to write", false, CLOSED_FD, libc::EBADF),
        ("-2 to read", true, -2, libc::EBADF),
        ("-2 to write", false, -2, libc::EBADF),
    ];
    // On a free index, and as a swap of index 1, which keeps both its programs.
    let mut vcpu = guest.vcpu(0);
    device.set_region(1, &valid);
    let mut assert_refused = |what: &str, index, bad: &_, errno| {
        assert_refused(what, &device, index, bad, errno);
        let read = vcpu.read(ADDR, 8);
        assert_got!((read.value, read.exits), (PATTERN, vec![]), "{what}: read");
        let count = recorder.count();
        assert_got!(vcpu.write(ADDR, 4, 1), [], "{what}: write");
        assert_got!(recorder.count(), count + 1, "{what}: writes seen");
    };
    for (index, addr) in [(0, ADDR + SIZE), (1, ADDR)] {
        for (what, is_read, fd, errno) in cases {
            let mut bad = kvm_bpf_user_region { addr, ..valid };
            if is_read {
                bad.bpf_readfd = fd;
            } else {
                bad.bpf_writefd = fd;
            }
            assert_refused(what, index, &bad, errno);
        }
        let none = region(addr, SIZE, None, None);
        assert_refused("no program", index, &none, libc::EINVAL);
        for (what, read, write) in [
            ("size 0 with a read program", Some(&read), None),
            ("size 0 with a write program", None, Some(&write)),
        ] {
            let bad = region(addr, 0, read, write);
            assert_refused(what, index, &bad, libc::EINVAL);
        }
    }
    device.set_region(
        0,
        &kvm_bpf_user_region {
            addr: ADDR + SIZE,
            ..valid
        },
    );
}

fn bad_ranges() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let prog = answer(0);
    let cases = [
        ("wraps around", u64::MAX - 0x7ff, 0x1000),
        ("wraps around by far", u64::MAX, 0x7fff_ffff),
        ("has one of the last 8 addresses", u64::MAX - 0x1006, 0x1000),
        ("larger than INT_MAX", ADDR, 0x8000_0000),
        (
            "valid but for the upper half of the size",
            ADDR,
            0x1_0000_1000,
        ),
        ("the largest size", ADDR, u64::MAX),
    ];
    for (what, addr, size) in cases {
        let bad = region(addr, size, Some(&prog), None);
        assert_refused(what, &device, 0, &bad, libc::ERANGE);
    }
    device.set_region(0, &region(ADDR, 0x1000, Some(&prog), None));
    device.set_region(1, &region(u64::MAX - 0x1007, 0x1000, Some(&prog), None));
}

fn largest_range() {
    const SIZE: u64 = i32::MAX as u64;
    const ADDR: u64 = 0x4000_0000;

    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let device = Device::new(guest.vm());
    device.set_region(0, &region(ADDR, SIZE, Some(&answer(PATTERN)), None));
    for addr in [ADDR, ADDR + SIZE / 8 * 4, ADDR + SIZE - 1] {
        let read = vcpu.read(addr, 1);
        assert_got!(
            (read.value, read.exits),
            (PATTERN & 0xff, vec![]),
            "{addr:#x}"
        );
    }
}

fn index_in_use_keeps_its_range() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let device = Device::new(guest.vm());
    let (old, new) = (answer(1), answer(2));
    device.set_region(0, &region(ADDR, SIZE, Some(&old), None));
    for (addr, size) in [(ADDR + 8, SIZE), (ADDR, SIZE + 8), (0xe000_0000, SIZE)] {
        let bad = region(addr, size, Some(&new), None);
        assert_refused("another range", &device, 0, &bad, libc::EEXIST);
    }
    assert_got!(vcpu.read(ADDR, 8).value, 1, "after EEXIST");
    device.set_region(0, &region(ADDR, SIZE, Some(&new), None));
    assert_got!(vcpu.read(ADDR, 8).value, 2, "after the swap");
}

/// One pair of programs serves regions of several devices, and is told which.
fn programs_see_the_index() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let devices = [Device::new(guest.vm()), Device::new(guest.vm())];
    let map = Map::new(1, 1);
    let mut read = vec![load(4, R2, R1, CTX_REGION), store(8, R1, CTX_BUF, R2)];
    read.extend(ret(0));
    let mut write = vec![load(4, R6, R1, CTX_REGION)];
    write.extend(lookup(&map, Index::Imm(0)));
    write.push(store(8, R0, 0, R6));
    write.extend(ret(0));
    for load_prog in LOADERS {
        let read = load_prog(ProgType::READ, &read);
        let write = load_prog(ProgType::WRITE, &write);
        // Not in the order of the addresses, and each a second time: as a swap, and anew.
        for (round, indices) in [[3, 0, 255], [3, 0, 255], [254, 1, 0]].iter().enumerate() {
            if round == 2 {
                devices[0].set_region(255, &NO_REGION);
                devices[0].set_region(3, &NO_REGION);
                devices[0].set_region(0, &NO_REGION);
                devices[1].set_region(0, &NO_REGION);
            }
            for (at, &index) in (0..).zip(indices) {
                let range = region(ADDR + at * SIZE, SIZE, Some(&read), Some(&write));
                devices[0].set_region(index, &range);
            }
            devices[1].set_region(0, &region(ADDR + 3 * SIZE, SIZE, Some(&read), Some(&write)));
            for (at, &index) in (0..).zip(indices.iter().chain(&[0])) {
                assert_got!(vcpu.read(ADDR + at * SIZE, 8).value, index, "region {at}");
                map.set(0, &[PATTERN]);
                assert_got!(vcpu.write(ADDR + at * SIZE, 1, 0), []);
                assert_got!(map.get(0), [index], "region {at}");
            }
        }
        for index in [254, 1, 0] {
            devices[0].set_region(index, &NO_REGION);
        }
        devices[1].set_region(0, &NO_REGION);
    }
}

/// Ranges of `SIZE` bytes or so that overlap `ADDR..ADDR + SIZE`, and two that do not.
const OVERLAPS: [(&str, u64, u64); 6] = [
    ("the same", ADDR, SIZE),
    ("inside", ADDR + 8, 8),
    ("around", ADDR - SIZE, 3 * SIZE),
    ("the first byte", ADDR - SIZE, SIZE + 1),
    ("the last byte", ADDR + SIZE - 1, SIZE),
    ("one byte", ADDR + SIZE / 2, 1),
];
const NEIGHBOURS: [(u64, u64); 2] = [(ADDR - SIZE, SIZE), (ADDR + SIZE, SIZE)];

/// The bus of the guest has `ADDR..ADDR + SIZE`: regions beside it are fine, over it not.
fn assert_occupied(guest: &Guest) {
    let device = Device::new(guest.vm());
    let prog = answer(0);
    for (what, addr, size) in OVERLAPS {
        let bad = region(addr, size, Some(&prog), None);
        assert_refused(what, &device, 0, &bad, libc::EEXIST);
    }
    for (index, (addr, size)) in (0..).zip(NEIGHBOURS) {
        device.set_region(index, &region(addr, size, Some(&prog), None));
    }
}

fn overlap_with_other_regions() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let prog = answer(PATTERN);
    device.set_region(0, &region(ADDR, SIZE, Some(&prog), None));
    assert_occupied(&guest);
    // The same within one device.
    for (what, addr, size) in OVERLAPS {
        let bad = region(addr, size, Some(&prog), None);
        assert_refused(what, &device, 1, &bad, libc::EEXIST);
    }
    let read = guest.vcpu(0).read(ADDR, 8);
    assert_got!((read.value, read.exits), (PATTERN, vec![]));
}

fn overlap_with_ioeventfd() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let prog = answer(PATTERN);
    let mut vcpu = guest.vcpu(0);
    let eventfd = eventfd();
    let addr = IoEventAddress::Mmio(ADDR + 16);

    // One for writes of 4 bytes, then one for writes of any width.
    for len in [4, 0] {
        let ioeventfd = |deassign| {
            let answer = match (len, deassign) {
                (0, false) => guest.vm().register_ioevent(&eventfd, &addr, NoDatamatch),
                (0, true) => guest.vm().unregister_ioevent(&eventfd, &addr, NoDatamatch),
                (_, false) => guest.vm().register_ioevent(&eventfd, &addr, 1_u32),
                (_, true) => guest.vm().unregister_ioevent(&eventfd, &addr, 1_u32),
            };
            answer.expect("KVM_IOEVENTFD");
        };
        ioeventfd(false);
        for (what, first, size) in [
            ("around it", ADDR, SIZE),
            ("its first byte", ADDR, 17),
            ("only its first byte", ADDR + 16, 1),
        ] {
            let bad = region(first, size, Some(&prog), None);
            assert_refused(what, &device, 0, &bad, libc::EEXIST);
        }
        // All are found on the bus, whichever was there first; KVM had the one that ends where an
        // ioeventfd without a length is behind that.
        let regions = [ADDR - SIZE, ADDR, ADDR + 20];
        for (index, addr) in (0..).zip(regions) {
            device.set_region(index, &region(addr, 16, Some(&prog), None));
            for &addr in &regions[..=index as usize] {
                let read = vcpu.read(addr, 4);
                let wanted = (PATTERN & mask(4), vec![]);
                assert_got!((read.value, read.exits), wanted, "{addr:#x}, length {len}");
            }
        }
        let exits = vcpu.write(ADDR + 16, 4, 1);
        assert_got!((taken(&eventfd), exits), (1, vec![]), "length {len}");
        for index in 0..3 {
            device.set_region(index, &NO_REGION);
        }

        ioeventfd(true);
        device.set_region(0, &region(ADDR, SIZE, Some(&prog), None));
        device.set_region(0, &NO_REGION);
    }
}

fn overlap_with_coalesced_mmio() {
    let guest = Guest::new();
    let zone = IoEventAddress::Mmio(ADDR);
    guest
        .vm()
        .register_coalesced_mmio(zone, SIZE as u32)
        .expect("KVM_REGISTER_COALESCED_MMIO");
    assert_occupied(&guest);
}

fn overlap_with_the_irqchip() {
    let guest = Guest::with_irqchip();
    // On arm64 the interrupt controller is on the bus only when it has started.
    let _vcpu = guest.vcpu_with_interrupts();
    let device = Device::new(guest.vm());
    let prog = answer(0);
    for (what, addr) in [
        ("its registers", IRQCHIP_ADDR),
        ("its second half", IRQCHIP_ADDR + 0x80),
    ] {
        let bad = region(addr, 0x80, Some(&prog), None);
        assert_refused(what, &device, 0, &bad, libc::EEXIST);
    }
    device.set_region(0, &region(IRQCHIP_ADDR - SIZE, SIZE, Some(&prog), None));
}

fn errors_hold_no_program() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let census = Census::now();
    let (used, read, write) = (answer(0), answer(1), only_return(ProgType::WRITE, 0));
    device.set_region(0, &region(ADDR, SIZE, Some(&used), None));
    for (index, addr, size, errno) in [
        (0, ADDR + SIZE, SIZE, libc::EEXIST),
        (1, ADDR, SIZE, libc::EEXIST),
        (1, u64::MAX, SIZE, libc::ERANGE),
        (KVM_DEV_BPF_MAX_REGIONS, ADDR + SIZE, SIZE, libc::ENXIO),
    ] {
        let bad = region(addr, size, Some(&read), Some(&write));
        assert_errno("a bad range", device.try_set_region(index, &bad), errno);
    }
    // The first fd is good, the second not: the first must be put again.
    let bad = kvm_bpf_user_region {
        bpf_writefd: read.as_raw_fd(),
        ..region(ADDR + SIZE, SIZE, Some(&read), None)
    };
    assert_refused("a read program to write", &device, 1, &bad, libc::EINVAL);

    drop((read, write));
    census.wait_for_newer(1, 0);
    drop(used);
    drop(device);
    census.wait_for_newer(0, 0);
}

fn every_index_at_once() {
    const STEP: u64 = 16;

    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let device = Device::new(guest.vm());
    let programs: Vec<_> = (0..KVM_DEV_BPF_MAX_REGIONS).map(answer).collect();
    for (index, prog) in (0..).zip(&programs) {
        let range = region(ADDR + STEP * index, STEP, Some(prog), None);
        device.set_region(index, &range);
    }
    // Every other one away: the rest must still be found.
    for index in (0..KVM_DEV_BPF_MAX_REGIONS).step_by(2) {
        device.set_region(index, &NO_REGION);
    }
    for index in 0..KVM_DEV_BPF_MAX_REGIONS {
        let addr = ADDR + STEP * index;
        let read = vcpu.read(addr, 8);
        if index % 2 == 0 {
            assert_got!(read.exits, [Exit::Read(addr, 8)], "region {index}, gone");
        } else {
            assert_got!((read.value, read.exits), (index, vec![]), "region {index}");
        }
    }
}

fn bus_full() {
    /// `NR_IOBUS_DEVS` of the kernel; an interrupt controller would take some.
    const BUS: u64 = 1000;
    const PER_DEVICE: u64 = KVM_DEV_BPF_MAX_REGIONS;

    let guest = Guest::new();
    let prog = answer(0);
    let devices: Vec<_> = (0..=BUS / PER_DEVICE)
        .map(|_| Device::new(guest.vm()))
        .collect();
    let place = |number: u64| {
        (
            &devices[(number / PER_DEVICE) as usize],
            number % PER_DEVICE,
        )
    };
    let range = |number| region(ADDR + 16 * number, 16, Some(&prog), None);

    let taken = (0..=BUS)
        .find(|&number| {
            let (device, index) = place(number);
            device.try_set_region(index, &range(number)) == Err(Errno(libc::ENOSPC))
        })
        .expect("wanted ENOSPC from a full bus, got none");
    assert_got!(taken, BUS, "regions on the bus when it was full");
    let (device, index) = place(taken);
    assert_refused("a full bus", device, index, &range(taken), libc::ENOSPC);
    assert_errno("the index refused", device.region(index), libc::ENOENT);

    // A swap needs no room; one less makes room for one.
    devices[0].set_region(0, &range(0));
    devices[0].set_region(0, &NO_REGION);
    device.set_region(index, &range(taken));
    let read = guest.vcpu(0).read(ADDR + 16 * taken, 4);
    assert_got!(read.exits, [], "the region that took the room");
}

/// What registers `len` bytes at an address on the MMIO bus, and takes it off again.
struct Other {
    name: &'static str,
    eventfd: EventFd,
}

impl Other {
    /// All kinds: an ioeventfd for writes of any length, and one of 4 bytes; a coalesced zone.
    fn all() -> [Self; 3] {
        ["ioeventfd 0", "ioeventfd 4", "zone"].map(|name| Other {
            name,
            eventfd: eventfd(),
        })
    }

    /// Bytes that it takes.
    fn len(&self) -> u64 {
        match self.name {
            "ioeventfd 0" => 1,
            _ => 4,
        }
    }

    fn set(&self, guest: &Guest, addr: u64, there: bool) -> Result<(), Errno> {
        let (vm, at) = (guest.vm(), IoEventAddress::Mmio(addr));
        let result = match (self.name, there) {
            ("ioeventfd 0", true) => vm.register_ioevent(&self.eventfd, &at, NoDatamatch),
            ("ioeventfd 0", false) => vm.unregister_ioevent(&self.eventfd, &at, NoDatamatch),
            ("ioeventfd 4", true) => vm.register_ioevent(&self.eventfd, &at, DOORBELL),
            ("ioeventfd 4", false) => vm.unregister_ioevent(&self.eventfd, &at, DOORBELL),
            (_, true) => vm.register_coalesced_mmio(at, 4),
            (_, false) => vm.unregister_coalesced_mmio(at, 4),
        };
        result.map_err(|error| Errno(error.errno()))
    }
}

/// What is written to the ioeventfd of 4 bytes.
const DOORBELL: u32 = 1;

/// A range of ours is exclusive, whichever comes first: nothing hides a register of it.
fn nothing_registers_over_a_region() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let device = Device::new(guest.vm());
    let prog = answer(PATTERN);
    let range = region(ADDR, 0x100, Some(&prog), None);
    device.set_region(0, &range);
    let mut assert_whole = |what: &str| {
        for addr in (ADDR..ADDR + 0x100).step_by(4) {
            let read = vcpu.read(addr, 4);
            let wanted = (PATTERN & mask(4), vec![]);
            assert_got!((read.value, read.exits), wanted, "{what}: {addr:#x}");
        }
    };
    for other in Other::all() {
        let (name, len) = (other.name, other.len());
        for addr in [ADDR - len + 1, ADDR, ADDR + 0x50, ADDR + 0xfc, ADDR + 0xff] {
            let what = format!("{name} at {addr:#x}");
            assert_errno(&what, other.set(&guest, addr, true), libc::EEXIST);
        }
        assert_whole(name);
        // Just before and just behind.
        for addr in [ADDR - len, ADDR + 0x100] {
            assert_got!(other.set(&guest, addr, true), Ok(()), "{name} at {addr:#x}");
            assert_whole(name);
            // Another device does not register over it, and this one is found again.
            device.set_region(0, &NO_REGION);
            let bad = region(addr & !7, 16, Some(&prog), None);
            assert_refused(name, &device, 1, &bad, libc::EEXIST);
            device.set_region(0, &range);
            assert_whole(name);
            assert_got!(
                other.set(&guest, addr, false),
                Ok(()),
                "{name} at {addr:#x}"
            );
        }
    }
}

/// Registers of 0x200 bytes with a doorbell at 0x50, as virtio-mmio has them: not one over the
/// other, but in two regions around it, and none is lost.
fn layout_of_virtio_mmio() {
    const LEN: u64 = 0x200;
    const BELL: u64 = ADDR + 0x50;

    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let device = Device::new(guest.vm());
    let prog = answer(PATTERN);
    let [any, bell, _] = Other::all();
    for (other, width) in [(&bell, 4), (&any, 4)] {
        let name = other.name;
        device.set_region(0, &region(ADDR, LEN, Some(&prog), None));
        assert_errno(name, other.set(&guest, BELL, true), libc::EEXIST);
        device.set_region(0, &NO_REGION);

        let parts = [(ADDR, BELL), (BELL + 4, ADDR + LEN)];
        let set = |device: &Device| {
            for (index, (start, end)) in (0..).zip(parts) {
                device.set_region(index, &region(start, end - start, Some(&prog), None));
            }
        };
        // The doorbell first, then last.
        for first in [true, false] {
            if first {
                assert_got!(other.set(&guest, BELL, true), Ok(()), "{name}");
                let whole = region(ADDR, LEN, Some(&prog), None);
                assert_refused(name, &device, 0, &whole, libc::EEXIST);
            }
            set(&device);
            if !first {
                assert_got!(other.set(&guest, BELL, true), Ok(()), "{name}");
            }
            for addr in (ADDR..ADDR + LEN).step_by(4).filter(|&addr| addr != BELL) {
                let read = vcpu.read(addr, 4);
                let wanted = (PATTERN & mask(4), vec![]);
                assert_got!((read.value, read.exits), wanted, "{name}: {addr:#x}");
            }
            let exits = vcpu.write(BELL, width, DOORBELL.into());
            assert_got!((taken(&other.eventfd), exits), (1, vec![]), "{name}");
            for index in 0..2 {
                device.set_region(index, &NO_REGION);
            }
            assert_got!(other.set(&guest, BELL, false), Ok(()), "{name}");
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn the_irqchip_does_not_register_over_a_region() {
    let mut guest = Guest::new();
    let device = Device::new(guest.vm());
    let prog = answer(PATTERN);
    device.set_region(0, &region(IRQCHIP_ADDR + 0x80, 8, Some(&prog), None));
    let added = guest.try_add_irqchip();
    assert_errno("KVM_CREATE_IRQCHIP", added, libc::EEXIST);
    device.set_region(0, &NO_REGION);
    assert_got!(guest.try_add_irqchip(), Ok(()));
}

/// Its parts come onto the bus one after another, the distributor when a vCPU first runs.
#[cfg(target_arch = "aarch64")]
fn the_irqchip_does_not_register_over_a_region() {
    use kvm_bpf_selftests::guest::REDISTRIBUTORS;

    let prog = answer(PATTERN);
    let over = |addr| {
        let guest = Guest::with_irqchip();
        let device = Device::new(guest.vm());
        device.set_region(0, &region(addr + 0x80, 8, Some(&prog), None));
        (guest, device)
    };
    let (guest, _device) = over(REDISTRIBUTORS);
    let vcpu = guest.try_vcpu(0).map(drop);
    assert_errno("KVM_CREATE_VCPU", vcpu, libc::EEXIST);

    let (guest, _device) = over(IRQCHIP_ADDR);
    let mut vcpu = guest.vcpu(0);
    guest.start_irqchip();
    assert_errno("KVM_RUN", vcpu.try_prepare_run(), libc::EEXIST);
}

fn appears_while_a_vcpu_runs() {
    const ROUNDS: u32 = 20;

    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let device = Device::new(guest.vm());
    let prog = answer(PATTERN);
    // The round in which the region is there; 0 while it is not.
    let there = AtomicU32::new(0);
    let seen = AtomicBool::new(false);
    let worker = || {
        // An access that begins after the ioctl returned is the program's.
        let round = there.load(SeqCst);
        let read = vcpu.read(ADDR, 8);
        if round > 0 && there.load(SeqCst) == round {
            assert_got!((read.value, read.exits), (PATTERN, vec![]));
            seen.store(true, SeqCst);
        }
    };
    meanwhile([worker], || {
        for round in 1..=ROUNDS {
            device.set_region(0, &region(ADDR, SIZE, Some(&prog), None));
            seen.store(false, SeqCst);
            there.store(round, SeqCst);
            wait_for("an access after the region appeared", true, || {
                seen.load(SeqCst)
            });
            there.store(0, SeqCst);
            device.set_region(0, &NO_REGION);
        }
    });
}

/// Threads set and unregister ranges that overlap: each call works or says why
/// not, a program handles an access or it exits, and nothing is left over.
fn set_by_several_threads() {
    const THREADS: u64 = 3;
    const CALLS: u64 = 200;
    const INDICES: u64 = 4;

    let census = Census::now();
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let device = Device::new(guest.vm());
    let reader = || {
        let read = vcpu.read(ADDR + SIZE, 8);
        let handled = read.exits.is_empty() && read.value < THREADS;
        assert!(
            handled || read.exits == [Exit::Read(ADDR + SIZE, 8)],
            "wanted a program's value or an exit, got {read:x?}"
        );
    };
    let set_regions = |number| {
        let prog = answer(number);
        for call in 0..CALLS {
            let (range, errno) = if (call + number) % 5 == 0 {
                (NO_REGION, Errno(libc::ENOENT))
            } else {
                let addr = ADDR + (call + number) % 3 * (SIZE / 2);
                (
                    region(addr, 2 * SIZE, Some(&prog), None),
                    Errno(libc::EEXIST),
                )
            };
            let got = device.try_set_region(call % INDICES, &range);
            assert!(
                got.is_ok() || got == Err(errno),
                "{range:x?}: wanted Ok or {errno:?}, got {got:?}"
            );
        }
    };
    meanwhile([reader], || {
        thread::scope(|scope| {
            for number in 0..THREADS {
                let set_regions = &set_regions;
                scope.spawn(move || set_regions(number));
            }
        });
    });
    let used = (0..INDICES).filter(|&index| device.region(index).is_ok());
    assert!(
        used.count() <= 1,
        "wanted at most one of the ranges, which all overlap"
    );
    drop(device);
    census.wait_for_newer(0, 0);
}
