// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The clock, which arm64's Linux has a driver for.

use std::mem;
use std::sync::Mutex;
use std::time::Duration;

use kvm_bpf_selftests::vmm::{Running, Vmm, assert_between, number, sample};
use libtest_mimic::Trial;

use super::demo::{demo, row};
use super::{ARM64, at};

pub fn all() -> Vec<Trial> {
    if !ARM64 {
        return Vec::new();
    }
    tests!(
        guest_has_a_clock,
        clock_is_right,
        alarm_interrupts_once,
        clock_is_served_by_the_kernel,
    )
}

/// The test that takes minutes, most of which it waits.
pub const SLOW: &str = "vmm::kernels_tests_of_clocks_pass";

pub fn slow() -> Vec<Trial> {
    if !ARM64 {
        return Vec::new();
    }
    tests!(kernels_tests_of_clocks_pass)
}

fn guest_has_a_clock() {
    let driver = demo().said("RTC driver");
    assert!(driver.starts_with("rtc-pl031"), "the driver is {driver:?}");
}

fn clock_is_right() {
    let demo = demo();
    let host = number(demo.said("HOST since_epoch"));
    let hwclock = demo.said("RTC hwclock");
    let year = year(host).to_string();
    assert!(hwclock.contains(&year), "wanted {year} in {hwclock:?}");
    let guest = number(demo.said("RTC since_epoch"));
    assert_between("the guest's time", host - 2, guest, host + 2);
}

/// That of a time in seconds since 1970, in UTC.
fn year(time: i64) -> i32 {
    // SAFETY: all zeroes is a broken-down time, which the call changes.
    let mut broken_down: libc::tm = unsafe { mem::zeroed() };
    // SAFETY: both are ours.
    unsafe { libc::gmtime_r(&time, &mut broken_down) };
    broken_down.tm_year + 1900
}

/// The interrupt comes at the second, once; the guest looks four times a second.
fn alarm_interrupts_once() {
    let [target, fired, interrupts] = demo().fields("RTC alarm").map(number);
    assert_between("the time of the interrupt", target, fired, target + 3);
    assert_eq!(interrupts, 1, "interrupts");
}

fn clock_is_served_by_the_kernel() {
    let [accesses, exits] = row("pl031", "eBPF programs");
    assert!(accesses > 0, "wanted accesses");
    assert_eq!(exits, 0, "exits");
}

/// A guest of its own that runs while other tests do.
static GUEST: Mutex<Option<Running>> = Mutex::new(None);

pub fn start_slow() {
    *GUEST.lock().expect("the guest") = Some(begin());
}

fn begin() -> Running {
    Vmm::new()
        .bpf(at(&sample("pl031"), 0x901_0000))
        .append("rtctest=rtc0")
        .start()
}

fn kernels_tests_of_clocks_pass() {
    let guest = GUEST.lock().expect("the guest").take();
    let guest = guest.unwrap_or_else(begin);
    guest.show();
    let got = guest.finish(Duration::from_secs(600));
    got.assert_well();
    assert_eq!(got.said("RTCTEST"), "0", "the status of the tests");
    let totals = got.lines.iter().find_map(|line| {
        let (_, totals) = line.text.split_once("# Totals: pass:")?;
        Some(totals)
    });
    let (passed, rest) = totals.and_then(|it| it.split_once(' ')).expect("totals");
    assert_between("passed", 1, number(passed), 1000);
    assert!(rest.starts_with("fail:0 "), "wanted no failure: {rest}");
    got.assert_no_exits(1);
}
