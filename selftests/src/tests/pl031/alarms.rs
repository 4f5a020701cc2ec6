// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Alarms: when they come, and when not.

use std::thread::sleep;
use std::time::Instant;

use super::{Clock, DR, ICR, IMSC, LATE, LR, MR, RIS, SECOND, host_time, read, write};

pub(super) fn alarm_while_no_vcpu_runs() {
    let mut clock = Clock::with_alarm();
    for seconds in [2, 3] {
        let before = host_time().as_secs();
        clock.write(LR, 1000);
        clock.write(MR, 1000 + seconds);
        assert_got!(clock.signals(), 0, "signals before the alarm");
        assert!(clock.signalled_within(LATE), "no alarm within {LATE:?}");
        let now = host_time();
        assert!(
            now.as_secs() >= before + u64::from(seconds),
            "wanted the alarm {seconds} s after {before}, got {now:?}"
        );
        assert_got!(clock.signals(), 1, "signals at the alarm");
        sleep(SECOND + SECOND / 2);
        assert_got!(clock.signals(), 0, "signals after the alarm");
        let got = clock.read(DR);
        assert!(got > 1000 + seconds, "DR after the alarm: {got}");
        assert_got!(clock.status(), (1, 1));
        // Only bit 0 clears it.
        clock.write(ICR, !1);
        assert_got!(clock.status(), (1, 1));
        clock.write(ICR, 1);
        assert_got!(clock.status(), (0, 0));
        assert_got!(clock.signals(), 0, "signals after clearing");
    }
}

/// The vCPU looks all the time, so the timer and an access both come upon the moment.
pub(super) fn alarm_found_by_an_access() {
    let mut clock = Clock::with_alarm();
    for _ in 0..2 {
        clock.alarm_in(1);
        let match_at = clock.read(MR);
        let start = Instant::now();
        loop {
            // In this order: time passes between the two.
            let dr_first = clock.read(DR);
            let ris = clock.read(RIS);
            let dr_last = clock.read(DR);
            if ris == 1 {
                assert!(dr_last >= match_at, "RIS is set at {dr_last}");
                break;
            }
            assert!(dr_first < match_at, "RIS is not set at {dr_first}");
            assert!(start.elapsed() < LATE, "no alarm within {LATE:?}");
        }
        // The timer may have found it, and be about to signal.
        assert!(clock.signalled_within(LATE), "no signal within {LATE:?}");
        sleep(SECOND / 10);
        assert_got!(clock.signals(), 1, "signals of one alarm");
        clock.write(ICR, 1);
        sleep(SECOND);
        assert_got!(clock.signals(), 0, "signals of an alarm that was cleared");
        assert_got!(clock.status(), (0, 0));
    }
}

/// DR and MR made equal by the guest, by a write of either.
pub(super) fn alarm_made_by_a_write() {
    let mut clock = Clock::with_alarm();
    clock.write(MR, 777);
    for _ in 0..3 {
        clock.write(LR, 777);
        assert_got!(clock.signals(), 1, "signals when LR makes DR equal MR");
        assert_got!(clock.status(), (1, 1));
        // It is set already.
        clock.write(LR, 777);
        assert_got!(clock.signals(), 0, "signals when it is set already");
        clock.write(ICR, 1);
        assert_got!(clock.status(), (0, 0));
        assert_got!(clock.signals(), 0);
    }
    let mut made = 0;
    for _ in 0..5 {
        // Unless a second begins between the two.
        clock.alarm_in(0);
        let signals = clock.signals();
        assert_got!(clock.status(), (signals as u32, signals as u32));
        clock.write(ICR, 1);
        made += signals;
    }
    assert!(made > 0, "wanted MR = DR to raise the interrupt, got none");
}

pub(super) fn masked_alarm() {
    let mut clock = Clock::with_alarm();
    // Not the next tick, which may come before the mask.
    clock.alarm_in(2);
    // The timer has been started; it must find nothing to do.
    clock.write(IMSC, 0);
    sleep(3 * SECOND);
    assert_got!(clock.status(), (1, 0), "RIS and MIS of a masked alarm");
    assert_got!(clock.signals(), 0, "signals of a masked alarm");
    clock.write(IMSC, 1);
    assert_got!(clock.signals(), 1, "signals when it is unmasked");
    clock.write(IMSC, 1);
    assert_got!(clock.signals(), 0, "signals when nothing changes");
    clock.write(IMSC, 0);
    clock.write(IMSC, 1);
    assert_got!(clock.signals(), 1, "signals when it is unmasked again");
    clock.write(IMSC, 0);
    clock.write(ICR, 1);
    clock.write(IMSC, 1);
    assert_got!(
        clock.signals(),
        0,
        "signals when there is nothing to unmask"
    );

    // Unmasked in time: the timer is started by that.
    clock.write(IMSC, 0);
    clock.alarm_in(2);
    clock.write(IMSC, 1);
    clock.expect_alarm();
}

pub(super) fn alarm_in_the_past() {
    let mut clock = Clock::with_alarm();
    clock.write(LR, 2000);
    clock.write(MR, 1999);
    sleep(2 * SECOND);
    assert_got!(clock.status(), (0, 0));
    // Nor is the past passed when the clock is set further back, but now it will be.
    clock.write(LR, 1997);
    assert_got!(clock.status(), (0, 0));
    clock.expect_alarm();
    // And not when it is set ahead across the match.
    clock.write(LR, 1000);
    clock.write(LR, 3000);
    sleep(2 * SECOND);
    assert_got!(clock.status(), (0, 0));
    assert_got!(clock.signals(), 0);
}

pub(super) fn alarm_replaced() {
    let mut clock = Clock::with_alarm();
    clock.alarm_in(2);
    clock.alarm_in(1000);
    assert!(!clock.signalled_within(3 * SECOND), "the first alarm came");
    assert_got!(clock.status(), (0, 0));
    clock.alarm_in(1);
    clock.expect_alarm();
    // The clock set, so that the alarm is earlier, and later.
    clock.alarm_in(1000);
    let match_at = clock.read(MR);
    clock.write(LR, match_at - 1);
    clock.expect_alarm();
    clock.write(MR, match_at + 3);
    clock.write(LR, match_at - 1000);
    assert!(!clock.signalled_within(4 * SECOND), "the old alarm came");
    assert_got!(clock.status(), (0, 0));
}

/// Two vCPUs at once; the alarm of the last write counts.
pub(super) fn two_vcpus_set_alarms() {
    let mut clock = Clock::new();
    let mut other = clock.guest.vcpu(1);
    clock.enable_alarm();
    for far_first in [true, false] {
        let now = clock.read(DR);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 0..50 {
                    write(&mut other, MR, now + 2000 + round);
                }
            });
            for round in 0..50 {
                write(&mut clock.vcpu, MR, now + 1000 + round);
            }
        });
        assert_got!(clock.signals(), 0, "signals of alarms far away");
        if far_first {
            clock.alarm_in(1);
        } else {
            let now = read(&mut other, DR);
            write(&mut other, MR, now + 1);
        }
        clock.expect_alarm();
    }
}
