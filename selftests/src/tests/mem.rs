// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Guest memory that programs access, in the windows that user space has given the device.

use std::ptr;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_bpf::{ImageDevice, Programs, Window};
use kvm_bpf_selftests::guest::{Guest, Vcpu};
use kvm_bpf_selftests::harness::wait_for;
use kvm_bpf_selftests::programs::{plug, test_image};
use vmm_sys_util::eventfd::EventFd;

use super::{ADDR, element};

mod copies;
mod late;
#[cfg(target_arch = "aarch64")]
mod protected;
mod slots;
mod windows;

tests!(
    windows::bad_arguments,
    windows::get_returns_what_was_set,
    windows::nothing_without_a_window,
    windows::ends_of_a_window,
    windows::rights_of_a_window,
    windows::several_windows,
    slots::across_slots_and_holes,
    slots::read_only_slots,
    copies::all_of_memory_as_the_model_says,
    copies::words_are_whole,
    late::memory_that_is_not_there,
    late::pages_that_come_late,
    late::removal_waits_for_a_page_that_is_late,
    late::permissions_for_a_page_that_is_late,
    late::run_is_given_up_while_it_waits,
    late::killed_while_a_page_is_late,
    copies::too_much_at_once,
    copies::a_mebibyte_at_once,
    windows::removed_while_programs_use_it,
    slots::deleted_and_moved_slots,
    slots::slots_that_come_and_go,
    slots::dirty_pages_are_marked,
    slots::dirty_rings_without_bitmaps,
    #[cfg(target_arch = "aarch64")]
    protected::protected_guest_shares_a_page,
    #[cfg(target_arch = "aarch64")]
    protected::protected_guest_shares_while_programs_access,
    copies::random_bytes,
);

/// Beyond the guest's own memory; a page has 4 KiB where this runs.
pub(super) const START: u64 = 0x10_0000;
pub(super) const PAGE: usize = 0x1000;

const READ: u32 = 0;
const WRITE: u32 = 1;
const READ_NOFAULT: u32 = 2;
const WRITE_NOFAULT: u32 = 3;
const RANDOM: u32 = 4;

/// What a request's `data` has room for.
const DATA_SIZE: usize = 0x2000;
/// `offsetof(struct request, data)`.
const DATA: usize = 32;

/// Memory of this process for a slot of a VM; the VM must go first.
pub(super) struct Pages {
    start: *mut u8,
    len: usize,
}

// SAFETY: it is accessed through pointers only, as the guest does.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Pages {
    pub(super) fn new(count: usize) -> Self {
        let len = count * PAGE;
        // SAFETY: a new mapping touches no other memory.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(start, libc::MAP_FAILED, "mmap of {count} pages");
        Pages {
            start: start.cast(),
            len,
        }
    }

    pub(super) fn at(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(offset + len <= self.len, "{offset:#x} is outside");
        // SAFETY: checked just above.
        unsafe { self.start.add(offset) }
    }

    pub(super) fn fill(&self, bytes: impl Iterator<Item = u8>) {
        for (offset, byte) in (0..self.len).zip(bytes) {
            // SAFETY: it is inside, and nothing else looks at it.
            unsafe { self.at(offset, 1).write_volatile(byte) };
        }
    }

    pub(super) fn bytes(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        // SAFETY: it is inside, and nobody has a reference to it.
        unsafe { ptr::copy_nonoverlapping(self.at(offset, len), bytes.as_mut_ptr(), len) };
        bytes
    }

    pub(super) fn set(&self, offset: usize, len: usize, byte: u8) {
        // SAFETY: as above.
        unsafe { ptr::write_bytes(self.at(offset, len), byte, len) };
    }

    /// Gives pages back, as if they had never been touched.
    fn forget(&self) {
        // SAFETY: the mapping is ours, and anonymous.
        let result = unsafe { libc::madvise(self.start.cast(), self.len, libc::MADV_DONTNEED) };
        assert_eq!(result, 0, "madvise");
    }

    /// Makes some of it a slot, of size 0 to delete it.
    pub(super) fn slot(
        &self,
        guest: &Guest,
        slot: u32,
        flags: u32,
        addr: u64,
        offset: usize,
        len: usize,
    ) {
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: addr,
            memory_size: len as u64,
            userspace_addr: self.at(offset, len) as u64,
        };
        // SAFETY: the mapping outlives the VM.
        let set = unsafe { guest.vm().set_user_memory_region(region) };
        set.unwrap_or_else(|error| panic!("slot {slot} of {len:#x} at {addr:#x}: {error}"));
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}

/// Who runs the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    /// A guest's write.
    Access,
    /// The test, by its name.
    Run,
    /// The device's thread, which an eventfd wakes.
    Signal,
}

/// A guest with a device whose programs do what they are asked to.
struct Setup {
    vcpu: Vcpu,
    device: ImageDevice,
    guest: Guest,
    pages: Pages,
}

impl Setup {
    /// With so many pages at [`START`], in one slot, and no window.
    fn new(object: &str, pages: usize) -> Self {
        Self::of(Guest::new(), object, pages)
    }

    fn of(guest: Guest, object: &str, pages: usize) -> Self {
        let pages = Pages::new(pages);
        pages.slot(&guest, 1, 0, START, 0, pages.len);
        let device = plug(guest.vm(), ADDR, test_image(object));
        Setup {
            vcpu: guest.vcpu(0),
            device,
            guest,
            pages,
        }
    }

    fn window(&self, index: u32, addr: u64, size: u64, read: bool, write: bool) {
        let window = Window {
            addr,
            size,
            read,
            write,
        };
        let set = self.device.device().set_window(index, window);
        set.unwrap_or_else(|error| panic!("wanted a window, got {error:?}"));
    }

    /// Asks for an access; returns the errno and the data afterwards.
    #[track_caller]
    fn ask(&mut self, by: By, op: u32, gpa: u64, data: &[u8]) -> (i32, Vec<u8>) {
        let done = request(self.device.programs(), op, gpa, data);
        match by {
            By::Access => assert_got!(self.vcpu.write(ADDR, 4, 0), []),
            By::Run => assert!(
                self.device.run("work", 0).expect("a run"),
                "no such program"
            ),
            By::Signal => {
                let wake = EventFd::new(0).expect("eventfd");
                let set = self.device.set_work_eventfd("work", Some(&wake));
                set.expect("the program's eventfd");
                wake.write(1).expect("signalling it");
                let served = || result(self.device.programs(), data.len()).1;
                wait_for("a request that is served", done + 1, served);
                let unset = self.device.set_work_eventfd("work", None);
                unset.expect("no eventfd");
            }
        }
        let (result, now, data) = result(self.device.programs(), data.len());
        assert_got!(now, done + 1, "requests that were served");
        (-result, data)
    }

    /// The same by all means, which must agree.
    #[track_caller]
    fn ask_all(&mut self, ops: &[u32], gpa: u64, data: &[u8]) -> (i32, Vec<u8>) {
        let mut results = Vec::new();
        for by in [By::Access, By::Run] {
            for &op in ops {
                results.push(self.ask(by, op, gpa, data));
            }
        }
        let first = results.pop().expect("a means");
        for result in results {
            assert_got!(result, first, "{ops:?} at {gpa:#x}");
        }
        first
    }

    #[track_caller]
    fn read(&mut self, gpa: u64, len: usize) -> (i32, Vec<u8>) {
        self.ask_all(&[READ, READ_NOFAULT], gpa, &vec![0x5a; len])
    }

    #[track_caller]
    fn write(&mut self, gpa: u64, data: &[u8]) -> i32 {
        self.ask_all(&[WRITE, WRITE_NOFAULT], gpa, data).0
    }
}

/// Puts a request into the map; returns how many were served.
fn request(image: &Programs, op: u32, gpa: u64, data: &[u8]) -> u64 {
    let mut value = element(image, "request");
    value[..4].copy_from_slice(&op.to_le_bytes());
    value[4..8].copy_from_slice(&(data.len() as u32).to_le_bytes());
    value[8..16].copy_from_slice(&gpa.to_le_bytes());
    value[16..24].copy_from_slice(&i64::MIN.to_le_bytes());
    value[DATA..].fill(0);
    value[DATA..][..data.len()].copy_from_slice(data);
    let map = image.map("request").expect("the program's map");
    map.update(&[0; 4], &value).expect("BPF_MAP_UPDATE_ELEM");
    u64::from_le_bytes(value[24..32].try_into().expect("8 bytes"))
}

/// The program's result, how many requests were served, and the data.
fn result(image: &Programs, len: usize) -> (i32, u64, Vec<u8>) {
    let value = element(image, "request");
    let word = |at: usize| i64::from_le_bytes(value[at..at + 8].try_into().expect("8 bytes"));
    assert!(
        value[DATA + len..].iter().all(|&byte| byte == 0),
        "bytes behind the data"
    );
    (
        word(16) as i32,
        word(24) as u64,
        value[DATA..][..len].to_vec(),
    )
}

/// All bytes of a page and the next one differ from their neighbours.
fn pattern(offset: usize) -> u8 {
    (offset ^ offset >> 8) as u8 ^ 0x80
}
