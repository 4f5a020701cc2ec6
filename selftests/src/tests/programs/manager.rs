// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Programs that the manager sends, and the VMM uses and replaces.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use kvm_bpf::device::Error;
use kvm_bpf::{OnLoss, Programs, State, programs, transfer};
use kvm_bpf_selftests::guest::Guest;
use kvm_bpf_selftests::harness::{Errno, unpaused, wait_for};
use kvm_bpf_selftests::programs::{loaded, sample, test_image};

use super::super::{ADDR, PATTERN, open_files};
use super::{LIMIT, between, plugged, received, without_bpf};

/// Tells the VMM who the manager is.
fn say_id(stream: &mut UnixStream) {
    let id = std::process::id();
    stream.write_all(&id.to_ne_bytes()).expect("its id sent");
}

fn id_of_the_manager(stream: &mut UnixStream) -> i32 {
    let mut id = [0; 4];
    stream.read_exact(&mut id).expect("the manager's id");
    i32::from_ne_bytes(id)
}

fn wait_for_the_end_of(manager: i32) {
    wait_for("the manager's end", libc::ESRCH, || {
        // SAFETY: signal 0 is none.
        match unsafe { libc::kill(manager, 0) } {
            0 => 0,
            _ => Errno::last().0,
        }
    });
}

pub(super) fn json(state: &State) -> serde_json::Value {
    let mut json = serde_json::to_value(state).expect("JSON");
    json["clock"].take();
    json
}

/// A device has all that it had where it was loaded: it saves and restores.
pub(super) fn of_a_manager_that_ends() {
    let manager = |mut stream: UnixStream| {
        let guest = Guest::new();
        let programs = loaded(test_image("state"));
        programs.fill("raw", [[5; 12]]).expect("values");
        programs.send(&stream).expect("the programs sent");
        say_id(&mut stream);
        let device = plugged(&guest, programs);
        let state = device.save().expect("its state").to_json();
        let state = state.expect("its JSON");
        stream
            .write_all(&(state.len() as u32).to_ne_bytes())
            .and_then(|()| stream.write_all(&state))
            .expect("its state sent");
    };
    between(manager, |mut stream, kvm| {
        let guest = Guest::on(kvm);
        without_bpf();
        let programs = received(&stream);
        assert_got!(
            programs.note().compatible,
            ["kvm-bpf,state", "kvm-bpf,test"]
        );
        let manager = id_of_the_manager(&mut stream);
        let (mut len, mut state) = ([0; 4], Vec::new());
        stream.read_exact(&mut len).expect("a length");
        state.resize(u32::from_ne_bytes(len) as usize, 0);
        stream.read_exact(&mut state).expect("the state");
        wait_for_the_end_of(manager);
        let saved = State::from_json(&state).expect("the state");

        let mut device = plugged(&guest, programs);
        assert_got!(json(&device.save().expect("a state")), json(&saved));
        // As in a new device.
        let preset = device.programs().map(".data").expect("the map").value(0);
        assert_got!(preset.expect("a value")[..8], 7_u64.to_ne_bytes());
        device.programs().fill("raw", [[6; 12]]).expect("values");
        device.restore(&saved).expect("the state restored");
        let raw = device.programs().map("raw").expect("the map").value(0);
        assert_got!(raw, Some(vec![5; 12]));
    });
}

/// Timers are a map's, and last as long as somebody has it.
pub(super) fn timers_outlive_the_manager() {
    let manager = |mut stream: UnixStream| {
        let programs = loaded(test_image("work_timer"));
        programs.send(&stream).expect("the programs sent");
        say_id(&mut stream);
        stream.read_exact(&mut [0]).expect("the VMM's word");
    };
    between(manager, |mut stream, kvm| {
        let guest = Guest::on(kvm);
        without_bpf();
        let programs = received(&stream);
        let manager = id_of_the_manager(&mut stream);
        let device = plugged(&guest, programs);
        let callbacks = || {
            let progress = device.programs().map("progress").expect("the map");
            let begun = progress.value(0).expect("a value")[..4].try_into();
            u32::from_ne_bytes(begun.expect("four bytes"))
        };
        device.resume().expect("starting the timer");
        wait_for("callbacks", true, || callbacks() > 2);
        stream.write_all(&[0]).expect("a word to the manager");
        wait_for_the_end_of(manager);
        let before = callbacks();
        wait_for("callbacks afterwards", true, || callbacks() > before + 2);
    });
}

/// The VMM sends what runs, and takes what comes back.
pub(super) fn replaced_by_the_manager() {
    let manager = |stream: UnixStream| {
        let programs = loaded(sample("regbank"));
        programs.send(&stream).expect("the programs sent");
        drop(programs);
        let running = received(&stream);
        let mut next = test_image("regbank_v2");
        let changes = next.reuse_maps(&running, OnLoss::Refuse).expect("its maps");
        assert_got!(
            (changes.carried.is_empty(), changes.needs_pause()),
            (false, false)
        );
        loaded(next).send(&stream).expect("the next programs sent");
    };
    between(manager, |stream, kvm| {
        let guest = Guest::on(kvm);
        let mut vcpu = guest.vcpu(0);
        without_bpf();
        let mut device = plugged(&guest, received(&stream));
        assert_got!(vcpu.write(ADDR + 8, 8, PATTERN), []);
        let mut state = || (vcpu.read(ADDR + 4, 4), vcpu.read(ADDR + 8, 8));
        let (version, scratch) = state();
        assert_got!((version.value, scratch.value), (1, PATTERN));
        assert_got!((version.exits, scratch.exits), (vec![], vec![]));
        device.programs().send(&stream).expect("the programs sent");
        let next = received(&stream);
        let changes = device.changes(&next, OnLoss::Refuse).expect("a successor");
        let done = device
            .swap(next, OnLoss::Refuse, unpaused)
            .expect("the swap");
        assert_got!(done, changes, "what became of the maps");
        let (version, scratch) = state();
        assert_got!((version.value, scratch.value), (2, PATTERN));
        assert_got!((version.exits, scratch.exits), (vec![], vec![]));
    });
}

/// A successor that the manager has made without the running maps would lose what is in them.
pub(super) fn another_map_is_no_replacement() {
    let manager = |stream: UnixStream| {
        for image in [sample("regbank"), test_image("regbank_v2")] {
            loaded(image).send(&stream).expect("the programs sent");
        }
    };
    between(manager, |stream, kvm| {
        let guest = Guest::on(kvm);
        without_bpf();
        let mut device = plugged(&guest, received(&stream));
        match device.swap(received(&stream), OnLoss::Refuse, unpaused) {
            Err(Error::Programs(programs::Error::LostMap { why, .. })) => {
                assert_got!(why, "the new programs have another map of that name");
            }
            other => panic!("wanted LostMap, got {other:?}"),
        }
        let version = guest.vcpu(0).read(ADDR + 4, 4);
        assert_got!((version.value, version.exits), (1, vec![]));
    });
}

/// What `/proc` says of a file descriptor must be what is described.
pub(super) fn not_what_is_described() {
    let programs = loaded(sample("regbank"));
    // As a description would have it, but with the file descriptors in another order.
    let (one, other) = UnixStream::pair().expect("socketpair");
    other.set_read_timeout(Some(LIMIT)).expect("a limit");
    programs.send(&one).expect("the programs sent");
    let fds = open_files();
    drop(received(&other));
    assert_got!(open_files(), fds, "open files");

    let read: OwnedFd = programs
        .map(".bss")
        .or_else(|| programs.maps().next())
        .map(|map| map.try_clone().expect("a map"))
        .map(|map| std::os::fd::AsFd::as_fd(&map).try_clone_to_owned())
        .expect("a map")
        .expect("a file descriptor");
    let mut note = programs.note().clone();
    note.works.clear();
    note.doorbells.clear();
    note.read_pages.clear();
    let wrong = Programs::from_fds(note, Some(read), None, [], Vec::new());
    wrong
        .expect("nothing is asked yet")
        .send(&one)
        .expect("sent");
    match Programs::recv(&other) {
        Err(transfer::Error::NotProgram(name)) if name == "read" => {}
        other => panic!("wanted NotProgram, got {other:?}"),
    }
    assert_got!(open_files(), fds, "open files");
}
