// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The KVM device: regions of programs, and interrupts.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::{fmt, io};

use kvm_bindings::{kvm_create_device, kvm_device_attr};
use kvm_ioctls::{DeviceFd, VmFd};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

use crate::image::{self, Image, OpenImage, Work};
use crate::maps::{MapChanges, OnLoss};
use crate::note::{Note, Range, Space};
use crate::page::{NoSlot, ReadPage};
use crate::state::{self, Clocks, State};
use crate::uapi::{
    KVM_BPF_MEM_READ, KVM_BPF_MEM_WRITE, KVM_DEV_BPF_ATTR_GROUP_IRQ, KVM_DEV_BPF_ATTR_GROUP_MEM,
    KVM_DEV_BPF_ATTR_GROUP_PIO, KVM_DEV_BPF_ATTR_GROUP_REGION, KVM_DEV_BPF_ATTR_GROUP_RUN,
    KVM_DEV_BPF_ATTR_GROUP_WORK, KVM_DEV_TYPE_BPF, kvm_bpf_user_irq, kvm_bpf_user_mem,
    kvm_bpf_user_region, kvm_bpf_user_run, kvm_bpf_user_work,
};

/// How often a program may say that there is more to do, before it counts as one that never ends.
const MAX_RUNS: u32 = 1 << 20;

/// Why a device operation failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host's KVM has no devices made of eBPF programs.
    #[error(
        "this host's KVM has no eBPF devices (kernel without CONFIG_KVM_BPF, or kvm_bpf not loaded)"
    )]
    Unsupported,
    /// The device cannot be created.
    #[error("cannot create the KVM device")]
    Create(#[source] errno::Error),
    /// The region is refused.
    #[error("cannot set region {index} at {place}, {size:#x} bytes")]
    SetRegion {
        /// Index of the region.
        index: u64,
        /// Where it begins.
        place: Place,
        /// Length in bytes.
        size: u64,
        /// The kernel's error.
        #[source]
        source: errno::Error,
    },
    /// The host has no ports, or the kernel no regions of them.
    #[error("this host's KVM has no eBPF devices at ports (not an x86 host, or an older kernel)")]
    NoPorts,
    /// A device of memory was to be at ports, or the other way round.
    #[error("the device is for {}, not for {}", space_name(*.0), space_name(opposite(*.0)))]
    WrongSpace(Space),
    /// The device has several ranges.
    #[error("the device has {0} ranges; this library serves those of one")]
    SeveralRanges(usize),
    /// The region cannot be removed.
    #[error("cannot remove region {index}")]
    UnsetRegion {
        /// Index of the region.
        index: u64,
        /// The kernel's error.
        #[source]
        source: errno::Error,
    },
    /// The memory slot of a read page cannot be removed.
    #[error("cannot remove the memory slot of the read page at {addr:#x}")]
    UnsetReadPage {
        /// Where the guest has the page.
        addr: u64,
        /// The kernel's error.
        #[source]
        source: errno::Error,
    },
    /// The interrupt's eventfd is refused.
    #[error("cannot set interrupt {index}")]
    SetIrq {
        /// Index of the interrupt.
        index: u64,
        /// The kernel's error.
        #[source]
        source: errno::Error,
    },
    /// The interrupt cannot be detached.
    #[error("cannot detach interrupt {index}")]
    UnsetIrq {
        /// Index of the interrupt.
        index: u64,
        /// The kernel's error.
        #[source]
        source: errno::Error,
    },
    /// The host's KVM gives programs no guest memory.
    #[error("this host's KVM gives programs no guest memory (an older kernel)")]
    NoMem,
    /// The window is refused.
    #[error("cannot set window {index}: {window:?}")]
    SetWindow {
        /// Its index.
        index: u64,
        /// What it was to be.
        window: Window,
        /// The kernel's error.
        #[source]
        source: errno::Error,
    },
    /// The window cannot be removed.
    #[error("cannot remove window {index}")]
    UnsetWindow {
        /// Its index.
        index: u64,
        /// The kernel's error.
        #[source]
        source: errno::Error,
    },
    /// The host's KVM has no WORK programs.
    #[error("this host's KVM runs programs for a guest's accesses only (an older kernel)")]
    NoWork,
    /// The WORK program or its eventfd is refused.
    #[error("cannot set WORK program {index}")]
    SetWork {
        /// Its index.
        index: u64,
        /// The kernel's error.
        #[source]
        source: errno::Error,
    },
    /// The WORK program cannot be removed.
    #[error("cannot remove WORK program {index}")]
    UnsetWork {
        /// Its index.
        index: u64,
        /// The kernel's error.
        #[source]
        source: errno::Error,
    },
    /// The WORK program cannot be run.
    #[error("cannot run WORK program {index}")]
    Run {
        /// Its index.
        index: u64,
        /// The kernel's error.
        #[source]
        source: errno::Error,
    },
    /// A WORK program always has more to do.
    #[error("WORK program {0} does not come to an end")]
    Endless(String),
    /// The device has no WORK program of that name.
    #[error("the device has no WORK program {0}")]
    NoSuchWork(String),
    /// An eventfd cannot be kept for programs to come.
    #[error("cannot duplicate an eventfd")]
    Duplicate(#[source] io::Error),
    /// There is no eventfd for a doorbell.
    #[error("cannot make an eventfd for doorbell {0}")]
    Doorbell(u32, #[source] io::Error),
    /// The state cannot be saved or restored.
    #[error(transparent)]
    State(#[from] state::Error),
    /// The new programs can take the state over only while no vCPU runs.
    #[error("the state has other types than before, and the vCPUs were not paused")]
    NotPaused,
    /// The new file describes another device than the one it should replace.
    #[error("the new file is not the same device: {new:?} instead of {running:?}")]
    OtherDevice {
        /// The running device's note.
        running: Box<Note>,
        /// The new file's note.
        new: Box<Note>,
    },
    /// The object file cannot be used.
    #[error(transparent)]
    Image(#[from] image::Error),
}

type Result<T> = std::result::Result<T, Error>;

/// Where a region begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// At a guest-physical address.
    Memory(u64),
    /// At a port.
    Port(u16),
}

impl Place {
    /// Memory or ports.
    pub fn space(self) -> Space {
        match self {
            Place::Memory(_) => Space::Memory,
            Place::Port(_) => Space::Ports,
        }
    }

    /// The address or port.
    pub fn addr(self) -> u64 {
        match self {
            Place::Memory(addr) => addr,
            Place::Port(port) => port.into(),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Memory(addr) => write!(f, "{addr:#x}"),
            Place::Port(port) => write!(f, "port {port:#x}"),
        }
    }
}

fn region_group(space: Space) -> u32 {
    match space {
        Space::Memory => KVM_DEV_BPF_ATTR_GROUP_REGION,
        Space::Ports => KVM_DEV_BPF_ATTR_GROUP_PIO,
    }
}

fn space_name(space: Space) -> &'static str {
    match space {
        Space::Memory => "memory",
        Space::Ports => "ports",
    }
}

fn opposite(space: Space) -> Space {
    match space {
        Space::Memory => Space::Ports,
        Space::Ports => Space::Memory,
    }
}

/// Guest memory that a device's programs may access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// First guest-physical address.
    pub addr: u64,
    /// Length in bytes, at least 1. There need not be memory everywhere.
    pub size: u64,
    /// Programs may read it.
    pub read: bool,
    /// Programs may write to it.
    pub write: bool,
}

/// A KVM device of type `KVM_DEV_TYPE_BPF`.
///
/// It lives as long as this value: dropping it removes its regions and
/// interrupts from the VM, also while vCPUs run.
#[derive(Debug)]
pub struct Device {
    fd: DeviceFd,
}

impl Device {
    /// Creates a device without regions and interrupts.
    pub fn new(vm: &VmFd) -> Result<Self> {
        let mut create = kvm_create_device {
            type_: KVM_DEV_TYPE_BPF,
            fd: 0,
            flags: 0,
        };
        match vm.create_device(&mut create) {
            Ok(fd) => Ok(Device { fd }),
            Err(errno) if errno.errno() == libc::ENODEV => Err(Error::Unsupported),
            Err(errno) => Err(Error::Create(errno)),
        }
    }

    /// Lets programs handle the accesses to a range; without one, they exit to the VMM.
    ///
    /// Set again with the same range, the region goes over to the new programs
    /// in one step: each access runs the old ones or the new ones. The kernel
    /// keeps references of its own to the programs.
    ///
    /// Then it waits until no vCPU runs the old programs, which may sleep: call it neither on a
    /// thread that one of them waits for nor with a lock that such a thread wants.
    ///
    /// Indices of regions at ports and at addresses are the same.
    pub fn set_region(
        &self,
        index: u64,
        place: Place,
        size: u64,
        read: Option<BorrowedFd<'_>>,
        write: Option<BorrowedFd<'_>>,
    ) -> Result<()> {
        let region = kvm_bpf_user_region {
            addr: place.addr(),
            size,
            bpf_readfd: raw_or_none(read),
            bpf_writefd: raw_or_none(write),
        };
        let group = region_group(place.space());
        self.set_attr(group, index, &region)
            .map_err(|source| match place {
                Place::Port(_) if !self.has_group(group) => Error::NoPorts,
                _ => Error::SetRegion {
                    index,
                    place,
                    size,
                    source,
                },
            })
    }

    /// Removes a region; accesses to its range exit to the VMM from then on.
    ///
    /// It waits as [`Self::set_region`] does.
    pub fn unset_region(&self, space: Space, index: u64) -> Result<()> {
        let none = kvm_bpf_user_region {
            addr: 0,
            size: 0,
            bpf_readfd: -1,
            bpf_writefd: -1,
        };
        self.set_attr(region_group(space), index, &none)
            .map_err(|source| Error::UnsetRegion { index, source })
    }

    /// Has an interrupt of the device signal `eventfd`, instead of an earlier one.
    ///
    /// Where there was one, it waits until nobody signals that any more: for an RCU grace period,
    /// but for no program that sleeps.
    ///
    /// The device keeps the counter, not the file: where it is also an irqfd, keep `eventfd`
    /// open, as KVM ends an irqfd when its last file descriptor is closed.
    pub fn set_irq(&self, index: u64, eventfd: &EventFd) -> Result<()> {
        let irq = kvm_bpf_user_irq {
            eventfd: eventfd.as_raw_fd(),
            flags: 0,
        };
        self.set_attr(KVM_DEV_BPF_ATTR_GROUP_IRQ, index, &irq)
            .map_err(|source| Error::SetIrq { index, source })
    }

    /// Detaches an interrupt from its eventfd. It waits as [`Self::set_irq`] does.
    pub fn unset_irq(&self, index: u64) -> Result<()> {
        let irq = kvm_bpf_user_irq {
            eventfd: -1,
            flags: 0,
        };
        self.set_attr(KVM_DEV_BPF_ATTR_GROUP_IRQ, index, &irq)
            .map_err(|source| Error::UnsetIrq { index, source })
    }

    /// Lets the device's programs access guest memory, instead of an earlier window of that index.
    ///
    /// A program's access has to lie inside one window. Programs that run see the one or the other;
    /// it waits until those have ended that may see the old one, and they may sleep.
    pub fn set_window(&self, index: u64, window: Window) -> Result<()> {
        let right = |has, flag| if has { flag } else { 0 };
        let mem = kvm_bpf_user_mem {
            addr: window.addr,
            size: window.size,
            flags: right(window.read, KVM_BPF_MEM_READ) | right(window.write, KVM_BPF_MEM_WRITE),
            pad: 0,
        };
        let group = KVM_DEV_BPF_ATTR_GROUP_MEM;
        self.set_attr(group, index, &mem)
            .map_err(|source| match self.has_group(group) {
                true => Error::SetWindow {
                    index,
                    window,
                    source,
                },
                false => Error::NoMem,
            })
    }

    /// Removes a window; when this returns, no program accesses it any more. It waits as
    /// [`Self::set_window`] does.
    pub fn unset_window(&self, index: u64) -> Result<()> {
        let none = kvm_bpf_user_mem::default();
        self.set_attr(KVM_DEV_BPF_ATTR_GROUP_MEM, index, &none)
            .map_err(|source| Error::UnsetWindow { index, source })
    }

    /// Sets the program that [`Self::run`] runs, and that also runs when `eventfd` is signalled.
    ///
    /// Set again with the same eventfd, the index goes over to the new program, and no signal is
    /// lost; with another one, signals that no program has seen yet are. The device takes the
    /// signals of the eventfd: nobody else may wait for it.
    ///
    /// It waits until the old program has ended where it runs.
    pub fn set_work(
        &self,
        index: u64,
        program: BorrowedFd<'_>,
        eventfd: Option<&EventFd>,
    ) -> Result<()> {
        let work = kvm_bpf_user_work {
            bpf_fd: program.as_raw_fd(),
            eventfd: eventfd.map_or(-1, AsRawFd::as_raw_fd),
            ..Default::default()
        };
        let group = KVM_DEV_BPF_ATTR_GROUP_WORK;
        self.set_attr(group, index, &work)
            .map_err(|source| match self.has_group(group) {
                true => Error::SetWork { index, source },
                false => Error::NoWork,
            })
    }

    /// Removes a program, and waits for its end where it runs.
    pub fn unset_work(&self, index: u64) -> Result<()> {
        let none = kvm_bpf_user_work {
            bpf_fd: -1,
            eventfd: -1,
            ..Default::default()
        };
        self.set_attr(KVM_DEV_BPF_ATTR_GROUP_WORK, index, &none)
            .map_err(|source| Error::UnsetWork { index, source })
    }

    /// Runs a program once, on the calling thread; it finds `arg` in its context's `buf`.
    pub fn run(&self, index: u64, arg: u64) -> Result<Ran> {
        let run = kvm_bpf_user_run { arg };
        match self.set_attr(KVM_DEV_BPF_ATTR_GROUP_RUN, index, &run) {
            Ok(()) => Ok(Ran::Done),
            Err(errno) if errno.errno() == libc::EAGAIN => Ok(Ran::More),
            Err(source) => Err(Error::Run { index, source }),
        }
    }

    /// Whether the kernel knows a group; each has an index 0.
    fn has_group(&self, group: u32) -> bool {
        let attr = kvm_device_attr {
            group,
            ..Default::default()
        };
        self.fd.has_device_attr(&attr).is_ok()
    }

    fn set_attr<T>(
        &self,
        group: u32,
        index: u64,
        value: &T,
    ) -> std::result::Result<(), errno::Error> {
        self.fd.set_device_attr(&kvm_device_attr {
            flags: 0,
            group,
            attr: index,
            addr: std::ptr::from_ref(value) as u64,
        })
    }
}

fn raw_or_none(fd: Option<BorrowedFd<'_>>) -> i32 {
    fd.map_or(-1, |fd| fd.as_raw_fd())
}

/// What a run of a WORK program came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ran {
    /// It did all there was to do.
    Done,
    /// There is more to do: it wants to run again.
    More,
}

/// A device that one object file describes: a single region, its programs and its maps.
#[derive(Debug)]
pub struct ImageDevice {
    /// The first to go: a guest that runs on then finds the programs.
    read_pages: Vec<ReadPage>,
    device: Device,
    place: Place,
    image: Image,
    /// By the name of the WORK program, what also runs it.
    eventfds: BTreeMap<String, EventFd>,
    /// What a saved state tells of the time.
    clocks: Clocks,
}

impl ImageDevice {
    /// Has the programs of `image` handle the guest's accesses at `place`, from now on.
    ///
    /// So whatever they need is there before: what the VMM puts into maps, the interrupts, and the
    /// windows that the note asks for ([`Note::window`]).
    pub fn new(device: Device, place: Place, image: Image) -> Result<Self> {
        let read_pages = image.note().read_pages.iter().zip(&image.read_pages);
        let read_pages = read_pages
            .map(|(page, mapping)| ReadPage::new(place.addr() + page.offset, Arc::clone(mapping)))
            .collect();
        let mut eventfds = BTreeMap::new();
        set_doorbells(&device, &image, &mut eventfds)?;
        let device = ImageDevice {
            read_pages,
            device,
            place,
            image,
            eventfds,
            clocks: Clocks::new(),
        };
        device.set_works()?;
        device.set_region()?;
        Ok(device)
    }

    /// Goes over to the programs of a new file while the guest runs.
    ///
    /// `paused` is called only where the state has other types than before and the new file says that
    /// it loads the version of the old one. It has to call what it is given, once, while no vCPU is
    /// in `KVM_RUN`. When this returns, no callback of the old programs runs or is to run: the old
    /// WORK program `save`, and `replaced` or `restore` of the new ones, see to that.
    ///
    /// It waits until no vCPU runs the old programs, as [`Device::set_region`] says.
    ///
    /// On an error the device goes on as it was.
    pub fn replace(
        &mut self,
        image: OpenImage,
        on_loss: OnLoss,
        paused: impl FnOnce(&mut dyn FnMut()),
    ) -> Result<MapChanges> {
        let replacement = self.load(image, on_loss)?;
        self.swap(replacement, paused)
    }

    /// Loads a new file for [`Self::swap`], with the maps that it has in common with the running
    /// one. The first half of [`Self::replace`], for callers that fill the other maps in between.
    pub fn load(&self, mut image: OpenImage, on_loss: OnLoss) -> Result<Replacement> {
        self.check(image.note())?;
        let changes = image.reuse_maps(&self.image, on_loss)?;
        Ok(Replacement {
            image: image.load()?,
            changes,
        })
    }

    fn check(&self, new: &Note) -> Result<()> {
        if new.is_same_device(self.image.note()) {
            return Ok(());
        }
        Err(Error::OtherDevice {
            running: Box::new(self.image.note().clone()),
            new: Box::new(new.clone()),
        })
    }

    /// Goes over to the programs of what [`Self::load`] returned while the guest runs, with `paused`
    /// as [`Self::replace`] has it, and runs its WORK program `replaced`; or `restore`, where the
    /// state is converted after a run of the old `save`.
    ///
    /// Memory slots of read pages stay where the page's map is carried over. Of others they are
    /// taken away before and set with the new map after; in between, loads run the read program.
    ///
    /// It waits until no vCPU runs the old programs, as [`Device::set_region`] says.
    ///
    /// On an error the device goes on as it was, but for one of `replaced` or `restore` itself.
    pub fn swap(
        &mut self,
        replacement: Replacement,
        paused: impl FnOnce(&mut dyn FnMut()),
    ) -> Result<MapChanges> {
        // It may be another device's.
        self.check(replacement.image.note())?;
        if !replacement.needs_pause() {
            self.set_programs(replacement.image)?;
            self.run("replaced", 0)?;
            return Ok(replacement.changes);
        }
        let Replacement { image, changes } = replacement;
        let mut image = Some(image);
        let mut result = Err(Error::NotPaused);
        paused(&mut || {
            if let Some(image) = image.take() {
                result = self.convert(image);
            }
        });
        result.map(|()| changes)
    }

    /// Has the programs of `new` handle accesses and the rest.
    fn set_programs(&mut self, new: Image) -> Result<()> {
        let swapped = self.swap_programs(new);
        // With the old maps, where the old programs go on.
        self.read_pages.iter_mut().for_each(ReadPage::set_again);
        swapped
    }

    /// The same, with the state by the names of its fields, while no vCPU is in `KVM_RUN`.
    fn convert(&mut self, new: Image) -> Result<()> {
        let state = self.save()?;
        // Maps that go on have what they had.
        let taken = state::restore(new.note(), new.states(), &state).map_err(Error::from);
        let set = taken.and_then(|_| self.set_programs(new));
        let resumed = self.resume();
        set.and(resumed)
    }

    fn swap_programs(&mut self, new: Image) -> Result<()> {
        // No load must see the old map when a store has run a new program.
        for (page, mapping) in self.read_pages.iter_mut().zip(&new.read_pages) {
            if !page.is_same_map(mapping) {
                suspend(page)?;
            }
        }
        let names: Vec<_> = self.eventfds.keys().cloned().collect();
        let old = std::mem::replace(&mut self.image, new);
        if let Err(error) = self.go_over(&old) {
            let new = std::mem::replace(&mut self.image, old);
            self.eventfds.retain(|name, _| names.contains(name));
            // They were set before: that the kernel refuses them now is less news than the first.
            let _ = self.go_over(&new);
            return Err(error);
        }
        for (page, mapping) in self.read_pages.iter_mut().zip(&self.image.read_pages) {
            if !page.is_same_map(mapping) {
                page.exchange(Arc::clone(mapping));
            }
        }
        self.eventfds
            .retain(|name, _| self.image.work(name).is_some());
        Ok(())
    }

    /// Has the image's programs handle accesses and the rest, instead of those of `from`.
    fn go_over(&mut self, from: &Image) -> Result<()> {
        set_doorbells(&self.device, &self.image, &mut self.eventfds)?;
        self.free_eventfds(from);
        self.set_works()?;
        self.set_region()?;
        self.unset_works(from);
        self.unset_doorbells(from);
        Ok(())
    }

    fn set_region(&self) -> Result<()> {
        let range = only_region(self.image.note(), self.place.space())?;
        self.device.set_region(
            range.region.into(),
            self.place,
            range.size,
            self.image.read_program(),
            self.image.write_program(),
        )
    }

    fn set_works(&self) -> Result<()> {
        self.image.works().try_for_each(|work| {
            let eventfd = self.eventfds.get(work.name);
            self.device
                .set_work(work.index.into(), work.program, eventfd)
        })
    }

    /// An eventfd is one program's: has `from` give up those that go to another index.
    fn free_eventfds(&self, from: &Image) {
        self.remove_works(from, |old| {
            let new = self.image.work(old.name);
            self.eventfds.contains_key(old.name) && new.is_some_and(|new| new.index != old.index)
        });
    }

    /// Removes those of `from` that have no successor.
    fn unset_works(&self, from: &Image) {
        self.remove_works(from, |old| {
            !self.image.works().any(|new| new.index == old.index)
        });
    }

    fn remove_works(&self, from: &Image, is_gone: impl Fn(&Work<'_>) -> bool) {
        for work in from.works().filter(is_gone) {
            // It fails only where there is none.
            let _ = self.device.unset_work(work.index.into());
        }
    }

    /// Takes the eventfds from the doorbells that only `from` has.
    fn unset_doorbells(&self, from: &Image) {
        let own = &self.image.note().doorbells;
        for bell in &from.note().doorbells {
            if !own.iter().any(|other| other.irq == bell.irq) {
                // It fails only where there is none.
                let _ = self.device.unset_irq(bell.irq.into());
            }
        }
    }

    /// Has a WORK program also run when `eventfd` is signalled, or no more.
    ///
    /// It may be the eventfd of one of the device's interrupts, so that the device's other programs
    /// have it run. It stays with the name when the programs are replaced.
    pub fn set_work_eventfd(&mut self, name: &str, eventfd: Option<&EventFd>) -> Result<()> {
        let no_such = || Error::NoSuchWork(name.to_string());
        let work = self.image.work(name).ok_or_else(no_such)?;
        let eventfd = eventfd.map(EventFd::try_clone).transpose();
        let eventfd = eventfd.map_err(Error::Duplicate)?;
        self.device
            .set_work(work.index.into(), work.program, eventfd.as_ref())?;
        match eventfd {
            Some(eventfd) => self.eventfds.insert(name.to_string(), eventfd),
            None => self.eventfds.remove(name),
        };
        Ok(())
    }

    /// Runs the WORK program of that name, until it has no more to do; returns whether there is one.
    pub fn run(&self, name: &str, arg: u64) -> Result<bool> {
        let Some(work) = self.image.work(name) else {
            return Ok(false);
        };
        for _ in 0..MAX_RUNS {
            if self.device.run(work.index.into(), arg)? == Ran::Done {
                return Ok(true);
            }
        }
        Err(Error::Endless(name.to_string()))
    }

    /// Puts the device into the state of a new one, where it has a WORK program `reset`; returns
    /// whether it has.
    pub fn reset(&self) -> Result<bool> {
        self.run("reset", 0)
    }

    /// Has an input of the device be at a level, where it has a WORK program `input`; returns
    /// whether it has.
    pub fn input(&self, line: u32, level: bool) -> Result<bool> {
        self.run("input", u64::from(line) | u64::from(level) << 32)
    }

    /// The state of the device, after a run of its WORK program `save` where it has one.
    ///
    /// No vCPU may be in `KVM_RUN`, from before until [`Self::resume`], where the device goes on
    /// here. On an error it goes on without. Calls neither bpf(2) nor libbpf.
    pub fn save(&self) -> Result<State> {
        if self.image.work("save").is_none()
            && let Some((map, what)) = self.image.runs_later()
        {
            let map = map.to_string();
            return Err(state::Error::TimersWithoutSave { map, what }.into());
        }
        let saved = self.run("save", 0).and_then(|_| {
            let (note, maps) = (self.image.note(), self.image.states());
            Ok(state::save(note, maps, &self.clocks)?)
        });
        if saved.is_err() {
            // What kept the state from being saved is the news.
            let _ = self.resume();
        }
        saved
    }

    /// Has the device go on after [`Self::save`] or [`Self::prepare`], with its WORK program
    /// `restore` where it has one.
    pub fn resume(&self) -> Result<()> {
        self.run("restore", 0).map(drop)
    }

    /// Has the device go on from a saved state, with a run of its WORK program `restore` where it
    /// has one.
    ///
    /// No vCPU may be in `KVM_RUN`. On an error the state maps are as before; if it is one of
    /// `restore` itself, what else that did is done. Calls neither bpf(2) nor libbpf.
    pub fn restore(&mut self, state: &State) -> Result<()> {
        let maps = self.image.states();
        let before = state::restore(self.image.note(), maps, state)?;
        if let Err(error) = self.run("restore", 0) {
            state::undo(maps, &before);
            return Err(error);
        }
        Ok(())
    }

    /// The first half of [`Self::restore`]: puts the state into the maps. [`Self::resume`] is the other.
    ///
    /// So the device does nothing yet, while it is not certain that the guest goes on here: from
    /// `restore` on it may access guest memory, which may still be another's too.
    pub fn prepare(&mut self, state: &State) -> Result<()> {
        state::restore(self.image.note(), self.image.states(), state)?;
        Ok(())
    }

    /// The pages whose loads have no side effect, in the note's order.
    pub fn read_pages(&self) -> &[ReadPage] {
        &self.read_pages
    }

    /// Has the guest read a page, by its index in [`Self::read_pages`], through a read-only memory
    /// slot of that number, which is free: loads then leave the guest no more.
    ///
    /// The slot goes with the device, or with [`Self::unset_read_page`]; it must not be set
    /// otherwise. Without one all is the same, but for the cost: go on after an error.
    ///
    /// # Panics
    ///
    /// If there is no such page.
    pub fn set_read_page(
        &mut self,
        vm: &VmFd,
        index: usize,
        slot: u32,
    ) -> std::result::Result<(), NoSlot> {
        self.read_pages[index].set(vm, slot)
    }

    /// Takes the memory slot of a page away, if it has one: loads run the read program from then on.
    ///
    /// # Panics
    ///
    /// If there is no such page.
    pub fn unset_read_page(&mut self, index: usize) -> Result<()> {
        let page = &mut self.read_pages[index];
        let addr = page.addr();
        let unset = page.unset();
        unset.map_err(|source| Error::UnsetReadPage { addr, source })
    }

    /// Where it is.
    pub fn place(&self) -> Place {
        self.place
    }

    /// The running programs and maps.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// The KVM device, for its interrupts and for regions beyond the first.
    pub fn device(&self) -> &Device {
        &self.device
    }
}

/// A loaded file that is to replace the programs of a device.
#[derive(Debug)]
pub struct Replacement {
    image: Image,
    changes: MapChanges,
}

impl Replacement {
    /// The programs and maps.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// Whether [`ImageDevice::swap`] will have the vCPUs paused.
    pub fn needs_pause(&self) -> bool {
        !self.changes.converted.is_empty()
    }
}

/// Has each doorbell signal the eventfd of its WORK program, and makes those that are not there.
fn set_doorbells(
    device: &Device,
    image: &Image,
    eventfds: &mut BTreeMap<String, EventFd>,
) -> Result<()> {
    for bell in &image.note().doorbells {
        let Some(work) = image.works().find(|work| work.index == bell.work) else {
            continue;
        };
        let eventfd = match eventfds.entry(work.name.to_string()) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let eventfd = EventFd::new(libc::EFD_NONBLOCK);
                entry.insert(eventfd.map_err(|error| Error::Doorbell(bell.irq, error))?)
            }
        };
        device.set_irq(bell.irq.into(), eventfd)?;
    }
    Ok(())
}

/// The only region of the device that a note describes, which must be of that kind.
pub fn only_region(note: &Note, space: Space) -> Result<Range> {
    match note.regions()[..] {
        [range] if range.space == space => Ok(range),
        [range] => Err(Error::WrongSpace(range.space)),
        ref ranges => Err(Error::SeveralRanges(ranges.len())),
    }
}

fn suspend(page: &mut ReadPage) -> Result<()> {
    let addr = page.addr();
    let suspended = page.suspend();
    suspended.map_err(|source| Error::UnsetReadPage { addr, source })
}
