// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the tests and the benchmark of `KVM_DEV_TYPE_BPF` are made of.
//!
//! * [`guest`]: a virtual machine whose program is a few instructions long,
//! * [`device`]: the device's ioctls, with nothing checked on the way,
//! * [`bpf`]: instructions, programs and maps,
//! * [`cgroup`]: control groups, of what they allow and what they count,
//! * [`peer`]: another process, which gets fds over a socket,
//! * [`programs`]: device programs that several tests share,
//! * [`vmm`]: the VMM with a Linux guest, as a process,
//! * [`harness`]: skips, time limits and bounded waiting,
//! * [`marker`]: what QEMU's plugin is told.

pub mod bpf;
pub mod cgroup;
pub mod device;
pub mod guest;
pub mod harness;
pub mod marker;
pub mod peer;
pub mod programs;
pub mod vmm;
