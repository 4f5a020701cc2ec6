// SPDX-License-Identifier: Apache-2.0 OR MIT

//! System calls, as far as std has none for them.

use std::ffi::CString;
use std::fs;
use std::io;
use std::mem;
#[cfg(feature = "serde")]
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
#[cfg(feature = "serde")]
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// `struct kvm_create_device`.
#[repr(C)]
struct CreateDevice {
    type_: u32,
    fd: u32,
    flags: u32,
}

/// `struct kvm_device_attr`.
#[repr(C)]
struct DeviceAttr {
    flags: u32,
    group: u32,
    attr: u64,
    addr: u64,
}

/// `struct kvm_enable_cap`.
#[repr(C)]
struct EnableCap {
    cap: u32,
    flags: u32,
    args: [u64; 4],
    pad: [u8; 64],
}

/// `struct kvm_userspace_memory_region`.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct MemoryRegion {
    pub slot: u32,
    pub flags: u32,
    pub guest_phys_addr: u64,
    pub memory_size: u64,
    pub userspace_addr: u64,
}

/// `KVM_MEM_READONLY`, a flag of [`MemoryRegion`].
pub(crate) const KVM_MEM_READONLY: u32 = 1 << 1;

const KVM_CHECK_EXTENSION: u64 = 0xae03;
const KVM_SET_USER_MEMORY_REGION: u64 = 0x4020_ae46;
const KVM_ENABLE_CAP: u64 = 0x4068_aea3;
const KVM_CREATE_DEVICE: u64 = 0xc00c_aee0;
const KVM_SET_DEVICE_ATTR: u64 = 0x4018_aee1;
const KVM_GET_DEVICE_ATTR: u64 = 0x4018_aee2;
const KVM_HAS_DEVICE_ATTR: u64 = 0x4018_aee3;
/// Only asks whether there is such a device.
const KVM_CREATE_DEVICE_TEST: u32 = 1;

/// An ioctl whose argument is a structure, or a number that goes by as an address.
///
/// # Safety
///
/// `arg` is what the request expects.
unsafe fn ioctl<T>(fd: RawFd, request: u64, arg: *mut T) -> io::Result<i32> {
    // The C libraries do not agree on the type of the request.
    // SAFETY: the caller has an argument that fits.
    match unsafe { libc::ioctl(fd, request as _, arg) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

/// Creates a device of a VM.
pub(crate) fn create_device(vm: RawFd, type_: u32) -> io::Result<OwnedFd> {
    let (fd, flags) = (0, 0);
    let mut create = CreateDevice { type_, fd, flags };
    // SAFETY: the kernel reads and writes one structure.
    unsafe { ioctl(vm, KVM_CREATE_DEVICE, &mut create)? };
    // SAFETY: the kernel has just made it, for nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(create.fd as RawFd) })
}

/// Whether a VM could have such a device.
pub(crate) fn has_device(vm: RawFd, type_: u32) -> io::Result<()> {
    let (fd, flags) = (0, KVM_CREATE_DEVICE_TEST);
    let mut create = CreateDevice { type_, fd, flags };
    // SAFETY: the kernel reads and writes one structure.
    unsafe { ioctl(vm, KVM_CREATE_DEVICE, &mut create) }.map(drop)
}

/// Sets an attribute of a device.
pub(crate) fn set_attr<T>(
    device: BorrowedFd<'_>,
    group: u32,
    attr: u64,
    value: &T,
) -> io::Result<()> {
    let mut attr = DeviceAttr {
        flags: 0,
        group,
        attr,
        addr: std::ptr::from_ref(value) as u64,
    };
    // SAFETY: the kernel reads one structure, and `value`, which lives as long as the call.
    unsafe { ioctl(device.as_raw_fd(), KVM_SET_DEVICE_ATTR, &mut attr) }.map(drop)
}

/// Returns an attribute of a device.
///
/// # Safety
///
/// The kernel writes a `T` for attributes of that group, for which any bytes are a value.
pub(crate) unsafe fn get_attr<T: Default>(
    device: BorrowedFd<'_>,
    group: u32,
    attr: u64,
) -> io::Result<T> {
    let mut value = T::default();
    let mut attr = DeviceAttr {
        flags: 0,
        group,
        attr,
        addr: (&raw mut value) as u64,
    };
    // SAFETY: the kernel reads one structure, and writes to `value` what fits.
    unsafe { ioctl(device.as_raw_fd(), KVM_GET_DEVICE_ATTR, &mut attr)? };
    Ok(value)
}

/// Enables a capability of a VM, with one argument.
pub(crate) fn enable_cap(vm: RawFd, cap: u32, arg: u64) -> io::Result<()> {
    let mut enable = EnableCap {
        cap,
        flags: 0,
        args: [arg, 0, 0, 0],
        pad: [0; 64],
    };
    // SAFETY: the kernel reads one structure.
    unsafe { ioctl(vm, KVM_ENABLE_CAP, &mut enable) }.map(drop)
}

/// Whether a device has an attribute: `ENXIO` if not.
pub(crate) fn has_attr(device: BorrowedFd<'_>, group: u32, attr: u64) -> io::Result<()> {
    let (flags, addr) = (0, 0);
    let mut attr = DeviceAttr {
        flags,
        group,
        attr,
        addr,
    };
    // SAFETY: the kernel reads one structure.
    unsafe { ioctl(device.as_raw_fd(), KVM_HAS_DEVICE_ATTR, &mut attr) }.map(drop)
}

/// What KVM answers about an extension; 0 where it has it not, or does not know it.
pub(crate) fn check_extension(vm: RawFd, extension: u64) -> i32 {
    // SAFETY: the argument is a number.
    unsafe { ioctl(vm, KVM_CHECK_EXTENSION, extension as *mut libc::c_void) }.unwrap_or(0)
}

/// Sets a memory slot.
///
/// # Safety
///
/// The memory at `userspace_addr` is the guest's, as far as the flags say, until the slot is gone.
pub(crate) unsafe fn set_memory(vm: BorrowedFd<'_>, region: &mut MemoryRegion) -> io::Result<()> {
    // SAFETY: the kernel reads one structure; the caller gives the memory away.
    unsafe { ioctl(vm.as_raw_fd(), KVM_SET_USER_MEMORY_REGION, region) }.map(drop)
}

/// A duplicate of a file descriptor, with close-on-exec.
pub(crate) fn duplicate(fd: &impl AsRawFd) -> io::Result<OwnedFd> {
    // SAFETY: duplicating takes nothing from anyone; a number that is none is EBADF.
    match unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 3) } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: it is new.
        new => Ok(unsafe { OwnedFd::from_raw_fd(new) }),
    }
}

/// A new eventfd that does not block.
pub(crate) fn eventfd() -> io::Result<OwnedFd> {
    // SAFETY: there are no pointers.
    match unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: it is new.
        fd => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
    }
}

/// Signals an eventfd once. It waits while that has as many signals as it can, if it is one that
/// blocks.
pub(crate) fn signal(eventfd: &impl AsRawFd) -> io::Result<()> {
    let once = 1_u64.to_ne_bytes();
    // SAFETY: the kernel reads as many bytes as there are.
    match unsafe { libc::write(eventfd.as_raw_fd(), once.as_ptr().cast(), once.len()) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

// --- bpf(2): numbers and layouts are those of include/uapi/linux/bpf.h ---

#[cfg(feature = "serde")]
const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
#[cfg(feature = "serde")]
const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
#[cfg(feature = "serde")]
const BPF_MAP_FREEZE: libc::c_int = 22;

/// The types of maps that the library has to tell.
#[allow(unused)]
pub(crate) mod map_type {
    pub const HASH: u32 = 1;
    pub const ARRAY: u32 = 2;
    pub const PROG_ARRAY: u32 = 3;
    pub const PERCPU_HASH: u32 = 5;
    pub const PERCPU_ARRAY: u32 = 6;
    pub const LRU_PERCPU_HASH: u32 = 10;
    pub const PERCPU_CGROUP_STORAGE: u32 = 21;
    pub const RINGBUF: u32 = 27;
}

/// `BPF_F_RDONLY_PROG`: programs only read the map.
pub(crate) const BPF_F_RDONLY_PROG: u32 = 1 << 7;
/// `BPF_F_MMAPABLE`: user space can map the array.
pub(crate) const BPF_F_MMAPABLE: u32 = 1 << 10;

/// What all commands here have of `union bpf_attr`: larger than each of them, with zeroes behind it.
#[repr(C, align(8))]
struct Attr([u64; 10]);

/// # Safety
///
/// The addresses in `attr` are what the command expects.
unsafe fn bpf(command: libc::c_int, attr: &mut Attr) -> io::Result<i32> {
    // SAFETY: the structure has the size that is said, and the caller answers for what is in it.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attr, size_of::<Attr>()) };
    match result {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result as i32),
    }
}

/// Two numbers of 32 bits, one behind the other.
fn pair(first: u32, second: u32) -> u64 {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&first.to_ne_bytes());
    bytes[4..].copy_from_slice(&second.to_ne_bytes());
    u64::from_ne_bytes(bytes)
}

/// A system call that makes a file descriptor.
fn owned(fd: io::Result<i32>) -> io::Result<OwnedFd> {
    // SAFETY: the kernel has just made it, for nobody else.
    fd.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What the kernel says about a map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub(crate) struct MapInfo {
    pub map_type: u32,
    pub id: u32,
    pub key_size: u32,
    pub value_size: u32,
    pub max_entries: u32,
    pub flags: u32,
}

impl MapInfo {
    /// Bytes from one element of an array to the next: the kernel pads them.
    pub fn stride(&self) -> usize {
        (self.value_size as usize).next_multiple_of(8)
    }
}

/// The kernel's `struct bpf_map_info`, as far as it is of use here.
pub(crate) fn map_info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    // Room for what a newer kernel has: it must be 0.
    let mut info = [0_u32; 64];
    let mut attr = Attr([0; 10]);
    attr.0[0] = pair(map.as_raw_fd() as u32, size_of_val(&info) as u32);
    attr.0[1] = info.as_mut_ptr() as u64;
    // SAFETY: the kernel writes at most as many bytes as `info` has.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)? };
    let [map_type, id, key_size, value_size, max_entries, flags, ..] = info;
    Ok(MapInfo {
        map_type,
        id,
        key_size,
        value_size,
        max_entries,
        flags,
    })
}

/// Reads an element into `value`, which has room for it; none if there is no such key.
pub(crate) fn map_lookup(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
    let mut attr = Attr([0; 10]);
    attr.0[0] = pair(map.as_raw_fd() as u32, 0);
    attr.0[1] = key.as_ptr() as u64;
    attr.0[2] = value.as_mut_ptr() as u64;
    // SAFETY: the callers have checked the sizes of both.
    match unsafe { bpf(BPF_MAP_LOOKUP_ELEM, &mut attr) } {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Writes an element, new or not.
pub(crate) fn map_update(map: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> io::Result<()> {
    let mut attr = Attr([0; 10]);
    attr.0[0] = pair(map.as_raw_fd() as u32, 0);
    attr.0[1] = key.as_ptr() as u64;
    attr.0[2] = value.as_ptr() as u64;
    // SAFETY: the callers have checked the sizes of both.
    unsafe { bpf(BPF_MAP_UPDATE_ELEM, &mut attr) }.map(drop)
}

/// Makes an array of one element with these bytes, which nobody changes any more.
#[cfg(feature = "serde")]
pub(crate) fn frozen_array(name: &str, bytes: &[u8]) -> io::Result<OwnedFd> {
    let mut attr = Attr([0; 10]);
    attr.0[0] = pair(map_type::ARRAY, size_of::<u32>() as u32);
    attr.0[1] = pair(bytes.len() as u32, 1);
    // Behind flags, a map inside, a NUMA node: 16 bytes for the name.
    let mut full = [0; 16];
    let len = name.len().min(15);
    full[..len].copy_from_slice(&name.as_bytes()[..len]);
    // The name begins in the middle of a word, at byte 28.
    let word = |at: usize| u32::from_ne_bytes([full[at], full[at + 1], full[at + 2], full[at + 3]]);
    attr.0[3] = pair(0, word(0));
    attr.0[4] = pair(word(4), word(8));
    attr.0[5] = pair(word(12), 0);
    // SAFETY: there are no addresses.
    let map = owned(unsafe { bpf(BPF_MAP_CREATE, &mut attr) })?;
    let fd = std::os::fd::AsFd::as_fd(&map);
    map_update(fd, &[0; 4], bytes)?;
    let mut attr = Attr([0; 10]);
    attr.0[0] = pair(fd.as_raw_fd() as u32, 0);
    // SAFETY: there are no addresses.
    unsafe { bpf(BPF_MAP_FREEZE, &mut attr)? };
    Ok(map)
}

fn c_path(path: &Path) -> io::Result<CString> {
    let path = CString::new(path.as_os_str().as_bytes());
    path.map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))
}

/// Pins a program or map in a bpf file system.
#[cfg(feature = "serde")]
pub(crate) fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attr = Attr([0; 10]);
    attr.0[0] = path.as_ptr() as u64;
    attr.0[1] = pair(fd.as_raw_fd() as u32, 0);
    // SAFETY: the path ends in NUL and lives as long as the call.
    unsafe { bpf(BPF_OBJ_PIN, &mut attr) }.map(drop)
}

/// Opens a pinned program or map.
pub(crate) fn get_pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attr = Attr([0; 10]);
    attr.0[0] = path.as_ptr() as u64;
    // SAFETY: the path ends in NUL and lives as long as the call.
    owned(unsafe { bpf(BPF_OBJ_GET, &mut attr) })
}

/// What `/proc/self/fdinfo` says of a program or map, by the names of the lines.
#[derive(Debug)]
pub(crate) struct FdInfo(String);

impl FdInfo {
    /// Reads it. It is no system call of bpf(2). The error names the file.
    pub fn of(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let path = format!("/proc/self/fdinfo/{}", fd.as_raw_fd());
        fs::read_to_string(&path)
            .map(FdInfo)
            .map_err(|error| io::Error::new(error.kind(), format!("{path}: {error}")))
    }

    /// The number in a line, with `0x` before it or not.
    pub fn number(&self, name: &str) -> Option<u64> {
        let value = self.0.lines().find_map(|line| {
            let (own, value) = line.split_once(':')?;
            (own == name).then_some(value.trim())
        })?;
        match value.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).ok(),
            None => value.parse().ok(),
        }
    }

    /// What it says of a map; none if it is of something else.
    #[cfg(feature = "serde")]
    pub fn map(&self) -> Option<MapInfo> {
        let number = |name| u32::try_from(self.number(name)?).ok();
        Some(MapInfo {
            map_type: number("map_type")?,
            id: number("map_id")?,
            key_size: number("key_size")?,
            value_size: number("value_size")?,
            max_entries: number("max_entries")?,
            flags: number("map_flags")?,
        })
    }
}

/// Whether it is no file that has a name or could have one, no pipe and no socket: as programs, maps
/// and what else the kernel has file descriptors for.
#[cfg(feature = "serde")]
pub(crate) fn is_anonymous(fd: BorrowedFd<'_>) -> bool {
    // With statx(2), which std needs for any file: fstat(3) would be one more to allow.
    //
    // SAFETY: the descriptor is open, and stays so.
    let file = ManuallyDrop::new(unsafe { fs::File::from_raw_fd(fd.as_raw_fd()) });
    file.metadata()
        .is_ok_and(|data| data.mode() & libc::S_IFMT == 0)
}

/// Bytes of a page of this host.
pub(crate) fn page_size() -> usize {
    // SAFETY: asks for a number.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as usize }
}

const _: () = assert!(mem::size_of::<CreateDevice>() == 12);
const _: () = assert!(mem::size_of::<DeviceAttr>() == 24);
const _: () = assert!(mem::size_of::<MemoryRegion>() == 32);

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(feature = "serde")]
    #[test]
    fn lines_of_fdinfo_are_numbers() {
        let text = "pos:\t0\nmap_type:\t2\nkey_size:\t4\nvalue_size:\t24\nmax_entries:\t1\n\
                    map_flags:\t0x400\nmap_extra:\t0x0\nmemlock:\t4096\nmap_id:\t17\nfrozen:\t0\n";
        let info = FdInfo(text.to_string()).map();
        let wanted = MapInfo {
            map_type: map_type::ARRAY,
            id: 17,
            key_size: 4,
            value_size: 24,
            max_entries: 1,
            flags: BPF_F_MMAPABLE,
        };
        assert_eq!(info, Some(wanted));
        let program = FdInfo("prog_type:\t33\nprog_id:\t9\nrun_cnt:\t7\n".to_string());
        assert_eq!(program.map(), None);
        assert_eq!(program.number("run_cnt"), Some(7));
        assert_eq!(program.number("cnt"), None);
    }

    #[cfg(feature = "serde")]
    #[test]
    fn files_are_not_anonymous() {
        use std::os::fd::AsFd;

        assert!(is_anonymous(eventfd().unwrap().as_fd()));
        // SAFETY: the name is a string.
        let memory = unsafe { libc::memfd_create(c"x".as_ptr(), libc::MFD_CLOEXEC) };
        // SAFETY: it is new.
        let memory = unsafe { OwnedFd::from_raw_fd(memory) };
        assert!(!is_anonymous(memory.as_fd()));
        let (reader, _) = io::pipe().unwrap();
        assert!(!is_anonymous(reader.as_fd()));
        let null = fs::File::open("/dev/null").unwrap();
        assert!(!is_anonymous(null.as_fd()));
    }

    #[test]
    fn eventfds_count_and_duplicates_are_the_same() {
        let eventfd = eventfd().unwrap();
        let other = duplicate(&eventfd).unwrap();
        let one = 1_u64.to_ne_bytes();
        // SAFETY: both calls have 8 bytes.
        unsafe {
            assert_eq!(libc::write(eventfd.as_raw_fd(), one.as_ptr().cast(), 8), 8);
            let mut got = [0; 8];
            assert_eq!(libc::read(other.as_raw_fd(), got.as_mut_ptr().cast(), 8), 8);
            assert_eq!(u64::from_ne_bytes(got), 1);
            // It is empty, and does not block.
            assert_eq!(
                libc::read(other.as_raw_fd(), got.as_mut_ptr().cast(), 8),
                -1
            );
            let flags = libc::fcntl(other.as_raw_fd(), libc::F_GETFD);
            assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
        }
        let closed = duplicate(&-1).unwrap_err();
        assert_eq!(closed.raw_os_error(), Some(libc::EBADF));
    }
}
