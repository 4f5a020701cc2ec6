// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The sample serial port, at ports: its registers, its interrupt, and where the bytes go; thousands
//! of accesses compared with the serial port of the crate `vm-superio`.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use kvm_bpf::device::Error;
use kvm_bpf::note::Space;
use kvm_bpf::{Device, ImageDevice, Map, OnLoss, Place, RingBuffer};
use kvm_bpf_selftests::bpf::Census;
use kvm_bpf_selftests::guest::{Guest, PRESET, PortExit, Vcpu, mask};
use kvm_bpf_selftests::harness::{Random, number_from_env, unpaused};
use kvm_bpf_selftests::programs::{loaded, sample};
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::{ADDR, element, eventfd, taken};

tests!(
    note,
    registers,
    modem_lines_loop_back,
    other_accesses,
    bytes_arrive_in_order,
    what_nobody_takes_is_counted,
    interrupt,
    replaced,
    place_and_kind_must_agree,
    occupied_ports,
    as_vm_superio,
);

const PORT: u16 = 0x2f8;
const THR: u16 = 0;
const IER: u16 = 1;
const IIR: u16 = 2;
const LCR: u16 = 3;
const MCR: u16 = 4;
const LSR: u16 = 5;
const MSR: u16 = 6;
const SCR: u16 = 7;

const IER_THRE: u8 = 2;
const LCR_DLAB: u8 = 0x80;
const MCR_OUT2: u8 = 8;
const MCR_LOOP: u8 = 0x10;

struct Setup {
    vcpu: Vcpu,
    device: ImageDevice,
    irq: EventFd,
    _guest: Guest,
}

impl Setup {
    fn new() -> Self {
        let guest = Guest::new();
        let device = Device::new(guest.vm()).expect("KVM_CREATE_DEVICE");
        let irq = eventfd();
        device.set_irq(0, &irq).expect("interrupt 0");
        let device = ImageDevice::builder(device, loaded(sample("uart16550")))
            .plug(Place::Port(PORT))
            .unwrap_or_else(|error| panic!("wanted the ports to be set, got {error:#?}"));
        Setup {
            vcpu: guest.vcpu(0),
            device,
            irq,
            _guest: guest,
        }
    }

    #[track_caller]
    fn get(&mut self, register: u16) -> u8 {
        let (value, exits) = self.vcpu.port_in(PORT + register, 1);
        assert_got!(exits, [], "exits of a read of register {register}");
        assert_got!(value & !mask(1), PRESET & !mask(1));
        value as u8
    }

    #[track_caller]
    fn set(&mut self, register: u16, value: u8) {
        let exits = self.vcpu.port_out(PORT + register, 1, value.into());
        assert_got!(exits, [], "exits of a write of register {register}");
    }

    /// Takes what the guest sends.
    fn taker(&self) -> Taker {
        Taker::new(
            self.device
                .programs()
                .map("output")
                .expect("the ring buffer"),
        )
    }
}

struct Taker {
    ring: RingBuffer,
}

impl Taker {
    fn new(map: &Map) -> Self {
        Taker {
            ring: RingBuffer::new(map).expect("a ring buffer's reader"),
        }
    }

    fn take(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        let taken = self.ring.take(|bytes| all.extend(bytes));
        taken.expect("a sound ring buffer");
        all
    }
}

fn note() {
    let image = sample("uart16550");
    let note = image.note();
    assert_got!((note.mmio_size, note.nr_irqs), (0, 1));
    assert_got!(note.compatible, ["ns16550a"]);
    let regions: Vec<_> = note
        .regions()
        .iter()
        .map(|range| (range.space, range.region, range.size))
        .collect();
    assert_got!(regions, [(Space::Ports, 0, 8)]);
}

fn registers() {
    let mut uart = Setup::new();
    let reset: Vec<u8> = (0..8).map(|register| uart.get(register)).collect();
    assert_got!(reset, [0, 0, 1, 0, 0, 0x60, 0xb0, 0], "after reset");

    for value in [0x5a, 0xff, 0] {
        for (register, bits) in [(IER, 0x0f), (LCR, 0x7f), (MCR, 0x1f), (SCR, 0xff)] {
            let written = match register {
                LCR => value & !LCR_DLAB,
                _ => value,
            };
            uart.set(register, written);
            assert_got!(uart.get(register), value & bits, "register {register}");
            uart.set(register, 0);
        }
        // LSR and MSR are not for the guest to write.
        uart.set(LSR, value);
        uart.set(MSR, value);
        assert_got!((uart.get(LSR), uart.get(MSR)), (0x60, 0xb0));
    }

    // The divisor is where data and IER are, and neither changes the other.
    uart.set(IER, 1);
    uart.set(LCR, LCR_DLAB | 3);
    uart.set(THR, 0x12);
    uart.set(IER, 0xfe);
    assert_got!((uart.get(THR), uart.get(IER)), (0x12, 0xfe), "divisor");
    uart.set(LCR, 3);
    assert_got!((uart.get(THR), uart.get(IER)), (0, 1), "no divisor");
    assert_got!(uart.taker().take(), [0; 0], "bytes sent");

    uart.set(IIR, 1);
    assert_got!(uart.get(IIR), 0xc1, "with FIFOs");
    uart.set(IIR, 0);
    assert_got!(uart.get(IIR), 0x01, "without");
    assert_got!(taken(&uart.irq), 0, "interrupts");
}

/// How Linux tells that there is a UART: what the guest sets comes back, nothing is sent.
fn modem_lines_loop_back() {
    let mut uart = Setup::new();
    let mut taker = uart.taker();
    for (lines, wanted) in [
        (0, 0),
        (1, 0x20),
        (2, 0x10),
        (4, 0x40),
        (8, 0x80),
        (0x0a, 0x90),
        (0x0f, 0xf0),
    ] {
        uart.set(MCR, MCR_LOOP | lines);
        assert_got!(uart.get(MSR), wanted, "lines {lines:#x}");
    }
    uart.set(THR, b'x');
    assert_got!(taker.take(), [0; 0], "bytes sent");
    uart.set(MCR, 0);
    assert_got!(uart.get(MSR), 0xb0);
    uart.set(THR, b'y');
    assert_got!(taker.take(), b"y");
}

fn other_accesses() {
    let mut uart = Setup::new();
    uart.set(SCR, 0x5a);
    for (register, width) in [(THR, 2), (THR, 4), (4, 4), (6, 2), (1, 2)] {
        let exits = uart.vcpu.port_out(PORT + register, width, u64::MAX);
        assert_got!(exits, [], "{width}-byte out at {register}");
        let (value, exits) = uart.vcpu.port_in(PORT + register, width);
        assert_got!((value & mask(width), exits), (0, vec![]), "{width}-byte in");
    }
    assert_got!(uart.get(SCR), 0x5a);
    assert_got!(uart.taker().take(), [0; 0], "bytes sent");
    // Not all of it is the device's.
    let wanted = [PortExit::In(PORT + 7, 2, 1)];
    assert_got!(uart.vcpu.port_in(PORT + 7, 2).1, wanted);
}

fn bytes_arrive_in_order() {
    let mut uart = Setup::new();
    let mut taker = uart.taker();
    let bytes: Vec<u8> = (0..=255).chain((0..=255).rev()).collect();
    for &byte in &bytes {
        uart.set(THR, byte);
    }
    assert_got!(taker.take(), bytes);
    // One who waits is woken.
    uart.set(THR, b'!');
    taker.ring.wait(Duration::from_secs(10)).expect("waiting");
    assert_got!(taker.take(), b"!");
}

fn what_nobody_takes_is_counted() {
    /// Bytes of the ring, and of one byte there.
    const ROOM: usize = (256 << 10) / 16;
    const MORE: usize = 100;

    let mut uart = Setup::new();
    for at in 0..ROOM + MORE {
        uart.set(THR, at as u8);
    }
    assert_got!(uart.get(LSR), 0x60, "the guest never has to wait");
    let lost = element(uart.device.programs(), "lost");
    let lost = u64::from_ne_bytes(lost.try_into().expect("8 bytes")) as usize;
    let got = uart.taker().take();
    assert_got!(got.len() + lost, ROOM + MORE, "bytes taken and lost");
    assert!((MORE..MORE + 16).contains(&lost), "{lost} bytes lost");
    let wanted: Vec<u8> = (0..got.len()).map(|at| at as u8).collect();
    assert!(got == wanted, "the first bytes, as they were sent");
}

fn interrupt() {
    let mut uart = Setup::new();
    // The chip's: pending, but enabled neither here nor there.
    uart.set(THR, 0);
    assert_got!((uart.get(IIR), taken(&uart.irq)), (1, 0));
    uart.set(IER, IER_THRE);
    assert_got!(taken(&uart.irq), 0, "without OUT2");
    uart.set(MCR, MCR_OUT2);
    assert_got!(taken(&uart.irq), 1, "with OUT2");
    // It stays pending, and is no second edge, until someone looks.
    uart.set(THR, 0);
    assert_got!(taken(&uart.irq), 0, "while it is pending");
    assert_got!((uart.get(IIR), uart.get(IIR)), (2, 1));
    uart.set(THR, 0);
    assert_got!(taken(&uart.irq), 1, "after a byte");
    assert_got!(uart.get(IIR), 2);
    // The same value is no edge of IER.
    uart.set(IER, IER_THRE);
    assert_got!((taken(&uart.irq), uart.get(IIR)), (0, 1));
    for _ in 0..2 {
        uart.set(IER, 0);
        assert_got!((taken(&uart.irq), uart.get(IIR)), (0, 1));
        uart.set(IER, IER_THRE);
        assert_got!((taken(&uart.irq), uart.get(IIR)), (1, 2));
    }
    // A byte that loops back empties THR too.
    uart.set(MCR, MCR_OUT2 | MCR_LOOP);
    uart.set(THR, 0);
    assert_got!((taken(&uart.irq), uart.get(IIR)), (1, 2));
}

/// New programs at the same ports; registers and bytes that wait stay.
fn replaced() {
    let census = Census::now();
    let mut uart = Setup::new();
    let mut taker = uart.taker();
    uart.set(SCR, 0x5a);
    uart.set(THR, b'a');
    let changes = uart
        .device
        .replace(sample("uart16550"), OnLoss::Refuse, unpaused);
    let changes = changes.unwrap_or_else(|error| panic!("wanted it to do, got {error:#?}"));
    assert_got!(
        changes.to_string(),
        "carried over: locks, lost, output, uart"
    );
    assert_got!(uart.device.place(), Place::Port(PORT));
    uart.set(THR, b'b');
    assert_got!(uart.get(SCR), 0x5a);
    assert_got!(taker.take(), b"ab");

    // A device of memory is another one.
    match uart
        .device
        .replace(sample("regbank"), OnLoss::Accept, unpaused)
    {
        Err(Error::OtherDevice { .. }) => {}
        result => panic!("wanted OtherDevice, got {result:?}"),
    }
    assert_got!(uart.get(SCR), 0x5a);
    drop((uart, taker));
    census.wait_for_newer(0, 0);
}

fn place_and_kind_must_agree() {
    let guest = Guest::new();
    for (name, place, space, words) in [
        (
            "uart16550",
            Place::Memory(ADDR),
            Space::Ports,
            "for ports, not for memory",
        ),
        (
            "regbank",
            Place::Port(PORT),
            Space::Memory,
            "for memory, not for ports",
        ),
    ] {
        let device = Device::new(guest.vm()).expect("KVM_CREATE_DEVICE");
        match ImageDevice::builder(device, loaded(sample(name))).plug(place) {
            Err(error @ Error::WrongSpace(has)) if has == space => {
                let message = error.to_string();
                assert!(message.contains(words), "wanted {words:?}, got {message}");
            }
            result => panic!("{name}: wanted WrongSpace, got {result:?}"),
        }
    }
}

fn occupied_ports() {
    let guest = Guest::with_irqchip();
    let device = Device::new(guest.vm()).expect("KVM_CREATE_DEVICE");
    match ImageDevice::builder(device, loaded(sample("uart16550"))).plug(Place::Port(0x20)) {
        Err(Error::SetRegion { place, source, .. }) => {
            assert_got!(place.to_string(), "port 0x20");
            assert_got!(source.raw_os_error(), Some(libc::EEXIST));
        }
        result => panic!("wanted the PIC to have the port, got {result:?}"),
    }
}

/// Counts the interrupts of vm-superio's serial port.
struct Interrupts(Arc<AtomicU64>);

impl Trigger for Interrupts {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.fetch_add(1, SeqCst);
        Ok(())
    }
}

/// Random accesses give the same values, interrupts and bytes.
///
/// Where the two differ, the accesses do not go:
///
/// * vm-superio always has FIFOs, lets its interrupt out without OUT2, and keeps all bits of MCR.
/// * A write of IER that leaves bit 1 set is an interrupt of vm-superio's, as if it had been clear,
///   and one that clears it leaves the interrupt in IIR: IIR is read before, and IER is cleared.
/// * vm-superio receives what loops back.
fn as_vm_superio() {
    const STEP: u64 = 1000;

    let mut uart = Setup::new();
    let mut taker = uart.taker();
    let triggered = Arc::<AtomicU64>::default();
    let mut model: Serial<_, NoEvents, _> =
        Serial::new(Interrupts(triggered.clone()), Vec::<u8>::new());
    let set = |uart: &mut Setup, model: &mut Serial<_, _, _>, register: u16, value: u8| {
        uart.set(register, value);
        let written: Result<(), vm_superio::serial::Error<Infallible>> =
            model.write(register as u8, value);
        written.expect("a write of vm-superio's");
    };
    // What they are not after reset.
    for (register, value) in [
        (IIR, 1),
        (MCR, MCR_OUT2),
        (LCR, LCR_DLAB),
        (THR, 1),
        (IER, 0),
        (LCR, 3),
    ] {
        set(&mut uart, &mut model, register, value);
    }

    let mut random = Random::new(number_from_env("KVM_BPF_SEED", 1));
    let (mut lcr, mut mcr) = (3, MCR_OUT2);
    for at in 0..number_from_env("KVM_BPF_ACCESSES", 20_000) {
        let register = random.below(8) as u16;
        let value = random.next() as u8;
        let is_dlab = lcr & LCR_DLAB != 0;
        if random.below(3) == 0 {
            let got = (uart.get(register), model.read(register as u8));
            assert_got!(got.0, got.1, "access {at}: register {register}");
        } else {
            match register {
                THR if !is_dlab && mcr & MCR_LOOP != 0 => {}
                IER if !is_dlab => {
                    assert_got!(uart.get(IIR), model.read(IIR as u8), "access {at}: IIR");
                    set(&mut uart, &mut model, IER, 0);
                    set(&mut uart, &mut model, IER, value);
                }
                IIR => set(&mut uart, &mut model, IIR, value | 1),
                LCR => {
                    lcr = value;
                    set(&mut uart, &mut model, LCR, value);
                }
                MCR => {
                    mcr = value & 0x1f | MCR_OUT2;
                    set(&mut uart, &mut model, MCR, mcr);
                }
                _ => set(&mut uart, &mut model, register, value),
            }
        }
        let interrupts = triggered.swap(0, SeqCst);
        assert_got!(taken(&uart.irq), interrupts, "access {at}: interrupts");
        if at % STEP == STEP - 1 {
            assert_got!(&taker.take(), model.writer(), "access {at}: bytes");
            model.writer_mut().clear();
        }
    }
}
