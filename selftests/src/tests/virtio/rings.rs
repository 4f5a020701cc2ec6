// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Rings that no driver writes: made by hand, and at random against a model.

use super::model::{Disk, Model};
use super::*;

/// Rings that no driver makes, of both devices where it is theirs.
pub(super) fn bad_rings_need_a_reset() {
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
pub(super) fn random_rings_as_the_model_says() {
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
