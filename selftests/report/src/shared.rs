// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Which lines of memory two CPUs write to with each access.

use std::collections::BTreeMap;
use std::path::Path;

use crate::Result;
use crate::counts::{Output, lines};
use crate::phase::Phase;

/// Stores per access from which on they are part of it, not of the clock's tick.
const OFTEN: f64 = 0.1;
/// A CPU writes to a line with each access, but for some around which the count began.
const EACH: f64 = 0.9;

#[derive(Default)]
struct Line {
    /// Stores per access, by CPU.
    cpus: BTreeMap<u64, f64>,
    /// The same by what stores, and an address that it stores to.
    by: BTreeMap<(String, Phase), (f64, u64)>,
}

/// Whether no line is ours, and none is written to with each access, whoever does it: a lock of
/// ours would be written to by a function of the kernel's. With `expect`, whether there are such.
pub fn check(counts: &Path, output: &Path, expect: bool) -> Result<bool> {
    let output = Output::read(output)?;
    let mut all: BTreeMap<u64, Line> = BTreeMap::new();
    for (numbers, count) in lines(counts, "store", 4)? {
        let [cpu, line, address, by] = numbers[..] else {
            continue;
        };
        let place = output.place(by);
        let count = count / output.accesses;
        let line = all.entry(line).or_default();
        *line.cpus.entry(cpu).or_default() += count;
        let by = line
            .by
            .entry((place.to_string(), Phase::of(&place)))
            .or_insert((0.0, address));
        by.0 += count;
    }
    // What is written now and then is no part of an access.
    for line in all.values_mut() {
        line.cpus.retain(|_, count| *count >= OFTEN);
        line.by.retain(|_, (count, _)| *count >= OFTEN);
    }
    all.retain(|_, line| !line.cpus.is_empty());

    let mut ours = 0;
    let mut shared = 0;
    let mut each = 0;
    for (number, line) in &all {
        if line.cpus.len() < 2 {
            continue;
        }
        shared += 1;
        each += usize::from(line.cpus.values().all(|count| *count >= EACH));
        let mut writers = Vec::new();
        let mut address = 0;
        for ((name, phase), (_, at)) in &line.by {
            address = *at;
            if matches!(phase, Phase::Glue | Phase::Runner | Phase::Program) {
                ours += 1;
                writers.push(format!("{name} (OURS)"));
            } else {
                writers.push(name.clone());
            }
        }
        println!(
            "{:#x} ({}), {:.1} stores per access: {}",
            number << 6,
            output.place(address),
            line.cpus.values().sum::<f64>(),
            writers.join(", ")
        );
    }
    for cpu in [0, 1] {
        let count = all
            .values()
            .filter(|line| line.cpus.contains_key(&cpu))
            .count();
        println!("CPU {cpu} writes to {count} lines with each access");
    }
    println!(
        "{shared} lines are written to by both, {each} of them with each access, {ours} by us"
    );
    let seen = all.len() > 1;
    Ok(seen
        && if expect {
            each > 0
        } else {
            ours == 0 && each == 0
        })
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::{env, fs, process};

    use super::*;

    /// Files of that content, which differ by their test.
    fn files(test: &str, counts: &str) -> [PathBuf; 2] {
        const OUTPUT: &str = "accesses 10\n\
            symbol ffffffff80000000 T bpf_prog_run_in_task\n\
            symbol ffffffff80001000 T eventfd_signal_mask\n";
        let path = |name| env::temp_dir().join(format!("{test}-{}-{name}", process::id()));
        let [first, second] = ["counts", "output"].map(path);
        fs::write(&first, counts).unwrap();
        fs::write(&second, OUTPUT).unwrap();
        [first, second]
    }

    fn verdict(test: &str, counts: &str, expect: bool) -> bool {
        let files = files(test, counts);
        let verdict = check(&files[0], &files[1], expect).unwrap();
        for file in files {
            fs::remove_file(file).unwrap();
        }
        verdict
    }

    #[test]
    fn each_cpu_has_its_line() {
        let counts = "store 0 1 ffff000000000040 ffffffff80000010 10 20\n\
            store 1 2 ffff000000000080 ffffffff80000010 10 20\n";
        assert!(verdict("own", counts, false));
        assert!(!verdict("none", counts, true));
    }

    /// Both CPUs store to one line, the second one so often; a function of ours and another one.
    fn shared(often: u32) -> [String; 2] {
        ["ffffffff80000010", "ffffffff80001010"].map(|by| {
            format!(
                "store 0 1 ffff000000000040 {by} 10 20\n\
                 store 1 1 ffff000000000048 {by} 10 {}\n\
                 store 1 2 ffff000000000080 {by} 10 20\n",
                10 + often
            )
        })
    }

    #[test]
    fn a_shared_line() {
        let [ours, theirs] = shared(10);
        assert!(!verdict("ours", &ours, false));
        assert!(!verdict("theirs", &theirs, false));
        assert!(verdict("found", &theirs, true));
    }

    #[test]
    fn a_line_that_one_cpu_seldom_writes() {
        let [ours, theirs] = shared(3);
        assert!(!verdict("ours-seldom", &ours, false));
        assert!(verdict("theirs-seldom", &theirs, false));
        assert!(!verdict("not-found", &theirs, true));
    }

    #[test]
    fn now_and_then_is_no_access() {
        let counts = "store 0 1 ffff000000000040 ffffffff80000010 0 20\n\
            store 1 1 ffff000000000040 ffffffff80000010 5 5\n\
            store 1 2 ffff000000000080 ffffffff80000010 10 20\n";
        assert!(verdict("rare", counts, false));
    }
}
