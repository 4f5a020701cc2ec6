// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The KVM device: regions of programs, and interrupts.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::{fmt, io};

use crate::abi::Abi;
use crate::note::{Note, Range, Space};
use crate::uapi::{
    KVM_BPF_MEM_READ, KVM_BPF_MEM_WRITE, KVM_DEV_BPF_ATTR_GROUP_IRQ, KVM_DEV_BPF_ATTR_GROUP_MEM,
    KVM_DEV_BPF_ATTR_GROUP_PIO, KVM_DEV_BPF_ATTR_GROUP_REGION, KVM_DEV_BPF_ATTR_GROUP_RUN,
    KVM_DEV_BPF_ATTR_GROUP_WORK, kvm_bpf_user_irq, kvm_bpf_user_mem, kvm_bpf_user_region,
    kvm_bpf_user_run, kvm_bpf_user_work,
};
use crate::{programs, state, sys};

/// Why a device operation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The host's KVM has no devices made of eBPF programs: `ENODEV`.
    ///
    /// The module loads only when somebody asks for it. A process in a jail cannot, so a host loads
    /// it when it boots.
    #[error(
        "this host's KVM has no eBPF devices: load the module kvm_bpf (modprobe kvm_bpf; at each \
         boot, with a line kvm_bpf in /etc/modules-load.d/kvm_bpf.conf), or build the kernel with \
         CONFIG_KVM_BPF"
    )]
    Unsupported,
    /// The device cannot be created.
    #[error("cannot create the KVM device")]
    Create(#[source] io::Error),
    /// The region is refused.
    #[error("cannot set region {index} at {place}, {size:#x} bytes")]
    SetRegion {
        /// Index of the region.
        index: u32,
        /// Where it begins.
        place: Place,
        /// Length in bytes.
        size: u64,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// The host has no ports, or the kernel no regions of them.
    #[error("this host's KVM has no eBPF devices at ports (not an x86 host, or an older kernel)")]
    NoPorts,
    /// A device of memory was to be at ports, or the other way round.
    #[error("the device is for {}, not for {}", space_name(*.0), space_name(opposite(*.0)))]
    WrongSpace(Space),
    /// The device would end behind the last address.
    #[error("a device of {size:#x} bytes has no room at {place}")]
    NoRoom {
        /// Where it was to begin.
        place: Place,
        /// Bytes of its region.
        size: u64,
    },
    /// The device has several ranges.
    #[error("the device has {0} ranges; this library serves those of one")]
    SeveralRanges(usize),
    /// The region cannot be removed.
    #[error("cannot remove region {index}")]
    UnsetRegion {
        /// Index of the region.
        index: u32,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// The memory slot of a read page cannot be removed.
    #[error("cannot remove the memory slot of the read page at {addr:#x}")]
    UnsetReadPage {
        /// Where the guest has the page.
        addr: u64,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// The interrupt's eventfd is refused.
    #[error("cannot set interrupt {index}")]
    SetIrq {
        /// Index of the interrupt.
        index: u32,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// The interrupt cannot be detached.
    #[error("cannot detach interrupt {index}")]
    UnsetIrq {
        /// Index of the interrupt.
        index: u32,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// The host's KVM gives programs no guest memory.
    #[error("this host's KVM gives programs no guest memory (an older kernel)")]
    NoWindows,
    /// The note says that the device accesses guest memory, and the VMM has given it no window for
    /// that.
    #[error("the device {0} guest memory, and the VMM has given it no window for that")]
    MissingWindow(&'static str),
    /// The window is refused.
    #[error("cannot set window {index}: {window:?}")]
    SetWindow {
        /// Its index.
        index: u32,
        /// What it was to be.
        window: Window,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// The window cannot be removed.
    #[error("cannot remove window {index}")]
    UnsetWindow {
        /// Its index.
        index: u32,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// The host's KVM has no WORK programs.
    #[error("this host's KVM runs programs for a guest's accesses only (an older kernel)")]
    NoWork,
    /// The WORK program or its eventfd is refused.
    #[error("cannot set WORK program {index}")]
    SetWork {
        /// Its index.
        index: u32,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// The WORK program cannot be removed.
    #[error("cannot remove WORK program {index}")]
    UnsetWork {
        /// Its index.
        index: u32,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// The WORK program cannot be run.
    #[error("cannot run WORK program {index}")]
    Run {
        /// Its index.
        index: u32,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// A WORK program always has more to do.
    #[error("WORK program {0} does not come to an end")]
    Endless(String),
    /// The device has no WORK program of that name.
    #[error("the device has no WORK program {0}")]
    NoSuchWork(String),
    /// The device has no such interrupt.
    #[error("the device has no interrupt {index}: its note says {count}")]
    NoSuchIrq {
        /// Index of the interrupt.
        index: u32,
        /// How many it has.
        count: u32,
    },
    /// What is to be no interrupt is one.
    #[error("index {0} is an interrupt of the device")]
    IsIrq(u32),
    /// What the VMM gives an eventfd, or has given one, is a doorbell of the note.
    #[error("index {0} is a doorbell of the device, which runs a WORK program")]
    IsDoorbell(u32),
    /// An eventfd cannot be kept open.
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
    /// The new programs have taken over and stay, but the WORK program with which they begin has
    /// failed.
    #[error("the new programs run, but their WORK program {name} has failed")]
    Swapped {
        /// `replaced`, or `restore` where the state was converted.
        name: &'static str,
        /// Its error.
        #[source]
        source: Box<Error>,
    },
    /// The new programs are of another device than the one it should replace.
    #[error("the new programs are not the same device: {new:?} instead of {running:?}")]
    OtherDevice {
        /// The running device's note.
        running: Box<Note>,
        /// The new programs' note.
        new: Box<Note>,
    },
    /// The programs cannot be those of the device.
    #[error(transparent)]
    Programs(#[from] programs::Error),
    /// The object file cannot be used.
    #[cfg(feature = "loader")]
    #[error(transparent)]
    Image(crate::image::Error),
}

#[cfg(feature = "loader")]
impl From<crate::image::Error> for Error {
    fn from(error: crate::image::Error) -> Self {
        match error {
            crate::image::Error::Programs(error) => Error::Programs(error),
            error => Error::Image(error),
        }
    }
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
/// It lives as long as this value: dropping it removes its regions and interrupts from the VM, also
/// while vCPUs run. It waits until no program of the device runs: drop it neither on a thread that a
/// sleeping program waits for nor with a lock that such a thread wants.
#[derive(Debug)]
pub struct Device {
    fd: OwnedFd,
    abi: Abi,
}

impl Device {
    /// Creates a device without regions and interrupts, with the number of its type that the headers
    /// have: [`Abi::default`]. The process is the one that created the VM.
    ///
    /// # Errors
    ///
    /// Those of [`Self::with_abi`].
    pub fn new(vm: &impl AsRawFd) -> Result<Self> {
        Self::with_abi(vm, &Abi::default())
    }

    /// The same with the running kernel's number, from [`Abi::from_running_kernel`].
    ///
    /// # Errors
    ///
    /// [`Unsupported`](Error::Unsupported), and [`Create`](Error::Create) for another reason:
    /// `EPERM` of a VM that is sealed, `EIO` in another process than the VM's.
    pub fn with_abi(vm: &impl AsRawFd, abi: &Abi) -> Result<Self> {
        match sys::create_device(vm.as_raw_fd(), abi.device_type) {
            Ok(fd) => Ok(Device { fd, abi: *abi }),
            Err(error) => Err(no_device(error)),
        }
    }

    /// Takes over a device that the VMM has created itself: `KVM_CREATE_DEVICE` with
    /// [`Abi::device_type`]. Files that replace its programs then need `OpenImage::set_abi()`.
    ///
    /// Nothing is asked of the kernel: of another kind of file, or of another device, all else
    /// fails.
    pub fn from_fd(fd: OwnedFd) -> Self {
        let abi = Abi::default();
        Device { fd, abi }
    }

    /// The numbers of types that it was created with; of [`Self::from_fd`] the default.
    pub fn abi(&self) -> &Abi {
        &self.abi
    }

    /// Checks whether a VM can have such devices. It creates none.
    ///
    /// # Errors
    ///
    /// [`Unsupported`](Error::Unsupported), and [`Create`](Error::Create) for another reason.
    pub fn is_supported(vm: &impl AsRawFd, abi: &Abi) -> Result<()> {
        sys::has_device(vm.as_raw_fd(), abi.device_type).map_err(no_device)
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
    ///
    /// # Errors
    ///
    /// [`NoPorts`](Error::NoPorts), and [`SetRegion`](Error::SetRegion) with the kernel's: `EEXIST`
    /// if something else has an address of the range, or the index another range; `ERANGE` if the
    /// range is too long or wraps around; `EINVAL` if a program is of another type, or there is
    /// none; `EACCES` if the device has [given that up](crate::perms); `ENXIO` if there is no such
    /// index. The region is as before.
    pub fn set_region(
        &self,
        index: u32,
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
                Place::Port(_) if self.lacks_group(group) => Error::NoPorts,
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
    ///
    /// # Errors
    ///
    /// [`UnsetRegion`](Error::UnsetRegion): `ENOENT` if there is no such region, `EACCES` if the
    /// device has [given that up](crate::perms).
    pub fn unset_region(&self, space: Space, index: u32) -> Result<()> {
        let none = kvm_bpf_user_region::default();
        self.set_attr(region_group(space), index, &none)
            .map_err(|source| Error::UnsetRegion { index, source })
    }

    /// Connects an interrupt of the device to `eventfd`, instead of an earlier one.
    ///
    /// Where there was one, it waits until nobody signals that any more: for an RCU grace period,
    /// but for no program that sleeps.
    ///
    /// The device keeps the counter, not the file: where it is also an irqfd, keep `eventfd`
    /// open, as KVM ends an irqfd when its last file descriptor is closed.
    ///
    /// # Errors
    ///
    /// [`SetIrq`](Error::SetIrq): `EINVAL` if it is no eventfd, `ENXIO` if there is no such index,
    /// `EACCES` if the device has [given that up](crate::perms). The interrupt is as before.
    pub fn set_irq(&self, index: u32, eventfd: &impl AsRawFd) -> Result<()> {
        let irq = kvm_bpf_user_irq {
            eventfd: eventfd.as_raw_fd(),
            flags: 0,
        };
        self.set_attr(KVM_DEV_BPF_ATTR_GROUP_IRQ, index, &irq)
            .map_err(|source| Error::SetIrq { index, source })
    }

    /// Detaches an interrupt from its eventfd. It waits as [`Self::set_irq`] does.
    ///
    /// # Errors
    ///
    /// [`UnsetIrq`](Error::UnsetIrq): `ENOENT` if it has none, `EACCES` if the device has
    /// [given that up](crate::perms).
    pub fn unset_irq(&self, index: u32) -> Result<()> {
        let none = kvm_bpf_user_irq::default();
        self.set_attr(KVM_DEV_BPF_ATTR_GROUP_IRQ, index, &none)
            .map_err(|source| Error::UnsetIrq { index, source })
    }

    /// Lets the device's programs access guest memory, instead of an earlier window of that index.
    ///
    /// A program's access has to lie inside one window. Programs that run see the one or the other;
    /// it waits until those have ended that may see the old one, and they may sleep.
    ///
    /// # Errors
    ///
    /// [`NoWindows`](Error::NoWindows), and [`SetWindow`](Error::SetWindow) with the kernel's: `EINVAL` if
    /// the window has no bytes, or neither right; `ERANGE` if it wraps around; `ENXIO` if there is no
    /// such index; `EACCES` if the device has [given that up](crate::perms). The window is as before.
    pub fn set_window(&self, index: u32, window: Window) -> Result<()> {
        let right = |has, flag| if has { flag } else { 0 };
        let mem = kvm_bpf_user_mem {
            addr: window.addr,
            size: window.size,
            flags: right(window.read, KVM_BPF_MEM_READ) | right(window.write, KVM_BPF_MEM_WRITE),
            pad: 0,
        };
        let group = KVM_DEV_BPF_ATTR_GROUP_MEM;
        self.set_attr(group, index, &mem)
            .map_err(|source| match self.lacks_group(group) {
                true => Error::NoWindows,
                false => Error::SetWindow {
                    index,
                    window,
                    source,
                },
            })
    }

    /// Removes a window; when this returns, no program accesses it any more. It waits as
    /// [`Self::set_window`] does.
    ///
    /// # Errors
    ///
    /// [`UnsetWindow`](Error::UnsetWindow): `ENOENT` if there is no such window, `EACCES` if the
    /// device has [given that up](crate::perms).
    pub fn unset_window(&self, index: u32) -> Result<()> {
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
    ///
    /// # Errors
    ///
    /// [`NoWork`](Error::NoWork), and [`SetWork`](Error::SetWork) with the kernel's: `EBUSY` if the
    /// eventfd has a consumer, another index or an irqfd; `EINVAL` if it is no eventfd, or the
    /// program of another type; `EAGAIN` if the process may have no more threads; `ENXIO` if there
    /// is no such index; `EACCES` if the device has [given that up](crate::perms). The index is as
    /// before.
    pub fn set_work(
        &self,
        index: u32,
        program: BorrowedFd<'_>,
        eventfd: Option<&dyn AsRawFd>,
    ) -> Result<()> {
        let work = kvm_bpf_user_work {
            bpf_fd: program.as_raw_fd(),
            eventfd: eventfd.map_or(-1, |eventfd| eventfd.as_raw_fd()),
            ..Default::default()
        };
        let group = KVM_DEV_BPF_ATTR_GROUP_WORK;
        self.set_attr(group, index, &work)
            .map_err(|source| match self.lacks_group(group) {
                true => Error::NoWork,
                false => Error::SetWork { index, source },
            })
    }

    /// Removes a program, and waits for its end where it runs. Signals that it has not seen yet are
    /// lost.
    ///
    /// # Errors
    ///
    /// [`UnsetWork`](Error::UnsetWork): `ENOENT` if there is none, `EACCES` if the device has
    /// [given that up](crate::perms).
    pub fn unset_work(&self, index: u32) -> Result<()> {
        let none = kvm_bpf_user_work::default();
        self.set_attr(KVM_DEV_BPF_ATTR_GROUP_WORK, index, &none)
            .map_err(|source| Error::UnsetWork { index, source })
    }

    /// Runs a program once, on the calling thread; it finds `arg` in its context's `buf`. It waits
    /// while another thread runs the program of that index.
    ///
    /// # Errors
    ///
    /// [`Run`](Error::Run): `ENOENT` if there is no such program, `EACCES` if the device has
    /// [given that up](crate::perms).
    pub fn run(&self, index: u32, arg: u64) -> Result<Ran> {
        let run = kvm_bpf_user_run { arg };
        match self.set_attr(KVM_DEV_BPF_ATTR_GROUP_RUN, index, &run) {
            Ok(()) => Ok(Ran::Done),
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Ok(Ran::More),
            Err(source) => Err(Error::Run { index, source }),
        }
    }

    /// Whether a group is one that the kernel does not know: each has an index 0. What fails for
    /// another reason tells nothing of groups.
    fn lacks_group(&self, group: u32) -> bool {
        let error = sys::has_attr(self.as_fd(), group, 0).err();
        error.is_some_and(|error| error.raw_os_error() == Some(libc::ENXIO))
    }

    fn set_attr<T>(&self, group: u32, index: u32, value: &T) -> io::Result<()> {
        sys::set_attr(self.as_fd(), group, index.into(), value)
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Device {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl From<Device> for OwnedFd {
    fn from(device: Device) -> Self {
        device.fd
    }
}

/// Why there is no device.
fn no_device(error: io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::ENODEV) => Error::Unsupported,
        _ => Error::Create(error),
    }
}

fn raw_or_none(fd: Option<BorrowedFd<'_>>) -> i32 {
    fd.map_or(-1, |fd| fd.as_raw_fd())
}

/// What a run of a WORK program came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "there may be more to do"]
pub enum Ran {
    /// It did all there was to do.
    Done,
    /// There is more to do: it wants to run again.
    More,
}

/// The only region of the device that a note describes, which must be of that kind.
///
/// # Errors
///
/// [`WrongSpace`](Error::WrongSpace), [`SeveralRanges`](Error::SeveralRanges).
pub fn only_region(note: &Note, space: Space) -> Result<Range> {
    match note.regions()[..] {
        [range] if range.space == space => Ok(range),
        [range] => Err(Error::WrongSpace(range.space)),
        ref ranges => Err(Error::SeveralRanges(ranges.len())),
    }
}
