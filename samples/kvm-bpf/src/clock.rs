// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The host's clocks, as programs in its kernel see them.

use std::fs;
use std::time::Duration;

/// How often to read two clocks that cannot be read at one moment.
const TRIES: u32 = 10;

/// A clock of the kernel, such as `CLOCK_MONOTONIC`.
///
/// A time namespace shifts the clocks that run since boot for its processes, but not for programs
/// in the kernel. Here they are as without one, if `/proc` is there to tell.
#[derive(Clone, Copy, Debug)]
pub struct HostClock {
    id: libc::clockid_t,
    /// What the namespace has added, in nanoseconds.
    shift: i128,
}

impl HostClock {
    /// The clock of that number, in the namespace of this process.
    pub fn new(id: libc::clockid_t) -> Self {
        // A kernel without such namespaces does not have the file.
        let offsets = fs::read_to_string("/proc/self/timens_offsets").unwrap_or_default();
        let shift = match id {
            libc::CLOCK_MONOTONIC => shift_ns(&offsets, "monotonic"),
            libc::CLOCK_BOOTTIME => shift_ns(&offsets, "boottime"),
            _ => None,
        };
        HostClock {
            id,
            shift: shift.unwrap_or(0),
        }
    }

    /// Its time.
    pub fn now(&self) -> Duration {
        let mut now = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: the kernel only writes to `now`, which is a whole timespec.
        unsafe { libc::clock_gettime(self.id, &mut now) };
        let now = i128::from(now.tv_sec) * NSEC_PER_SEC + i128::from(now.tv_nsec);
        Duration::from_nanos((now - self.shift) as u64)
    }
}

const NSEC_PER_SEC: i128 = 1_000_000_000;

/// What a time namespace adds to a clock: the kernel writes "NAME SECONDS NANOSECONDS" per clock,
/// the seconds with a sign.
fn shift_ns(offsets: &str, clock: &str) -> Option<i128> {
    offsets.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        if words.next()? != clock {
            return None;
        }
        let seconds: i64 = words.next()?.parse().ok()?;
        let nanoseconds: i64 = words.next()?.parse().ok()?;
        Some(i128::from(seconds) * NSEC_PER_SEC + i128::from(nanoseconds))
    })
}

/// What a program adds to `bpf_ktime_get_boot_ns()` to get the time of day, in nanoseconds.
pub fn time_of_day_offset_ns() -> u64 {
    let (time_of_day, boot) = (
        HostClock::new(libc::CLOCK_REALTIME),
        HostClock::new(libc::CLOCK_BOOTTIME),
    );
    // The try that took least time is the best.
    let try_once = |_| {
        let before = boot.now();
        let time = time_of_day.now();
        let took = boot.now().saturating_sub(before);
        (took, time, before + took / 2)
    };
    let (_, time, boot) = (0..TRIES).map(try_once).min().unwrap_or_default();
    (time.as_nanos() as u64).wrapping_sub(boot.as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shifts_are_read_by_clock() {
        let file = "monotonic           0         0\nboottime      -86400 500000000\n";
        assert_eq!(shift_ns(file, "monotonic"), Some(0));
        assert_eq!(shift_ns(file, "boottime"), Some(-86_399_500_000_000));
        let file = "monotonic  1000000         1\nboottime  9000000000 999999999\n";
        assert_eq!(shift_ns(file, "monotonic"), Some(1_000_000_000_000_001));
        assert_eq!(
            shift_ns(file, "boottime"),
            Some(9_000_000_000_999_999_999),
            "64 bits are enough for no more"
        );
        for none in ["", "boottime", "boottime x 0", "boottime 1", "tai 1 1\n"] {
            assert_eq!(shift_ns(none, "boottime"), None, "{none:?}");
        }
    }

    #[test]
    fn a_shifted_clock_is_shifted_back() {
        let clock = HostClock {
            id: libc::CLOCK_REALTIME,
            shift: 1_000_000_000_000,
        };
        let now = HostClock::new(libc::CLOCK_REALTIME).now();
        let off = (clock.now() + Duration::from_secs(1000)).abs_diff(now);
        assert!(off < Duration::from_secs(60), "{off:?} off");
    }

    #[test]
    fn the_offset_leads_to_the_time_of_day() {
        let boot = HostClock::new(libc::CLOCK_BOOTTIME).now();
        let sum = (boot.as_nanos() as u64).wrapping_add(time_of_day_offset_ns());
        let now = HostClock::new(libc::CLOCK_REALTIME).now();
        let off = Duration::from_nanos(sum).abs_diff(now);
        assert!(off < Duration::from_secs(1), "{off:?} off");
    }
}
