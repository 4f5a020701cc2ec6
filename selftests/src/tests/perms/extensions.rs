// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Programs that others extend, and devices that want none such.

use std::os::fd::AsRawFd;

use kvm_bpf::Programs;
use kvm_bpf::uapi::{KVM_BPF_REQUIRE_NOT_EXTENSIBLE, kvm_bpf_user_region};
use kvm_bpf_selftests::bpf::{Map, ProgType};
use kvm_bpf_selftests::device::{Device, NO_REGION, region};
use kvm_bpf_selftests::guest::Guest;
use kvm_bpf_selftests::programs::{loaded, only_return, test_image, test_path};
use libbpf_rs::{Link, Object, ObjectBuilder};

use super::super::{ADDR, SIZE};
use super::{ALL, DENIED, EXTENDED, fd_region};

/// `extended.bpf.c`, whose functions others may extend.
struct Extended(Programs);

impl Extended {
    fn new() -> Self {
        Extended(loaded(test_image("extended")))
    }

    fn region(&self) -> kvm_bpf_user_region {
        fd_region(0, self.0.read_program(), None)
    }

    /// Attaches an extension to `function`, until what this returns is dropped.
    fn extend(&self, function: &str) -> Result<(Object, Link), libbpf_rs::Error> {
        let target = self.0.read_program().expect("its program").as_raw_fd();
        let mut object = ObjectBuilder::default()
            .open_file(test_path("extensions"))
            .expect("extensions");
        for mut program in object.progs_mut() {
            program.set_autoload(program.name() == "with_array");
            program
                .set_attach_target(target, Some(function.to_string()))
                .expect("bpf_program__set_attach_target()");
        }
        let object = object.load().expect("loading an extension");
        let mut programs = object.progs_mut();
        let program = programs.find(|program| program.name() == "with_array");
        let link = program.expect("with_array").attach()?;
        drop(programs);
        Ok((object, link))
    }

    #[track_caller]
    fn assert_extensible(&self, wanted: bool, when: &str) {
        let errno = match self.extend("value") {
            Ok(_) => None,
            Err(error) => Some(format!("{error:#}")),
        };
        match errno {
            None => assert!(wanted, "{when}: wanted no extension, got one"),
            Some(error) => assert!(
                !wanted && error.contains("os error 16"),
                "{when}: wanted {wanted}, got {error}"
            ),
        }
    }
}

pub(super) fn programs_are_not_extended() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let extended = Extended::new();
    extended.assert_extensible(true, "before it is attached");
    // By what comes after, and by what is there already.
    for first in [true, false] {
        let device = Device::new(guest.vm());
        if first {
            device.set_perms(ALL, KVM_BPF_REQUIRE_NOT_EXTENSIBLE);
        }
        device.set_region(0, &extended.region());
        if !first {
            extended.assert_extensible(true, "while the device does not care");
            device.set_perms(ALL, KVM_BPF_REQUIRE_NOT_EXTENSIBLE);
        }
        extended.assert_extensible(false, "while it is attached");
        assert_got!(vcpu.read(ADDR + 8, 8).value, 9, "what it returns");
        // Two devices forbid it twice.
        let other = Device::new(guest.vm());
        other.set_perms(ALL, KVM_BPF_REQUIRE_NOT_EXTENSIBLE);
        let elsewhere = kvm_bpf_user_region {
            addr: ADDR + SIZE,
            ..extended.region()
        };
        other.set_region(0, &elsewhere);
        drop(other);
        extended.assert_extensible(false, "after another device is closed");
        device.set_region(0, &NO_REGION);
        extended.assert_extensible(true, "after it is removed");
        device.set_region(0, &extended.region());
        extended.assert_extensible(false, "when it is attached again");
        drop(device);
        extended.assert_extensible(true, "after the device is closed");
    }
}

pub(super) fn an_extended_program_is_refused() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let extended = Extended::new();
    let extension = extended.extend("value").expect("extending it");
    let strict = Device::new(guest.vm());
    strict.set_perms(ALL, KVM_BPF_REQUIRE_NOT_EXTENSIBLE);
    assert_got!(
        strict.try_set_region(0, &extended.region()),
        DENIED,
        "what is extended"
    );

    let device = Device::new(guest.vm());
    let other = only_return(ProgType::READ, 0);
    device.set_region(1, &region(ADDR + SIZE, SIZE, Some(&other), None));
    device.set_region(0, &extended.region());
    assert_got!(
        vcpu.read(ADDR + 8, 8).value,
        10,
        "what the extension returns"
    );
    let got = device.try_set_perms(ALL, KVM_BPF_REQUIRE_NOT_EXTENSIBLE);
    assert_got!(got, EXTENDED, "with a program that is extended");
    assert_got!(device.perms().require, 0, "after the error");
    drop(extension);
    // The failed call has left nothing behind.
    extended.assert_extensible(true, "after the failed call");
    device.set_perms(ALL, KVM_BPF_REQUIRE_NOT_EXTENSIBLE);
    extended.assert_extensible(false, "after the one that works");
}

/// One goes, the other is still there.
pub(super) fn one_of_two_extensions() {
    let guest = Guest::new();
    let extended = Extended::new();
    let first = extended.extend("value").expect("extending one function");
    let second = extended.extend("more").expect("extending another");
    drop(first);
    let device = Device::new(guest.vm());
    device.set_perms(ALL, KVM_BPF_REQUIRE_NOT_EXTENSIBLE);
    assert_got!(
        device.try_set_region(0, &extended.region()),
        DENIED,
        "with one left"
    );
    // As in an array of programs, which takes no extended one either.
    let map = Map::of_programs(1);
    let program = extended.0.read_program().expect("its program");
    assert_got!(
        map.set_program(0, program),
        EXTENDED,
        "in an array of programs"
    );
    drop(second);
    assert_got!(
        map.set_program(0, program),
        Ok(()),
        "in an array, with none"
    );
    device.set_region(0, &extended.region());
}
