// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Random programs of the three types: the verifier takes them or not, and those that it takes run.
//!
//! Half of the programs only calculate, with their context and their stack. What such a program does
//! is told by an interpreter here, so that neither the rewrite of context accesses nor the compiler
//! of the kernel is trusted. The others use maps, helpers and kfuncs as well; of them nothing more
//! is wanted than that an access is handled or exits, and that the kernel has nothing to say.

use std::collections::BTreeMap;

use Reg::{R0, R1, R2, R3, R4, R6, R10};
use kvm_bpf::uapi::{KVM_BPF_MEM_READ, KVM_BPF_MEM_WRITE, kvm_bpf_user_mem};
use kvm_bpf_selftests::bpf::{
    Census, Index, Insn, LoadOptions, Map, Prog, ProgType, Reg, add_imm, call_helper, call_kfunc,
    exit, lookup, mov, mov_imm, store, store_imm,
};
use kvm_bpf_selftests::device::{Device, region, work};
use kvm_bpf_selftests::guest::{Exit, Guest, USER_ANSWER, Vcpu, mask};
use kvm_bpf_selftests::harness::{Errno, Random};
use kvm_bpf_selftests::programs::{
    CTX_BUF, CTX_LEN, CTX_OFFSET, CTX_REGION, CTX_SIZE, CTX_VCPU_ID,
};
use libbpf_rs::libbpf_sys as sys;
use vmm_sys_util::eventfd::EventFd;

use super::super::eventfd;
use super::super::kfunc::required;
use super::{loads, one_of, seed};

/// A region so large that all bytes of offsets count.
const ADDR: u64 = 0x4000_0000;
const SIZE: u64 = 0x7fff_0000;
const REGION: u64 = 0xa5;
const WORK: u64 = 0xb;
const VCPU: u32 = 0xc3;

/// `ENOTSUPP`, which user space has no name for.
const ENOTSUPP: i32 = 524;

/// The pointers that the interpreter gives to the context and to the end of the stack.
const CONTEXT: u64 = 0x1000_0000_0000;
const STACK: u64 = 0x2000_0000_0000;
const STACK_SIZE: u64 = 512;

// Classes and operations of the instruction set.
const LDX: u8 = 0x61;
const LDX_SIGNED: u8 = 0x81;
const ST: u8 = 0x62;
const STX: u8 = 0x63;
const ALU32: u8 = 0x04;
const JMP: u8 = 0x05;
const JMP32: u8 = 0x06;
const ALU64: u8 = 0x07;
const REGISTER: u8 = 0x08;

/// Operations that need no second thought: no division, nothing that swaps bytes.
const OPERATIONS: [u8; 11] = [
    0x00, 0x10, 0x20, 0x40, 0x50, 0x60, 0x70, 0x80, 0xa0, 0xb0, 0xc0,
];
const NEGATE: u8 = 0x80;
const CONDITIONS: [u8; 11] = [
    0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70, 0xa0, 0xb0, 0xc0, 0xd0,
];

/// The size bits of a width.
fn size_bits(width: usize) -> u8 {
    match width {
        1 => 0x10,
        2 => 0x08,
        4 => 0x00,
        _ => 0x18,
    }
}

fn width_of(code: u8) -> usize {
    match code & 0x18 {
        0x10 => 1,
        0x08 => 2,
        0x00 => 4,
        _ => 8,
    }
}

/// A run as the interpreter sees it.
struct Machine {
    registers: [u64; 11],
    context: [u8; CTX_SIZE as usize],
    stack: [u8; STACK_SIZE as usize],
}

impl Machine {
    fn new(context: [u8; CTX_SIZE as usize]) -> Self {
        let mut registers = [0; 11];
        registers[1] = CONTEXT;
        registers[10] = STACK;
        Machine {
            registers,
            context,
            stack: [0; STACK_SIZE as usize],
        }
    }

    fn memory(&mut self, addr: u64, width: usize) -> Option<&mut [u8]> {
        let (bytes, at) = if (STACK - STACK_SIZE..STACK).contains(&addr) {
            (&mut self.stack[..], addr - (STACK - STACK_SIZE))
        } else {
            (&mut self.context[..], addr.checked_sub(CONTEXT)?)
        };
        let at = at as usize;
        bytes.get_mut(at..at.checked_add(width)?)
    }

    fn load(&mut self, addr: u64, width: usize) -> Option<u64> {
        let mut bytes = [0; 8];
        bytes[..width].copy_from_slice(self.memory(addr, width)?);
        Some(u64::from_le_bytes(bytes))
    }

    /// Runs all of it; [`None`] where there is an instruction that is not known here.
    fn run(&mut self, insns: &[Insn]) -> Option<()> {
        let mut at = 0_usize;
        for _ in 0..100_000 {
            if at == insns.len() {
                return Some(());
            }
            let (code, dst, src, off, imm) = insns.get(at)?.parts();
            at += 1;
            let (dst, src) = (usize::from(dst), usize::from(src));
            if dst > 10 || src > 10 {
                return None;
            }
            let address = |base: u64| base.wrapping_add(i64::from(off) as u64);
            let imm = i64::from(imm) as u64;
            let operand = match code & REGISTER {
                0 => imm,
                _ => self.registers[src],
            };
            match code & 7 {
                1 if code & 0xe7 == LDX => {
                    let width = width_of(code);
                    self.registers[dst] = self.load(address(self.registers[src]), width)?;
                }
                1 if code & 0xe7 == LDX_SIGNED && width_of(code) < 8 => {
                    let width = width_of(code);
                    let value = self.load(address(self.registers[src]), width)?;
                    let unused = 64 - 8 * width;
                    self.registers[dst] = ((value << unused) as i64 >> unused) as u64;
                }
                2 | 3 if [ST, STX].contains(&(code & 0xe7)) => {
                    let width = width_of(code);
                    let value = if code & 7 == 2 {
                        imm
                    } else {
                        self.registers[src]
                    };
                    let addr = address(self.registers[dst]);
                    let bytes = value.to_le_bytes();
                    self.memory(addr, width)?.copy_from_slice(&bytes[..width]);
                }
                ALU32 | ALU64 => {
                    let value = self.registers[dst];
                    let is_wide = code & 7 == ALU64;
                    self.registers[dst] = calculate(code & 0xf0, is_wide, value, operand, off)?;
                }
                JMP | JMP32 => {
                    let value = self.registers[dst];
                    if holds(code & 0xf0, code & 7 == JMP, value, operand)? {
                        at = at.checked_add_signed(off.into())?;
                    }
                }
                0 if code == 0x18 && src == 0 => {
                    let (0, _, _, _, high) = insns.get(at)?.parts() else {
                        return None;
                    };
                    at += 1;
                    self.registers[dst] = u64::from(imm as u32) | (high as u64) << 32;
                }
                _ => return None,
            }
        }
        None
    }
}

fn calculate(operation: u8, is_wide: bool, value: u64, operand: u64, off: i16) -> Option<u64> {
    // Extensions of the sign, and signed divisions.
    if off != 0 {
        return None;
    }
    if !is_wide {
        let (value, operand) = (value as u32, operand as u32);
        let result = match operation {
            0x00 => value.wrapping_add(operand),
            0x10 => value.wrapping_sub(operand),
            0x20 => value.wrapping_mul(operand),
            0x40 => value | operand,
            0x50 => value & operand,
            0x60 => value.wrapping_shl(operand),
            0x70 => value.wrapping_shr(operand),
            0x80 => value.wrapping_neg(),
            0xa0 => value ^ operand,
            0xb0 => operand,
            0xc0 => (value as i32).wrapping_shr(operand) as u32,
            _ => return None,
        };
        return Some(result.into());
    }
    Some(match operation {
        0x00 => value.wrapping_add(operand),
        0x10 => value.wrapping_sub(operand),
        0x20 => value.wrapping_mul(operand),
        0x40 => value | operand,
        0x50 => value & operand,
        0x60 => value.wrapping_shl(operand as u32),
        0x70 => value.wrapping_shr(operand as u32),
        0x80 => value.wrapping_neg(),
        0xa0 => value ^ operand,
        0xb0 => operand,
        0xc0 => (value as i64).wrapping_shr(operand as u32) as u64,
        _ => return None,
    })
}

fn holds(condition: u8, is_wide: bool, value: u64, operand: u64) -> Option<bool> {
    let (value, operand, signed, other) = if is_wide {
        (value, operand, value as i64, operand as i64)
    } else {
        let (value, operand) = (value as u32, operand as u32);
        let signed = (value as i32, operand as i32);
        (
            value.into(),
            operand.into(),
            signed.0.into(),
            signed.1.into(),
        )
    };
    Some(match condition {
        0x00 if is_wide => true,
        0x10 => value == operand,
        0x20 => value > operand,
        0x30 => value >= operand,
        0x40 => value & operand != 0,
        0x50 => value != operand,
        0x60 => signed > other,
        0x70 => signed >= other,
        0xa0 => value < operand,
        0xb0 => value <= operand,
        0xc0 => signed < other,
        0xd0 => signed <= other,
        _ => return None,
    })
}

/// What a register has, as far as the generator cares.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Has {
    Nothing,
    Number,
    Context,
    /// A value of the map, 32 bytes.
    Value,
}

/// Writes a program.
struct Generator<'a> {
    random: &'a mut Random,
    kind: ProgType,
    map: &'a Map,
    insns: Vec<Insn>,
    has: [Has; 10],
    /// Which words of the stack, from its end, have something.
    stack: [bool; 8],
}

impl Generator<'_> {
    fn number(&mut self) -> u8 {
        let numbers: Vec<u8> = (0..10)
            .filter(|&reg| self.has[usize::from(reg)] == Has::Number)
            .collect();
        match numbers.is_empty() || self.random.below(40) == 0 {
            true => self.random.below(10) as u8,
            false => one_of(self.random, &numbers),
        }
    }

    /// A register to write to; the context stays in `r6`, most often.
    fn target(&mut self) -> u8 {
        let reg = one_of(self.random, &[0, 1, 2, 3, 4, 5, 7, 8, 9]);
        match self.random.below(100) {
            0 => 6,
            _ => reg,
        }
    }

    fn set(&mut self, reg: u8, has: Has) {
        if let Some(slot) = self.has.get_mut(usize::from(reg)) {
            *slot = has;
        }
    }

    fn immediate(&mut self) -> i32 {
        match self.random.below(4) {
            0 => self.random.next() as i32,
            1 => one_of(self.random, &[-1, i32::MIN, i32::MAX, 0x80, 0xffff]),
            _ => self.random.below(64) as i32,
        }
    }

    fn width(&mut self) -> usize {
        1 << self.random.below(4)
    }

    /// A part of the context that may be loaded, or one of any sort.
    fn place(&mut self, stores: bool) -> (i16, usize) {
        if self.random.below(24) == 0 {
            return (self.random.below(40) as i16 - 4, self.width());
        }
        let fields: &[(i16, usize)] = if stores {
            &[(CTX_BUF, 8)]
        } else if self.kind == ProgType::READ {
            &[
                (CTX_OFFSET, 8),
                (CTX_LEN, 1),
                (CTX_VCPU_ID, 4),
                (CTX_REGION, 4),
            ]
        } else if self.kind == ProgType::WRITE {
            &[
                (CTX_BUF, 8),
                (CTX_OFFSET, 8),
                (CTX_LEN, 1),
                (CTX_VCPU_ID, 4),
                (CTX_REGION, 4),
            ]
        } else {
            &[(CTX_BUF, 8), (CTX_REGION, 4)]
        };
        let (start, size) = one_of(self.random, fields);
        let width = self.width().min(size);
        let parts = (size / width) as u64;
        (
            start + (width as u64 * self.random.below(parts)) as i16,
            width,
        )
    }

    fn load_context(&mut self) {
        let (offset, width) = self.place(false);
        let code = match self.random.below(4) {
            0 if width < 8 => LDX_SIGNED,
            _ => LDX,
        } | size_bits(width);
        let dst = self.target();
        self.insns.push(Insn::raw(code, dst, 6, offset, 0));
        self.set(dst, Has::Number);
    }

    fn store_context(&mut self) {
        let (offset, width) = self.place(true);
        let insn = match self.random.below(2) {
            0 => {
                let imm = self.immediate();
                Insn::raw(ST | size_bits(width), 6, 0, offset, imm)
            }
            _ => {
                let src = self.number();
                Insn::raw(STX | size_bits(width), 6, src, offset, 0)
            }
        };
        self.insns.push(insn);
    }

    fn calculation(&mut self) {
        let class = one_of(self.random, &[ALU64, ALU64, ALU32]);
        let operation = one_of(self.random, &OPERATIONS);
        let bits = if class == ALU64 { 64 } else { 32 };
        let is_shift = [0x60, 0x70, 0xc0].contains(&operation);
        let by_register = operation != NEGATE && self.random.below(2) == 0;
        let dst = match operation {
            0xb0 => self.target(),
            _ => self.number(),
        };
        let insn = if by_register {
            let src = self.number();
            Insn::raw(class | operation | REGISTER, dst, src, 0, 0)
        } else {
            let imm = match operation {
                NEGATE => 0,
                _ if is_shift => self.random.below(bits) as i32,
                _ => self.immediate(),
            };
            Insn::raw(class | operation, dst, 0, 0, imm)
        };
        self.insns.push(insn);
        if operation == 0xb0 {
            self.set(dst, Has::Number);
        }
    }

    fn spill(&mut self) {
        let (word, width) = (self.random.below(8) as i16, self.width());
        let src = self.number();
        let code = STX | size_bits(width);
        self.insns.push(Insn::raw(code, 10, src, -8 - 8 * word, 0));
        self.stack[word as usize] |= width == 8;
    }

    fn fill(&mut self) {
        let words: Vec<usize> = (0..8).filter(|&word| self.stack[word]).collect();
        let Some(&word) = words.first() else {
            return self.spill();
        };
        let width = self.width();
        let part = self.random.below(8 / width as u64) * width as u64;
        let dst = self.target();
        let offset = -8 - 8 * word as i16 + part as i16;
        self.insns
            .push(Insn::raw(LDX | size_bits(width), dst, 10, offset, 0));
        self.set(dst, Has::Number);
    }

    /// A condition over a few instructions: what they set may be missing behind.
    fn branch(&mut self, depth: u32, pure: bool) {
        let class = one_of(self.random, &[JMP, JMP, JMP32]);
        let condition = one_of(self.random, &CONDITIONS);
        let dst = self.number();
        let at = self.insns.len();
        let (bits, src, imm) = match self.random.below(2) {
            0 => (REGISTER, self.number(), 0),
            _ => (0, 0, self.immediate()),
        };
        self.insns.push(Insn::raw(0, 0, 0, 0, 0));
        let (has, stack) = (self.has, self.stack);
        let count = 1 + self.random.below(4);
        for _ in 0..count {
            self.piece(depth + 1, pure);
        }
        for (now, before) in self.has.iter_mut().zip(has) {
            if *now != before {
                *now = Has::Nothing;
            }
        }
        for (now, before) in self.stack.iter_mut().zip(stack) {
            *now &= before;
        }
        let off = (self.insns.len() - at - 1) as i16;
        self.insns[at] = Insn::raw(class | condition | bits, dst, src, off, imm);
    }

    /// After a call, `r1` to `r5` are gone.
    fn called(&mut self, result: Has) {
        self.has[1..6].fill(Has::Nothing);
        self.set(0, result);
    }

    fn look_up(&mut self) {
        let index = self.random.below(5) as i32;
        let mut insns = lookup(self.map, Index::Imm(index));
        if self.random.below(30) == 0 {
            // Without the look at whether it is there.
            insns.truncate(insns.len() - 3);
        }
        self.insns.extend(insns);
        self.stack[0] = false;
        self.called(Has::Value);
        // Kept where the next call does not overwrite it.
        let keep = one_of(self.random, &[R0, Reg::R7, Reg::R8, Reg::R9]);
        self.insns.push(mov(keep, R0));
        self.set(keep as u8, Has::Value);
    }

    fn value(&mut self) {
        let values: Vec<u8> = (0..10)
            .filter(|&reg| self.has[usize::from(reg)] == Has::Value)
            .collect();
        if values.is_empty() {
            return self.look_up();
        }
        let (base, width) = (one_of(self.random, &values), self.width());
        let last = match self.random.below(30) {
            0 => 40,
            _ => 32,
        };
        let offset = (self.random.below(last / width as u64) * width as u64) as i16;
        if self.random.below(2) == 0 {
            let dst = self.target();
            self.insns
                .push(Insn::raw(LDX | size_bits(width), dst, base, offset, 0));
            self.set(dst, Has::Number);
        } else {
            let src = self.number();
            self.insns
                .push(Insn::raw(STX | size_bits(width), base, src, offset, 0));
        }
    }

    fn helper(&mut self) {
        let id = one_of(
            self.random,
            &[
                sys::BPF_FUNC_ktime_get_ns,
                sys::BPF_FUNC_get_prandom_u32,
                sys::BPF_FUNC_get_smp_processor_id,
                sys::BPF_FUNC_jiffies64,
                // Needs what these programs have no right to.
                sys::BPF_FUNC_get_current_task,
            ],
        );
        self.insns.push(call_helper(id));
        self.called(Has::Number);
    }

    /// `r1` is the context that the kernel has.
    fn kernels_context(&mut self) {
        self.insns.extend([
            mov(R1, R6),
            call_kfunc(required("bpf_cast_to_kern_ctx")),
            mov(R1, R0),
        ]);
    }

    fn signal(&mut self) {
        self.kernels_context();
        let irq = one_of(self.random, &[0, 1, 255, 256, -1]);
        self.insns.push(mov_imm(R2, irq));
        self.insns.push(call_kfunc(required("bpf_kvm_irq_signal")));
        self.called(Has::Number);
    }

    fn memory(&mut self) {
        const KFUNCS: [&str; 4] = [
            "bpf_kvm_mem_read_nofault",
            "bpf_kvm_mem_write_nofault",
            "bpf_kvm_mem_read",
            "bpf_kvm_mem_write",
        ];
        let width = one_of(self.random, &[1, 2, 4, 8, 8, 16, 24]);
        for word in 0..3 {
            self.insns.push(store_imm(8, R10, -24 + 8 * word, 0x55));
        }
        self.stack[..3].fill(true);
        self.kernels_context();
        // The guest's memory, its end, and what is none.
        let gpa = one_of(self.random, &[0xc000, 0xc007, 0xfff8, 0xfffc, 0x2_0000, -8]);
        let kfunc = one_of(self.random, &KFUNCS);
        self.insns.extend([
            mov_imm(R2, gpa),
            mov(R3, R10),
            add_imm(R3, -24),
            mov_imm(R4, width),
            call_kfunc(required(kfunc)),
        ]);
        self.called(Has::Number);
    }

    fn other_kfunc(&mut self) {
        match self.random.below(3) {
            0 => {
                self.insns.extend([
                    store_imm(8, R10, -8, 0),
                    mov(R1, R10),
                    add_imm(R1, -8),
                    mov_imm(R2, 8),
                    call_kfunc(required("bpf_kvm_random")),
                ]);
                self.stack[0] = true;
            }
            1 => {
                let cpu = one_of(self.random, &[0, 1, -1, 10_000]);
                let kfunc = one_of(self.random, &["bpf_get_cpu_scale", "bpf_get_cpu_freq"]);
                self.insns
                    .extend([mov_imm(R1, cpu), call_kfunc(required(kfunc))]);
            }
            _ => {
                // An interrupt is taken and given back, most often.
                self.kernels_context();
                let irq = self.random.below(300) as i32;
                self.insns.extend([
                    mov_imm(R2, irq),
                    call_kfunc(required("bpf_kvm_irq_acquire")),
                ]);
                let release = [
                    Insn::raw(JMP | 0x10, 0, 0, 2, 0),
                    mov(R1, R0),
                    call_kfunc(required("bpf_kvm_irq_release")),
                ];
                if self.random.below(12) > 0 {
                    self.insns.extend(release);
                }
                self.called(Has::Nothing);
                return;
            }
        }
        self.called(Has::Number);
    }

    fn piece(&mut self, depth: u32, pure: bool) {
        let choices = if pure { 12 } else { 20 };
        match self.random.below(choices) {
            0..=2 => self.load_context(),
            3 if self.kind == ProgType::READ => self.store_context(),
            4 => self.spill(),
            5 => self.fill(),
            6 if depth < 3 => self.branch(depth, pure),
            3 | 6..=11 => self.calculation(),
            12..=13 => self.look_up(),
            14..=15 => self.value(),
            16 => self.helper(),
            17 => self.signal(),
            18 => self.memory(),
            _ => self.other_kfunc(),
        }
    }

    /// Changes something in one instruction.
    fn damage(&mut self) {
        let at = self.random.below(self.insns.len() as u64) as usize;
        let (mut code, mut dst, mut src, mut off, mut imm) = self.insns[at].parts();
        match self.random.below(6) {
            0 => code ^= 1 << self.random.below(8),
            1 => dst = self.random.below(12) as u8,
            2 => src = self.random.below(12) as u8,
            3 => off ^= 1 << self.random.below(6),
            4 => off = self.random.next() as i16,
            _ => imm ^= 1 << self.random.below(32),
        }
        self.insns[at] = Insn::raw(code, dst, src, off, imm);
    }
}

/// A program: what is random, and what is added so that something can be seen of it: `r9` is kept in
/// the map, the lowest bit of `r7` is the result, and READ programs give `r8`.
struct Program {
    body: Vec<Insn>,
    stores: bool,
    pure: bool,
}

impl Program {
    fn random(kind: ProgType, map: &Map, random: &mut Random) -> Self {
        let pure = random.below(2) == 0;
        let mut generator = Generator {
            random,
            kind,
            map,
            insns: vec![mov(R6, R1)],
            has: [Has::Nothing; 10],
            stack: [false; 8],
        };
        generator.has[6] = Has::Context;
        for reg in [7, 8, 9] {
            let imm = generator.immediate();
            generator
                .insns
                .push(Insn::raw(ALU64 | 0xb0, reg, 0, 0, imm));
            generator.set(reg, Has::Number);
        }
        let count = 2 + generator.random.below(24);
        for _ in 0..count {
            generator.piece(0, pure);
        }
        // What the last instructions need.
        for reg in [7, 8, 9] {
            if generator.has[usize::from(reg)] != Has::Number {
                let imm = generator.immediate();
                generator
                    .insns
                    .push(Insn::raw(ALU64 | 0xb0, reg, 0, 0, imm));
            }
        }
        if generator.random.below(16) == 0 {
            generator.damage();
        }
        let stores = kind == ProgType::READ && generator.random.below(2) == 0;
        Program {
            body: generator.insns,
            stores,
            pure,
        }
    }

    fn insns(&self, map: &Map) -> Vec<Insn> {
        let mut insns = self.body.clone();
        if self.stores {
            insns.push(store(8, R6, CTX_BUF, Reg::R8));
        }
        insns.extend(lookup(map, Index::Imm(4)));
        insns.extend([
            store(8, R0, 0, Reg::R9),
            mov(R0, Reg::R7),
            Insn::raw(ALU64 | 0x50, 0, 0, 0, 1),
            exit(),
        ]);
        insns
    }

    /// What the program does with a context: its result, what it keeps, and the buffer.
    fn outcome(&self, context: [u8; CTX_SIZE as usize]) -> Option<(u64, u64, u64)> {
        let mut machine = Machine::new(context);
        machine.run(&self.body)?;
        if self.stores {
            machine.context[..8].copy_from_slice(&machine.registers[8].to_le_bytes());
        }
        let buf = u64::from_le_bytes(machine.context[..8].try_into().expect("eight bytes"));
        Some((machine.registers[7] & 1, machine.registers[9], buf))
    }
}

/// A guest and a device to run them.
struct Bench {
    vcpu: Vcpu,
    device: Device,
    map: Map,
    _irq: EventFd,
}

impl Bench {
    fn new() -> Self {
        let guest = Guest::new();
        let device = Device::new(guest.vm());
        let irq = eventfd();
        device.set_irq(0, std::os::fd::AsRawFd::as_raw_fd(&irq));
        let window = kvm_bpf_user_mem {
            addr: 0xc000,
            size: 0x4000,
            flags: KVM_BPF_MEM_READ | KVM_BPF_MEM_WRITE,
            pad: 0,
        };
        device.set_mem(0, &window);
        Bench {
            vcpu: guest.vcpu(VCPU),
            device,
            map: Map::new(5, 4),
            _irq: irq,
        }
    }

    /// Runs a program on one access or request, and compares what comes of it; returns whether
    /// there was something to compare with.
    fn run(&mut self, kind: ProgType, program: &Program, prog: &Prog, random: &mut Random) -> bool {
        const UNTOUCHED: u64 = 0x5555_5555_5555_5555;

        self.map.set(4, &[UNTOUCHED; 4]);
        let width = 1 << random.below(4);
        let offset = random.below(SIZE / 16) * 16 + random.below(16 / width) * width;
        let (width, addr, data) = (width as usize, ADDR + offset, random.next() << 16 | 0x8001);
        let mut context = [0; CTX_SIZE as usize];
        if kind != ProgType::READ {
            let data = if kind == ProgType::WORK {
                data
            } else {
                data & mask(width)
            };
            context[..8].copy_from_slice(&data.to_le_bytes());
        }
        let index = if kind == ProgType::WORK { WORK } else { REGION };
        context[8..16].copy_from_slice(&offset.to_le_bytes());
        context[16] = width as u8;
        context[20..24].copy_from_slice(&VCPU.to_le_bytes());
        context[24..28].copy_from_slice(&(index as u32).to_le_bytes());
        let outcome = match program.pure {
            true => program.outcome(context),
            false => None,
        };

        let (result, value) = if kind == ProgType::READ {
            self.device
                .set_region(REGION, &region(ADDR, SIZE, Some(prog), None));
            let read = self.vcpu.read(addr, width);
            match read.exits.len() {
                0 => (0, Some(read.value)),
                _ => {
                    assert_got!(read.exits, [Exit::Read(addr, width)]);
                    assert_got!(read.value, USER_ANSWER & mask(width));
                    (1, None)
                }
            }
        } else if kind == ProgType::WRITE {
            self.device
                .set_region(REGION, &region(ADDR, SIZE, None, Some(prog)));
            let exits = self.vcpu.write(addr, width, data);
            if !exits.is_empty() {
                assert_got!(exits, [Exit::Write(addr, width, data & mask(width))]);
            }
            (exits.len() as u64, None)
        } else {
            self.device.set_work(WORK, &work(Some(prog), None));
            match self.device.run(WORK, data) {
                Ok(()) => (0, None),
                Err(Errno(libc::EAGAIN)) => (1, None),
                Err(errno) => panic!("RUN: {errno:?}"),
            }
        };
        let Some((wanted, kept, buf)) = outcome else {
            return false;
        };
        let what = format!(
            "KVM_BPF_SEED={}: {kind:?}, {width} bytes at offset {offset:#x}, data {data:#x}, {}",
            seed(),
            hex(&program.body)
        );
        assert_got!(result, wanted, "the result of {what}");
        assert_got!(self.map.get(4)[0], kept, "r9 of {what}");
        if let Some(value) = value {
            assert_got!(value, buf & mask(width), "what the guest reads by {what}");
        }
        true
    }
}

/// Instructions as the kernel has them, byte by byte.
fn hex(insns: &[Insn]) -> String {
    let insn = |insn: &Insn| {
        let (code, dst, src, off, imm) = insn.parts();
        let bytes = [
            u64::from(code),
            u64::from(src << 4 | dst) << 8,
            u64::from(off as u16) << 16,
            u64::from(imm as u32) << 32,
        ];
        format!("{:016x}", bytes.into_iter().sum::<u64>().swap_bytes())
    };
    insns.iter().map(insn).collect::<Vec<_>>().join(" ")
}

/// What the verifier says no with.
const REFUSALS: [i32; 9] = [
    libc::EACCES,
    libc::EINVAL,
    libc::EPERM,
    libc::E2BIG,
    libc::ENOENT,
    libc::EOPNOTSUPP,
    // Where the number of a map is damaged, and the module of a kfunc.
    libc::EBADF,
    libc::EPROTO,
    ENOTSUPP,
];

pub(super) fn programs() {
    let census = Census::now();
    let mut random = Random::new(seed());
    let (mut accepted, mut compared) = (0, 0);
    let mut refused = BTreeMap::<i32, u64>::new();
    {
        let mut bench = Bench::new();
        for number in 0..loads() {
            // Each has numbers of its own, whatever becomes of the others.
            let random = &mut Random::new(random.next());
            let kind = one_of(random, &[ProgType::READ, ProgType::WRITE, ProgType::WORK]);
            let program = Program::random(kind, &bench.map, random);
            let options = LoadOptions {
                sleepable: random.below(4) == 0,
                without_log: true,
                ..Default::default()
            };
            match Prog::try_load(kind, &program.insns(&bench.map), options) {
                Ok(prog) => {
                    accepted += 1;
                    for _ in 0..2 {
                        compared += u64::from(bench.run(kind, &program, &prog, random));
                    }
                }
                Err(error) => {
                    // Among them is EFAULT, with which the verifier owns up to a defect.
                    assert!(
                        REFUSALS.contains(&error.errno.0),
                        "KVM_BPF_SEED={} program {number}: got {:?} for {}",
                        seed(),
                        error.errno,
                        hex(&program.insns(&bench.map))
                    );
                    *refused.entry(error.errno.0).or_default() += 1;
                }
            }
        }
    }
    println!(
        "KVM_BPF_SEED={}: {} programs, {accepted} accepted, {compared} runs compared, refused with {refused:?}",
        seed(),
        loads()
    );
    // A generator of which nothing loads finds nothing.
    assert!(
        accepted * 4 > loads(),
        "wanted a quarter to load, got {accepted}"
    );
    assert!(
        compared * 10 > loads(),
        "wanted some to be compared, got {compared}"
    );
    census.wait_for_newer(0, 0);
}
