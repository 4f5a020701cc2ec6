// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What booting a guest has in common on all architectures: the initramfs, and errors.

use std::fs::File;
use std::io::{Seek, SeekFrom};

use linux_loader::loader;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, ReadVolatile,
};
use vmm_sys_util::errno;

const PAGE: u64 = 0x1000;

/// Why the guest could not be prepared.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot {0}")]
    Kvm(&'static str, #[source] errno::Error),
    // The loader's errors name their causes themselves.
    #[error("{0}")]
    Kernel(loader::Error),
    #[cfg(target_arch = "x86_64")]
    #[error("a kernel without 64-bit entry point")]
    No64BitEntry,
    #[error("the kernel needs {needed} MiB of guest memory and there are {have}")]
    SmallMemory { needed: u64, have: u64 },
    #[error("the initramfs has {0} bytes and finds no room in guest memory")]
    InitrdSize(u64),
    #[error("cannot read the initramfs")]
    Initrd(#[source] GuestMemoryError),
    #[error("cannot write to guest memory")]
    Memory(#[from] GuestMemoryError),
    #[error("the command line has {len} bytes and the kernel takes {max}")]
    Cmdline { len: usize, max: usize },
    #[cfg(target_arch = "x86_64")]
    #[error(transparent)]
    Acpi(#[from] kvm_bpf::acpi::Error),
    #[cfg(target_arch = "x86_64")]
    #[error("{0} bytes of ACPI tables, too many devices or CPUs")]
    AcpiSize(usize),
    #[cfg(target_arch = "aarch64")]
    #[error("{has} registers of one kind are saved, and {wanted} are known")]
    Registers { wanted: usize, has: usize },
    #[cfg(target_arch = "x86_64")]
    #[error(
        "cannot set model-specific register {0:#x} to what it was: is this host's CPU another?"
    )]
    Msr(u32),
    #[cfg(target_arch = "aarch64")]
    #[error("cannot set register {0:#x} to what it was: is this host's CPU another?")]
    Register(u64, #[source] errno::Error),
    #[cfg(target_arch = "aarch64")]
    #[error(transparent)]
    Fdt(#[from] crate::aarch64::FdtError),
    #[cfg(target_arch = "aarch64")]
    #[error("{0} bytes of device tree, too many devices")]
    FdtSize(usize),
}

/// Makes an error of what KVM returned for an attempt to do that.
pub fn kvm(what: &'static str) -> impl Fn(errno::Error) -> Error {
    move |source| Error::Kvm(what, source)
}

/// Puts the initramfs below `end` and clear of the kernel; returns its first address and its size.
pub fn load_initrd(
    memory: &GuestMemoryMmap,
    initrd: &mut File,
    kernel_end: u64,
    end: u64,
) -> Result<(u64, u64), Error> {
    let unreadable = |error| Error::Initrd(GuestMemoryError::IOError(error));
    let size = initrd.seek(SeekFrom::End(0)).map_err(unreadable)?;
    initrd.rewind().map_err(unreadable)?;
    let addr = end
        .checked_sub(size)
        .map(|addr| addr & !(PAGE - 1))
        .filter(|&addr| addr >= kernel_end)
        .ok_or(Error::InitrdSize(size))?;
    let slice = memory
        .get_slice(GuestAddress(addr), size as usize)
        .map_err(Error::Initrd)?;
    initrd
        .read_exact_volatile(&mut { slice })
        .map_err(|error| Error::Initrd(error.into()))?;
    Ok((addr, size))
}

#[cfg(test)]
mod tests {
    use std::io::{Write, pipe};
    use std::os::fd::OwnedFd;

    use vm_memory::Bytes;
    use vmm_sys_util::tempfile::TempFile;

    use super::*;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap()
    }

    #[test]
    fn the_initramfs_ends_below_the_end() {
        let mut file = TempFile::new().unwrap().into_file();
        file.write_all(&[0xa5; 0x1001]).unwrap();
        let memory = memory();
        let (addr, size) = load_initrd(&memory, &mut file, 0x1000, 0x4000).unwrap();
        assert_eq!((addr, size), (0x2000, 0x1001));
        let mut bytes = [0; 0x1001];
        memory.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        assert_eq!(bytes, [0xa5; 0x1001]);

        let error = load_initrd(&memory, &mut file, 0x3000, 0x4000).unwrap_err();
        assert!(matches!(error, Error::InitrdSize(0x1001)), "{error:?}");
    }

    #[test]
    fn a_pipe_is_no_initramfs() {
        let (reader, _writer) = pipe().unwrap();
        let mut file = File::from(OwnedFd::from(reader));
        let error = load_initrd(&memory(), &mut file, 0, 0x4000).unwrap_err();
        assert!(matches!(error, Error::Initrd(_)), "{error:?}");
    }
}
