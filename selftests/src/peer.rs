// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Another process: this program again, which is told its role and gets fds over a socket.

use std::fs::File;
use std::os::fd::{AsFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::process::{Child, Command, Stdio};
use std::{env, io};

use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Before its role.
const PEER: &str = "--peer";

/// How many fds a message has at most.
const MOST_FDS: usize = 3;

/// What this process is to be, if it is the other one.
pub fn role() -> Option<String> {
    env::args().skip_while(|arg| arg != PEER).nth(1)
}

/// Two ends of a connection. It is not a stream, which wakes who waits to read when the other end
/// has taken what was sent last: that costs a quarter more, and says nothing of messages.
fn socket_pair() -> [UnixDatagram; 2] {
    let mut fds = [-1; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: the array is a local.
    let result = unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) };
    assert_eq!(result, 0, "socketpair");
    // SAFETY: both fds are new, and nobody else's.
    fds.map(|fd| unsafe { UnixDatagram::from_raw_fd(fd) })
}

/// The other process, which has of this one what came over the socket; dropping it ends it.
#[derive(Debug)]
pub struct Peer {
    child: Child,
    socket: UnixDatagram,
}

impl Peer {
    /// Starts it and sends it those fds.
    pub fn new(role: &str, fds: &[RawFd]) -> Self {
        let [socket, theirs] = socket_pair();
        let child = Command::new("/proc/self/exe")
            .args([PEER, role])
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .spawn()
            .expect("another process");
        send_fds(&socket, fds).expect("fds over a socket");
        Peer { child, socket }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// This end of the connection.
    pub fn socket(&self) -> &UnixDatagram {
        &self.socket
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.child.kill().expect("the end of our own process");
        self.child.wait().expect("its status");
    }
}

/// The other process's end of the connection, and the fds that it was sent. From now on it ends
/// with this one.
pub fn connect() -> io::Result<(UnixDatagram, impl Iterator<Item = File>)> {
    // SAFETY: no memory is involved.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    let socket = UnixDatagram::from(io::stdin().as_fd().try_clone_to_owned()?);
    let fds = receive_fds(&socket)?;
    Ok((socket, fds.into_iter()))
}

/// Sends a message of one byte with fds.
pub fn send_fds(socket: &UnixDatagram, fds: &[RawFd]) -> io::Result<()> {
    socket.send_with_fds(&[&[0][..]], fds)?;
    Ok(())
}

/// Receives it.
pub fn receive_fds(socket: &UnixDatagram) -> io::Result<Vec<File>> {
    let mut byte = [0_u8];
    let mut parts = [libc::iovec {
        iov_base: byte.as_mut_ptr().cast(),
        iov_len: byte.len(),
    }];
    let mut fds = [-1; MOST_FDS];
    // SAFETY: the part is that of a local array.
    let (_, count) = unsafe { socket.recv_with_fds(&mut parts, &mut fds)? };
    // SAFETY: so many fds are new, and nobody else's.
    let file = |fd| unsafe { File::from_raw_fd(fd) };
    Ok(fds[..count].iter().copied().map(file).collect())
}

/// An fd that was received, which is that of an eventfd.
pub fn eventfd(file: File) -> EventFd {
    // SAFETY: the fd is this one's, and an eventfd's according to who sent it.
    unsafe { EventFd::from_raw_fd(file.into_raw_fd()) }
}
