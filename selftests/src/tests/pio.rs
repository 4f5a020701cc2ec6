// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Regions of ports: what a program is told, what the guest gets, when user space sees it, and
//! what they share with regions of memory.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};

use Reg::{R0, R1, R2, R6, R7, R8, R9};
use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_bpf::uapi::{KVM_DEV_BPF_ATTR_GROUP_PIO, KVM_DEV_BPF_MAX_REGIONS, kvm_bpf_user_region};
use kvm_bpf_selftests::bpf::{
    Census, Index, LOADERS, Map, Prog, ProgType, Reg, add, add_imm, atomic_add, exit, jump_if_ge,
    load, lookup, mov, mov_imm, mov_imm64, store,
};
use kvm_bpf_selftests::device::{Device, NO_REGION, region};
use kvm_bpf_selftests::guest::{
    Args, Exit, Guest, PRESET, PortExit, Routine, Vcpu, mask, register_after_read, user_byte,
};
use kvm_bpf_selftests::harness::{Errno, meanwhile, number_from_env, wait_for};
use kvm_bpf_selftests::programs::{
    CTX_BUF, CTX_REGION, Record, Recorder, answer, only_return, ret,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{ADDR, PATTERN, SIZE, assert_errno, taken};

tests!(
    every_width_at_every_offset,
    past_the_end,
    declined,
    one_direction_only,
    programs_see_the_index,
    indices_are_shared,
    bad_ranges,
    bad_arguments,
    every_port_there_is,
    overlap_with_other_regions,
    bus_full,
    pic_and_elcr,
    pit_and_speaker,
    ioeventfds,
    coalesced_zones,
    memory_at_the_same_number,
    unregistered_and_closed,
    removed_while_a_vcpu_runs,
    hot_swap,
    string_out_handled,
    string_out_declined,
    string_out_declined_in_the_middle,
    string_in_handled,
    string_in_declined,
    string_in_declined_in_the_middle,
    string_in_declined_at_a_block,
);

/// Where most tests have their region: ports of nothing in the kernel.
const PORT: u16 = 0x2f8;
/// And how many.
const PORTS: u64 = 8;

const WIDTHS: [usize; 3] = [1, 2, 4];

fn ports(first: u16, size: u64, read: Option<&Prog>, write: Option<&Prog>) -> kvm_bpf_user_region {
    region(first.into(), size, read, write)
}

/// What user space gives for so many bytes.
fn user_answer(width: usize) -> u64 {
    let bytes: [u8; 8] = std::array::from_fn(user_byte);
    u64::from_le_bytes(bytes) & mask(width)
}

#[track_caller]
fn assert_in(vcpu: &mut Vcpu, port: u16, width: usize, wanted: u64) {
    let (register, exits) = vcpu.port_in(port, width);
    assert_got!(exits, [], "{width}-byte in of port {port:#x}");
    // What the register held besides must be as the processor would leave it.
    let wanted = register_after_read(PRESET, wanted & mask(width), width);
    assert_got!(register, wanted, "{width}-byte in of port {port:#x}");
}

/// User space sees the access, and its data reaches the guest.
#[track_caller]
fn assert_in_exits(vcpu: &mut Vcpu, port: u16, width: usize) {
    let (register, exits) = vcpu.port_in(port, width);
    let wanted = [PortExit::In(port, width, 1)];
    assert_got!(exits, wanted, "{width}-byte in of port {port:#x}");
    let wanted = register_after_read(PRESET, user_answer(width), width);
    assert_got!(register, wanted, "{width}-byte in of port {port:#x}");
}

#[track_caller]
fn assert_out_exits(vcpu: &mut Vcpu, port: u16, width: usize) {
    let data = PATTERN.to_le_bytes()[..width].to_vec();
    let exits = vcpu.port_out(port, width, PATTERN);
    let wanted = [PortExit::Out(port, width, data)];
    assert_got!(exits, wanted, "{width}-byte out of port {port:#x}");
}

fn every_width_at_every_offset() {
    const VCPU: u32 = 7;

    let guest = Guest::new();
    let mut vcpu = guest.vcpu(VCPU);
    let device = Device::new(guest.vm());
    let (reads, writes) = (Recorder::new(), Recorder::new());
    let (read, write) = (reads.reads(PATTERN, 0), writes.writes(0));
    device.set_ports(0, &ports(PORT, PORTS, Some(&read), Some(&write)));
    for width in WIDTHS {
        for (count, offset) in (1..).zip(0..=PORTS - width as u64) {
            let port = PORT + offset as u16;
            let wanted = Record {
                count,
                buf: 0,
                offset,
                len: width as u64,
                vcpu_id: VCPU.into(),
            };
            assert_in(&mut vcpu, port, width, PATTERN);
            assert_got!(reads.of_len(width), wanted, "in of port {port:#x}");

            let value = PATTERN.rotate_left(8 * offset as u32);
            let exits = vcpu.port_out(port, width, value);
            assert_got!(exits, [], "{width}-byte out of port {port:#x}");
            // Bytes past `len` are 0 and not those of an earlier access.
            let buf = value & mask(width);
            let wanted = Record { buf, ..wanted };
            assert_got!(writes.of_len(width), wanted, "out of port {port:#x}");
        }
    }
    let accesses = 3 * PORTS + 3 - WIDTHS.iter().sum::<usize>() as u64;
    assert_got!((reads.count(), writes.count()), (accesses, accesses));
}

/// An access is the region's only if all of it is inside.
fn past_the_end() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let device = Device::new(guest.vm());
    let recorder = Recorder::new();
    let (read, write) = (recorder.reads(PATTERN, 0), recorder.writes(0));
    device.set_ports(0, &ports(PORT, PORTS, Some(&read), Some(&write)));
    let end = PORT + PORTS as u16;
    for (port, width) in [
        (end - 1, 2),
        (end - 1, 4),
        (end - 3, 4),
        (end, 1),
        (end, 2),
        (PORT - 1, 1),
        (PORT - 1, 2),
        (PORT - 2, 4),
    ] {
        assert_in_exits(&mut vcpu, port, width);
        assert_out_exits(&mut vcpu, port, width);
    }
    assert_got!(recorder.count(), 0, "runs of the programs");
    assert_in(&mut vcpu, end - 2, 2, PATTERN);
    assert_in(&mut vcpu, end - 1, 1, PATTERN);
}

/// The programs acted, but what they stored does not count.
fn declined() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let device = Device::new(guest.vm());
    for result in [1, -1, i32::MIN] {
        let recorder = Recorder::new();
        let (read, write) = (recorder.reads(PATTERN, result), recorder.writes(result));
        device.set_ports(0, &ports(PORT, PORTS, Some(&read), Some(&write)));
        for width in WIDTHS {
            assert_in_exits(&mut vcpu, PORT + 2, width);
            assert_out_exits(&mut vcpu, PORT + 2, width);
            assert_got!(recorder.of_len(width).count, 2, "runs of the programs");
        }
    }
}

fn one_direction_only() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let device = Device::new(guest.vm());
    let (read, write) = (answer(PATTERN), only_return(ProgType::WRITE, 0));
    device.set_ports(0, &ports(PORT, PORTS, Some(&read), None));
    assert_in(&mut vcpu, PORT, 4, PATTERN);
    assert_out_exits(&mut vcpu, PORT, 4);

    device.set_ports(0, &ports(PORT, PORTS, None, Some(&write)));
    assert_in_exits(&mut vcpu, PORT, 4);
    assert_got!(vcpu.port_out(PORT, 4, PATTERN), []);
}

/// One pair of programs serves ports and memory, and is told which by the index alone.
fn programs_see_the_index() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let device = Device::new(guest.vm());
    let mut insns = vec![load(4, R2, R1, CTX_REGION), store(8, R1, CTX_BUF, R2)];
    insns.extend(ret(0));
    for load in LOADERS {
        let read = load(ProgType::READ, &insns);
        device.set_ports(5, &ports(PORT, PORTS, Some(&read), None));
        device.set_ports(255, &ports(PORT + PORTS as u16, PORTS, Some(&read), None));
        device.set_region(6, &region(ADDR, SIZE, Some(&read), None));
        assert_in(&mut vcpu, PORT, 4, 5);
        assert_in(&mut vcpu, PORT + PORTS as u16, 4, 255);
        assert_got!(vcpu.read(ADDR, 8).value, 6);
    }
}

/// An index that is in use for memory is not free for ports, and the other way round; not even
/// where the numbers are the same.
fn indices_are_shared() {
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

fn bad_ranges() {
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

fn bad_arguments() {
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

fn every_port_there_is() {
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
fn overlap_with_other_regions() {
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
fn bus_full() {
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

fn pic_and_elcr() {
    let mut guest = Guest::new();
    let ports = [0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1];
    assert_exclusive(&mut guest, &ports, Guest::try_add_irqchip);
}

/// Also: a VM whose timer was refused can have it when the region is gone.
fn pit_and_speaker() {
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

fn ioeventfds() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let eventfd = EventFd::new(EFD_NONBLOCK).expect("eventfd");
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

fn coalesced_zones() {
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

/// Ports and memory are two spaces: each has its own programs, and goes by itself.
fn memory_at_the_same_number() {
    const BOTH: u64 = 0xc000;
    const LEN: u64 = 0x100;

    let guest = Guest::new();
    guest.end_ram_at(BOTH);
    let mut vcpu = guest.vcpu(0);
    let device = Device::new(guest.vm());
    let (of_memory, of_ports) = (Recorder::new(), Recorder::new());
    let load = |recorder: &Recorder, value| (recorder.reads(value, 0), recorder.writes(0));
    let (memory, ports) = (load(&of_memory, 1), load(&of_ports, 2));
    for round in 1..=3 {
        device.set_region(0, &region(BOTH, LEN, Some(&memory.0), Some(&memory.1)));
        device.set_ports(1, &region(BOTH, LEN, Some(&ports.0), Some(&ports.1)));
        let read = vcpu.read(BOTH + 4, 4);
        assert_got!((read.value, read.exits), (1, vec![]));
        assert_in(&mut vcpu, BOTH as u16 + 4, 4, 2);
        assert_got!(vcpu.write(BOTH + 4, 4, 0), []);
        assert_got!(vcpu.port_out(BOTH as u16 + 4, 4, 0), []);
        let counts = (of_memory.count(), of_ports.count());
        assert_got!(counts, (3 * round - 1, 3 * round - 1), "round {round}");

        device.set_region(0, &NO_REGION);
        let exit = Exit::Read(BOTH, 4);
        assert_got!(vcpu.read(BOTH, 4).exits, [exit], "memory that is gone");
        assert_in(&mut vcpu, BOTH as u16, 4, 2);
        device.set_region(0, &region(BOTH, LEN, Some(&memory.0), None));
        device.set_ports(1, &NO_REGION);
        assert_in_exits(&mut vcpu, BOTH as u16, 4);
        assert_got!(vcpu.read(BOTH, 4).exits, []);
    }
}

fn unregistered_and_closed() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let census = Census::now();
    let device = Device::new(guest.vm());
    for round in 0..3 {
        let prog = answer(PATTERN + round);
        device.set_ports(9, &ports(PORT, PORTS, Some(&prog), None));
        assert_in(&mut vcpu, PORT, 4, PATTERN + round);
        device.set_ports(9, &NO_REGION);
        assert_in_exits(&mut vcpu, PORT, 4);
        let unset = device.try_set_ports(9, &NO_REGION);
        assert_errno("a second time", unset, libc::ENOENT);
    }
    census.wait_for_newer(0, 0);

    device.set_ports(9, &ports(PORT, PORTS, Some(&answer(PATTERN)), None));
    census.wait_for_newer(1, 0);
    let worker = || drop(vcpu.port_in(PORT, 4));
    meanwhile([worker], || drop(device));
    census.wait_for_newer(0, 0);
    assert_in_exits(&mut vcpu, PORT, 4);
}

fn removed_while_a_vcpu_runs() {
    const ROUNDS: u32 = 20;

    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let device = Device::new(guest.vm());
    let prog = answer(PATTERN);
    // The round in which the region is there; 0 while it is not.
    let there = AtomicU32::new(0);
    let seen = AtomicBool::new(false);
    let worker = || {
        let round = there.load(SeqCst);
        let (register, exits) = vcpu.port_in(PORT, 4);
        // One that begins after the region was set is the program's, wholly.
        let handled = (PATTERN & mask(4), vec![]);
        if round > 0 && there.load(SeqCst) == round {
            assert_got!((register, exits), handled);
            seen.store(true, SeqCst);
        }
    };
    meanwhile([worker], || {
        for round in 1..=ROUNDS {
            device.set_ports(0, &ports(PORT, PORTS, Some(&prog), None));
            seen.store(false, SeqCst);
            there.store(round, SeqCst);
            wait_for("an access after the region appeared", true, || {
                seen.load(SeqCst)
            });
            there.store(0, SeqCst);
            device.set_ports(0, &NO_REGION);
        }
    });
}

/// Every read gets the value of one pair, every write runs one program once, nothing reaches user
/// space, nothing leaks.
fn hot_swap() {
    const VCPUS: u32 = 2;
    const BATCH: u64 = 100;
    const ANSWERS: [u64; 2] = [0x5a5a_5a5a, 0xc3c3_c3c3];

    let census = Census::now();
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let counts = [Map::new(1, 1), Map::new(1, 1)];
    let programs = [0, 1].map(|side: usize| {
        let mut write = lookup(&counts[side], Index::Imm(0));
        write.extend([mov_imm(R1, 1), atomic_add(8, R0, 0, R1)]);
        write.extend(ret(0));
        let load = LOADERS[side];
        let mut read = mov_imm64(R2, ANSWERS[side]).to_vec();
        read.push(store(8, R1, CTX_BUF, R2));
        read.extend(ret(0));
        [load(ProgType::READ, &read), load(ProgType::WRITE, &write)]
    });
    let set = |[read, write]: &[Prog; 2]| {
        device.set_ports(0, &ports(PORT, PORTS, Some(read), Some(write)));
    };
    set(&programs[0]);
    let args = Args {
        addr: PORT.into(),
        count: BATCH,
        pair: ANSWERS,
        ..Default::default()
    };
    let written = AtomicU64::new(0);
    let workers = (0..VCPUS).map(|id| {
        let mut vcpu = guest.vcpu(id);
        let written = &written;
        move || {
            let (results, exits) = vcpu.ports(Routine::PortHammer, 1, args);
            assert_got!(exits, [], "exits of vCPU {id}");
            assert_got!(results.count, 0, "vCPU {id}: {results:x?}");
            written.fetch_add(BATCH, SeqCst);
        }
    });
    meanwhile(workers, || {
        for swap in 1..=number_from_env("KVM_BPF_SWAPS", 1000) as usize {
            set(&programs[swap % 2]);
        }
    });
    let counts = counts.map(|map| map.get(0)[0]);
    assert_got!(counts[0] + counts[1], written.into_inner(), "writes");
    assert!(counts[0] > 0 && counts[1] > 0, "both used, got {counts:?}");
    drop((device, programs));
    census.wait_for_newer(0, 0);
}

/// Where string instructions have their data in the guest's memory: at a page's start.
const STRING: u64 = 0xb000;
/// KVM reads ahead so many bytes.
const BLOCK: usize = 1024;

/// Programs that number the elements of a string: `read` gives element n the value `PATTERN + n`,
/// `write` notes its data; both decline those from `decline.start` up to `decline.end`.
struct Series {
    state: Map,
    data: Map,
    read: Prog,
    write: Prog,
}

impl Series {
    fn new(decline: std::ops::Range<u64>) -> Self {
        let (state, data) = (Map::new(1, 3), Map::new(4096, 1));
        state.set(0, &[0, decline.start, decline.end]);
        let [read, write] = [ProgType::READ, ProgType::WRITE].map(|kind| {
            let mut insns = vec![mov(R6, R1)];
            insns.extend(lookup(&state, Index::Imm(0)));
            insns.extend([
                load(8, R7, R0, 0),
                load(8, R8, R0, 8),
                load(8, R9, R0, 16),
                mov(R1, R7),
                add_imm(R1, 1),
                store(8, R0, 0, R1),
            ]);
            if kind == ProgType::READ {
                insns.extend(mov_imm64(R2, PATTERN));
                insns.extend([add(R2, R7), store(8, R6, CTX_BUF, R2)]);
            } else {
                insns.extend(lookup(&data, Index::Reg(R7)));
                insns.extend([load(8, R1, R6, CTX_BUF), store(8, R0, 0, R1)]);
            }
            insns.push(jump_if_ge(R7, R8, 2));
            insns.extend(ret(0));
            insns.push(jump_if_ge(R7, R9, 2));
            insns.extend(ret(1));
            insns.extend([mov_imm(R0, 0), exit()]);
            Prog::load(kind, &insns)
        });
        Series {
            state,
            data,
            read,
            write,
        }
    }

    /// How often a program ran.
    fn runs(&self) -> u64 {
        self.state.get(0)[0]
    }

    /// What `rep ins` of so many elements leaves in memory, and what user space saw.
    fn string_in(&self, width: usize, count: u64) -> (Vec<u8>, Vec<PortExit>) {
        let (bytes, exits) = self.run(Routine::InString, width, count, |_| 0xaa);
        // Nothing behind it.
        let (data, rest) = bytes.split_at(width * count as usize);
        assert!(rest.iter().all(|&byte| byte == 0xaa), "got {rest:x?}");
        (data.to_vec(), exits)
    }

    /// The same for any routine, with what is in memory before.
    fn run(
        &self,
        routine: Routine,
        width: usize,
        count: u64,
        byte: fn(usize) -> u8,
    ) -> (Vec<u8>, Vec<PortExit>) {
        let guest = Guest::new();
        let mut vcpu = guest.vcpu(0);
        let device = Device::new(guest.vm());
        let range = ports(PORT, PORTS, Some(&self.read), Some(&self.write));
        device.set_ports(0, &range);
        let bytes: [u8; 0x4000] = std::array::from_fn(byte);
        guest.write_ram(STRING, &bytes);
        let args = Args {
            addr: PORT.into(),
            count,
            pair: [STRING, 0],
            ..Default::default()
        };
        let (results, exits) = vcpu.ports(routine, width, args);
        assert_got!(results.count, 0, "elements left");
        (guest.read_ram::<0x4000>(STRING).to_vec(), exits)
    }
}

/// Byte `at` of what `rep outs` writes.
fn out_byte(at: usize) -> u8 {
    (at * 7 + at / 256) as u8
}

/// Elements `first` up to `end` of it.
fn out_bytes(width: usize, element: u64) -> Vec<u8> {
    let first = width * element as usize;
    (first..first + width).map(out_byte).collect()
}

/// `rep outs`: each element runs the program once, and those it declines exit one by one.
fn assert_string_out(decline: std::ops::Range<u64>, count: u64) {
    for width in WIDTHS {
        let series = Series::new(decline.clone());
        let (_, exits) = series.run(Routine::OutString, width, count, out_byte);
        let wanted: Vec<_> = (decline.start..decline.end.min(count))
            .map(|element| PortExit::Out(PORT, width, out_bytes(width, element)))
            .collect();
        assert_got!(exits, wanted, "width {width}");
        assert_got!(series.runs(), count, "runs, width {width}");
        for element in 0..count {
            let mut wanted = out_bytes(width, element);
            wanted.resize(8, 0);
            let got = series.data.get(element as u32)[0].to_le_bytes().to_vec();
            assert_got!(got, wanted, "element {element}, width {width}");
        }
    }
}

fn string_out_handled() {
    assert_string_out(0..0, 1);
    // More than KVM does at once.
    assert_string_out(0..0, 1500);
}

fn string_out_declined() {
    assert_string_out(0..u64::MAX, 100);
}

fn string_out_declined_in_the_middle() {
    assert_string_out(10..20, 100);
    assert_string_out(99..100, 100);
}

/// Elements from `first` on as the read program gives them.
fn elements(width: usize, first: u64, count: u64) -> Vec<u8> {
    (first..first + count)
        .flat_map(|element| (PATTERN + element).to_le_bytes()[..width].to_vec())
        .collect()
}

/// What user space gives for a block of so many bytes.
fn user_bytes(len: usize) -> Vec<u8> {
    (0..len).map(user_byte).collect()
}

fn string_in_handled() {
    for width in WIDTHS {
        for count in [1, 100, 1500] {
            let series = Series::new(0..0);
            let (data, exits) = series.string_in(width, count);
            assert_got!(exits, [], "width {width}");
            assert_got!(data, elements(width, 0, count), "width {width}");
            assert_got!(series.runs(), count, "runs, width {width}");
        }
    }
}

/// Whole blocks exit, and the program runs once for each.
fn string_in_declined() {
    for width in WIDTHS {
        let series = Series::new(0..u64::MAX);
        let block = BLOCK / width;
        let (data, exits) = series.string_in(width, 2 * block as u64 + 10);
        let exit = |count| PortExit::In(PORT, width, count);
        assert_got!(exits, [exit(block), exit(block), exit(10)], "width {width}");
        let parts = [BLOCK, BLOCK, 10 * width].map(user_bytes);
        assert_got!(data, parts.concat(), "width {width}");
        assert_got!(series.runs(), 3, "runs, width {width}");
    }
}

/// From that element to the end of its block all is 0, without a run or an exit.
fn string_in_declined_in_the_middle() {
    for width in WIDTHS {
        for declined in [1, 10] {
            let series = Series::new(declined..declined + 1);
            let block = (BLOCK / width) as u64;
            let (data, exits) = series.string_in(width, block + 10);
            assert_got!(exits, [], "width {width}");
            let mut wanted = elements(width, 0, declined);
            wanted.resize(BLOCK, 0);
            wanted.extend(elements(width, declined + 1, 10));
            assert_got!(data, wanted, "width {width}");
            assert_got!(series.runs(), declined + 11, "runs, width {width}");
        }
    }
}

/// The first element of a later block: that block exits, those around it do not.
fn string_in_declined_at_a_block() {
    for width in WIDTHS {
        let block = (BLOCK / width) as u64;
        let series = Series::new(block..block + 1);
        let (data, exits) = series.string_in(width, 2 * block + 10);
        let wanted = [PortExit::In(PORT, width, block as usize)];
        assert_got!(exits, wanted, "width {width}");
        let mut wanted = elements(width, 0, block);
        wanted.extend(user_bytes(BLOCK));
        wanted.extend(elements(width, block + 1, 10));
        assert_got!(data, wanted, "width {width}");
        assert_got!(series.runs(), block + 11, "runs, width {width}");
    }
}
