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
use model::{Disk, Model};

mod model;

tests!(
    notes_say_what_they_need,
    registers_of_a_device,
    features_are_negotiated,
    random_buffers_are_filled,
    interrupts_are_acknowledged_or_unwanted,
    notified_before_the_driver_is_there,
    a_disk_keeps_its_data,
    a_disk_as_the_model_says,
    a_disk_refuses,
    two_guests_read_one_disk,
    reset_forgets_all,
    reset_in_the_middle,
    bad_rings_need_a_reset,
    #[cfg(target_arch = "aarch64")]
    what_a_protected_guest_shares_is_enough,
    random_rings_as_the_model_says,
    two_vcpus_lose_no_request,
    the_rest_of_a_budget_is_done_later,
    a_queue_in_use_moves,
    programs_change_under_a_queue,
    two_queues_are_served,
    two_vcpus_use_a_queue_each,
    two_queues_move,
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
        device.set_window(0, window).expect("a window");
        let irq = EventFd::new(libc::EFD_NONBLOCK).expect("an eventfd");
        device.set_irq(0, &irq).expect("an interrupt");
        let device = ImageDevice::builder(device, image)
            .plug(Place::Memory(ADDR))
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

fn a_disk_keeps_its_data() {
    let mut setup = Setup::new(sample("virtio_blk"));
    disk_image(0, false, b"a disk of a program!")(&setup.device);
    let mut config = |offset, width| setup.registers.0.read(ADDR + CONFIG + offset, width).value;
    assert_got!(config(0, 8), SECTORS, "capacity");
    assert_got!(config(8, 4), 4096, "size_max");
    assert_got!(config(12, 4), 32, "seg_max");
    assert_got!(config(20, 4), 512, "blk_size");
    assert_got!(config(0xf8, 8), 0, "behind it");

    let mut queue = setup.start(64);
    let data = |seed: usize, len: usize| -> Vec<u8> {
        (0..len)
            .map(|at| (at * 7 + at / 256 + seed) as u8)
            .collect()
    };
    for (indirect, sector) in [(false, 8), (true, 8), (false, 13), (true, SECTORS - 24)] {
        // Pages, single sectors, and pages across pages.
        for lens in [&[4096][..], &[512], &[4096, 4096, 512], &[1024, 512, 4096]] {
            let total = lens.iter().sum::<u32>() as usize;
            let what = format!("{lens:?} at {sector}, indirect: {indirect}");
            let mut offset = BLOCKS;
            let mut buffers = Vec::new();
            for &len in lens {
                buffers.push((gpa(offset), len));
                offset += len as usize;
            }
            let written = data(sector as usize, total);
            store(&setup.pages, BLOCKS, &written);
            let got = ask_disk(&mut setup, &mut queue, indirect, (OUT, sector), &buffers);
            assert_got!(got, (OK, 1), "{what}");
            store(&setup.pages, BLOCKS, &vec![CANARY; total + SECTOR]);
            let got = ask_disk(&mut setup, &mut queue, indirect, (IN, sector), &buffers);
            assert_got!(got, (OK, total as u32 + 1), "{what}");
            assert_got!(setup.pages.bytes(BLOCKS, total), written, "{what}");
            let behind = setup.pages.bytes(BLOCKS + total, SECTOR);
            assert_got!(behind, vec![CANARY; SECTOR], "{what}");
        }
        let got = ask_disk(&mut setup, &mut queue, indirect, (FLUSH, 0), &[]);
        assert_got!(got, (OK, 1));
        let got = ask_disk(
            &mut setup,
            &mut queue,
            indirect,
            (GET_ID, 0),
            &[(gpa(BLOCKS), 20)],
        );
        assert_got!(got, (OK, 21));
        assert_got!(setup.pages.bytes(BLOCKS, 20), b"a disk of a program!");
    }
    setup.assert_edges_untouched();
}

/// Random requests, against a copy of the disk.
fn a_disk_as_the_model_says() {
    let seed = number_from_env("KVM_BPF_SEED", 1);
    let count = number_from_env("KVM_BPF_ACCESSES", 1000);
    let mut random = Random::new(seed);
    let mut setup = Setup::new(sample("virtio_blk"));
    let mut queue = setup.start(64);
    let mut model = vec![0; SECTORS as usize * SECTOR];
    for number in 0..count {
        let segments = 1 + random.below(5);
        let mut buffers = Vec::new();
        let mut offset = BLOCKS;
        for _ in 0..segments {
            let len = match random.below(2) {
                0 => SECTOR * (1 + random.below(16) as usize),
                _ => PAGE * (1 + random.below(2) as usize),
            };
            buffers.push((gpa(offset), len as u32));
            offset += len;
        }
        let total = offset - BLOCKS;
        let sector = match random.below(4) {
            // At the end, or beyond.
            0 => SECTORS - random.below(64),
            1 => 8 * random.below(SECTORS / 8 - 10),
            _ => random.below(64),
        };
        let kind = random.below(2) as u32;
        let indirect = random.below(2) == 0;
        let what = format!("request {number} of seed {seed}: {kind} at {sector}, {buffers:?}");
        let start = sector as usize * SECTOR;
        // What of it is on the disk, segment by segment.
        let mut fits = 0;
        for &(_, len) in &buffers {
            if start + fits + len as usize > model.len() {
                break;
            }
            fits += len as usize;
        }
        let status = if fits == total { OK } else { IOERR };
        if kind == OUT {
            let data: Vec<u8> = (0..total).map(|_| random.next() as u8).collect();
            store(&setup.pages, BLOCKS, &data);
            let got = ask_disk(&mut setup, &mut queue, indirect, (OUT, sector), &buffers);
            assert_got!(got, (status, 1), "{what}");
            model[start..start + fits].copy_from_slice(&data[..fits]);
        } else {
            let got = ask_disk(&mut setup, &mut queue, indirect, (IN, sector), &buffers);
            assert_got!(got, (status, fits as u32 + 1), "{what}");
            let data = setup.pages.bytes(BLOCKS, fits);
            assert!(data == model[start..start + fits], "{what}: other data");
        }
    }
    setup.assert_edges_untouched();
}

fn a_disk_refuses() {
    let mut setup = Setup::new(sample("virtio_blk"));
    disk_image(24, false, b"")(&setup.device);
    let mut queue = setup.start(64);
    let at = gpa(BLOCKS);
    let outside = gpa(END);
    let many = vec![(at, 4096); 33];
    for (what, request, data, wanted) in [
        ("past the end", (IN, 24), &[(at, 512)][..], (IOERR, 1)),
        ("far past it", (IN, u64::MAX), &[(at, 512)], (IOERR, 1)),
        ("across it", (IN, 23), &[(at, 1024)], (IOERR, 1)),
        ("in part", (IN, 23), &[(at, 512), (at, 512)], (IOERR, 513)),
        ("a write there", (OUT, 24), &[(at, 512)], (IOERR, 1)),
        ("no sector", (IN, 0), &[(at, 511)], (IOERR, 1)),
        ("no sector", (OUT, 0), &[(at, 513)], (IOERR, 1)),
        ("too much", (IN, 0), &[(at, 0xffff_fe00)], (IOERR, 1)),
        ("too many", (FLUSH, 0), &many, (UNSUPP, 1)),
        ("no memory", (IN, 0), &[(outside, 512)], (IOERR, 1)),
        ("no memory", (OUT, 0), &[(outside, 512)], (IOERR, 1)),
        ("half of it", (IN, 0), &[(outside - 512, 1024)], (IOERR, 1)),
        ("wrap-around", (IN, 0), &[(u64::MAX - 511, 512)], (IOERR, 1)),
        ("short id", (GET_ID, 0), &[(at, 19)], (IOERR, 1)),
        ("unknown", (2, 0), &[], (UNSUPP, 1)),
        ("unknown", (u32::MAX, 0), &[(at, 512)], (UNSUPP, 1)),
        ("nothing", (IN, 24), &[], (OK, 1)),
        ("good", (IN, 16), &[(at, 4096)], (OK, 4097)),
    ] {
        for indirect in [false, true] {
            let got = ask_disk(&mut setup, &mut queue, indirect, request, data);
            assert_got!(got, wanted, "{what}: {request:?}");
        }
    }
    // More than a request may copy, on a disk that has it.
    disk_image(0, false, b"")(&setup.device);
    let got = ask_disk(&mut setup, &mut queue, true, (IN, 0), &many);
    assert_got!(got, (IOERR, 32 * 4096 + 1));
    // The wrong way round.
    for (kind, writable) in [(IN, false), (OUT, true)] {
        store(&setup.pages, HEADER, &header(kind, 0));
        let buffers = [
            (gpa(HEADER), 16, false),
            (at, 512, writable),
            (gpa(RESULT), 1, true),
        ];
        queue.chain(&setup.pages, 0, &buffers);
        queue.offer(&setup.pages, 0);
        setup.registers.notify();
        assert_got!(queue.used(&setup.pages), [(0, 1)]);
        assert_got!(setup.pages.bytes(RESULT, 1), [IOERR]);
    }
    // The first ones are good for the second, and it is not there any more.
    disk_image(0, true, b"")(&setup.device);
    assert_got!(setup.registers.device_features() & 1 << 5, 1 << 5);
    let mut queue = setup.start(64);
    let got = ask_disk(&mut setup, &mut queue, false, (OUT, 0), &[(at, 512)]);
    assert_got!(got, (IOERR, 1), "a disk to read only");
    let got = ask_disk(&mut setup, &mut queue, false, (IN, 0), &[(at, 512)]);
    assert_got!(got, (OK, 513));
    setup.assert_edges_untouched();
}

fn two_guests_read_one_disk() {
    let mut first = Setup::new(sample("virtio_blk"));
    let page: Vec<u8> = (0..PAGE).map(|at| (at ^ at >> 8) as u8).collect();
    let disk = first.device.programs().map("disk").expect("the disk");
    disk.update(&9_u32.to_ne_bytes(), &page)
        .expect("BPF_MAP_UPDATE_ELEM");
    let mut image = sample("virtio_blk");
    image.share_map("disk", disk).expect("another one's map");
    let mut second = Setup::new(image);
    for setup in [&mut first, &mut second] {
        disk_image(0, true, b"")(&setup.device);
        let mut queue = setup.start(8);
        let buffer = [(gpa(BLOCKS), 4096)];
        let got = ask_disk(setup, &mut queue, false, (IN, 72), &buffer);
        assert_got!(got, (OK, 4097));
        assert_got!(setup.pages.bytes(BLOCKS, PAGE), page);
        let got = ask_disk(setup, &mut queue, false, (OUT, 72), &buffer);
        assert_got!(got, (IOERR, 1));
    }
}

fn reset_forgets_all() {
    let mut setup = Setup::new(sample("virtio_rng"));
    let new = element(setup.device.programs(), "virtio");
    for by_vmm in [false, true] {
        let mut queue = setup.start(8);
        queue.chain(&setup.pages, 0, &[(gpa(DATA), 64, true)]);
        queue.offer(&setup.pages, 0);
        setup.registers.notify();
        assert_got!(queue.used(&setup.pages), [(0, 64)]);
        assert_ne!(element(setup.device.programs(), "virtio"), new);
        match by_vmm {
            true => assert!(setup.device.reset().expect("a run"), "no such program"),
            false => setup.registers.set(STATUS, 0),
        }
        assert_got!(element(setup.device.programs(), "virtio"), new);
        queue.offer(&setup.pages, 0);
        setup.registers.notify();
        assert_got!(queue.used(&setup.pages), []);
    }
}

/// A driver resets the device while other vCPUs notify it and the WORK program serves what is
/// left, and sets it up anew at once, in another place. What is after the reset is the new driver's
/// alone: the old place does not change any more, and the new ring has the new requests, each once.
fn reset_in_the_middle() {
    /// Where the rings and buffers of every second driver are.
    const OTHER: usize = 38 * PAGE;
    const NUM: u16 = 32;

    let seed = number_from_env("KVM_BPF_SEED", 1);
    let count = number_from_env("KVM_BPF_ACCESSES", 2000) / 8;
    let mut random = Random::new(seed);
    let mut setup = Setup::new(sample("virtio_rng"));
    let new = element(setup.device.programs(), "virtio");
    // More than there are CPUs: some are late.
    let others: Vec<_> = (1..4).map(|id| setup.guest.vcpu(id)).collect();
    let notify = |mut vcpu: Vcpu| {
        move || {
            let args = Args {
                value: 0,
                addr: ADDR + QUEUE_NOTIFY,
                count: 100,
                ..Default::default()
            };
            assert_got!(vcpu.call(Routine::WriteLoop, args).1, []);
        }
    };
    let (mut cut_short, mut served) = (0, 0);
    meanwhile(others.into_iter().map(notify), || {
        let mut before = None;
        for number in 0..count {
            let what = format!("driver {number} of seed {seed}");
            let base = OTHER * (number % 2) as usize;
            let (pages, registers) = (&setup.pages, &mut setup.registers);
            let mut queue = registers.prepare(pages, base, NUM, VERSION_1 | INDIRECT_DESC);
            pages.set(base + DATA, usize::from(NUM) * PAGE, CANARY);
            let wanted: Vec<_> = (0..1 + random.below(NUM.into()))
                .map(|at| {
                    // Another one than the last driver has here.
                    let head = (at + number) as u32 % u32::from(NUM);
                    (head, 64 * (1 + random.below(64)) as u32)
                })
                .collect();
            for (at, &(head, len)) in wanted.iter().enumerate() {
                let data = gpa(base + DATA + PAGE * at);
                queue.chain(pages, head as u16, &[(data, len, true)]);
            }
            // Those who notify do not make it serve a driver that is not there yet.
            queue.offer(pages, wanted[0].0 as u16);
            assert_got!(queue.used_index(pages), 0, "{what}: too early");
            assert_got!(registers.get(INTERRUPT_STATUS), 0, "{what}: too early");
            registers.go();
            for &(head, _) in &wanted[1..] {
                queue.offer(pages, head as u16);
            }
            // This one is begun, at least, and so ends before the reset does.
            let begun = random.below(wanted.len() as u64) as usize;
            let data = base + DATA + PAGE * begun;
            let all = random.below(4) == 0;
            if all {
                registers.notify();
            }
            let start = Instant::now();
            while match all {
                true => queue.used_index(pages) != queue.next,
                false => pages.bytes(data, 8) == [CANARY; 8],
            } {
                let waited = start.elapsed().as_secs();
                assert!(waited < 60, "{what}: request {begun} is not done");
                std::hint::spin_loop();
            }

            match random.below(4) {
                0 => assert!(setup.device.reset().expect("a run"), "no such program"),
                _ => registers.reset(),
            }
            // The next driver does not wait. What this one has is looked at when that is gone.
            let done = usize::from(queue.used_index(pages));
            let is_ended = begun < done && done <= wanted.len();
            assert!(is_ended, "{what}: {begun} was begun, but {done} are done");
            cut_short += u64::from(done < wanted.len());
            served += done;
            let driver = (what, queue, wanted, done);
            if let Some((what, mut queue, wanted, done)) = before.replace(driver) {
                assert_got!(queue.used(pages), wanted[..done], "{what}: used ring");
                for at in done..wanted.len() {
                    let data = pages.bytes(queue.base + DATA + PAGE * at, PAGE);
                    let kept = data.iter().all(|&byte| byte == CANARY);
                    assert!(kept, "{what}: request {at} is not done, but has data");
                }
            }
            if number % 64 == 0 {
                setup.assert_edges_untouched();
            }
        }
    });
    setup.assert_edges_untouched();
    println!("seed {seed}: {served} requests, {cut_short} of {count} drivers had more");
    assert!(cut_short > count / 20, "{cut_short} resets in the middle");
    setup.registers.reset();
    assert_got!(element(setup.device.programs(), "virtio"), new);
    let mut queue = setup.start(8);
    queue.chain(&setup.pages, 0, &[(gpa(DATA), 64, true)]);
    queue.offer(&setup.pages, 0);
    setup.registers.notify();
    assert_got!(queue.used(&setup.pages), [(0, 64)]);
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

/// Rings that no driver makes, of both devices where it is theirs.
fn bad_rings_need_a_reset() {
    type Spoil = fn(&Pages, &mut Queue);
    let cases: [(&str, Spoil); 16] = [
        ("more entries than there are", |pages, queue| {
            queue.next = 8;
            queue.offer(pages, 0);
        }),
        ("an index that goes back", |pages, queue| {
            queue.next = u16::MAX - 1;
            queue.offer(pages, 0);
        }),
        ("a head outside of the table", |pages, queue| {
            queue.offer(pages, 8);
        }),
        ("a next one outside of the table", |pages, queue| {
            queue.set(pages, 0, descriptor(gpa(DATA), 64, NEXT | WRITE, 8));
            queue.offer(pages, 0);
        }),
        ("a loop of one", |pages, queue| {
            queue.set(pages, 0, descriptor(gpa(DATA), 0, NEXT | WRITE, 0));
            queue.offer(pages, 0);
        }),
        ("a loop of two", |pages, queue| {
            queue.set(pages, 0, descriptor(gpa(DATA), 0, NEXT | WRITE, 1));
            queue.set(pages, 1, descriptor(gpa(DATA), 0, NEXT | WRITE, 0));
            queue.offer(pages, 0);
        }),
        ("a buffer that is not for the device", |pages, queue| {
            queue.set(pages, 0, descriptor(gpa(DATA), 64, 0, 0));
            queue.offer(pages, 0);
        }),
        ("a buffer outside of the window", |pages, queue| {
            queue.set(pages, 0, descriptor(gpa(END), 64, WRITE, 0));
            queue.offer(pages, 0);
        }),
        ("a buffer across its end", |pages, queue| {
            queue.set(pages, 0, descriptor(gpa(END) - 1, 64, WRITE, 0));
            queue.offer(pages, 0);
        }),
        ("a buffer at no address", |pages, queue| {
            queue.set(pages, 0, descriptor(u64::MAX, 64, WRITE, 0));
            queue.offer(pages, 0);
        }),
        ("an empty table", |pages, queue| {
            queue.set(pages, 0, descriptor(gpa(TABLE), 0, INDIRECT, 0));
            queue.offer(pages, 0);
        }),
        ("a part of a table", |pages, queue| {
            queue.indirect(pages, 0, TABLE, &[(gpa(DATA), 64, true)]);
            queue.set(pages, 0, descriptor(gpa(TABLE), 15, INDIRECT, 0));
            queue.offer(pages, 0);
        }),
        ("a table with more behind it", |pages, queue| {
            queue.indirect(pages, 0, TABLE, &[(gpa(DATA), 64, true)]);
            queue.set(pages, 0, descriptor(gpa(TABLE), 16, INDIRECT | NEXT, 1));
            queue.offer(pages, 0);
        }),
        ("a table in a table", |pages, queue| {
            queue.indirect(pages, 0, TABLE, &[(gpa(DATA), 64, true)]);
            store(pages, TABLE, &descriptor(gpa(TABLE), 16, INDIRECT, 0));
            queue.offer(pages, 0);
        }),
        ("a next one outside of a table", |pages, queue| {
            let table = &[(gpa(DATA), 0, true)];
            queue.indirect(pages, 0, TABLE, table);
            store(pages, TABLE, &descriptor(gpa(DATA), 0, NEXT | WRITE, 1));
            queue.offer(pages, 0);
        }),
        ("a table outside of the window", |pages, queue| {
            queue.set(pages, 0, descriptor(gpa(END), 16, INDIRECT, 0));
            queue.offer(pages, 0);
        }),
    ];
    let mut setup = Setup::new(sample("virtio_rng"));
    let good = ACKNOWLEDGE_AND_DRIVER | FEATURES_OK | DRIVER_OK;
    let spoiled = |setup: &mut Setup, what: &str, features, spoil: &dyn Fn(&Pages, &mut Queue)| {
        let mut queue = setup.registers.start(&setup.pages, 8, features);
        setup.interrupts();
        spoil(&setup.pages, &mut queue);
        setup.registers.notify();
        assert_got!(queue.used(&setup.pages), [], "{what}");
        assert_got!(setup.registers.get(STATUS), good | NEEDS_RESET, "{what}");
        assert_got!(setup.interrupts(), (1, CHANGED), "{what}");
        // It does nothing more, and a driver cannot talk it out of that.
        setup.registers.set(STATUS, good);
        assert_got!(setup.registers.get(STATUS), good | NEEDS_RESET, "{what}");
        queue.chain(&setup.pages, 0, &[(gpa(DATA), 64, true)]);
        queue.next = 0;
        queue.offer(&setup.pages, 0);
        setup.registers.notify();
        assert_got!(queue.used(&setup.pages), [], "{what}");
        assert_got!(setup.interrupts(), (0, 0), "{what}");
        setup.assert_edges_untouched();
        let mut queue = setup.start(8);
        queue.offer(&setup.pages, 0);
        setup.registers.notify();
        assert_got!(queue.used(&setup.pages), [(0, 64)], "after {what}");
    };
    for (what, spoil) in cases {
        spoiled(&mut setup, what, VERSION_1 | INDIRECT_DESC, &spoil);
    }
    spoiled(
        &mut setup,
        "a table nobody talked of",
        VERSION_1,
        &|pages, queue| {
            queue.indirect(pages, 0, TABLE, &[(gpa(DATA), 64, true)]);
            queue.offer(pages, 0);
        },
    );

    // Each part of the queue outside of the window; what was used cannot be told.
    for (part, (register, offset)) in QUEUE_ADDRS.into_iter().enumerate() {
        for addr in [gpa(END), gpa(0), u64::MAX - 1, 1 << 63] {
            let what = format!("part {part} at {addr:#x}");
            setup.start(8);
            setup.registers.set(QUEUE_READY, 0);
            setup.registers.set(register, addr as u32);
            setup.registers.set(register + 4, (addr >> 32) as u32);
            setup.registers.set(QUEUE_READY, 1);
            let mut queue = Queue {
                base: 0,
                num: 8,
                next: 0,
                seen: 0,
            };
            setup.interrupts();
            queue.chain(&setup.pages, 0, &[(gpa(DATA), 64, true)]);
            queue.offer(&setup.pages, 0);
            setup.registers.notify();
            let status = setup.registers.get(STATUS);
            assert_got!(status, good | NEEDS_RESET, "{what}, not {offset:#x}");
            setup.assert_edges_untouched();
        }
    }

    // What a disk does not take for a request.
    let mut setup = Setup::new(sample("virtio_blk"));
    let (first, data, last) = (
        (gpa(HEADER), 16, false),
        (gpa(BLOCKS), 512, true),
        (gpa(RESULT), 1, true),
    );
    for (what, buffers) in [
        ("no result", &[first][..]),
        ("a short header", &[(gpa(HEADER), 15, false), data, last]),
        ("a long one", &[(gpa(HEADER), 17, false), data, last]),
        ("one to write", &[(gpa(HEADER), 16, true), data, last]),
        ("one outside", &[(gpa(END), 16, false), data, last]),
        ("a long result", &[first, data, (gpa(RESULT), 2, true)]),
        ("one to read", &[first, data, (gpa(RESULT), 1, false)]),
        ("one outside", &[first, data, (gpa(END), 1, true)]),
    ] {
        store(&setup.pages, HEADER, &header(IN, 0));
        let mut queue = setup.start(8);
        queue.chain(&setup.pages, 0, buffers);
        queue.offer(&setup.pages, 0);
        setup.registers.notify();
        assert_got!(setup.registers.get(STATUS), good | NEEDS_RESET, "{what}");
        assert_got!(queue.used(&setup.pages), [], "{what}");
    }
    // A loop of data.
    let mut queue = setup.start(8);
    queue.chain(&setup.pages, 0, &[first, data, last]);
    queue.set(&setup.pages, 1, descriptor(data.0, 512, NEXT | WRITE, 1));
    queue.offer(&setup.pages, 0);
    setup.registers.notify();
    assert_got!(setup.registers.get(STATUS), good | NEEDS_RESET);
    assert_got!(queue.used(&setup.pages), []);
    setup.assert_edges_untouched();
}

/// Whatever a driver puts into its rings, and whatever numbers it writes to the registers, the
/// device ends every notification, soon, and stays in its window. But for the registers it does
/// what the model says: it uses the same requests, writes the same bytes, and needs a reset or not.
fn random_rings_as_the_model_says() {
    let seed = number_from_env("KVM_BPF_SEED", 1);
    let count = number_from_env("KVM_BPF_ACCESSES", 1000);
    for name in ["virtio_rng", "virtio_blk"] {
        let mut random = Random::new(seed);
        let mut setup = Setup::new(sample(name));
        let disk = (name == "virtio_blk").then(|| {
            disk_image(0, false, b"a disk of a program!")(&setup.device);
            Disk::new(*b"a disk of a program!")
        });
        let mut model = Model::new(disk);
        let (mut resets, mut served, mut unknown) = (0, 0, 0);
        let mut longest = Duration::ZERO;
        let mut queue = setup.start(16);
        model.start(16, true);
        for number in 0..count {
            let what = format!("{name}: notification {number} of seed {seed}");
            let pages = &setup.pages;
            make_requests(&mut random, &queue, pages, name);
            for _ in 0..random.below(3) {
                let table = if random.below(4) == 0 { TABLE } else { DESC };
                let at = table + 16 * random.below(16) as usize;
                spoil_descriptor(&mut random, pages, at);
            }
            for _ in 0..1 + random.below(16) {
                let head = match random.below(100) {
                    0 => random.below(20),
                    1..=20 => 15,
                    _ => 3 * random.below(5),
                };
                queue.offer(pages, head as u16);
            }
            if random.below(100) == 0 {
                queue.next = random.next() as u16;
                queue.offer(pages, 0);
            }
            store16(pages, AVAIL, u16::from(random.below(4) == 0));
            if random.below(20) == 0 {
                let register = 4 * random.below(0x80);
                // Nothing that moves the rings: the test would not know them again.
                if !(0x80..0xb0).contains(&register) && register != QUEUE_READY {
                    let value = random.next() as u32;
                    if register == STATUS {
                        model.set_status(value);
                    }
                    setup.registers.set(register, value);
                }
            }
            let wanted = model.notify(pages.bytes(0, PAGES * PAGE));
            let start = Instant::now();
            setup.registers.notify();
            longest = longest.max(start.elapsed());
            let seen = queue.seen;
            // What a notification leaves the WORK program does.
            if let Ok(interrupts) = wanted {
                let wanted = (model.served, model.status(), interrupts);
                wait_for(&what, wanted, || {
                    let used = queue.used_index(&setup.pages);
                    let registers = &mut setup.registers;
                    (used, registers.get(STATUS), registers.get(INTERRUPT_STATUS))
                });
                let same = model.is_like(setup.pages.bytes(0, PAGES * PAGE));
                assert!(same, "{what}: memory is not what the model says");
                setup.registers.set(INTERRUPT_ACK, interrupts);
            } else {
                unknown += 1;
                wait_for(&what, true, || {
                    setup.registers.get(STATUS) != good_status()
                        || queue.used_index(&setup.pages) == queue.next
                });
            }
            queue.seen = queue.used_index(&setup.pages);
            served += u64::from(queue.seen.wrapping_sub(seen));
            if wanted.is_err() || model.status() != good_status() {
                resets += 1;
                let tables = random.below(8) != 0;
                let features = if tables { INDIRECT_DESC } else { 0 };
                let pages = &setup.pages;
                queue = setup.registers.start(pages, 16, VERSION_1 | features);
                model.start(16, tables);
            }
        }
        setup.assert_edges_untouched();
        if let Some(disk) = &model.disk {
            let map = setup.device.programs().map("disk").expect("the disk");
            for (index, wanted) in (0_u32..).zip(disk.data.chunks(PAGE)) {
                let got = map.lookup(&index.to_ne_bytes());
                let got = got.expect("BPF_MAP_LOOKUP_ELEM").expect("a page");
                assert!(
                    got == wanted,
                    "{name}, seed {seed}: page {index} of the disk"
                );
            }
        }
        println!(
            "{name}, seed {seed}: {served} requests, {resets} resets, {unknown} that the model \
             does not know, longest {longest:?}"
        );
        assert!(served > count / 10, "{name}: {served} requests served");
        assert!(resets > count / 100, "{name}: {resets} resets");
        assert!(unknown < count / 5, "{name}: {unknown} are not known");
        // Under emulation, with other load.
        assert!(
            longest.as_secs() < 2,
            "{name}: {longest:?} for a notification"
        );
    }
}

fn good_status() -> u32 {
    ACKNOWLEDGE_AND_DRIVER | FEATURES_OK | DRIVER_OK
}

/// Five requests of three descriptors each, and a table with another one.
fn make_requests(random: &mut Random, queue: &Queue, pages: &Pages, device: &str) {
    let kinds = [IN, OUT, FLUSH, GET_ID, 99];
    let kind = kinds[random.below(5) as usize];
    store(pages, HEADER, &header(kind, random.below(SECTORS + 8)));
    let mut buffers = || {
        let data = gpa(BLOCKS) + random.below((END - BLOCKS - 8192) as u64);
        match device {
            "virtio_blk" => [
                (gpa(HEADER), 16, false),
                (data, 512 * random.below(17) as u32, kind != OUT),
                (gpa(RESULT), 1, true),
            ],
            _ => [64, 64 * random.below(65) as u32, 100].map(|len| (data, len, true)),
        }
    };
    for at in 0..5 {
        queue.chain(pages, 3 * at, &buffers());
    }
    queue.indirect(pages, 15, TABLE, &buffers());
}

/// A descriptor that is good, or not so good.
fn spoil_descriptor(random: &mut Random, pages: &Pages, at: usize) {
    let addr = match random.below(60) {
        0 => random.next() << random.below(49),
        1 => gpa(END) - random.below(64),
        2..=30 => gpa(HEADER),
        31..=40 => gpa(TABLE) + 16 * random.below(16),
        _ => gpa(BLOCKS) + random.below((END - BLOCKS - 8192) as u64),
    };
    let len = match random.below(20) {
        0 => random.next() as u32,
        1..=7 => 16,
        8..=12 => 1,
        13..=15 => 512 * random.below(17) as u32,
        _ => 16 * random.below(17) as u32,
    };
    let mut flags = random.below(4) as u16;
    if random.below(8) == 0 {
        flags = INDIRECT | random.below(32) as u16 & !NEXT;
    }
    let ends = 16 + 2 * u64::from(random.below(30) == 0);
    let next = random.below(ends);
    store(pages, at, &descriptor(addr, len, flags, next as u16));
}

/// Each adds requests and notifies, at the same time, and then nobody does any more: all
/// requests are done, once, also those which one of them has left to the other.
fn two_vcpus_lose_no_request() {
    const NUM: u16 = 16;

    let seed = number_from_env("KVM_BPF_SEED", 1);
    let rounds = number_from_env("KVM_BPF_ACCESSES", 4000) / 4;
    let Setup {
        mut registers,
        device: _device,
        irq: _irq,
        guest,
        pages,
    } = Setup::new(sample("virtio_rng"));
    let second = Registers(guest.vcpu(1));
    let queue = registers.start(&pages, NUM, VERSION_1 | INDIRECT_DESC);
    for at in 0..NUM {
        let data = gpa(DATA + PAGE * usize::from(at));
        queue.chain(&pages, at, &[(data, 64 * (1 + u32::from(at)), true)]);
    }
    let queue = Mutex::new(queue);
    std::thread::scope(|scope| {
        let (queue, pages) = (&queue, &pages);
        let vcpus: Vec<_> = [registers, second]
            .into_iter()
            .zip(seed..)
            .map(|(mut registers, seed)| {
                let (start, started) = mpsc::channel();
                let (end, ended) = mpsc::channel();
                scope.spawn(move || {
                    let mut random = Random::new(seed);
                    while let Ok(()) = started.recv() {
                        for _ in 0..1 + random.below(3) {
                            let mut queue = queue.lock().expect("the other vCPU");
                            let head = queue.next % NUM;
                            queue.offer(pages, head);
                            drop(queue);
                            registers.notify();
                        }
                        end.send(()).expect("the test");
                    }
                });
                (start, ended)
            })
            .collect();
        for round in 0..rounds {
            let what = format!("round {round} of seed {seed}");
            for (start, _) in &vcpus {
                start.send(()).expect("a vCPU");
            }
            for (_, ended) in &vcpus {
                ended.recv().expect("a vCPU");
            }
            let mut queue = queue.lock().expect("no vCPU");
            let (seen, next) = (queue.seen, queue.next);
            wait_for(&what, next, || queue.used_index(pages));
            let requests = (0..next.wrapping_sub(seen)).map(|at| {
                let head = u32::from(seen.wrapping_add(at) % NUM);
                (head, 64 * (1 + head))
            });
            assert_got!(queue.used(pages), requests.collect::<Vec<_>>(), "{what}");
        }
    });
}

/// As many requests as fit the queue, of the most bytes, of which a notification does a part.
fn fill_queue(setup: &Setup, queue: &mut Queue) {
    for at in 0..queue.num {
        let data = gpa(DATA) + PAGE as u64 * u64::from(at);
        queue.chain(&setup.pages, at, &[(data, 4096, true)]);
        queue.offer(&setup.pages, at);
    }
}

/// Requests that a notification of random numbers does: 4 KiB.
const BUDGET: usize = 1;

fn the_rest_of_a_budget_is_done_later() {
    let mut setup = Setup::new(sample("virtio_rng"));
    let mut queue = setup.start(64);
    let mut total = 0;
    for _ in 0..20 {
        fill_queue(&setup, &mut queue);
        setup.registers.notify();
        total += 64;
        wait_for("requests that are done", total as u16, || {
            load16(&setup.pages, USED + 2)
        });
        assert_got!(queue.used(&setup.pages).len(), 64);
    }
    assert_got!(setup.interrupts().1, RING);
    wait_for("an end", 0, || setup.interrupts().0);

    // Without the doorbell the rest waits.
    setup.device.device().unset_irq(1).expect("no doorbell");
    fill_queue(&setup, &mut queue);
    setup.registers.notify();
    assert_got!(queue.used(&setup.pages).len(), BUDGET);
    setup.registers.notify();
    assert_got!(queue.used(&setup.pages).len(), BUDGET);
    assert!(setup.device.run("queues", 0).expect("a run"), "no program");
    assert_got!(queue.used(&setup.pages).len(), 64 - 2 * BUDGET);
    // What is left of a request costs what a whole chunk of 64 bytes does.
    queue.chain(&setup.pages, 0, &[(gpa(DATA), 65, true)]);
    queue.chain(&setup.pages, 1, &[(gpa(DATA), 1, true)]);
    for at in 0..64 {
        queue.offer(&setup.pages, u16::from(at != 0));
    }
    setup.registers.notify();
    assert_got!(queue.used(&setup.pages).len(), 63);
    assert!(setup.device.run("queues", 0).expect("a run"), "no program");
    assert_got!(queue.used(&setup.pages), [(1, 1)]);
    // So do descriptors that have no bytes.
    let buffers = vec![(gpa(DATA), 0, true); 40];
    for _ in 0..20 {
        queue.indirect(&setup.pages, 0, TABLE, &buffers);
        queue.offer(&setup.pages, 0);
    }
    setup.registers.notify();
    assert_got!(queue.used(&setup.pages).len(), 7);
    assert!(setup.device.run("queues", 0).expect("a run"), "no program");
    assert_got!(queue.used(&setup.pages).len(), 13);
}

/// With requests that nobody has looked at yet.
fn a_queue_in_use_moves() {
    let mut setup = Setup::new(sample("virtio_rng"));
    let mut queue = setup.start(64);
    setup.device.device().unset_irq(1).expect("no doorbell");
    fill_queue(&setup, &mut queue);
    setup.registers.notify();
    assert_got!(queue.used(&setup.pages).len(), BUDGET);
    let state = setup.device.save().expect("a state");
    // While it is saved nothing is done.
    setup.registers.notify();
    assert!(setup.device.run("queues", 0).expect("a run"), "no program");
    assert_got!(queue.used(&setup.pages), []);

    let mut other = Setup::new(sample("virtio_rng"));
    store(&other.pages, 0, &setup.pages.bytes(0, PAGES * PAGE));
    // With the state alone it does not touch memory, which may still be another's.
    other.device.prepare(&state).expect("the state");
    std::thread::sleep(Duration::from_millis(100));
    let mut moved = queue.clone();
    assert_got!(moved.used(&other.pages), []);
    other.device.resume().expect("a run");
    wait_for("the rest of the requests", 64, || {
        load16(&other.pages, USED + 2)
    });
    let heads: Vec<_> = moved.used(&other.pages);
    let wanted: Vec<_> = (BUDGET as u32..64).map(|head| (head, 4096)).collect();
    assert_got!(heads, wanted);
    wait_for("an interrupt", true, || other.interrupts().0 > 0);
    fill_queue(&other, &mut moved);
    other.registers.notify();
    wait_for("more requests", 128, || load16(&other.pages, USED + 2));

    // And it goes on where it was.
    setup.device.resume().expect("a run");
    setup.registers.notify();
    assert!(setup.device.run("queues", 0).expect("a run"), "no program");
    assert_got!(queue.used(&setup.pages), wanted);

    // A disk moves with what is on it.
    let mut setup = Setup::new(sample("virtio_blk"));
    let mut queue = setup.start(8);
    let page: Vec<u8> = (0..PAGE).map(|at| ((at * 3) ^ (at >> 8)) as u8).collect();
    store(&setup.pages, BLOCKS, &page);
    let buffer = [(gpa(BLOCKS), 4096)];
    let got = ask_disk(&mut setup, &mut queue, false, (OUT, 4001), &buffer);
    assert_got!(got, (OK, 1));
    let state = setup.device.save().expect("a state");
    let mut other = Setup::new(sample("virtio_blk"));
    store(&other.pages, 0, &setup.pages.bytes(0, PAGES * PAGE));
    store(&other.pages, BLOCKS, &[0; PAGE]);
    other.device.restore(&state).expect("the state");
    let got = ask_disk(&mut other, &mut queue, false, (IN, 4001), &buffer);
    assert_got!(got, (OK, 4097));
    assert_got!(other.pages.bytes(BLOCKS, PAGE), page);
}

fn programs_change_under_a_queue() {
    let Setup {
        mut registers,
        mut device,
        irq: _irq,
        guest: _guest,
        pages,
    } = Setup::new(sample("virtio_rng"));
    let mut queue = registers.start(&pages, 64, VERSION_1);
    for at in 0..64 {
        let data = gpa(DATA) + PAGE as u64 * u64::from(at);
        queue.chain(&pages, at, &[(data, 4096, true)]);
    }
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let driver = scope.spawn(|| {
            let mut total = 0_u16;
            while !stop.load(SeqCst) || total == 0 {
                for at in 0..64 {
                    queue.offer(&pages, at);
                }
                total = total.wrapping_add(64);
                registers.notify();
                wait_for("requests that are done", total, || load16(&pages, USED + 2));
                assert_got!(queue.used(&pages).len(), 64);
            }
        });
        for _ in 0..10 {
            let image = OpenImage::open_file(&sample_path("virtio_rng")).expect("the file");
            device
                .replace(image, OnLoss::Accept, unpaused)
                .expect("new programs");
        }
        stop.store(true, SeqCst);
        driver.join().expect("the driver");
    });
}

/// The queues of `virtio_two`: one to add numbers to a sum, one to be told it.
const ADD: u32 = 0;
const TELL: u32 = 1;
/// Where the second one is, behind the first; it has the same entries.
const SECOND: usize = 40 * PAGE;
const NUM: u16 = 64;
/// How many requests to add a number that count for a page a notification does: 64 KiB.
const ADD_BUDGET: usize = 16;

/// Starts both.
#[track_caller]
fn start_two(setup: &mut Setup) -> [Queue; 2] {
    let (registers, pages) = (&mut setup.registers, &setup.pages);
    registers.reset();
    let add = registers.prepare(pages, 0, NUM, VERSION_1);
    let tell = registers.add_queue(pages, TELL, SECOND, NUM);
    registers.go();
    [add, tell]
}

/// Where the data of an entry is.
fn place_of(queue: &Queue, at: u16) -> usize {
    queue.base + DATA + 8 * usize::from(at)
}

/// A request to add a number, which counts for so many bytes.
fn add(pages: &Pages, queue: &mut Queue, number: u64, len: u32) {
    let at = queue.next % NUM;
    let place = place_of(queue, at);
    store(pages, place, &number.to_le_bytes());
    queue.chain(pages, at, &[(gpa(place), len, false)]);
    queue.offer(pages, at);
}

/// A request to be told the sum.
fn tell(pages: &Pages, queue: &mut Queue) {
    let at = queue.next % NUM;
    queue.chain(pages, at, &[(gpa(place_of(queue, at)), 8, true)]);
    queue.offer(pages, at);
}

/// The sums that were told since the last call.
#[track_caller]
fn told(pages: &Pages, queue: &mut Queue) -> Vec<u64> {
    let used = queue.used(pages);
    let sum = |(head, len): &(u32, u32)| {
        assert_got!(*len, 8);
        let bytes = pages.bytes(place_of(queue, *head as u16), 8);
        u64::from_le_bytes(bytes.try_into().expect("8 bytes"))
    };
    used.iter().map(sum).collect()
}

/// Each is served when it is notified, and not when the other one is; a reset is one of both.
fn two_queues_are_served() {
    let seed = number_from_env("KVM_BPF_SEED", 1);
    let mut random = Random::new(seed);
    let mut setup = Setup::new(test_image("virtio_two"));
    for (index, num_max) in [(ADD, NUM), (TELL, NUM), (2, 0)] {
        setup.registers.set(QUEUE_SEL, index);
        assert_got!(setup.registers.get(QUEUE_NUM_MAX), u32::from(num_max));
    }
    let [mut adds, mut tells] = start_two(&mut setup);
    let (mut sum, mut waiting) = (0, Vec::new());
    let mut asked = 0;
    for round in 0..200 {
        let what = format!("round {round} of seed {seed}");
        let pages = &setup.pages;
        for _ in 0..random.below(4) {
            if waiting.len() < NUM.into() {
                let number = random.next();
                add(pages, &mut adds, number, 8);
                waiting.push(number);
            }
            if asked < NUM {
                tell(pages, &mut tells);
                asked += 1;
            }
        }
        let index = random.below(3) as u32;
        setup.registers.set(QUEUE_NOTIFY, index);
        let (mut added, mut was_told) = (0, Vec::new());
        if index == ADD {
            added = waiting.len();
            sum = waiting.drain(..).fold(sum, u64::wrapping_add);
        } else if index == TELL {
            was_told = vec![sum; asked.into()];
            asked = 0;
        }
        assert_got!(adds.used(&setup.pages).len(), added, "{what}");
        assert_got!(told(&setup.pages, &mut tells), was_told, "{what}");
        let wanted = u32::from(added + was_told.len() > 0);
        assert_got!(setup.interrupts(), (wanted.into(), wanted), "{what}");
    }

    // One with more than the budget does not keep the other from being served.
    setup.device.device().unset_irq(1).expect("no doorbell");
    let [mut adds, mut tells] = start_two(&mut setup);
    for _ in 0..NUM {
        add(&setup.pages, &mut adds, 1, 4096);
    }
    setup.registers.set(QUEUE_NOTIFY, ADD);
    assert_got!(adds.used(&setup.pages).len(), ADD_BUDGET);
    tell(&setup.pages, &mut tells);
    setup.registers.set(QUEUE_NOTIFY, TELL);
    let sum = sum.wrapping_add(ADD_BUDGET as u64);
    assert_got!(told(&setup.pages, &mut tells), [sum]);
    assert_got!(adds.used(&setup.pages), []);
    let rest = usize::from(NUM) - ADD_BUDGET;
    assert!(setup.device.run("queues", 0).expect("a run"), "no program");
    assert_got!(adds.used(&setup.pages).len(), rest);

    // What one driver does wrong ends both.
    adds.set(&setup.pages, 0, descriptor(gpa(END), 8, 0, 0));
    adds.offer(&setup.pages, 0);
    tell(&setup.pages, &mut tells);
    setup.registers.set(QUEUE_NOTIFY, ADD);
    setup.registers.set(QUEUE_NOTIFY, TELL);
    let status = good_status() | NEEDS_RESET;
    assert_got!(setup.registers.get(STATUS), status);
    assert_got!(tells.used(&setup.pages), []);
    setup.registers.reset();
    for index in [ADD, TELL] {
        setup.registers.set(QUEUE_SEL, index);
        assert_got!(setup.registers.get(QUEUE_READY), 0);
    }
    let [mut adds, mut tells] = start_two(&mut setup);
    add(&setup.pages, &mut adds, 5, 8);
    tell(&setup.pages, &mut tells);
    setup.registers.set(QUEUE_NOTIFY, ADD);
    setup.registers.set(QUEUE_NOTIFY, TELL);
    assert_got!(adds.used(&setup.pages).len(), 1);
    let sum = sum.wrapping_add(5 + rest as u64);
    assert_got!(told(&setup.pages, &mut tells), [sum]);
    setup.assert_edges_untouched();
}

/// At the same time: neither loses a request, and sums only grow.
fn two_vcpus_use_a_queue_each() {
    let rounds = number_from_env("KVM_BPF_ACCESSES", 4000) / 4;
    let mut setup = Setup::new(test_image("virtio_two"));
    let second = Registers(setup.guest.vcpu(1));
    let [mut adds, mut tells] = start_two(&mut setup);
    let (first, pages) = (setup.registers, &setup.pages);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut registers = first;
            for round in 0..rounds {
                add(pages, &mut adds, 1, 4096);
                registers.set(QUEUE_NOTIFY, ADD);
                let wanted = adds.next;
                wait_for("numbers that are added", wanted, || adds.used_index(pages));
                assert_got!(adds.used(pages).len(), 1, "round {round}");
            }
        });
        scope.spawn(|| {
            let mut registers = second;
            let mut last = 0;
            for round in 0..rounds {
                tell(pages, &mut tells);
                registers.set(QUEUE_NOTIFY, TELL);
                let wanted = tells.next;
                wait_for("a sum", wanted, || tells.used_index(pages));
                let [sum] = told(pages, &mut tells)[..] else {
                    panic!("round {round}: wanted one sum");
                };
                assert!(sum >= last, "round {round}: {sum} after {last}");
                last = sum;
            }
        });
    });
    let sum = element(setup.device.programs(), "sum");
    assert_got!(sum[..8], rounds.to_ne_bytes());
}

/// With requests in both that nobody has looked at.
fn two_queues_move() {
    let mut setup = Setup::new(test_image("virtio_two"));
    let mut queues = start_two(&mut setup);
    let [adds, tells] = &mut queues;
    setup.device.device().unset_irq(1).expect("no doorbell");
    for _ in 0..NUM {
        add(&setup.pages, adds, 1, 4096);
    }
    setup.registers.set(QUEUE_NOTIFY, ADD);
    assert_got!(adds.used(&setup.pages).len(), ADD_BUDGET);
    let state = setup.device.save().expect("a state");
    tell(&setup.pages, tells);
    setup.registers.set(QUEUE_NOTIFY, TELL);
    assert_got!(tells.used(&setup.pages), []);
    // Now with this one.
    setup.device.resume().expect("a run");
    let later = setup.device.save().expect("a state");
    for (state, has_both) in [(&state, false), (&later, true)] {
        let mut other = Setup::new(test_image("virtio_two"));
        store(&other.pages, 0, &setup.pages.bytes(0, PAGES * PAGE));
        other.device.restore(state).expect("the state");
        let [mut adds, mut tells] = queues.clone();
        let added = adds.next;
        wait_for("the rest of the numbers", added, || {
            adds.used_index(&other.pages)
        });
        assert_got!(adds.used(&other.pages).len(), usize::from(NUM) - ADD_BUDGET);
        if !has_both {
            other.registers.set(QUEUE_NOTIFY, TELL);
        }
        let asked = tells.next;
        wait_for("a sum", asked, || tells.used_index(&other.pages));
        let [sum] = told(&other.pages, &mut tells)[..] else {
            panic!("wanted one sum");
        };
        assert!((ADD_BUDGET as u64..=NUM.into()).contains(&sum), "{sum}");
        wait_for("an interrupt", true, || other.interrupts().0 > 0);
        let sum = element(other.device.programs(), "sum");
        assert_got!(sum[..8], u64::from(NUM).to_ne_bytes());
    }
}
