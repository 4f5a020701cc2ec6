// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Memory of maps that is this process's too.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicU32;

use libbpf_rs::{MapCore, MapType};

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

/// The words of an array that programs and this process change at the same time.
///
/// The array has the flag `BPF_F_MMAPABLE`. Changes of a word are atomic on both sides, or one of
/// them undoes the other's.
#[derive(Debug)]
pub struct Words {
    memory: Mapping,
}

impl Words {
    /// Maps all of an array that is loaded.
    pub fn new(map: &impl MapCore) -> io::Result<Self> {
        if map.map_type() != MapType::Array {
            let message = format!("no array, but of type {:?}", map.map_type());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        let info = map.info().map_err(io::Error::other)?.info;
        // The kernel pads elements.
        let size = (info.value_size as usize).next_multiple_of(8) * info.max_entries as usize;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        Ok(Words {
            memory: Mapping::new(map.as_fd(), size, protection)?,
        })
    }

    /// The word that begins at that byte, a multiple of 4. Elements begin at multiples of 8.
    pub fn get(&self, offset: usize) -> Option<&AtomicU32> {
        if !offset.is_multiple_of(4) || offset >= self.memory.len() {
            return None;
        }
        // SAFETY: the word lies inside the mapping, which begins with a page and has a multiple of 8
        // bytes, and lives as long as the reference. Who else accesses it may: it is atomic.
        Some(unsafe { AtomicU32::from_ptr(self.memory.start().as_ptr().byte_add(offset).cast()) })
    }
}
