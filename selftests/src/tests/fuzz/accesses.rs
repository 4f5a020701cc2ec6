// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Random accesses of the guest at the ends of regions, against a model of what programs are told of
//! each, what the guest gets, and what exits.
//!
//! On x86 the instructions are also those that read and write, copy, fill, and have 16 bytes, and
//! accesses begin at any byte: KVM's emulator splits them. On arm64 they are aligned loads and stores
//! of one register, and those that reach no program, as the CPU does not describe them.

use Reg::{R0, R1, R6, R7, R8, R9};
use kvm_bpf_selftests::bpf::{
    Atomic, Index, Insn, Map, Prog, ProgType, Reg, add, and, atomic, exit, jump_if_ne, load,
    lookup, mov, mov_imm, mov_imm64, store, store_imm,
};
use kvm_bpf_selftests::device::{Device, region};
use kvm_bpf_selftests::guest::{Args, Exit, Guest, RAM_SIZE, Routine, USER_ANSWER, Vcpu, mask};
use kvm_bpf_selftests::harness::Random;
use kvm_bpf_selftests::programs::{CTX_BUF, CTX_LEN, CTX_OFFSET, CTX_REGION};

use super::{for_a_while, one_of, seed};

const BASE: u64 = 0xd000_0000;
const PAGE: u64 = 0x1000;
/// Where copies go to.
#[cfg(target_arch = "x86_64")]
const COPIES: u64 = 0xc000;
/// How much of the end of the guest's memory accesses meet.
const TAIL: u64 = 64;
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// Addresses, sizes, and whether there is a read and a write program.
const REGIONS: [(u64, u64, bool, bool); 8] = [
    // Behind the guest's memory.
    (RAM_SIZE, 0x26, true, true),
    // Side by side, and a page's end inside.
    (BASE, PAGE, true, true),
    (BASE + PAGE, PAGE + PAGE / 2, true, true),
    // Smaller than some accesses, without a gap.
    (BASE + 3 * PAGE - 6, 6, true, true),
    (BASE + 3 * PAGE, 1, true, true),
    (BASE + 3 * PAGE + 1, 7, true, true),
    (BASE + 4 * PAGE - 0x10, 0x20, true, false),
    (BASE + 5 * PAGE, 0x18, false, true),
];

/// What a program has written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    writes: bool,
    region: u64,
    offset: u64,
    len: u64,
    /// What a store brings, or what a load gets.
    data: u64,
}

/// Where the next run is written down, and runs, the last first.
struct Log(Map);

/// As many as no instruction here causes.
const RUNS: u32 = 64;

impl Log {
    fn new() -> Self {
        Log(Map::new(RUNS + 1, 5))
    }

    /// A program that writes down each run, gives loads what [`answer`] says, and declines where
    /// [`declines`] says.
    fn program(&self, kind: ProgType) -> Prog {
        let writes = kind == ProgType::WRITE;
        let mut insns = vec![
            mov(R6, R1),
            load(8, R7, R6, CTX_OFFSET),
            load(4, R8, R6, CTX_REGION),
        ];
        insns.extend(lookup(&self.0, Index::Imm(RUNS as i32)));
        insns.extend([
            mov_imm(R1, 1),
            atomic(Atomic::FetchAdd, 8, R0, 0, R1),
            mov_imm(R9, RUNS as i32 - 1),
            and(R9, R1),
        ]);
        insns.extend(lookup(&self.0, Index::Reg(R9)));
        insns.extend([
            store_imm(8, R0, 0, writes.into()),
            store(8, R0, 8, R8),
            store(8, R0, 16, R7),
            load(1, R1, R6, CTX_LEN),
            store(8, R0, 24, R1),
        ]);
        if writes {
            insns.push(load(8, R1, R6, CTX_BUF));
        } else {
            insns.extend(mov_imm64(R1, FACTOR));
            // R1 *= R7.
            insns.push(Insn::raw(0x2f, 1, 7, 0, 0));
            insns.extend([add(R1, R8), store(8, R6, CTX_BUF, R1)]);
        }
        insns.extend([
            store(8, R0, 32, R1),
            mov_imm(R1, 0x38),
            and(R1, R7),
            jump_if_ne(R1, 0x18, 2),
            mov_imm(R0, 1),
            exit(),
            mov_imm(R0, 0),
            exit(),
        ]);
        Prog::load(kind, &insns)
    }

    /// Takes what there is.
    fn take(&self) -> Vec<Run> {
        let count = self.0.get(RUNS)[0] as u32;
        assert!(count <= RUNS, "{count} runs of one instruction");
        self.0.set(RUNS, &[0; 5]);
        let run = |index| {
            let words = self.0.get(index);
            Run {
                writes: words[0] == 1,
                region: words[1],
                offset: words[2],
                len: words[3],
                data: words[4],
            }
        };
        (0..count).map(run).collect()
    }
}

/// What a program gives a load.
fn answer(region: u64, offset: u64) -> u64 {
    FACTOR.wrapping_mul(offset).wrapping_add(region)
}

/// Whether programs leave an offset to user space.
fn declines(offset: u64) -> bool {
    offset & 0x38 == 0x18
}

/// What the model expects of one instruction.
#[derive(Debug, Default, PartialEq, Eq)]
struct Trace {
    runs: Vec<Run>,
    exits: Vec<Exit>,
}

struct Model {
    /// The end of the guest's memory.
    tail: [u8; TAIL as usize],
    trace: Trace,
}

impl Model {
    /// One access of up to 8 bytes by KVM's bus; whether it was handled.
    fn bus(&mut self, addr: u64, data: &mut [u8], writes: bool) -> bool {
        let len = data.len() as u64;
        let inside = |&(_, &(start, size, ..)): &(usize, &(u64, u64, bool, bool))| {
            addr >= start && addr + len <= start + size
        };
        let Some((index, &(start, _, reads, takes))) = REGIONS.iter().enumerate().find(inside)
        else {
            return false;
        };
        if (writes && !takes) || (!writes && !reads) {
            return false;
        }
        let (region, offset) = (index as u64, addr - start);
        let mut value = [0; 8];
        if writes {
            value[..data.len()].copy_from_slice(data);
        } else {
            value = answer(region, offset).to_le_bytes();
        }
        self.trace.runs.push(Run {
            writes,
            region,
            offset,
            len,
            data: u64::from_le_bytes(value),
        });
        if declines(offset) {
            return false;
        }
        if !writes {
            data.copy_from_slice(&value[..data.len()]);
        }
        true
    }

    /// One access of an instruction: cut at a page's end, then in pieces of 8 bytes. What the kernel
    /// does not handle exits at last; of a piece that it does not, the rest of its page as well.
    fn access(&mut self, addr: u64, data: &mut [u8], writes: bool) {
        let first = (PAGE - addr % PAGE).min(data.len() as u64) as usize;
        let mut left = Vec::new();
        for (from, to) in [(0, first), (first, data.len())] {
            let piece_addr = addr + from as u64;
            let piece = &mut data[from..to];
            if piece.is_empty() {
                continue;
            }
            if piece_addr < RAM_SIZE {
                let at = (piece_addr + TAIL - RAM_SIZE) as usize;
                let memory = &mut self.tail[at..at + piece.len()];
                if writes {
                    memory.copy_from_slice(piece);
                } else {
                    piece.copy_from_slice(memory);
                }
                continue;
            }
            let mut done = 0;
            while done < piece.len() {
                let len = (piece.len() - done).min(8);
                let part = &mut piece[done..done + len];
                if !self.bus(piece_addr + done as u64, part, writes) {
                    break;
                }
                done += len;
            }
            left.push((from + done, to));
        }
        for (from, to) in left {
            for start in (from..to).step_by(8) {
                let part = &mut data[start..to.min(start + 8)];
                let (addr, len) = (addr + start as u64, part.len());
                if writes {
                    let mut value = [0; 8];
                    value[..len].copy_from_slice(part);
                    let value = u64::from_le_bytes(value);
                    self.trace.exits.push(Exit::Write(addr, len, value));
                } else {
                    part.copy_from_slice(&USER_ANSWER.to_le_bytes()[..len]);
                    self.trace.exits.push(Exit::Read(addr, len));
                }
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn read<const N: usize>(&mut self, addr: u64) -> [u8; N] {
        let mut data = [0; N];
        self.access(addr, &mut data, false);
        data
    }

    fn write(&mut self, addr: u64, data: &[u8]) {
        self.access(addr, &mut data.to_vec(), true);
    }
}

/// A guest, its regions, and the model of both.
struct Bench {
    guest: Guest,
    vcpu: Vcpu,
    log: Log,
    model: Model,
    _device: Device,
}

impl Bench {
    fn new() -> Self {
        let guest = Guest::new();
        let vcpu = guest.vcpu(0);
        let device = Device::new(guest.vm());
        let log = Log::new();
        let (read, write) = (log.program(ProgType::READ), log.program(ProgType::WRITE));
        for (index, &(addr, size, reads, takes)) in (0..).zip(&REGIONS) {
            let region = region(addr, size, reads.then_some(&read), takes.then_some(&write));
            device.set_region(index, &region);
        }
        Bench {
            guest,
            vcpu,
            log,
            model: Model {
                tail: [0; TAIL as usize],
                trace: Trace::default(),
            },
            _device: device,
        }
    }

    /// An address at an end of a region.
    fn address(random: &mut Random, width: u64) -> u64 {
        let (start, size, ..) = one_of(random, &REGIONS);
        let edge = start + one_of(random, &[0, 0, 0x10, 0x18, 0x20, size, size]);
        let addr = (edge + random.below(24)).saturating_sub(12);
        if cfg!(target_arch = "x86_64") {
            addr
        } else {
            addr / width * width
        }
    }

    /// Runs one instruction. What the model has of it so far is compared.
    fn step(&mut self, random: &mut Random, number: u64) {
        let value = random.next() << 24 ^ random.next();
        let (what, addr, got, wanted) =
            match random.below(if cfg!(target_arch = "x86_64") { 12 } else { 3 }) {
                0 => {
                    let width = 1 << random.below(4);
                    let addr = Self::address(random, width);
                    let width = width as usize;
                    let read = self.vcpu.read(addr, width);
                    let mut data = [0; 8];
                    self.model.access(addr, &mut data[..width], false);
                    (
                        format!("{width}-byte read"),
                        addr,
                        (read.exits, read.value),
                        u64::from_le_bytes(data),
                    )
                }
                1 => {
                    let width = 1 << random.below(4);
                    let addr = Self::address(random, width);
                    let width = width as usize;
                    let exits = self.vcpu.write(addr, width, value);
                    self.model.write(addr, &value.to_le_bytes()[..width]);
                    (
                        format!("{width}-byte write of {:#x}", value & mask(width)),
                        addr,
                        (exits, 0),
                        0,
                    )
                }
                #[cfg(target_arch = "x86_64")]
                other => self.odd_instruction(other, value, random),
                #[cfg(target_arch = "aarch64")]
                _ => {
                    let routines = [
                        Routine::ReadPair,
                        Routine::WritePair,
                        Routine::ReadExclusive,
                        Routine::WriteBack,
                    ];
                    let routine = one_of(random, &routines);
                    // In memory they just do what they do.
                    let addr = Self::address(random, 16).max(BASE);
                    let args = Args {
                        value,
                        addr,
                        ..Default::default()
                    };
                    let errno = self.vcpu.errno_of(routine, args);
                    let got = (Vec::new(), errno.0 as u64);
                    (format!("{routine:?}"), addr, got, libc::ENOSYS as u64)
                }
            };
        let context = format!("KVM_BPF_SEED={} step {number}: {what} at {addr:#x}", seed());
        let trace = std::mem::take(&mut self.model.trace);
        let seen = Trace {
            runs: self.log.take(),
            exits: got.0,
        };
        assert_got!(seen, trace, "{context}");
        assert_got!(got.1, wanted, "{context}: what the guest got");
        let tail = self.guest.read_ram::<{ TAIL as usize }>(RAM_SIZE - TAIL);
        assert_got!(tail, self.model.tail, "{context}: the end of memory");
    }

    /// Returns what it is, where, exits and a result, and the result that it should have.
    #[cfg(target_arch = "x86_64")]
    fn odd_instruction(
        &mut self,
        which: u64,
        value: u64,
        random: &mut Random,
    ) -> (String, u64, (Vec<Exit>, u64), u64) {
        let addr = Self::address(random, 1);
        let other = random.next() << 20;
        let count = 1 + random.below(3);
        let mut args = Args {
            value,
            addr,
            count,
            pair: [other, 0],
        };
        let word = |bytes: [u8; 4]| u32::from_le_bytes(bytes);
        let routine = match which {
            2..=3 => Routine::Exchange,
            4 => Routine::LockedAdd,
            5 => Routine::Add,
            6 => Routine::CopyBytes,
            7 => Routine::CopyWords,
            8 => Routine::Fill,
            9 => Routine::ReadVector,
            10 => Routine::WriteVector,
            _ => Routine::ReadSigned,
        };
        if matches!(routine, Routine::CopyBytes | Routine::CopyWords) {
            args.pair[0] = COPIES;
            self.guest.write_ram(COPIES, &[0; 16]);
        }
        let (results, exits) = self.vcpu.call(routine, args);
        let model = &mut self.model;
        let (got, wanted) = match routine {
            Routine::Exchange => {
                let old = word(model.read(addr));
                model.write(addr, &value.to_le_bytes()[..4]);
                (results.value, old.into())
            }
            Routine::LockedAdd => {
                let old = u64::from_le_bytes(model.read(addr));
                model.write(addr, &old.wrapping_add(value).to_le_bytes());
                (results.value, old)
            }
            Routine::Add => {
                let sum = word(model.read(addr)).wrapping_add(value as u32);
                model.write(addr, &sum.to_le_bytes());
                (0, 0)
            }
            Routine::CopyBytes => {
                let bytes: Vec<u8> = (0..count)
                    .flat_map(|at| model.read::<1>(addr + at))
                    .collect();
                let mut wanted = [0; 8];
                wanted[..bytes.len()].copy_from_slice(&bytes);
                let got = self.guest.read_ram::<8>(COPIES);
                (u64::from_le_bytes(got), u64::from_le_bytes(wanted))
            }
            Routine::CopyWords => {
                let bytes: Vec<u8> = (0..count)
                    .flat_map(|at| model.read::<4>(addr + 4 * at))
                    .collect();
                let got = self.guest.read_ram::<16>(COPIES);
                let same = got[..bytes.len()] == bytes;
                assert!(
                    same,
                    "copies from {addr:#x}: wanted {bytes:x?}, got {got:x?}"
                );
                (0, 0)
            }
            Routine::Fill => {
                for at in 0..count {
                    model.write(addr + 4 * at, &value.to_le_bytes()[..4]);
                }
                (results.count, 0)
            }
            Routine::ReadVector => {
                let bytes = model.read::<16>(addr);
                let half = |at: usize| {
                    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
                };
                assert_got!(results.count, half(8), "upper half read at {addr:#x}");
                (results.value, half(0))
            }
            Routine::WriteVector => {
                let mut bytes = [0; 16];
                bytes[..8].copy_from_slice(&value.to_le_bytes());
                bytes[8..].copy_from_slice(&other.to_le_bytes());
                model.write(addr, &bytes);
                (0, 0)
            }
            _ => {
                let value = word(model.read(addr)) as i32;
                (results.value, i64::from(value) as u64)
            }
        };
        let what = format!("{routine:?} of {args:x?}");
        (what, addr, (exits, got), wanted)
    }
}

pub(super) fn accesses() {
    let mut bench = Bench::new();
    let mut random = Random::new(seed());
    for_a_while("accesses", |number| bench.step(&mut random, number));
}
