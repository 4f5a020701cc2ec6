// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Allocations that fail: each call fails as a whole, or not at all, and nothing leaks.
//!
//! For a kernel with failslab (`CONFIG_FAILSLAB`), which fails the n-th allocation of a thread; with
//! `CONFIG_FAIL_PAGE_ALLOC` those of pages, too. There is a test for each call of the ABI: what sets,
//! replaces and removes in each group, what reads, the seal, and close(2).

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::id;

use kvm_bpf::uapi::{
    KVM_BPF_MEM_READ, KVM_BPF_REQUIRE_NOT_EXTENSIBLE, KVM_DEV_BPF_ATTR_GROUP_PIO,
    KVM_DEV_BPF_ATTR_GROUP_REGION, KVM_DEV_BPF_MAX_REGIONS, kvm_bpf_user_irq, kvm_bpf_user_mem,
};
use kvm_bpf_selftests::bpf::{
    Census, Index, Map, Prog, ProgType, Reg, atomic_add, lookup, mov_imm,
};
use kvm_bpf_selftests::device::{Answer, Device, NO_REGION, NO_WORK, region, work};
use kvm_bpf_selftests::guest::{Guest, Vcpu};
use kvm_bpf_selftests::harness::{Errno, skip, wait_for};
use kvm_bpf_selftests::programs::{answer as constant, only_return, ret};
use vmm_sys_util::eventfd::EventFd;

use super::perms::seal;
use super::{ADDR, PATTERN, SIZE, assert_errno};

tests!(
    creating_a_device,
    registering_a_region,
    registering_the_last_region,
    replacing_programs,
    replacing_with_programs_that_sleep,
    unregistering_a_region,
    ports,
    setting_an_irq_needs_no_memory,
    windows,
    setting_work,
    replacing_work,
    removing_and_running_work,
    giving_up_permissions,
    reading_what_there_is,
    sealing,
    closing_a_device,
);

/// More than any of these calls allocates.
const ENOUGH: u32 = 200;

/// Runs `op` again and again, with the first, second, ... allocation of its call failing, until
/// the call has none of that number.
///
/// `op` prepares, hands its call to the injector, and checks what it did.
fn each_allocation(op: impl Fn(&Injector)) {
    assert!(
        each_allocation_if_any(op) > 0,
        "the call has allocated nothing"
    );
}

/// The same for a call that may need no memory; returns how many allocations have failed.
fn each_allocation_if_any(op: impl Fn(&Injector)) -> u32 {
    let failslab = Path::new("/sys/kernel/debug/failslab");
    if !failslab.exists() {
        skip("this kernel has no CONFIG_FAILSLAB");
    }
    // Allocations that may sleep too, single pages too; and no stack traces in the log.
    let set = |directory: &Path, knob: &str, value| {
        fs::write(directory.join(knob), value).unwrap_or_else(|error| panic!("{knob}: {error}"));
    };
    let pages = Path::new("/sys/kernel/debug/fail_page_alloc");
    for directory in [failslab, pages].iter().filter(|path| path.exists()) {
        set(directory, "ignore-gfp-wait", "N");
        set(directory, "verbose", "0");
    }
    if pages.exists() {
        set(pages, "ignore-gfp-highmem", "N");
        set(pages, "min-order", "0");
    }
    let census = Census::now();
    for nth in 1..ENOUGH {
        let injector = Injector::new(nth);
        op(&injector);
        census.wait_for_newer(0, 0);
        if !injector.has_failed() {
            println!("{} allocations failed in turn", nth - 1);
            return nth - 1;
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

/// A guest and a device that has one of everything: what a call must leave as it is.
struct Setup {
    guest: Guest,
    vcpu: Vcpu,
    device: Device,
    read: Prog,
    work: Prog,
    eventfd: EventFd,
}

const WINDOW: kvm_bpf_user_mem = kvm_bpf_user_mem {
    addr: 0x1000,
    size: 0x10,
    flags: KVM_BPF_MEM_READ,
    pad: 0,
};

impl Setup {
    fn new() -> Self {
        let guest = Guest::new();
        let setup = Setup {
            vcpu: guest.vcpu(0),
            device: Device::new(guest.vm()),
            guest,
            read: constant(PATTERN),
            work: only_return(ProgType::WORK, 0),
            eventfd: EventFd::new(0).expect("eventfd"),
        };
        let device = &setup.device;
        device.set_region(0, &region(ADDR, SIZE, Some(&setup.read), None));
        device.set_irq(0, setup.eventfd.as_raw_fd());
        device.set_mem(0, &WINDOW);
        device.set_work(0, &work(Some(&setup.work), None));
        setup
    }

    /// The device does what it did.
    #[track_caller]
    fn assert_works(&mut self) {
        assert_got!(self.vcpu.read(ADDR, 8).value, PATTERN, "the region");
        assert_got!(self.device.mem(0), Ok(WINDOW), "the window");
        assert_got!(self.device.run(0, 1), Ok(()), "the work");
        let all = self.device.perms();
        assert_got!(self.device.try_set_perms(all.allow, all.require), Ok(()));
    }
}

/// For the last index the device needs a longer list.
fn registering_the_last_region() {
    let index = KVM_DEV_BPF_MAX_REGIONS - 1;
    each_allocation(|injector| {
        let mut setup = Setup::new();
        let wanted = region(ADDR + SIZE, SIZE, Some(&setup.read), None);
        let answer = injector.call(|| setup.device.try_set_region(index, &wanted));
        if !injector.succeeded(&answer) {
            assert_errno("getting it", setup.device.region(index), libc::ENOENT);
            setup.assert_works();
            setup.device.set_region(index, &wanted);
        }
        assert_got!(setup.vcpu.read(ADDR + SIZE, 8).value, PATTERN);
        setup.assert_works();
    });
}

fn replacing_with_programs_that_sleep() {
    each_allocation(|injector| {
        let mut setup = Setup::new();
        let sleeps = Prog::load_sleepable(ProgType::READ, &ret(0));
        let wanted = region(ADDR, SIZE, Some(&sleeps), None);
        let answer = injector.call(|| setup.device.try_set_region(0, &wanted));
        if injector.succeeded(&answer) {
            assert_got!(setup.vcpu.read(ADDR, 8).value, 0, "with the new program");
        } else {
            setup.assert_works();
        }
    });
}

fn ports() {
    if Device::new(Guest::new().vm())
        .has_attr(KVM_DEV_BPF_ATTR_GROUP_PIO, 0)
        .is_err()
    {
        skip("this architecture has no ports");
    }
    each_allocation(|injector| {
        let mut setup = Setup::new();
        let wanted = region(0x600, 8, Some(&setup.read), None);
        let answer = injector.call(|| setup.device.try_set_ports(1, &wanted));
        if !injector.succeeded(&answer) {
            assert_errno("getting it", setup.device.ports(1), libc::ENOENT);
            setup.device.set_ports(1, &wanted);
        }
        setup.assert_works();
    });
    each_allocation(|injector| {
        let mut setup = Setup::new();
        let write = only_return(ProgType::WRITE, 0);
        setup
            .device
            .set_ports(1, &region(0x600, 8, Some(&setup.read), None));
        let wanted = region(0x600, 8, None, Some(&write));
        let answer = injector.call(|| setup.device.try_set_ports(1, &wanted));
        let replaced = injector.succeeded(&answer);
        let info = setup.device.info(1).expect("INFO of the ports");
        assert_got!(info.read_id == 0, replaced, "the program is another one");
        setup.assert_works();
    });
    // This always succeeds.
    each_allocation(|injector| {
        let mut setup = Setup::new();
        setup
            .device
            .set_ports(1, &region(0x600, 8, Some(&setup.read), None));
        let answer = injector.call(|| setup.device.try_set_ports(1, &NO_REGION));
        assert_got!(answer, Ok(()));
        assert_errno("getting it", setup.device.ports(1), libc::ENOENT);
        setup.assert_works();
    });
}

fn windows() {
    let other = kvm_bpf_user_mem {
        addr: 0x8000,
        ..WINDOW
    };
    let none = kvm_bpf_user_mem::default();
    for (index, wanted, before) in [
        (1, other, Err(Errno(libc::ENOENT))),
        (0, other, Ok(WINDOW)),
        (0, none, Ok(WINDOW)),
    ] {
        each_allocation(|injector| {
            let setup = Setup::new();
            let answer = injector.call(|| setup.device.try_set_mem(index, &wanted));
            let after = match (injector.succeeded(&answer), wanted.size) {
                (false, _) => before,
                (true, 0) => Err(Errno(libc::ENOENT)),
                (true, _) => Ok(wanted),
            };
            assert_got!(setup.device.mem(index), after, "window {index}");
            // Nothing is in the way of another try.
            setup.device.set_mem(index, &WINDOW);
            assert_got!(setup.device.mem(index), Ok(WINDOW), "window {index}");
        });
    }
}

/// By one without an eventfd, with the same one, and with another one.
fn replacing_work() {
    for (first, second) in [(false, true), (true, true), (true, false)] {
        each_allocation_if_any(|injector| {
            let mut setup = Setup::new();
            let eventfds = [(); 2].map(|()| EventFd::new(0).expect("eventfd"));
            let old = work(Some(&setup.work), first.then_some(&eventfds[0]));
            setup.device.set_work(1, &old);
            let again = only_return(ProgType::WORK, 1);
            let eventfd = match (first, second) {
                (true, true) => Some(&eventfds[0]),
                _ => second.then_some(&eventfds[1]),
            };
            let answer =
                injector.call(|| setup.device.try_set_work(1, &work(Some(&again), eventfd)));
            let ran = if injector.succeeded(&answer) {
                Err(Errno(libc::EAGAIN))
            } else {
                Ok(())
            };
            assert_got!(setup.device.run(1, 0), ran, "running it");
            // What a call has not taken is free, what is replaced too.
            setup.device.set_work(1, &NO_WORK);
            for (index, eventfd) in (2..).zip(&eventfds) {
                setup
                    .device
                    .set_work(index, &work(Some(&setup.work), Some(eventfd)));
            }
            setup.assert_works();
        });
    }
}

fn removing_and_running_work() {
    each_allocation_if_any(|injector| {
        let mut setup = Setup::new();
        let eventfd = EventFd::new(0).expect("eventfd");
        let with_eventfd = work(Some(&setup.work), Some(&eventfd));
        setup.device.set_work(1, &with_eventfd);
        let answers = injector.call(|| {
            (
                setup.device.run(1, 1),
                setup.device.try_set_work(1, &NO_WORK),
            )
        });
        assert_got!(answers, (Ok(()), Ok(())), "running and removing it");
        setup.device.set_work(1, &with_eventfd);
        setup.assert_works();
    });
}

/// What keeps programs from being extended is allocated for all of them at once.
fn giving_up_permissions() {
    each_allocation(|injector| {
        let mut setup = Setup::new();
        let before = setup.device.perms();
        let allow = before.allow & !1;
        let require = KVM_BPF_REQUIRE_NOT_EXTENSIBLE;
        let answer = injector.call(|| setup.device.try_set_perms(allow, require));
        let after = setup.device.perms();
        if injector.succeeded(&answer) {
            assert_got!((after.allow, after.require), (allow, require));
        } else {
            assert_got!(after, before, "permissions after ENOMEM");
            setup.device.set_perms(allow, require);
        }
        setup.assert_works();
        // A program that comes later is kept from it, too.
        let wanted = region(ADDR, SIZE, Some(&setup.read), None);
        setup.device.set_region(0, &wanted);
    });
    // One that is attached under the requirement.
    each_allocation(|injector| {
        let mut setup = Setup::new();
        let all = setup.device.perms();
        setup
            .device
            .set_perms(all.allow, KVM_BPF_REQUIRE_NOT_EXTENSIBLE);
        let wanted = region(ADDR + SIZE, SIZE, Some(&setup.read), None);
        let answer = injector.call(|| setup.device.try_set_region(1, &wanted));
        if !injector.succeeded(&answer) {
            setup.device.set_region(1, &wanted);
        }
        assert_got!(setup.vcpu.read(ADDR + SIZE, 8).value, PATTERN);
        setup.assert_works();
    });
}

/// Attributes need no memory; fdinfo is a file, and opening and reading it does.
fn reading_what_there_is() {
    each_allocation_if_any(|injector| {
        let mut setup = Setup::new();
        let device = &setup.device;
        let (region, window, info) =
            injector.call(|| (device.region(0), device.mem(0), device.info(0)));
        let got = (region.map(|region| region.addr), window);
        assert_got!(got, (Ok(ADDR), Ok(WINDOW)), "region and window");
        assert_got!(info.map(|info| info.addr), Ok(ADDR), "INFO");
        setup.assert_works();
    });
    each_allocation_if_any(|injector| {
        let mut setup = Setup::new();
        let device = &setup.device;
        let (perms, has) = injector.call(|| {
            let has = device.has_attr(KVM_DEV_BPF_ATTR_GROUP_REGION, 0);
            (device.perms(), has)
        });
        assert_got!((perms.require, has), (0, Ok(())), "permissions");
        setup.assert_works();
    });
    each_allocation(|injector| {
        let mut setup = Setup::new();
        let path = format!("/proc/{}/fdinfo/{}", id(), setup.device.as_raw_fd());
        let text = injector.call(|| fs::read_to_string(&path));
        let answer = match &text {
            Ok(_) => Ok(()),
            Err(error) => Err(Errno(error.raw_os_error().unwrap_or(0))),
        };
        if injector.succeeded(&answer) {
            let text = text.expect("fdinfo");
            assert!(text.contains("region:\t0 mmio"), "got {text:?}");
            assert!(text.contains("sealed:\t0"), "all of it: got {text:?}");
        }
        setup.assert_works();
    });
}

fn sealing() {
    each_allocation_if_any(|injector| {
        let mut setup = Setup::new();
        let answer = injector.call(|| seal(setup.guest.vm(), 1, 0));
        assert_got!(answer, Ok(()), "the seal");
        let other = Device::try_new(setup.guest.vm()).map(drop);
        assert_errno("another device", other, libc::EPERM);
        setup.assert_works();
    });
}

/// It always succeeds, and nothing is left. KVM's own bus may dissolve.
fn closing_a_device() {
    each_allocation(|injector| {
        let Setup {
            guest,
            mut vcpu,
            device,
            eventfd,
            work: prog,
            ..
        } = Setup::new();
        device.set_work(1, &work(Some(&prog), Some(&eventfd)));
        injector.call(|| drop(device));
        let exits = vcpu.read(ADDR, 8).exits.len();
        assert_got!(exits, 1, "exits of the region that is gone");
        // The eventfd has no consumer any more, and the VM takes devices.
        let other = Device::new(guest.vm());
        other.set_work(0, &work(Some(&prog), Some(&eventfd)));
        assert_got!(other.run(0, 0), Ok(()), "the work of another device");
    });
}
