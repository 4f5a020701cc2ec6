// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Devices served from user space, to compare with those made of eBPF programs.
//!
//! Each does what the device of the same name in `samples/devices` does, or says where it does
//! not.

mod pl031;
mod regbank;
pub mod uclamp;
mod vcpufreq;

use vmm_sys_util::eventfd::EventFd;

pub use pl031::Pl031;
pub use regbank::RegisterBank;
pub use vcpufreq::VcpuFreq;

/// A device model: told of each access, with its offset from the device's start.
pub trait MmioDevice: Send {
    /// Handles a guest read of 1 to 8 bytes.
    fn read(&mut self, vcpu: usize, offset: u64, data: &mut [u8]);
    /// Takes a guest write of 1 to 8 bytes.  Called on the vCPU's own thread.
    fn write(&mut self, vcpu: usize, offset: u64, data: &[u8]);
}

/// What a guest is told of a device, as the note of a device made of programs says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Description {
    /// Device-tree `compatible` strings.
    pub compatible: &'static [&'static str],
    /// Bytes of MMIO space.
    pub size: u64,
    /// Number of interrupts.
    pub nr_irqs: u32,
}

/// The devices that there are.
pub const NAMES: &[&str] = &["regbank", "pl031", "vcpufreq"];

/// What a device is like; none if there is none of that name.
pub fn describe(name: &str) -> Option<Description> {
    match name {
        "regbank" => Some(RegisterBank::DESCRIPTION),
        "pl031" => Some(Pl031::DESCRIPTION),
        "vcpufreq" => Some(VcpuFreq::DESCRIPTION),
        _ => None,
    }
}

/// Makes a device; none if there is none of that name, or if `irqs` are fewer than it has.
///
/// `perf_table` is for "vcpufreq": 1 to 64 frequencies in kHz, ascending.
pub fn create(name: &str, irqs: Vec<EventFd>, perf_table: &[u32]) -> Option<Box<dyn MmioDevice>> {
    let mut irqs = irqs.into_iter();
    match name {
        "regbank" => Some(Box::new(RegisterBank::new(irqs.next()?))),
        "pl031" => Some(Box::new(Pl031::new(irqs.next()?))),
        "vcpufreq" => Some(Box::new(VcpuFreq::new(perf_table))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_device_can_be_made() {
        for name in NAMES {
            let description = describe(name).unwrap();
            let irqs = (0..description.nr_irqs)
                .map(|_| EventFd::new(0).unwrap())
                .collect();
            assert!(create(name, irqs, &[1000]).is_some(), "{name}");
            let made = create(name, Vec::new(), &[1000]).is_some();
            assert_eq!(made, description.nr_irqs == 0, "{name}");
        }
        assert!(describe("toaster").is_none());
        assert!(create("toaster", Vec::new(), &[]).is_none());
    }
}
