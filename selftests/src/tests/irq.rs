// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Interrupts: eventfds that programs signal, polled by the VMM or wired to a guest.

use std::cmp::Ordering;
use std::fs;
use std::os::fd::AsRawFd;
use std::thread::sleep;
use std::time::{Duration, Instant};

use Reg::{R0, R1, R2, R6, R7, R10};
use kvm_bpf::Programs;
use kvm_bpf::uapi::{KVM_DEV_BPF_ATTR_GROUP_IRQ, KVM_DEV_BPF_MAX_IRQS, kvm_bpf_user_irq};
use kvm_bpf_selftests::bpf::{
    Index, Insn, LOADERS, Load, LoadOptions, Map, Prog, ProgType, Reg, add_imm, atomic_add,
    call_kfunc, jump_if_ne, load, lookup, mov, mov_imm, mov_signed32, store, store_imm,
};
use kvm_bpf_selftests::device::{Device, NO_REGION, region};
use kvm_bpf_selftests::guest::{Args, Guest, Routine, Vcpu};
use kvm_bpf_selftests::harness::{meanwhile, wait_for};
use kvm_bpf_selftests::programs::{CTX_BUF, only_return, plug, ret, test_image};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::kfunc::required;
use super::lifetime::Unloaded;
use super::{ADDR, PATTERN, SIZE, assert_errno, assert_refused, element, taken};

tests!(
    bad_arguments,
    get_returns_no_eventfd,
    eventfd_polled_without_irqchip,
    every_irq_has_its_eventfd,
    irq_without_eventfd,
    detached_and_replaced,
    one_eventfd_for_two_irqs,
    closed_by_the_vmm,
    eventfd_outlives_the_device,
    eventfd_is_held_as_long_as_it_is_set,
    signalled_by_reads,
    one_program_in_two_devices,
    signalled_after_the_region_is_gone,
    replaced_while_signalled,
    only_our_programs_may_signal,
    context_cannot_be_forged,
    guest_takes_edge,
    #[cfg(target_arch = "aarch64")]
    protected_guest_takes_edge,
    guest_takes_level,
    guest_takes_msi,
    each_irq_has_its_line,
    kept_irq_is_signalled,
    kept_irq_is_signalled_by_a_timer,
    kept_irq_and_a_state_that_is_restored,
    kept_irq_that_there_is_not,
    kept_irq_outlives_the_device,
    kept_irq_outlives_the_module,
    kept_irq_is_released,
    kept_irq_must_be_released,
    kept_irq_cannot_be_forged,
    kept_irq_is_not_for_sleepable_programs,
    acquired_irq_is_signalled,
);

const SIGNAL: &str = "bpf_kvm_irq_signal";
const ACQUIRE: &str = "bpf_kvm_irq_acquire";
const SIGNAL_KEPT: &str = "bpf_kvm_irq_signal_kept";
const RELEASE: &str = "bpf_kvm_irq_release";

fn eventfd() -> EventFd {
    EventFd::new(EFD_NONBLOCK).expect("eventfd")
}

/// The kernel's number of an eventfd: the lowest that no other has.
fn id_of(eventfd: &EventFd) -> u32 {
    let path = format!("/proc/self/fdinfo/{}", eventfd.as_raw_fd());
    let info = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    info.lines()
        .find_map(|line| line.strip_prefix("eventfd-id:")?.trim().parse().ok())
        .unwrap_or_else(|| panic!("wanted an eventfd-id, got {info:?}"))
}

/// Whether nobody has a reference to the eventfd of that number any more: a new one gets it.
fn is_free(id: u32) -> bool {
    // Those with lower numbers are kept open, so that the next one gets a higher.
    let mut lower = Vec::new();
    loop {
        let next = eventfd();
        match id_of(&next).cmp(&id) {
            Ordering::Less => lower.push(next),
            order => return order == Ordering::Equal,
        }
    }
}

/// Calls a kfunc that takes the kernel's context and `r2`; `r1` is the program's context.
pub(super) fn call_with_context(kfunc: &str) -> [Insn; 5] {
    [
        mov(R7, R2),
        call_kfunc(required("bpf_cast_to_kern_ctx")),
        mov(R1, R0),
        mov(R2, R7),
        call_kfunc(required(kfunc)),
    ]
}

/// Signals the irq in `r2` and keeps what the kfunc returns; `r1` is the context.
fn signal_insns(results: &Map) -> Vec<Insn> {
    let mut insns = call_with_context(SIGNAL).to_vec();
    insns.push(mov_signed32(R7, R0));
    insns.extend(lookup(results, Index::Imm(0)));
    insns.extend([
        store(8, R0, 0, R7),
        mov_imm(R1, 1),
        jump_if_ne(R7, 0, 1),
        atomic_add(8, R0, 8, R1),
    ]);
    insns.extend(ret(0));
    insns
}

/// A guest with a device whose writes signal the irq that was written.
struct Setup {
    guest: Guest,
    device: Device,
    write: Prog,
    /// What the kfunc returned last; how often it was 0.
    results: Map,
}

impl Setup {
    fn new() -> Self {
        Self::on(Guest::new(), Prog::load)
    }

    fn on(guest: Guest, load_prog: Load) -> Self {
        let results = Map::new(1, 2);
        let mut insns = vec![load(4, R2, R1, CTX_BUF)];
        insns.extend(signal_insns(&results));
        let write = load_prog(ProgType::WRITE, &insns);
        let device = Device::new(guest.vm());
        device.set_region(0, &region(ADDR, SIZE, None, Some(&write)));
        Setup {
            guest,
            device,
            write,
            results,
        }
    }

    /// Has the guest signal an irq; says what the kfunc returned.
    fn signal(&self, vcpu: &mut Vcpu, irq: u32) -> i64 {
        self.signal_at(vcpu, ADDR, irq)
    }

    /// The same where the program has another region.
    fn signal_at(&self, vcpu: &mut Vcpu, addr: u64, irq: u32) -> i64 {
        self.results.set(0, &[0x5555, 0]);
        assert_got!(vcpu.write(addr, 4, irq.into()), []);
        self.results.get(0)[0] as i64
    }
}

/// A test for programs of either sort.
fn with_each_loader(test: impl Fn(Setup)) {
    for load_prog in LOADERS {
        test(Setup::on(Guest::new(), load_prog));
    }
}

/// A call that is refused changes nothing: an index keeps the eventfd that it has.
fn bad_arguments() {
    let setup = Setup::new();
    let Setup { guest, device, .. } = &setup;
    let mut vcpu = guest.vcpu(0);
    let (before, eventfd) = (eventfd(), eventfd());
    let map = Map::new(1, 1);
    let good = kvm_bpf_user_irq {
        eventfd: eventfd.as_raw_fd(),
        flags: 0,
    };
    let cases = [
        ("a flag", good.eventfd, 1, libc::EINVAL),
        ("the last flag", good.eventfd, 1 << 31, libc::EINVAL),
        ("a flag to detach", -1, 1, libc::EINVAL),
        ("a closed fd", 9999, 0, libc::EBADF),
        ("-2", -2, 0, libc::EBADF),
        ("a map", map.as_raw_fd(), 0, libc::EINVAL),
        ("the VM", guest.vm().as_raw_fd(), 0, libc::EINVAL),
    ];
    for index in [0, KVM_DEV_BPF_MAX_IRQS - 1] {
        let irq = index as u32;
        for (what, eventfd, flags, errno) in cases {
            let bad = kvm_bpf_user_irq { eventfd, flags };
            assert_errno(what, device.try_set_irq(index, &bad), errno);
        }
        let answer = setup.signal(&mut vcpu, irq);
        assert_got!(answer, -i64::from(libc::ENOENT), "irq {irq}, never set");

        device.set_irq(index, before.as_raw_fd());
        for (what, eventfd, flags, errno) in cases {
            let bad = kvm_bpf_user_irq { eventfd, flags };
            assert_errno(what, device.try_set_irq(index, &bad), errno);
            assert_got!(setup.signal(&mut vcpu, irq), 0, "irq {irq} after {what}");
            assert_got!(taken(&before), 1, "irq {irq} after {what}");
        }
        assert_got!(device.try_set_irq(index, &good), Ok(()));
        assert_got!(setup.signal(&mut vcpu, irq), 0);
        assert_got!((taken(&before), taken(&eventfd)), (0, 1), "irq {irq}");
    }
    assert_errno(
        "an index past the last",
        device.try_set_irq(KVM_DEV_BPF_MAX_IRQS, &good),
        libc::ENXIO,
    );
}

/// There is no number for an eventfd that another process may have set.
fn get_returns_no_eventfd() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let eventfd = eventfd();
    device.set_irq(1, eventfd.as_raw_fd());
    for index in [0, 1, KVM_DEV_BPF_MAX_IRQS] {
        let mut there = [PATTERN; 2];
        let addr = (&raw mut there) as u64;
        // SAFETY: there is room for an attribute.
        let answer = unsafe { device.get_attr(KVM_DEV_BPF_ATTR_GROUP_IRQ, index, addr) };
        assert_errno("KVM_GET_DEVICE_ATTR", answer, libc::ENXIO);
        assert_got!(there, [PATTERN; 2], "irq {index}");
    }
}

fn eventfd_polled_without_irqchip() {
    with_each_loader(|setup| {
        let mut vcpu = setup.guest.vcpu(0);
        let eventfd = eventfd();
        setup.device.set_irq(0, eventfd.as_raw_fd());
        assert_got!(taken(&eventfd), 0, "before any signal");
        for count in [1, 5, 20] {
            for _ in 0..count {
                assert_got!(setup.signal(&mut vcpu, 0), 0);
            }
            assert_got!(taken(&eventfd), count);
        }
    });
}

fn every_irq_has_its_eventfd() {
    let setup = Setup::new();
    let mut vcpu = setup.guest.vcpu(0);
    let eventfds: Vec<_> = (0..KVM_DEV_BPF_MAX_IRQS).map(|_| eventfd()).collect();
    for (index, eventfd) in (0..).zip(&eventfds) {
        setup.device.set_irq(index, eventfd.as_raw_fd());
    }
    for irq in 0..KVM_DEV_BPF_MAX_IRQS as u32 {
        assert_got!(setup.signal(&mut vcpu, irq), 0, "irq {irq}");
        assert_got!(taken(&eventfds[irq as usize]), 1, "irq {irq}");
    }
    let others: u64 = eventfds.iter().map(taken).sum();
    assert_got!(others, 0, "signals that nobody asked for");
}

fn irq_without_eventfd() {
    with_each_loader(|setup| {
        let mut vcpu = setup.guest.vcpu(0);
        for irq in [0, 1, 255, 256, 1 << 16, u32::MAX] {
            let answer = setup.signal(&mut vcpu, irq);
            assert_got!(answer, -i64::from(libc::ENOENT), "irq {irq}");
        }
    });
}

fn detached_and_replaced() {
    with_each_loader(detach_and_replace);
}

fn detach_and_replace(setup: Setup) {
    let mut vcpu = setup.guest.vcpu(0);
    let (first, second) = (eventfd(), eventfd());
    setup.device.set_irq(3, first.as_raw_fd());
    assert_got!(setup.signal(&mut vcpu, 3), 0);
    setup.device.set_irq(3, second.as_raw_fd());
    assert_got!(setup.signal(&mut vcpu, 3), 0);
    assert_got!((taken(&first), taken(&second)), (1, 1));

    setup.device.set_irq(3, -1);
    let detach = kvm_bpf_user_irq {
        eventfd: -1,
        flags: 0,
    };
    let again = setup.device.try_set_irq(3, &detach);
    assert_errno("detaching again", again, libc::ENOENT);
    assert_got!(setup.signal(&mut vcpu, 3), -i64::from(libc::ENOENT));
    assert_got!((taken(&first), taken(&second)), (0, 0));

    setup.device.set_irq(3, first.as_raw_fd());
    assert_got!(setup.signal(&mut vcpu, 3), 0);
    assert_got!(taken(&first), 1);
}

fn one_eventfd_for_two_irqs() {
    let setup = Setup::new();
    let mut vcpu = setup.guest.vcpu(0);
    let eventfd = eventfd();
    setup.device.set_irq(0, eventfd.as_raw_fd());
    setup.device.set_irq(1, eventfd.as_raw_fd());
    assert_got!(setup.signal(&mut vcpu, 0), 0);
    assert_got!(setup.signal(&mut vcpu, 1), 0);
    assert_got!(taken(&eventfd), 2);
    setup.device.set_irq(0, -1);
    assert_got!(setup.signal(&mut vcpu, 1), 0);
    assert_got!(taken(&eventfd), 1);
}

/// The device holds the eventfd, whatever becomes of the VMM's fd.
fn closed_by_the_vmm() {
    let setup = Setup::new();
    let mut vcpu = setup.guest.vcpu(0);
    let eventfd = eventfd();
    let id = id_of(&eventfd);
    setup.device.set_irq(0, eventfd.as_raw_fd());
    drop(eventfd);
    for _ in 0..10 {
        assert_got!(setup.signal(&mut vcpu, 0), 0);
        assert_got!(is_free(id), false, "the eventfd is free");
    }
}

/// Every reference that the device took is put, and none that it did not take.
fn eventfd_outlives_the_device() {
    let eventfd = eventfd();
    let id = id_of(&eventfd);
    for _ in 0..10 {
        let setup = Setup::new();
        let mut vcpu = setup.guest.vcpu(0);
        for index in [0, 0, 1, 255] {
            setup.device.set_irq(index, eventfd.as_raw_fd());
        }
        setup.device.set_irq(1, -1);
        assert_got!(setup.signal(&mut vcpu, 255), 0);
        drop(setup);
        assert_got!(taken(&eventfd), 1);
        eventfd.write(3).expect("the VMM's eventfd");
        assert_got!(taken(&eventfd), 3);
        assert_got!(is_free(id), false, "the VMM's eventfd is free");
    }
    drop(eventfd);
    wait_for("the eventfd to be free", true, || is_free(id));
}

/// Each reference goes with what took it: an index that is detached or set anew, or the device.
fn eventfd_is_held_as_long_as_it_is_set() {
    let guest = Guest::new();
    let other = eventfd();
    let detach = -1;
    for (what, instead) in [
        ("detached", Some(detach)),
        ("replaced", Some(other.as_raw_fd())),
        ("closed", None),
    ] {
        let device = Device::new(guest.vm());
        let eventfd = eventfd();
        let id = id_of(&eventfd);
        // The second time, index 0 gives up the reference of the first.
        for index in [0, 0, 255] {
            device.set_irq(index, eventfd.as_raw_fd());
        }
        drop(eventfd);
        let device = if let Some(instead) = instead {
            for index in [0, 255] {
                assert_got!(is_free(id), false, "free before {index} is {what}");
                device.set_irq(index, instead);
            }
            Some(device)
        } else {
            assert_got!(is_free(id), false, "free before the device is {what}");
            drop(device);
            None
        };
        wait_for(what, true, || is_free(id));
        drop(device);
        // One reference given up too many, and it would be.
        assert_got!(is_free(id_of(&other)), false, "the VMM's eventfd is free");
    }
}

fn signalled_by_reads() {
    for load_prog in LOADERS {
        let guest = Guest::new();
        let mut vcpu = guest.vcpu(0);
        let device = Device::new(guest.vm());
        let eventfd = eventfd();
        device.set_irq(9, eventfd.as_raw_fd());

        // The context must still be good for a store after the call.
        let mut insns = vec![mov(R6, R1), mov_imm(R2, 9)];
        insns.extend(call_with_context(SIGNAL));
        insns.push(store_imm(4, R6, CTX_BUF, 0x77));
        insns.extend(ret(0));
        let read = load_prog(ProgType::READ, &insns);
        device.set_region(0, &region(ADDR, SIZE, Some(&read), None));
        assert_got!(vcpu.read(ADDR, 4).value, 0x77);
        assert_got!(taken(&eventfd), 1);
    }
}

/// The interrupt is one of the device that was accessed, whatever other devices run the program.
fn one_program_in_two_devices() {
    with_each_loader(|setup| {
        const OTHER: u64 = ADDR + SIZE;

        let mut vcpu = setup.guest.vcpu(0);
        let device = Device::new(setup.guest.vm());
        device.set_region(0, &region(OTHER, SIZE, None, Some(&setup.write)));
        let (first, second) = (eventfd(), eventfd());
        setup.device.set_irq(0, first.as_raw_fd());
        let alone = setup.signal_at(&mut vcpu, OTHER, 0);
        assert_got!(alone, -i64::from(libc::ENOENT), "the other has no eventfd");

        device.set_irq(0, second.as_raw_fd());
        for _ in 0..3 {
            for (addr, wanted) in [(ADDR, (1, 0)), (OTHER, (0, 1))] {
                assert_got!(setup.signal_at(&mut vcpu, addr, 0), 0);
                assert_got!((taken(&first), taken(&second)), wanted, "by {addr:#x}");
            }
        }
        drop(setup.device);
        assert_got!(vcpu.write(OTHER, 4, 0), []);
        assert_got!((taken(&first), taken(&second)), (0, 1), "one is closed");
    });
}

/// Regions and irqs come and go without each other.
fn signalled_after_the_region_is_gone() {
    let setup = Setup::new();
    let mut vcpu = setup.guest.vcpu(0);
    let eventfd = eventfd();
    setup.device.set_irq(0, eventfd.as_raw_fd());
    setup.device.set_region(0, &NO_REGION);
    assert_got!(vcpu.write(ADDR, 4, 0).len(), 1, "exits without a region");
    assert_got!(taken(&eventfd), 0);
    let again = Setup::on(setup.guest, Prog::load);
    assert_got!(again.signal(&mut vcpu, 0), -i64::from(libc::ENOENT));
    assert_got!(taken(&eventfd), 0, "signals of another device's irq 0");
}

/// Each signal for which the kfunc returned 0 reached one of the eventfds, once; and none reaches
/// one that is not set any more.
fn replaced_while_signalled() {
    with_each_loader(replace_while_signalled);
}

fn replace_while_signalled(setup: Setup) {
    let eventfds = [eventfd(), eventfd()];
    let signalled = || setup.results.get(0)[1];
    let mut before = 0;
    let workers = (0..2).map(|id| {
        let mut vcpu = setup.guest.vcpu(id);
        move || assert_got!(vcpu.write(ADDR, 4, 0), [])
    });
    meanwhile(workers, || {
        for round in 0..100 {
            let (old, new) = (&eventfds[round % 2], &eventfds[(round + 1) % 2]);
            if round % 4 == 3 {
                setup.device.set_irq(0, -1);
                before += taken(old);
            }
            setup.device.set_irq(0, new.as_raw_fd());
            if round % 4 != 3 {
                before += taken(old);
            }
            // By both vCPUs: neither can still be at a signal of then.
            let enough = signalled() + 10;
            wait_for("more signals", true, || signalled() >= enough);
            assert_got!(taken(old), 0, "signals of what was replaced");
        }
    });
    let after: u64 = eventfds.iter().map(taken).sum();
    assert_got!(before + after, signalled(), "signals taken");
}

fn only_our_programs_may_signal() {
    // The one takes what only our programs have, the others nothing that a program of any type lacks.
    for kfunc in [SIGNAL, "bpf_get_cpu_scale", "bpf_set_current_uclamp"] {
        let id = required(kfunc);
        // Socket filter, tc, XDP, tracepoint, raw tracepoint, and a sleepable one: syscall.
        for kind in [1, 3, 6, 5, 17, 31] {
            let mut insns = vec![mov_imm(R2, 0)];
            if kfunc != SIGNAL {
                insns.push(mov_imm(R1, 0));
            }
            insns.push(call_kfunc(id));
            insns.extend(ret(0));
            let options = LoadOptions {
                sleepable: kind == 31,
                ..Default::default()
            };
            let answer = Prog::try_load(ProgType(kind), &insns, options);
            let reason = format!("calling kernel function {kfunc} is not allowed");
            assert_refused(&format!("program type {kind}"), answer, &reason);
        }
    }
}

/// Neither memory of the program, nor what it sees as its context, nor a part of the kernel's is the
/// kernel's context.
fn context_cannot_be_forged() {
    let map = Map::new(1, 4);
    let stack = (0..4)
        .map(|word| store_imm(8, R10, -8 * (word + 1), 0))
        .chain([mov(R1, R10), add_imm(R1, -32)])
        .collect();
    let mut value = lookup(&map, Index::Imm(0));
    value.push(mov(R1, R0));
    let kernels = || vec![call_kfunc(required("bpf_cast_to_kern_ctx")), mov(R1, R0)];
    let mut part = kernels();
    part.push(add_imm(R1, 8));
    let mut pointer = kernels();
    pointer.push(load(8, R1, R1, 16));
    let mut cast_part = vec![add_imm(R1, 8)];
    cast_part.extend(kernels());
    let cases: [(&str, Vec<Insn>, &str); 7] = [
        (
            "the stack",
            stack,
            "is fp expected STRUCT bpf_kvm_io_ctx_kern",
        ),
        (
            "a map's value",
            value,
            "is map_value expected STRUCT bpf_kvm_io_ctx_kern",
        ),
        (
            "a number",
            vec![mov_imm(R1, 4096)],
            "is scalar expected STRUCT bpf_kvm_io_ctx_kern",
        ),
        (
            "the program's context",
            Vec::new(),
            "is ctx expected STRUCT bpf_kvm_io_ctx_kern",
        ),
        (
            "the program's context + 8",
            cast_part,
            "dereference of modified ctx ptr",
        ),
        (
            "the kernel's context + 8",
            part,
            "expected pointer to STRUCT bpf_kvm_io_ctx_kern",
        ),
        (
            "a pointer out of the kernel's context",
            pointer,
            "access is allowed only to CAP_PERFMON and CAP_SYS_ADMIN",
        ),
    ];
    for kind in [ProgType::READ, ProgType::WRITE] {
        for kfunc in [SIGNAL, ACQUIRE] {
            for (what, start, reason) in &cases {
                let mut insns = start.clone();
                insns.extend([mov_imm(R2, 0), call_kfunc(required(kfunc))]);
                insns.extend(ret(0));
                let answer = Prog::try_load(kind, &insns, LoadOptions::default());
                assert_refused(&format!("{what} as {kind:?}'s context"), answer, reason);
            }
        }
    }
}

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

fn guest_takes_edge() {
    for load_prog in LOADERS {
        let (setup, mut vcpu) = wired(load_prog);
        setup.guest.route_line(&mut vcpu, GSI, false);
        takes_each(&setup, &mut vcpu, GSI);
    }
}

#[cfg(target_arch = "aarch64")]
fn protected_guest_takes_edge() {
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
fn guest_takes_level() {
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
fn guest_takes_msi() {
    const MSI_GSI: u32 = 24;

    let (setup, mut vcpu) = wired(Prog::load);
    setup.guest.route_edge(&mut vcpu, MSI_GSI);
    takes_each(&setup, &mut vcpu, MSI_GSI);
}

#[cfg(not(target_arch = "x86_64"))]
fn guest_takes_msi() {
    kvm_bpf_selftests::harness::skip("MSIs of arm64 need an ITS, with tables in guest memory");
}

/// A device of the library with all the interrupts of its note wired, to a line each: the guest
/// takes the one whose line it listens to.
fn each_irq_has_its_line() {
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

/// The device of `progs/irq_object.bpf.c`, of which a test needs the parts.
struct Kept {
    guest: Guest,
    device: Device,
    image: Programs,
}

/// Commands: offsets of its registers.
const KEEP: u64 = 0x0;
const FIRE: u64 = 0x4;
const FIRE_LATER: u64 = 0x8;
const GIVE_UP: u64 = 0xc;

/// Its result where there is no interrupt to keep or to signal.
const NO_IRQ: i64 = -1000;
/// A timer's delay that leaves a test time to act first.
const LONG: Duration = Duration::from_secs(2);

impl Kept {
    fn new() -> Self {
        let guest = Guest::new();
        let image = test_image("irq_object").load();
        let image = image.unwrap_or_else(|error| panic!("loading irq_object: {error:#?}"));
        let device = Device::new(guest.vm());
        let write = image.write_program().expect("its write program");
        let region = kvm_bpf::uapi::kvm_bpf_user_region {
            addr: ADDR,
            size: SIZE,
            bpf_readfd: -1,
            bpf_writefd: write.as_raw_fd(),
        };
        device.set_region(0, &region);
        Kept {
            guest,
            device,
            image,
        }
    }

    /// Has the guest write a command; returns the program's result.
    fn command(&self, vcpu: &mut Vcpu, command: u64, value: u64) -> i64 {
        assert_got!(vcpu.write(ADDR + command, 4, value), []);
        answer(&self.image).0
    }
}

/// The last result, and how often the timer's callback ran.
fn answer(image: &Programs) -> (i64, u64) {
    let value = element(image, "kept");
    let word = |at: usize| u64::from_ne_bytes(value[at..at + 8].try_into().expect("8 bytes"));
    let end = value.len();
    (word(end - 16) as i64, word(end - 8))
}

fn kept_irq_is_signalled() {
    let kept = Kept::new();
    let mut vcpu = kept.guest.vcpu(0);
    let (first, second) = (eventfd(), eventfd());
    kept.device.set_irq(0, first.as_raw_fd());
    kept.device.set_irq(255, second.as_raw_fd());
    assert_got!(
        kept.command(&mut vcpu, FIRE, 0),
        NO_IRQ,
        "before it is kept"
    );
    assert_got!(kept.command(&mut vcpu, KEEP, 0), 0);
    assert_got!(kept.command(&mut vcpu, FIRE, 0), 0);
    assert_got!((taken(&first), taken(&second)), (1, 0));
    assert_got!(kept.command(&mut vcpu, KEEP, 255), 0);
    assert_got!(kept.command(&mut vcpu, FIRE, 0), 0);
    assert_got!((taken(&first), taken(&second)), (0, 1));
    // It is the interrupt that is kept, not its eventfd of the time.
    kept.device.set_irq(255, first.as_raw_fd());
    assert_got!(kept.command(&mut vcpu, FIRE, 0), 0);
    assert_got!((taken(&first), taken(&second)), (1, 0));
    assert_got!(kept.command(&mut vcpu, GIVE_UP, 0), 0);
    assert_got!(
        kept.command(&mut vcpu, FIRE, 0),
        NO_IRQ,
        "after it is given up"
    );
}

fn kept_irq_is_signalled_by_a_timer() {
    let kept = Kept::new();
    let mut vcpu = kept.guest.vcpu(0);
    let eventfd = eventfd();
    kept.device.set_irq(0, eventfd.as_raw_fd());
    assert_got!(kept.command(&mut vcpu, KEEP, 0), 0);
    for round in 1..=5 {
        assert_got!(kept.command(&mut vcpu, FIRE_LATER, 1_000_000), 0);
        // No vCPU runs now.
        wait_for("the timer", round, || answer(&kept.image).1);
        assert_got!(answer(&kept.image).0, 0, "the callback's result");
        assert_got!(taken(&eventfd), 1);
    }
}

/// Writing an array's element cancels its timer and leaves the interrupt that it keeps.
fn kept_irq_and_a_state_that_is_restored() {
    let kept = Kept::new();
    let mut vcpu = kept.guest.vcpu(0);
    let eventfd = eventfd();
    kept.device.set_irq(0, eventfd.as_raw_fd());
    assert_got!(kept.command(&mut vcpu, KEEP, 0), 0);
    let delay = LONG.as_nanos() as u64;
    assert_got!(kept.command(&mut vcpu, FIRE_LATER, delay), 0);

    let map = kept.image.map("kept").expect("the program's map");
    let state = element(&kept.image, "kept");
    map.update(&[0; 4], &state).expect("BPF_MAP_UPDATE_ELEM");
    sleep(2 * LONG);
    assert_got!(answer(&kept.image).1, 0, "callbacks of the timer");
    assert_got!(taken(&eventfd), 0);
    assert_got!(kept.command(&mut vcpu, FIRE, 0), 0, "what is kept still");
    assert_got!(taken(&eventfd), 1);
}

fn kept_irq_that_there_is_not() {
    let kept = Kept::new();
    let mut vcpu = kept.guest.vcpu(0);
    for irq in [KVM_DEV_BPF_MAX_IRQS, 1 << 31, u32::MAX.into()] {
        assert_got!(kept.command(&mut vcpu, KEEP, irq), NO_IRQ, "irq {irq}");
    }
    // One without an eventfd may be kept, and gets one later.
    let eventfd = eventfd();
    assert_got!(kept.command(&mut vcpu, KEEP, 7), 0);
    let answer = kept.command(&mut vcpu, FIRE, 0);
    assert_got!(answer, -i64::from(libc::ENOENT), "without an eventfd");
    kept.device.set_irq(7, eventfd.as_raw_fd());
    assert_got!(kept.command(&mut vcpu, FIRE, 0), 0);
    assert_got!(taken(&eventfd), 1);
}

/// What a program has kept outlives the device, but signals nothing any more.
fn kept_irq_outlives_the_device() {
    let kept = Kept::new();
    let mut vcpu = kept.guest.vcpu(0);
    let eventfd = eventfd();
    kept.device.set_irq(0, eventfd.as_raw_fd());
    assert_got!(kept.command(&mut vcpu, KEEP, 0), 0);
    let delay = LONG.as_nanos() as u64;
    assert_got!(kept.command(&mut vcpu, FIRE_LATER, delay), 0);
    let Kept {
        guest,
        device,
        image,
    } = kept;
    drop(device);
    assert_got!(
        answer(&image),
        (0, 0),
        "the timer ran too early for this test"
    );
    assert_got!(
        vcpu.write(ADDR + FIRE, 4, 0).len(),
        1,
        "exits without device"
    );
    drop((guest, vcpu));
    wait_for("the timer", 1, || answer(&image).1);
    assert_got!(answer(&image).0, -i64::from(libc::ENOENT));
    assert_got!(taken(&eventfd), 0);
}

/// Where KVM is a module, so is the device; but what a program has kept, and the program, is
/// not of it, and does not hold it.
fn kept_irq_outlives_the_module() {
    let kept = Kept::new();
    let mut vcpu = kept.guest.vcpu(0);
    let eventfd = eventfd();
    let id = id_of(&eventfd);
    kept.device.set_irq(0, eventfd.as_raw_fd());
    drop(eventfd);
    assert_got!(kept.command(&mut vcpu, KEEP, 0), 0);
    let delay = 2 * LONG.as_nanos() as u64;
    assert_got!(kept.command(&mut vcpu, FIRE_LATER, delay), 0);
    let Kept {
        guest,
        device,
        image,
    } = kept;
    drop((device, vcpu, guest));
    wait_for("the eventfd to be free", true, || is_free(id));

    let unloaded = Unloaded::new();
    let early = "the timer ran too early for this test";
    assert_got!(answer(&image), (0, 0), early);
    wait_for("the timer", 1, || answer(&image).1);
    assert_got!(answer(&image).0, -i64::from(libc::ENOENT));
    // The map's reference is the last; a worker and RCU take a moment to free what it is of.
    drop(image);
    sleep(LONG);
    drop(unloaded);
    drop(Device::new(Guest::new().vm()));
}

/// By a map that goes away with its timer armed, after the device and before it; that nothing
/// leaks shows on a kernel with kmemleak.
fn kept_irq_is_released() {
    for device_first in [true, false] {
        let kept = Kept::new();
        let mut vcpu = kept.guest.vcpu(0);
        let eventfd = eventfd();
        kept.device.set_irq(0, eventfd.as_raw_fd());
        assert_got!(kept.command(&mut vcpu, KEEP, 0), 0);
        let delay = LONG.as_nanos() as u64;
        assert_got!(kept.command(&mut vcpu, FIRE_LATER, delay), 0);
        let armed = Instant::now();
        let Kept {
            guest: _guest,
            device,
            image,
        } = kept;
        // When user space drops its last reference to a map, its timers are cancelled.
        let late = "the timer may have run, too early for this test";
        if device_first {
            drop(device);
            drop(image);
            assert!(armed.elapsed() < LONG, "{late}");
        } else {
            drop(image);
            assert!(armed.elapsed() < LONG, "{late}");
            sleep(LONG);
            drop(device);
        }
        sleep(LONG);
        assert_got!(taken(&eventfd), 0, "device first: {device_first}");
    }
}

fn kept_irq_must_be_released() {
    let mut insns = vec![mov_imm(R2, 0)];
    insns.extend(call_with_context(ACQUIRE));
    insns.extend(ret(0));
    let answer = Prog::try_load(ProgType::WRITE, &insns, LoadOptions::default());
    assert_refused("a leaked interrupt", answer, "Unreleased reference");
}

/// Nor is one good for more than it is, or for longer.
fn kept_irq_cannot_be_forged() {
    let map = Map::new(1, 4);
    let mut value = lookup(&map, Index::Imm(0));
    value.push(mov(R1, R0));
    let stack = vec![
        store_imm(8, R10, -8, 0),
        store_imm(8, R10, -16, 0),
        mov(R1, R10),
        add_imm(R1, -16),
    ];
    let kernel = vec![call_kfunc(required("bpf_cast_to_kern_ctx")), mov(R1, R0)];
    let mut acquired = vec![mov_imm(R2, 0)];
    acquired.extend(call_with_context(ACQUIRE));
    acquired.push(jump_if_ne(R0, 0, 2));
    acquired.extend(ret(0));
    acquired.extend([mov(R6, R0), mov(R1, R0)]);
    let mut part = acquired.clone();
    part.push(add_imm(R1, 8));
    let mut released = acquired;
    released.extend([call_kfunc(required(RELEASE)), mov(R1, R6)]);

    let unowned = "release expects referenced PTR_TO_BTF_ID";
    let cases: [(&str, Vec<Insn>, &str, &str); 7] = [
        (
            "the stack",
            stack,
            "is fp expected STRUCT bpf_kvm_irq",
            unowned,
        ),
        (
            "a map's value",
            value,
            "is map_value expected STRUCT bpf_kvm_irq",
            unowned,
        ),
        (
            "a number",
            vec![mov_imm(R1, 4096)],
            "is scalar expected STRUCT bpf_kvm_irq",
            unowned,
        ),
        (
            "the context",
            Vec::new(),
            "is ctx expected STRUCT bpf_kvm_irq",
            unowned,
        ),
        (
            "what the kernel has instead of the context",
            kernel,
            "has a pointer to STRUCT bpf_kvm_io_ctx_kern",
            unowned,
        ),
        (
            "part of an interrupt",
            part,
            "expected pointer to STRUCT bpf_kvm_irq",
            "must have zero offset",
        ),
        (
            "one that is released",
            released,
            "R6 !read_ok",
            "R6 !read_ok",
        ),
    ];
    for (what, start, no_signal, no_release) in cases {
        for (kfunc, reason) in [(SIGNAL_KEPT, no_signal), (RELEASE, no_release)] {
            let mut insns = start.clone();
            insns.push(call_kfunc(required(kfunc)));
            insns.extend(ret(0));
            let answer = Prog::try_load(ProgType::WRITE, &insns, LoadOptions::default());
            assert_refused(&format!("{kfunc} of {what}"), answer, reason);
        }
    }
}

/// Where RCU does not protect it, a program needs a reference of its own.
fn kept_irq_is_not_for_sleepable_programs() {
    let Err(error) = test_image("irq_object_sleepable").load() else {
        panic!("wanted a refusal of what RCU does not protect, but it loads");
    };
    let error = format!("{error:#?}");
    let reason = "must be a rcu pointer";
    assert!(error.contains(reason), "wanted {reason:?}, got {error}");
}

/// And with one, it may signal the interrupt.
fn acquired_irq_is_signalled() {
    let results = Map::new(1, 1);
    let mut insns = vec![load(4, R2, R1, CTX_BUF)];
    insns.extend(call_with_context(ACQUIRE));
    insns.push(jump_if_ne(R0, 0, 2));
    insns.extend(ret(1));
    insns.extend([
        mov(R6, R0),
        mov(R1, R0),
        call_kfunc(required(SIGNAL_KEPT)),
        mov_signed32(R7, R0),
        mov(R1, R6),
        call_kfunc(required(RELEASE)),
    ]);
    insns.extend(lookup(&results, Index::Imm(0)));
    insns.push(store(8, R0, 0, R7));
    insns.extend(ret(0));
    for load_prog in LOADERS {
        let guest = Guest::new();
        let mut vcpu = guest.vcpu(0);
        let device = Device::new(guest.vm());
        let write = load_prog(ProgType::WRITE, &insns);
        device.set_region(0, &region(ADDR, SIZE, None, Some(&write)));
        let eventfd = eventfd();
        for (set, wanted) in [(false, -i64::from(libc::ENOENT)), (true, 0)] {
            if set {
                device.set_irq(255, eventfd.as_raw_fd());
            }
            results.set(0, &[0x5555]);
            assert_got!(vcpu.write(ADDR, 4, 255), []);
            assert_got!(results.get(0)[0] as i64, wanted, "with an eventfd: {set}");
            assert_got!(taken(&eventfd), u64::from(set), "with an eventfd: {set}");
        }
        assert_got!(vcpu.write(ADDR, 4, 256).len(), 1, "exits: no such irq");
    }
}
