// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Virtio devices whose data goes between guest memory and programs: the guest's own drivers find
//! them and use them, and none of their accesses is for the VMM.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use kvm_bpf_selftests::vmm::{Finished, GUEST, Vmm, assert_between, fields, number, sample, trial};
use libtest_mimic::Trial;

use super::{AT, AT2, at};

pub fn all() -> Vec<Trial> {
    let mut tests = tests!(
        guest_gets_random_bytes,
        guest_has_a_disk,
        disk_has_the_image_of_a_file_system,
        disk_is_right_with_one_in_flight,
        disk_is_right_with_eight_in_flight,
        disk_is_right_with_eight_large_in_flight,
        two_guests_read_one_disk,
    );
    tests.extend(other_maps());
    tests
}

/// A disk of programs.
fn disk() -> String {
    at(&sample("virtio_blk"), AT)
}

/// A guest with random numbers and a disk, for both tests of them.
#[track_caller]
fn random_and_disk() -> &'static Finished {
    static BOTH: OnceLock<Finished> = OnceLock::new();
    let got = BOTH.get_or_init(|| {
        Vmm::new()
            .args(["--cpus", "2"])
            .bpf(at(&sample("virtio_rng"), AT))
            .bpf(at(&sample("virtio_blk"), AT2))
            .append("hwrng=4096 disk=vda")
            .run()
    });
    got.show();
    got.assert_well();
    got.assert_no_exits(2);
    got
}

fn guest_gets_random_bytes() {
    let [driver, bytes, values] = random_and_disk().fields("HWRNG");
    assert!(driver.starts_with("virtio_rng"), "the driver is {driver:?}");
    assert_eq!(bytes, "4096", "bytes");
    // That one is missing happens once in 35,000 times.
    assert_between("values of bytes", 250, number(values), 256);
}

fn guest_has_a_disk() {
    assert_same_data(random_and_disk(), "vda");
}

/// Fails unless a disk of 8 MiB has what the guest has written to it.  Returns the sum of that.
#[track_caller]
pub fn assert_same_data<'a>(got: &'a Finished, disk: &str) -> &'a str {
    let [sectors, written, back] = got.fields(&format!("DISK {disk}"));
    assert_eq!(sectors, "16384", "sectors");
    assert_eq!(written.len(), 64, "digits of a sum");
    assert_eq!(
        back, written,
        "sums of what came back and of what was written"
    );
    written
}

/// A file system's image through the disk and back, past the page cache, in requests of all sizes;
/// then loads with one request in flight and with eight, of a page each and of many.
#[track_caller]
fn loaded() -> &'static Finished {
    static LOADED: OnceLock<Finished> = OnceLock::new();
    let got = LOADED.get_or_init(|| {
        Vmm::new()
            .args(["--cpus", "2"])
            .bpf(disk())
            .append("image=vda io=vda,1,1,1000 io=vda,8,1,2000 io=vda,8,32,300")
            .run_within(Duration::from_secs(400))
    });
    got.show();
    got.assert_well();
    got.assert_no_exits(1);
    got
}

/// As the guest has written it, in requests of each size and past the page cache.
fn disk_has_the_image_of_a_file_system() {
    /// Written in sectors, in pages, and in MiB; and so read.
    const LEAST: i64 = 1024 + 384 + 6 + 4 + 768 + 2048;

    let requests = assert_image(loaded());
    assert_between("requests", LEAST, requests, 2 * LEAST);
}

/// Fails unless the image of a file system came back from a disk as it was written.  Returns how
/// many requests the driver has made for that.
#[track_caller]
pub fn assert_image(got: &Finished) -> i64 {
    let [name, magic, written, back, requests] = got.fields("IMAGE");
    assert_eq!([name, magic], ["vda", "ef53"], "the file system");
    assert_eq!(written.len(), 64, "digits of a sum");
    assert_eq!(
        back, written,
        "sums of what came back and of what was written"
    );
    number(requests)
}

/// Fails unless in a round of a load each read had what the last write wrote, the driver has made
/// no other requests, and there were so many interrupts.
#[track_caller]
fn assert_round(round: usize, depth: i64, wanted: i64, low: i64, high: i64) {
    let nth = |words| {
        let rounds = loaded().all_said(words);
        *rounds.get(round).expect("the round")
    };
    let [requests, reads, writes, deepest, wrong] = fields(nth("IO vda")).map(number);
    let [made, interrupts] = fields(nth("IO-DEVICE vda")).map(number);
    assert_eq!(wrong, 0, "reads with other data");
    assert_eq!([requests, made], [wanted; 2], "requests");
    assert_eq!(deepest, depth, "requests in flight");
    assert_between("reads", wanted / 3, reads, wanted);
    assert_between("writes", wanted / 3, writes, wanted);
    assert_between("interrupts", low, interrupts, high);
}

// Besides the requests asked for, the whole disk is written and read.

/// SVM's emulation may deliver an interrupt twice (Documentation/emulation.md).
fn disk_is_right_with_one_in_flight() {
    assert_round(0, 1, 5096, 5096, 10192);
}

/// Those that come at once have one interrupt.
fn disk_is_right_with_eight_in_flight() {
    assert_round(1, 8, 6096, 1, 3048);
}

fn disk_is_right_with_eight_large_in_flight() {
    assert_round(2, 8, 428, 1, 856);
}

/// Maps that are pinned, as long as there is one of these.
struct Pinned {
    disk: PathBuf,
    options: PathBuf,
}

impl Pinned {
    /// A disk's content and its options.
    #[track_caller]
    fn new() -> Self {
        let pinned = Pinned {
            disk: "/sys/fs/bpf/kvm-bpf-disk".into(),
            options: "/sys/fs/bpf/kvm-bpf-options".into(),
        };
        let array = |path: &Path, words: &str| {
            let path = path.display();
            bpftool(&format!("map create {path} type array key 4 {words}"));
        };
        array(
            &pinned.disk,
            "value 4096 entries 2048 name disk flags 0x400",
        );
        array(&pinned.options, "value 32 entries 1 name disk_options");
        pinned
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.disk);
        let _ = fs::remove_file(&self.options);
    }
}

#[track_caller]
fn bpftool(words: &str) {
    let output = Command::new("bpftool").args(words.split(' ')).output();
    let output = output.expect("bpftool");
    assert!(output.status.success(), "bpftool {words}: {output:?}");
}

/// One image for guests that only read, at the same time: a map that is pinned, and options that say
/// so.  A guest has written it before.
fn two_guests_read_one_disk() {
    let pinned = Pinned::new();
    let device = format!("{},map=disk:{}", disk(), pinned.disk.display());
    let writer = Vmm::new().bpf(&device).append("image=vda").run();
    writer.assert_well();
    let [_, _, written, _, _] = writer.fields("IMAGE");
    assert_eq!(written.len(), 64, "digits of a sum");

    let options = pinned.options.display();
    let identity = ["120"; 20].join(" ");
    bpftool(&format!(
        "map update pinned {options} key 0 0 0 0 value 0 0 0 0 0 0 0 0 1 0 0 0 {identity}"
    ));
    let device = format!("{device},map=disk_options:{options}");
    let readers = [(); 2].map(|()| Vmm::new().bpf(&device).append("shared=vda").start());
    for reader in readers {
        let got = reader.finish(GUEST);
        got.assert_well();
        // The driver knows that it may only read, a write fails, and each time the data is right.
        let wanted = format!("1 1 {written} {written} {written}");
        assert_eq!(
            got.all_said("SHARED vda"),
            [wanted],
            "what a guest has read"
        );
        got.assert_no_exits(1);
    }
}

/// Maps of another size and of another name, and none.
fn other_maps() -> Vec<Trial> {
    vec![
        trial("vmm::refuses_another_map", || {
            let pinned = Pinned::new();
            Vmm::new()
                .bpf(format!("{},map=disk:{}", disk(), pinned.options.display()))
                .refuses(Some(1), &["virtio_blk", "map disk", "values of 32"]);
        }),
        trial("vmm::refuses_map_of_another_name", || {
            let pinned = Pinned::new();
            Vmm::new()
                .bpf(format!("{},map=image:{}", disk(), pinned.disk.display()))
                .refuses(Some(1), &["virtio_blk", "map image", "none of that name"]);
        }),
        trial("vmm::refuses_no_such_map", || {
            let nothing = "/sys/fs/bpf/nothing";
            Vmm::new()
                .bpf(format!("{},map=disk:{nothing}", disk()))
                .refuses(Some(1), &[nothing, "virtio_blk", "No such file"]);
        }),
    ]
}
