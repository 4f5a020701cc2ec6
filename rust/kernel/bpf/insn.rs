// SPDX-License-Identifier: GPL-2.0

//! Constructors of BPF instructions.
//!
//! C header: [`include/linux/filter.h`](srctree/include/linux/filter.h).

use crate::bindings;
use core::mem::transmute;

const CLASS_MASK: u8 = 0x07;
const SIZE_MASK: u8 = 0x18;

/// Width of a memory access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// 1 byte, `BPF_B`.
    Byte,
    /// 2 bytes, `BPF_H`.
    Half,
    /// 4 bytes, `BPF_W`.
    Word,
    /// 8 bytes, `BPF_DW`.
    DoubleWord,
}

impl Width {
    /// Returns the bits of an instruction's code that stand for this width.
    const fn code(self) -> u8 {
        match self {
            Self::Byte => bindings::BPF_B as u8,
            Self::Half => bindings::BPF_H as u8,
            Self::Word => bindings::BPF_W as u8,
            Self::DoubleWord => bindings::BPF_DW as u8,
        }
    }

    /// Returns the width of the memory access `code`.
    const fn of(code: u8) -> Self {
        match (code & SIZE_MASK) as u32 {
            bindings::BPF_B => Self::Byte,
            bindings::BPF_H => Self::Half,
            bindings::BPF_W => Self::Word,
            _ => Self::DoubleWord,
        }
    }
}

/// One BPF instruction, the layout of `struct bpf_insn`.
///
/// # Examples
///
/// ```
/// use kernel::bpf::insn::{
///     Insn,
///     Width, //
/// };
///
/// // r2 = *(u32 *)(r1 + 20)
/// let load = Insn::load(Width::Word, 2, 1, 20);
/// assert_eq!((load.dst(), load.src(), load.offset()), (2, 1, 20));
/// assert_eq!(load.width(), Width::Word);
/// assert!(load.is_load());
/// # Ok::<(), Error>(())
/// ```
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Insn {
    code: u8,
    regs: u8,
    off: i16,
    imm: i32,
}

impl Insn {
    /// `dst = *(width *)(src + off)`, zero-extended.
    pub const fn load(width: Width, dst: u8, src: u8, off: i16) -> Self {
        Self {
            code: (bindings::BPF_LDX | bindings::BPF_MEM) as u8 | width.code(),
            regs: Self::regs(dst, src),
            off,
            imm: 0,
        }
    }

    /// The same access as `self` at another offset.
    ///
    /// All else stays: direction, width, registers, and for a store of an immediate, its value.
    pub const fn at(self, off: i16) -> Self {
        Self { off, ..self }
    }

    /// Returns the number of the destination register.
    pub const fn dst(self) -> u8 {
        if cfg!(target_endian = "little") {
            self.regs & 0xf
        } else {
            self.regs >> 4
        }
    }

    /// Returns the number of the source register.
    pub const fn src(self) -> u8 {
        if cfg!(target_endian = "little") {
            self.regs >> 4
        } else {
            self.regs & 0xf
        }
    }

    /// Returns the offset, in bytes for a memory access.
    pub const fn offset(self) -> i16 {
        self.off
    }

    /// Returns the width of a memory access.
    pub const fn width(self) -> Width {
        Width::of(self.code)
    }

    /// Whether this loads a register from memory.
    pub const fn is_load(self) -> bool {
        (self.code & CLASS_MASK) as u32 == bindings::BPF_LDX
    }

    /// The C type's bit-field: which half of the byte is `dst_reg` depends on the endianness.
    const fn regs(dst: u8, src: u8) -> u8 {
        assert!(dst < 16 && src < 16);
        if cfg!(target_endian = "little") {
            src << 4 | dst
        } else {
            dst << 4 | src
        }
    }
}

impl From<bindings::bpf_insn> for Insn {
    #[inline]
    fn from(insn: bindings::bpf_insn) -> Self {
        // SAFETY: Both are eight initialised bytes, for which any value is valid in both types;
        // `transmute` compares the sizes.
        unsafe { transmute(insn) }
    }
}

impl From<Insn> for bindings::bpf_insn {
    #[inline]
    fn from(insn: Insn) -> Self {
        // SAFETY: Both are eight initialised bytes, for which any value is valid in both types;
        // `transmute` compares the sizes.
        unsafe { transmute(insn) }
    }
}

#[cfg(CONFIG_RUST_BPF_KUNIT_TEST)]
#[macros::kunit_tests(rust_bpf_insn)]
mod tests {
    use super::*;

    #[test]
    fn layout_is_that_of_the_c_type() {
        let insn: bindings::bpf_insn = Insn::load(Width::Half, 3, 10, -8).into();

        assert_eq!(insn.code, 0x69);
        assert_eq!(insn.dst_reg(), 3);
        assert_eq!(insn.src_reg(), 10);
        assert_eq!(insn.off, -8);
        assert_eq!(insn.imm, 0);
    }

    #[test]
    fn widths_round_trip() {
        for width in [Width::Byte, Width::Half, Width::Word, Width::DoubleWord] {
            assert_eq!(Insn::load(width, 0, 1, 0).width(), width);
        }
    }
}
