// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The tables of `Documentation/choosing.md`: what the benchmark's rows `echo-` cost, and what is
//! true of each way to serve a device.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use crate::{Error, Result, disk, lines, read, table, write};

/// The file's first lines.
const HEAD: &str =
    "# Numbers of choosing.md; written by scripts/cost choosing.\nhost,row,what,number\n";
/// Between these lines of the guide are the tables.
const BEGIN: &str = "<!-- tables: scripts/cost choosing writes them -->\n";
const END: &str = "<!-- end of the tables -->\n";

/// What is counted of a row.
pub const INSTRUCTIONS: &str = "instructions";
pub const EXITS: &str = "exits";
pub const SWITCHES: &str = "switches";
const LINES: &str = "lines";

/// Hosts, and what the guide calls them.
pub const HOSTS: [(&str, &str); 2] = [("x86_64", "x86-64"), ("arm64", "arm64")];

/// Parts of the kernel whose lines are counted, as "host" `kernel`.
const KERNEL: &str = "kernel";
const SERIES: &str = "series";
const EVENTFD: &str = "eventfd";
const SOCKET: &str = "socket";
const VERIFIER: &str = "verifier";
const JIT: [(&str, &str); 2] = [("jit_x86_64", "x86-64"), ("jit_arm64", "arm64")];

/// What a row's name ends with where the completion is an interrupt.
const IRQ: &str = "-irq";

/// A way to serve a device: a row of the benchmark, and one with [`IRQ`].
struct Way {
    row: &'static str,
    title: &'static str,
    /// Parts of the kernel.
    parts: &'static [&'static str],
    /// Exits to user space, and switches between threads, per operation.
    counts: [f64; 2],
    reads: &'static str,
    payload: &'static str,
    memory: &'static str,
    replaceable: &'static str,
    trusted: &'static str,
}

const WAYS: [Way; 5] = [
    Way {
        row: "echo-program",
        title: "a program",
        parts: &[SERIES],
        counts: [0.0, 0.0],
        reads: "yes",
        payload: "8 bytes each way",
        memory: "in windows, copied",
        replaceable: "yes: one ioctl, between two accesses, maps stay",
        trusted: "verifier and JIT, not the program: it has its maps, its interrupts and its windows",
    },
    Way {
        row: "echo-user",
        title: "the VMM's vCPU thread",
        parts: &[],
        counts: [2.0, 0.0],
        reads: "yes",
        payload: "8 bytes each way",
        memory: "all",
        replaceable: "no: another VMM, to which the guest migrates",
        trusted: "the device's code, with all that the VMM may do",
    },
    Way {
        row: "echo-thread",
        title: "ioeventfd, a thread of the VMM",
        parts: &[EVENTFD],
        counts: [0.0, 2.0],
        reads: "no",
        payload: "none",
        memory: "all, and needed",
        replaceable: "no: as above",
        trusted: "the device's code, with all that the VMM may do",
    },
    Way {
        row: "echo-process",
        title: "ioeventfd, another process",
        parts: &[EVENTFD],
        counts: [0.0, 2.0],
        reads: "no",
        payload: "none",
        memory: "what it was sent, and needed",
        replaceable: "yes: another process gets the fds, if it also gets the state",
        trusted: "the device's code, with the memory that it was sent",
    },
    Way {
        row: "echo-messages",
        title: "messages to another process",
        parts: &[SOCKET],
        counts: [2.0, 4.0],
        reads: "yes",
        payload: "any",
        memory: "none, or what it was sent",
        replaceable: "yes: another process at the socket, if it also gets the state",
        trusted: "the device's code, with its socket and the memory that it was sent",
    },
];

/// Numbers by host, row and what they count.
#[derive(Debug, Default)]
pub struct Data(BTreeMap<[String; 3], f64>);

impl Data {
    fn read(path: &Path) -> Result<Self> {
        if path.exists() {
            Self::parse(path, &read(path)?)
        } else {
            Ok(Data::default())
        }
    }

    fn parse(path: &Path, text: &str) -> Result<Self> {
        let mut data = Data::default();
        for line in text.lines().filter(|line| !line.starts_with('#')).skip(1) {
            let words: Vec<&str> = line.split(',').collect();
            let parsed = match words[..] {
                [host, row, what, number] => number.parse().ok().map(|n| (host, row, what, n)),
                _ => None,
            };
            let (host, row, what, number) =
                parsed.ok_or_else(|| Error::Content(path.into(), format!("what is '{line}'?")))?;
            data.set(host, row, what, number);
        }
        Ok(data)
    }

    pub fn set(&mut self, host: &str, row: &str, what: &str, number: f64) {
        let key = [host, row, what].map(str::to_string);
        self.0.insert(key, number);
    }

    pub fn get(&self, host: &str, row: &str, what: &str) -> Option<f64> {
        let key = [host, row, what].map(str::to_string);
        self.0.get(&key).copied()
    }

    fn write(&self, path: &Path) -> Result<()> {
        let mut text = HEAD.to_string();
        for ([host, row, what], number) in &self.0 {
            writeln!(text, "{host},{row},{what},{number}").expect("no error in memory");
        }
        write(path, &text)
    }

    /// Of a part of the kernel.
    fn lines(&self, part: &str) -> f64 {
        self.get(KERNEL, part, LINES).unwrap_or(f64::NAN)
    }
}

/// The names of all rows.
pub fn rows() -> impl Iterator<Item = String> {
    echo_rows().chain(disk::rows())
}

/// Those of the small device, with an interrupt behind those without.
fn echo_rows() -> impl Iterator<Item = String> {
    WAYS.iter()
        .flat_map(|way| [way.row.to_string(), format!("{}{IRQ}", way.row)])
}

/// Puts the numbers of a host's table into the file.
pub fn save(path: &Path, host: &str, output: &Path) -> Result<bool> {
    let mut data = Data::read(path)?;
    let table = table::counted(output)?;
    for row in rows() {
        let Some([instructions, exits, switches]) = table.get(&row) else {
            println!("the table lacks {row}");
            return Ok(false);
        };
        data.set(host, &row, INSTRUCTIONS, instructions.round());
        data.set(host, &row, EXITS, *exits);
        data.set(host, &row, SWITCHES, *switches);
    }
    data.write(path)?;
    Ok(true)
}

/// Puts the lines of a part of the kernel into the file.
pub fn save_lines(path: &Path, part: &str, files: &[PathBuf]) -> Result<bool> {
    let mut data = Data::read(path)?;
    let mut sum = 0;
    for file in files {
        sum += lines::of_file(file)?;
    }
    println!("{part}: {sum} lines in {} files", files.len());
    data.set(KERNEL, part, LINES, sum as f64);
    data.write(path)?;
    Ok(true)
}

/// Writes the tables into the guide and draws its picture, or says whether they are there as they
/// would be; and whether the numbers are as the guide says.
pub fn guide(data: &Path, guide: &Path, check: bool) -> Result<bool> {
    let numbers = Data::read(data)?;
    let mut text = read(guide)?;
    for (begin, end, wanted) in [
        (BEGIN, END, render(&numbers)),
        (disk::BEGIN, disk::END, disk::render(&numbers)),
    ] {
        text = with_part(&text, begin, end, &wanted)
            .ok_or_else(|| Error::Content(guide.into(), "no place for tables".to_string()))?;
    }
    let mut good = true;
    let picture = guide.with_extension("svg");
    for (path, wanted) in [(guide, text), (&picture, disk::picture(&numbers)?)] {
        if !check {
            write(path, &wanted)?;
        } else if read(path)? != wanted {
            let [path, data] = [path, data].map(Path::display);
            println!("{path} is not what {data} says");
            good = false;
        }
    }
    for wrong in disorder(&numbers)
        .into_iter()
        .chain(disk::disorder(&numbers))
    {
        println!("{wrong}");
        good = false;
    }
    Ok(good)
}

/// The text with another part between two lines, if they are there.
fn with_part(text: &str, begin: &str, end: &str, part: &str) -> Option<String> {
    let (before, rest) = text.split_once(begin)?;
    let (_, after) = rest.split_once(end)?;
    Some([before, begin, part, end, after].concat())
}

/// What the guide says in words, where the numbers say otherwise.
fn disorder(data: &Data) -> Vec<String> {
    let mut wrong = Vec::new();
    for (host, _) in HOSTS {
        let mut say = |what: String| wrong.push(format!("{host}: {what}"));
        for row in echo_rows() {
            for what in [INSTRUCTIONS, EXITS, SWITCHES] {
                if data.get(host, &row, what).is_none() {
                    say(format!("no {what} of {row}"));
                }
            }
        }
        let cost = |row: &str| data.get(host, row, INSTRUCTIONS).unwrap_or(f64::NAN);
        let mut less = |one: &str, other: &str| {
            if cost(one) >= cost(other) {
                say(format!("{one} costs no less than {other}"));
            }
        };
        for irq in ["", IRQ] {
            let row = |name: &str| format!("echo-{name}{irq}");
            for other in ["user", "thread", "process"] {
                less(&row("program"), &row(other));
                less(&row(other), &row("messages"));
            }
        }
        for way in &WAYS {
            less(way.row, &format!("{}{IRQ}", way.row));
        }
        for irq in ["", IRQ] {
            let [thread, process] = ["thread", "process"].map(|name| format!("echo-{name}{irq}"));
            if (cost(&process) / cost(&thread) - 1.0).abs() > 0.02 {
                say(format!("{process} is not within 2 % of {thread}"));
            }
        }
        for way in &WAYS {
            for row in [way.row.to_string(), format!("{}{IRQ}", way.row)] {
                for (what, wanted) in [EXITS, SWITCHES].into_iter().zip(way.counts) {
                    let count = data.get(host, &row, what).unwrap_or(f64::NAN);
                    if (count - wanted).abs() > 0.05 {
                        say(format!("{row} has {count} {what}, not {wanted}"));
                    }
                }
            }
        }
    }
    wrong
}

/// The tables, and what belongs to them.
fn render(data: &Data) -> String {
    let mut text = String::new();
    let mut line = |words: String| {
        text.push_str(&words);
        text.push('\n');
    };
    line(format!(
        "| served by | completion | {} | exits to user space | context switches | lines of kernel code |",
        HOSTS.map(|(_, name)| name).join(" | ")
    ));
    line("| --- | --- | --- | --- | --- | --- | --- |".to_string());
    for way in &WAYS {
        for (irq, completion) in [("", "read"), (IRQ, "interrupt")] {
            let row = format!("{}{irq}", way.row);
            let costs = HOSTS.map(|(host, _)| {
                let cost = |row: &str| data.get(host, row, INSTRUCTIONS);
                let (least, cost) = (cost(&format!("{}{irq}", WAYS[0].row)), cost(&row));
                match (cost, least) {
                    (Some(cost), Some(least)) => format!("{cost} (× {:.2})", cost / least),
                    _ => "not measured".to_string(),
                }
            });
            let counts = [EXITS, SWITCHES].map(|what| {
                let mut counts: Vec<f64> = HOSTS
                    .iter()
                    .filter_map(|(host, _)| data.get(host, &row, what))
                    .map(f64::round)
                    .collect();
                counts.dedup();
                let counts: Vec<String> = counts.iter().map(f64::to_string).collect();
                counts.join("; ")
            });
            line(format!(
                "| {} | {completion} | {} | {} | {} |",
                way.title,
                costs.join(" | "),
                counts.join(" | "),
                kernel_lines(data, way, !irq.is_empty())
            ));
        }
    }
    line(String::new());
    let jit = JIT.map(|(part, name)| format!("{} on {name}", data.lines(part)));
    line(format!(
        "Lines are those of files whose code runs for each operation, without comments, blank lines and \
         tests: of the series all that is the device's ({}), of irqfd and ioeventfd `virt/kvm/eventfd.c` \
         and `fs/eventfd.c` ({}), of messages the UNIX sockets' ({}). A program is trusted because of {} \
         more, the verifier, and the JIT, {}.",
        data.lines(SERIES),
        data.lines(EVENTFD),
        data.lines(SOCKET),
        data.lines(VERIFIER),
        jit.join(", ")
    ));
    line(String::new());
    line(
        "| served by | reads trapped? | payload? | guest memory? | replaceable at run time? | who must be trusted |"
            .to_string(),
    );
    line("| --- | --- | --- | --- | --- | --- |".to_string());
    for way in &WAYS {
        line(format!(
            "| {} | {} | {} | {} | {} | {} |",
            way.title, way.reads, way.payload, way.memory, way.replaceable, way.trusted
        ));
    }
    text
}

/// Of what serves the row, and with an interrupt what delivers it.
fn kernel_lines(data: &Data, way: &Way, irq: bool) -> f64 {
    let mut parts = way.parts.to_vec();
    if irq && !parts.contains(&EVENTFD) {
        parts.push(EVENTFD);
    }
    parts.iter().fold(0.0, |sum, part| sum + data.lines(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that are as the guide says.
    fn data() -> Data {
        let mut data = Data::default();
        for (host, _) in HOSTS {
            for (index, way) in WAYS.iter().enumerate() {
                // A thread and another process cost the same.
                let cost = 100.0 * [0, 1, 2, 2, 4][index] as f64 + 1000.0;
                for (irq, more) in [("", 0.0), (IRQ, 50.0)] {
                    let row = format!("{}{irq}", way.row);
                    data.set(host, &row, INSTRUCTIONS, cost + more);
                    data.set(host, &row, EXITS, way.counts[0]);
                    data.set(host, &row, SWITCHES, way.counts[1]);
                }
            }
        }
        for part in [SERIES, EVENTFD, SOCKET, VERIFIER, JIT[0].0, JIT[1].0] {
            data.set(KERNEL, part, LINES, 10.0);
        }
        data
    }

    #[test]
    fn order() {
        assert_eq!(disorder(&data()), [""; 0]);
        for (row, what, number) in [
            ("echo-program", INSTRUCTIONS, 1100.0),
            ("echo-messages-irq", INSTRUCTIONS, 1200.0),
            ("echo-user-irq", INSTRUCTIONS, 1100.0),
            ("echo-process", INSTRUCTIONS, 1240.0),
            ("echo-program-irq", EXITS, 1.0),
            ("echo-thread", SWITCHES, 2.1),
        ] {
            let mut data = data();
            data.set("arm64", row, what, number);
            assert!(!disorder(&data).is_empty(), "{row}: {what} {number}");
        }
        let mut data = data();
        data.0
            .retain(|[host, row, _], _| host != "x86_64" || row != "echo-user");
        assert_eq!(disorder(&data).len(), 3);
    }

    #[test]
    fn numbers_come_back() {
        let data = data();
        let mut text = HEAD.to_string();
        for ([host, row, what], number) in &data.0 {
            writeln!(text, "{host},{row},{what},{number}").unwrap();
        }
        assert_eq!(Data::parse(Path::new("x"), &text).unwrap().0, data.0);
        assert!(Data::parse(Path::new("x"), "host,row,what,number\na,b,c").is_err());
    }

    #[test]
    fn tables() {
        let text = render(&data());
        let wanted = "| a program | interrupt | 1050 (× 1.00) | 1050 (× 1.00) | 0 | 0 | 20 |";
        assert!(text.lines().any(|line| line == wanted), "{text}");
        let wanted =
            "| messages to another process | read | 1400 (× 1.40) | 1400 (× 1.40) | 2 | 4 | 10 |";
        assert!(text.lines().any(|line| line == wanted), "{text}");
    }
}
