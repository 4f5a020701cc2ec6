// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Memory of maps that is this process's too.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};

/// The memory of an array that user space can map, until this is dropped.
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
        // SAFETY: a new mapping, at an address that the kernel chooses, takes nothing from anyone.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                protection,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                0,
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
