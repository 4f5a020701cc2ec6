// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Command lines and files that the VMM refuses: with status 1 and a line that says why.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use kvm_bpf_selftests::vmm::{Vmm, initrd, kernel, make_fifo, program, sample, trial};
use libtest_mimic::Trial;
use vmm_sys_util::tempdir::TempDir;

use super::{ARM64, AT, accessing, at, bank, serial_port};

/// Makes a test of a command line and of what its refusal says; both are made when it runs.
macro_rules! refused {
    ($name:literal, $words:expr, $args:expr) => {
        trial(concat!("vmm::refuses_", $name), || {
            Vmm::new().args($args).refuses(Some(1), &$words);
        })
    };
}

pub fn all() -> Vec<Trial> {
    let mut tests = objects();
    tests.extend(places());
    tests.extend(disks());
    tests.extend(parameters());
    tests.extend(if ARM64 {
        tests!(refuses_ports)
    } else {
        ports()
    });
    tests.extend(inputs());
    tests.extend(tests!(
        refuses_empty_disk,
        refuses_disk_over_a_device,
        refuses_to_save_a_disk,
        refuses_missing_kernel,
        refuses_endless_kernel,
        refuses_large_kernel,
        refuses_large_device,
        refuses_pipe_as_device,
        refuses_endless_initramfs,
        refuses_address_past_the_last,
        refuses_device_across_the_last_address,
        device_ends_at_the_last_address,
        refuses_what_the_verifier_refuses,
        shows_the_verifiers_log,
    ));
    tests
}

fn objects() -> Vec<Trial> {
    vec![
        refused!(
            "no_such_file",
            ["/nowhere.o", "No such file"],
            ["--bpf", &at("/nowhere.o", AT)]
        ),
        refused!(
            "not_an_elf",
            ["/bin/kvm-bpf-kselftests", "ELF"],
            ["--bpf", &at("/bin/kvm-bpf-kselftests", AT)]
        ),
        refused!(
            "not_ebpf",
            ["/bin/busybox", "eBPF"],
            ["--bpf", &at("/bin/busybox", AT)]
        ),
        refused!(
            "no_note",
            ["no_note.bpf.o", "note"],
            ["--bpf", &at(&program("no_note"), AT)]
        ),
        refused!(
            "note_from_the_future",
            ["future_note.bpf.o", "version"],
            ["--bpf", &at(&program("future_note"), AT)]
        ),
        refused!(
            "endless_device",
            ["/dev/zero", "character device"],
            ["--bpf", &at("/dev/zero", AT)]
        ),
        refused!(
            "directory_as_device",
            ["/progs", "a directory"],
            ["--bpf", &at("/progs", AT)]
        ),
        refused!(
            "no_such_device",
            ["nothing", "regbank"],
            ["--userspace", &at("nothing", AT)]
        ),
        refused!(
            "no_such_fallback",
            ["nothing", "regbank"],
            ["--bpf", &(bank() + ",fallback=nothing")]
        ),
        refused!(
            "fallback_with_more_interrupts",
            ["carry.bpf.o", "0 interrupts", "regbank"],
            ["--bpf", &(at(&program("carry"), AT) + ",fallback=regbank")]
        ),
        refused!(
            "line_of_no_controller",
            ["regbank", "uio", "arm,pl061"],
            ["--bpf", &(bank() + ",uio=0")]
        ),
        refused!(
            "line_past_the_last",
            ["pl061", "uio", "0 to 7"],
            ["--bpf", &(at(&sample("pl061"), AT) + ",uio=8")]
        ),
        refused!(
            "to_reset_user_space",
            ["regbank", "cannot be reset"],
            ["--reboot", "--userspace", &at("regbank", AT)]
        ),
    ]
}

/// An address that the guest has RAM at.
const RAM: u64 = if ARM64 { 0x4800_0000 } else { 0x800_0000 };

fn places() -> Vec<Trial> {
    vec![
        refused!(
            "overlap",
            ["regbank", "0xd0000800", "overlaps"],
            ["--bpf", &bank(), "--userspace", "regbank@0xd0000800"]
        ),
        refused!(
            "overlap_with_ram",
            ["regbank", "RAM"],
            ["--bpf", &at(&sample("regbank"), RAM)]
        ),
        refused!(
            "too_many_cpus",
            ["vcpufreq.bpf.o", "CPUs"],
            ["--bpf", &at(&sample("vcpufreq"), AT), "--cpus", "9"]
        ),
        refused!(
            "more_interrupts_than_lines",
            ["many_irqs.bpf.o", "interrupt line"],
            ["--bpf", &at(&program("many_irqs"), AT)]
        ),
    ]
}

fn disks() -> Vec<Trial> {
    vec![
        refused!(
            "no_such_disk",
            ["/nowhere.img", "No such file"],
            ["--disk", &at("/nowhere.img", AT)]
        ),
        refused!(
            "endless_disk",
            ["/dev/zero", "character device"],
            ["--disk", &at("/dev/zero", AT)]
        ),
        refused!(
            "disk_with_other_registers",
            ["regbank", "virtio device"],
            [
                "--disk",
                &format!("{},registers={}", bank(), sample("regbank"))
            ]
        ),
    ]
}

/// What the VMM cannot know of a device is for the command line to say, in its words.
fn parameters() -> Vec<Trial> {
    vec![
        refused!(
            "missing_parameter",
            ["params.bpf.o", "not given parameter longs"],
            ["--bpf", &at(&program("params"), AT)]
        ),
        refused!(
            "other_parameter",
            ["pl031", "no parameter alarm", "only clock"],
            ["--bpf", &(at(&sample("pl031"), AT) + ",param=alarm:1")]
        ),
        refused!(
            "parameter_of_what_has_none",
            ["regbank", "no parameter x", "it has none"],
            ["--bpf", &(bank() + ",param=x:1")]
        ),
        refused!(
            "more_values_than_a_parameter",
            ["pl031", "more than 1 values", "clock"],
            ["--bpf", &(at(&sample("pl031"), AT) + ",param=clock:1:2")]
        ),
        refused!(
            "value_too_large",
            ["params.bpf.o", "value 1 of parameter bytes, 256"],
            [
                "--bpf",
                &(at(&program("params"), AT) + ",param=bytes:0:0x100")
            ]
        ),
    ]
}

/// The UART at ports.
fn uart_at(port: &str) -> String {
    format!("{}@pio:{port}", sample("uart16550"))
}

/// What else may be there.
fn ports() -> Vec<Trial> {
    vec![
        refused!(
            "port_of_the_console",
            ["uart16550", "COM1", "ports 0x3f4 to 0x3fb", "overlaps"],
            ["--bpf", &uart_at("0x3f4")]
        ),
        refused!(
            "port_of_the_reset",
            ["uart16550", "keyboard"],
            ["--bpf", &uart_at("0x64")]
        ),
        refused!(
            "port_of_the_timer",
            ["uart16550", "timer"],
            ["--bpf", &uart_at("0x3f")]
        ),
        refused!(
            "port_of_the_pic",
            ["uart16550", "first PIC"],
            ["--bpf", &uart_at("0x19")]
        ),
        refused!(
            "port_of_the_sleep_registers",
            ["uart16550", "sleep"],
            ["--bpf", &uart_at("0x601")]
        ),
        refused!(
            "ports_twice",
            ["uart16550", "overlaps"],
            ["--bpf", &serial_port(), "--bpf", &uart_at("0x2ff")]
        ),
        refused!(
            "past_the_last_port",
            ["uart16550", "last port"],
            ["--bpf", &uart_at("0xfff9")]
        ),
        refused!(
            "memory_at_ports",
            ["regbank", "for memory, not for ports"],
            ["--bpf", &format!("{}@pio:0x2f8", sample("regbank"))]
        ),
        refused!(
            "userspace_at_ports",
            ["regbank", "ports"],
            ["--userspace", "regbank@pio:0x2f8"]
        ),
        refused!(
            "fallback_at_ports",
            ["regbank", "ports"],
            ["--bpf", &(serial_port() + ",fallback=regbank")]
        ),
    ]
}

/// arm64 has none.
fn refuses_ports() {
    let got = Vmm::new()
        .bpf(serial_port())
        .run_within(Duration::from_secs(30));
    assert_eq!(got.status, Some(2), "the VMM's status");
    got.assert_has("*no ports but on x86-64*");
}

fn inputs() -> Vec<Trial> {
    vec![
        refused!(
            "ports_in_memory",
            ["uart16550", "for ports, not for memory"],
            ["--bpf", &at(&sample("uart16550"), AT)]
        ),
        refused!(
            "input_of_what_has_none",
            ["regbank", "no input"],
            ["--bpf", &(bank() + ",input=/init")]
        ),
        refused!(
            "input_from_a_device",
            ["/dev/zero", "neither a pipe"],
            ["--bpf", &(at(&sample("pl061"), AT) + ",input=/dev/zero")]
        ),
        refused!(
            "output_of_what_has_none",
            ["regbank", "no output"],
            ["--bpf", &(bank() + ",output=/tmp/serial")]
        ),
    ]
}

fn refuses_empty_disk() {
    let directory = TempDir::new().expect("a directory");
    let file = directory.as_path().join("empty");
    File::create(&file).expect("an empty file");
    let disk = at(&file.display().to_string(), AT);
    Vmm::new()
        .args(["--disk", &disk])
        .refuses(Some(1), &["empty", "no whole sector"]);
}

/// A disk that would do, as the command line has it.
fn image(directory: &TempDir) -> String {
    let file = directory.as_path().join("image");
    fs::copy("/bin/busybox", &file).expect("a file");
    at(&file.display().to_string(), AT)
}

fn refuses_disk_over_a_device() {
    let directory = TempDir::new().expect("a directory");
    Vmm::new()
        .bpf(bank())
        .args(["--disk", &image(&directory)])
        .refuses(Some(1), &["image", "regbank", "overlaps"]);
}

fn refuses_to_save_a_disk() {
    let directory = TempDir::new().expect("a directory");
    let saved = directory.as_path().join("saved");
    Vmm::new()
        .args(["--disk", &image(&directory)])
        .args(["--save".as_ref(), saved.as_os_str()])
        .refuses(Some(1), &["image", "cannot be saved"]);
}

fn refuses_missing_kernel() {
    Vmm::booting(Path::new("/nowhere"), &initrd()).refuses(Some(1), &["/nowhere", "No such file"]);
}

// What has no end, or no place in guest memory, is refused before it is read.

fn refuses_endless_kernel() {
    Vmm::booting(Path::new("/dev/zero"), &initrd())
        .refuses(Some(1), &["/dev/zero", "character device"]);
}

/// A file of 512 MiB that takes no memory.
fn large(directory: &TempDir) -> String {
    let path = directory.as_path().join("large");
    let file = File::create(&path).expect("a file");
    file.set_len(512 << 20).expect("its length");
    path.display().to_string()
}

fn refuses_large_kernel() {
    let directory = TempDir::new().expect("a directory");
    Vmm::booting(Path::new(&large(&directory)), &initrd()).refuses(Some(1), &["large", "256 MiB"]);
}

fn refuses_large_device() {
    let directory = TempDir::new().expect("a directory");
    Vmm::new()
        .bpf(at(&large(&directory), AT))
        .refuses(Some(1), &["large", "16 MiB"]);
}

fn refuses_pipe_as_device() {
    let directory = TempDir::new().expect("a directory");
    let pipe = directory.as_path().join("pipe");
    make_fifo(&pipe);
    Vmm::new()
        .bpf(at(&pipe.display().to_string(), AT))
        .refuses(Some(1), &["pipe", "a pipe"]);
}

fn refuses_endless_initramfs() {
    Vmm::booting(&kernel(), Path::new("/dev/zero"))
        .refuses(Some(1), &["/dev/zero", "character device"]);
}

/// The last address that the guest's CPUs have, as the VMM says when a device is past it.
#[track_caller]
fn last_address() -> u64 {
    let said = Vmm::new()
        .bpf(at(&sample("regbank"), 1 << 52))
        .refuses(Some(1), &["regbank", "last address"]);
    let (_, last) = said.split_once(" last address, 0x").expect("the address");
    let digits = last.split(|it: char| !it.is_ascii_hexdigit()).next();
    u64::from_str_radix(digits.unwrap_or_default(), 16).expect("a number")
}

/// Of a device of eight pages that ends with the last address.
fn first_of_the_last_pages() -> u64 {
    last_address() - 0x7fff
}

fn refuses_address_past_the_last() {
    last_address();
}

fn refuses_device_across_the_last_address() {
    let last = last_address();
    Vmm::new()
        .bpf(at(&sample("vcpufreq"), first_of_the_last_pages() + 1))
        .refuses(Some(1), &["vcpufreq", &format!("{last:#x}")]);
}

// The guest accesses its first page: Linux gives no process the last one.
fn device_ends_at_the_last_address() {
    let first = first_of_the_last_pages();
    let got = Vmm::new()
        .bpf(at(&sample("vcpufreq"), first))
        .append(&format!("bank={first:#x}"))
        .run();
    got.assert_well();
    got.assert_has(&format!("ACCESS {first:#x} 32 read 0x*"));
    got.assert_no_exits(1);
}

fn refuses_what_the_verifier_refuses() {
    Vmm::new()
        .bpf(at(&program("refused"), AT))
        .refuses(None, &["refused.bpf.o"]);
}

// In what follows the refusal.
fn shows_the_verifiers_log() {
    let got = accessing(&at(&program("refused"), AT)).run_within(Duration::from_secs(30));
    got.assert_has("*invalid bpf_context access off=8 size=8*");
}
