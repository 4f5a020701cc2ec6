// SPDX-License-Identifier: Apache-2.0 OR MIT

//! [`Programs`] from one process to another: over a socket, and pinned in a bpf file system.
//!
//! A process with rights loads them, and one without goes on with them: a manager and a VMM. What
//! goes over is file descriptors and a description: 16 bytes, which are `kvm-bpf` and a NUL, the
//! version and the length of the rest (both 32 bits, little endian), and then so many bytes of JSON.
//! On a socket the file descriptors come with the first byte: the programs for reads and writes, as
//! far as they are there, the WORK programs by their indices, and all maps. Pinned, the description
//! is the one value of a frozen array.
//!
//! The receiver takes nothing on trust that could harm it: sizes have limits, notes and types are
//! checked as those of a file are, and what the kernel says of each map must agree with the
//! description: it could be something else, whose memory ends with a SIGBUS. [`Programs::recv`] finds
//! that in `/proc/self/fdinfo` and calls no bpf(2). A process without `/proc` asks with bpf(2):
//! [`Programs::recv_with_bpf`].

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::maps::Layout;
use crate::note::Note;
use crate::programs::{self, Map, Parts, Programs};
use crate::schema::Text;
use crate::state::check_json;
use crate::sys::{self, FdInfo, MapInfo, map_type};

/// The newest version of the description that this library reads, and the one that it writes.
pub const VERSION: u32 = 1;
/// The most bytes of a description.
pub const MAX_DESCRIPTION: usize = 4 << 20;
/// The most maps of a device.
pub const MAX_MAPS: usize = 128;

const MAGIC: &[u8; 8] = b"kvm-bpf\0";
const HEADER_LEN: usize = 16;
/// How deep JSON may be nested; its reader has a limit of 128.
const MAX_DEPTH: usize = 120;
/// The most values in the JSON of a description.
const MAX_VALUES: usize = 1 << 20;
/// The most file descriptors that the kernel takes with one message.
const MAX_FDS: usize = 253;
/// Name of the pin with the description.
const DESCRIPTION: &str = "description";

/// Why programs did not go from one process to another.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The socket cannot be written to.
    #[error("cannot send the programs")]
    Send(#[source] io::Error),
    /// The socket cannot be read, or ended early: `UnexpectedEof`.
    #[error("cannot receive the programs")]
    Receive(#[source] io::Error),
    /// What came is no description.
    #[error("no description of programs begins there")]
    NotPrograms,
    /// The description is newer than this library.
    #[error("the description has version {found}, newer than the supported {VERSION}")]
    FutureVersion {
        /// Its version.
        found: u32,
    },
    /// There is more of something than a device has.
    #[error("{found} {what}, more than {max}")]
    TooMuch {
        /// Of what.
        what: &'static str,
        /// How much there is.
        found: usize,
        /// How much there may be.
        max: usize,
    },
    /// More file descriptors came than there was room for, or this process may have.
    #[error("file descriptors were lost on the way: too many for a message or for this process")]
    LostFds,
    /// The description does not fit what came with it.
    #[error("{found} file descriptors came, and the description has {described}")]
    Fds {
        /// How many came.
        found: usize,
        /// How many there should be.
        described: usize,
    },
    /// The description is no JSON, or not of a device.
    #[error("the description cannot be used")]
    Json(#[source] io::Error),
    /// A file descriptor is not that of a program.
    #[error("{0}: no eBPF program")]
    NotProgram(String),
    /// The kernel does not say what a map is.
    #[error("map {name}: the kernel does not say what it is")]
    Unconfirmed {
        /// The map.
        name: String,
        /// Its error: of `/proc`, where that is not there.
        #[source]
        source: io::Error,
    },
    /// A file descriptor is not that of the map that is described.
    #[error("map {name}: {why}")]
    Map {
        /// The map.
        name: String,
        /// What is wrong.
        why: String,
    },
    /// A program or map cannot be pinned.
    #[error("{}: cannot pin it there", .path.display())]
    Pin {
        /// The file, or the directory.
        path: PathBuf,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// A pin cannot be opened.
    #[error("{}: cannot open the pin", .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// Programs and maps cannot be those of a device.
    #[error(transparent)]
    Programs(#[from] programs::Error),
}

type Result<T> = std::result::Result<T, Error>;

/// Asks the kernel which map a file descriptor is; none if it is that of something else.
type Ask = fn(BorrowedFd<'_>) -> io::Result<Option<MapInfo>>;

/// Without bpf(2).
const IN_PROC: Ask = |fd| Ok(FdInfo::of(fd)?.map());
/// Without `/proc`.
const WITH_BPF: Ask = |fd| sys::map_info(fd).map(Some);

/// What file descriptors do not say.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    note: Note,
    read: bool,
    write: bool,
    /// Indices of the WORK programs.
    works: Vec<u32>,
    maps: Vec<DescribedMap>,
    layouts: Vec<Layout>,
    /// What global data has in a new device, by section, as hexadecimal digits.
    initial: BTreeMap<String, String>,
    /// The parameters that have their values: the receiver need not give them again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    given: Vec<String>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DescribedMap {
    name: String,
    info: MapInfo,
}

impl Description {
    fn of(programs: &Programs) -> Self {
        let maps = programs.maps().map(|map| DescribedMap {
            name: map.name().to_string(),
            info: map.info,
        });
        let states = programs.states().iter().map(|state| {
            let (name, bytes) = state.initial();
            (name.to_string(), hex::encode(bytes))
        });
        Description {
            note: programs.note().clone(),
            read: programs.read_program().is_some(),
            write: programs.write_program().is_some(),
            works: programs.works().map(|work| work.index).collect(),
            maps: maps.collect(),
            layouts: programs.layouts().to_vec(),
            initial: states.collect(),
            given: programs.given().map(str::to_string).collect(),
        }
    }

    /// The header and the JSON.
    fn to_bytes(&self) -> Result<Vec<u8>> {
        let json = serde_json::to_vec(self).map_err(|error| Error::Json(error.into()))?;
        // What is written can be read.
        self.check()?;
        check_len(json.len())?;
        check_text(&json)?;
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((json.len() as u32).to_le_bytes());
        bytes.extend(json);
        Ok(bytes)
    }

    /// Reads JSON of anybody.
    fn from_json(json: &[u8]) -> Result<Self> {
        check_text(json)?;
        let this: Self = serde_json::from_slice(json).map_err(|error| Error::Json(error.into()))?;
        this.check()?;
        Ok(this)
    }

    fn check(&self) -> Result<()> {
        let at_most = |what, found: usize, max| match found > max {
            true => Err(Error::TooMuch { what, found, max }),
            false => Ok(()),
        };
        at_most("maps", self.maps.len(), MAX_MAPS)?;
        at_most("types of maps", self.layouts.len(), MAX_MAPS)?;
        at_most("WORK programs", self.works.len(), self.note.works.len())?;
        if let Some(odd) = self
            .given
            .iter()
            .find(|name| self.note.param(name).is_none())
        {
            return Err(Error::Map {
                name: odd.clone(),
                why: "given, and no parameter".to_string(),
            });
        }
        let mut text = Text::default();
        for layout in &self.layouts {
            let bad = |why: &str| Error::Map {
                name: layout.name.clone(),
                why: why.to_string(),
            };
            if !layout.value.is_sound(&mut text) {
                let why = "its types are nested too deeply, or hold too much with those before";
                return Err(bad(why));
            }
            let is_described = self.maps.iter().any(|map| map.name == layout.name);
            if !is_described {
                return Err(bad("described, and not there"));
            }
        }
        Ok(())
    }

    /// What each file descriptor is, in their order.
    fn names(&self) -> Vec<String> {
        let handlers = [("read", self.read), ("write", self.write)];
        let handlers = handlers.into_iter().filter(|&(_, is_there)| is_there);
        let works = self.works.iter().map(|index| format!("work{index}"));
        let maps = (0..self.maps.len()).map(|at| format!("map{at}"));
        let names = handlers.map(|(name, _)| name.to_string());
        names.chain(works).chain(maps).collect()
    }

    /// Makes programs of it and of its file descriptors, in the order of [`Self::names`].
    fn with_fds(self, fds: Vec<OwnedFd>, ask: Ask) -> Result<Programs> {
        let names = self.names();
        if fds.len() != names.len() {
            return Err(Error::Fds {
                found: fds.len(),
                described: names.len(),
            });
        }
        let mut fds = fds.into_iter().zip(names);
        let mut program = || {
            let (fd, name) = fds.next().expect("as many as names");
            check_program(fd.as_fd(), &name).map(|()| fd)
        };
        let read = self.read.then(&mut program).transpose()?;
        let write = self.write.then(&mut program).transpose()?;
        let mut works = BTreeMap::new();
        for &index in &self.works {
            if works.insert(index, program()?).is_some() {
                return Err(programs::Error::Work(index).into());
            }
        }
        let mut maps = Vec::new();
        for ((fd, _), DescribedMap { name, info }) in fds.zip(self.maps) {
            check_map(ask(fd.as_fd()), &name, &info)?;
            maps.push(Map::with_info(&name, fd, info));
        }
        let mut initial = BTreeMap::new();
        for (name, digits) in self.initial {
            let bytes = hex::decode(digits).map_err(|error| Error::Map {
                name: name.clone(),
                why: error.to_string(),
            })?;
            initial.insert(name, bytes);
        }
        Ok(Programs::new(Parts {
            note: self.note,
            read,
            write,
            works,
            maps,
            layouts: self.layouts,
            initial,
            given: self.given,
        })?)
    }
}

fn check_len(len: usize) -> Result<()> {
    match len > MAX_DESCRIPTION {
        true => Err(Error::TooMuch {
            what: "bytes of a description",
            found: len,
            max: MAX_DESCRIPTION,
        }),
        false => Ok(()),
    }
}

/// Refuses what would take much memory or stack to read.
fn check_text(json: &[u8]) -> Result<()> {
    match check_json(json, MAX_VALUES, MAX_DEPTH) {
        true => Ok(()),
        false => Err(Error::Json(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("more than {MAX_VALUES} values or {MAX_DEPTH} levels"),
        ))),
    }
}

/// The length of the JSON behind a header.
fn len_behind(header: &[u8; HEADER_LEN]) -> Result<usize> {
    let word = |at: usize| {
        let bytes = header[at..at + 4].try_into().expect("4 bytes");
        u32::from_le_bytes(bytes)
    };
    if header[..8] != MAGIC[..] || word(8) == 0 {
        return Err(Error::NotPrograms);
    }
    if word(8) > VERSION {
        return Err(Error::FutureVersion { found: word(8) });
    }
    let len = word(12) as usize;
    check_len(len).map(|()| len)
}

/// What it is where `/proc` says it; the kernel finds out the rest when it is to run. Nothing else is
/// done with it.
fn check_program(fd: BorrowedFd<'_>, name: &str) -> Result<()> {
    let is_one = match FdInfo::of(fd) {
        Ok(info) => info.number("prog_id").is_some(),
        Err(_) => sys::is_anonymous(fd),
    };
    match is_one {
        true => Ok(()),
        false => Err(Error::NotProgram(name.to_string())),
    }
}

/// Checks what the kernel says of a map. Its memory is mapped behind this, so nothing is taken for one
/// that the kernel does not say is one.
fn check_map(found: io::Result<Option<MapInfo>>, name: &str, described: &MapInfo) -> Result<()> {
    let name = name.to_string();
    let why = match found {
        Ok(Some(info)) if info == *described => return Ok(()),
        Ok(Some(info)) => format!("it is {info:?}, and described as {described:?}"),
        Ok(None) => "no eBPF map".to_string(),
        Err(source) => return Err(Error::Unconfirmed { name, source }),
    };
    Err(Error::Map { name, why })
}

/// Programs as they go over a socket, see [`Programs::message`].
#[derive(Debug)]
pub struct Message<'a> {
    bytes: Vec<u8>,
    fds: Vec<BorrowedFd<'a>>,
}

impl Message<'_> {
    /// Sends it, as [`Programs::send`] does.
    pub fn send(&self, stream: &UnixStream) -> Result<()> {
        let (header, json) = self.bytes.split_at(HEADER_LEN);
        let sent = send_with_fds(stream, header, &self.fds).map_err(Error::Send)?;
        send_all(stream, &header[sent..]).map_err(Error::Send)?;
        send_all(stream, json).map_err(Error::Send)
    }
}

impl Programs {
    /// Sends them to whoever is at the other end, who has them then too. It waits until the other
    /// has read most of it; [`UnixStream::set_write_timeout`] limits each wait, not their sum.
    pub fn send(&self, stream: &UnixStream) -> Result<()> {
        self.message()?.send(stream)
    }

    /// Makes what [`Self::send`] sends: whoever has to say something before it knows then that there
    /// is something to send. [`Error::TooMuch`] and others: no receiver would take it.
    pub fn message(&self) -> Result<Message<'_>> {
        let bytes = Description::of(self).to_bytes()?;
        let fds = self.fds();
        Ok(Message { bytes, fds })
    }

    /// Receives what [`Self::send`] sends. It waits for it; [`UnixStream::set_read_timeout`] limits
    /// each wait, not their sum. On an error all file descriptors that came are closed, and the stream
    /// is of no more use.
    ///
    /// It calls no bpf(2), and reads `/proc/self/fdinfo`. Where that is not there, and the device has
    /// maps: [`Error::Unconfirmed`].
    pub fn recv(stream: &UnixStream) -> Result<Self> {
        Self::recv_and_ask(stream, IN_PROC)
    }

    /// The same in a process without `/proc`: it asks with bpf(2) what the maps are
    /// (`BPF_OBJ_GET_INFO_BY_FD`, which needs no rights).
    pub fn recv_with_bpf(stream: &UnixStream) -> Result<Self> {
        Self::recv_and_ask(stream, WITH_BPF)
    }

    fn recv_and_ask(stream: &UnixStream, ask: Ask) -> Result<Self> {
        let mut header = [0; HEADER_LEN];
        let (len, fds) = receive_with_fds(stream, &mut header)?;
        let mut reader = stream;
        let receive = |error| Error::Receive(error);
        reader.read_exact(&mut header[len..]).map_err(receive)?;
        let mut json = vec![0; len_behind(&header)?];
        reader.read_exact(&mut json).map_err(receive)?;
        Description::from_json(&json)?.with_fds(fds, ask)
    }

    /// Pins them in a new directory of a bpf file system, for [`Self::from_pinned`]. This calls bpf(2)
    /// and needs the right to make a map, `CAP_BPF`.
    ///
    /// The files are the caller's: who should open them needs the right to read and write them, and
    /// to search the directory. Removing them unpins. On an error nothing is left.
    pub fn pin(&self, directory: &Path) -> Result<()> {
        let description = Description::of(self);
        let bytes = description.to_bytes()?;
        let failed = |path: &Path| {
            let path = path.to_path_buf();
            move |source| Error::Pin { path, source }
        };
        fs::create_dir(directory).map_err(failed(directory))?;
        let pin = |fd: BorrowedFd<'_>, name: &str| {
            let path = directory.join(name);
            sys::pin(fd, &path).map_err(failed(&path))
        };
        let pin_all = || {
            for (fd, name) in self.fds().iter().zip(description.names()) {
                pin(*fd, &name)?;
            }
            // The last one: who finds it finds all.
            let path = directory.join(DESCRIPTION);
            let map = sys::frozen_array("kvm_bpf_device", &bytes).map_err(failed(&path))?;
            pin(map.as_fd(), DESCRIPTION)
        };
        pin_all().inspect_err(|_| drop(fs::remove_dir_all(directory)))
    }

    /// Opens what [`Self::pin`] has pinned. It calls bpf(2), and needs no more rights than those to
    /// the files.
    pub fn from_pinned(directory: &Path) -> Result<Self> {
        let open = |name: &str| {
            let path = directory.join(name);
            sys::get_pinned(&path).map_err(|source| Error::Open { path, source })
        };
        let map = open(DESCRIPTION)?;
        let description = read_description(map.as_fd()).map_err(|source| Error::Open {
            path: directory.join(DESCRIPTION),
            source,
        })?;
        let Some((header, rest)) = description.split_first_chunk() else {
            return Err(Error::NotPrograms);
        };
        let json = rest.get(..len_behind(header)?).ok_or(Error::NotPrograms)?;
        let description = Description::from_json(json)?;
        let names = description.names();
        let fds = names.iter().map(|name| open(name));
        let fds = fds.collect::<Result<Vec<_>>>()?;
        description.with_fds(fds, WITH_BPF)
    }

    /// Those of [`Description::names`].
    fn fds(&self) -> Vec<BorrowedFd<'_>> {
        let handlers = self.read_program().into_iter().chain(self.write_program());
        let works = self.works().map(|work| work.program);
        let maps = self.maps().map(Map::as_fd);
        handlers.chain(works).chain(maps).collect()
    }
}

/// The value of the array with a description.
fn read_description(map: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let info = sys::map_info(map)?;
    let len = info.value_size as usize;
    let is_good = info.map_type == map_type::ARRAY && info.key_size == 4;
    if !is_good || len > HEADER_LEN + MAX_DESCRIPTION {
        let message = "not the map of a description";
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    let mut value = vec![0; len];
    match sys::map_lookup(map, &[0; 4], &mut value)? {
        true => Ok(value),
        false => Err(io::ErrorKind::NotFound.into()),
    }
}

// --- messages with file descriptors ---

/// Room for control messages: those with the most file descriptors, and some that others ask for.
#[repr(C, align(8))]
struct Control([u8; 2048]);

/// Sends bytes; file descriptors go with the first. Returns how many bytes went.
fn send_with_fds(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    if fds.len() > MAX_FDS {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{} file descriptors, more than {MAX_FDS}", fds.len()),
        ));
    }
    let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let mut control = Control([0; 2048]);
    let mut part = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    let len = size_of_val(&numbers[..]) as u32;
    // SAFETY: all zeroes is a good header of a message; both are only numbers and addresses.
    let (mut message, space): (libc::msghdr, u32) =
        unsafe { (mem::zeroed(), libc::CMSG_SPACE(len)) };
    message.msg_iov = &mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = space as _;
    // SAFETY: `control` has more than `space` bytes, aligned for the header that goes first and the
    // numbers behind it.
    unsafe {
        let header = libc::CMSG_FIRSTHDR(&message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(len) as _;
        let data = libc::CMSG_DATA(header).cast::<RawFd>();
        std::ptr::copy_nonoverlapping(numbers.as_ptr(), data, numbers.len());
    }
    loop {
        // SAFETY: the message and all that it points to live as long as the call, which only reads.
        let sent = unsafe { libc::sendmsg(stream.as_raw_fd(), &message, libc::MSG_NOSIGNAL) };
        match sent {
            -1 => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
            sent => return Ok(sent as usize),
        }
    }
}

/// Sends all bytes, and no SIGPIPE where the other is gone.
fn send_all(stream: &UnixStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let (start, len) = (bytes.as_ptr().cast(), bytes.len());
        // SAFETY: the kernel reads so many bytes.
        let sent = unsafe { libc::send(stream.as_raw_fd(), start, len, libc::MSG_NOSIGNAL) };
        match sent {
            -1 => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
            sent => bytes = &bytes[sent as usize..],
        }
    }
    Ok(())
}

/// Receives at least one byte, and the file descriptors that come with it.
fn receive_with_fds(stream: &UnixStream, bytes: &mut [u8]) -> Result<(usize, Vec<OwnedFd>)> {
    /// A process that the socket's owner has asked for, as a file descriptor.
    const SCM_PIDFD: libc::c_int = 4;

    let mut control = Control([0; 2048]);
    let mut part = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: all zeroes is a good header of a message.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &mut part;
    message.msg_iovlen = 1;
    let len = loop {
        message.msg_control = control.0.as_mut_ptr().cast();
        message.msg_controllen = control.0.len() as _;
        let flags = libc::MSG_CMSG_CLOEXEC;
        // SAFETY: the message and all that it points to live as long as the call, and have the lengths
        // that it says.
        match unsafe { libc::recvmsg(stream.as_raw_fd(), &mut message, flags) } {
            -1 => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(Error::Receive(error)),
            },
            len => break len as usize,
        }
    };
    let mut fds = Vec::new();
    // The C libraries do not agree on the type of a length.
    #[allow(clippy::unnecessary_cast)]
    // SAFETY: the kernel has written whole control messages, and the macros stay inside of what
    // `msg_controllen` now says. Each number is a new file descriptor of this process, which nobody
    // else knows.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&message);
        while let Some(control) = header.as_ref() {
            let data = libc::CMSG_DATA(header).cast::<RawFd>();
            let bytes = control.cmsg_len as usize - libc::CMSG_LEN(0) as usize;
            let new = |at| OwnedFd::from_raw_fd(data.add(at).read_unaligned());
            match (control.cmsg_level, control.cmsg_type) {
                (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                    fds.extend((0..bytes / size_of::<RawFd>()).map(new));
                }
                // It is of no use here.
                (libc::SOL_SOCKET, SCM_PIDFD) if bytes >= size_of::<RawFd>() => drop(new(0)),
                _ => {}
            }
            header = libc::CMSG_NXTHDR(&message, header);
        }
    }
    if message.msg_flags & libc::MSG_CTRUNC != 0 {
        return Err(Error::LostFds);
    }
    match len {
        0 => Err(Error::Receive(io::ErrorKind::UnexpectedEof.into())),
        len => Ok((len, fds)),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::IntoRawFd;
    use std::thread;
    use std::time::Duration;

    use vmm_sys_util::eventfd::EventFd;

    use super::*;
    use crate::note::{Param, Range, Rights, Space, WorkName};
    use crate::schema::tests::{array, field, int, structure};
    use crate::schema::{Encoding, Kind, Type};

    fn note() -> Note {
        Note {
            mmio_size: 0x1000,
            nr_irqs: 2,
            compatible: vec!["kvm-bpf,test".to_string()],
            ranges: vec![Range {
                space: Space::Ports,
                region: 3,
                size: 8,
            }],
            works: vec![WorkName {
                index: 4,
                name: "save".to_string(),
            }],
            window: Some(Rights {
                read: true,
                write: false,
            }),
            ..Note::default()
        }
    }

    fn layout(value: Type) -> Layout {
        Layout {
            name: ".bss".to_string(),
            facts: Vec::new(),
            value,
            entries: 1,
            is_state: false,
            is_shared: false,
            runs_later: None,
        }
    }

    fn description() -> Description {
        let name = ".bss".to_string();
        Description {
            note: note(),
            read: true,
            write: false,
            works: vec![4],
            maps: vec![DescribedMap {
                name: name.clone(),
                info: MapInfo::default(),
            }],
            layouts: vec![layout(structure(
                vec![field("a", 0, array(int(4, Encoding::Unsigned), 3))],
                12,
            ))],
            initial: BTreeMap::from([(name, "0a00".to_string())]),
            given: Vec::new(),
        }
    }

    fn file() -> OwnedFd {
        fs::File::open("/dev/null").unwrap().into()
    }

    fn pair() -> (UnixStream, UnixStream) {
        let (one, other) = UnixStream::pair().unwrap();
        let limit = Some(Duration::from_secs(10));
        one.set_read_timeout(limit).unwrap();
        other.set_read_timeout(limit).unwrap();
        (one, other)
    }

    /// Whether somebody can still write to a pipe. A process that another test starts may have it
    /// for a moment, so it waits for the end.
    fn is_open(reader: &io::PipeReader, milliseconds: i32) -> bool {
        let mut poll = libc::pollfd {
            fd: reader.as_raw_fd(),
            events: 0,
            revents: 0,
        };
        // SAFETY: the kernel reads and writes one structure.
        unsafe { libc::poll(&mut poll, 1, milliseconds) == 0 || poll.revents & libc::POLLHUP == 0 }
    }

    /// Sends these bytes with the writing ends of as many pipes, and receives; then all pipes must
    /// be at their end.
    fn error_of(bytes: &[u8], pipes: usize) -> Error {
        let (one, other) = pair();
        let (mut readers, mut writers) = (Vec::new(), Vec::new());
        for _ in 0..pipes {
            let (reader, writer) = io::pipe().unwrap();
            readers.push(reader);
            writers.push(writer);
        }
        let fds: Vec<_> = writers.iter().map(AsFd::as_fd).collect();
        let sent = send_with_fds(&one, &bytes[..bytes.len().min(HEADER_LEN)], &fds).unwrap();
        drop(fds);
        drop(writers);
        let rest = bytes[sent..].to_vec();
        // More than the socket has room for; the other end may go before it has read all.
        let rest = thread::spawn(move || drop(send_all(&one, &rest)));
        let error = Programs::recv(&other).unwrap_err();
        drop(other);
        rest.join().unwrap();
        for reader in &readers {
            assert!(!is_open(reader, 5000), "leaked after {error}");
        }
        error
    }

    #[test]
    fn a_description_comes_back() {
        let bytes = description().to_bytes().unwrap();
        let (header, json) = bytes.split_first_chunk().unwrap();
        assert_eq!(len_behind(header).unwrap(), json.len());
        let back = Description::from_json(json).unwrap();
        assert_eq!(back.note, note());
        assert_eq!(back.layouts, description().layouts);
        assert_eq!(back.names(), ["read", "work4", "map0"]);
        assert_eq!(back.to_bytes().unwrap(), bytes);
    }

    /// Parameters are told only where there are such: who knows none can read the rest.
    #[test]
    fn parameters_that_are_given_go_along() {
        let json = |this: &Description| {
            let bytes = this.to_bytes().unwrap();
            String::from_utf8(bytes[HEADER_LEN..].to_vec()).unwrap()
        };
        let without = json(&description());
        for word in ["params", "given"] {
            assert!(!without.contains(word), "{word} in {without}");
        }
        let mut this = description();
        let params = [("clock", true), ("table", false)];
        this.note.params = params
            .map(|(name, required)| Param {
                name: name.to_string(),
                required,
            })
            .to_vec();
        this.given = vec!["clock".to_string()];
        let text = json(&this);
        let back = Description::from_json(text.as_bytes()).unwrap();
        assert_eq!((back.note, back.given), (this.note, this.given));
        let odd = text.replace(r#""given":["clock"]"#, r#""given":["clocks"]"#);
        let error = Description::from_json(odd.as_bytes()).unwrap_err();
        assert_eq!(error.to_string(), "map clocks: given, and no parameter");
    }

    #[test]
    fn file_descriptors_go_over() {
        let (one, other) = pair();
        let (reader, writer) = io::pipe().unwrap();
        let fds: Vec<_> = (0..MAX_FDS).map(|_| reader.as_fd()).collect();
        assert_eq!(send_with_fds(&one, b"x", &fds).unwrap(), 1);
        let mut byte = [0; 4];
        let (len, got) = receive_with_fds(&other, &mut byte).unwrap();
        assert_eq!((len, byte[0], got.len()), (1, b'x', MAX_FDS));
        for fd in &got {
            // SAFETY: asks for flags.
            let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFD) };
            assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
        }
        (&writer).write_all(b"y").unwrap();
        let mut byte = [0];
        let mut file = fs::File::from(got.into_iter().next().unwrap());
        file.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"y");
        let too_many: Vec<_> = (0..=MAX_FDS).map(|_| reader.as_fd()).collect();
        assert!(send_with_fds(&one, b"x", &too_many).is_err());
    }

    #[test]
    fn a_leak_would_be_seen() {
        let (reader, writer) = io::pipe().unwrap();
        let (one, other) = pair();
        send_with_fds(&one, b"x", &[writer.as_fd()]).unwrap();
        drop(writer);
        let (_, fds) = receive_with_fds(&other, &mut [0]).unwrap();
        assert!(is_open(&reader, 0));
        drop(fds);
        assert!(!is_open(&reader, 5000));
    }

    #[test]
    fn nothing_leaks_and_errors_are_precise() {
        let good = description().to_bytes().unwrap();
        let header = |version: u32, len: u32| {
            let words = [version.to_le_bytes(), len.to_le_bytes()];
            [&MAGIC[..], &words.concat()].concat()
        };
        let with_json = |json: &str| {
            let mut bytes = header(VERSION, json.len() as u32);
            bytes.extend(json.as_bytes());
            bytes
        };
        let json = String::from_utf8(good[HEADER_LEN..].to_vec()).unwrap();
        for (what, bytes, fds, words) in [
            ("nothing", vec![0], 1, "cannot receive"),
            (
                "another protocol",
                b"GET / HTTP/1.1\r\n\r\n".to_vec(),
                3,
                "no description",
            ),
            ("version 0", header(0, 0), 1, "no description"),
            ("the future", header(2, 0), 1, "version 2"),
            ("too long", header(1, u32::MAX), 1, "bytes of a description"),
            ("half", good[..good.len() / 2].to_vec(), 3, "cannot receive"),
            (
                "no file descriptors",
                good.clone(),
                0,
                "0 file descriptors came",
            ),
            ("too few", good.clone(), 2, "2 file descriptors came"),
            ("too many", good.clone(), 253, "253 file descriptors came"),
            ("no programs", good.clone(), 3, "read: no eBPF program"),
            ("no JSON", with_json("{"), 3, "cannot be used"),
            ("deep", with_json(&"[".repeat(1000)), 3, "cannot be used"),
            (
                "large",
                with_json(&",".repeat(MAX_VALUES + 1)),
                3,
                "cannot be used",
            ),
            (
                "a field that is not known",
                with_json(&json.replace("\"read\"", "\"reads\"")),
                3,
                "cannot be used",
            ),
            (
                "a bad note",
                with_json(&json.replace("\"nr_irqs\":2", "\"nr_irqs\":257")),
                3,
                "cannot be used",
            ),
            (
                "types without a map",
                with_json(
                    &json.replace("\"maps\":[{\"name\":\".bss\"", "\"maps\":[{\"name\":\"x\""),
                ),
                3,
                "described, and not there",
            ),
        ] {
            let error = error_of(&bytes, fds);
            let text = error.to_string();
            assert!(text.contains(words), "{what}: wanted {words:?}, got {text}");
        }
    }

    /// Whatever byte is another one: an error, and no file descriptor is left.
    #[test]
    fn survives_every_flipped_byte() {
        let good = description().to_bytes().unwrap();
        for at in 0..good.len() {
            for flip in [1, 0x80] {
                let mut bad = good.clone();
                bad[at] ^= flip;
                error_of(&bad, 3);
            }
        }
    }

    #[test]
    fn limits_hold() {
        let mut many = description();
        many.maps = (0..=MAX_MAPS)
            .map(|at| DescribedMap {
                name: format!("{at}"),
                info: MapInfo::default(),
            })
            .collect();
        let error = many.check().unwrap_err();
        assert_eq!(error.to_string(), "129 maps, more than 128");
        let refused = |ty: Type| {
            let mut this = description();
            this.layouts = vec![layout(ty)];
            this.check().is_err()
        };
        let number = || int(4, Encoding::Unsigned);
        let mut deep = number();
        for _ in 0..40 {
            deep = structure(vec![field("a", 0, deep)], 4);
        }
        assert!(refused(deep));
        let mut far = field("a", 0, number());
        far.offset = usize::MAX;
        assert!(refused(structure(vec![far], 4)));
        let mut long = array(number(), 1);
        long.kind = Kind::Array {
            count: usize::MAX,
            element: Box::new(number()),
        };
        assert!(refused(long));
        // Its lines would be many times longer than what came.
        let wide = |name: usize| {
            let fields = (0..5000).map(|_| field("a", 0, number())).collect();
            let name = "n".repeat(name);
            structure(vec![field(&name, 0, structure(fields, 4))], 4)
        };
        assert!(refused(wide(10_000)));
        // One is not too long, and all together are.
        assert!(!refused(wide(1000)));
        let mut all = description();
        all.layouts = vec![layout(wide(1000)); 4];
        let error = all.check().unwrap_err().to_string();
        assert!(
            error.ends_with("hold too much with those before"),
            "{error}"
        );
    }

    #[test]
    fn a_map_must_be_one() {
        let fds = vec![file(), file(), file()];
        let mut this = description();
        (this.read, this.works) = (false, Vec::new());
        let error = this.with_fds(fds, IN_PROC).unwrap_err();
        assert_eq!(
            error.to_string(),
            "3 file descriptors came, and the description has 1"
        );
        let mut this = description();
        (this.read, this.works) = (false, Vec::new());
        let error = this.with_fds(vec![file()], IN_PROC).unwrap_err();
        assert_eq!(error.to_string(), "map .bss: no eBPF map");
        // An eventfd, which has no name either, where nobody says what it is.
        let mut this = description();
        (this.read, this.works) = (false, Vec::new());
        let eventfd = EventFd::new(0).unwrap();
        // SAFETY: its descriptor is open, and nobody else's from here on.
        let eventfd = unsafe { OwnedFd::from_raw_fd(eventfd.into_raw_fd()) };
        let nobody: Ask = |_| Err(io::ErrorKind::NotFound.into());
        let error = this.with_fds(vec![eventfd], nobody).unwrap_err();
        assert!(matches!(error, Error::Unconfirmed { .. }), "{error}");
    }

    #[test]
    fn a_directory_without_pins_is_none() {
        let error = Programs::from_pinned(Path::new("/nonexistent")).unwrap_err();
        assert!(matches!(error, Error::Open { .. }), "{error}");
    }
}
