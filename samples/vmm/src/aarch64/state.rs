// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What KVM keeps of a stopped guest: the registers of its CPUs, the interrupt controller, the
//! counter.
//!
//! Of the interrupt controller (Documentation/virt/kvm/devices/arm-vgic-v3.rst) there are the
//! distributor, each CPU's redistributor and its interface, and the levels of all lines. There is no
//! ITS, so there are no LPIs.

use std::ptr;

use kvm_bindings::{
    KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, KVM_DEV_ARM_VGIC_GRP_DIST_REGS,
    KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, RegList, kvm_device_attr,
    kvm_mp_state, kvm_vcpu_events,
};
use kvm_ioctls::{DeviceFd, Kvm, VcpuFd, VmFd, reg_size};
use serde::{Deserialize, Serialize};
use vmm_sys_util::errno;

use super::NR_IRQS;
use super::fdt::mpidr;
use crate::boot::{Error, kvm};

/// KVM's names of the virtual and the physical counter. They run while a vCPU does not, and all
/// vCPUs have the same ones, so they are no vCPU's.
const TIMER_CNT: u64 = 0x6030_0000_0013_df1a;
const PTIMER_CNT: u64 = 0x6030_0000_0013_df01;

/// Registers of a vCPU of an imaginable CPU.
const REGISTERS_MAX: usize = 1 << 16;

/// A CPU register.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Register {
    /// KVM's name of it.
    id: u64,
    #[serde(with = "hex::serde")]
    value: Vec<u8>,
}

/// A vCPU.
#[derive(Debug, Deserialize, Serialize)]
#[cfg_attr(test, derive(Default))]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    registers: Vec<Register>,
    /// Whether it runs, or waits for PSCI.
    mp_state: u32,
    /// A system error that the guest is yet to take. KVM keeps no abort: it has happened.
    serror_pending: u8,
    serror_has_esr: u8,
    serror_esr: u64,
}

/// What no vCPU has for itself.
#[derive(Debug, Deserialize, Serialize)]
#[cfg_attr(test, derive(Default))]
#[serde(deny_unknown_fields)]
pub struct PlatformState {
    virtual_counter: u64,
    physical_counter: u64,
    /// Registers of 32 bits, in the order of [`dist_registers`].
    distributor: Vec<u32>,
    /// By CPU, likewise with [`redist_registers`].
    redistributors: Vec<Vec<u32>>,
    /// By CPU, likewise with [`interface_registers`].
    interfaces: Vec<Vec<u64>>,
    /// By CPU, 32 levels of lines of its own.
    private_lines: Vec<u32>,
    /// 32 levels of lines each.
    shared_lines: Vec<u32>,
}

impl VcpuState {
    /// Reads the state of a vCPU that is not in `KVM_RUN` and has completed its last exit.
    pub fn save(_kvm: &Kvm, vcpu: &VcpuFd) -> Result<Self, Error> {
        let read = kvm("read its registers");
        let mut registers = Vec::new();
        for id in register_names(vcpu).map_err(&read)? {
            let mut value = vec![0; reg_size(id)];
            vcpu.get_one_reg(id, &mut value).map_err(&read)?;
            registers.push(Register { id, value });
        }
        let mp_state = vcpu.get_mp_state().map_err(&read)?.mp_state;
        let exception = vcpu.get_vcpu_events().map_err(&read)?.exception;
        Ok(VcpuState {
            registers,
            mp_state,
            serror_pending: exception.serror_pending,
            serror_has_esr: exception.serror_has_esr,
            serror_esr: exception.serror_esr,
        })
    }

    /// Gives the state to a vCPU that has not run since it was initialised.
    pub fn restore(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        for Register { id, value } in &self.registers {
            if matches!(*id, TIMER_CNT | PTIMER_CNT) {
                continue;
            }
            // kvm-ioctls takes no value of another size than the name tells.
            vcpu.set_one_reg(*id, value)
                .map_err(|source| Error::Register(*id, source))?;
        }
        let mp_state = kvm_mp_state {
            mp_state: self.mp_state,
        };
        let mut events = kvm_vcpu_events::default();
        events.exception.serror_pending = self.serror_pending;
        events.exception.serror_has_esr = self.serror_has_esr;
        events.exception.serror_esr = self.serror_esr;
        vcpu.set_mp_state(mp_state)
            .and_then(|()| vcpu.set_vcpu_events(&events))
            .map_err(kvm("set its state"))
    }
}

/// KVM's names of a vCPU's registers, but for the counters.
fn register_names(vcpu: &VcpuFd) -> Result<Vec<u64>, errno::Error> {
    let too_many = |_| errno::Error::new(libc::E2BIG);
    let mut list = RegList::new(0).map_err(too_many)?;
    // It fails, and tells how many there are.
    let _ = vcpu.get_reg_list(&mut list);
    let count = list.as_fam_struct_ref().n as usize;
    let mut list = RegList::new(count.min(REGISTERS_MAX)).map_err(too_many)?;
    vcpu.get_reg_list(&mut list)?;
    let mut names = list.as_slice().to_vec();
    names.retain(|id| !matches!(*id, TIMER_CNT | PTIMER_CNT));
    Ok(names)
}

impl PlatformState {
    /// Reads the state, when no vCPU is in `KVM_RUN`.
    pub fn save(gic: &DeviceFd, vcpus: &[VcpuFd]) -> Result<Self, Error> {
        let cpus = vcpus.len() as u8;
        let read = |group, attrs: Vec<u64>| {
            let get = |attr| get_attr::<u32>(gic, group, attr);
            let values: Result<Vec<_>, _> = attrs.into_iter().map(get).collect();
            values.map_err(kvm("read the interrupt controller"))
        };
        let interface = |id| {
            let group = KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS;
            let get = |register| get_attr::<u64>(gic, group, of_cpu(id, register));
            let control = get(ICC_CTLR_EL1)?;
            interface_registers(control).map(get).collect()
        };
        let counter = |id| {
            let mut value = [0; 8];
            // All vCPUs have the same ones.
            vcpus[0]
                .get_one_reg(id, &mut value)
                .map_err(kvm("read the counters"))?;
            Ok::<_, Error>(u64::from_le_bytes(value))
        };
        let lines = KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO;
        let redist = |id| {
            let attrs = redist_registers().map(|offset| of_cpu(id, offset));
            read(KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, attrs.collect())
        };
        let interfaces: Result<Vec<_>, _> = (0..cpus).map(interface).collect();
        Ok(PlatformState {
            virtual_counter: counter(TIMER_CNT)?,
            physical_counter: counter(PTIMER_CNT)?,
            distributor: read(KVM_DEV_ARM_VGIC_GRP_DIST_REGS, dist_registers().collect())?,
            redistributors: (0..cpus).map(redist).collect::<Result<_, _>>()?,
            interfaces: interfaces.map_err(kvm("read the interrupt controller"))?,
            private_lines: read(lines, (0..cpus).map(|id| of_cpu(id, 0)).collect())?,
            shared_lines: read(lines, shared_lines().collect())?,
        })
    }

    /// Gives the state to an interrupt controller, when no vCPU is in `KVM_RUN`.
    pub fn restore(&self, gic: &DeviceFd, vcpus: &[VcpuFd]) -> Result<(), Error> {
        let cpus = vcpus.len() as u8;
        let refused = kvm("set the interrupt controller");
        let write = |group, attrs: Vec<u64>, values: &[u32]| -> Result<(), Error> {
            same_length(attrs.len(), values.len())?;
            for (attr, value) in attrs.into_iter().zip(values) {
                set_attr(gic, group, attr, value).map_err(&refused)?;
            }
            Ok(())
        };
        // Of what is enabled and active KVM takes the bits that are set, so first all of them go.
        let clear =
            |group, attrs: Vec<u64>| write(group, attrs.clone(), &vec![u32::MAX; attrs.len()]);
        for per_cpu in [
            self.redistributors.len(),
            self.interfaces.len(),
            self.private_lines.len(),
        ] {
            same_length(cpus.into(), per_cpu)?;
        }
        let lines = KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO;
        write(lines, shared_lines().collect(), &self.shared_lines)?;
        let attrs = (0..cpus).map(|id| of_cpu(id, 0)).collect();
        write(lines, attrs, &self.private_lines)?;
        let group = KVM_DEV_ARM_VGIC_GRP_DIST_REGS;
        let shared = |offset| per_irq(offset, 1, 32, NR_IRQS).collect();
        clear(group, shared(ICENABLER))?;
        clear(group, shared(ICACTIVER))?;
        write(group, dist_registers().collect(), &self.distributor)?;
        for (id, values) in (0..cpus).zip(&self.redistributors) {
            let group = KVM_DEV_ARM_VGIC_GRP_REDIST_REGS;
            let private = [ICENABLER, ICACTIVER].map(|offset| of_cpu(id, GICR_SGI + offset));
            clear(group, private.into())?;
            let attrs = redist_registers().map(|offset| of_cpu(id, offset));
            write(group, attrs.collect(), values)?;
        }
        for (id, values) in (0..cpus).zip(&self.interfaces) {
            let control = values.get(1).copied().unwrap_or_default();
            same_length(interface_registers(control).count(), values.len())?;
            for (register, value) in interface_registers(control).zip(values) {
                let group = KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS;
                set_attr(gic, group, of_cpu(id, register), value).map_err(&refused)?;
            }
        }
        Ok(())
    }

    /// Has the counters go on from where they were; the last thing before a vCPU runs.
    pub fn restore_clock(&self, _vm: &VmFd, vcpus: &[VcpuFd]) -> Result<(), Error> {
        for (id, value) in [
            (TIMER_CNT, self.virtual_counter),
            (PTIMER_CNT, self.physical_counter),
        ] {
            vcpus[0]
                .set_one_reg(id, &value.to_le_bytes())
                .map_err(kvm("set the counters"))?;
        }
        Ok(())
    }
}

fn same_length(wanted: usize, has: usize) -> Result<(), Error> {
    match wanted == has {
        true => Ok(()),
        false => Err(Error::Registers { wanted, has }),
    }
}

const GICR_SGI: u64 = 0x1_0000;
/// What clears bits, of the distributor and of a redistributor.
const ICENABLER: u64 = 0x180;
const ICACTIVER: u64 = 0x380;

/// Offsets of registers that have so many bits per interrupt, for interrupts from `first` on.
fn per_irq(offset: u64, bits: u64, first: u32, end: u32) -> impl Iterator<Item = u64> {
    let place = move |irq: u32| u64::from(irq) * bits / 8;
    (place(first)..place(end))
        .step_by(4)
        .map(move |at| offset + at)
}

/// The distributor's, in the order in which they can be set: the version that it is of first, and
/// what turns it on last.
fn dist_registers() -> impl Iterator<Item = u64> {
    const CTLR: u64 = 0;
    const IIDR: u64 = 8;
    // IGROUPR, ICFGR, IPRIORITYR, IROUTER, ISENABLER, ISPENDR, ISACTIVER.
    let shared = [
        (0x80, 1),
        (0xc00, 2),
        (0x400, 8),
        (0x6000, 64),
        (0x100, 1),
        (0x200, 1),
        (0x300, 1),
    ];
    let shared = shared
        .into_iter()
        .flat_map(|(offset, bits)| per_irq(offset, bits, 32, NR_IRQS));
    [IIDR].into_iter().chain(shared).chain([CTLR])
}

/// A redistributor's: the same for 32 interrupts.
fn redist_registers() -> impl Iterator<Item = u64> {
    let private = [
        (0x80, 1),
        (0xc00, 2),
        (0x400, 8),
        (0x100, 1),
        (0x200, 1),
        (0x300, 1),
    ];
    private
        .into_iter()
        .flat_map(|(offset, bits)| per_irq(GICR_SGI + offset, bits, 0, 32))
}

/// The first shared interrupt of each 32.
fn shared_lines() -> impl Iterator<Item = u64> {
    (32..NR_IRQS.into()).step_by(32)
}

/// A system register with op0 3 and op1 0.
const fn icc(crn: u64, crm: u64, op2: u64) -> u64 {
    3 << 14 | crn << 7 | crm << 3 | op2
}

const ICC_SRE_EL1: u64 = icc(12, 12, 5);
const ICC_CTLR_EL1: u64 = icc(12, 12, 4);

/// Those of a CPU's interface, whose ICC_CTLR_EL1 says how many active priorities it has.
fn interface_registers(control: u64) -> impl Iterator<Item = u64> {
    const PMR: u64 = icc(4, 6, 0);
    const BPR0: u64 = icc(12, 8, 3);
    const BPR1: u64 = icc(12, 12, 3);
    const IGRPEN0: u64 = icc(12, 12, 6);
    const IGRPEN1: u64 = icc(12, 12, 7);

    let priority_bits = (control >> 8 & 7) + 1;
    let active = 1 << (priority_bits.clamp(5, 7) - 5);
    let active = (0..active).flat_map(|n| [icc(12, 8, 4 + n), icc(12, 9, n)]);
    [ICC_SRE_EL1, ICC_CTLR_EL1, PMR, BPR0, BPR1]
        .into_iter()
        .chain(active)
        .chain([IGRPEN0, IGRPEN1])
}

/// KVM's name of what a CPU has for itself.
fn of_cpu(id: u8, what: u64) -> u64 {
    u64::from(mpidr(id)) << 32 | what
}

fn get_attr<T: Default>(gic: &DeviceFd, group: u32, attr: u64) -> Result<T, errno::Error> {
    let mut value = T::default();
    let mut attr = kvm_device_attr {
        flags: 0,
        group,
        attr,
        addr: ptr::from_mut(&mut value) as u64,
    };
    // SAFETY: `value` has the size of that group's values: the callers here say which.
    unsafe { gic.get_device_attr(&mut attr) }?;
    Ok(value)
}

fn set_attr<T>(gic: &DeviceFd, group: u32, attr: u64, value: &T) -> Result<(), errno::Error> {
    gic.set_device_attr(&kvm_device_attr {
        flags: 0,
        group,
        attr,
        addr: ptr::from_ref(value) as u64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_those_of_the_manual() {
        let dist: Vec<_> = dist_registers().collect();
        assert_eq!(dist[..2], [0x8, 0x84]);
        assert_eq!(*dist.last().unwrap(), 0);
        for (first, last) in [
            (0x84, 0xa0),
            (0xc08, 0xc44),
            (0x420, 0x51c),
            (0x6100, 0x68fc),
            (0x104, 0x120),
        ] {
            assert!(dist.contains(&first) && dist.contains(&last), "{first:x}");
            assert!(!dist.contains(&(first - 4)) && !dist.contains(&(last + 4)));
        }
        let redist: Vec<_> = redist_registers().collect();
        assert_eq!(redist.len(), 1 + 2 + 8 + 3);
        assert!(redist.contains(&0x1_0c04) && redist.contains(&0x1_041c));
        assert_eq!(shared_lines().count(), 8);
    }

    #[test]
    fn interfaces_have_the_active_priorities_that_they_say() {
        // The encoding of ICC_PMR_EL1, S3_0_C4_C6_0, as KVM has it.
        assert!(interface_registers(0).any(|register| register == 0xc230));
        assert_eq!(interface_registers(4 << 8).count(), 9);
        assert_eq!(interface_registers(6 << 8).count(), 15);
        assert_eq!(interface_registers(u64::MAX).count(), 15);
        assert!(interface_registers(6 << 8).any(|register| register == icc(12, 9, 3)));
    }

    #[test]
    fn cpus_have_their_affinity() {
        assert_eq!(of_cpu(0, 0x1_0080), 0x1_0080);
        assert_eq!(of_cpu(0x21, 3), 0x201 << 32 | 3);
    }
}
