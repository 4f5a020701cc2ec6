// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a program is told of an access, what the guest gets, and when user space sees it.

use kvm_bpf_selftests::bpf::{
    Index, LOADERS, Map, Prog, ProgType, Reg, atomic_add, exit, lookup, mov_imm, mov_imm64,
    store_imm,
};
use kvm_bpf_selftests::device::{Device, region};
#[cfg(target_arch = "x86_64")]
use kvm_bpf_selftests::guest::{Args, Routine};
use kvm_bpf_selftests::guest::{
    Exit, Guest, PRESET, RAM_SIZE, USER_ANSWER, Vcpu, mask, register_after_read,
};
use kvm_bpf_selftests::harness::skip;
use kvm_bpf_selftests::programs::{CTX_BUF, Record, Recorder, answer, only_return, ret};

use super::{ADDR, PATTERN, SIZE};

tests!(
    reads_of_every_width,
    writes_of_every_width,
    narrow_write_after_a_wide_one,
    context_fields,
    store_of_nothing_reads_as_zero,
    partial_store_leaves_the_rest_zero,
    read_falls_through,
    write_falls_through,
    one_direction_only,
    past_the_end,
    page_crossing,
    page_crossing_beside_ram,
    maps_of_every_kind,
    low_half_of_the_result_counts,
    memory_comes_first,
    rom_takes_loads_only,
    #[cfg(target_arch = "aarch64")]
    a_protected_guest_accesses_the_same,
    #[cfg(target_arch = "x86_64")]
    event_on_mmio_exits,
);

const WIDTHS: [usize; 4] = [1, 2, 4, 8];

/// A guest with one region at [`ADDR`].
struct Setup {
    guest: Guest,
    vcpu: Vcpu,
    _device: Device,
}

fn setup(read: Option<&Prog>, write: Option<&Prog>) -> Setup {
    setup_at(ADDR, read, write)
}

fn setup_at(addr: u64, read: Option<&Prog>, write: Option<&Prog>) -> Setup {
    setup_on(Guest::new(), addr, read, write)
}

fn setup_on(guest: Guest, addr: u64, read: Option<&Prog>, write: Option<&Prog>) -> Setup {
    let vcpu = guest.vcpu(0);
    let device = Device::new(guest.vm());
    device.set_region(0, &region(addr, 2 * SIZE, read, write));
    Setup {
        guest,
        vcpu,
        _device: device,
    }
}

#[track_caller]
fn assert_read(vcpu: &mut Vcpu, addr: u64, width: usize, wanted: u64, exits: &[Exit]) {
    let read = vcpu.read(addr, width);
    assert_got!(
        read.value,
        wanted,
        "{width}-byte read at {addr:#x}: {read:x?}"
    );
    // What the register held besides must be as the processor would leave it.
    let register = register_after_read(PRESET, wanted, width);
    assert_got!(read.register, register, "{width}-byte read: {read:x?}");
    assert_got!(read.exits, exits, "{width}-byte read at {addr:#x}");
}

fn reads_of_every_width() {
    let recorder = Recorder::new();
    let mut setup = setup(Some(&recorder.reads(PATTERN, 0)), None);
    for width in WIDTHS {
        for offset in [0, 8, SIZE - 8] {
            assert_read(
                &mut setup.vcpu,
                ADDR + offset,
                width,
                PATTERN & mask(width),
                &[],
            );
        }
        assert_got!(recorder.of_len(width).count, 3, "{width}-byte reads");
    }
}

fn writes_of_every_width() {
    let recorder = Recorder::new();
    let mut setup = setup(None, Some(&recorder.writes(0)));
    for width in WIDTHS {
        assert_got!(setup.vcpu.write(ADDR + 8, width, PATTERN), []);
        let wanted = Record {
            count: 1,
            buf: PATTERN & mask(width),
            offset: 8,
            len: width as u64,
            vcpu_id: 0,
        };
        assert_got!(recorder.of_len(width), wanted, "{width}-byte write");
    }
}

/// Bytes past `len` are 0 and not those of an earlier access.
fn narrow_write_after_a_wide_one() {
    let recorder = Recorder::new();
    let mut setup = setup(None, Some(&recorder.writes(0)));
    for width in [1, 2, 4] {
        setup.vcpu.write(ADDR, 8, u64::MAX);
        setup.vcpu.write(ADDR, width, PATTERN);
        let got = recorder.of_len(width).buf;
        assert_got!(got, PATTERN & mask(width), "buf of a {width}-byte write");
    }
}

fn context_fields() {
    let (reads, writes) = (Recorder::new(), Recorder::new());
    let setup = setup(Some(&reads.reads(0, 0)), Some(&writes.writes(0)));
    // All of them, before one runs: protected KVM takes no vCPU later.
    let vcpus = [1, 77, 255].map(|id| (id, setup.guest.vcpu(id)));
    for (id, mut vcpu) in vcpus {
        for offset in [0, 8, 0x248, SIZE - 8] {
            for width in WIDTHS {
                vcpu.read(ADDR + offset, width);
                vcpu.write(ADDR + offset, width, 0);
                for (what, record) in [
                    ("read", reads.of_len(width)),
                    ("write", writes.of_len(width)),
                ] {
                    assert_got!(
                        (record.offset, record.len, record.vcpu_id),
                        (offset, width as u64, id.into()),
                        "{what} of {width} bytes at offset {offset:#x} by vCPU {id}"
                    );
                }
            }
        }
    }
}

fn store_of_nothing_reads_as_zero() {
    let mut setup = setup(Some(&only_return(ProgType::READ, 0)), None);
    for width in WIDTHS {
        assert_read(&mut setup.vcpu, ADDR, width, 0, &[]);
    }
}

fn partial_store_leaves_the_rest_zero() {
    let mut insns = vec![store_imm(1, Reg::R1, CTX_BUF + 2, 0x5a)];
    insns.extend(ret(0));
    let mut setup = setup(Some(&Prog::load(ProgType::READ, &insns)), None);
    for width in WIDTHS {
        assert_read(&mut setup.vcpu, ADDR, width, 0x5a_0000 & mask(width), &[]);
    }
}

/// The program acted, but what it stored does not count: user space handles the read.
fn read_falls_through() {
    for result in [1, -1, i32::MIN] {
        let recorder = Recorder::new();
        let mut setup = setup(Some(&recorder.reads(PATTERN, result)), None);
        for width in WIDTHS {
            let exit = Exit::Read(ADDR, width);
            assert_read(
                &mut setup.vcpu,
                ADDR,
                width,
                USER_ANSWER & mask(width),
                &[exit],
            );
            assert_got!(recorder.of_len(width).count, 1, "runs of the program");
        }
    }
}

fn write_falls_through() {
    for result in [1, -1, i32::MIN] {
        let recorder = Recorder::new();
        let mut setup = setup(None, Some(&recorder.writes(result)));
        for width in WIDTHS {
            let exits = setup.vcpu.write(ADDR + 8, width, PATTERN);
            assert_got!(exits, [Exit::Write(ADDR + 8, width, PATTERN & mask(width))]);
            assert_got!(recorder.of_len(width).count, 1, "runs of the program");
        }
    }
}

fn one_direction_only() {
    let read = answer(PATTERN);
    let mut only_read = setup(Some(&read), None);
    assert_read(&mut only_read.vcpu, ADDR, 8, PATTERN, &[]);
    let exits = only_read.vcpu.write(ADDR, 4, PATTERN);
    assert_got!(exits, [Exit::Write(ADDR, 4, PATTERN & mask(4))]);

    let write = only_return(ProgType::WRITE, 0);
    let mut only_write = setup(None, Some(&write));
    assert_got!(only_write.vcpu.write(ADDR, 4, PATTERN), []);
    let exit = Exit::Read(ADDR, 4);
    assert_read(
        &mut only_write.vcpu,
        ADDR,
        4,
        USER_ANSWER & mask(4),
        &[exit],
    );
}

/// An access is the region's only if all of it is inside.
fn past_the_end() {
    const LEN: u64 = 6;

    let recorder = Recorder::new();
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let device = Device::new(guest.vm());
    let read = answer(PATTERN);
    device.set_region(
        0,
        &region(ADDR, LEN, Some(&read), Some(&recorder.writes(0))),
    );
    for (offset, width) in [(0, 8), (4, 4), (6, 2), (6, 1)] {
        let (addr, exit) = (ADDR + offset, Exit::Read(ADDR + offset, width));
        assert_read(&mut vcpu, addr, width, USER_ANSWER & mask(width), &[exit]);
        let exits = vcpu.write(addr, width, PATTERN);
        assert_got!(exits, [Exit::Write(addr, width, PATTERN & mask(width))]);
    }
    assert_got!(recorder.count(), 0, "writes that the program saw");
    assert_read(&mut vcpu, ADDR + 4, 2, PATTERN & mask(2), &[]);
}

fn needs_unaligned_accesses() {
    if !cfg!(target_arch = "x86_64") {
        skip("only x86 lets a guest without MMU access devices unaligned");
    }
}

/// x86 cuts an access at the page boundary: 3 bytes, then 5.
fn page_crossing() {
    needs_unaligned_accesses();
    let addr = ADDR + SIZE - 3;
    let recorder = Recorder::new();
    let mut setup = setup(Some(&answer(PATTERN)), Some(&recorder.writes(0)));
    assert_got!(setup.vcpu.write(addr, 8, PATTERN), []);
    for (len, offset, buf) in [(3, SIZE - 3, PATTERN & mask(3)), (5, SIZE, PATTERN >> 24)] {
        let wanted = Record {
            count: 1,
            buf,
            offset,
            len: len as u64,
            vcpu_id: 0,
        };
        assert_got!(recorder.of_len(len), wanted, "{len}-byte part of the write");
    }
    // Each part is a read of its own, which takes the low bytes.
    let wanted = PATTERN & mask(3) | PATTERN << 24;
    assert_read(&mut setup.vcpu, addr, 8, wanted, &[]);
}

fn page_crossing_beside_ram() {
    needs_unaligned_accesses();
    let (addr, around) = (RAM_SIZE - 3, RAM_SIZE - 8);
    let recorder = Recorder::new();
    let mut setup = setup_at(RAM_SIZE, Some(&answer(PATTERN)), Some(&recorder.writes(0)));

    setup.guest.write_ram(around, &[0x11; 8]);
    assert_got!(setup.vcpu.write(addr, 8, PATTERN), []);
    let mut wanted = [0x11; 8];
    wanted[5..].copy_from_slice(&PATTERN.to_le_bytes()[..3]);
    assert_got!(
        setup.guest.read_ram(around),
        wanted,
        "RAM before the region"
    );
    assert_got!(recorder.of_len(5).buf, PATTERN >> 24, "the region's part");
    assert_got!(recorder.count(), 1, "accesses to the region");

    setup.guest.write_ram(addr, &[0x21, 0x22, 0x23]);
    assert_read(&mut setup.vcpu, addr, 8, 0x23_2221 | PATTERN << 24, &[]);
}

/// A hash table's look-up is a call into the kernel which wants RCU's protection and says so, on a
/// kernel that checks (lockdep); an array's is not.
fn maps_of_every_kind() {
    for load in LOADERS {
        for map in [Map::new(1, 1), Map::hash(1, 1)] {
            let programs = [ProgType::READ, ProgType::WRITE].map(|kind| {
                let mut insns = lookup(&map, Index::Imm(0));
                insns.extend([mov_imm(Reg::R1, 1), atomic_add(8, Reg::R0, 0, Reg::R1)]);
                insns.extend(ret(0));
                load(kind, &insns)
            });
            let mut setup = setup(Some(&programs[0]), Some(&programs[1]));
            for round in 0..3 {
                assert_read(&mut setup.vcpu, ADDR, 4, 0, &[]);
                assert_got!(setup.vcpu.write(ADDR, 4, 1), []);
                assert_got!(map.get(0)[0], 2 * (round + 1), "accesses counted");
            }
        }
    }
}

fn low_half_of_the_result_counts() {
    for (result, exits) in [(1 << 32, 0), (u64::MAX << 32, 0), (1 << 32 | 1, 1)] {
        for load in LOADERS {
            let mut insns = mov_imm64(Reg::R0, result).to_vec();
            insns.push(exit());
            let write = load(ProgType::WRITE, &insns);
            let mut setup = setup(None, Some(&write));
            let got = setup.vcpu.write(ADDR, 4, 1).len();
            assert_got!(got, exits, "exits of a program that returns {result:#x}");
        }
    }
}

/// A region over the guest's memory is registered, but accesses of memory do not trap.
fn memory_comes_first() {
    const PAGE: u64 = RAM_SIZE - 0x1000;

    let recorder = Recorder::new();
    let (read, write) = (recorder.reads(PATTERN, 0), recorder.writes(0));
    // Both its pages: the last of memory and the first beyond.
    let mut setup = setup_at(PAGE, Some(&read), Some(&write));
    setup.guest.write_ram(PAGE, &1_u64.to_le_bytes());
    assert_read(&mut setup.vcpu, PAGE, 8, 1, &[]);
    assert_got!(setup.vcpu.write(PAGE, 8, 2), []);
    assert_got!(setup.guest.read_ram::<8>(PAGE), 2_u64.to_le_bytes());
    assert_got!(recorder.count(), 0, "runs of the programs");
    assert_read(&mut setup.vcpu, PAGE + SIZE, 8, PATTERN, &[]);
    assert_got!(recorder.count(), 1, "runs beyond the memory");
}

fn rom_takes_loads_only() {
    let recorder = Recorder::new();
    let (read, write) = (recorder.reads(PATTERN, 0), recorder.writes(0));
    let mut setup = setup(Some(&read), Some(&write));
    setup.guest.add_rom(ADDR);
    let first = u64::from_le_bytes(setup.guest.read_ram::<8>(0));
    assert_ne!(first, PATTERN);
    assert_read(&mut setup.vcpu, ADDR, 8, first, &[]);
    assert_got!(recorder.count(), 0, "runs of the programs");
    assert_got!(setup.vcpu.write(ADDR, 8, PATTERN), []);
    assert_got!(recorder.count(), 1, "runs of the programs");
    assert_read(&mut setup.vcpu, ADDR, 8, first, &[]);
}

/// Programs handle a protected guest's accesses, and user space those that they decline.
#[cfg(target_arch = "aarch64")]
fn a_protected_guest_accesses_the_same() {
    for result in [0, 1] {
        let (reads, writes) = (Recorder::new(), Recorder::new());
        let mut setup = setup_on(
            Guest::protected(),
            ADDR,
            Some(&reads.reads(PATTERN, result)),
            Some(&writes.writes(result)),
        );
        for width in WIDTHS {
            let (value, exits) = match result {
                0 => (PATTERN, vec![]),
                _ => (USER_ANSWER, vec![Exit::Read(ADDR, width)]),
            };
            assert_read(&mut setup.vcpu, ADDR, width, value & mask(width), &exits);
            assert_got!(reads.of_len(width).count, 1, "{width}-byte reads");

            let value = PATTERN & mask(width);
            let exits = match result {
                0 => vec![],
                _ => vec![Exit::Write(ADDR + 8, width, value)],
            };
            assert_got!(setup.vcpu.write(ADDR + 8, width, PATTERN), exits);
            let wanted = Record {
                count: 1,
                buf: value,
                offset: 8,
                len: width as u64,
                vcpu_id: 0,
            };
            assert_got!(writes.of_len(width), wanted, "{width}-byte write");
        }
    }
}

/// A vCPU that pushes an exception's frame to MMIO exits to user space, also when KVM has seen the
/// page before: both where a device is and where none is.
#[cfg(target_arch = "x86_64")]
fn event_on_mmio_exits() {
    /// `KVM_INTERNAL_ERROR_DELIVERY_EV`.
    const DELIVERY: u32 = 3;

    let prog = answer(PATTERN);
    let mut setup = setup(Some(&prog), None);
    for addr in [ADDR, ADDR + 0x10_0000] {
        let args = Args {
            addr,
            ..Default::default()
        };
        let error = setup
            .vcpu
            .internal_error_of(Routine::ExceptionOnStack, args);
        assert_got!(error, DELIVERY, "an exception's frame at {addr:#x}");
    }
}
