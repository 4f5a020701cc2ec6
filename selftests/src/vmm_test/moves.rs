// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A Linux guest goes on elsewhere, in the middle of what it does, with its devices of programs: a
//! register bank, a clock whose alarm is still to come and a virtual cpufreq device.
//!
//! For the last two x86-64's Linux has no drivers; a process of the guest accesses their registers
//! there.  What the guest does is `goes-on` in `selftests/src/guest_init`.

use std::fs;
use std::io::Read;
use std::mem;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

use kvm_bpf_selftests::harness::{Errno, in_a_thread, stay_on};
use kvm_bpf_selftests::vmm::{
    Finished, GUEST, Line, Running, Vmm, all_said, assert_between, feed, fields, is_like,
    make_fifo, number, program, sample, trial,
};
use libtest_mimic::Trial;
use vmm_sys_util::tempdir::TempDir;

use super::{ARM64, AT, AT2, BROUGHT, at};

/// From one VMM to another on this host.
pub fn here() -> Vec<Trial> {
    let mut tests = tests!("move": saves_when_it_can, goes_on_from_a_file);
    tests.extend(refusals());
    tests.extend(tests!("move":
        goes_on_in_another_process,
        level_goes_along,
        disk_and_random_numbers_go_along,
        requests_outlive_a_reset,
    ));
    tests
}

/// From this host to another one, whose time of day may be any.
pub fn save() -> Vec<Trial> {
    tests!("move": saves_for_another_host)
}

/// And on that one.
pub fn restore() -> Vec<Trial> {
    tests!("move": goes_on_on_another_host)
}

const CLOCK: u64 = 0xd001_0000;
const FREQUENCY: u64 = 0xd002_0000;
const COUNTS: u64 = 0xd000_2000;
const CPUS: &str = if ARM64 { "2" } else { "1" };

/// How long a VMM may take for all that it does.
const LIMIT: Duration = Duration::from_secs(600);

/// The machine of most guests; without a guest if it gets one from elsewhere.
fn machine(vmm: Vmm) -> Vmm {
    vmm.args(["--cpus", CPUS, "--memory", "128"])
        .bpf(at(&sample("regbank"), AT))
        .bpf(at(&sample("pl031"), CLOCK))
        .bpf(at(&sample("vcpufreq"), FREQUENCY))
}

/// With a guest that sets its alarm so many seconds ahead.
fn boot(alarm: u32) -> Vmm {
    // The last frequency is a quarter of the highest.
    let append = if ARM64 {
        format!("cpufreq=cpu0 goes-on={AT:#x},rtc0,{alarm}")
    } else {
        format!("perf={FREQUENCY:#x},500000 goes-on={AT:#x},{CLOCK:#x},{alarm}")
    };
    machine(Vmm::new())
        .append(&append)
        .args(["--perf-table", "500000,1000000,1500000,2000000"])
}

/// A VMM that goes on with what is in a file.
fn restoring(file: &Path) -> Vmm {
    Vmm::without_guest().args(["--restore".as_ref(), file.as_os_str()])
}

/// One that takes over what another process has.
fn taking_over(socket: &Path) -> Vmm {
    Vmm::without_guest().args(["--take-over".as_ref(), socket.as_os_str()])
}

/// Where a guest goes, if it is wanted or told to.
trait To {
    fn saving_to(self, file: &Path) -> Self;
    fn handing_over(self, socket: &Path) -> Self;
}

impl To for Vmm {
    fn saving_to(self, file: &Path) -> Self {
        self.args(["--save".as_ref(), file.as_os_str()])
    }

    fn handing_over(self, socket: &Path) -> Self {
        self.args(["--hand-over".as_ref(), socket.as_os_str()])
    }
}

/// Fails unless there is such a line while a guest does something.
#[track_caller]
fn sees(vmm: &Running, pattern: &str) {
    vmm.sees_times(1, pattern, GUEST);
}

/// Fails unless a condition holds within the same time.
#[track_caller]
fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < GUEST, "not within {GUEST:?}: {what}");
        sleep(Duration::from_millis(100));
    }
}

/// What a guest has printed in its VMMs, one after the other.  A message of a VMM may be in the
/// middle of a line, and a move.
fn console<'a>(lines: impl IntoIterator<Item = &'a Line>) -> Vec<Line> {
    let mut console = Vec::new();
    let mut begun = String::new();
    for line in lines {
        let (text, ended) = match line.text.split_once("kvm-bpf-vmm: ") {
            Some((text, _)) => (text, false),
            None => (&*line.text, line.ended),
        };
        begun += text;
        if ended {
            let text = mem::take(&mut begun);
            console.push(Line {
                text,
                ..line.clone()
            });
        }
    }
    console
}

/// The rest of the last line that begins with those words.
#[track_caller]
fn said<'a>(console: &'a [Line], words: &str) -> &'a str {
    let last = all_said(console, words).pop();
    last.unwrap_or_else(|| panic!("wanted a line that begins with {words:?}"))
}

/// The last number that a guest has printed behind a word; 0 if none.
fn last_number(vmm: &Running, word: &str) -> i64 {
    let console = console(&vmm.lines());
    let last = all_said(&console, word).pop();
    last.and_then(|it| it.parse().ok()).unwrap_or(0)
}

/// Fails unless a guest that should have moved goes on where it is, and the VMM says why.
#[track_caller]
fn goes_on_here(vmm: &Running, why: &str) {
    sees(vmm, &format!("*the guest goes on here: *{why}*"));
    let round = last_number(vmm, "ROUND");
    wait_until("the next round", || last_number(vmm, "ROUND") > round);
}

/// Waits for the end of a VMM, which is to be so.
#[track_caller]
fn ends(vmm: Running, how: &str) -> Finished {
    let got = vmm.finish(LIMIT);
    got.assert_well();
    assert_eq!(got.report["end"], how, "the guest's end");
    got
}

/// Fails unless the guest of these VMMs, one after the other, has had all its rounds and accesses,
/// and its alarm in time.
#[track_caller]
fn assert_went_on(vmms: &[&Finished]) {
    let console = console(vmms.iter().flat_map(|vmm| &vmm.lines));
    let last = vmms.last().expect("a VMM");
    last.assert_no_exits(3);

    let [rounds, wrong, accesses] = fields(said(&console, "GOES-ON")).map(number);
    let seen: Vec<_> = all_said(&console, "ROUND")
        .into_iter()
        .map(number)
        .collect();
    // Those before are on another host.
    let first = *seen.first().expect("a round");
    assert_eq!(seen, (first..=rounds).collect::<Vec<_>>(), "rounds");
    assert_between("rounds", 20, rounds, 1000);
    // With the last of its own.
    assert_eq!([wrong, accesses], [0, 2 * rounds + 1], "wrong, accesses");

    // The interrupt comes at the second, once, or when the guest goes on if that is later; the guest
    // looks four times a second.
    let [target, fired, interrupts] = fields(said(&console, "RTC alarm")).map(number);
    let here = console.iter().find(|line| line.text.starts_with("ROUND "));
    let due = target.max(here.expect("a round").at);
    assert_between("the alarm", target, fired, due + 3);
    assert_eq!(interrupts, 1, "interrupts of the alarm");

    let clock = |line: &Line| Some((number(line.text.strip_prefix("RTC since_epoch ")?), line.at));
    let (time, host) = console
        .iter()
        .filter_map(clock)
        .next_back()
        .expect("the time");
    assert_between("the guest's clock", host - 2, time, host + 2);

    let vcpu = &last.report["vcpus"][0];
    let clamps = ["id", "uclamp_min", "uclamp_max"].map(|name| vcpu[name].as_i64());
    assert_eq!(clamps, [0, 256, 256].map(Some), "the first vCPU's clamps");
}

/// A guest in a file.
struct Saved {
    first: Finished,
    directory: TempDir,
    /// For how many seconds its host was up.
    uptime: u64,
}

impl Saved {
    /// The guest goes on when there is nowhere to save it to, and is saved when there is.
    #[track_caller]
    fn new(alarm: u32, least_uptime: u64) -> Self {
        let directory = TempDir::new().expect("a directory");
        let saved = directory.as_path().join("saved");
        let first = boot(alarm).saving_to(&saved.join("guest")).start();
        wait_until("the uptime", || uptime() >= least_uptime);
        sees(&first, "ROUND 2");
        first.signal(libc::SIGUSR2);
        goes_on_here(&first, ": No such file");
        fs::create_dir(&saved).expect("a directory");
        let uptime = uptime();
        first.signal(libc::SIGUSR2);
        let first = ends(first, "saved");
        let entries = fs::read_dir(&saved).expect("the directory");
        let names: Vec<_> = entries.map(|it| it.expect("a file").file_name()).collect();
        assert_eq!(names, ["guest"], "files");
        Saved {
            first,
            directory,
            uptime,
        }
    }

    fn file(&self) -> PathBuf {
        self.directory.as_path().join("saved/guest")
    }
}

/// For how many seconds this host is up.
fn uptime() -> u64 {
    let text = fs::read_to_string("/proc/uptime").expect("the uptime");
    let (seconds, _) = text.split_once('.').expect("seconds");
    seconds.parse().expect("a number")
}

/// For the tests here; the first of them has it made.
static SAVED: LazyLock<Saved> = LazyLock::new(|| Saved::new(40, 0));

fn saves_when_it_can() {
    LazyLock::force(&SAVED);
}

fn goes_on_from_a_file() {
    SAVED.first.show();
    let second = ends(machine(restoring(&SAVED.file())).start(), "reset");
    assert_went_on(&[&SAVED.first, &second]);
}

/// A machine of that size, without devices, for the guest that is saved.
fn other(cpus: &str, memory: &str) -> Vmm {
    restoring(&SAVED.file()).args(["--cpus", cpus, "--memory", memory])
}

/// What is no such file, or of another machine.
fn refusals() -> Vec<Trial> {
    macro_rules! refused {
        ($name:literal, $words:expr, $vmm:expr) => {
            trial(concat!("move::refuses_", $name), || {
                $vmm.refuses(Some(1), &$words);
            })
        };
    }
    vec![
        refused!(
            "no_file",
            ["/nothing", "No such file"],
            restoring("/nothing".as_ref())
        ),
        refused!(
            "a_directory",
            ["/progs", "a directory"],
            restoring("/progs".as_ref())
        ),
        refused!(
            "another_file",
            ["/init", "no saved VM"],
            restoring("/init".as_ref())
        ),
        refused!(
            "an_empty_file",
            ["short", "no saved VM"],
            Short::new(0, None).restoring()
        ),
        refused!("another_memory", ["has 128 MiB", "256"], other(CPUS, "256")),
        refused!(
            "other_cpus",
            [
                "cannot go on with it: the saved VM has",
                "CPUs, and this one 3 CPUs"
            ],
            other("3", "128")
        ),
        refused!(
            "no_devices",
            ["devices of programs", "0 devices"],
            other(CPUS, "128")
        ),
        refused!(
            "another_place",
            ["regbank", "0xd0001000", "0xd0000000"],
            other(CPUS, "128").bpf(at(&sample("regbank"), AT2))
        ),
        refused!(
            "another_device",
            ["carry", "regbank"],
            other(CPUS, "128").bpf(at(&program("carry"), AT))
        ),
        refused!(
            "userspace_devices",
            ["regbank", "cannot be saved"],
            Vmm::new()
                .saving_to(&SAVED.file())
                .args(["--userspace", &at("regbank", AT)])
        ),
        // The description's end is missing, then memory's.
        refused!(
            "half_a_description",
            ["short"],
            Short::new(1000, None).restoring()
        ),
        refused!(
            "half_a_memory",
            ["short", "bytes of memory"],
            machine(Short::new(4 << 20, None).restoring())
        ),
        // Of 2^56 bytes.
        refused!(
            "an_endless_description",
            ["short", "is the most"],
            Short::new(4096, Some((23, 1))).restoring()
        ),
        refused!(
            "a_later_version",
            ["short", "version 255"],
            Short::new(4096, Some((8, 255))).restoring()
        ),
    ]
}

/// The first bytes of a saved guest, one of them changed; as long as the host is up.
struct Short(PathBuf);

impl Short {
    fn new(len: u64, change: Option<(usize, u8)>) -> Self {
        let file = fs::File::open(SAVED.file()).expect("the saved guest");
        let mut bytes = Vec::new();
        file.take(len).read_to_end(&mut bytes).expect("its bytes");
        if let Some((at, byte)) = change {
            bytes[at] = byte;
        }
        let path = SAVED.directory.as_path().join("short");
        fs::write(&path, bytes).expect("room");
        Short(path)
    }

    fn restoring(&self) -> Vmm {
        restoring(&self.0)
    }
}

/// The guest goes on where it is when another machine wants it, then in the one that can; and from
/// there in one more.
fn goes_on_in_another_process() {
    let directory = TempDir::new().expect("a directory");
    let [socket, next] = ["socket", "next"].map(|name| directory.as_path().join(name));
    let first = boot(40).handing_over(&socket).start();
    sees(&first, "ROUND 2");
    taking_over(&socket)
        .args(["--cpus", "3", "--memory", "128"])
        .refuses(Some(1), &["socket", "CPUs", "3"]);
    goes_on_here(&first, "");
    let second = machine(taking_over(&socket)).handing_over(&next).start();
    let first = ends(first, "handed over");
    assert!(!socket.exists(), "its socket is there");
    sees(&second, "ROUND *");
    let third = machine(taking_over(&next)).start();
    let second = ends(second, "handed over");
    let third = ends(third, "reset");
    assert_went_on(&[&first, &second, &third]);
}

/// A level-triggered interrupt that a device wants all the time, wherever the guest is, and one that
/// it wants while the guest cannot take it: none is lost, and none comes twice.
fn level_goes_along() {
    let directory = TempDir::new().expect("a directory");
    let [socket, file] = ["socket", "guest"].map(|name| directory.as_path().join(name));
    let machine = |vmm: Vmm| {
        vmm.args(["--memory", "128"])
            .bpf(at(&program("virtio_level"), AT))
    };
    let append = format!("level={AT:#x}");
    let first = machine(Vmm::new()).append(&append).handing_over(&socket);
    let first = first.start();
    wait_until("an interrupt", || last_number(&first, "LEVEL") > 0);
    let second = machine(taking_over(&socket)).saving_to(&file).start();
    let first = ends(first, "handed over");
    sees(&second, "MOVED 1");
    second.signal(libc::SIGUSR2);
    let second = ends(second, "saved");
    let third = machine(restoring(&file)).handing_over(&socket).start();
    sees(&third, "HELD");
    sees(&third, "MOVED 2*");
    let fourth = machine(taking_over(&socket)).start();
    let third = ends(third, "handed over");
    let fourth = ends(fourth, "reset");

    let console = console(
        [&first, &second, &third, &fourth]
            .map(|it| &it.lines)
            .into_iter()
            .flatten(),
    );
    let [more, acks, interrupts] = fields(said(&console, "LEVELS"));
    assert_eq!(more, "1", "acknowledged since it was held");
    let acks = number(acks);
    assert_between("acknowledged", 40, acks, 10_000_000);
    let (_, interrupts) = interrupts.split_once(':').expect("a line and a count");
    // SVM's emulation may deliver one twice (Documentation/emulation.md).
    let most = if ARM64 { acks } else { 2 * acks };
    assert_between("interrupts", acks, number(interrupts), most);
}

/// A guest with a disk and random numbers of programs that access its memory, all the time with 64
/// requests in flight.  First others cannot take it: they have the disk's state already when they
/// find that another device's does not fit.  Then it goes on in processes and from files, one of
/// them with requests that the disk has not looked at.  No request is lost or done twice.
fn disk_and_random_numbers_go_along() {
    // There are always such requests if the disk's thread comes after the guest, on one CPU.
    in_a_thread(|| {
        stay_on(0);
        moves_with_requests();
    });
}

fn moves_with_requests() {
    const MOVES: usize = 3;

    let directory = TempDir::new().expect("a directory");
    let [socket, file] = ["socket", "guest"].map(|name| directory.as_path().join(name));
    let machine = |vmm: Vmm, counting| {
        vmm.args(["--memory", "128"])
            .bpf(at(&sample("virtio_blk"), AT))
            .bpf(at(&sample("virtio_rng"), AT2))
            .bpf(at(&program(counting), COUNTS))
    };
    let append = format!("io-moves=vda,{COUNTS:#x},{}", 2 + 2 * MOVES);
    let mut guest = machine(Vmm::new(), "convert")
        .append(&append)
        .handing_over(&socket)
        .start();
    sees(&guest, "IO-MOVES");
    run_behind(&guest);
    // The whole disk is written at first.
    sleep(Duration::from_secs(5));
    for _ in 0..2 {
        let other = machine(taking_over(&socket), "convert_less");
        other.refuses(Some(1), &["convert_less", "no such field"]);
        sleep(Duration::from_secs(1));
    }
    let stayed = guest.count("*the guest goes on here: *");
    assert_eq!(stayed, 2, "how often it went on where it was");

    let mut lines = Vec::new();
    let mut pending = 0;
    for _ in 0..MOVES {
        let next = machine(taking_over(&socket), "convert").saving_to(&file);
        let next = next.start();
        lines.extend(ends(guest, "handed over").lines);
        run_behind(&next);
        sleep(Duration::from_secs(2));
        next.signal(libc::SIGUSR2);
        lines.extend(ends(next, "saved").lines);
        pending += i64::from(has_pending_requests(&file));
        guest = machine(restoring(&file), "convert")
            .handing_over(&socket)
            .start();
        wait_until("a socket", || socket.exists());
        sleep(Duration::from_secs(2));
    }
    let last = ends(guest, "reset");
    last.assert_no_exits(3);
    lines.extend(last.lines);

    let console = console(&lines);
    let [requests, reads, writes, deepest, wrong] = fields(said(&console, "IO vda")).map(number);
    let [random, short, zeroes] = fields(said(&console, "RANDOM")).map(number);
    println!(
        "\n{requests} requests of a disk, pending in {pending} files, and {random} of random numbers"
    );
    assert_between("files with requests", 1, pending, MOVES as i64);
    assert_eq!([wrong, deepest], [0, 64], "wrong, deepest");
    assert_between("requests", 200, requests, 100_000_000);
    assert_between("reads", 50, reads, requests);
    assert_between("writes", 50, writes, requests);
    assert_between("random numbers", 10, random, 100_000_000);
    assert_eq!([short, zeroes], [0, 0], "short, zeroes");
}

/// The threads of a VMM's devices have a CPU only when its guest does not want it.
#[track_caller]
fn run_behind(vmm: &Running) {
    let mut threads = 0;
    for task in fs::read_dir(format!("/proc/{}/task", vmm.id())).expect("threads") {
        let task = task.expect("a thread").path();
        if fs::read_to_string(task.join("comm")).is_ok_and(|name| name == "kvm-bpf\n") {
            let id = task
                .file_name()
                .and_then(|name| name.to_str()?.parse().ok());
            // SAFETY: a system call on numbers.
            let result =
                unsafe { libc::setpriority(libc::PRIO_PROCESS, id.expect("a number"), 19) };
            assert_eq!(result, 0, "setpriority: {:?}", Errno::last());
            threads += 1;
        }
    }
    assert!(threads > 0, "no thread of a device");
}

/// Whether a saved guest's disk has such, in the state of its queue, which is before guest memory.
fn has_pending_requests(file: &Path) -> bool {
    let file = fs::File::open(file).expect("the saved guest");
    let mut bytes = Vec::new();
    let mut state = file.take(20_000_000);
    state.read_to_end(&mut bytes).expect("its state");
    let wanted = br#""pending":1"#;
    bytes.windows(wanted.len()).any(|it| it == wanted)
}

/// Requests that come as the guest resets are for the guest that starts again: to save it where that
/// fails, then to hand it over.  Its device, which cannot be reset, has what it had.
fn requests_outlive_a_reset() {
    let directory = TempDir::new().expect("a directory");
    let [socket, lines] = ["socket", "lines"].map(|name| directory.as_path().join(name));
    make_fifo(&lines);
    let busy = program("busy");
    let machine = |vmm: Vmm| {
        vmm.args(["--memory", "128"])
            .bpf(format!("{},input={}", at(&busy, AT), lines.display()))
    };
    let first = machine(Vmm::new())
        .append(&format!("busy={AT:#x}"))
        .args(["--reboot"])
        .saving_to(&directory.as_path().join("nowhere/guest"))
        .handing_over(&socket)
        .start();
    let busy_at = |boot: usize| {
        sees(&first, &format!("BOOT {boot}"));
        feed(&lines, "0 1\n");
        sees(&first, &format!("BUSY {boot}"));
    };
    let restarts = || first.count("*starts again*");
    busy_at(1);
    first.signal(libc::SIGUSR2);
    assert_eq!(restarts(), 0, "restarts");
    busy_at(2);
    let second = machine(taking_over(&socket)).start();
    assert_eq!(restarts(), 1, "restarts");
    sees(&first, "*the guest goes on here: *: No such file*");
    let kept = format!("*starts again; not reset: {busy}");
    let first = ends(first, "handed over");
    let second = ends(second, "reset");
    let restarts = first.lines.iter().filter(|it| is_like(&it.text, &kept));
    assert_eq!(restarts.count(), 2, "restarts that say what is not reset");
    assert_eq!(first.report["reboots"], 2, "reboots in the report");
    let console = console(&second.lines);
    assert_eq!(said(&console, "BOOT"), "3", "the boot of the other process");
}

fn saves_for_another_host() {
    // The second host has to be up for less time, also where booting takes no time.
    let saved = Saved::new(600, 20);
    println!("\nUPTIME {}", saved.uptime);
    let out = std::env::var_os("KVM_BPF_OUT").expect("KVM_BPF_OUT");
    fs::write(out, fs::read(saved.file()).expect("the saved guest")).expect("KVM_BPF_OUT");
}

fn goes_on_on_another_host() {
    let second = machine(restoring(BROUGHT.as_ref())).start();
    sees(&second, "ROUND *");
    println!("\nUPTIME {}", uptime());
    assert_went_on(&[&ends(second, "reset")]);
}
