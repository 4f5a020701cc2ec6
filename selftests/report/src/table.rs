// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The benchmark's tables: do they repeat, and are they what they were?

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use crate::{Error, Result, read, write};

/// Two runs may differ so much,
const REPEATS: f64 = 0.001;
/// and so much where a thread is woken: when it runs depends on what else the host does then.
const REPEATS_WITH_SWITCHES: f64 = 0.01;
/// Instructions by which a difference may be another than that of the record.
const TOLERANCE: f64 = 20.0;

/// Numbers by the names of rows.
type Table = BTreeMap<String, f64>;

fn parse(text: &str) -> Table {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            Some((words.next()?, words.next()?.parse().ok()?))
        })
        .map(|(name, number)| (name.to_string(), number))
        .collect()
}

/// Instructions, exits to user space and switches of each row.
pub type Counts = BTreeMap<String, [f64; 3]>;

pub fn counted(path: &Path) -> Result<Counts> {
    Ok(counts(&read(path)?))
}

fn counts(text: &str) -> Counts {
    text.lines()
        .filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let [name, median, _, _, exits, switches] = *words.first_chunk()?;
            let mut numbers = [0.0; 3];
            for (number, word) in numbers.iter_mut().zip([median, exits, switches]) {
                *number = word.parse().ok()?;
            }
            Some((name.to_string(), numbers))
        })
        .collect()
}

fn table(path: &Path) -> Result<Table> {
    let table = parse(&read(path)?);
    if table.is_empty() {
        return Err(Error::Content(path.into(), "no table".to_string()));
    }
    Ok(table)
}

pub fn repeat(first: &Path, second: &Path) -> Result<bool> {
    let (text, good) = compared(&counted(first)?, &counted(second)?);
    print!("{text}");
    Ok(good)
}

fn compared(first: &Counts, second: &Counts) -> (String, bool) {
    let mut text = String::new();
    let mut good = !first.is_empty() && first.keys().eq(second.keys());
    if !good {
        text += "the tables have different rows, or none\n";
    }
    for (name, &[one, _, switches]) in first {
        let Some(&[other, ..]) = second.get(name) else {
            continue;
        };
        let allowed = if switches == 0.0 {
            REPEATS
        } else {
            REPEATS_WITH_SWITCHES
        };
        let off = (other - one) / one;
        let verdict = if off.abs() <= allowed { "" } else { "  FAILED" };
        good &= verdict.is_empty();
        let percent = 100.0 * off;
        writeln!(
            text,
            "{name:<24} {one:>9.1} {other:>9.1} {percent:>+8.3} %{verdict}"
        )
        .expect("a String takes all");
    }
    writeln!(
        text,
        "{} rows, {} % allowed, {} % where threads are switched",
        first.len(),
        100.0 * REPEATS,
        100.0 * REPEATS_WITH_SWITCHES
    )
    .expect("a String takes all");
    (text, good)
}

/// One line of the record: what a row costs more than another.
struct Difference<'a> {
    host: &'a str,
    more: &'a str,
    less: &'a str,
    wanted: f64,
}

impl<'a> Difference<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [host, more, less, wanted] = words[..] else {
            return None;
        };
        let wanted = wanted.parse().ok()?;
        Some(Difference {
            host,
            more,
            less,
            wanted,
        })
    }

    fn found(&self, table: &Table) -> Option<f64> {
        Some(table.get(self.more)? - table.get(self.less)?)
    }
}

pub fn gate(record: &Path, host: &str, path: &Path, update: bool) -> Result<bool> {
    let text = read(record)?;
    let table = table(path)?;
    let mut good = true;
    let mut seen = false;
    let mut updated = String::new();
    for line in text.lines() {
        let difference = Difference::parse(line).filter(|difference| difference.host == host);
        let Some(difference) = difference.filter(|_| !line.starts_with('#')) else {
            writeln!(updated, "{line}").expect("no error in memory");
            continue;
        };
        let Difference {
            more, less, wanted, ..
        } = difference;
        seen = true;
        let Some(found) = difference.found(&table) else {
            println!("{more} less {less}: the table lacks one of them");
            good = false;
            writeln!(updated, "{line}").expect("no error in memory");
            continue;
        };
        let fits = (found - wanted).abs() <= TOLERANCE;
        good &= fits || update;
        println!(
            "{:<52} {found:>8.1}, recorded {wanted:>8.1}{}",
            format!("{more} less {less}"),
            if fits { "" } else { "  FAILED" }
        );
        writeln!(updated, "{host:<16} {more:<24} {less:<24} {found:>7.1}")
            .expect("no error in memory");
    }
    if !seen {
        println!("no record of {host}");
    }
    if update && updated != text {
        write(record, &updated)?;
    }
    Ok(good && seen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_found_among_comments() {
        let table = parse("# kernel Linux\nebpf-write   3880.0 1.0 2.0  the smallest program\nx\n");
        assert_eq!(table, Table::from([("ebpf-write".to_string(), 3880.0)]));
    }

    #[test]
    fn counts_are_behind_the_quartiles() {
        let text =
            "# a 1 2 3 4 5\nuser-write 10.0 9.0 11.0 1.0 0.5  a loop\nold 10.0 9.0 11.0  x y";
        let counted = BTreeMap::from([("user-write".to_string(), [10.0, 1.0, 0.5])]);
        assert_eq!(counts(text), counted);
    }

    #[test]
    fn tables_that_repeat() {
        let rows = |plain: f64, woken: f64| {
            Counts::from([
                ("plain".to_string(), [plain, 0.0, 0.0]),
                ("woken".to_string(), [woken, 0.0, 2.0]),
            ])
        };
        let good = |plain, woken| compared(&rows(1000.0, 1000.0), &rows(plain, woken)).1;
        assert!(good(1000.9, 1009.0));
        assert!(!good(1001.1, 1000.0));
        assert!(!good(1000.0, 989.0));
        assert!(!compared(&rows(1.0, 1.0), &Counts::new()).1);
        assert!(!compared(&Counts::new(), &Counts::new()).1);
    }

    #[test]
    fn differences() {
        let line = "x86_64 ebpf-write ioeventfd-write 99";
        let difference = Difference::parse(line).unwrap();
        let table = parse("ebpf-write 3880\nioeventfd-write 3781");
        assert_eq!((difference.host, difference.wanted), ("x86_64", 99.0));
        assert_eq!(difference.found(&table), Some(99.0));
        assert_eq!(difference.found(&parse("ebpf-write 1")), None);
        assert!(Difference::parse("# of something").is_none());
    }
}
