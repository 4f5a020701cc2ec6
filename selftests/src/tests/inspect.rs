// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `kvm-bpf inspect`, which shows the devices of a process.

use std::os::fd::AsRawFd;
use std::process::id;

use kvm_bpf::{Device as LibraryDevice, Window};
use kvm_bpf_selftests::bpf::{Prog, ProgType, program_id};
use kvm_bpf_selftests::device::{Device, region, work};
use kvm_bpf_selftests::guest::Guest;
use kvm_bpf_selftests::harness::meanwhile;
use kvm_bpf_selftests::programs::{answer, only_return, plug, ret, sample};
use vmm_sys_util::eventfd::EventFd;

use super::{ADDR, SIZE, beside_this_program};

tests!(
    a_sample_with_its_state_in_words,
    each_kind_of_thing,
    counts_while_it_runs,
    a_process_without_devices,
);

/// What it printed: whether it worked, stdout, stderr.
fn inspect(args: &[&str]) -> (bool, String, String) {
    let output = beside_this_program("kvm-bpf")
        .arg("inspect")
        .args(args)
        .output()
        .expect("kvm-bpf");
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    (
        output.status.success(),
        text(&output.stdout),
        text(&output.stderr),
    )
}

/// The lines about this process.
#[track_caller]
fn own(args: &[&str]) -> Vec<String> {
    let pid = id().to_string();
    let (works, out, error) = inspect(&[&[pid.as_str()], args].concat());
    assert!(works, "kvm-bpf inspect {args:?}: {error}");
    out.lines().map(|line| line.trim().to_string()).collect()
}

#[track_caller]
fn assert_line(lines: &[String], wanted: &str) {
    assert!(
        lines.iter().any(|line| line == wanted),
        "wanted {wanted:?}, got {lines:#?}"
    );
}

fn a_sample_with_its_state_in_words() {
    let guest = Guest::new();
    let device = plug(guest.vm(), ADDR, sample("regbank"));
    let mut vcpu = guest.vcpu(0);
    vcpu.write(ADDR + 8, 8, 0x1234);
    vcpu.read(ADDR + 0x30, 4);
    let lines = own(&[]);
    assert_line(&lines, &format!("region 0: MMIO {ADDR:#x}, 0x1000 bytes"));
    let read = device.programs().read_program().expect("a read program");
    let named = format!(
        "reads: regbank_read (program {}, tag ",
        program_id(read.as_raw_fd())
    );
    assert!(
        lines.iter().any(|line| line.starts_with(&named)),
        "wanted {named:?}, got {lines:#?}"
    );
    let state = "0: (struct regbank){.scratch = (__u64)4660,.unknown_reads = (__u64)1,}";
    assert_line(&lines, state);
    assert_line(&lines, "allowed: all");
}

fn each_kind_of_thing() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let eventfd = EventFd::new(0).expect("eventfd");
    let write = Prog::load_sleepable(ProgType::WRITE, &ret(0));
    let works = only_return(ProgType::WORK, 0);
    device.set_region(3, &region(ADDR, SIZE, None, Some(&write)));
    device.set_irq(0, eventfd.as_raw_fd());
    device.set_irq(7, eventfd.as_raw_fd());
    device.set_work(2, &work(Some(&works), Some(&eventfd)));
    let other = LibraryDevice::new(guest.vm()).expect("a second device");
    let window = Window {
        addr: 0x1000,
        size: 0x2000,
        read: true,
        write: true,
    };
    other.set_window(4, window).expect("a window");
    device.set_perms(0x2_0040, 1);

    let lines = own(&[]);
    for wanted in [
        format!("region 3: MMIO {ADDR:#x}, {SIZE:#x} bytes"),
        "reads: user space".to_string(),
        "work 2: run by an eventfd or the VMM".to_string(),
        "interrupts: 0, 7".to_string(),
        "allowed: SLEEP, REPLACE".to_string(),
        "programs must not be extended".to_string(),
        "window 4: 0x1000, 0x2000 bytes, to read and write".to_string(),
        "allowed: all".to_string(),
        "programs may be extended".to_string(),
        "the VM can get more devices of this kind".to_string(),
    ] {
        assert_line(&lines, &wanted);
    }
    let sleeps = lines
        .iter()
        .any(|line| line.starts_with("writes: ") && line.contains(", may sleep)"));
    assert!(sleeps, "wanted a program that may sleep, got {lines:#?}");
}

/// The numbers behind "handled" and "declined" of a program's line.
#[track_caller]
fn counts(lines: &[String], what: &str) -> [u64; 2] {
    let line = lines.iter().find(|line| line.starts_with(what));
    let line = line.unwrap_or_else(|| panic!("wanted {what:?}, got {lines:#?}"));
    let (_, counts) = line
        .split_once("handled ")
        .unwrap_or_else(|| panic!("no counts: {line}"));
    let mut numbers = counts
        .split(", declined ")
        .map(|number| number.parse().expect("a number"));
    [(); 2].map(|()| numbers.next().expect("two numbers"))
}

fn counts_while_it_runs() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let read = answer(1);
    // Also of a sleepable one.
    let declines = Prog::load_sleepable(ProgType::WRITE, &ret(1));
    device.set_region(0, &region(ADDR, SIZE, Some(&read), Some(&declines)));
    let mut vcpu = guest.vcpu(0);
    vcpu.read(ADDR, 4);
    let lines = own(&["--for", "0.1"]);
    assert_got!(counts(&lines, "reads: "), [0, 0], "of no reads");
    assert_got!(counts(&lines, "writes: "), [0, 0], "of no writes");

    let lines = meanwhile(
        [|| {
            vcpu.read(ADDR, 4);
            vcpu.write(ADDR, 4, 5);
        }],
        || own(&["--for", "1"]),
    );
    let ([handled, none], [nothing, declined]) =
        (counts(&lines, "reads: "), counts(&lines, "writes: "));
    assert_got!((none, nothing), (0, 0), "declined reads, handled writes");
    assert!(
        handled > 0 && handled.abs_diff(declined) <= 1 + handled / 2,
        "as many reads as writes: {handled}, {declined}"
    );
    // Nobody counts any more.
    let lines = own(&[]);
    assert!(
        !lines.iter().any(|line| line.contains("handled")),
        "{lines:#?}"
    );
}

fn a_process_without_devices() {
    let (works, out, error) = inspect(&["1"]);
    assert_got!((works, out.as_str()), (false, ""), "of init");
    assert_got!(
        error.trim(),
        "kvm-bpf: process 1 has no device made of eBPF programs"
    );
    let (works, _, error) = inspect(&["4194304"]);
    let wanted = "kvm-bpf: process 4194304: No such file or directory (os error 2)";
    assert_got!((works, error.trim()), (false, wanted), "of nobody");
    let (works, _, error) = inspect(&["1", "--for", "-1"]);
    assert!(!works && !error.is_empty(), "a negative time: {error}");
}
