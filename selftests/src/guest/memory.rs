// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The guest's memory, and memory that it shares with others.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicU64};

use super::RAM_SIZE;

/// The guest's memory.
pub(super) struct Ram(pub(super) *mut u8);

// SAFETY: the host touches the memory by raw copies only.
unsafe impl Send for Ram {}
// SAFETY: as above; tests do not race with the guest for the same bytes.
unsafe impl Sync for Ram {}

impl Ram {
    pub(super) fn new() -> Self {
        let size = RAM_SIZE as usize;
        // SAFETY: a new anonymous mapping touches no other memory.
        let memory = unsafe {
            libc::mmap(
                ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(memory, libc::MAP_FAILED, "mmap of the guest's RAM");
        Ram(memory.cast())
    }

    fn range(&self, at: usize, len: usize) -> *mut u8 {
        assert!(at + len <= RAM_SIZE as usize, "{at:#x} is outside the RAM");
        // SAFETY: checked just above.
        unsafe { self.0.add(at) }
    }

    pub(super) fn write(&self, at: usize, bytes: &[u8]) {
        // SAFETY: `range` gives as many bytes as were asked for.
        unsafe {
            ptr::copy_nonoverlapping(bytes.as_ptr(), self.range(at, bytes.len()), bytes.len())
        }
    }

    pub(super) fn read(&self, at: usize, bytes: &mut [u8]) {
        // SAFETY: as for `write`.
        unsafe {
            ptr::copy_nonoverlapping(self.range(at, bytes.len()), bytes.as_mut_ptr(), bytes.len())
        }
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and each VM and vCPU holds a count on it.
        unsafe { libc::munmap(self.0.cast(), RAM_SIZE as usize) };
    }
}

/// Memory that a guest, the host's threads and other processes may all have.
#[derive(Debug)]
pub struct SharedMemory {
    file: File,
    pub(super) size: usize,
    pub(super) words: *mut AtomicU32,
}

// SAFETY: all accesses are atomic.
unsafe impl Send for SharedMemory {}
// SAFETY: as above.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// A new one of so many pages, all 0.
    pub fn new(pages: usize) -> Self {
        // SAFETY: the name is a string with its end; the new fd is nobody else's.
        let file = unsafe {
            let fd = libc::memfd_create(c"shared memory".as_ptr(), libc::MFD_CLOEXEC);
            assert!(fd >= 0, "memfd_create");
            File::from_raw_fd(fd)
        };
        file.set_len(0x1000 * pages as u64).expect("ftruncate");
        Self::of(file, pages)
    }

    /// One that another process has made, or the kernel: a map's file has no length.
    pub fn of(file: File, pages: usize) -> Self {
        let size = 0x1000 * pages;
        // SAFETY: a new mapping touches no other memory.
        let words = unsafe {
            libc::mmap(
                ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        assert_ne!(words, libc::MAP_FAILED, "mmap of shared memory");
        SharedMemory {
            file,
            size,
            words: words.cast(),
        }
    }

    /// What another process gets it by.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// A word of it.
    pub fn word(&self, index: usize) -> &AtomicU32 {
        assert!(index < self.size / 4, "word {index} is outside");
        // SAFETY: checked just above; the mapping lives as long as the borrow.
        unsafe { &*self.words.add(index) }
    }

    /// Eight bytes of it.
    pub fn double_word(&self, index: usize) -> &AtomicU64 {
        let first = ptr::from_ref(self.word(2 * index));
        // SAFETY: a page is aligned and has a multiple of 8 bytes; all of it is shared memory.
        unsafe { &*first.cast() }
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and each VM and vCPU holds a count on it.
        unsafe { libc::munmap(self.words.cast(), self.size) };
    }
}
