// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Allocations that fail: each call fails as a whole, or not at all, and nothing leaks.
//!
//! For a kernel with failslab (`CONFIG_FAILSLAB`), which fails the n-th allocation of a thread.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use kvm_bpf::uapi::kvm_bpf_user_irq;
use kvm_bpf_selftests::bpf::{
    Census, Index, Map, Prog, ProgType, Reg, atomic_add, lookup, mov_imm,
};
use kvm_bpf_selftests::device::{Answer, Device, NO_REGION, region, work};
use kvm_bpf_selftests::guest::Guest;
use kvm_bpf_selftests::harness::{Errno, skip, wait_for};
use kvm_bpf_selftests::programs::{answer as constant, ret};
use vmm_sys_util::eventfd::EventFd;

use super::{ADDR, PATTERN, SIZE, assert_errno};

tests!(
    creating_a_device,
    registering_a_region,
    replacing_programs,
    unregistering_a_region,
    setting_an_irq_needs_no_memory,
    setting_work,
);

/// More than any of these calls allocates.
const ENOUGH: u32 = 200;

/// Runs `op` again and again, with the first, second, ... allocation of its call failing, until
/// the call has none of that number.
///
/// `op` prepares, hands its call to the injector, and checks what it did.
fn each_allocation(op: impl Fn(&Injector)) {
    let failslab = Path::new("/sys/kernel/debug/failslab");
    if !failslab.exists() {
        skip("this kernel has no CONFIG_FAILSLAB");
    }
    // Allocations that may sleep too; and no stack traces in the log.
    for (knob, value) in [("ignore-gfp-wait", "N"), ("verbose", "0")] {
        fs::write(failslab.join(knob), value).unwrap_or_else(|error| panic!("{knob}: {error}"));
    }
    let census = Census::now();
    for nth in 1..ENOUGH {
        let injector = Injector::new(nth);
        op(&injector);
        census.wait_for_newer(0, 0);
        if !injector.has_failed() {
            assert!(nth > 1, "the call has allocated nothing");
            println!("{} allocations failed in turn", nth - 1);
            return;
        }
    }
    panic!("there is no end of allocations");
}

/// Fails one allocation of the thread.
struct Injector {
    nth: u32,
    /// Opened before, as opening allocates.
    file: File,
    failed: std::cell::Cell<bool>,
}

impl Injector {
    fn new(nth: u32) -> Self {
        let file = File::options()
            .read(true)
            .write(true)
            .open("/proc/thread-self/fail-nth")
            .expect("/proc/thread-self/fail-nth");
        Injector {
            nth,
            file,
            failed: false.into(),
        }
    }

    fn set(&self, nth: u32) {
        let text = nth.to_string();
        self.file
            .write_all_at(text.as_bytes(), 0)
            .expect("fail-nth");
    }

    /// The one call whose allocations fail.
    fn call<T>(&self, call: impl FnOnce() -> T) -> T {
        self.set(self.nth);
        let result = call();
        let mut left = [0; 16];
        let len = self.file.read_at(&mut left, 0).expect("fail-nth");
        self.set(0);
        // The kernel counts down to 0, and fails that allocation.
        let left = String::from_utf8_lossy(&left[..len]);
        self.failed.set(left.trim() == "0");
        result
    }

    fn has_failed(&self) -> bool {
        self.failed.get()
    }

    /// Whether the call succeeded; it may fail for lack of memory only, and only if an
    /// allocation failed.
    #[track_caller]
    fn succeeded(&self, answer: &Answer) -> bool {
        match answer {
            Ok(()) => true,
            Err(Errno(libc::ENOMEM)) if self.has_failed() => false,
            Err(errno) => panic!("allocation {} of the call failed: got {errno:?}", self.nth),
        }
    }
}

fn creating_a_device() {
    each_allocation(|injector| {
        let guest = Guest::new();
        let device = injector.call(|| Device::try_new(guest.vm()));
        let answer = device.as_ref().map(|_| ()).map_err(|&errno| errno);
        injector.succeeded(&answer);
        // A device that there is works.
        if let Ok(device) = device {
            let mut vcpu = guest.vcpu(0);
            let prog = constant(PATTERN);
            device.set_region(0, &region(ADDR, SIZE, Some(&prog), None));
            assert_got!(vcpu.read(ADDR, 8).value, PATTERN);
        }
    });
}

fn registering_a_region() {
    each_allocation(|injector| {
        let guest = Guest::new();
        let mut vcpu = guest.vcpu(0);
        let device = Device::new(guest.vm());
        let prog = constant(PATTERN);
        let wanted = region(ADDR, SIZE, Some(&prog), None);
        let answer = injector.call(|| device.try_set_region(3, &wanted));
        if injector.succeeded(&answer) {
            assert_got!(vcpu.read(ADDR, 8).value, PATTERN);
        } else {
            assert_got!(vcpu.read(ADDR, 8).exits.len(), 1, "exits after ENOMEM");
            // Index and range are still free.
            device.set_region(3, &wanted);
            assert_got!(vcpu.read(ADDR, 8).value, PATTERN);
        }
    });
}

fn replacing_programs() {
    each_allocation(|injector| {
        let guest = Guest::new();
        let mut vcpu = guest.vcpu(0);
        let device = Device::new(guest.vm());
        let (old, new) = (constant(PATTERN), constant(!PATTERN));
        device.set_region(0, &region(ADDR, SIZE, Some(&old), None));
        let wanted = region(ADDR, SIZE, Some(&new), None);
        let answer = injector.call(|| device.try_set_region(0, &wanted));
        let value = if injector.succeeded(&answer) {
            !PATTERN
        } else {
            PATTERN
        };
        assert_got!(vcpu.read(ADDR, 8).value, value);
    });
}

/// It always succeeds. KVM's own bus may dissolve for lack of memory, and accesses of other
/// regions exit then; but it does not fall to pieces.
fn unregistering_a_region() {
    let dissolved = std::cell::Cell::new(false);
    each_allocation(|injector| {
        let guest = Guest::new();
        let mut vcpu = guest.vcpu(0);
        let device = Device::new(guest.vm());
        let prog = constant(PATTERN);
        device.set_region(0, &region(ADDR, SIZE, Some(&prog), None));
        device.set_region(1, &region(ADDR + SIZE, SIZE, Some(&prog), None));
        let answer = injector.call(|| device.try_set_region(0, &NO_REGION));
        assert_got!(answer, Ok(()));
        assert_got!(
            vcpu.read(ADDR, 8).exits.len(),
            1,
            "exits of the region that is gone"
        );
        let other = vcpu.read(ADDR + SIZE, 8);
        if !injector.has_failed() || other.exits.is_empty() {
            assert_got!(other.value, PATTERN);
            return;
        }
        // The bus has dissolved: a region cannot be had any more, nor changed, only removed.
        let again = region(ADDR + SIZE, SIZE, Some(&prog), None);
        assert_errno("replacing", device.try_set_region(1, &again), libc::ENOMEM);
        let new = region(ADDR, SIZE, Some(&prog), None);
        assert_errno("adding", device.try_set_region(2, &new), libc::ENOMEM);
        assert_errno("the one refused", device.region(2), libc::ENOENT);
        device.set_region(1, &NO_REGION);
        dissolved.set(true);
    });
    assert!(
        dissolved.get(),
        "wanted the bus to dissolve once, got never"
    );
}

fn setting_an_irq_needs_no_memory() {
    each_allocation(|injector| {
        let guest = Guest::new();
        let device = Device::new(guest.vm());
        let eventfd = EventFd::new(0).expect("eventfd");
        let irq = |fd| kvm_bpf_user_irq {
            eventfd: fd,
            flags: 0,
        };
        // The device that follows does allocate, so there is something to fail.
        let (set, detached, device) = injector.call(|| {
            (
                device.try_set_irq(0, &irq(eventfd.as_raw_fd())),
                device.try_set_irq(0, &irq(-1)),
                Device::try_new(guest.vm()).map(drop),
            )
        });
        assert_got!((set, detached), (Ok(()), Ok(())));
        injector.succeeded(&device);
    });
}

/// With an eventfd, so that it makes a thread.
fn setting_work() {
    each_allocation(|injector| {
        let guest = Guest::new();
        let device = Device::new(guest.vm());
        let eventfd = EventFd::new(0).expect("eventfd");
        let runs = Map::new(1, 1);
        let mut insns = lookup(&runs, Index::Imm(0));
        insns.extend([mov_imm(Reg::R1, 1), atomic_add(8, Reg::R0, 0, Reg::R1)]);
        insns.extend(ret(0));
        let prog = Prog::load(ProgType::WORK, &insns);
        let wanted = work(Some(&prog), Some(&eventfd));
        let answer = injector.call(|| device.try_set_work(0, &wanted));
        if !injector.succeeded(&answer) {
            // Index and eventfd are still free.
            assert_errno("running it", device.run(0, 0), libc::ENOENT);
            device.set_work(0, &wanted);
        }
        eventfd.write(1).expect("signalling an eventfd");
        wait_for("a run", 1, || runs.get(0)[0]);
    });
}
