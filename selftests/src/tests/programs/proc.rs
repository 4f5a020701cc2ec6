// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Programs taken without `/proc`, and what is refused then.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use kvm_bpf::{Programs, transfer};
use kvm_bpf_selftests::guest::Guest;
use kvm_bpf_selftests::harness::Errno;
use kvm_bpf_selftests::programs::{loaded, test_image};
use kvm_ioctls::Kvm;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::params::param;
use super::{between_ends, ends, plugged};

/// Takes `/proc` away from a process.
fn unmount_proc() {
    // SAFETY: the process has one thread, and the strings end in NUL.
    let results = unsafe {
        [
            libc::unshare(libc::CLONE_NEWNS),
            libc::mount(
                std::ptr::null(),
                c"/".as_ptr(),
                std::ptr::null(),
                libc::MS_REC | libc::MS_PRIVATE,
                std::ptr::null(),
            ),
            libc::umount2(c"/proc".as_ptr(), libc::MNT_DETACH),
        ]
    };
    assert_got!(results, [0; 3], "/proc unmounted: {:?}", Errno::last());
    assert!(!Path::new("/proc/self").exists(), "/proc is there still");
}

/// Sends programs with the description and the file descriptors that `change` makes of theirs.
fn send_changed(
    stream: &UnixStream,
    programs: &Programs,
    change: impl FnOnce(&str, &mut [RawFd]) -> String,
) {
    let (one, other) = UnixStream::pair().expect("socketpair");
    programs.send(&one).expect("the programs sent");
    drop(one);
    let mut bytes = vec![0; 0x1_0000];
    let mut fds = [-1; 64];
    let mut parts = [libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: 16,
    }];
    // SAFETY: the buffer has the room that is said.
    let received = unsafe { other.recv_with_fds(&mut parts, &mut fds) };
    let (len, count) = received.expect("the header");
    assert_got!(len, 16, "bytes of a header");
    let mut json = String::new();
    (&other).read_to_string(&mut json).expect("a description");
    let before = fds;
    let changed = change(&json, &mut fds[..count]);
    assert!(
        changed != json || fds != before,
        "nothing has changed: {json}"
    );
    bytes.truncate(12);
    bytes.extend((changed.len() as u32).to_le_bytes());
    let fds = &fds[..count];
    stream.send_with_fds(&[&bytes[..]], fds).expect("a header");
    (&*stream)
        .write_all(changed.as_bytes())
        .expect("a description");
}

/// Without `/proc` no map is taken, but by who may ask with bpf(2).
pub(super) fn without_proc() {
    // A value that is larger than described would be copied behind the memory that is for it.
    let smaller = |json: &str, _: &mut [RawFd]| {
        let at = json.find(r#""name":"longs""#).expect("the map");
        let (before, map) = json.split_at(at);
        format!(
            "{before}{}",
            map.replacen(r#""value_size":8"#, r#""value_size":4"#, 1)
        )
    };
    let manager = |stream: UnixStream| {
        let good = loaded(test_image("params"));
        good.param("longs", [5]).expect("a value");
        for _ in 0..2 {
            good.send(&stream).expect("the programs sent");
        }
        // Any length of a vCPU's memory can be mapped, and behind its pages is a SIGBUS.
        let guest = Guest::new();
        let vcpu = guest.vm().create_vcpu(0).expect("KVM_CREATE_VCPU");
        let not_maps = |json: &str, fds: &mut [RawFd]| {
            let maps = fds.len() - good.maps().count();
            fds[maps..].fill(vcpu.as_raw_fd());
            json.to_string()
        };
        send_changed(&stream, &good, not_maps);
        for _ in 0..2 {
            send_changed(&stream, &loaded(test_image("params")), smaller);
        }
    };
    let assert_unconfirmed = |result: Result<Programs, _>, wanted| match result {
        Err(transfer::Error::Unconfirmed { source, .. }) => assert_got!(source.kind(), wanted),
        other => panic!("wanted Unconfirmed, got {other:?}"),
    };
    let assert_other_sizes = |result| match result {
        Err(transfer::Error::Map { name, why }) => {
            assert_got!(name, "longs");
            assert!(why.contains("described as"), "{why}");
        }
        other => panic!("wanted an error of the map, got {other:?}"),
    };
    let vmm = |stream: UnixStream, kvm: Kvm| {
        let guest = Guest::on(kvm);
        let mut vcpu = guest.vcpu(0);
        let none = Programs::recv(&stream);
        assert_unconfirmed(none, std::io::ErrorKind::NotFound);
        let programs = Programs::recv_with_bpf(&stream).expect("the programs");
        programs.param("mapped", [7]).expect("a value");
        let error = programs.stats().expect_err("counts");
        assert_got!(error.kind(), std::io::ErrorKind::NotFound);
        let text = error.to_string();
        assert!(text.starts_with("/proc/self/fdinfo/"), "{text}");
        let value = programs.map("longs").expect("the map").lookup(&[0; 4]);
        assert_got!(value.expect("a value"), Some(5_u64.to_ne_bytes().to_vec()));
        let device = plugged(&guest, programs);
        assert_got!(param(&mut vcpu, 3), [5, 0, 0]);
        assert_got!(param(&mut vcpu, 4), [7, 0, 0]);
        device.save().expect("its state");

        let not_maps = Programs::recv_with_bpf(&stream);
        assert_unconfirmed(not_maps, std::io::ErrorKind::InvalidInput);
        assert_other_sizes(Programs::recv_with_bpf(&stream));
    };
    // Without rights it cannot unmount: so before it gives them up.
    let ends = ends();
    let checked = ends.1.try_clone().expect("dup");
    between_ends(ends, unmount_proc, manager, vmm);
    // With `/proc`, the second of them is refused likewise.
    assert_other_sizes(Programs::recv(&checked));
}
