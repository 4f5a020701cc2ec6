// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A disk in memory behind virtio-mmio, served in several ways: what a request costs. The guest
//! fills descriptors, notifies, waits for the interrupt, and reads and acknowledges its status.
//! Each way copies the data once, between the guest's memory and the disk.
//!
//! A process that serves the queue signals the interrupt itself, and does not know of its status,
//! which is always that of the queue there.

use std::any::Any;
use std::error::Error;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use kvm_bpf::{Device, ImageDevice, Place, Window};
use kvm_bpf_selftests::guest::{
    Access, Args, Guest, QUEUE_AVAIL, QUEUE_ENTRIES, QUEUE_PER_REQUEST, QUEUE_TEMPLATE, QUEUE_USED,
    Routine, SharedMemory, Vcpu,
};
use kvm_bpf_selftests::peer::Peer;
use kvm_bpf_selftests::programs::{loaded, sample};
use kvm_ioctls::IoEventAddress;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{Frontend, Listener, VhostUserFrontend, VhostUserVirtioFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringMutex, VringT};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_OK, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_INDIRECT_DESC, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueT, Reader, Writer};
use vm_memory::{
    ByteValued, Bytes, FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryAtomic,
    GuestMemoryBackend, GuestMemoryMmap, Le32, Le64,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use crate::echo::{GSI, Server, ServerThread, clone, ready_peer, signal, word};
use crate::host::{run_at_once, run_when_idle};
use crate::rows::{ADDR, Case, Handler, Loop, Serve, register};

/// The guest's memory that the device may access: the queue, what is copied there, and in pages of
/// their own results, tables of descriptors, and data.
const MEMORY: GuestAddress = GuestAddress(0x10_0000);
const PAGE: u64 = 0x1000;
const PAGES: usize = 40;
const RESULTS: u64 = 2 * PAGE;
const TABLES: u64 = 3 * PAGE;
const DATA: u64 = 5 * PAGE;

const SECTOR: usize = 512;
/// Of the disk that is no program's. Requests are of its first pages.
const DISK: usize = 8 << 20;

/// A request reads or writes so many bytes.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    write: bool,
    len: u32,
    /// How many requests are made at a time.
    depth: u16,
}

const READ: Work = Work {
    write: false,
    len: 4096,
    depth: 1,
};
const WRITE: Work = Work {
    write: true,
    ..READ
};
const WRITES: Work = Work { depth: 8, ..WRITE };

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// All that is done for a request; the guest idles until it is told, or is preempted by who
    /// serves the queue.
    Requests {
        server: Server,
        work: Work,
        idle: bool,
    },
    /// A program's notification alone.
    Notification(Work),
    /// The longest notification of a disk, or of random numbers.
    Longest { disk: bool },
    /// A reset of a disk that does not become idle.
    Reset,
}

impl Kind {
    /// A round has the default number of these divided by this: the dearer, the fewer.
    pub fn share(&self) -> u64 {
        match self {
            Kind::Notification(_)
            | Kind::Requests {
                server: Server::Program,
                ..
            } => 2,
            Kind::Requests { .. } => 10,
            Kind::Longest { .. } | Kind::Reset => 50,
        }
    }
}

const WAYS: [(Server, &str, &str); 4] = [
    (Server::Program, "program", "a program"),
    (Server::User, "vcpu", "a loop around KVM_RUN"),
    (Server::Thread, "thread", "ioeventfd, a thread"),
    (Server::Process, "process", "vhost-user, another process"),
];

/// Names, what they are, and handlers of the rows.
pub fn rows() -> Vec<(String, &'static str, Handler)> {
    let mut rows = Vec::new();
    let mut add = |name: String, what, kind| rows.push((name, what, Handler::Block(kind)));
    for (server, way, what) in WAYS {
        // Only for these the guest has to wait.
        let waits = matches!(server, Server::Thread | Server::Process);
        for idle in [false, true] {
            for (name, work) in [("read", READ), ("write", WRITE), ("write-8", WRITES)] {
                let kind = Kind::Requests { server, work, idle };
                match idle {
                    false => add(format!("block-{way}-{name}"), what, kind),
                    true if waits => add(format!("block-{way}-{name}-idle"), what, kind),
                    true => (),
                }
            }
        }
    }
    for (name, work) in [("read", READ), ("write", WRITE)] {
        let sector = Work {
            len: SECTOR as u32,
            ..work
        };
        let name = format!("block-notify-{name}");
        let what = "a notification of a program, 4096 bytes";
        add(name.clone(), what, Kind::Notification(work));
        let what = "the same, 512 bytes";
        add(format!("{name}-512"), what, Kind::Notification(sector));
    }
    let what = "the longest notification of a program";
    for (name, disk) in [("block-longest", true), ("rng-longest", false)] {
        add(name.to_string(), what, Kind::Longest { disk });
    }
    let what = "a reset of a program's device, in which someone else is";
    add("block-reset-busy".to_string(), what, Kind::Reset);
    rows
}

/// A guest whose disk is served so, after one request of each kind.
pub fn set_up(kind: Kind) -> Case {
    match kind {
        Kind::Requests { server, work, idle } => requests(server, work, idle),
        Kind::Notification(work) => notifications(work),
        Kind::Longest { disk } => longest(disk),
        Kind::Reset => reset(),
    }
}

fn requests(server: Server, work: Work, idle: bool) -> Case {
    let mut guest = Guest::with_irqchip();
    let (shared, memory) = add_memory(&mut guest);
    let mut vcpu = guest.vcpu_with_interrupts();
    guest.route_edge(&mut vcpu, GSI);
    let irq = EventFd::new(0).expect("eventfd");
    guest.vm().register_irqfd(&irq, GSI).expect("KVM_IRQFD");
    let notified = EventFd::new(0).expect("eventfd");
    if matches!(server, Server::Thread | Server::Process) {
        let notify = IoEventAddress::Mmio(ADDR + u64::from(VIRTIO_MMIO_QUEUE_NOTIFY));
        register(&guest, &notified, &notify);
    }

    let (mut serve, mut peer): (Serve, _) = (
        Box::new(|access| panic!("wanted no exit, got {access:x?}")),
        None,
    );
    let handler: Box<dyn Any> = match server {
        Server::Program => {
            let device = program(&guest, "virtio_blk", &irq);
            start_driver(&mut vcpu, QUEUE_ENTRIES);
            Box::new(device)
        }
        Server::User => {
            let status = AtomicU32::new(0);
            let mut disk = Disk::new();
            let mut queue = queue();
            let (memory, irq) = (memory.clone(), clone(&irq));
            serve = Box::new(move |access| {
                serve_registers(access, &status, || {
                    if disk.serve(&mut queue, &memory) {
                        status.fetch_or(VIRTIO_MMIO_INT_VRING, Ordering::SeqCst);
                        signal(&irq);
                    }
                });
            });
            Box::new(())
        }
        Server::Thread => {
            let status = Arc::new(AtomicU32::new(0));
            let thread = ServerThread::new(clone(&notified), {
                let (status, memory, irq) = (Arc::clone(&status), memory.clone(), clone(&irq));
                move |is_over| {
                    run(idle);
                    let mut disk = Disk::new();
                    let mut queue = queue();
                    loop {
                        notified.read().expect("read of an eventfd");
                        if is_over() {
                            return;
                        }
                        if disk.serve(&mut queue, &memory) {
                            status.fetch_or(VIRTIO_MMIO_INT_VRING, Ordering::SeqCst);
                            signal(&irq);
                        }
                    }
                }
            });
            serve = Box::new(move |access| serve_registers(access, &status, || unreachable!()));
            Box::new(thread)
        }
        Server::Process => {
            let status = AtomicU32::new(VIRTIO_MMIO_INT_VRING);
            serve = Box::new(move |access| match access {
                Access::Write(_, _) => (),
                access => serve_registers(access, &status, || unreachable!()),
            });
            let (process, frontend) = connect(idle, &memory, &notified, &irq);
            peer = Some(process.id());
            Box::new((frontend, process))
        }
        Server::Messages => unreachable!("a queue needs none"),
    };
    let routine = match idle {
        false => Routine::Disk,
        true => Routine::DiskIdle,
    };
    let depth = work.depth.into();
    let mut target = queue_loop(vcpu, routine, work.depth, serve).in_rounds_of(depth);
    check(&memory, QUEUE_TEMPLATE, work, || target.run(depth));
    // An irqfd ends with the last descriptor of its eventfd.
    Case::new(target, Box::new((handler, irq, shared)), guest, peer)
}

/// How the thread runs that serves the queue.
fn run(idle: bool) {
    match idle {
        false => run_at_once(),
        true => run_when_idle(),
    }
}

/// What reaches the VMM of the registers.
fn serve_registers(access: Access<'_>, status: &AtomicU32, notify: impl FnOnce()) {
    let register = |addr: u64| (addr - ADDR) as u32;
    match access {
        Access::Write(addr, data) if register(addr) == VIRTIO_MMIO_INTERRUPT_ACK => {
            status.fetch_and(!word(data), Ordering::SeqCst);
        }
        Access::Write(addr, _) if register(addr) == VIRTIO_MMIO_QUEUE_NOTIFY => notify(),
        Access::Read(addr, data) if register(addr) == VIRTIO_MMIO_INTERRUPT_STATUS => {
            data.copy_from_slice(&status.load(Ordering::SeqCst).to_le_bytes());
        }
        access => panic!("wanted an access of a request, got {access:x?}"),
    }
}

/// A queue that is as it is when nothing happens but notifications.
fn notifications(work: Work) -> Case {
    let (mut target, memory, rest, guest) = alone("virtio_blk", QUEUE_ENTRIES, work.depth);
    check(&memory, 0, work, || target.run(1));
    Case::new(target, rest, guest, None)
}

/// As many descriptors, and as many bytes, as one notification takes.
fn longest(disk: bool) -> Case {
    /// The budget of `samples/devices/virtio_bpf.h`: with one less spent, another request is begun.
    const DESCRIPTORS: u16 = 256;
    /// That of `samples/devices/virtio_rng.bpf.c`, of which each request takes this at least.
    const BYTES: u32 = 4096;
    const CHUNK: u32 = 64;

    // As many small requests as there may be before the last one, which is as large as it may be.
    let (name, entries, count) = match disk {
        true => ("virtio_blk", 128, DESCRIPTORS / 2),
        false => ("virtio_rng", 64, (BYTES / CHUNK) as u16),
    };
    let (mut target, memory, rest, guest) = alone(name, entries, count);
    put(&memory, QUEUE_AVAIL + 4 + 2 * u64::from(count - 1), 1_u16);
    if disk {
        let table = |index: u64, chain: &[Buffer]| {
            let at = TABLES + PAGE * index;
            put_chain(&memory, at, 0, chain);
            let len = 16 * chain.len() as u32;
            let descriptor = Descriptor::new(gpa(at), len, VRING_DESC_F_INDIRECT as u16, 0);
            put(&memory, 16 * index, descriptor);
        };
        let [flush, read] = [(VIRTIO_BLK_T_FLUSH, 0), (VIRTIO_BLK_T_IN, PAGE / 16)];
        let header = |(kind, at)| {
            put_header(&memory, RESULTS + at + 16, kind, 0);
            (RESULTS + at + 16, 16, false)
        };
        let result = |(_, at)| (RESULTS + at, 1, true);
        table(0, &[header(flush), result(flush)]);
        let mut all = vec![header(read)];
        let sectors = (0..u64::from(DESCRIPTORS) - 2).map(|at| SECTOR as u64 * at);
        all.extend(sectors.map(|at| (DATA + at, SECTOR as u32, true)));
        all.push(result(read));
        table(1, &all);
        for (_, at) in [flush, read] {
            put(&memory, RESULTS + at, u8::MAX);
        }
        target.run(1);
        for (_, at) in [flush, read] {
            assert_eq!(get::<u8>(&memory, RESULTS + at), VIRTIO_BLK_S_OK as u8);
        }
    } else {
        for (index, len) in [(0, 1), (1, BYTES)] {
            put_chain(&memory, 0, index, &[(DATA, len, true)]);
        }
        target.run(1);
    }
    assert_eq!(get::<u16>(&memory, QUEUE_USED + 2), count, "requests");
    Case::new(target, rest, guest, None)
}

/// The queue is someone's for ever.
fn reset() -> Case {
    let guest = Guest::new();
    let irq = EventFd::new(0).expect("eventfd");
    let device = program(&guest, "virtio_blk", &irq);
    let map = device.programs().map("virtio_run").expect("the map");
    let mut run = map
        .lookup(&[0; 4])
        .expect("BPF_MAP_LOOKUP_ELEM")
        .expect("an element");
    // `busy` of the queue.
    run[0] = 1;
    map.update(&[0; 4], &run).expect("BPF_MAP_UPDATE_ELEM");
    let args = Args {
        addr: ADDR + u64::from(VIRTIO_MMIO_STATUS),
        ..Default::default()
    };
    let serve = Box::new(|access: Access<'_>| panic!("wanted no exit, got {access:x?}"));
    let target = Loop::new(guest.vcpu(0), Routine::WriteLoop, args, serve);
    Case::new(target, Box::new((device, irq)), guest, None)
}

/// A program's device that nobody but the guest knows of, and a loop of notifications, each of so
/// many requests.
fn alone(name: &str, entries: u16, depth: u16) -> (Loop, GuestMemoryMmap, Box<dyn Any>, Guest) {
    let mut guest = Guest::new();
    let (shared, memory) = add_memory(&mut guest);
    let mut vcpu = guest.vcpu(0);
    let irq = EventFd::new(0).expect("eventfd");
    let device = program(&guest, name, &irq);
    start_driver(&mut vcpu, entries);
    let serve = Box::new(|access: Access<'_>| panic!("wanted no exit, got {access:x?}"));
    let target = queue_loop(vcpu, Routine::Notifications, depth, serve);
    (target, memory, Box::new((device, irq, shared)), guest)
}

fn queue_loop(vcpu: Vcpu, routine: Routine, depth: u16, serve: Serve) -> Loop {
    let args = Args {
        value: depth.into(),
        addr: ADDR + u64::from(VIRTIO_MMIO_QUEUE_NOTIFY),
        pair: [0, MEMORY.0],
        ..Default::default()
    };
    Loop::new(vcpu, routine, args, serve)
}

/// Memory that all who serve the device have.
fn add_memory(guest: &mut Guest) -> (Arc<SharedMemory>, GuestMemoryMmap) {
    let shared = Arc::new(SharedMemory::new(PAGES));
    guest.add_shared(MEMORY.0, &shared);
    let file = shared.file().try_clone().expect("dup");
    let range = (
        MEMORY,
        PAGE as usize * PAGES,
        Some(FileOffset::new(file, 0)),
    );
    let memory = GuestMemoryMmap::from_ranges_with_files([range]).expect("mmap");
    (shared, memory)
}

fn gpa(offset: u64) -> u64 {
    MEMORY.0 + offset
}

fn put<T: ByteValued>(memory: &GuestMemoryMmap, offset: u64, value: T) {
    let at = GuestAddress(gpa(offset));
    memory.write_obj(value, at).expect("memory");
}

fn get<T: ByteValued>(memory: &GuestMemoryMmap, offset: u64) -> T {
    memory.read_obj(GuestAddress(gpa(offset))).expect("memory")
}

fn put_header(memory: &GuestMemoryMmap, offset: u64, kind: u32, sector: u64) {
    put(memory, offset, Le32::from(kind));
    put(memory, offset + 8, Le64::from(sector));
}

/// Where a buffer is, its length, and whether the device writes to it.
type Buffer = (u64, u32, bool);

/// Puts descriptors into a table, from an index on.
fn put_chain(memory: &GuestMemoryMmap, table: u64, first: u16, chain: &[Buffer]) {
    for (index, &(at, len, is_written)) in (first..).zip(chain) {
        let is_last = usize::from(index - first) + 1 == chain.len();
        let mut flags = if is_last { 0 } else { VRING_DESC_F_NEXT };
        if is_written {
            flags |= VRING_DESC_F_WRITE;
        }
        let descriptor = Descriptor::new(gpa(at), len, flags as u16, index + 1);
        put(memory, table + 16 * u64::from(index), descriptor);
    }
}

/// Puts the requests where the guest finds them, which then are at the queue's begin.
fn prepare(memory: &GuestMemoryMmap, place: u64, work: Work) {
    let kind = if work.write {
        VIRTIO_BLK_T_OUT
    } else {
        VIRTIO_BLK_T_IN
    };
    for n in 0..work.depth {
        let first = QUEUE_PER_REQUEST * n;
        let header = 16 * u64::from(first + 3);
        let n = u64::from(n);
        let data = (DATA + PAGE * n, work.len, !work.write);
        let chain = [(header, 16, false), data, (RESULTS + n, 1, true)];
        put_chain(memory, place, first, &chain);
        put_header(memory, place + header, kind, PAGE / SECTOR as u64 * n);
    }
}

/// Writes with the device, reads what it wrote, and prepares what is measured.
fn check(memory: &GuestMemoryMmap, place: u64, work: Work, mut run: impl FnMut()) {
    let data = |n: u16| GuestAddress(gpa(DATA + PAGE * u64::from(n)));
    let bytes =
        |n: u16| -> Vec<u8> { (0..work.len).map(|at| (at % 251) as u8 ^ n as u8).collect() };
    for write in [true, false] {
        prepare(memory, place, Work { write, ..work });
        for n in 0..work.depth {
            put(memory, RESULTS + u64::from(n), u8::MAX);
            let fill = if write {
                bytes(n)
            } else {
                vec![0; work.len as usize]
            };
            memory.write_slice(&fill, data(n)).expect("memory");
        }
        run();
        for n in 0..work.depth {
            let result: u8 = get(memory, RESULTS + u64::from(n));
            assert_eq!(
                u32::from(result),
                VIRTIO_BLK_S_OK,
                "request {n} of {work:?}"
            );
            let mut found = vec![0; work.len as usize];
            memory.read_slice(&mut found, data(n)).expect("memory");
            assert_eq!(found, bytes(n), "data of request {n} of {work:?}");
        }
    }
    prepare(memory, place, work);
}

/// A device of a program, whose window is that memory.
fn program(guest: &Guest, name: &str, irq: &EventFd) -> ImageDevice {
    let device = Device::new(guest.vm()).expect("KVM_CREATE_DEVICE");
    let window = Window {
        addr: MEMORY.0,
        size: PAGE * PAGES as u64,
        read: true,
        write: true,
    };
    device.set_irq(0, irq).expect("an interrupt");
    ImageDevice::builder(device, loaded(sample(name)))
        .window(0, window)
        .and_then(|builder| builder.plug(Place::Memory(ADDR)))
        .expect("a device")
}

/// What a driver does before its first request.
fn start_driver(vcpu: &mut Vcpu, entries: u16) {
    let found = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
    let agreed = found | VIRTIO_CONFIG_S_FEATURES_OK;
    let features = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC;
    let halves = |value: u64| [value as u32, (value >> 32) as u32];
    let [low, high] = halves(features);
    let [desc_low, desc_high] = halves(MEMORY.0);
    let [avail_low, avail_high] = halves(gpa(QUEUE_AVAIL));
    let [used_low, used_high] = halves(gpa(QUEUE_USED));
    for (register, value) in [
        (VIRTIO_MMIO_STATUS, 0),
        (VIRTIO_MMIO_STATUS, found),
        (VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0),
        (VIRTIO_MMIO_DRIVER_FEATURES, low),
        (VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1),
        (VIRTIO_MMIO_DRIVER_FEATURES, high),
        (VIRTIO_MMIO_STATUS, agreed),
        (VIRTIO_MMIO_QUEUE_SEL, 0),
        (VIRTIO_MMIO_QUEUE_NUM, entries.into()),
        (VIRTIO_MMIO_QUEUE_DESC_LOW, desc_low),
        (VIRTIO_MMIO_QUEUE_DESC_HIGH, desc_high),
        (VIRTIO_MMIO_QUEUE_AVAIL_LOW, avail_low),
        (VIRTIO_MMIO_QUEUE_AVAIL_HIGH, avail_high),
        (VIRTIO_MMIO_QUEUE_USED_LOW, used_low),
        (VIRTIO_MMIO_QUEUE_USED_HIGH, used_high),
        (VIRTIO_MMIO_QUEUE_READY, 1),
        (VIRTIO_MMIO_STATUS, agreed | VIRTIO_CONFIG_S_DRIVER_OK),
    ] {
        let exits = vcpu.write(ADDR + u64::from(register), 4, value.into());
        assert_eq!(exits, [], "writing {value:#x} to register {register:#x}");
    }
}

/// The same queue, for rust-vmm's code.
fn queue() -> Queue {
    let mut queue = Queue::new(QUEUE_ENTRIES).expect("a power of 2");
    let part = |offset: u64| Some(gpa(offset) as u32);
    queue.set_desc_table_address(part(0), Some(0));
    queue.set_avail_ring_address(part(QUEUE_AVAIL), Some(0));
    queue.set_used_ring_address(part(QUEUE_USED), Some(0));
    queue.set_ready(true);
    queue
}

/// A disk in memory of this process.
struct Disk(Box<[u8]>);

impl Disk {
    fn new() -> Self {
        Disk(vec![0; DISK].into())
    }

    /// Serves all requests that there are; returns whether the driver wants to be told.
    fn serve(&mut self, queue: &mut Queue, memory: &GuestMemoryMmap) -> bool {
        loop {
            queue.disable_notification(memory).expect("a ring");
            while let Some(chain) = queue.pop_descriptor_chain(memory) {
                let head = chain.head_index();
                let written = self.request(memory, chain).expect("a request");
                queue.add_used(memory, head, written).expect("a ring");
            }
            if !queue.enable_notification(memory).expect("a ring") {
                return queue.needs_notification(memory).expect("a ring");
            }
        }
    }

    /// Does what a request says; returns how many bytes it wrote.
    fn request(
        &mut self,
        memory: &GuestMemoryMmap,
        chain: DescriptorChain<&GuestMemoryMmap>,
    ) -> Result<u32, Box<dyn Error>> {
        let mut from: Reader<'_> = chain.clone().reader(memory)?;
        let mut to: Writer<'_> = chain.writer(memory)?;
        let kind = from.read_obj::<Le32>()?.to_native();
        let _priority: Le32 = from.read_obj()?;
        let at = from.read_obj::<Le64>()?.to_native() as usize * SECTOR;
        let mut result = to.split_at(to.available_bytes() - 1)?;
        let len = from.available_bytes() + to.available_bytes();
        let data = self.0.get_mut(at..at + len).ok_or("the disk has an end")?;
        match kind {
            VIRTIO_BLK_T_IN => to.write_all(data)?,
            VIRTIO_BLK_T_OUT => from.read_exact(data)?,
            _ => return Err("a request of a kind that nobody makes".into()),
        }
        result.write_obj(VIRTIO_BLK_S_OK as u8)?;
        Ok(to.bytes_written() as u32 + 1)
    }
}

/// What another process is told to be: how it runs.
pub const AT_ONCE: &str = "block";
pub const IDLE: &str = "block-idle";

/// Has another process serve the queue, by vhost-user.
fn connect(
    idle: bool,
    memory: &GuestMemoryMmap,
    notified: &EventFd,
    irq: &EventFd,
) -> (Peer, Frontend) {
    let name = format!("kvm-bpf-bench-{}", process::id());
    let addr = SocketAddr::from_abstract_name(name).expect("a name");
    let listener = UnixListener::bind_addr(&addr).expect("bind");
    let role = if idle { IDLE } else { AT_ONCE };
    let process = ready_peer(role, &[listener.as_raw_fd()]);
    let stream = UnixStream::connect_addr(&addr).expect("connect");
    let mut frontend = Frontend::from_stream(stream, 1);
    set_up_vhost(&mut frontend, memory, notified, irq).expect("vhost-user");
    (process, frontend)
}

fn set_up_vhost(
    frontend: &mut Frontend,
    memory: &GuestMemoryMmap,
    notified: &EventFd,
    irq: &EventFd,
) -> vhost::Result<()> {
    frontend.set_owner()?;
    let features = frontend.get_features()?;
    frontend.set_features(features)?;
    let regions = memory.iter();
    let regions: vhost::Result<Vec<_>> = regions
        .map(VhostUserMemoryRegionInfo::from_guest_region)
        .collect();
    frontend.set_mem_table(&regions?)?;
    let host = |offset: u64| {
        let at = memory.get_host_address(GuestAddress(gpa(offset)));
        at.expect("memory") as u64
    };
    frontend.set_vring_num(0, QUEUE_ENTRIES)?;
    frontend.set_vring_addr(
        0,
        &VringConfigData {
            queue_max_size: QUEUE_ENTRIES,
            queue_size: QUEUE_ENTRIES,
            flags: 0,
            desc_table_addr: host(0),
            used_ring_addr: host(QUEUE_USED),
            avail_ring_addr: host(QUEUE_AVAIL),
            log_addr: None,
        },
    )?;
    frontend.set_vring_base(0, 0)?;
    frontend.set_vring_call(0, irq)?;
    frontend.set_vring_kick(0, notified)?;
    frontend.set_vring_enable(0, true)?;
    // Has a reply: all is done.
    frontend.get_features().map(drop)
}

/// Serves the queue as the other process, until the connection is closed.
pub fn serve_vhost(listener: UnixListener, idle: bool) -> io::Result<()> {
    // Its threads inherit that.
    run(idle);
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let backend = Backend {
        memory: memory.clone(),
        disk: Disk::new(),
    };
    let failed = |error| io::Error::other(format!("{error}"));
    let backend = Arc::new(Mutex::new(backend));
    let mut daemon = VhostUserDaemon::new(AT_ONCE.to_string(), backend, memory).map_err(failed)?;
    daemon
        .start(&mut Listener::from(listener))
        .map_err(failed)?;
    daemon.wait().map_err(failed)
}

/// The disk of another process.
struct Backend {
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    disk: Disk,
}

impl VhostUserBackendMut for Backend {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        1
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_ENTRIES.into()
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::empty()
    }

    fn set_event_idx(&mut self, enabled: bool) {
        assert!(!enabled, "nobody has asked for that");
    }

    fn update_memory(&mut self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        self.memory = memory;
        Ok(())
    }

    fn handle_event(
        &mut self,
        _event: u16,
        _set: EventSet,
        vrings: &[VringMutex],
        _thread: usize,
    ) -> io::Result<()> {
        let memory = self.memory.memory();
        let mut vring = vrings[0].get_mut();
        if self.disk.serve(vring.get_queue_mut(), &memory) {
            vring.signal_used_queue()?;
        }
        Ok(())
    }
}
