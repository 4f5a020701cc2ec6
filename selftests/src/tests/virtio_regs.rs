// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The registers of a virtio device that user space serves: what its programs take, what they
//! decline, and that neither side undoes what the other does to `InterruptStatus`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;

use kvm_bpf::{ImageDevice, Words};
use kvm_bpf_selftests::guest::{Args, Exit, Guest, PRESET, Routine, USER_ANSWER, Vcpu, mask};
use kvm_bpf_selftests::harness::number_from_env;
use kvm_bpf_selftests::programs::{loaded, plug, sample, sample_path};
use libbpf_rs::ObjectBuilder;
use vmm_sys_util::eventfd::EventFd;

use super::{ADDR, eventfd, taken};

tests!(
    words_of_a_map,
    status_is_the_word,
    only_acknowledged_bits_are_cleared,
    notifications_go_to_their_queue,
    all_else_is_declined,
    no_bit_is_lost,
    words_change_in_one_instruction,
);

const QUEUE_NOTIFY: u64 = ADDR + 0x50;
const INTERRUPT_STATUS: u64 = ADDR + 0x60;
const INTERRUPT_ACK: u64 = ADDR + 0x64;
/// Where the region ends.
const CONFIG: u64 = ADDR + 0x100;

struct Setup {
    vcpu: Vcpu,
    device: ImageDevice,
    words: Arc<Words>,
    _guest: Guest,
}

impl Setup {
    fn new() -> Self {
        let guest = Guest::new();
        let device = plug(guest.vm(), ADDR, sample("virtio_regs"));
        let map = device.programs().map("interrupt_status").expect("the map");
        Setup {
            vcpu: guest.vcpu(0),
            words: Arc::clone(map.words().expect("words of the map")),
            device,
            _guest: guest,
        }
    }

    fn set(&self, status: u32) {
        self.words
            .get(0)
            .expect("a word")
            .store(status.into(), SeqCst);
    }

    fn status(&self) -> u32 {
        self.words.get(0).expect("a word").load(SeqCst) as u32
    }

    fn queue(&self, index: u32) -> EventFd {
        let eventfd = eventfd();
        let set = self.device.device().set_irq(index, &eventfd);
        set.expect("the eventfd of a queue");
        eventfd
    }
}

fn words_of_a_map() {
    let setup = Setup::new();
    for (offset, there) in [(0, true), (4, false), (8, false), (1, false), (2, false)] {
        let got = setup.words.get(offset).is_some();
        assert_got!(got, there, "a word at byte {offset}");
    }
    let other = |device, map| {
        let image = loaded(sample(device));
        image.map(map).expect("its map").words().is_some()
    };
    // One that user space cannot map, and one that is no array.
    for (device, map) in [("virtio_blk", "disk_options"), ("uart16550", "output")] {
        assert_got!(other(device, map), false, "{device}: {map}");
    }
}

fn status_is_the_word() {
    let mut setup = Setup::new();
    for status in [0, 1, 2, 3, 0xf8e7_d6c5, 0] {
        setup.set(status);
        let read = setup.vcpu.read(INTERRUPT_STATUS, 4);
        assert_got!((read.value, read.exits), (status.into(), vec![]));
        assert_got!(setup.status(), status, "the word after a read");
    }
}

fn only_acknowledged_bits_are_cleared() {
    let mut setup = Setup::new();
    for (status, value, wanted) in [(3, 1, 2), (3, 2, 1), (3, 3, 0), (1, 2, 1), (3, 0, 3)] {
        setup.set(status);
        let exits = setup.vcpu.write(INTERRUPT_ACK, 4, value);
        assert_got!(exits, [], "exits of {value} to {status}");
        assert_got!(setup.status(), wanted, "{value} to {status}");
    }
}

/// A queue without an eventfd is the VMM's, which gets the number.
fn notifications_go_to_their_queue() {
    let mut setup = Setup::new();
    let queues = [0, 1, 255].map(|index| (index, setup.queue(index)));
    for (written, _) in &queues {
        let exits = setup.vcpu.write(QUEUE_NOTIFY, 4, (*written).into());
        assert_got!(exits, [], "exits of queue {written}");
        for (index, eventfd) in &queues {
            let wanted = u64::from(index == written);
            assert_got!(taken(eventfd), wanted, "signals of {index} by {written}");
        }
    }
    // The last has the number of a queue in its lower half.
    for other in [2, 254, 256, u32::MAX, 1 << 16] {
        let exits = setup.vcpu.write(QUEUE_NOTIFY, 4, other.into());
        assert_got!(exits, [Exit::Write(QUEUE_NOTIFY, 4, other.into())]);
    }
    for (index, eventfd) in &queues {
        assert_got!(taken(eventfd), 0, "signals of {index}");
    }
    setup.device.device().unset_irq(1).expect("unset_irq");
    let exits = setup.vcpu.write(QUEUE_NOTIFY, 4, 1);
    assert_got!(exits, [Exit::Write(QUEUE_NOTIFY, 4, 1)]);
    assert_got!(setup.status(), 0, "the word after notifications");
}

/// The registers that the programs do not serve, those that they do in the other direction or
/// width, and the configuration: once, with all that is written.
fn all_else_is_declined() {
    const VALUE: u64 = 0x0403_0201;

    let mut setup = Setup::new();
    let queue = setup.queue(0);
    let status = 0xf8e7_d6c5;
    setup.set(status);
    for width in [1, 2, 4, 8] {
        for addr in (ADDR..CONFIG + 0x10).step_by(width) {
            if (addr, width) != (INTERRUPT_STATUS, 4) {
                let read = setup.vcpu.read(addr, width);
                assert_got!(read.exits, [Exit::Read(addr, width)]);
                assert_got!(read.value, USER_ANSWER & mask(width));
            }
            if width != 4 || (addr != QUEUE_NOTIFY && addr != INTERRUPT_ACK) {
                let value = PRESET << 32 | VALUE;
                let exits = setup.vcpu.write(addr, width, value);
                assert_got!(exits, [Exit::Write(addr, width, value & mask(width))]);
            }
        }
    }
    assert_got!(setup.status(), status, "the word");
    assert_got!(taken(&queue), 0, "signals");
}

/// One side sets and clears a bit while the other acknowledges another one.
/// `KVM_BPF_ACCESSES` sets how often.
fn no_bit_is_lost() {
    const VMMS: u64 = 2;
    const GUESTS: u64 = 1;

    let mut setup = Setup::new();
    let count = number_from_env("KVM_BPF_ACCESSES", 5000);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let words = &setup.words;
        let over = &over;
        let user = scope.spawn(move || {
            let word = words.get(0).expect("a word");
            let mut lost = 0_u64;
            while !over.load(SeqCst) {
                word.fetch_or(VMMS | GUESTS, SeqCst);
                lost += u64::from((0..8).any(|_| word.load(SeqCst) & VMMS == 0));
                word.fetch_and(!VMMS, SeqCst);
                lost += u64::from((0..8).any(|_| word.load(SeqCst) & VMMS != 0));
            }
            lost
        });
        let args = Args {
            value: GUESTS,
            addr: INTERRUPT_ACK,
            count,
            ..Default::default()
        };
        let (results, exits) = setup.vcpu.call(Routine::WriteLoop, args);
        over.store(true, SeqCst);
        assert_got!(exits, [], "exits of acknowledgements");
        assert_got!(results.count, 0, "rounds that are left");
        let lost = user.join().expect("the thread that sets bits");
        assert_got!(lost, 0, "bits of {count} acknowledgements that were lost");
    });
}

/// Emulated processors may share a thread, and then the accesses of both sides do not come in between
/// each other: so that one instruction changes the word has to be seen in the program.
fn words_change_in_one_instruction() {
    const CLASS: u8 = 7;
    const ST: u8 = 2;
    const STX: u8 = 3;
    /// `BPF_STX | BPF_ATOMIC | BPF_W`, and `BPF_AND | BPF_FETCH`.
    const ATOMIC: u8 = 0xc3;
    const FETCH_AND: i32 = 0x51;
    const STACK: u8 = 10;

    let mut builder = ObjectBuilder::default();
    let path = sample_path("virtio_regs");
    let object = builder.open_file(path).expect("the object file");
    let program = object
        .progs()
        .find(|program| program.name() == "virtio_regs_write");
    let program = program.expect("the write program");
    let stores: Vec<_> = program
        .insns()
        .iter()
        .filter(|insn| matches!(insn.code & CLASS, ST | STX) && insn.dst_reg() != STACK)
        .map(|insn| (insn.code, insn.imm))
        .collect();
    assert_got!(stores, [(ATOMIC, FETCH_AND)], "what stores to the map");
}
