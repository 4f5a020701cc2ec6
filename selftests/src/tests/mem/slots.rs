// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Slots of memory behind the windows: read-only, deleted, moved, and with a log of dirty pages.

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY};
use kvm_bpf_selftests::guest::Guest;
use kvm_bpf_selftests::harness::{Random, meanwhile, skip};
use kvm_bpf_selftests::programs::{plug, test_image};

use super::super::ADDR;
use super::{By, PAGE, Pages, READ, START, Setup, WRITE, WRITE_NOFAULT, pattern, request, result};

pub(super) fn across_slots_and_holes() {
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

pub(super) fn read_only_slots() {
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

/// Nobody uses the memory of a slot that is not there any more.
pub(super) fn deleted_and_moved_slots() {
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
pub(super) fn slots_that_come_and_go() {
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
pub(super) fn dirty_pages_are_marked() {
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
pub(super) fn dirty_rings_without_bitmaps() {
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
