// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Resets, of devices that serve requests too.

use super::*;

pub(super) fn reset_forgets_all() {
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
pub(super) fn reset_in_the_middle() {
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
