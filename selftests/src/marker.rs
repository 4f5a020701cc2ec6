// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Instructions without effect that `scripts/plugin.rs` finds when QEMU executes them.

use std::arch::asm;

/// What the plugin is told.
#[derive(Clone, Copy, Debug)]
pub enum Marker {
    /// Code that comes to be executed from now on is looked at.
    Watch,
    /// Counts from here on are those of the first phase.
    First,
    /// From here on, of the second phase.
    Second,
    /// Nothing counts any more.
    End,
}

/// Tells it.
pub fn mark(marker: Marker) {
    match marker {
        Marker::Watch => word::<0>(),
        Marker::First => word::<1>(),
        Marker::Second => word::<2>(),
        Marker::End => word::<3>(),
    }
}

/// `nop` with a displacement of four bytes.
#[cfg(target_arch = "x86_64")]
fn word<const N: i32>() {
    // SAFETY: a `nop` that names an address does not access it.
    unsafe { asm!("nop dword ptr [rax + {}]", const 0x4b42_5040 + N) };
}

/// A move to the register that is always zero.
#[cfg(target_arch = "aarch64")]
fn word<const N: i32>() {
    // SAFETY: nothing changes.
    unsafe { asm!("movz xzr, {}", const 0x4b40 + N) };
}
