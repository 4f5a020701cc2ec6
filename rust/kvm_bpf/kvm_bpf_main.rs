// SPDX-License-Identifier: GPL-2.0-only

//! Virtual devices made of BPF programs.
//!
//! A device of type `KVM_DEV_TYPE_BPF` is a set of regions of guest-physical addresses and, on
//! x86, of ports. Each has up to two programs, one that handles the guest's loads and one that
//! handles its stores, on the vCPU's thread inside `KVM_RUN`. Where there is no program, or it
//! returns non-zero, the access goes on to user space. Further programs run without an access:
//! see [`work`].
//!
//! User ABI: `Documentation/virt/kvm/devices/bpf.rst`.
//!
//! # Locks
//!
//! [`BpfDevice::changing`], then `kvm->slots_lock`, or the lock of who sets work and then
//! [`BpfDevice::perms`]. [`BpfDevice::regions`] is inside them, and outside only what keeps a
//! program from being extended.
//!
//! An access takes none of them. A region's programs go away only when no access can be inside any
//! more, and whoever waits for that holds none of ours.

use kernel::{
    eventfd::EventFd,
    kvm::{
        device::{
            Attr,
            Device, //
        },
        io::{
            self,
            Access,
            Bus,
            Handler,
            Range,
            Verdict, //
        },
        irq::Irqs,
        mem::{
            Window,
            Windows, //
        },
        prog::{
            self,
            Binding,
            Context,
            IoRead,
            IoWrite, //
        },
        Vm, //
    },
    module_kvm_device, new_mutex, nospec,
    prelude::*,
    seq_file::SeqFile,
    sync::{
        aref::ARef,
        Arc,
        Mutex,
        UniqueArc, //
    },
    uapi,
};

mod info;
mod perms;
mod work;

use perms::{
    AnyAttached,
    Attached,
    Perms, //
};
use work::Works;

module_kvm_device! {
    type: BpfDevice,
    name: "kvm_bpf",
    description: "KVM virtual devices made of BPF programs",
    license: "GPL",
}

/// What user space passes as a file descriptor for "none".
const NO_FD: i32 = -1;

/// The programs of a region, and what they act on.
struct Programs {
    binding: Binding,
    read: Option<Attached<IoRead>>,
    write: Option<Attached<IoWrite>>,
}

impl Programs {
    /// Takes references to the programs that user space has named.
    fn get(binding: Binding, region: &uapi::kvm_bpf_user_region) -> Result<Self> {
        if region.bpf_readfd == NO_FD && region.bpf_writefd == NO_FD {
            return Err(EINVAL);
        }

        Ok(Self {
            binding,
            read: Attached::from_fd(region.bpf_readfd)?,
            write: Attached::from_fd(region.bpf_writefd)?,
        })
    }

    fn admit(&self, perms: &Perms) -> Result {
        self.read
            .as_ref()
            .map_or(Ok(()), |prog| prog.admit(perms))?;
        self.write.as_ref().map_or(Ok(()), |prog| prog.admit(perms))
    }

    fn for_each(&self, f: &mut dyn FnMut(&dyn AnyAttached)) {
        if let Some(prog) = &self.read {
            f(prog);
        }
        if let Some(prog) = &self.write {
            f(prog);
        }
    }

    fn may_sleep(&self) -> bool {
        self.read.as_ref().is_some_and(|prog| prog.is_sleepable())
            || self.write.as_ref().is_some_and(|prog| prog.is_sleepable())
    }
}

impl Handler for Programs {
    type OwnerModule = LocalModule;

    fn read(&self, access: &Access<'_>) -> Verdict<[u8; 8]> {
        let Some(prog) = &self.read else {
            return Verdict::PassOn;
        };
        // What the program does not store, the guest reads as 0.
        let mut ctx = Context::new(access, &self.binding, [0; 8]);

        match prog::run(prog, &mut ctx) {
            0 => Verdict::Handled(ctx.data()),
            _ => Verdict::PassOn,
        }
    }

    fn write(&self, access: &Access<'_>, data: [u8; 8]) -> Verdict {
        let Some(prog) = &self.write else {
            return Verdict::PassOn;
        };

        match prog::run(prog, &mut Context::new(access, &self.binding, data)) {
            0 => Verdict::Handled(()),
            _ => Verdict::PassOn,
        }
    }
}

type Region = io::Registration<Programs>;

#[pin_data]
struct BpfDevice {
    /// Held by who adds and removes regions.
    #[pin]
    changing: Mutex<()>,
    /// By index, and only as long as the largest index in use has needed. Held to look at it, and
    /// never to wait for an access, nor for memory.
    #[pin]
    regions: Mutex<KVec<Option<Arc<Region>>>>,
    #[pin]
    works: Works,
    /// Held while interrupts and windows are set. Whoever changes it holds `changing` and the lock
    /// of who sets work, too.
    #[pin]
    perms: Mutex<Perms>,
    irqs: ARef<Irqs>,
    mem: Arc<Windows>,
}

impl BpfDevice {
    /// Calls `f` with the place of a region; [`None`] if there is none yet. User space has chosen
    /// the index.
    fn with_slot<R>(
        &self,
        index: usize,
        f: impl FnOnce(&mut Option<Arc<Region>>) -> R,
    ) -> Option<R> {
        let mut regions = self.regions.lock();
        let index = nospec::array_index(index, regions.len())?;

        regions.get_mut(index).map(f)
    }

    fn region(&self, index: usize) -> Option<Arc<Region>> {
        self.with_slot(index, |slot| slot.clone()).flatten()
    }

    fn set_region(
        &self,
        vm: &Vm,
        bus: Bus,
        index: usize,
        region: &uapi::kvm_bpf_user_region,
    ) -> Result {
        if region.size == 0 {
            return self.remove_region(bus, index, region);
        }

        // CAST: There are few regions.
        let binding = Binding::new(index as u32, self.irqs.clone(), self.mem.clone());
        let programs = Programs::get(binding, region)?;
        let range = Range::new(bus, region.addr, region.size)?;

        if programs.may_sleep() {
            prog::prepare_sleepable();
        }

        let changing = self.changing.lock();
        // So that whoever removes the region drops its last reference, this one goes before the
        // lock does, whatever becomes of the call.
        let old = self.region(index);

        match old {
            Some(region) if region.range() == range => {
                self.check(bus, uapi::KVM_BPF_ALLOW_REPLACE)?;
                programs.admit(&self.perms())?;
                let replaced = region.replace(programs)?;

                drop(region);
                drop(changing);
                // This waits, for a program that sleeps as long as that does.
                drop(replaced);
                Ok(())
            }
            Some(_) => Err(EEXIST),
            None => self.add_region(vm, index, range, programs),
        }
    }

    /// The caller holds `changing`.
    fn add_region(&self, vm: &Vm, index: usize, range: Range, programs: Programs) -> Result {
        self.check(range.bus(), uapi::KVM_BPF_ALLOW_NEW_REGION)?;
        programs.admit(&self.perms())?;
        self.make_room(index)?;
        // First, so that nothing has to be taken back, which would wait.
        let place = UniqueArc::new_uninit(GFP_KERNEL_ACCOUNT)?;
        let region = Arc::from(place.write(Region::new(vm, range, programs)?));

        self.with_slot(index, |slot| *slot = Some(region))
            .ok_or(ENOMEM)
    }

    /// Has a place for a region. The caller holds `changing`.
    fn make_room(&self, index: usize) -> Result {
        if index < self.regions.lock().len() {
            return Ok(());
        }
        let mut longer = KVec::with_capacity(index + 1, GFP_KERNEL_ACCOUNT)?;
        while longer.len() <= index {
            longer.push_within_capacity(None)?;
        }
        let mut regions = self.regions.lock();

        for (new, old) in longer.iter_mut().zip(regions.iter_mut()) {
            core::mem::swap(new, old);
        }
        core::mem::swap(&mut *regions, &mut longer);
        drop(regions);
        Ok(())
    }

    fn remove_region(&self, bus: Bus, index: usize, region: &uapi::kvm_bpf_user_region) -> Result {
        if region.bpf_readfd != NO_FD || region.bpf_writefd != NO_FD {
            return Err(EINVAL);
        }

        let changing = self.changing.lock();

        self.check(bus, uapi::KVM_BPF_ALLOW_REMOVE)?;
        let region = self
            .with_slot(index, |slot| {
                slot.take_if(|region| region.range().bus() == bus)
            })
            .flatten()
            .ok_or(ENOENT)?;

        // Once a later call sees the index free, so is the range.
        region.unlink();
        drop(changing);
        // This waits.
        drop(region);
        Ok(())
    }

    fn set_irq(&self, index: usize, irq: &uapi::kvm_bpf_user_irq) -> Result {
        if irq.flags != 0 {
            return Err(EINVAL);
        }

        let eventfd = match irq.eventfd {
            NO_FD => None,
            fd => Some(EventFd::from_fd(fd)?),
        };
        let removes = eventfd.is_none();
        let perms = self.perms.lock();

        perms.check(uapi::KVM_BPF_ALLOW_SET_IRQ)?;
        let old = self.irqs.set(index, eventfd);

        drop(perms);
        if removes && old.is_none() {
            return Err(ENOENT);
        }
        // This waits.
        drop(old);
        Ok(())
    }

    fn set_mem(&self, index: usize, mem: &uapi::kvm_bpf_user_mem) -> Result {
        if mem.pad != 0 {
            return Err(EINVAL);
        }
        if mem.size == 0 {
            if mem.flags != 0 {
                return Err(EINVAL);
            }
            return self.set_window(index, None);
        }
        let window = Window::new(mem.addr, mem.size, mem.flags)?;

        self.set_window(index, Some(window))
    }

    fn set_window(&self, index: usize, window: Option<Window>) -> Result {
        let perms = self.perms.lock();

        perms.check(uapi::KVM_BPF_ALLOW_SET_MEM)?;
        let old = self.mem.set(index, window)?;

        drop(perms);
        // This waits.
        drop(old);
        Ok(())
    }

    /// The permissions. The caller holds `changing`, so they stay.
    fn perms(&self) -> Perms {
        *self.perms.lock()
    }

    /// Fails unless user space may do that with a region. The caller holds `changing`.
    fn check(&self, bus: Bus, allow: u32) -> Result {
        let ports = match bus {
            Bus::Mmio => 0,
            Bus::Pio => uapi::KVM_BPF_ALLOW_SET_PIO,
        };

        self.perms().check(allow | ports)
    }

    fn set_perms(&self, to: &uapi::kvm_bpf_user_perms) -> Result {
        let _changing = self.changing.lock();

        self.works.unchanged(|| self.narrow_perms(to))
    }

    /// The caller holds `changing` and the lock of who sets work.
    fn narrow_perms(&self, to: &uapi::kvm_bpf_user_perms) -> Result {
        let mut perms = self.perms.lock();
        let new = perms.narrowed(to)?;
        let mut result = Ok(());
        let mut count = 0;

        self.for_each_program(&mut |prog| {
            count += 1;
            if prog.check(&new).is_err() {
                result = Err(EBUSY);
            }
        });
        result?;

        if new.not_extensible() && !perms.not_extensible() {
            // All or none.
            let mut unextended = KVec::with_capacity(count, GFP_KERNEL_ACCOUNT)?;

            self.for_each_program(&mut |prog| {
                result = result.and_then(|()| {
                    unextended.push_within_capacity(prog.forbid_extension()?)?;
                    Ok(())
                });
            });
            result?;
            let mut unextended = unextended.into_iter();

            self.for_each_program(&mut |prog| {
                if let Some(unextended) = unextended.next() {
                    prog.keep(unextended);
                }
            });
        }
        *perms = new;
        Ok(())
    }

    /// Calls `f` with each program, always in the same order. The caller holds `changing` and the
    /// lock of who sets work.
    fn for_each_program(&self, f: &mut dyn FnMut(&dyn AnyAttached)) {
        for region in self.regions.lock().iter().flatten() {
            region.with_handler(|programs| programs.for_each(f));
        }
        self.works.for_each(f);
    }

    fn get_mem(&self, index: usize) -> Result<uapi::kvm_bpf_user_mem> {
        let window = self.mem.get(index).ok_or(ENOENT)?;

        Ok(uapi::kvm_bpf_user_mem {
            addr: window.start(),
            size: window.size(),
            flags: window.rights(),
            pad: 0,
        })
    }

    fn get_region(&self, bus: Bus, index: usize) -> Result<uapi::kvm_bpf_user_region> {
        let range = self.with_slot(index, |slot| slot.as_ref().map(|region| region.range()));
        let range = range
            .flatten()
            .filter(|range| range.bus() == bus)
            .ok_or(ENOENT)?;

        // Programs have no file descriptor to return; `bpf(2)` lists them.
        Ok(uapi::kvm_bpf_user_region {
            addr: range.start(),
            size: range.size(),
            bpf_readfd: NO_FD,
            bpf_writefd: NO_FD,
        })
    }
}

/// An attribute of ours.
enum Id {
    /// Regions have one index space, whatever their bus.
    Region(Bus, usize),
    Irq(usize),
    Mem(usize),
    Work(usize),
    Run(usize),
    Perms,
    Info(usize),
}

impl TryFrom<&Attr<'_>> for Id {
    type Error = Error;

    fn try_from(attr: &Attr<'_>) -> Result<Self> {
        // CAST: The limits are far below `usize::MAX`.
        match (attr.group(), attr.index()) {
            (uapi::KVM_DEV_BPF_ATTR_GROUP_REGION, i) if i < REGIONS => {
                Ok(Self::Region(Bus::Mmio, i as usize))
            }
            (uapi::KVM_DEV_BPF_ATTR_GROUP_PIO, i) if i < REGIONS && Bus::HAS_PORTS => {
                Ok(Self::Region(Bus::Pio, i as usize))
            }
            (uapi::KVM_DEV_BPF_ATTR_GROUP_IRQ, i) if i < IRQS => Ok(Self::Irq(i as usize)),
            (uapi::KVM_DEV_BPF_ATTR_GROUP_MEM, i) if i < MEMS => Ok(Self::Mem(i as usize)),
            (uapi::KVM_DEV_BPF_ATTR_GROUP_WORK, i) if i < WORKS => Ok(Self::Work(i as usize)),
            (uapi::KVM_DEV_BPF_ATTR_GROUP_RUN, i) if i < WORKS => Ok(Self::Run(i as usize)),
            (uapi::KVM_DEV_BPF_ATTR_GROUP_PERMS, 0) => Ok(Self::Perms),
            (uapi::KVM_DEV_BPF_ATTR_GROUP_INFO, i) if i < REGIONS => Ok(Self::Info(i as usize)),
            _ => Err(ENXIO),
        }
    }
}

const REGIONS: u64 = uapi::KVM_DEV_BPF_MAX_REGIONS as u64;
const IRQS: u64 = uapi::KVM_DEV_BPF_MAX_IRQS as u64;
const MEMS: u64 = uapi::KVM_DEV_BPF_MAX_MEMS as u64;
const WORKS: u64 = uapi::KVM_DEV_BPF_MAX_WORKS as u64;

#[vtable]
impl Device for BpfDevice {
    const TYPE: u32 = uapi::kvm_device_type_KVM_DEV_TYPE_BPF;
    const NAME: &'static CStr = c"kvm-bpf";

    fn create(vm: &Vm) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            _: {
                if vm.is_bpf_sealed() {
                    return Err(EPERM);
                }
            },
            changing <- new_mutex!(()),
            regions <- new_mutex!(KVec::new()),
            irqs: Irqs::new()?,
            mem: Arc::pin_init(Windows::new(vm), GFP_KERNEL_ACCOUNT)?,
            works <- Works::new(irqs.clone(), mem.clone()),
            perms <- new_mutex!(Perms::ALL),
        })
    }

    fn set_attr(&self, vm: &Vm, attr: &Attr<'_>) -> Result {
        match Id::try_from(attr)? {
            Id::Region(bus, index) => self.set_region(vm, bus, index, &attr.read()?),
            Id::Irq(index) => self.set_irq(index, &attr.read()?),
            Id::Mem(index) => self.set_mem(index, &attr.read()?),
            Id::Work(index) => self.works.set(index, &attr.read()?, &self.perms),
            Id::Run(index) => {
                let run = attr.read()?;

                self.works.run(index, &run, &self.perms)
            }
            Id::Perms => self.set_perms(&attr.read()?),
            Id::Info(_) => Err(ENXIO),
        }
    }

    fn get_attr(&self, _vm: &Vm, attr: &Attr<'_>) -> Result {
        match Id::try_from(attr)? {
            Id::Region(bus, index) => attr.write(&self.get_region(bus, index)?),
            Id::Mem(index) => attr.write(&self.get_mem(index)?),
            Id::Perms => {
                let perms = *self.perms.lock();

                attr.write(&perms.to_user())
            }
            Id::Info(index) => attr.write(&self.info(index).ok_or(ENOENT)?),
            // An eventfd that another process may have set has no number to return.
            Id::Irq(_) | Id::Work(_) | Id::Run(_) => Err(ENXIO),
        }
    }

    fn quiesce(&self) {
        let regions = core::mem::take(&mut *self.regions.lock());

        Region::unregister_all(regions.iter().flatten().map(|region| &**region));
        self.works.clear();
        // After that, so that programs have their interrupts as long as they run. Those that a
        // program has stored outlive us, but not their eventfds.
        self.irqs.close();
    }

    fn has_attr(&self, _vm: &Vm, attr: &Attr<'_>) -> Result {
        Id::try_from(attr).map(|_| ())
    }

    fn show_fdinfo(&self, vm: &Vm, m: &SeqFile) {
        self.show(vm, m);
    }
}
