// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Which lines of memory two CPUs write to with each access.

use std::collections::BTreeMap;
use std::path::Path;

use crate::Result;
use crate::counts::{Output, lines};
use crate::phase::Phase;

/// Stores per access from which on they are part of it, not of the clock's tick.
const OFTEN: f64 = 0.1;

#[derive(Default)]
struct Line {
    /// Stores per access, by CPU.
    cpus: BTreeMap<u64, f64>,
    /// The same by what stores, and an address that it stores to.
    by: BTreeMap<(String, Phase), (f64, u64)>,
}

/// Whether no line is ours; with `expect`, whether there are lines at all.
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
    for (number, line) in &all {
        if line.cpus.len() < 2 {
            continue;
        }
        shared += 1;
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
    println!("{shared} lines are written to by both, {ours} of them by us");
    let seen = all.len() > 1;
    Ok(seen && if expect { shared > 0 } else { ours == 0 })
}
