// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Random input, and models of what should come of it: calls of user space, programs, and accesses
//! of the guest.
//!
//! `KVM_BPF_SEED` is the seed of all, 1 if not set: the same seed gives the same input.
//! `KVM_BPF_FUZZ_MS` sets how long calls and accesses are tried, `KVM_BPF_LOADS` how many programs.
//! What fails says with which seed, and at which step.

use std::time::{Duration, Instant};

use kvm_bpf_selftests::harness::{Random, number_from_env};

mod accesses;
mod calls;
mod programs;

tests!(calls::calls, programs::programs, accesses::accesses);

fn seed() -> u64 {
    number_from_env("KVM_BPF_SEED", 1)
}

fn duration() -> Duration {
    Duration::from_millis(number_from_env("KVM_BPF_FUZZ_MS", 2000))
}

fn loads() -> u64 {
    number_from_env("KVM_BPF_LOADS", 400)
}

/// Takes step after step, as long as there is time; returns how many, and prints how many in a
/// second.
fn for_a_while(what: &str, mut step: impl FnMut(u64)) -> u64 {
    let start = Instant::now();
    let mut count = 0;
    while count == 0 || start.elapsed() < duration() {
        step(count);
        count += 1;
    }
    let rate = count as f64 / start.elapsed().as_secs_f64();
    println!(
        "KVM_BPF_SEED={}: {count} {what}, {rate:.0} in a second",
        seed()
    );
    count
}

/// One of several.
fn one_of<T: Copy>(random: &mut Random, choices: &[T]) -> T {
    choices[random.below(choices.len() as u64) as usize]
}
