// SPDX-License-Identifier: Apache-2.0 OR MIT

//! All tests, by topic.

use kvm_bpf_selftests::harness::Errno;
use libtest_mimic::Trial;

/// Lists the functions of a topic that are tests, as `topic::function`.
macro_rules! tests {
    ($($test:ident),+ $(,)?) => {
        pub(super) fn all() -> Vec<libtest_mimic::Trial> {
            vec![$(kvm_bpf_selftests::harness::trial(
                concat!(module_path!(), "::", stringify!($test))
                    .trim_start_matches("kvm_bpf_selftests::tests::"),
                $test,
            )),+]
        }
    };
}

/// Fails unless the first value equals the second; says what of, wanted and got.
macro_rules! assert_got {
    ($got:expr, $wanted:expr $(,)?) => {
        assert_got!($got, $wanted, stringify!($got))
    };
    ($got:expr, $wanted:expr, $what:literal) => {
        assert_got!($got, $wanted, format_args!($what))
    };
    ($got:expr, $wanted:expr, $what:literal, $($arg:expr),+ $(,)?) => {
        assert_got!($got, $wanted, format_args!($what, $($arg),+))
    };
    ($got:expr, $wanted:expr, $what:expr $(,)?) => {
        match (&$got, &$wanted) {
            (got, wanted) => assert!(
                got == wanted,
                "{}: wanted {wanted:x?}, got {got:x?}",
                $what
            ),
        }
    };
}

mod access;
mod context;
mod device;
mod fault;
mod irq;
mod kfunc;
mod lifetime;
mod pl031;
mod region;
mod swap;
mod vcpufreq;
mod verifier;

/// Where most tests have their region.
const ADDR: u64 = 0xd000_0000;
/// And its size.
const SIZE: u64 = 0x1000;

/// A value whose bytes all differ and whose every half has its sign bit set.
const PATTERN: u64 = 0xf8e7_d6c5_b4a3_9281;

/// Every test; the first says whether this is the right kernel at all.
pub fn all() -> Vec<Trial> {
    [
        device::all(),
        region::all(),
        access::all(),
        context::all(),
        swap::all(),
        lifetime::all(),
        irq::all(),
        kfunc::all(),
        fault::all(),
        verifier::all(),
        pl031::all(),
        vcpufreq::all(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Fails unless an ioctl answered so.
#[track_caller]
fn assert_errno<T: std::fmt::Debug>(what: &str, got: Result<T, Errno>, wanted: i32) {
    let wanted = Errno(wanted);
    match got {
        Err(errno) if errno == wanted => {}
        Err(errno) => panic!("{what}: wanted {wanted:?}, got {errno:?}"),
        Ok(value) => panic!("{what}: wanted {wanted:?}, got {value:?}"),
    }
}
