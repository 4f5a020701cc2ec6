// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the plugin has written down, and the kernel's symbols.

use std::fmt;
use std::path::Path;

use crate::{Error, Result, read};

/// The guest has its RAM, and so its code, below this address.
const GUEST_END: u64 = 0x1_0000;
/// User space ends below this one, on both architectures.
const USER_END: u64 = 1 << 63;

/// The output of the benchmark.
#[derive(Debug)]
pub struct Output {
    /// How many accesses there were in the first phase; in the second twice as many.
    pub accesses: f64,
    /// By address.
    symbols: Vec<(u64, String)>,
}

/// What is at an address.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Place {
    /// The guest that makes the accesses.
    Guest,
    /// The program that runs the guest.
    User,
    /// A function or a variable of the kernel's, with its module.
    Kernel(String),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Guest => f.write_str("(guest)"),
            Place::User => f.write_str("(user space)"),
            Place::Kernel(symbol) => f.write_str(symbol),
        }
    }
}

impl Output {
    pub fn read(path: &Path) -> Result<Self> {
        let text = read(path)?;
        let mut accesses = None;
        let mut symbols = Vec::new();
        for line in text.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                ["accesses", count] => accesses = count.parse().ok(),
                ["symbol", address, _, name, ref module @ ..] => {
                    if let Ok(address) = u64::from_str_radix(address, 16) {
                        // What rustc adds to tell crates apart tells nobody anything.
                        let mut name = format!("{:#}", rustc_demangle::demangle(name));
                        if let [module] = module {
                            name = format!("{name} {module}");
                        }
                        symbols.push((address, name));
                    }
                }
                _ => (),
            }
        }
        symbols.sort();
        match accesses {
            Some(accesses) if !symbols.is_empty() => Ok(Output { accesses, symbols }),
            _ => Err(Error::Content(
                path.into(),
                "not the output of the benchmark".to_string(),
            )),
        }
    }

    pub fn place(&self, address: u64) -> Place {
        if address < GUEST_END {
            return Place::Guest;
        }
        if address < USER_END {
            return Place::User;
        }
        let next = self.symbols.partition_point(|(start, _)| *start <= address);
        match next.checked_sub(1) {
            Some(index) => {
                // Of names for the same place the first is as good as any, and always the same.
                let start = self.symbols[index].0;
                let first = self.symbols.partition_point(|(other, _)| *other < start);
                Place::Kernel(self.symbols[first].1.clone())
            }
            None => Place::Kernel(format!("{address:x}")),
        }
    }
}

/// Lines of a kind in the plugin's file: the hexadecimal numbers, and how much the counts of the
/// phases differ.
pub fn lines(path: &Path, kind: &str, numbers: usize) -> Result<Vec<(Vec<u64>, f64)>> {
    let text = read(path)?;
    text.lines()
        .filter_map(|line| line.strip_prefix(kind)?.strip_prefix(' '))
        .map(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            let parsed = || {
                let (addresses, counts) = words.split_at_checked(numbers)?;
                let addresses = addresses
                    .iter()
                    .map(|word| u64::from_str_radix(word, 16).ok())
                    .collect::<Option<_>>()?;
                let [first, second]: [f64; 2] =
                    [counts.first()?.parse().ok()?, counts.get(1)?.parse().ok()?];
                Some((addresses, second - first))
            };
            parsed().ok_or_else(|| Error::Content(path.into(), format!("what is '{line}'?")))
        })
        .collect()
}
