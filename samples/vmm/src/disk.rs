// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A virtio block device (virtio 1.3, 5.2) on a file, whose queue a thread of this process serves.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use kvm_bpf::file::open_regular_to;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::{Reader, Writer};
use vm_memory::{Le32, Le64};

use crate::virtio::{Kind, Request};

const SECTOR: u64 = 512;
/// How much is copied in one go.
const CHUNK: usize = 64 * 1024;
const QUEUE_MAX: u16 = 128;
/// A request has a header and a status besides.
const SEG_MAX: u32 = QUEUE_MAX as u32 - 2;
const ID: &str = "kvm-bpf-vmm";

/// A disk.
#[derive(Debug)]
pub struct Disk {
    file: File,
    sectors: u64,
    /// What is copied.
    buffer: Box<[u8]>,
    /// Makes what is written stable; another one in tests.
    sync: fn(&File) -> io::Result<()>,
}

impl Disk {
    /// A disk of the file's whole sectors.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = open_regular_to(File::options().read(true).write(true), 0, path)?;
        let sectors = file.metadata()?.len() / SECTOR;
        if sectors == 0 {
            let message = format!("it has no whole sector, which is {SECTOR} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        Ok(Disk {
            file,
            sectors,
            buffer: vec![0; CHUNK].into(),
            sync: File::sync_data,
        })
    }

    /// What its driver is told.
    pub fn kind(&self) -> Kind {
        let mut config = self.sectors.to_le_bytes().to_vec();
        // Behind a "size_max" that means nothing without its feature.
        config.extend([0; 4]);
        config.extend(SEG_MAX.to_le_bytes());
        Kind {
            id: VIRTIO_ID_BLOCK,
            features: 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_FLUSH,
            config,
            queue_max: QUEUE_MAX,
        }
    }

    /// Does what a request says. Returns how many bytes it wrote for the driver, or none if it is
    /// no request.
    pub fn serve(&mut self, mut request: Request<'_>) -> Option<u32> {
        let chain = request.chain.clone();
        let mut from: Reader<'_> = chain.clone().reader(request.memory).ok()?;
        let mut to: Writer<'_> = chain.writer(request.memory).ok()?;
        let kind = from.read_obj::<Le32>().ok()?.to_native();
        let _priority: Le32 = from.read_obj().ok()?;
        let sector = from.read_obj::<Le64>().ok()?.to_native();
        let mut status_to = to.split_at(to.available_bytes().checked_sub(1)?).ok()?;
        let done = match kind {
            VIRTIO_BLK_T_IN => self.read(sector, &mut to),
            VIRTIO_BLK_T_OUT => self
                .write(sector, &mut from)
                // A driver that cannot flush takes what is written for stable.
                .and_then(|()| match request.features & 1 << VIRTIO_BLK_F_FLUSH {
                    0 => self.flush(&mut request),
                    _ => Ok(()),
                }),
            VIRTIO_BLK_T_FLUSH => self.flush(&mut request),
            VIRTIO_BLK_T_GET_ID => {
                let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
                id[..ID.len()].copy_from_slice(ID.as_bytes());
                to.write_all(&id)
            }
            _ => Err(io::ErrorKind::Unsupported.into()),
        };
        let status = match done {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(error) if error.kind() == io::ErrorKind::Unsupported => VIRTIO_BLK_S_UNSUPP,
            Err(_) => VIRTIO_BLK_S_IOERR,
        };
        status_to.write_obj(status as u8).ok()?;
        u32::try_from(to.bytes_written() + 1).ok()
    }

    fn read(&mut self, sector: u64, to: &mut Writer<'_>) -> io::Result<()> {
        let mut at = self.range(sector, to.available_bytes())?;
        while to.available_bytes() > 0 {
            let len = to.available_bytes().min(CHUNK);
            self.file.read_exact_at(&mut self.buffer[..len], at)?;
            to.write_all(&self.buffer[..len])?;
            at += len as u64;
        }
        Ok(())
    }

    fn write(&mut self, sector: u64, from: &mut Reader<'_>) -> io::Result<()> {
        let mut at = self.range(sector, from.available_bytes())?;
        while from.available_bytes() > 0 {
            let len = from.available_bytes().min(CHUNK);
            from.read_exact(&mut self.buffer[..len])?;
            self.file.write_all_at(&self.buffer[..len], at)?;
            at += len as u64;
        }
        Ok(())
    }

    fn flush(&self, request: &mut Request<'_>) -> io::Result<()> {
        request.announce_others();
        (self.sync)(&self.file)
    }

    /// Where in the file so many bytes begin, which are whole sectors that are there.
    fn range(&self, sector: u64, len: usize) -> io::Result<u64> {
        let len = len as u64;
        let left = self.sectors.checked_sub(sector);
        if !len.is_multiple_of(SECTOR) || left.is_none_or(|left| len / SECTOR > left) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(sector * SECTOR)
    }
}

#[cfg(test)]
mod tests {
    use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_STATUS};
    use vmm_sys_util::tempfile::TempFile;

    use super::*;
    use crate::virtio::driver::Driver;

    /// Sectors of the disk, and what is in the last one.
    const SECTORS: u64 = 300;
    const LAST: u8 = 0x77;

    fn driver() -> (Driver, TempFile) {
        driver_with(File::sync_data)
    }

    fn driver_with(sync: fn(&File) -> io::Result<()>) -> (Driver, TempFile) {
        let file = TempFile::new().unwrap();
        // Not all of it is whole sectors.
        file.as_file().set_len(SECTORS * SECTOR + 100).unwrap();
        let last = [LAST; SECTOR as usize];
        let at = (SECTORS - 1) * SECTOR;
        file.as_file().write_all_at(&last, at).unwrap();
        let mut disk = Disk::open(file.as_path()).unwrap();
        disk.sync = sync;
        let kind = disk.kind();
        let serve = move |request: Request<'_>| disk.serve(request);
        (Driver::new(kind, serve), file)
    }

    fn header(kind: u32, sector: u64) -> Vec<u8> {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        header
    }

    /// The status, and how many bytes came before.
    #[track_caller]
    fn status((written, bytes): (u32, Vec<u8>)) -> (u32, u32) {
        (u32::from(*bytes.last().unwrap()), written - 1)
    }

    #[test]
    fn what_is_written_is_read() {
        let (mut driver, file) = driver();
        let data: Vec<u8> = (0..3 * SECTOR).map(|at| (at % 251) as u8).collect();
        let out = header(VIRTIO_BLK_T_OUT, 5);
        let done = driver.request(&[&out, &data[..700], &data[700..]], &[1]);
        assert_eq!(status(done), (VIRTIO_BLK_S_OK, 0));
        let mut there = vec![0; data.len()];
        let at = 5 * SECTOR;
        file.as_file().read_exact_at(&mut there, at).unwrap();
        assert_eq!(there, data);

        // The header in pieces, the status behind data.
        let read = header(VIRTIO_BLK_T_IN, 5);
        let (written, bytes) = driver.request(&[&read[..3], &read[3..]], &[500, data.len() - 499]);
        assert_eq!(written as usize, data.len() + 1);
        assert_eq!(bytes.split_last(), Some((&0, &data[..])));

        // More than is copied in one go.
        let all = (SECTORS * SECTOR) as usize;
        let (written, bytes) = driver.request(&[&header(VIRTIO_BLK_T_IN, 0)], &[all, 1]);
        assert_eq!(written as usize, all + 1);
        assert_eq!(bytes[all - 1], LAST);
        let flush = driver.request(&[&header(VIRTIO_BLK_T_FLUSH, 0)], &[1]);
        assert_eq!(status(flush), (VIRTIO_BLK_S_OK, 0));
    }

    #[test]
    fn only_whole_sectors_that_are_there() {
        let (mut driver, file) = driver();
        for (sector, len) in [
            (SECTORS, 512),
            (SECTORS - 1, 1024),
            (u64::MAX, 512),
            (u64::MAX / 512 + 1, 512),
            (0, 511),
            (0, 513),
        ] {
            let read = driver.request(&[&header(VIRTIO_BLK_T_IN, sector)], &[len, 1]);
            assert_eq!(status(read), (VIRTIO_BLK_S_IOERR, 0), "{sector} {len}");
            let data = vec![1; len];
            let out = header(VIRTIO_BLK_T_OUT, sector);
            let done = driver.request(&[&out, &data], &[1]);
            assert_eq!(status(done), (VIRTIO_BLK_S_IOERR, 0), "{sector} {len}");
        }
        let end = file.as_file().metadata().unwrap().len();
        assert_eq!(end, SECTORS * SECTOR + 100);
    }

    /// What is not stable is an error of a flush, and of each write where the driver cannot flush.
    #[test]
    fn writes_are_stable_for_a_driver_without_flushes() {
        let (mut driver, _file) = driver_with(|_| Err(io::ErrorKind::Other.into()));
        let (out, flush) = (header(VIRTIO_BLK_T_OUT, 0), header(VIRTIO_BLK_T_FLUSH, 0));
        for (refused, wanted) in [
            (0, VIRTIO_BLK_S_OK),
            (1 << VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_IOERR),
        ] {
            driver.set(VIRTIO_MMIO_STATUS, 0);
            driver.start_without(refused);
            let done = driver.request(&[&out, &[1; 512]], &[1]);
            assert_eq!(status(done), (wanted, 0));
            let done = driver.request(&[&flush], &[1]);
            assert_eq!(status(done), (VIRTIO_BLK_S_IOERR, 0));
        }
    }

    #[test]
    fn other_requests() {
        let (mut driver, _file) = driver();
        let id = driver.request(&[&header(VIRTIO_BLK_T_GET_ID, 0)], &[20, 1]);
        assert!(id.1.starts_with(b"kvm-bpf-vmm\0"));
        assert_eq!(status(id), (VIRTIO_BLK_S_OK, 20));
        let unknown = driver.request(&[&header(99, 0)], &[1]);
        assert_eq!(status(unknown), (VIRTIO_BLK_S_UNSUPP, 0));
        // No header, and no place for a status.
        let all = header(VIRTIO_BLK_T_FLUSH, 0);
        for (parts, sizes) in [(&all[..7], &[1][..]), (&all, &[])] {
            driver.send(&[parts], sizes);
            assert_eq!(driver.interrupted(), VIRTIO_MMIO_INT_CONFIG);
            driver.set(VIRTIO_MMIO_STATUS, 0);
            driver.start();
        }
    }

    #[test]
    fn only_regular_files_with_a_sector() {
        let refused = |path: &Path| Disk::open(path).unwrap_err().to_string();
        assert!(refused(Path::new("/dev/zero")).contains("a character device"));
        assert!(refused(Path::new("/nowhere/disk")).contains("No such file"));
        let file = TempFile::new().unwrap();
        for size in [0, SECTOR - 1] {
            file.as_file().set_len(size).unwrap();
            let why = refused(file.as_path());
            assert!(why.contains("no whole sector"), "{why}");
        }
        file.as_file().set_len(SECTOR).unwrap();
        assert_eq!(Disk::open(file.as_path()).unwrap().sectors, 1);
    }
}
