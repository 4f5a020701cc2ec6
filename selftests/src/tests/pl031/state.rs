// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Time and alarm when the device closes, changes its programs, is saved, restored or reset.

use std::thread::sleep;
use std::time::Duration;

use kvm_bpf::clock::{HostClock, time_of_day_offset_ns};
use kvm_bpf::{ImageDevice, State};
use kvm_bpf_selftests::bpf::Census;

use super::{
    Clock, DR, ICR, IMSC, LATE, LR, MIS, MR, RIS, SECOND, host_time, read_between, set_clock,
};

/// Nothing comes of an alarm whose device is gone, and nothing is left.
pub(super) fn closed_with_alarm() {
    let census = Census::now();
    for _ in 0..2 {
        let mut clock = Clock::with_alarm();
        clock.alarm_in(2);
        let Clock {
            guest,
            vcpu,
            device,
            irq,
        } = clock;
        drop(device);
        assert_got!(irq.read().is_err(), true, "no signal so far");
        census.wait_for_newer(0, 0);
        sleep(3 * SECOND);
        assert!(irq.read().is_err(), "wanted no signal after closing");
        drop((guest, vcpu));
    }
    census.wait_for_newer(0, 0);
}

pub(super) fn swapped_with_alarm() {
    let census = Census::now();
    let mut clock = Clock::with_alarm();
    census.wait_for_newer(PROGRAMS, MAPS);

    clock.alarm_in(3);
    let match_at = clock.read(MR);
    for _ in 0..3 {
        clock.replace();
    }
    // No timer keeps an old program.
    census.wait_for_newer(PROGRAMS, MAPS);
    assert_got!(clock.read(MR), match_at, "MR after replacing");
    assert!(clock.signalled_within(LATE), "no alarm within {LATE:?}");
    clock.expect_alarm();
    clock.alarm_in(1);
    clock.expect_alarm();
    drop(clock);
    census.wait_for_newer(0, 0);
}

/// What the device consists of.
const PROGRAMS: usize = 6;
const MAPS: usize = 5;

/// The state as it is in a file.
fn saved(device: &ImageDevice) -> Vec<u8> {
    let state = device.save().expect("saving");
    state.to_json().expect("the state's text")
}

/// Has a new VM go on with a saved clock, which the guest does not touch.
fn restored(state: &[u8]) -> Clock {
    let mut clock = Clock::new();
    let state = State::from_json(state).expect("the state");
    clock.device.restore(&state).expect("restoring");
    clock
}

/// All numbers of the maps of a state.
fn numbers(state: &[u8]) -> Vec<i128> {
    fn collect(value: &serde_json::Value, numbers: &mut Vec<i128>) {
        match value {
            serde_json::Value::Number(number) => {
                numbers.push(number.as_i128().expect("an integer"))
            }
            serde_json::Value::String(text) => numbers.extend(text.parse::<i128>()),
            serde_json::Value::Array(values) => values.iter().for_each(|v| collect(v, numbers)),
            serde_json::Value::Object(fields) => fields
                .iter()
                .filter(|(name, _)| *name != "schema")
                .for_each(|(_, value)| collect(value, numbers)),
            _ => {}
        }
    }
    let json: serde_json::Value = serde_json::from_slice(state).expect("JSON");
    let mut numbers = Vec::new();
    collect(&json["maps"], &mut numbers);
    numbers
}

/// The state tells nothing of when this host has booted, in whatever unit: so it is right on a host
/// that has at another time.
pub(super) fn restored_elsewhere() {
    let boot = HostClock::new(libc::CLOCK_BOOTTIME);
    let mut clock = Clock::with_alarm();
    clock.write(LR, 5000);
    clock.alarm_in(1000);
    let match_at = clock.read(MR);
    let saved_at = (host_time().as_secs(), clock.read(DR));
    let state = saved(&clock.device);
    drop(clock);

    let numbers = numbers(&state);
    assert!(numbers.contains(&match_at.into()), "MR is in {numbers:?}");
    let offset = time_of_day_offset_ns();
    for number in numbers {
        for (name, ns) in [("boot", boot.now().as_nanos()), ("offset", offset.into())] {
            // A host that has been up for as long as a register says is none of ours.
            for (unit, size) in [("ns", 1), ("us", 1_000), ("ms", 1_000_000)] {
                let apart = (ns / size).abs_diff(number as u128);
                let second = 1_000_000_000 / size;
                assert!(apart > second, "{number} is the {name} time in {unit}");
            }
        }
    }

    let mut clock = restored(&state);
    for pause in [Duration::ZERO, 3 * SECOND] {
        sleep(pause);
        let (before, got, after) = read_between(&mut clock);
        let passed = before - saved_at.0..=after - saved_at.0;
        assert!(
            passed.contains(&u64::from(got - saved_at.1)),
            "{got} is not {passed:?} s after {}",
            saved_at.1
        );
    }
    assert_got!(clock.read(MR), match_at, "MR");
    assert_got!(clock.read(LR), 5000, "LR");
    assert_got!(clock.status(), (0, 0));
    clock.alarm_in(1);
    clock.expect_alarm();
}

/// On a host that has booted ten days later, by its own clock and by what the state says of the
/// first one's: what leads from the time since boot to the time of day is ten days more there.
pub(super) fn restored_with_ten_days_less_uptime() {
    const DAYS: Duration = Duration::from_secs(10 * 24 * 60 * 60);
    const AHEAD: Duration = Duration::from_secs(6);

    let mut clock = Clock::with_alarm();
    let less = time_of_day_offset_ns() - DAYS.as_nanos() as u64;
    set_clock(clock.device.programs(), less);
    let (before, got, after) = read_between(&mut clock);
    let wanted = before - DAYS.as_secs()..=after - DAYS.as_secs();
    assert!(wanted.contains(&got.into()), "wanted {wanted:?}, got {got}");
    clock.alarm_in((DAYS + AHEAD).as_secs() as u32);
    let match_at = clock.read(MR);
    let mut state = clock.device.save().expect("saving");
    drop(clock);
    for ns in [&mut state.clock.boottime_ns, &mut state.clock.monotonic_ns] {
        *ns += DAYS.as_nanos() as u64;
    }

    let mut clock = restored(&state.to_json().expect("the state's text"));
    let (before, got, after) = read_between(&mut clock);
    assert!(
        (before..=after).contains(&got.into()),
        "wanted {before} to {after}, got {got}"
    );
    assert_got!(clock.read(MR), match_at, "MR");
    assert!(clock.signalled_within(AHEAD + LATE), "no alarm");
    let rang = host_time().as_secs();
    assert!(
        (u64::from(match_at)..u64::from(match_at) + LATE.as_secs()).contains(&rang),
        "wanted the alarm at {match_at}, got it at {rang}"
    );
    clock.expect_alarm();
}

pub(super) fn restored_alarm_rings_by_itself() {
    let mut clock = Clock::with_alarm();
    clock.alarm_in(2);
    let state = saved(&clock.device);
    drop(clock);
    let mut clock = restored(&state);
    assert!(clock.signalled_within(LATE), "no alarm within {LATE:?}");
    clock.expect_alarm();
    clock.alarm_in(1);
    clock.expect_alarm();
}

/// It has passed while there was no VM: late is better than never.
pub(super) fn restored_after_the_alarm() {
    let mut clock = Clock::with_alarm();
    clock.alarm_in(1);
    let state = saved(&clock.device);
    drop(clock);
    sleep(2 * SECOND);
    let mut clock = restored(&state);
    assert_got!(clock.signals(), 1, "signals of the alarm");
    assert_got!(clock.status(), (1, 1));
    // And once only.
    let state = saved(&clock.device);
    drop(clock);
    let mut clock = restored(&state);
    assert_got!(clock.signals(), 0, "signals of an alarm that has been");
    assert_got!(clock.status(), (1, 1));
}

/// Between saving and going on nothing happens, so that what else is saved then agrees with it.
pub(super) fn saved_and_resumed() {
    let mut clock = Clock::with_alarm();
    clock.alarm_in(1);
    let state = saved(&clock.device);
    sleep(2 * SECOND);
    assert_got!(clock.signals(), 0, "signals of a saved clock");
    let maps = |state: &[u8]| State::from_json(state).expect("the state").maps;
    assert_got!(maps(&saved(&clock.device)), maps(&state));
    clock.device.resume().expect("going on");
    assert_got!(clock.signals(), 1, "signals of the alarm");
    clock.write(ICR, 1);
    clock.alarm_in(1);
    clock.expect_alarm();
}

/// The time goes on; all else is as at first.
pub(super) fn reset_with_alarm() {
    let mut clock = Clock::with_alarm();
    clock.write(LR, 5000);
    clock.alarm_in(1);
    assert_got!(clock.device.reset().expect("a reset"), true);
    sleep(2 * SECOND);
    assert_got!(clock.signals(), 0, "signals of an alarm before the reset");
    let time = clock.read(DR);
    assert!(
        (5002..5060).contains(&time),
        "wanted 5000 and a few, got {time}"
    );
    for register in [MR, LR, IMSC, RIS, MIS] {
        assert_got!(clock.read(register), 0, "register {register:#x}");
    }
    clock.enable_alarm();
    clock.alarm_in(1);
    clock.expect_alarm();
}
