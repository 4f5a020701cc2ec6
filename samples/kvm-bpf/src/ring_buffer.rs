// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What programs write into a ring buffer, a map of type `BPF_MAP_TYPE_RINGBUF`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::time::Duration;

use crate::mapping::Mapping;
use crate::programs::Map;
use crate::sys::{self, map_type};

/// What a record begins with: its length, with flags, and a number of the kernel's.
const HEADER_LEN: usize = 8;
/// The program has not finished the record yet.
const BUSY: u32 = 1 << 31;
/// The program does not want it to be seen.
const DISCARDED: u32 = 1 << 30;

/// The one reader of a ring buffer.
///
/// It calls no bpf(2). The map stays open until this is dropped.
#[derive(Debug)]
pub struct RingBuffer {
    map: OwnedFd,
    /// How far it was read, in bytes since the beginning: a page of ours.
    consumer: Mapping,
    /// How far it was written, and the page behind it the data, twice: no record is in two parts.
    producer: Mapping,
    data_len: usize,
}

impl RingBuffer {
    /// Begins with what nobody has read yet. `InvalidInput`: it is no ring buffer.
    pub fn new(map: &Map) -> io::Result<Self> {
        if map.map_type() != map_type::RINGBUF {
            let message = format!("no ring buffer, but of type {}", map.map_type());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        let (page, data_len) = (sys::page_size(), map.max_entries() as usize);
        let both = libc::PROT_READ | libc::PROT_WRITE;
        let whole = page + 2 * data_len;
        Ok(RingBuffer {
            map: map.as_fd().try_clone_to_owned()?,
            consumer: Mapping::new(map.as_fd(), page, both)?,
            producer: Mapping::at(map.as_fd(), page, whole, libc::PROT_READ)?,
            data_len,
        })
    }

    /// Takes all records that are there; returns how many.
    pub fn take(&mut self, mut each: impl FnMut(&[u8])) -> usize {
        let mut count = 0;
        let mut at = self.consumer.word(0).load(Relaxed);
        let mut record = Vec::new();
        while at < self.producer.word(0).load(Acquire) {
            let header = self.data(at, Acquire);
            let flags_and_len = u32::from_ne_bytes(header[..4].try_into().expect("4 bytes"));
            if flags_and_len & BUSY != 0 {
                break;
            }
            let len = (flags_and_len & !DISCARDED) as usize;
            if flags_and_len & DISCARDED == 0 {
                record.clear();
                for start in (0..len.min(self.data_len)).step_by(8) {
                    record.extend(self.data(at + (HEADER_LEN + start) as u64, Relaxed));
                }
                record.truncate(len);
                each(&record);
                count += 1;
            }
            at += (HEADER_LEN + len).next_multiple_of(8) as u64;
            self.consumer.word(0).store(at, Release);
        }
        count
    }

    /// Eight bytes of the data.
    fn data(&self, at: u64, order: std::sync::atomic::Ordering) -> [u8; 8] {
        let at = at as usize & (self.data_len - 1);
        let word = self.producer.word(sys::page_size() + at);
        word.load(order).to_ne_bytes()
    }

    /// Waits for a record, but no longer than `timeout`, or until a signal comes; returns whether one
    /// may be there. Who waits in another way polls its file descriptor.
    pub fn wait(&self, timeout: Duration) -> io::Result<bool> {
        let mut poll = libc::pollfd {
            fd: self.map.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let milliseconds = timeout.as_millis().try_into().unwrap_or(libc::c_int::MAX);
        // SAFETY: the kernel reads and writes one structure.
        match unsafe { libc::poll(&mut poll, 1, milliseconds) } {
            -1 => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => Ok(false),
                error => Err(error),
            },
            ready => Ok(ready > 0),
        }
    }
}

impl AsFd for RingBuffer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.map.as_fd()
    }
}
