// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Virtual devices that KVM runs as eBPF programs.
//!
//! A device is an object file: programs that handle guest reads and writes,
//! maps with its state, and a [`note`] with its size, its interrupts and its
//! name. [`Programs`] are such a file in the kernel: a VMM loads it (`OpenImage`, feature `loader`),
//! is sent it over a socket by a process with more rights, or finds it pinned in a directory (feature
//! `serde`). [`ImageDevice`] puts them into a VM, where accesses no longer leave the kernel.
//! [`Device`] is the KVM device by itself.
//!
//! ```no_run
//! # #[cfg(feature = "loader")]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # use std::path::Path;
//! use kvm_bpf::{Abi, Device, ImageDevice, OnLoss, OpenImage, Place};
//! use vmm_sys_util::eventfd::EventFd;
//!
//! let vm = kvm_ioctls::Kvm::new()?.create_vm()?;
//! let file = Path::new("regbank.bpf.o");
//!
//! // While the process has rights.
//! let abi = Abi::from_running_kernel()?;
//! let mut image = OpenImage::open_file(file)?;
//! image.set_abi(&abi);
//! let programs = image.load()?;
//!
//! // With interrupt controllers there; on arm64 the GIC must also have started, which it does
//! // when all vCPUs are there. GSI n is its shared interrupt n.
//! let irq = EventFd::new(0)?;
//! vm.register_irqfd(&irq, 5)?;
//!
//! // The last step has the guest see it.
//! let mut device = ImageDevice::builder(Device::with_abi(&vm, &abi)?, programs)
//!     .irq(0, &irq)?
//!     .plug(Place::Memory(0xd000_0000))?;
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
//! # #[cfg(not(feature = "loader"))]
//! # fn main() {}
//! ```
//!
//! Which addresses a device gets, how the guest learns of them, what an access
//! does that no program handled, and the values of a device's parameters (the
//! offset of a clock, say: [`Builder::param`]) are up to the VMM.
//!
//! # Rights
//!
//! Loading and pinning need `CAP_BPF` or a token, and bpf(2). Receiving [`Programs`], plugging them
//! in, [`ImageDevice::swap`], saving and restoring need none, and call no bpf(2). The crate's README
//! has the system calls that a seccomp filter lets through.
//!
//! A device is its VM's: a process that has another address space, as after fork(2), gets `EIO` for
//! what it asks of it.
//!
//! # Features
//!
//! | feature | what for | what it links |
//! | --- | --- | --- |
//! | none | devices of programs that are there already | no C |
//! | `serde` (default) | state as JSON; programs over sockets, and pinned | no C |
//! | `loader` (default) | object files: `OpenImage` | libbpf; the system's libelf and zlib |
//! | `vendored` | `loader`, and nothing of the system's | libbpf, libelf and zlib, statically |
//! | `log` | what libbpf prints, through the crate `log` | as `loader` |
//! | `fdt` | the device's node in a device tree | no C |
//! | `acpi` | the device's object in ACPI's namespace | no C |
//!
//! File descriptors of the VMM are `impl AsRawFd`, which eventfds and VMs of all versions of
//! `vmm-sys-util` and `kvm-ioctls` are; errors of the kernel are [`std::io::Error`].

#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod abi;
#[cfg(feature = "acpi")]
pub mod acpi;
pub mod clock;
pub mod device;
#[cfg(feature = "fdt")]
pub mod fdt;
pub mod file;
#[cfg(feature = "loader")]
pub mod image;
mod image_device;
#[cfg(feature = "loader")]
mod layouts;
mod mapping;
#[cfg_attr(not(feature = "loader"), allow(dead_code))]
mod maps;
pub mod note;
#[cfg(feature = "loader")]
mod object_types;
pub mod page;
mod param;
pub mod perms;
pub mod programs;
mod ring_buffer;
#[cfg_attr(not(feature = "loader"), allow(dead_code))]
mod schema;
pub mod state;
mod sys;
#[cfg(feature = "serde")]
pub mod transfer;
pub mod uapi;

pub use abi::Abi;
pub use device::{Device, Place, Window};
#[cfg(feature = "loader")]
pub use image::OpenImage;
pub use image_device::{Builder, ImageDevice};
pub use mapping::Words;
pub use maps::{MapChanges, OnLoss};
pub use note::Note;
pub use page::{NoSlot, ReadPage};
pub use perms::Permissions;
pub use programs::{Map, ProgramStats, Programs, Work};
pub use ring_buffer::RingBuffer;
pub use state::State;
