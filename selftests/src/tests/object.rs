// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Object files as clang makes them of what a device's author may write.

use std::os::fd::AsRawFd;

use kvm_bpf::image::Error;
use kvm_bpf_selftests::bpf::Census;
use kvm_bpf_selftests::guest::{Exit, Guest};
use kvm_bpf_selftests::harness::{skip, wait_for};
use kvm_bpf_selftests::programs::{plug, test_image, test_path};

use super::{ADDR, element, eventfd, taken};

tests!(
    static_offsets,
    after_a_minimal_vmlinux_h,
    after_a_full_vmlinux_h,
    programs_that_are_not_loaded,
    no_program_that_is_loaded,
    examples_of_documents,
    examples_of_kernel_documents,
);

/// `kvm_bpf.h` has clang keep constant offsets into the context, where branches would share one
/// that is computed.
fn static_offsets() {
    const DATA: u64 = 0x8877_6655_1122_3344;
    const UPPER: u64 = 0x08;
    const VCPU: u64 = 0x10;

    let image = test_image("static_offsets");
    if image.note().compatible == ["kvm-bpf,old-clang"] {
        skip("compiled by a clang without preserve_static_offset");
    }
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(5);
    let device = plug(guest.vm(), ADDR, image);
    for (offset, wanted) in [
        (0, 0x1122_3344),
        (UPPER, 0x8877_6655),
        (VCPU, 0x1122_3344),
        (VCPU | UPPER, 5),
    ] {
        assert_got!(vcpu.write(ADDR + offset, 8, DATA), []);
        let seen = element(device.programs(), "seen");
        assert_got!(seen, u64::to_ne_bytes(wanted), "write at {offset:#x}");
    }
    for (offset, wanted) in [(0, 0x1122_3344), (UPPER, 0x1122_3344 << 32)] {
        let read = vcpu.read(ADDR + offset, 8);
        assert_got!((read.value, read.exits), (wanted, vec![]));
    }
}

fn after_a_minimal_vmlinux_h() {
    after_vmlinux_h("after_minimal_vmlinux");
}

fn after_a_full_vmlinux_h() {
    if !test_path("after_vmlinux").exists() {
        skip("where this was built there was no kernel");
    }
    after_vmlinux_h("after_vmlinux");
}

/// `kvm_bpf.h` takes the types from there, and the device can use those of the kernel.
fn after_vmlinux_h(name: &str) {
    const TASK_SIZE: u64 = 0x0;
    const WRITES: u64 = 0x4;
    const HAS_SCALE: u64 = 0x8;

    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let device = plug(guest.vm(), ADDR, test_image(name));
    let irq = eventfd();
    device.device().set_irq(0, &irq).expect("interrupt 0");
    let mut read = |register| {
        let read = vcpu.read(ADDR + register, 4);
        assert_got!(read.exits, [], "exits of a read at {register:#x}");
        read.value
    };
    let size = read(TASK_SIZE);
    assert!(size > 1000, "sizeof(struct task_struct): {size}");
    assert_got!(read(WRITES), 0);
    assert_got!(read(HAS_SCALE), 1, "a capacity of the host's first CPU");
    for writes in 1..=2 {
        assert_got!(vcpu.write(ADDR, 4, 0), []);
        assert_got!(taken(&irq), 1, "signals of fd {}", irq.as_raw_fd());
        let read = vcpu.read(ADDR + WRITES, 4);
        assert_got!((read.value, read.exits), (writes, vec![]));
    }
}

/// What libbpf does not load by itself is as if not there, whatever it is.
fn programs_that_are_not_loaded() {
    let census = Census::now();
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let device = plug(guest.vm(), ADDR, test_image("optional_programs"));
    assert_got!(census.newer().0, 1, "programs");
    let read = vcpu.read(ADDR, 8);
    assert_got!((read.value, read.exits), (42, vec![]));
    assert_got!(vcpu.write(ADDR, 4, 7), [Exit::Write(ADDR, 4, 7)]);
    drop(device);
    census.wait_for_newer(0, 0);
}

fn no_program_that_is_loaded() {
    match test_image("optional_only").load() {
        Err(Error::NoProgram) => {}
        Err(error) => panic!("wanted NoProgram, got {error:#?}"),
        Ok(_) => panic!("wanted NoProgram, but it loads"),
    }
}

/// What README.md and Documentation/writing-a-device.md show; `scripts/commands` compares them.
fn examples_of_documents() {
    const DATA: u64 = 0x8877_6655_1122_3344;
    const LOWER: u64 = 0x1122_3344;
    const UPPER: u64 = 0x8877_6655;

    let guest = Guest::new();
    let mut vcpu = guest.vcpu(5);
    let _ten_lines = plug(guest.vm(), ADDR, test_image("ten_lines"));
    for (offset, wanted) in [(0, 42), (8, 0)] {
        let read = vcpu.read(ADDR + offset, 8);
        assert_got!((read.value, read.exits), (wanted, vec![]));
    }
    assert_got!(vcpu.write(ADDR, 4, 7), [Exit::Write(ADDR, 4, 7)]);

    let addr = ADDR + 0x1000;
    let excerpts = plug(guest.vm(), addr, test_image("excerpts"));
    let read = vcpu.read(addr, 8);
    assert_got!((read.value, read.exits), ((1 << 32) | 42, vec![]));
    for (offset, wanted) in [(0, LOWER), (8, 5), (0x10, LOWER)] {
        assert_got!(vcpu.write(addr + offset, 8, DATA), []);
        for (word, wanted) in [(1, wanted), (2, LOWER)] {
            let read = vcpu.read(addr + 8 * word, 8);
            assert_got!((read.value, read.exits), (wanted, vec![]));
        }
    }
    let state = excerpts.save().expect("a state");
    let json = String::from_utf8(state.to_json().expect("JSON")).expect("text");
    let field = format!("\"seconds_left\": {UPPER}");
    assert!(json.contains(&field), "{json}");
}

/// Those of the documents that the series adds to the kernel: they load, and do what is said.
fn examples_of_kernel_documents() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(5);
    let irq = eventfd();
    let mut device = plug(guest.vm(), ADDR, test_image("documents"));
    device.set_irq(0, &irq).expect("interrupt 0");
    let read = vcpu.read(ADDR, 4);
    assert_got!((read.value, read.exits), (5, vec![]));
    for (offset, len) in [(0, 8), (4, 4)] {
        let exits = vcpu.read(ADDR + offset, len).exits;
        assert_got!(exits, [Exit::Read(ADDR + offset, len)]);
    }
    // The timer finds the interrupt that a program has taken, and not before.
    device.resume().expect("starting the timer");
    device.save().expect("its end");
    assert_got!(taken(&irq), 0, "signals without an interrupt");
    assert_got!(vcpu.write(ADDR, 4, 0), []);
    device.resume().expect("starting the timer");
    wait_for("the timer's signal", 1, || taken(&irq));
}
