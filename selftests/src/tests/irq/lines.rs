// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Interrupts that a guest takes: edges, levels and messages.

use std::os::fd::AsRawFd;

use kvm_bpf_selftests::bpf::{LOADERS, Load, Prog, ProgType};
use kvm_bpf_selftests::device::region;
use kvm_bpf_selftests::guest::{Args, Guest, Routine, Vcpu};
use kvm_bpf_selftests::harness::wait_for;
use kvm_bpf_selftests::programs::{only_return, plug, test_image};

use super::super::{ADDR, SIZE, eventfd, taken};
use super::Setup;

/// A line of the interrupt controller that is for devices, on every architecture.
const GSI: u32 = 20;

/// A guest that takes interrupts.
fn wired(load_prog: Load) -> (Setup, Vcpu) {
    let guest = Guest::with_irqchip();
    let vcpu = guest.vcpu_with_interrupts();
    (Setup::on(guest, load_prog), vcpu)
}

/// One write by the guest, which then waits until it took so many interrupts; its handler
/// writes to the device, if it has an address to do so.
fn write_and_take(vcpu: &mut Vcpu, count: u64, acknowledge: Option<u64>) -> u64 {
    let args = Args {
        value: 0,
        addr: ADDR,
        count,
        pair: [acknowledge.unwrap_or(0), 0],
    };
    let (results, exits) = vcpu.call(Routine::AwaitInterrupts, args);
    assert_got!(exits, []);
    results.value
}

/// Irq 0 is one of the guest's interrupts, which takes each signal.
fn takes_each(setup: &Setup, vcpu: &mut Vcpu, gsi: u32) {
    let line = eventfd();
    let registered = setup.guest.vm().register_irqfd(&line, gsi);
    registered.expect("KVM_IRQFD");
    setup.device.set_irq(0, line.as_raw_fd());
    for _ in 0..10 {
        assert_got!(write_and_take(vcpu, 1, None), 1, "interrupts taken");
    }
}

pub(super) fn guest_takes_edge() {
    for load_prog in LOADERS {
        let (setup, mut vcpu) = wired(load_prog);
        setup.guest.route_line(&mut vcpu, GSI, false);
        takes_each(&setup, &mut vcpu, GSI);
    }
}

#[cfg(target_arch = "aarch64")]
pub(super) fn protected_guest_takes_edge() {
    let mut guest = Guest::protected();
    guest.try_add_irqchip().expect("interrupt controllers");
    let mut vcpu = guest.vcpu_with_interrupts();
    guest.route_line(&mut vcpu, GSI, false);
    takes_each(&Setup::on(guest, Prog::load), &mut vcpu, GSI);
}

/// The line stays up until the VMM has no more to deliver: it raises it again after each end of
/// interrupt.
///
/// The guest's handler accesses the device, as handlers of level-triggered interrupts have to.
/// KVM on arm64 depends on that: it overlooks the end of an interrupt that came and went without
/// an exit, and the line stays up.
pub(super) fn guest_takes_level() {
    const INTERRUPTS: u64 = 5;
    const ACKNOWLEDGE: u64 = ADDR + SIZE;

    let (setup, mut vcpu) = wired(Prog::load);
    let (line, resample) = (eventfd(), eventfd());
    let acknowledge = only_return(ProgType::WRITE, 0);
    setup
        .device
        .set_region(1, &region(ACKNOWLEDGE, SIZE, None, Some(&acknowledge)));
    setup.guest.route_line(&mut vcpu, GSI, true);
    setup
        .guest
        .vm()
        .register_irqfd_with_resample(&line, &resample, GSI)
        .expect("KVM_IRQFD with a resample fd");
    setup.device.set_irq(0, line.as_raw_fd());

    let resampled = || wait_for("an end of interrupt", 1, || taken(&resample));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 1..INTERRUPTS {
                resampled();
                line.write(1).expect("raising the line again");
            }
        });
        let got = write_and_take(&mut vcpu, INTERRUPTS, Some(ACKNOWLEDGE));
        assert_got!(got, INTERRUPTS, "interrupts taken");
    });
    resampled();
    // The line is down now, and rises again.
    assert_got!(taken(&resample), 0, "ends of interrupt");
    let got = write_and_take(&mut vcpu, 1, Some(ACKNOWLEDGE));
    assert_got!(got, 1, "interrupts after the line fell");
}

#[cfg(target_arch = "x86_64")]
pub(super) fn guest_takes_msi() {
    const MSI_GSI: u32 = 24;

    let (setup, mut vcpu) = wired(Prog::load);
    setup.guest.route_edge(&mut vcpu, MSI_GSI);
    takes_each(&setup, &mut vcpu, MSI_GSI);
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) fn guest_takes_msi() {
    kvm_bpf_selftests::harness::skip("MSIs of arm64 need an ITS, with tables in guest memory");
}

/// A device of the library with all the interrupts of its note wired, to a line each: the guest
/// takes the one whose line it listens to.
pub(super) fn each_irq_has_its_line() {
    /// A write signals the interrupt that was written.
    const SIGNAL: u64 = ADDR + 0xf00;

    for irq in 0..3 {
        let guest = Guest::with_irqchip();
        let mut vcpu = guest.vcpu_with_interrupts();
        let device = plug(guest.vm(), ADDR, test_image("virtio_irqs"));
        assert_got!(
            device.programs().note().nr_irqs,
            3,
            "interrupts of the note"
        );
        let lines = [GSI, GSI + 1, GSI + 2].map(|gsi| {
            let line = eventfd();
            let registered = guest.vm().register_irqfd(&line, gsi);
            registered.unwrap_or_else(|error| panic!("KVM_IRQFD of {gsi}: {error}"));
            line
        });
        for (index, line) in (0..).zip(&lines) {
            let set = device.device().set_irq(index, line);
            set.unwrap_or_else(|error| panic!("setting irq {index}: {error:#?}"));
        }

        guest.route_line(&mut vcpu, GSI + irq, false);
        for _ in 0..5 {
            let args = Args {
                value: irq.into(),
                addr: SIGNAL,
                count: 1,
                ..Default::default()
            };
            let (results, exits) = vcpu.call(Routine::AwaitInterrupts, args);
            assert_got!(
                (results.value, exits),
                (1, vec![]),
                "interrupts of irq {irq}, and exits"
            );
        }
    }
}
