// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The manager's process: what it listens at, and what it may do.

use std::error::Error;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{self, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::{env, fs, thread};

use caps::{CapSet, Capability, CapsHashSet};
use clap::Parser;
use kvm_bpf_manager::Files;
use listenfd::ListenFd;

mod token;

/// The most VMMs that are served at the same time.
const MAX_CONNECTIONS: u32 = 64;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Loads devices made of eBPF programs, for VMMs that have no right to.
///
/// It gives up all rights but CAP_BPF. Without that, a BPF token does: of --token, or of the bpf
/// file system that LIBBPF_BPF_TOKEN_PATH names.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// The directory of the object files; links in it are not followed
    #[arg(long, value_name = "DIRECTORY")]
    files: PathBuf,
    /// Where to listen; by default the socket that was handed over (LISTEN_FDS)
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// A user who may ask for programs, by number; others are refused
    #[arg(long = "allow", value_name = "UID", required = true)]
    allowed: Vec<libc::uid_t>,
    /// The user to become, by number
    #[arg(long, value_name = "UID")]
    user: Option<libc::uid_t>,
    /// Load with a BPF token, in a user namespace of its own, where the process has CAP_BPF, and no
    /// capability on the host; it has to start with all that root has
    #[arg(long, requires = "user")]
    token: bool,
}

fn listen(path: Option<&Path>) -> Result<UnixListener> {
    let Some(path) = path else {
        return handed_over();
    };
    // Who may is not a matter of the file. Its mode is that from the beginning: later, another file
    // may have the name.
    //
    // SAFETY: a number. There are no other threads so far.
    let mask = unsafe { libc::umask(0o111) };
    let listener = bind(path);
    // SAFETY: likewise.
    unsafe { libc::umask(mask) };
    Ok(listener.map_err(|error| format!("{}: {error}", path.display()))?)
}

/// Binds a socket to a path, also where one is that nobody listens at: a manager's that was killed.
fn bind(path: &Path) -> io::Result<UnixListener> {
    let bound = UnixListener::bind(path);
    let is_left = || {
        let is_socket = fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket());
        let connected = || UnixStream::connect(path);
        is_socket
            && connected().is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    };
    match bound {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_left() => {
            fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        bound => bound,
    }
}

/// The first socket of those that are meant for this process, as sd_listen_fds(3) has it.
fn handed_over() -> Result<UnixListener> {
    // The crate also takes what is meant for nobody.
    let pid = env::var("LISTEN_PID").ok();
    let is_ours = pid.and_then(|pid| pid.parse().ok()) == Some(process::id());
    let listener = match is_ours {
        true => ListenFd::from_env().take_unix_listener(0)?,
        false => None,
    };
    let listener = listener.ok_or("no --socket, and none handed over")?;
    let (mut listens, mut len): (libc::c_int, _) = (0, size_of::<libc::c_int>() as u32);
    // SAFETY: the kernel writes at most `len` bytes to a number of that size.
    let result = unsafe {
        libc::getsockopt(
            listener.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ACCEPTCONN,
            (&raw mut listens).cast(),
            &mut len,
        )
    };
    if (result, listens) != (0, 1) {
        return Err("the socket that was handed over does not listen".into());
    }
    Ok(listener)
}

/// Gives up all rights but CAP_BPF, if it has that, for good.
fn drop_privileges(user: Option<libc::uid_t>) -> Result<()> {
    let check = |result: libc::c_int| match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    let mut keep = CapsHashSet::new();
    if caps::has_cap(None, CapSet::Permitted, Capability::CAP_BPF)? {
        keep.insert(Capability::CAP_BPF);
    }
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        caps::clear(None, CapSet::Bounding)?;
    }
    if let Some(user) = user {
        // SAFETY: no pointers but an empty list. There are no other threads so far.
        unsafe {
            check(libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0))?;
            check(libc::setgroups(0, std::ptr::null()))?;
            check(libc::setresgid(user, user, user))?;
            check(libc::setresuid(user, user, user))?;
        }
    }
    caps::clear(None, CapSet::Ambient)?;
    caps::clear(None, CapSet::Inheritable)?;
    caps::set(None, CapSet::Effective, &keep)?;
    caps::set(None, CapSet::Permitted, &keep)?;
    // SAFETY: no pointers.
    Ok(check(unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    })?)
}

fn run(args: Args) -> Result<()> {
    let files = Files::new(&args.files);
    let files = files.map_err(|error| format!("{}: {error}", args.files.display()))?;
    let files = Arc::new(files);
    let listener = listen(args.socket.as_deref())?;
    if args.token {
        // Root's files are root's, whatever the namespace.
        if args.user == Some(0) {
            return Err("with --token, --user is not root".into());
        }
        token::enter().map_err(|error| format!("cannot get a BPF token: {error}"))?;
    }
    token::refuse_ambiguous(&args.allowed)?;
    drop_privileges(args.user)?;
    let allowed: Arc<[_]> = args.allowed.into();
    let connections = Arc::new(AtomicU32::new(0));
    println!("kvm-bpf-manager: ready");
    loop {
        let mut stream = match listener.accept() {
            Ok((stream, _)) => stream,
            // It is gone, or there are too many files.
            Err(error) => {
                eprintln!("kvm-bpf-manager: {error}");
                thread::sleep(std::time::Duration::from_millis(100));
                continue;
            }
        };
        if connections.fetch_add(1, SeqCst) >= MAX_CONNECTIONS {
            connections.fetch_sub(1, SeqCst);
            _ = writeln!(stream, "error {MAX_CONNECTIONS} connections are there");
            continue;
        }
        let (files, allowed) = (Arc::clone(&files), Arc::clone(&allowed));
        let own = Served(Arc::clone(&connections));
        let serve = move || {
            let _own = own;
            serve(&files, &stream, &allowed);
        };
        // Where there is no thread, the connection is closed.
        if let Err(error) = thread::Builder::new().spawn(serve) {
            eprintln!("kvm-bpf-manager: {error}");
        }
    }
}

/// A connection among those that are served.
struct Served(Arc<AtomicU32>);

impl Drop for Served {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

fn serve(files: &Files, stream: &UnixStream, allowed: &[libc::uid_t]) {
    let (granted, ended) = files.serve(stream, allowed);
    // Who read that may be gone.
    _ = match ended {
        Ok(()) => writeln!(io::stdout(), "kvm-bpf-manager: {granted} granted"),
        Err(error) => writeln!(io::stderr(), "kvm-bpf-manager: {granted} granted; {error}"),
    };
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kvm-bpf-manager: {error}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The page has a unit for systemd, which this starts with: on a socket that is handed over.
    #[test]
    fn the_unit_of_the_page_has_our_options() {
        let page = include_str!("../../../Documentation/privileges.md");
        let commands = page
            .lines()
            .filter_map(|line| line.strip_prefix("ExecStart="));
        let [command] = commands.collect::<Vec<_>>()[..] else {
            panic!("the page has not one line ExecStart=");
        };
        let (program, _) = command.split_once(' ').unwrap();
        assert!(program.ends_with(env!("CARGO_BIN_NAME")), "{program}");
        let args = Args::try_parse_from(command.split(' ')).unwrap();
        assert_eq!(args.files, Path::new("/usr/lib/kvm-bpf"));
        assert_eq!(
            (args.socket, args.allowed, args.user),
            (None, vec![65534], None)
        );
    }
}
