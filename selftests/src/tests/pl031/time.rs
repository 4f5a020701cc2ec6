// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the clock says: the time of day, as the VMM sets it, and what the guest loads.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use kvm_bpf::clock::{HostClock, time_of_day_offset_ns};
use kvm_bpf_selftests::guest::Guest;
use kvm_bpf_selftests::harness::{Errno, in_a_process, meanwhile};
use kvm_bpf_selftests::programs::{loaded, sample};

use super::super::{ADDR, eventfd};
use super::{Clock, DR, LATE, LR, MR, SECOND, host_time, plug, read_between, set_clock};

pub(super) fn time_of_day() {
    let mut clock = Clock::new();
    for _ in 0..50 {
        let (before, got, after) = read_between(&mut clock);
        assert!(
            (before..=after).contains(&got.into()),
            "wanted {before} to {after}, got {got}"
        );
        sleep(Duration::from_millis(30));
    }
    // The time stays when the programs are replaced.
    clock.replace();
    let (before, got, after) = read_between(&mut clock);
    assert!(
        (before..=after).contains(&got.into()),
        "replaced: wanted {before} to {after}, got {got}"
    );
}

/// A vCPU that looks all the time sees no device, or one that has been told the time.
pub(super) fn plugged_in_while_a_vcpu_looks() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let mut seen = 0;
    let look = || {
        let before = host_time().as_secs();
        let read = vcpu.read(ADDR + DR, 4);
        if read.exits.is_empty() {
            let after = host_time().as_secs();
            assert!(
                (before..=after).contains(&read.value),
                "wanted {before} to {after}, got {}",
                read.value
            );
            seen += 1;
        }
    };
    meanwhile([look], || {
        for _ in 0..20 {
            let irq = eventfd();
            let pause = || sleep(SECOND / 50);
            let device = plug(guest.vm(), loaded(sample("pl031")), &irq, pause);
            pause();
            drop(device);
        }
    });
    assert!(seen > 0, "the vCPU has seen no device");
}

/// The VMM sets the clock: an earlier time is taken too, and matches happen again.
pub(super) fn clock_set_back() {
    let mut clock = Clock::new();
    let offset = time_of_day_offset_ns();
    let nanoseconds = |seconds: u64| seconds * 1_000_000_000;
    for (back, ahead) in [(1000, 0), (0, 0), (0, 500), (3, 0)] {
        set_clock(
            clock.device.programs(),
            offset - nanoseconds(back) + nanoseconds(ahead),
        );
        let (before, got, after) = read_between(&mut clock);
        let wanted = before - back + ahead..=after - back + ahead;
        assert!(
            wanted.contains(&got.into()),
            "{back} s back, {ahead} s ahead: wanted {wanted:?}, got {got}"
        );
    }
    // 3 seconds back: what has been a second ago will be again.
    let now = host_time().as_secs() as u32;
    clock.write(MR, now - 1);
    assert_got!(clock.status(), (0, 0));
    let start = Instant::now();
    while clock.status() == (0, 0) {
        assert!(start.elapsed() < LATE, "no match within {LATE:?}");
        sleep(SECOND / 10);
    }
    let got = clock.read(DR);
    assert!(got >= now - 1, "a match at {got}, not at {}", now - 1);
}

/// A VMM in a time namespace sees other clocks than programs do, but gives them the right one.
pub(super) fn in_a_time_namespace() {
    const SHIFT: Duration = Duration::from_secs(1_000_000);

    let own = HostClock::new(libc::CLOCK_BOOTTIME).now();
    in_a_process(move || {
        // SAFETY: the children of this process are in a namespace of their own, nothing else.
        let result = unsafe { libc::unshare(libc::CLONE_NEWTIME) };
        assert!(
            result == 0,
            "unshare of the time: {:?}; has this kernel no CONFIG_TIME_NS?",
            Errno::last()
        );
        let offsets = format!("boottime {} 0\nmonotonic 5000 0\n", SHIFT.as_secs());
        fs::write("/proc/self/timens_offsets", offsets).expect("setting the offsets");
        in_a_process(move || {
            let mut shifted = libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            // SAFETY: the kernel only writes to `shifted`, a whole timespec.
            unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut shifted) };
            let shifted = Duration::from_secs(shifted.tv_sec as u64);
            assert!(shifted >= SHIFT, "this process is up for {shifted:?}");
            let clock = HostClock::new(libc::CLOCK_BOOTTIME).now();
            assert!(
                (own..own + 10 * LATE).contains(&clock),
                "wanted {own:?} or a bit more since the host's boot, got {clock:?}"
            );
            let mut clock = Clock::new();
            let (before, got, after) = read_between(&mut clock);
            assert!(
                (before..=after).contains(&got.into()),
                "wanted {before} to {after}, got {got}"
            );
            // Nor does a state tell of the namespace.
            let saved = clock.device.save().expect("saving").clock;
            for (saved, id) in [
                (saved.boottime_ns, libc::CLOCK_BOOTTIME),
                (saved.monotonic_ns, libc::CLOCK_MONOTONIC),
                (saved.realtime_ns, libc::CLOCK_REALTIME),
            ] {
                let now = HostClock::new(id).now();
                let off = Duration::from_nanos(saved).abs_diff(now);
                assert!(off < 10 * LATE, "clock {id} of the state is {off:?} off");
            }
        });
    });
}

pub(super) fn load_and_count_on() {
    let mut clock = Clock::new();
    for value in [7, 4_000_000_000] {
        let before = host_time().as_secs();
        clock.write(LR, value);
        let after = host_time().as_secs();
        let mut last = 0;
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(2500) {
            let (earliest, got, latest) = read_between(&mut clock);
            let passed = u64::from(got.wrapping_sub(value));
            // It steps with the host's second, whenever it was loaded.
            assert!(
                (earliest - after.min(earliest)..=latest - before).contains(&passed),
                "{passed} s after loading {value} between {before} and {after}, now {latest}"
            );
            assert!(passed >= last, "went from {last} back to {passed}");
            last = passed;
            sleep(Duration::from_millis(20));
        }
        assert!(last >= 2, "wanted at least 2 s to have passed, got {last}");
        assert_got!(clock.read(LR), value, "LR");
    }
}

pub(super) fn wraps_around() {
    let mut clock = Clock::with_alarm();
    clock.write(MR, 1);
    clock.write(LR, u32::MAX);
    assert_got!(clock.signals(), 0);
    clock.expect_alarm();
    let got = clock.read(DR);
    assert!((1..60).contains(&got), "DR after the wrap: {got}");
}
