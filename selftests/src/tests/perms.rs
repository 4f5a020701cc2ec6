// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Permissions: what programs may contain, what user space may do, and that none come back.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Barrier;
use std::time::Duration;
use std::{fs, hint, thread};

use Reg::{R2, R3};
use kvm_bindings::{KVMIO, kvm_enable_cap};
use kvm_bpf::Programs;
use kvm_bpf::uapi::{
    KVM_BPF_ALLOW_ASYNC, KVM_BPF_ALLOW_HOST_CPU, KVM_BPF_ALLOW_INNER_MAPS, KVM_BPF_ALLOW_IRQ,
    KVM_BPF_ALLOW_MEM_R, KVM_BPF_ALLOW_MEM_W, KVM_BPF_ALLOW_NEW_REGION, KVM_BPF_ALLOW_OTHER_KFUNC,
    KVM_BPF_ALLOW_REMOVE, KVM_BPF_ALLOW_REPLACE, KVM_BPF_ALLOW_RUN, KVM_BPF_ALLOW_SET_IRQ,
    KVM_BPF_ALLOW_SET_MEM, KVM_BPF_ALLOW_SET_PIO, KVM_BPF_ALLOW_SET_WORK, KVM_BPF_ALLOW_SLEEP,
    KVM_BPF_ALLOW_TAIL_CALL, KVM_BPF_ALLOW_UCLAMP, KVM_BPF_MEM_READ,
    KVM_BPF_REQUIRE_NOT_EXTENSIBLE, KVM_CAP_BPF_SEAL, KVM_DEV_BPF_ATTR_GROUP_PERMS,
    KVM_DEV_BPF_ATTR_GROUP_PIO, kvm_bpf_user_irq, kvm_bpf_user_mem, kvm_bpf_user_perms,
    kvm_bpf_user_region,
};
use kvm_bpf_selftests::bpf::{
    Map, Prog, ProgType, Reg, call_helper, load_map, mov_imm, program_id,
};
use kvm_bpf_selftests::device::{Answer, Device, NO_REGION, NO_WORK, region, work};
use kvm_bpf_selftests::guest::Guest;
use kvm_bpf_selftests::harness::{Errno, Random, number_from_env, skip, wait_for};
use kvm_bpf_selftests::programs::{answer, loaded, only_return, ret, test_image, test_path};
use kvm_ioctls::VmFd;
use libbpf_rs::{Link, Object, ObjectBuilder, libbpf_sys as sys};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_WRITE, ioctl_expr, ioctl_with_ref, ioctl_with_val};

use super::info::fdinfo;
use super::{ADDR, SIZE};

tests!(
    a_new_device_has_all,
    they_only_become_fewer,
    each_call_wherever_it_is,
    hardened_code,
    what_is_never_reached_is_not_there,
    maps_and_tail_calls,
    timers_of_inner_maps,
    programs_that_sleep,
    work_programs_too,
    a_program_that_is_attached_holds_its_permission,
    what_user_space_may_do,
    ports,
    programs_are_not_extended,
    an_extended_program_is_refused,
    one_of_two_extensions,
    each_device_has_its_own,
    no_program_slips_through_a_race,
    no_call_slips_through_a_race,
    sealed,
    another_vm_is_the_hole,
);

/// All that this kernel knows.
const ALL: u64 = 0xff_07ff;
const DENIED: Answer = Err(Errno(libc::EACCES));
const EXTENDED: Answer = Err(Errno(libc::EBUSY));

/// A region of programs of an object file, at the place of that index.
pub(super) fn fd_region(
    index: u64,
    read: Option<BorrowedFd<'_>>,
    write: Option<BorrowedFd<'_>>,
) -> kvm_bpf_user_region {
    let raw = |fd: Option<BorrowedFd<'_>>| fd.map_or(-1, |fd| fd.as_raw_fd());
    kvm_bpf_user_region {
        addr: ADDR + index * SIZE,
        size: SIZE,
        bpf_readfd: raw(read),
        bpf_writefd: raw(write),
    }
}

fn a_new_device_has_all() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let all = kvm_bpf_user_perms {
        allow: ALL,
        require: 0,
    };
    assert_got!(device.perms(), all);
    assert_got!(device.has_attr(KVM_DEV_BPF_ATTR_GROUP_PERMS, 0), Ok(()));
    let none = Err(Errno(libc::ENXIO));
    assert_got!(device.has_attr(KVM_DEV_BPF_ATTR_GROUP_PERMS, 1), none);
    let addr = (&raw const all) as u64;
    assert_got!(device.set_attr(KVM_DEV_BPF_ATTR_GROUP_PERMS, 1, addr), none);
    let fault = Err(Errno(libc::EFAULT));
    assert_got!(device.set_attr(KVM_DEV_BPF_ATTR_GROUP_PERMS, 0, 8), fault);
    // SAFETY: nothing is there to be written to.
    let got = unsafe { device.get_attr(KVM_DEV_BPF_ATTR_GROUP_PERMS, 0, 8) };
    assert_got!(got, fault, "getting them at a bad address");
    // To keep all is no change.
    device.set_perms(ALL, 0);
    assert_got!(device.perms(), all, "after a change of nothing");
}

fn they_only_become_fewer() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let eperm = Err(Errno(libc::EPERM));
    let mut left = ALL;
    for bit in (0..64).map(|n| 1 << n) {
        if ALL & bit == 0 {
            let got = device.try_set_perms(left | bit, 0);
            assert_got!(got, eperm, "a bit that the kernel does not know, {bit:#x}");
            continue;
        }
        left &= !bit;
        device.set_perms(left, 0);
        for wanted in [left | bit, bit, ALL] {
            assert_got!(
                device.try_set_perms(wanted, 0),
                eperm,
                "{wanted:#x} of {left:#x}"
            );
        }
        assert_got!(device.perms().allow, left, "after errors");
    }
    assert_got!(left, 0, "all are gone");

    for bit in (1..64).map(|n| 1 << n) {
        let got = device.try_set_perms(0, bit | KVM_BPF_REQUIRE_NOT_EXTENSIBLE);
        assert_got!(got, Err(Errno(libc::EINVAL)), "to require {bit:#x}");
    }
    assert_got!(device.perms().require, 0, "after errors");
    device.set_perms(0, KVM_BPF_REQUIRE_NOT_EXTENSIBLE);
    assert_got!(device.try_set_perms(0, 0), eperm, "to require it no more");
    assert_got!(device.perms().require, KVM_BPF_REQUIRE_NOT_EXTENSIBLE);
}

/// `perms.bpf.c`'s numbers, and the permission that each takes.
const CALLS: [(u32, &str, u64); 12] = [
    (1, "bpf_kvm_irq_signal", KVM_BPF_ALLOW_IRQ),
    (2, "bpf_kvm_irq_acquire", KVM_BPF_ALLOW_IRQ),
    (3, "bpf_get_cpu_freq", KVM_BPF_ALLOW_HOST_CPU),
    (4, "bpf_get_cpu_max_hw_freq", KVM_BPF_ALLOW_HOST_CPU),
    (5, "bpf_get_cpu_scale", KVM_BPF_ALLOW_HOST_CPU),
    (6, "bpf_set_current_uclamp", KVM_BPF_ALLOW_UCLAMP),
    (7, "bpf_kvm_mem_read", KVM_BPF_ALLOW_MEM_R),
    (8, "bpf_kvm_mem_write", KVM_BPF_ALLOW_MEM_W),
    (9, "bpf_kvm_mem_read_nofault", KVM_BPF_ALLOW_MEM_R),
    (10, "bpf_kvm_mem_write_nofault", KVM_BPF_ALLOW_MEM_W),
    (11, "bpf_kvm_random", KVM_BPF_ALLOW_OTHER_KFUNC),
    (12, "bpf_kvm_irq_signal_kept", KVM_BPF_ALLOW_IRQ),
];
const PLACES: [&str; 3] = ["the program", "a subprogram", "a callback"];
const NEVER: u32 = 3;

fn containing(what: u32, place: u32) -> Programs {
    let mut image = test_image("perms");
    let bytes: Vec<u8> = [what, place].iter().flat_map(|n| n.to_ne_bytes()).collect();
    let set = image.edit_initial(".rodata", |constants| constants.copy_from_slice(&bytes));
    assert!(set, "there are no constants");
    loaded(image)
}

/// Refused without the permission, and attached with it alone.
///
/// One call of each permission is tried in all places, the others in one.
fn each_call_wherever_it_is() {
    let guest = Guest::new();
    let mut tried = 0;
    for (what, name, bit) in CALLS {
        let places = if tried & bit == 0 { 3 } else { 1 };
        tried |= bit;
        for (place, place_name) in (0..).zip(PLACES).take(places) {
            let image = containing(what, place);
            let region = fd_region(0, image.read_program(), None);
            let device = Device::new(guest.vm());
            device.set_perms(ALL & !bit, 0);
            let got = device.try_set_region(0, &region);
            assert_got!(
                got,
                DENIED,
                "{name}() in {place_name} without its permission"
            );
            // The refused call has changed nothing: the range is free.
            let device = Device::new(guest.vm());
            device.set_perms(bit | KVM_BPF_ALLOW_SLEEP | KVM_BPF_ALLOW_NEW_REGION, 0);
            let got = device.try_set_region(0, &region);
            assert_got!(got, Ok(()), "{name}() in {place_name} with its permission");
        }
    }
}

/// What the kernel does to constants, against those who would spray them, hides no call.
fn hardened_code() {
    const PATH: &str = "/proc/sys/net/core/bpf_jit_harden";

    struct Restore(String);
    impl Drop for Restore {
        fn drop(&mut self) {
            fs::write(PATH, self.0.trim()).expect("what it was");
        }
    }

    let _restore = Restore(fs::read_to_string(PATH).expect("bpf_jit_harden"));
    // Of all loaders.
    fs::write(PATH, "2").expect("bpf_jit_harden");
    let guest = Guest::new();
    for (what, name, bit) in CALLS.into_iter().step_by(4) {
        let image = containing(what, 2);
        let device = Device::new(guest.vm());
        device.set_perms(ALL & !bit, 0);
        let got = device.try_set_region(0, &fd_region(0, image.read_program(), None));
        assert_got!(got, DENIED, "{name}() without its permission");
    }
}

fn what_is_never_reached_is_not_there() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    for (what, name, _) in CALLS {
        let device = Device::new(guest.vm());
        device.set_perms(KVM_BPF_ALLOW_SLEEP | KVM_BPF_ALLOW_NEW_REGION, 0);
        let image = containing(what, NEVER);
        device.set_region(0, &fd_region(0, image.read_program(), None));
        let read = vcpu.read(ADDR, 8).value;
        assert_got!(read, 42, "{name}() where it is never reached");
    }
}

/// But for arenas, which no program of these types can have: see `rights::no_arenas`.
fn maps_and_tail_calls() {
    let guest = Guest::new();
    let maps = loaded(test_image("perms_maps"));
    let later = loaded(test_image("perms_async"));
    let map = Map::of_programs(1);
    let mut insns = vec![mov_imm(R3, 0)];
    insns.extend(load_map(R2, &map));
    insns.push(call_helper(sys::BPF_FUNC_tail_call));
    insns.extend(ret(0));
    let tail_call = Prog::load(ProgType::READ, &insns);
    for (what, bit, read, write) in [
        ("a timer", KVM_BPF_ALLOW_ASYNC, maps.read_program(), None),
        (
            "a workqueue",
            KVM_BPF_ALLOW_ASYNC,
            later.read_program(),
            None,
        ),
        (
            "task work",
            KVM_BPF_ALLOW_ASYNC,
            None,
            later.write_program(),
        ),
        (
            "a map of maps",
            KVM_BPF_ALLOW_INNER_MAPS,
            None,
            maps.write_program(),
        ),
        (
            "a tail call",
            KVM_BPF_ALLOW_TAIL_CALL,
            Some(tail_call.as_fd()),
            None,
        ),
    ] {
        let device = Device::new(guest.vm());
        device.set_perms(ALL & !bit, 0);
        let got = device.try_set_region(0, &fd_region(0, read, write));
        assert_got!(got, DENIED, "{what} without its permission");
        let device = Device::new(guest.vm());
        device.set_perms(bit | KVM_BPF_ALLOW_NEW_REGION, 0);
        let got = device.try_set_region(0, &fd_region(0, read, write));
        assert_got!(got, Ok(()), "{what} with its permission");
    }
}

/// A program can start them, and names only the map of maps. Both permissions count.
fn timers_of_inner_maps() {
    const BOTH: u64 = KVM_BPF_ALLOW_ASYNC | KVM_BPF_ALLOW_INNER_MAPS;

    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let image = loaded(test_image("perms_inner"));
    // A workqueue alone takes no kfunc.
    for (what, read, write) in [
        ("a timer", image.read_program(), None),
        ("a workqueue", None, image.write_program()),
    ] {
        for bit in [KVM_BPF_ALLOW_ASYNC, KVM_BPF_ALLOW_INNER_MAPS] {
            let device = Device::new(guest.vm());
            device.set_perms(ALL & !bit, 0);
            let got = device.try_set_region(0, &fd_region(0, read, write));
            assert_got!(got, DENIED, "{what} in a map of maps without {bit:#x}");
            // Nor is the permission given up while it is there.
            let device = Device::new(guest.vm());
            device.set_region(0, &fd_region(0, read, write));
            let got = device.try_set_perms(ALL & !bit, 0);
            assert_got!(got, Err(Errno(libc::EBUSY)), "{what} holds {bit:#x}");
        }
    }
    let device = Device::new(guest.vm());
    device.set_perms(BOTH | KVM_BPF_ALLOW_NEW_REGION, 0);
    device.set_region(0, &fd_region(0, image.read_program(), None));
    assert_got!(
        vcpu.read(ADDR, 8).exits,
        [],
        "a read, which starts the timer"
    );
    wait_for("the timer", true, || vcpu.read(ADDR, 8).value > 0);
}

fn programs_that_sleep() {
    let guest = Guest::new();
    let sleepable = Prog::load_sleepable(ProgType::WRITE, &ret(0));
    let device = Device::new(guest.vm());
    device.set_perms(ALL & !KVM_BPF_ALLOW_SLEEP, 0);
    let got = device.try_set_region(0, &region(ADDR, SIZE, None, Some(&sleepable)));
    assert_got!(got, DENIED, "a sleepable program");
    device.set_region(0, &region(ADDR, SIZE, Some(&answer(1)), None));
    let got = device.try_set_region(0, &region(ADDR, SIZE, None, Some(&sleepable)));
    assert_got!(got, DENIED, "a sleepable program in place of another");
    assert_got!(
        guest.vcpu(0).read(ADDR, 8).value,
        1,
        "what the guest still reads"
    );
}

fn work_programs_too() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let sleepable = Prog::load_sleepable(ProgType::WORK, &ret(0));
    let other = only_return(ProgType::WORK, 0);
    device.set_perms(ALL & !KVM_BPF_ALLOW_SLEEP, 0);
    let got = device.try_set_work(0, &work(Some(&sleepable), None));
    assert_got!(got, DENIED, "a sleepable WORK program");
    assert_got!(
        device.run(0, 0),
        Err(Errno(libc::ENOENT)),
        "running what was refused"
    );
    device.set_work(0, &work(Some(&other), None));
    let device = Device::new(guest.vm());
    device.set_work(0, &work(Some(&sleepable), None));
    let got = device.try_set_perms(ALL & !KVM_BPF_ALLOW_SLEEP, 0);
    assert_got!(got, Err(Errno(libc::EBUSY)), "with such a program");
}

fn a_program_that_is_attached_holds_its_permission() {
    let guest = Guest::new();
    let image = containing(1, 1);
    let device = Device::new(guest.vm());
    device.set_region(3, &fd_region(0, image.read_program(), None));
    let without = ALL & !KVM_BPF_ALLOW_IRQ;
    let got = device.try_set_perms(without, KVM_BPF_REQUIRE_NOT_EXTENSIBLE);
    assert_got!(
        got,
        Err(Errno(libc::EBUSY)),
        "giving up what a program contains"
    );
    let left = kvm_bpf_user_perms {
        allow: ALL,
        require: 0,
    };
    assert_got!(device.perms(), left, "after the error");
    device.set_region(3, &NO_REGION);
    device.set_perms(without, KVM_BPF_REQUIRE_NOT_EXTENSIBLE);
    let got = device.try_set_region(3, &fd_region(0, image.read_program(), None));
    assert_got!(got, DENIED, "setting the program again");
}

/// A device with a region, an interrupt, a window and a WORK program, which has given up `bits`.
fn set_up(vm: &VmFd, index: u64, eventfd: &EventFd, bits: u64) -> Device {
    let device = Device::new(vm);
    device.set_region(
        0,
        &region(ADDR + index * 4 * SIZE, SIZE, Some(&answer(1)), None),
    );
    device.set_irq(0, eventfd.as_raw_fd());
    device.set_mem(0, &WINDOW);
    device.set_work(0, &work(Some(&only_return(ProgType::WORK, 0)), None));
    device.set_perms(ALL & !bits, 0);
    device
}

pub(super) const WINDOW: kvm_bpf_user_mem = kvm_bpf_user_mem {
    addr: 0,
    size: 0x1000,
    flags: KVM_BPF_MEM_READ,
    pad: 0,
};

/// What user space does to a device at an address.
type Call = fn(&Device, u64, &EventFd) -> Answer;

fn what_user_space_may_do() {
    let guest = Guest::new();
    let eventfd = EventFd::new(0).expect("eventfd");
    let calls: [(&str, u64, Call); 8] = [
        (
            "a new region",
            KVM_BPF_ALLOW_NEW_REGION,
            |device, addr, _| {
                device.try_set_region(1, &region(addr + SIZE, SIZE, Some(&answer(1)), None))
            },
        ),
        (
            "a region's new program",
            KVM_BPF_ALLOW_REPLACE,
            |device, addr, _| device.try_set_region(0, &region(addr, SIZE, Some(&answer(2)), None)),
        ),
        (
            "a new interrupt",
            KVM_BPF_ALLOW_SET_IRQ,
            |device, _, eventfd| {
                let eventfd = eventfd.as_raw_fd();
                device.try_set_irq(1, &kvm_bpf_user_irq { eventfd, flags: 0 })
            },
        ),
        (
            "one interrupt less",
            KVM_BPF_ALLOW_SET_IRQ,
            |device, _, _| {
                device.try_set_irq(
                    0,
                    &kvm_bpf_user_irq {
                        eventfd: -1,
                        flags: 0,
                    },
                )
            },
        ),
        ("a window", KVM_BPF_ALLOW_SET_MEM, |device, _, _| {
            device.try_set_mem(0, &WINDOW)
        }),
        ("running", KVM_BPF_ALLOW_RUN, |device, _, _| {
            device.run(0, 0)
        }),
        (
            "a WORK program less",
            KVM_BPF_ALLOW_SET_WORK,
            |device, _, _| device.try_set_work(0, &NO_WORK),
        ),
        ("a region less", KVM_BPF_ALLOW_REMOVE, |device, _, _| {
            device.try_set_region(0, &NO_REGION)
        }),
    ];
    for (index, (what, bit, call)) in (0..).zip(calls) {
        let addr = ADDR + index * 4 * SIZE;
        let device = set_up(guest.vm(), index, &eventfd, bit);
        let before = (device.info(0), device.info(1), device.mem(0));
        assert_got!(
            call(&device, addr, &eventfd),
            DENIED,
            "{what} without its permission"
        );
        let after = (device.info(0), device.info(1), device.mem(0));
        assert_got!(after, before, "after {what} was refused");
        // All others are there.
        for (other, other_bit, call) in calls {
            if other_bit != bit {
                let got = call(&device, addr, &eventfd);
                assert_got!(got, Ok(()), "{other} after giving up {what}");
            }
            if other_bit == KVM_BPF_ALLOW_NEW_REGION && other_bit != bit {
                let region = region(addr + SIZE, SIZE, Some(&answer(1)), None);
                assert_got!(device.region(1).map(|got| got.addr), Ok(region.addr));
            }
        }
    }
}

fn ports() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    if device.has_attr(KVM_DEV_BPF_ATTR_GROUP_PIO, 0).is_err() {
        skip("this architecture has no ports");
    }
    let [first, second] = [1, 2].map(answer);
    let at = |port, prog| region(port, 8, Some(prog), None);
    device.set_ports(0, &at(0x600, &first));
    device.set_perms(ALL & !KVM_BPF_ALLOW_SET_PIO, 0);
    for (what, index, ports) in [
        ("replacing programs", 0, at(0x600, &second)),
        ("removing ports", 0, NO_REGION),
        ("new ports", 1, at(0x700, &first)),
    ] {
        assert_got!(device.try_set_ports(index, &ports), DENIED, "{what}");
    }
    device.set_region(1, &region(ADDR, SIZE, Some(&first), None));

    let device = Device::new(guest.vm());
    device.set_perms(KVM_BPF_ALLOW_SET_PIO, 0);
    let got = device.try_set_ports(1, &at(0x700, &first));
    assert_got!(got, DENIED, "new ports without new regions");
}

/// `extended.bpf.c`, whose functions others may extend.
struct Extended(Programs);

impl Extended {
    fn new() -> Self {
        Extended(loaded(test_image("extended")))
    }

    fn region(&self) -> kvm_bpf_user_region {
        fd_region(0, self.0.read_program(), None)
    }

    /// Attaches an extension to `function`, until what this returns is dropped.
    fn extend(&self, function: &str) -> Result<(Object, Link), libbpf_rs::Error> {
        let target = self.0.read_program().expect("its program").as_raw_fd();
        let mut object = ObjectBuilder::default()
            .open_file(test_path("extensions"))
            .expect("extensions");
        for mut program in object.progs_mut() {
            program.set_autoload(program.name() == "with_array");
            program
                .set_attach_target(target, Some(function.to_string()))
                .expect("bpf_program__set_attach_target()");
        }
        let object = object.load().expect("loading an extension");
        let mut programs = object.progs_mut();
        let program = programs.find(|program| program.name() == "with_array");
        let link = program.expect("with_array").attach()?;
        drop(programs);
        Ok((object, link))
    }

    #[track_caller]
    fn assert_extensible(&self, wanted: bool, when: &str) {
        let errno = match self.extend("value") {
            Ok(_) => None,
            Err(error) => Some(format!("{error:#}")),
        };
        match errno {
            None => assert!(wanted, "{when}: wanted no extension, got one"),
            Some(error) => assert!(
                !wanted && error.contains("os error 16"),
                "{when}: wanted {wanted}, got {error}"
            ),
        }
    }
}

fn programs_are_not_extended() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let extended = Extended::new();
    extended.assert_extensible(true, "before it is attached");
    // By what comes after, and by what is there already.
    for first in [true, false] {
        let device = Device::new(guest.vm());
        if first {
            device.set_perms(ALL, KVM_BPF_REQUIRE_NOT_EXTENSIBLE);
        }
        device.set_region(0, &extended.region());
        if !first {
            extended.assert_extensible(true, "while the device does not care");
            device.set_perms(ALL, KVM_BPF_REQUIRE_NOT_EXTENSIBLE);
        }
        extended.assert_extensible(false, "while it is attached");
        assert_got!(vcpu.read(ADDR + 8, 8).value, 9, "what it returns");
        // Two devices forbid it twice.
        let other = Device::new(guest.vm());
        other.set_perms(ALL, KVM_BPF_REQUIRE_NOT_EXTENSIBLE);
        let elsewhere = kvm_bpf_user_region {
            addr: ADDR + SIZE,
            ..extended.region()
        };
        other.set_region(0, &elsewhere);
        drop(other);
        extended.assert_extensible(false, "after another device is closed");
        device.set_region(0, &NO_REGION);
        extended.assert_extensible(true, "after it is removed");
        device.set_region(0, &extended.region());
        extended.assert_extensible(false, "when it is attached again");
        drop(device);
        extended.assert_extensible(true, "after the device is closed");
    }
}

fn an_extended_program_is_refused() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let extended = Extended::new();
    let extension = extended.extend("value").expect("extending it");
    let strict = Device::new(guest.vm());
    strict.set_perms(ALL, KVM_BPF_REQUIRE_NOT_EXTENSIBLE);
    assert_got!(
        strict.try_set_region(0, &extended.region()),
        DENIED,
        "what is extended"
    );

    let device = Device::new(guest.vm());
    let other = only_return(ProgType::READ, 0);
    device.set_region(1, &region(ADDR + SIZE, SIZE, Some(&other), None));
    device.set_region(0, &extended.region());
    assert_got!(
        vcpu.read(ADDR + 8, 8).value,
        10,
        "what the extension returns"
    );
    let got = device.try_set_perms(ALL, KVM_BPF_REQUIRE_NOT_EXTENSIBLE);
    assert_got!(got, EXTENDED, "with a program that is extended");
    assert_got!(device.perms().require, 0, "after the error");
    drop(extension);
    // The failed call has left nothing behind.
    extended.assert_extensible(true, "after the failed call");
    device.set_perms(ALL, KVM_BPF_REQUIRE_NOT_EXTENSIBLE);
    extended.assert_extensible(false, "after the one that works");
}

/// One goes, the other is still there.
fn one_of_two_extensions() {
    let guest = Guest::new();
    let extended = Extended::new();
    let first = extended.extend("value").expect("extending one function");
    let second = extended.extend("more").expect("extending another");
    drop(first);
    let device = Device::new(guest.vm());
    device.set_perms(ALL, KVM_BPF_REQUIRE_NOT_EXTENSIBLE);
    assert_got!(
        device.try_set_region(0, &extended.region()),
        DENIED,
        "with one left"
    );
    // As in an array of programs, which takes no extended one either.
    let map = Map::of_programs(1);
    let program = extended.0.read_program().expect("its program");
    assert_got!(
        map.set_program(0, program),
        EXTENDED,
        "in an array of programs"
    );
    drop(second);
    assert_got!(
        map.set_program(0, program),
        Ok(()),
        "in an array, with none"
    );
    device.set_region(0, &extended.region());
}

fn each_device_has_its_own() {
    let guest = Guest::new();
    let first = Device::new(guest.vm());
    let second = Device::new(guest.vm());
    first.set_perms(0, KVM_BPF_REQUIRE_NOT_EXTENSIBLE);
    let all = kvm_bpf_user_perms {
        allow: ALL,
        require: 0,
    };
    assert_got!(second.perms(), all, "those of the other device");
    second.set_region(0, &region(ADDR, SIZE, Some(&answer(1)), None));
    assert_got!(
        Device::new(guest.vm()).perms(),
        all,
        "those of a new device"
    );
}

/// What is attached while the permission that it needs is given up.
struct Race<'a> {
    what: &'static str,
    bit: u64,
    /// Before both.
    prepare: &'a dyn Fn(&Device, u64),
    /// Attaches it to the device, which is the only one at that place.
    attach: &'a (dyn Fn(&Device, u64) -> Answer + Sync),
    is_there: &'a dyn Fn(&Device) -> bool,
}

/// How many devices there are before they are closed: each is at a place of its own. A device that
/// closes waits; many that close at once wait as long as one.
const PLACES_OF_RACES: usize = 100;

fn close_at_once(devices: &mut Vec<Device>) {
    thread::scope(|scope| {
        for device in devices.drain(..) {
            scope.spawn(|| drop(device));
        }
    });
}

/// Has two threads begin at the same time, each after up to so many turns of a loop.
fn at_once<A: Send, B>(
    random: &mut Random,
    turns: u64,
    other: impl FnOnce() -> A + Send,
    this: impl FnOnce() -> B,
) -> (A, B) {
    let delays = [random.below(turns), random.below(turns)];
    let start = Barrier::new(2);
    let wait = |delay| {
        start.wait();
        (0..delay).for_each(|_| hint::spin_loop());
    };
    thread::scope(|scope| {
        let other = scope.spawn(|| {
            wait(delays[0]);
            other()
        });
        wait(delays[1]);
        let result = this();
        (other.join().expect("the other thread"), result)
    })
}

/// Either the program is there and the permission with it, or neither.
fn no_program_slips_through_a_race() {
    let rounds = number_from_env("KVM_BPF_RACES", 200);
    let guest = Guest::new();
    let image = containing(1, 0);
    let read = image.read_program();
    let work_sleeps = Prog::load_sleepable(ProgType::WORK, &ret(0));
    let port_sleeps = Prog::load_sleepable(ProgType::WRITE, &ret(0));
    let harmless = answer(1);
    let signal = EventFd::new(0).expect("eventfd");
    let has_region = |device: &Device| device.info(0).is_ok();
    let has_work = |device: &Device| device.run(0, 0).is_ok();
    let nothing = |_: &Device, _: u64| {};
    let ports = |at| region(0x1000 + 0x10 * at, 8, None, Some(&port_sleeps));
    let races = [
        Race {
            what: "a region",
            bit: KVM_BPF_ALLOW_IRQ,
            prepare: &nothing,
            attach: &|device, at| device.try_set_region(0, &fd_region(at, read, None)),
            is_there: &has_region,
        },
        Race {
            what: "a region's new program",
            bit: KVM_BPF_ALLOW_IRQ,
            prepare: &|device, at| {
                device.set_region(0, &fd_region(at, Some(harmless.as_fd()), None));
            },
            attach: &|device, at| device.try_set_region(0, &fd_region(at, read, None)),
            is_there: &|device| {
                let now = device.info(0).expect("a region").read_id;
                now == program_id(read.expect("its program").as_raw_fd())
            },
        },
        Race {
            what: "a region of ports",
            bit: KVM_BPF_ALLOW_SLEEP,
            prepare: &nothing,
            attach: &|device, at| device.try_set_ports(0, &ports(at)),
            is_there: &has_region,
        },
        Race {
            what: "a WORK program",
            bit: KVM_BPF_ALLOW_SLEEP,
            prepare: &nothing,
            attach: &|device, _| device.try_set_work(0, &work(Some(&work_sleeps), None)),
            is_there: &has_work,
        },
        Race {
            what: "a WORK program in place of another",
            bit: KVM_BPF_ALLOW_SLEEP,
            prepare: &|device, _| {
                // It asks to be run again: running it fails.
                let again = only_return(ProgType::WORK, 1);
                device.set_work(0, &work(Some(&again), None));
            },
            attach: &|device, _| device.try_set_work(0, &work(Some(&work_sleeps), None)),
            is_there: &has_work,
        },
        Race {
            // Its thread is made meanwhile.
            what: "a WORK program with an eventfd",
            bit: KVM_BPF_ALLOW_SLEEP,
            prepare: &nothing,
            attach: &|device, _| {
                let work = work(Some(&work_sleeps), Some(&signal));
                device.try_set_work(0, &work)
            },
            is_there: &has_work,
        },
    ];
    let has_ports = Device::new(guest.vm())
        .has_attr(KVM_DEV_BPF_ATTR_GROUP_PIO, 0)
        .is_ok();
    for race in races {
        if race.what == "a region of ports" && !has_ports {
            continue;
        }
        // An eventfd has one consumer: each device closes before the next one.
        let (rounds, places) = match race.what.contains("eventfd") {
            true => (rounds / 10, 1),
            false => (rounds, PLACES_OF_RACES),
        };
        let mut random = Random::new(rounds);
        let mut outcomes = [0; 2];
        let mut devices = Vec::new();
        for round in 0..rounds {
            let device = Device::new(guest.vm());
            let at = devices.len() as u64;
            (race.prepare)(&device, at);
            let (attached, shrunk) = at_once(
                &mut random,
                2000,
                || (race.attach)(&device, at),
                || device.try_set_perms(ALL & !race.bit, 0),
            );
            let there = (race.is_there)(&device);
            let wanted = match there {
                true => (Ok(()), Err(Errno(libc::EBUSY))),
                false => (DENIED, Ok(())),
            };
            let what = race.what;
            assert_got!(
                (attached, shrunk),
                wanted,
                "{what}, round {round}, there: {there}"
            );
            outcomes[usize::from(there)] += 1;
            devices.push(device);
            if devices.len() == places {
                close_at_once(&mut devices);
            }
        }
        println!(
            "{}: refused {}, attached {}",
            race.what, outcomes[0], outcomes[1]
        );
        assert!(
            outcomes.iter().all(|&rounds| rounds > 0),
            "{}: no race: {outcomes:?}",
            race.what
        );
    }
}

/// What user space does to a device for the n-th time. The device is at an address.
type Repeated<'a> = &'a (dyn Fn(&Device, u64, u64) -> Answer + Sync);

/// When the call that gives a permission up has returned, nothing changes that it was for.
fn no_call_slips_through_a_race() {
    let rounds = number_from_env("KVM_BPF_RACES", 200) / 10;
    let guest = Guest::new();
    let eventfd = EventFd::new(0).expect("eventfd");
    let programs = [1, 2].map(answer);
    let works = [0, 0].map(|value| only_return(ProgType::WORK, value));
    let of = |n: u64| (n % 2) as usize;
    let calls: [(&str, u64, Repeated<'_>); 6] = [
        ("interrupts", KVM_BPF_ALLOW_SET_IRQ, &|device, _, n| {
            let eventfd = if n.is_multiple_of(2) {
                eventfd.as_raw_fd()
            } else {
                -1
            };
            device.try_set_irq(1, &kvm_bpf_user_irq { eventfd, flags: 0 })
        }),
        ("windows", KVM_BPF_ALLOW_SET_MEM, &|device, _, n| {
            let window = kvm_bpf_user_mem {
                size: 1 + n,
                ..WINDOW
            };
            device.try_set_mem(0, &window)
        }),
        ("WORK programs", KVM_BPF_ALLOW_SET_WORK, &|device, _, n| {
            device.try_set_work(0, &work(Some(&works[of(n)]), None))
        }),
        ("programs", KVM_BPF_ALLOW_REPLACE, &|device, addr, n| {
            device.try_set_region(0, &region(addr, SIZE, Some(&programs[of(n)]), None))
        }),
        (
            "new regions",
            KVM_BPF_ALLOW_NEW_REGION,
            &|device, addr, n| {
                let at = addr + SIZE + 0x10 * n;
                device.try_set_region(1 + n, &region(at, 0x10, Some(&programs[0]), None))
            },
        ),
        ("removed regions", KVM_BPF_ALLOW_REMOVE, &|device, _, n| {
            device.try_set_region(1 + n, &NO_REGION)
        }),
    ];
    for (what, bit, call) in calls {
        let mut random = Random::new(rounds);
        let mut devices = Vec::new();
        let mut calls_before = 0;
        let mut rounds_with_calls = 0;
        for round in 0..rounds {
            let index = devices.len() as u64;
            let addr = ADDR + index * 4 * SIZE;
            let device = set_up(guest.vm(), index, &eventfd, 0);
            let most = match bit {
                KVM_BPF_ALLOW_NEW_REGION => 40,
                KVM_BPF_ALLOW_REMOVE => 20,
                _ => 1000,
            };
            if bit == KVM_BPF_ALLOW_REMOVE {
                for n in 0..most {
                    let at = addr + SIZE + 0x10 * n;
                    device.set_region(1 + n, &region(at, 0x10, Some(&programs[0]), None));
                }
            }
            let repeat = || {
                for n in 0..most {
                    match call(&device, addr, n) {
                        // Emulated processors take turns: the other thread's is when this one
                        // holds no lock.
                        Ok(()) => thread::sleep(Duration::from_micros(1)),
                        DENIED => return n,
                        other => panic!("{what}: wanted success or EACCES, got {other:?}"),
                    }
                }
                most
            };
            let give_up = || {
                device.set_perms(ALL & !bit, 0);
                fdinfo(&device)
            };
            let (calls, then) = at_once(&mut random, 20_000, repeat, give_up);
            let now = fdinfo(&device);
            assert_got!(now, then, "{what}, round {round}, after {calls} calls");
            calls_before += calls;
            rounds_with_calls += u64::from(calls > 0 && calls < most);
            devices.push(device);
            // A VM has 1000 ranges.
            if devices.len() == 20 {
                close_at_once(&mut devices);
            }
        }
        println!("{what}: {calls_before} calls, a race in {rounds_with_calls} of {rounds} rounds");
        assert!(rounds_with_calls > 0, "{what}: no race");
    }
}

/// Those of a VM, which kvm-ioctls has for the capabilities alone that it knows.
const KVM_CHECK_EXTENSION: libc::c_ulong = ioctl_expr(_IOC_NONE, KVMIO, 0x03, 0);
const KVM_ENABLE_CAP: libc::c_ulong =
    ioctl_expr(_IOC_WRITE, KVMIO, 0xa3, size_of::<kvm_enable_cap>() as u32);

pub(super) fn seal(vm: &VmFd, arg: u64, flags: u32) -> Answer {
    let mut cap = kvm_enable_cap {
        cap: KVM_CAP_BPF_SEAL,
        flags,
        ..Default::default()
    };
    cap.args[0] = arg;
    // SAFETY: the kernel reads the structure.
    match unsafe { ioctl_with_ref(vm, KVM_ENABLE_CAP, &cap) } {
        0 => Ok(()),
        _ => Err(Errno::last()),
    }
}

fn sealed() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let device = Device::new(guest.vm());
    let einval = Err(Errno(libc::EINVAL));
    for (arg, flags) in [(0, 0), (2, 0), (1, 1), (u64::MAX, 0)] {
        assert_got!(
            seal(guest.vm(), arg, flags),
            einval,
            "argument {arg}, flags {flags}"
        );
    }
    drop(Device::new(guest.vm()));
    // SAFETY: it takes a number.
    let has = unsafe { ioctl_with_val(guest.vm(), KVM_CHECK_EXTENSION, KVM_CAP_BPF_SEAL.into()) };
    assert_got!(has, 1, "KVM_CHECK_EXTENSION");
    assert_got!(seal(guest.vm(), 1, 0), Ok(()));
    let refused = || Device::try_new(guest.vm()).map(drop);
    let eperm = Err(Errno(libc::EPERM));
    assert_got!(refused(), eperm, "a new device");
    // What was there does all it could.
    device.set_region(0, &region(ADDR, SIZE, Some(&answer(1)), None));
    device.set_region(0, &region(ADDR, SIZE, Some(&answer(2)), None));
    assert_got!(vcpu.read(ADDR, 8).value, 2);
    assert_got!(seal(guest.vm(), 1, 0), Ok(()), "sealing it again");
    assert_got!(seal(guest.vm(), 0, 0), einval, "opening it again");
    drop(device);
    assert_got!(refused(), eperm, "in place of a device that was closed");
}

/// Who can make another VM is not stopped: that is for the VMM to see to.
fn another_vm_is_the_hole() {
    let guest = Guest::new();
    assert_got!(seal(guest.vm(), 1, 0), Ok(()));
    let other = Guest::new();
    let device = Device::new(other.vm());
    device.set_region(0, &region(ADDR, SIZE, Some(&answer(1)), None));
    assert_got!(other.vcpu(0).read(ADDR, 8).value, 1, "in another VM");
}
