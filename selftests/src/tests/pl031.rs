// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The real-time clock of `samples/devices`: its registers, its time, its alarm, and
//! thousands of accesses compared with the clock of the crate `vm-superio`.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use kvm_bpf::clock::{HostClock, time_of_day_offset_ns};
use kvm_bpf::{Device, ImageDevice, OnLoss, Place, Programs};
use kvm_bpf_selftests::guest::{Guest, Vcpu};
use kvm_bpf_selftests::harness::unpaused;
use kvm_bpf_selftests::programs::{loaded, sample};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use super::kfunc::required;
use super::{ADDR, SIZE, eventfd, other_accesses_of, taken};

mod alarms;
mod model;
mod state;
mod time;

tests!(
    registers,
    other_accesses,
    time::time_of_day,
    time::plugged_in_while_a_vcpu_looks,
    time::clock_set_back,
    time::in_a_time_namespace,
    time::load_and_count_on,
    time::wraps_around,
    alarms::alarm_while_no_vcpu_runs,
    alarms::alarm_found_by_an_access,
    alarms::alarm_made_by_a_write,
    alarms::masked_alarm,
    alarms::alarm_in_the_past,
    alarms::alarm_replaced,
    alarms::two_vcpus_set_alarms,
    state::closed_with_alarm,
    state::swapped_with_alarm,
    state::restored_elsewhere,
    state::restored_with_ten_days_less_uptime,
    state::restored_alarm_rings_by_itself,
    state::restored_after_the_alarm,
    state::saved_and_resumed,
    state::reset_with_alarm,
    model::as_vm_superio,
);

const DR: u64 = 0x00;
const MR: u64 = 0x04;
const LR: u64 = 0x08;
const CR: u64 = 0x0c;
const IMSC: u64 = 0x10;
const RIS: u64 = 0x14;
const MIS: u64 = 0x18;
const ICR: u64 = 0x1c;
const ID_FIRST: u64 = 0xfe0;

/// Peripheral and PrimeCell identification, of the reference manual's table of registers.
const IDS: [u32; 8] = [0x31, 0x10, 0x04, 0x00, 0x0d, 0xf0, 0x05, 0xb1];

/// How late a signal may come under emulation.
const LATE: Duration = Duration::from_secs(10);

const SECOND: Duration = Duration::from_secs(1);

/// The time of day.
fn host_time() -> Duration {
    HostClock::new(libc::CLOCK_REALTIME).now()
}

/// Sets what the VMM tells the device: how far the time of day is from the time since boot.
fn set_clock(image: &Programs, offset_ns: u64) {
    image.param("clock", [offset_ns]).expect("the parameter");
}

/// Sets a device up, with pauses, and then has the guest see it.
fn plug(vm: &VmFd, image: Programs, irq: &EventFd, pause: impl Fn()) -> ImageDevice {
    let device = Device::new(vm).expect("KVM_CREATE_DEVICE");
    pause();
    device.set_irq(0, irq).expect("interrupt 0");
    pause();
    set_clock(&image, time_of_day_offset_ns());
    pause();
    ImageDevice::builder(device, image)
        .plug(Place::Memory(ADDR))
        .expect("the region")
}

/// A guest with a clock.
struct Clock {
    guest: Guest,
    vcpu: Vcpu,
    device: ImageDevice,
    irq: EventFd,
}

fn read(vcpu: &mut Vcpu, register: u64) -> u32 {
    let read = vcpu.read(ADDR + register, 4);
    assert_got!(read.exits, [], "exits of a read at {register:#x}");
    read.value as u32
}

fn write(vcpu: &mut Vcpu, register: u64, value: u32) {
    let exits = vcpu.write(ADDR + register, 4, value.into());
    assert_got!(exits, [], "exits of a write at {register:#x}");
}

impl Clock {
    fn new() -> Self {
        Self::of(loaded(sample("pl031")))
    }

    /// One of that image, whose "pl031" may have a state.
    fn of(image: Programs) -> Self {
        let guest = Guest::new();
        let irq = eventfd();
        let device = plug(guest.vm(), image, &irq, || {});
        Clock {
            vcpu: guest.vcpu(0),
            guest,
            device,
            irq,
        }
    }

    /// One whose alarm works, without an interrupt so far.
    fn with_alarm() -> Self {
        let mut clock = Clock::new();
        clock.enable_alarm();
        clock
    }

    fn enable_alarm(&mut self) {
        required("bpf_kvm_irq_acquire");
        self.write(IMSC, 1);
        assert_got!(self.signals(), 0, "signals of a new clock");
    }

    fn read(&mut self, register: u64) -> u32 {
        read(&mut self.vcpu, register)
    }

    fn write(&mut self, register: u64, value: u32) {
        write(&mut self.vcpu, register, value);
    }

    /// The same programs again, with the state.
    fn replace(&mut self) {
        let changes = self
            .device
            .replace(sample("pl031"), OnLoss::Refuse, unpaused);
        let changes = changes.expect("replacing");
        let all = ["alarm_irqs", "alarms", "clock", "locks", "pl031"];
        assert_got!(changes.carried, all, "maps that go on");
    }

    /// RIS and MIS.
    fn status(&mut self) -> (u32, u32) {
        (self.read(RIS), self.read(MIS))
    }

    /// Sets the alarm so many seconds past what the clock says: 1 is its next tick.
    fn alarm_in(&mut self, seconds: u32) {
        let now = self.read(DR);
        self.write(MR, now.wrapping_add(seconds));
    }

    /// How often the interrupt was signalled since the last look.
    fn signals(&self) -> u64 {
        taken(&self.irq)
    }

    /// Waits for a signal while no vCPU runs; says whether there was one.
    fn signalled_within(&self, limit: Duration) -> bool {
        let mut fd = libc::pollfd {
            fd: self.irq.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one pollfd, a local.
        let ready = unsafe { libc::poll(&mut fd, 1, limit.as_millis() as libc::c_int) };
        assert!(ready >= 0, "poll: {}", io::Error::last_os_error());
        ready == 1
    }

    /// Waits for the alarm, which signals once, and clears it.
    #[track_caller]
    fn expect_alarm(&mut self) {
        assert!(self.signalled_within(LATE), "no alarm within {LATE:?}");
        assert_got!(self.status(), (1, 1), "RIS and MIS after the alarm");
        assert_got!(self.signals(), 1, "signals of one alarm");
        self.write(ICR, 1);
        assert_got!(self.status(), (0, 0), "RIS and MIS after ICR");
    }
}

fn registers() {
    let mut clock = Clock::new();
    for (register, wanted) in [
        (MR, 0),
        (LR, 0),
        (CR, 1),
        (IMSC, 0),
        (RIS, 0),
        (MIS, 0),
        (ICR, 0),
    ] {
        assert_got!(clock.read(register), wanted, "register {register:#x}");
    }
    for (offset, wanted) in (ID_FIRST..).step_by(4).zip(IDS) {
        assert_got!(clock.read(offset), wanted, "id at {offset:#x}");
        clock.write(offset, !wanted);
        assert_got!(clock.read(offset), wanted, "id at {offset:#x}");
    }
    // Far apart: where MR and DR meet, an alarm is due.
    for value in [0x1234_5678, u32::MAX, 0x8000_1000] {
        clock.write(MR, value);
        assert_got!(clock.read(MR), value, "MR");
        clock.write(LR, !value);
        assert_got!(clock.read(LR), !value, "LR");
        assert_got!(clock.read(MR), value, "MR");
    }
    for (value, wanted) in [(u32::MAX, 1), (u32::MAX - 1, 0), (1, 1), (0, 0)] {
        clock.write(IMSC, value);
        assert_got!(clock.read(IMSC), wanted, "IMSC after {value:#x}");
    }
    // It runs, and nothing stops or resets it.
    clock.write(LR, 5_000_000);
    for value in [0, 1, u32::MAX] {
        clock.write(CR, value);
        assert_got!(clock.read(CR), 1, "CR after {value:#x}");
        assert_got!(clock.read(LR), 5_000_000, "LR after CR = {value:#x}");
        let got = clock.read(DR);
        assert!(
            (5_000_000..5_000_060).contains(&got),
            "DR after CR = {value:#x}: {got}"
        );
    }
    for register in [DR, RIS, MIS] {
        clock.write(register, u32::MAX);
    }
    assert_got!(clock.status(), (0, 0));
    let got = clock.read(DR);
    assert!((5_000_000..5_000_060).contains(&got), "DR written: {got}");
    assert_got!(clock.signals(), 0);
}

/// What is no access to a register: reads 0, is ignored, never leaves the kernel.
fn other_accesses() {
    let mut clock = Clock::new();
    clock.write(MR, 0x1234_5678);
    clock.write(LR, 0x1000_0000);
    let unknown = [0x20, 0x24, 0x80, 0x7fc, 0xfd8, 0xfdc];
    for offset in unknown {
        clock.write(offset, u32::MAX);
        assert_got!(clock.read(offset), 0, "unknown register {offset:#x}");
    }
    let registers = [DR, MR, LR, CR, IMSC, RIS, MIS, ICR, ID_FIRST, SIZE - 8];
    for register in registers {
        other_accesses_of(&mut clock.vcpu, ADDR + register);
    }
    assert_got!(clock.read(MR), 0x1234_5678, "MR after all this");
    assert_got!(clock.read(LR), 0x1000_0000, "LR after all this");
    assert_got!(clock.read(IMSC), 0, "IMSC after all this");
    assert_got!(clock.status(), (0, 0));
    assert_got!(clock.signals(), 0);
}

/// A read of DR, and the seconds of the host's time between which it was.
fn read_between(clock: &mut Clock) -> (u64, u32, u64) {
    let before = host_time().as_secs();
    let value = clock.read(DR);
    (before, value, host_time().as_secs())
}
