// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What programs contain, and which permission each part takes.

use std::fs;
use std::os::fd::AsFd;

use Reg::{R2, R3};
use kvm_bpf::Programs;
use kvm_bpf::uapi::{
    KVM_BPF_ALLOW_ASYNC, KVM_BPF_ALLOW_HOST_CPU, KVM_BPF_ALLOW_INNER_MAPS, KVM_BPF_ALLOW_IRQ,
    KVM_BPF_ALLOW_MEM_R, KVM_BPF_ALLOW_MEM_W, KVM_BPF_ALLOW_NEW_REGION, KVM_BPF_ALLOW_OTHER_KFUNC,
    KVM_BPF_ALLOW_SLEEP, KVM_BPF_ALLOW_TAIL_CALL, KVM_BPF_ALLOW_UCLAMP,
    KVM_BPF_REQUIRE_NOT_EXTENSIBLE, kvm_bpf_user_perms,
};
use kvm_bpf_selftests::bpf::{Map, Prog, ProgType, Reg, call_helper, load_map, mov_imm};
use kvm_bpf_selftests::device::{Device, NO_REGION, region, work};
use kvm_bpf_selftests::guest::Guest;
use kvm_bpf_selftests::harness::{Errno, wait_for};
use kvm_bpf_selftests::programs::{answer, loaded, only_return, ret, test_image};
use libbpf_rs::libbpf_sys as sys;

use super::super::{ADDR, SIZE};
use super::{ALL, DENIED, fd_region};

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

pub(super) fn containing(what: u32, place: u32) -> Programs {
    let mut image = test_image("perms");
    let bytes: Vec<u8> = [what, place].iter().flat_map(|n| n.to_ne_bytes()).collect();
    let set = image.edit_initial(".rodata", |constants| constants.copy_from_slice(&bytes));
    assert!(set, "there are no constants");
    loaded(image)
}

/// Refused without the permission, and attached with it alone.
///
/// One call of each permission is tried in all places, the others in one.
pub(super) fn each_call_wherever_it_is() {
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
pub(super) fn hardened_code() {
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

pub(super) fn what_is_never_reached_is_not_there() {
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
pub(super) fn maps_and_tail_calls() {
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
pub(super) fn timers_of_inner_maps() {
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

pub(super) fn programs_that_sleep() {
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

pub(super) fn work_programs_too() {
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

pub(super) fn a_program_that_is_attached_holds_its_permission() {
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
