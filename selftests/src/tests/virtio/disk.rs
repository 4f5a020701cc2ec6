// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Disks, and what a guest may ask of them.

use super::*;

pub(super) fn a_disk_keeps_its_data() {
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
pub(super) fn a_disk_as_the_model_says() {
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

pub(super) fn a_disk_refuses() {
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

pub(super) fn two_guests_read_one_disk() {
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
