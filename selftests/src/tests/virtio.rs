// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Virtio devices made of programs: the guest here writes the registers, and the test has the rings.

use std::sync::atomic::{Ordering::SeqCst, fence};
use std::sync::{Mutex, mpsc};
use std::time::{Duration, Instant};

use kvm_bpf::{Device, ImageDevice, OnLoss, OpenImage, Place, Window};
use kvm_bpf_selftests::guest::{Args, Guest, Routine, Vcpu};
use kvm_bpf_selftests::harness::{Random, meanwhile, number_from_env, unpaused, wait_for};
use kvm_bpf_selftests::programs::{loaded, sample, sample_path, test_image};
use vmm_sys_util::eventfd::EventFd;

use super::mem::{PAGE, Pages, START};
use super::{ADDR, element, taken};

mod disk;
mod model;
mod queue;
mod queues;
mod reset;
mod rings;

tests!(
    notes_say_what_they_need,
    registers_of_a_device,
    features_are_negotiated,
    random_buffers_are_filled,
    interrupts_are_acknowledged_or_unwanted,
    notified_before_the_driver_is_there,
    disk::a_disk_keeps_its_data,
    disk::a_disk_as_the_model_says,
    disk::a_disk_refuses,
    disk::two_guests_read_one_disk,
    reset::reset_forgets_all,
    reset::reset_in_the_middle,
    rings::bad_rings_need_a_reset,
    #[cfg(target_arch = "aarch64")]
    what_a_protected_guest_shares_is_enough,
    rings::random_rings_as_the_model_says,
    queue::two_vcpus_lose_no_request,
    queue::the_rest_of_a_budget_is_done_later,
    queue::a_queue_in_use_moves,
    queue::programs_change_under_a_queue,
    queues::two_queues_are_served,
    queues::two_vcpus_use_a_queue_each,
    queues::two_queues_move,
);

const MAGIC: u64 = 0x000;
const VERSION: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const VENDOR_ID: u64 = 0x00c;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SEL: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SEL: u64 = 0x024;
const QUEUE_SEL: u64 = 0x030;
const QUEUE_NUM_MAX: u64 = 0x034;
const QUEUE_NUM: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
const QUEUE_NOTIFY: u64 = 0x050;
const INTERRUPT_STATUS: u64 = 0x060;
const INTERRUPT_ACK: u64 = 0x064;
const STATUS: u64 = 0x070;
/// Low halves; the high ones follow.
const QUEUE_ADDRS: [(u64, usize); 3] = [(0x080, DESC), (0x090, AVAIL), (0x0a0, USED)];
const CONFIG: u64 = 0x100;

const ACKNOWLEDGE_AND_DRIVER: u32 = 3;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;

const VERSION_1: u64 = 1 << 32;
const INDIRECT_DESC: u64 = 1 << 28;

/// Interrupt status: of the rings, of the configuration.
const RING: u32 = 1;
const CHANGED: u32 = 2;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// The guest's memory, as offsets: the first and the last page are outside of the window.
const PAGES: usize = 80;
const DESC: usize = PAGE;
const AVAIL: usize = PAGE + 0x800;
const USED: usize = 2 * PAGE;
const TABLE: usize = 3 * PAGE;
const DATA: usize = 4 * PAGE;
const END: usize = (PAGES - 1) * PAGE;

/// What fills memory that no device writes to.
const CANARY: u8 = 0xc5;

/// The guest-physical address of an offset.
fn gpa(offset: usize) -> u64 {
    START + offset as u64
}

fn store(pages: &Pages, offset: usize, bytes: &[u8]) {
    for (i, &byte) in bytes.iter().enumerate() {
        // SAFETY: `at` checks that it is inside.
        unsafe { pages.at(offset + i, 1).write_volatile(byte) };
    }
}

fn load16(pages: &Pages, offset: usize) -> u16 {
    // SAFETY: `at` checks that it is inside; all are aligned.
    let value = unsafe { pages.at(offset, 2).cast::<u16>().read_volatile() };
    fence(SeqCst);
    value
}

fn store16(pages: &Pages, offset: usize, value: u16) {
    fence(SeqCst);
    // SAFETY: as above.
    unsafe { pages.at(offset, 2).cast::<u16>().write_volatile(value) };
    fence(SeqCst);
}

/// A buffer: guest-physical address, length, and whether the device writes it.
type Buffer = (u64, u32, bool);

fn descriptor(addr: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}

/// The driver's side of a queue.
#[derive(Clone, Debug)]
struct Queue {
    /// How far behind the usual place its parts are.
    base: usize,
    num: u16,
    /// What is in the ring's index next.
    next: u16,
    /// How much of the other ring was seen.
    seen: u16,
}

impl Queue {
    fn set(&self, pages: &Pages, at: u16, descriptor: [u8; 16]) {
        store(pages, self.base + DESC + 16 * usize::from(at), &descriptor);
    }

    /// Writes a chain of descriptors, from `at` on.
    fn chain(&self, pages: &Pages, at: u16, buffers: &[Buffer]) {
        write_chain(pages, self.base + DESC, at, buffers);
    }

    /// The same in a table that descriptor `at` points to.
    fn indirect(&self, pages: &Pages, at: u16, table: usize, buffers: &[Buffer]) {
        write_chain(pages, table, 0, buffers);
        let len = 16 * buffers.len() as u32;
        self.set(pages, at, descriptor(gpa(table), len, INDIRECT, 0));
    }

    /// Makes a chain available.
    fn offer(&mut self, pages: &Pages, head: u16) {
        let slot = usize::from(self.next % self.num);
        store16(pages, self.base + AVAIL + 4 + 2 * slot, head);
        self.next = self.next.wrapping_add(1);
        store16(pages, self.base + AVAIL + 2, self.next);
    }

    /// The device's index.
    fn used_index(&self, pages: &Pages) -> u16 {
        load16(pages, self.base + USED + 2)
    }

    /// What the device is done with since the last call: heads and lengths.
    fn used(&mut self, pages: &Pages) -> Vec<(u32, u32)> {
        let mut used = Vec::new();
        let now = self.used_index(pages);
        while self.seen != now {
            let at = self.base + USED + 4 + 8 * usize::from(self.seen % self.num);
            let bytes = pages.bytes(at, 8);
            let word = |i: usize| u32::from_le_bytes(bytes[i..i + 4].try_into().expect("4 bytes"));
            used.push((word(0), word(4)));
            self.seen = self.seen.wrapping_add(1);
        }
        used
    }
}

fn write_chain(pages: &Pages, table: usize, at: u16, buffers: &[Buffer]) {
    let last = buffers.len() - 1;
    for (i, &(addr, len, writable)) in buffers.iter().enumerate() {
        let index = at + i as u16;
        let next = if i < last { NEXT } else { 0 };
        let flags = next | if writable { WRITE } else { 0 };
        let bytes = descriptor(addr, len, flags, index + 1);
        store(pages, table + 16 * usize::from(index), &bytes);
    }
}

/// Registers of a device, written by a vCPU.
struct Registers(Vcpu);

impl Registers {
    #[track_caller]
    fn get(&mut self, offset: u64) -> u32 {
        let read = self.0.read(ADDR + offset, 4);
        assert_got!(read.exits, [], "reading {offset:#x}");
        read.value as u32
    }

    #[track_caller]
    fn set(&mut self, offset: u64, value: u32) {
        let exits = self.0.write(ADDR + offset, 4, value.into());
        assert_got!(exits, [], "writing {offset:#x}");
    }

    #[track_caller]
    fn device_features(&mut self) -> u64 {
        let mut features = 0;
        for half in 0..2 {
            self.set(DEVICE_FEATURES_SEL, half);
            features |= u64::from(self.get(DEVICE_FEATURES)) << (32 * half);
        }
        features
    }

    /// Resets, which may take until a request has ended that another vCPU serves.
    #[track_caller]
    fn reset(&mut self) {
        self.set(STATUS, 0);
        wait_for("status after a reset", 0, || self.get(STATUS));
    }

    /// Resets, and negotiates; returns the status.
    #[track_caller]
    fn negotiate(&mut self, features: u64) -> u32 {
        self.reset();
        self.accept(features)
    }

    /// Negotiates with a device that is reset.
    #[track_caller]
    fn accept(&mut self, features: u64) -> u32 {
        self.set(STATUS, ACKNOWLEDGE_AND_DRIVER);
        for half in 0..2 {
            self.set(DRIVER_FEATURES_SEL, half);
            self.set(DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        self.set(STATUS, ACKNOWLEDGE_AND_DRIVER | FEATURES_OK);
        self.get(STATUS)
    }

    /// The whole way, to a queue of so many entries.
    #[track_caller]
    fn start(&mut self, pages: &Pages, num: u16, features: u64) -> Queue {
        self.reset();
        let queue = self.prepare(pages, 0, num, features);
        self.go();
        queue
    }

    /// All of it but the first step and the last.
    #[track_caller]
    fn prepare(&mut self, pages: &Pages, base: usize, num: u16, features: u64) -> Queue {
        let status = ACKNOWLEDGE_AND_DRIVER | FEATURES_OK;
        assert_got!(self.accept(features), status, "features {features:#x}");
        self.add_queue(pages, 0, base, num)
    }

    /// A queue with nothing in it.
    #[track_caller]
    fn add_queue(&mut self, pages: &Pages, index: u32, base: usize, num: u16) -> Queue {
        self.set_up_queue(index, base, num);
        store(pages, base + AVAIL, &[0; 4]);
        store(pages, base + USED, &[0; 4]);
        Queue {
            base,
            num,
            next: 0,
            seen: 0,
        }
    }

    /// The last one.
    #[track_caller]
    fn go(&mut self) {
        self.set(STATUS, good_status());
        assert_got!(self.get(STATUS), good_status(), "status");
    }

    #[track_caller]
    fn set_up_queue(&mut self, index: u32, base: usize, num: u16) {
        self.set(QUEUE_SEL, index);
        self.set(QUEUE_NUM, num.into());
        for (register, offset) in QUEUE_ADDRS {
            let addr = gpa(base + offset);
            self.set(register, addr as u32);
            self.set(register + 4, (addr >> 32) as u32);
        }
        self.set(QUEUE_READY, 1);
        assert_got!(self.get(QUEUE_READY), 1);
    }

    #[track_caller]
    fn notify(&mut self) {
        self.set(QUEUE_NOTIFY, 0);
    }
}

/// A device and its guest.
struct Setup {
    registers: Registers,
    device: ImageDevice,
    irq: EventFd,
    guest: Guest,
    pages: Pages,
}

impl Setup {
    fn new(image: OpenImage) -> Self {
        Self::of(Guest::new(), image)
    }

    fn of(guest: Guest, image: OpenImage) -> Self {
        let pages = Pages::new(PAGES);
        pages.fill(std::iter::repeat(CANARY));
        pages.slot(&guest, 1, 0, START, 0, PAGES * PAGE);
        let device = Device::new(guest.vm()).expect("KVM_CREATE_DEVICE");
        let image = loaded(image);
        let rights = image.note().window.expect("a window");
        let window = Window {
            addr: gpa(PAGE),
            size: (END - PAGE) as u64,
            read: rights.read,
            write: rights.write,
        };
        let irq = EventFd::new(libc::EFD_NONBLOCK).expect("an eventfd");
        device.set_irq(0, &irq).expect("an interrupt");
        let device = ImageDevice::builder(device, image)
            .window(0, window)
            .and_then(|builder| builder.plug(Place::Memory(ADDR)))
            .expect("wanted a device");
        Setup {
            registers: Registers(guest.vcpu(0)),
            device,
            irq,
            guest,
            pages,
        }
    }

    #[track_caller]
    fn start(&mut self, num: u16) -> Queue {
        self.registers
            .start(&self.pages, num, VERSION_1 | INDIRECT_DESC)
    }

    #[track_caller]
    fn assert_edges_untouched(&self) {
        for start in [0, END] {
            let page = self.pages.bytes(start, PAGE);
            assert!(
                page.iter().all(|&byte| byte == CANARY),
                "memory at {start:#x} outside of the window has changed"
            );
        }
    }

    /// How many interrupts there were, and of what; all are acknowledged.
    #[track_caller]
    fn interrupts(&mut self) -> (u64, u32) {
        let status = self.registers.get(INTERRUPT_STATUS);
        self.registers.set(INTERRUPT_ACK, status);
        (taken(&self.irq), status)
    }
}

fn good_status() -> u32 {
    ACKNOWLEDGE_AND_DRIVER | FEATURES_OK | DRIVER_OK
}

fn notes_say_what_they_need() {
    for name in ["virtio_rng", "virtio_blk"] {
        let image = sample(name);
        let note = image.note();
        assert_got!(note.compatible, ["virtio,mmio"], "{name}");
        assert_got!((note.mmio_size, note.nr_irqs), (0x200, 1), "{name}");
        let rights = note.window.expect("a window");
        assert_got!((rights.read, rights.write), (true, true), "{name}");
        let [bell] = note.doorbells[..] else {
            panic!("{name}: wanted one doorbell, got {:?}", note.doorbells);
        };
        let work = note.works.iter().find(|work| work.index == bell.work);
        assert_got!(
            work.map(|work| work.name.as_str()),
            Some("queues"),
            "{name}"
        );
    }
}

fn registers_of_a_device() {
    for (name, id, num_max) in [("virtio_rng", 4, 64), ("virtio_blk", 2, 128)] {
        let mut setup = Setup::new(sample(name));
        let registers = &mut setup.registers;
        assert_got!(registers.get(MAGIC), u32::from_le_bytes(*b"virt"), "{name}");
        assert_got!(registers.get(VERSION), 2, "{name}");
        assert_got!(registers.get(DEVICE_ID), id, "{name}");
        assert_got!(registers.get(VENDOR_ID), 0x4b42_5042, "{name}");
        assert_got!(registers.get(QUEUE_NUM_MAX), num_max, "{name}");
        // There is one queue, and as many features as two words have.
        registers.set(QUEUE_SEL, 1);
        assert_got!(registers.get(QUEUE_NUM_MAX), 0, "{name}");
        registers.set(QUEUE_READY, 1);
        assert_got!(registers.get(QUEUE_READY), 0, "{name}");
        registers.set(QUEUE_SEL, 0);
        assert_got!(registers.get(QUEUE_READY), 0, "{name}");
        registers.set(DEVICE_FEATURES_SEL, 2);
        assert_got!(registers.get(DEVICE_FEATURES), 0, "{name}");
        // No memory is shared: its length is the highest.
        for register in [0xb0, 0xb4] {
            assert_got!(registers.get(register), u32::MAX, "{name}");
        }
        // Only whole registers are accessed.
        for (offset, width) in [(MAGIC, 1), (MAGIC, 2), (MAGIC, 8), (STATUS, 2)] {
            let read = registers.0.read(ADDR + offset, width);
            assert_got!(
                (read.value, read.exits),
                (0, vec![]),
                "{name}, {width} bytes"
            );
        }
        assert_got!(registers.0.write(ADDR + STATUS, 1, 1), []);
        assert_got!(registers.get(STATUS), 0, "{name}");
        // A queue has a power of 2 of entries, and that is the end of it.
        registers.set(QUEUE_SEL, 0);
        registers.set(QUEUE_NUM, 8);
        for num in [0, 3, 2 * num_max, u32::MAX, 1 << 31] {
            registers.set(QUEUE_NUM, num);
        }
        let state = element(setup.device.programs(), "virtio");
        // `offsetof(struct virtio, queues[0].num)`.
        assert_got!(state[56..60], 8_u32.to_le_bytes(), "{name}");
    }
}

fn features_are_negotiated() {
    const OF_DISK: u64 = 1 << 1 | 1 << 2 | 1 << 6 | 1 << 9;

    for (name, own) in [("virtio_rng", 0), ("virtio_blk", OF_DISK)] {
        let mut setup = Setup::new(sample(name));
        let registers = &mut setup.registers;
        let all = own | VERSION_1 | INDIRECT_DESC;
        assert_got!(registers.device_features(), all, "{name}");
        let accepted = ACKNOWLEDGE_AND_DRIVER | FEATURES_OK;
        for good in [all, VERSION_1, VERSION_1 | own] {
            assert_got!(registers.negotiate(good), accepted, "{name}: {good:#x}");
            // They stay as they are.
            registers.set(DRIVER_FEATURES_SEL, 1);
            registers.set(DRIVER_FEATURES, 0);
            let state = element(setup.device.programs(), "virtio");
            assert_got!(state[..8], good.to_le_bytes(), "{name}");
        }
        for bad in [
            0,
            INDIRECT_DESC,
            all | 1 << 29,
            all | 1 << 33,
            all | 1 << 63,
        ] {
            let status = registers.negotiate(bad);
            assert_got!(status, ACKNOWLEDGE_AND_DRIVER, "{name}: {bad:#x}");
            // Nor is the device there for such a driver.
            registers.set(STATUS, ACKNOWLEDGE_AND_DRIVER | FEATURES_OK | DRIVER_OK);
            assert_got!(registers.get(STATUS), ACKNOWLEDGE_AND_DRIVER, "{name}");
        }
    }
}

fn random_buffers_are_filled() {
    let mut setup = Setup::new(sample("virtio_rng"));
    let mut queue = setup.start(8);
    let end = 40 * PAGE;
    for indirect in [false, true] {
        for lens in [
            &[1][..],
            &[63],
            &[64],
            &[65],
            &[4095],
            &[4096],
            &[4097],
            &[64, 128],
            &[64, 1],
            &[64, 0, 64],
            &[0, 0],
            &[2048, 2048, 64],
            &[100, 64],
        ] {
            store(&setup.pages, DATA, &vec![CANARY; end - DATA]);
            // With a gap in between.
            let mut offset = DATA + 3;
            let mut buffers = Vec::new();
            for &len in lens {
                buffers.push((gpa(offset), len, true));
                offset += len as usize + 5;
            }
            match indirect {
                true => queue.indirect(&setup.pages, 5, TABLE, &buffers),
                false => queue.chain(&setup.pages, 5, &buffers),
            }
            queue.offer(&setup.pages, 5);
            setup.registers.notify();
            let used = queue.used(&setup.pages);
            let what = format!("{lens:?}, indirect: {indirect}");
            // At most 4 KiB, and nothing behind a part that is no multiple of 64.
            let mut wanted = 0;
            let mut full = Vec::new();
            for &len in lens {
                let len = len.min(4096 - wanted);
                full.push(len);
                wanted += len;
                if len % 64 != 0 {
                    break;
                }
            }
            full.resize(lens.len(), 0);
            assert_got!(used, [(5, wanted)], "{what}");
            assert_got!(setup.interrupts(), (1, RING), "{what}");
            let bytes = setup.pages.bytes(DATA, end - DATA);
            let mut model = vec![false; end - DATA];
            for (&(addr, ..), &len) in buffers.iter().zip(&full) {
                let start = (addr - gpa(DATA)) as usize;
                model[start..start + len as usize].fill(true);
            }
            let changed = |at: usize| bytes[at] != CANARY;
            let outside = (0..model.len()).find(|&at| changed(at) && !model[at]);
            assert_got!(outside, None, "{what}: changed outside of the buffers");
            let inside = model.iter().filter(|&&inside| inside).count();
            let kept = (0..model.len()).filter(|&at| model[at] && !changed(at));
            // A byte stays by chance once in 256 times.
            assert!(
                kept.count() <= 3 + inside / 64,
                "{what}: bytes that did not change"
            );
        }
    }
    setup.assert_edges_untouched();
}

fn interrupts_are_acknowledged_or_unwanted() {
    let mut setup = Setup::new(sample("virtio_rng"));
    let mut queue = setup.start(8);
    let mut request = |setup: &mut Setup| {
        queue.chain(&setup.pages, 0, &[(gpa(DATA), 64, true)]);
        queue.offer(&setup.pages, 0);
        setup.registers.notify();
        assert_got!(queue.used(&setup.pages), [(0, 64)]);
    };
    // One for all that a notification finds, none for one that finds nothing.
    assert_got!(setup.interrupts(), (0, 0));
    setup.registers.notify();
    assert_got!(setup.interrupts(), (0, 0));
    request(&mut setup);
    assert_got!(setup.registers.get(INTERRUPT_STATUS), RING);
    setup.registers.set(INTERRUPT_ACK, CHANGED);
    assert_got!(setup.interrupts(), (1, RING));
    assert_got!(setup.interrupts(), (0, 0));
    store16(&setup.pages, AVAIL, 1);
    request(&mut setup);
    assert_got!(setup.interrupts(), (0, 0), "unwanted");
    store16(&setup.pages, AVAIL, 0);
    request(&mut setup);
    assert_got!(setup.interrupts(), (1, RING));
}

fn notified_before_the_driver_is_there() {
    let mut setup = Setup::new(sample("virtio_rng"));
    let mut queue = setup.start(8);
    let status = setup.registers.negotiate(VERSION_1);
    setup.registers.set_up_queue(0, 0, 8);
    store(&setup.pages, USED, &[0; 4]);
    queue.chain(&setup.pages, 0, &[(gpa(DATA), 64, true)]);
    queue.offer(&setup.pages, 0);
    setup.registers.notify();
    assert_got!(queue.used(&setup.pages), []);
    setup.registers.set(STATUS, status | DRIVER_OK);
    assert_got!(queue.used(&setup.pages), [(0, 64)]);
    // Notifications of queues that are not there.
    for index in [1, 2, 64, u32::MAX] {
        setup.registers.set(QUEUE_NOTIFY, index);
    }
    // A queue that is not ready any more.
    setup.registers.set(QUEUE_READY, 0);
    assert_got!(setup.registers.get(QUEUE_READY), 0);
    queue.offer(&setup.pages, 0);
    setup.registers.notify();
    assert_got!(queue.used(&setup.pages), []);
}

const SECTOR: usize = 512;
/// Of the sample, without options.
const SECTORS: u64 = 2048 * 8;

/// Types of requests.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// Where requests have their first and last descriptor.
const HEADER: usize = DATA;
const RESULT: usize = DATA + 0x100;
/// And their data.
const BLOCKS: usize = DATA + PAGE;

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

/// A request to a disk; returns its status and how many bytes the device says it wrote.
#[track_caller]
fn ask_disk(
    setup: &mut Setup,
    queue: &mut Queue,
    indirect: bool,
    (kind, sector): (u32, u64),
    data: &[(u64, u32)],
) -> (u8, u32) {
    let pages = &setup.pages;
    store(pages, HEADER, &header(kind, sector));
    store(pages, RESULT, &[CANARY]);
    let mut buffers = vec![(gpa(HEADER), 16, false)];
    let writes = kind != OUT;
    buffers.extend(data.iter().map(|&(addr, len)| (addr, len, writes)));
    buffers.push((gpa(RESULT), 1, true));
    match indirect {
        true => queue.indirect(pages, 3, TABLE, &buffers),
        false => queue.chain(pages, 3, &buffers),
    }
    queue.offer(pages, 3);
    setup.registers.notify();
    let used = queue.used(pages);
    let [(3, len)] = used[..] else {
        panic!("wanted one request to be used, got {used:?}");
    };
    (setup.pages.bytes(RESULT, 1)[0], len)
}

fn disk_image(sectors: u64, read_only: bool, id: &[u8]) -> impl Fn(&ImageDevice) {
    let mut options = Vec::new();
    options.extend(sectors.to_le_bytes());
    options.extend(u32::from(read_only).to_le_bytes());
    options.extend(id);
    options.resize(32, 0);
    move |device| {
        let map = device.programs().map("disk_options").expect("the options");
        map.update(&[0; 4], &options).expect("BPF_MAP_UPDATE_ELEM");
    }
}

/// A guest shares its rings and a buffer; a request with another buffer is a bad one, and so are
/// rings that it does not share any more.
#[cfg(target_arch = "aarch64")]
fn what_a_protected_guest_shares_is_enough() {
    const PRIVATE: usize = DATA + PAGE;
    const UNTOUCHED: u64 = u64::from_ne_bytes([CANARY; 8]);

    let mut setup = Setup::of(Guest::protected(), sample("virtio_rng"));
    for page in (DESC..=PRIVATE).step_by(PAGE) {
        let got = setup.registers.0.read(gpa(page), 8).value;
        assert_got!(got, UNTOUCHED, "{page:#x}");
        if page != PRIVATE {
            setup.registers.0.share_page(gpa(page));
        }
    }
    for buffer in [gpa(PRIVATE), gpa(PRIVATE) - 32] {
        let mut queue = setup.start(8);
        setup.interrupts();
        queue.chain(&setup.pages, 0, &[(gpa(DATA), 64, true)]);
        queue.offer(&setup.pages, 0);
        setup.registers.notify();
        assert_got!(queue.used(&setup.pages), [(0, 64)]);
        assert_got!(setup.interrupts(), (1, RING));
        let got = setup.registers.0.read(gpa(DATA), 8).value;
        assert_got!(got.to_le_bytes(), setup.pages.bytes(DATA, 8)[..]);
        assert_ne!(got, UNTOUCHED, "nothing has come");

        queue.chain(&setup.pages, 1, &[(buffer, 64, true)]);
        queue.offer(&setup.pages, 1);
        setup.registers.notify();
        assert_got!(queue.used(&setup.pages), [], "{buffer:#x}");
        let status = setup.registers.get(STATUS);
        assert_got!(status, good_status() | NEEDS_RESET, "{buffer:#x}");
        assert_got!(setup.interrupts(), (1, CHANGED), "{buffer:#x}");
        let got = setup.registers.0.read(gpa(PRIVATE), 8).value;
        assert_got!(got, UNTOUCHED, "a buffer that is not shared");
    }
    // Without one of the rings it does nothing.
    for ring in [DESC, USED] {
        let mut queue = setup.start(8);
        queue.chain(&setup.pages, 0, &[(gpa(DATA), 64, true)]);
        queue.offer(&setup.pages, 0);
        setup.registers.0.unshare_page(gpa(ring));
        setup.registers.notify();
        let status = setup.registers.get(STATUS);
        assert_got!(status, good_status() | NEEDS_RESET, "{ring:#x}");
        setup.registers.0.share_page(gpa(ring));
        assert_got!(queue.used(&setup.pages), [], "{ring:#x}");
    }
}
