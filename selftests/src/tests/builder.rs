// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the library's builder gives a device before the guest sees it; and that after a failure the
//! guest never does, and nothing is left.

use std::fs;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use kvm_bpf::device::Error;
use kvm_bpf::note::Space;
use kvm_bpf::{Builder, Device, ImageDevice, Place, Window, programs, state};
use kvm_bpf_selftests::bpf::Census;
use kvm_bpf_selftests::guest::{Guest, Vcpu};
use kvm_bpf_selftests::harness::wait_for;
use kvm_bpf_selftests::programs::{loaded, sample, test_image};

use super::{ADDR, PATTERN, eventfd, open_files, taken};

tests!(
    goes_on_from_a_state,
    state_of_another_device,
    opens_a_window,
    window_that_is_missing,
    window_that_is_none,
    wires_interrupts,
    interrupts_that_are_none,
    signals_an_eventfd,
    signals_that_are_none,
    fills_maps,
    maps_that_cannot_be_filled,
    runs_work_for_an_eventfd,
    work_that_is_none,
    eventfd_that_is_none,
    place_that_is_taken,
    places_that_are_none,
    dropped_before_the_end,
);

/// Registers of the device in `builder.bpf.c`.
const VALUE: u64 = ADDR;
const MEMORY: u64 = ADDR + 8;
const SIGNAL: u64 = ADDR + 0x10;
const TABLE: u64 = ADDR + 0x100;

/// A guest without a device so far.
struct Setup {
    guest: Guest,
    vcpu: Vcpu,
}

/// What is in the map `builder`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    value: u64,
    restores: u64,
    kicks: u64,
    kick: u64,
    memory: i64,
    signal: i64,
}

impl Setup {
    fn new() -> Self {
        let guest = Guest::new();
        Setup {
            vcpu: guest.vcpu(0),
            guest,
        }
    }

    fn builder(&self) -> Builder {
        let device = Device::new(self.guest.vm()).expect("KVM_CREATE_DEVICE");
        ImageDevice::builder(device, loaded(test_image("builder")))
    }

    fn write(&mut self, register: u64, value: u64) {
        let exits = self.vcpu.write(register, 8, value);
        assert_got!(exits, [], "exits of a write at {register:#x}");
    }

    fn read(&mut self, register: u64) -> u64 {
        let read = self.vcpu.read(register, 8);
        assert_got!(read.exits, [], "exits of a read at {register:#x}");
        read.value
    }

    /// Has a builder fail; returns why. The guest must not see anything of the device then, and
    /// programs, maps and file descriptors must be gone.
    #[track_caller]
    fn failure(&mut self, build: impl FnOnce(Builder) -> Result<ImageDevice, Error>) -> Error {
        let (census, files) = (Census::now(), open_files());
        let error = match build(self.builder()) {
            Err(error) => error,
            Ok(device) => panic!("wanted a failure, got {device:?}"),
        };
        assert_got!(open_files(), files, "open files after {error}");
        census.wait_for_newer(0, 0);
        for register in [VALUE, TABLE] {
            let exits = self.vcpu.read(register, 8).exits.len();
            assert_got!(exits, 1, "exits at {register:#x} after {error}");
        }
        // The place is free.
        drop(plugged(self.builder()));
        error
    }
}

#[track_caller]
fn plugged(builder: Builder) -> ImageDevice {
    plug(builder).unwrap_or_else(|error| panic!("wanted it plugged, got {error:#?}"))
}

/// With a window, as it must have one. For a failure of the last step.
fn plug(builder: Builder) -> Result<ImageDevice, Error> {
    builder.window(0, WINDOW)?.plug(Place::Memory(ADDR))
}

fn counts(device: &ImageDevice) -> Counts {
    let map = device.programs().map("builder").expect("the map");
    let value = map.value(0).expect("a value");
    let word = |at: usize| {
        let bytes = value[8 * at..8 * at + 8].try_into().expect("8 bytes");
        u64::from_ne_bytes(bytes)
    };
    Counts {
        value: word(0),
        restores: word(1),
        kicks: word(2),
        kick: word(3),
        memory: word(4) as i64,
        signal: word(5) as i64,
    }
}

/// The state is in the maps, and `restore` has run, when the guest sees the device.
fn goes_on_from_a_state() {
    let mut first = Setup::new();
    let device = plugged(first.builder());
    first.write(VALUE, PATTERN);
    let state = device.save().expect("its state");
    assert_got!(counts(&device).restores, 0, "runs of a new device");

    let mut second = Setup::new();
    let builder = second.builder().state(&state).expect("the state");
    let exits = second.vcpu.read(VALUE, 8).exits.len();
    assert_got!(exits, 1, "exits before the last step");
    let device = plugged(builder);
    assert_got!(second.read(VALUE), PATTERN);
    let wanted = Counts {
        value: PATTERN,
        restores: 1,
        ..Counts::default()
    };
    assert_got!(counts(&device), wanted);
}

fn state_of_another_device() {
    let mut setup = Setup::new();
    let other = Guest::new();
    let device = Device::new(other.vm()).expect("KVM_CREATE_DEVICE");
    let other = plugged(ImageDevice::builder(device, loaded(sample("regbank"))));
    let state = other.save().expect("its state");
    match setup.failure(|builder| builder.state(&state).and_then(plug)) {
        Error::State(state::Error::OtherDevice { .. }) => {}
        error => panic!("wanted OtherDevice, got {error:?}"),
    }

    // One of its own, of which a field makes no sense.
    let device = plugged(setup.builder());
    let mut state = device.save().expect("its state");
    drop(device);
    let map = state.maps.get_mut("builder").expect("the map");
    map.values.push(state::Value::Number(1));
    match setup.failure(|builder| builder.state(&state).and_then(plug)) {
        Error::State(state::Error::Map { path, .. }) => assert_got!(path, "builder"),
        error => panic!("wanted an error of the map, got {error:?}"),
    }
}

/// Where the guest's own memory is.
const WINDOW: Window = Window {
    addr: 0,
    size: 0x1000,
    read: true,
    write: false,
};

fn opens_a_window() {
    let mut setup = Setup::new();
    let device = plugged(setup.builder());
    for (addr, wanted) in [(0, 0), (0xff8, 0), (0x1000, -i64::from(libc::EACCES))] {
        setup.write(MEMORY, addr);
        assert_got!(counts(&device).memory, wanted, "guest memory at {addr:#x}");
    }
    device.device().unset_window(0).expect("removing it");
    setup.write(MEMORY, 0);
    assert_got!(counts(&device).memory, -i64::from(libc::EACCES));
}

/// The device reads guest memory: there must be a window for that.
fn window_that_is_missing() {
    let mut setup = Setup::new();
    let only_written = Window {
        read: false,
        write: true,
        ..WINDOW
    };
    for window in [None, Some(only_written)] {
        let failure = setup.failure(|builder| {
            let builder = match window {
                Some(window) => builder.window(0, window)?,
                None => builder,
            };
            builder.plug(Place::Memory(ADDR))
        });
        assert!(matches!(failure, Error::MissingWindow(_)), "{failure:?}");
        assert_got!(
            failure.to_string(),
            "the device reads guest memory, and the VMM has given it no window for that"
        );
    }
}

fn window_that_is_none() {
    let mut setup = Setup::new();
    for (index, size) in [(0, u64::MAX), (u32::MAX, 0x1000)] {
        let window = Window {
            addr: 0x1000,
            size,
            ..WINDOW
        };
        match setup.failure(|builder| builder.window(index, window).and_then(plug)) {
            Error::SetWindow {
                index: own,
                window: theirs,
                source,
            } => {
                assert_got!((own, theirs), (index, window));
                assert!(source.raw_os_error().is_some(), "{source:?}");
            }
            error => panic!("wanted SetWindow, got {error:?}"),
        }
    }
}

fn wires_interrupts() {
    let mut setup = Setup::new();
    let irq = eventfd();
    let device = plugged(setup.builder().irq(0, &irq).expect("interrupt 0"));
    setup.write(SIGNAL, 0);
    assert_got!((counts(&device).signal, taken(&irq)), (0, 1));
}

fn interrupts_that_are_none() {
    let mut setup = Setup::new();
    let irq = eventfd();
    match setup.failure(|builder| builder.irq(1, &irq).and_then(plug)) {
        Error::NoSuchIrq { index: 1, count: 1 } => {}
        error => panic!("wanted NoSuchIrq, got {error:?}"),
    }
    let file = fs::File::open("/dev/null").expect("/dev/null");
    match setup.failure(|builder| builder.irq(0, &file).and_then(plug)) {
        Error::SetIrq { index: 0, source } => {
            assert_got!(source.raw_os_error(), Some(libc::EINVAL));
        }
        error => panic!("wanted SetIrq, got {error:?}"),
    }
    match setup.failure(|builder| builder.irq(0, &-1).and_then(plug)) {
        Error::Duplicate(source) => assert_got!(source.raw_os_error(), Some(libc::EBADF)),
        error => panic!("wanted Duplicate, got {error:?}"),
    }
    assert_got!(taken(&irq), 0, "signals of what never was");
}

fn signals_an_eventfd() {
    let mut setup = Setup::new();
    let bell = eventfd();
    let seen = bell.try_clone().expect("dup");
    let builder = setup.builder().signal(7, &bell).expect("an index");
    // The device keeps it.
    drop(bell);
    let device = plugged(builder);
    setup.write(SIGNAL, 7);
    setup.write(SIGNAL, 7);
    assert_got!((counts(&device).signal, taken(&seen)), (0, 2));
    setup.write(SIGNAL, 8);
    let signal = counts(&device).signal;
    assert_got!(signal, -i64::from(libc::ENOENT), "no eventfd");
}

fn signals_that_are_none() {
    let mut setup = Setup::new();
    let bell = eventfd();
    match setup.failure(|builder| builder.signal(0, &bell).and_then(plug)) {
        Error::IsIrq(0) => {}
        error => panic!("wanted IsIrq, got {error:?}"),
    }
    match setup.failure(|builder| builder.signal(0x1_0000, &bell).and_then(plug)) {
        Error::SetIrq { index, source } => {
            assert_got!(index, 0x1_0000);
            assert!(source.raw_os_error().is_some(), "{source:?}");
        }
        error => panic!("wanted SetIrq, got {error:?}"),
    }
    let file = fs::File::open("/dev/null").expect("/dev/null");
    match setup.failure(|builder| builder.signal(7, &file).and_then(plug)) {
        Error::SetIrq { index: 7, source } => {
            assert_got!(source.raw_os_error(), Some(libc::EINVAL));
        }
        error => panic!("wanted SetIrq, got {error:?}"),
    }
}

fn fills_maps() {
    let mut setup = Setup::new();
    let table = [1, u64::MAX, PATTERN].map(u64::to_ne_bytes);
    let builder = setup.builder().fill("table", table).expect("values");
    // Also one that is in memory.
    let state = [PATTERN, 0, 0, 0, 0, 0].map(u64::to_ne_bytes).concat();
    let builder = builder.fill("builder", [state]).expect("a value");
    let device = plugged(builder);
    let read = [0, 8, 0x10, 0x18].map(|at| setup.read(TABLE + at));
    assert_got!(read, [1, u64::MAX, PATTERN, 0]);
    assert_got!((setup.read(VALUE), counts(&device).restores), (PATTERN, 0));
}

fn maps_that_cannot_be_filled() {
    let mut setup = Setup::new();
    let eight = vec![0_u8; 8];
    for (map, values, wanted) in [
        ("none", vec![eight.clone()], "there is no map none"),
        ("table", vec![vec![0; 4]], "cannot access map table"),
        ("table", vec![eight.clone(); 5], "cannot access map table"),
        ("builder", vec![eight], "cannot access map builder"),
    ] {
        match setup.failure(|builder| builder.fill(map, values).and_then(plug)) {
            Error::Programs(
                error @ (programs::Error::NoSuchMap(_) | programs::Error::Access { .. }),
            ) => assert_got!(error.to_string(), wanted),
            error => panic!("wanted {wanted}, got {error:?}"),
        }
    }
}

fn runs_work_for_an_eventfd() {
    let setup = Setup::new();
    let kick = eventfd();
    let other = kick.try_clone().expect("dup");
    let builder = setup.builder().work_eventfd("kick", &kick);
    let builder = builder.expect("an eventfd");
    // Signals from before wait for the device, which keeps the eventfd.
    drop(kick);
    other.write(3).expect("a signal");
    let device = plugged(builder);
    wait_for("a run", 1, || counts(&device).kicks);
    assert_got!(counts(&device).kick, 3, "the count of the signals");
    other.write(4).expect("a signal");
    wait_for("another run", (2, 4), || {
        let counts = counts(&device);
        (counts.kicks, counts.kick)
    });
}

fn work_that_is_none() {
    let mut setup = Setup::new();
    let kick = eventfd();
    kick.write(1).expect("a signal");
    match setup.failure(|builder| builder.work_eventfd("kicks", &kick).and_then(plug)) {
        Error::NoSuchWork(name) => assert_got!(name, "kicks"),
        error => panic!("wanted NoSuchWork, got {error:?}"),
    }
    match setup.failure(|builder| builder.work_eventfd("kick", &-1).and_then(plug)) {
        Error::Duplicate(source) => assert_got!(source.raw_os_error(), Some(libc::EBADF)),
        error => panic!("wanted Duplicate, got {error:?}"),
    }
    // Nobody has taken the signal.
    assert_got!(taken(&kick), 1);
}

/// The last step finds it.
fn eventfd_that_is_none() {
    let mut setup = Setup::new();
    let file = fs::File::open("/dev/null").expect("/dev/null");
    let built = |builder: Builder| builder.work_eventfd("kick", &file).expect("not seen yet");
    match setup.failure(|builder| plug(built(builder))) {
        Error::SetWork { index: 1, source } => {
            assert_got!(source.raw_os_error(), Some(libc::EINVAL));
        }
        error => panic!("wanted SetWork, got {error:?}"),
    }
}

/// All but the last call has succeeded: nothing of that is left either.
fn place_that_is_taken() {
    let mut setup = Setup::new();
    let (irq, kick) = (eventfd(), eventfd());
    let first = plugged(setup.builder());
    setup.write(VALUE, PATTERN);
    let (census, files) = (Census::now(), open_files());
    let second = setup
        .builder()
        .irq(0, &irq)
        .and_then(|builder| builder.signal(7, &irq))
        .and_then(|builder| builder.work_eventfd("kick", &kick))
        .and_then(|builder| builder.state(&first.save()?))
        .and_then(plug);
    match second {
        Err(Error::SetRegion { index, source, .. }) => {
            assert_got!((index, source.raw_os_error()), (0, Some(libc::EEXIST)));
        }
        other => panic!("wanted SetRegion, got {other:?}"),
    }
    assert_got!(open_files(), files, "open files");
    census.wait_for_newer(0, 0);
    kick.write(5).expect("a signal");
    // The first one is as it was, without what the second had.
    assert_got!(setup.read(VALUE), PATTERN);
    setup.write(SIGNAL, 0);
    let wanted = Counts {
        value: PATTERN,
        signal: -i64::from(libc::ENOENT),
        ..Counts::default()
    };
    assert_got!(counts(&first), wanted);
    assert_got!((taken(&irq), taken(&kick)), (0, 5), "signals");
}

/// No program has run when they are refused.
fn places_that_are_none() {
    let setup = Setup::new();
    let device = plugged(setup.builder());
    let state = device.save().expect("its state");
    drop(device);
    for place in [Place::Port(0x100), Place::Memory(u64::MAX - 0xffe)] {
        let builder = setup.builder().state(&state).expect("the state");
        let map = builder.programs().map("builder").expect("the map");
        let words = Arc::clone(map.words().expect("its memory"));
        let builder = builder.window(0, WINDOW).expect("a window");
        match (place, builder.plug(place)) {
            (Place::Port(_), Err(Error::WrongSpace(Space::Memory))) => {}
            (Place::Memory(_), Err(Error::NoRoom { size: 0x1000, .. })) => {}
            (_, result) => panic!("{place}: wanted it refused, got {result:?}"),
        }
        let restores = words.get(8).expect("a word").load(SeqCst);
        assert_got!(restores, 0, "runs of restore, {place}");
    }
}

fn dropped_before_the_end() {
    let mut setup = Setup::new();
    let (census, files) = (Census::now(), open_files());
    let kick = eventfd();
    let builder = setup.builder().window(0, WINDOW).expect("a window");
    let builder = builder.work_eventfd("kick", &kick).expect("an eventfd");
    assert!(builder.device().as_raw_fd() > 2, "{builder:?}");
    drop(builder);
    assert_got!(open_files(), files + 1, "open files but for the eventfd");
    census.wait_for_newer(0, 0);
    assert_got!(setup.vcpu.read(VALUE, 8).exits.len(), 1, "exits");
}
