// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a guest's access costs, by who handles it.
//!
//! usage: `kvm-bpf-bench [--list | --scale | --profile | --shared] [--row NAME[,NAME]...]... [ACCESSES]`
//!
//! Prints a table: lines that begin with "#" say what ran where, all others begin with a row's
//! name and its number. Under QEMU's `-icount` (see `scripts/boot`) the numbers are the host's
//! instructions per access, elsewhere nanoseconds. A number is what one more access costs: a
//! round of 2 ACCESSES less one of ACCESSES, each the median of several; so what a round costs by
//! itself and a tick of the host's clock in between do not count. Behind the numbers are exits to
//! user space and switches between threads, per access. An access of the rows `echo-` is an
//! operation, a command and its result; one of `request-` is what a driver of virtio does per
//! request, and one of `block-` is a request of a disk.
//!
//! * `--row NAME` selects a row, with commas several, and may be given again; `--list` lists them.
//! * `--scale` measures accesses per second of 1 to n vCPUs, each on a CPU of its own.
//! * `--profile` runs one row for QEMU's plugin that counts what is executed, `--shared` with two
//!   vCPUs for the one that looks at stores; both print the kernel's symbols.

mod block;
mod echo;
mod host;
mod parallel;
mod profile;
mod request;
mod rows;

use std::process::ExitCode;
use std::{env, fmt};

use kvm_bpf_selftests::peer;
use rows::{Loop, Row};

/// How many rounds of each length are measured.
const ROUNDS: usize = 11;

enum Mode {
    Table,
    List,
    Scale,
    Profile,
    Shared,
}

struct Options {
    mode: Mode,
    rows: Vec<Row>,
    accesses: Option<u64>,
}

fn main() -> ExitCode {
    // What the benchmark starts itself.
    if let Some(role) = peer::role() {
        if let Err(error) = echo::serve_as(&role) {
            eprintln!("kvm-bpf-bench as the other process: {error}");
            return ExitCode::FAILURE;
        }
        return ExitCode::SUCCESS;
    }
    let options = match parse(env::args().skip(1)) {
        Ok(options) => options,
        Err(message) => {
            eprintln!("kvm-bpf-bench: {message}");
            eprintln!(
                "usage: kvm-bpf-bench [--list | --scale | --profile | --shared] [--row NAME[,NAME]...]... \
                 [ACCESSES]"
            );
            return ExitCode::from(2);
        }
    };
    libbpf_rs::set_print(None);
    let Options {
        mode,
        rows,
        accesses,
    } = options;
    match mode {
        Mode::List => {
            for row in rows {
                println!("{:<24} {}", row.name, row.what);
            }
            ExitCode::SUCCESS
        }
        Mode::Table => table(&rows, accesses),
        Mode::Scale => parallel::scale(&rows, accesses),
        Mode::Profile => profile::profile(&rows[0], accesses),
        Mode::Shared => parallel::shared(&rows[0], accesses),
    }
}

fn parse(args: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut mode = Mode::Table;
    let mut selected = Vec::new();
    let mut accesses = None;
    let mut args = args;
    let all = rows::all();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--list" => mode = Mode::List,
            "--scale" => mode = Mode::Scale,
            "--profile" => mode = Mode::Profile,
            "--shared" => mode = Mode::Shared,
            "--row" => {
                for name in args.next().ok_or("--row wants names")?.split(',') {
                    let row = all.iter().find(|row| row.name == name);
                    selected.push(row.ok_or(format!("no row '{name}'; see --list"))?.clone());
                }
            }
            _ => match arg.parse() {
                Ok(count) if count > 0 && accesses.is_none() => accesses = Some(count),
                _ => return Err(format!("what is '{arg}'?")),
            },
        }
    }
    if matches!(mode, Mode::Profile | Mode::Shared) && selected.len() != 1 {
        return Err("one --row, please".to_string());
    }
    Ok(Options {
        mode,
        rows: if selected.is_empty() { all } else { selected },
        accesses,
    })
}

/// What one more access costs.
struct Cost {
    median: f64,
    /// The lower and the upper quartile of the rounds.
    quartiles: [f64; 2],
}

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [low, high] = self.quartiles;
        write!(f, "{:>9.1} {low:>9.1} {high:>9.1}", self.median)
    }
}

/// The element that so many fourths of the others are not greater than.
fn quantile(sorted: &[f64], fourths: usize) -> f64 {
    sorted[(sorted.len() - 1) * fourths / 4]
}

fn measure(target: &mut Loop, accesses: u64) -> Cost {
    let clock = host::Clock::new();
    let accesses = target.whole_rounds(accesses);
    let mut time = |count| {
        let start = clock.now();
        target.run(count);
        (clock.now() - start) as f64
    };
    host::settle();
    // The first rounds warm up.
    time(accesses);
    time(2 * accesses);
    let mut rounds: Vec<[f64; 2]> = (0..ROUNDS)
        .map(|_| [time(accesses), time(2 * accesses)])
        .collect();
    let middle = |which: usize, rounds: &mut Vec<[f64; 2]>| {
        rounds.sort_by(|a, b| a[which].total_cmp(&b[which]));
        rounds[ROUNDS / 2][which]
    };
    let median = (middle(1, &mut rounds) - middle(0, &mut rounds)) / accesses as f64;
    let start = 2.0 * middle(0, &mut rounds) - middle(1, &mut rounds);
    let mut each: Vec<f64> = rounds
        .iter()
        .map(|round| (round[1] - start) / (2 * accesses) as f64)
        .collect();
    each.sort_by(f64::total_cmp);
    Cost {
        median,
        quartiles: [quantile(&each, 1), quantile(&each, 3)],
    }
}

fn table(rows: &[Row], accesses: Option<u64>) -> ExitCode {
    host::head();
    println!(
        "# unit     {} per 4-byte access; median and quartiles of {ROUNDS} rounds of up to {} \
         accesses; exits to user space and switches between threads, per access",
        host::unit(),
        accesses.unwrap_or(host::default_accesses())
    );
    println!(
        "# {:<22} {:>9} {:>9} {:>9} {:>5} {:>8}",
        "row", "median", "low", "high", "exits", "switches"
    );
    let mut held = String::new();
    for row in rows {
        let line = match row.set_up(1) {
            Ok(mut case) => {
                let accesses = accesses.unwrap_or(row.default_accesses());
                let cost = measure(&mut case.loops[0], accesses);
                let [exits, switches] = case.count();
                format!(
                    "{:<24} {cost} {exits:>5.1} {switches:>8.1}  {}\n",
                    row.name, row.what
                )
            }
            Err(why) => format!("# {:<22} not here: {why}\n", row.name),
        };
        // The console's interrupts come when the machine below likes. Where instructions are
        // counted, there are none before the last row: they would decide where memory is.
        match host::counts_instructions() {
            true => held.push_str(&line),
            false => print!("{line}"),
        }
    }
    print!("{held}");
    ExitCode::SUCCESS
}
