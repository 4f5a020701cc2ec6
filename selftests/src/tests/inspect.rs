// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `kvm-bpf inspect`, which shows the devices of a process.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::process::id;
use std::thread;

use kvm_bpf::uapi::{KVM_DEV_BPF_ATTR_GROUP_PIO, kvm_bpf_user_region, kvm_bpf_user_work};
use kvm_bpf::{Device as LibraryDevice, Window};
use kvm_bpf_selftests::bpf::{Prog, ProgType, program_id};
use kvm_bpf_selftests::device::{Device, region, work};
use kvm_bpf_selftests::guest::{Guest, Vcpu};
use kvm_bpf_selftests::harness::{Errno, meanwhile, skip, wait_for};
use kvm_bpf_selftests::programs::{answer, loaded, only_return, plug, ret, sample, test_image};
use libbpf_rs::query::LinkInfoIter;
use vmm_sys_util::eventfd::EventFd;

use super::{ADDR, SIZE, beside_this_program};

tests!(
    a_sample_with_its_state_in_words,
    state_of_each_kind_in_words,
    each_kind_of_thing,
    counts_while_it_runs,
    counts_of_ports,
    counts_of_work,
    counts_only_when_asked,
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

/// Arrays, hash tables and global variables; of what is in other maps nothing is said.
fn state_of_each_kind_in_words() {
    let guest = Guest::new();
    let device = plug(guest.vm(), ADDR, test_image("carry"));
    let mut vcpu = guest.vcpu(0);
    for (offset, value) in [(0, 11), (8, 12), (0x10, 13), (0x18, 14)] {
        vcpu.write(ADDR + offset, 8, value);
    }
    let other = device.programs().map("other").expect("a hash table");
    other
        .update(&[5, 0, 0, 0], &77_u64.to_ne_bytes())
        .expect("an entry");
    let lines = own(&[]);
    for wanted in [
        "0: (struct state){.first = (__u32)11,.second = (__u32)12,}",
        "(__u32)0: (__u64)13",
        "(__u32)5: (__u64)77",
    ] {
        assert_line(&lines, wanted);
    }
    for wanted in [
        "zeroed = (__u64)14",
        "preset = (__u64)7",
        "version = (__u64)1",
    ] {
        let is_there = lines.iter().any(|line| line.contains(wanted));
        assert!(is_there, "wanted {wanted:?}, got {lines:#?}");
    }
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
    counts_in_words(lines, what, ["handled", "declined"])
}

/// The numbers behind these two words.
#[track_caller]
fn counts_in_words(lines: &[String], what: &str, [zero, other]: [&str; 2]) -> [u64; 2] {
    let line = lines.iter().find(|line| line.starts_with(what));
    let line = line.unwrap_or_else(|| panic!("wanted {what:?}, got {lines:#?}"));
    let (_, counts) = line
        .split_once(&format!(": {zero} "))
        .unwrap_or_else(|| panic!("no counts: {line}"));
    let between = format!(", {other} ");
    let mut numbers = counts
        .split(&between)
        .map(|number| number.parse().expect("a number"));
    [(); 2].map(|()| numbers.next().expect("two numbers"))
}

/// What it printed as it counted for a second. It counts so many programs when `act` is called.
#[track_caller]
fn counted_meanwhile(programs: usize, act: impl FnOnce()) -> Vec<String> {
    thread::scope(|scope| {
        let before = links();
        let inspect = scope.spawn(|| own(&["--for", "1"]));
        wait_for("programs that count", before + programs, links);
        act();
        inspect.join().expect("kvm-bpf inspect")
    })
}

/// How many links there are: a program that counts is attached with one.
fn links() -> usize {
    LinkInfoIter::default().count()
}

fn counts_while_it_runs() {
    let guest = Guest::new();
    // Reads of what is there it handles, writes to that it declines.
    let _device = plug(guest.vm(), ADDR, test_image("half_bank"));
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
    // Of a program without types only that it cannot be counted is known.
    let device = Device::new(guest.vm());
    device.set_region(0, &region(ADDR + SIZE, SIZE, Some(&answer(1)), None));
    let lines = own(&["--for", "0"]);
    let bare = lines
        .iter()
        .any(|line| line.ends_with("not counted: it has no BTF"));
    assert!(bare, "{lines:#?}");
    // Nobody counts any more.
    let lines = own(&[]);
    assert!(
        !lines.iter().any(|line| line.contains("handled")),
        "{lines:#?}"
    );
}

fn counts_of_ports() {
    const PORT: u16 = 0x2f8;

    let guest = Guest::new();
    let device = Device::new(guest.vm());
    if device.has_attr(KVM_DEV_BPF_ATTR_GROUP_PIO, 0).is_err() {
        skip("this architecture has no ports");
    }
    let programs = loaded(test_image("inspected"));
    let fd = |program: Option<BorrowedFd<'_>>| program.expect("a program").as_raw_fd();
    let ports = kvm_bpf_user_region {
        addr: PORT.into(),
        size: 8,
        bpf_readfd: fd(programs.read_program()),
        bpf_writefd: fd(programs.write_program()),
    };
    device.set_ports(5, &ports);
    let mut vcpu = guest.vcpu(0);
    let lines = counted_meanwhile(2, || {
        for (port, times) in [(PORT, 5), (PORT + 4, 3)] {
            for _ in 0..times {
                port_access(&mut vcpu, port);
            }
        }
    });
    assert_line(&lines, "region 5: ports 0x2f8, 0x8 bytes");
    assert_got!(counts(&lines, "reads: inspected_read "), [5, 3], "of in");
    assert_got!(counts(&lines, "writes: inspected_write "), [3, 5], "of out");
}

#[cfg(target_arch = "x86_64")]
fn port_access(vcpu: &mut Vcpu, port: u16) {
    vcpu.port_in(port, 1);
    vcpu.port_out(port, 1, 0);
}

#[cfg(not(target_arch = "x86_64"))]
fn port_access(_: &mut Vcpu, _: u16) {
    unreachable!("there are no ports");
}

/// Whoever runs it. A run that asks to be run again is one that had more to do.
fn counts_of_work() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let programs = loaded(test_image("inspected"));
    let signal = EventFd::new(0).expect("eventfd");
    let program = programs.work("odd").expect("its program").program;
    let work = kvm_bpf_user_work {
        bpf_fd: program.as_raw_fd(),
        eventfd: signal.as_raw_fd(),
        flags: 0,
        pad: 0,
    };
    device.set_work(9, &work);
    let lines = counted_meanwhile(1, || {
        let again = Err(Errno(libc::EAGAIN));
        assert_got!((device.run(9, 2), device.run(9, 4)), (Ok(()), Ok(())));
        assert_got!(device.run(9, 3), again, "with an odd number");
        // Once for the number, and once more as it was odd.
        signal.write(7).expect("a signal");
    });
    assert_line(&lines, "work 9: run by an eventfd or the VMM");
    let got = counts_in_words(
        &lines,
        "program: inspected_work ",
        ["finished", "more to do"],
    );
    assert_got!(got, [3, 2], "runs that finished, and that had more to do");
}

/// The kernel numbers programs one by one: none is loaded without `--for`, and none stays with it.
fn counts_only_when_asked() {
    let guest = Guest::new();
    let _device = plug(guest.vm(), ADDR, test_image("half_bank"));
    let before = links();
    let next = || program_id(answer(0).as_raw_fd());
    let loaded_by = |args: &[&str]| {
        let before = next();
        own(args);
        next() - before - 1
    };
    assert_got!(loaded_by(&[]), 0, "programs that it loads");
    // libbpf has some of its own, to find out what the kernel can.
    let counting = loaded_by(&["--for", "0"]);
    assert!(
        counting >= 2,
        "wanted two programs that count, got {counting}"
    );
    wait_for("programs that count", before, links);
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
