// SPDX-License-Identifier: Apache-2.0 OR MIT

//! One small device, served in several ways: the rows of `Documentation/choosing.md`.
//!
//! The guest gives a command of 32 bits and gets its result, the command's complement, for which
//! it either just looks or waits for an interrupt first. Where reads reach the device both are
//! registers. An ioeventfd has neither data nor reads: there, command and result are in memory
//! that guest and device share, and the register is a doorbell. (A guest without MMU goes past
//! the caches on arm64: on hardware without FEAT_S2FWB it would not see the result.)
//!
//! Who serves the device has precedence over the vCPU, and blocks in one system call: on one CPU,
//! the result is there when the guest goes on.

use std::any::Any;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use kvm_bpf_selftests::guest::{Access, Args, Guest, Routine, SharedMemory};
use kvm_bpf_selftests::peer::{self, Peer};
use kvm_bpf_selftests::programs::{plug, test_image};
use kvm_ioctls::IoEventAddress;
use vmm_sys_util::eventfd::EventFd;

use crate::block;
use crate::host::run_at_once;
use crate::rows::{ADDR, Case, Handler, Loop, Serve, register};

/// The device's registers; [`COMMAND_IRQ`] is a command that ends with an interrupt.
const COMMAND: u64 = 0x0;
const COMMAND_IRQ: u64 = 0x4;
const RESULT: u64 = 0x8;

/// Where the guest has the shared page, and the words there.
const PAGE: u64 = 0x10_0000;
const RESULT_WORD: usize = 0;
const COMMAND_WORD: usize = 1;

/// A line that is for devices, on every architecture.
pub const GSI: u32 = 20;

/// Who serves the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// An eBPF program.
    Program,
    /// The loop around `KVM_RUN`.
    User,
    /// A thread that an ioeventfd wakes.
    Thread,
    /// The same in another process, which got the fds over a socket.
    Process,
    /// Another process, which the loop around `KVM_RUN` sends messages.
    Messages,
}

/// Name of a row without interrupt, and of one with; what they are.
const ROWS: [(Server, [&str; 2], &str); 5] = [
    (
        Server::Program,
        ["echo-program", "echo-program-irq"],
        "a program",
    ),
    (
        Server::User,
        ["echo-user", "echo-user-irq"],
        "a loop around KVM_RUN",
    ),
    (
        Server::Thread,
        ["echo-thread", "echo-thread-irq"],
        "ioeventfd, a thread",
    ),
    (
        Server::Process,
        ["echo-process", "echo-process-irq"],
        "ioeventfd, another process",
    ),
    (
        Server::Messages,
        ["echo-messages", "echo-messages-irq"],
        "messages to another process",
    ),
];

/// Names, what they are, and handlers of the rows.
pub fn rows() -> impl Iterator<Item = (&'static str, &'static str, Handler)> {
    ROWS.into_iter().flat_map(|(server, names, what)| {
        [false, true].map(|irq| {
            let handler = Handler::Echo { server, irq };
            (names[usize::from(irq)], what, handler)
        })
    })
}

/// The device's state where user space serves registers.
#[derive(Default)]
struct Registers {
    result: u32,
    irq: Option<EventFd>,
}

impl Registers {
    fn write(&mut self, offset: u64, command: u32) {
        assert!(matches!(offset, COMMAND | COMMAND_IRQ), "{offset:#x}");
        self.result = !command;
        if offset == COMMAND_IRQ {
            signal(self.irq.as_ref().expect("an irq"));
        }
    }

    fn read(&self, offset: u64) -> u32 {
        assert_eq!(offset, RESULT);
        self.result
    }
}

/// The device where it is a doorbell.
struct Doorbell {
    rung: EventFd,
    page: Arc<SharedMemory>,
    irq: Option<EventFd>,
}

impl Doorbell {
    /// Serves the device until the doorbell rings after all is over.
    fn serve(&self, is_over: impl Fn() -> bool) {
        loop {
            self.rung.read().expect("read of an eventfd");
            if is_over() {
                return;
            }
            let command = self.page.word(COMMAND_WORD).load(Ordering::Acquire);
            let result = self.page.word(RESULT_WORD);
            result.store(!command, Ordering::Release);
            self.irq.iter().for_each(signal);
        }
    }
}

pub fn signal(irq: &EventFd) {
    irq.write(1).expect("write to an eventfd");
}

pub fn clone(eventfd: &EventFd) -> EventFd {
    eventfd.try_clone().expect("another fd of an eventfd")
}

/// A guest whose device is served so.
pub fn set_up(server: Server, irq: bool) -> Case {
    let mut guest = Guest::with_irqchip();
    let page = Arc::new(SharedMemory::new(1));
    if matches!(server, Server::Thread | Server::Process) {
        guest.add_shared(PAGE, &page);
    }
    let mut vcpu = guest.vcpu_with_interrupts();
    let line = irq.then(|| {
        guest.route_edge(&mut vcpu, GSI);
        let line = EventFd::new(0).expect("eventfd");
        guest.vm().register_irqfd(&line, GSI).expect("KVM_IRQFD");
        line
    });

    let (mut serve, mut peer): (Serve, _) = (
        Box::new(|access| panic!("wanted no exit, got {access:x?}")),
        None,
    );
    let command = ADDR + if irq { COMMAND_IRQ } else { COMMAND };
    let rung = || {
        let rung = EventFd::new(0).expect("eventfd");
        register(&guest, &rung, &IoEventAddress::Mmio(command));
        rung
    };
    let handler: Box<dyn Any> = match server {
        Server::Program => {
            let device = plug(guest.vm(), ADDR, test_image("echo"));
            if let Some(line) = &line {
                device.device().set_irq(0, line).expect("KVM_BPF_IRQ");
            }
            Box::new(device)
        }
        Server::User => {
            let mut registers = Registers {
                irq: line.as_ref().map(clone),
                ..Default::default()
            };
            serve = Box::new(move |access| match access {
                Access::Write(addr, data) => registers.write(addr - ADDR, word(data)),
                Access::Read(addr, data) => {
                    data.copy_from_slice(&registers.read(addr - ADDR).to_ne_bytes());
                }
                #[cfg(target_arch = "x86_64")]
                access => panic!("wanted an access of memory, got {access:x?}"),
            });
            Box::new(())
        }
        Server::Thread => {
            let rung = rung();
            let end = clone(&rung);
            let irq = line.as_ref().map(clone);
            let doorbell = Doorbell { rung, page, irq };
            Box::new(ServerThread::new(end, move |is_over| {
                run_at_once();
                doorbell.serve(is_over)
            }))
        }
        Server::Process => {
            let rung = rung();
            let mut fds = vec![page.file().as_raw_fd(), rung.as_raw_fd()];
            fds.extend(line.iter().map(AsRawFd::as_raw_fd));
            let process = ready_peer(DOORBELL, &fds);
            peer = Some(process.id());
            Box::new((process, rung))
        }
        Server::Messages => {
            let fds: Vec<RawFd> = line.iter().map(AsRawFd::as_raw_fd).collect();
            let process = ready_peer(MESSAGES, &fds);
            peer = Some(process.id());
            let mut client = Client::new(process.socket().try_clone().expect("dup"));
            serve = Box::new(move |access| match access {
                Access::Write(addr, data) => client.write(addr - ADDR, data),
                Access::Read(addr, data) => client.read(addr - ADDR, data),
                #[cfg(target_arch = "x86_64")]
                access => panic!("wanted an access of memory, got {access:x?}"),
            });
            Box::new(process)
        }
    };
    let shared = matches!(server, Server::Thread | Server::Process);
    let routine = match (shared, irq) {
        (false, false) => Routine::Commands,
        (false, true) => Routine::CommandsInterrupt,
        (true, false) => Routine::CommandsMemory,
        (true, true) => Routine::CommandsMemoryInterrupt,
    };
    let result = if shared {
        PAGE + 4 * RESULT_WORD as u64
    } else {
        ADDR + RESULT
    };
    let args = Args {
        addr: command,
        pair: [0, result],
        ..Default::default()
    };
    let target = Loop::new(vcpu, routine, args, serve);
    Case::new(target, Box::new((handler, line)), guest, peer)
}

pub fn word(data: &[u8]) -> u32 {
    u32::from_ne_bytes(data.try_into().expect("an access of 4 bytes"))
}

/// A thread that waits for an eventfd; dropping it ends it.
pub struct ServerThread {
    rung: EventFd,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl ServerThread {
    /// Has a thread serve until it is told, after a last signal of `rung`, that all is over.
    pub fn new(rung: EventFd, serve: impl FnOnce(&dyn Fn() -> bool) + Send + 'static) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let over = Arc::clone(&over);
            move || {
                serve(&|| over.load(Ordering::Relaxed));
            }
        });
        ServerThread {
            rung,
            over,
            thread: Some(thread),
        }
    }
}

impl Drop for ServerThread {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        signal(&self.rung);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the thread that serves");
        }
    }
}

/// What the other process is told to be.
const DOORBELL: &str = "doorbell";
const MESSAGES: &str = "messages";

/// Another process that has what serving takes, and is ready.
pub fn ready_peer(role: &str, fds: &[RawFd]) -> Peer {
    let peer = Peer::new(role, fds);
    peer.socket().recv(&mut [0]).expect("its start");
    peer
}

/// The other process.
pub fn serve_as(role: &str) -> io::Result<()> {
    let (socket, mut fds) = peer::connect()?;
    let mut next = || fds.next().ok_or(io::Error::other("wanted another fd"));
    run_at_once();
    match role {
        DOORBELL => {
            let page = Arc::new(SharedMemory::of(next()?, 1));
            let rung = peer::eventfd(next()?);
            let irq = next().ok().map(peer::eventfd);
            socket.send(&[0])?;
            Doorbell { rung, page, irq }.serve(|| false);
            Ok(())
        }
        MESSAGES => {
            let irq = next().ok().map(peer::eventfd);
            socket.send(&[0])?;
            serve_messages(&socket, Registers { result: 0, irq })
        }
        block::AT_ONCE | block::IDLE => {
            let listener = UnixListener::from(OwnedFd::from(next()?));
            socket.send(&[0])?;
            block::serve_vhost(listener, role == block::IDLE)
        }
        _ => Err(io::Error::other(format!("no such role: '{role}'"))),
    }
}

/// The start of a vfio-user message: id, command, size, flags and error, then of an access its
/// offset, its region and its bytes, behind which is what is written or was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    id: u16,
    command: u16,
    size: u32,
    flags: u32,
    offset: u64,
    count: u32,
}

const REGION_READ: u16 = 9;
const REGION_WRITE: u16 = 10;
const REPLY: u32 = 1;

const HEADER: usize = 32;
/// The longest message here.
const LONGEST: usize = HEADER + 4;

impl Header {
    fn put(&self, message: &mut [u8; LONGEST]) {
        message[0..2].copy_from_slice(&self.id.to_ne_bytes());
        message[2..4].copy_from_slice(&self.command.to_ne_bytes());
        message[4..8].copy_from_slice(&self.size.to_ne_bytes());
        message[8..12].copy_from_slice(&self.flags.to_ne_bytes());
        message[16..24].copy_from_slice(&self.offset.to_ne_bytes());
        message[28..32].copy_from_slice(&self.count.to_ne_bytes());
    }

    fn get(message: &[u8; LONGEST]) -> Self {
        let half = |at: usize| u16::from_ne_bytes([message[at], message[at + 1]]);
        let word = |at: usize| word(&message[at..at + 4]);
        Header {
            id: half(0),
            command: half(2),
            size: word(4),
            flags: word(8),
            offset: u64::from_ne_bytes(message[16..24].try_into().expect("8 bytes")),
            count: word(28),
        }
    }
}

/// Who sends them.
struct Client {
    socket: UnixDatagram,
    id: u16,
}

impl Client {
    fn new(socket: UnixDatagram) -> Self {
        Client { socket, id: 0 }
    }

    /// Sends a request and waits for its reply.
    fn call(&mut self, command: u16, offset: u64, data: [u8; 4], sizes: [usize; 2]) -> [u8; 4] {
        let [size, wanted] = sizes;
        self.id = self.id.wrapping_add(1);
        let request = Header {
            id: self.id,
            command,
            size: size as u32,
            flags: 0,
            offset,
            count: 4,
        };
        let mut message = [0; LONGEST];
        request.put(&mut message);
        message[HEADER..].copy_from_slice(&data);
        self.socket.send(&message[..size]).expect("a request");
        let got = self.socket.recv(&mut message).expect("a reply");
        assert_eq!(got, wanted, "length of a reply");
        let reply = Header {
            size: wanted as u32,
            flags: REPLY,
            ..request
        };
        assert_eq!(Header::get(&message), reply);
        message[HEADER..].try_into().expect("4 bytes")
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let data = word(data).to_ne_bytes();
        self.call(REGION_WRITE, offset, data, [LONGEST, HEADER]);
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let result = self.call(REGION_READ, offset, [0; 4], [HEADER, LONGEST]);
        data.copy_from_slice(&result);
    }
}

/// Serves the device until the socket's other end is closed.
fn serve_messages(socket: &UnixDatagram, mut registers: Registers) -> io::Result<()> {
    let mut message = [0; LONGEST];
    loop {
        let len = socket.recv(&mut message)?;
        if len == 0 {
            return Ok(());
        }
        if len < HEADER || len != Header::get(&message).size as usize {
            return Err(io::Error::other(format!("a message of {len} bytes")));
        }
        let mut reply = Header::get(&message);
        let size = match reply.command {
            REGION_WRITE => {
                registers.write(reply.offset, word(&message[HEADER..]));
                HEADER
            }
            REGION_READ => {
                let result = registers.read(reply.offset);
                message[HEADER..].copy_from_slice(&result.to_ne_bytes());
                LONGEST
            }
            command => return Err(io::Error::other(format!("what is command {command}?"))),
        };
        reply.size = size as u32;
        reply.flags = REPLY;
        reply.put(&mut message);
        socket.send(&message[..size])?;
    }
}
