// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The GPIO controller of `samples/devices`: its registers, lines and interrupt, and thousands of
//! accesses compared with a model that has a structure per line.

use kvm_bpf::{Device, ImageDevice, OnLoss, Place};
use kvm_bpf_selftests::guest::{Args, Guest, Routine, Vcpu};
use kvm_bpf_selftests::harness::{Random, number_from_env, unpaused};
use kvm_bpf_selftests::programs::{loaded, sample};
use vmm_sys_util::eventfd::EventFd;

use super::kfunc::required;
use super::{ADDR, SIZE, eventfd, taken};

tests!(
    registers,
    lines,
    other_accesses,
    edges,
    levels,
    resample,
    guest_takes_level,
    reset,
    restored_elsewhere,
    replaced,
    as_a_model,
);

const DIR: u64 = 0x400;
const IS: u64 = 0x404;
const IBE: u64 = 0x408;
const IEV: u64 = 0x40c;
const IE: u64 = 0x410;
const RIS: u64 = 0x414;
const MIS: u64 = 0x418;
const IC: u64 = 0x41c;
const AFSEL: u64 = 0x420;
const ID_FIRST: u64 = 0xfe0;

/// Peripheral and PrimeCell identification, of the reference manual's table of registers.
const IDS: [u8; 8] = [0x61, 0x10, 0x04, 0x00, 0x0d, 0xf0, 0x05, 0xb1];

/// Offset of the levels of those lines.
fn data(lines: u8) -> u64 {
    u64::from(lines) << 2
}

/// A guest with GPIO lines.
struct Gpio {
    guest: Guest,
    vcpu: Vcpu,
    device: ImageDevice,
    irq: EventFd,
}

impl Gpio {
    fn new() -> Self {
        let guest = Guest::new();
        let vcpu = guest.vcpu(0);
        Self::of(guest, vcpu)
    }

    fn of(guest: Guest, vcpu: Vcpu) -> Self {
        required("bpf_kvm_irq_signal");
        let irq = eventfd();
        let device = Device::new(guest.vm()).expect("KVM_CREATE_DEVICE");
        device.set_irq(0, &irq).expect("interrupt 0");
        let device =
            ImageDevice::builder(device, loaded(sample("pl061"))).plug(Place::Memory(ADDR));
        Gpio {
            vcpu,
            device: device.expect("the region"),
            guest,
            irq,
        }
    }

    /// With 1 byte or 4, which comes to the same.
    #[track_caller]
    fn read_width(&mut self, register: u64, width: usize) -> u64 {
        let read = self.vcpu.read(ADDR + register, width);
        assert_got!(read.exits, [], "exits of a read at {register:#x}");
        read.value
    }

    #[track_caller]
    fn write_width(&mut self, register: u64, width: usize, value: u64) {
        let exits = self.vcpu.write(ADDR + register, width, value);
        assert_got!(exits, [], "exits of a write at {register:#x}");
    }

    #[track_caller]
    fn get(&mut self, register: u64) -> u8 {
        self.read_width(register, 1) as u8
    }

    #[track_caller]
    fn set(&mut self, register: u64, value: u8) {
        self.write_width(register, 1, value.into());
    }

    #[track_caller]
    fn input(&self, line: u32, level: bool) {
        let known = self.device.input(line, level).expect("an input");
        assert!(known, "wanted a WORK program \"input\"");
    }

    /// How often the interrupt was signalled since the last look.
    fn signals(&self) -> u64 {
        taken(&self.irq)
    }

    /// RIS and MIS.
    fn status(&mut self) -> (u8, u8) {
        (self.get(RIS), self.get(MIS))
    }
}

fn registers() {
    let mut gpio = Gpio::new();
    for register in [data(0xff), DIR, IS, IBE, IEV, IE, RIS, MIS, IC, AFSEL] {
        assert_got!(gpio.get(register), 0, "register {register:#x} at first");
    }
    for (offset, wanted) in (ID_FIRST..).step_by(4).zip(IDS) {
        gpio.set(offset, !wanted);
        assert_got!(gpio.get(offset), wanted, "id at {offset:#x}");
    }
    for register in [DIR, IS, IBE, IEV, IE, AFSEL] {
        for width in [1, 4] {
            for value in [0x5a_u64, 0xff, 0xffff_ff81, 0] {
                gpio.write_width(register, width, value);
                let wanted = value & 0xff;
                for width in [1, 4] {
                    let got = gpio.read_width(register, width);
                    assert_got!(got, wanted, "register {register:#x}");
                }
            }
        }
    }
    for register in [RIS, MIS] {
        gpio.set(register, 0xff);
        assert_got!(
            gpio.get(register),
            0,
            "register {register:#x} is not written"
        );
    }
    assert_got!(gpio.signals(), 0);
}

/// The address says which lines an access is for; outputs are the guest's, inputs the VMM's.
fn lines() {
    let mut gpio = Gpio::new();
    gpio.set(DIR, 0xf0);
    gpio.set(data(0xff), 0xa5);
    assert_got!(gpio.get(data(0xff)), 0xa0, "outputs alone");
    gpio.set(data(0x30), 0xff);
    assert_got!(gpio.get(data(0xff)), 0xb0, "two lines more");
    gpio.set(data(0), 0);
    for lines in 0..=0xff {
        assert_got!(gpio.get(data(lines)), 0xb0 & lines, "lines {lines:#x}");
    }
    for line in 0..8 {
        gpio.input(line, true);
    }
    assert_got!(gpio.get(data(0xff)), 0xbf, "inputs high");
    gpio.input(2, false);
    // There is none of these.
    gpio.input(8, false);
    gpio.input(u32::MAX, false);
    assert_got!(gpio.get(data(0xff)), 0xbb, "one low");
    // What is an input now keeps what it would drive.
    gpio.set(DIR, 0x0f);
    assert_got!(gpio.get(data(0xff)), 0xf5, "the other way round");
    let map = super::element(gpio.device.programs(), "pl061");
    assert_got!(map[..3], [0xfb, 0xb5, 0x0f], "in, out and dir in the map");
    assert_got!(gpio.signals(), 0);
}

fn other_accesses() {
    let mut gpio = Gpio::new();
    gpio.set(DIR, 0xff);
    gpio.set(data(0xff), 0xff);
    for offset in [0x424, 0x500, 0x7fc, 0xfdc] {
        gpio.write_width(offset, 4, u32::MAX.into());
        assert_got!(gpio.read_width(offset, 4), 0, "unknown {offset:#x}");
    }
    for register in [data(0xff), DIR, MIS, SIZE - 8] {
        for (offset, width) in [(0, 2), (2, 2), (1, 1), (3, 1)] {
            gpio.write_width(register + offset, width, 0);
            let got = gpio.read_width(register + offset, width);
            assert_got!(got, 0, "{width} bytes at {register:#x} + {offset}");
        }
    }
    // Eight bytes at once are none of a register's either.
    for register in [data(0xfe), DIR, IE, MIS] {
        gpio.write_width(register & !7, 8, 0);
        assert_got!(gpio.read_width(register & !7, 8), 0, "8 bytes");
    }
    assert_got!((gpio.get(DIR), gpio.get(data(0xff))), (0xff, 0xff));
    assert_got!(gpio.signals(), 0);
}

/// Each kind of edge is noted as asked for, until it is cleared; the first one signals.
fn edges() {
    let mut gpio = Gpio::new();
    // Line 0 rising, 1 falling, 2 both, 3 rising but masked.
    gpio.set(IEV, 0b1001);
    gpio.set(IBE, 0b0100);
    gpio.set(IE, 0b0111);
    for line in 0..4 {
        gpio.input(line, true);
    }
    assert_got!(gpio.status(), (0b1101, 0b0101), "rising");
    // One interrupt for all lines.
    assert_got!(gpio.signals(), 1);
    gpio.set(IC, 0b0101);
    assert_got!(gpio.status(), (0b1000, 0));
    for line in 0..4 {
        gpio.input(line, true);
    }
    assert_got!((gpio.status(), gpio.signals()), ((0b1000, 0), 0), "no edge");
    for line in 0..4 {
        gpio.input(line, false);
    }
    assert_got!(gpio.status(), (0b1110, 0b0110), "falling");
    assert_got!(gpio.signals(), 1);
    // Letting one through that was noted signals.
    gpio.set(IC, 0b0110);
    gpio.set(IE, 0b1000);
    assert_got!((gpio.status(), gpio.signals()), ((0b1000, 0b1000), 1));
    gpio.set(IC, 0xff);
    // Outputs have edges too.
    gpio.set(DIR, 0b1000);
    gpio.set(data(0b1000), 0xff);
    assert_got!((gpio.status(), gpio.signals()), ((0b1000, 0b1000), 1));
}

fn levels() {
    let mut gpio = Gpio::new();
    // Line 0 high, 1 low.
    gpio.set(IEV, 0b01);
    gpio.set(IS, 0b11);
    assert_got!(gpio.status(), (0b10, 0), "both low");
    gpio.set(IE, 0b11);
    assert_got!((gpio.status(), gpio.signals()), ((0b10, 0b10), 1));
    gpio.set(IC, 0xff);
    assert_got!(gpio.status(), (0b10, 0b10), "a level cannot be cleared");
    gpio.input(1, true);
    assert_got!((gpio.status(), gpio.signals()), ((0, 0), 0), "gone");
    gpio.input(0, true);
    assert_got!((gpio.status(), gpio.signals()), ((0b01, 0b01), 1));
    // It is up already.
    gpio.input(1, false);
    assert_got!((gpio.status(), gpio.signals()), ((0b11, 0b11), 0));
}

/// The interrupt is signalled again as long as it is wanted.
fn resample() {
    let mut gpio = Gpio::new();
    let run = |gpio: &Gpio| assert!(gpio.device.run("resample", 0).expect("a run"));
    run(&gpio);
    assert_got!(gpio.signals(), 0, "not wanted");
    gpio.set(IEV, 1);
    gpio.set(IS, 1);
    gpio.set(IE, 1);
    gpio.input(0, true);
    assert_got!(gpio.signals(), 1);
    for _ in 0..3 {
        run(&gpio);
        assert_got!(gpio.signals(), 1, "wanted");
    }
    gpio.input(0, false);
    run(&gpio);
    assert_got!(gpio.signals(), 0, "not wanted any more");
}

/// The guest takes the interrupt as long as the input is high, and no more when it is low.
fn guest_takes_level() {
    const GSI: u32 = 20;
    /// No register, so that the handler's access changes nothing.
    const NOWHERE: u64 = ADDR + 0xf00;

    let guest = Guest::with_irqchip();
    let mut vcpu = guest.vcpu_with_interrupts();
    guest.route_line(&mut vcpu, GSI, true);
    let mut gpio = Gpio::of(guest, vcpu);
    let done = eventfd();
    let vm = gpio.guest.vm();
    vm.register_irqfd_with_resample(&gpio.irq, &done, GSI)
        .expect("KVM_IRQFD with a resample fd");
    gpio.device
        .set_work_eventfd("resample", Some(&done))
        .expect("the eventfd of resample");
    for register in [IEV, IS, IE] {
        gpio.set(register, 1);
    }
    for _ in 0..3 {
        gpio.input(0, true);
        let args = Args {
            addr: NOWHERE,
            count: 5,
            pair: [NOWHERE, 0],
            ..Default::default()
        };
        let (results, exits) = gpio.vcpu.call(Routine::AwaitInterrupts, args);
        assert_got!(exits, []);
        assert!(results.value >= 5, "interrupts: {}", results.value);
        gpio.input(0, false);
    }
}

/// The guest's registers are as in a new device, what comes from outside is not.
fn reset() {
    let mut gpio = Gpio::new();
    gpio.input(5, true);
    for register in [DIR, IBE, IEV, IE, AFSEL] {
        gpio.set(register, 0x0f);
    }
    gpio.set(data(0xff), 0xff);
    gpio.input(1, true);
    assert_got!(gpio.get(MIS), 0x0f);
    assert_got!(gpio.signals(), 1);
    assert!(gpio.device.reset().expect("a reset"));
    for register in [DIR, IS, IBE, IEV, IE, RIS, MIS, AFSEL] {
        assert_got!(gpio.get(register), 0, "register {register:#x}");
    }
    assert_got!(gpio.get(data(0xff)), 0b10_0010, "inputs");
    assert_got!(gpio.signals(), 0);
}

/// The interrupt is signalled where the device goes on, if it is still wanted.
fn restored_elsewhere() {
    let mut gpio = Gpio::new();
    gpio.set(DIR, 0xf0);
    gpio.set(data(0xff), 0xa0);
    gpio.set(IEV, 0x01);
    gpio.set(IE, 0x01);
    gpio.input(1, true);
    let quiet = gpio.device.save().expect("the state");
    gpio.input(0, true);
    let state = gpio.device.save().expect("the state");
    let mut other = Gpio::new();
    other.device.restore(&quiet).expect("restoring");
    assert_got!((other.get(data(0xff)), other.signals()), (0xa2, 0));
    other.device.restore(&state).expect("restoring");
    assert_got!(other.get(data(0xff)), 0xa3);
    assert_got!((other.status(), other.signals()), ((1, 1), 1));
    other.set(IC, 1);
    assert_got!(other.status(), (0, 0));
    // The first one has it still.
    assert_got!((gpio.status(), gpio.signals()), ((1, 1), 1));
}

fn replaced() {
    let mut gpio = Gpio::new();
    gpio.set(DIR, 0xf0);
    gpio.set(data(0xff), 0x50);
    gpio.input(0, true);
    let changes = gpio
        .device
        .replace(sample("pl061"), OnLoss::Refuse, unpaused);
    assert_got!(changes.expect("replacing").carried, ["locks", "pl061"]);
    assert_got!((gpio.get(DIR), gpio.get(data(0xff))), (0xf0, 0x51));
    gpio.input(1, true);
    assert_got!(gpio.get(data(0xff)), 0x53);
}

/// A line, as the manual tells of one.
#[derive(Clone, Copy, Debug, Default)]
struct Line {
    input: bool,
    output: bool,
    is_output: bool,
    by_level: bool,
    both_edges: bool,
    rising_or_high: bool,
    enabled: bool,
    hardware: bool,
    edge: bool,
}

impl Line {
    fn level(&self) -> bool {
        match self.is_output {
            true => self.output,
            false => self.input,
        }
    }

    fn raw(&self) -> bool {
        match self.by_level {
            true => self.level() == self.rising_or_high,
            false => self.edge,
        }
    }

    /// What changes the line, and what comes of a change of its level.
    fn change(&mut self, change: impl FnOnce(&mut Self)) {
        let before = self.level();
        change(self);
        let after = self.level();
        let is_wanted = self.both_edges || after == self.rising_or_high;
        if before != after && is_wanted && !self.by_level {
            self.edge = true;
        }
    }

    fn write(&mut self, register: u64, bit: bool) {
        self.change(|line| match register {
            DIR => line.is_output = bit,
            IS => line.by_level = bit,
            IBE => line.both_edges = bit,
            IEV => line.rising_or_high = bit,
            IE => line.enabled = bit,
            IC => line.edge &= !bit,
            AFSEL => line.hardware = bit,
            _ => (),
        });
    }

    fn read(&self, register: u64) -> bool {
        match register {
            DIR => self.is_output,
            IS => self.by_level,
            IBE => self.both_edges,
            IEV => self.rising_or_high,
            IE => self.enabled,
            RIS => self.raw(),
            MIS => self.raw() && self.enabled,
            AFSEL => self.hardware,
            _ => false,
        }
    }
}

#[derive(Default)]
struct Model([Line; 8]);

impl Model {
    fn read(&self, offset: u64) -> u8 {
        let lines = self.0.iter().enumerate();
        lines.fold(0, |byte, (line, state)| {
            let bit = match offset {
                0x000..0x400 => offset >> (line + 2) & 1 == 1 && state.level(),
                _ => state.read(offset),
            };
            byte | u8::from(bit) << line
        })
    }

    fn write(&mut self, offset: u64, value: u8) {
        for (line, state) in self.0.iter_mut().enumerate() {
            let bit = value >> line & 1 == 1;
            match offset {
                0x000..0x400 if offset >> (line + 2) & 1 == 1 => {
                    state.change(|state| state.output = bit);
                }
                _ => state.write(offset, bit),
            }
        }
    }
}

/// `KVM_BPF_SEED` and `KVM_BPF_ACCESSES` set the script.
fn as_a_model() {
    let seed = number_from_env("KVM_BPF_SEED", 1);
    let accesses = number_from_env("KVM_BPF_ACCESSES", 5000);
    let mut random = Random::new(seed);
    let mut gpio = Gpio::new();
    let mut model = Model::default();
    let mut signalled = 0;
    for number in 0..accesses {
        let register = match random.below(4) {
            0 => 4 * random.below(0x100),
            _ => DIR + 4 * random.below(9),
        };
        let value = random.next();
        let width = if value >> 32 & 1 == 1 { 1 } else { 4 };
        let was_wanted = model.read(MIS) != 0;
        let what = format!("access {number} of seed {seed} at {register:#x}");
        match random.below(3) {
            0 => {
                let got = gpio.read_width(register, width);
                assert_got!(got, u64::from(model.read(register)), "{what}: read");
            }
            1 => {
                let value = value & 0xffff_ffff >> (32 - 8 * width);
                gpio.write_width(register, width, value);
                model.write(register, value as u8);
            }
            _ => {
                let (line, level) = (random.below(8), random.below(2) == 1);
                gpio.input(line as u32, level);
                model.0[line as usize].change(|state| state.input = level);
            }
        }
        assert_got!(gpio.get(RIS), model.read(RIS), "{what}: RIS");
        let signals = u64::from(!was_wanted && model.read(MIS) != 0);
        assert_got!(gpio.signals(), signals, "{what}: signals");
        signalled += signals;
        // Else nearly all of the time one of eight lines wants it.
        if random.below(4) == 0 {
            let enabled = 1 << random.below(8);
            gpio.set(IE, enabled);
            model.write(IE, enabled);
            gpio.signals();
        }
    }
    assert!(
        accesses < 5000 || signalled > 20,
        "wanted many interrupts compared, got {signalled}"
    );
}
