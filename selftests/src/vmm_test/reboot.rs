// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A guest that resets starts again, twice in a row, and then switches itself off.

use std::sync::OnceLock;

use kvm_bpf_selftests::vmm::{Finished, Vmm, assert_between, number, sample};
use libtest_mimic::Trial;

use super::{ARM64, at, bank};

pub fn all() -> Vec<Trial> {
    let mut tests = tests!(guest_starts_again);
    if ARM64 {
        tests.extend(tests!(
            alarm_is_gone_after_a_reboot,
            clock_is_right_after_a_reboot
        ));
    }
    tests
}

/// One run for all of them.  Its bank has a WORK program "reset" that clears one register and leaves
/// another; on arm64 the clock goes on, but an alarm of the boot before does not ring.
fn rebooted() -> &'static Finished {
    static REBOOTED: OnceLock<Finished> = OnceLock::new();
    let got = REBOOTED.get_or_init(|| {
        let vmm = Vmm::new().args(["--reboot", "--cpus", "2"]).bpf(bank());
        if ARM64 {
            vmm.bpf(at(&sample("pl031"), 0x901_0000))
                .append("reboots=0xd0000000,2,rtc0")
                .run()
        } else {
            vmm.append("reboots=0xd0000000,2").run()
        }
    });
    got.show();
    got
}

fn guest_starts_again() {
    let got = rebooted();
    got.assert_well();
    let boots = got.all_said("BOOT");
    let wanted = [0, 1, 2].map(|boot| format!("{boot} 0x0000000000000000 2"));
    assert_eq!(boots, wanted, "boots");
    assert_eq!(got.report["end"], "power off", "the end");
    assert_eq!(got.report["reboots"], 2, "reboots");
    got.assert_no_exits(if ARM64 { 2 } else { 1 });
}

fn alarm_is_gone_after_a_reboot() {
    assert_eq!(rebooted().all_said("RTC left"), ["none 0"; 3], "alarms");
}

fn clock_is_right_after_a_reboot() {
    let mut times = 0;
    for line in &rebooted().lines {
        if let Some(time) = line.text.strip_prefix("RTC since_epoch ") {
            let host = line.at;
            assert_between("the guest's time", host - 2, number(time), host + 2);
            times += 1;
        }
    }
    assert_eq!(times, 3, "times");
}
