// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The guest's console: a 16550A whose output is standard output.

use std::io;
use std::sync::Mutex;

use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

use crate::output::Output;

/// Signals an eventfd as the interrupt of a device model.
struct EventTrigger(EventFd);

impl Trigger for EventTrigger {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Its registers.
#[derive(Debug, Deserialize, Serialize)]
#[cfg_attr(test, derive(Default))]
pub struct State(#[serde(with = "Registers")] SerialState);

/// How they are written.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields, remote = "SerialState")]
struct Registers {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    /// There is no input but what a guest sends itself in loopback mode, which is not saved.
    #[serde(skip)]
    in_buffer: Vec<u8>,
}

/// The serial port; where its eight registers are is the architecture's affair.
pub struct Console {
    serial: Mutex<Serial<EventTrigger, NoEvents, Output>>,
}

impl Console {
    /// Number of registers, a byte each.
    pub const SIZE: u64 = 8;

    /// A console without interrupt so far.
    pub fn new() -> io::Result<Self> {
        let irq = EventTrigger(EventFd::new(libc::EFD_NONBLOCK)?);
        Ok(Console {
            serial: Mutex::new(Serial::new(irq, Output::new("console", io::stdout())?)),
        })
    }

    /// Has its interrupt raise `gsi`, edge-triggered.
    pub fn wire(&self, vm: &VmFd, gsi: u32) -> Result<(), errno::Error> {
        vm.register_irqfd(&self.lock().interrupt_evt().0, gsi)
    }

    /// The eventfd of its interrupt.
    pub fn irq(&self) -> io::Result<EventFd> {
        self.lock().interrupt_evt().0.try_clone()
    }

    /// Its registers now.
    pub fn save(&self) -> State {
        State(self.lock().state())
    }

    /// Sets its registers; raises its interrupt, if that is pending.
    pub fn restore(&self, state: &State) -> io::Result<()> {
        let mut serial = self.lock();
        let irq = EventTrigger(serial.interrupt_evt().0.try_clone()?);
        let output = serial.writer().clone();
        *serial = Serial::from_state(&state.0, irq, NoEvents, output).map_err(io::Error::other)?;
        Ok(())
    }

    /// Handles a read of the register at `offset`, which is below [`Console::SIZE`].
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let mut serial = self.lock();
        data.fill_with(|| serial.read(offset as u8));
    }

    /// Takes a write of the register at `offset`, which is below [`Console::SIZE`].
    pub fn write(&self, offset: u64, data: &[u8]) {
        let mut serial = self.lock();
        for &byte in data {
            // It fails when the interrupt cannot be raised; the guest may go on.
            let _ = serial.write(offset as u8, byte);
        }
    }

    /// Waits for the output to be taken, but not for ever; returns how many bytes were not.
    pub fn finish(&self) -> u64 {
        self.lock().writer().finish()
    }

    /// The same output, for others.
    pub fn output(&self) -> Output {
        self.lock().writer().clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Serial<EventTrigger, NoEvents, Output>> {
        crate::lock(&self.serial)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_written_by_name() {
        let state = State(SerialState {
            scratch: 7,
            ..Default::default()
        });
        let mut json = serde_json::to_value(&state).unwrap();
        assert_eq!(json.as_object().unwrap().len(), 9);
        assert_eq!(json["scratch"], 7);
        let read: State = serde_json::from_value(json.clone()).unwrap();
        assert_eq!(read.0, state.0);
        json["in_buffer"] = [0].into();
        assert!(serde_json::from_value::<State>(json).is_err());
    }
}
