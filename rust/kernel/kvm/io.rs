// SPDX-License-Identifier: GPL-2.0

//! Handlers of guest accesses to device registers.
//!
//! C header: [`include/kvm/iodev.h`](srctree/include/kvm/iodev.h).
//!
//! A [`Handler`] takes the accesses of a [`Range`] of addresses on a [`Bus`] as long as its
//! [`Registration`] lives. Another handler of the same type can take its place at any time, while
//! vCPUs run: see [`Registration::replace()`].

pub use super::published::Replaced;
use super::{
    published::Published,
    Vcpu,
    Vm, //
};
use crate::{
    bindings,
    error::to_result,
    module::{
        ModuleMetadata,
        ModuleRef, //
    },
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc, //
    },
    types::Opaque,
};
use core::{
    marker::PhantomData,
    ptr, //
};

/// A bus of a VM: a kind of address that its guest can access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bus {
    /// Guest-physical addresses (memory-mapped I/O).
    Mmio,
    /// Ports, where [`Bus::HAS_PORTS`].
    Pio,
}

impl Bus {
    /// Whether guests have ports, with instructions of their own for them.
    pub const HAS_PORTS: bool = cfg!(CONFIG_X86);

    /// Returns the address up to which ranges may reach, itself not included.
    ///
    /// An access that begins below does not wrap around.
    #[inline]
    const fn end(self) -> u64 {
        match self {
            Self::Mmio => u64::MAX - 7,
            Self::Pio if Self::HAS_PORTS => 0x1_0000,
            Self::Pio => 0,
        }
    }

    /// Returns KVM's number for the bus.
    #[inline]
    const fn number(self) -> bindings::kvm_bus {
        match self {
            Self::Mmio => bindings::kvm_bus_KVM_MMIO_BUS,
            Self::Pio => bindings::kvm_bus_KVM_PIO_BUS,
        }
    }
}

/// A range of addresses on a bus.
///
/// # Invariants
///
/// `len` is at least 1 and at most `i32::MAX`; `start + len` does not overflow, and is no more than
/// the end of `bus`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    start: u64,
    len: u32,
    bus: Bus,
}

impl Range {
    /// The `size` bytes, or ports, from `start` on.
    ///
    /// # Errors
    ///
    /// `ERANGE` if the range is empty, wraps around, is longer than `i32::MAX` bytes, which is all
    /// that KVM's buses can express, or leaves `bus`.
    pub const fn new(bus: Bus, start: u64, size: u64) -> Result<Self> {
        if size == 0 || size > i32::MAX as u64 {
            return Err(ERANGE);
        }
        match start.checked_add(size) {
            // INVARIANT: Just checked. CAST: `size` fits.
            Some(end) if end <= bus.end() => Ok(Self {
                start,
                len: size as u32,
                bus,
            }),
            _ => Err(ERANGE),
        }
    }

    /// Returns the bus.
    #[inline]
    pub const fn bus(&self) -> Bus {
        self.bus
    }

    /// Returns the first address.
    #[inline]
    pub const fn start(&self) -> u64 {
        self.start
    }

    /// Returns the length in bytes.
    #[inline]
    pub const fn size(&self) -> u64 {
        self.len as u64
    }
}

/// One access by a guest.
pub struct Access<'a> {
    /// The vCPU that does it. The caller is on this vCPU's thread.
    pub vcpu: &'a Vcpu,
    /// Where, in bytes from the start of the range. The whole access lies inside the range.
    pub offset: u64,
    /// The length in bytes, from 1 to 8; not always a power of two.
    pub len: u8,
}

/// What became of an access.
pub enum Verdict<T = ()> {
    /// Done.
    Handled(T),
    /// Not for this handler: goes to user space.
    PassOn,
}

/// Handles accesses of a range of addresses.
///
/// Context: process context, on the vCPU's thread, in a read-side section of the VM's SRCU. May
/// sleep, but holds up changes of the VM's memory slots and buses, and must not make any. Several
/// vCPUs may call at a time.
///
/// # Examples
///
/// A register of 8 bytes that reads as what was last stored to it, by accesses of the whole. It is
/// not built, as KVM may be a module:
///
/// ```ignore
/// use kernel::{
///     kvm::{
///         io::{Access, Bus, Handler, Range, Registration, Verdict},
///         Vm,
///     },
///     prelude::*,
///     sync::atomic::{Atomic, Relaxed},
/// };
///
/// struct Latch(Atomic<u64>);
///
/// impl Handler for Latch {
///     type OwnerModule = crate::LocalModule;
///
///     fn read(&self, _access: &Access<'_>) -> Verdict<[u8; 8]> {
///         Verdict::Handled(self.0.load(Relaxed).to_le_bytes())
///     }
///
///     fn write(&self, _access: &Access<'_>, data: [u8; 8]) -> Verdict {
///         self.0.store(u64::from_le_bytes(data), Relaxed);
///         Verdict::Handled(())
///     }
/// }
///
/// fn add_latch(vm: &Vm) -> Result<Registration<Latch>> {
///     let range = Range::new(Bus::Mmio, 0x1000_0000, 8)?;
///
///     Registration::new(vm, range, Latch(Atomic::new(0)))
/// }
/// ```
pub trait Handler: Send + Sync + 'static {
    /// The module whose code this is, `crate::LocalModule`. The module stays while a handler is
    /// registered.
    type OwnerModule: ModuleMetadata;

    /// Handles a load. The guest sees the first [`Access::len`] bytes, in memory order.
    fn read(&self, access: &Access<'_>) -> Verdict<[u8; 8]>;

    /// Takes a store. `data` is in memory order, 0 past [`Access::len`].
    fn write(&self, access: &Access<'_>, data: [u8; 8]) -> Verdict;
}

/// What the bus points to.
///
/// # Invariants
///
/// - The bus has a reference to `self` until `destroyed` is set, or [`Registration::drop()`] takes
///   it over.
/// - If `quiet` is set, no vCPU is or will be inside.
#[repr(C)]
struct Io<T: Handler> {
    dev: Opaque<bindings::kvm_io_device>,
    range: Range,
    handler: Published<T>,
    destroyed: Atomic<bool>,
    quiet: Atomic<bool>,
}

// SAFETY: `dev` is only read once it is initialised, and `T` is `Send` and `Sync`.
unsafe impl<T: Handler> Send for Io<T> {}
// SAFETY: As above.
unsafe impl<T: Handler> Sync for Io<T> {}

/// A handler on a bus of a VM. The handler's module stays while this exists.
///
/// Dropping it takes the handler off the bus, waits until no vCPU is inside, and drops it. It takes
/// the VM's `slots_lock` and so must not be dropped by a [`Handler`].
///
/// # Invariants
///
/// `io` has been registered on the bus of `vm` that its range is on.
pub struct Registration<T: Handler> {
    io: Arc<Io<T>>,
    vm: ARef<Vm>,
    // Last, so that it is dropped last.
    _module: ModuleRef,
}

impl<T: Handler> Registration<T> {
    /// Puts `handler` on the bus of `vm` that `range` is on. It may be called before this returns.
    ///
    /// The range is exclusive: as long as the handler is registered, nothing else registers at any
    /// of its addresses.
    ///
    /// Takes the VM's `slots_lock`.
    ///
    /// # Errors
    ///
    /// - `EEXIST`: something on that bus has an address of `range`.
    /// - `ENOSPC`: the bus is full.
    /// - `ENOMEM`: out of memory, or the bus has been dissolved for lack of it.
    /// - `ENODEV`: the module is being unloaded.
    pub fn new(vm: &Vm, range: Range, handler: T) -> Result<Self> {
        let module = ModuleRef::new::<T::OwnerModule>()?;
        let handler = KBox::new(handler, GFP_KERNEL_ACCOUNT)?;
        let io = Arc::new(
            Io {
                dev: Opaque::new(bindings::kvm_io_device {
                    ops: IoVTable::<T>::build(),
                }),
                range,
                handler: Published::new(handler),
                destroyed: Atomic::new(false),
                quiet: Atomic::new(false),
            },
            GFP_KERNEL_ACCOUNT,
        )?;

        let _guard = vm.slots_lock().lock();
        let bus_ref = io.clone().into_raw();
        // SAFETY: `slots_lock` is held. `dev` is the first field of `Io`, which stays where it is
        // and valid while the bus has `bus_ref`. The length fits by the invariant of `Range`.
        let ret = unsafe {
            bindings::kvm_io_bus_register_dev(
                vm.as_raw(),
                range.bus.number(),
                range.start,
                range.len as c_int,
                bus_ref.cast_mut().cast(),
            )
        };
        if let Err(err) = to_result(ret) {
            // SAFETY: From `into_raw()` above, and the bus has not taken it.
            drop(unsafe { Arc::from_raw(bus_ref) });
            return Err(err);
        }

        // INVARIANT: Registered just now.
        Ok(Self {
            io,
            vm: vm.into(),
            _module: module,
        })
    }

    /// Returns the addresses that the handler is registered for.
    #[inline]
    pub fn range(&self) -> Range {
        self.io.range
    }

    /// Calls `f` with the present handler.
    ///
    /// Context: process context. `f` is in a read-side section of the VM's SRCU.
    #[inline]
    pub fn with_handler<R>(&self, f: impl FnOnce(&T) -> R) -> R {
        let _guard = self.vm.srcu().read_lock();

        // SAFETY: The guard exists until `f` has returned.
        f(unsafe { self.io.handler.get() })
    }

    /// Has `handler` take the place of the present one, which is returned.
    ///
    /// Each access is handled by the one or the other, and none is missed.
    ///
    /// # Errors
    ///
    /// `ENOMEM`: out of memory, or the bus has been dissolved for lack of it.
    pub fn replace(&self, handler: T) -> Result<Replaced<T>> {
        // SAFETY: The VM is valid. Only whether there is a bus matters, and one that has dissolved
        // does not come back.
        let bus = unsafe {
            (&raw const (*self.vm.as_raw()).buses[self.io.range.bus.number() as usize])
                .read_volatile()
        };
        if bus.is_null() {
            return Err(ENOMEM);
        }
        let new = KBox::new(handler, GFP_KERNEL_ACCOUNT)?;

        // SAFETY: The handler is called in read-side sections of this VM's SRCU.
        Ok(unsafe { self.io.handler.replace(&self.vm, new) })
    }

    /// Takes the handler off the bus, and does not wait for vCPUs that are inside.
    ///
    /// Its range is free when this returns. Takes the VM's `slots_lock`.
    pub fn unlink(&self) {
        let _guard = self.vm.slots_lock().lock();

        // It fails only for lack of memory, after it has dissolved the bus and called the
        // destructor of everything on it; and does nothing where `io` is off the bus already.
        //
        // SAFETY: `slots_lock` is held, and `io` is what has been registered.
        unsafe {
            bindings::kvm_io_bus_unlink_dev(
                self.vm.as_raw(),
                self.io.range.bus.number(),
                Arc::as_ptr(&self.io).cast_mut().cast(),
            )
        };
    }

    /// Takes handlers of one VM off the bus, and waits once until no vCPU is inside any of them.
    ///
    /// Dropping them does not wait then.
    pub fn unregister_all<'a>(regs: impl Iterator<Item = &'a Self> + Clone) {
        let Some(first) = regs.clone().next() else {
            return;
        };
        let regs = regs.filter(|reg| ptr::eq(&*reg.vm, &*first.vm));

        for reg in regs.clone() {
            reg.unlink();
        }
        first.vm.srcu().synchronize_expedited();
        for reg in regs {
            // INVARIANT: It is off the bus since before the grace period.
            reg.io.quiet.store(true, Relaxed);
        }
    }
}

impl<T: Handler> Drop for Registration<T> {
    fn drop(&mut self) {
        self.unlink();
        if !self.io.quiet.load(Relaxed) {
            self.vm.srcu().synchronize_expedited();
        }
        // A destructor that has been called is done, as `unlink()` has had the lock.
        if !self.io.destroyed.load(Relaxed) {
            // SAFETY: By the type invariants of `Io` it is the bus's reference, from `into_raw()`
            // in `new()`; the bus has no reader now.
            drop(unsafe { Arc::from_raw(Arc::as_ptr(&self.io)) });
        }
    }
}

/// Reads the bytes of an access; the others are 0.
///
/// The usual lengths take one load, and none takes a call, around which the callback would have to
/// save its registers.
///
/// # Safety
///
/// `from` must be valid for reads of `len` bytes, at most 8.
#[inline(always)]
unsafe fn load(from: *const u8, len: u8) -> [u8; 8] {
    // SAFETY: By the safety requirements; arrays of bytes need no alignment.
    let low_first = unsafe {
        match len {
            4 => u32::from_le_bytes(from.cast::<[u8; 4]>().read()).into(),
            8 => u64::from_le_bytes(from.cast::<[u8; 8]>().read()),
            _ => {
                let mut bytes = [0; 8];
                copy(from, bytes.as_mut_ptr(), len);
                u64::from_le_bytes(bytes)
            }
        }
    };

    low_first.to_le_bytes()
}

/// Writes the bytes of an access; as [`load()`].
///
/// # Safety
///
/// `to` must be valid for writes of `len` bytes, at most 8.
#[inline(always)]
unsafe fn store(bytes: [u8; 8], to: *mut u8, len: u8) {
    let [b0, b1, b2, b3, ..] = bytes;

    // SAFETY: By the safety requirements; arrays of bytes need no alignment.
    unsafe {
        match len {
            4 => to.cast::<[u8; 4]>().write([b0, b1, b2, b3]),
            8 => to.cast::<[u8; 8]>().write(bytes),
            _ => copy(bytes.as_ptr(), to, len),
        }
    }
}

/// Copies less than 8 bytes, in pieces of fixed size.
///
/// # Safety
///
/// `from` must be valid for reads of `len` bytes and `to` for writes, and they must not overlap.
#[inline(always)]
unsafe fn copy(from: *const u8, to: *mut u8, len: u8) {
    let len = usize::from(len);

    macro_rules! piece {
        ($size:literal) => {
            if len & $size != 0 {
                // Behind the larger pieces.
                let at = len & !(2 * $size - 1);
                // SAFETY: By the safety requirements.
                unsafe {
                    to.add(at)
                        .cast::<[u8; $size]>()
                        .write(from.add(at).cast::<[u8; $size]>().read())
                };
            }
        };
    }

    piece!(4);
    piece!(2);
    piece!(1);
}

struct IoVTable<T: Handler>(PhantomData<T>);

impl<T: Handler> IoVTable<T> {
    /// # Safety
    ///
    /// As a callback of a bus: `vcpu` is the current thread's, the VM's SRCU is held for reading,
    /// and `this` is the `dev` of an [`Io<T>`] on the bus. `len` bytes at `val` are valid for
    /// writes, if it is at most 8.
    unsafe extern "C" fn read(
        vcpu: *mut bindings::kvm_vcpu,
        this: *mut bindings::kvm_io_device,
        addr: bindings::gpa_t,
        len: c_int,
        val: *mut c_void,
    ) -> c_int {
        // Where the length is a constant, nothing has to remember it while the handler runs.
        //
        // SAFETY: By the safety requirements.
        unsafe {
            match len {
                4 => Self::read_bytes(vcpu, this, addr, 4, val),
                8 => Self::read_bytes(vcpu, this, addr, 8, val),
                _ => Self::read_odd(vcpu, this, addr, len, val),
            }
        }
    }

    /// # Safety
    ///
    /// As [`Self::read()`].
    #[inline(never)]
    unsafe fn read_odd(
        vcpu: *mut bindings::kvm_vcpu,
        this: *mut bindings::kvm_io_device,
        addr: bindings::gpa_t,
        len: c_int,
        val: *mut c_void,
    ) -> c_int {
        // SAFETY: By the safety requirements.
        unsafe { Self::read_bytes(vcpu, this, addr, len, val) }
    }

    /// # Safety
    ///
    /// As [`Self::read()`].
    #[inline(always)]
    unsafe fn read_bytes(
        vcpu: *mut bindings::kvm_vcpu,
        this: *mut bindings::kvm_io_device,
        addr: bindings::gpa_t,
        len: c_int,
        val: *mut c_void,
    ) -> c_int {
        // SAFETY: By the safety requirements.
        let Some((handler, access)) = (unsafe { Self::access(vcpu, this, addr, len) }) else {
            return EOPNOTSUPP.to_errno();
        };

        match handler.read(&access) {
            Verdict::Handled(bytes) => {
                // SAFETY: By the safety requirements; `access.len` is `len`. `val` may be in a
                // page that user space sees and writes, so it is never borrowed.
                unsafe { store(bytes, val.cast(), access.len) };
                0
            }
            Verdict::PassOn => EOPNOTSUPP.to_errno(),
        }
    }

    /// # Safety
    ///
    /// As [`Self::read()`], but `val` is valid for reads.
    unsafe extern "C" fn write(
        vcpu: *mut bindings::kvm_vcpu,
        this: *mut bindings::kvm_io_device,
        addr: bindings::gpa_t,
        len: c_int,
        val: *const c_void,
    ) -> c_int {
        // SAFETY: By the safety requirements.
        let Some((handler, access)) = (unsafe { Self::access(vcpu, this, addr, len) }) else {
            return EOPNOTSUPP.to_errno();
        };

        // SAFETY: By the safety requirements; `access.len` is `len`. `val` may be in a page that
        // user space sees and writes, so it is never borrowed. Whatever is read is data.
        let data = unsafe { load(val.cast(), access.len) };

        match handler.write(&access, data) {
            Verdict::Handled(()) => 0,
            Verdict::PassOn => EOPNOTSUPP.to_errno(),
        }
    }

    /// Returns the handler and the access for it, or [`None`] for a length that none handles, and
    /// for an access that is not inside the range.
    ///
    /// # Safety
    ///
    /// As [`Self::read()`], but for `val`. The references are valid until the callback returns.
    unsafe fn access<'a>(
        vcpu: *mut bindings::kvm_vcpu,
        this: *mut bindings::kvm_io_device,
        addr: bindings::gpa_t,
        len: c_int,
    ) -> Option<(&'a T, Access<'a>)> {
        let 1..=8 = len else {
            return None;
        };
        // SAFETY: By the safety requirements; `dev` is the first field of `Io`, and the bus has a
        // reference to it until its readers are gone.
        let io = unsafe { &*this.cast::<Io<T>>() };
        let offset = addr.wrapping_sub(io.range.start);

        // The bus takes an access behind the range for one inside if it wraps around, as that of a
        // guest which names addresses itself may (SEV-ES).
        if offset >= io.range.size() {
            return None;
        }
        Some((
            // SAFETY: We are in a read-side section of the VM's SRCU, and `io` lives as long.
            unsafe { io.handler.get() },
            Access {
                // SAFETY: By the safety requirements.
                vcpu: unsafe { Vcpu::from_raw(vcpu) },
                offset,
                // CAST: Just checked.
                len: len as u8,
            },
        ))
    }

    /// # Safety
    ///
    /// `this` must be the `dev` of an [`Io<T>`] that leaves the bus and has no reader left.
    unsafe extern "C" fn destructor(this: *mut bindings::kvm_io_device) {
        // SAFETY: By the safety requirements this is what `Registration::new()` gave the bus.
        let io = unsafe { Arc::from_raw(this.cast_const().cast::<Io<T>>()) };

        // INVARIANT: The bus's reference is dropped below.
        io.destroyed.store(true, Relaxed);
    }

    const VTABLE: bindings::kvm_io_device_ops = bindings::kvm_io_device_ops {
        read: Some(Self::read),
        write: Some(Self::write),
        destructor: Some(Self::destructor),
        exclusive: true,
    };

    const fn build() -> &'static bindings::kvm_io_device_ops {
        &Self::VTABLE
    }
}

#[cfg(CONFIG_RUST_KVM_KUNIT_TEST)]
#[macros::kunit_tests(rust_kvm_io)]
mod tests {
    use super::*;

    const ANSWER: [u8; 8] = [1, 2, 3, 4, 5, 6, 7, 8];

    /// Gives the same answer to all reads, and keeps what was written last.
    struct Latch(Atomic<u64>);

    impl Handler for Latch {
        type OwnerModule = crate::LocalModule;

        fn read(&self, _: &Access<'_>) -> Verdict<[u8; 8]> {
            Verdict::Handled(ANSWER)
        }

        fn write(&self, _: &Access<'_>, data: [u8; 8]) -> Verdict {
            self.0.store(u64::from_ne_bytes(data), Relaxed);
            Verdict::Handled(())
        }
    }

    /// A latch of 4096 bytes that no bus knows.
    fn latch_at(start: u64) -> Result<Io<Latch>> {
        Ok(Io {
            dev: Opaque::uninit(),
            range: Range::new(Bus::Mmio, start, 0x1000)?,
            handler: Published::new(KBox::new(Latch(Atomic::new(0)), GFP_KERNEL)?),
            destroyed: Atomic::new(false),
            quiet: Atomic::new(false),
        })
    }

    #[test]
    fn as_many_bytes_as_the_access_has() -> Result {
        const AROUND: u8 = 0x5a;

        let mut vcpu = KBox::<bindings::kvm_vcpu>::new_uninit(GFP_KERNEL)?;
        let io = latch_at(0x1000)?;
        // SAFETY: `io` lives, and nobody replaces its handler.
        let latch = unsafe { io.handler.get() };
        let this: *mut bindings::kvm_io_device = ptr::from_ref(&io).cast_mut().cast();

        for len in 0..=9 {
            let handled = (1..=8).contains(&len);
            let n = if handled { len as usize } else { 0 };
            let ret = if handled { 0 } else { EOPNOTSUPP.to_errno() };
            let mut val = [AROUND; 16];
            let mut wanted = val;

            wanted[4..4 + n].copy_from_slice(&ANSWER[..n]);
            // SAFETY: `this` is `dev` of `io`, `val` has 8 bytes from there on, and `Latch` does
            // not look at the vCPU, whose bytes may be any.
            let got = unsafe {
                IoVTable::<Latch>::read(
                    vcpu.as_mut_ptr(),
                    this,
                    0x1000,
                    len,
                    val[4..].as_mut_ptr().cast(),
                )
            };
            assert_eq!(got, ret);
            assert_eq!(val, wanted);

            latch.0.store(u64::MAX, Relaxed);
            let mut data = [0; 8];
            data[..n].fill(AROUND);
            // SAFETY: As above.
            let got = unsafe {
                IoVTable::<Latch>::write(
                    vcpu.as_mut_ptr(),
                    this,
                    0x1000,
                    len,
                    [AROUND; 8].as_ptr().cast(),
                )
            };
            let wanted = if handled {
                u64::from_ne_bytes(data)
            } else {
                u64::MAX
            };
            assert_eq!(got, ret);
            assert_eq!(latch.0.load(Relaxed), wanted);
        }
        Ok(())
    }

    #[test]
    fn accesses_that_wrap_around() -> Result {
        let mut vcpu = KBox::<bindings::kvm_vcpu>::new_uninit(GFP_KERNEL)?;
        let io = latch_at(0)?;
        let this: *mut bindings::kvm_io_device = ptr::from_ref(&io).cast_mut().cast();

        for (addr, handled) in [
            (0, true),
            (0xffc, true),
            (0x1000, false),
            (u64::MAX - 1, false),
        ] {
            let mut val = [0_u8; 8];
            // SAFETY: `this` is `dev` of `io`, `val` has 8 bytes, and `Latch` does not look at the
            // vCPU, whose bytes may be any.
            let got = unsafe {
                IoVTable::<Latch>::read(vcpu.as_mut_ptr(), this, addr, 4, val.as_mut_ptr().cast())
            };
            let wanted = if handled {
                (0, [1, 2, 3, 4, 0, 0, 0, 0])
            } else {
                (EOPNOTSUPP.to_errno(), [0; 8])
            };
            assert_eq!((got, val), wanted);
        }
        Ok(())
    }

    #[test]
    fn ranges_that_kvm_cannot_express() {
        for bus in [Bus::Mmio, Bus::Pio] {
            assert_eq!(Range::new(bus, 0, 0), Err(ERANGE));
            assert_eq!(Range::new(bus, 0, 1 << 31), Err(ERANGE));
            // The low 32 bits alone would do.
            assert_eq!(Range::new(bus, 0, (1 << 32) + 4096), Err(ERANGE));
            assert_eq!(Range::new(bus, u64::MAX, 1), Err(ERANGE));
            assert_eq!(Range::new(bus, u64::MAX - 4095, 4096), Err(ERANGE));
        }
        assert_eq!(
            Range::new(Bus::Mmio, u64::MAX - 6 - 4096, 4096),
            Err(ERANGE)
        );
        assert!(Range::new(Bus::Mmio, u64::MAX - 7 - 4096, 4096).is_ok());
        assert!(Range::new(Bus::Mmio, 0, (1 << 31) - 1).is_ok());
    }

    #[test]
    fn ports_where_there_are_some() {
        const PORTS: u64 = 0x1_0000;

        for (start, size) in [(0, 1), (0, PORTS), (PORTS - 1, 1)] {
            assert_eq!(Range::new(Bus::Pio, start, size).is_ok(), Bus::HAS_PORTS);
        }
        for (start, size) in [(0, PORTS + 1), (PORTS - 1, 2), (PORTS, 1), (1 << 32, 1)] {
            assert_eq!(Range::new(Bus::Pio, start, size), Err(ERANGE));
        }
    }
}
