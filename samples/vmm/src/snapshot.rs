// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A stopped VM: as a file that another host goes on from, or as what goes to another process.
//!
//! | bytes of the file | content |
//! | --- | --- |
//! | 0 to 7 | `KVMBPFVM` |
//! | 8 to 11 | version of the format |
//! | 12 to 15 | architecture, as ELF files name it |
//! | 16 to 23 | length of the description |
//! | 24 and on | the description: [`Snapshot`] as JSON |
//! | from the next multiple of 4096 | guest memory; pages of zeroes are holes |
//!
//! Numbers are little-endian. To another process goes the same without memory, whose file
//! descriptor comes with the first byte.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use kvm_bpf::State;
use kvm_bpf::file::write_whole;
use kvm_bpf::note::Space;
use kvm_bpf::state::{MAX_FILE_SIZE, MAX_VALUES, check_size};
use serde::{Deserialize, Serialize};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap,
    GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress,
};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::arch;
use crate::console;

const MAGIC: [u8; 8] = *b"KVMBPFVM";
const VERSION: u32 = 2;
/// `e_machine` of this architecture's ELF files.
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 183;
#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 62;
const HEADER_SIZE: usize = 24;
/// No description is longer, or has more values in JSON: 254 vCPUs and a thousand devices have less.
const DESCRIPTION_MAX: u64 = MAX_FILE_SIZE;
const VALUES_MAX: usize = 8 * MAX_VALUES;

const PAGE: usize = 0x1000;
/// How much memory is looked at in one go.
const CHUNK: usize = 1 << 20;

/// What one process tells the other, a byte each: that all is there, and to go on with it.
const READY: u8 = b'R';
const GO: u8 = b'G';
/// How long one waits for the other in all. The guest stands still meanwhile.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why a VM cannot be saved, restored or handed over.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot write it")]
    Write(#[source] io::Error),
    #[error("cannot read it")]
    Read(#[source] io::Error),
    #[error("no saved VM")]
    Magic,
    #[error("a saved VM of version {0}, and this program reads version {VERSION}")]
    Version(u32),
    #[error("a saved VM of another architecture ({0} in ELF files, and here it is {ARCHITECTURE})")]
    Architecture(u32),
    #[error("{0} bytes of description, and {DESCRIPTION_MAX} is the most")]
    Large(u64),
    #[error("its description is too much")]
    Size(#[source] kvm_bpf::state::Error),
    #[error("its description cannot be understood")]
    Description(#[source] serde_json::Error),
    #[error("it has {0} bytes of memory, and should have {1}")]
    Length(u64, u64),
    #[error("its memory cannot be used: {0}")]
    Memory(&'static str),
    #[error("cannot access guest memory")]
    GuestMemory(#[from] GuestMemoryError),
    #[error("cannot clear guest memory")]
    Clear(#[source] io::Error),
    #[error("cannot map guest memory")]
    Map(#[from] vm_memory::mmap::FromRangesError),
    #[error("the saved VM has {saved}, and this one {here}")]
    Differs { saved: String, here: String },
    #[error("the other process has not taken it")]
    NotTaken(#[source] io::Error),
    #[error("the other process goes on by itself")]
    NotGiven(#[source] io::Error),
}

/// All of a stopped VM but its memory.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    /// What it is.
    pub machine: Machine,
    /// Interrupt controllers, timers.
    pub platform: arch::PlatformState,
    /// The console.
    pub console: console::State,
    /// By number.
    pub vcpus: Vec<Vcpu>,
    /// The devices made of programs, in the order of the machine's.
    pub devices: Vec<State>,
}

/// A vCPU.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Vcpu {
    /// Its registers.
    pub state: arch::VcpuState,
    /// Bounds of the utilization that the scheduler assumes, where they are set.
    pub uclamp: Option<(u32, u32)>,
}

/// What the command line makes of a VM; a guest takes no other.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// Number of vCPUs.
    pub cpus: u8,
    /// MiB of memory.
    pub memory: u64,
    /// Frequencies in kHz.
    pub perf_table: Vec<u32>,
    /// The devices made of programs, as on the command line.
    pub devices: Vec<Device>,
}

/// A device made of programs, as the guest knows it.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// Of its file, for messages only.
    pub name: String,
    /// Whether it is at ports.
    pub ports: bool,
    /// First address or port.
    pub addr: u64,
    /// Bytes.
    pub size: u64,
    /// Device-tree `compatible` strings.
    pub compatible: Vec<String>,
    /// Its interrupt lines.
    pub gsis: Vec<u32>,
    /// Whether the first of them is level-triggered.
    pub is_level: bool,
}

impl Device {
    /// Where the guest finds it, and what it takes it for.
    fn identity(&self) -> (bool, u64, u64, &[String], &[u32], bool) {
        let Device {
            ports,
            addr,
            size,
            is_level,
            ..
        } = *self;
        (ports, addr, size, &self.compatible, &self.gsis, is_level)
    }
}

impl PartialEq for Device {
    fn eq(&self, other: &Self) -> bool {
        self.identity() == other.identity()
    }
}

impl Eq for Device {}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Device {
            name, addr, size, ..
        } = self;
        let port = if self.ports { "port " } else { "" };
        let compatible = self.compatible.join(", ");
        let level = match self.is_level {
            true => ", the first level-triggered",
            false => "",
        };
        write!(
            f,
            "{name} ({compatible}; {size:#x} bytes at {port}{addr:#x}; interrupt lines {:?}{level})",
            self.gsis
        )
    }
}

impl From<&crate::vm::GuestDevice> for Device {
    fn from(device: &crate::vm::GuestDevice) -> Self {
        let range = &device.range;
        Device {
            name: range.name.clone(),
            ports: range.space == Space::Ports,
            addr: range.addr,
            size: range.size,
            compatible: device.compatible.clone(),
            gsis: device.gsis.clone(),
            is_level: device.is_level,
        }
    }
}

impl Machine {
    /// Checks that a guest of `saved` does not notice that it is in this machine.
    fn check(&self, saved: &Machine) -> Result<(), Error> {
        let differs = |saved: String, here: String| Err(Error::Differs { saved, here });
        let count = |number: u64, what: &str| format!("{number} {what}");
        if saved.cpus != self.cpus {
            let count = |cpus: u8| count(cpus.into(), "CPUs");
            return differs(count(saved.cpus), count(self.cpus));
        }
        if saved.memory != self.memory {
            let count = |mib| count(mib, "MiB of memory");
            return differs(count(saved.memory), count(self.memory));
        }
        if saved.perf_table != self.perf_table {
            let list = |table: &[u32]| format!("the frequencies {table:?}");
            return differs(list(&saved.perf_table), list(&self.perf_table));
        }
        for (saved, here) in saved.devices.iter().zip(&self.devices) {
            if saved != here {
                return differs(saved.to_string(), here.to_string());
            }
        }
        if saved.devices.len() != self.devices.len() {
            let count = |devices: &[Device]| count(devices.len() as u64, "devices of programs");
            return differs(count(&saved.devices), count(&self.devices));
        }
        Ok(())
    }
}

impl Snapshot {
    /// Checks that it is of `machine`, and whole.
    pub fn check(&self, machine: &Machine) -> Result<(), Error> {
        machine.check(&self.machine)?;
        let parts = |vcpus: usize, devices: usize| {
            format!("registers of {vcpus} CPUs and the state of {devices} devices")
        };
        let has = (self.vcpus.len(), self.devices.len());
        let wanted = (machine.cpus.into(), machine.devices.len());
        if has != wanted {
            return Err(Error::Differs {
                saved: parts(has.0, has.1),
                here: parts(wanted.0, wanted.1),
            });
        }
        Ok(())
    }

    fn encode(&self) -> Result<([u8; HEADER_SIZE], Vec<u8>), Error> {
        let description = serde_json::to_vec(self).map_err(Error::Description)?;
        let length = description.len() as u64;
        // What is written can be read.
        check_size(&description, VALUES_MAX).map_err(Error::Size)?;
        let mut header = [0; HEADER_SIZE];
        header[..8].copy_from_slice(&MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        header[12..16].copy_from_slice(&ARCHITECTURE.to_le_bytes());
        header[16..].copy_from_slice(&length.to_le_bytes());
        Ok((header, description))
    }

    /// Reads what [`Self::encode`] returned; also how long the description is.
    fn decode(header: &[u8; HEADER_SIZE], mut from: impl Read) -> Result<(Self, u64), Error> {
        let number = |at: usize| {
            let bytes = [0, 1, 2, 3].map(|offset| header[at + offset]);
            u32::from_le_bytes(bytes)
        };
        if header[..8] != MAGIC {
            return Err(Error::Magic);
        }
        if number(8) != VERSION {
            return Err(Error::Version(number(8)));
        }
        if number(12) != ARCHITECTURE {
            return Err(Error::Architecture(number(12)));
        }
        let length = u64::from(number(20)) << 32 | u64::from(number(16));
        if length > DESCRIPTION_MAX {
            return Err(Error::Large(length));
        }
        let mut description = vec![0; length as usize];
        from.read_exact(&mut description).map_err(Error::Read)?;
        check_size(&description, VALUES_MAX).map_err(Error::Size)?;
        let snapshot = serde_json::from_slice(&description).map_err(Error::Description)?;
        Ok((snapshot, length))
    }

    /// Writes a file, which is there when it is whole.
    pub fn save(&self, path: &Path, memory: &GuestMemoryMmap) -> Result<(), Error> {
        let (header, description) = self.encode()?;
        // The guest's secrets are in it: it is for the owner alone.
        write_whole(path, Error::Write, |mut file| {
            file.write_all(&header).map_err(Error::Write)?;
            file.write_all(&description).map_err(Error::Write)?;
            write_memory(file, memory_offset(description.len() as u64), memory)
        })
    }

    /// Sends it with its memory to a process that takes it with [`Source::receive`] and [`take`].
    /// When this returns, the guest is the other's.
    pub fn send(&self, stream: &UnixStream, memory: &File) -> Result<(), Error> {
        self.send_within(PATIENCE, stream, memory)
    }

    fn send_within(
        &self,
        patience: Duration,
        stream: &UnixStream,
        memory: &File,
    ) -> Result<(), Error> {
        let (header, description) = self.encode()?;
        let mut other = Other::new(stream, patience);
        other.limit_write().map_err(Error::Write)?;
        let sent = stream
            .send_with_fd(&header[..], memory.as_raw_fd())
            .map_err(|error| Error::Write(error.into()))?;
        other
            .write_all(&header[sent..])
            .and_then(|()| other.write_all(&description))
            .map_err(Error::Write)?;
        expect(&mut other, READY).map_err(Error::NotTaken)?;
        other.write_all(&[GO]).map_err(Error::NotTaken)
    }
}

/// The other process, for a limited time. A socket's own limit is one of each wait, and whoever takes
/// some now and then stays below that.
struct Other<'a> {
    stream: &'a UnixStream,
    until: Instant,
}

impl<'a> Other<'a> {
    fn new(stream: &'a UnixStream, patience: Duration) -> Self {
        let until = Instant::now() + patience;
        Other { stream, until }
    }

    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.until.saturating_duration_since(Instant::now());
        match left.is_zero() {
            true => Err(io::ErrorKind::TimedOut.into()),
            false => Ok(Some(left)),
        }
    }

    fn limit_read(&self) -> io::Result<()> {
        self.stream.set_read_timeout(self.left()?)
    }

    fn limit_write(&self) -> io::Result<()> {
        self.stream.set_write_timeout(self.left()?)
    }
}

impl Read for Other<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.limit_read()?;
        self.stream.read(bytes)
    }
}

impl Write for Other<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.limit_write()?;
        // The limit is one of each buffer of the kernel's, so no call has more than one.
        self.stream.write(&bytes[..bytes.len().min(PAGE)])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Waits for a byte that has to be this one.
fn expect(stream: &mut Other<'_>, wanted: u8) -> io::Result<()> {
    let mut byte = [0];
    stream.read_exact(&mut byte)?;
    match byte[0] == wanted {
        true => Ok(()),
        false => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Where memory is in a file with so long a description.
fn memory_offset(description: u64) -> u64 {
    (HEADER_SIZE as u64 + description).next_multiple_of(PAGE as u64)
}

/// A saved VM with its memory.
pub struct Source {
    /// All but the memory.
    pub snapshot: Snapshot,
    memory: Memory,
}

enum Memory {
    /// From there on in a file.
    Saved(File, u64),
    /// A file that is the memory.
    Shared(File),
}

impl Source {
    /// Reads a file of [`Snapshot::save`], but for the memory.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let mut file = kvm_bpf::file::open_regular(path).map_err(Error::Read)?;
        let mut header = [0; HEADER_SIZE];
        file.read_exact(&mut header).map_err(|error| {
            if error.kind() == io::ErrorKind::UnexpectedEof {
                Error::Magic
            } else {
                Error::Read(error)
            }
        })?;
        let (snapshot, length) = Snapshot::decode(&header, &file)?;
        let memory = Memory::Saved(file, memory_offset(length));
        Ok(Source { snapshot, memory })
    }

    /// Takes what [`Snapshot::send`] sends.
    pub fn receive(stream: &UnixStream) -> Result<Self, Error> {
        let mut other = Other::new(stream, PATIENCE);
        other.limit_read().map_err(Error::Read)?;
        let mut header = [0; HEADER_SIZE];
        let (length, memory) = stream
            .recv_with_fd(&mut header)
            .map_err(|error| Error::Read(error.into()))?;
        other
            .read_exact(&mut header[length..])
            .map_err(Error::Read)?;
        let (snapshot, _) = Snapshot::decode(&header, other)?;
        let memory = memory.ok_or(Error::Memory("no file descriptor has come with it"))?;
        let memory = Memory::Shared(memory);
        Ok(Source { snapshot, memory })
    }

    /// Makes guest memory of it; `shared` as [`create_memory`] has it.
    pub fn memory(&self, size: u64, shared: bool) -> Result<GuestMemoryMmap, Error> {
        match &self.memory {
            Memory::Saved(file, offset) => {
                let length = file.metadata().map_err(Error::Read)?.len();
                let length = length.saturating_sub(*offset);
                if length != size {
                    return Err(Error::Length(length, size));
                }
                let memory = create_memory(size, shared)?;
                read_memory(file, *offset, &memory)?;
                Ok(memory)
            }
            Memory::Shared(file) => {
                check_shared(file, size)?;
                map(file.try_clone().map_err(Error::Read)?, size)
            }
        }
    }
}

/// Tells the process that sent a VM that it is here whole; on success the VM is this process's.
pub fn take(stream: &UnixStream) -> Result<(), Error> {
    let mut other = Other::new(stream, PATIENCE);
    other
        .write_all(&[READY])
        .and_then(|()| expect(&mut other, GO))
        .map_err(Error::NotGiven)
}

/// Guest memory of zeroes; `shared` as a file that other processes can map.
pub fn create_memory(size: u64, shared: bool) -> Result<GuestMemoryMmap, Error> {
    if !shared {
        let range = (GuestAddress(arch::RAM_START), size as usize);
        return Ok(GuestMemoryMmap::from_ranges(&[range])?);
    }
    let failed = || Error::Write(io::Error::last_os_error());
    // SAFETY: the name is a string that lives on, and the kernel only reads it.
    let fd = unsafe {
        libc::memfd_create(
            c"guest memory".as_ptr(),
            libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING,
        )
    };
    if fd < 0 {
        return Err(failed());
    }
    // SAFETY: it is open and nobody else's.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size).map_err(Error::Write)?;
    // SAFETY: the call has numbers only.
    if unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, SEALS) } < 0 {
        return Err(failed());
    }
    map(file, size)
}

/// Makes all of guest memory zeroes again, when no vCPU is in `KVM_RUN`.
pub fn clear_memory(memory: &GuestMemoryMmap) -> Result<(), Error> {
    for region in memory.iter() {
        let result = match region.file_offset() {
            // SAFETY: the call has numbers only.
            Some(file) => unsafe {
                let hole = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                libc::fallocate(
                    file.file().as_raw_fd(),
                    hole,
                    0,
                    region.len() as libc::off_t,
                )
            },
            // SAFETY: the region is mapped, and nobody holds a reference into guest memory.
            None => unsafe {
                let start = region.as_ptr().cast();
                libc::madvise(start, region.len() as usize, libc::MADV_DONTNEED)
            },
        };
        if result != 0 {
            return Err(Error::Clear(io::Error::last_os_error()));
        }
    }
    Ok(())
}

/// Who maps a file that another can shorten dies of that.
const SEALS: libc::c_int = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;

/// Checks that a file of another process can be guest memory.
fn check_shared(file: &File, size: u64) -> Result<(), Error> {
    // SAFETY: the call has numbers only. It fails for what is no memory.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    if seals < 0 || seals & SEALS != SEALS {
        return Err(Error::Memory("its size is not sealed"));
    }
    let length = file.metadata().map_err(Error::Read)?.len();
    if length != size {
        return Err(Error::Length(length, size));
    }
    Ok(())
}

fn map(file: File, size: u64) -> Result<GuestMemoryMmap, Error> {
    let file = FileOffset::new(file, 0);
    let range = (GuestAddress(arch::RAM_START), size as usize, Some(file));
    Ok(GuestMemoryMmap::from_ranges_with_files([range])?)
}

/// The file that is guest memory, where [`create_memory`] made it one.
pub fn memory_file(memory: &GuestMemoryMmap) -> Option<&File> {
    let region = memory.iter().next()?;
    region.file_offset().map(FileOffset::file)
}

/// Writes all of memory but pages of zeroes, which stay holes.
fn write_memory(file: &File, at: u64, memory: &GuestMemoryMmap) -> Result<(), Error> {
    let end = for_each_chunk(memory, at, |region, offset, at, chunk| {
        region.read_slice(chunk, MemoryRegionAddress(offset))?;
        for_each_run(chunk, |start, bytes| {
            file.write_all_at(bytes, at + start as u64)
                .map_err(Error::Write)
        })
    })?;
    file.set_len(end).map_err(Error::Write)
}

/// Fills memory, which is zero. Pages of zeroes are left alone: so they take no memory.
fn read_memory(file: &File, at: u64, memory: &GuestMemoryMmap) -> Result<(), Error> {
    for_each_chunk(memory, at, |region, offset, at, chunk| {
        file.read_exact_at(chunk, at).map_err(Error::Read)?;
        for_each_run(chunk, |start, bytes| {
            let start = MemoryRegionAddress(offset + start as u64);
            Ok(region.write_slice(bytes, start)?)
        })
    })?;
    Ok(())
}

/// Calls `copy` for each part of memory: with its region and where it begins there, where it is in a
/// file that has memory from `at` on, and a buffer of its size. Returns where memory ends in the file.
fn for_each_chunk(
    memory: &GuestMemoryMmap,
    mut at: u64,
    mut copy: impl FnMut(&GuestRegionMmap, u64, u64, &mut [u8]) -> Result<(), Error>,
) -> Result<u64, Error> {
    let mut buffer = vec![0; CHUNK];
    for region in memory.iter() {
        for offset in (0..region.len()).step_by(CHUNK) {
            let length = (region.len() - offset).min(CHUNK as u64);
            copy(region, offset, at, &mut buffer[..length as usize])?;
            at += length;
        }
    }
    Ok(at)
}

/// Calls `take` for each longest run of pages that are not all zero.
fn for_each_run(
    chunk: &[u8],
    mut take: impl FnMut(usize, &[u8]) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut start = None;
    for (index, page) in chunk.chunks(PAGE).enumerate() {
        let at = index * PAGE;
        match (page.iter().all(|&byte| byte == 0), start) {
            (false, None) => start = Some(at),
            (true, Some(first)) => {
                take(first, &chunk[first..at])?;
                start = None;
            }
            _ => (),
        }
    }
    match start {
        Some(first) => take(first, &chunk[first..]),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;
    use std::path::PathBuf;
    use std::thread;

    use kvm_bpf::state::{MapState, Value};
    use vmm_sys_util::tempdir::TempDir;

    use super::*;

    const SIZE: u64 = 3 * CHUNK as u64;

    fn device() -> Device {
        Device {
            name: "a.o".to_string(),
            ports: false,
            addr: 0x1000,
            size: 0x100,
            compatible: vec!["x,y".to_string()],
            gsis: vec![5],
            is_level: false,
        }
    }

    fn machine() -> Machine {
        Machine {
            cpus: 1,
            memory: 3,
            perf_table: vec![1000],
            devices: vec![device()],
        }
    }

    fn state() -> State {
        let json = r#"{
            "clock": { "boottime_ns": 1, "monotonic_ns": 1, "realtime_ns": 2 },
            "device": { "compatible": ["x,y"], "nr_irqs": 1, "regions": [], "state_version": 0 },
            "format": "kvm-bpf-state", "maps": [], "version": 1
        }"#;
        State::from_json(json.as_bytes()).unwrap()
    }

    fn snapshot() -> Snapshot {
        Snapshot {
            machine: machine(),
            platform: arch::PlatformState::default(),
            console: console::State::default(),
            vcpus: vec![Vcpu {
                state: arch::VcpuState::default(),
                uclamp: Some((256, 512)),
            }],
            devices: vec![state()],
        }
    }

    /// Memory with something in its first page and in one of the third chunk.
    fn memory(shared: bool) -> GuestMemoryMmap {
        let memory = create_memory(SIZE, shared).unwrap();
        for (offset, value) in CONTENT {
            let addr = GuestAddress(arch::RAM_START + offset);
            memory.write_obj(value, addr).unwrap();
        }
        memory
    }

    const CONTENT: [(u64, u64); 3] = [(0, 1), (2 * CHUNK as u64 + 0x5ff8, 2), (SIZE - 8, 3)];

    fn assert_content(memory: &GuestMemoryMmap) {
        for (offset, value) in CONTENT {
            let addr = GuestAddress(arch::RAM_START + offset);
            assert_eq!(memory.read_obj::<u64>(addr).unwrap(), value, "{offset:#x}");
        }
    }

    fn saved() -> (TempDir, PathBuf) {
        let dir = TempDir::new().unwrap();
        let path = dir.as_path().join("vm");
        snapshot().save(&path, &memory(false)).unwrap();
        (dir, path)
    }

    #[test]
    fn a_file_has_all_and_holes() {
        let (_dir, path) = saved();
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!(metadata.mode() & 0o777, 0o600);
        assert!(
            metadata.blocks() * 512 < SIZE / 2,
            "{} blocks",
            metadata.blocks()
        );
        assert!(!path.with_extension("new").exists());
        let source = Source::open(&path).unwrap();
        source.snapshot.check(&machine()).unwrap();
        assert_eq!(source.snapshot.vcpus[0].uclamp, Some((256, 512)));
        for shared in [false, true] {
            let memory = source.memory(SIZE, shared).unwrap();
            assert_content(&memory);
            assert_eq!(memory_file(&memory).is_some(), shared);
        }
        let error = source.memory(2 * SIZE, false).unwrap_err();
        assert!(matches!(error, Error::Length(SIZE, _)), "{error:?}");
    }

    #[test]
    fn no_file_is_half_there() {
        let dir = TempDir::new().unwrap();
        let path = dir.as_path().join("vm");
        fs::create_dir(&path).unwrap();
        let error = snapshot().save(&path, &memory(false)).unwrap_err();
        assert!(matches!(error, Error::Write(_)), "{error:?}");
        assert_eq!(fs::read_dir(dir.as_path()).unwrap().count(), 1);
    }

    #[test]
    fn other_files_are_refused() {
        let (_dir, path) = saved();
        let bytes = fs::read(&path).unwrap();
        let open = |at: usize, byte: u8, length: usize| {
            let mut bytes = bytes[..length].to_vec();
            bytes[at] = byte;
            fs::write(&path, bytes).unwrap();
            Source::open(&path).map(drop).unwrap_err()
        };
        let all = bytes.len();
        assert!(matches!(open(0, b'k', all), Error::Magic));
        assert!(matches!(open(0, b'K', 23), Error::Magic));
        assert!(matches!(open(8, 1, all), Error::Version(1)));
        assert!(matches!(open(12, 1, all), Error::Architecture(1)));
        assert!(matches!(open(20, 1, all), Error::Large(_)));
        assert!(matches!(open(23, 0xff, all), Error::Large(_)));
        assert!(matches!(open(24, b'[', all), Error::Description(_)));
        assert!(matches!(open(24, b'{', 30), Error::Read(_)));
    }

    #[test]
    fn another_machine_is_named() {
        let check = |change: &dyn Fn(&mut Machine)| {
            let mut machine = machine();
            change(&mut machine);
            snapshot().check(&machine).unwrap_err().to_string()
        };
        for (change, words) in [
            (
                &(|machine: &mut Machine| machine.cpus = 2) as &dyn Fn(&mut Machine),
                ["1 CPUs", "2 CPUs"],
            ),
            (&|machine| machine.memory = 4, ["3 MiB", "4 MiB"]),
            (&|machine| machine.perf_table.push(2000), ["[1000]", "2000"]),
            (&|machine| machine.devices.clear(), ["1 devices", "0 dev"]),
            (
                &|machine| machine.devices.push(device()),
                ["1 devices", "2 dev"],
            ),
            (
                &|machine| machine.devices[0].addr = 0x2000,
                ["0x1000", "0x2000"],
            ),
            (
                &|machine| machine.devices[0].ports = true,
                ["at 0x1", "at port 0x1"],
            ),
            (&|machine| machine.devices[0].size = 8, ["0x100 b", "0x8 b"]),
            (
                &|machine| machine.devices[0].compatible[0] = "z".into(),
                ["x,y", "(z"],
            ),
            (&|machine| machine.devices[0].gsis[0] = 6, ["[5]", "[6]"]),
            (
                &|machine| machine.devices[0].is_level = true,
                ["[5])", "[5], the first level-triggered)"],
            ),
        ] {
            let error = check(change);
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
        let mut renamed = machine();
        renamed.devices[0].name = "b.o".to_string();
        snapshot().check(&renamed).unwrap();

        let mut snapshot = snapshot();
        snapshot.vcpus.clear();
        let error = snapshot.check(&machine()).unwrap_err();
        assert!(matches!(error, Error::Differs { .. }), "{error:?}");
    }

    /// Before it takes memory: a byte of text may become many.
    #[test]
    fn descriptions_have_limits() {
        let (header, _) = snapshot().encode().unwrap();
        let decode = |description: String| {
            let mut header = header;
            let length = description.len() as u64;
            header[16..].copy_from_slice(&length.to_le_bytes());
            Snapshot::decode(&header, description.as_bytes()).unwrap_err()
        };
        for (values, is_size) in [(VALUES_MAX - 1, false), (VALUES_MAX, true)] {
            let error = decode(format!("[{}0]", "0,".repeat(values)));
            assert_eq!(matches!(error, Error::Size(_)), is_size, "{error:?}");
        }
        let error = decode("[".repeat(1000));
        assert!(matches!(error, Error::Size(_)), "{error:?}");

        let mut large = snapshot();
        let vcpu = |_| Vcpu {
            state: arch::VcpuState::default(),
            uclamp: None,
        };
        large.vcpus = (0..254).map(vcpu).collect();
        large.encode().unwrap();
        let mut state = state();
        let map = MapState {
            schema: String::new(),
            types: vec![],
            values: vec![Value::Number(0); VALUES_MAX],
        };
        state.maps.insert("many".to_string(), map);
        large.devices.push(state);
        let error = large.encode().unwrap_err();
        assert!(matches!(error, Error::Size(_)), "{error:?}");
    }

    #[test]
    fn another_process_takes_it() {
        let (here, there) = UnixStream::pair().unwrap();
        let taking = thread::spawn(move || {
            let source = Source::receive(&there).unwrap();
            source.snapshot.check(&machine()).unwrap();
            let memory = source.memory(SIZE, false).unwrap();
            assert_content(&memory);
            take(&there).unwrap();
            memory
                .write_obj(4u64, GuestAddress(arch::RAM_START))
                .unwrap();
        });
        let memory = memory(true);
        snapshot()
            .send(&here, memory_file(&memory).unwrap())
            .unwrap();
        taking.join().unwrap();
        let first: u64 = memory.read_obj(GuestAddress(arch::RAM_START)).unwrap();
        assert_eq!(first, 4, "it is the same memory");
    }

    #[test]
    fn it_stays_where_nobody_takes_it() {
        let (here, there) = UnixStream::pair().unwrap();
        let memory = memory(true);
        let file = memory_file(&memory).unwrap();
        let receiving = thread::spawn(move || {
            let source = Source::receive(&there).unwrap();
            source.memory(2 * SIZE, false).map(drop).unwrap_err()
        });
        let error = snapshot().send(&here, file).unwrap_err();
        assert!(matches!(error, Error::NotTaken(_)), "{error:?}");
        let error = receiving.join().unwrap();
        assert!(matches!(error, Error::Length(SIZE, _)), "{error:?}");

        // It is too late when the first has gone on.
        let (here, there) = UnixStream::pair().unwrap();
        drop(here);
        let error = take(&there).unwrap_err();
        assert!(matches!(error, Error::NotGiven(_)), "{error:?}");
    }

    /// It takes some all the time, so no single wait is long.
    #[test]
    fn it_stays_where_somebody_takes_it_slowly() {
        let mut large = snapshot();
        let mut state = state();
        let map = MapState {
            schema: String::new(),
            types: vec![],
            values: vec![Value::Number(0); MAX_VALUES],
        };
        state.maps.insert("many".to_string(), map);
        large.devices.push(state);
        let (here, there) = UnixStream::pair().unwrap();
        let reading = thread::spawn(move || {
            let mut some = [0; 4096];
            while let Ok(1..) = (&there).read(&mut some) {
                thread::sleep(Duration::from_millis(20));
            }
        });
        let memory = memory(true);
        let start = Instant::now();
        let patience = Duration::from_millis(300);
        let error = large.send_within(patience, &here, memory_file(&memory).unwrap());
        let error = error.unwrap_err();
        assert!(matches!(error, Error::Write(_)), "{error:?}");
        assert!(start.elapsed() < 10 * patience, "{:?}", start.elapsed());
        // The rest of what is on its way is dropped.
        here.shutdown(std::net::Shutdown::Both).unwrap();
        reading.join().unwrap();
    }

    #[test]
    fn memory_that_can_shrink_is_refused() {
        let dir = TempDir::new().unwrap();
        let file = File::create(dir.as_path().join("memory")).unwrap();
        file.set_len(SIZE).unwrap();
        let (here, there) = UnixStream::pair().unwrap();
        let receiving = thread::spawn(move || {
            let source = Source::receive(&there).unwrap();
            source.memory(SIZE, false).map(drop).unwrap_err()
        });
        snapshot().send(&here, &file).unwrap_err();
        let error = receiving.join().unwrap();
        assert!(matches!(error, Error::Memory(_)), "{error:?}");
    }
}
