// SPDX-License-Identifier: Apache-2.0 OR MIT

//! All targets on mutations of the seeds: `KVM_BPF_MUTATIONS` of each target (20000), which follow
//! from `KVM_BPF_SEED` (1).

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::{env, fs};

use kvm_bpf_fuzz::{TARGETS, Target};
use kvm_bpf_selftests::harness::{Random, number_from_env};

fn seeds(target: &str) -> Vec<Vec<u8>> {
    let mut directories = vec![target];
    // Object files have a note, too.
    if target == "note" {
        directories.push("object");
    }
    let mut files: Vec<PathBuf> = Vec::new();
    for directory in directories {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("seeds")
            .join(directory);
        let Ok(entries) = fs::read_dir(&directory) else {
            continue;
        };
        files.extend(entries.map(|entry| entry.expect("a directory of seeds").path()));
    }
    files.sort();
    let seeds = files.iter().map(|path| fs::read(path).expect("a seed"));
    let seeds: Vec<_> = seeds.collect();
    assert!(!seeds.is_empty(), "no seeds of {target}");
    seeds
}

/// A place in the input: often near its beginning, where headers are.
fn place(random: &mut Random, len: usize) -> usize {
    let limit = match random.below(3) {
        0 => len.min(64),
        _ => len,
    };
    random.below(limit as u64 + 1) as usize
}

fn mutate(random: &mut Random, seeds: &[Vec<u8>]) -> Vec<u8> {
    const NUMBERS: [u64; 10] = [
        0,
        1,
        0x7f,
        0xff,
        0xffff,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        1 << 63,
        u64::MAX,
    ];
    let any = |random: &mut Random| &seeds[random.below(seeds.len() as u64) as usize];
    let mut input = any(random).clone();
    for _ in 0..1 + random.below(4) {
        let at = place(random, input.len());
        match random.below(8) {
            0..=1 => {
                if let Some(byte) = input.get_mut(at) {
                    *byte ^= 1 << random.below(8);
                }
            }
            2 => {
                let number = NUMBERS[random.below(NUMBERS.len() as u64) as usize];
                let width = 1 << random.below(4);
                let bytes = number.to_le_bytes();
                for (byte, new) in input[at..].iter_mut().zip(&bytes[..width]) {
                    *byte = *new;
                }
            }
            3 => input.truncate(at),
            4 => {
                let len = random.below(16) as usize;
                let end = (at + len).min(input.len());
                input.drain(at..end);
            }
            5 => {
                let len = 1 + random.below(8);
                let bytes: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
                input.splice(at..at, bytes);
            }
            6 => {
                // A part of one, twice or in another place.
                let other = any(random);
                let from = place(random, other.len());
                let to = (from + random.below(64) as usize).min(other.len());
                input.splice(at..at, other[from..to].iter().copied());
            }
            _ => {
                let other = any(random);
                let from = at.min(other.len());
                input.truncate(at);
                input.extend(&other[from..]);
            }
        }
    }
    input
}

/// Runs a target; keeps the input that it ends with. Returns whether that was good.
fn run((name, target): Target, what: &str, input: &[u8]) -> bool {
    let file = env::temp_dir().join(format!("kvm-bpf-fuzz-{name}"));
    // What a signal ends does not come back to say so.
    if name == "object" {
        fs::write(&file, input).expect("keeping the input");
    }
    let is_good = catch_unwind(AssertUnwindSafe(|| target(input))).unwrap_or_else(|panic| {
        fs::write(&file, input).expect("keeping the input");
        eprintln!("{name}: {what} is in {}", file.display());
        resume_unwind(panic);
    });
    if name == "object" {
        fs::remove_file(&file).expect("forgetting the input");
    }
    is_good
}

/// In one test, as the number of open files is that of the process.
#[test]
fn mutations_of_the_seeds() {
    let seed = number_from_env("KVM_BPF_SEED", 1);
    let count = number_from_env("KVM_BPF_MUTATIONS", 20_000);
    for target in TARGETS {
        let (name, _) = target;
        let seeds = seeds(name);
        // Where no seed is good, mutations of it are not nearly good.
        let good = seeds.iter().filter(|input| run(target, "a seed", input));
        assert!(good.count() > 0, "{name}: no seed is good");
        let mut good = 0;
        let mut random = Random::new(seed);
        for number in 0..count {
            let input = mutate(&mut Random::new(random.next()), &seeds);
            let what = format!("mutation {number} with KVM_BPF_SEED={seed}");
            good += u64::from(run(target, &what, &input));
        }
        let seeds = seeds.len();
        println!("{name}: {count} mutations of {seeds} seeds, {good} of them good");
    }
}
