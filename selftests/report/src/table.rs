// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The benchmark's tables: do they repeat, and are they what they were?

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::path::Path;

use crate::{Error, Result, read, write};

/// Two runs may differ so much.
const REPEATS: f64 = 0.001;
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
    let (text, good) = compared(&parse(&read(first)?), &parse(&read(second)?));
    print!("{text}");
    Ok(good)
}

fn compared(first: &Table, second: &Table) -> (String, bool) {
    let mut text = String::new();
    let mut good = !first.is_empty() && first.keys().eq(second.keys());
    if !good {
        text += "the tables have different rows, or none\n";
    }
    for (name, one) in first {
        let Some(other) = second.get(name) else {
            continue;
        };
        let off = (other - one) / one;
        let verdict = if off.abs() <= REPEATS { "" } else { "  FAILED" };
        good &= verdict.is_empty();
        let percent = 100.0 * off;
        writeln!(
            text,
            "{name:<24} {one:>9.1} {other:>9.1} {percent:>+8.3} %{verdict}"
        )
        .expect("a String takes all");
    }
    writeln!(text, "{} rows, {} % allowed", first.len(), 100.0 * REPEATS)
        .expect("a String takes all");
    (text, good)
}

/// What a row may cost more than another.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Wanted {
    /// About as much as it did.
    Recorded(f64),
    /// A goal: at most so much, in instructions or in percent of the other row.
    AtMost(f64),
    AtMostPercent(f64),
}

/// In the place of the other row.
const NOTHING: &str = "-";

/// One line of the record.
struct Difference<'a> {
    host: &'a str,
    more: &'a str,
    less: &'a str,
    wanted: Wanted,
}

impl<'a> Difference<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (&[host, more, less], wanted) = words.split_first_chunk()?;
        let wanted = match *wanted {
            [recorded] => Wanted::Recorded(recorded.parse().ok()?),
            ["at-most", limit] => match limit.strip_suffix('%') {
                Some(percent) => Wanted::AtMostPercent(percent.parse().ok()?),
                None => Wanted::AtMost(limit.parse().ok()?),
            },
            _ => return None,
        };
        Some(Difference {
            host,
            more,
            less,
            wanted,
        })
    }

    /// What the table says, and whether that is what is wanted; `None` if it lacks a row.
    fn found(&self, table: &Table) -> Option<(f64, bool)> {
        let less = match self.less {
            NOTHING => &0.0,
            row => table.get(row)?,
        };
        let found = table.get(self.more)? - less;
        let fits = match self.wanted {
            Wanted::Recorded(recorded) => (found - recorded).abs() <= TOLERANCE,
            Wanted::AtMost(limit) => found <= limit,
            Wanted::AtMostPercent(percent) => found <= less * percent / 100.0,
        };
        Some((found, fits))
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Wanted::Recorded(recorded) => write!(f, "recorded {recorded:>8.1}"),
            Wanted::AtMost(limit) => write!(f, "at most {limit:>9.1}"),
            Wanted::AtMostPercent(percent) => write!(f, "at most {percent:>7} %"),
        }
    }
}

pub fn gate(record: &Path, host: &str, path: &Path, update: bool) -> Result<bool> {
    let text = read(record)?;
    let (output, updated, good) = compare_with_record(&text, host, &table(path)?, update);
    print!("{output}");
    if update && updated != text {
        write(record, &updated)?;
    }
    Ok(good)
}

/// What the table is like beside the record, the record with the table's numbers, and whether
/// the table is as the record wants it, which is to be renewed or not.
fn compare_with_record(
    text: &str,
    host: &str,
    table: &Table,
    renew: bool,
) -> (String, String, bool) {
    let mut output = String::new();
    let mut updated = String::new();
    let mut good = true;
    let mut seen = false;
    for line in text.lines() {
        let difference = Difference::parse(line).filter(|difference| difference.host == host);
        let Some(difference) = difference.filter(|_| !line.starts_with('#')) else {
            updated += &format!("{line}\n");
            continue;
        };
        let Difference {
            more, less, wanted, ..
        } = difference;
        seen = true;
        let Some((found, fits)) = difference.found(table) else {
            output += &format!("{more} less {less}: the table lacks one of them\n");
            good = false;
            updated += &format!("{line}\n");
            continue;
        };
        good &= fits || renew && matches!(wanted, Wanted::Recorded(_));
        let verdict = if fits { "" } else { "  FAILED" };
        let what = format!("{more} less {less}");
        output += &format!("{what:<52} {found:>8.1}, {wanted}{verdict}\n");
        updated += &match wanted {
            Wanted::Recorded(_) => format!("{host:<16} {more:<24} {less:<24} {found:>7.1}\n"),
            _ => format!("{line}\n"),
        };
    }
    if !seen {
        output += &format!("no record of {host}\n");
    }
    (output, updated, good && seen)
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
        let rows = |first: f64, second: f64| {
            Table::from([("first".to_string(), first), ("second".to_string(), second)])
        };
        let good = |one, other| compared(&rows(1000.0, 1000.0), &rows(one, other)).1;
        assert!(good(1000.9, 999.1));
        assert!(!good(1001.1, 1000.0));
        assert!(!good(1000.0, 998.9));
        assert!(!compared(&rows(1.0, 1.0), &Table::new()).1);
        assert!(!compared(&Table::new(), &Table::new()).1);
    }

    #[test]
    fn differences() {
        let table = parse("ebpf-write 3840\nioeventfd-write 3781");
        let found = |wanted| {
            let line = format!("x86_64 ebpf-write ioeventfd-write {wanted}");
            Difference::parse(&line).unwrap().found(&table)
        };
        for (wanted, fits) in [
            ("79", true),
            ("39", true),
            ("38", false),
            ("80", false),
            ("at-most 59", true),
            ("at-most 58", false),
            ("at-most 2%", true),
            ("at-most 1.5%", false),
        ] {
            assert_eq!(found(wanted), Some((59.0, fits)), "{wanted}");
        }
        let line = "x86_64 ebpf-write ioeventfd-write 59";
        let difference = Difference::parse(line).unwrap();
        assert_eq!(difference.found(&parse("ebpf-write 1")), None);
        let difference = Difference::parse("x86_64 ebpf-write - at-most 3839").unwrap();
        assert_eq!(difference.found(&table), Some((3840.0, false)));
        assert!(Difference::parse("x86_64 a b at-least 3").is_none());
        assert!(Difference::parse("# of something").is_none());
    }

    #[test]
    fn a_record_is_renewed_but_for_its_goals() {
        let record = "# of x\nx a b 99\nx a b at-most 10\ny a b 1\n";
        let table = parse("a 60\nb 40");
        let (_, updated, good) = compare_with_record(record, "x", &table, true);
        let line = format!("{:<16} {:<24} {:<24} {:>7.1}", "x", "a", "b", 20.0);
        assert_eq!(
            updated,
            format!("# of x\n{line}\nx a b at-most 10\ny a b 1\n")
        );
        assert!(!good);
        let good = |record, host, renew| compare_with_record(record, host, &table, renew).2;
        assert!(good("x a b 20\nx a b at-most 20\n", "x", false));
        assert!(!good("x a b 99\nx a b at-most 20\n", "x", false));
        assert!(good("x a b 99\nx a b at-most 20\n", "x", true));
        assert!(!good("x a b 20\nx a c at-most 20\n", "x", true));
        assert!(!good(record, "z", true));
    }
}
