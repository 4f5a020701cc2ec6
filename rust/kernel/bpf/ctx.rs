// SPDX-License-Identifier: GPL-2.0

//! Program contexts described by a table.
//!
//! A program does not see the structure that the kernel runs it on. It is compiled against a
//! *fake* structure, which is user ABI and never allocated, and the verifier has each access of a
//! fake field rewritten into accesses of the real structures behind it. Here that rewrite is a
//! table: one [`Field`] per fake field says who may access it and along which chain of real
//! structures the value is found.
//!
//! An access may have any width from one byte to the field's, at any offset inside the field that
//! is a multiple of the width. The real field is as wide as the fake one (checked at build time),
//! so the access is carried out at its own width, at its own offset inside the real field. No
//! shifts or masks are needed, the two byte orders do not differ, and nothing of the kernel's is
//! visible next to the field.
//!
//! # Examples
//!
//! A fake structure with a number that programs read and one that they set:
//!
//! ```
//! use kernel::bpf::ctx::{
//!     Context,
//!     Rights, //
//! };
//!
//! // What programs are compiled against.
//! #[repr(C)]
//! struct Fake {
//!     cpu: u32,
//!     verdict: u32,
//! }
//!
//! struct Cpu {
//!     id: u32,
//! }
//!
//! // What the kernel runs them on.
//! struct Real {
//!     verdict: u32,
//!     cpu: *const Cpu,
//! }
//!
//! // SAFETY: For this example, `cpu` is valid whenever a program runs.
//! unsafe impl Context for Real {
//!     type Fake = Fake;
//!     type Inner = Real;
//! }
//!
//! const CPU: kernel::bpf::ctx::Field =
//!     kernel::bpf_ctx_field!(Real, cpu: Rights::Load, Real.cpu => Cpu.id);
//! const VERDICT: kernel::bpf::ctx::Field =
//!     kernel::bpf_ctx_field!(Real, verdict: Rights::Store, Real.verdict);
//!
//! assert!(CPU.allows(0, 4, Rights::Load));
//! assert!(CPU.allows(2, 2, Rights::Load));
//! assert!(!CPU.allows(1, 2, Rights::Load)); // not aligned
//! assert!(!CPU.allows(0, 8, Rights::Load)); // past the field's end
//! assert!(!CPU.allows(0, 4, Rights::Store));
//! assert!(VERDICT.allows(4, 4, Rights::Store));
//! # Ok::<(), Error>(())
//! ```

use super::ProgType;
use crate::{
    bindings::{
        self,
        bpf_insn, //
    },
    prelude::*, //
};
use core::{
    marker::PhantomData,
    ptr, //
};

/// The bits of an instruction's code that hold its class.
const CLASS_MASK: u32 = 0x07;

/// The bits of an instruction's code that hold the width of a memory access.
const WIDTH_MASK: u32 = 0x18;

/// The width of a pointer, of the steps of a chain but the last.
const POINTER: u32 = if size_of::<usize>() == 8 {
    bindings::BPF_DW
} else {
    bindings::BPF_W
};

/// The longest chain of structures, and so the most instructions an access becomes.
pub const MAX_CHAIN: usize = 4;

/// Returns the instruction `dst = *(width *)(src + off)`, where `width` is one of `BPF_B` to
/// `BPF_DW`. It extends with zeroes.
fn load(width: u32, dst: u8, src: u8, off: i16) -> bpf_insn {
    bpf_insn {
        // CAST: A code has 8 bits.
        code: (bindings::BPF_LDX | bindings::BPF_MEM | width) as u8,
        _bitfield_1: bpf_insn::new_bitfield_1(dst, src),
        off,
        ..Default::default()
    }
}

/// What programs may do with a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// Load it.
    Load,
    /// Store to it.
    Store,
}

impl From<bindings::bpf_access_type> for Rights {
    /// Returns what an access of that kind needs.
    fn from(access: bindings::bpf_access_type) -> Self {
        if access == bindings::bpf_access_type::BPF_READ {
            Self::Load
        } else {
            Self::Store
        }
    }
}

/// What the kernel runs programs on.
///
/// # Safety
///
/// - `Self` must have the layout of `Inner`.
/// - While a program runs, every pointer of `Inner`, and of what such pointers point to, that a
///   [`Field`] follows must be valid for reads.
/// - A program may change any field of `Inner` that a [`Field`] names, and read all of `Inner`,
///   with `bpf_cast_to_kern_ctx()`.
pub unsafe trait Context {
    /// What programs are compiled against.
    type Fake;

    /// The structure that the chains start from.
    type Inner;
}

/// One field of the fake structure.
///
/// # Invariants
///
/// - `start..start + len` is the field in the fake structure, and `len` is at most 8.
/// - `chain` holds byte offsets. Each but the last is that of a pointer, to the structure which the
///   next one is an offset into; the last is that of a field of `len` bytes.
/// - A field with [`Rights::Store`] has a chain of length 1.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    start: usize,
    len: usize,
    rights: Rights,
    chain: &'static [i16],
}

impl Field {
    /// Use [`bpf_ctx_field!`](crate::bpf_ctx_field) instead.
    ///
    /// # Safety
    ///
    /// The arguments must meet the type invariants, as far as they are not asserted here.
    #[doc(hidden)]
    pub const unsafe fn new(
        start: usize,
        len: usize,
        real_len: usize,
        rights: Rights,
        chain: &'static [i16],
    ) -> Self {
        assert!(
            len == real_len,
            "the real field is not as wide as the fake one"
        );
        assert!(len >= 1 && len <= 8 && !chain.is_empty() && chain.len() <= MAX_CHAIN);
        // CAST: Offsets are not negative.
        let real_start = chain[chain.len() - 1] as usize;
        assert!(
            (real_start ^ start) & ((1 << len.ilog2()) - 1) == 0,
            "the real field is not aligned as the fake one is"
        );
        assert!(
            matches!(rights, Rights::Load) || chain.len() == 1,
            "a store has no register to follow a pointer with"
        );
        Self {
            start,
            len,
            rights,
            chain,
        }
    }

    /// Whether programs may access the `size` bytes at `off` of the fake structure, as far as
    /// this field is concerned.
    pub const fn allows(&self, off: usize, size: usize, rights: Rights) -> bool {
        self.contains(off, size)
            && size.is_power_of_two()
            && off % size == 0
            && matches!(
                (self.rights, rights),
                (Rights::Load, Rights::Load) | (Rights::Store, Rights::Store)
            )
    }

    const fn contains(&self, off: usize, size: usize) -> bool {
        off >= self.start && off < self.start + self.len && size <= self.start + self.len - off
    }

    /// Rewrites `access`, which [`Self::allows()`] has admitted, and returns how many instructions
    /// it became.
    fn rewrite(&self, access: bpf_insn, out: &mut [bpf_insn; MAX_CHAIN]) -> usize {
        let Some((&field, pointers)) = self.chain.split_last() else {
            return 0;
        };
        let mut slots = out.iter_mut();
        let mut base = access.src_reg();

        // A load may use its destination to follow the pointers. A store has none to follow, and
        // leaves all registers as they are.
        for (&off, slot) in pointers.iter().zip(&mut slots) {
            *slot = load(POINTER, access.dst_reg(), base, off);
            base = access.dst_reg();
        }

        if let Some(slot) = slots.next() {
            let code = u32::from(access.code);
            // CAST: `is_valid_access()` has bounded the offset by the fake structure's size.
            let inside = (access.off as usize).wrapping_sub(self.start) as i16;
            let off = field.wrapping_add(inside);

            *slot = if code & CLASS_MASK == bindings::BPF_LDX {
                // Sign extension, if any, is up to the verifier.
                load(code & WIDTH_MASK, access.dst_reg(), base, off)
            } else {
                bpf_insn { off, ..access }
            };
        }
        self.chain.len()
    }
}

/// Describes a field of a [`Context`]'s fake structure.
///
/// Takes the context, the fake field with the rights that programs have, and the chain: structure
/// and field, `=>`, the structure that this field points to and a field of that, and so on. That
/// the fields exist, that each step is a pointer to the next structure, and that the last field is
/// as wide as the fake one is checked at build time.
///
/// See the [module](crate::bpf::ctx) for an example.
#[macro_export]
macro_rules! bpf_ctx_field {
    (
        $ctx:ty, $fake:ident: $rights:expr,
        $first:ident . $f:ident $(=> $next:ident . $n:ident)*
    ) => {{
        type Fake = <$ctx as $crate::bpf::ctx::Context>::Fake;
        // The chain starts from the context's own structure.
        const _: fn(*const $first) -> *const <$ctx as $crate::bpf::ctx::Context>::Inner =
            |inner| inner;
        $crate::bpf_ctx_field!(@check $first . $f $(=> $next . $n)*);

        const OFFSET: usize = ::core::mem::offset_of!(Fake, $fake);
        const FAKE_LEN: usize = $crate::bpf::ctx::size_of_ref(|fake: &Fake| &fake.$fake);
        const LEN: usize = $crate::bpf_ctx_field!(@size $first . $f $(=> $next . $n)*);
        const RIGHTS: $crate::bpf::ctx::Rights = $rights;
        const CHAIN: &[i16] = &[
            ::core::mem::offset_of!($first, $f) as i16,
            $(::core::mem::offset_of!($next, $n) as i16,)*
        ];

        // SAFETY: The offsets are those of the fields named, and `@check` has compared the type
        // of each step with the structure that the next one is in.
        unsafe { $crate::bpf::ctx::Field::new(OFFSET, FAKE_LEN, LEN, RIGHTS, CHAIN) }
    }};
    (@check $last:ident . $f:ident) => {
        $crate::static_assert!(::core::mem::offset_of!($last, $f) < 0x7ff8);
    };
    (@check $here:ident . $f:ident => $next:ident . $n:ident $(=> $more:ident . $m:ident)*) => {
        $crate::static_assert!(::core::mem::offset_of!($here, $f) < 0x7ff8);
        const _: fn(&$here) -> *const $next = |here| here.$f;
        $crate::bpf_ctx_field!(@check $next . $n $(=> $more . $m)*);
    };
    (@size $last:ident . $f:ident) => {
        $crate::bpf::ctx::size_of_ref(|last: &$last| &last.$f)
    };
    (@size $here:ident . $f:ident => $($rest:tt)*) => {
        $crate::bpf_ctx_field!(@size $($rest)*)
    };
}

/// Returns the size of what a function projects to; it is not called.
#[doc(hidden)]
pub const fn size_of_ref<T, F>(_project: fn(&T) -> &F) -> usize {
    size_of::<F>()
}

/// Returns the callbacks by which the verifier checks and rewrites programs of type `T`.
///
/// They offer the helpers that programs of any type may call, as far as [`ProgType::NO_PERFMON`]
/// and the loader's capabilities allow.
pub const fn verifier_ops<T: ProgType>() -> bindings::bpf_verifier_ops {
    bindings::bpf_verifier_ops {
        get_func_proto: Some(bindings::bpf_base_func_proto),
        is_valid_access: Some(VerifierOps::<T>::is_valid_access),
        convert_ctx_access: Some(VerifierOps::<T>::convert_ctx_access),
        no_perfmon: T::NO_PERFMON,
        ..pin_init::zeroed()
    }
}

/// Returns the callbacks for loaded programs of type `T`: there are no test runs.
pub const fn prog_ops<T: ProgType>() -> bindings::bpf_prog_ops {
    pin_init::zeroed()
}

struct VerifierOps<T: ProgType>(PhantomData<T>);

impl<T: ProgType> VerifierOps<T> {
    /// Whether programs may do an access of `size` bytes at `off` of their context.
    ///
    /// # Safety
    ///
    /// None; the signature is C's, and no pointer is followed.
    unsafe extern "C" fn is_valid_access(
        off: c_int,
        size: c_int,
        access: bindings::bpf_access_type,
        _prog: *const bindings::bpf_prog,
        _info: *mut bindings::bpf_insn_access_aux,
    ) -> bool {
        let (Ok(off), Ok(size)) = (usize::try_from(off), usize::try_from(size)) else {
            return false;
        };
        let rights = Rights::from(access);

        // `_info` stays as it is: a zero `ctx_field_size` has the verifier leave the width of the
        // access alone.
        T::FIELDS.iter().any(|f| f.allows(off, size, rights))
    }

    /// Writes the instructions that do the access `src` to the real structures to `out`.
    ///
    /// # Safety
    ///
    /// - `src` must be valid for reads, an access that [`Self::is_valid_access()`] has admitted.
    /// - `out` must be valid for writes of [`MAX_CHAIN`] instructions, `target_size` of a number.
    unsafe extern "C" fn convert_ctx_access(
        access: bindings::bpf_access_type,
        src: *const bpf_insn,
        out: *mut bpf_insn,
        _prog: *mut bindings::bpf_prog,
        target_size: *mut u32,
    ) -> u32 {
        let rights = Rights::from(access);
        // SAFETY: By the safety requirements.
        let insn = unsafe { *src };
        let mut insns = [insn; MAX_CHAIN];

        let Some((n, len)) = usize::try_from(insn.off).ok().and_then(|off| {
            // A field that programs load and store has an entry for each.
            let mut fields = T::FIELDS.iter();
            let field = fields.find(|f| f.contains(off, 1) && f.rights == rights)?;
            Some((field.rewrite(insn, &mut insns), field.len))
        }) else {
            // The verifier takes zero instructions as a bug and refuses the program.
            return 0;
        };

        // SAFETY: `n` is at most `MAX_CHAIN`; the safety requirements cover `out`, which is the
        // verifier's, not `insns`.
        unsafe { ptr::copy_nonoverlapping(insns.as_ptr(), out, n) };
        // SAFETY: By the safety requirements. CAST: A field has at most 8 bytes.
        unsafe { *target_size = len as u32 };
        // CAST: `n` is at most `MAX_CHAIN`.
        n as u32
    }
}

#[cfg(CONFIG_RUST_BPF_KUNIT_TEST)]
#[macros::kunit_tests(rust_bpf_ctx)]
mod tests {
    use super::*;
    use core::mem::offset_of;

    #[repr(C)]
    struct Fake {
        data: [u8; 8],
        deep: u32,
    }

    #[repr(C)]
    struct Inner {
        pad: u64,
        next: *mut Inner,
        data: [u8; 8],
        deep: u32,
    }

    // SAFETY: No program runs on it.
    unsafe impl Context for Inner {
        type Fake = Fake;
        type Inner = Inner;
    }

    const DATA: Field = bpf_ctx_field!(Inner, data: Rights::Store, Inner.data);
    const DEEP: Field =
        bpf_ctx_field!(Inner, deep: Rights::Load, Inner.next => Inner.next => Inner.deep);

    fn rewrite(field: &Field, access: bpf_insn) -> ([bpf_insn; MAX_CHAIN], usize) {
        let mut out = [access; MAX_CHAIN];
        let n = field.rewrite(access, &mut out);
        (out, n)
    }

    /// Returns a store of `width` to `off` of the context in r6, of class `BPF_ST` or `BPF_STX`.
    fn store(class: u32, width: u32, off: i16) -> bpf_insn {
        bpf_insn {
            code: (class | bindings::BPF_MEM | width) as u8,
            _bitfield_1: bpf_insn::new_bitfield_1(6, 0),
            off,
            imm: 77,
            ..Default::default()
        }
    }

    fn parts(insn: bpf_insn) -> (u8, u8, u8, i16, i32) {
        let registers = (insn.dst_reg(), insn.src_reg());

        (insn.code, registers.0, registers.1, insn.off, insn.imm)
    }

    #[test]
    fn a_load_is_encoded_as_in_c() {
        let load = load(bindings::BPF_H, 3, 10, -8);

        assert_eq!(parts(load), (0x69, 3, 10, -8, 0));
    }

    #[test]
    fn a_store_keeps_width_and_registers() {
        let store = store(bindings::BPF_ST, bindings::BPF_H, 2);
        let (out, n) = rewrite(&DATA, store);

        assert_eq!(n, 1);
        let off = offset_of!(Inner, data) as i16 + 2;
        assert_eq!(parts(out[0]), parts(bpf_insn { off, ..store }));
    }

    #[test]
    fn a_load_follows_pointers_in_its_destination() {
        let (out, n) = rewrite(&DEEP, load(bindings::BPF_B, 1, 6, 8 + 3));

        assert_eq!(n, 3);
        let next = offset_of!(Inner, next) as i16;
        assert_eq!(parts(out[0]), parts(load(POINTER, 1, 6, next)));
        assert_eq!(parts(out[1]), parts(load(POINTER, 1, 1, next)));
        let deep = offset_of!(Inner, deep) as i16;
        assert_eq!(parts(out[2]), parts(load(bindings::BPF_B, 1, 1, deep + 3)));
    }

    #[test]
    fn accesses_stay_inside_one_field() {
        assert!(DATA.allows(0, 8, Rights::Store));
        assert!(DATA.allows(7, 1, Rights::Store));
        assert!(!DATA.allows(0, 8, Rights::Load));
        assert!(!DATA.allows(4, 8, Rights::Store));
        assert!(!DATA.allows(2, 4, Rights::Store));
        assert!(!DATA.allows(0, 3, Rights::Store));
        assert!(!DATA.allows(0, 0, Rights::Store));
        assert!(!DATA.allows(8, 4, Rights::Store));
        assert!(!DEEP.allows(8, 8, Rights::Load));
        assert!(!DEEP.allows(usize::MAX - 3, 4, Rights::Load));
    }

    /// A field that is loaded from one place and stored to another.
    struct BothWays;

    // SAFETY: No program is of this type.
    unsafe impl ProgType for BothWays {
        const TYPE: bindings::bpf_prog_type = bindings::bpf_prog_type_BPF_PROG_TYPE_UNSPEC;
        type Context<'a> = Inner;
        const FIELDS: &'static [Field] =
            &[DEEP, bpf_ctx_field!(Inner, deep: Rights::Store, Inner.deep)];
        const NO_PERFMON: bool = false;
    }

    #[test]
    fn loads_and_stores_of_a_field_go_their_own_ways() {
        let load = load(bindings::BPF_W, 1, 6, 8);
        let store = store(bindings::BPF_STX, bindings::BPF_W, 8);

        for (access, src, wanted) in [
            (bindings::bpf_access_type::BPF_READ, load, 3),
            (bindings::bpf_access_type::BPF_WRITE, store, 1),
        ] {
            let mut out = [src; MAX_CHAIN];
            let mut target_size = 0;
            // SAFETY: All pointers but the unused one are to what they have to be.
            let n = unsafe {
                VerifierOps::<BothWays>::convert_ctx_access(
                    access,
                    &src,
                    out.as_mut_ptr(),
                    ptr::null_mut(),
                    &mut target_size,
                )
            };

            assert_eq!((n, target_size), (wanted, 4));
            if n == 1 {
                let off = offset_of!(Inner, deep) as i16;
                assert_eq!(parts(out[0]), parts(bpf_insn { off, ..store }));
            }
        }
    }
}
