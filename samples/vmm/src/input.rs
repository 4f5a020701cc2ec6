// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What drives the inputs of a device: lines of text, `LINE LEVEL` with numbers, from a pipe or a
//! regular file. LEVEL is 0 or 1.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Sender};
use std::thread;

use crate::vm::{Error, Event};

/// Bytes of a line, with its end: more than two numbers need.
const LINE_MAX: u64 = 64;

/// An input of a device that is to be at a level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Input {
    /// Which of the device's inputs.
    pub line: u32,
    /// High or low.
    pub level: bool,
}

/// Where a device's inputs come from.
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    is_pipe: bool,
}

impl Source {
    /// Checks that the file is a pipe or a regular one.
    pub fn new(path: &Path) -> io::Result<Self> {
        let kind = path.metadata()?.file_type();
        if !kind.is_file() && !kind.is_fifo() {
            let message = "neither a pipe nor a regular file";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        Ok(Source {
            path: path.to_path_buf(),
            is_pipe: kind.is_fifo(),
        })
    }

    /// Begins to send what is in the file as events of that device, each when the one before is
    /// done.
    pub fn start(self, device: usize, sender: Sender<Event>) -> Result<(), Error> {
        thread::Builder::new()
            .name("input".to_string())
            .spawn(move || {
                if let Err(error) = self.send_all(device, &sender) {
                    crate::print_error("input", &Error::Input(self.path, error));
                }
            })
            .map_err(Error::Thread)?;
        Ok(())
    }

    /// Sends all until the end, or until nobody listens any more.
    fn send_all(&self, device: usize, sender: &Sender<Event>) -> io::Result<()> {
        // A pipe that is open for writing too has no end, so that one writer can follow another.
        let mut options = File::options();
        let file = options.read(true).write(self.is_pipe).open(&self.path)?;
        let mut from = BufReader::new(file);
        while let Some(input) = next(&mut from)? {
            // One for each event: so it is known when one is dropped.
            let (done, is_done) = mpsc::channel();
            let event = Event::Input {
                device,
                input,
                done,
            };
            if sender.send(event).is_err() || is_done.recv().is_err() {
                break;
            }
        }
        Ok(())
    }
}

/// Reads a line; `None` at the end.
fn next(from: &mut impl BufRead) -> io::Result<Option<Input>> {
    let mut line = Vec::new();
    from.take(LINE_MAX).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Ok(None);
    }
    let text = String::from_utf8_lossy(&line);
    let text = text.trim_end();
    let wrong = || {
        let message = format!("{text:?} is not LINE LEVEL");
        io::Error::new(io::ErrorKind::InvalidData, message)
    };
    let (line, level) = text.split_once(' ').ok_or_else(wrong)?;
    Ok(Some(Input {
        line: line.parse().map_err(|_| wrong())?,
        level: match level {
            "0" => false,
            "1" => true,
            _ => return Err(wrong()),
        },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_two_numbers() {
        let mut text = &b"0 1\n7 0\n4294967295 1"[..];
        for wanted in [(0, true), (7, false), (u32::MAX, true)] {
            let input = next(&mut text).unwrap().unwrap();
            assert_eq!((input.line, input.level), wanted);
        }
        assert_eq!(next(&mut text).unwrap(), None);
        for bad in [
            "\n",
            "1\n",
            "1 2\n",
            "1 1 1\n",
            "-1 0\n",
            "4294967296 0\n",
            " 1 0\n",
        ] {
            assert!(next(&mut bad.as_bytes()).is_err(), "{bad:?}");
        }
        let endless = "0".repeat(1000);
        let mut text = endless.as_bytes();
        assert!(next(&mut text).is_err());
        assert_eq!(text.len(), 1000 - LINE_MAX as usize);
    }

    #[test]
    fn files_are_pipes_or_regular() {
        assert!(Source::new(Path::new("/dev/zero")).is_err());
        assert!(Source::new(Path::new("/")).is_err());
        assert!(Source::new(Path::new("/nowhere")).is_err());
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap();
        assert!(!Source::new(file.as_path()).unwrap().is_pipe);
    }
}
