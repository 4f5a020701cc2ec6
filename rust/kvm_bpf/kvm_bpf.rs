// SPDX-License-Identifier: GPL-2.0-only

//! Virtual devices made of BPF programs.
//!
//! A device of type `KVM_DEV_TYPE_BPF` is a set of regions of guest-physical addresses. Each has
//! up to two programs, one that answers the guest's loads and one that takes its stores, on the
//! vCPU's thread inside `KVM_RUN`. Where there is no program, or it returns non-zero, the access
//! goes on to user space.
//!
//! User ABI: `Documentation/virt/kvm/devices/bpf.rst`.
//!
//! # Locks
//!
//! `kvm->lock`, then [`BpfDevice::changing`], then `kvm->slots_lock`. [`BpfDevice::regions`] is
//! innermost. An access takes none of them; a region's programs go away only when no access can be
//! inside any more, and whoever waits for that holds neither of ours.

use kernel::{
    bpf::Prog,
    eventfd::EventFd,
    kvm::{
        device::{
            self,
            Attr,
            Device, //
        },
        io::{
            self,
            Access,
            Handler,
            Range,
            Verdict, //
        },
        irq::Lines,
        prog::{
            self,
            Context,
            IoRead,
            IoWrite, //
        },
        Vm, //
    },
    new_mutex,
    nospec,
    prelude::*,
    sync::{
        aref::ARef,
        Mutex, //
    },
    uapi,
};

module! {
    type: KvmBpf,
    name: "kvm_bpf",
    description: "KVM virtual devices made of BPF programs",
    license: "GPL",
}

struct KvmBpf {
    _type: device::Registration<BpfDevice>,
}

impl kernel::Module for KvmBpf {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        prog::check_layout()?;
        Ok(Self {
            _type: device::Registration::new()?,
        })
    }
}

/// What user space passes as a file descriptor for "none".
const NO_FD: i32 = -1;

/// The programs of a region, and what they act on.
struct Programs {
    irqs: ARef<Lines>,
    read: Option<ARef<Prog<IoRead>>>,
    write: Option<ARef<Prog<IoWrite>>>,
}

impl Programs {
    /// Takes references to the programs that user space has named.
    fn get(region: &uapi::kvm_bpf_user_region, irqs: ARef<Lines>) -> Result<Self> {
        if region.bpf_readfd == NO_FD && region.bpf_writefd == NO_FD {
            return Err(EINVAL);
        }

        // CAST: Negative numbers but `NO_FD` become ones that are never open: `EBADF`.
        Ok(Self {
            irqs,
            read: match region.bpf_readfd {
                NO_FD => None,
                fd => Some(Prog::from_fd(fd as u32)?),
            },
            write: match region.bpf_writefd {
                NO_FD => None,
                fd => Some(Prog::from_fd(fd as u32)?),
            },
        })
    }

    fn may_sleep(&self) -> bool {
        self.read.as_ref().is_some_and(|prog| prog.is_sleepable())
            || self.write.as_ref().is_some_and(|prog| prog.is_sleepable())
    }
}

impl Handler for Programs {
    fn read(&self, access: &Access<'_>) -> Verdict<[u8; 8]> {
        let Some(prog) = &self.read else {
            return Verdict::PassOn;
        };
        // What the program does not store, the guest reads as 0.
        let mut ctx = Context::new(access, &self.irqs, [0; 8]);

        match prog.run(&mut ctx) {
            0 => Verdict::Handled(ctx.data()),
            _ => Verdict::PassOn,
        }
    }

    fn write(&self, access: &Access<'_>, data: [u8; 8]) -> Verdict {
        let Some(prog) = &self.write else {
            return Verdict::PassOn;
        };

        match prog.run(&mut Context::new(access, &self.irqs, data)) {
            0 => Verdict::Handled(()),
            _ => Verdict::PassOn,
        }
    }
}

type Region = io::Registration<Programs>;

#[pin_data(PinnedDrop)]
struct BpfDevice {
    /// Held by who adds and removes regions.
    #[pin]
    changing: Mutex<()>,
    /// By index, and only as long as the largest index in use has needed. Held to look at it, and
    /// never to wait for anything.
    #[pin]
    regions: Mutex<KVec<Option<Region>>>,
    irqs: ARef<Lines>,
}

#[pinned_drop]
impl PinnedDrop for BpfDevice {
    fn drop(self: Pin<&mut Self>) {
        let regions = core::mem::take(&mut *self.regions.lock());

        Region::unregister_all(regions.iter().flatten());
        // After that, so that programs have their interrupts as long as they run. Those that a
        // program has put aside outlive us, but not their eventfds.
        self.irqs.close();
    }
}

impl BpfDevice {
    /// Calls `f` with the place of a region; [`None`] if there is none yet. User space has chosen
    /// the index.
    fn with_slot<R>(&self, index: usize, f: impl FnOnce(&mut Option<Region>) -> R) -> Option<R> {
        let mut regions = self.regions.lock();
        let index = nospec::array_index(index, regions.len())?;

        regions.get_mut(index).map(f)
    }

    fn set_region(&self, vm: &Vm, index: usize, region: &uapi::kvm_bpf_user_region) -> Result {
        if region.size == 0 {
            return self.remove_region(index, region);
        }

        let programs = Programs::get(region, self.irqs.clone())?;
        let range = Range::new(region.addr, region.size)?;

        if programs.may_sleep() {
            prog::prepare_sleepable();
        }

        let changing = self.changing.lock();

        match self.with_slot(index, |slot| slot.as_ref().map(Region::range)) {
            Some(Some(own)) if own == range => {
                let replaced = self
                    .with_slot(index, |slot| {
                        slot.as_ref().ok_or(ENOENT)?.replace(programs)
                    })
                    .ok_or(ENOENT)?;

                drop(changing);
                // This waits, for a program that sleeps as long as that does.
                drop(replaced?);
                Ok(())
            }
            Some(Some(_)) => Err(EEXIST),
            _ => self.add_region(vm, index, range, programs),
        }
    }

    fn add_region(&self, vm: &Vm, index: usize, range: Range, programs: Programs) -> Result {
        {
            let mut regions = self.regions.lock();
            while regions.len() <= index {
                regions.push(None, GFP_KERNEL_ACCOUNT)?;
            }
        }
        let region = Region::new(vm, range, programs)?;

        self.with_slot(index, |slot| *slot = Some(region)).ok_or(ENOMEM)
    }

    fn remove_region(&self, index: usize, region: &uapi::kvm_bpf_user_region) -> Result {
        if region.bpf_readfd != NO_FD || region.bpf_writefd != NO_FD {
            return Err(EINVAL);
        }

        let changing = self.changing.lock();
        let region = self.with_slot(index, Option::take).flatten().ok_or(ENOENT)?;

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

        if irq.eventfd == NO_FD {
            self.irqs.set(index, None).map(drop).ok_or(ENOENT)
        } else {
            drop(self.irqs.set(index, Some(EventFd::from_fd(irq.eventfd)?)));
            Ok(())
        }
    }

    fn region(&self, index: usize) -> Result<uapi::kvm_bpf_user_region> {
        let range = self.with_slot(index, |slot| slot.as_ref().map(Region::range));
        let range = range.flatten().ok_or(ENOENT)?;

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
    Region(usize),
    Irq(usize),
}

impl TryFrom<&Attr<'_>> for Id {
    type Error = Error;

    fn try_from(attr: &Attr<'_>) -> Result<Self> {
        // CAST: The limits are far below `usize::MAX`.
        match (attr.group(), attr.index()) {
            (uapi::KVM_DEV_BPF_ATTR_GROUP_REGION, i) if i < REGIONS => Ok(Self::Region(i as usize)),
            (uapi::KVM_DEV_BPF_ATTR_GROUP_IRQ, i) if i < IRQS => Ok(Self::Irq(i as usize)),
            _ => Err(ENXIO),
        }
    }
}

const REGIONS: u64 = uapi::KVM_DEV_BPF_MAX_REGIONS as u64;
const IRQS: u64 = uapi::KVM_DEV_BPF_MAX_IRQS as u64;

#[vtable]
impl Device for BpfDevice {
    const TYPE: u32 = uapi::kvm_device_type_KVM_DEV_TYPE_BPF;
    const NAME: &'static CStr = c"kvm-bpf";

    fn create(_vm: &Vm) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            changing <- new_mutex!(()),
            regions <- new_mutex!(KVec::new()),
            irqs: Lines::new()?,
        })
    }

    fn set_attr(&self, vm: &Vm, attr: &Attr<'_>) -> Result {
        match Id::try_from(attr)? {
            Id::Region(index) => self.set_region(vm, index, &attr.read()?),
            Id::Irq(index) => self.set_irq(index, &attr.read()?),
        }
    }

    fn get_attr(&self, _vm: &Vm, attr: &Attr<'_>) -> Result {
        match Id::try_from(attr)? {
            Id::Region(index) => attr.write(&self.region(index)?),
            // An eventfd that another process may have set has no number to answer.
            Id::Irq(_) => Err(ENXIO),
        }
    }

    fn has_attr(&self, _vm: &Vm, attr: &Attr<'_>) -> Result {
        Id::try_from(attr).map(|_| ())
    }
}
