// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Memory of maps that is this process's too.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::{io, slice};

/// Memory of a map that user space can map, until this is dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<libc::c_void>,
    len: usize,
}

// SAFETY: the memory is the whole process's, and safe code only gets its address here.
unsafe impl Send for Mapping {}
// SAFETY: likewise.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps so many bytes of a map; `protection` is that of mmap(2).
    pub fn new(map: BorrowedFd<'_>, len: usize, protection: libc::c_int) -> io::Result<Self> {
        Self::at(map, 0, len, protection)
    }

    /// The same from a byte on, at which a page begins.
    pub fn at(
        map: BorrowedFd<'_>,
        offset: usize,
        len: usize,
        protection: libc::c_int,
    ) -> io::Result<Self> {
        // SAFETY: a new mapping, at an address that the kernel chooses, takes nothing from anyone.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                protection,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                offset as libc::off_t,
            )
        };
        match NonNull::new(start) {
            Some(start) if start.as_ptr() != libc::MAP_FAILED => Ok(Mapping { start, len }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Its first byte, at the beginning of a page.
    pub fn start(&self) -> NonNull<libc::c_void> {
        self.start
    }

    /// The word at that byte, a multiple of 8 inside of it.
    pub fn word(&self, at: usize) -> &AtomicU64 {
        assert!(
            at.is_multiple_of(8) && at < self.len,
            "{at} of {}",
            self.len
        );
        // SAFETY: the word lies inside the mapping, which begins with a page and has whole pages, and
        // lives as long as the reference. Who else accesses it may: it is atomic.
        unsafe { AtomicU64::from_ptr(self.start.as_ptr().byte_add(at).cast()) }
    }

    /// Its bytes.
    pub fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and who uses its memory keeps it.
        unsafe { libc::munmap(self.start.as_ptr(), self.len) };
    }
}

/// The memory of an array that programs and this process change at the same time.
///
/// The array has the flag `BPF_F_MMAPABLE`. Changes of a word are atomic on both sides, or one of
/// them undoes the other's. No access is a system call.
///
/// A word has 8 bytes here, also where programs have two numbers of 4 in it: Rust has no accesses of
/// two sizes to the same atomic memory. Change one of the two with `fetch_or()` and the like, and
/// not by a store of both.
#[derive(Debug)]
pub struct Words {
    memory: Mapping,
}

impl Words {
    /// Maps so many bytes of an array, a multiple of 8.
    pub(crate) fn new(map: BorrowedFd<'_>, len: usize) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let memory = Mapping::new(map, len, protection)?;
        Ok(Words { memory })
    }

    /// The word that begins at that byte, a multiple of 8, as elements do; none if it is not, or lies
    /// behind the last one.
    pub fn get(&self, offset: usize) -> Option<&AtomicU64> {
        let is_word = offset.is_multiple_of(8) && offset < self.memory.len();
        is_word.then(|| self.memory.word(offset))
    }

    fn words(&self) -> &[AtomicU64] {
        let count = self.memory.len() / size_of::<u64>();
        // SAFETY: the mapping has as many words, lives as long as `self`, and begins at a page; all
        // access to it is atomic.
        unsafe { slice::from_raw_parts(self.memory.start().cast().as_ptr(), count) }
    }

    /// All bytes; each 8 of them are as they were at one moment.
    pub(crate) fn copy(&self) -> Vec<u8> {
        self.read(0, self.memory.len())
    }

    /// So many bytes from the `at`th on, a multiple of 8; less where there are less.
    pub(crate) fn read(&self, at: usize, len: usize) -> Vec<u8> {
        let words = self.words().iter().skip(at / 8);
        let bytes = words.flat_map(|word| word.load(Relaxed).to_ne_bytes());
        bytes.take(len).collect()
    }

    /// Writes bytes from the `at`th on, a multiple of 8, and zeroes up to the next.
    pub(crate) fn write(&self, at: usize, bytes: &[u8]) {
        let words = self.words().iter().skip(at / 8);
        for (word, bytes) in words.zip(bytes.chunks(8)) {
            let mut whole = [0; 8];
            whole[..bytes.len()].copy_from_slice(bytes);
            word.store(u64::from_ne_bytes(whole), Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, FromRawFd, OwnedFd};
    use std::sync::atomic::Ordering::SeqCst;

    use super::*;

    /// Memory of this process, as that of a map.
    fn memory(len: i64) -> OwnedFd {
        // SAFETY: the name is a string, and the file is new.
        let file = unsafe {
            let file = libc::memfd_create(c"map".as_ptr(), libc::MFD_CLOEXEC);
            assert_eq!(libc::ftruncate(file, len), 0);
            file
        };
        // SAFETY: likewise.
        unsafe { OwnedFd::from_raw_fd(file) }
    }

    #[test]
    fn bytes_are_in_words() {
        let file = memory(4096);
        let words = Words::new(file.as_fd(), 24).unwrap();
        let again = Words::new(file.as_fd(), 24).unwrap();
        words.write(8, &[1, 2, 3, 4, 5]);
        assert_eq!(again.read(8, 5), [1, 2, 3, 4, 5]);
        assert_eq!(
            again.get(8).unwrap().load(SeqCst).to_ne_bytes(),
            [1, 2, 3, 4, 5, 0, 0, 0]
        );
        let two = u64::from_ne_bytes([0, 0, 0, 0, 255, 255, 255, 255]);
        again.get(8).unwrap().fetch_or(two, SeqCst);
        assert_eq!(
            words.copy()[8..],
            [[1, 2, 3, 4], [255; 4], [0; 4], [0; 4]].concat()
        );
        // Nothing outside of it is written.
        words.write(16, &[7; 100]);
        assert_eq!(words.copy()[16..], [7; 8]);
        for none in [1, 4, 12, 24, 4096] {
            assert!(words.get(none).is_none(), "{none}");
        }
    }
}
