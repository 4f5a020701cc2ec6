// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Guest memory that programs access, in the windows that user space has given the device.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};
use std::{env, ptr, thread};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_bpf::perms::Allow;
use kvm_bpf::uapi::{
    KVM_BPF_MEM_READ, KVM_BPF_MEM_WRITE, KVM_DEV_BPF_ATTR_GROUP_MEM, KVM_DEV_BPF_ATTR_GROUP_PERMS,
    KVM_DEV_BPF_MAX_MEMS, kvm_bpf_user_mem,
};
use kvm_bpf::{ImageDevice, Programs, Window};
use kvm_bpf_selftests::bpf::Census;
use kvm_bpf_selftests::device::Device;
use kvm_bpf_selftests::guest::{Args, Guest, Routine, Vcpu};
use kvm_bpf_selftests::harness::{Random, Victim, meanwhile, number_from_env, skip, wait_for};
use kvm_bpf_selftests::programs::{plug, test_image};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{_IOC_READ, _IOC_WRITE, ioctl_expr, ioctl_with_mut_ref};

use super::{ADDR, assert_errno, element};

#[cfg(target_arch = "aarch64")]
mod protected;

tests!(
    bad_arguments,
    get_returns_what_was_set,
    nothing_without_a_window,
    ends_of_a_window,
    rights_of_a_window,
    several_windows,
    across_slots_and_holes,
    read_only_slots,
    all_of_memory_as_the_model_says,
    words_are_whole,
    memory_that_is_not_there,
    pages_that_come_late,
    removal_waits_for_a_page_that_is_late,
    permissions_for_a_page_that_is_late,
    run_is_given_up_while_it_waits,
    killed_while_a_page_is_late,
    too_much_at_once,
    a_mebibyte_at_once,
    removed_while_programs_use_it,
    deleted_and_moved_slots,
    slots_that_come_and_go,
    dirty_pages_are_marked,
    dirty_rings_without_bitmaps,
    #[cfg(target_arch = "aarch64")]
    protected::protected_guest_shares_a_page,
    #[cfg(target_arch = "aarch64")]
    protected::protected_guest_shares_while_programs_access,
    random_bytes,
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

fn bad_arguments() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let set = |index, mem: &kvm_bpf_user_mem| {
        device.set_attr(KVM_DEV_BPF_ATTR_GROUP_MEM, index, (&raw const *mem) as u64)
    };
    let good = kvm_bpf_user_mem {
        addr: 0,
        size: 0x1000,
        flags: KVM_BPF_MEM_READ | KVM_BPF_MEM_WRITE,
        pad: 0,
    };
    let last = KVM_DEV_BPF_MAX_MEMS - 1;
    for (what, index, mem, wanted) in [
        ("index", last + 1, good, libc::ENXIO),
        ("index of 33 bits", 1 << 32, good, libc::ENXIO),
        ("pad", 0, kvm_bpf_user_mem { pad: 1, ..good }, libc::EINVAL),
        (
            "no flags",
            0,
            kvm_bpf_user_mem { flags: 0, ..good },
            libc::EINVAL,
        ),
        (
            "other flags",
            0,
            kvm_bpf_user_mem { flags: 5, ..good },
            libc::EINVAL,
        ),
        (
            "flags to remove",
            0,
            kvm_bpf_user_mem { size: 0, ..good },
            libc::EINVAL,
        ),
        (
            "wrap-around",
            0,
            kvm_bpf_user_mem {
                addr: u64::MAX - 0xfff,
                ..good
            },
            libc::ERANGE,
        ),
        (
            "removing a free one",
            0,
            kvm_bpf_user_mem::default(),
            libc::ENOENT,
        ),
    ] {
        assert_errno(what, set(index, &mem), wanted);
    }
    let answer = device.set_attr(KVM_DEV_BPF_ATTR_GROUP_MEM, 0, 8);
    assert_errno("bad pointer", answer, libc::EFAULT);
    for index in 0..=last {
        assert_got!(device.has_attr(KVM_DEV_BPF_ATTR_GROUP_MEM, index), Ok(()));
        assert_got!(set(index, &good), Ok(()));
    }
    let answer = device.has_attr(KVM_DEV_BPF_ATTR_GROUP_MEM, last + 1);
    assert_errno("asking past the last", answer, libc::ENXIO);
    // One may reach the end, and the address before it.
    let most = kvm_bpf_user_mem {
        addr: 1,
        size: u64::MAX - 1,
        ..good
    };
    assert_got!(set(0, &most), Ok(()));
}

fn get_returns_what_was_set() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let set = |mem: &kvm_bpf_user_mem| device.try_set_mem(31, mem);
    assert_errno("a free index", device.mem(31), libc::ENOENT);
    for flags in [KVM_BPF_MEM_READ, KVM_BPF_MEM_WRITE] {
        let mem = kvm_bpf_user_mem {
            addr: 0x1234_5678_9abc_def1,
            size: 0x23,
            flags,
            pad: 0,
        };
        assert_got!(set(&mem), Ok(()));
        assert_got!(device.mem(31), Ok(mem));
        // A bad one changes nothing.
        set(&kvm_bpf_user_mem { flags: 0, ..mem }).expect_err("no flags");
        assert_got!(device.mem(31), Ok(mem));
    }
    assert_got!(set(&kvm_bpf_user_mem::default()), Ok(()));
    assert_errno("a removed one", device.mem(31), libc::ENOENT);
    let answer = device.mem(KVM_DEV_BPF_MAX_MEMS);
    assert_errno("past the last", answer, libc::ENXIO);
}

fn nothing_without_a_window() {
    let mut setup = Setup::new("mem", 1);
    setup.pages.fill((0..).map(pattern));
    // What fails leaves zeroes.
    assert_got!(setup.read(START, 8), (libc::EACCES, vec![0; 8]));
    assert_got!(setup.write(START, &[1; 8]), libc::EACCES);
    assert_got!(setup.pages.bytes(0, 1), [pattern(0)]);
    assert_got!(setup.read(START, 0).0, libc::EACCES);
    setup.window(0, START, 8, true, true);
    setup.device.device().unset_window(0).expect("removing it");
    assert_got!(setup.read(START, 1), (libc::EACCES, vec![0]));
}

fn ends_of_a_window() {
    for object in ["mem", "mem_nofault"] {
        let mut setup = Setup::new(object, 2);
        setup.pages.fill((0..).map(pattern));
        // Over the end of a page, and with odd ends.
        let (first, size) = (0xff1, 0x1d);
        let start = START + first as u64;
        setup.window(3, start, size as u64, true, true);
        let ops = match object {
            "mem" => (&[READ, READ_NOFAULT][..], &[WRITE, WRITE_NOFAULT][..]),
            _ => (&[READ_NOFAULT][..], &[WRITE_NOFAULT][..]),
        };
        for (offset, len) in (0..=size).flat_map(|offset| (0..=size).map(move |len| (offset, len)))
        {
            let inside = offset + len <= size;
            let gpa = start + offset as u64;
            let wanted: Vec<u8> = (0..len)
                .map(|i| {
                    if inside {
                        pattern(first + offset + i)
                    } else {
                        0
                    }
                })
                .collect();
            let errno = if inside { 0 } else { libc::EACCES };
            // All of them by all means take long under emulation.
            let by = if len % 2 == 0 { By::Access } else { By::Run };
            for &op in ops.0 {
                let got = setup.ask(by, op, gpa, &vec![0x5a; len]);
                assert_got!(got, (errno, wanted.clone()), "{len} at {gpa:#x}");
            }
        }
        for (gpa, len) in [
            (start - 1, 1),
            (start - 1, size + 2),
            (start + size as u64, 1),
            (u64::MAX, 1),
            (u64::MAX, 2),
            (u64::MAX - 7, 8),
            (start | 1 << 63, 4),
        ] {
            let got = setup.ask_all(ops.0, gpa, &vec![0x5a; len]);
            assert_got!(got, (libc::EACCES, vec![0; len]), "{len} at {gpa:#x}");
            let got = setup.ask_all(ops.1, gpa, &vec![0x5a; len]).0;
            assert_got!(got, libc::EACCES, "{len} at {gpa:#x}");
        }
        let all: Vec<u8> = (0..2 * PAGE).map(pattern).collect();
        assert_got!(setup.pages.bytes(0, 2 * PAGE), all);
        assert_got!(setup.ask_all(ops.1, start, &vec![0xc3; size]).0, 0);
        assert_got!(setup.pages.bytes(first, size), vec![0xc3; size]);
        assert_got!(setup.pages.bytes(first - 1, 1), [pattern(first - 1)]);
        assert_got!(setup.pages.bytes(first + size, 1), [pattern(first + size)]);
    }
}

fn rights_of_a_window() {
    let mut setup = Setup::new("mem", 1);
    for (read, write) in [(true, false), (false, true), (true, true)] {
        let byte = 1 + u8::from(read) + 2 * u8::from(write);
        setup.pages.fill(std::iter::repeat(byte));
        setup.window(0, START, PAGE as u64, read, write);
        let errno = |allowed| if allowed { 0 } else { libc::EACCES };
        let value = if read { byte } else { 0 };
        assert_got!(setup.read(START + 4, 4), (errno(read), vec![value; 4]));
        assert_got!(setup.write(START + 4, &[0x99; 4]), errno(write));
        let value = if write { 0x99 } else { byte };
        assert_got!(setup.pages.bytes(4, 4), [value; 4]);
    }
}

/// An access lies inside one of them; they may overlap, and are the device's own.
fn several_windows() {
    let mut setup = Setup::new("mem", 4);
    let other = plug(setup.guest.vm(), ADDR + 0x1000, test_image("mem"));
    let page = PAGE as u64;
    setup.window(0, START, page, true, false);
    setup.window(31, START + page, page, true, false);
    setup.window(7, START + page, 2 * page, false, true);
    assert_got!(setup.read(START + page - 4, 4).0, 0);
    assert_got!(setup.read(START + page, 4).0, 0);
    assert_got!(
        setup.read(START + page - 4, 8).0,
        libc::EACCES,
        "over two windows"
    );
    assert_got!(setup.write(START + 2 * page - 4, &[0; 8]), 0);
    assert_got!(setup.read(START + 2 * page - 4, 8).0, libc::EACCES);
    assert_got!(setup.write(START + page - 1, &[0]), libc::EACCES);
    // One over all makes all one.
    setup.window(1, START, 4 * page, true, true);
    assert_got!(setup.read(START + page - 4, 8).0, 0);
    setup.device.device().unset_window(1).expect("removing it");
    assert_got!(setup.read(START + page - 4, 8).0, libc::EACCES);

    request(other.programs(), READ, START, &[0; 4]);
    assert!(other.run("work", 0).expect("a run"), "no such program");
    assert_got!(
        result(other.programs(), 4).0,
        -libc::EACCES,
        "another device"
    );
}

fn across_slots_and_holes() {
    let mut setup = Setup::new("mem", 1);
    let pages = Pages::new(3);
    pages.fill((0..).map(pattern));
    let start = START + 0x10_0000;
    // Side by side for the guest, and the other way round here.
    pages.slot(&setup.guest, 2, 0, start, PAGE, PAGE);
    pages.slot(&setup.guest, 3, 0, start + PAGE as u64, 0, PAGE);
    setup.window(0, start - 8, 4 * PAGE as u64, true, true);
    let edge = start + PAGE as u64;
    let wanted: Vec<u8> = [2 * PAGE - 3, 2 * PAGE - 2, 2 * PAGE - 1, 0, 1]
        .map(pattern)
        .into();
    assert_got!(setup.read(edge - 3, 5), (0, wanted));
    assert_got!(setup.write(edge - 1, &[0xaa, 0xbb]), 0);
    assert_got!(pages.bytes(2 * PAGE - 1, 1), [0xaa]);
    assert_got!(pages.bytes(0, 1), [0xbb]);
    // The window goes on, the memory does not.
    let end = edge + PAGE as u64;
    assert_got!(setup.read(end - 4, 4).0, 0);
    assert_got!(setup.read(end - 4, 8), (libc::EFAULT, vec![0; 8]));
    assert_got!(setup.read(start - 4, 4), (libc::EFAULT, vec![0; 4]));
    assert_got!(setup.write(end, &[0]), libc::EFAULT);
    drop(setup);
}

fn read_only_slots() {
    let mut setup = Setup::new("mem", 2);
    setup.pages.fill((0..).map(pattern));
    let start = START + 0x10_0000;
    let flags = KVM_MEM_READONLY;
    setup.pages.slot(&setup.guest, 2, flags, start, PAGE, PAGE);
    setup.window(0, start, PAGE as u64, true, true);
    assert_got!(setup.read(start, 1), (0, vec![pattern(PAGE)]));
    assert_got!(setup.write(start, &[0x11]), libc::EFAULT);
    assert_got!(setup.pages.bytes(PAGE, 1), [pattern(PAGE)]);
}

/// Random accesses, against a copy of the memory.
fn all_of_memory_as_the_model_says() {
    let seed = number_from_env("KVM_BPF_SEED", 1);
    let count = number_from_env("KVM_BPF_ACCESSES", 2000);
    let mut random = Random::new(seed);
    let mut setup = Setup::new("mem", 4);
    let mut model: Vec<u8> = (0..4 * PAGE).map(pattern).collect();
    setup.pages.fill(model.iter().copied());
    setup.window(0, START, 4 * PAGE as u64, true, true);
    for number in 0..count {
        let len = match random.below(4) {
            0 => 1 << random.below(4),
            1 => random.below(17),
            2 => random.below(600),
            _ => random.below(PAGE as u64 + 1),
        } as usize;
        let offset = match random.below(2) {
            0 => random.below((4 * PAGE - len) as u64) & !7,
            _ => random.below((4 * PAGE - len) as u64 + 1),
        } as usize;
        let by = if random.below(4) == 0 {
            By::Access
        } else {
            By::Run
        };
        let op = random.below(4) as u32;
        let data: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
        let (errno, got) = setup.ask(by, op, START + offset as u64, &data);
        let what = format!("access {number} of seed {seed}: {by:?} {op} {len} at {offset:#x}");
        assert_got!(errno, 0, "{what}");
        if op == WRITE || op == WRITE_NOFAULT {
            model[offset..][..len].copy_from_slice(&data);
        } else {
            assert_got!(got, model[offset..][..len], "{what}");
        }
    }
    assert_got!(setup.pages.bytes(0, 4 * PAGE), model);
}

/// A guest changes all bytes of a word at once, and a program sees one value or the other.
fn words_are_whole() {
    let reads = number_from_env("KVM_BPF_ACCESSES", 20_000);

    for (len, pair) in [
        (2, [0x00ff, 0x0100]),
        (4, [0x00ff_ffff, 0x0100_0000]),
        (8, [0x00ff_ffff_ffff_ffff_u64, 0x0100_0000_0000_0000]),
    ] {
        let setup = Setup::new("mem_word", 1);
        setup.window(0, START, PAGE as u64, true, false);
        let data: Vec<u8> = pair
            .iter()
            .flat_map(|word: &u64| word.to_le_bytes())
            .collect();
        let image = setup.device.programs();
        request(image, READ, START + 8, &data);
        let map = image.map("request").expect("the program's map");
        let mut value = element(image, "request");
        value[4..8].copy_from_slice(&(len as u32).to_le_bytes());
        map.update(&[0; 4], &value).expect("BPF_MAP_UPDATE_ELEM");
        let pages = &setup.pages;
        let store = |value: u64| {
            let word = pages.at(8, 8);
            // SAFETY: it is inside, and aligned; each is one store.
            unsafe {
                match len {
                    2 => word.cast::<u16>().write_volatile(value as u16),
                    4 => word.cast::<u32>().write_volatile(value as u32),
                    _ => word.cast::<u64>().write_volatile(value),
                }
            }
        };
        store(pair[0]);
        let torn = meanwhile(
            [|| {
                for _ in 0..100 {
                    store(pair[1]);
                    store(pair[0]);
                }
            }],
            || {
                assert!(
                    setup.device.run("work", reads).expect("a run"),
                    "no program"
                );
                result(image, 16)
            },
        );
        assert_got!(
            (torn.0, torn.1),
            (0, 0),
            "result, and torn words of {len} bytes"
        );
    }
}

fn memory_that_is_not_there() {
    let mut setup = Setup::new("mem", 2);
    setup.window(0, START, 2 * PAGE as u64, true, true);
    for by in [By::Access, By::Run] {
        setup.pages.forget();
        let got = setup.ask(by, READ_NOFAULT, START + 4, &[0x5a; 4]);
        assert_got!(got, (libc::EFAULT, vec![0; 4]));
        assert_got!(
            setup.ask(by, WRITE_NOFAULT, START + 4, &[7; 4]).0,
            libc::EFAULT
        );
        assert_got!(setup.ask(by, WRITE, START + 4, &[7; 4]).0, 0);
        assert_got!(
            setup.ask(by, READ_NOFAULT, START + 4, &[0; 4]),
            (0, vec![7; 4])
        );
        // The next page still is not, nor is a part of what crosses into it.
        let edge = START + PAGE as u64 - 2;
        let got = setup.ask(by, READ_NOFAULT, edge, &[0x5a; 4]);
        assert_got!(got, (libc::EFAULT, vec![0; 4]));
        assert_got!(setup.ask(by, READ, edge, &[0x5a; 4]), (0, vec![0; 4]));
    }
    // Nor will it ever be.
    // SAFETY: the mapping is ours.
    let result = unsafe { libc::mprotect(setup.pages.start.cast(), 2 * PAGE, libc::PROT_NONE) };
    assert_eq!(result, 0, "mprotect");
    assert_got!(setup.read(START, 8), (libc::EFAULT, vec![0; 8]));
    assert_got!(setup.write(START, &[1]), libc::EFAULT);
}

/// Has the pages of a range come when this says so.
struct Late(OwnedFd);

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRegister {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

impl Late {
    /// `_IOWR(UFFDIO, number, size)`.
    const fn ioctl(number: u32, size: usize) -> libc::c_ulong {
        ioctl_expr(_IOC_READ | _IOC_WRITE, 0xaa, number, size as u32)
    }

    fn new(pages: &Pages) -> Self {
        // SAFETY: no pointers.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
        assert!(fd >= 0, "userfaultfd: {}", io::Error::last_os_error());
        // SAFETY: the kernel just gave us this fd.
        let late = Late(unsafe { OwnedFd::from_raw_fd(fd as i32) });
        let mut api = UffdioApi {
            api: 0xaa,
            features: 0,
            ioctls: 0,
        };
        late.call(0x3f, &mut api);
        late.call(
            0,
            &mut UffdioRegister {
                start: pages.start as u64,
                len: pages.len as u64,
                // Pages that are missing.
                mode: 1,
                ioctls: 0,
            },
        );
        late
    }

    fn call<T>(&self, number: u32, arg: &mut T) {
        let request = Self::ioctl(number, size_of::<T>());
        // SAFETY: the kernel reads and writes no more than the structure.
        let result = unsafe { ioctl_with_mut_ref(&self.0, request, arg) };
        assert_eq!(
            result,
            0,
            "ioctl {number:#x}: {}",
            io::Error::last_os_error()
        );
    }

    /// Waits until somebody wants one.
    fn wait(&self) {
        /// `struct uffd_msg`; the event of a page that is missing.
        const SIZE: usize = 32;
        const PAGEFAULT: u8 = 0x12;

        let mut message = [0; SIZE];
        // SAFETY: the buffer is as large as said.
        let len = unsafe { libc::read(self.0.as_raw_fd(), message.as_mut_ptr().cast(), SIZE) };
        assert_got!((len, message[0]), (SIZE as isize, PAGEFAULT));
    }

    /// Has a page come, with that in all bytes.
    fn come(&self, pages: &Pages, page: usize, byte: u8) {
        let from = [byte; PAGE];
        self.call(
            3,
            &mut UffdioCopy {
                dst: pages.at(page * PAGE, PAGE) as u64,
                src: from.as_ptr() as u64,
                len: PAGE as u64,
                mode: 0,
                copy: 0,
            },
        );
    }
}

/// Who may sleep waits for them, and so does closing the device; who may not does not.
fn pages_that_come_late() {
    for by in [By::Access, By::Run] {
        let mut setup = Setup::new("mem", 2);
        setup.window(0, START, 2 * PAGE as u64, true, true);
        let late = Late::new(&setup.pages);
        for op in [READ_NOFAULT, WRITE_NOFAULT] {
            assert_got!(setup.ask(by, op, START + 4, &[0x5a; 4]).0, libc::EFAULT);
        }
        let Setup {
            vcpu,
            device,
            guest,
            pages,
        } = setup;
        request(device.programs(), READ, START + 4, &[0x5a; 4]);
        thread::scope(|scope| {
            let ask = scope.spawn(|| {
                let mut vcpu = vcpu;
                match by {
                    By::Access => assert_got!(vcpu.write(ADDR, 4, 0), []),
                    _ => assert!(device.run("work", 0).expect("a run"), "no program"),
                }
            });
            late.wait();
            thread::sleep(Duration::from_millis(20));
            assert!(!ask.is_finished(), "wanted it to wait for the page");
            late.come(&pages, 0, 0x3c);
            ask.join().expect("the access");
        });
        let (result, _, data) = result(device.programs(), 4);
        assert_got!((result, data), (0, vec![0x3c; 4]));

        // A write, on the device's thread; and the device closes meanwhile.
        let wake = EventFd::new(0).expect("eventfd");
        request(device.programs(), WRITE, START + PAGE as u64, &[0x11; 4]);
        let mut device = device;
        device
            .set_work_eventfd("work", Some(&wake))
            .expect("an eventfd");
        wake.write(1).expect("signalling an eventfd");
        late.wait();
        thread::scope(|scope| {
            let close = scope.spawn(|| drop(device));
            thread::sleep(Duration::from_millis(20));
            assert!(!close.is_finished(), "wanted it to wait for the page");
            late.come(&pages, 1, 0x3c);
            close.join().expect("closing");
        });
        assert_got!(pages.bytes(PAGE, 5), [0x11, 0x11, 0x11, 0x11, 0x3c]);
        drop((guest, late));
    }
}

/// When work is removed, its program does not run, whoever runs it.
fn removal_waits_for_a_page_that_is_late() {
    for by in [By::Run, By::Signal] {
        let setup = Setup::new("mem", 1);
        setup.window(0, START, PAGE as u64, true, true);
        let late = Late::new(&setup.pages);
        let Setup {
            mut device,
            guest: _guest,
            pages,
            ..
        } = setup;
        let wake = EventFd::new(0).expect("eventfd");
        let set = device.set_work_eventfd("work", Some(&wake));
        set.expect("the program's eventfd");
        request(device.programs(), READ, START, &[0; 4]);
        thread::scope(|scope| {
            let run = scope.spawn(|| match by {
                By::Signal => wake.write(1).is_ok(),
                _ => device.run("work", 0).is_ok(),
            });
            late.wait();
            let remove = scope.spawn(|| device.device().unset_work(0));
            thread::sleep(Duration::from_millis(50));
            let waits = !remove.is_finished();
            late.come(&pages, 0, 0x3c);
            assert!(waits, "{by:?}: wanted it to wait");
            let removed = remove.join().expect("no panic");
            removed.expect("removing the work");
            let (errno, served, data) = result(device.programs(), 4);
            assert_got!((errno, served, data), (0, 1, vec![0x3c; 4]), "{by:?}");
            assert!(run.join().expect("no panic"), "{by:?}: wanted a run");
        });
    }
}

/// Nobody waits for whoever gets the permissions.
fn permissions_for_a_page_that_is_late() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let pages = Pages::new(1);
    let late = Late::new(&pages);
    let eventfd = EventFd::new(0).expect("eventfd");
    let addr = pages.at(0, PAGE) as u64;
    thread::scope(|scope| {
        // SAFETY: the kernel writes the permissions there, and nothing else does meanwhile.
        let get = || unsafe { device.get_attr(KVM_DEV_BPF_ATTR_GROUP_PERMS, 0, addr) };
        let get = scope.spawn(get);
        late.wait();
        let set = scope.spawn(|| device.set_irq(0, eventfd.as_raw_fd()));
        let patience = Instant::now() + Duration::from_secs(20);
        while !set.is_finished() && Instant::now() < patience {
            thread::sleep(Duration::from_millis(1));
        }
        let is_set = set.is_finished();
        late.come(&pages, 0, 0);
        assert!(is_set, "wanted an interrupt to be set, but it waits");
        assert_got!(get.join().expect("no panic"), Ok(()));
    });
    assert!(pages.bytes(0, 8) != [0; 8], "wanted permissions, got none");
}

/// A run that waits for another one does not take place.
fn run_is_given_up_while_it_waits() {
    let setup = Setup::new("mem", 1);
    setup.window(0, START, PAGE as u64, true, true);
    let late = Late::new(&setup.pages);
    let (image, pages) = (&setup.device, &setup.pages);
    request(image.programs(), READ, START, &[0; 4]);
    thread::scope(|scope| {
        let first = scope.spawn(|| image.run("work", 0).is_ok());
        late.wait();
        let second = scope.spawn(|| image.run("work", 0).is_ok());
        thread::sleep(Duration::from_millis(50));
        let waits = !second.is_finished();
        let device = image.device();
        let mut left = device.permissions().expect("the permissions");
        left.allow = left.allow.without(Allow::RUN);
        let given_up = device.restrict(left);
        late.come(pages, 0, 0x3c);
        assert!(waits, "wanted the second run to wait");
        given_up.expect("giving up a permission");
        let ran = [first, second].map(|run| run.join().expect("no panic"));
        assert_got!(ran, [true, false]);
    });
    let (errno, served, data) = result(image.programs(), 4);
    assert_got!((errno, served, data), (0, 1, vec![0x3c; 4]));
}

/// The page never comes, and all threads are in the kernel for it.
fn killed_while_a_page_is_late() {
    const VARIABLE: &str = "KVM_BPF_MEM_VICTIM";

    if env::var_os(VARIABLE).is_some() {
        let setup = Setup::new("mem", 1);
        setup.window(0, START, PAGE as u64, true, true);
        let late = Late::new(&setup.pages);
        let wake = EventFd::new(0).expect("eventfd");
        let Setup {
            mut vcpu,
            mut device,
            guest: _guest,
            pages: _pages,
        } = setup;
        device
            .set_work_eventfd("work", Some(&wake))
            .expect("an eventfd");
        request(device.programs(), READ, START, &[0; 4]);
        wake.write(1).expect("signalling an eventfd");
        late.wait();
        thread::scope(|scope| {
            scope.spawn(|| vcpu.write(ADDR, 4, 0));
            scope.spawn(|| device.run("work", 0));
            loop {
                // Whoever else wants the page.
                late.wait();
            }
        });
    }
    let census = Census::now();
    let victim = Victim::new("mem::killed_while_a_page_is_late", VARIABLE, "1");
    let task = format!("/proc/{}/task", victim.id());
    wait_for("programs and threads of the process", true, || {
        let tasks = fs::read_dir(&task).map_or(0, Iterator::count);
        census.newer().0 == 2 && tasks >= 5
    });
    thread::sleep(Duration::from_millis(50));
    victim.kill();
    census.wait_for_newer(0, 0);
}

fn too_much_at_once() {
    let mut setup = Setup::new("mem", 4);
    setup.window(0, START, 4 * PAGE as u64, true, true);
    let data = vec![0x5a; DATA_SIZE];
    assert_got!(setup.ask(By::Run, WRITE, START + 1, &data).0, 0);
    assert_got!(
        setup
            .ask(By::Run, WRITE_NOFAULT, START + 1, &data[..PAGE])
            .0,
        0
    );
    let (errno, got) = setup.ask(By::Run, READ_NOFAULT, START, &data[..PAGE + 1]);
    assert_got!((errno, got), (libc::E2BIG, vec![0; PAGE + 1]));
    let got = setup.ask(By::Run, WRITE_NOFAULT, START, &data[..PAGE + 1]);
    assert_got!(got.0, libc::E2BIG);
}

/// What a call copies at most if it may sleep.
fn a_mebibyte_at_once() {
    const MOST: usize = 1 << 20;

    let mut setup = Setup::new("mem_large", MOST / PAGE + 1);
    setup.window(0, START, (MOST + PAGE) as u64, true, true);
    setup.pages.fill((0..).map(pattern));
    for by in [By::Access, By::Run] {
        let before = setup.pages.bytes(1, MOST);
        let got = setup.ask(by, READ, START + 1, &vec![0x5a; MOST]);
        assert!(got == (0, before), "{by:?}: reading a mebibyte");
        let got = setup.ask(by, READ, START, &vec![0x5a; MOST + 1]);
        let wanted = (libc::E2BIG, vec![0; MOST + 1]);
        assert!(got == wanted, "{by:?}: reading a byte more, {}", got.0);

        let data: Vec<_> = (0..MOST).map(|at| !pattern(at)).collect();
        assert_got!(setup.ask(by, WRITE, START + 1, &data).0, 0);
        assert!(
            setup.pages.bytes(1, MOST) == data,
            "{by:?}: a mebibyte written"
        );
        let more = vec![0x5a; MOST + 1];
        assert_got!(setup.ask(by, WRITE, START + 1, &more).0, libc::E2BIG);
        assert!(
            setup.pages.bytes(1, MOST) == data,
            "{by:?}: a byte more has been written"
        );
        setup.pages.fill((0..).map(pattern));
    }
}

/// When the call returns, programs do not use the window any more.
fn removed_while_programs_use_it() {
    let Setup {
        guest,
        vcpu,
        device,
        pages,
    } = Setup::new("mem", 1);
    let window = Window {
        addr: START,
        size: PAGE as u64,
        read: true,
        write: true,
    };
    request(device.programs(), WRITE, START, &[0x77; 8]);
    device.device().set_window(0, window).expect("a window");
    let mut vcpus = vec![vcpu, guest.vcpu(1)];
    let writes = Args {
        addr: ADDR,
        count: 10,
        ..Default::default()
    };
    meanwhile(
        vcpus.drain(..).map(|mut vcpu| {
            move || {
                let (_, exits) = vcpu.call(Routine::WriteLoop, writes);
                assert_got!(exits, []);
            }
        }),
        || {
            for round in 0..50 {
                device.device().set_window(0, window).expect("a window");
                wait_for("a write", 0x77, || pages.bytes(0, 1)[0]);
                device.device().unset_window(0).expect("removing it");
                pages.fill(std::iter::repeat_n(0, 8));
                thread::yield_now();
                assert_got!(pages.bytes(0, 8), [0; 8], "after removal {round}");
            }
        },
    );
}

/// Nobody uses the memory of a slot that is not there any more.
fn deleted_and_moved_slots() {
    const MOVED: u64 = START + 0x10_0000;

    let mut setup = Setup::new("mem", 2);
    setup.window(0, START, MOVED - START + PAGE as u64, true, true);
    setup.pages.fill((0..).map(pattern));
    let data = setup.pages.bytes(8, 8);
    let slot = |setup: &Setup, addr, len| setup.pages.slot(&setup.guest, 1, 0, addr, 0, len);
    let is_at = |setup: &mut Setup, addr| {
        assert_got!(setup.read(addr + 8, 8), (0, data.clone()));
        assert_got!(setup.write(addr, &[0x77; 8]), 0);
        assert_got!(setup.pages.bytes(0, 8), [0x77; 8]);
        setup.pages.set(0, 8, 0);
    };
    let is_not_at = |setup: &mut Setup, addr| {
        assert_got!(setup.read(addr + 8, 8), (libc::EFAULT, vec![0; 8]));
        assert_got!(setup.write(addr, &[0x77; 8]), libc::EFAULT);
        assert_got!(setup.pages.bytes(0, 8), [0; 8]);
    };
    is_at(&mut setup, START);
    slot(&setup, START, 0);
    is_not_at(&mut setup, START);
    slot(&setup, START, 2 * PAGE);
    is_at(&mut setup, START);
    is_not_at(&mut setup, MOVED);
    slot(&setup, MOVED, 2 * PAGE);
    is_at(&mut setup, MOVED);
    is_not_at(&mut setup, START);
}

/// An access finds one state of the slots or the other.
fn slots_that_come_and_go() {
    let setup = Setup::new("mem", 2);
    setup.window(0, START, 2 * PAGE as u64, true, true);
    let Setup {
        guest,
        vcpu: _vcpu,
        device,
        pages,
    } = &setup;
    pages.set(0, 2 * PAGE, 0x77);
    request(device.programs(), READ, START, &[0; 8]);
    let mut seen = [0_u64; 2];
    meanwhile(
        [|| {
            pages.slot(guest, 1, 0, START, 0, 0);
            pages.slot(guest, 1, 0, START, 0, 2 * PAGE);
            // Moved, and back.
            pages.slot(guest, 1, 0, START + 0x10_0000, 0, 2 * PAGE);
            pages.slot(guest, 1, 0, START, 0, 2 * PAGE);
        }],
        || {
            while seen.iter().sum::<u64>() < 300 || seen.contains(&0) {
                let count = seen.iter().sum::<u64>();
                assert!(count < 100_000, "wanted both results, got {seen:?}");
                assert!(device.run("work", 0).expect("a run"), "no such program");
                let (errno, _, data) = result(device.programs(), 8);
                let (which, wanted) = match -errno {
                    0 => (0, [0x77; 8]),
                    libc::EFAULT => (1, [0; 8]),
                    errno => panic!("wanted 0 or EFAULT, got {errno}"),
                };
                assert_got!(data, wanted);
                seen[which] += 1;
            }
        },
    );
}

/// A migration takes the dirty pages while devices write: none is missed.
fn dirty_pages_are_marked() {
    const PAGES: usize = 70;

    for by in [By::Access, By::Run, By::Signal] {
        for op in [WRITE, WRITE_NOFAULT] {
            let mut setup = Setup::new("mem", PAGES);
            setup.pages.fill(std::iter::repeat(1));
            let len = PAGES * PAGE;
            setup.window(0, START, len as u64, true, true);
            let flags = KVM_MEM_LOG_DIRTY_PAGES;
            setup.pages.slot(&setup.guest, 1, flags, START, 0, len);
            let dirty = |setup: &Setup| -> Vec<usize> {
                let words = setup.guest.vm().get_dirty_log(1, len).expect("the log");
                (0..PAGES)
                    .filter(|page| words[page / 64] >> (page % 64) & 1 != 0)
                    .collect()
            };
            assert_got!(dirty(&setup).len(), 0);
            for (offset, size, wanted) in [
                (0, 1, vec![0]),
                (3 * PAGE + 7, 8, vec![3]),
                (5 * PAGE - 1, 2, vec![4, 5]),
                (64 * PAGE, PAGE, vec![64]),
                (66 * PAGE + 1, PAGE, vec![66, 67]),
            ] {
                let got = setup.ask(by, op, START + offset as u64, &vec![9; size]);
                assert_got!(got.0, 0);
                assert_got!(dirty(&setup), wanted, "{by:?} {op} {size} at {offset:#x}");
            }
            // What is read, refused or not written is not.
            assert_got!(setup.ask(by, READ, START, &[0; 8]).0, 0);
            assert_got!(
                setup.ask(by, op, START + len as u64 - 4, &[0; 8]).0,
                libc::EACCES
            );
            assert_got!(dirty(&setup).len(), 0);
        }
    }

    // Page by page, as they are harvested: the copies agree with the memory in the end.
    let setup = Setup::new("mem", PAGES);
    let len = PAGES * PAGE;
    setup.window(0, START, len as u64, true, true);
    let flags = KVM_MEM_LOG_DIRTY_PAGES;
    setup.pages.slot(&setup.guest, 1, flags, START, 0, len);
    let copies = std::cell::RefCell::new(vec![vec![0; PAGE]; PAGES]);
    let harvest = || {
        let words = setup.guest.vm().get_dirty_log(1, len).expect("the log");
        for (page, copy) in copies.borrow_mut().iter_mut().enumerate() {
            if words[page / 64] >> (page % 64) & 1 != 0 {
                *copy = setup.pages.bytes(page * PAGE, PAGE);
            }
        }
    };
    let device = &setup.device;
    let mut random = Random::new(7);
    meanwhile(
        [move || {
            let offset = random.below((len - 16) as u64);
            let data: Vec<u8> = (0..16).map(|_| random.next() as u8).collect();
            request(device.programs(), WRITE, START + offset, &data);
            assert!(device.run("work", 0).expect("a run"), "no such program");
        }],
        || (0..30).for_each(|_| harvest()),
    );
    harvest();
    for (page, copy) in copies.borrow().iter().enumerate() {
        assert_got!(setup.pages.bytes(page * PAGE, PAGE), *copy, "page {page}");
    }
}

/// The rings are of vCPUs, and a device's writes are theirs or nobody's: so there are none.
fn dirty_rings_without_bitmaps() {
    let guest = Guest::new();
    if !guest.try_dirty_rings(64 * 1024) {
        skip("this KVM has no dirty rings");
    }
    let pages = Pages::new(1);
    pages.slot(&guest, 1, KVM_MEM_LOG_DIRTY_PAGES, START, 0, PAGE);
    let device = plug(guest.vm(), ADDR, test_image("mem"));
    let mut setup = Setup {
        vcpu: guest.vcpu(0),
        device,
        guest,
        pages,
    };
    setup.window(0, START, PAGE as u64, true, true);
    assert_got!(setup.read(START, 8), (0, vec![0; 8]));
    assert_got!(setup.write(START, &[1; 8]), libc::EOPNOTSUPP);
    assert_got!(setup.pages.bytes(0, 8), [0; 8]);
}

fn random_bytes() {
    let mut setup = Setup::new("mem", 1);
    let mut ask = |len| setup.ask_all_differ(len);
    let (first, second) = ask(PAGE);
    assert_ne!(first, second, "two times the same");
    let ones: u32 = first.iter().map(|byte| byte.count_ones()).sum();
    let half = (4 * PAGE) as u32;
    // A hundred times what chance does.
    assert!(ones.abs_diff(half) < 9_000, "{ones} ones of {}", 2 * half);
    let (errno, got) = setup.ask(By::Run, RANDOM, 0, &vec![0x5a; PAGE + 1]);
    assert_got!((errno, got), (libc::E2BIG, vec![0x5a; PAGE + 1]));
}

impl Setup {
    /// Random bytes by each means.
    fn ask_all_differ(&mut self, len: usize) -> (Vec<u8>, Vec<u8>) {
        let mut ask = |by| {
            let (errno, data) = self.ask(by, RANDOM, 0, &vec![0; len]);
            assert_got!(errno, 0);
            data
        };
        (ask(By::Access), ask(By::Run))
    }
}
