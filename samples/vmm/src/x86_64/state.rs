// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What KVM keeps of a stopped guest: the registers of its CPUs, interrupt controllers, timer,
//! clock.

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MAX_CPUID_ENTRIES, Msrs, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use vmm_sys_util::errno;

use crate::boot::{Error, kvm};

/// When the local APIC's timer rings, in cycles: it is set when these count already.
const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// A vCPU.
#[derive(Debug, Deserialize, Serialize)]
#[cfg_attr(test, derive(Default))]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    cpuid: Vec<kvm_cpuid_entry2>,
    tsc_khz: u32,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

/// What no vCPU has for itself.
#[derive(Debug, Deserialize, Serialize)]
#[cfg_attr(test, derive(Default))]
#[serde(deny_unknown_fields)]
pub struct PlatformState {
    /// The two PICs and the IOAPIC.
    irqchips: Vec<kvm_irqchip>,
    pit: kvm_pit_state2,
    clock: kvm_clock_data,
}

impl VcpuState {
    /// Reads the state of a vCPU that is not in `KVM_RUN` and has completed its last exit.
    pub fn save(kvm_fd: &Kvm, vcpu: &VcpuFd) -> Result<Self, Error> {
        let read = || -> Result<Self, errno::Error> {
            Ok(VcpuState {
                // KVM takes what the local APIC has pending over to it when it is asked for this.
                mp_state: vcpu.get_mp_state()?,
                cpuid: vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES)?.as_slice().to_vec(),
                tsc_khz: vcpu.get_tsc_khz()?,
                regs: vcpu.get_regs()?,
                sregs: vcpu.get_sregs()?,
                xsave: vcpu.get_xsave()?,
                xcrs: vcpu.get_xcrs()?,
                debug_regs: vcpu.get_debug_regs()?,
                lapic: vcpu.get_lapic()?,
                msrs: read_msrs(kvm_fd, vcpu)?,
                events: vcpu.get_vcpu_events()?,
            })
        };
        read().map_err(kvm("read its registers"))
    }

    /// Gives the state to a vCPU, which may have run with the same CPUID.
    pub fn restore(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        let too_many = |_| Error::Kvm("build the CPUID", errno::Error::new(libc::E2BIG));
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(too_many)?;
        vcpu.set_cpuid2(&cpuid).map_err(kvm("set the CPUID"))?;
        if vcpu.get_tsc_khz() != Ok(self.tsc_khz) {
            vcpu.set_tsc_khz(self.tsc_khz)
                .map_err(kvm("have its counter run as fast as it did"))?;
        }
        let set = || {
            vcpu.set_mp_state(self.mp_state)?;
            vcpu.set_sregs(&self.sregs)?;
            vcpu.set_regs(&self.regs)?;
            // SAFETY: KVM reads no more than that type has, as nobody has asked it for CPU features
            // with a larger state.
            unsafe { vcpu.set_xsave(&self.xsave) }?;
            vcpu.set_xcrs(&self.xcrs)?;
            vcpu.set_debug_regs(&self.debug_regs)?;
            vcpu.set_lapic(&self.lapic)
        };
        set().map_err(kvm("set its registers"))?;
        let is_deadline = |msr: &&kvm_msr_entry| msr.index == MSR_TSC_DEADLINE;
        let others = self.msrs.iter().filter(|msr| !is_deadline(msr));
        for msr in others.chain(self.msrs.iter().filter(is_deadline)) {
            let one = Msrs::from_entries(&[*msr]).map_err(too_many)?;
            if vcpu.set_msrs(&one).map_err(kvm("set its registers"))? != 1 {
                return Err(Error::Msr(msr.index));
            }
        }
        vcpu.set_vcpu_events(&self.events)
            .map_err(kvm("set its events"))
    }
}

/// The model-specific registers that the vCPU has of those that KVM knows.
fn read_msrs(kvm_fd: &Kvm, vcpu: &VcpuFd) -> Result<Vec<kvm_msr_entry>, errno::Error> {
    let mut read = Vec::new();
    for &index in kvm_fd.get_msr_index_list()?.as_slice() {
        let entry = kvm_msr_entry {
            index,
            ..Default::default()
        };
        let mut one = Msrs::from_entries(&[entry]).map_err(|_| errno::Error::new(libc::E2BIG))?;
        if vcpu.get_msrs(&mut one)? == 1 {
            read.extend_from_slice(one.as_slice());
        }
    }
    Ok(read)
}

impl PlatformState {
    /// Reads the state, when no vCPU is in `KVM_RUN`.
    pub fn save(vm: &VmFd) -> Result<Self, Error> {
        let irqchip = |chip_id| {
            let mut irqchip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            vm.get_irqchip(&mut irqchip).map(|()| irqchip)
        };
        let irqchips = [
            KVM_IRQCHIP_PIC_MASTER,
            KVM_IRQCHIP_PIC_SLAVE,
            KVM_IRQCHIP_IOAPIC,
        ];
        let irqchips: Result<_, _> = irqchips.into_iter().map(irqchip).collect();
        Ok(PlatformState {
            irqchips: irqchips.map_err(kvm("read the interrupt controllers"))?,
            pit: vm.get_pit2().map_err(kvm("read the timer"))?,
            clock: vm.get_clock().map_err(kvm("read the clock"))?,
        })
    }

    /// Gives the state to a stopped VM, after its vCPUs: what is pending goes to them.
    pub fn restore(&self, vm: &VmFd) -> Result<(), Error> {
        for irqchip in &self.irqchips {
            vm.set_irqchip(irqchip)
                .map_err(kvm("set the interrupt controllers"))?;
        }
        vm.set_pit2(&self.pit).map_err(kvm("set the timer"))
    }

    /// Has the clock go on from where it was; the last thing before a vCPU runs.
    pub fn restore_clock(&self, vm: &VmFd, vcpus: &[VcpuFd]) -> Result<(), Error> {
        let clock = kvm_clock_data {
            clock: self.clock.clock,
            ..Default::default()
        };
        vm.set_clock(&clock).map_err(kvm("set the clock"))?;
        for vcpu in vcpus {
            // So that the guest's watchdog knows; it fails where the guest does not use the clock.
            let _ = vcpu.kvmclock_ctrl();
        }
        Ok(())
    }
}
