// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A manager that loads devices made of eBPF programs, for VMMs that have no right to.
//!
//! A VMM connects and writes a request, one line:
//!
//! | line | behind it | the answer |
//! | --- | --- | --- |
//! | `load NAME` | | `ok`, and the programs of a new device |
//! | `replace NAME` | its running programs | `ok`, and programs that go on with their maps |
//!
//! Programs are as [`Programs::send`] sends them. Where a request is refused, the answer is one line,
//! `error` and the reason, and nothing has changed. A connection that has sent what is no request,
//! and one of somebody who may not, is closed after it.
//!
//! The manager keeps nothing: what it has sent is the VMM's alone, and goes on when it dies.

use std::error::Error as StdError;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use kvm_bpf::image::{self, MAX_FILE_SIZE};
use kvm_bpf::{Abi, OnLoss, OpenImage, Programs, abi, clock, programs, transfer};

/// The most bytes of a request's line, its end included.
pub const MAX_REQUEST: usize = 100;
/// The most bytes of the name of an object file.
pub const MAX_NAME: usize = 64;
/// The most requests of one connection.
pub const MAX_REQUESTS: u32 = 1000;
/// How long a VMM may take for the rest of a request, its programs included, and to take an answer.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// The parameter that a device finds the time of day with, which the manager gives: the VMM may not.
const CLOCK: &str = "clock";

/// Why a request is refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What came is no request. The connection ends.
    #[error("no request: {0}")]
    NoRequest(&'static str),
    /// The connection has had its requests. It ends.
    #[error("more than {MAX_REQUESTS} requests")]
    TooMany,
    /// Who connects may not. The connection ends.
    #[error("user {0} may not ask for programs")]
    NotAllowed(libc::uid_t),
    /// The name is none that files have here.
    #[error("bad name: 1 to {MAX_NAME} letters, digits, \"_\", \"-\" and \".\", no \".\" first")]
    BadName,
    /// There is no such file, or it cannot be read.
    #[error("cannot read the file")]
    File(#[source] io::Error),
    /// It cannot be loaded, or not with these maps.
    #[error("cannot load the file")]
    Image(#[source] image::Error),
    /// The kernel does not say what types programs have.
    #[error("cannot load any file")]
    Abi(#[source] abi::Error),
    /// The programs are more than can be sent.
    #[error("cannot describe the programs")]
    Describe(#[source] transfer::Error),
    /// The VMM does not take the programs. The connection ends.
    #[error("the VMM does not take the programs")]
    Send(#[source] transfer::Error),
    /// What the VMM has sent are no programs. The connection ends.
    #[error("cannot take the running programs")]
    Programs(#[source] transfer::Error),
    /// The parameter cannot be given.
    #[error("cannot set the clock")]
    Clock(#[source] programs::Error),
    /// The VMM takes too long, see [`PATIENCE`]. The connection ends.
    #[error("a request, or taking the answer, takes longer than {} s", PATIENCE.as_secs())]
    TooSlow,
    /// The connection does not go on. It ends.
    #[error("the connection does not go on")]
    Connection(#[source] io::Error),
}

impl Error {
    /// Whether nobody knows what comes next on the connection.
    fn ends_connection(&self) -> bool {
        matches!(
            self,
            Error::NoRequest(_)
                | Error::TooMany
                | Error::NotAllowed(_)
                | Error::Send(_)
                | Error::Programs(_)
                | Error::TooSlow
                | Error::Connection(_)
        )
    }

    /// The error and its causes, in one line.
    fn line(&self) -> String {
        let first: &dyn StdError = self;
        let causes = std::iter::successors(Some(first), |&error| error.source());
        let texts: Vec<_> = causes.map(|error| error.to_string()).collect();
        let line = texts.join(": ").replace(char::is_control, " ");
        line.chars().take(MAX_ANSWER).collect()
    }
}

/// The most characters of an answer's line.
const MAX_ANSWER: usize = 400;

/// What a VMM asks for.
#[derive(Debug)]
struct Request {
    /// The object file's.
    name: String,
    /// The running programs that it is to replace.
    running: Option<Programs>,
}

/// Reads a request. The programs behind the line come with file descriptors, so it is byte by byte.
fn read_request(stream: &UnixStream) -> Result<Option<Request>, Error> {
    let mut from = stream;
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        match from.read(&mut byte) {
            Ok(0) if line.is_empty() => return Ok(None),
            Ok(0) => return Err(Error::NoRequest("it has no end")),
            Ok(_) if byte == *b"\n" => break,
            Ok(_) => line.extend(byte),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Error::Connection(error)),
        }
        if line.len() >= MAX_REQUEST {
            return Err(Error::NoRequest("it is too long"));
        }
    }
    let line = String::from_utf8(line).map_err(|_| Error::NoRequest("it is no text"))?;
    let (name, running) = match line.split_once(' ') {
        Some(("load", name)) => (name, None),
        Some(("replace", name)) => {
            // Whatever becomes of the name, they are on their way.
            let running = Programs::recv(stream).map_err(Error::Programs)?;
            (name, Some(running))
        }
        _ => {
            return Err(Error::NoRequest(
                "neither \"load NAME\" nor \"replace NAME\"",
            ));
        }
    };
    let name = name.to_string();
    Ok(Some(Request { name, running }))
}

/// Does something that waits for the VMM, and for no longer than that: then one direction of the
/// connection is shut. The socket's own limits are those of each call, however little comes.
fn within<T>(
    patience: Duration,
    stream: &UnixStream,
    direction: Shutdown,
    work: impl FnOnce() -> Result<T, Error>,
) -> Result<T, Error> {
    let (done, waits) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let watch = move || {
            let is_late = waits.recv_timeout(patience) == Err(RecvTimeoutError::Timeout);
            if is_late {
                // It may be gone.
                _ = stream.shutdown(direction);
            }
            is_late
        };
        let watch = thread::Builder::new().spawn_scoped(scope, watch);
        let watch = watch.map_err(Error::Connection)?;
        let result = work();
        drop(done);
        match watch.join() {
            Ok(false) => result,
            // What shutting it made of the call says less.
            Ok(true) | Err(_) => result.map_err(|_| Error::TooSlow),
        }
    })
}

/// The object files that VMMs may ask for: those of one directory.
#[derive(Debug)]
pub struct Files {
    directory: File,
    /// One after the other is loaded: it may take seconds of a CPU each. The numbers of the
    /// programs' types are known from the first one on.
    loading: Mutex<Option<Abi>>,
    /// [`PATIENCE`], or less in tests.
    patience: Duration,
}

impl Files {
    /// Those of that directory, wherever its path leads to later.
    pub fn new(directory: &Path) -> io::Result<Self> {
        let directory = File::open(directory)?;
        if !directory.metadata()?.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        Ok(Files {
            directory,
            loading: Mutex::new(None),
            patience: PATIENCE,
        })
    }

    fn open(&self, name: &str) -> Result<OpenImage, Error> {
        let is_ok = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
        let is_name = (1..=MAX_NAME).contains(&name.len())
            && name.bytes().all(is_ok)
            && !name.starts_with('.');
        if !is_name {
            return Err(Error::BadName);
        }
        let bytes = self.read(name).map_err(Error::File)?;
        let short = name.split('.').next().unwrap_or_default();
        OpenImage::open(short, &bytes).map_err(Error::Image)
    }

    /// Reads a regular file of the directory; links lead nowhere.
    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        let mut path = std::ffi::OsStr::new(name).as_bytes().to_vec();
        path.push(0);
        // A pipe does not wait for a writer.
        let flags = libc::O_RDONLY | libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
        // SAFETY: the path ends in NUL.
        let fd = unsafe { libc::openat(self.directory.as_raw_fd(), path.as_ptr().cast(), flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: it is new.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        let mut bytes = Vec::new();
        file.take(MAX_FILE_SIZE + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn load(&self, mut image: OpenImage) -> Result<Programs, Error> {
        let mut loading = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        let abi = match *loading {
            Some(abi) => abi,
            None => *loading.insert(Abi::from_running_kernel().map_err(Error::Abi)?),
        };
        image.set_abi(&abi);
        let programs = image.load().map_err(Error::Image)?;
        if programs.note().param(CLOCK).is_some() {
            let offset = clock::time_of_day_offset_ns();
            programs.param(CLOCK, [offset]).map_err(Error::Clock)?;
        }
        Ok(programs)
    }

    /// Serves the requests of a connection until it ends. Returns how many it has granted, and why
    /// it ended if the VMM did not end it.
    pub fn serve(&self, stream: &UnixStream, allowed: &[libc::uid_t]) -> (u32, Result<(), Error>) {
        let mut granted = 0;
        let served = self.try_serve(stream, allowed, &mut granted);
        // Where the VMM has had a part of the programs, it would take a line for more of them.
        if let Err(error) = &served
            && !matches!(error, Error::Send(_))
        {
            // It may be gone.
            _ = writeln!(&mut &*stream, "error {}", error.line());
        }
        (granted, served)
    }

    fn try_serve(
        &self,
        stream: &UnixStream,
        allowed: &[libc::uid_t],
        granted: &mut u32,
    ) -> Result<(), Error> {
        stream
            .set_write_timeout(Some(PATIENCE))
            .map_err(Error::Connection)?;
        let uid = peer(stream).map_err(Error::Connection)?;
        if !allowed.contains(&uid) {
            return Err(Error::NotAllowed(uid));
        }
        for count in 0.. {
            // It may take any time until it wants something.
            wait(stream).map_err(Error::Connection)?;
            let request = within(self.patience, stream, Shutdown::Read, || {
                read_request(stream)
            });
            let Some(request) = request? else {
                return Ok(());
            };
            if count >= MAX_REQUESTS {
                return Err(Error::TooMany);
            }
            match self.answer(request, stream) {
                Ok(()) => *granted += 1,
                Err(error) if error.ends_connection() => return Err(error),
                Err(error) => {
                    writeln!(&mut &*stream, "error {}", error.line()).map_err(Error::Connection)?;
                }
            }
        }
        Ok(())
    }

    /// Loads what a request asks for, and sends it. On an error that does not end the connection
    /// nothing is sent.
    fn answer(&self, request: Request, stream: &UnixStream) -> Result<(), Error> {
        let mut image = self.open(&request.name)?;
        if let Some(running) = &request.running {
            let reused = image.reuse_maps(running, OnLoss::Refuse);
            reused.map_err(Error::Image)?;
        }
        let programs = self.load(image)?;
        // Behind the "ok" there is no way to say that there are none.
        let message = programs.message().map_err(Error::Describe)?;
        within(self.patience, stream, Shutdown::Write, || {
            writeln!(&mut &*stream, "ok").map_err(Error::Connection)?;
            message.send(stream).map_err(Error::Send)
        })
    }
}

/// Waits until there is something to read, or the end.
fn wait(stream: &UnixStream) -> io::Result<()> {
    let mut poll = libc::pollfd {
        fd: stream.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    loop {
        // SAFETY: one structure, which lives as long as the call.
        match unsafe { libc::poll(&mut poll, 1, -1) } {
            1 => return Ok(()),
            _ => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}

/// The user who has connected, as the kernel knows it.
fn peer(stream: &UnixStream) -> io::Result<libc::uid_t> {
    let mut peer = libc::ucred {
        pid: 0,
        uid: libc::uid_t::MAX,
        gid: 0,
    };
    let mut len = size_of_val(&peer) as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `peer`.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &mut len,
        )
    };
    match result {
        0 => Ok(peer.uid),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::BufRead;
    use std::os::unix::fs::symlink;
    use std::time::Instant;

    use vmm_sys_util::tempdir::TempDir;

    use super::*;

    fn own_uid() -> libc::uid_t {
        // SAFETY: no arguments.
        unsafe { libc::geteuid() }
    }

    /// A directory with some that are no devices, and one above it.
    fn files() -> (TempDir, Files) {
        let dir = TempDir::new().unwrap();
        let path = dir.as_path();
        fs::write(path.join("secret.o"), "above").unwrap();
        let inner = path.join("files");
        fs::create_dir(&inner).unwrap();
        fs::write(inner.join("text.o"), "no object file").unwrap();
        symlink("../secret.o", inner.join("link.o")).unwrap();
        fs::create_dir(inner.join("directory.o")).unwrap();
        let pipe = std::ffi::CString::new(inner.join("pipe.o").to_str().unwrap()).unwrap();
        // SAFETY: a path that ends in NUL.
        assert_eq!(unsafe { libc::mkfifo(pipe.as_ptr(), 0o600) }, 0);
        let files = Files::new(&inner).unwrap();
        (dir, files)
    }

    /// What the manager answers to these bytes, line by line, and why it ended.
    fn answers(bytes: &[u8], allowed: &[libc::uid_t]) -> (Vec<String>, Result<(), Error>) {
        let (_dir, files) = files();
        let (ours, theirs) = UnixStream::pair().unwrap();
        thread::scope(|scope| {
            let served = scope.spawn(move || files.serve(&theirs, allowed));
            // It may have ended before it has read all.
            _ = (&ours).write_all(bytes);
            ours.shutdown(Shutdown::Write).unwrap();
            let lines = io::BufReader::new(&ours).lines();
            let lines = lines.map_while(std::result::Result::ok).collect();
            let (granted, ended) = served.join().unwrap();
            assert_eq!(granted, 0);
            (lines, ended)
        })
    }

    #[track_caller]
    fn assert_answers(bytes: &[u8], wanted: &[&str]) -> Result<(), Error> {
        let (lines, ended) = answers(bytes, &[own_uid()]);
        let is_so = |(line, wanted): (&String, &&str)| line.starts_with(&format!("error {wanted}"));
        let same = lines.len() == wanted.len() && lines.iter().zip(wanted).all(is_so);
        assert!(same, "wanted {wanted:?}, got {lines:?}");
        ended
    }

    #[test]
    fn who_may_not_is_told() {
        let others = own_uid() + 1;
        let (lines, ended) = answers(b"load text.o\n", &[others]);
        assert_eq!(lines.len(), 1);
        let wanted = format!("error user {} may not ask for programs", own_uid());
        assert_eq!(lines[0], wanted);
        assert!(matches!(ended, Err(Error::NotAllowed(_))), "{ended:?}");
    }

    #[test]
    fn nonsense_ends_the_connection() {
        let long = [
            b"load ".as_slice(),
            &[b'x'; MAX_REQUEST],
            b"\nload text.o\n",
        ]
        .concat();
        for (bytes, why) in [
            (b"hello\nload text.o\n".as_slice(), "no request: neither"),
            (b"\nload text.o\n", "no request: neither"),
            (b"load\nload text.o\n", "no request: neither"),
            (b"load \xff\nload text.o\n", "no request: it is no text"),
            (b"load text.o", "no request: it has no end"),
            (&long, "no request: it is too long"),
        ] {
            let ended = assert_answers(bytes, &[why]);
            assert!(matches!(ended, Err(Error::NoRequest(_))), "{ended:?}");
        }
        assert!(assert_answers(b"", &[]).is_ok());
    }

    #[test]
    fn a_replacement_without_programs_ends_the_connection() {
        for bytes in [
            b"replace text.o\n".as_slice(),
            b"replace text.o\nno programs at all, but some bytes that are none\n",
        ] {
            let ended = assert_answers(bytes, &["cannot take the running programs: "]);
            assert!(matches!(ended, Err(Error::Programs(_))), "{ended:?}");
        }
    }

    /// However often a byte comes.
    #[test]
    fn a_request_has_its_time() {
        for start in [&b"load "[..], b"replace text.o\nkvm-bpf\0"] {
            let (_dir, mut files) = files();
            files.patience = Duration::from_millis(300);
            let (ours, theirs) = UnixStream::pair().unwrap();
            let begin = Instant::now();
            let ended = thread::scope(|scope| {
                let files = &files;
                let served = scope.spawn(move || files.serve(&theirs, &[own_uid()]));
                (&ours).write_all(start).unwrap();
                while !served.is_finished() && begin.elapsed() < Duration::from_secs(10) {
                    _ = (&ours).write_all(b"x");
                    thread::sleep(Duration::from_millis(100));
                }
                // One that still reads is at the end now.
                ours.shutdown(Shutdown::Write).unwrap();
                served.join().unwrap().1
            });
            assert!(matches!(ended, Err(Error::TooSlow)), "{ended:?}");
            let mut said = String::new();
            (&ours).read_to_string(&mut said).unwrap();
            assert!(said.starts_with("error a request, or"), "{said}");
        }
    }

    #[test]
    fn an_answer_is_taken_in_time() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let write = || {
            let written = (&ours).write_all(&vec![0; 4 << 20]);
            written.map_err(Error::Connection)
        };
        let patience = Duration::from_millis(100);
        let error = within(patience, &ours, Shutdown::Write, write).unwrap_err();
        assert!(matches!(error, Error::TooSlow), "{error}");
        let error = within(patience, &ours, Shutdown::Write, || {
            Err::<(), _>(Error::BadName)
        });
        assert!(matches!(error, Err(Error::BadName)), "{error:?}");
    }

    #[test]
    fn names_lead_to_files_of_the_directory_only() {
        let mut bytes = Vec::new();
        let long = "x".repeat(MAX_NAME + 1);
        let bad = [
            "",
            ".",
            "..",
            "../secret.o",
            "/etc/passwd",
            "a b",
            ".o",
            "\0",
            &long,
        ];
        let longest = "x".repeat(MAX_NAME);
        let unreadable = ["secret.o", "link.o", "directory.o", "pipe.o", &longest];
        for name in bad.iter().chain(&unreadable).chain(&["text.o"]) {
            bytes.extend(format!("load {name}\n").into_bytes());
        }
        let wanted = [
            vec!["bad name: "; bad.len()],
            vec!["cannot read the file: "; unreadable.len()],
            vec!["cannot load the file: not a 64-bit ELF file"],
        ];
        assert!(assert_answers(&bytes, &wanted.concat()).is_ok());
    }

    #[test]
    fn a_connection_has_so_many_requests() {
        let bytes = b"load .\n".repeat(MAX_REQUESTS as usize + 1);
        let (lines, ended) = answers(&bytes, &[own_uid()]);
        assert_eq!(lines.len(), MAX_REQUESTS as usize + 1);
        assert!(lines[MAX_REQUESTS as usize].starts_with("error more than"));
        assert!(matches!(ended, Err(Error::TooMany)), "{ended:?}");
    }

    #[test]
    fn the_directory_is_one() {
        let (dir, _) = files();
        assert!(Files::new(&dir.as_path().join("secret.o")).is_err());
        assert!(Files::new(&dir.as_path().join("nothing")).is_err());
    }

    #[test]
    fn an_answer_is_one_line() {
        let error = Error::File(io::Error::other("a\nb\tc".to_string() + &"x".repeat(1000)));
        let line = error.line();
        assert!(line.starts_with("cannot read the file: a b cx"), "{line}");
        assert_eq!(line.len(), MAX_ANSWER);
    }
}
