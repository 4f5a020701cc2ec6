// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Doorbells of a note: they run their WORK program, whatever eventfd that has and whatever programs
//! replace others.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread;

use kvm_bpf::device::Error;
use kvm_bpf::perms::Allow;
use kvm_bpf::{Builder, Device, ImageDevice, OnLoss, Place, Words};
use kvm_bpf_selftests::device;
use kvm_bpf_selftests::guest::{Guest, Vcpu};
use kvm_bpf_selftests::harness::{unpaused, wait_for};
use kvm_bpf_selftests::programs::{loaded, test_image};

use super::info::fdinfo;
use super::{ADDR, PATTERN, eventfd, taken};

tests!(
    runs_its_program,
    goes_over_to_another_eventfd,
    index_is_not_the_vmms,
    comes_with_a_swap,
    no_signal_is_lost_by_another_index,
    failure_after_a_swap_is_told,
    the_same_doorbell_needs_no_right,
);

/// Registers of the device in `bell.bpf.c`.
const VALUE: u64 = ADDR;
const SIGNAL: u64 = ADDR + 8;
/// The doorbell, and the name of its program.
const BELL: u32 = 7;
const SERVE: &str = "serve";

/// Words of its map.
const SERVED: usize = 1;
const RUNS: usize = 2;
const INSIDE: usize = 3;
const CLOSED: usize = 4;
const SIGNALLED: usize = 5;

struct Setup {
    vcpu: Vcpu,
    device: ImageDevice,
    words: Arc<Words>,
    _guest: Guest,
}

impl Setup {
    fn new(object: &str) -> Self {
        Self::of(object, Ok)
    }

    #[track_caller]
    fn of(object: &str, build: impl FnOnce(Builder) -> Result<Builder, Error>) -> Self {
        let guest = Guest::new();
        let device = builder(&guest, object);
        let device = build(device).and_then(|builder| builder.plug(Place::Memory(ADDR)));
        let device = device.unwrap_or_else(|error| panic!("wanted it plugged, got {error:#?}"));
        let map = device.programs().map("bell").expect("the map");
        Setup {
            vcpu: guest.vcpu(0),
            words: Arc::clone(map.words().expect("its memory")),
            device,
            _guest: guest,
        }
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        self.words.get(8 * at).expect("a word")
    }

    /// The guest sets a value and rings; the doorbell's program takes the value over.
    #[track_caller]
    fn rings(&mut self, value: u64) {
        assert_got!(self.ring(value), 0, "the signal's result");
        wait_for("the value", value, || self.word(SERVED).load(SeqCst));
    }

    /// Returns what the signal came to.
    #[track_caller]
    fn ring(&mut self, value: u64) -> i64 {
        for (register, data) in [(VALUE, value), (SIGNAL, BELL.into())] {
            let exits = self.vcpu.write(register, 8, data);
            assert_got!(exits, [], "exits of a write at {register:#x}");
        }
        self.word(SIGNALLED).load(SeqCst) as i64
    }
}

fn builder(guest: &Guest, object: &str) -> Builder {
    let device = Device::new(guest.vm()).expect("KVM_CREATE_DEVICE");
    ImageDevice::builder(device, loaded(test_image(object)))
}

fn runs_its_program() {
    let mut setup = Setup::new("bell");
    for value in 1..10 {
        setup.rings(value);
    }
    // Also with an eventfd of the VMM's, which runs it too.
    let kick = eventfd();
    let mut setup = Setup::of("bell", |builder| builder.work_eventfd(SERVE, &kick));
    setup.rings(PATTERN);
    let runs = setup.word(RUNS).load(SeqCst);
    kick.write(1).expect("a signal");
    wait_for("a run", runs + 1, || setup.word(RUNS).load(SeqCst));
}

fn goes_over_to_another_eventfd() {
    let mut setup = Setup::new("bell");
    setup.rings(1);
    let (first, second) = (eventfd(), eventfd());
    for (value, eventfd) in [(2, Some(&first)), (3, Some(&second)), (4, None)] {
        let eventfd = eventfd.map(|eventfd| eventfd as &dyn std::os::fd::AsRawFd);
        let set = setup.device.set_work_eventfd(SERVE, eventfd);
        set.unwrap_or_else(|error| panic!("wanted eventfd {value} set, got {error:#?}"));
        setup.rings(value);
    }
    for kick in [&first, &second] {
        assert_got!(taken(kick), 0, "signals of an eventfd that it had");
        kick.write(1).expect("a signal");
        assert_got!(taken(kick), 1, "signals that nobody takes");
    }

    // One that it cannot have: all is as before.
    let file = std::fs::File::open("/dev/null").expect("/dev/null");
    let set = setup.device.set_work_eventfd(SERVE, Some(&file));
    assert!(
        matches!(set, Err(Error::SetIrq { index: BELL, .. })),
        "{set:?}"
    );
    setup.rings(5);
}

/// Neither before the guest sees the device nor by a swap does one take the place of the other.
fn index_is_not_the_vmms() {
    let guest = Guest::new();
    let own = eventfd();
    match builder(&guest, "bell").signal(BELL, &own) {
        Err(Error::IsDoorbell(BELL)) => {}
        result => panic!("wanted IsDoorbell, got {result:?}"),
    }

    let mut setup = Setup::of("bell_silent", |builder| builder.signal(BELL, &own));
    assert_got!((setup.ring(1), taken(&own)), (0, 1));
    let replaced = setup
        .device
        .replace(test_image("bell"), OnLoss::Refuse, unpaused);
    match replaced {
        Err(Error::IsDoorbell(BELL)) => {}
        result => panic!("wanted IsDoorbell, got {result:?}"),
    }
    assert_got!((setup.ring(2), taken(&own)), (0, 1));
}

fn comes_with_a_swap() {
    let mut setup = Setup::new("bell_silent");
    assert_got!(setup.ring(1), -i64::from(libc::ENOENT), "no doorbell");
    let replace = |setup: &mut Setup, object| {
        let replaced = setup
            .device
            .replace(test_image(object), OnLoss::Refuse, unpaused);
        replaced.unwrap_or_else(|error| panic!("wanted {object}, got {error:#?}"));
    };
    replace(&mut setup, "bell");
    setup.rings(2);
    replace(&mut setup, "bell_moved");
    setup.rings(3);
    replace(&mut setup, "bell_silent");
    assert_got!(setup.ring(4), -i64::from(libc::ENOENT), "no doorbell");
}

/// The kernel has taken the signal from the eventfd, and the program has not run for it when it gets
/// another index.
fn no_signal_is_lost_by_another_index() {
    let mut setup = Setup::new("bell");
    let new = setup
        .device
        .load(test_image("bell_moved"), OnLoss::Refuse)
        .expect("the next version");
    let fd = setup.device.device().as_fd().try_clone_to_owned();
    let device = device::Device::from(fd.expect("another handle"));
    setup.word(CLOSED).store(1, SeqCst);
    thread::scope(|scope| {
        // Meanwhile the device's thread waits for its turn.
        let run = scope.spawn(|| device.run(0, 0));
        wait_for("a run", 1, || setup.word(INSIDE).load(SeqCst));
        assert_got!(setup.ring(PATTERN), 0, "the signal's result");
        let words = Arc::clone(&setup.words);
        let device = &device;
        scope.spawn(move || {
            wait_for("the old index to be free", false, || {
                fdinfo(device)
                    .iter()
                    .any(|line| line.starts_with("work:\t0 "))
            });
            words.get(8 * CLOSED).expect("a word").store(0, SeqCst);
        });
        let swapped = setup.device.swap(new, OnLoss::Refuse, unpaused);
        swapped.unwrap_or_else(|error| panic!("wanted the next version, got {error:#?}"));
        assert_got!(run.join().expect("the run"), Ok(()));
    });
    wait_for("a run for the signal", true, || {
        setup.word(RUNS).load(SeqCst) >= 2
    });
}

/// `replaced` fails when the new programs run already, and go on.
fn failure_after_a_swap_is_told() {
    let mut setup = Setup::new("bell");
    let device = setup.device.device();
    let mut left = device.permissions().expect("its permissions");
    left.allow = left.allow.without(Allow::RUN);
    device.restrict(left).expect("giving up a right");
    let replaced = setup
        .device
        .replace(test_image("bell_replaced"), OnLoss::Refuse, unpaused);
    match replaced {
        Err(Error::Swapped { name, source }) => {
            assert_got!(name, "replaced");
            assert!(matches!(*source, Error::Run { index: 1, .. }), "{source:?}");
        }
        result => panic!("wanted Swapped, got {result:?}"),
    }
    assert!(setup.device.programs().work("replaced").is_some());
    setup.rings(PATTERN);
}

/// Programs whose doorbell is the same can be replaced though no interrupt may be set any more.
fn the_same_doorbell_needs_no_right() {
    let mut setup = Setup::new("bell");
    let device = setup.device.device();
    let mut left = device.permissions().expect("its permissions");
    left.allow = left.allow.without(Allow::SET_IRQ);
    device.restrict(left).expect("giving up a right");
    match device.set_irq(0, &eventfd()) {
        Err(Error::SetIrq { index: 0, .. }) => {}
        result => panic!("wanted SetIrq, got {result:?}"),
    }
    let replaced = setup
        .device
        .replace(test_image("bell"), OnLoss::Refuse, unpaused);
    replaced.expect("programs with the same doorbell");
    setup.rings(PATTERN);
}
