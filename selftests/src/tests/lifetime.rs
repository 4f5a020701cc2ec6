// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What is freed, when: devices closed under load, references, the module.

use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::{env, io, thread};

use Reg::{R0, R1, R6};
use kvm_bpf::uapi::KVM_DEV_TYPE_BPF;
use kvm_bpf_selftests::bpf::{
    Census, Index, Map, Prog, ProgType, Reg, add_imm, atomic_add, jump_if_ne, lookup, mov_imm,
};
use kvm_bpf_selftests::device::{Answer, Device, NO_REGION, region, test_create};
use kvm_bpf_selftests::guest::{Guest, Vcpu};
use kvm_bpf_selftests::harness::{Errno, meanwhile, skip, wait_for};
use kvm_bpf_selftests::programs::{Recorder, ret};

use super::{ADDR, SIZE, assert_errno};

tests!(
    close_while_vcpus_run,
    close_while_vcpus_are_inside,
    vm_closed_under_a_running_vcpu,
    references_are_given_back,
    region_holds_programs,
    module_is_held_by_devices,
    module_unloads_and_loads,
);

/// Counts itself in a map when it starts, then works for a while.
fn slow_write(map: &Map, rounds: i32) -> Prog {
    let mut insns = lookup(map, Index::Imm(0));
    insns.extend([
        mov_imm(R1, 1),
        atomic_add(8, R0, 0, R1),
        mov_imm(R6, rounds),
        add_imm(R6, -1),
        jump_if_ne(R6, 0, -2),
    ]);
    insns.extend(ret(0));
    Prog::load(ProgType::WRITE, &insns)
}

/// Lets two vCPUs write while `action` lasts, which is given a count of their writes.
fn while_vcpus_write(guest: &Guest, action: impl FnOnce(&AtomicU64)) {
    let accesses = AtomicU64::new(0);
    let workers = (0..2).map(|id| {
        let mut vcpu = guest.vcpu(id);
        let accesses = &accesses;
        move || {
            vcpu.write(ADDR, 4, 1);
            accesses.fetch_add(1, SeqCst);
        }
    });
    meanwhile(workers, || action(&accesses));
}

/// Waits for so many more accesses.
#[track_caller]
fn wait_for_more(accesses: &AtomicU64, more: u64) {
    let enough = accesses.load(SeqCst) + more;
    wait_for("more accesses", true, || accesses.load(SeqCst) >= enough);
}

/// No program runs once `close` returned.
#[track_caller]
fn close_under_load(rounds: i32, repetitions: u32) {
    let census = Census::now();
    let guest = Guest::new();
    while_vcpus_write(&guest, |accesses| {
        for repetition in 0..repetitions {
            let map = Map::new(1, 1);
            let device = Device::new(guest.vm());
            let prog = slow_write(&map, rounds);
            device.set_region(0, &region(ADDR, SIZE, None, Some(&prog)));
            drop(prog);
            wait_for_more(accesses, 10);

            drop(device);
            let at_close = map.get(0)[0];
            assert!(at_close > 0, "wanted the program to have run, got 0 runs");
            wait_for_more(accesses, 10);
            assert_got!(map.get(0)[0], at_close, "runs, closed {repetition} times");
        }
    });
    census.wait_for_newer(0, 0);
}

fn close_while_vcpus_run() {
    close_under_load(1, 8);
}

/// The program takes most of a vCPU's time, so the close finds it at work.
fn close_while_vcpus_are_inside() {
    close_under_load(20_000, 8);
}

fn vm_closed_under_a_running_vcpu() {
    let census = Census::now();
    let guest = Guest::new();
    let recorder = Recorder::new();
    let device = Device::new(guest.vm());
    device.set_region(0, &region(ADDR, SIZE, None, Some(&recorder.writes(0))));
    let mut vcpus: Vec<Vcpu> = (0..2).map(|id| guest.vcpu(id)).collect();
    drop(guest);
    thread::scope(|scope| {
        for vcpu in &mut vcpus {
            scope.spawn(|| {
                for _ in 0..50 {
                    assert_got!(vcpu.write(ADDR, 4, 1), []);
                }
            });
        }
    });
    assert_got!(recorder.count(), 100, "writes that the program saw");
    drop((vcpus, device, recorder));
    census.wait_for_newer(0, 0);
}

fn references_are_given_back() {
    let census = Census::now();
    for _ in 0..10 {
        let guest = Guest::new();
        let mut vcpu = guest.vcpu(0);
        let device = Device::new(guest.vm());
        let recorder = Recorder::new();
        for index in 0..8 {
            // Set, swapped, swapped back, and left to the close.
            for round in 0..3 {
                let (read, write) = (recorder.reads(round, 0), recorder.writes(0));
                let addr = ADDR + index * SIZE;
                device.set_region(index, &region(addr, SIZE, Some(&read), Some(&write)));
                assert_got!(vcpu.read(addr, 8).value, round);
            }
        }
    }
    census.wait_for_newer(0, 0);
}

/// A region is all that a program needs to live; the VMM may close its fds.
fn region_holds_programs() {
    let census = Census::now();
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let device = Device::new(guest.vm());
    {
        let recorder = Recorder::new();
        let (read, write) = (recorder.reads(7, 0), recorder.writes(0));
        device.set_region(0, &region(ADDR, SIZE, Some(&read), Some(&write)));
    }
    for _ in 0..20 {
        assert_got!(vcpu.read(ADDR, 4).value, 7);
        assert_got!(vcpu.write(ADDR, 4, 1), []);
        assert_got!(census.newer(), (2, 1), "programs and maps");
    }
    device.set_region(0, &NO_REGION);
    census.wait_for_newer(0, 0);
}

const MODULE: &str = "/sys/module/kvm_bpf";

/// References to the module, as the kernel counts them.
fn module_references() -> u64 {
    match fs::read_to_string(format!("{MODULE}/refcnt")) {
        Ok(text) => text.trim().parse().expect("a number in refcnt"),
        Err(_) => skip("kvm_bpf is built into this kernel"),
    }
}

fn delete_module() -> Answer {
    // SAFETY: the name is a C string.
    let result = unsafe {
        libc::syscall(
            libc::SYS_delete_module,
            c"kvm_bpf".as_ptr(),
            libc::O_NONBLOCK,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(Errno::last()),
    }
}

fn module_is_held_by_devices() {
    let before = module_references();
    let guest = Guest::new();
    for _ in 0..3 {
        let first = Device::new(guest.vm());
        let second = Device::new(guest.vm());
        assert_got!(module_references(), before + 2, "with two devices");
        assert_errno("unloading with two devices", delete_module(), libc::EAGAIN);
        drop(first);
        assert_errno("unloading with one device", delete_module(), libc::EAGAIN);
        drop(second);
        assert_got!(module_references(), before, "references after closing");
    }
    assert!(Path::new(MODULE).exists(), "wanted {MODULE}, got nothing");
}

/// `KVM_BPF_MODULE` names the file to load again.
fn module_unloads_and_loads() {
    module_references();
    let Ok(path) = env::var("KVM_BPF_MODULE") else {
        skip("KVM_BPF_MODULE does not name kvm_bpf.ko");
    };
    let file = File::open(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let load = || {
        let no_arguments = CString::default();
        // SAFETY: the fd is open, the string a C string.
        let result = unsafe {
            libc::syscall(
                libc::SYS_finit_module,
                file.as_raw_fd(),
                no_arguments.as_ptr(),
                0,
            )
        };
        assert!(result == 0, "{path}: {}", io::Error::last_os_error());
    };

    let guest = Guest::new();
    for _ in 0..3 {
        assert_got!(delete_module(), Ok(()), "unloading without a device");
        let answer = test_create(guest.vm(), KVM_DEV_TYPE_BPF);
        assert_errno(
            "KVM_CREATE_DEVICE_TEST without the module",
            answer,
            libc::ENODEV,
        );
        load();
        drop(Device::new(guest.vm()));
    }
}
