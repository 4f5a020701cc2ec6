// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The end of a process.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// Waits so long, or until the process ends.
pub fn wait(pid: u32, time: Duration) -> io::Result<()> {
    // SAFETY: there are no pointers.
    let fd = match unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) } {
        -1 => return Err(io::Error::last_os_error()),
        // SAFETY: it is new.
        fd => unsafe { OwnedFd::from_raw_fd(fd as i32) },
    };
    let end = Instant::now() + time;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let mut poll = libc::pollfd {
            fd: fd.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // Rounded up: less than a millisecond must not become a loop.
        let timeout = left.as_nanos().div_ceil(1_000_000) as i32;
        // SAFETY: one structure, which lives.
        match unsafe { libc::poll(&mut poll, 1, timeout) } {
            -1 if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            -1 => return Err(io::Error::last_os_error()),
            _ => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn until_the_end_or_the_time() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let start = Instant::now();
        wait(child.id(), Duration::from_millis(20)).unwrap();
        assert!(start.elapsed() >= Duration::from_millis(20));
        child.kill().unwrap();
        wait(child.id(), Duration::from_secs(60)).unwrap();
        assert!(start.elapsed() < Duration::from_secs(30));
        child.wait().unwrap();
        assert!(wait(child.id(), Duration::ZERO).is_err());
    }
}
