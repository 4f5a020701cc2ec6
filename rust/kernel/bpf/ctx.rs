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
//!     kernel::bpf_ctx_field!(Real, cpu: Rights::Read, Real.cpu => Cpu.id);
//! const VERDICT: kernel::bpf::ctx::Field =
//!     kernel::bpf_ctx_field!(Real, verdict: Rights::Write, Real.verdict);
//!
//! assert!(CPU.allows(0, 4, Rights::Read));
//! assert!(CPU.allows(2, 2, Rights::Read));
//! assert!(!CPU.allows(1, 2, Rights::Read)); // not aligned
//! assert!(!CPU.allows(0, 8, Rights::Read)); // past the field's end
//! assert!(!CPU.allows(0, 4, Rights::Write));
//! assert!(VERDICT.allows(4, 4, Rights::Write));
//! # Ok::<(), Error>(())
//! ```

use super::{
    insn::{
        Insn,
        Width, //
    },
    ProgType,
};
use crate::{
    bindings,
    prelude::*, //
};
use core::marker::PhantomData;

/// The width of a pointer, of the steps of a chain but the last.
const POINTER: Width = if size_of::<usize>() == 8 {
    Width::DoubleWord
} else {
    Width::Word
};

/// The longest chain of structures, and so the most instructions an access becomes.
pub const MAX_CHAIN: usize = 4;

/// What programs may do with a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// Load it.
    Read,
    /// Store to it.
    Write,
}

impl Rights {
    /// What an access of that kind needs.
    fn to_do(access: bindings::bpf_access_type) -> Self {
        if access == bindings::bpf_access_type::BPF_READ {
            Self::Read
        } else {
            Self::Write
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
/// - A field with [`Rights::Write`] has a chain of length 1.
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
            matches!(rights, Rights::Read) || chain.len() == 1,
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
                (Rights::Read, Rights::Read) | (Rights::Write, Rights::Write)
            )
    }

    const fn contains(&self, off: usize, size: usize) -> bool {
        off >= self.start && off < self.start + self.len && size <= self.start + self.len - off
    }

    /// Rewrites `access`, which [`Self::allows()`] has admitted, and returns how many instructions
    /// it became.
    fn rewrite(&self, access: Insn, out: &mut [Insn; MAX_CHAIN]) -> usize {
        // A load may use its destination to follow the pointers. A store has one step only, and
        // leaves all registers as they are.
        let mut base = access.src();
        let mut n = 0_usize;

        for (slot, &off) in out.iter_mut().zip(self.chain) {
            *slot = Insn::load(POINTER, access.dst(), base, off);
            base = access.dst();
            n += 1;
        }

        if let (Some(last), Some(&field)) = (out.get_mut(n.wrapping_sub(1)), self.chain.last()) {
            // CAST: `is_valid_access()` has bounded the offset by the fake structure's size.
            let inside = (access.offset() as usize).wrapping_sub(self.start) as i16;
            let off = field.wrapping_add(inside);
            *last = if access.is_load() {
                // Sign extension, if any, is up to the verifier; `last` is a plain load.
                Insn::load(access.width(), access.dst(), last.src(), off)
            } else {
                access.at(off)
            };
        }
        n
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
        let rights = Rights::to_do(access);

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
        src: *const bindings::bpf_insn,
        out: *mut bindings::bpf_insn,
        _prog: *mut bindings::bpf_prog,
        target_size: *mut u32,
    ) -> u32 {
        let rights = Rights::to_do(access);
        // SAFETY: By the safety requirements.
        let insn = Insn::from(unsafe { *src });
        let mut insns = [insn; MAX_CHAIN];

        let Some((n, len)) = usize::try_from(insn.offset()).ok().and_then(|off| {
            // A field that programs load and store has an entry for each.
            let mut fields = T::FIELDS.iter();
            let field = fields.find(|f| f.contains(off, 1) && f.rights == rights)?;
            Some((field.rewrite(insn, &mut insns), field.len))
        }) else {
            // The verifier takes zero instructions as a bug and refuses the program.
            return 0;
        };

        for (i, insn) in insns.iter().take(n).enumerate() {
            // SAFETY: `n` is at most `MAX_CHAIN`, so the safety requirements cover `out + i`.
            unsafe { out.add(i).write((*insn).into()) };
        }
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

    const DATA: Field = bpf_ctx_field!(Inner, data: Rights::Write, Inner.data);
    const DEEP: Field =
        bpf_ctx_field!(Inner, deep: Rights::Read, Inner.next => Inner.next => Inner.deep);

    fn rewrite(field: &Field, access: Insn) -> ([Insn; MAX_CHAIN], usize) {
        let mut out = [access; MAX_CHAIN];
        let n = field.rewrite(access, &mut out);
        (out, n)
    }

    #[test]
    fn a_store_keeps_width_and_registers() {
        let store: Insn = bindings::bpf_insn {
            code: (bindings::BPF_ST | bindings::BPF_MEM | bindings::BPF_H) as u8,
            _bitfield_align_1: [],
            _bitfield_1: bindings::bpf_insn::new_bitfield_1(6, 0),
            off: 2,
            imm: 77,
        }
        .into();
        let (out, n) = rewrite(&DATA, store);

        assert_eq!(n, 1);
        assert_eq!(out[0], store.at(offset_of!(Inner, data) as i16 + 2));
    }

    #[test]
    fn a_load_follows_pointers_in_its_destination() {
        let (out, n) = rewrite(&DEEP, Insn::load(Width::Byte, 1, 6, 8 + 3));

        assert_eq!(n, 3);
        let next = offset_of!(Inner, next) as i16;
        assert_eq!(out[0], Insn::load(POINTER, 1, 6, next));
        assert_eq!(out[1], Insn::load(POINTER, 1, 1, next));
        assert_eq!(
            out[2],
            Insn::load(Width::Byte, 1, 1, offset_of!(Inner, deep) as i16 + 3)
        );
    }

    #[test]
    fn accesses_stay_inside_one_field() {
        assert!(DATA.allows(0, 8, Rights::Write));
        assert!(DATA.allows(7, 1, Rights::Write));
        assert!(!DATA.allows(0, 8, Rights::Read));
        assert!(!DATA.allows(4, 8, Rights::Write));
        assert!(!DATA.allows(2, 4, Rights::Write));
        assert!(!DATA.allows(0, 3, Rights::Write));
        assert!(!DATA.allows(0, 0, Rights::Write));
        assert!(!DATA.allows(8, 4, Rights::Write));
        assert!(!DEEP.allows(8, 8, Rights::Read));
        assert!(!DEEP.allows(usize::MAX - 3, 4, Rights::Read));
    }

    /// A field that is loaded from one place and stored to another.
    struct BothWays;

    // SAFETY: No program is of this type.
    unsafe impl ProgType for BothWays {
        const TYPE: bindings::bpf_prog_type = bindings::bpf_prog_type_BPF_PROG_TYPE_UNSPEC;
        type Context<'a> = Inner;
        const FIELDS: &'static [Field] =
            &[DEEP, bpf_ctx_field!(Inner, deep: Rights::Write, Inner.deep)];
        const NO_PERFMON: bool = false;
    }

    #[test]
    fn loads_and_stores_of_a_field_go_their_own_ways() {
        let load = Insn::load(Width::Word, 1, 6, 8);
        let store: Insn = bindings::bpf_insn {
            code: (bindings::BPF_STX | bindings::BPF_MEM | bindings::BPF_W) as u8,
            _bitfield_align_1: [],
            _bitfield_1: bindings::bpf_insn::new_bitfield_1(6, 0),
            off: 8,
            imm: 0,
        }
        .into();

        for (access, insn, wanted) in [
            (bindings::bpf_access_type::BPF_READ, load, 3),
            (bindings::bpf_access_type::BPF_WRITE, store, 1),
        ] {
            let src = bindings::bpf_insn::from(insn);
            let mut out = [src; MAX_CHAIN];
            let mut target_size = 0;
            // SAFETY: All pointers but the unused one are to what they have to be.
            let n = unsafe {
                VerifierOps::<BothWays>::convert_ctx_access(
                    access,
                    &src,
                    out.as_mut_ptr(),
                    core::ptr::null_mut(),
                    &mut target_size,
                )
            };

            assert_eq!((n, target_size), (wanted, 4));
            if n == 1 {
                assert_eq!(Insn::from(out[0]), store.at(offset_of!(Inner, deep) as i16));
            }
        }
    }
}
