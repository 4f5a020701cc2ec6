// SPDX-License-Identifier: GPL-2.0

//! BPF programs that handle guest accesses to device registers.
//!
//! C header: [`include/linux/kvm_bpf.h`](srctree/include/linux/kvm_bpf.h).
//!
//! There is one program type per direction, so that the verifier knows which way the data goes:
//! an [`IoRead`] program handles a load, an [`IoWrite`] program a store. An [`IoWork`] program does
//! what a device has to do without an access.

use super::{
    io::Access,
    irq::Irqs,
    mem::Windows,
    Vcpu, //
};
use crate::{
    bindings,
    bpf::{
        ctx::{
            self,
            Field,
            Rights, //
        },
        Prog,
        ProgType, //
    },
    bpf_ctx_field,
    jump_label::static_branch_unlikely,
    prelude::*,
    sync::{
        aref::ARef,
        Arc, //
    },
    tracepoint::declare_trace, //
};
use core::{
    marker::PhantomData,
    mem::offset_of,
    ptr, //
};

/// What programs of a region, or of a work, act on, the same each time.
///
/// # Invariants
///
/// `inner.irqs` is that of `_irqs`, and `inner.mem` that of `mem`.
pub struct Binding {
    inner: bindings::kvm_bpf_binding,
    _irqs: ARef<Irqs>,
    mem: Arc<Windows>,
}

// SAFETY: The pointers are to what `_irqs` and `mem` refer to, which may be used on any thread.
unsafe impl Send for Binding {}
// SAFETY: As above.
unsafe impl Sync for Binding {}

impl Binding {
    /// For the region, or the work, with that index, of a device with these interrupts and this
    /// guest memory. Of another VM's memory, programs access nothing.
    #[inline]
    pub fn new(region: u32, irqs: ARef<Irqs>, mem: Arc<Windows>) -> Self {
        // INVARIANT: One is made of the other.
        Self {
            inner: bindings::kvm_bpf_binding {
                irqs: ptr::from_ref(&*irqs).cast(),
                mem: mem.as_raw(),
                region,
            },
            _irqs: irqs,
            mem,
        }
    }
}

/// What a program is run on: one access and its data.
///
/// # Invariants
///
/// `vcpu` and `binding` are valid for `'a`, which is in a read-side section of the SRCU of the
/// vCPU's VM.
#[repr(transparent)]
pub struct Context<'a> {
    inner: bindings::bpf_kvm_io_ctx_kern,
    _refs: PhantomData<(&'a Vcpu, &'a Binding)>,
}

impl<'a> Context<'a> {
    /// The context for `access` of a region with that binding.
    ///
    /// `data` is in the guest's memory order.
    #[inline]
    pub fn new(access: &Access<'a>, binding: &'a Binding, data: [u8; 8]) -> Self {
        // INVARIANT: `access.vcpu` and `binding` are borrowed for `'a`, and accesses are in such a
        // section.
        Self {
            inner: bindings::bpf_kvm_io_ctx_kern {
                buf: data,
                offset: access.offset,
                vcpu: access.vcpu.as_raw(),
                binding: &raw const binding.inner,
                len: access.len,
            },
            _refs: PhantomData,
        }
    }

    /// Returns the data, in the guest's memory order.
    #[inline]
    pub fn data(&self) -> [u8; 8] {
        self.inner.buf
    }
}

// SAFETY: `Context` is `repr(transparent)`. Its pointers are valid while it exists, by the type
// invariants, those of `struct kvm_vcpu` and of a binding are not followed, and no vCPU is known
// before `check_layout()`. A program may change the data, as any bytes will do; nothing else is
// writable.
unsafe impl ctx::Context for Context<'_> {
    type Fake = bindings::bpf_kvm_io_ctx;
    type Inner = bindings::bpf_kvm_io_ctx_kern;
}

/// What a program that runs without an access is run on.
///
/// # Invariants
///
/// `binding` is valid for `'a`. Where a program is run on it, this is in a read-side section of the
/// SRCU of the VM of the binding's windows.
#[repr(transparent)]
pub struct WorkContext<'a> {
    inner: bindings::bpf_kvm_io_ctx_kern,
    _binding: PhantomData<&'a Binding>,
}

impl<'a> WorkContext<'a> {
    #[inline]
    fn new(arg: u64, binding: &'a Binding) -> Self {
        // INVARIANT: `binding` is borrowed for `'a`.
        Self {
            inner: bindings::bpf_kvm_io_ctx_kern {
                buf: arg.to_ne_bytes(),
                offset: 0,
                vcpu: ptr::null_mut(),
                binding: &raw const binding.inner,
                len: 0,
            },
            _binding: PhantomData,
        }
    }
}

// SAFETY: `WorkContext` is `repr(transparent)`. No field's chain follows a pointer but that to the
// binding, which is valid by the type invariants, and programs can change nothing.
unsafe impl ctx::Context for WorkContext<'_> {
    type Fake = bindings::bpf_kvm_io_ctx;
    type Inner = bindings::bpf_kvm_io_ctx_kern;
}

/// Prepares what kfuncs for sleepable programs need that cannot be done while a program runs.
///
/// To be called before such a program is run.
///
/// Context: process context, may sleep, takes the CPU hotplug lock.
#[inline]
pub fn prepare_sleepable() {
    // SAFETY: No requirements but process context.
    unsafe { bindings::kvm_bpf_kfuncs_prepare() }
}

/// Takes the clamps of its utilization off the current thread, for one that runs [`IoWork`].
///
/// It has them from the thread that made it, where programs may have set them.
///
/// Context: process context, may sleep.
#[inline]
pub fn unclamp_current() {
    // SAFETY: No requirements but process context.
    unsafe { bindings::kvm_bpf_unclamp_current() }
}

/// Returns what a device has to allow for the program, `KVM_BPF_ALLOW_*`.
///
/// Context: process context, may sleep. It looks at each instruction.
#[inline]
pub fn needs<T: ProgType>(prog: &Prog<T>) -> u32 {
    // SAFETY: The program is valid.
    unsafe { bindings::kvm_bpf_prog_needs(prog.as_raw()) }
}

type Kern = bindings::bpf_kvm_io_ctx_kern;
type KvmVcpu = bindings::kvm_vcpu;
type KvmBinding = bindings::kvm_bpf_binding;

/// The fields of [`IoRead`] and [`IoWrite`], but for `buf`: what happens, where, and who does it.
const OFFSET: Field = bpf_ctx_field!(Context<'static>, offset: Rights::Load, Kern.offset);
const LEN: Field = bpf_ctx_field!(Context<'static>, len: Rights::Load, Kern.len);
const VCPU_ID: Field =
    bpf_ctx_field!(Context<'static>, vcpu_id: Rights::Load, Kern.vcpu => KvmVcpu.vcpu_id);
const REGION: Field =
    bpf_ctx_field!(Context<'static>, region: Rights::Load, Kern.binding => KvmBinding.region);

/// Programs that handle loads.
pub struct IoRead;

// SAFETY: The fields are those of `Context`. `include/linux/bpf_types.h` refers to
// `kvm_io_read_verifier_ops` and `kvm_io_read_prog_ops` below for this type.
// No helper that such programs may call looks at their context; of the kfuncs those for
// interrupts and guest memory do, and rely on the binding, which is valid in every `Context`.
unsafe impl ProgType for IoRead {
    const TYPE: bindings::bpf_prog_type = bindings::bpf_prog_type_BPF_PROG_TYPE_KVM_IO_READ;
    type Context<'a> = Context<'a>;
    const FIELDS: &'static [Field] = &[
        bpf_ctx_field!(Context<'static>, buf: Rights::Store, Kern.buf),
        OFFSET,
        LEN,
        VCPU_ID,
        REGION,
    ];
    const NO_PERFMON: bool = true;
}

/// Programs that handle stores.
pub struct IoWrite;

// SAFETY: The fields are those of `Context`. `include/linux/bpf_types.h` refers to
// `kvm_io_write_verifier_ops` and `kvm_io_write_prog_ops` below for this type. Helpers and kfuncs
// are those of `IoRead`.
unsafe impl ProgType for IoWrite {
    const TYPE: bindings::bpf_prog_type = bindings::bpf_prog_type_BPF_PROG_TYPE_KVM_IO_WRITE;
    type Context<'a> = Context<'a>;
    const FIELDS: &'static [Field] = &[
        bpf_ctx_field!(Context<'static>, buf: Rights::Load, Kern.buf),
        OFFSET,
        LEN,
        VCPU_ID,
        REGION,
    ];
    const NO_PERFMON: bool = true;
}

/// Programs that run without an access.
///
/// What they return is 0 or 1, and 1 asks to be run again.
pub struct IoWork;

// SAFETY: The fields are those of `WorkContext`. `include/linux/bpf_types.h` refers to
// `kvm_io_work_verifier_ops` and `kvm_io_work_prog_ops` below for this type. Helpers and kfuncs
// are those of `IoRead`, but for one, and rely on the binding alone.
unsafe impl ProgType for IoWork {
    const TYPE: bindings::bpf_prog_type = bindings::bpf_prog_type_BPF_PROG_TYPE_KVM_IO_WORK;
    type Context<'a> = WorkContext<'a>;
    const FIELDS: &'static [Field] = &[
        bpf_ctx_field!(WorkContext<'static>, buf: Rights::Load, Kern.buf),
        bpf_ctx_field!(
            WorkContext<'static>,
            region: Rights::Load,
            Kern.binding => KvmBinding.region
        ),
    ];
    const NO_PERFMON: bool = true;
}

declare_trace! {
    /// A program begins.
    ///
    /// # Safety
    ///
    /// `prog` and `ctx` must be valid.
    unsafe fn kvm_bpf_enter(prog: *const bindings::bpf_prog, ctx: *const Kern);

    /// A program has ended.
    ///
    /// # Safety
    ///
    /// `prog` and `ctx` must be valid.
    unsafe fn kvm_bpf_exit(prog: *const bindings::bpf_prog, ctx: *const Kern, ret: u32);
}

/// Whether somebody looks at one of these.
#[inline(always)]
fn is_traced() -> bool {
    #[cfg(CONFIG_TRACEPOINTS)]
    // SAFETY: A tracepoint has its key for as long as there is code of ours.
    unsafe {
        static_branch_unlikely!(
            bindings::__tracepoint_kvm_bpf_enter,
            bindings::tracepoint,
            key
        ) || static_branch_unlikely!(
            bindings::__tracepoint_kvm_bpf_exit,
            bindings::tracepoint,
            key
        )
    }
    #[cfg(not(CONFIG_TRACEPOINTS))]
    false
}

/// Runs a program, as [`Prog::run()`], between two tracepoints.
#[inline(always)]
pub fn run<T: ProgType>(prog: &Prog<T>, ctx: &mut T::Context<'_>) -> u32
where
    for<'a> T::Context<'a>: ctx::Context<Inner = Kern>,
{
    // Apart, so that an access keeps nothing for the tracepoint behind it.
    if is_traced() {
        return run_traced(prog, ctx);
    }
    prog.run(ctx)
}

#[cold]
#[inline(never)]
fn run_traced<T: ProgType>(prog: &Prog<T>, ctx: &mut T::Context<'_>) -> u32
where
    for<'a> T::Context<'a>: ctx::Context<Inner = Kern>,
{
    // SAFETY: The program is valid, and a context has the layout of its `Inner`.
    unsafe { kvm_bpf_enter(prog.as_raw(), ptr::from_ref(ctx).cast()) };
    let ret = prog.run(ctx);
    // SAFETY: As above.
    unsafe { kvm_bpf_exit(prog.as_raw(), ptr::from_ref(ctx).cast(), ret) };
    ret
}

impl Prog<IoWork> {
    /// Runs the program for the work with that binding. Returns whether it asks to be run again.
    ///
    /// `arg` is what the program finds in `buf`.
    ///
    /// Context: process context, may sleep; on a thread without the VM's memory the program has no
    /// access to it. It is in a read-side section of the VM's SRCU, as a
    /// [`Handler`](super::io::Handler) is.
    #[inline]
    pub fn run_work(&self, arg: u64, binding: &Binding) -> bool {
        let _guard = binding.mem.vm().srcu().read_lock();

        run(self, &mut WorkContext::new(arg, binding)) != 0
    }
}

/// Returns where in KVM's structures programs and this crate find fields.
// Not inlined: it is about the structures that the kernel image was built with.
#[inline(never)]
fn layout() -> [usize; bindings::KVM_BPF_LAYOUT_LEN as usize] {
    [
        offset_of!(KvmVcpu, kvm),
        offset_of!(KvmVcpu, vcpu_id),
        offset_of!(bindings::kvm, slots_lock),
        offset_of!(bindings::kvm, srcu),
        offset_of!(bindings::kvm, buses),
        offset_of!(bindings::kvm, bpf_sealed),
    ]
}

/// Checks that programs and this crate find fields where KVM has them.
///
/// The verifier's part is in the kernel image, and has compiled in where they are; KVM may be a
/// module that was built on its own. A device type is registered only after this.
///
/// # Errors
///
/// `ENOEXEC` if KVM has them elsewhere.
#[inline]
pub fn check_layout() -> Result {
    // SAFETY: KVM's constant.
    let kvms = unsafe { bindings::kvm_bpf_layout };

    // CAST: `usize` has 64 bits where this is built.
    if layout() != kvms.map(|offset| offset as usize) {
        pr_err!("KVM does not belong to this kernel: its structures differ\n");
        return Err(ENOEXEC);
    }
    Ok(())
}

#[no_mangle]
static kvm_io_read_verifier_ops: bindings::bpf_verifier_ops = ctx::verifier_ops::<IoRead>();
#[no_mangle]
static kvm_io_read_prog_ops: bindings::bpf_prog_ops = ctx::prog_ops::<IoRead>();
#[no_mangle]
static kvm_io_write_verifier_ops: bindings::bpf_verifier_ops = ctx::verifier_ops::<IoWrite>();
#[no_mangle]
static kvm_io_write_prog_ops: bindings::bpf_prog_ops = ctx::prog_ops::<IoWrite>();
#[no_mangle]
static kvm_io_work_verifier_ops: bindings::bpf_verifier_ops = ctx::verifier_ops::<IoWork>();
#[no_mangle]
static kvm_io_work_prog_ops: bindings::bpf_prog_ops = ctx::prog_ops::<IoWork>();
