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
    /// How far it was read, in bytes since the beginning. Whoever has the map can write to the page
    /// that tells the kernel so, so what counts here is this.
    at: u64,
    /// That page.
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
        let consumer = Mapping::new(map.as_fd(), page, both)?;
        Ok(RingBuffer {
            map: map.as_fd().try_clone_to_owned()?,
            at: consumer.word(0).load(Relaxed),
            consumer,
            producer: Mapping::at(map.as_fd(), page, whole, libc::PROT_READ)?,
            data_len,
        })
    }

    /// Takes the records that are there now; returns how many. Those that programs write meanwhile
    /// are for the next call.
    ///
    /// `InvalidData`: the positions or lengths in the buffer contradict each other, as they do after
    /// another holder of the map has changed them. `each` has had the records before.
    pub fn take(&mut self, mut each: impl FnMut(&[u8])) -> io::Result<usize> {
        let end = self.producer.word(0).load(Acquire);
        let mut count = 0;
        let mut record = Vec::new();
        while self.at != end {
            let at = self.at;
            let room = end.wrapping_sub(at);
            if !at.is_multiple_of(8) || room > self.data_len as u64 {
                let message = format!("read up to {at:#x}, written up to {end:#x}");
                return Err(damaged(&message));
            }
            let header = self.data(at, Acquire);
            let flags_and_len = u32::from_ne_bytes(header[..4].try_into().expect("4 bytes"));
            if flags_and_len & BUSY != 0 {
                break;
            }
            let len = (flags_and_len & !DISCARDED) as usize;
            let whole = (HEADER_LEN + len).next_multiple_of(8) as u64;
            if whole > room {
                return Err(damaged(&format!("{len} bytes at {at:#x}, before {end:#x}")));
            }
            if flags_and_len & DISCARDED == 0 {
                record.clear();
                for start in (0..len).step_by(8) {
                    record.extend(self.data(at.wrapping_add((HEADER_LEN + start) as u64), Relaxed));
                }
                record.truncate(len);
                each(&record);
                count += 1;
            }
            self.at = self.at.wrapping_add(whole);
            self.consumer.word(0).store(self.at, Release);
        }
        Ok(count)
    }

    /// Eight bytes of the data.
    fn data(&self, at: u64, order: std::sync::atomic::Ordering) -> [u8; 8] {
        let at = at as usize & (self.data_len - 1);
        let word = self.producer.word(sys::page_size() + at);
        word.load(order).to_ne_bytes()
    }

    /// Waits for a record, but no longer than `timeout` in whole milliseconds, rounded up, or until a
    /// signal comes; returns whether one may be there. Who waits in another way polls its file descriptor.
    pub fn wait(&self, timeout: Duration) -> io::Result<bool> {
        let mut poll = libc::pollfd {
            fd: self.map.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // Rounded down, a short one would not wait at all.
        let milliseconds = timeout.as_nanos().div_ceil(1_000_000);
        let milliseconds = milliseconds.try_into().unwrap_or(libc::c_int::MAX);
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

fn damaged(why: &str) -> io::Error {
    let message = format!("the ring buffer is damaged: {why}");
    io::Error::new(io::ErrorKind::InvalidData, message)
}

impl AsFd for RingBuffer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.map.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::time::Instant;

    use vmm_sys_util::tempfile::TempFile;

    use super::*;
    use crate::sys::MapInfo;

    const LEN: u64 = 4096;

    /// A reader of a file that looks like the memory of a ring buffer.
    fn reader_of(file: &File) -> RingBuffer {
        let info = MapInfo {
            map_type: map_type::RINGBUF,
            max_entries: LEN as u32,
            ..MapInfo::default()
        };
        let map = Map::with_info("ring", file.try_clone().unwrap().into(), info);
        RingBuffer::new(&map).unwrap()
    }

    fn ring() -> (File, RingBuffer) {
        let file = TempFile::new().unwrap().into_file();
        file.set_len(2 * sys::page_size() as u64 + 2 * LEN).unwrap();
        let reader = reader_of(&file);
        (file, reader)
    }

    fn set_producer(file: &File, at: u64) {
        let page = sys::page_size() as u64;
        file.write_all_at(&at.to_ne_bytes(), page).unwrap();
    }

    /// Writes a record's header and bytes at a place of the data.
    fn set_record(file: &File, at: u64, header: u32, bytes: &[u8]) {
        let start = 2 * sys::page_size() as u64 + at;
        file.write_all_at(&header.to_ne_bytes(), start).unwrap();
        file.write_all_at(bytes, start + HEADER_LEN as u64).unwrap();
    }

    fn taken(ring: &mut RingBuffer) -> (Vec<Vec<u8>>, io::Result<usize>) {
        let mut records = Vec::new();
        let result = ring.take(|record| records.push(record.to_vec()));
        (records, result)
    }

    #[test]
    fn records_are_taken_in_order() {
        let (file, mut ring) = ring();
        set_record(&file, 0, 3, b"abc");
        set_record(&file, 16, 4 | DISCARDED, b"none");
        set_record(&file, 32, 9, b"123456789");
        set_record(&file, 56, 1 | BUSY, b"x");
        set_producer(&file, 72);
        let (records, result) = taken(&mut ring);
        assert_eq!(
            (&records[..], result.unwrap()),
            (&[b"abc".to_vec(), b"123456789".to_vec()][..], 2)
        );
        set_record(&file, 56, 1, b"x");
        let (records, result) = taken(&mut ring);
        assert_eq!((&records[..], result.unwrap()), (&[b"x".to_vec()][..], 1));
        let mut told = [0; 8];
        file.read_exact_at(&mut told, 0).unwrap();
        assert_eq!(u64::from_ne_bytes(told), 72);
    }

    /// As it may be after another has written to the page that the consumer has.
    #[test]
    fn positions_and_lengths_are_checked() {
        for (what, producer, header) in [
            ("behind", u64::MAX - 7, 0),
            ("too far", LEN + 8, 0),
            ("longer than what is there", 16, 9),
            ("longer than all", 16, DISCARDED - 1),
            ("in the middle of a word", 4, 0),
        ] {
            let (file, mut ring) = ring();
            set_record(&file, 0, header, b"");
            set_producer(&file, producer);
            let (records, result) = taken(&mut ring);
            let error = result.expect_err(what);
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{what}");
            assert!(records.is_empty(), "{what}: {records:?}");
        }
        // Positions that pass the greatest number.
        let (file, _) = ring();
        file.write_all_at(&(u64::MAX - 7).to_ne_bytes(), 0).unwrap();
        set_producer(&file, 16);
        set_record(&file, LEN - 8, 9, b"");
        set_record(&file, 0, u32::from_ne_bytes(*b"abcd"), b"efgh");
        let (records, result) = taken(&mut reader_of(&file));
        assert_eq!(
            (&records[..], result.unwrap()),
            (&[b"abcd\0\0\0\0e".to_vec()][..], 1)
        );
        let (file, _) = ring();
        file.write_all_at(&3_u64.to_ne_bytes(), 0).unwrap();
        set_producer(&file, 16);
        let (_, result) = taken(&mut reader_of(&file));
        result.expect_err("begins in the middle of a word");
    }

    /// A program that goes on writing does not keep the reader.
    #[test]
    fn what_comes_meanwhile_is_for_the_next_call() {
        let (file, mut ring) = ring();
        set_record(&file, 0, 1, b"a");
        set_record(&file, 16, 1, b"b");
        set_producer(&file, 16);
        let count = ring.take(|_| set_producer(&file, 32)).unwrap();
        assert_eq!(count, 1);
        assert_eq!(taken(&mut ring).1.unwrap(), 1);
    }

    #[test]
    fn a_short_time_is_waited() {
        let (reader, _writer) = io::pipe().unwrap();
        let (_, mut ring) = ring();
        ring.map = reader.into();
        let start = Instant::now();
        assert!(!ring.wait(Duration::from_micros(1)).unwrap());
        assert!(start.elapsed() >= Duration::from_micros(900));
    }
}
