// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A guest of a few instructions: it does one access, or a loop of them, and stops.
//!
//! The host puts arguments into registers, points the program counter at a
//! [`Routine`] and runs the vCPU until the routine says that it is done.
//! Accesses that reach user space on the way are written down.

use std::fs;
use std::slice;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_MEM_READONLY, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VmFd};

use crate::harness::Errno;
use memory::Ram;

#[cfg(target_arch = "aarch64")]
#[path = "guest/aarch64.rs"]
mod arch;
#[cfg(target_arch = "x86_64")]
#[path = "guest/x86_64.rs"]
mod arch;
mod memory;
mod routine;
mod vcpu;

#[cfg(target_arch = "aarch64")]
pub use arch::REDISTRIBUTORS;
pub use arch::{IRQCHIP_ADDR, register_after_read, ticks};
pub use memory::SharedMemory;
pub use routine::{
    Args, QUEUE_AVAIL, QUEUE_ENTRIES, QUEUE_PER_REQUEST, QUEUE_TEMPLATE, QUEUE_USED, Results,
    Routine,
};
pub use vcpu::{Access, Exit, Read, Vcpu, mask};
#[cfg(target_arch = "x86_64")]
pub use vcpu::{PortExit, user_byte};

/// The guest has RAM from 0 up to here and nowhere else.
pub const RAM_SIZE: u64 = 0x1_0000;

/// Where the routines are in the guest's RAM.
const CODE: u64 = 0x8000;

/// What user space gives a read that reaches it.
pub const USER_ANSWER: u64 = 0xeeee_eeee_eeee_eeee;

/// What the guest's register holds before it reads.
pub const PRESET: u64 = 0xa5a5_a5a5_a5a5_a5a5;

/// A number that is larger if the kernel has more virtual machines, where it tells: the entries in
/// KVM's debugfs, or the references to KVM's module, which its open files hold, too.
pub fn vms() -> Option<usize> {
    if let Ok(entries) = fs::read_dir("/sys/kernel/debug/kvm") {
        return Some(
            entries
                .flatten()
                .filter(|entry| entry.path().is_dir())
                .count(),
        );
    }
    ["kvm_amd", "kvm_intel"].iter().find_map(|module| {
        let text = fs::read_to_string(format!("/sys/module/{module}/refcnt")).ok()?;
        text.trim().parse().ok()
    })
}

/// The assembled routines.
fn code() -> &'static [u8] {
    unsafe extern "C" {
        static kvm_bpf_guest: u8;
        static kvm_bpf_guest_end: u8;
    }
    let (start, end) = (&raw const kvm_bpf_guest, &raw const kvm_bpf_guest_end);
    // SAFETY: the two symbols enclose the read-only bytes of the assembly.
    unsafe { slice::from_raw_parts(start, end as usize - start as usize) }
}

/// A virtual machine with some RAM; dropping it closes the VM's fd.
#[allow(missing_debug_implementations)]
pub struct Guest {
    kvm: Kvm,
    vm: VmFd,
    ram: Arc<Ram>,
    irqchip: Option<arch::Irqchip>,
    shared: Option<Arc<SharedMemory>>,
    /// One of its vCPUs has run.
    has_run: Arc<AtomicBool>,
    paging: bool,
}

impl Guest {
    /// A VM without interrupt controllers.
    pub fn new() -> Self {
        Self::on(Kvm::new().expect("open /dev/kvm"))
    }

    /// The same, for a thread that may not open `/dev/kvm` itself.
    pub fn on(kvm: Kvm) -> Self {
        let vm = arch::create_vm(&kvm);
        Self::of(kvm, vm)
    }

    /// One whose memory is taken from the host page by page, as the guest touches it: then the host
    /// may not touch it. Ends the test as ignored where the host has no such guests.
    #[cfg(target_arch = "aarch64")]
    pub fn protected() -> Self {
        let kvm = Kvm::new().expect("open /dev/kvm");
        let vm = arch::create_protected_vm(&kvm);
        Self::of(kvm, vm)
    }

    fn of(kvm: Kvm, vm: VmFd) -> Self {
        let ram = Arc::new(Ram::new());
        arch::prepare_ram(&ram);
        ram.write(CODE as usize, code());
        let slot = kvm_userspace_memory_region {
            memory_size: RAM_SIZE,
            userspace_addr: ram.0 as u64,
            ..Default::default()
        };
        // SAFETY: the mapping lives as long as the VM and its vCPUs, which share it.
        unsafe { vm.set_user_memory_region(slot) }.expect("KVM_SET_USER_MEMORY_REGION");
        Guest {
            kvm,
            vm,
            ram,
            irqchip: None,
            shared: None,
            has_run: Arc::default(),
            paging: true,
        }
    }

    /// Takes the guest's memory from an address on away from it.
    pub fn end_ram_at(&self, addr: u64) {
        for memory_size in [0, addr] {
            let slot = kvm_userspace_memory_region {
                memory_size,
                userspace_addr: self.ram.0 as u64,
                ..Default::default()
            };
            // SAFETY: as for all of the memory.
            unsafe { self.vm.set_user_memory_region(slot) }.expect("KVM_SET_USER_MEMORY_REGION");
        }
    }

    /// Has vCPUs that come now start without paging, in 32 bits: for the loops of [`Routine`] that
    /// take no `pair`, and for single accesses of up to 4 bytes.
    #[cfg(target_arch = "x86_64")]
    pub fn without_paging(mut self) -> Self {
        self.paging = false;
        self
    }

    /// Has the guest see the first page of its memory at another address too, for loads only.
    pub fn add_rom(&self, addr: u64) {
        let slot = kvm_userspace_memory_region {
            slot: 1,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: addr,
            memory_size: 0x1000,
            userspace_addr: self.ram.0 as u64,
        };
        // SAFETY: as for the memory's own slot.
        unsafe { self.vm.set_user_memory_region(slot) }.expect("KVM_SET_USER_MEMORY_REGION");
    }

    /// Has vCPUs that come now write the pages that they make dirty into rings of so many bytes;
    /// returns whether KVM can.
    pub fn try_dirty_rings(&self, bytes: u64) -> bool {
        [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING]
            .into_iter()
            .any(|cap| {
                let cap = kvm_enable_cap {
                    cap,
                    args: [bytes, 0, 0, 0],
                    ..Default::default()
                };
                self.vm.enable_cap(&cap).is_ok()
            })
    }

    /// Has the guest see shared memory at an address; before its first vCPU.
    pub fn add_shared(&mut self, addr: u64, memory: &Arc<SharedMemory>) {
        let slot = kvm_userspace_memory_region {
            slot: 2,
            guest_phys_addr: addr,
            memory_size: memory.size as u64,
            userspace_addr: memory.words as u64,
            ..Default::default()
        };
        // SAFETY: the mapping lives as long as the VM and its vCPUs, which share it.
        unsafe { self.vm.set_user_memory_region(slot) }.expect("KVM_SET_USER_MEMORY_REGION");
        self.shared = Some(Arc::clone(memory));
    }

    /// A VM with KVM's own interrupt controllers, for one vCPU that takes interrupts.
    pub fn with_irqchip() -> Self {
        let mut guest = Self::new();
        guest
            .try_add_irqchip()
            .unwrap_or_else(|errno| panic!("wanted interrupt controllers, got {errno:?}"));
        guest
    }

    /// Adds them to a VM that has none and no vCPU.
    pub fn try_add_irqchip(&mut self) -> Result<(), Errno> {
        self.irqchip = Some(arch::Irqchip::new(&self.vm)?);
        Ok(())
    }

    /// Adds that vCPU and makes it accept interrupts.
    pub fn vcpu_with_interrupts(&self) -> Vcpu {
        let mut vcpu = self.vcpu(0);
        self.connect(&mut vcpu);
        vcpu
    }

    /// Makes a vCPU accept interrupts; all vCPUs are there.
    pub fn connect(&self, vcpu: &mut Vcpu) {
        let irqchip = self.irqchip.as_ref().expect("a guest with an irqchip");
        irqchip.connect(vcpu);
    }

    /// All vCPUs are there: the interrupt controller starts.
    #[cfg(target_arch = "aarch64")]
    pub fn start_irqchip(&self) {
        let irqchip = self.irqchip.as_ref().expect("a guest with an irqchip");
        irqchip.start();
    }

    /// Has the interrupt controller hand on a line (its GSI) to that vCPU.
    pub fn route_line(&self, vcpu: &mut Vcpu, gsi: u32, level: bool) {
        let irqchip = self.irqchip.as_ref().expect("a guest with an irqchip");
        irqchip.route_line(vcpu, gsi, level);
    }

    /// Has each signal of a GSI interrupt that vCPU: as a message on x86, which KVM hands on at
    /// once, unlike a pin's; as a line on arm64, where it does so with lines.
    pub fn route_edge(&self, vcpu: &mut Vcpu, gsi: u32) {
        let irqchip = self.irqchip.as_ref().expect("a guest with an irqchip");
        irqchip.route_edge(&self.vm, vcpu, gsi);
    }

    /// The VM's fd.
    pub fn vm(&self) -> &VmFd {
        &self.vm
    }

    /// Adds a vCPU, before one runs: pKVM takes none later.
    #[track_caller]
    pub fn vcpu(&self, id: u32) -> Vcpu {
        self.try_vcpu(id)
            .unwrap_or_else(|errno| panic!("wanted KVM_CREATE_VCPU to work, got {errno:?}"))
    }

    /// The same, or the kernel's errno.
    #[track_caller]
    pub fn try_vcpu(&self, id: u32) -> Result<Vcpu, Errno> {
        let has_run = self.has_run.load(Ordering::Relaxed);
        assert!(!has_run, "vCPU {id} comes after another one has run");
        let fd = self.vm.create_vcpu(id.into());
        let fd = fd.map_err(|error| Errno(error.errno()))?;
        arch::prepare_vcpu(&self.kvm, &self.vm, &fd, self.paging);
        Ok(Vcpu {
            fd,
            _ram: Arc::clone(&self.ram),
            _shared: self.shared.clone(),
            has_run: Arc::clone(&self.has_run),
        })
    }

    /// Writes the guest's memory.
    pub fn write_ram(&self, addr: u64, bytes: &[u8]) {
        self.ram.write(addr as usize, bytes);
    }

    /// Reads the guest's memory.
    pub fn read_ram<const N: usize>(&self, addr: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.ram.read(addr as usize, &mut bytes);
        bytes
    }
}

impl Default for Guest {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_fits_between_its_address_and_the_stack() {
        assert!(code().len() >= 64 * 11, "got {} bytes", code().len());
        assert!(code().len() <= 0x1000, "got {} bytes", code().len());
    }

    #[test]
    fn masks() {
        assert_eq!(
            [1, 2, 4, 8].map(mask),
            [0xff, 0xffff, 0xffff_ffff, u64::MAX]
        );
    }

    /// A guest, where this machine can run one.
    fn guest() -> Option<Guest> {
        let guest = Kvm::new().ok().map(Guest::on);
        if guest.is_none() {
            eprintln!("ignored: no /dev/kvm");
        }
        guest
    }

    #[test]
    fn accesses_without_a_device_reach_user_space() {
        let Some(guest) = guest() else { return };
        let mut vcpu = guest.vcpu(3);
        drop(guest);
        for width in [1, 2, 4, 8] {
            let read = vcpu.read(0xd000_0000, width);
            let value = USER_ANSWER & mask(width);
            assert_eq!(read.exits, [Exit::Read(0xd000_0000, width)]);
            assert_eq!(read.value, value);
            assert_eq!(read.register, register_after_read(PRESET, value, width));

            let value: u64 = 0x8877_6655_4433_2211;
            let exits = vcpu.write(0xd000_0000, width, value);
            assert_eq!(
                exits,
                [Exit::Write(0xd000_0000, width, value & mask(width))]
            );
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn ports_without_a_device_reach_user_space() {
        let Some(guest) = guest() else { return };
        let mut vcpu = guest.vcpu(0);
        for width in [1, 2, 4] {
            let (register, exits) = vcpu.port_in(0x510, width);
            assert_eq!(exits, [PortExit::In(0x510, width, 1)]);
            let bytes: [u8; 8] = std::array::from_fn(user_byte);
            let value = u64::from_le_bytes(bytes) & mask(width);
            assert_eq!(register, register_after_read(PRESET, value, width));

            let exits = vcpu.port_out(0x510, width, 0x44_3322_1100);
            let data = 0x44_3322_1100_u64.to_le_bytes()[..width].to_vec();
            assert_eq!(exits, [PortExit::Out(0x510, width, data)]);
        }
    }

    #[test]
    fn hammer_ends_at_a_wrong_answer() {
        let Some(guest) = guest() else { return };
        let mut vcpu = guest.vcpu(0);
        for (pair, left, exits) in [
            ([0, USER_ANSWER], 0, 20),
            ([USER_ANSWER, 0], 0, 20),
            ([0; 2], 10, 2),
        ] {
            let args = Args {
                value: 1,
                addr: 0xd000_0000,
                count: 10,
                pair,
            };
            let (results, seen) = vcpu.call(Routine::Hammer, args);
            assert_eq!((results.count, results.value), (left, USER_ANSWER));
            assert_eq!(seen.len(), exits);
        }
    }

    #[test]
    fn takes_interrupts() {
        use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

        if guest().is_none() {
            return;
        }
        let guest = Guest::with_irqchip();
        let mut vcpu = guest.vcpu_with_interrupts();
        let (line, resample) = (
            EventFd::new(0).unwrap(),
            EventFd::new(EFD_NONBLOCK).unwrap(),
        );
        for level in [false, true] {
            guest.route_line(&mut vcpu, 20, level);
            if level {
                guest.vm().unregister_irqfd(&line, 20).unwrap();
                guest
                    .vm()
                    .register_irqfd_with_resample(&line, &resample, 20)
                    .unwrap();
            } else {
                guest.vm().register_irqfd(&line, 20).unwrap();
            }
            for _ in 0..3 {
                line.write(1).unwrap();
                let args = Args {
                    addr: 0xd000_0000,
                    count: 1,
                    ..Default::default()
                };
                let (results, exits) = vcpu.call(Routine::AwaitInterrupts, args);
                assert_eq!((results.value, exits.len()), (1, 1));
            }
        }
        assert_eq!(resample.read().unwrap(), 3);
    }
}
