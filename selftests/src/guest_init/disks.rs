// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Disks, and random numbers.
//!
//! "requests" are those that a disk's driver has made meanwhile, before any were joined, and
//! "interrupts" those that the guest has had of it; sums are SHA-256.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::process::Stdio;

use nix::mount::umount;
use sha2::{Digest, Sha256};

use crate::system::{busybox, fact, interrupts, mount, number, parts, program, status, wrong};

pub const GUEST_IO: &str = "kvm-bpf-guest-io";

/// Files of the guest's.
const BUSYBOX: &str = "/bin/busybox";
const IMAGE: &str = "/image";
const BACK: &str = "/back";

/// `hwrng=BYTES`: reads so many bytes of /dev/hwrng.
///
/// "HWRNG driver bytes values": how many came, and how many of 256 values are among them.
pub fn hwrng(args: &[&str]) -> io::Result<()> {
    let [wanted] = parts(args)?;
    let mut device = File::open("/dev/hwrng")?;
    let mut bytes = Vec::new();
    let mut piece = [0_u8; 64];
    for _ in 0..number(wanted)? as usize / piece.len() {
        let count = device.read(&mut piece)?;
        bytes.extend_from_slice(&piece[..count]);
    }
    let driver = fact("/sys/class/misc/hw_random/rng_current");
    let values: BTreeSet<_> = bytes.iter().collect();
    println!("HWRNG {driver} {} {}", bytes.len(), values.len());
    Ok(())
}

/// `disk=NAME`: writes 4 MiB to a disk, as in vda, and reads them back when the page cache has
/// nothing of it any more.
///
/// "DISK name sectors sum sum": of what was written, and of what came back.
pub fn disk(args: &[&str]) -> io::Result<()> {
    let [name] = parts(args)?;
    let path = device(name);
    let mut data = vec![0; 4 << 20];
    File::open("/dev/urandom")?.read_exact(&mut data)?;
    let mut disk = File::options().write(true).open(&path)?;
    disk.write_all(&data)?;
    disk.sync_all()?;
    drop(disk);
    busybox(&["blockdev", "--flushbufs", &path])?;
    drop_caches()?;
    let mut back = vec![0; data.len()];
    File::open(&path)?.read_exact(&mut back)?;
    let sectors = block(name, "size");
    println!("DISK {name} {sectors} {} {}", sum(&data), sum(&back));
    Ok(())
}

/// `image=NAME`: writes a file system's image to a disk and reads it back, past the page cache, with
/// requests of all sizes; nothing else accesses the disk meanwhile.
///
/// "IMAGE name magic sum sum requests": the magic number of what came back.
pub fn image(args: &[&str]) -> io::Result<()> {
    const SIZE: usize = 8 << 20;
    const MAGIC: u64 = 1080;

    let [name] = parts(args)?;
    let busybox_file = fs::read(BUSYBOX)?;
    let data: Vec<_> = busybox_file.iter().copied().cycle().take(SIZE).collect();
    fs::write(IMAGE, data)?;
    busybox(&["mke2fs", "-F", IMAGE])?;
    let before = requests(name)?;
    // Sectors, pages, and more than a request may have; what is read in other pieces.
    let path = device(name);
    for requests in [
        ["512", "0", "1024"],
        ["4096", "128", "512"],
        ["1048576", "2", "8"],
    ] {
        copy(IMAGE, &path, requests)?;
    }
    for requests in [
        ["1048576", "0", "4"],
        ["4096", "1024", "1792"],
        ["512", "14336", "16384"],
    ] {
        copy(&path, BACK, requests)?;
    }
    let requests = requests(name)? - before;
    let mut magic = [0; 2];
    File::open(BACK)?.read_exact_at(&mut magic, MAGIC)?;
    let magic = u16::from_le_bytes(magic);
    let (written, back) = (sum(&fs::read(IMAGE)?), sum(&fs::read(BACK)?));
    println!("IMAGE {name} {magic:04x} {written} {back} {requests}");
    fs::remove_file(IMAGE)?;
    fs::remove_file(BACK)
}

/// `files=NAME`: makes an ext2 file system on a disk, and mounts it twice: to write two large files,
/// and to read them.
///
/// "FILES name type count sum sum", of which "count" includes a directory that is there from the
/// beginning.
pub fn files(args: &[&str]) -> io::Result<()> {
    const AT: &str = "/mnt";

    let [name] = parts(args)?;
    let path = device(name);
    let names = ["1", "2"].map(|name| format!("{AT}/{name}"));
    fs::create_dir_all(AT)?;
    busybox(&["mke2fs", "-F", &path])?;
    mount("ext2", &path, AT, false)?;
    for name in &names {
        fs::copy(BUSYBOX, name)?;
    }
    umount(AT)?;
    drop_caches()?;
    mount("ext2", &path, AT, true)?;
    let mounts = fact("/proc/mounts");
    let kind = mounts.lines().find_map(|line| {
        let mut words = line.split(' ');
        (words.next() == Some(&path)).then(|| words.nth(1))?
    });
    let count = fs::read_dir(AT)?.count();
    let sum_of = |files: [&str; 2]| -> io::Result<String> {
        Ok(sum(&[fs::read(files[0])?, fs::read(files[1])?].concat()))
    };
    let written = sum_of([BUSYBOX; 2])?;
    let back = sum_of([&names[0], &names[1]])?;
    umount(AT)?;
    let kind = kind.unwrap_or("none");
    println!("FILES {name} {kind} {count} {written} {back}");
    Ok(())
}

/// `io=NAME,DEPTH,PAGES,REQUESTS`: has `kvm-bpf-guest-io` load a disk, with so many requests in
/// flight of so many pages at most.
///
/// What that prints, and "IO-DEVICE name requests interrupts".
pub fn io(args: &[&str]) -> io::Result<()> {
    let [name, depth, pages, count] = parts(args)?;
    let before = (requests(name)?, disk_interrupts(name)?);
    status(program(GUEST_IO, &[&device(name), depth, pages, count]))?;
    let requests = requests(name)? - before.0;
    let interrupts = disk_interrupts(name)? - before.1;
    println!("IO-DEVICE {name} {requests} {interrupts}");
    Ok(())
}

/// `shared=NAME`: a disk to read only, of which others read, too: reads all of it three times, past
/// the page cache, and tries to write.
///
/// "SHARED name read_only status sum...": what the driver makes of the disk, and the status of the
/// attempt.
pub fn shared(args: &[&str]) -> io::Result<()> {
    const SECTOR: u64 = 512;
    const REQUEST: u64 = 128 << 10;

    let [name] = parts(args)?;
    let path = device(name);
    let size = number(&block(name, "size"))? * SECTOR;
    let mut sums = String::new();
    for _ in 0..3 {
        let (bytes, end) = (REQUEST.to_string(), (size / REQUEST).to_string());
        copy(&path, BACK, [&bytes, "0", &end])?;
        sums += " ";
        sums += &sum(&fs::read(BACK)?);
        fs::remove_file(BACK)?;
    }
    let mut writes = program(GUEST_IO, &["copy", BUSYBOX, &path, "512", "0", "1"]);
    writes.stderr(Stdio::null());
    println!(
        "SHARED {name} {} {}{sums}",
        block(name, "ro"),
        status(writes)?
    );
    Ok(())
}

/// `reads=NAME,COUNT`: reads so many pages of a disk, past the page cache, each when the one before
/// is there.
///
/// "READS name status".
pub fn reads(args: &[&str]) -> io::Result<()> {
    let [name, count] = parts(args)?;
    let reads = ["copy", &device(name), "/dev/null", "4096", "0", count];
    println!("READS {name} {}", status(program(GUEST_IO, &reads))?);
    Ok(())
}

/// The file of a disk.
pub fn device(name: &str) -> String {
    format!("/dev/{name}")
}

/// What the kernel says of a disk.
fn block(name: &str, what: &str) -> String {
    fact(format!("/sys/block/{name}/{what}"))
}

/// Copies between a file and a disk: the bytes of a request, the first of them by number, and the
/// number behind the last.
fn copy(from: &str, to: &str, requests: [&str; 3]) -> io::Result<()> {
    let [bytes, first, end] = requests;
    status(program(GUEST_IO, &["copy", from, to, bytes, first, end]))?;
    Ok(())
}

fn drop_caches() -> io::Result<()> {
    fs::write("/proc/sys/vm/drop_caches", "3")
}

fn sum(data: &[u8]) -> String {
    format!("{:x}", Sha256::digest(data))
}

/// How many a disk's driver has made: reads and writes, and those joined to others.
fn requests(name: &str) -> io::Result<u64> {
    let stat = block(name, "stat");
    let words: Vec<_> = stat.split_whitespace().collect();
    let [reads, joined_reads, _, _, writes, joined_writes, ..] = words.as_slice() else {
        return Err(wrong(stat));
    };
    let numbers = [reads, joined_reads, writes, joined_writes].map(|it| number(it));
    numbers.into_iter().sum()
}

/// Those of a disk's device, on all CPUs.
fn disk_interrupts(name: &str) -> io::Result<u64> {
    let device = fs::read_link(format!("/sys/block/{name}/device"))?;
    let device = device.file_name().unwrap_or_default();
    Ok(interrupts(|own| own == device))
}
