// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What serial ports made of eBPF programs send.
//!
//! A device that is `ns16550a` puts each byte into its ring buffer `output`; a thread takes them and
//! writes them on. While it is busy the kernel need not wake it.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_bpf::{Image, Note};
use libbpf_rs::{MapCore, MapFlags, MapHandle, MapType, RingBufferBuilder};

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
        image: &Image,
        file: Option<&Path>,
        platform: &arch::Platform,
    ) -> Result<Option<Self>, Error> {
        let Some(map) = ring(image) else {
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

    /// Takes from the ring buffer of programs that replace the running ones, too, if it is another.
    pub fn follow(&mut self, name: &str, image: &Image) -> Result<(), Error> {
        match ring(image) {
            Some(map) => self.take_from(name, map),
            None => Ok(()),
        }
    }

    fn take_from(&mut self, name: &str, map: &MapHandle) -> Result<(), Error> {
        let failed = |error| Error::TakeOutput(name.to_string(), error);
        let id = map.info().map_err(|error| failed(other(error)))?.info.id;
        if id == self.map {
            return Ok(());
        }
        let map = MapHandle::try_from(map).map_err(|error| failed(other(error)))?;
        let (stop, mut to) = (self.stop.clone(), self.to.clone());
        let mut builder = RingBufferBuilder::new();
        let write_on = move |bytes: &[u8]| {
            // It never fails.
            drop(to.write_all(bytes));
            0
        };
        let ring = builder
            .add(&map, write_on)
            .map(drop)
            .and_then(|()| builder.build())
            .map_err(|error| failed(other(error)))?;
        let take = move || {
            // Open as long as the ring: libbpf has its number only.
            let _map = map;
            while !stop.load(Ordering::SeqCst) {
                // It fails when a signal comes.
                let _ = ring.poll(PAUSE);
            }
            // The vCPUs have stopped: what is there is all.
            let _ = ring.consume();
        };
        let thread = thread::Builder::new()
            .name("serial".to_string())
            .spawn(take)
            .map_err(failed)?;
        self.threads.push(thread);
        self.map = id;
        Ok(())
    }

    /// Takes the rest, after the guest's end; returns how many bytes are lost: those that the
    /// programs had no room for, and of a file those that are not written.
    pub fn finish(self, image: &Image) -> u64 {
        self.stop.store(true, Ordering::SeqCst);
        for thread in self.threads {
            // A panic has been printed already.
            let _ = thread.join();
        }
        let unwritten = match self.is_file {
            true => self.to.finish(),
            false => 0,
        };
        unwritten + dropped(image).unwrap_or(0)
    }
}

/// How many bytes the programs have dropped, where they tell.
fn dropped(image: &Image) -> Option<u64> {
    let map = image
        .map(LOST)
        .filter(|map| map.map_type() == MapType::Array)?;
    let count = map.lookup(&0_u32.to_ne_bytes(), MapFlags::ANY).ok()??;
    Some(u64::from_ne_bytes(count.try_into().ok()?))
}

/// The ring buffer of a serial port.
fn ring(image: &Image) -> Option<&MapHandle> {
    if !Serial::is_one(image.note()) {
        return None;
    }
    image
        .map(MAP)
        .filter(|map| map.map_type() == MapType::RingBuf)
}

fn other(error: libbpf_rs::Error) -> io::Error {
    io::Error::other(error)
}
