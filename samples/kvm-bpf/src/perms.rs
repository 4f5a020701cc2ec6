// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a VMM gives up before it runs a guest, and never gets back.
//!
//! A guest that takes over its VMM finds the device's file descriptor. What the VMM has given up, it
//! does not find: other programs, other interrupts, other windows. The VMM does so when all is set,
//! before the first vCPU runs:
//!
//! ```no_run
//! # fn f(vm: &impl std::os::fd::AsRawFd, device: &kvm_bpf::Device) -> Result<(), kvm_bpf::perms::Error> {
//! use kvm_bpf::perms::{Allow, Permissions, seal};
//!
//! // Programs of a region may be replaced by others that signal interrupts, and that is all.
//! device.restrict(Permissions::new(Allow::REPLACE | Allow::IRQ))?;
//! // No further devices: what holds for this one does not hold for another.
//! seal(vm)?;
//! # Ok(())
//! # }
//! ```
//!
//! Calls of [`ImageDevice`](crate::ImageDevice) need what they do: `save`, `restore`, `reset` and
//! `input` need `RUN`, where the device has a WORK program of that name; `swap` needs `REPLACE`, and
//! `RUN` for `replaced`, `save` and `restore`, where there are such programs; `SET_WORK` if the old or
//! the new programs have WORK programs; `SET_IRQ` if a doorbell changes.
//!
//! That is worth nothing where the process can create another VM. It also has to lose `/dev/kvm`, or
//! the ioctl `KVM_CREATE_VM` by a seccomp filter.

use std::fmt;
use std::io;
use std::ops::BitOr;
use std::os::fd::{AsFd, AsRawFd};

use crate::device::Device;
use crate::sys;
use crate::uapi::{
    KVM_BPF_ALLOW_ARENA, KVM_BPF_ALLOW_ASYNC, KVM_BPF_ALLOW_HOST_CPU, KVM_BPF_ALLOW_INNER_MAPS,
    KVM_BPF_ALLOW_IRQ, KVM_BPF_ALLOW_MEM_R, KVM_BPF_ALLOW_MEM_W, KVM_BPF_ALLOW_NEW_REGION,
    KVM_BPF_ALLOW_OTHER_KFUNC, KVM_BPF_ALLOW_REMOVE, KVM_BPF_ALLOW_REPLACE, KVM_BPF_ALLOW_RUN,
    KVM_BPF_ALLOW_SET_IRQ, KVM_BPF_ALLOW_SET_MEM, KVM_BPF_ALLOW_SET_PIO, KVM_BPF_ALLOW_SET_WORK,
    KVM_BPF_ALLOW_SLEEP, KVM_BPF_ALLOW_TAIL_CALL, KVM_BPF_ALLOW_UCLAMP,
    KVM_BPF_REQUIRE_NOT_EXTENSIBLE, KVM_CAP_BPF_SEAL, KVM_DEV_BPF_ATTR_GROUP_PERMS,
    kvm_bpf_user_perms,
};

/// Why permissions are not given up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The host's KVM has no permissions of devices.
    #[error("this host's KVM has no permissions of eBPF devices (an older kernel)")]
    Unsupported,
    /// The device would gain some: `EPERM`.
    #[error("the device has given up {0}")]
    Gone(Allow),
    /// The device's programs would become extensible again: `EPERM`.
    #[error("the device has given up that its programs can be extended")]
    NotExtensible,
    /// A program of the device contains what is to be given up, or is extended: `EBUSY`.
    #[error("the device has a program that needs more than {0}, or that is extended")]
    InUse(Allow),
    /// The kernel refuses it for another reason.
    #[error("cannot change the device's permissions")]
    Device(#[source] io::Error),
    /// The VM is not sealed.
    #[error("cannot seal the VM")]
    Seal(#[source] io::Error),
}

/// What a device's programs may contain, and what the VMM may do with it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Allow(u64);

macro_rules! allow {
    ($($(#[$doc:meta])* $name:ident = $bit:ident),+ $(,)?) => {
        impl Allow {
            $($(#[$doc])* pub const $name: Allow = Allow($bit);)+

            const NAMES: &[(Allow, &str)] = &[$((Self::$name, stringify!($name))),+];
        }
    };
}

allow! {
    /// Programs signal interrupts.
    IRQ = KVM_BPF_ALLOW_IRQ,
    /// Programs learn of the frequency and capacity of the host's CPUs.
    HOST_CPU = KVM_BPF_ALLOW_HOST_CPU,
    /// Programs set the utilization clamps of the vCPU's thread.
    UCLAMP = KVM_BPF_ALLOW_UCLAMP,
    /// Programs read guest memory, in windows.
    READ_MEMORY = KVM_BPF_ALLOW_MEM_R,
    /// Programs write to guest memory, in windows.
    WRITE_MEMORY = KVM_BPF_ALLOW_MEM_W,
    /// Programs have timers, work queues or task work.
    ASYNC = KVM_BPF_ALLOW_ASYNC,
    /// Programs sleep.
    SLEEP = KVM_BPF_ALLOW_SLEEP,
    /// Programs do tail calls, to programs that others put into an array.
    TAIL_CALL = KVM_BPF_ALLOW_TAIL_CALL,
    /// Programs have maps of maps.
    INNER_MAPS = KVM_BPF_ALLOW_INNER_MAPS,
    /// Programs have arenas, which the verifier refuses to these types of programs so far.
    ARENA = KVM_BPF_ALLOW_ARENA,
    /// Programs call other kernel functions, those of later kernels included.
    OTHER_KFUNC = KVM_BPF_ALLOW_OTHER_KFUNC,
    /// The VMM registers regions.
    NEW_REGION = KVM_BPF_ALLOW_NEW_REGION,
    /// The VMM replaces the programs of regions.
    REPLACE = KVM_BPF_ALLOW_REPLACE,
    /// The VMM removes regions.
    REMOVE = KVM_BPF_ALLOW_REMOVE,
    /// The VMM sets and detaches interrupts.
    SET_IRQ = KVM_BPF_ALLOW_SET_IRQ,
    /// The VMM sets and removes windows.
    SET_MEMORY = KVM_BPF_ALLOW_SET_MEM,
    /// The VMM does with regions of ports what it may do with regions.
    SET_PORTS = KVM_BPF_ALLOW_SET_PIO,
    /// The VMM sets and removes WORK programs.
    SET_WORK = KVM_BPF_ALLOW_SET_WORK,
    /// The VMM runs WORK programs: it resets, saves and restores the device.
    RUN = KVM_BPF_ALLOW_RUN,
}

impl Allow {
    /// Nothing.
    pub const NONE: Allow = Allow(0);
    /// All that this library knows.
    pub const ALL: Allow = {
        let mut all = Allow::NONE;
        let mut at = 0;
        while at < Self::NAMES.len() {
            all = Allow(all.0 | Self::NAMES[at].0.0);
            at += 1;
        }
        all
    };

    /// The kernel's bits, `KVM_BPF_ALLOW_*`.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// From the kernel's bits, also those that this library does not know.
    pub const fn from_bits(bits: u64) -> Self {
        Allow(bits)
    }

    /// These but those of the other.
    #[must_use = "it returns what is left, and changes nothing"]
    pub const fn without(self, other: Allow) -> Self {
        Allow(self.0 & !other.0)
    }

    /// Whether it has all of the other.
    pub const fn contains(self, other: Allow) -> bool {
        other.0 & !self.0 == 0
    }
}

impl BitOr for Allow {
    type Output = Allow;

    fn bitor(self, other: Allow) -> Allow {
        Allow(self.0 | other.0)
    }
}

/// Names, separated by commas.
impl fmt::Display for Allow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = *self;
        let mut separator = "";
        for &(bit, name) in Self::NAMES {
            if rest.contains(bit) {
                write!(f, "{separator}{name}")?;
                rest = rest.without(bit);
                separator = ", ";
            }
        }
        match (rest.0, separator) {
            (0, "") => f.write_str("nothing"),
            (0, _) => Ok(()),
            (bits, _) => write!(f, "{separator}{bits:#x}"),
        }
    }
}

impl fmt::Debug for Allow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Allow({self})")
    }
}

/// The permissions of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Permissions {
    /// What is allowed.
    pub allow: Allow,
    /// Whether the device's programs may be extended by others (`BPF_PROG_TYPE_EXT`), which then
    /// may contain anything.
    pub extensible: bool,
}

impl Permissions {
    /// These, and programs that others cannot extend.
    pub const fn new(allow: Allow) -> Self {
        Permissions {
            allow,
            extensible: false,
        }
    }

    /// Why a device that has these does not get others.
    fn refusal(self, to: Permissions) -> Error {
        match to.allow.without(self.allow) {
            Allow::NONE if to.extensible && !self.extensible => Error::NotExtensible,
            gone => Error::Gone(gone),
        }
    }
}

impl Device {
    /// Returns the permissions that are left; of a new device all that the kernel knows.
    ///
    /// # Errors
    ///
    /// [`Unsupported`](Error::Unsupported), and [`Device`](Error::Device) for another reason.
    pub fn permissions(&self) -> Result<Permissions, Error> {
        // SAFETY: it is the structure of that group.
        let perms: io::Result<kvm_bpf_user_perms> =
            unsafe { sys::get_attr(self.as_fd(), KVM_DEV_BPF_ATTR_GROUP_PERMS, 0) };
        let perms = perms.map_err(no_permissions)?;
        Ok(Permissions {
            allow: Allow(perms.allow),
            extensible: perms.require & KVM_BPF_REQUIRE_NOT_EXTENSIBLE == 0,
        })
    }

    /// Gives up all other permissions, for good.
    ///
    /// When this returns, the device has no program that contains what is not allowed. It waits for
    /// other calls that set regions and WORK programs, and for no program.
    ///
    /// # Errors
    ///
    /// [`Gone`](Error::Gone) or [`NotExtensible`](Error::NotExtensible): it is more than is left, or
    /// than the kernel knows. [`InUse`](Error::InUse): a program of the device needs more.
    /// [`Unsupported`](Error::Unsupported), and [`Device`](Error::Device) for another reason.
    /// Nothing has changed.
    pub fn restrict(&self, to: Permissions) -> Result<(), Error> {
        let perms = kvm_bpf_user_perms {
            allow: to.allow.bits(),
            require: if to.extensible {
                0
            } else {
                KVM_BPF_REQUIRE_NOT_EXTENSIBLE
            },
        };
        let set = sys::set_attr(self.as_fd(), KVM_DEV_BPF_ATTR_GROUP_PERMS, 0, &perms);
        set.map_err(|error| match error.raw_os_error() {
            Some(libc::EPERM) => match self.permissions() {
                Ok(left) => left.refusal(to),
                Err(error) => error,
            },
            Some(libc::EBUSY) => Error::InUse(to.allow),
            _ => no_permissions(error),
        })
    }
}

fn no_permissions(error: io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::ENXIO) => Error::Unsupported,
        _ => Error::Device(error),
    }
}

/// Refuses the VM all further devices made of eBPF programs, for good: creating one is then `EPERM`.
///
/// # Errors
///
/// [`Seal`](Error::Seal): the kernel knows no seal (`EINVAL`), say.
pub fn seal(vm: &impl AsRawFd) -> Result<(), Error> {
    sys::enable_cap(vm.as_raw_fd(), KVM_CAP_BPF_SEAL, 1).map_err(Error::Seal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_have_names() {
        assert_eq!(Allow::NONE.to_string(), "nothing");
        let some = Allow::RUN | Allow::IRQ;
        assert_eq!(some.to_string(), "IRQ, RUN");
        assert_eq!(
            (some | Allow(1 << 40)).to_string(),
            "IRQ, RUN, 0x10000000000"
        );
        assert_eq!(Allow(1 << 40).to_string(), "0x10000000000");
        assert!(some.contains(Allow::IRQ) && !Allow::IRQ.contains(some));
        assert_eq!(some.without(Allow::RUN), Allow::IRQ);
    }

    #[test]
    fn refusals_say_what_is_gone() {
        let left = Permissions::new(Allow::IRQ);
        let mut to = left;
        to.extensible = true;
        assert!(matches!(left.refusal(to), Error::NotExtensible));
        to.allow = Allow::IRQ | Allow::RUN;
        assert!(matches!(left.refusal(to), Error::Gone(Allow::RUN)));
    }

    #[test]
    fn each_bit_has_one_name() {
        let all = Allow::NAMES.iter().fold(0, |all, (bit, _)| {
            assert_eq!((all & bit.0, bit.0.count_ones()), (0, 1));
            all | bit.0
        });
        assert_eq!((all, Allow::ALL.bits()), (0xff_07ff, 0xff_07ff));
    }
}
