// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What serial ports made of eBPF programs send.
//!
//! A device that is `ns16550a` puts each byte into its ring buffer `output`; a thread takes them and
//! writes them on. While it is busy the kernel need not wake it.

use std::fs::File;
use std::io::Write;
use std::mem;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_bpf::{Map, Note, Programs, RingBuffer};

use crate::arch;
use crate::output::Output;
use crate::vm::Error;

const COMPATIBLE: &str = "ns16550a";
const MAP: &str = "output";
/// The map in which the programs count bytes that they drop.
const LOST: &str = "lost";

/// How long the end of the guest may wait for a thread that nothing is sent to.
const PAUSE: Duration = Duration::from_millis(100);

/// Takes what one device sends.
pub struct Serial {
    to: Output,
    /// It goes to a file of its own, and not to the console.
    is_file: bool,
    /// The kernel's number of the ring buffer.
    map: u32,
    /// Ends the thread that takes from it.
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Serial {
    /// Whether the device is a serial port.
    pub fn is_one(note: &Note) -> bool {
        note.compatible.iter().any(|own| own == COMPATIBLE)
    }

    /// Begins to take what the device sends, if it is a serial port and has the ring buffer, for a
    /// file or for the console.
    pub fn new(
        name: &str,
        programs: &Programs,
        file: Option<&Path>,
        platform: &arch::Platform,
    ) -> Result<Option<Self>, Error> {
        let Some(map) = ring(programs) else {
            return match file {
                Some(_) => Err(Error::NoOutput(name.to_string())),
                None => Ok(None),
            };
        };
        let to = match file {
            Some(path) => File::create(path)
                .and_then(|file| Output::new("output", file))
                .map_err(|error| Error::Output(path.to_path_buf(), error))?,
            None => platform.console(),
        };
        let mut serial = Serial {
            to,
            is_file: file.is_some(),
            map: 0,
            stop: Arc::default(),
            threads: Vec::new(),
        };
        serial.take_from(name, map)?;
        Ok(Some(serial))
    }

    /// Takes from the ring buffer of programs that have replaced the others, if it is another: nothing
    /// comes into the old one any more.
    pub fn follow(&mut self, name: &str, programs: &Programs) -> Result<(), Error> {
        match ring(programs) {
            Some(map) => self.take_from(name, map),
            None => Ok(()),
        }
    }

    fn take_from(&mut self, name: &str, map: &Map) -> Result<(), Error> {
        let failed = |error| Error::TakeOutput(name.to_string(), error);
        if map.id() == self.map {
            return Ok(());
        }
        let stop: Arc<AtomicBool> = Arc::default();
        let (stopped, mut to, device) = (stop.clone(), self.to.clone(), name.to_string());
        let mut ring = RingBuffer::new(map).map_err(failed)?;
        let take = move || {
            // It never fails.
            let mut write_on = |bytes: &[u8]| drop(to.write_all(bytes));
            loop {
                // No program writes behind this: then what is there is all.
                let is_last = stopped.load(Ordering::SeqCst);
                if let Err(error) = ring.take(&mut write_on) {
                    let error = Error::TakeOutput(device, error);
                    return crate::print_error("the output ends", &error);
                }
                if is_last {
                    return;
                }
                // Without memory for it, it is tried again at once.
                let _ = ring.wait(PAUSE);
            }
        };
        let thread = thread::Builder::new()
            .name("serial".to_string())
            .spawn(take)
            .map_err(failed)?;
        mem::replace(&mut self.stop, stop).store(true, Ordering::SeqCst);
        self.threads.retain(|old| !old.is_finished());
        self.threads.push(thread);
        self.map = map.id();
        Ok(())
    }

    /// Takes the rest, after the guest's end; returns how many bytes are lost: those that the
    /// programs had no room for, and of a file those that are not written.
    pub fn finish(self, programs: &Programs) -> u64 {
        self.stop.store(true, Ordering::SeqCst);
        for thread in self.threads {
            // A panic has been printed already.
            let _ = thread.join();
        }
        let unwritten = match self.is_file {
            true => self.to.finish(),
            false => 0,
        };
        unwritten + dropped(programs).unwrap_or(0)
    }
}

/// How many bytes the programs have dropped, where they tell.
fn dropped(programs: &Programs) -> Option<u64> {
    let map = programs.map(LOST).filter(|map| map.is_array())?;
    let count = map.lookup(&0_u32.to_ne_bytes()).ok()??;
    Some(u64::from_ne_bytes(count.try_into().ok()?))
}

/// The ring buffer of a serial port; whether it is one is for the reader to say.
fn ring(programs: &Programs) -> Option<&Map> {
    if !Serial::is_one(programs.note()) {
        return None;
    }
    programs.map(MAP)
}
