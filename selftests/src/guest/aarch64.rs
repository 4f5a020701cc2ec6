// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The bare guest on arm64: EL1, MMU off, so that every address without RAM is a device.

use std::arch::{asm, global_asm};

use kvm_bindings::kvm_vcpu_init;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use super::{Args, Ram, Results};

// x0 = value, x1 = address, x2 = count, x3 and x4 = expected, x5 = where to say "done".
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
    routine 11
    .global kvm_bpf_guest_end
kvm_bpf_guest_end:
    .popsection
    "#
);

/// An address that no test gives a device: a store there ends a routine.
const DONE: u64 = 0xf000_0000;

/// `KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE`; the index counts 32-bit words.
const CORE_REGISTER: u64 = 0x6030_0000_0010_0000;
const PC: u64 = 32;

pub(super) fn prepare_ram(_ram: &Ram) {}

pub(super) fn prepare_vcpu(_kvm: &Kvm, vm: &VmFd, vcpu: &VcpuFd) {
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
