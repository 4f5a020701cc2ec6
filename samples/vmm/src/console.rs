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
#[serde(deny_unknown_fields)]
pub struct State {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
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

    /// Its registers now. There is no input.
    pub fn save(&self) -> State {
        let state = self.lock().state();
        State {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
        }
    }

    /// Sets its registers; raises its interrupt, if that is pending.
    pub fn restore(&self, state: &State) -> io::Result<()> {
        let state = SerialState {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: Vec::new(),
        };
        let mut serial = self.lock();
        let irq = EventTrigger(serial.interrupt_evt().0.try_clone()?);
        let output = serial.writer().clone();
        *serial = Serial::from_state(&state, irq, NoEvents, output).map_err(io::Error::other)?;
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
        self.serial.lock().unwrap_or_else(|e| e.into_inner())
    }
}
