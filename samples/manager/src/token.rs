// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A user namespace with a BPF token: the right to load devices, and no capability of the host.
//!
//! A token comes from a bpf file system that belongs to the namespace. What it allows is written
//! there by somebody who has `CAP_SYS_ADMIN` on the host: a process that is left behind for that.

use std::ffi::{CStr, c_char};
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process;
use std::ptr;

use libbpf_rs::libbpf_sys::{bpf_map_create_opts, size_t};
use libbpf_rs::{MapHandle, MapType};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::Result;

/// Where libbpf finds the bpf file system whose token it takes.
const PATH_VARIABLE: &str = "LIBBPF_BPF_TOKEN_PATH";

/// What the token allows. libbpf probes the kernel with socket filters.
const DELEGATED: [(&CStr, &CStr); 4] = [
    (c"delegate_cmds", c"prog_load:map_create:btf_load"),
    (
        c"delegate_maps",
        c"array:percpu_array:hash:percpu_hash:lru_hash:lpm_trie:prog_array:array_of_maps:\
        hash_of_maps:ringbuf",
    ),
    (
        c"delegate_progs",
        c"kvm_io_read:kvm_io_write:kvm_io_work:socket_filter",
    ),
    // Attach type 0, which programs of these types have.
    (c"delegate_attachs", c"0x1"),
];

/// Every user keeps its number. A user without one would look like another one without.
const EVERY_ID: &str = "0 0 4294967295\n";

/// Moves this process, which has a single thread, to a user namespace where libbpf finds a token.
///
/// It has all capabilities there afterwards, and none on the host.
pub fn enter() -> Result<()> {
    // libbpf asks once whether the kernel knows names, and not with a token: it would give none to
    // what it loads.
    let options = bpf_map_create_opts {
        sz: size_of::<bpf_map_create_opts>() as size_t,
        ..Default::default()
    };
    MapHandle::create(MapType::Array, Some("names"), 4, 4, 1, &options)?;
    let manager = process::id();
    let (mut here, there) = UnixStream::pair()?;
    // SAFETY: there are no other threads, so the child may do all that this process may.
    let child = unsafe { libc::fork() };
    check(child)?;
    if child == 0 {
        drop(here);
        if let Err(error) = delegate(manager, there) {
            eprintln!("kvm-bpf-manager: cannot delegate BPF: {error}");
        }
        // SAFETY: ends the child, and nothing of its parent's.
        unsafe { libc::_exit(0) };
    }
    drop(there);
    // SAFETY: gives this process namespaces of its own.
    check(unsafe { libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS) })?;
    // SAFETY: a string, and no flags.
    let context = owned(unsafe { libc::syscall(libc::SYS_fsopen, c"bpf".as_ptr(), 0) })?;
    here.send_with_fd(&[0_u8][..], context.as_raw_fd())
        .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
    // It ends without a word where it has failed.
    let delegated = here.read_exact(&mut [0]);
    // SAFETY: the child is ours, and nobody wants its status.
    unsafe { libc::waitpid(child, ptr::null_mut(), 0) };
    delegated.map_err(|_| "nobody has delegated BPF")?;
    let context = context.as_raw_fd();
    // SAFETY: numbers only.
    let root = owned(unsafe { libc::syscall(libc::SYS_fsmount, context, 0, 0) })?;
    // It is mounted nowhere, and stays as long as it is open.
    let path = format!("/proc/self/fd/{}", root.into_raw_fd());
    // SAFETY: there are no other threads.
    unsafe { std::env::set_var(PATH_VARIABLE, path) };
    Ok(())
}

/// What the process that is left behind does: it has the host's rights.
fn delegate(manager: u32, mut stream: UnixStream) -> Result<()> {
    let (_, context) = stream
        .recv_with_fd(&mut [0_u8][..])
        .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
    let context = context.ok_or("the manager has ended")?;
    for map in ["uid_map", "gid_map"] {
        fs::write(format!("/proc/{manager}/{map}"), EVERY_ID)?;
    }
    let configure = |command: u32, key: *const c_char, value: *const c_char| {
        let fd = context.as_raw_fd();
        // SAFETY: key and value are strings, or not there.
        check(unsafe { libc::syscall(libc::SYS_fsconfig, fd, command, key, value, 0) })
    };
    for (key, value) in DELEGATED {
        configure(FSCONFIG_SET_STRING, key.as_ptr(), value.as_ptr())
            .map_err(|error| format!("{key:?}: {error}"))?;
    }
    configure(FSCONFIG_CMD_CREATE, ptr::null(), ptr::null())?;
    Ok(stream.write_all(&[0])?)
}

/// `enum fsconfig_command`
const FSCONFIG_SET_STRING: u32 = 1;
/// `enum fsconfig_command`
const FSCONFIG_CMD_CREATE: u32 = 6;

fn check(result: impl Into<i64>) -> io::Result<()> {
    match result.into() {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    check(fd)?;
    // SAFETY: it is new.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Refuses users who cannot be told from others: in a user namespace, all users of the host without
/// a number there have the same one.
pub fn refuse_ambiguous(allowed: &[libc::uid_t]) -> Result<()> {
    let map = fs::read_to_string("/proc/self/uid_map")?;
    let overflow = fs::read_to_string("/proc/sys/kernel/overflowuid")?;
    let overflow = overflow.trim().parse()?;
    if allowed.contains(&overflow) && !has_every_id(&map) {
        let why = "stands for all users without a number in this user namespace";
        return Err(format!("cannot allow user {overflow}, who {why}").into());
    }
    Ok(())
}

/// Whether a user namespace has a number for each user.
fn has_every_id(map: &str) -> bool {
    let lengths = map
        .lines()
        .filter_map(|line| line.split_whitespace().nth(2));
    let lengths = lengths.filter_map(|length| length.parse::<u64>().ok());
    lengths.sum::<u64>() >= u32::MAX.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_with_every_user() {
        assert!(has_every_id("         0          0 4294967295\n"));
        assert!(has_every_id("0 1 4294967294\n4294967294 0 1\n"));
        for map in [
            "",
            "0 0 1\n",
            "0 0 65536\n",
            "0 0 4294967294\n",
            "0 100000 65536\n65536 0 1\n",
        ] {
            assert!(!has_every_id(map), "{map:?}");
        }
        assert!(has_every_id(EVERY_ID));
    }
}
