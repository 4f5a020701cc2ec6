// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Object files as clang makes them of what a device's author may write.

use kvm_bpf::image::Error;
use kvm_bpf_selftests::bpf::Census;
use kvm_bpf_selftests::guest::{Exit, Guest};
use kvm_bpf_selftests::programs::{plug, test_image};

use super::ADDR;

tests!(programs_that_are_not_loaded, no_program_that_is_loaded);

/// What libbpf does not load by itself is as if not there, whatever it is.
fn programs_that_are_not_loaded() {
    let census = Census::now();
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let device = plug(guest.vm(), ADDR, test_image("optional_programs"));
    assert_got!(census.newer().0, 1, "programs");
    let read = vcpu.read(ADDR, 8);
    assert_got!((read.value, read.exits), (42, vec![]));
    assert_got!(vcpu.write(ADDR, 4, 7), [Exit::Write(ADDR, 4, 7)]);
    drop(device);
    census.wait_for_newer(0, 0);
}

fn no_program_that_is_loaded() {
    match test_image("optional_only").load() {
        Err(Error::NoProgram) => {}
        Err(error) => panic!("wanted NoProgram, got {error:#?}"),
        Ok(_) => panic!("wanted NoProgram, but it loads"),
    }
}
