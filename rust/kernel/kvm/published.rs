// SPDX-License-Identifier: GPL-2.0

//! Values that the readers of a VM's SRCU use, and that others can take the place of meanwhile.

use super::Vm;
use crate::{
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{
            Acquire,
            Atomic,
            Full, //
        }, //
    },
};

/// A value that another one can take the place of at any time.
///
/// # Invariants
///
/// `value` came from a [`KBox`] and is valid; code that takes it out waits for the readers of the
/// VM's SRCU before it is freed.
pub(super) struct Published<T: Send + Sync + 'static> {
    value: Atomic<*mut T>,
}

impl<T: Send + Sync + 'static> Published<T> {
    #[inline]
    pub(super) fn new(value: KBox<T>) -> Self {
        // INVARIANT: From a `KBox`.
        Self {
            value: Atomic::new(KBox::into_raw(value)),
        }
    }

    /// Returns the value.
    ///
    /// # Safety
    ///
    /// For `'a`, `self` must live, and the caller must be in a read-side section of the VM's SRCU
    /// or keep others from replacing the value.
    #[inline(always)]
    pub(super) unsafe fn get<'a>(&self) -> &'a T {
        // As `rcu_dereference()` does it, by a volatile load: what is read through the pointer
        // depends on it, and needs no more order than that. `Atomic` would call a function.
        //
        // SAFETY: By the safety requirements and the type invariants.
        unsafe { &*self.value.as_ptr().read_volatile() }
    }

    /// Has `value` take the place of the present one, which is returned.
    ///
    /// # Safety
    ///
    /// `vm` must be the one in whose SRCU's read-side sections [`Self::get()`] is called.
    #[inline]
    pub(super) unsafe fn replace(&self, vm: &Vm, value: KBox<T>) -> Replaced<T> {
        // INVARIANT: From a `KBox`, here and there.
        Replaced {
            value: self.value.xchg(KBox::into_raw(value), Full),
            vm: vm.into(),
        }
    }
}

impl<T: Send + Sync + 'static> Drop for Published<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariants, and no reference from `get()` is in use.
        drop(unsafe { KBox::from_raw(self.value.load(Acquire)) });
    }
}

/// A value that another one has taken the place of.
///
/// Dropping it waits until no reader of the VM's SRCU uses it, and drops it. It must not be dropped
/// by such a reader.
///
/// # Invariants
///
/// `value` came from a [`KBox`], and out of a [`Published`] for readers of the SRCU of `vm`.
#[must_use]
pub struct Replaced<T> {
    value: *mut T,
    vm: ARef<Vm>,
}

impl<T> Drop for Replaced<T> {
    fn drop(&mut self) {
        self.vm.srcu().synchronize_expedited();
        // SAFETY: By the type invariants. Nobody else has taken this pointer out, and the readers
        // that might have loaded it are gone.
        drop(unsafe { KBox::from_raw(self.value) });
    }
}
