// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Registers of devices that no driver of the guest has.

use std::fmt::LowerHex;
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::ptr::NonNull;
use std::time::Duration;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use vm_memory::ByteValued;

use crate::system::{number, parts, program, status, wait_until};

/// Registers of a bank.
const ID: u64 = 0x00;
const VERSION: u64 = 0x04;
pub const SCRATCH: u64 = 0x08;
pub const COUNT: u64 = 0x10;
const TIME: u64 = 0x18;
const UNKNOWN: u64 = 0x28;

const PAGE: u64 = 0x1000;

/// The registers of a device from an address on, to the end of that page.
pub struct Registers {
    addr: u64,
    page: NonNull<u8>,
}

impl Registers {
    pub fn at(addr: u64) -> io::Result<Self> {
        // O_SYNC: not cached.
        let memory = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_SYNC)
            .open("/dev/mem")?;
        // SAFETY: a new mapping; that of a device has no Rust object in it.
        let page = unsafe {
            mmap(
                None,
                (PAGE as usize).try_into().expect("a page"),
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                &memory,
                (addr - addr % PAGE) as libc::off_t,
            )?
        };
        let page = page.cast();
        Ok(Registers { addr, page })
    }

    /// The address of one.
    pub fn addr(&self, offset: u64) -> u64 {
        self.addr + offset
    }

    /// Where it is, which is no place for another width, or in another page.
    #[track_caller]
    fn register<T>(&self, offset: u64) -> NonNull<T> {
        let at = self.addr % PAGE + offset;
        let size = size_of::<T>() as u64;
        assert!(
            at + size <= PAGE && at.is_multiple_of(size),
            "offset {offset:#x}"
        );
        // SAFETY: that is within the page.
        unsafe { self.page.add(at as usize).cast() }
    }

    // Neither is inlined: in a loop the compiler may choose an instruction that moves the pointer as
    // well, which KVM cannot emulate on arm64.

    /// Loads one, with one access of its width.
    #[inline(never)]
    pub fn read<T: ByteValued + Into<u64>>(&self, offset: u64) -> T {
        // SAFETY: it is mapped and aligned, and any bits are a number.
        unsafe { self.register::<T>(offset).read_volatile() }
    }

    /// Stores to one, likewise.
    #[inline(never)]
    pub fn write<T: ByteValued + Into<u64>>(&self, offset: u64, value: T) {
        // SAFETY: it is mapped and aligned.
        unsafe { self.register::<T>(offset).write_volatile(value) }
    }
}

impl Drop for Registers {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing points to it any more.
        let _ = unsafe { munmap(self.page.cast(), PAGE as usize) };
    }
}

/// `bank=ADDRESS`: accesses each register of a bank.
///
/// "ACCESS address bits read|write value": what came back, or what was written.
pub fn bank(args: &[&str]) -> io::Result<()> {
    let [addr] = parts(args)?;
    let bank = Registers::at(number(addr)?)?;
    read::<u32>(&bank, ID);
    read::<u32>(&bank, VERSION);
    write::<u64>(&bank, SCRATCH, 0x1122_3344_5566_7788);
    // Its lowest byte alone.
    write::<u8>(&bank, SCRATCH, 0xaa);
    read::<u64>(&bank, SCRATCH);
    // Its bytes 2 and 3.
    read::<u16>(&bank, SCRATCH + 2);
    read::<u64>(&bank, TIME);
    read::<u64>(&bank, TIME);
    read::<u32>(&bank, UNKNOWN);
    read::<u64>(&bank, COUNT);
    Ok(())
}

fn read<T: ByteValued + Into<u64>>(bank: &Registers, offset: u64) {
    let value: u64 = bank.read::<T>(offset).into();
    let (addr, bits) = (bank.addr(offset), 8 * size_of::<T>());
    let width = 2 + bits / 4;
    println!("ACCESS {addr:#x} {bits} read {value:#0width$X}");
}

fn write<T: ByteValued + Into<u64> + LowerHex>(bank: &Registers, offset: u64, value: T) {
    bank.write(offset, value);
    let (addr, bits) = (bank.addr(offset), 8 * size_of::<T>());
    println!("ACCESS {addr:#x} {bits} write {value:#x}");
}

/// `watch=ADDRESS`: reads a register until it changes, for a minute.
///
/// "WATCH value" when it begins, and at the end.
pub fn watch(args: &[&str]) -> io::Result<()> {
    let [addr] = parts(args)?;
    let register = Registers::at(number(addr)?)?;
    let read = || register.read::<u32>(0);
    let first = read();
    println!("WATCH {first:#010X}");
    wait_until(60, Duration::from_secs(1), || read() != first);
    println!("WATCH {:#010X}", read());
    Ok(())
}

/// `access=ADDRESS`: has `kvm-bpf-guest-access` access a device, where there is that program.
pub fn access(args: &[&str]) -> io::Result<()> {
    status(program("kvm-bpf-guest-access", args))?;
    Ok(())
}

/// `perf=ADDRESS,KHZ`: asks for a frequency, of a virtual cpufreq device that no driver has.
pub fn perf(args: &[&str]) -> io::Result<()> {
    const CURRENT: u64 = 0x00;
    const WANTED: u64 = 0x04;

    let [addr, frequency] = parts(args)?;
    let page = Registers::at(number(addr)?)?;
    // It is for the vCPU that reads what it runs at.
    page.read::<u32>(CURRENT);
    page.write::<u32>(WANTED, number(frequency)? as u32);
    Ok(())
}
