// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Processes whose output is kept.

use std::fs::{self, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle, sleep};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;
use vmm_sys_util::tempdir::TempDir;

use super::STEP;
use super::text::{fields, is_like};
use crate::harness::Errno;

/// What the processes of the running test have printed, for when it fails.
static SEEN: Mutex<Vec<Arc<Log>>> = Mutex::new(Vec::new());

/// What a process has printed.
#[derive(Debug, Default)]
struct Log {
    command: String,
    lines: Mutex<Vec<Line>>,
    report: Mutex<String>,
}

/// A line of it.
#[derive(Clone, Debug)]
pub struct Line {
    /// Without what ends it on a console.
    pub text: String,
    /// When it came, in seconds since 1970.
    pub at: i64,
    /// Whether the line ended, and not only the output.
    pub ended: bool,
}

/// Forgets what was seen; what is seen from now on is shown when this is dropped in a panic.
pub fn show_if_failed() -> ShowIfFailed {
    SEEN.lock().expect("what was seen").clear();
    ShowIfFailed
}

pub struct ShowIfFailed;

impl Drop for ShowIfFailed {
    fn drop(&mut self) {
        if !thread::panicking() {
            return;
        }
        for log in SEEN.lock().expect("what was seen").iter() {
            println!("    {}", log.command);
            for line in log.lines.lock().expect("lines").iter() {
                println!("    {}", line.text);
            }
            for line in log.report.lock().expect("the report").lines() {
                println!("    {line}");
            }
        }
    }
}

/// A process whose output is kept.  Killed when dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    started: Instant,
    log: Arc<Log>,
    reader: Option<JoinHandle<()>>,
    directory: Option<TempDir>,
}

impl Running {
    /// Starts it; its report, if it has one, is "report" in that directory.
    #[track_caller]
    pub fn start(command: Command, directory: Option<TempDir>) -> Self {
        Self::start_on(Stdio::null(), command, directory)
    }

    /// The same, with input from [`Self::input`].
    #[track_caller]
    pub fn start_with_input(command: Command) -> Self {
        Self::start_on(Stdio::piped(), command, None)
    }

    #[track_caller]
    fn start_on(from: Stdio, mut command: Command, directory: Option<TempDir>) -> Self {
        let (output, input) = io::pipe().expect("a pipe");
        command
            .stdin(from)
            .stdout(input.try_clone().expect("the pipe again"))
            .stderr(input);
        let child = command
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let log = Arc::new(Log {
            command: format!("{command:?}"),
            ..Log::default()
        });
        // It has the pipe's other end open, whose last one is to be the process's.
        drop(command);
        let to = Arc::clone(&log);
        let reader = thread::spawn(move || {
            let mut output = BufReader::new(output);
            let mut bytes = Vec::new();
            while output.read_until(b'\n', &mut bytes).is_ok_and(|n| n > 0) {
                let text = String::from_utf8_lossy(&bytes).replace(['\r', '\n'], "");
                let (at, ended) = (now(), bytes.ends_with(b"\n"));
                let line = Line { text, at, ended };
                to.lines.lock().expect("lines").push(line);
                bytes.clear();
            }
        });
        let running = Running {
            child,
            started: Instant::now(),
            log,
            reader: Some(reader),
            directory,
        };
        running.show();
        running
    }

    /// Counts its output to what the running test has seen.
    pub fn show(&self) {
        show(&self.log);
    }

    /// Sends it a signal.
    #[track_caller]
    pub fn signal(&self, signal: libc::c_int) {
        // SAFETY: a system call on numbers; nobody has waited for the child, so its number is its
        // own.
        let result = unsafe { libc::kill(self.child.id() as libc::pid_t, signal) };
        assert_eq!(result, 0, "kill: {:?}", Errno::last());
    }

    /// Its PID.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Gives it a line of input.
    #[track_caller]
    pub fn input(&mut self, line: &str) {
        let input = self.child.stdin.as_mut().expect("a process with input");
        writeln!(input, "{line}").unwrap_or_else(|error| panic!("{line:?}: {error}"));
    }

    /// Ends its input.
    pub fn close_input(&mut self) {
        self.child.stdin = None;
    }

    /// What it has printed so far.
    pub fn lines(&self) -> Vec<Line> {
        self.log.lines.lock().expect("lines").clone()
    }

    /// Waits for its end, and fails unless it was killed.
    #[track_caller]
    pub fn assert_killed(&mut self) {
        let status = self.child.wait().expect("wait(2)");
        assert_eq!(status.signal(), Some(libc::SIGKILL), "what ended it");
    }

    /// How many lines are as the pattern says so far.
    pub fn count(&self, pattern: &str) -> usize {
        let lines = self.log.lines.lock().expect("lines");
        let alike = lines.iter().filter(|line| is_like(&line.text, pattern));
        alike.count()
    }

    /// Fails unless there is a line as the pattern says within two minutes.
    #[track_caller]
    pub fn sees(&self, pattern: &str) {
        self.sees_times(1, pattern, STEP);
    }

    /// Fails unless there are so many such lines within a time.
    #[track_caller]
    pub fn sees_times(&self, wanted: usize, pattern: &str, limit: Duration) {
        let start = Instant::now();
        loop {
            // Looked at before the lines: what has ended prints nothing more.
            let ended = self.reader.as_ref().is_none_or(JoinHandle::is_finished);
            let got = self.count(pattern);
            if got >= wanted {
                return;
            }
            assert!(
                !ended && start.elapsed() < limit,
                "wanted {wanted} lines like {pattern:?} within {limit:?}, got {got}{}",
                if ended { " and the end" } else { "" }
            );
            sleep(Duration::from_millis(100));
        }
    }

    /// Waits for its end, which is to come within that time of its start; else it is killed and
    /// has no status.
    pub fn finish(mut self, limit: Duration) -> Finished {
        let status = loop {
            match self.child.try_wait().expect("wait(2)") {
                Some(status) => break status.code(),
                None if self.started.elapsed() >= limit => break None,
                None => sleep(Duration::from_millis(50)),
            }
        };
        if let (Some(_), Some(reader)) = (status, self.reader.take()) {
            reader.join().expect("the thread that reads");
        }
        let report = self.directory.as_ref();
        let report = report.and_then(|directory| {
            let text = fs::read_to_string(directory.as_path().join("report")).ok()?;
            *self.log.report.lock().expect("the report") = text.clone();
            serde_json::from_str(&text).ok()
        });
        Finished {
            status,
            lines: self.log.lines.lock().expect("lines").clone(),
            report: report.unwrap_or(Value::Null),
            log: Arc::clone(&self.log),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a process has done.
#[derive(Debug)]
pub struct Finished {
    /// Its exit status; none if it had to be killed, or was.
    pub status: Option<i32>,
    /// All that it has printed.
    pub lines: Vec<Line>,
    /// Its report; null if there is none.
    pub report: Value,
    log: Arc<Log>,
}

impl Finished {
    /// Counts its output to what the running test has seen: for one that several tests look at.
    pub fn show(&self) {
        show(&self.log);
    }

    /// Fails unless it ended with status 0.
    #[track_caller]
    pub fn assert_well(&self) {
        assert_eq!(self.status, Some(0), "the status");
    }

    /// Whether a line is as the pattern says.
    pub fn has(&self, pattern: &str) -> bool {
        self.lines.iter().any(|line| is_like(&line.text, pattern))
    }

    /// Fails unless a line is so.
    #[track_caller]
    pub fn assert_has(&self, pattern: &str) {
        assert!(self.has(pattern), "wanted a line like {pattern:?}");
    }

    /// The rest of the lines that begin with those words.
    pub fn all_said<'a>(&'a self, words: &str) -> Vec<&'a str> {
        all_said(&self.lines, words)
    }

    /// The rest of the first such line.
    #[track_caller]
    pub fn said<'a>(&'a self, words: &str) -> &'a str {
        let rest = self.all_said(words);
        let first = rest.first().copied();
        first.unwrap_or_else(|| panic!("wanted a line that begins with {words:?}"))
    }

    /// The rest of the first such line as so many words.
    #[track_caller]
    pub fn fields<const N: usize>(&self, words: &str) -> [&str; N] {
        fields(self.said(words))
    }

    /// The devices of the report, by address.
    #[track_caller]
    pub fn devices(&self) -> &[Value] {
        let devices = self.report["devices"].as_array();
        devices.expect("a report with devices")
    }

    /// The device of the report that has that address.
    #[track_caller]
    pub fn device(&self, addr: u64) -> &Value {
        let device = |device: &&Value| device["addr"] == addr;
        let found = self.devices().iter().find(device);
        found.unwrap_or_else(|| panic!("wanted a device at {addr:#x} in the report"))
    }

    /// Fails unless it reports so many devices, and no exit of one to user space.
    #[track_caller]
    pub fn assert_no_exits(&self, devices: usize) {
        let exits: Vec<_> = self.devices().iter().map(|it| &it["exits"]).collect();
        assert_eq!(exits, vec![0; devices], "exits by device");
    }
}

/// The rest of the lines that begin with those words.
pub fn all_said<'a>(lines: &'a [Line], words: &str) -> Vec<&'a str> {
    let rest = |line: &'a Line| line.text.strip_prefix(words)?.strip_prefix(' ');
    lines.iter().filter_map(rest).collect()
}

fn show(log: &Arc<Log>) {
    SEEN.lock().expect("what was seen").push(Arc::clone(log));
}

/// Seconds since 1970.
fn now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.expect("a time of day").as_secs() as i64
}

/// Writes lines to a FIFO that a process reads, which has a minute to open it.
#[track_caller]
pub fn feed(fifo: &Path, lines: &str) {
    let start = Instant::now();
    let mut options = OpenOptions::new();
    options.write(true).custom_flags(libc::O_NONBLOCK);
    let mut file = loop {
        match options.open(fifo) {
            Ok(file) => break file,
            // Nobody has it open for reading.
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => assert!(
                start.elapsed() < Duration::from_secs(60),
                "nobody reads {}",
                fifo.display()
            ),
            Err(error) => panic!("{}: {error}", fifo.display()),
        }
        sleep(Duration::from_millis(50));
    };
    file.write_all(lines.as_bytes()).expect("room in the FIFO");
}

/// Makes a FIFO.
#[track_caller]
pub fn make_fifo(path: &Path) {
    let status = Command::new("mkfifo").arg(path).status();
    assert!(status.expect("mkfifo").success(), "mkfifo");
}
