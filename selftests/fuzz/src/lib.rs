// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What in user space reads what others have written: each target takes any bytes, and neither
//! panics nor loses a file descriptor.
//!
//! `cargo test` runs all on mutations of `seeds/`, the same each time; `scripts/fuzz` runs one under
//! libFuzzer, which follows what the code does.
//!
//! The seeds are small, so that much of them counts: objects of `samples/devices` and
//! `selftests/progs` without debugging information, for `note` their notes alone.

use std::io::{IoSlice, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Once;
use std::{fs, io, mem, ptr, str};

use kvm_bpf::acpi::{Interrupt, Object};
use kvm_bpf::fdt::Node;
use kvm_bpf::transfer::Error;
use kvm_bpf::{Note, OpenImage, Place, Programs, State};

#[allow(dead_code)]
#[path = "../../../samples/inspect/src/fdinfo.rs"]
mod fdinfo_of;

/// A target by its name, which its directory of seeds has too. It returns whether the input was good.
pub type Target = (&'static str, fn(&[u8]) -> bool);

/// All of them.
pub const TARGETS: [Target; 6] = [
    ("note", note),
    ("object", object),
    ("state", state),
    ("socket", socket),
    ("fdinfo", fdinfo),
    ("tables", tables),
];

/// The note of an object file.
pub fn note(file: &[u8]) -> bool {
    let Ok(note) = Note::from_elf(file) else {
        return false;
    };
    assert!(note.is_same_device(&note), "{note:?}");
    let loads_own = note.state_version.is_some();
    assert_eq!(note.loads_state_of(&note), loads_own, "{note:?}");
    for work in &note.works {
        assert_eq!(note.work_index(&work.name), Some(work.index), "{note:?}");
    }
    for param in &note.params {
        assert_eq!(note.param(&param.name), Some(param), "{note:?}");
    }
    note.regions();
    true
}

/// A device's node in a device tree and its object in ACPI's namespace, from what the VMM chooses
/// (the first 16 bytes) and the note of an object file (the rest).
pub fn tables(bytes: &[u8]) -> bool {
    let Some((chosen, file)) = bytes.split_at_checked(16) else {
        return false;
    };
    let Ok(note) = Note::from_elf(file) else {
        return false;
    };
    let addr = u64::from_le_bytes(chosen[..8].try_into().expect("eight bytes"));
    let numbers: Vec<u32> = chosen[8..12].iter().copied().map(u32::from).collect();
    let name = str::from_utf8(&chosen[12..]).unwrap_or("DEV0");

    let is_in_tree = Node::of_note(&note, addr).is_ok_and(|mut node| {
        node.interrupts = numbers.clone();
        node.clock = Some(numbers[0]);
        node.properties().is_ok_and(|properties| {
            let value = |name| properties.iter().find(|property| property.0 == name);
            let (_, reg) = value("reg").expect("its range");
            assert_eq!(reg[..8], addr.to_be_bytes(), "{note:?}");
            true
        })
    });

    let places = [Place::Memory(addr), Place::Port(addr as u16)];
    let objects = places.map(|place| {
        Object::of_note(&note, name, numbers[0], place).is_ok_and(|mut object| {
            object.interrupts = numbers.iter().copied().map(Interrupt::level).collect();
            let aml = object.to_aml();
            // A Device (ExtOp, DeviceOp), with the length of the rest.
            assert_eq!(aml[..2], [0x5b, 0x82], "{note:?} at {place:?}");
            true
        })
    });
    is_in_tree || objects.contains(&true)
}

/// An object file that is opened, and not loaded: the library's part and libbpf's.
pub fn object(file: &[u8]) -> bool {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        libbpf_rs::set_print(None);
    });
    let Ok(mut image) = OpenImage::open("fuzz", file) else {
        return false;
    };
    image.note().regions();
    // It may have none.
    let _ = image.edit_initial(".rodata", |bytes| bytes.fill(0));
    true
}

/// Saved state. What can be read comes back when it is written.
pub fn state(json: &[u8]) -> bool {
    let Ok(state) = State::from_json(json) else {
        return false;
    };
    let written = state.to_json().expect("what was read can be written");
    let again = State::from_json(&written).expect("what was written can be read");
    assert_eq!(again, state);
    true
}

/// Programs that come over a socket. The first byte says how many file descriptors come with the
/// rest, which are no programs, and whether a good header comes before it. Nothing is good then but
/// the description.
pub fn socket(bytes: &[u8]) -> bool {
    let Some((&first, bytes)) = bytes.split_first() else {
        return false;
    };
    let before = open_files();
    let is_good = {
        let (sender, receiver) = UnixStream::pair().expect("a pair of sockets");
        let file = fs::File::open("/dev/null").expect("/dev/null");
        let fds = vec![file.as_raw_fd(); usize::from(first % 8)];
        // Nobody reads meanwhile: no more than the socket has room for.
        let bytes = &bytes[..bytes.len().min(0x1_0000)];
        let mut all = Vec::new();
        if first & 0x80 != 0 {
            all.extend(b"kvm-bpf\0\x01\0\0\0");
            all.extend((bytes.len() as u32).to_le_bytes());
        }
        all.extend(bytes);
        let bytes = &all[..];
        let (start, rest) = bytes.split_at(bytes.len().min(16));
        if !start.is_empty() {
            let sent = send_with_fds(&sender, start, &fds).expect("sending the start");
            (&sender)
                .write_all(&start[sent..])
                .expect("sending the start");
        }
        (&sender).write_all(rest).expect("sending the rest");
        sender.shutdown(Shutdown::Write).expect("ending it");
        let received = Programs::recv(&receiver);
        assert!(
            fds.is_empty() || received.is_err(),
            "/dev/null as a program: {received:?}"
        );
        matches!(
            received,
            Ok(_) | Err(Error::NotProgram(_) | Error::Map { .. } | Error::Fds { .. })
        )
    };
    assert_eq!(open_files(), before, "open files");
    is_good
}

fn open_files() -> usize {
    fs::read_dir("/proc/self/fd").expect("/proc").count()
}

fn send_with_fds(stream: &UnixStream, bytes: &[u8], fds: &[RawFd]) -> io::Result<usize> {
    /// Room for a header and eight file descriptors, with the alignment of the header.
    #[repr(align(8))]
    struct Control([u8; 64]);

    let parts = [IoSlice::new(bytes)];
    let mut control = Control([0; 64]);
    let data_len = size_of_val(fds) as u32;
    // SAFETY: all zeroes is a good header of a message; the parts have the layout of `iovec`; the
    // control message fits into its buffer, with eight file descriptors too.
    unsafe {
        let mut message: libc::msghdr = mem::zeroed();
        message.msg_iov = parts.as_ptr().cast_mut().cast();
        message.msg_iovlen = 1;
        if !fds.is_empty() {
            message.msg_control = control.0.as_mut_ptr().cast();
            message.msg_controllen = libc::CMSG_SPACE(data_len) as _;
            let header = libc::CMSG_FIRSTHDR(&message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(data_len) as _;
            let data = libc::CMSG_DATA(header);
            ptr::copy_nonoverlapping(fds.as_ptr().cast(), data, data_len as usize);
        }
        match libc::sendmsg(stream.as_raw_fd(), &message, 0) {
            -1 => Err(io::Error::last_os_error()),
            len => Ok(len as usize),
        }
    }
}

/// What `kvm-bpf inspect` reads.
pub fn fdinfo(text: &[u8]) -> bool {
    let device = str::from_utf8(text).map(fdinfo_of::Device::parse);
    let Ok(Ok(device)) = device else {
        return false;
    };
    device.programs();
    true
}
