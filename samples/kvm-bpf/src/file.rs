// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Files that others name: regular ones only.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
#[cfg(any(feature = "loader", feature = "serde"))]
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

/// Opens a file to read, if it is a regular one.
///
/// Others may have no end, wait for a writer, or do something because they are opened.
pub fn open_regular(path: &Path) -> io::Result<File> {
    open_regular_to(File::options().read(true), path)
}

/// Opens a file with these options, if it is a regular one.
pub fn open_regular_to(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let check = |metadata: Metadata| {
        let kind = metadata.file_type();
        let kind = match kind {
            _ if kind.is_file() => return Ok(()),
            _ if kind.is_dir() => "a directory",
            _ if kind.is_char_device() => "a character device",
            _ if kind.is_block_device() => "a block device",
            _ if kind.is_fifo() => "a pipe",
            _ => "a socket",
        };
        let message = format!("not a regular file, but {kind}");
        Err(io::Error::new(io::ErrorKind::InvalidInput, message))
    };
    check(fs::metadata(path)?)?;
    // It may have become another one since: then this does not wait.
    let file = options.custom_flags(libc::O_NONBLOCK).open(path)?;
    check(file.metadata()?)?;
    Ok(file)
}

/// Reads so many bytes of a regular file, or all that it has.
#[cfg(any(feature = "loader", feature = "serde"))]
pub(crate) fn read_start(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open_regular(path)?.take(max).read_to_end(&mut bytes)?;
    Ok(bytes)
}
