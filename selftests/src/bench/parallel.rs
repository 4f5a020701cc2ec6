// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Several vCPUs of one guest at once, each on a CPU of its own.

use std::process::ExitCode;
use std::sync::Barrier;
use std::time::Instant;
use std::{mem, thread};

use kvm_bpf_selftests::harness::stay_on;
use kvm_bpf_selftests::marker::{Marker, mark};

use crate::rows::{Loop, Row};
use crate::{host, profile, quantile};

const ROUNDS: usize = 11;

/// The CPUs that this process may use.
fn cpus() -> Vec<usize> {
    // SAFETY: the set is plain data, and the kernel fills no more of it than it is told of.
    let set = unsafe {
        let mut set: libc::cpu_set_t = mem::zeroed();
        let result = libc::sched_getaffinity(0, size_of_val(&set), &mut set);
        assert_eq!(result, 0, "sched_getaffinity");
        set
    };
    (0..libc::CPU_SETSIZE as usize)
        // SAFETY: the number is below the set's size.
        .filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) })
        .collect()
}

/// Runs each loop on a CPU of its own; `each` is told which it is.
fn on_each_cpu(loops: &mut [Loop], each: impl Fn(usize, &mut Loop) + Sync) {
    thread::scope(|scope| {
        for ((index, target), cpu) in loops.iter_mut().enumerate().zip(cpus()) {
            let each = &each;
            scope.spawn(move || {
                stay_on(cpu);
                each(index, target);
            });
        }
    });
}

/// Accesses per second, of 1 vCPU to as many as there are CPUs.
pub fn scale(rows: &[Row], accesses: Option<u64>) -> ExitCode {
    let accesses = accesses.unwrap_or(host::default_accesses());
    let cpus = cpus().len();
    host::head();
    println!(
        "# unit     1000 accesses per second; median and quartiles of {ROUNDS} rounds of \
         {accesses} accesses per vCPU"
    );
    if host::counts_instructions() {
        println!("# note     time is a count of instructions here: it says nothing of time");
    }
    println!(
        "# {:<22} {:>5} {:>9} {:>9} {:>9} {:>8}",
        "row", "vCPUs", "median", "low", "high", "per vCPU"
    );
    for row in rows.iter().filter(|row| row.scales()) {
        let mut alone = 0.0;
        for vcpus in 1..=cpus {
            let mut case = match row.set_up(vcpus as u32) {
                Ok(case) => case,
                Err(why) => {
                    println!("# {:<22} not here: {why}", row.name);
                    break;
                }
            };
            let mut rates: Vec<f64> = (0..=ROUNDS)
                .map(|_| rate(&mut case.loops, accesses))
                // The first warms up.
                .skip(1)
                .collect();
            rates.sort_by(f64::total_cmp);
            let [low, median, high] = [1, 2, 3].map(|fourths| quantile(&rates, fourths));
            if vcpus == 1 {
                alone = median;
            }
            println!(
                "{:<24} {vcpus:>5} {median:>9.1} {low:>9.1} {high:>9.1} {:>7.1}%",
                row.name,
                100.0 * median / (alone * vcpus as f64)
            );
        }
    }
    ExitCode::SUCCESS
}

/// Thousands of accesses per second of all vCPUs, from when all are ready until the last is done.
fn rate(loops: &mut [Loop], accesses: u64) -> f64 {
    let vcpus = loops.len();
    let [ready, done] = [(); 2].map(|()| Barrier::new(vcpus + 1));
    thread::scope(|scope| {
        for (target, cpu) in loops.iter_mut().zip(cpus()) {
            let (ready, done) = (&ready, &done);
            scope.spawn(move || {
                stay_on(cpu);
                ready.wait();
                target.run(accesses);
                done.wait();
            });
        }
        ready.wait();
        let start = Instant::now();
        done.wait();
        (vcpus as u64 * accesses) as f64 / start.elapsed().as_secs_f64() / 1000.0
    })
}

/// Two vCPUs for QEMU's plugin that looks at stores.
pub fn shared(row: &Row, accesses: Option<u64>) -> ExitCode {
    let accesses = accesses.unwrap_or(500);
    if cpus().len() < 2 {
        eprintln!("wanted two CPUs, got one");
        return ExitCode::FAILURE;
    }
    let mut case = match row.set_up(2) {
        Ok(case) => case,
        Err(why) => {
            eprintln!("{}: {why}", row.name);
            return ExitCode::FAILURE;
        }
    };
    let barrier = Barrier::new(2);
    on_each_cpu(&mut case.loops, |index, target| {
        let together = |marker| {
            barrier.wait();
            if index == 0 {
                mark(marker);
            }
            barrier.wait();
        };
        together(Marker::Watch);
        target.run(accesses);
        together(Marker::First);
        target.run(accesses);
        together(Marker::Second);
        target.run(2 * accesses);
        together(Marker::End);
    });
    println!("accesses {accesses}");
    profile::symbols();
    ExitCode::SUCCESS
}
