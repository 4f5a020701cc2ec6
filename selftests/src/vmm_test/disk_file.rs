// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Virtio disks whose requests a thread of the VMM serves, on files.
//!
//! Of its registers a driver accesses three for each request; each disk has another one serve them:
//! the VMM, an ioeventfd for one of them, or programs.

use std::fs::File;
use std::io::Read;
use std::sync::OnceLock;

use kvm_bpf_selftests::vmm::{Finished, Vmm, assert_between, number, sample};
use libtest_mimic::Trial;
use sha2::{Digest, Sha256};
use vmm_sys_util::tempdir::TempDir;

use super::disk::assert_same_data;
use super::{AT, AT2};

pub fn all() -> Vec<Trial> {
    tests!(
        guest_has_vda_of_a_file,
        guest_has_vdb_of_a_file,
        guest_has_vdc_of_a_file,
        requests_exit_three_times,
        requests_exit_twice_with_an_ioeventfd,
        requests_exit_never_with_programs,
    )
}

const AT3: u64 = 0xd000_2000;

/// A VMM with the three disks, and their files.
fn disks() -> (Vmm, TempDir) {
    let directory = TempDir::new().expect("a directory");
    let regs = format!(",registers={}", sample("virtio_regs"));
    let mut vmm = Vmm::new();
    for (name, addr, option) in [
        ("vda", AT, ""),
        ("vdb", AT2, ",notify=ioeventfd"),
        ("vdc", AT3, &regs),
    ] {
        let path = directory.as_path().join(name);
        let file = File::create(&path).expect("a file");
        file.set_len(8 << 20).expect("its length");
        vmm = vmm.args(["--disk", &format!("{}@{addr:#x}{option}", path.display())]);
    }
    (vmm, directory)
}

/// The guest writes to the disks from two CPUs, and each file has then what it wrote.
#[track_caller]
fn assert_file_of(disk: &str) {
    static WRITTEN: OnceLock<(Finished, TempDir)> = OnceLock::new();
    let (got, directory) = WRITTEN.get_or_init(|| {
        let (vmm, directory) = disks();
        let vmm = vmm.args(["--cpus", "2"]);
        (vmm.append("disk=vda disk=vdb disk=vdc").run(), directory)
    });
    got.show();
    got.assert_well();
    let written = assert_same_data(got, disk);
    let mut data = vec![0; 4 << 20];
    let mut file = File::open(directory.as_path().join(disk)).expect("the file");
    file.read_exact(&mut data).expect("4 MiB");
    let sum = format!("{:x}", Sha256::digest(data));
    assert_eq!(sum, written, "sums of the file and of what was written");
}

fn guest_has_vda_of_a_file() {
    assert_file_of("vda");
}

fn guest_has_vdb_of_a_file() {
    assert_file_of("vdb");
}

fn guest_has_vdc_of_a_file() {
    assert_file_of("vdc");
}

/// The same requests from each disk, one after the other.
#[track_caller]
fn reads() -> &'static Finished {
    static READS: OnceLock<Finished> = OnceLock::new();
    let got = READS.get_or_init(|| {
        let (vmm, _directory) = disks();
        vmm.append("reads=vda,1000 reads=vdb,1000 reads=vdc,1000")
            .run()
    });
    got.show();
    got.assert_well();
    got
}

/// Exits to user space of a register of the device there.
#[track_caller]
fn exits_of(addr: u64, offset: u64) -> i64 {
    let registers = reads().device(addr)["registers"].as_array();
    let registers = registers.expect("registers");
    let of_it = registers.iter().filter(|it| it["offset"] == offset);
    of_it.map(|it| it["exits"].as_i64().expect("exits")).sum()
}

/// Fails unless a notification of each request exits, or none does; and so the interrupt's registers.
#[track_caller]
fn assert_exits(disk: &str, addr: u64, notify: bool, interrupt: bool) {
    /// QueueNotify, InterruptStatus, InterruptACK.
    const REGISTERS: [u64; 3] = [0x50, 0x60, 0x64];

    let status = reads().said(&format!("READS {disk}"));
    assert_eq!(number(status), 0, "the status of the reads");
    let requests = reads().device(addr)["requests"].as_i64();
    let requests = requests.expect("the device's requests");
    assert_between("requests", 1000, requests, 1100);
    for (register, exits) in REGISTERS.into_iter().zip([notify, interrupt, interrupt]) {
        let got = exits_of(addr, register);
        if exits {
            // SVM's emulation may deliver an interrupt twice (Documentation/emulation.md): then the
            // driver looks at InterruptStatus once more.
            let what = format!("exits of register {register:#x}");
            assert_between(&what, requests, got, requests + 20);
        } else {
            assert_eq!(got, 0, "exits of register {register:#x}");
        }
    }
}

fn requests_exit_three_times() {
    assert_exits("vda", AT, true, true);
}

fn requests_exit_twice_with_an_ioeventfd() {
    assert_exits("vdb", AT2, false, true);
}

fn requests_exit_never_with_programs() {
    assert_exits("vdc", AT3, false, false);
}
