// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A host without the device, where that can be had: with KVM as modules.

use std::env;
use std::process::Command;

use kvm_bpf_selftests::vmm::Vmm;
use libtest_mimic::Trial;

use super::bank;

pub fn all() -> Vec<Trial> {
    if env::var_os("KVM_BPF_MODULE").is_none() {
        return Vec::new();
    }
    tests!(
        leaves_the_module_unused,
        refuses_host_without_the_device,
        module_loads_again,
    )
}

/// As long as there is one of these, the module is not loaded.
struct Unloaded;

impl Unloaded {
    #[track_caller]
    fn new() -> Self {
        assert!(works("rmmod"), "rmmod kvm_bpf");
        Unloaded
    }
}

impl Drop for Unloaded {
    fn drop(&mut self) {
        // In a test that fails already, the next one will say so.
        let _ = works("modprobe");
    }
}

fn works(command: &str) -> bool {
    let status = Command::new(command).arg("kvm_bpf").status();
    status.is_ok_and(|status| status.success())
}

fn leaves_the_module_unused() {
    let got = Vmm::new().bpf(bank()).append("").run();
    got.assert_well();
    Unloaded::new();
}

fn refuses_host_without_the_device() {
    let _unloaded = Unloaded::new();
    Vmm::new()
        .bpf(bank())
        .refuses(Some(1), &["regbank", "kvm_bpf"]);
}

fn module_loads_again() {
    let unloaded = Unloaded::new();
    assert!(works("modprobe"), "modprobe kvm_bpf");
    // Which works once more when it is loaded.
    drop(unloaded);
    let got = Vmm::new().bpf(bank()).append("").run();
    got.assert_well();
}
