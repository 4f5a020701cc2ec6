// SPDX-License-Identifier: Apache-2.0 OR MIT

//! GPIO lines, whose inputs come from a pipe or a file.  arm64's Linux has a driver for them.

use std::fs;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use kvm_bpf_selftests::vmm::{Running, STEP, Vmm, feed, make_fifo, sample};
use libtest_mimic::Trial;
use vmm_sys_util::tempdir::TempDir;

use super::{ARM64, AT, AT2, at};

pub fn all() -> Vec<Trial> {
    let mut tests = tests!(inputs_come_from_files);
    if ARM64 {
        tests.extend(tests!(
            guest_has_gpio_lines,
            guest_takes_levels_of_gpio_lines
        ));
    }
    tests
}

/// How long a guest has for all of its inputs.
const LIMIT: Duration = Duration::from_secs(400);

/// A guest with such lines, and the pipe for them.
struct Lines {
    vmm: Running,
    directory: TempDir,
}

impl Lines {
    fn new(option: &str, append: &str) -> Self {
        let directory = TempDir::new().expect("a directory");
        let pipe = directory.as_path().join("lines");
        make_fifo(&pipe);
        let device = at(&sample("pl061"), 0x903_0000);
        let vmm = Vmm::new()
            .bpf(format!("{device}{option},input={}", pipe.display()))
            .append(append)
            .start();
        Lines { vmm, directory }
    }

    /// Has a line that level.
    #[track_caller]
    fn set(&self, line: u32, level: u32) {
        let pipe = self.directory.as_path().join("lines");
        feed(&pipe, &format!("{line} {level}\n"));
    }

    /// Has line 3 these levels; a guest sees each before the next.
    #[track_caller]
    fn drive(&self, levels: &[u32]) {
        for &level in levels {
            self.set(3, level);
            sleep(Duration::from_secs(1));
        }
    }

    /// Waits until so many event monitors have begun.
    #[track_caller]
    fn monitors(&self, count: usize) {
        self.vmm.sees_times(count, "Monitoring line*", STEP);
    }
}

/// Waits, for a minute at most, until the device's map has what the guest drives.  Returns the map.
#[track_caller]
fn driven(out: u32) -> String {
    let start = Instant::now();
    let wanted = format!("\"out\": {out},");
    loop {
        let output = Command::new("bpftool")
            .args(["map", "dump", "name", "pl061"])
            .output()
            .expect("bpftool");
        let map = String::from_utf8_lossy(&output.stdout).into_owned();
        if map.lines().any(|line| line.ends_with(&wanted)) {
            return map;
        }
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "wanted {wanted} in the map, got {map}"
        );
        sleep(Duration::from_millis(250));
    }
}

/// With the interrupt of the guest's own driver, which is a level, each edge of an input arrives, and
/// only those that are wanted; what the guest drives is in the device's map.
fn guest_has_gpio_lines() {
    let lines = Lines::new("", "gpio=gpiochip0");
    // Line 0 does not matter; line 3 is low at first, and then high.
    lines.set(0, 1);
    lines.monitors(1);
    lines.drive(&[1, 0, 1]);
    lines.monitors(2);
    lines.drive(&[0, 1, 0]);
    lines.monitors(3);
    lines.drive(&[1, 0, 1, 0]);
    driven(32);
    driven(0);
    let map = driven(32);
    lines.monitors(4);
    lines.set(6, 1);
    let got = lines.vmm.finish(LIMIT);
    got.assert_well();
    let events: Vec<_> = got.lines.iter().filter_map(|it| event(&it.text)).collect();
    let wanted = [
        "0",
        "3 rising",
        "3 rising",
        "1",
        "3 falling",
        "3 falling",
        "0",
        "3 rising",
        "3 falling",
        "3 rising",
        "3 falling",
        "status 0",
        "0",
        "6 rising",
    ];
    assert_eq!(events, wanted, "what the guest has seen");
    // The direction of line 5 alone is out.
    assert!(map.contains("\"dir\": 32,"), "wanted dir 32 in {map}");
    got.assert_no_exits(1);
}

/// What a line of the kernel's tools tells: a line's level at first, an edge, a status.
fn event(line: &str) -> Option<String> {
    if let Some(level) = line.strip_prefix("Initial line value: ") {
        return Some(level.to_string());
    }
    if let Some(event) = line.strip_prefix("GPIO EVENT at ") {
        let (number, rest) = event.split_once(" on line ")?.1.split_once(' ')?;
        let edge = rest.strip_suffix(" edge")?.rsplit(' ').next()?;
        return Some(format!("{number} {edge}"));
    }
    let status = line.strip_prefix("GPIO ")?;
    Some(format!("status {status}"))
}

/// A level-triggered interrupt of a line comes as long as the line is high, and not when it is low.
fn guest_takes_levels_of_gpio_lines() {
    let append = "uio_pdrv_genirq.of_id=generic-uio uio=uio0";
    let lines = Lines::new(",uio=3", append);
    lines.set(3, 1);
    lines.monitors(1);
    lines.set(3, 0);
    lines.set(6, 1);
    lines.vmm.sees("UIO quiet*");
    lines.set(3, 1);
    let got = lines.vmm.finish(LIMIT);
    got.assert_well();
    let wanted = ["wanted", "again", "quiet", "wanted"];
    assert_eq!(got.all_said("UIO"), wanted, "interrupts");
    got.assert_no_exits(1);
}

/// Each file to its end; a bad line is one.
fn inputs_come_from_files() {
    let directory = TempDir::new().expect("a directory");
    let input = |name: &str, lines: &str| {
        let path = directory.as_path().join(name);
        fs::write(&path, lines).expect("a file");
        format!(",input={}", path.display())
    };
    let device = sample("pl061");
    let got = Vmm::new()
        .bpf(at(&device, AT) + &input("good.lines", "0 1\n1 1\n3 1\n1 0"))
        .bpf(at(&device, AT2) + &input("bad.lines", "3 1\nhigh\n1 1\n"))
        .append("bank=0xd0000000 bank=0xd0001000")
        .run();
    got.assert_well();
    // Bits of the address are those of the lines.
    for access in [
        "0xd0000004 32 read 0x00000001",
        "0xd0000028 32 read 0x00000008",
        "0xd0001004 32 read 0x00000000",
        "0xd0001028 32 read 0x00000008",
    ] {
        got.assert_has(&format!("ACCESS {access}"));
    }
    let said = got.all_said("kvm-bpf-vmm: input:");
    assert_eq!(said.len(), 1, "lines about inputs");
    got.assert_has("kvm-bpf-vmm: input:*bad.lines*\"high\" is not LINE LEVEL*");
    got.assert_no_exits(2);
}
