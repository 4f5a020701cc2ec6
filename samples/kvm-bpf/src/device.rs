// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The KVM device: regions of programs, and interrupts.

use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd};

use kvm_bindings::{kvm_create_device, kvm_device_attr};
use kvm_ioctls::{DeviceFd, VmFd};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

use crate::image::{self, Image, OpenImage};
use crate::maps::{MapChanges, OnLoss};
use crate::note::{Note, Range, Space};
use crate::uapi::{
    KVM_DEV_BPF_ATTR_GROUP_IRQ, KVM_DEV_BPF_ATTR_GROUP_PIO, KVM_DEV_BPF_ATTR_GROUP_REGION,
    KVM_DEV_TYPE_BPF, kvm_bpf_user_irq, kvm_bpf_user_region,
};

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

    fn group(self) -> u32 {
        match self {
            Place::Memory(_) => KVM_DEV_BPF_ATTR_GROUP_REGION,
            Place::Port(_) => KVM_DEV_BPF_ATTR_GROUP_PIO,
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
        let group = place.group();
        self.set_attr(group, index, &region).map_err(|source| {
            let no_ports = group == KVM_DEV_BPF_ATTR_GROUP_PIO && !self.has_attr(group, 0);
            match no_ports {
                true => Error::NoPorts,
                false => Error::SetRegion {
                    index,
                    place,
                    size,
                    source,
                },
            }
        })
    }

    /// Removes a region; accesses to its range exit to the VMM from then on.
    pub fn unset_region(&self, space: Space, index: u64) -> Result<()> {
        let none = kvm_bpf_user_region {
            addr: 0,
            size: 0,
            bpf_readfd: -1,
            bpf_writefd: -1,
        };
        let group = match space {
            Space::Memory => KVM_DEV_BPF_ATTR_GROUP_REGION,
            Space::Ports => KVM_DEV_BPF_ATTR_GROUP_PIO,
        };
        self.set_attr(group, index, &none)
            .map_err(|source| Error::UnsetRegion { index, source })
    }

    /// Has an interrupt of the device signal `eventfd`, instead of an earlier one.
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

    /// Detaches an interrupt from its eventfd.
    pub fn unset_irq(&self, index: u64) -> Result<()> {
        let irq = kvm_bpf_user_irq {
            eventfd: -1,
            flags: 0,
        };
        self.set_attr(KVM_DEV_BPF_ATTR_GROUP_IRQ, index, &irq)
            .map_err(|source| Error::UnsetIrq { index, source })
    }

    fn has_attr(&self, group: u32, attr: u64) -> bool {
        let attr = kvm_device_attr {
            group,
            attr,
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

/// A device that one object file describes: a single region, its programs and its maps.
#[derive(Debug)]
pub struct ImageDevice {
    device: Device,
    place: Place,
    image: Image,
}

impl ImageDevice {
    /// Has the programs of `image` handle the guest's accesses at `place`, from now on.
    ///
    /// So whatever they need is there before: what the VMM puts into maps, and the interrupts.
    pub fn new(device: Device, place: Place, image: Image) -> Result<Self> {
        set_image(&device, place, &image)?;
        Ok(ImageDevice {
            device,
            place,
            image,
        })
    }

    /// Goes over to the programs of a new file while the guest runs.
    ///
    /// On an error the device goes on as it was.
    pub fn replace(&mut self, image: OpenImage, on_loss: OnLoss) -> Result<MapChanges> {
        let replacement = self.load(image, on_loss)?;
        self.swap(replacement)
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
        if new == self.image.note() {
            return Ok(());
        }
        Err(Error::OtherDevice {
            running: Box::new(self.image.note().clone()),
            new: Box::new(new.clone()),
        })
    }

    /// Goes over to the programs of what [`Self::load`] returned while the guest runs.
    pub fn swap(&mut self, replacement: Replacement) -> Result<MapChanges> {
        // It may be another device's.
        self.check(replacement.image.note())?;
        set_image(&self.device, self.place, &replacement.image)?;
        self.image = replacement.image;
        Ok(replacement.changes)
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
}

/// The only region of the device that a note describes, which must be of that kind.
pub fn only_region(note: &Note, space: Space) -> Result<Range> {
    match note.regions()[..] {
        [range] if range.space == space => Ok(range),
        [range] => Err(Error::WrongSpace(range.space)),
        ref ranges => Err(Error::SeveralRanges(ranges.len())),
    }
}

fn set_image(device: &Device, place: Place, image: &Image) -> Result<()> {
    let range = only_region(image.note(), place.space())?;
    device.set_region(
        range.region.into(),
        place,
        range.size,
        image.read_program(),
        image.write_program(),
    )
}
