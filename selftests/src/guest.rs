// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A guest of a few instructions: it does one access, or a loop of them, and stops.
//!
//! The host puts arguments into registers, points the program counter at a
//! [`Routine`] and runs the vCPU until the routine says that it is done.
//! Accesses that reach user space on the way are written down.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Once};
use std::time::Duration;
use std::{mem, ptr, slice};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_EXIT_INTERNAL_ERROR,
    KVM_MEM_READONLY, kvm_enable_cap, kvm_stats_desc, kvm_stats_header,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vmm_sys_util::ioctl::{_IOC_NONE, ioctl, ioctl_expr};

use crate::harness::Errno;

#[cfg(target_arch = "aarch64")]
#[path = "guest/aarch64.rs"]
mod arch;
#[cfg(target_arch = "x86_64")]
#[path = "guest/x86_64.rs"]
mod arch;

#[cfg(target_arch = "aarch64")]
pub use arch::REDISTRIBUTORS;
pub use arch::{IRQCHIP_ADDR, register_after_read, ticks};

/// The guest has RAM from 0 up to here and nowhere else.
pub const RAM_SIZE: u64 = 0x1_0000;

/// Where the routines are in the guest's RAM.
const CODE: u64 = 0x8000;

/// What user space gives a read that reaches it.
pub const USER_ANSWER: u64 = 0xeeee_eeee_eeee_eeee;

/// What the guest's register holds before it reads.
pub const PRESET: u64 = 0xa5a5_a5a5_a5a5_a5a5;

/// How long a routine may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// The guest's code; the numbers are those in the assembly.
#[derive(Clone, Copy, Debug)]
pub enum Routine {
    /// Reads 1 byte; the routines for 2, 4 and 8 follow.
    Read = 0,
    /// Writes 1 byte; the routines for 2, 4 and 8 follow.
    Write = 4,
    /// Writes `value` and reads, 8 bytes each, `count` times.  Ends early when
    /// an answer is none of `pair`, with the answer as the result.
    Hammer = 8,
    /// Reads 4 bytes, `count` times.
    ReadLoop = 9,
    /// Writes 4 bytes, `count` times.
    WriteLoop = 10,
    /// Writes 8 bytes, then waits until it took `count` interrupts.
    AwaitInterrupts = 11,
    /// Counts an interrupt and writes `pair.1` to address `pair.0`, if not 0.
    InterruptHandler = 12,
    /// Makes the call `value` of the hypervisor with one argument, `addr`.
    #[cfg(target_arch = "aarch64")]
    Call = 13,
    /// Reads 4 bytes, and has an exception whose stack is there.
    #[cfg(target_arch = "x86_64")]
    ExceptionOnStack = 13,
    /// `in` of 1 byte from port `addr`; the routines for 2 and 4 follow.
    #[cfg(target_arch = "x86_64")]
    In = 14,
    /// `out` of 1 byte; the routines for 2 and 4 follow.
    #[cfg(target_arch = "x86_64")]
    Out = 17,
    /// `rep ins` of `count` times 1 byte to address `pair.0`; the routines for 2 and 4 follow.
    #[cfg(target_arch = "x86_64")]
    InString = 20,
    /// `rep outs` from there; the routines for 2 and 4 follow.
    #[cfg(target_arch = "x86_64")]
    OutString = 23,
    /// `Hammer` with a port, 4 bytes.
    #[cfg(target_arch = "x86_64")]
    PortHammer = 26,
    /// Does what always exits to KVM and no further, `count` times: `cpuid`, or the call
    /// `SMCCC_VERSION`.
    ExitLoop = 27,
    /// Writes 4 bytes to the port `addr`, `count` times.
    #[cfg(target_arch = "x86_64")]
    OutLoop = 28,
    /// Writes 4 bytes `count` times, to addresses that go round from `addr` to `pair.1` in steps
    /// of `pair.0`.
    Walk = 29,
    /// Writes 8 bytes `count` times: `value`, and each time one more.
    Increase = 30,
    /// `count` times: writes a command of 4 bytes to `addr`, and reads `pair.1` until the result,
    /// the command's complement, is there. All of these use two numbers.
    Commands = 32,
    /// The same, which waits for an interrupt before it reads; `pair.0` is 0.
    CommandsInterrupt = 34,
    /// The same with a command that is in memory, behind the result, before `addr` is written to.
    CommandsMemory = 36,
    /// Both.
    CommandsMemoryInterrupt = 38,
    /// `count` times: writes a 0 of 4 bytes to `addr`, waits for an interrupt, reads 4 bytes at
    /// `pair.1` and writes them behind. `pair.0` is 0.
    Requests = 40,
    /// The same, and idles until the interrupt comes.
    RequestsIdle = 42,
    /// `count` requests of a disk, `value` of them at a time: copies them from [`QUEUE_TEMPLATE`]
    /// into the queue at `pair.1`, makes them available, notifies at `addr`, waits for an interrupt,
    /// reads the status behind and acknowledges it, until all are used. `pair.0` is 0.
    Disk = 44,
    /// The same, and idles until the interrupt comes.
    DiskIdle = 48,
    /// `count` times: makes the next `value` entries of the queue at `pair.1` available, as they
    /// are, and notifies at `addr`.
    Notifications = 52,
    /// Reads two registers of 8 bytes at once.
    #[cfg(target_arch = "aarch64")]
    ReadPair = 53,
    /// Writes two.
    #[cfg(target_arch = "aarch64")]
    WritePair = 54,
    /// Reads 4 bytes and begins an exclusive access.
    #[cfg(target_arch = "aarch64")]
    ReadExclusive = 55,
    /// Writes 4 bytes and adds to the address.
    #[cfg(target_arch = "aarch64")]
    WriteBack = 56,
    /// Exchanges 4 bytes with `value`.
    #[cfg(target_arch = "x86_64")]
    Exchange = 53,
    /// Adds `value` to 8 bytes, locked; the result is what was there.
    #[cfg(target_arch = "x86_64")]
    LockedAdd = 54,
    /// Adds `value` to 4 bytes.
    #[cfg(target_arch = "x86_64")]
    Add = 55,
    /// Copies `count` bytes to `pair.0`, one after the other.
    #[cfg(target_arch = "x86_64")]
    CopyBytes = 56,
    /// Copies `count` times 4 bytes.
    #[cfg(target_arch = "x86_64")]
    CopyWords = 57,
    /// Writes `value` `count` times, 4 bytes one after the other.
    #[cfg(target_arch = "x86_64")]
    Fill = 58,
    /// Reads 16 bytes at once: the result, and in place of the rounds that are left the upper half.
    #[cfg(target_arch = "x86_64")]
    ReadVector = 59,
    /// Writes 16 bytes at once, `value` and `pair.0`.
    #[cfg(target_arch = "x86_64")]
    WriteVector = 60,
    /// Reads 4 bytes and extends the sign.
    #[cfg(target_arch = "x86_64")]
    ReadSigned = 61,
}

/// What the routines for a disk have in the queue's page; numbers are those in the assembly.
/// Request *n* has the descriptors from 4 *n* on, in place of the fourth its header.
pub const QUEUE_AVAIL: u64 = 0x800;
/// The device's part.
pub const QUEUE_USED: u64 = 0xa00;
/// In the page behind: what is copied to the descriptors.
pub const QUEUE_TEMPLATE: u64 = 0x1000;
/// Entries of the queue of [`Routine::Disk`].
pub const QUEUE_ENTRIES: u16 = 32;
/// How many descriptors each request has there.
pub const QUEUE_PER_REQUEST: u16 = 4;

impl Routine {
    /// Distance of a routine from the first.
    pub fn offset(self) -> u64 {
        64 * self as u64
    }
}

/// Arguments of a routine.
#[derive(Clone, Copy, Debug, Default)]
pub struct Args {
    /// What to write.
    pub value: u64,
    /// Where to read or write.
    pub addr: u64,
    /// How often.
    pub count: u64,
    /// Meaning depends on the routine.
    pub pair: [u64; 2],
}

/// Results of a routine.
#[derive(Clone, Copy, Debug)]
pub struct Results {
    /// What was read last.
    pub value: u64,
    /// How many rounds were left.
    pub count: u64,
}

/// An access that reached user space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Address and width of a read.
    Read(u64, usize),
    /// Address, width and value of a write.
    Write(u64, usize, u64),
}

/// What reached user space of the accesses of a port: an element, or several of a string.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortExit {
    /// Port, bytes of an element, and the number of elements.
    In(u16, usize, usize),
    /// Port, bytes of an element, and the data.
    Out(u16, usize, Vec<u8>),
}

/// What user space gives for byte `at` of a read from a port.
#[cfg(target_arch = "x86_64")]
pub fn user_byte(at: usize) -> u8 {
    0xe1 ^ at as u8
}

/// An access that user space has to serve.
#[derive(Debug)]
pub enum Access<'a> {
    /// Address, and where the answer goes.
    Read(u64, &'a mut [u8]),
    /// Address and data.
    Write(u64, &'a [u8]),
    /// Port, bytes of an element, and where the data goes.
    #[cfg(target_arch = "x86_64")]
    In(u16, usize, &'a mut [u8]),
    /// Port, bytes of an element, and data.
    #[cfg(target_arch = "x86_64")]
    Out(u16, usize, &'a [u8]),
}

/// What a read gave.
#[derive(Debug)]
pub struct Read {
    /// The bytes read.
    pub value: u64,
    /// The whole register, which held [`PRESET`] before.
    pub register: u64,
    /// The accesses that user space saw.
    pub exits: Vec<Exit>,
}

/// All bits of so many bytes.
pub fn mask(width: usize) -> u64 {
    u64::MAX >> (64 - 8 * width)
}

/// A number that is larger if the kernel has more virtual machines, where it tells: the entries in
/// KVM's debugfs, or the references to KVM's module, which its open files hold, too.
pub fn vms() -> Option<usize> {
    if let Ok(entries) = fs::read_dir("/sys/kernel/debug/kvm") {
        return Some(
            entries
                .flatten()
                .filter(|entry| entry.path().is_dir())
                .count(),
        );
    }
    ["kvm_amd", "kvm_intel"].iter().find_map(|module| {
        let text = fs::read_to_string(format!("/sys/module/{module}/refcnt")).ok()?;
        text.trim().parse().ok()
    })
}

/// `KVM_GET_STATS_FD`, which kvm-ioctls does not have.
const KVM_GET_STATS_FD: libc::c_ulong = ioctl_expr(_IOC_NONE, kvm_bindings::KVMIO, 0xce, 0);

/// A number of KVM's own about a vCPU.
fn statistic(vcpu: &VcpuFd, name: &str) -> u64 {
    // SAFETY: makes a file descriptor, which is ours.
    let file = unsafe {
        let fd = ioctl(vcpu, KVM_GET_STATS_FD);
        assert!(fd >= 0, "KVM_GET_STATS_FD: {:?}", Errno::last());
        File::from_raw_fd(fd)
    };
    let bytes = |at: u32, len: usize| {
        let mut bytes = vec![0; len];
        let read = file.read_exact_at(&mut bytes, at.into());
        read.expect("a read of KVM's statistics");
        bytes
    };
    let word = |bytes: &[u8], at: usize| {
        let word = bytes[at..at + 4].try_into().expect("four bytes");
        u32::from_ne_bytes(word)
    };
    // The fields of struct kvm_stats_header.
    let header = bytes(0, size_of::<kvm_stats_header>());
    let [_, name_size, count, _, descriptors, data] =
        std::array::from_fn(|field| word(&header, 4 * field));
    let before_name = size_of::<kvm_stats_desc>();
    let size = before_name + name_size as usize;
    for descriptor in bytes(descriptors, count as usize * size).chunks(size) {
        let found = descriptor[before_name..].split(|&byte| byte == 0).next();
        if found == Some(name.as_bytes()) {
            // Its offset is behind flags, exponent and size.
            let value = bytes(data + word(descriptor, 8), 8);
            return u64::from_ne_bytes(value.try_into().expect("eight bytes"));
        }
    }
    panic!("KVM has no statistic {name}")
}

/// The guest's memory.
struct Ram(*mut u8);

// SAFETY: the host touches the memory by raw copies only.
unsafe impl Send for Ram {}
// SAFETY: as above; tests do not race with the guest for the same bytes.
unsafe impl Sync for Ram {}

impl Ram {
    fn new() -> Self {
        let size = RAM_SIZE as usize;
        // SAFETY: a new anonymous mapping touches no other memory.
        let memory = unsafe {
            libc::mmap(
                ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(memory, libc::MAP_FAILED, "mmap of the guest's RAM");
        Ram(memory.cast())
    }

    fn range(&self, at: usize, len: usize) -> *mut u8 {
        assert!(at + len <= RAM_SIZE as usize, "{at:#x} is outside the RAM");
        // SAFETY: checked just above.
        unsafe { self.0.add(at) }
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        // SAFETY: `range` gives as many bytes as were asked for.
        unsafe {
            ptr::copy_nonoverlapping(bytes.as_ptr(), self.range(at, bytes.len()), bytes.len())
        }
    }

    fn read(&self, at: usize, bytes: &mut [u8]) {
        // SAFETY: as for `write`.
        unsafe {
            ptr::copy_nonoverlapping(self.range(at, bytes.len()), bytes.as_mut_ptr(), bytes.len())
        }
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and each VM and vCPU holds a count on it.
        unsafe { libc::munmap(self.0.cast(), RAM_SIZE as usize) };
    }
}

/// Memory that a guest, the host's threads and other processes may all have.
#[derive(Debug)]
pub struct SharedMemory {
    file: File,
    size: usize,
    words: *mut AtomicU32,
}

// SAFETY: all accesses are atomic.
unsafe impl Send for SharedMemory {}
// SAFETY: as above.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// A new one of so many pages, all 0.
    pub fn new(pages: usize) -> Self {
        // SAFETY: the name is a string with its end; the new fd is nobody else's.
        let file = unsafe {
            let fd = libc::memfd_create(c"shared memory".as_ptr(), libc::MFD_CLOEXEC);
            assert!(fd >= 0, "memfd_create");
            File::from_raw_fd(fd)
        };
        file.set_len(0x1000 * pages as u64).expect("ftruncate");
        Self::of(file, pages)
    }

    /// One that another process has made, or the kernel: a map's file has no length.
    pub fn of(file: File, pages: usize) -> Self {
        let size = 0x1000 * pages;
        // SAFETY: a new mapping touches no other memory.
        let words = unsafe {
            libc::mmap(
                ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        assert_ne!(words, libc::MAP_FAILED, "mmap of shared memory");
        SharedMemory {
            file,
            size,
            words: words.cast(),
        }
    }

    /// What another process gets it by.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// A word of it.
    pub fn word(&self, index: usize) -> &AtomicU32 {
        assert!(index < self.size / 4, "word {index} is outside");
        // SAFETY: checked just above; the mapping lives as long as the borrow.
        unsafe { &*self.words.add(index) }
    }

    /// Eight bytes of it.
    pub fn double_word(&self, index: usize) -> &AtomicU64 {
        let first = ptr::from_ref(self.word(2 * index));
        // SAFETY: a page is aligned and has a multiple of 8 bytes; all of it is shared memory.
        unsafe { &*first.cast() }
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and each VM and vCPU holds a count on it.
        unsafe { libc::munmap(self.words.cast(), self.size) };
    }
}

/// The assembled routines.
fn code() -> &'static [u8] {
    unsafe extern "C" {
        static kvm_bpf_guest: u8;
        static kvm_bpf_guest_end: u8;
    }
    let (start, end) = (&raw const kvm_bpf_guest, &raw const kvm_bpf_guest_end);
    // SAFETY: the two symbols enclose the read-only bytes of the assembly.
    unsafe { slice::from_raw_parts(start, end as usize - start as usize) }
}

/// A virtual machine with some RAM; dropping it closes the VM's fd.
#[allow(missing_debug_implementations)]
pub struct Guest {
    kvm: Kvm,
    vm: VmFd,
    ram: Arc<Ram>,
    irqchip: Option<arch::Irqchip>,
    shared: Option<Arc<SharedMemory>>,
    /// One of its vCPUs has run.
    has_run: Arc<AtomicBool>,
    paging: bool,
}

impl Guest {
    /// A VM without interrupt controllers.
    pub fn new() -> Self {
        Self::on(Kvm::new().expect("open /dev/kvm"))
    }

    /// The same, for a thread that may not open `/dev/kvm` itself.
    pub fn on(kvm: Kvm) -> Self {
        let vm = arch::create_vm(&kvm);
        Self::of(kvm, vm)
    }

    /// One whose memory is taken from the host page by page, as the guest touches it: then the host
    /// may not touch it. Ends the test as ignored where the host has no such guests.
    #[cfg(target_arch = "aarch64")]
    pub fn protected() -> Self {
        let kvm = Kvm::new().expect("open /dev/kvm");
        let vm = arch::create_protected_vm(&kvm);
        Self::of(kvm, vm)
    }

    fn of(kvm: Kvm, vm: VmFd) -> Self {
        let ram = Arc::new(Ram::new());
        arch::prepare_ram(&ram);
        ram.write(CODE as usize, code());
        let slot = kvm_userspace_memory_region {
            memory_size: RAM_SIZE,
            userspace_addr: ram.0 as u64,
            ..Default::default()
        };
        // SAFETY: the mapping lives as long as the VM and its vCPUs, which share it.
        unsafe { vm.set_user_memory_region(slot) }.expect("KVM_SET_USER_MEMORY_REGION");
        Guest {
            kvm,
            vm,
            ram,
            irqchip: None,
            shared: None,
            has_run: Arc::default(),
            paging: true,
        }
    }

    /// Takes the guest's memory from an address on away from it.
    pub fn end_ram_at(&self, addr: u64) {
        for memory_size in [0, addr] {
            let slot = kvm_userspace_memory_region {
                memory_size,
                userspace_addr: self.ram.0 as u64,
                ..Default::default()
            };
            // SAFETY: as for all of the memory.
            unsafe { self.vm.set_user_memory_region(slot) }.expect("KVM_SET_USER_MEMORY_REGION");
        }
    }

    /// Has vCPUs that come now start without paging, in 32 bits: for the loops of [`Routine`] that
    /// take no `pair`, and for single accesses of up to 4 bytes.
    #[cfg(target_arch = "x86_64")]
    pub fn without_paging(mut self) -> Self {
        self.paging = false;
        self
    }

    /// Has the guest see the first page of its memory at another address too, for loads only.
    pub fn add_rom(&self, addr: u64) {
        let slot = kvm_userspace_memory_region {
            slot: 1,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: addr,
            memory_size: 0x1000,
            userspace_addr: self.ram.0 as u64,
        };
        // SAFETY: as for the memory's own slot.
        unsafe { self.vm.set_user_memory_region(slot) }.expect("KVM_SET_USER_MEMORY_REGION");
    }

    /// Has vCPUs that come now write the pages that they make dirty into rings of so many bytes;
    /// returns whether KVM can.
    pub fn try_dirty_rings(&self, bytes: u64) -> bool {
        [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING]
            .into_iter()
            .any(|cap| {
                let cap = kvm_enable_cap {
                    cap,
                    args: [bytes, 0, 0, 0],
                    ..Default::default()
                };
                self.vm.enable_cap(&cap).is_ok()
            })
    }

    /// Has the guest see shared memory at an address; before its first vCPU.
    pub fn add_shared(&mut self, addr: u64, memory: &Arc<SharedMemory>) {
        let slot = kvm_userspace_memory_region {
            slot: 2,
            guest_phys_addr: addr,
            memory_size: memory.size as u64,
            userspace_addr: memory.words as u64,
            ..Default::default()
        };
        // SAFETY: the mapping lives as long as the VM and its vCPUs, which share it.
        unsafe { self.vm.set_user_memory_region(slot) }.expect("KVM_SET_USER_MEMORY_REGION");
        self.shared = Some(Arc::clone(memory));
    }

    /// A VM with KVM's own interrupt controllers, for one vCPU that takes interrupts.
    pub fn with_irqchip() -> Self {
        let mut guest = Self::new();
        guest
            .try_add_irqchip()
            .unwrap_or_else(|errno| panic!("wanted interrupt controllers, got {errno:?}"));
        guest
    }

    /// Adds them to a VM that has none and no vCPU.
    pub fn try_add_irqchip(&mut self) -> Result<(), Errno> {
        self.irqchip = Some(arch::Irqchip::new(&self.vm)?);
        Ok(())
    }

    /// Adds that vCPU and makes it accept interrupts.
    pub fn vcpu_with_interrupts(&self) -> Vcpu {
        let mut vcpu = self.vcpu(0);
        self.connect(&mut vcpu);
        vcpu
    }

    /// Makes a vCPU accept interrupts; all vCPUs are there.
    pub fn connect(&self, vcpu: &mut Vcpu) {
        let irqchip = self.irqchip.as_ref().expect("a guest with an irqchip");
        irqchip.connect(vcpu);
    }

    /// All vCPUs are there: the interrupt controller starts.
    #[cfg(target_arch = "aarch64")]
    pub fn start_irqchip(&self) {
        let irqchip = self.irqchip.as_ref().expect("a guest with an irqchip");
        irqchip.start();
    }

    /// Has the interrupt controller hand on a line (its GSI) to that vCPU.
    pub fn route_line(&self, vcpu: &mut Vcpu, gsi: u32, level: bool) {
        let irqchip = self.irqchip.as_ref().expect("a guest with an irqchip");
        irqchip.route_line(vcpu, gsi, level);
    }

    /// Has each signal of a GSI interrupt that vCPU: as a message on x86, which KVM hands on at
    /// once, unlike a pin's; as a line on arm64, where it does so with lines.
    pub fn route_edge(&self, vcpu: &mut Vcpu, gsi: u32) {
        let irqchip = self.irqchip.as_ref().expect("a guest with an irqchip");
        irqchip.route_edge(&self.vm, vcpu, gsi);
    }

    /// The VM's fd.
    pub fn vm(&self) -> &VmFd {
        &self.vm
    }

    /// Adds a vCPU, before one runs: pKVM takes none later.
    #[track_caller]
    pub fn vcpu(&self, id: u32) -> Vcpu {
        self.try_vcpu(id)
            .unwrap_or_else(|errno| panic!("wanted KVM_CREATE_VCPU to work, got {errno:?}"))
    }

    /// The same, or the kernel's errno.
    #[track_caller]
    pub fn try_vcpu(&self, id: u32) -> Result<Vcpu, Errno> {
        let has_run = self.has_run.load(Ordering::Relaxed);
        assert!(!has_run, "vCPU {id} comes after another one has run");
        let fd = self.vm.create_vcpu(id.into());
        let fd = fd.map_err(|error| Errno(error.errno()))?;
        arch::prepare_vcpu(&self.kvm, &self.vm, &fd, self.paging);
        Ok(Vcpu {
            fd,
            _ram: Arc::clone(&self.ram),
            _shared: self.shared.clone(),
            has_run: Arc::clone(&self.has_run),
        })
    }

    /// Writes the guest's memory.
    pub fn write_ram(&self, addr: u64, bytes: &[u8]) {
        self.ram.write(addr as usize, bytes);
    }

    /// Reads the guest's memory.
    pub fn read_ram<const N: usize>(&self, addr: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.ram.read(addr as usize, &mut bytes);
        bytes
    }
}

impl Default for Guest {
    fn default() -> Self {
        Self::new()
    }
}

/// A vCPU; dropping it closes its fd.
#[allow(missing_debug_implementations)]
pub struct Vcpu {
    fd: VcpuFd,
    _ram: Arc<Ram>,
    _shared: Option<Arc<SharedMemory>>,
    has_run: Arc<AtomicBool>,
}

impl Vcpu {
    /// Reads 1, 2, 4 or 8 bytes.
    pub fn read(&mut self, addr: u64, width: usize) -> Read {
        let args = Args {
            value: PRESET,
            addr,
            ..Default::default()
        };
        let (results, exits) = self.run(Routine::Read, width.ilog2().into(), args);
        Read {
            value: results.value & mask(width),
            register: results.value,
            exits,
        }
    }

    /// Writes the low 1, 2, 4 or 8 bytes of a value.  Returns what user space saw.
    pub fn write(&mut self, addr: u64, width: usize, value: u64) -> Vec<Exit> {
        let args = Args {
            value,
            addr,
            ..Default::default()
        };
        self.run(Routine::Write, width.ilog2().into(), args).1
    }

    /// `in` of 1, 2 or 4 bytes.  Returns the register, which held [`PRESET`], and what user space saw.
    #[cfg(target_arch = "x86_64")]
    pub fn port_in(&mut self, port: u16, width: usize) -> (u64, Vec<PortExit>) {
        let args = Args {
            value: PRESET,
            addr: port.into(),
            ..Default::default()
        };
        let (results, exits) = self.ports(Routine::In, width, args);
        (results.value, exits)
    }

    /// `out` of the low 1, 2 or 4 bytes of a value.
    #[cfg(target_arch = "x86_64")]
    pub fn port_out(&mut self, port: u16, width: usize, value: u64) -> Vec<PortExit> {
        let args = Args {
            value,
            addr: port.into(),
            ..Default::default()
        };
        self.ports(Routine::Out, width, args).1
    }

    /// Runs a routine that accesses ports, `width` bytes at a time.
    #[cfg(target_arch = "x86_64")]
    pub fn ports(
        &mut self,
        routine: Routine,
        width: usize,
        args: Args,
    ) -> (Results, Vec<PortExit>) {
        let mut exits = Vec::new();
        let variant = width.ilog2().into();
        let results = self.run_and_serve(routine, variant, args, |access| match access {
            Access::In(port, width, data) => {
                exits.push(PortExit::In(port, width, data.len() / width));
                for (at, byte) in data.iter_mut().enumerate() {
                    *byte = user_byte(at);
                }
            }
            Access::Out(port, width, data) => {
                exits.push(PortExit::Out(port, width, data.to_vec()));
            }
            other => panic!("{routine:?} {args:x?}: wanted ports, got {other:x?}"),
        });
        (results, exits)
    }

    /// Has a protected guest give the host access to a page of its memory.
    #[cfg(target_arch = "aarch64")]
    #[track_caller]
    pub fn share_page(&mut self, addr: u64) {
        self.hypercall(arch::MEM_SHARE, addr);
    }

    /// And take it back.
    #[cfg(target_arch = "aarch64")]
    #[track_caller]
    pub fn unshare_page(&mut self, addr: u64) {
        self.hypercall(arch::MEM_UNSHARE, addr);
    }

    #[cfg(target_arch = "aarch64")]
    #[track_caller]
    fn hypercall(&mut self, value: u64, addr: u64) {
        let args = Args {
            value,
            addr,
            ..Default::default()
        };
        let (results, exits) = self.call(Routine::Call, args);
        let got = (results.value as i64, exits);
        assert_eq!(got, (0, vec![]), "call {value:#x} with {addr:#x}");
    }

    /// How often the vCPU has left the guest so far, for whatever reason.
    pub fn exits(&self) -> u64 {
        statistic(&self.fd, "exits")
    }

    /// Has `KVM_RUN` prepare all that it does before a guest's first instruction.
    pub fn try_prepare_run(&mut self) -> Result<(), Errno> {
        self.fd.set_kvm_immediate_exit(1);
        let errno = self.fd.run().map(drop).map_err(|error| error.errno());
        self.fd.set_kvm_immediate_exit(0);
        match errno {
            Err(libc::EINTR) => Ok(()),
            Err(errno) => Err(Errno(errno)),
            Ok(()) => panic!("KVM_RUN with immediate_exit: wanted EINTR, got none"),
        }
    }

    /// Runs a loop.
    pub fn call(&mut self, routine: Routine, args: Args) -> (Results, Vec<Exit>) {
        self.run(routine, 0, args)
    }

    /// Runs a loop whose accesses, where they reach user space, are served there.
    pub fn serve(
        &mut self,
        routine: Routine,
        args: Args,
        serve: impl FnMut(Access<'_>),
    ) -> Results {
        self.run_and_serve(routine, 0, args, serve)
    }

    fn run(&mut self, routine: Routine, variant: u64, args: Args) -> (Results, Vec<Exit>) {
        let mut exits = Vec::new();
        let results = self.run_and_serve(routine, variant, args, |access| match access {
            Access::Read(addr, data) => {
                exits.push(Exit::Read(addr, data.len()));
                data.copy_from_slice(&USER_ANSWER.to_le_bytes()[..data.len()]);
            }
            Access::Write(addr, data) => {
                let mut value = [0; 8];
                value[..data.len()].copy_from_slice(data);
                exits.push(Exit::Write(addr, data.len(), u64::from_le_bytes(value)));
            }
            #[cfg(target_arch = "x86_64")]
            other => panic!("{routine:?} {args:x?}: wanted no ports, got {other:x?}"),
        });
        (results, exits)
    }

    fn run_and_serve(
        &mut self,
        routine: Routine,
        variant: u64,
        args: Args,
        serve: impl FnMut(Access<'_>),
    ) -> Results {
        self.run_until(routine, variant, args, serve, arch::is_done)
    }

    /// Runs a routine that KVM cannot go on with; returns what `KVM_RUN` says.
    #[cfg(target_arch = "aarch64")]
    #[track_caller]
    pub fn errno_of(&mut self, routine: Routine, args: Args) -> Errno {
        arch::set_registers(&self.fd, CODE + routine.offset(), &args);
        self.has_run.store(true, Ordering::Relaxed);
        match self.fd.run() {
            Err(error) => Errno(error.errno()),
            Ok(exit) => panic!("{routine:?} {args:x?}: wanted no exit, got {exit:?}"),
        }
    }

    /// Runs a routine that ends in an error of KVM's own; returns which.
    #[cfg(target_arch = "x86_64")]
    pub fn internal_error_of(&mut self, routine: Routine, args: Args) -> u32 {
        self.run_until(
            routine,
            0,
            args,
            |_| (),
            |exit| matches!(exit, VcpuExit::InternalError),
        );
        // SAFETY: the exit was `KVM_EXIT_INTERNAL_ERROR`, for which KVM fills this member.
        unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal.suberror }
    }

    fn run_until(
        &mut self,
        routine: Routine,
        variant: u64,
        args: Args,
        mut serve: impl FnMut(Access<'_>),
        is_end: impl Fn(&VcpuExit<'_>) -> bool,
    ) -> Results {
        let pc = CODE + routine.offset() + 64 * variant;
        arch::set_registers(&self.fd, pc, &args);
        self.has_run.store(true, Ordering::Relaxed);

        let alarm = Alarm::new();
        loop {
            match self.fd.run() {
                Ok(exit) if is_end(&exit) => break,
                Ok(VcpuExit::MmioRead(addr, data)) => serve(Access::Read(addr, data)),
                Ok(VcpuExit::MmioWrite(addr, data)) => serve(Access::Write(addr, data)),
                #[cfg(target_arch = "x86_64")]
                Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => {
                    serve(arch::port_access(&mut self.fd));
                }
                Ok(other) => {
                    panic!("{routine:?} {args:x?}: wanted an MMIO exit or the end, got {other:?}")
                }
                Err(error) if error.errno() == libc::EINTR => panic!(
                    "{routine:?} {args:x?}: not done after {PATIENCE:?}, at {:#x}",
                    arch::pc(&self.fd) - CODE
                ),
                Err(error) => panic!("{routine:?} {args:x?}: KVM_RUN: {error}"),
            }
        }
        drop(alarm);

        // KVM finishes the last instruction when it is entered again.
        let internal_error = self.fd.get_kvm_run().exit_reason == KVM_EXIT_INTERNAL_ERROR;
        if !internal_error {
            assert_eq!(
                self.try_prepare_run(),
                Ok(()),
                "KVM_RUN with immediate_exit"
            );
        }
        arch::results(&self.fd)
    }
}

/// Interrupts the thread's `KVM_RUN` with a signal when [`PATIENCE`] is over.
struct Alarm(libc::timer_t);

impl Alarm {
    fn new() -> Self {
        static HANDLER: Once = Once::new();
        extern "C" fn do_nothing(_signal: libc::c_int) {}
        // SAFETY: the handler does nothing, so it may run at any point.
        HANDLER.call_once(|| unsafe {
            let mut action: libc::sigaction = mem::zeroed();
            action.sa_sigaction = do_nothing as *const () as usize;
            libc::sigaction(libc::SIGUSR1, &action, ptr::null_mut());
        });

        // Again every second, should the first signal come just before KVM_RUN.
        let second = libc::timespec {
            tv_sec: 1,
            tv_nsec: 0,
        };
        let times = libc::itimerspec {
            it_interval: second,
            it_value: libc::timespec {
                tv_sec: PATIENCE.as_secs() as libc::time_t,
                tv_nsec: 0,
            },
        };
        // SAFETY: plain system calls on local structures.
        unsafe {
            let mut event: libc::sigevent = mem::zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = libc::SIGUSR1;
            event.sigev_notify_thread_id = libc::gettid();
            let mut timer = ptr::null_mut();
            assert_eq!(
                libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer),
                0,
                "timer_create"
            );
            assert_eq!(
                libc::timer_settime(timer, 0, &times, ptr::null_mut()),
                0,
                "timer_settime"
            );
            Alarm(timer)
        }
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        // SAFETY: the timer is ours.
        unsafe { libc::timer_delete(self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_fits_between_its_address_and_the_stack() {
        assert!(code().len() >= 64 * 11, "got {} bytes", code().len());
        assert!(code().len() <= 0x1000, "got {} bytes", code().len());
    }

    #[test]
    fn masks() {
        assert_eq!(
            [1, 2, 4, 8].map(mask),
            [0xff, 0xffff, 0xffff_ffff, u64::MAX]
        );
    }

    /// A guest, where this machine can run one.
    fn guest() -> Option<Guest> {
        let guest = Kvm::new().ok().map(Guest::on);
        if guest.is_none() {
            eprintln!("ignored: no /dev/kvm");
        }
        guest
    }

    #[test]
    fn accesses_without_a_device_reach_user_space() {
        let Some(guest) = guest() else { return };
        let mut vcpu = guest.vcpu(3);
        drop(guest);
        for width in [1, 2, 4, 8] {
            let read = vcpu.read(0xd000_0000, width);
            let value = USER_ANSWER & mask(width);
            assert_eq!(read.exits, [Exit::Read(0xd000_0000, width)]);
            assert_eq!(read.value, value);
            assert_eq!(read.register, register_after_read(PRESET, value, width));

            let value: u64 = 0x8877_6655_4433_2211;
            let exits = vcpu.write(0xd000_0000, width, value);
            assert_eq!(
                exits,
                [Exit::Write(0xd000_0000, width, value & mask(width))]
            );
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn ports_without_a_device_reach_user_space() {
        let Some(guest) = guest() else { return };
        let mut vcpu = guest.vcpu(0);
        for width in [1, 2, 4] {
            let (register, exits) = vcpu.port_in(0x510, width);
            assert_eq!(exits, [PortExit::In(0x510, width, 1)]);
            let bytes: [u8; 8] = std::array::from_fn(user_byte);
            let value = u64::from_le_bytes(bytes) & mask(width);
            assert_eq!(register, register_after_read(PRESET, value, width));

            let exits = vcpu.port_out(0x510, width, 0x44_3322_1100);
            let data = 0x44_3322_1100_u64.to_le_bytes()[..width].to_vec();
            assert_eq!(exits, [PortExit::Out(0x510, width, data)]);
        }
    }

    #[test]
    fn hammer_ends_at_a_wrong_answer() {
        let Some(guest) = guest() else { return };
        let mut vcpu = guest.vcpu(0);
        for (pair, left, exits) in [
            ([0, USER_ANSWER], 0, 20),
            ([USER_ANSWER, 0], 0, 20),
            ([0; 2], 10, 2),
        ] {
            let args = Args {
                value: 1,
                addr: 0xd000_0000,
                count: 10,
                pair,
            };
            let (results, seen) = vcpu.call(Routine::Hammer, args);
            assert_eq!((results.count, results.value), (left, USER_ANSWER));
            assert_eq!(seen.len(), exits);
        }
    }

    #[test]
    fn takes_interrupts() {
        use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

        if guest().is_none() {
            return;
        }
        let guest = Guest::with_irqchip();
        let mut vcpu = guest.vcpu_with_interrupts();
        let (line, resample) = (
            EventFd::new(0).unwrap(),
            EventFd::new(EFD_NONBLOCK).unwrap(),
        );
        for level in [false, true] {
            guest.route_line(&mut vcpu, 20, level);
            if level {
                guest.vm().unregister_irqfd(&line, 20).unwrap();
                guest
                    .vm()
                    .register_irqfd_with_resample(&line, &resample, 20)
                    .unwrap();
            } else {
                guest.vm().register_irqfd(&line, 20).unwrap();
            }
            for _ in 0..3 {
                line.write(1).unwrap();
                let args = Args {
                    addr: 0xd000_0000,
                    count: 1,
                    ..Default::default()
                };
                let (results, exits) = vcpu.call(Routine::AwaitInterrupts, args);
                assert_eq!((results.value, exits.len()), (1, 1));
            }
        }
        assert_eq!(resample.read().unwrap(), 3);
    }
}
