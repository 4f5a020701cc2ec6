// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The bare guest on arm64: EL1, MMU off, so that every address without RAM is a device.

use std::arch::{asm, global_asm};
use std::fs;

use kvm_bindings::{
    KVM_DEV_ARM_VGIC_CTRL_INIT, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_DEV_ARM_VGIC_GRP_CTRL,
    KVM_DEV_ARM_VGIC_GRP_NR_IRQS, KVM_VGIC_V3_ADDR_TYPE_DIST, KVM_VGIC_V3_ADDR_TYPE_REDIST,
    kvm_create_device, kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3, kvm_vcpu_init,
};
use kvm_ioctls::{DeviceFd, Kvm, VcpuExit, VcpuFd, VmFd};

use super::{Args, CODE, Ram, Results, Routine};
use crate::harness::{Errno, skip};

// x0 = value, x1 = address, x2 = count, x3 and x4 = expected or acknowledge, x5 = where to say
// "done". Registers of the GIC's CPU interface are named by their encoding.
// Only plain loads and stores of one register: those KVM can emulate.
global_asm!(
    r#"
    .pushsection .rodata.kvm_bpf_guest, "a"
    .macro routine number
        .org kvm_bpf_guest + 64 * \number
    .endm
    .macro done
        str xzr, [x5]
        b .
    .endm
    .balign 64
    .global kvm_bpf_guest
kvm_bpf_guest:
    routine 0
        ldrb w0, [x1]
        done
    routine 1
        ldrh w0, [x1]
        done
    routine 2
        ldr w0, [x1]
        done
    routine 3
        ldr x0, [x1]
        done
    routine 4
        strb w0, [x1]
        done
    routine 5
        strh w0, [x1]
        done
    routine 6
        str w0, [x1]
        done
    routine 7
        str x0, [x1]
        done
    routine 8       // hammer: write, read, stop at an answer that is neither x3 nor x4
2:      str x0, [x1]
        ldr x6, [x1]
        cmp x6, x3
        b.eq 3f
        cmp x6, x4
        b.ne 4f
3:      subs x2, x2, #1
        b.ne 2b
4:      mov x0, x6
        done
    routine 9       // read loop
2:      ldr w0, [x1]
        subs x2, x2, #1
        b.ne 2b
        done
    routine 10      // write loop
2:      str w0, [x1]
        subs x2, x2, #1
        b.ne 2b
        done
    .macro take_interrupts      // x7 counts them
        mov x6, #0x4000
        msr vbar_el1, x6
        mov x6, #0xff
        msr s3_0_c4_c6_0, x6    // ICC_PMR_EL1: any priority
        mov x6, #1
        msr s3_0_c12_c12_7, x6  // ICC_IGRPEN1_EL1
        isb
        mov x7, #0
        msr daifclr, #2
    .endm
    routine 11      // write, then wait until x2 interrupts were taken
        take_interrupts
        str x0, [x1]
2:      cmp x7, x2
        b.lo 2b
        msr daifset, #2
        mov x0, x7
        done
    routine 12      // interrupt handler: tell the device at x3, if any; end of interrupt
        mrs x6, s3_0_c12_c12_0  // ICC_IAR1_EL1
        cmp x6, #1020           // from here on none: it has gone meanwhile
        b.hs 3f
        add x7, x7, #1
        cbz x3, 2f
        str x4, [x3]
2:      msr s3_0_c12_c12_1, x6  // ICC_EOIR1_EL1
3:      eret
    routine 13      // a call: x0 is the function, x1 the argument
        hvc #0
        done
    routine 27      // loop of the call that always exits: SMCCC_VERSION
        mov x19, x2
2:      mov w0, #0x80000000
        hvc #0
        subs x19, x19, #1
        b.ne 2b
        done
    routine 29      // writes that go round from x1 to x4 in steps of x3
        mov x6, x1
2:      str w0, [x1]
        add x1, x1, x3
        cmp x1, x4
        csel x1, x6, x1, hs
        subs x2, x2, #1
        b.ne 2b
        done
    routine 30      // writes of x0, which increases
2:      str x0, [x1]
        add x0, x0, #1
        subs x2, x2, #1
        b.ne 2b
        done
    .macro next_interrupt       // or the end: how many there were
        subs x2, x2, #1
        b.ne 2b
        msr daifset, #2
        mov x0, x7
        done
    .endm
    // Commands that differ, and the result of each. With memory, the command is in the word
    // after the one at x4 where the result comes, and the write to x1 but a doorbell.
    .macro commands number, memory, interrupt
    routine \number
        mov x7, #0
        mov x8, #0
        .if \interrupt
        take_interrupts
        .endif
2:
        .if \memory
        str w2, [x4, #4]
        .endif
        str w2, [x1]
        .if \interrupt
        add x8, x8, #1
3:      cmp x7, x8
        b.lo 3b
        .endif
        mvn w9, w2
4:      ldr w0, [x4]
        cmp w0, w9
        b.ne 4b
        next_interrupt
    .endm
    commands 32, 0, 0
    commands 34, 0, 1
    commands 36, 1, 0
    commands 38, 1, 1
    // Waits for interrupt number x8: halts until it comes, or looks for it all the time.
    .macro await_interrupt idle
3:
        .if \idle
        msr daifset, #2
        cmp x7, x8
        b.hs 4f
        wfi
        msr daifclr, #2
        b 3b
4:      msr daifclr, #2
        .else
        cmp x7, x8
        b.lo 3b
        .endif
    .endm
    // Notifies at x1, waits for the interrupt, reads its status at x4, and acknowledges.
    .macro requests number, idle
    routine \number
        mov x8, #0
        take_interrupts
2:      str wzr, [x1]
        add x8, x8, #1
        await_interrupt \idle
        ldr w0, [x4]
        str w0, [x4, #4]
        next_interrupt
    .endm
    requests 40, 0
    requests 42, 1
    // x0 requests of a disk at a time: see "Routine::Disk".
    .macro disk number, idle
    routine \number
        mov x8, #0
        take_interrupts
2:      add x9, x4, #0x1000
        mov x10, x4
        add x11, x4, x0, lsl #6
5:      ldr x12, [x9], #8
        str x12, [x10], #8
        cmp x10, x11
        b.lo 5b
        ldrh w12, [x4, #0x802]
        mov w9, #0
6:      and w10, w12, #31
        add x10, x4, w10, uxtw #1
        strh w9, [x10, #0x804]
        add w12, w12, #1
        add w9, w9, #4
        cmp w9, w0, lsl #2
        b.lo 6b
        and w12, w12, #0xffff
        dmb ishst
        strh w12, [x4, #0x802]
        dmb ishst
        str wzr, [x1]
7:      add x8, x8, #1
        await_interrupt \idle
        ldr w9, [x1, #0x10]
        str w9, [x1, #0x14]
        ldrh w9, [x4, #0xa02]
        cmp w9, w12
        b.ne 7b
        subs x2, x2, x0
        b.hi 2b
        msr daifset, #2
        done
    .endm
    disk 44, 0
    disk 48, 1
    routine 52      // x0 entries more, and a notification
2:      ldrh w9, [x4, #0x802]
        add w9, w9, w0
        dmb ishst
        strh w9, [x4, #0x802]
        dmb ishst
        str wzr, [x1]
        subs x2, x2, #1
        b.ne 2b
        done
    // What the syndrome of an abort does not describe: two registers, exclusive ones, writeback.
    routine 53
        ldp x0, x6, [x1]
        done
    routine 54
        stp x0, x6, [x1]
        done
    routine 55
        ldxr w0, [x1]
        done
    routine 56
        str w0, [x1], #4
        done
    routine 57
    .global kvm_bpf_guest_end
kvm_bpf_guest_end:
    .popsection
    "#
);

/// An address that no test gives a device: a store there ends a routine.
const DONE: u64 = 0xf000_0000;

/// Calls of a protected guest, `ARM_SMCCC_VENDOR_HYP_KVM_MEM_SHARE_FUNC_ID` and its opposite; the
/// argument is the address of a page.
pub(super) const MEM_SHARE: u64 = 0xc600_0003;
pub(super) const MEM_UNSHARE: u64 = 0xc600_0004;

/// `KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE`; the index counts 32-bit words.
const CORE_REGISTER: u64 = 0x6030_0000_0010_0000;
const PC: u64 = 32;

/// Where the guest's exception vectors are, and the one for interrupts at EL1.
const VECTORS: u64 = 0x4000;
const IRQ_VECTOR: u64 = VECTORS + 0x280;

/// With 40 bits of guest-physical addresses, KVM's default; kvm-ioctls' is all that the host has,
/// which takes KVM seconds to take down under emulation.
pub(super) fn create_vm(kvm: &Kvm) -> VmFd {
    kvm.create_vm_with_type(0).expect("KVM_CREATE_VM")
}

/// The same for a protected guest, which only hosts in protected mode have.
pub(super) fn create_protected_vm(kvm: &Kvm) -> VmFd {
    /// `KVM_VM_TYPE_ARM_PROTECTED`.
    const PROTECTED: u64 = 1 << 31;

    let words = fs::read_to_string("/proc/cmdline").expect("the kernel's command line");
    let has_them = words.contains("kvm-arm.mode=protected");
    match kvm.create_vm_with_type(PROTECTED) {
        Ok(vm) => vm,
        Err(error) if error.errno() == libc::EINVAL && !has_them => {
            skip("the host has no protected guests")
        }
        Err(error) => panic!("KVM_CREATE_VM of a protected guest: {error}"),
    }
}

/// Writes the one exception vector that is used: a branch to its routine.
pub(super) fn prepare_ram(ram: &Ram) {
    const BRANCH: u32 = 0x1400_0000;

    let words = (CODE + Routine::InterruptHandler.offset() - IRQ_VECTOR) / 4;
    ram.write(IRQ_VECTOR as usize, &(BRANCH | words as u32).to_le_bytes());
}

pub(super) fn prepare_vcpu(_kvm: &Kvm, vm: &VmFd, vcpu: &VcpuFd, _paging: bool) {
    let mut init = kvm_vcpu_init::default();
    vm.get_preferred_target(&mut init)
        .expect("KVM_ARM_PREFERRED_TARGET");
    vcpu.vcpu_init(&init).expect("KVM_ARM_VCPU_INIT");
}

fn set_register(vcpu: &VcpuFd, number: u64, value: u64) {
    vcpu.set_one_reg(CORE_REGISTER + 2 * number, &value.to_le_bytes())
        .expect("KVM_SET_ONE_REG");
}

fn register(vcpu: &VcpuFd, number: u64) -> u64 {
    let mut bytes = [0; 8];
    vcpu.get_one_reg(CORE_REGISTER + 2 * number, &mut bytes)
        .expect("KVM_GET_ONE_REG");
    u64::from_le_bytes(bytes)
}

pub(super) fn set_registers(vcpu: &VcpuFd, pc: u64, args: &Args) {
    let [first, second] = args.pair;
    let values = [args.value, args.addr, args.count, first, second, DONE];
    for (number, value) in (0..).zip(values) {
        set_register(vcpu, number, value);
    }
    set_register(vcpu, PC, pc);
}

pub(super) fn results(vcpu: &VcpuFd) -> Results {
    Results {
        value: register(vcpu, 0),
        count: register(vcpu, 2),
    }
}

/// Where a vCPU is, for messages.
pub(super) fn pc(vcpu: &VcpuFd) -> u64 {
    register(vcpu, PC)
}

pub(super) fn is_done(exit: &VcpuExit<'_>) -> bool {
    matches!(exit, VcpuExit::MmioWrite(DONE, _))
}

/// What a register holds after reading `value`: every load clears the rest of it.
pub fn register_after_read(_preset: u64, value: u64, _width: usize) -> u64 {
    value
}

/// The host's instruction counter under QEMU's `-icount`; elsewhere a clock.
pub fn ticks() -> u64 {
    let ticks;
    // SAFETY: Linux lets user space read the virtual counter.
    unsafe { asm!("isb", "mrs {}, cntvct_el0", out(reg) ticks) };
    ticks
}

/// The GIC distributor's registers.
pub const IRQCHIP_ADDR: u64 = 0x800_0000;
/// The GIC redistributors' registers.
pub const REDISTRIBUTORS: u64 = 0x80a_0000;
/// Of all kinds; a GSI is a shared one.
const INTERRUPTS: u32 = 64;
const FIRST_SHARED: u64 = 32;

/// KVM's GICv3.
pub(super) struct Irqchip(DeviceFd);

impl Irqchip {
    pub(super) fn new(vm: &VmFd) -> Result<Self, Errno> {
        let mut request = kvm_create_device {
            type_: kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3,
            fd: 0,
            flags: 0,
        };
        let device = vm.create_device(&mut request);
        let irqchip = Irqchip(device.map_err(|error| Errno(error.errno()))?);
        let number = INTERRUPTS;
        let addr = (&raw const number) as u64;
        irqchip.set(KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, addr);
        for (kind, addr) in [
            (KVM_VGIC_V3_ADDR_TYPE_DIST, IRQCHIP_ADDR),
            (KVM_VGIC_V3_ADDR_TYPE_REDIST, REDISTRIBUTORS),
        ] {
            let addr = (&raw const addr) as u64;
            irqchip.set(KVM_DEV_ARM_VGIC_GRP_ADDR, kind.into(), addr);
        }
        Ok(irqchip)
    }

    fn set(&self, group: u32, attr: u64, addr: u64) {
        let attr = kvm_device_attr {
            group,
            attr,
            addr,
            flags: 0,
        };
        self.0
            .set_device_attr(&attr)
            .unwrap_or_else(|error| panic!("{attr:?} of the GIC: {error}"));
    }

    /// All vCPUs are there: the interrupt controller starts.
    pub(super) fn start(&self) {
        let attr = KVM_DEV_ARM_VGIC_CTRL_INIT.into();
        self.set(KVM_DEV_ARM_VGIC_GRP_CTRL, attr, 0);
    }

    pub(super) fn connect(&self, vcpu: &mut super::Vcpu) {
        const CONTROL: u64 = 0;
        const ENABLE_GROUP_1: u64 = 1 << 1;

        self.start();
        vcpu.write(IRQCHIP_ADDR + CONTROL, 4, ENABLE_GROUP_1);
    }

    /// Messages need an ITS, whose tables are in memory: a shared interrupt.
    pub(super) fn route_edge(&self, _vm: &VmFd, vcpu: &mut super::Vcpu, gsi: u32) {
        self.route_line(vcpu, gsi, false);
    }

    /// Sets up a shared interrupt, in group 1, for the first CPU.
    pub(super) fn route_line(&self, vcpu: &mut super::Vcpu, gsi: u32, level: bool) {
        const GROUP: u64 = 0x80;
        const SET_ENABLE: u64 = 0x100;
        const PRIORITY: u64 = 0x400;
        const CONFIGURATION: u64 = 0xc00;
        const ROUTE: u64 = 0x6000;

        let id = FIRST_SHARED + u64::from(gsi);
        let bit = 1 << (id % 32);
        let edge = u64::from(!level) << (2 * (id % 16) + 1);
        for (register, width, value) in [
            (GROUP + id / 32 * 4, 4, bit),
            (CONFIGURATION + id / 16 * 4, 4, edge),
            (PRIORITY + id, 1, 0x80),
            (ROUTE + 8 * id, 8, 0),
            (SET_ENABLE + id / 32 * 4, 4, bit),
        ] {
            vcpu.write(IRQCHIP_ADDR + register, width, value);
        }
    }
}
