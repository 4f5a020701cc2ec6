// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A distribution's own kernel, as guest, drives virtio devices of programs with its modules, and
//! none of its accesses is for the VMM.

use std::fs;
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use kvm_bpf_selftests::vmm::{Finished, Vmm, assert_between, fields, number, sample};
use libtest_mimic::Trial;
use vmm_sys_util::tempdir::TempDir;

use super::disk::assert_image;
use super::{AT, AT2, BROUGHT, at};

pub fn all() -> Vec<Trial> {
    tests!("distribution":
        guest_makes_no_exits,
        guest_has_a_register_bank,
        guest_gets_random_bytes,
        disk_has_the_image_of_a_file_system,
        disk_is_right_under_load,
        disk_has_files,
    )
}

/// Where the register bank is.
const BANK: u64 = 0xd000_2000;

/// What a guest does for all tests; its kernel and files are in an archive of
/// `scripts/distribution`.
#[track_caller]
fn guest() -> &'static Finished {
    static GUEST: OnceLock<Finished> = OnceLock::new();
    let got = GUEST.get_or_init(|| {
        let directory = TempDir::new().expect("a directory");
        let files = directory.as_path();
        let mut tar = Command::new("tar");
        tar.args(["-x", "-f", BROUGHT, "-C"]).arg(files);
        assert!(tar.status().expect("tar").success(), "tar");
        let got = Vmm::booting(&files.join("kernel"), &files.join("initramfs"))
            .args(["--cpus", "2", "--memory", "512"])
            .bpf(at(&sample("virtio_rng"), AT))
            .bpf(at(&sample("virtio_blk"), AT2))
            .bpf(at(&sample("regbank"), BANK))
            .append(&format!(
                "bank={BANK:#x} hwrng=4096 image=vda io=vda,1,1,1000 io=vda,8,1,2000 \
                 io=vda,8,32,300 files=vda"
            ))
            .run_within(Duration::from_secs(900));
        let release = fs::read_to_string(files.join("release")).expect("the kernel's release");
        assert_eq!(got.said("KERNEL"), release.trim(), "the guest's kernel");
        got
    });
    got.show();
    got.assert_well();
    got
}

fn guest_makes_no_exits() {
    guest().assert_no_exits(3);
    assert_eq!(guest().report["end"], "reset", "the guest's end");
    println!("\nLinux {}", guest().said("KERNEL"));
}

fn guest_has_a_register_bank() {
    guest().assert_has("ACCESS 0xd0002008 64 read 0x11223344556677AA");
}

fn guest_gets_random_bytes() {
    let [driver, bytes, values] = guest().fields("HWRNG");
    assert!(driver.starts_with("virtio_rng"), "the driver is {driver:?}");
    assert_eq!(bytes, "4096", "bytes");
    // That one is missing happens once in 35,000 times.
    assert_between("values of bytes", 250, number(values), 256);
}

fn disk_has_the_image_of_a_file_system() {
    assert_image(guest());
}

fn disk_is_right_under_load() {
    let rounds = guest().all_said("IO vda");
    let devices = guest().all_said("IO-DEVICE vda");
    assert_eq!([rounds.len(), devices.len()], [3; 2], "rounds");
    println!();
    for ((round, device), depth) in rounds.into_iter().zip(devices).zip([1, 8, 8]) {
        let [requests, reads, writes, deepest, wrong] = fields(round).map(number);
        let [made, interrupts] = fields(device).map(number);
        println!("{requests} requests, at most {deepest} in flight, {interrupts} interrupts");
        assert_eq!([wrong, deepest, made], [0, depth, requests], "{round}");
        assert_between("reads", 100, reads, requests);
        assert_between("writes", 100, writes, requests);
        assert_between("interrupts", 1, interrupts, 2 * requests);
    }
}

fn disk_has_files() {
    let [name, kind, files, written, back] = guest().fields("FILES");
    assert_eq!([name, kind, files], ["vda", "ext2", "3"], "the files");
    assert_eq!(written.len(), 64, "digits of a sum");
    assert_eq!(back, written, "sums of what came back");
}
