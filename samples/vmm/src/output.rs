// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Output that holds nobody up: what is not taken is dropped.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use crate::lock;

/// How many bytes wait for whoever takes them; as many more may be on their way.
const CAPACITY: usize = 64 << 10;

/// How long the end waits for one who takes nothing.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long bytes wait for more: a guest writes one at a time, and waking a thread for each takes
/// longer than that.
const DELAY: Duration = Duration::from_millis(2);

#[derive(Default)]
struct State {
    waiting: Vec<u8>,
    /// How many bytes have been given to this, how many of them were not dropped, and how many
    /// of those are written.
    given: u64,
    kept: u64,
    written: u64,
    /// Writing has failed, as it does when the reader is gone.
    closed: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// Where to write to without ever waiting; a thread writes it on. A clone writes to the same.
#[derive(Clone)]
pub struct Output(Arc<Shared>);

impl Output {
    /// Starts the thread that writes to `to`.
    pub fn new(name: &str, to: impl Write + Send + 'static) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let writer = shared.clone();
        thread::Builder::new()
            .name(name.to_string())
            .spawn(move || write_on(&writer, to))?;
        Ok(Output(shared))
    }

    /// Waits until all is written, or nothing is taken any more; returns how many bytes are lost.
    pub fn finish(&self) -> u64 {
        let mut state = lock(&self.0.state);
        while !state.closed && state.written < state.kept {
            let written = state.written;
            let waited = self.0.changed.wait_timeout(state, PATIENCE);
            let (next, timeout) = waited.unwrap_or_else(|e| e.into_inner());
            state = next;
            if timeout.timed_out() && state.written == written {
                break;
            }
        }
        state.given - state.written
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = lock(&self.0.state);
        let room = match state.closed {
            true => 0,
            false => bytes.len().min(CAPACITY - state.waiting.len()),
        };
        if state.waiting.is_empty() {
            self.0.changed.notify_all();
        }
        state.waiting.extend(&bytes[..room]);
        state.given += bytes.len() as u64;
        state.kept += room as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes what is waiting, for ever.
fn write_on(shared: &Shared, mut to: impl Write) {
    loop {
        let mut state = lock(&shared.state);
        while state.waiting.is_empty() {
            let waited = shared.changed.wait(state);
            state = waited.unwrap_or_else(|e| e.into_inner());
        }
        drop(state);
        thread::sleep(DELAY);
        let mut state = lock(&shared.state);
        let bytes = std::mem::take(&mut state.waiting);
        drop(state);
        // In parts, so that a slow reader is told from one that takes nothing.
        for part in bytes.chunks(1024) {
            let result = to.write_all(part).and_then(|()| to.flush());
            let mut state = lock(&shared.state);
            match result {
                Ok(()) => state.written += part.len() as u64,
                Err(_) => state.closed = true,
            }
            shared.changed.notify_all();
            if state.closed {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, pipe};
    use std::time::Instant;

    use super::*;

    #[test]
    fn all_that_is_taken_arrives() {
        let (mut reader, writer) = pipe().unwrap();
        let mut output = Output::new("test", writer).unwrap();
        let bytes: Vec<u8> = (0..CAPACITY).map(|at| at as u8).collect();
        let reading = thread::spawn(move || {
            let mut got = vec![0; CAPACITY];
            reader.read_exact(&mut got).unwrap();
            got
        });
        for part in bytes.chunks(100) {
            output.write_all(part).unwrap();
        }
        assert_eq!(output.finish(), 0);
        assert_eq!(reading.join().unwrap(), bytes);
    }

    #[test]
    fn what_nobody_takes_is_dropped() {
        const PARTS: usize = 16;

        let (mut reader, writer) = pipe().unwrap();
        let mut output = Output::new("test", writer).unwrap();
        let start = Instant::now();
        for _ in 0..PARTS {
            output.write_all(&[b'x'; CAPACITY]).unwrap();
            thread::sleep(10 * DELAY);
        }
        let lost = output.finish() as usize;
        assert!(start.elapsed() < 10 * PATIENCE, "{:?}", start.elapsed());
        // The pipe, what the thread has taken, and what waits for it, are full.
        assert!(
            ((PARTS - 4) * CAPACITY..PARTS * CAPACITY).contains(&lost),
            "{lost} bytes lost"
        );

        // It goes on when someone takes it; the thread ends as the pipe does.
        let mut got = vec![0; 2 * CAPACITY];
        reader.read_exact(&mut got).unwrap();
        assert!(got.iter().all(|&byte| byte == b'x'));
        drop(reader);
        let lost = output.finish();
        output.write_all(b"y").unwrap();
        assert_eq!(output.finish(), lost + 1);
    }
}
