// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The register bank of `samples/devices/regbank.bpf.c`, served from user space.
//!
//! It does with every access what the programs do, so that the two can be compared.

use kvm_bpf::clock::HostClock;
use vmm_sys_util::eventfd::EventFd;

use super::{Description, MmioDevice};

const ID: u64 = 0x4b42_5042;
const VERSION: u64 = 1;
const MAX_VCPUS: usize = 256;

/// Each group of registers is a slot of 8 bytes.
const SLOT_ID: u64 = 0x00;
const SLOT_SCRATCH: u64 = 0x08;
const SLOT_COUNT: u64 = 0x10;
const SLOT_TIME: u64 = 0x18;
const SLOT_IRQ: u64 = 0x20;
const SLOT_MASK: u64 = 0x07;

/// The bank's registers.
#[derive(Debug)]
pub struct RegisterBank {
    irq: EventFd,
    /// The one that `bpf_ktime_get_ns()` reads.
    clock: HostClock,
    scratch: [u8; 8],
    accesses: [u64; MAX_VCPUS],
    unknown_reads: u64,
    unknown_writes: u64,
}

impl RegisterBank {
    /// What the guest is told of it.
    pub const DESCRIPTION: Description = Description {
        compatible: &["kvm-bpf,regbank"],
        size: 0x1000,
        nr_irqs: 1,
    };

    /// A bank whose interrupt 0 signals `irq`.
    pub fn new(irq: EventFd) -> Self {
        RegisterBank {
            irq,
            clock: HostClock::new(libc::CLOCK_MONOTONIC),
            scratch: [0; 8],
            accesses: [0; MAX_VCPUS],
            unknown_reads: 0,
            unknown_writes: 0,
        }
    }

    /// Accesses that reached no register: reads, writes.
    pub fn unknown(&self) -> [u64; 2] {
        [self.unknown_reads, self.unknown_writes]
    }

    fn count_access(&mut self, vcpu: usize) -> u64 {
        self.accesses.get_mut(vcpu).map_or(0, |count| {
            *count += 1;
            *count
        })
    }
}

fn naturally_aligned(offset: u64, len: usize) -> bool {
    matches!(len, 1 | 2 | 4 | 8) && offset.is_multiple_of(len as u64)
}

impl MmioDevice for RegisterBank {
    fn read(&mut self, vcpu: usize, offset: u64, data: &mut [u8]) {
        let count = self.count_access(vcpu);
        let slot = match offset & !SLOT_MASK {
            _ if !naturally_aligned(offset, data.len()) => None,
            SLOT_ID => Some(VERSION << 32 | ID),
            SLOT_SCRATCH => Some(u64::from_le_bytes(self.scratch)),
            SLOT_COUNT => Some(count),
            SLOT_TIME => Some(self.clock.now().as_nanos() as u64),
            _ => None,
        };
        match slot {
            Some(slot) => {
                let lane = (offset & SLOT_MASK) as usize;
                data.copy_from_slice(&slot.to_le_bytes()[lane..lane + data.len()]);
            }
            None => {
                self.unknown_reads += 1;
                data.fill(0);
            }
        }
    }

    fn write(&mut self, vcpu: usize, offset: u64, data: &[u8]) {
        self.count_access(vcpu);
        match offset & !SLOT_MASK {
            SLOT_SCRATCH if naturally_aligned(offset, data.len()) => {
                let lane = (offset & SLOT_MASK) as usize;
                self.scratch[lane..lane + data.len()].copy_from_slice(data);
            }
            // There is one interrupt, so only a write of 0 signals one.
            _ if offset == SLOT_IRQ
                && naturally_aligned(offset, data.len())
                && data.iter().take(4).all(|&byte| byte == 0)
                && self.irq.write(1).is_ok() => {}
            _ => self.unknown_writes += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bank() -> RegisterBank {
        RegisterBank::new(EventFd::new(libc::EFD_NONBLOCK).unwrap())
    }

    fn read<const N: usize>(bank: &mut RegisterBank, offset: u64) -> [u8; N] {
        let mut data = [0xa5; N];
        bank.read(0, offset, &mut data);
        data
    }

    #[test]
    fn identifies_itself() {
        let mut bank = bank();
        assert_eq!(u32::from_le_bytes(read(&mut bank, 0)), 0x4b42_5042);
        assert_eq!(u32::from_le_bytes(read(&mut bank, 4)), 1);
        assert_eq!(u64::from_le_bytes(read(&mut bank, 0)), 0x1_4b42_5042);
        assert_eq!(read(&mut bank, 3), [0x4b]);
    }

    #[test]
    fn scratch_takes_every_width() {
        let mut bank = bank();
        bank.write(0, 8, &0x1122_3344_5566_7788u64.to_le_bytes());
        bank.write(0, 9, &[0xaa]);
        bank.write(0, 10, &0xbbcc_u16.to_le_bytes());
        bank.write(0, 12, &0xdead_beef_u32.to_le_bytes());
        assert_eq!(
            u64::from_le_bytes(read(&mut bank, 8)),
            0xdead_beef_bbcc_aa88
        );
        assert_eq!(u16::from_le_bytes(read(&mut bank, 14)), 0xdead);
        assert_eq!(bank.unknown(), [0, 0]);
    }

    #[test]
    fn counts_per_vcpu() {
        let mut bank = bank();
        bank.write(0, 8, &[1]);
        assert_eq!(u64::from_le_bytes(read(&mut bank, 0x10)), 2);
        let mut data = [0; 8];
        bank.read(7, 0x10, &mut data);
        assert_eq!(u64::from_le_bytes(data), 1);
        bank.read(MAX_VCPUS, 0x10, &mut data);
        assert_eq!(u64::from_le_bytes(data), 0);
    }

    #[test]
    fn time_runs() {
        let mut bank = bank();
        let first = u64::from_le_bytes(read(&mut bank, 0x18));
        assert!(u64::from_le_bytes(read(&mut bank, 0x18)) >= first);
        assert_ne!(first, 0);
    }

    #[test]
    fn interrupt_zero_is_the_only_one() {
        let mut bank = bank();
        bank.write(0, 0x20, &1u32.to_le_bytes());
        bank.write(0, 0x21, &[0]);
        assert_eq!(bank.unknown(), [0, 2]);
        assert!(bank.irq.read().is_err());
        bank.write(0, 0x20, &0u32.to_le_bytes());
        assert_eq!(bank.irq.read().unwrap(), 1);
    }

    #[test]
    fn the_rest_reads_zero_and_is_counted() {
        let mut bank = bank();
        assert_eq!(read(&mut bank, 0x28), [0; 4]);
        assert_eq!(read(&mut bank, 0x20), [0; 4]);
        assert_eq!(read(&mut bank, 0x09), [0; 2]);
        assert_eq!(read(&mut bank, 0x08), [0; 3]);
        assert_eq!(bank.unknown(), [4, 0]);
        bank.write(0, 0, &[1; 4]);
        bank.write(0, 0xff8, &[1; 8]);
        assert_eq!(bank.unknown(), [4, 2]);
    }
}
