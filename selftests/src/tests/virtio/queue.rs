// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A queue in use: by two vCPUs, beyond a budget, while it moves and while programs change.

use super::*;

/// Each adds requests and notifies, at the same time, and then nobody does any more: all
/// requests are done, once, also those which one of them has left to the other.
pub(super) fn two_vcpus_lose_no_request() {
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

pub(super) fn the_rest_of_a_budget_is_done_later() {
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
pub(super) fn a_queue_in_use_moves() {
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

pub(super) fn programs_change_under_a_queue() {
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
