// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the benchmark's tables and the counts of QEMU's plugin say; `scripts/cost` runs it.

mod chart;
mod counts;
mod disk;
mod guide;
mod lines;
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
    /// The names of the rows of the guide.
    GuideRows,
    /// Puts a table's numbers of these rows into the guide's data.
    GuideNumbers {
        /// The data.
        data: PathBuf,
        /// Which host's.
        host: String,
        /// The table.
        table: PathBuf,
    },
    /// Puts the lines of a part of the kernel there.
    GuideLines {
        /// The data.
        data: PathBuf,
        /// What the part is called there.
        part: String,
        /// Its files.
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Writes the guide's tables and draws its picture; fails if the numbers are not in the order that it says.
    Guide {
        /// The data.
        data: PathBuf,
        /// The guide.
        guide: PathBuf,
        /// Only compares: fails if they are others.
        #[arg(long)]
        check: bool,
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
        Command::GuideRows => {
            guide::rows().for_each(|row| println!("{row}"));
            Ok(true)
        }
        Command::GuideNumbers { data, host, table } => guide::save(&data, &host, &table),
        Command::GuideLines { data, part, files } => guide::save_lines(&data, &part, &files),
        Command::Guide { data, guide, check } => guide::guide(&data, &guide, check),
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
