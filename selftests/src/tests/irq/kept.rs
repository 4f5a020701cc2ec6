// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Interrupts that programs keep, in maps and as references.

use std::os::fd::AsRawFd;
use std::thread::sleep;
use std::time::{Duration, Instant};

use Reg::{R0, R1, R2, R6, R7, R10};
use kvm_bpf::Programs;
use kvm_bpf::uapi::KVM_DEV_BPF_MAX_IRQS;
use kvm_bpf_selftests::bpf::{
    Index, Insn, LOADERS, LoadOptions, Map, Prog, ProgType, Reg, add_imm, call_kfunc, jump_if_ne,
    load, lookup, mov, mov_imm, mov_signed32, store, store_imm,
};
use kvm_bpf_selftests::device::{Device, region};
use kvm_bpf_selftests::guest::{Guest, Vcpu};
use kvm_bpf_selftests::harness::wait_for;
use kvm_bpf_selftests::programs::{CTX_BUF, ret, test_image};
use vmm_sys_util::eventfd::EventFd;

use super::super::kfunc::required;
use super::super::lifetime::Unloaded;
use super::super::{ADDR, SIZE, assert_refused, element, eventfd, taken};
use super::{ACQUIRE, RELEASE, SIGNAL_KEPT, call_with_context, id_of, is_free};

/// The device of `progs/irq_object.bpf.c`, of which a test needs the parts.
struct Kept {
    guest: Guest,
    device: Device,
    image: Programs,
}

/// Commands: offsets of its registers.
const KEEP: u64 = 0x0;
const FIRE: u64 = 0x4;
const FIRE_LATER: u64 = 0x8;
const GIVE_UP: u64 = 0xc;

/// Its result where there is no interrupt to keep or to signal.
const NO_IRQ: i64 = -1000;
/// A timer's delay that leaves a test time to act first.
const LONG: Duration = Duration::from_secs(2);

impl Kept {
    fn new() -> Self {
        let guest = Guest::new();
        let image = test_image("irq_object").load();
        let image = image.unwrap_or_else(|error| panic!("loading irq_object: {error:#?}"));
        let device = Device::new(guest.vm());
        let write = image.write_program().expect("its write program");
        let region = kvm_bpf::uapi::kvm_bpf_user_region {
            addr: ADDR,
            size: SIZE,
            bpf_readfd: -1,
            bpf_writefd: write.as_raw_fd(),
        };
        device.set_region(0, &region);
        Kept {
            guest,
            device,
            image,
        }
    }

    /// One that has kept interrupt 0, whose eventfd is this.
    fn with_irq() -> (Self, Vcpu, EventFd) {
        let kept = Kept::new();
        let mut vcpu = kept.guest.vcpu(0);
        let eventfd = eventfd();
        kept.device.set_irq(0, eventfd.as_raw_fd());
        assert_got!(kept.command(&mut vcpu, KEEP, 0), 0);
        (kept, vcpu, eventfd)
    }

    /// Has a timer signal what is kept.
    #[track_caller]
    fn fire_after(&self, vcpu: &mut Vcpu, delay: Duration) {
        let delay = delay.as_nanos() as u64;
        assert_got!(self.command(vcpu, FIRE_LATER, delay), 0);
    }

    /// Has the guest write a command; returns the program's result.
    fn command(&self, vcpu: &mut Vcpu, command: u64, value: u64) -> i64 {
        assert_got!(vcpu.write(ADDR + command, 4, value), []);
        answer(&self.image).0
    }
}

/// The last result, and how often the timer's callback ran.
fn answer(image: &Programs) -> (i64, u64) {
    let value = element(image, "kept");
    let word = |at: usize| u64::from_ne_bytes(value[at..at + 8].try_into().expect("8 bytes"));
    let end = value.len();
    (word(end - 16) as i64, word(end - 8))
}

pub(super) fn kept_irq_is_signalled() {
    let kept = Kept::new();
    let mut vcpu = kept.guest.vcpu(0);
    let (first, second) = (eventfd(), eventfd());
    kept.device.set_irq(0, first.as_raw_fd());
    kept.device.set_irq(255, second.as_raw_fd());
    assert_got!(
        kept.command(&mut vcpu, FIRE, 0),
        NO_IRQ,
        "before it is kept"
    );
    assert_got!(kept.command(&mut vcpu, KEEP, 0), 0);
    assert_got!(kept.command(&mut vcpu, FIRE, 0), 0);
    assert_got!((taken(&first), taken(&second)), (1, 0));
    assert_got!(kept.command(&mut vcpu, KEEP, 255), 0);
    assert_got!(kept.command(&mut vcpu, FIRE, 0), 0);
    assert_got!((taken(&first), taken(&second)), (0, 1));
    // It is the interrupt that is kept, not its eventfd of the time.
    kept.device.set_irq(255, first.as_raw_fd());
    assert_got!(kept.command(&mut vcpu, FIRE, 0), 0);
    assert_got!((taken(&first), taken(&second)), (1, 0));
    assert_got!(kept.command(&mut vcpu, GIVE_UP, 0), 0);
    assert_got!(
        kept.command(&mut vcpu, FIRE, 0),
        NO_IRQ,
        "after it is given up"
    );
}

pub(super) fn kept_irq_is_signalled_by_a_timer() {
    let (kept, mut vcpu, eventfd) = Kept::with_irq();
    for round in 1..=5 {
        kept.fire_after(&mut vcpu, Duration::from_millis(1));
        // No vCPU runs now.
        wait_for("the timer", round, || answer(&kept.image).1);
        assert_got!(answer(&kept.image).0, 0, "the callback's result");
        assert_got!(taken(&eventfd), 1);
    }
}

/// Writing an array's element cancels its timer and leaves the interrupt that it keeps.
pub(super) fn kept_irq_and_a_state_that_is_restored() {
    let (kept, mut vcpu, eventfd) = Kept::with_irq();
    kept.fire_after(&mut vcpu, LONG);

    let map = kept.image.map("kept").expect("the program's map");
    let state = element(&kept.image, "kept");
    map.update(&[0; 4], &state).expect("BPF_MAP_UPDATE_ELEM");
    sleep(2 * LONG);
    assert_got!(answer(&kept.image).1, 0, "callbacks of the timer");
    assert_got!(taken(&eventfd), 0);
    assert_got!(kept.command(&mut vcpu, FIRE, 0), 0, "what is kept still");
    assert_got!(taken(&eventfd), 1);
}

pub(super) fn kept_irq_that_there_is_not() {
    let kept = Kept::new();
    let mut vcpu = kept.guest.vcpu(0);
    for irq in [KVM_DEV_BPF_MAX_IRQS, 1 << 31, u32::MAX.into()] {
        assert_got!(kept.command(&mut vcpu, KEEP, irq), NO_IRQ, "irq {irq}");
    }
    // One without an eventfd may be kept, and gets one later.
    let eventfd = eventfd();
    assert_got!(kept.command(&mut vcpu, KEEP, 7), 0);
    let answer = kept.command(&mut vcpu, FIRE, 0);
    assert_got!(answer, -i64::from(libc::ENOENT), "without an eventfd");
    kept.device.set_irq(7, eventfd.as_raw_fd());
    assert_got!(kept.command(&mut vcpu, FIRE, 0), 0);
    assert_got!(taken(&eventfd), 1);
}

/// What a program has kept outlives the device, but signals nothing any more.
pub(super) fn kept_irq_outlives_the_device() {
    let (kept, mut vcpu, eventfd) = Kept::with_irq();
    kept.fire_after(&mut vcpu, LONG);
    let Kept {
        guest,
        device,
        image,
    } = kept;
    drop(device);
    assert_got!(
        answer(&image),
        (0, 0),
        "the timer ran too early for this test"
    );
    assert_got!(
        vcpu.write(ADDR + FIRE, 4, 0).len(),
        1,
        "exits without device"
    );
    drop((guest, vcpu));
    wait_for("the timer", 1, || answer(&image).1);
    assert_got!(answer(&image).0, -i64::from(libc::ENOENT));
    assert_got!(taken(&eventfd), 0);
}

/// Where KVM is a module, so is the device; but what a program has kept, and the program, is
/// not of it, and does not hold it.
pub(super) fn kept_irq_outlives_the_module() {
    let (kept, mut vcpu, eventfd) = Kept::with_irq();
    let id = id_of(&eventfd);
    drop(eventfd);
    kept.fire_after(&mut vcpu, 2 * LONG);
    let Kept {
        guest,
        device,
        image,
    } = kept;
    drop((device, vcpu, guest));
    wait_for("the eventfd to be free", true, || is_free(id));

    let unloaded = Unloaded::new();
    let early = "the timer ran too early for this test";
    assert_got!(answer(&image), (0, 0), early);
    wait_for("the timer", 1, || answer(&image).1);
    assert_got!(answer(&image).0, -i64::from(libc::ENOENT));
    // The map's reference is the last; a worker and RCU take a moment to free what it is of.
    drop(image);
    sleep(LONG);
    drop(unloaded);
    drop(Device::new(Guest::new().vm()));
}

/// By a map that goes away with its timer armed, after the device and before it; that nothing
/// leaks shows on a kernel with kmemleak.
pub(super) fn kept_irq_is_released() {
    for device_first in [true, false] {
        let (kept, mut vcpu, eventfd) = Kept::with_irq();
        kept.fire_after(&mut vcpu, LONG);
        let armed = Instant::now();
        let Kept {
            guest: _guest,
            device,
            image,
        } = kept;
        // When user space drops its last reference to a map, its timers are cancelled.
        let late = "the timer may have run, too early for this test";
        if device_first {
            drop(device);
            drop(image);
            assert!(armed.elapsed() < LONG, "{late}");
        } else {
            drop(image);
            assert!(armed.elapsed() < LONG, "{late}");
            sleep(LONG);
            drop(device);
        }
        sleep(LONG);
        assert_got!(taken(&eventfd), 0, "device first: {device_first}");
    }
}

pub(super) fn kept_irq_must_be_released() {
    let mut insns = vec![mov_imm(R2, 0)];
    insns.extend(call_with_context(ACQUIRE));
    insns.extend(ret(0));
    let answer = Prog::try_load(ProgType::WRITE, &insns, LoadOptions::default());
    assert_refused("a leaked interrupt", answer, "Unreleased reference");
}

/// Nor is one good for more than it is, or for longer.
pub(super) fn kept_irq_cannot_be_forged() {
    let map = Map::new(1, 4);
    let mut value = lookup(&map, Index::Imm(0));
    value.push(mov(R1, R0));
    let stack = vec![
        store_imm(8, R10, -8, 0),
        store_imm(8, R10, -16, 0),
        mov(R1, R10),
        add_imm(R1, -16),
    ];
    let kernel = vec![call_kfunc(required("bpf_cast_to_kern_ctx")), mov(R1, R0)];
    let mut acquired = vec![mov_imm(R2, 0)];
    acquired.extend(call_with_context(ACQUIRE));
    acquired.push(jump_if_ne(R0, 0, 2));
    acquired.extend(ret(0));
    acquired.extend([mov(R6, R0), mov(R1, R0)]);
    let mut part = acquired.clone();
    part.push(add_imm(R1, 8));
    let mut released = acquired;
    released.extend([call_kfunc(required(RELEASE)), mov(R1, R6)]);

    let unowned = "release expects referenced PTR_TO_BTF_ID";
    let cases: [(&str, Vec<Insn>, &str, &str); 7] = [
        (
            "the stack",
            stack,
            "is fp expected STRUCT bpf_kvm_irq",
            unowned,
        ),
        (
            "a map's value",
            value,
            "is map_value expected STRUCT bpf_kvm_irq",
            unowned,
        ),
        (
            "a number",
            vec![mov_imm(R1, 4096)],
            "is scalar expected STRUCT bpf_kvm_irq",
            unowned,
        ),
        (
            "the context",
            Vec::new(),
            "is ctx expected STRUCT bpf_kvm_irq",
            unowned,
        ),
        (
            "what the kernel has instead of the context",
            kernel,
            "has a pointer to STRUCT bpf_kvm_io_ctx_kern",
            unowned,
        ),
        (
            "part of an interrupt",
            part,
            "expected pointer to STRUCT bpf_kvm_irq",
            "must have zero offset",
        ),
        (
            "one that is released",
            released,
            "R6 !read_ok",
            "R6 !read_ok",
        ),
    ];
    for (what, start, no_signal, no_release) in cases {
        for (kfunc, reason) in [(SIGNAL_KEPT, no_signal), (RELEASE, no_release)] {
            let mut insns = start.clone();
            insns.push(call_kfunc(required(kfunc)));
            insns.extend(ret(0));
            let answer = Prog::try_load(ProgType::WRITE, &insns, LoadOptions::default());
            assert_refused(&format!("{kfunc} of {what}"), answer, reason);
        }
    }
}

/// Where RCU does not protect it, a program needs a reference of its own.
pub(super) fn kept_irq_is_not_for_sleepable_programs() {
    let Err(error) = test_image("irq_object_sleepable").load() else {
        panic!("wanted a refusal of what RCU does not protect, but it loads");
    };
    let error = format!("{error:#?}");
    let reason = "must be a rcu pointer";
    assert!(error.contains(reason), "wanted {reason:?}, got {error}");
}

/// And with one, it may signal the interrupt.
pub(super) fn acquired_irq_is_signalled() {
    let results = Map::new(1, 1);
    let mut insns = vec![load(4, R2, R1, CTX_BUF)];
    insns.extend(call_with_context(ACQUIRE));
    insns.push(jump_if_ne(R0, 0, 2));
    insns.extend(ret(1));
    insns.extend([
        mov(R6, R0),
        mov(R1, R0),
        call_kfunc(required(SIGNAL_KEPT)),
        mov_signed32(R7, R0),
        mov(R1, R6),
        call_kfunc(required(RELEASE)),
    ]);
    insns.extend(lookup(&results, Index::Imm(0)));
    insns.push(store(8, R0, 0, R7));
    insns.extend(ret(0));
    for load_prog in LOADERS {
        let guest = Guest::new();
        let mut vcpu = guest.vcpu(0);
        let device = Device::new(guest.vm());
        let write = load_prog(ProgType::WRITE, &insns);
        device.set_region(0, &region(ADDR, SIZE, None, Some(&write)));
        let eventfd = eventfd();
        for (set, wanted) in [(false, -i64::from(libc::ENOENT)), (true, 0)] {
            if set {
                device.set_irq(255, eventfd.as_raw_fd());
            }
            results.set(0, &[0x5555]);
            assert_got!(vcpu.write(ADDR, 4, 255), []);
            assert_got!(results.get(0)[0] as i64, wanted, "with an eventfd: {set}");
            assert_got!(taken(&eventfd), u64::from(set), "with an eventfd: {set}");
        }
        assert_got!(vcpu.write(ADDR, 4, 256).len(), 1, "exits: no such irq");
    }
}
