// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The manager's process: sockets that it makes, and one that it is handed.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use vmm_sys_util::tempdir::TempDir;

/// Ends the process with the test.
struct Manager(Child);

impl Drop for Manager {
    fn drop(&mut self) {
        // It may have ended.
        _ = self.0.kill();
        self.0.wait().expect("wait(2)");
    }
}

/// Starts it, and waits until it listens.
fn start(mut command: Command) -> Manager {
    let child = command.stdout(Stdio::piped()).spawn().expect("the manager");
    let mut manager = Manager(child);
    assert_eq!(first_line(&mut manager), "kvm-bpf-manager: ready\n");
    manager
}

/// What it prints first; nothing if it ends before.
fn first_line(manager: &mut Manager) -> String {
    let output = manager.0.stdout.take().expect("its output");
    let mut line = String::new();
    BufReader::new(output).read_line(&mut line).expect("a line");
    line
}

fn own_uid() -> String {
    // SAFETY: no arguments.
    unsafe { libc::geteuid() }.to_string()
}

/// What it answers to a request for a file that is not there.
fn ask(socket: &Path) -> String {
    let mut stream = UnixStream::connect(socket).expect("a connection");
    // Where there are too many connections it answers unasked, and closes this one.
    _ = stream.write_all(b"load nothing.o\n");
    let mut line = String::new();
    BufReader::new(stream)
        .read_line(&mut line)
        .expect("an answer");
    line
}

/// The manager, with a socket of its own.
fn listening_at(socket: &Path, files: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvm-bpf-manager"));
    command.arg("--files").arg(files);
    command.arg("--socket").arg(socket);
    command.args(["--allow", &own_uid()]);
    command
}

#[test]
fn listens_at_a_path() {
    let dir = TempDir::new().expect("a directory");
    let socket = dir.as_path().join("socket");
    let _manager = start(listening_at(&socket, dir.as_path()));
    let mode = fs::metadata(&socket).expect("the socket").mode();
    assert_eq!(mode & 0o777, 0o666, "its mode");
    assert!(ask(&socket).starts_with("error cannot read the file: No such file"));
}

/// The manager, with `fd` as its descriptor 3 and what the shell is told to have in the environment,
/// where `$$` is the manager's number.
fn handed(dir: &Path, fd: &impl AsRawFd, environment: &str) -> Command {
    let fd = fd.as_raw_fd();
    // The shell has the number of the process that it becomes, as systemd's child has.
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{environment} exec \"$@\""), "sh"]);
    command.arg(env!("CARGO_BIN_EXE_kvm-bpf-manager"));
    command.arg("--files").arg(dir);
    command.args(["--allow", &own_uid()]);
    // SAFETY: these may be called between fork(2) and execve(2). If it is 3 already, it is still to
    // stay open.
    unsafe {
        command.pre_exec(
            move || match (libc::dup2(fd, 3), libc::fcntl(3, libc::F_SETFD, 0)) {
                (3, 0) => Ok(()),
                _ => Err(io::Error::last_os_error()),
            },
        )
    };
    command
}

/// Fails unless the manager ends and says why.
#[track_caller]
fn assert_refused(mut command: Command, why: &str) {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut manager = Manager(command.spawn().expect("the manager"));
    let line = first_line(&mut manager);
    assert_eq!(line, "", "{why}: it should not begin");
    let mut said = String::new();
    let mut errors = manager.0.stderr.take().expect("its errors");
    errors.read_to_string(&mut said).expect("its errors");
    let status = manager.0.wait().expect("wait(2)");
    assert_eq!(status.code(), Some(1), "{why}: {said}");
    assert!(said.contains(why), "wanted {why:?}, got {said:?}");
}

#[test]
fn takes_the_socket_that_it_is_handed() {
    let dir = TempDir::new().expect("a directory");
    for (index, environment) in [
        "LISTEN_PID=$$ LISTEN_FDS=1",
        // Of more it takes the first.
        "LISTEN_PID=$$ LISTEN_FDS=2",
        "LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=a.socket",
    ]
    .into_iter()
    .enumerate()
    {
        let socket = dir.as_path().join(format!("socket{index}"));
        let listener = UnixListener::bind(&socket).expect("a socket");
        let _manager = start(handed(dir.as_path(), &listener, environment));
        drop(listener);
        let answer = ask(&socket);
        assert!(
            answer.starts_with("error cannot read the file: No such file"),
            "{environment}: {answer}"
        );
    }
}

/// As sd_listen_fds(3) has it: another process's are not taken, whatever is at the number.
#[test]
fn takes_no_socket_that_is_anothers() {
    let dir = TempDir::new().expect("a directory");
    let listener = UnixListener::bind(dir.as_path().join("socket")).expect("a socket");
    for environment in [
        "LISTEN_PID=1 LISTEN_FDS=1",
        "LISTEN_PID=$(($$ + 1)) LISTEN_FDS=1",
        "LISTEN_PID=-1 LISTEN_FDS=1",
        "LISTEN_PID=x$$ LISTEN_FDS=1",
        "LISTEN_PID= LISTEN_FDS=1",
        "LISTEN_FDS=1",
        "LISTEN_PID=$$",
        "LISTEN_PID=$$ LISTEN_FDS=0",
        "LISTEN_PID=$$ LISTEN_FDS=-1",
        "LISTEN_PID=$$ LISTEN_FDS=one",
        "LISTEN_PID=$$ LISTEN_FDS=",
        "",
    ] {
        let command = handed(dir.as_path(), &listener, environment);
        assert_refused(command, "no --socket, and none handed over");
    }
}

#[test]
fn takes_nothing_but_a_listening_socket() {
    let dir = TempDir::new().expect("a directory");
    let path = dir.as_path();
    let (stream, _peer) = UnixStream::pair().expect("socketpair(2)");
    let datagrams = UnixDatagram::bind(path.join("datagrams")).expect("a socket");
    let internet = TcpListener::bind("127.0.0.1:0").expect("a socket");
    let file = File::open("/dev/null").expect("/dev/null");
    let environment = "LISTEN_PID=$$ LISTEN_FDS=1";
    assert_refused(handed(path, &file, environment), "fd 3 is not a socket");
    let not_one = "fd 3 is not a valid unix stream socket";
    assert_refused(handed(path, &datagrams, environment), not_one);
    assert_refused(handed(path, &internet, environment), not_one);
    let connected = "the socket that was handed over does not listen";
    assert_refused(handed(path, &stream, environment), connected);
    let closed = format!("exec 3<&-; {environment}");
    assert_refused(handed(path, &file, &closed), "fd 3 is not a socket");
}

/// A socket that a killed manager has left is taken over; one that is in use is not, nor another file.
#[test]
fn takes_over_a_socket_that_nobody_has() {
    let dir = TempDir::new().expect("a directory");
    let (socket, file) = (dir.as_path().join("socket"), dir.as_path().join("file"));
    drop(start(listening_at(&socket, dir.as_path())));
    assert!(socket.exists(), "a killed manager leaves its socket");
    let _manager = start(listening_at(&socket, dir.as_path()));
    fs::write(&file, "mine").expect("a file");
    for path in [&socket, &file] {
        let why = format!("{}: Address already in use", path.display());
        assert_refused(listening_at(path, dir.as_path()), &why);
    }
    assert!(ask(&socket).starts_with("error cannot read the file"));
    assert_eq!(fs::read_to_string(&file).expect("the file"), "mine");
}

#[test]
fn wants_a_socket_and_a_directory() {
    let dir = TempDir::new().expect("a directory");
    let socket = dir.as_path().join("socket");
    for (files, socket, why) in [
        (dir.as_path(), None, "no --socket, and none handed over"),
        (
            Path::new("/dev/null"),
            Some(&socket),
            "/dev/null: not a directory",
        ),
        (
            Path::new("/nowhere"),
            Some(&socket),
            "/nowhere: No such file",
        ),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvm-bpf-manager"));
        command
            .arg("--files")
            .arg(files)
            .args(["--allow", &own_uid()]);
        if let Some(socket) = socket {
            command.arg("--socket").arg(socket);
        }
        assert_refused(command, why);
    }
}

#[test]
fn serves_so_many_at_a_time() {
    let dir = TempDir::new().expect("a directory");
    let socket = dir.as_path().join("socket");
    let _manager = start(listening_at(&socket, dir.as_path()));
    let connect = || UnixStream::connect(&socket).expect("a connection");
    let mut served: Vec<_> = (0..64).map(|_| connect()).collect();
    let one_more = connect();
    let limit = Some(Duration::from_secs(60));
    one_more.set_read_timeout(limit).expect("a time limit");
    let mut line = String::new();
    BufReader::new(one_more)
        .read_line(&mut line)
        .expect("an answer");
    assert_eq!(line, "error 64 connections are there\n");
    // One that ends makes room.
    served.pop();
    let end = Instant::now() + Duration::from_secs(60);
    while !ask(&socket).starts_with("error cannot read the file") {
        assert!(Instant::now() < end, "wanted room for another connection");
        thread::sleep(Duration::from_millis(10));
    }
}
