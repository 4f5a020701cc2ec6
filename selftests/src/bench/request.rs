// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the registers of a virtio device in user space cost per request: the guest notifies, waits
//! for the interrupt, reads `InterruptStatus` and writes `InterruptACK`. Who is notified does no more
//! than to say that the request is done: its data costs the same, whoever serves the registers.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bpf::{Device, ImageDevice, Place, Words};
use kvm_bpf_selftests::guest::{Access, Args, Guest, Routine};
use kvm_bpf_selftests::programs::{loaded, sample};
use kvm_ioctls::IoEventAddress;
use vmm_sys_util::eventfd::EventFd;

use crate::echo::{GSI, ServerThread, clone, signal, word};
use crate::host::{run_at_once, run_when_idle};
use crate::rows::{ADDR, Case, Handler, Loop, Serve, register};

const QUEUE_NOTIFY: u64 = ADDR + 0x50;
const INTERRUPT_STATUS: u64 = ADDR + 0x60;
const INTERRUPT_ACK: u64 = ADDR + 0x64;
/// The interrupt is one of the queue.
const QUEUE: u64 = 1;

/// Who serves the registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The loop around `KVM_RUN`.
    User,
    /// The same, but for notifications.
    Ioeventfd,
    /// The programs of `samples/devices/virtio_regs.bpf.c`.
    Programs,
}

/// Name of a row whose guest idles until the interrupt comes, and of one whose thread takes the
/// processor from the vCPU when it is notified; what they are.
const ROWS: [(Way, [&str; 2], &str); 3] = [
    (
        Way::User,
        ["request-user", "request-user-at-once"],
        "three registers by a loop around KVM_RUN",
    ),
    (
        Way::Ioeventfd,
        ["request-ioeventfd", "request-ioeventfd-at-once"],
        "the same, notifications by ioeventfd",
    ),
    (
        Way::Programs,
        ["request-programs", "request-programs-at-once"],
        "three registers by programs",
    ),
];

/// Names, what they are, and handlers of the rows.
pub fn rows() -> impl Iterator<Item = (&'static str, &'static str, Handler)> {
    ROWS.into_iter().flat_map(|(way, names, what)| {
        [false, true].map(|at_once| {
            let handler = Handler::Request { way, at_once };
            (names[usize::from(at_once)], what, handler)
        })
    })
}

/// The word of `InterruptStatus`.
enum Status {
    Own(AtomicU64),
    Map(Arc<Words>),
}

impl Status {
    fn word(&self) -> &AtomicU64 {
        match self {
            Status::Own(word) => word,
            Status::Map(words) => words.get(0).expect("a word"),
        }
    }
}

/// A guest whose device has its registers served so.
pub fn set_up(way: Way, at_once: bool) -> Case {
    let guest = Guest::with_irqchip();
    let mut vcpu = guest.vcpu_with_interrupts();
    guest.route_edge(&mut vcpu, GSI);
    let irq = EventFd::new(0).expect("eventfd");
    guest.vm().register_irqfd(&irq, GSI).expect("KVM_IRQFD");
    let notified = EventFd::new(0).expect("eventfd");

    let (mut status, mut handler): (_, Box<dyn Any>) =
        (Status::Own(AtomicU64::new(0)), Box::new(()));
    match way {
        Way::User => (),
        Way::Ioeventfd => register(&guest, &notified, &IoEventAddress::Mmio(QUEUE_NOTIFY)),
        Way::Programs => {
            let image = loaded(sample("virtio_regs"));
            let map = image.map("interrupt_status").expect("the map");
            status = Status::Map(Arc::clone(map.words().expect("its words")));
            let device = Device::new(guest.vm()).expect("KVM_CREATE_DEVICE");
            device.set_irq(0, &notified).expect("queue 0");
            let device = ImageDevice::builder(device, image).plug(Place::Memory(ADDR));
            handler = Box::new(device.expect("the registers"));
        }
    }
    let status = Arc::new(status);
    let thread = ServerThread::new(clone(&notified), {
        let (status, notified, irq) = (Arc::clone(&status), clone(&notified), clone(&irq));
        move |is_over| {
            match at_once {
                true => run_at_once(),
                false => run_when_idle(),
            }
            loop {
                notified.read().expect("read of an eventfd");
                if is_over() {
                    return;
                }
                let before = status.word().fetch_or(QUEUE, Ordering::SeqCst);
                assert_eq!(before, 0, "the request before was not acknowledged");
                signal(&irq);
            }
        }
    });
    let serve: Serve = Box::new(move |access| match access {
        Access::Write(QUEUE_NOTIFY, _) => signal(&notified),
        Access::Write(INTERRUPT_ACK, data) => {
            let acknowledged = u64::from(word(data));
            status.word().fetch_and(!acknowledged, Ordering::SeqCst);
        }
        Access::Read(INTERRUPT_STATUS, data) => {
            let status = status.word().load(Ordering::SeqCst) as u32;
            data.copy_from_slice(&status.to_ne_bytes());
        }
        access => panic!("wanted an access of a register, got {access:x?}"),
    });
    let args = Args {
        addr: QUEUE_NOTIFY,
        pair: [0, INTERRUPT_STATUS],
        ..Default::default()
    };
    let routine = match at_once {
        true => Routine::Requests,
        false => Routine::RequestsIdle,
    };
    let target = Loop::new(vcpu, routine, args, serve);
    Case::new(target, Box::new((thread, handler, irq)), guest, None)
}
