// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Small devices and their interrupts; what a guest and its console do that ends or stops no VMM.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use kvm_bpf_selftests::harness::Errno;
use kvm_bpf_selftests::vmm::{
    GUEST, Running, Vmm, assert_between, fields, initrd, kernel, number, program, sample,
};
use libtest_mimic::Trial;
use vmm_sys_util::tempdir::TempDir;

use super::{ARM64, AT, AT2, accessing, at, bank};

pub fn all() -> Vec<Trial> {
    let mut tests = tests!(
        first_vm_has_a_device,
        guest_reads_the_device_in_ten_lines,
        guest_reads_a_parameter,
        interrupts_reach_the_lines_of_their_device,
        odd_accesses_end_no_guest,
        ends_though_nobody_reads,
    );
    // x86-64 alone has such an exit.
    if !ARM64 {
        tests.extend(tests!(triple_fault_is_a_crash));
    }
    tests
}

/// The program of Documentation/vmm-authors.md.
fn first_vm_has_a_device() {
    let directory = TempDir::new().expect("a directory");
    let output = directory.as_path().join("output");
    // Apart from libbpf's messages, which come in between.
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$@\" >\"$0\""]).arg(&output);
    command.args(["/bin/kvm-bpf-first-vm", &sample("regbank")]);
    let got = Running::start(command, None).finish(Duration::from_secs(120));
    let output = fs::read_to_string(output).expect("its output");
    let lines: Vec<_> = output.lines().take(3).collect();
    let wanted = [
        "the guest read 0x4b425042",
        "reloaded: carried over: accesses, regbank",
        "saved: {",
    ];
    assert_eq!(lines, wanted, "its first lines");
    got.assert_well();
}

/// That of README.md: its accesses are shown, and writes exit, as it takes none.
fn guest_reads_the_device_in_ten_lines() {
    let got = accessing(&at(&program("ten_lines"), AT)).run();
    got.assert_well();
    got.assert_has("ACCESS 0xd0000000 32 read 0x0000002A");
    let registers = got.device(AT)["registers"].as_array().expect("registers");
    let directions: Vec<_> = registers.iter().map(|it| &it["direction"]).collect();
    assert!(directions.iter().any(|it| **it == "write"), "writes exit");
    assert!(directions.iter().all(|it| **it != "read"), "reads do not");
}

/// A device's parameters are what the command line says.
fn guest_reads_a_parameter() {
    let device = at(&program("params"), AT);
    let got = accessing(&(device + ",param=longs:7,param=bytes:42:1,param=mapped:0x1")).run();
    got.assert_well();
    got.assert_has("ACCESS 0xd0000000 32 read 0x0000002A");
}

/// Each device gets as many interrupt lines as its note says, and a signal goes to its own: of two
/// devices with three each, Linux has a driver that takes the first.
fn interrupts_reach_the_lines_of_their_device() {
    let device = program("virtio_irqs");
    let got = Vmm::new()
        .bpf(at(&device, AT))
        .bpf(at(&device, AT2))
        .append("irqs=0xd0000000 irqs=0xd0001000")
        .run();
    got.assert_well();
    let lines = if ARM64 { ["33:", "36:"] } else { ["5:", "8:"] };
    // SVM's emulation may deliver an interrupt twice (Documentation/emulation.md).
    let three = if ARM64 { 3 } else { 6 };
    let said = got.all_said("IRQS");
    let wanted = [
        ("0xd0000000", [(0, 0), (0, 0)]),
        ("0xd0000000", [(3, three), (0, 0)]),
        ("0xd0001000", [(3, three), (0, 0)]),
        ("0xd0001000", [(3, three), (3, three)]),
    ];
    assert_eq!(said.len(), wanted.len(), "lines IRQS");
    for (said, (addr, bounds)) in said.into_iter().zip(wanted) {
        let [device, counts @ ..] = fields::<3>(said);
        assert_eq!(device, addr, "the device that has signalled");
        for ((count, line), (low, high)) in counts.into_iter().zip(lines).zip(bounds) {
            let count = count.strip_prefix(line);
            let count = count.unwrap_or_else(|| panic!("wanted line {line} in {said:?}"));
            assert_between(said, low, number(count), high);
        }
    }
    got.assert_no_exits(2);
}

/// A process of the guest accesses the bank with instructions that drivers do not use.  Where KVM
/// cannot emulate one the process gets a signal, and the guest goes on.
fn odd_accesses_end_no_guest() {
    let directory = TempDir::new().expect("a directory");
    let files = directory.as_path();
    fs::create_dir(files.join("bin")).expect("a directory");
    let program = "bin/kvm-bpf-guest-access";
    fs::copy(format!("/{program}"), files.join(program)).expect("the guest's program");
    // The kernel takes several archives as one.
    let all = files.join("initrd");
    let mut archive = File::create(&all).expect("a file");
    archive
        .write_all(&fs::read(initrd()).expect("the guest's files"))
        .expect("room");
    let names = files.join("names");
    fs::write(&names, format!("bin\n{program}\n")).expect("a file");
    let status = Command::new("cpio")
        .args(["-o", "-H", "newc"])
        .current_dir(files)
        .stdin(File::open(&names).expect("the names"))
        .stdout(archive)
        .stderr(Stdio::null())
        .status();
    assert!(status.expect("cpio").success(), "cpio");

    let got = Vmm::booting(&kernel(), &all)
        .bpf(bank())
        .append("access=0xd0000008 bank=0xd0000000")
        .run();
    got.assert_well();
    let ways = got.all_said("GUEST-ACCESS");
    if ARM64 {
        let wanted = [
            "pair signal 7",
            "vector signal 7",
            "post-index signal 7",
            "plain ok",
        ];
        assert_eq!(ways, wanted, "ways to access");
    } else {
        // Without AVX it is no instruction of the guest's.
        let avx = ways.get(1).copied().filter(|way| *way == "avx signal 4");
        let wanted = ["sse ok", avx.unwrap_or("avx ok"), "locked ok", "plain ok"];
        assert_eq!(ways, wanted, "ways to access");
    }
    got.assert_has("ACCESS 0xd0000000 32 read 0x4B425042");
    got.assert_no_exits(1);
}

/// Nobody takes what guest and VMM write: the pipe is full already.
fn ends_though_nobody_reads() {
    let (_unread, full) = io::pipe().expect("a pipe");
    let flags = |flags: libc::c_int| {
        // SAFETY: the fd is ours, and the flags are a number.
        let result = unsafe { libc::fcntl(full.as_raw_fd(), libc::F_SETFL, flags) };
        assert_eq!(result, 0, "fcntl: {:?}", Errno::last());
    };
    flags(libc::O_NONBLOCK);
    let mut filler = full.try_clone().expect("the pipe again");
    loop {
        // Byte by byte at last: there is to be no room for one.
        match filler.write(&[0; 4096]).or_else(|_| filler.write(&[0])) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => panic!("filling a pipe: {error}"),
        }
    }
    flags(0);

    let vmm = Vmm::new().args(["--cpus", "2"]).append("flood=10");
    let (mut command, _directory) = vmm.into_command();
    command.stdin(Stdio::null());
    command.stdout(full.try_clone().expect("the pipe again"));
    command.stderr(full);
    let mut child = command.spawn().expect("the VMM");
    let start = Instant::now();
    let status = loop {
        match child.try_wait().expect("wait(2)") {
            Some(status) => break status.code(),
            None if start.elapsed() < GUEST => sleep(Duration::from_millis(100)),
            None => {
                child.kill().expect("kill(2)");
                child.wait().expect("wait(2)");
                break None;
            }
        }
    };
    assert_eq!(status, Some(0), "the VMM's status within {GUEST:?}");
}

/// A guest's crash is an error of the VMM.
fn triple_fault_is_a_crash() {
    let got = Vmm::new().append("reboot=t").run();
    assert_eq!(got.status, Some(1), "the VMM's status");
    got.assert_has("*the guest crashed: triple fault*");
}
