// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What is arm64's own: boot, CPUs, interrupt controller, console.
//!
//! The guest enters an Image with a device tree, as the kernel's boot protocol
//! (Documentation/arch/arm64/booting.rst) describes it. KVM serves the
//! interrupt controller (a GICv3, which the host's must be too), the timer and
//! PSCI, through which the guest starts its other CPUs, resets and powers off.

mod fdt;
mod state;

use std::fs::File;
use std::mem::offset_of;
use std::ops::RangeInclusive;
use std::ptr;

use kvm_bindings::{
    KVM_ARM_VCPU_POWER_OFF, KVM_ARM_VCPU_PSCI_0_2, KVM_CAP_ARM_NISV_TO_USER,
    KVM_DEV_ARM_VGIC_CTRL_INIT, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_DEV_ARM_VGIC_GRP_CTRL,
    KVM_DEV_ARM_VGIC_GRP_NR_IRQS, KVM_REG_ARM_CORE, KVM_REG_ARM64, KVM_REG_ARM64_SYSREG,
    KVM_REG_SIZE_U64, KVM_VGIC_V3_ADDR_TYPE_DIST, KVM_VGIC_V3_ADDR_TYPE_REDIST, kvm_create_device,
    kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3, kvm_enable_cap, kvm_vcpu_init,
    user_pt_regs,
};
use kvm_ioctls::{Cap, DeviceFd, Kvm, VcpuFd, VmFd};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::pe::PE;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::errno;

pub use self::fdt::{Error as FdtError, RAM_START, has_line, reserved_ranges};
use self::fdt::{GIC_DIST_ADDR, GIC_REDIST_ADDR, Machine, SERIAL_ADDR, SERIAL_GSI, SERIAL_SIZE};
pub use self::state::{PlatformState, VcpuState};
use crate::boot::{Error, kvm, load_initrd};
use crate::console::Console;
use crate::output::Output;
use crate::vm::GuestDevice;

/// What the VMM needs of KVM here.
pub const CAPABILITIES: [(Cap, &str); 6] = [
    (Cap::ArmPsci02, "KVM_CAP_ARM_PSCI_0_2"),
    (Cap::DeviceCtrl, "KVM_CAP_DEVICE_CTRL"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::OneReg, "KVM_CAP_ONE_REG"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
];

/// Command line that every guest gets.
pub const CMDLINE: &str = "console=ttyS0 panic=-1";

/// Shared interrupts for devices: all but the console's. KVM's GSI n is SPI n if not told else.
pub const DEVICE_GSIS: RangeInclusive<u32> = SERIAL_GSI + 1..=255;

/// Interrupts of the GIC, with the 32 that are each CPU's own.
const NR_IRQS: u32 = 32 + 256;

/// The device tree is at RAM's end, and the kernel takes no larger one.
const FDT_MAX_SIZE: u64 = 2 << 20;
/// `COMMAND_LINE_SIZE` of the kernel, with the final NUL.
const CMDLINE_MAX: usize = 2048;
/// Where an Image's header has its size in memory, BSS included; the file is shorter.
const IMAGE_SIZE: u64 = 16;

/// KVM's name of a system register of 64 bits: op0 3, CRm 7, the rest 0.
const ID_AA64MMFR0_EL1: u64 =
    KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM64_SYSREG as u64 | 3 << 14 | 7 << 3;

/// The interrupt controller and the console.
pub struct Platform {
    gic: DeviceFd,
    console: Console,
}

impl Platform {
    /// Creates the interrupt controller, which starts when the vCPUs are there, and the console.
    pub fn new(vm: &VmFd) -> Result<Self, Error> {
        // Accesses that the CPU does not describe would otherwise make KVM_RUN fail.
        if vm.check_extension_raw(KVM_CAP_ARM_NISV_TO_USER.into()) > 0 {
            vm.enable_cap(&kvm_enable_cap {
                cap: KVM_CAP_ARM_NISV_TO_USER,
                ..Default::default()
            })
            .map_err(kvm("ask for accesses without syndrome"))?;
        }
        let mut create = kvm_create_device {
            type_: kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3,
            fd: 0,
            flags: 0,
        };
        let gic = vm
            .create_device(&mut create)
            .map_err(kvm("create the interrupt controller, a GICv3"))?;
        for (r#type, addr) in [
            (KVM_VGIC_V3_ADDR_TYPE_DIST, GIC_DIST_ADDR),
            (KVM_VGIC_V3_ADDR_TYPE_REDIST, GIC_REDIST_ADDR),
        ] {
            set_attr(&gic, KVM_DEV_ARM_VGIC_GRP_ADDR, r#type, Some(&addr))
                .map_err(kvm("place the interrupt controller"))?;
        }
        set_attr(&gic, KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, Some(&NR_IRQS))
            .map_err(kvm("set the number of interrupts"))?;
        let console = Console::new()
            .map_err(|error| Error::Kvm("create the console's interrupt", error.into()))?;
        Ok(Platform { gic, console })
    }

    /// Makes interrupts work; call it when all vCPUs are created, and before an irqfd is.
    pub fn wire(&self, vm: &VmFd) -> Result<(), Error> {
        let (group, init) = (KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT);
        set_attr::<()>(&self.gic, group, init, None)
            .map_err(kvm("start the interrupt controller"))?;
        self.console
            .wire(vm, SERIAL_GSI)
            .map_err(kvm("wire the console's interrupt"))
    }

    /// Handles a read of the platform's own devices, and says if it was one.
    pub fn mmio_read(&self, addr: u64, data: &mut [u8]) -> bool {
        match addr.checked_sub(SERIAL_ADDR) {
            Some(offset) if offset < Console::SIZE => self.console.read(offset, data),
            Some(offset) if offset < SERIAL_SIZE => data.fill(0),
            _ => return false,
        }
        true
    }

    /// Where other devices may write what is for the console.
    pub fn console(&self) -> Output {
        self.console.output()
    }

    /// Waits for the console's output to be taken; returns how many bytes are lost.
    pub fn finish(&self) -> u64 {
        self.console.finish()
    }

    /// The console, and its interrupt line.
    pub fn console_line(&self) -> (&Console, u32) {
        (&self.console, SERIAL_GSI)
    }

    /// Reads what KVM keeps for the guest, when all vCPUs are out of `KVM_RUN`.
    pub fn save(&self, _vm: &VmFd, vcpus: &[VcpuFd]) -> Result<PlatformState, Error> {
        PlatformState::save(&self.gic, vcpus)
    }

    /// Gives it to a VM whose vCPUs are out of `KVM_RUN`.
    pub fn restore(
        &self,
        _vm: &VmFd,
        vcpus: &[VcpuFd],
        state: &PlatformState,
    ) -> Result<(), Error> {
        state.restore(&self.gic, vcpus)
    }

    /// Takes a write to the platform's own devices, and says if it was one.
    pub fn mmio_write(&self, addr: u64, data: &[u8]) -> bool {
        match addr.checked_sub(SERIAL_ADDR) {
            Some(offset) if offset < Console::SIZE => self.console.write(offset, data),
            Some(offset) if offset < SERIAL_SIZE => (),
            _ => return false,
        }
        true
    }
}

fn set_attr<T>(
    device: &DeviceFd,
    group: u32,
    attr: u32,
    value: Option<&T>,
) -> Result<(), errno::Error> {
    device.set_device_attr(&kvm_device_attr {
        flags: 0,
        group,
        attr: attr.into(),
        addr: value.map_or(0, |value| ptr::from_ref(value) as u64),
    })
}

/// Where the guest starts, and with what.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    pc: u64,
    fdt: u64,
}

/// Loads kernel, initramfs and device tree.
pub fn load(
    memory: &GuestMemoryMmap,
    kernel: &mut File,
    initrd: Option<&mut File>,
    cmdline: &str,
    cpus: u8,
    devices: &[GuestDevice],
) -> Result<Entry, Error> {
    if cmdline.len() >= CMDLINE_MAX {
        return Err(Error::Cmdline {
            len: cmdline.len(),
            max: CMDLINE_MAX - 1,
        });
    }
    let loaded =
        PE::load(memory, Some(GuestAddress(RAM_START)), kernel, None).map_err(Error::Kernel)?;
    let pc = loaded.kernel_load.raw_value();
    let size: u64 = memory.read_obj(GuestAddress(pc + IMAGE_SIZE))?;
    let kernel_end = pc.saturating_add(u64::from_le(size)).max(loaded.kernel_end);
    let memory_end = memory.last_addr().raw_value() + 1;
    let fdt = memory_end - FDT_MAX_SIZE;
    if kernel_end > fdt {
        return Err(Error::SmallMemory {
            needed: (kernel_end - RAM_START)
                .saturating_add(FDT_MAX_SIZE)
                .div_ceil(1 << 20),
            have: (memory_end - RAM_START) >> 20,
        });
    }
    let initrd = initrd
        .map(|initrd| load_initrd(memory, initrd, kernel_end, fdt))
        .transpose()?;

    let tree = fdt::build(&Machine {
        cmdline,
        memory_size: memory_end - RAM_START,
        initrd,
        cpus,
        devices,
    })?;
    if tree.len() as u64 > FDT_MAX_SIZE {
        return Err(Error::FdtSize(tree.len()));
    }
    memory.write_slice(&tree, GuestAddress(fdt))?;
    Ok(Entry { pc, fdt })
}

/// Has an access fail that KVM cannot emulate, with an external abort.
///
/// KVM knows address and width of an access only where the CPU's syndrome tells: loads and stores
/// of one register without write-back.
pub fn abort_access(vcpu: &VcpuFd) -> Result<(), errno::Error> {
    let mut events = vcpu.get_vcpu_events()?;
    events.exception.ext_dabt_pending = 1;
    vcpu.set_vcpu_events(&events)
}

/// How many bits the guest's addresses have: the fewer of what KVM maps and what the CPU has.
pub fn address_bits(kvm_fd: &Kvm, vm: &VmFd, vcpu: &VcpuFd) -> Result<u8, Error> {
    /// What KVM maps where it does not tell.
    const DEFAULT: u8 = 40;

    let mapped = match kvm_fd.check_extension_int(Cap::ArmVmIPASize) {
        bits if bits > 0 => bits as u8,
        _ => DEFAULT,
    };
    vcpu.vcpu_init(&vcpu_init(vm, 0)?)
        .map_err(kvm("initialise a vCPU"))?;
    let mut register = [0; 8];
    vcpu.get_one_reg(ID_AA64MMFR0_EL1, &mut register)
        .map_err(kvm("read ID_AA64MMFR0_EL1"))?;
    Ok(mapped.min(pa_range(u64::from_le_bytes(register))))
}

/// Bits of a physical address, by the CPU's `ID_AA64MMFR0_EL1`.
fn pa_range(mmfr0: u64) -> u8 {
    // What comes after these has more.
    *[32, 36, 40, 42, 44, 48, 52, 56]
        .get((mmfr0 & 0xf) as usize)
        .unwrap_or(&56)
}

/// What a vCPU is: all but the first wait for PSCI.
fn vcpu_init(vm: &VmFd, id: u8) -> Result<kvm_vcpu_init, Error> {
    let mut init = kvm_vcpu_init::default();
    vm.get_preferred_target(&mut init)
        .map_err(kvm("ask for the kind of CPU"))?;
    init.features[0] |= 1 << KVM_ARM_VCPU_PSCI_0_2;
    if id != 0 {
        init.features[0] |= 1 << KVM_ARM_VCPU_POWER_OFF;
    }
    Ok(init)
}

/// Sets up a vCPU, also one that has run; all but the first wait for PSCI.
pub fn setup_vcpu(_kvm: &Kvm, vm: &VmFd, vcpu: &VcpuFd, id: u8, _cpus: u8) -> Result<(), Error> {
    vcpu.vcpu_init(&vcpu_init(vm, id)?)
        .map_err(kvm("initialise it"))
}

/// Has the first vCPU enter the kernel.
pub fn enter(vcpu: &VcpuFd, entry: Entry) -> Result<(), Error> {
    for (offset, value) in [
        (offset_of!(user_pt_regs, pc), entry.pc),
        (offset_of!(user_pt_regs, regs), entry.fdt),
    ] {
        vcpu.set_one_reg(core_register(offset), &value.to_le_bytes())
            .map_err(kvm("set the registers"))?;
    }
    Ok(())
}

/// KVM's name of a 64-bit core register: its place in `struct kvm_regs`, in units of 4 bytes.
fn core_register(offset: usize) -> u64 {
    let index = offset as u64 / 4;
    KVM_REG_ARM64 | KVM_REG_SIZE_U64 | u64::from(KVM_REG_ARM_CORE) | index
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_have_their_names() {
        // X0 and PC, as Documentation/virt/kvm/api.rst lists them.
        assert_eq!(
            core_register(offset_of!(user_pt_regs, regs)),
            0x6030_0000_0010_0000
        );
        assert_eq!(
            core_register(offset_of!(user_pt_regs, pc)),
            0x6030_0000_0010_0040
        );
        assert_eq!(ID_AA64MMFR0_EL1, 0x6030_0000_0013_c038);
    }

    #[test]
    fn addresses_have_as_many_bits_as_the_cpu_says() {
        assert_eq!(pa_range(0xff00_0002), 40);
        assert_eq!(pa_range(6), 52);
        assert_eq!(pa_range(0xf), 56);
    }

    #[test]
    fn interrupts_suffice() {
        assert!(*DEVICE_GSIS.end() < NR_IRQS - 32);
        assert_eq!(NR_IRQS % 32, 0);
    }
}
