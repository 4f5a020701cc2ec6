// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Random programs: some are good, some nearly.

use Reg::{R0, R1, R2, R3, R4, R6, R10};
use kvm_bpf_selftests::bpf::{
    Index, Insn, Map, ProgType, Reg, add_imm, call_helper, call_kfunc, exit, lookup, mov, mov_imm,
    store, store_imm,
};
use kvm_bpf_selftests::harness::Random;
use kvm_bpf_selftests::programs::{
    CTX_BUF, CTX_LEN, CTX_OFFSET, CTX_REGION, CTX_SIZE, CTX_VCPU_ID,
};
use libbpf_rs::libbpf_sys as sys;

use super::super::one_of;
use super::machine::{
    ALU32, ALU64, CONDITIONS, JMP, JMP32, LDX, LDX_SIGNED, Machine, NEGATE, OPERATIONS, REGISTER,
    ST, STX, size_bits,
};
use crate::tests::kfunc::required;

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
pub(super) struct Program {
    pub(super) body: Vec<Insn>,
    stores: bool,
    pub(super) pure: bool,
}

impl Program {
    pub(super) fn random(kind: ProgType, map: &Map, random: &mut Random) -> Self {
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

    pub(super) fn insns(&self, map: &Map) -> Vec<Insn> {
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
    pub(super) fn outcome(&self, context: [u8; CTX_SIZE as usize]) -> Option<(u64, u64, u64)> {
        let mut machine = Machine::new(context);
        machine.run(&self.body)?;
        if self.stores {
            machine.context[..8].copy_from_slice(&machine.registers[8].to_le_bytes());
        }
        let buf = u64::from_le_bytes(machine.context[..8].try_into().expect("eight bytes"));
        Some((machine.registers[7] & 1, machine.registers[9], buf))
    }
}
