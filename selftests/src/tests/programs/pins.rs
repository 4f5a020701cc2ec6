// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Programs that are pinned.

use std::fs;
use std::os::unix::fs::chown;
use std::path::Path;

use kvm_bpf::{Programs, transfer};
use kvm_bpf_selftests::guest::Guest;
use kvm_bpf_selftests::harness::status_of_a_process;
use kvm_bpf_selftests::programs::{loaded, sample};
use kvm_ioctls::Kvm;

use super::super::{ADDR, PATTERN};
use super::{NOBODY, Pins, become_nobody, plugged};

pub(super) fn pinned() {
    let pins = Pins::new();
    loaded(sample("regbank")).pin(&pins.0).expect("the pins");
    let (path, all) = (pins.0.clone(), pins.all());
    // Search permission to get there is root's matter.
    fs::set_permissions(
        "/sys/fs/bpf",
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .expect("a file system that others may look into");
    let kvm = Kvm::new().expect("open /dev/kvm");
    let status = status_of_a_process(move || {
        become_nobody();
        match Programs::from_pinned(&path) {
            Err(transfer::Error::Open { source, .. }) => {
                assert_got!(source.raw_os_error(), Some(libc::EACCES));
            }
            other => panic!("wanted no way in, got {other:?}"),
        }
        drop(kvm);
    });
    assert_got!(status, 0, "a VMM that was not let in");

    for file in all.iter().chain([&pins.0]) {
        chown(file, Some(NOBODY), None).expect("chown");
    }
    let (path, kvm) = (pins.0.clone(), Kvm::new().expect("open /dev/kvm"));
    let status = status_of_a_process(move || {
        become_nobody();
        let programs = Programs::from_pinned(&path).expect("the programs");
        let guest = Guest::on(kvm);
        let device = plugged(&guest, programs);
        assert_got!(vcpu_write(&guest), PATTERN);
        device.save().expect("its state");
    });
    assert_got!(status, 0, "a VMM that was let in");
    // The programs are pinned still, and have what the VMM left.
    let again = Programs::from_pinned(&pins.0).expect("the programs");
    let guest = Guest::new();
    let _device = plugged(&guest, again);
    let scratch = guest.vcpu(0).read(ADDR + 8, 8);
    assert_got!((scratch.value, scratch.exits), (PATTERN, vec![]));
}

pub(super) fn pinned_as_a_whole_or_not() {
    let pins = Pins::new();
    let programs = loaded(sample("regbank"));
    programs.pin(&pins.0).expect("the pins");
    let before = pins.all().len();
    match programs.pin(&pins.0) {
        Err(transfer::Error::Pin { path, source }) => {
            assert_got!(path, pins.0);
            assert_got!(source.raw_os_error(), Some(libc::EEXIST));
        }
        other => panic!("wanted the directory to be there, got {other:?}"),
    }
    assert_got!(pins.all().len(), before, "pins");
    // No bpf file system.
    let elsewhere = Path::new("/tmp/kvm_bpf_programs");
    match programs.pin(elsewhere) {
        Err(transfer::Error::Pin { path, .. }) => assert!(path.starts_with(elsewhere), "{path:?}"),
        other => panic!("wanted no pins there, got {other:?}"),
    }
    assert!(!elsewhere.exists(), "something is left");
    // A part is missing.
    fs::remove_file(pins.0.join("read")).expect("unpinning");
    match Programs::from_pinned(&pins.0) {
        Err(transfer::Error::Open { path, source }) => {
            assert_got!(path, pins.0.join("read"));
            assert_got!(source.raw_os_error(), Some(libc::ENOENT));
        }
        other => panic!("wanted a pin to be missing, got {other:?}"),
    }
}

/// Writes the register bank's scratch register, and returns what it then holds.
#[track_caller]
fn vcpu_write(guest: &Guest) -> u64 {
    let mut vcpu = guest.vcpu(0);
    assert_got!(vcpu.write(ADDR + 8, 8, PATTERN), []);
    let read = vcpu.read(ADDR + 8, 8);
    assert_got!(read.exits, []);
    read.value
}
