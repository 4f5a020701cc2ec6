// SPDX-License-Identifier: GPL-2.0

//! BPF programs and program types.
//!
//! C headers: [`include/linux/bpf.h`](srctree/include/linux/bpf.h),
//! [`include/linux/filter.h`](srctree/include/linux/filter.h).
//!
//! A subsystem that lets BPF programs decide something needs three things:
//!
//! - a *program type*, which tells the verifier what a program may do. It implements
//!   [`ProgType`], whose heart is a table of the fields of the context that programs see; the
//!   callbacks that the verifier wants follow from the table ([`ctx`]);
//! - *references* to programs that user space hands in by file descriptor: [`Prog::from_fd()`];
//! - a way to *run* them: [`Prog::run()`].
//!
//! Program types cannot come from a module, as the verifier's table of types is built in; what
//! implements [`ProgType`] is thus built in too. Its programs may be run from a module.
//!
//! Not covered: attaching by `bpf(2)` or links, `struct_ops`, maps, test runs.

use crate::{
    bindings,
    error::{
        from_err_ptr,
        to_result,
        Result, //
    },
    sync::aref::{
        ARef,
        AlwaysRefCounted, //
    },
    types::Opaque,
};
use core::{
    marker::PhantomData,
    ptr::NonNull, //
};

pub mod ctx;

/// A program type.
///
/// # Safety
///
/// Each of `FIELDS` must have been made by [`bpf_ctx_field!`](crate::bpf_ctx_field) for `Context`.
///
/// The C tables of `TYPE` must be [`verifier_ops`](ctx::verifier_ops) and
/// [`prog_ops`](ctx::prog_ops) of `Self`, so that the verifier admits only accesses of a
/// `Context` that `FIELDS` describes.
///
/// Helpers and kfuncs that the verifier lets such programs call with their context must rely on
/// nothing but what every `Context` guarantees.
pub unsafe trait ProgType: 'static {
    /// The number of the type, one of `enum bpf_prog_type`.
    const TYPE: bindings::bpf_prog_type;

    /// What a program is run on.
    type Context<'a>: ctx::Context;

    /// The fields of the context, as programs see them.
    const FIELDS: &'static [ctx::Field];

    /// Whether programs are verified as if their loader had no `CAP_PERFMON`.
    ///
    /// For types whose programs act on what no loader can vouch for, as a guest's choice of an
    /// index.
    const NO_PERFMON: bool;
}

/// A loaded program of type `T`.
///
/// Wraps the kernel's `struct bpf_prog`.
///
/// # Invariants
///
/// The program has been verified as one of type `T`.
#[repr(transparent)]
pub struct Prog<T: ProgType> {
    inner: Opaque<bindings::bpf_prog>,
    _type: PhantomData<T>,
}

// SAFETY: A loaded program is immutable, and its reference count may change on any thread.
unsafe impl<T: ProgType> Send for Prog<T> {}
// SAFETY: A loaded program is immutable; any number of threads may run it at a time.
unsafe impl<T: ProgType> Sync for Prog<T> {}

// SAFETY: `bpf_prog_inc()` and `bpf_prog_put()` count references to a program, and programs are
// only ever created with such a count.
unsafe impl<T: ProgType> AlwaysRefCounted for Prog<T> {
    #[inline]
    fn inc_ref(&self) {
        // SAFETY: By the existence of `&self` the program has a reference.
        unsafe { bindings::bpf_prog_inc(self.inner.get()) };
    }

    #[inline]
    unsafe fn dec_ref(obj: NonNull<Self>) {
        // SAFETY: The caller gives up a reference of its own.
        unsafe { bindings::bpf_prog_put(obj.cast().as_ptr()) };
    }
}

impl<T: ProgType> Prog<T> {
    /// Takes a reference to the program behind file descriptor `fd` of the current process.
    ///
    /// # Errors
    ///
    /// - `EBADF`: `fd` is not open.
    /// - `EINVAL`: `fd` is not a program, or one of another type.
    #[inline]
    pub fn from_fd(fd: u32) -> Result<ARef<Self>> {
        // SAFETY: No requirements on the arguments.
        let prog = from_err_ptr(unsafe { bindings::bpf_prog_get_type_dev(fd, T::TYPE, false) })?;

        // INVARIANT: `bpf_prog_get_type_dev()` has compared the type.
        //
        // SAFETY: The pointer is valid, as it is not an error, and comes with a reference.
        // `Prog` is `repr(transparent)` over `struct bpf_prog`.
        Ok(unsafe { ARef::from_raw(NonNull::new_unchecked(prog.cast())) })
    }

    /// Whether the program may sleep.
    #[inline]
    pub fn is_sleepable(&self) -> bool {
        // SAFETY: By the type invariants the program is valid, and it has been verified, after
        // which the flag does not change.
        unsafe { bindings::bpf_prog::sleepable_raw(self.inner.get()) != 0 }
    }

    /// Returns the number that `bpf(2)` knows the program by, never 0.
    #[inline]
    pub fn id(&self) -> u32 {
        // SAFETY: By the type invariants the program is valid. Its number was set when it was
        // loaded, and stays while there are references.
        unsafe { (*(*self.inner.get()).aux).id }
    }

    /// Returns a hash of the program's instructions, as `bpf(2)` does.
    #[inline]
    pub fn tag(&self) -> [u8; bindings::BPF_TAG_SIZE as usize] {
        // SAFETY: By the type invariants the program is valid, and was hashed when it was loaded.
        unsafe { (*self.inner.get()).__bindgen_anon_1.tag }
    }

    /// Keeps the program as it was verified: while what this returns exists, no other extends it.
    ///
    /// Context: process context, may sleep.
    ///
    /// # Errors
    ///
    /// `EBUSY` if one does.
    #[inline]
    pub fn forbid_extension(&self) -> Result<Unextended> {
        // SAFETY: By the existence of `&self` the program has a reference.
        to_result(unsafe { bindings::bpf_prog_forbid_extension(self.inner.get()) })?;
        // INVARIANT: Just called, and the reference is this one.
        Ok(Unextended(ARef::into_raw(ARef::<Self>::from(self)).cast()))
    }

    #[inline]
    pub(crate) fn as_raw(&self) -> *const bindings::bpf_prog {
        self.inner.get()
    }

    /// Runs the program and returns what it returned.
    ///
    /// A sleepable program runs in an RCU tasks trace read-side section, any other in an RCU
    /// read-side section, both with migration disabled. Nothing keeps two threads from running
    /// the same program, on one CPU too.
    ///
    /// Context: process context, may sleep.
    #[inline]
    pub fn run(&self, ctx: &mut T::Context<'_>) -> u32 {
        let ctx: *mut T::Context<'_> = ctx;

        // SAFETY: By the type invariants the program has been verified as one of type `T`. So by
        // the safety requirements of `ProgType` it changes nothing of `ctx` but the table's fields,
        // which `Context` allows, as it allows reading all of it; and what it calls can rely on
        // `ctx`, which is exclusively ours meanwhile.
        unsafe { bindings::bpf_prog_run_in_task(self.inner.get(), ctx.cast()) }
    }
}

/// A program that no other extends while this exists.
///
/// # Invariants
///
/// This has a reference to the program, and has called `bpf_prog_forbid_extension()` for it.
pub struct Unextended(NonNull<bindings::bpf_prog>);

// SAFETY: Any thread may undo the call and drop the reference.
unsafe impl Send for Unextended {}
// SAFETY: A shared one is good for nothing.
unsafe impl Sync for Unextended {}

impl Drop for Unextended {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: By the type invariants.
        unsafe {
            bindings::bpf_prog_allow_extension(self.0.as_ptr());
            bindings::bpf_prog_put(self.0.as_ptr());
        }
    }
}
