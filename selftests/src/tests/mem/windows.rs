// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Windows: their arguments, what they let programs access, and their removal.

use std::thread;

use kvm_bpf::Window;
use kvm_bpf::uapi::{
    KVM_BPF_MEM_READ, KVM_BPF_MEM_WRITE, KVM_DEV_BPF_ATTR_GROUP_MEM, KVM_DEV_BPF_MAX_MEMS,
    kvm_bpf_user_mem,
};
use kvm_bpf_selftests::device::Device;
use kvm_bpf_selftests::guest::{Args, Guest, Routine};
use kvm_bpf_selftests::harness::{meanwhile, wait_for};
use kvm_bpf_selftests::programs::{plug, test_image};

use super::super::{ADDR, assert_errno};
use super::{
    By, PAGE, READ, READ_NOFAULT, START, Setup, WRITE, WRITE_NOFAULT, pattern, request, result,
};

pub(super) fn bad_arguments() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let set = |index, mem: &kvm_bpf_user_mem| {
        device.set_attr(KVM_DEV_BPF_ATTR_GROUP_MEM, index, (&raw const *mem) as u64)
    };
    let good = kvm_bpf_user_mem {
        addr: 0,
        size: 0x1000,
        flags: KVM_BPF_MEM_READ | KVM_BPF_MEM_WRITE,
        pad: 0,
    };
    let last = KVM_DEV_BPF_MAX_MEMS - 1;
    for (what, index, mem, wanted) in [
        ("index", last + 1, good, libc::ENXIO),
        ("index of 33 bits", 1 << 32, good, libc::ENXIO),
        ("pad", 0, kvm_bpf_user_mem { pad: 1, ..good }, libc::EINVAL),
        (
            "no flags",
            0,
            kvm_bpf_user_mem { flags: 0, ..good },
            libc::EINVAL,
        ),
        (
            "other flags",
            0,
            kvm_bpf_user_mem { flags: 5, ..good },
            libc::EINVAL,
        ),
        (
            "flags to remove",
            0,
            kvm_bpf_user_mem { size: 0, ..good },
            libc::EINVAL,
        ),
        (
            "wrap-around",
            0,
            kvm_bpf_user_mem {
                addr: u64::MAX - 0xfff,
                ..good
            },
            libc::ERANGE,
        ),
        (
            "removing a free one",
            0,
            kvm_bpf_user_mem::default(),
            libc::ENOENT,
        ),
    ] {
        assert_errno(what, set(index, &mem), wanted);
    }
    let answer = device.set_attr(KVM_DEV_BPF_ATTR_GROUP_MEM, 0, 8);
    assert_errno("bad pointer", answer, libc::EFAULT);
    for index in 0..=last {
        assert_got!(device.has_attr(KVM_DEV_BPF_ATTR_GROUP_MEM, index), Ok(()));
        assert_got!(set(index, &good), Ok(()));
    }
    let answer = device.has_attr(KVM_DEV_BPF_ATTR_GROUP_MEM, last + 1);
    assert_errno("asking past the last", answer, libc::ENXIO);
    // One may reach the end, and the address before it.
    let most = kvm_bpf_user_mem {
        addr: 1,
        size: u64::MAX - 1,
        ..good
    };
    assert_got!(set(0, &most), Ok(()));
}

pub(super) fn get_returns_what_was_set() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let set = |mem: &kvm_bpf_user_mem| device.try_set_mem(31, mem);
    assert_errno("a free index", device.mem(31), libc::ENOENT);
    for flags in [KVM_BPF_MEM_READ, KVM_BPF_MEM_WRITE] {
        let mem = kvm_bpf_user_mem {
            addr: 0x1234_5678_9abc_def1,
            size: 0x23,
            flags,
            pad: 0,
        };
        assert_got!(set(&mem), Ok(()));
        assert_got!(device.mem(31), Ok(mem));
        // A bad one changes nothing.
        set(&kvm_bpf_user_mem { flags: 0, ..mem }).expect_err("no flags");
        assert_got!(device.mem(31), Ok(mem));
    }
    assert_got!(set(&kvm_bpf_user_mem::default()), Ok(()));
    assert_errno("a removed one", device.mem(31), libc::ENOENT);
    let answer = device.mem(KVM_DEV_BPF_MAX_MEMS);
    assert_errno("past the last", answer, libc::ENXIO);
}

pub(super) fn nothing_without_a_window() {
    let mut setup = Setup::new("mem", 1);
    setup.pages.fill((0..).map(pattern));
    // What fails leaves zeroes.
    assert_got!(setup.read(START, 8), (libc::EACCES, vec![0; 8]));
    assert_got!(setup.write(START, &[1; 8]), libc::EACCES);
    assert_got!(setup.pages.bytes(0, 1), [pattern(0)]);
    assert_got!(setup.read(START, 0).0, libc::EACCES);
    setup.window(0, START, 8, true, true);
    setup.device.device().unset_window(0).expect("removing it");
    assert_got!(setup.read(START, 1), (libc::EACCES, vec![0]));
}

pub(super) fn ends_of_a_window() {
    for object in ["mem", "mem_nofault"] {
        let mut setup = Setup::new(object, 2);
        setup.pages.fill((0..).map(pattern));
        // Over the end of a page, and with odd ends.
        let (first, size) = (0xff1, 0x1d);
        let start = START + first as u64;
        setup.window(3, start, size as u64, true, true);
        let ops = match object {
            "mem" => (&[READ, READ_NOFAULT][..], &[WRITE, WRITE_NOFAULT][..]),
            _ => (&[READ_NOFAULT][..], &[WRITE_NOFAULT][..]),
        };
        for (offset, len) in (0..=size).flat_map(|offset| (0..=size).map(move |len| (offset, len)))
        {
            let inside = offset + len <= size;
            let gpa = start + offset as u64;
            let wanted: Vec<u8> = (0..len)
                .map(|i| {
                    if inside {
                        pattern(first + offset + i)
                    } else {
                        0
                    }
                })
                .collect();
            let errno = if inside { 0 } else { libc::EACCES };
            // All of them by all means take long under emulation.
            let by = if len % 2 == 0 { By::Access } else { By::Run };
            for &op in ops.0 {
                let got = setup.ask(by, op, gpa, &vec![0x5a; len]);
                assert_got!(got, (errno, wanted.clone()), "{len} at {gpa:#x}");
            }
        }
        for (gpa, len) in [
            (start - 1, 1),
            (start - 1, size + 2),
            (start + size as u64, 1),
            (u64::MAX, 1),
            (u64::MAX, 2),
            (u64::MAX - 7, 8),
            (start | 1 << 63, 4),
        ] {
            let got = setup.ask_all(ops.0, gpa, &vec![0x5a; len]);
            assert_got!(got, (libc::EACCES, vec![0; len]), "{len} at {gpa:#x}");
            let got = setup.ask_all(ops.1, gpa, &vec![0x5a; len]).0;
            assert_got!(got, libc::EACCES, "{len} at {gpa:#x}");
        }
        let all: Vec<u8> = (0..2 * PAGE).map(pattern).collect();
        assert_got!(setup.pages.bytes(0, 2 * PAGE), all);
        assert_got!(setup.ask_all(ops.1, start, &vec![0xc3; size]).0, 0);
        assert_got!(setup.pages.bytes(first, size), vec![0xc3; size]);
        assert_got!(setup.pages.bytes(first - 1, 1), [pattern(first - 1)]);
        assert_got!(setup.pages.bytes(first + size, 1), [pattern(first + size)]);
    }
}

pub(super) fn rights_of_a_window() {
    let mut setup = Setup::new("mem", 1);
    for (read, write) in [(true, false), (false, true), (true, true)] {
        let byte = 1 + u8::from(read) + 2 * u8::from(write);
        setup.pages.fill(std::iter::repeat(byte));
        setup.window(0, START, PAGE as u64, read, write);
        let errno = |allowed| if allowed { 0 } else { libc::EACCES };
        let value = if read { byte } else { 0 };
        assert_got!(setup.read(START + 4, 4), (errno(read), vec![value; 4]));
        assert_got!(setup.write(START + 4, &[0x99; 4]), errno(write));
        let value = if write { 0x99 } else { byte };
        assert_got!(setup.pages.bytes(4, 4), [value; 4]);
    }
}

/// An access lies inside one of them; they may overlap, and are the device's own.
pub(super) fn several_windows() {
    let mut setup = Setup::new("mem", 4);
    let other = plug(setup.guest.vm(), ADDR + 0x1000, test_image("mem"));
    let page = PAGE as u64;
    setup.window(0, START, page, true, false);
    setup.window(31, START + page, page, true, false);
    setup.window(7, START + page, 2 * page, false, true);
    assert_got!(setup.read(START + page - 4, 4).0, 0);
    assert_got!(setup.read(START + page, 4).0, 0);
    assert_got!(
        setup.read(START + page - 4, 8).0,
        libc::EACCES,
        "over two windows"
    );
    assert_got!(setup.write(START + 2 * page - 4, &[0; 8]), 0);
    assert_got!(setup.read(START + 2 * page - 4, 8).0, libc::EACCES);
    assert_got!(setup.write(START + page - 1, &[0]), libc::EACCES);
    // One over all makes all one.
    setup.window(1, START, 4 * page, true, true);
    assert_got!(setup.read(START + page - 4, 8).0, 0);
    setup.device.device().unset_window(1).expect("removing it");
    assert_got!(setup.read(START + page - 4, 8).0, libc::EACCES);

    request(other.programs(), READ, START, &[0; 4]);
    assert!(other.run("work", 0).expect("a run"), "no such program");
    assert_got!(
        result(other.programs(), 4).0,
        -libc::EACCES,
        "another device"
    );
}

/// When the call returns, programs do not use the window any more.
pub(super) fn removed_while_programs_use_it() {
    let Setup {
        guest,
        vcpu,
        device,
        pages,
    } = Setup::new("mem", 1);
    let window = Window {
        addr: START,
        size: PAGE as u64,
        read: true,
        write: true,
    };
    request(device.programs(), WRITE, START, &[0x77; 8]);
    device.device().set_window(0, window).expect("a window");
    let mut vcpus = vec![vcpu, guest.vcpu(1)];
    let writes = Args {
        addr: ADDR,
        count: 10,
        ..Default::default()
    };
    meanwhile(
        vcpus.drain(..).map(|mut vcpu| {
            move || {
                let (_, exits) = vcpu.call(Routine::WriteLoop, writes);
                assert_got!(exits, []);
            }
        }),
        || {
            for round in 0..50 {
                device.device().set_window(0, window).expect("a window");
                wait_for("a write", 0x77, || pages.bytes(0, 1)[0]);
                device.device().unset_window(0).expect("removing it");
                pages.fill(std::iter::repeat_n(0, 8));
                thread::yield_now();
                assert_got!(pages.bytes(0, 8), [0; 8], "after removal {round}");
            }
        },
    );
}
