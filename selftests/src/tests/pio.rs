// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Regions of ports: what a program is told, what the guest gets, when user space sees it, and
//! what they share with regions of memory.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};

use Reg::{R0, R1, R2};
use kvm_bpf::uapi::kvm_bpf_user_region;
use kvm_bpf_selftests::bpf::{
    Census, Index, LOADERS, Map, Prog, ProgType, Reg, atomic_add, load, lookup, mov_imm, mov_imm64,
    store,
};
use kvm_bpf_selftests::device::{Device, NO_REGION, region};
use kvm_bpf_selftests::guest::{
    Args, Exit, Guest, PRESET, PortExit, Routine, Vcpu, mask, register_after_read, user_byte,
};
use kvm_bpf_selftests::harness::{meanwhile, number_from_env, wait_for};
use kvm_bpf_selftests::programs::{
    CTX_BUF, CTX_REGION, Record, Recorder, answer, only_return, ret,
};

use super::{ADDR, PATTERN, SIZE, assert_errno};

mod ranges;
mod strings;

tests!(
    every_width_at_every_offset,
    past_the_end,
    declined,
    one_direction_only,
    programs_see_the_index,
    ranges::indices_are_shared,
    ranges::bad_ranges,
    ranges::bad_arguments,
    ranges::every_port_there_is,
    ranges::overlap_with_other_regions,
    ranges::bus_full,
    ranges::pic_and_elcr,
    ranges::pit_and_speaker,
    ranges::ioeventfds,
    ranges::coalesced_zones,
    memory_at_the_same_number,
    unregistered_and_closed,
    removed_while_a_vcpu_runs,
    hot_swap,
    strings::string_out_handled,
    strings::string_out_declined,
    strings::string_out_declined_in_the_middle,
    strings::string_in_handled,
    strings::string_in_declined,
    strings::string_in_declined_in_the_middle,
    strings::string_in_declined_at_a_block,
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
