// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The disk of `Documentation/choosing.md`: what the benchmark's rows `block-` cost, and the bounds
//! that a disk of a program has.

use plotters::style::RGBColor;

use crate::Result;
use crate::chart::Chart;
use crate::guide::{Data, EXITS, HOSTS, INSTRUCTIONS, SWITCHES};

/// Between these lines of the guide is its part.
pub const BEGIN: &str = "<!-- disk: scripts/cost choosing writes this -->\n";
pub const END: &str = "<!-- end of the disk -->\n";

/// A way to serve the disk: rows of the benchmark, with the name of what a guest asks for in between.
struct Way {
    row: [&'static str; 2],
    title: &'static str,
    /// Exits to user space per notification.
    exits: f64,
}

const WAYS: [Way; 6] = [
    Way {
        row: ["block-program-", ""],
        title: "a program",
        exits: 0.0,
    },
    Way {
        row: ["block-vcpu-", ""],
        title: "the VMM's vCPU thread",
        exits: 3.0,
    },
    Way {
        row: ["block-thread-", ""],
        title: "ioeventfd, a thread, at once",
        exits: 2.0,
    },
    Way {
        row: ["block-thread-", "-idle"],
        title: "the same, the guest idles",
        exits: 2.0,
    },
    Way {
        row: ["block-process-", ""],
        title: "vhost-user, at once",
        exits: 2.0,
    },
    Way {
        row: ["block-process-", "-idle"],
        title: "the same, the guest idles",
        exits: 2.0,
    },
];

/// What the guest asks for: its name in rows and in the guide, and how many requests a notification
/// has.
const WORKS: [(&str, &str, f64); 3] = [
    ("read", "read", 1.0),
    ("write", "write", 1.0),
    ("write-8", "write, 8 at a time", 8.0),
];

/// Colours that people who see fewer of them can tell apart.
const COLOURS: [RGBColor; WORKS.len()] = [
    RGBColor(0x5b, 0x7d, 0xa8),
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0x00, 0x9e, 0x73),
];

/// A notification, and an empty write.
const NOTIFY: [&str; 2] = ["block-notify-read", "block-notify-write"];
const SECTOR: &str = "-512";
const EMPTY: &str = "ebpf-write";
const LONGEST: [(&str, &str); 3] = [
    ("block-longest", "the longest notification of a disk"),
    ("rng-longest", "the longest of random numbers"),
    (
        "block-reset-busy",
        "a reset while someone is in a request that does not end",
    ),
];

/// What a notification may cost above an empty write, but for the copy of 4096 bytes.
const MOST_ABOVE: f64 = 3500.0;
/// What the longest one may cost.
const MOST: f64 = 1_000_000.0;
/// What part of a thread's cost, or another process's, a program may have with one request at a
/// time, by host. On x86-64 it is not half: KVM's emulator, the same for all, is most of the cost.
const SHARES: [(&str, f64); 2] = [("x86_64", 0.7), ("arm64", 0.5)];

fn row(way: &Way, work: &str) -> String {
    let [before, behind] = way.row;
    format!("{before}{work}{behind}")
}

/// The names of the rows.
pub fn rows() -> impl Iterator<Item = String> {
    let requests = WAYS
        .iter()
        .flat_map(|way| WORKS.iter().map(|(work, _, _)| row(way, work)));
    let notifications = NOTIFY
        .iter()
        .flat_map(|name| [name.to_string(), format!("{name}{SECTOR}")]);
    let others = [EMPTY]
        .into_iter()
        .chain(LONGEST.map(|(row, _)| row))
        .map(str::to_string);
    requests.chain(notifications).chain(others)
}

/// Instructions of a row.
fn cost(data: &Data, host: &str, row: &str) -> f64 {
    data.get(host, row, INSTRUCTIONS).unwrap_or(f64::NAN)
}

/// Instructions of copying 4096 bytes, by those of 3584 more in the same call; none where a
/// processor has an instruction for it.
fn copy(data: &Data, host: &str, notify: &str) -> f64 {
    let less = cost(data, host, &format!("{notify}{SECTOR}"));
    (cost(data, host, notify) - less).max(0.0) * 4096.0 / 3584.0
}

/// Of a notification of 4096 bytes above an empty write, without the copy.
fn above(data: &Data, host: &str, notify: &str) -> f64 {
    cost(data, host, notify) - copy(data, host, notify) - cost(data, host, EMPTY)
}

/// Where the numbers are not as they have to be.
pub fn disorder(data: &Data) -> Vec<String> {
    let mut wrong = Vec::new();
    for (host, share) in SHARES {
        let mut say = |what: String| wrong.push(format!("{host}: {what}"));
        // A number that is not there is none below a bound.
        let mut below = |what: &str, number: f64, most: f64| {
            if number.is_nan() || number > most {
                say(format!("{what}: {number:.0}, more than {most:.0}"));
            }
        };
        for (work, _, depth) in WORKS {
            let program = cost(data, host, &row(&WAYS[0], work));
            for way in &WAYS[1..] {
                let name = row(way, work);
                let all_in_user_space = way.exits == 3.0;
                let share = if depth == 1.0 && !all_in_user_space {
                    share
                } else {
                    1.0
                };
                let most = cost(data, host, &name) * share;
                below(&format!("a program against {name}"), program, most);
            }
        }
        for notify in NOTIFY {
            let above = above(data, host, notify);
            below(&format!("{notify} without copy"), above, MOST_ABOVE);
        }
        for (name, _) in LONGEST {
            below(name, cost(data, host, name), MOST);
        }
        for way in &WAYS {
            for (work, _, depth) in WORKS {
                let name = row(way, work);
                let exits = data.get(host, &name, EXITS).unwrap_or(f64::NAN);
                let wanted = way.exits / depth;
                // The table has one digit.
                if exits.is_nan() || (exits - wanted).abs() > 0.06 {
                    say(format!("{name} has {exits} exits, not {wanted}"));
                }
            }
        }
        for name in NOTIFY.into_iter().chain(LONGEST.map(|(row, _)| row)) {
            let counts = [EXITS, SWITCHES].map(|what| data.get(host, name, what));
            if counts != [Some(0.0); 2] {
                say(format!("{name} has exits or switches: {counts:?}"));
            }
        }
    }
    wrong
}

/// The guide's part.
pub fn render(data: &Data) -> String {
    let mut text = String::new();
    let mut line = |words: String| {
        text.push_str(&words);
        text.push('\n');
    };
    let heads = HOSTS.map(|(_, name)| {
        WORKS
            .map(|(_, work, _)| format!("{name}, {work}"))
            .join(" | ")
    });
    line(format!(
        "| served by | {} | exits per notification | context switches |",
        heads.join(" | ")
    ));
    line(format!(
        "| --- {}| --- | --- |",
        "| --- ".repeat(HOSTS.len() * WORKS.len())
    ));
    for way in &WAYS {
        let costs = HOSTS.map(|(host, _)| {
            let costs = WORKS.map(|(work, _, _)| {
                let name = row(way, work);
                let least = cost(data, host, &row(&WAYS[0], work));
                let cost = cost(data, host, &name);
                format!("{cost:.0} (× {:.2})", cost / least)
            });
            costs.join(" | ")
        });
        let switches = HOSTS.map(|(host, _)| data.get(host, &row(way, WORKS[0].0), SWITCHES));
        let mut switches = switches
            .map(|count| count.unwrap_or(f64::NAN).round().to_string())
            .to_vec();
        switches.dedup();
        line(format!(
            "| {} | {} | {} | {} |",
            way.title,
            costs.join(" | "),
            way.exits,
            switches.join("; ")
        ));
    }
    line(String::new());
    line(format!(
        "| an access of a program's device | {} |",
        HOSTS.map(|(_, name)| name).join(" | ")
    ));
    line("| --- | --- | --- |".to_string());
    let mut numbers = |what: &str, of: &dyn Fn(&str) -> f64| {
        let numbers = HOSTS.map(|(host, _)| format!("{:.0}", of(host)));
        line(format!("| {what} | {} |", numbers.join(" | ")));
    };
    numbers("an empty write", &|host| cost(data, host, EMPTY));
    for (notify, what) in NOTIFY.into_iter().zip(["a read", "a write"]) {
        numbers(&format!("{what} of 4 KiB, all"), &|host| {
            cost(data, host, notify)
        });
        numbers("of these the copy", &|host| copy(data, host, notify));
        numbers("above an empty write, without the copy", &|host| {
            above(data, host, notify)
        });
    }
    for (row, what) in LONGEST {
        numbers(what, &|host| cost(data, host, row));
    }
    text
}

/// The picture.
pub fn picture(data: &Data) -> Result<String> {
    let mut legend = WORKS.map(|(_, what, _)| (what, RGBColor(0, 0, 0)));
    for (entry, colour) in legend.iter_mut().zip(COLOURS) {
        entry.1 = colour;
    }
    let mut chart = Chart::new(
        "Instructions of guest and host per request of 4 KiB",
        &legend,
    );
    for (host, name) in HOSTS {
        for way in &WAYS {
            for (at, (work, _, _)) in WORKS.iter().enumerate() {
                let title = if at == 0 { way.title } else { "" };
                let cost = cost(data, host, &row(way, work));
                chart.add(name.to_string(), title.to_string(), vec![(at, cost)]);
            }
        }
    }
    chart.svg()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that are as they have to be.
    fn data() -> Data {
        let mut data = Data::default();
        for (host, _) in HOSTS {
            for (at, way) in WAYS.iter().enumerate() {
                for (work, _, depth) in WORKS {
                    let name = row(way, work);
                    data.set(
                        host,
                        &name,
                        INSTRUCTIONS,
                        [100.0, 200.0][usize::from(at > 0)],
                    );
                    data.set(host, &name, EXITS, way.exits / depth);
                    data.set(host, &name, SWITCHES, 0.0);
                }
            }
            for name in rows().filter(|name| !name.ends_with("-8") && !name.contains("idle")) {
                if data.get(host, &name, INSTRUCTIONS).is_none() {
                    data.set(host, &name, INSTRUCTIONS, 3000.0);
                    data.set(host, &name, EXITS, 0.0);
                    data.set(host, &name, SWITCHES, 0.0);
                }
            }
            for notify in NOTIFY {
                // 3500 above an empty write, and 4096 to copy.
                data.set(host, notify, INSTRUCTIONS, 3000.0 + 3500.0 + 4096.0);
                let sector = format!("{notify}{SECTOR}");
                data.set(host, &sector, INSTRUCTIONS, 3000.0 + 3500.0 + 512.0);
            }
        }
        data
    }

    #[test]
    fn bounds() {
        assert_eq!(disorder(&data()), [""; 0]);
        for (row, what, number) in [
            ("block-program-read", INSTRUCTIONS, 101.0),
            ("block-vcpu-read", INSTRUCTIONS, 99.0),
            ("block-thread-write", INSTRUCTIONS, 199.0),
            ("block-vcpu-write-8", INSTRUCTIONS, 99.0),
            ("block-program-write", EXITS, 0.1),
            ("block-process-read-idle", EXITS, 3.0),
            ("block-notify-read", INSTRUCTIONS, 10_500.0),
            ("block-notify-write-512", INSTRUCTIONS, 7013.0),
            ("block-notify-write", SWITCHES, 1.0),
            ("block-longest", INSTRUCTIONS, 1_000_001.0),
            ("rng-longest", INSTRUCTIONS, f64::NAN),
        ] {
            let mut data = data();
            data.set("arm64", row, what, number);
            assert!(!disorder(&data).is_empty(), "{row}: {what} {number}");
        }
    }

    #[test]
    fn parts() {
        let data = data();
        assert_eq!(copy(&data, "arm64", NOTIFY[0]), 4096.0);
        assert_eq!(above(&data, "arm64", NOTIFY[1]), 3500.0);
        let text = render(&data);
        let wanted = "| of these the copy | 4096 | 4096 |";
        assert!(text.lines().any(|line| line == wanted), "{text}");
        assert!(picture(&data).unwrap().contains("vhost-user, at once"));
    }
}
