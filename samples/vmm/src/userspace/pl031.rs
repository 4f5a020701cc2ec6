// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The real-time clock of `samples/devices/pl031.bpf.c`, as the crate `vm-superio` has it.
//!
//! It keeps time for a guest.  Other than the programs, it
//!
//! * has no alarm: a match sets no bit and raises no interrupt,
//! * goes back to the host's time, and reads 0 in LR, after a write of 1 to CR,
//! * goes on with the host's time instead of wrapping around.

use std::fmt;

use vm_superio::Rtc;
use vm_superio::rtc_pl031::NoEvents;
use vmm_sys_util::eventfd::EventFd;

use super::{Description, MmioDevice};

/// The clock.
pub struct Pl031 {
    rtc: Rtc<NoEvents>,
    /// Never signalled, but open: it may be an irqfd.
    _irq: EventFd,
}

impl fmt::Debug for Pl031 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pl031")
            .field("state", &self.rtc.state())
            .finish()
    }
}

impl Pl031 {
    /// What the guest is told of it.
    pub const DESCRIPTION: Description = Description {
        compatible: &["arm,pl031", "arm,primecell"],
        size: 0x1000,
        nr_irqs: 1,
    };

    /// A clock with the host's time of day.
    pub fn new(irq: EventFd) -> Self {
        Pl031 {
            rtc: Rtc::new(),
            _irq: irq,
        }
    }
}

/// The register that an access is for: all have 32 bits, and any other access is for none.
fn register(offset: u64, len: usize) -> Option<u16> {
    let register = u16::try_from(offset).ok()?;
    (len == 4 && register.is_multiple_of(4)).then_some(register)
}

impl MmioDevice for Pl031 {
    fn read(&mut self, _vcpu: usize, offset: u64, data: &mut [u8]) {
        // The model leaves what it does not know as it is.
        let mut value = [0; 4];
        if let Some(register) = register(offset, data.len()) {
            self.rtc.read(register, &mut value);
        }
        data.fill(0);
        for (byte, value) in data.iter_mut().zip(value) {
            *byte = value;
        }
    }

    fn write(&mut self, _vcpu: usize, offset: u64, data: &[u8]) {
        if let (Some(register), Ok(value)) = (register(offset, data.len()), data.try_into()) {
            self.rtc.write(register, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{SystemTime, UNIX_EPOCH};

    use super::*;

    fn clock() -> Pl031 {
        Pl031::new(EventFd::new(libc::EFD_NONBLOCK).unwrap())
    }

    fn read<const N: usize>(clock: &mut Pl031, offset: u64) -> [u8; N] {
        let mut data = [0xa5; N];
        clock.read(0, offset, &mut data);
        data
    }

    #[test]
    fn has_the_time_of_day() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let got = u32::from_le_bytes(read(&mut clock(), 0));
        assert!(u64::from(got) - now.as_secs() <= 1);
    }

    #[test]
    fn identifies_itself() {
        let mut clock = clock();
        let ids = [0, 4, 8, 12, 16, 20, 24, 28]
            .map(|offset| u32::from_le_bytes(read(&mut clock, 0xfe0 + offset)));
        assert_eq!(ids, [0x31, 0x10, 0x04, 0x00, 0x0d, 0xf0, 0x05, 0xb1]);
    }

    #[test]
    fn registers_have_32_bits() {
        let mut clock = clock();
        clock.write(0, 4, &0x1234_5678_u32.to_le_bytes());
        clock.write(0, 4, &[0xff; 8]);
        clock.write(0, 4, &[0xff; 2]);
        clock.write(0, 5, &[0xff; 4]);
        clock.write(0, 0x1_0004, &[0xff; 4]);
        assert_eq!(u32::from_le_bytes(read(&mut clock, 4)), 0x1234_5678);
        assert_eq!(read(&mut clock, 4), [0; 8]);
        assert_eq!(read(&mut clock, 4), [0; 2]);
        assert_eq!(read(&mut clock, 0xfe1), [0; 4]);
        assert_eq!(read(&mut clock, 0x20), [0; 4]);
    }
}
