// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the benchmark's tables and the counts of QEMU's plugin say; `scripts/cost` runs it.

mod chart;
mod counts;
mod phase;
mod shared;
mod table;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("{0}: {1}")]
    File(PathBuf, std::io::Error),
    #[error("{0}: {1}")]
    Content(PathBuf, String),
    #[error("drawing: {0}")]
    Chart(String),
}

type Result<T> = std::result::Result<T, Error>;

fn read(path: &Path) -> Result<String> {
    // The console's output may hold anything.
    let bytes = fs::read(path).map_err(|error| Error::File(path.into(), error))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(|error| Error::File(path.into(), error))
}

#[derive(Debug, Parser)]
#[command(about = "What the benchmark's tables and the counts of QEMU's plugin say")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Where the instructions of an access are, by phase and by symbol.
    Profile {
        /// What the plugin counted.
        counts: PathBuf,
        /// The output of `kvm-bpf-bench --profile`.
        output: PathBuf,
        /// Puts the phases into this file, as those of a host ("x86_64", for instance) and a row.
        #[arg(long, num_args = 3, value_names = ["FILE", "HOST", "ROW"])]
        save: Option<Vec<String>>,
    },
    /// Draws that file.
    Chart {
        /// The file that `profile --save` writes.
        data: PathBuf,
        /// Where the SVG goes.
        svg: PathBuf,
    },
    /// Whether two CPUs write to the same lines of memory with each access.
    Shared {
        /// What the plugin counted.
        counts: PathBuf,
        /// The output of `kvm-bpf-bench --shared`.
        output: PathBuf,
        /// There must be such lines: to see that they would be found.
        #[arg(long)]
        expect: bool,
    },
    /// Whether two tables have the same numbers, within 0.1 %.
    Repeat {
        /// One table.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
    /// Whether differences in a table are those of the record, within 20 instructions.
    Gate {
        /// The record.
        record: PathBuf,
        /// Which host's.
        host: String,
        /// The table.
        table: PathBuf,
        /// Changes the record instead.
        #[arg(long)]
        update: bool,
    },
}

fn run(command: Command) -> Result<bool> {
    match command {
        Command::Profile {
            counts,
            output,
            save,
        } => {
            let profile = phase::Profile::read(&counts, &output)?;
            print!("{profile}");
            if let Some([file, host, row]) = save.as_deref() {
                chart::save(Path::new(file), host, row, &profile.phases())?;
            }
            Ok(true)
        }
        Command::Chart { data, svg } => chart::draw(&data, &svg).map(|()| true),
        Command::Shared {
            counts,
            output,
            expect,
        } => shared::check(&counts, &output, expect),
        Command::Repeat { first, second } => table::repeat(&first, &second),
        Command::Gate {
            record,
            host,
            table,
            update,
        } => table::gate(&record, &host, &table, update),
    }
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("kvm-bpf-report: {error}");
            ExitCode::from(2)
        }
    }
}
