// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Programs swapped while several vCPUs use them without a pause; and those that the library
//! does not take for a device that has others.
//!
//! `KVM_BPF_SWAPS` sets how often; emulation needs a smaller number than hardware.

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use Reg::{R0, R1, R6, R7};
use kvm_bpf::device::Error;
use kvm_bpf::{OnLoss, OpenImage};
use kvm_bpf_selftests::bpf::{
    Census, Index, Load, Map, Prog, ProgType, Reg, atomic_add, jump_if_ge, load, lookup, mov,
    mov_imm, store_imm,
};
use kvm_bpf_selftests::device::{Device, region};
use kvm_bpf_selftests::guest::{Args, Guest, Routine};
use kvm_bpf_selftests::harness::{meanwhile, number_from_env, trial_within, unpaused, wait_for};
use kvm_bpf_selftests::programs::{
    CTX_BUF, CTX_VCPU_ID, plug, ret, sample, sample_path, test_image,
};
use libtest_mimic::Trial;

use super::{ADDR, PATTERN, SIZE};

const VCPUS: u32 = 4;
const BATCH: u64 = 100;

pub(super) fn all() -> Vec<Trial> {
    let limit = Duration::from_secs(300 + swaps() / 20);
    let tests: [(&str, fn()); 5] = [
        ("swap::hot_swap", hot_swap),
        ("swap::sleepable_for_sleepable", sleepable_for_sleepable),
        (
            "swap::sleepable_for_non_sleepable",
            sleepable_for_non_sleepable,
        ),
        ("swap::both_programs_at_once", both_programs_at_once),
        ("swap::another_device_is_refused", another_device_is_refused),
    ];
    tests
        .map(|(name, test)| trial_within(name, limit, test))
        .into()
}

fn swaps() -> u64 {
    number_from_env("KVM_BPF_SWAPS", 1000)
}

fn hot_swap() {
    swap_under_load([Prog::load, Prog::load]);
}

fn sleepable_for_sleepable() {
    swap_under_load([Prog::load_sleepable, Prog::load_sleepable]);
}

fn sleepable_for_non_sleepable() {
    swap_under_load([Prog::load, Prog::load_sleepable]);
}

/// Programs that are told apart by the value that they store, and a count of their writes.
struct Pair {
    load: Load,
    byte: u8,
    writes: Map,
}

impl Pair {
    fn new(load: Load, byte: u8) -> Self {
        Pair {
            load,
            byte,
            writes: Map::new(1, 1),
        }
    }

    /// What the guest reads.
    fn answer(&self) -> u64 {
        u64::from_ne_bytes([self.byte; 8])
    }

    fn load(&self) -> [Prog; 2] {
        // A byte at a time, so that a mixture of two programs would show.
        let mut read: Vec<_> = (0..8)
            .map(|offset| store_imm(1, R1, CTX_BUF + offset, self.byte.into()))
            .collect();
        read.extend(ret(0));

        let mut write = lookup(&self.writes, Index::Imm(0));
        write.extend([mov_imm(R1, 1), atomic_add(8, R0, 0, R1)]);
        write.extend(ret(0));

        [
            (self.load)(ProgType::READ, &read),
            (self.load)(ProgType::WRITE, &write),
        ]
    }
}

/// Every read gets the value of one pair, every write runs one program once,
/// nothing reaches user space, nothing leaks.
fn swap_under_load(load: [Load; 2]) {
    let census = Census::now();
    let swaps = swaps();

    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let pairs = [Pair::new(load[0], 0x5a), Pair::new(load[1], 0xc3)];
    let programs = pairs.each_ref().map(Pair::load);
    let set = |[read, write]: &[Prog; 2]| {
        device.set_region(0, &region(ADDR, SIZE, Some(read), Some(write)));
    };
    set(&programs[0]);

    let args = Args {
        value: 1,
        addr: ADDR,
        count: BATCH,
        pair: pairs.each_ref().map(Pair::answer),
    };
    let written = AtomicU64::new(0);
    let workers = (0..VCPUS).map(|id| {
        let mut vcpu = guest.vcpu(id);
        let written = &written;
        move || {
            let (results, exits) = vcpu.call(Routine::Hammer, args);
            assert_got!(exits, [], "exits of vCPU {id}");
            assert!(
                results.count == 0,
                "vCPU {id}: wanted an answer of {:x?}, got {:#x}",
                args.pair,
                results.value
            );
            written.fetch_add(BATCH, SeqCst);
        }
    });
    meanwhile(workers, || {
        for swap in 1..=swaps {
            let side = (swap % 2) as usize;
            if swap % 15 == 0 {
                // Programs that only the region holds: the next swap frees them.
                set(&pairs[side].load());
            } else {
                set(&programs[side]);
            }
        }
    });

    let counts = pairs.each_ref().map(|pair| pair.writes.get(0)[0]);
    let written = written.into_inner();
    assert_got!(counts[0] + counts[1], written, "writes that ran a program");
    assert!(
        counts.iter().all(|&count| count > 0),
        "wanted both pairs to be used, got {counts:?} writes"
    );

    drop((device, programs, pairs));
    census.wait_for_newer(0, 0);
}

/// Both programs of a generation: they look which was the last that the vCPU met, count it if that
/// was a later one, and leave their own number.
fn generation(last: &Map, too_late: &Map, number: i32) -> [Prog; 2] {
    [ProgType::READ, ProgType::WRITE].map(|kind| {
        let mut insns = vec![mov(R6, R1), load(4, R7, R6, CTX_VCPU_ID)];
        insns.extend(lookup(last, Index::Reg(R7)));
        insns.extend([
            load(8, R7, R0, 0),
            store_imm(8, R0, 0, number),
            mov_imm(R1, number),
            // Skips what follows if the last was no later than this.
            jump_if_ge(R1, R7, lookup(too_late, Index::Imm(0)).len() as i16 + 2),
        ]);
        insns.extend(lookup(too_late, Index::Imm(0)));
        insns.extend([mov_imm(R1, 1), atomic_add(8, R0, 0, R1)]);
        insns.extend(ret(0));
        Prog::load(kind, &insns)
    })
}

/// Once a vCPU has met one program of a new pair, it does not meet any of an old one: the two of a
/// pair are never swapped one after the other.
fn both_programs_at_once() {
    const GENERATIONS: i32 = 300;

    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let (last, too_late) = (Map::new(VCPUS, 1), Map::new(1, 1));
    // From 1: an element that no program has met is 0.
    let programs: Vec<_> = (1..=GENERATIONS)
        .map(|number| generation(&last, &too_late, number))
        .collect();
    let set = |[read, write]: &[Prog; 2]| {
        device.set_region(0, &region(ADDR, SIZE, Some(read), Some(write)));
    };
    set(&programs[0]);

    let workers = (0..VCPUS).map(|id| {
        let mut vcpu = guest.vcpu(id);
        move || {
            let args = Args {
                addr: ADDR,
                count: BATCH,
                ..Default::default()
            };
            let (results, exits) = vcpu.call(Routine::Hammer, args);
            assert_got!((results.count, exits), (0, vec![]), "vCPU {id}");
        }
    });
    meanwhile(workers, || {
        for (number, pair) in (1..).zip(&programs) {
            set(pair);
            // Whatever the speed: all vCPUs run while the pairs are swapped.
            if number % 30 == 0 {
                wait_for("all vCPUs to meet the newest pair", true, || {
                    (0..VCPUS).all(|id| last.get(id)[0] == number)
                });
            }
        }
    });
    assert_got!(too_late.get(0)[0], 0, "accesses that ran an old program");
}

/// The same programs with a note that differs in one field are not the same device, opened or
/// loaded; the running one goes on as it was, and can be replaced by what is.
fn another_device_is_refused() {
    const VERSION: u64 = ADDR + 0x4;
    const SCRATCH: u64 = ADDR + 0x8;
    /// The note's owner and the start of its description: version 1.
    const NOTE: &[u8] = b"kvm-bpf\0\x01\0\0\0";
    const NR_IRQS: usize = 0;
    const MMIO_SIZE: usize = NR_IRQS + 4;
    const COMPATIBLE: usize = MMIO_SIZE + 8;

    let file = fs::read(sample_path("regbank")).expect("the register bank");
    let note = file.windows(NOTE.len()).position(|window| window == NOTE);
    let fields = note.expect("a note") + NOTE.len();

    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let mut device = plug(guest.vm(), ADDR, sample("regbank"));
    assert_got!(vcpu.write(SCRATCH, 8, PATTERN), []);
    let mut state = || {
        let (version, scratch) = (vcpu.read(VERSION, 4), vcpu.read(SCRATCH, 8));
        assert_got!((version.exits, scratch.exits), (vec![], vec![]));
        (version.value, scratch.value)
    };
    let running = device.programs().note().clone();
    assert_got!(state(), (1, PATTERN), "version and scratch");

    let census = Census::now();
    for (what, at) in [
        ("interrupts", NR_IRQS),
        ("size", MMIO_SIZE),
        ("compatible", COMPATIBLE),
    ] {
        let mut other = file.clone();
        other[fields + at] ^= 0x20;
        let open = || {
            OpenImage::open("regbank", &other)
                .unwrap_or_else(|error| panic!("{what}: wanted a valid file, got {error:#?}"))
        };
        let note = open().note().clone();
        // Loaded for a device that it is.
        let it = plug(guest.vm(), ADDR - note.mmio_size, open());
        let loaded = it.load(open(), OnLoss::Refuse);
        let loaded = loaded.unwrap_or_else(|error| panic!("{what}: {error:#?}"));
        for (how, result) in [
            ("replace", device.replace(open(), OnLoss::Refuse, unpaused)),
            ("swap", device.swap(loaded, OnLoss::Refuse, unpaused)),
        ] {
            match result {
                Err(Error::OtherDevice { running: old, new })
                    if *old == running && *new == note => {}
                result => panic!("{how}, another {what}: wanted OtherDevice, got {result:?}"),
            }
        }
        drop(it);
        assert_got!(
            device.programs().note(),
            &running,
            "the note, another {what}"
        );
        assert_got!(state(), (1, PATTERN), "version and scratch, another {what}");
        census.wait_for_newer(0, 0);
    }

    device
        .replace(test_image("regbank_v2"), OnLoss::Refuse, unpaused)
        .unwrap_or_else(|error| panic!("wanted the next version to do, got {error:#?}"));
    assert_got!(state(), (2, PATTERN), "version and scratch");
}
