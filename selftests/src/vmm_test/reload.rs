// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Replacing the device of a running guest.

use std::fs;
use std::path::PathBuf;

use kvm_bpf_selftests::harness::wait_for;
use kvm_bpf_selftests::vmm::{
    Finished, GUEST, Running, Vmm, assert_between, number, program, sample,
};
use libtest_mimic::Trial;
use vmm_sys_util::tempdir::TempDir;

use super::registers::assert_reads_itself;
use super::serial::assert_sent;
use super::{ARM64, AT, at};

pub fn all() -> Vec<Trial> {
    let mut tests = tests!(
        programs_are_replaced_under_a_running_guest,
        reload_keeps_the_state,
        reload_fresh_starts_maps_anew,
        state_is_converted_under_a_running_guest,
        another_page_is_read_after_reload,
    );
    if !ARM64 {
        tests.extend(tests!(
            serial_port_is_replaced_under_a_running_guest,
            serial_port_goes_on_with_another_ring_buffer,
        ));
    }
    tests
}

/// A VMM whose device's file is replaced.
struct Reloading {
    vmm: Running,
    directory: TempDir,
}

impl Reloading {
    /// With that file, and options of the command line.
    fn new(object: &str, append: &str, options: &[&str]) -> Self {
        let directory = TempDir::new().expect("a directory");
        let file = Self::file_in(&directory);
        fs::copy(object, &file).expect("the file");
        let vmm = Vmm::new()
            .bpf(at(&file.display().to_string(), AT))
            .args(options)
            .append(append)
            .start();
        Reloading { vmm, directory }
    }

    /// The same until the guest watches a register that is 1 now, for it to change.
    #[track_caller]
    fn watching(object: &str, offset: u64, options: &[&str]) -> Self {
        let watching = Self::new(object, &format!("watch={:#x}", AT + offset), options);
        watching.vmm.sees("WATCH 0x00000001");
        watching
    }

    fn file_in(directory: &TempDir) -> PathBuf {
        directory.as_path().join("device.o")
    }

    /// Replaces the file, and waits for what the VMM says of it.
    #[track_caller]
    fn reload(&self, object: &str, said: &str) {
        fs::copy(object, Self::file_in(&self.directory)).expect("the file");
        self.vmm.signal(libc::SIGUSR1);
        self.vmm.sees(&format!("*reload*device.o*{said}"));
    }

    /// Waits for the change, and for the end; so many files were taken.
    #[track_caller]
    fn changed(self, reloads: usize) -> Finished {
        self.vmm.sees("WATCH 0x00000002");
        self.ended(reloads)
    }

    #[track_caller]
    fn ended(self, reloads: usize) -> Finished {
        self.vmm.sees("DONE");
        let got = self.vmm.finish(GUEST);
        got.assert_well();
        assert_eq!(got.report["reloads"], reloads, "reloads");
        got
    }
}

/// VERSION of a bank.
const VERSION: u64 = 0x04;
/// And what `carry` says of itself.
const CARRY: u64 = 0x28;

fn programs_are_replaced_under_a_running_guest() {
    let device = Reloading::watching(&sample("regbank"), VERSION, &[]);
    // First what must leave the device as it is.
    device.reload(&program("no_note"), "note*");
    // Another device, that of this note: it has the register bank's size and interrupts.
    device.reload(&program("irq_object"), "not the same device*kvm-bpf,test*");
    device.reload(&program("regbank_refused"), "the verifier refused*");
    device.vmm.sees("*invalid bpf_context access off=8*");
    device.reload(&program("regbank_v2"), "carried over: accesses, regbank");
    device.changed(1).assert_no_exits(1);
}

/// What would lose state is refused, but if the command line allows it.
fn reload_keeps_the_state() {
    let device = Reloading::watching(&program("carry"), CARRY, &[]);
    let lost = "map state *would be lost: it lacks value.third at bit 64*";
    device.reload(&program("carry_grown"), lost);
    device.reload(&program("carry_read_only"), "program for writes*");
    let carried = "carried over: .bss, .data, other, state";
    device.reload(&program("carry_v2"), carried);
    device.changed(1).assert_no_exits(1);
}

fn reload_fresh_starts_maps_anew() {
    let device = Reloading::watching(&program("carry"), CARRY, &["--reload-fresh"]);
    for (object, said) in [
        (
            "carry_grown",
            "carried over: .bss, .data, other; starts anew: state",
        ),
        (
            "carry_removed",
            "carried over: .bss, .data; starts anew: state; dropped: other",
        ),
        (
            "carry_v2",
            "carried over: .bss, .data, state; starts anew: other",
        ),
    ] {
        device.reload(&program(object), said);
    }
    device.changed(3).assert_no_exits(1);
}

/// State whose types have changed is converted while the vCPUs stop; none of the guest's writes is
/// lost, which two of them make all the time.
fn state_is_converted_under_a_running_guest() {
    let device = Reloading::new(&program("convert"), "writes=0xd0000000", &["--cpus", "2"]);
    device.vmm.sees("WRITES");
    // First a file without a place for a field that is not 0.
    let no_place = "counts[0].saved: there is no such field any more*";
    device.reload(&program("convert_less"), no_place);
    let converted = "carried over: kept; converted: counts";
    device.reload(&program("convert_v2"), converted);
    let got = device.ended(1);
    let [version, written, counted, saved, restored, replaced] = got.fields("WRITES").map(number);
    assert_eq!(version, 2, "version");
    assert_between("writes", 20, written, 1_000_000_000);
    assert_eq!(counted, written, "writes that are counted");
    // "save" of the old programs twice, "restore" of old and new ones.
    assert_eq!([saved, restored, replaced], [2, 2, 0], "runs");
    got.assert_no_exits(1);
}

/// Another page takes the place of the one that the guest reads.
fn another_page_is_read_after_reload() {
    let page = sample("pagebank");
    let device = Reloading::watching(&page, VERSION, &["--reload-fresh"]);
    device.reload(&page, "carried over: .data.page");
    device.reload(&program("pagebank_v2"), "starts anew: .data.page");
    let got = device.changed(2);
    got.assert_no_exits(1);
    assert_reads_itself(&got);
}

/// The serial port goes on at its ports, with its bytes; it is used after the replacement.
fn serial_port_is_replaced_under_a_running_guest() {
    let said = "carried over: locks, lost, output, uart";
    serial_port_goes_on(&sample("uart16550"), said, &[]);
}

/// Nothing comes into the old one any more.
fn serial_port_goes_on_with_another_ring_buffer() {
    let said = "carried over: locks, lost, uart; starts anew: output";
    serial_port_goes_on(&program("uart16550_ring"), said, &["--reload-fresh"]);
}

/// Replaces a serial port before the guest uses it; one thread takes from it then.
#[track_caller]
fn serial_port_goes_on(object: &str, said: &str, options: &[&str]) {
    let directory = TempDir::new().expect("a directory");
    let [uart, serial] = ["uart.o", "serial"].map(|name| directory.as_path().join(name));
    fs::copy(sample("uart16550"), &uart).expect("the file");
    let port = format!("{}@pio:0x2f8,output={}", uart.display(), serial.display());
    let append = format!("watch={:#x} serial=ttyS1", AT + VERSION);
    let options = [&["--bpf", &port], options].concat();
    let device = Reloading::new(&sample("regbank"), &append, &options);
    device.vmm.sees("WATCH 0x00000001");
    fs::copy(object, &uart).expect("the file");
    let carried = "carried over: accesses, regbank";
    device.reload(&program("regbank_v2"), carried);
    device.vmm.sees(&format!("*reload*uart.o: {said}"));
    wait_for("threads that take from a serial port", 1, || {
        threads(device.vmm.id(), "serial")
    });
    device.changed(2).assert_no_exits(2);
    assert_sent(&serial);
}

/// How many threads of a process have that name.
fn threads(pid: u32, name: &str) -> usize {
    let all = fs::read_dir(format!("/proc/{pid}/task")).expect("its threads");
    // One may have ended.
    let names = all.filter_map(|thread| fs::read_to_string(thread.ok()?.path().join("comm")).ok());
    names.filter(|own| own.trim_end() == name).count()
}
