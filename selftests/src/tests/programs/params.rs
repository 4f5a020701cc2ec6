// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Parameters: given, refused, in a state, sent along, and of a replacement.

use std::os::unix::net::UnixStream;

use kvm_bpf::device::Error;
use kvm_bpf::{Builder, Device, ImageDevice, OnLoss, Place, Programs, image, programs};
use kvm_bpf_selftests::guest::{Guest, Vcpu};
use kvm_bpf_selftests::harness::unpaused;
use kvm_bpf_selftests::programs::{loaded, sample, test_image};

use super::super::ADDR;
use super::{Pins, between, plugged, received, without_bpf};

/// The parameters of `params.bpf.c`, in the order in which the guest reads them.
const PARAMS: [&str; 5] = ["bytes", "halves", "words", "longs", "mapped"];

fn builder_of(guest: &Guest, programs: Programs) -> Builder {
    let device = Device::new(guest.vm()).expect("KVM_CREATE_DEVICE");
    ImageDevice::builder(device, programs)
}

/// The three values of a parameter.
#[track_caller]
pub(super) fn param(vcpu: &mut Vcpu, number: u64) -> [u64; 3] {
    [0, 1, 2].map(|index| {
        let read = vcpu.read(ADDR + 0x100 * number + 8 * index, 8);
        assert_got!(read.exits, [], "value {index} of parameter {number}");
        read.value
    })
}

#[track_caller]
fn assert_missing(plugged: Result<ImageDevice, Error>, wanted: &str) {
    match plugged {
        Err(Error::Programs(programs::Error::MissingParam(name))) => assert_got!(name, wanted),
        other => panic!("wanted parameter {wanted} to be missing, got {other:?}"),
    }
}

pub(super) fn parameters_are_given() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let builder = || builder_of(&guest, loaded(test_image("params")));
    // What is required is missing, and then it is no more.
    assert_missing(builder().plug(Place::Memory(ADDR)), "longs");
    let given = builder().param("longs", [1]).expect("values");
    assert_missing(given.plug(Place::Memory(ADDR)), "mapped");
    assert_got!(vcpu.read(ADDR, 8).exits.len(), 1, "exits without a device");

    let largest = [u8::MAX.into(), u16::MAX.into(), u32::MAX.into(), u64::MAX];
    let mut all = builder();
    for (name, largest) in PARAMS.iter().zip(largest.iter().chain([&largest[2]])) {
        all = all.param(name, [7, *largest]).expect("values");
    }
    let device = all.plug(Place::Memory(ADDR)).expect("plugging it in");
    for (number, largest) in (0..).zip(largest.iter().chain([&largest[2]])) {
        assert_got!(param(&mut vcpu, number), [7, *largest, 0], "of {number}");
    }
    // Those of a running device, in memory and not: what is behind the new values is gone.
    for (number, name) in (0..).zip(PARAMS) {
        device.programs().param(name, [3]).expect("a value");
        assert_got!(param(&mut vcpu, number), [3, 0, 0], "{name}");
    }
    drop(device);

    // Only the required ones, one of them with the bytes of its map.
    let filled = builder().fill("longs", [[1; 8]]).expect("bytes");
    let few = filled.param("mapped", []).expect("no values");
    let _device = few.plug(Place::Memory(ADDR)).expect("plugging it in");
    assert_got!(param(&mut vcpu, 3), [0x0101_0101_0101_0101, 0, 0]);
    assert_got!(param(&mut vcpu, 0), [0, 0, 0]);
}

pub(super) fn parameters_that_are_refused() {
    let programs = loaded(test_image("params"));
    for name in PARAMS {
        programs.param(name, [1, 2, 3]).expect("values");
    }
    let contents = || {
        let value = |name, index: u32| {
            let map = programs.map(name).expect("the map");
            map.lookup(&index.to_ne_bytes()).expect("a value")
        };
        PARAMS.map(|name| [0, 1, 2].map(|index| value(name, index)))
    };
    let before = contents();
    for (name, values, wanted) in [
        (
            "byte",
            vec![9],
            "the device has no parameter byte, only bytes, halves, words, longs, mapped",
        ),
        (
            "longs",
            vec![9; 4],
            "more than 3 values for parameter longs, which has no room for them",
        ),
        (
            "mapped",
            vec![9, 9, 1 << 32],
            "value 2 of parameter mapped, 4294967296, does not fit into 4 bytes",
        ),
        (
            "words",
            vec![9, 1 << 32],
            "value 1 of parameter words, 4294967296, does not fit into 4 bytes",
        ),
        (
            "bytes",
            vec![256],
            "value 0 of parameter bytes, 256, does not fit into 1 bytes",
        ),
        (
            "halves",
            vec![9, 9, 9, 9],
            "more than 3 values for parameter halves, which has no room for them",
        ),
    ] {
        let error = programs.param(name, values).expect_err(wanted);
        assert_got!(error.to_string(), wanted);
        assert_got!(contents(), before, "values after {error}");
    }
    let none = loaded(sample("regbank")).param("x", [1]).expect_err("none");
    assert_got!(
        none.to_string(),
        "the device has no parameter x, it has none"
    );

    for (file, wanted) in [
        (
            "params_absent",
            "map absent cannot be a parameter: there is no such map",
        ),
        (
            "params_hash",
            "map hash cannot be a parameter: it is no array, but of type 1",
        ),
    ] {
        match test_image(file).load() {
            Err(image::Error::Programs(error @ programs::Error::Param { .. })) => {
                assert_got!(error.to_string(), wanted);
            }
            other => panic!("wanted {wanted}, got {other:?}"),
        }
    }
}

/// A map that user space can map is state, and the state has the parameter's values.
pub(super) fn parameters_in_a_state() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let builder = || builder_of(&guest, loaded(test_image("params")));
    let given = builder().param("longs", [1]).expect("values");
    let given = given.param("mapped", [1, 2, 3]).expect("values");
    let device = given.plug(Place::Memory(ADDR)).expect("plugging it in");
    let state = device.save().expect("its state");
    let maps: Vec<_> = state.maps.keys().collect();
    assert_got!(maps, ["mapped"], "maps of the state");
    drop(device);

    let restored = || builder().state(&state).expect("the state");
    // The other one is no state.
    assert_missing(restored().plug(Place::Memory(ADDR)), "longs");
    let given = restored().param("longs", [4]).expect("a value");
    let device = given.plug(Place::Memory(ADDR)).expect("plugging it in");
    assert_got!(param(&mut vcpu, 4), [1, 2, 3], "those of the state");
    assert_got!(param(&mut vcpu, 3), [4, 0, 0]);
    drop(device);

    // What comes last counts.
    let given = restored().param("longs", [4]).expect("a value");
    let given = given.param("mapped", [9]).expect("a value");
    let device = given.plug(Place::Memory(ADDR)).expect("plugging it in");
    assert_got!(param(&mut vcpu, 4), [9, 0, 0], "those of the VMM");
    drop(device);
    let given = builder().param("mapped", [9]).expect("a value");
    let given = given.param("longs", [4]).expect("a value");
    let given = given.state(&state).expect("the state");
    let _device = given.plug(Place::Memory(ADDR)).expect("plugging it in");
    assert_got!(param(&mut vcpu, 4), [1, 2, 3], "those of the state");
}

/// What the manager has given, the VMM need not, and mostly cannot. One that it can map it can give.
pub(super) fn parameters_go_over() {
    let manager = |stream: UnixStream| {
        for longs in [false, true] {
            let programs = loaded(test_image("params"));
            if longs {
                programs.param("longs", [5, 6]).expect("values");
            }
            programs.send(&stream).expect("the programs sent");
        }
    };
    between(manager, |stream, kvm| {
        let guest = Guest::on(kvm);
        let mut vcpu = guest.vcpu(0);
        without_bpf();
        let without = builder_of(&guest, received(&stream));
        let without = without.param("mapped", [7]).expect("a value in memory");
        assert_missing(without.plug(Place::Memory(ADDR)), "longs");
        let programs = received(&stream);
        programs.param("mapped", [7]).expect("a value in memory");
        let _device = plugged(&guest, programs);
        assert_got!(param(&mut vcpu, 3), [5, 6, 0]);
        assert_got!(param(&mut vcpu, 4), [7, 0, 0]);
    });
    let pins = Pins::new();
    let programs = loaded(test_image("params"));
    programs.param("longs", [8]).expect("a value");
    programs.pin(&pins.0).expect("the pins");
    let again = Programs::from_pinned(&pins.0).expect("the programs");
    let guest = Guest::new();
    assert_missing(
        builder_of(&guest, again).plug(Place::Memory(ADDR)),
        "mapped",
    );
}

/// A map that goes on has its values; what is new has to be given before the swap.
pub(super) fn parameters_of_a_replacement() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let given = builder_of(&guest, loaded(test_image("params")));
    let given = given.param("longs", [1]).expect("values");
    let given = given.param("mapped", [2]).expect("values");
    let mut device = given.plug(Place::Memory(ADDR)).expect("plugging it in");
    device
        .replace(test_image("params"), OnLoss::Refuse, unpaused)
        .expect("the same again");
    let load = |device: &ImageDevice| {
        let loaded = device.load(test_image("params_v2"), OnLoss::Refuse);
        loaded.expect("a new file")
    };
    let new = load(&device);
    let swapped = device.swap(new, OnLoss::Refuse, unpaused);
    assert_missing(swapped.map(|_| unreachable!("a swap")), "added");
    let added = |vcpu: &mut Vcpu| vcpu.read(ADDR + 0x500, 8).value;
    assert_got!(added(&mut vcpu), u64::MAX, "the old programs' answer");
    let new = load(&device);
    new.param("added", [11]).expect("a value");
    device
        .swap(new, OnLoss::Refuse, unpaused)
        .expect("the new programs");
    assert_got!(added(&mut vcpu), 11);
    assert_got!(param(&mut vcpu, 3), [1, 0, 0]);
    assert_got!(param(&mut vcpu, 4), [2, 0, 0]);
}
