// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The VMM without privileges (`samples/jailed`) with the manager that loads for it
//! (`samples/manager`): no capability, bpf(2) forbidden, every phase under its own filter.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use kvm_bpf_selftests::harness::{CAP_BPF, wait_for};
use kvm_bpf_selftests::vmm::{
    Finished, Running, feed, fields, is_like, make_fifo, number, program, sample,
};
use libtest_mimic::Trial;
use vmm_sys_util::tempdir::TempDir;

pub fn all() -> Vec<Trial> {
    tests!("jail":
        manager_starts,
        manager_has_cap_bpf_alone,
        vmm_is_without_libbpf,
        served_under_the_filters,
        no_capability,
        swapped_under_load,
        manager_refuses_bad_names,
        manager_refuses_links,
        manager_refuses_other_devices,
        permissions_are_gone,
        saved_and_restored,
        goes_on_where_it_is_not_saved_and_restored,
        alarm_rings_without_the_manager,
        bpf_is_forbidden,
        no_vm_without_the_seal,
        manager_with_a_token_has_no_right_on_the_host,
        served_by_a_manager_with_a_token,
        nothing_is_loaded_without_a_token,
        manager_tells_users_apart,
        manager_refuses_other_users,
    )
}

const MANAGER: &str = "/bin/kvm-bpf-manager";
const JAILED: &str = "/bin/kvm-bpf-jailed-vmm";
/// The user that the VMM becomes.
const NOBODY: u32 = 65534;
/// And the manager.
const USER: u32 = 65533;
const CLOCK: &str = "pl031.bpf.o";
/// What goes on with new programs of the same clock.
const KEPT: &str = "carried over: alarm_irqs, alarms, clock, locks, pl031";
/// How long a process may take for all that a test asks of it.
const LIMIT: Duration = Duration::from_secs(600);

/// Object files, and a socket that users other than root reach.
struct Files(TempDir);

impl Files {
    fn new() -> Self {
        let files = Files(TempDir::new().expect("a directory"));
        let mode = Permissions::from_mode(0o711);
        fs::set_permissions(files.0.as_path(), mode).expect("chmod(2)");
        let objects = files.objects();
        fs::create_dir(&objects).expect("a directory");
        let programs = ["pl031_sleepable", "pl031_memory", "refused"].map(program);
        let samples = ["pl031", "regbank"].map(sample);
        for from in programs.iter().chain(&samples) {
            let name = Path::new(from).file_name().expect("a name");
            fs::copy(from, objects.join(name)).unwrap_or_else(|error| panic!("{from}: {error}"));
        }
        files
    }

    fn objects(&self) -> PathBuf {
        self.0.as_path().join("files")
    }

    fn socket(&self) -> PathBuf {
        self.0.as_path().join("socket")
    }

    /// A manager that serves that user.
    fn manager(&self, allowed: u32) -> Command {
        let mut command = Command::new(MANAGER);
        command.arg("--files").arg(self.objects());
        command.arg("--socket").arg(self.socket());
        command.args(["--allow", &allowed.to_string()]);
        command
    }

    /// Starts one, which becomes another user.
    #[track_caller]
    fn start_manager(&self, allowed: u32, more: &[&str]) -> Running {
        let mut command = self.manager(allowed);
        command.args(["--user", &USER.to_string()]).args(more);
        let manager = Running::start(command, None);
        manager.sees("kvm-bpf-manager: ready");
        manager
    }

    /// The VMM, as a command.
    fn jailed(&self) -> Command {
        let mut command = Command::new(JAILED);
        command.arg(self.socket()).arg(CLOCK);
        command
    }
}

/// The VMM while it runs, with its manager.
struct Jailed {
    vmm: Running,
    manager: Running,
    files: Files,
}

impl Jailed {
    #[track_caller]
    fn new() -> Self {
        Self::with(&[])
    }

    /// With more options of the manager.
    #[track_caller]
    fn with(more: &[&str]) -> Self {
        let files = Files::new();
        let manager = files.start_manager(NOBODY, more);
        let vmm = Running::start_with_input(files.jailed());
        vmm.sees(&format!("running: {CLOCK}"));
        Jailed {
            vmm,
            manager,
            files,
        }
    }

    /// What the VMM says of a command.
    #[track_caller]
    fn tell(&mut self, command: &str) -> String {
        let before = self.vmm.count("*");
        self.vmm.input(command);
        self.vmm.sees_times(before + 1, "*", LIMIT);
        let line = &self.vmm.lines()[before].text;
        let name = command.split(' ').next().expect("a word");
        let rest = line.strip_prefix(name).and_then(|it| it.strip_prefix(": "));
        rest.unwrap_or_else(|| panic!("wanted what {command:?} gives, got {line:?}"))
            .to_string()
    }

    /// Fails unless it says what the pattern says.
    #[track_caller]
    fn told(&mut self, command: &str, pattern: &str) {
        let got = self.tell(command);
        assert!(
            is_like(&got, pattern),
            "{command:?}: wanted {pattern:?}, got {got:?}"
        );
    }

    /// How often the guest has read the time; no access exits, and no time goes backwards.
    #[track_caller]
    fn reads(&mut self) -> i64 {
        let got = self.tell("status");
        let [_, reads, rest @ ..] = fields::<8>(&got);
        assert_eq!(rest[..5], ["exits", "0", "backwards", "0", "interrupt"]);
        number(reads)
    }

    /// Fails unless the guest goes on with reading.
    #[track_caller]
    fn reads_more(&mut self) {
        let before = self.reads();
        sleep(Duration::from_millis(500));
        let after = self.reads();
        assert!(after > before, "reads: {before}, and {after} later");
    }

    /// Fails unless the clock's programs are replaced, and the guest reads meanwhile.
    #[track_caller]
    fn swaps(&mut self, name: &str) {
        let got = self.tell(&format!("swap {name}.bpf.o"));
        let [_, reads, _] = fields(got.split_once(": ").unwrap_or((&got, "")).0);
        assert!(number(reads) > 0, "{got:?}: wanted reads");
        assert!(got.ends_with(&format!(" reads: {KEPT}")), "{got:?}");
    }

    /// Fails unless the manager refuses those files and says why, and serves the next request.
    #[track_caller]
    fn refused(&mut self, names: &[&str], why: &str) {
        for name in names {
            self.told(
                &format!("swap {name}"),
                &format!("error: the manager refuses *{why}*"),
            );
        }
        self.swaps("pl031");
        self.reads_more();
    }

    /// Has the guest arm the alarm, and leave the clock alone.
    #[track_caller]
    fn arms(&mut self, seconds: u32) {
        self.told(&format!("alarm {seconds}"), &format!("in {seconds} s"));
        self.told("quiet", "the guest knows");
    }

    /// Fails unless the alarm has not rung, and does so later; then the guest reads again.
    #[track_caller]
    fn rings(&mut self) {
        self.told("status", "reads * exits 0 backwards 0 interrupt false");
        self.told("wait", "interrupts 1");
        self.told("busy", "the guest knows");
    }

    /// Fails unless a command makes the VMM call what its filters forbid, which ends it.
    #[track_caller]
    fn ends(mut self, command: &str, call: libc::c_long) {
        self.vmm.input(command);
        // One that goes on finds the end of its commands.
        self.vmm.close_input();
        let got = self.vmm.finish(LIMIT);
        // That is how a shell has the end by a signal.
        assert_eq!(got.status, Some(128 + libc::SIGSYS), "its status");
        let last = &got.lines.last().expect("a line").text;
        assert!(
            is_like(last, &format!("*forbidden system call *{call}")),
            "{last:?}: wanted call {call}"
        );
    }
}

/// Whether a process is in a user namespace that is not ours.
fn in_another_namespace(process: &Running) -> bool {
    let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/user")).expect("a namespace");
    of(&process.id().to_string()) != of("self")
}

/// Fails unless a process has `CAP_BPF` and no other right.
#[track_caller]
fn assert_cap_bpf_alone(process: &Running) {
    let status = fs::read_to_string(format!("/proc/{}/status", process.id())).expect("its status");
    let wanted = |name: &str| status.lines().find(|line| line.starts_with(name));
    let none = 0;
    let cap_bpf = 1_u64 << CAP_BPF;
    let sets = [
        ("CapInh", none),
        ("CapPrm", cap_bpf),
        ("CapEff", cap_bpf),
        ("CapBnd", none),
        ("CapAmb", none),
    ];
    for (name, set) in sets {
        let line = format!("{name}:\t{set:016x}");
        assert_eq!(wanted(name), Some(&*line), "in the manager's status");
    }
    let user = format!("Uid:\t{USER}\t{USER}\t{USER}\t{USER}");
    assert_eq!(wanted("Uid"), Some(&*user), "in the manager's status");
    assert_eq!(wanted("NoNewPrivs"), Some("NoNewPrivs:\t1"), "the same");
}

/// Runs a process that is to fail with status 1; returns what it has printed.
#[track_caller]
fn fails(command: Command) -> Finished {
    let got = Running::start(command, None).finish(Duration::from_secs(60));
    assert_eq!(got.status, Some(1), "the status");
    got
}

fn manager_starts() {
    Files::new().start_manager(NOBODY, &[]);
}

fn manager_has_cap_bpf_alone() {
    assert_cap_bpf_alone(&Files::new().start_manager(NOBODY, &[]));
}

/// A VMM needs no C.
fn vmm_is_without_libbpf() {
    for (file, wanted) in [(MANAGER, true), (JAILED, false)] {
        let bytes = fs::read(file).expect("a program");
        let has = bytes.windows(8).any(|it| it == b"libbpf: ");
        assert_eq!(has, wanted, "{file} has libbpf's messages");
    }
}

fn served_under_the_filters() {
    Jailed::new().reads_more();
}

fn no_capability() {
    let jailed = Jailed::new();
    let ids = [NOBODY; 4].map(|id| id.to_string()).join(" ");
    let sets = ["CapPrm", "CapEff", "CapBnd"].map(|set| format!("{set}: {:016x}", 0));
    let wanted = format!("privileges: Uid: {ids} {} NoNewPrivs: 1", sets.join(" "));
    assert_eq!(jailed.vmm.lines()[0].text, wanted);
}

/// Programs that sleep and programs that do not, in turn, while the guest reads the time.
fn swapped_under_load() {
    let mut jailed = Jailed::new();
    for _ in 0..2 {
        jailed.swaps("pl031_sleepable");
        jailed.swaps("pl031");
    }
    jailed.reads_more();
}

fn manager_refuses_bad_names() {
    let long = "0".repeat(70);
    let names = [
        "../pl031.bpf.o",
        "/devices/pl031.bpf.o",
        ".pl031",
        "pl031.bpf.o/",
        &long,
    ];
    Jailed::new().refused(&names, ": bad name: ");
}

fn manager_refuses_links() {
    let mut jailed = Jailed::new();
    let objects = jailed.files.objects();
    symlink(CLOCK, objects.join("link.bpf.o")).expect("a link");
    make_fifo(&objects.join("pipe.bpf.o"));
    let names = ["nowhere.bpf.o", "link.bpf.o", "pipe.bpf.o"];
    jailed.refused(&names, ": cannot read the file: ");
}

fn manager_refuses_other_devices() {
    Jailed::new().refused(&["refused.bpf.o", "regbank.bpf.o"], "");
}

/// What the VMM has given up stays so, whatever the manager would give it.
fn permissions_are_gone() {
    let mut jailed = Jailed::new();
    jailed.told(
        "swap pl031_memory.bpf.o",
        "error: cannot set *: Permission denied*",
    );
    jailed.told(
        "another",
        "error: cannot create the KVM device: Operation not permitted*",
    );
    jailed.swaps("pl031");
    jailed.reads_more();
}

/// The guest arms the alarm, and leaves the clock alone: it rings in the VM that goes on with it.
fn saved_and_restored() {
    let mut jailed = Jailed::new();
    jailed.arms(15);
    jailed.told(&format!("save-restore {CLOCK}"), "in a new VM");
    jailed.rings();
    jailed.reads_more();
}

/// The clock is saved, and nothing takes its state: the guest goes on, and the alarm rings.
fn goes_on_where_it_is_not_saved_and_restored() {
    let mut jailed = Jailed::new();
    jailed.arms(15);
    jailed.told("save-restore nowhere.bpf.o", "error: the manager refuses *");
    jailed.rings();
    jailed.reads_more();
    // A device that cannot load the state.
    jailed.told("save-restore regbank.bpf.o", "error: *another device*");
    jailed.reads_more();
    jailed.told(&format!("save-restore {CLOCK}"), "in a new VM");
    jailed.reads_more();
}

/// All that the clock needs is the VMM's.
fn alarm_rings_without_the_manager() {
    let mut jailed = Jailed::new();
    jailed.arms(5);
    jailed.manager.signal(libc::SIGKILL);
    jailed.manager.assert_killed();
    jailed.rings();
    jailed.told(&format!("swap {CLOCK}"), "error: *");
    jailed.reads_more();
}

fn bpf_is_forbidden() {
    Jailed::new().ends("forbidden", libc::SYS_bpf);
}

/// A new VM would have no seal.
fn no_vm_without_the_seal() {
    Jailed::new().ends("new-vm", libc::SYS_ioctl);
}

/// A capability in a user namespace is none of the host.
fn manager_with_a_token_has_no_right_on_the_host() {
    let files = Files::new();
    let manager = files.start_manager(NOBODY, &["--token"]);
    assert!(in_another_namespace(&manager), "its user namespace is ours");
    assert_cap_bpf_alone(&manager);
}

/// A token has the kernel load.
fn served_by_a_manager_with_a_token() {
    let mut jailed = Jailed::with(&["--token"]);
    jailed.reads_more();
    jailed.swaps("pl031_sleepable");
    jailed.refused(&["refused.bpf.o"], "");
    jailed.told("alarm 2", "in 2 s");
    jailed.told("wait", "interrupts 1");
    jailed.reads_more();
    jailed.vmm.input("quit");
    assert_eq!(jailed.vmm.finish(LIMIT).status, Some(0), "its status");
}

/// The same namespace without a token.
fn nothing_is_loaded_without_a_token() {
    let files = Files::new();
    let go = files.0.as_path().join("go");
    make_fifo(&go);
    // Between the namespace and the manager there is a line to wait for.
    let mut command = Command::new("unshare");
    command.args(["-U", "sh", "-c", "read -r _ <\"$1\"; shift; exec \"$@\""]);
    command.arg("sh").arg(&go).arg(MANAGER);
    command.args(files.manager(NOBODY).get_args());
    command.args(["--user", &USER.to_string()]);
    let manager = Running::start(command, None);
    wait_for("a namespace of its own", true, || {
        in_another_namespace(&manager)
    });
    for map in ["uid_map", "gid_map"] {
        let file = format!("/proc/{}/{map}", manager.id());
        fs::write(file, "0 0 4294967295\n").expect("the map of a namespace");
    }
    feed(&go, "\n");
    manager.sees("kvm-bpf-manager: ready");
    assert_cap_bpf_alone(&manager);
    fails(files.jailed()).assert_has("*the manager refuses *Operation not permitted*");
}

/// Where users of the host have no number, all of them look like the last one.
fn manager_tells_users_apart() {
    let files = Files::new();
    let manager = files.manager(NOBODY);
    let mut command = Command::new("unshare");
    command.args(["-U", "-r", MANAGER]).args(manager.get_args());
    fails(command).assert_has(&format!("*cannot allow user {NOBODY}, who stands for all*"));
}

fn manager_refuses_other_users() {
    let files = Files::new();
    let _manager = files.start_manager(1234, &[]);
    fails(files.jailed()).assert_has(&format!("*user {NOBODY} may not ask for programs*"));
}
