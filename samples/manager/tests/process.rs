// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The manager's process: sockets that it makes, and one that it is handed.

use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use vmm_sys_util::tempdir::TempDir;

/// Ends the process with the test.
struct Manager(Child);

impl Drop for Manager {
    fn drop(&mut self) {
        self.0.kill().expect("kill(2)");
        self.0.wait().expect("wait(2)");
    }
}

/// Starts it, and waits until it listens.
fn start(mut command: Command) -> Manager {
    let mut child = command.stdout(Stdio::piped()).spawn().expect("the manager");
    let output = child.stdout.take().expect("its output");
    let manager = Manager(child);
    let mut line = String::new();
    BufReader::new(output).read_line(&mut line).expect("a line");
    assert_eq!(line, "kvm-bpf-manager: ready\n");
    manager
}

fn own_uid() -> String {
    // SAFETY: no arguments.
    unsafe { libc::geteuid() }.to_string()
}

/// What it answers to a request for a file that is not there.
fn ask(socket: &Path) -> String {
    let mut stream = UnixStream::connect(socket).expect("a connection");
    stream.write_all(b"load nothing.o\n").expect("a request");
    let mut line = String::new();
    BufReader::new(stream)
        .read_line(&mut line)
        .expect("an answer");
    line
}

#[test]
fn listens_at_a_path() {
    let dir = TempDir::new().expect("a directory");
    let socket = dir.as_path().join("socket");
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvm-bpf-manager"));
    command.arg("--files").arg(dir.as_path());
    command.arg("--socket").arg(&socket);
    command.args(["--allow", &own_uid()]);
    let _manager = start(command);
    assert!(ask(&socket).starts_with("error cannot read the file: No such file"));
}

#[test]
fn takes_the_socket_that_it_is_handed() {
    let dir = TempDir::new().expect("a directory");
    let socket = dir.as_path().join("socket");
    let listener = UnixListener::bind(&socket).expect("a socket");
    let fd = listener.as_raw_fd();
    // The shell has the number of the process that it becomes, as systemd's child has.
    let mut command = Command::new("sh");
    command.args(["-c", "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"", "sh"]);
    command.arg(env!("CARGO_BIN_EXE_kvm-bpf-manager"));
    command.arg("--files").arg(dir.as_path());
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
    let _manager = start(command);
    drop(listener);
    assert!(ask(&socket).starts_with("error cannot read the file: No such file"));
}

#[test]
fn wants_a_socket_and_a_directory() {
    let dir = TempDir::new().expect("a directory");
    let socket = dir.as_path().join("socket");
    for (files, socket, why) in [
        (dir.as_path(), None, "no --socket, and none handed over"),
        (Path::new("/dev/null"), Some(&socket), "not a directory"),
        (Path::new("/nowhere"), Some(&socket), "No such file"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvm-bpf-manager"));
        command
            .arg("--files")
            .arg(files)
            .args(["--allow", &own_uid()]);
        if let Some(socket) = socket {
            command.arg("--socket").arg(socket);
        }
        let output = command.output().expect("the manager");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(why), "wanted {why:?}, got {said:?}");
    }
}
