// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The kernel's own bpftool, which the series teaches the program types, as it does the libbpf
//! in it. Ours knows neither: the library sets the types itself.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::{Path, PathBuf};
use std::process::Output;
use std::ptr::null_mut;

use kvm_bpf::Note;
use kvm_bpf_selftests::bpf::{Census, program_id};
use kvm_bpf_selftests::device::Device;
use kvm_bpf_selftests::guest::Guest;
use kvm_bpf_selftests::harness::{Errno, meanwhile, skip};
use kvm_bpf_selftests::programs::{loaded, sample_path, test_image, test_path};
use serde_json::Value;

use super::perms::fd_region;
use super::{ADDR, beside_this_program};

tests!(
    lists_the_types,
    probes_for_the_types,
    loads_by_section,
    loads_by_name_of_the_type,
    links_devices,
    profiles_programs,
);

const TYPES: [&str; 3] = ["kvm_io_read", "kvm_io_write", "kvm_io_work"];

fn run(args: &[&str]) -> Output {
    beside_this_program("bpftool")
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("bpftool {args:?}: {error}"))
}

/// What it printed, when it must work.
#[track_caller]
fn output(args: &[&str]) -> String {
    let output = run(args);
    assert!(
        output.status.success(),
        "bpftool {args:?}: wanted it to work, got {output:?}"
    );
    String::from_utf8(output.stdout).expect("text from bpftool")
}

fn lists_the_types() {
    let known = output(&["feature", "list_builtins", "prog_types"]);
    for name in TYPES {
        assert!(
            known.lines().any(|line| line == name),
            "wanted {name} among the program types, got {known}"
        );
    }
}

/// A terminal's two ends: what is written to the second can be read from the first.
fn terminal() -> [File; 2] {
    let mut fds = [-1; 2];
    let [ours, its] = &mut fds;
    // SAFETY: the kernel writes two file descriptors; the rest is optional.
    let opened = unsafe { libc::openpty(ours, its, null_mut(), null_mut(), null_mut()) };
    assert_eq!(opened, 0, "openpty: {:?}", Errno::last());
    // SAFETY: both are ours.
    fds.map(|fd| unsafe { File::from_raw_fd(fd) })
}

/// It tries to load a program of each type.
fn probes_for_the_types() {
    // It writes line by line to a terminal only.
    let [ours, its] = terminal();
    let mut probe = beside_this_program("bpftool")
        .args(["feature", "probe", "kernel"])
        .stdout(its)
        .spawn()
        .expect("bpftool");
    let lines = BufReader::new(ours).lines();
    // Every helper in every program type comes next, which takes an emulated host a minute.
    let types: Vec<_> = lines
        .map(|line| line.expect("text from bpftool"))
        .take_while(|line| !line.starts_with("eBPF map_type"))
        .filter(|line| line.starts_with("eBPF program_type"))
        .collect();
    probe.kill().expect("ending bpftool");
    probe.wait().expect("waiting for bpftool");
    for name in TYPES {
        let wanted = format!("eBPF program_type {name} is available");
        assert!(
            types.contains(&wanted),
            "wanted {wanted:?} among {types:#?}"
        );
    }
}

/// Names in the BPF file system, gone when this is dropped.
struct Pins(PathBuf);

impl Pins {
    fn new() -> Self {
        Pins("/sys/fs/bpf/kvm_bpf_test".into())
    }

    fn path(&self) -> &str {
        self.0.to_str().expect("a path of ASCII")
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        // One program's name, or a directory of them.
        if fs::remove_file(&self.0).is_ok() {
            return;
        }
        for pin in fs::read_dir(&self.0).into_iter().flatten().flatten() {
            let _ = fs::remove_file(pin.path());
        }
        let _ = fs::remove_dir(&self.0);
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path of UTF-8")
}

fn note(path: &Path) -> Note {
    let file = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    Note::from_elf(&file).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// For people and for programs it says of a pinned program what type it has.
#[track_caller]
fn assert_shows(pin: &str, kind: &str, name: &str) {
    let shown = output(&["prog", "show", "pinned", pin]);
    assert!(
        shown.contains(&format!(": {kind}  name {name} ")),
        "{pin}: wanted {kind} {name}, got {shown}"
    );
    let shown = output(&["--json", "prog", "show", "pinned", pin]);
    assert!(
        shown.contains(&format!(r#""type":"{kind}","name":"{name}","#)),
        "{pin}: wanted {kind} {name}, got {shown}"
    );
}

/// All sample devices: handlers that may sleep and such that may not, timers, kfuncs.
fn loads_by_section() {
    let [read, write, work] = TYPES;

    for device in ["regbank", "pl031", "pl061", "vcpufreq", "uart16550"] {
        let census = Census::now();
        let pins = Pins::new();
        let path = sample_path(device);
        let works = note(&path).works;
        output(&["prog", "loadall", text(&path), pins.path()]);
        let works = works.iter().map(|item| (work, item.name.as_str()));
        let all: Vec<_> = [(read, "read"), (write, "write")]
            .into_iter()
            .chain(works)
            .collect();
        for (kind, what) in &all {
            let name = format!("{device}_{what}");
            assert_shows(&format!("{}/{name}", pins.path()), kind, &name);
        }
        assert_got!(census.newer().0, all.len(), "programs of {device}");
        drop(pins);
        census.wait_for_newer(0, 0);
    }
}

/// The named type counts, not the section's.
fn loads_by_name_of_the_type() {
    let census = Census::now();
    let object = test_path("irq_object");
    let load = |pins: &Pins, kind| {
        let args = ["prog", "load", text(&object), pins.path(), "type", kind];
        let output = run(&args);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.success(), said)
    };

    let pins = Pins::new();
    let (loaded, said) = load(&pins, "kvm_io_write");
    assert!(loaded, "wanted it to load, got {said}");
    assert_shows(pins.path(), "kvm_io_write", "command");
    drop(pins);

    // It looks at what the guest writes, which a read has not.
    let pins = Pins::new();
    let (loaded, said) = load(&pins, "kvm_io_read");
    assert!(
        !loaded && said.contains("invalid bpf_context access"),
        "wanted the verifier's refusal, got {said}"
    );
    census.wait_for_newer(0, 0);
}

/// As the kernel's own rule for BPF objects does, which passes each through the linker: what comes
/// out has the note, and loads. A device may also have several files, one of which has the note.
fn links_devices() {
    let census = Census::now();
    let linked = PathBuf::from("/tmp/kvm_bpf_linked.bpf.o");
    for (device, other) in [
        ("regbank", None),
        ("pl031", None),
        // With two notes.
        ("uart16550", None),
        ("regbank", Some("no_state")),
        ("uart16550", Some("no_state")),
    ] {
        let from = sample_path(device);
        let mut args = vec!["gen", "object", text(&linked), text(&from)];
        let other = other.map(test_path);
        args.extend(other.as_deref().map(text));
        output(&args);
        assert_got!(note(&linked), note(&from), "{device}: the note");
        let pins = Pins::new();
        output(&["prog", "loadall", text(&linked), pins.path()]);
        drop(pins);
    }
    fs::remove_file(&linked).expect("the linked object");
    census.wait_for_newer(0, 0);
}

/// It attaches to a program's function, and reads the processor's counters before and after.
fn profiles_programs() {
    let of_a_processor = |name: &str| name == "cpu" || name.starts_with("armv8_");
    let events = fs::read_dir("/sys/bus/event_source/devices").expect("events of the kernel");
    let mut names = events.map(|entry| entry.expect("an event source").file_name());
    if !names.any(|name| name.to_str().is_some_and(of_a_processor)) {
        skip("the host's processor counts no cycles");
    }
    let guest = Guest::new();
    let programs = loaded(test_image("half_bank"));
    let read = programs.read_program();
    let device = Device::new(guest.vm());
    device.set_region(0, &fd_region(0, read, None));
    let mut vcpu = guest.vcpu(0);
    let id = program_id(read.expect("its program").as_raw_fd()).to_string();
    let mut count = 0_u64;
    let args = [
        "--json", "prog", "profile", "id", &id, "duration", "1", "cycles",
    ];
    let profile = meanwhile(
        [|| {
            vcpu.read(ADDR, 4);
            count += 1;
        }],
        || output(&args),
    );
    let profile: Value = serde_json::from_str(&profile).expect("JSON from bpftool");
    let number = |name: &str| profile[0][name].as_u64().expect("a number");
    assert_got!(profile[0]["metric"], "cycles");
    let ran = number("run_cnt");
    assert!(0 < ran && ran <= count, "{ran} of {count} runs");
    assert!(number("value") > ran, "cycles of {ran} runs: {profile}");
}
