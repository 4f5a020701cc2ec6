// SPDX-License-Identifier: Apache-2.0 OR MIT

//! An interpreter of programs that only calculate, with their context and their stack.

use kvm_bpf_selftests::bpf::Insn;
use kvm_bpf_selftests::programs::CTX_SIZE;

/// The pointers that the interpreter gives to the context and to the end of the stack.
const CONTEXT: u64 = 0x1000_0000_0000;
const STACK: u64 = 0x2000_0000_0000;
const STACK_SIZE: u64 = 512;

// Classes and operations of the instruction set.
pub(super) const LDX: u8 = 0x61;
pub(super) const LDX_SIGNED: u8 = 0x81;
pub(super) const ST: u8 = 0x62;
pub(super) const STX: u8 = 0x63;
pub(super) const ALU32: u8 = 0x04;
pub(super) const JMP: u8 = 0x05;
pub(super) const JMP32: u8 = 0x06;
pub(super) const ALU64: u8 = 0x07;
pub(super) const REGISTER: u8 = 0x08;

/// Operations that need no second thought: no division, nothing that swaps bytes.
pub(super) const OPERATIONS: [u8; 11] = [
    0x00, 0x10, 0x20, 0x40, 0x50, 0x60, 0x70, 0x80, 0xa0, 0xb0, 0xc0,
];
pub(super) const NEGATE: u8 = 0x80;
pub(super) const CONDITIONS: [u8; 11] = [
    0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70, 0xa0, 0xb0, 0xc0, 0xd0,
];

/// The size bits of a width.
pub(super) fn size_bits(width: usize) -> u8 {
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
pub(super) struct Machine {
    pub(super) registers: [u64; 11],
    pub(super) context: [u8; CTX_SIZE as usize],
    stack: [u8; STACK_SIZE as usize],
}

impl Machine {
    pub(super) fn new(context: [u8; CTX_SIZE as usize]) -> Self {
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
    pub(super) fn run(&mut self, insns: &[Insn]) -> Option<()> {
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
