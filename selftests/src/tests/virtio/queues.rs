// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A device with two queues.

use super::*;

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
pub(super) fn two_queues_are_served() {
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
pub(super) fn two_vcpus_use_a_queue_each() {
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
pub(super) fn two_queues_move() {
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
