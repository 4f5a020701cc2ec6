// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Virtual devices that KVM runs as eBPF programs.
//!
//! A device is an object file: programs that handle guest reads and writes,
//! maps with its state, and a [`note`] with its size, its interrupts and its
//! name. [`OpenImage`] opens such a file, [`Image`] is the loaded one, and
//! [`ImageDevice`] puts it into a VM, where accesses no longer leave the
//! kernel. [`Device`] is the KVM device by itself, for a VMM that loads
//! programs in another way, or is handed them by a process with more rights.
//!
//! ```no_run
//! use kvm_bpf::{Device, ImageDevice, OnLoss, OpenImage, Place};
//! use vmm_sys_util::eventfd::EventFd;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # use std::path::Path;
//! let vm = kvm_ioctls::Kvm::new()?.create_vm()?;
//! let file = Path::new("regbank.bpf.o");
//! let device = Device::new(&vm)?;
//! let image = OpenImage::open_file(file)?.load()?;
//!
//! // With interrupt controllers there; on arm64 the GIC must also have started, which it does
//! // when all vCPUs are there. GSI n is its shared interrupt n. Keep `irq` open.
//! let irq = EventFd::new(0)?;
//! vm.register_irqfd(&irq, 5)?;
//! device.set_irq(0, &irq)?;
//!
//! // When all is set the guest gets to see it.
//! let mut device = ImageDevice::new(device, Place::Memory(0xd000_0000), image)?;
//!
//! // Later, while vCPUs run: new programs, same state.
//! let changes = device.replace(OpenImage::open_file(file)?, OnLoss::Refuse, |swap| {
//!     // Here the vCPUs stop, if it is called at all,
//!     swap();
//!     // and here they go on.
//! })?;
//! println!("{changes}");
//! # Ok(())
//! # }
//! ```
//!
//! Which addresses a device gets, how the guest learns of them, what an access
//! does that no program handled, and what a device's maps must hold before a
//! vCPU runs (the offset of a clock, say: through [`Image::map`]) is up to the VMM.
//!
//! Loading needs `CAP_BPF`, and a seccomp filter that lets bpf(2) through. A VMM
//! without takes file descriptors of programs from a process that has them, with
//! [`Device::set_region`].

#[cfg(feature = "acpi")]
pub mod acpi;
pub mod clock;
pub mod device;
#[cfg(feature = "fdt")]
pub mod fdt;
pub mod image;
mod mapping;
mod maps;
pub mod note;
pub mod page;
mod schema;
pub mod state;
pub mod uapi;

pub use device::{Device, ImageDevice, Place, Replacement, Window};
pub use image::{Image, OpenImage, Work};
pub use mapping::Words;
pub use maps::{MapChanges, OnLoss};
pub use note::Note;
pub use page::{NoSlot, ReadPage};
pub use state::State;
