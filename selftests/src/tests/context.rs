// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Every access to `struct bpf_kvm_io_ctx` that an instruction can express,
//! against a model of which ones are allowed and what they do.

use Reg::{R0, R1, R2, R6, R7, R8, R9, R10};
use kvm_bpf_selftests::bpf::{
    Atomic, Index, Insn, LoadOptions, Map, Prog, ProgType, Reg, add, atomic, load, load_signed,
    lookup, mov, mov_imm, mov_imm64, store, store_imm,
};
use kvm_bpf_selftests::device::{Device, region, work};
use kvm_bpf_selftests::guest::{Guest, Vcpu};
use kvm_bpf_selftests::programs::{
    CTX_BUF, CTX_LEN, CTX_OFFSET, CTX_REGION, CTX_SIZE, CTX_VCPU_ID, ret,
};

use super::PATTERN;

tests!(
    every_access_as_the_model_says,
    store_then_other_accesses,
    several_stores,
    any_register_holds_the_context,
    destination_is_the_context_register,
);

/// A region so large that offsets have four bytes, all different.
const ADDR: u64 = 0x4000_0000;
const SIZE: u64 = 0x7fff_fff8;
const OFFSET: u64 = 0x71a2_c3d8;
/// Two bytes, the low one with its sign bit set.
const VCPU_ID: u32 = 0x1c3;
/// The region's index, likewise with its sign bit set.
const REGION: u32 = 0xa5;
/// The work's index.
const WORK: u32 = 0xb;
/// Sign-extended when it is stored as 8 bytes.
const IMM: i32 = 0x8192_a3b4_u32 as i32;

const WIDTHS: [usize; 4] = [1, 2, 4, 8];
const KINDS: [ProgType; 2] = [ProgType::READ, ProgType::WRITE];

#[derive(Clone, Copy, Debug)]
enum Op {
    Load,
    LoadSigned,
    Store,
    StoreImm,
    Atomic(Atomic),
}

const OPS: [Op; 16] = [
    Op::Load,
    Op::LoadSigned,
    Op::Store,
    Op::StoreImm,
    Op::Atomic(Atomic::Add),
    Op::Atomic(Atomic::FetchAdd),
    Op::Atomic(Atomic::Or),
    Op::Atomic(Atomic::FetchOr),
    Op::Atomic(Atomic::And),
    Op::Atomic(Atomic::FetchAnd),
    Op::Atomic(Atomic::Xor),
    Op::Atomic(Atomic::FetchXor),
    Op::Atomic(Atomic::Exchange),
    Op::Atomic(Atomic::CompareExchange),
    Op::Atomic(Atomic::LoadAcquire),
    Op::Atomic(Atomic::StoreRelease),
];

/// Whether the kernel is to accept an access.
fn model_accepts(kind: ProgType, op: Op, offset: i16, width: usize) -> bool {
    let read = kind == ProgType::READ;
    let access = kind != ProgType::WORK;
    // First byte, first byte after, may be loaded, may be stored to.
    let fields = [
        (CTX_BUF, 8, !read, read),
        (CTX_OFFSET, CTX_OFFSET + 8, access, false),
        (CTX_LEN, CTX_LEN + 1, access, false),
        (CTX_VCPU_ID, CTX_VCPU_ID + 4, access, false),
        (CTX_REGION, CTX_REGION + 4, true, false),
    ];
    let end = offset + width as i16;
    let Some((_, _, loads, stores)) = fields
        .into_iter()
        .find(|(first, after, ..)| *first <= offset && end <= *after)
    else {
        return false;
    };
    let aligned = offset % width as i16 == 0;
    aligned
        && match op {
            Op::Load | Op::LoadSigned => loads,
            Op::Store | Op::StoreImm => stores,
            Op::Atomic(_) => false,
        }
}

/// The context of the access below, as bytes; reads have no data.
fn model_context(kind: ProgType) -> [u8; CTX_SIZE as usize] {
    let mut context = [0; CTX_SIZE as usize];
    if kind != ProgType::READ {
        context[..8].copy_from_slice(&PATTERN.to_le_bytes());
    }
    context[8..16].copy_from_slice(&OFFSET.to_le_bytes());
    context[16] = 8;
    context[20..24].copy_from_slice(&VCPU_ID.to_le_bytes());
    let index = if kind == ProgType::WORK { WORK } else { REGION };
    context[24..28].copy_from_slice(&index.to_le_bytes());
    context
}

/// The low bytes of a value, as 8 bytes with zeroes or copies of the sign above.
fn extend(value: u64, width: usize, signed: bool) -> u64 {
    let unused = 64 - 8 * width as u32;
    if signed {
        ((value << unused) as i64 >> unused) as u64
    } else {
        value << unused >> unused
    }
}

/// What a load gives.
fn model_load(kind: ProgType, op: Op, offset: i16, width: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes[..width].copy_from_slice(&model_context(kind)[offset as usize..][..width]);
    extend(
        u64::from_le_bytes(bytes),
        width,
        matches!(op, Op::LoadSigned),
    )
}

/// What the guest reads after a store: the bytes stored, zeroes around them.
fn model_store(op: Op, offset: i16, width: usize) -> u64 {
    let value = match op {
        Op::StoreImm => IMM as i64 as u64,
        _ => PATTERN,
    };
    extend(value, width, false) << (8 * offset)
}

/// The instruction itself, on memory that `base` points to; loads go to `r7`, stores come from
/// `r8`.
fn access(op: Op, base: Reg, offset: i16, width: usize) -> Insn {
    match op {
        Op::Load => load(width, R7, base, offset),
        Op::LoadSigned => load_signed(width, R7, base, offset),
        Op::Store => store(width, base, offset, R8),
        Op::StoreImm => store_imm(width, base, offset, IMM),
        Op::Atomic(op @ Atomic::LoadAcquire) => atomic(op, width, R7, offset, base),
        Op::Atomic(op) => atomic(op, width, base, offset, R8),
    }
}

/// A guest with one region and a map for what programs load.
struct Bench {
    vcpu: Vcpu,
    device: Device,
    map: Map,
}

impl Bench {
    fn new() -> Self {
        let guest = Guest::new();
        Bench {
            vcpu: guest.vcpu(VCPU_ID),
            device: Device::new(guest.vm()),
            map: Map::new(1, 4),
        }
    }

    /// Stores a register in a word of the map.
    fn keep(&self, word: i16, reg: Reg) -> Vec<Insn> {
        let mut insns = lookup(&self.map, Index::Imm(0));
        insns.push(store(8, R0, 8 * word, reg));
        insns
    }

    /// Runs a program once, by a guest's access of 8 bytes or by asking for it.  Returns what a
    /// read gave.
    #[track_caller]
    fn run(&mut self, kind: ProgType, prog: &Prog) -> u64 {
        self.map.set(0, &[0x5555_5555_5555_5555; 4]);
        if kind == ProgType::READ {
            let range = region(ADDR, SIZE, Some(prog), None);
            self.device.set_region(REGION.into(), &range);
            let read = self.vcpu.read(ADDR + OFFSET, 8);
            assert_got!(read.exits, []);
            read.value
        } else if kind == ProgType::WORK {
            self.device.set_work(WORK.into(), &work(Some(prog), None));
            assert_got!(self.device.run(WORK.into(), PATTERN), Ok(()));
            0
        } else {
            let range = region(ADDR, SIZE, None, Some(prog));
            self.device.set_region(REGION.into(), &range);
            assert_got!(self.vcpu.write(ADDR + OFFSET, 8, PATTERN), []);
            0
        }
    }
}

/// One access with all registers that it may need, on the context or else on the stack.
fn access_insns(bench: &Bench, op: Op, offset: i16, width: usize, on_stack: bool) -> Vec<Insn> {
    let base = if on_stack { R10 } else { R6 };
    let mut insns = vec![mov(R6, R1), mov_imm(R0, 0), store_imm(8, R10, -16, 0)];
    insns.extend(mov_imm64(R8, PATTERN));
    insns.extend(mov_imm64(R7, 0));
    insns.push(access(op, base, offset, width));
    insns.extend(bench.keep(0, R7));
    insns.extend(ret(0));
    insns
}

/// Whether there is such an instruction.
fn exists(op: Op, width: usize) -> bool {
    match op {
        Op::Atomic(Atomic::LoadAcquire | Atomic::StoreRelease) => true,
        Op::Atomic(_) => width >= 4,
        // Nothing is left to extend in 8 bytes.
        Op::LoadSigned => width < 8,
        _ => true,
    }
}

fn every_access_as_the_model_says() {
    let mut bench = Bench::new();
    let mut wrong = Vec::new();
    let mut accepted = 0;
    // On other memory all are accepted: what is refused below is so for the context.
    for op in OPS {
        for width in WIDTHS {
            let insns = access_insns(&bench, op, -16, width, true);
            let loaded = Prog::try_load(ProgType::READ, &insns, LoadOptions::default());
            if loaded.is_ok() != exists(op, width) {
                wrong.push(format!("{op:?} width {width} on the stack: {loaded:?}"));
            }
        }
    }
    for (kind, sleepable) in [
        (ProgType::READ, false),
        (ProgType::WRITE, false),
        (ProgType::WORK, false),
        (ProgType::READ, true),
        (ProgType::WRITE, true),
        (ProgType::WORK, true),
    ] {
        let options = LoadOptions {
            sleepable,
            without_log: true,
            ..Default::default()
        };
        // A load takes milliseconds under emulation: no more of these than tell.
        let (ops, around) = if sleepable {
            (&OPS[..5], 0)
        } else {
            (&OPS[..], 8)
        };
        for &op in ops {
            for offset in -around..=CTX_SIZE + around {
                for width in WIDTHS {
                    if !exists(op, width) {
                        continue;
                    }
                    let sort = if sleepable { "sleepable " } else { "" };
                    let what = format!("{sort}{kind:?} {op:?} offset {offset} width {width}");
                    let insns = access_insns(&bench, op, offset, width, false);
                    let loaded = Prog::try_load(kind, &insns, options);
                    let wanted = model_accepts(kind, op, offset, width);
                    match (loaded, wanted) {
                        (Ok(prog), true) => {
                            accepted += 1;
                            // The code is the same, so is what it does.
                            if sleepable {
                                continue;
                            }
                            let read = bench.run(kind, &prog);
                            let (got, wanted) = match op {
                                Op::Load | Op::LoadSigned => {
                                    (bench.map.get(0)[0], model_load(kind, op, offset, width))
                                }
                                _ => (read, model_store(op, offset, width)),
                            };
                            if got != wanted {
                                wrong.push(format!("{what}: wanted {wanted:#x}, got {got:#x}"));
                            }
                        }
                        (Ok(_), false) => wrong.push(format!("{what}: wanted a refusal")),
                        (Err(refused), true) => {
                            wrong.push(format!("{what}: wanted it to load, got {refused}"));
                        }
                        (Err(refused), false) => {
                            if ![libc::EACCES, libc::EINVAL].contains(&refused.errno.0) {
                                wrong.push(format!("{what}: wanted EACCES, got {refused}"));
                            }
                        }
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // Stores of either kind: 15 each.  Loads of offset, len, vcpu_id, region: 30, of which 29
    // may extend the sign; of buf 15 and 14.  Without an access, of region alone: 7 of each.  All
    // by programs of either sort.
    assert_got!(
        accepted,
        2 * ((15 + 15 + 30 + 29) + (15 + 14 + 30 + 29) + (15 + 14 + 7 + 7)),
        "accesses accepted"
    );
}

/// A store must not change the register that holds the context.
fn store_then_other_accesses() {
    let mut bench = Bench::new();
    for width in [1, 2, 4, 8] {
        for store_insn in [
            store(width, R6, CTX_BUF, R8),
            store_imm(width, R6, CTX_BUF, IMM),
        ] {
            let mut insns = vec![mov(R6, R1)];
            insns.extend(mov_imm64(R8, PATTERN));
            insns.extend([
                store_insn,
                load(8, R7, R6, CTX_OFFSET),
                store_insn,
                load(4, R8, R6, CTX_VCPU_ID),
                load(1, R9, R6, CTX_LEN),
            ]);
            for (word, reg) in [(0, R7), (1, R8), (2, R9)] {
                insns.extend(bench.keep(word, reg));
            }
            insns.extend(ret(0));
            let prog = Prog::load(ProgType::READ, &insns);
            bench.run(ProgType::READ, &prog);
            let words = bench.map.get(0);
            assert_got!(
                words[..3],
                [OFFSET, VCPU_ID.into(), 8],
                "loads after {store_insn:?}"
            );
        }
    }
}

/// Each store reaches its own bytes and no others.
fn several_stores() {
    let mut bench = Bench::new();
    for width in [1, 2, 4] {
        let mut insns = Vec::new();
        let mut wanted = [0; 8];
        for (number, offset) in (0..8).step_by(width).enumerate() {
            let imm = 0x1110_9080 + number as i32;
            insns.push(store_imm(width, R1, CTX_BUF + offset as i16, imm));
            wanted[offset..][..width].copy_from_slice(&imm.to_le_bytes()[..width]);
        }
        insns.extend(ret(0));
        let prog = Prog::load(ProgType::READ, &insns);
        let got = bench.run(ProgType::READ, &prog);
        assert_got!(got.to_le_bytes(), wanted, "{width}-byte stores");
    }
}

/// The rewrite must not assume `r1`, nor overwrite a register that the program uses.
fn any_register_holds_the_context() {
    const REGS: [Reg; 9] = [R0, R1, R2, Reg::R3, Reg::R4, Reg::R5, R6, R7, R8];

    let mut bench = Bench::new();
    for context in REGS {
        let mut insns = vec![mov(R9, R1), mov(context, R1)];
        // Every other register holds a value of its own across the accesses.
        let others: Vec<_> = REGS.into_iter().filter(|&reg| reg != context).collect();
        for &other in &others {
            insns.extend(mov_imm64(other, other as u64));
        }
        let value = others[0];
        insns.extend(mov_imm64(value, PATTERN));
        insns.extend([
            store(8, context, CTX_BUF, value),
            load(4, value, context, CTX_VCPU_ID),
            // The sum of all that must not have changed.
            load(8, context, context, CTX_OFFSET),
        ]);
        for &other in &others[1..] {
            insns.push(add(context, other));
        }
        insns.extend([mov(R9, value), mov(R8, context), mov(R7, R9)]);
        insns.extend(bench.keep(0, R7));
        insns.extend(bench.keep(1, R8));
        insns.extend(ret(0));

        let prog = Prog::load(ProgType::READ, &insns);
        assert_got!(bench.run(ProgType::READ, &prog), PATTERN, "{context:?}");
        let sum: u64 = others[1..].iter().map(|&reg| reg as u64).sum();
        let words = bench.map.get(0);
        assert_got!(words[..2], [VCPU_ID.into(), OFFSET + sum], "{context:?}");
    }
}

/// `r1 = *(r1 + offset)`: the chain of loads has no other register to use.
fn destination_is_the_context_register() {
    let mut bench = Bench::new();
    for (width, offset, wanted) in [
        (8, CTX_OFFSET, OFFSET),
        (1, CTX_LEN, 8),
        (4, CTX_VCPU_ID, VCPU_ID.into()),
        (4, CTX_REGION, REGION.into()),
    ] {
        for kind in KINDS {
            let mut insns = vec![load(width, R1, R1, offset), mov(R7, R1)];
            insns.extend(bench.keep(0, R7));
            insns.extend(ret(0));
            let prog = Prog::load(kind, &insns);
            bench.run(kind, &prog);
            assert_got!(bench.map.get(0)[0], wanted, "{kind:?} offset {offset}");
        }
    }
}
