// SPDX-License-Identifier: GPL-2.0-only

//! What a device's programs may contain, and what user space may do with the device.
//!
//! User space gives permissions up and never gets them back, so that code which takes it over later
//! has no more than it has left. They are looked at when user space calls, never when the guest
//! accesses the device.

use super::NO_FD;
use core::ops::Deref;
use kernel::{
    bpf::{
        Prog,
        ProgType,
        Unextended, //
    },
    kvm::prog,
    prelude::*,
    sync::{
        aref::ARef,
        SetOnce, //
    },
    uapi,
};

/// The permissions of a device.
#[derive(Clone, Copy)]
pub(crate) struct Perms {
    /// `KVM_BPF_ALLOW_*`.
    allow: u64,
    /// `KVM_BPF_REQUIRE_*`.
    require: u64,
}

const NOT_EXTENSIBLE: u64 = uapi::KVM_BPF_REQUIRE_NOT_EXTENSIBLE as u64;

impl Perms {
    /// What a new device has.
    pub(crate) const ALL: Self = Self {
        allow: (uapi::KVM_BPF_ALLOW_IRQ
            | uapi::KVM_BPF_ALLOW_HOST_CPU
            | uapi::KVM_BPF_ALLOW_UCLAMP
            | uapi::KVM_BPF_ALLOW_MEM_R
            | uapi::KVM_BPF_ALLOW_MEM_W
            | uapi::KVM_BPF_ALLOW_ASYNC
            | uapi::KVM_BPF_ALLOW_SLEEP
            | uapi::KVM_BPF_ALLOW_TAIL_CALL
            | uapi::KVM_BPF_ALLOW_INNER_MAPS
            | uapi::KVM_BPF_ALLOW_ARENA
            | uapi::KVM_BPF_ALLOW_OTHER_KFUNC
            | uapi::KVM_BPF_ALLOW_NEW_REGION
            | uapi::KVM_BPF_ALLOW_REPLACE
            | uapi::KVM_BPF_ALLOW_REMOVE
            | uapi::KVM_BPF_ALLOW_SET_IRQ
            | uapi::KVM_BPF_ALLOW_SET_MEM
            | uapi::KVM_BPF_ALLOW_SET_PIO
            | uapi::KVM_BPF_ALLOW_SET_WORK
            | uapi::KVM_BPF_ALLOW_RUN) as u64,
        require: 0,
    };

    /// Fails with `EACCES` unless all of these `KVM_BPF_ALLOW_*` are there.
    pub(crate) fn check(&self, allow: u32) -> Result {
        if u64::from(allow) & !self.allow != 0 {
            return Err(EACCES);
        }
        Ok(())
    }

    /// Whether no program of the device may be extended.
    pub(crate) fn not_extensible(&self) -> bool {
        self.require & NOT_EXTENSIBLE != 0
    }

    /// Returns the permissions that user space wants to keep.
    ///
    /// # Errors
    ///
    /// - `EINVAL`: it requires what there is not.
    /// - `EPERM`: it would gain some.
    pub(crate) fn narrowed(&self, to: &uapi::kvm_bpf_user_perms) -> Result<Self> {
        if to.require & !NOT_EXTENSIBLE != 0 {
            return Err(EINVAL);
        }
        if to.allow & !self.allow != 0 || self.require & !to.require != 0 {
            return Err(EPERM);
        }
        Ok(Self {
            allow: to.allow,
            require: to.require,
        })
    }

    /// Returns them for user space.
    pub(crate) fn to_user(self) -> uapi::kvm_bpf_user_perms {
        uapi::kvm_bpf_user_perms {
            allow: self.allow,
            require: self.require,
        }
    }
}

/// A program that a device has.
pub(crate) struct Attached<T: ProgType> {
    prog: ARef<Prog<T>>,
    /// Apart: an access does not look at it, and finds all else in one line of the cache.
    needs: KBox<Needs>,
}

/// What a program needs permissions for.
struct Needs {
    /// `KVM_BPF_ALLOW_*`.
    allow: u32,
    /// Once no other program may extend it.
    unextended: SetOnce<Unextended>,
}

impl<T: ProgType> Attached<T> {
    /// Takes a reference to the program that user space has named; [`None`] for none.
    pub(crate) fn from_fd(fd: i32) -> Result<Option<Self>> {
        if fd == NO_FD {
            return Ok(None);
        }
        // CAST: Other negative numbers become ones that are never open: `EBADF`.
        let prog = Prog::from_fd(fd as u32)?;

        let needs = Needs {
            allow: prog::needs(&prog),
            unextended: SetOnce::new(),
        };

        Ok(Some(Self {
            prog,
            needs: KBox::new(needs, GFP_KERNEL_ACCOUNT)?,
        }))
    }

    /// Prepares a new program to be attached.
    ///
    /// # Errors
    ///
    /// `EACCES`: it contains what is not allowed, or is extended and must not be.
    pub(crate) fn admit(&self, perms: &Perms) -> Result {
        perms.check(self.needs.allow)?;
        if perms.not_extensible() {
            self.keep(self.prog.forbid_extension().map_err(|_| EACCES)?);
        }
        Ok(())
    }
}

impl<T: ProgType> Deref for Attached<T> {
    type Target = ARef<Prog<T>>;

    #[inline]
    fn deref(&self) -> &Self::Target {
        &self.prog
    }
}

/// An [`Attached`] program of any type.
pub(crate) trait AnyAttached {
    /// Fails with `EACCES` unless these permissions allow what it contains.
    fn check(&self, perms: &Perms) -> Result;

    /// Keeps others from extending it; `EBUSY` if one does.
    fn forbid_extension(&self) -> Result<Unextended>;

    /// Keeps it so for as long as it is attached.
    fn keep(&self, unextended: Unextended);
}

impl<T: ProgType> AnyAttached for Attached<T> {
    fn check(&self, perms: &Perms) -> Result {
        perms.check(self.needs.allow)
    }

    fn forbid_extension(&self) -> Result<Unextended> {
        self.prog.forbid_extension()
    }

    fn keep(&self, unextended: Unextended) {
        self.needs.unextended.populate(unextended);
    }
}
