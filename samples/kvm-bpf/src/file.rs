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
    open_regular_to(File::options().read(true), 0, path)
}

/// Opens a file with these options and flags of open(2), if it is a regular one.
///
/// The flags, 0 for none, take the place of those that the options have by
/// [`OpenOptionsExt::custom_flags`].
pub fn open_regular_to(
    options: &mut OpenOptions,
    flags: libc::c_int,
    path: &Path,
) -> io::Result<File> {
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
    let file = options.custom_flags(flags | libc::O_NONBLOCK).open(path)?;
    check(file.metadata()?)?;
    Ok(file)
}

/// Writes a file that only its owner may read; it has its name once it is whole and on the disk. It
/// takes the place of a file that has the name.
///
/// Until then it is in a file of the same name with `.new` behind it, which goes on an error. One
/// that is there already goes too. `failed` makes an error of the kernel's.
pub fn write_whole<E>(
    path: &Path,
    failed: impl Fn(io::Error) -> E,
    write: impl FnOnce(&File) -> Result<(), E>,
) -> Result<(), E> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let new = Path::new(&new);
    // One of an earlier process, or a link that leads elsewhere. There may be none.
    let _ = fs::remove_file(new);
    let file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(new)
        .map_err(&failed)?;
    let written = write(&file).and_then(|()| {
        // Nothing of it may be missing where it has its name.
        file.sync_all()
            .and_then(|()| fs::rename(new, path))
            .map_err(&failed)
    });
    written.inspect_err(|_| drop(fs::remove_file(new)))
}

/// Reads so many bytes of a regular file, or all that it has.
#[cfg(any(feature = "loader", feature = "serde"))]
pub(crate) fn read_start(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open_regular(path)?.take(max).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use vmm_sys_util::tempdir::TempDir;

    use super::*;

    #[test]
    fn flags_are_the_callers() {
        let dir = TempDir::new().unwrap();
        let [file, link] = ["file", "link"].map(|name| dir.as_path().join(name));
        fs::write(&file, "x").unwrap();
        symlink(&file, &link).unwrap();
        let open = |flags| open_regular_to(File::options().read(true), flags, &link);
        open(0).unwrap();
        let error = open(libc::O_NOFOLLOW).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
    }

    #[test]
    fn a_file_is_whole_or_the_old_one() {
        let dir = TempDir::new().unwrap();
        let [path, new, other] = ["file", "file.new", "other"].map(|name| dir.as_path().join(name));
        fs::write(&path, "old").unwrap();
        fs::write(&other, "other").unwrap();
        // Nobody else's file is written.
        symlink(&other, &new).unwrap();
        let failed = write_whole(
            &path,
            |error| error,
            |mut file| {
                file.write_all(b"half")?;
                Err(io::Error::other("no more"))
            },
        );
        assert_eq!(failed.unwrap_err().to_string(), "no more");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert!(!new.exists());

        write_whole(&path, |error| error, |mut file| file.write_all(b"whole")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"whole");
        assert_eq!(fs::read(&other).unwrap(), b"other");
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(!new.exists());
    }
}
