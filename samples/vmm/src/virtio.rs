// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Registers of a virtio device of this process (virtio 1.3, 4.2: version 2), with one split queue.
//!
//! Three registers are accessed for each request. They can be served without this process, and then
//! it is not told: `QueueNotify` only signals an eventfd, for which the thread waits that serves the
//! queue, and `InterruptStatus` and `InterruptACK` are a word in memory, which may be that of a map.
//! `samples/devices/virtio_regs.bpf.c` says what is between the programs there and this.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::{io, mem};

use kvm_bpf::Words;
use kvm_bpf_vmm::userspace::MmioDevice;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{DescriptorChain, Error, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

/// Device-tree `compatible` of such a device.
pub const COMPATIBLE: &str = "virtio,mmio";
/// That of programs which serve those three, and the map in which they have `InterruptStatus`.
pub const PROGRAMS: &str = "kvm-bpf,virtio-registers";
pub const STATUS_MAP: &str = "interrupt_status";
/// Bytes of its registers, those of its configuration included.
pub const SIZE: u64 = 0x200;

const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
const VENDOR: u32 = 0x4b42_5042;

/// What all such devices have.
const FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// A request of the driver's.
pub struct Request<'a> {
    pub memory: &'a GuestMemoryMmap,
    pub chain: DescriptorChain<&'a GuestMemoryMmap>,
    /// The features that the driver wants.
    pub features: u64,
    announce: &'a mut dyn FnMut(),
}

impl Request<'_> {
    /// Tells the driver of the requests that have been served, as this one takes long.
    pub fn announce_others(&mut self) {
        (self.announce)();
    }
}

/// What serves requests: it returns how many bytes it wrote for the driver, or none if the driver
/// broke the rules.
pub trait Serve: FnMut(Request<'_>) -> Option<u32> {}

impl<F: FnMut(Request<'_>) -> Option<u32>> Serve for F {}

/// What kind of device it is.
#[derive(Debug)]
pub struct Kind {
    /// Its number.
    pub id: u32,
    /// Features of this kind.
    pub features: u64,
    /// What the driver reads behind the registers.
    pub config: Vec<u8>,
    /// The most entries of the queue, a power of 2.
    pub queue_max: u16,
}

/// The bits of `InterruptStatus`: where they are.
#[derive(Debug)]
pub enum InterruptStatus {
    /// Accesses of the register come here.
    Own(AtomicU64),
    /// Programs serve them: the lower half of the first word of a map.
    Map(Arc<Words>),
}

impl InterruptStatus {
    /// One that is this process's.
    pub fn own() -> Self {
        InterruptStatus::Own(AtomicU64::new(0))
    }

    fn word(&self) -> &AtomicU64 {
        match self {
            InterruptStatus::Own(word) => word,
            InterruptStatus::Map(words) => words.get(0).expect("a map has an element"),
        }
    }
}

/// What the driver has set up.
struct State {
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    status: u32,
    queue_sel: u32,
    queue: Queue,
    /// The driver has not been told of requests that have been served.
    has_used: bool,
}

/// A device's registers and its queue.
pub struct Device {
    kind: Kind,
    /// Who serves a request has it, so that a reset waits for the end of the request.
    state: Mutex<State>,
    /// How many accesses wait for it. The next request does not begin before them: a mutex alone
    /// would mostly return to the thread that has just given it back.
    waiting: AtomicU32,
    none_waits: Condvar,
    interrupt_status: InterruptStatus,
    interrupt: EventFd,
    notified: EventFd,
    requests: AtomicU64,
    over: AtomicBool,
}

impl Device {
    /// A device that signals `interrupt`, and serves its queue when `notified` is signalled.
    pub fn new(
        kind: Kind,
        interrupt_status: InterruptStatus,
        interrupt: EventFd,
        notified: EventFd,
    ) -> Self {
        let queue = Queue::new(kind.queue_max).expect("a power of 2");
        Device {
            kind,
            state: Mutex::new(State {
                device_features_sel: 0,
                driver_features_sel: 0,
                driver_features: 0,
                status: 0,
                queue_sel: 0,
                queue,
                has_used: false,
            }),
            waiting: AtomicU32::new(0),
            none_waits: Condvar::new(),
            interrupt_status,
            interrupt,
            notified,
            requests: AtomicU64::new(0),
            over: AtomicBool::new(false),
        }
    }

    /// Serves the queue until the device's end.
    fn run(&self, memory: &GuestMemoryMmap, mut serve: impl Serve) -> io::Result<()> {
        while !self.is_over() {
            // It goes on after a signal by itself.
            if let Err(error) = self.notified.read() {
                self.needs_reset(&mut self.lock());
                return Err(error);
            }
            // A driver can make requests for ever.
            while !self.is_over() && self.serve_next(memory, &mut serve).is_continue() {}
        }
        Ok(())
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    /// Serves the next request, if there is one and the driver is ready. Continues if there may be
    /// others.
    fn serve_next(&self, memory: &GuestMemoryMmap, serve: &mut impl Serve) -> ControlFlow<()> {
        let mut state = self.lock_to_serve();
        let mask = VIRTIO_CONFIG_S_DRIVER_OK | VIRTIO_CONFIG_S_NEEDS_RESET;
        if state.status & mask != VIRTIO_CONFIG_S_DRIVER_OK || !state.queue.ready() {
            return ControlFlow::Break(());
        }
        match self.take_next(&mut state, memory, serve) {
            Ok(flow) => flow,
            Err(_) => {
                self.needs_reset(&mut state);
                ControlFlow::Break(())
            }
        }
    }

    /// Serves nothing before the next reset, and tells a driver that has begun.
    fn needs_reset(&self, state: &mut State) {
        state.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
        if state.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.interrupt(VIRTIO_MMIO_INT_CONFIG);
        }
    }

    fn take_next(
        &self,
        state: &mut State,
        memory: &GuestMemoryMmap,
        serve: &mut impl Serve,
    ) -> Result<ControlFlow<()>, Error> {
        let queue = &mut state.queue;
        if !queue.is_valid(memory) {
            return Err(Error::QueueNotReady);
        }
        let Some(chain) = queue.iter(memory)?.next() else {
            if queue.enable_notification(memory)? {
                return Ok(ControlFlow::Continue(()));
            }
            // Not before, but for a request that takes long: a driver that is told now notifies of
            // what it has next.
            self.announce(queue, &mut state.has_used, memory)?;
            return Ok(ControlFlow::Break(()));
        };
        let head = chain.head_index();
        let mut announced = Ok(());
        let written = serve(Request {
            memory,
            chain,
            features: state.driver_features,
            announce: &mut || announced = self.announce(queue, &mut state.has_used, memory),
        });
        announced?;
        let written = written.ok_or(Error::InvalidChain)?;
        queue.add_used(memory, head, written)?;
        state.has_used = true;
        self.requests.fetch_add(1, Ordering::Relaxed);
        Ok(ControlFlow::Continue(()))
    }

    /// Tells the driver of requests that have been served, if it has not been told and wants it.
    fn announce(
        &self,
        queue: &mut Queue,
        has_used: &mut bool,
        memory: &GuestMemoryMmap,
    ) -> Result<(), Error> {
        if mem::take(has_used) && queue.needs_notification(memory)? {
            self.interrupt(VIRTIO_MMIO_INT_VRING);
        }
        Ok(())
    }

    /// Interrupts the driver, which finds out why. Who calls it has the state: so there is no bit
    /// after a reset.
    fn interrupt(&self, why: u32) {
        // Not before the ring, nor behind the signal, which is a system call.
        let word = self.interrupt_status.word();
        word.fetch_or(why.into(), Ordering::SeqCst);
        signal(&self.interrupt);
    }

    /// Has the driver's state as at first, when nobody is in a request.
    fn reset(&self) {
        let mut state = self.lock();
        state.device_features_sel = 0;
        state.driver_features_sel = 0;
        state.driver_features = 0;
        state.queue_sel = 0;
        state.queue.reset();
        state.has_used = false;
        state.status = 0;
        self.interrupt_status.word().store(0, Ordering::SeqCst);
    }

    fn set_status(&self, status: u32) {
        if status == 0 {
            return self.reset();
        }
        let mut state = self.lock();
        let mut status = status & 0xff & !VIRTIO_CONFIG_S_NEEDS_RESET;
        let wanted = state.driver_features;
        if wanted & !self.features() != 0 || wanted & 1 << VIRTIO_F_VERSION_1 == 0 {
            status &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        if status & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            status &= !VIRTIO_CONFIG_S_DRIVER_OK;
        }
        state.status = status | state.status & VIRTIO_CONFIG_S_NEEDS_RESET;
        if status & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            let event_idx = wanted & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
            state.queue.set_event_idx(event_idx);
            // It may have notified before.
            signal(&self.notified);
        }
    }

    fn features(&self) -> u64 {
        FEATURES | self.kind.features
    }

    fn load(&self, register: u32) -> u32 {
        // The driver's interrupt handler does not wait for the end of a request, unless another
        // vCPU is at a register that does: the bus has one access of a device at a time.
        if register == VIRTIO_MMIO_INTERRUPT_STATUS {
            return self.interrupt_status.word().load(Ordering::SeqCst) as u32;
        }
        let state = self.lock();
        match register {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.kind.id,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => half(self.features(), state.device_features_sel),
            VIRTIO_MMIO_QUEUE_NUM_MAX if state.queue_sel == 0 => self.kind.queue_max.into(),
            VIRTIO_MMIO_QUEUE_READY if state.queue_sel == 0 => state.queue.ready().into(),
            VIRTIO_MMIO_STATUS => state.status,
            // There is no such memory.
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    fn store(&self, register: u32, value: u32) {
        match register {
            VIRTIO_MMIO_INTERRUPT_ACK => {
                let word = self.interrupt_status.word();
                word.fetch_and(!u64::from(value), Ordering::SeqCst);
            }
            VIRTIO_MMIO_QUEUE_NOTIFY if value == 0 => signal(&self.notified),
            VIRTIO_MMIO_STATUS => self.set_status(value),
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.lock().device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.lock().driver_features_sel = value,
            VIRTIO_MMIO_QUEUE_SEL => self.lock().queue_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES => {
                let mut state = self.lock();
                if state.driver_features_sel < 2 && state.status & VIRTIO_CONFIG_S_FEATURES_OK == 0
                {
                    let shift = 32 * state.driver_features_sel;
                    let others = state.driver_features & !(0xffff_ffff << shift);
                    state.driver_features = others | u64::from(value) << shift;
                }
            }
            _ => {
                let mut state = self.lock();
                if state.queue_sel == 0 {
                    store_to_queue(&mut state.queue, register, value);
                }
            }
        }
    }

    /// Waits for the end of a request at most.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let state = crate::lock(&self.state);
        if self.waiting.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.none_waits.notify_one();
        }
        state
    }

    /// Waits until no access does.
    fn lock_to_serve(&self) -> MutexGuard<'_, State> {
        let others_wait = |_: &mut State| self.waiting.load(Ordering::SeqCst) != 0;
        self.none_waits
            .wait_while(crate::lock(&self.state), others_wait)
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn store_to_queue(queue: &mut Queue, register: u32, value: u32) {
    if register == VIRTIO_MMIO_QUEUE_READY {
        let ready = value & 1 != 0;
        if ready && !queue.ready() {
            queue.set_next_avail(0);
            queue.set_next_used(0);
        }
        return queue.set_ready(ready);
    }
    if queue.ready() {
        return;
    }
    match register {
        // The queue looks whether it can have so many.
        VIRTIO_MMIO_QUEUE_NUM => queue.set_size(u16::try_from(value).unwrap_or(0)),
        VIRTIO_MMIO_QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
        VIRTIO_MMIO_QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
        VIRTIO_MMIO_QUEUE_AVAIL_LOW => queue.set_avail_ring_address(Some(value), None),
        VIRTIO_MMIO_QUEUE_AVAIL_HIGH => queue.set_avail_ring_address(None, Some(value)),
        VIRTIO_MMIO_QUEUE_USED_LOW => queue.set_used_ring_address(Some(value), None),
        VIRTIO_MMIO_QUEUE_USED_HIGH => queue.set_used_ring_address(None, Some(value)),
        _ => (),
    }
}

fn half(features: u64, which: u32) -> u32 {
    match which {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

fn signal(eventfd: &EventFd) {
    // It fails, or waits, only where the count is as high as it gets: after 2^64 signals of which
    // nobody has taken one.
    let _ = eventfd.write(1);
}

/// What the vCPUs' exits reach of a device.
pub struct Registers(pub Arc<Device>);

impl MmioDevice for Registers {
    fn read(&mut self, _vcpu: usize, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let config = u64::from(VIRTIO_MMIO_CONFIG);
        if offset >= config {
            let at = (offset - config) as usize;
            let bytes = self.0.kind.config.iter().skip(at);
            data.iter_mut()
                .zip(bytes)
                .for_each(|(to, from)| *to = *from);
        } else if data.len() == mem::size_of::<u32>() {
            data.copy_from_slice(&self.0.load(offset as u32).to_le_bytes());
        }
    }

    fn write(&mut self, _vcpu: usize, offset: u64, data: &[u8]) {
        if let (Ok(data), Ok(register)) = (data.try_into(), offset.try_into()) {
            self.0.store(register, u32::from_le_bytes(data));
        }
    }
}

/// The thread that serves a device's queue; it ends with this.
pub struct Server {
    device: Arc<Device>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Begins to serve a device's queue.
    pub fn start(
        name: &str,
        device: &Arc<Device>,
        memory: &GuestMemoryMmap,
        serve: impl Serve + Send + 'static,
    ) -> io::Result<Self> {
        let (device, memory) = (Arc::clone(device), memory.clone());
        let thread = thread::Builder::new().name(name.to_string()).spawn({
            let device = Arc::clone(&device);
            move || {
                if let Err(error) = device.run(&memory, serve) {
                    crate::print_error("a device is not served any more", &error);
                }
            }
        })?;
        Ok(Server {
            device,
            thread: Some(thread),
        })
    }

    /// How many requests it has served.
    pub fn requests(&self) -> u64 {
        self.device.requests.load(Ordering::Relaxed)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.device.over.store(true, Ordering::SeqCst);
        signal(&self.device.notified);
        if let Some(thread) = self.thread.take() {
            // A panic has been printed already.
            let _ = thread.join();
        }
    }
}

/// A driver for the tests of devices.
#[cfg(test)]
pub mod driver {
    use std::time::{Duration, Instant};

    use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
    use virtio_queue::desc::split::Descriptor;
    use vm_memory::{ByteValued, Bytes, GuestAddress};

    use super::*;

    const MEMORY: usize = 1 << 20;
    const ENTRIES: u16 = 16;
    /// Where the queue's parts are.
    const DESC: u64 = 0;
    const AVAIL: u64 = 0x400;
    const USED: u64 = 0x600;
    pub const AVAIL_INDEX: u64 = AVAIL + 2;
    pub const USED_INDEX: u64 = USED + 2;
    /// In the ring "avail": the last entry of "used" that the driver has seen, as it tells.
    const USED_EVENT: u64 = AVAIL + 4 + 2 * ENTRIES as u64;
    /// Where the bytes of requests are.
    const DATA: u64 = 0x1000;
    pub const PATIENCE: Duration = Duration::from_secs(20);

    /// The driver, and its device.
    pub struct Driver {
        pub memory: GuestMemoryMmap,
        pub device: Arc<Device>,
        pub interrupt: EventFd,
        registers: Registers,
        _server: Server,
    }

    impl Driver {
        /// A device whose driver is ready.
        pub fn new(kind: Kind, serve: impl Serve + Send + 'static) -> Self {
            let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
            let interrupt = EventFd::new(libc::EFD_NONBLOCK).unwrap();
            let device = Arc::new(Device::new(
                kind,
                InterruptStatus::own(),
                interrupt.try_clone().unwrap(),
                EventFd::new(0).unwrap(),
            ));
            let mut driver = Driver {
                _server: Server::start("test", &device, &memory, serve).unwrap(),
                registers: Registers(Arc::clone(&device)),
                memory,
                device,
                interrupt,
            };
            driver.start();
            driver
        }

        pub fn set(&mut self, register: u32, value: u32) {
            let data = value.to_le_bytes();
            self.registers.write(0, register.into(), &data);
        }

        pub fn get(&mut self, register: u32) -> u32 {
            let mut data = [0xee; 4];
            self.registers.read(0, register.into(), &mut data);
            u32::from_le_bytes(data)
        }

        /// Negotiates all features, and begins.
        pub fn start(&mut self) {
            self.start_without(0);
        }

        /// Negotiates all features but these, and begins.
        pub fn start_without(&mut self, refused: u64) {
            self.put(AVAIL_INDEX, 0_u16);
            self.put(USED_INDEX, 0_u16);
            for half in [0, 1] {
                self.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, half);
                self.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
                let features = self.get(VIRTIO_MMIO_DEVICE_FEATURES);
                self.set(
                    VIRTIO_MMIO_DRIVER_FEATURES,
                    features & !super::half(refused, half),
                );
            }
            self.set(VIRTIO_MMIO_STATUS, VIRTIO_CONFIG_S_FEATURES_OK);
            self.set(VIRTIO_MMIO_QUEUE_SEL, 0);
            self.set(VIRTIO_MMIO_QUEUE_NUM, ENTRIES.into());
            self.set(VIRTIO_MMIO_QUEUE_DESC_LOW, DESC as u32);
            self.set(VIRTIO_MMIO_QUEUE_AVAIL_LOW, AVAIL as u32);
            self.set(VIRTIO_MMIO_QUEUE_USED_LOW, USED as u32);
            self.set(VIRTIO_MMIO_QUEUE_READY, 1);
            let status = VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK;
            self.set(VIRTIO_MMIO_STATUS, status);
            // A bad queue may have been seen by now.
            assert_eq!(self.get(VIRTIO_MMIO_STATUS) & status, status);
        }

        pub fn put<T: ByteValued>(&self, addr: u64, value: T) {
            self.memory.write_obj(value, GuestAddress(addr)).unwrap();
        }

        pub fn find<T: ByteValued>(&self, addr: u64) -> T {
            self.memory.read_obj(GuestAddress(addr)).unwrap()
        }

        /// Makes a request available: the device reads `parts` and then has so many bytes to write to.
        pub fn send(&mut self, parts: &[&[u8]], sizes: &[usize]) {
            let read = parts.iter().map(|part| (part.len(), 0));
            let written = sizes.iter().map(|&size| (size, VRING_DESC_F_WRITE));
            let count = parts.len() + sizes.len();
            let mut addr = DATA;
            for (index, (len, flags)) in read.chain(written).enumerate() {
                if let Some(part) = parts.get(index) {
                    self.memory.write_slice(part, GuestAddress(addr)).unwrap();
                }
                let next = if index + 1 < count {
                    VRING_DESC_F_NEXT
                } else {
                    0
                };
                let next_index = index as u16 + 1;
                let desc = Descriptor::new(addr, len as u32, (flags | next) as u16, next_index);
                self.put(DESC + 16 * index as u64, desc);
                addr += len as u64;
            }
            let index: u16 = self.find(AVAIL_INDEX);
            self.put(AVAIL + 4 + 2 * u64::from(index % ENTRIES), 0_u16);
            // It wants the next interrupt.
            self.put(USED_EVENT, self.find::<u16>(USED_INDEX));
            self.put(AVAIL_INDEX, index.wrapping_add(1));
            self.set(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
        }

        /// Waits for the interrupt; returns its reasons, and acknowledges them.
        pub fn interrupted(&mut self) -> u32 {
            wait_until(|| self.interrupt.read().is_ok());
            let why = self.get(VIRTIO_MMIO_INTERRUPT_STATUS);
            self.set(VIRTIO_MMIO_INTERRUPT_ACK, why);
            assert_eq!(self.get(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
            why
        }

        /// Has a request served; returns what the device has written, which it says is so much.
        pub fn request(&mut self, parts: &[&[u8]], sizes: &[usize]) -> (u32, Vec<u8>) {
            let used: u16 = self.find(USED_INDEX);
            self.send(parts, sizes);
            assert_eq!(self.interrupted(), VIRTIO_MMIO_INT_VRING);
            assert_eq!(self.find::<u16>(USED_INDEX), used.wrapping_add(1));
            let [id, len]: [u32; 2] = self.find(USED + 4 + 8 * u64::from(used % ENTRIES));
            assert_eq!(id, 0);
            let mut bytes = vec![0; sizes.iter().sum()];
            let read: usize = parts.iter().map(|part| part.len()).sum();
            let addr = GuestAddress(DATA + read as u64);
            self.memory.read_slice(&mut bytes, addr).unwrap();
            (len, bytes)
        }
    }

    #[track_caller]
    pub fn wait_until(mut done: impl FnMut() -> bool) {
        let start = Instant::now();
        while !done() {
            assert!(start.elapsed() < PATIENCE, "it does not come");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use libc::EFD_NONBLOCK;
    use vm_memory::{Bytes, GuestAddress};

    use super::driver::{AVAIL_INDEX, Driver, PATIENCE, USED_INDEX, wait_until};
    use super::*;

    fn kind() -> Kind {
        Kind {
            id: 9,
            features: 1 << 3,
            config: vec![1, 2, 3, 4, 5],
            queue_max: 32,
        }
    }

    #[test]
    fn registers_are_those_of_version_2() {
        let mut driver = Driver::new(kind(), |_: Request<'_>| Some(0));
        for (register, wanted) in [
            (VIRTIO_MMIO_MAGIC_VALUE, u32::from_le_bytes(*b"virt")),
            (VIRTIO_MMIO_VERSION, 2),
            (VIRTIO_MMIO_DEVICE_ID, 9),
            (VIRTIO_MMIO_QUEUE_NUM_MAX, 32),
            (VIRTIO_MMIO_QUEUE_READY, 1),
            (VIRTIO_MMIO_SHM_LEN_LOW, u32::MAX),
            (VIRTIO_MMIO_CONFIG, 0x0403_0201),
            (VIRTIO_MMIO_CONFIG + 4, 5),
        ] {
            assert_eq!(driver.get(register), wanted, "{register:#x}");
        }
        for (half, wanted) in [(0, 1 << 3 | 1 << 28 | 1 << 29), (1, 1), (2, 0)] {
            driver.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, half);
            assert_eq!(driver.get(VIRTIO_MMIO_DEVICE_FEATURES), wanted, "{half}");
        }
        driver.set(VIRTIO_MMIO_QUEUE_SEL, 1);
        assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
        assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_READY), 0);
    }

    #[test]
    fn a_device_without_its_features_does_not_begin() {
        let mut driver = Driver::new(kind(), |_: Request<'_>| Some(0));
        for (low, high) in [(0, 0), (1 << 4, 1)] {
            driver.set(VIRTIO_MMIO_STATUS, 0);
            for (half, features) in [(0, low), (1, high)] {
                driver.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
                driver.set(VIRTIO_MMIO_DRIVER_FEATURES, features);
            }
            let status = VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK;
            driver.set(VIRTIO_MMIO_STATUS, status);
            assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 0, "{low:#x} {high:#x}");
        }
    }

    #[test]
    fn only_bits_that_are_written_are_acknowledged() {
        let mut driver = Driver::new(kind(), |_: Request<'_>| Some(0));
        driver
            .device
            .interrupt(VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG);
        driver.set(VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_VRING);
        let left = driver.get(VIRTIO_MMIO_INTERRUPT_STATUS);
        assert_eq!(left, VIRTIO_MMIO_INT_CONFIG);
    }

    #[test]
    fn requests_are_served_after_a_reset_too() {
        let mut driver = Driver::new(kind(), |_: Request<'_>| Some(7));
        for _ in 0..3 {
            // More than there are entries.
            for _ in 0..20 {
                assert_eq!(driver.request(&[b"abc"], &[8]).0, 7);
            }
            driver.set(VIRTIO_MMIO_STATUS, 0);
            driver.start();
        }
        assert_eq!(driver.device.requests.load(Ordering::Relaxed), 60);
    }

    #[test]
    fn a_driver_that_breaks_the_rules_has_to_reset() {
        let mut driver = Driver::new(kind(), |_: Request<'_>| None);
        driver.send(&[b"abc"], &[]);
        assert_eq!(driver.interrupted(), VIRTIO_MMIO_INT_CONFIG);
        let bad = VIRTIO_CONFIG_S_NEEDS_RESET;
        assert_eq!(driver.get(VIRTIO_MMIO_STATUS) & bad, bad);
        // The driver cannot take it back.
        driver.set(VIRTIO_MMIO_STATUS, VIRTIO_CONFIG_S_FEATURES_OK);
        assert_eq!(driver.get(VIRTIO_MMIO_STATUS) & bad, bad);

        driver.set(VIRTIO_MMIO_STATUS, 0);
        driver.start();
        driver.put(AVAIL_INDEX, 1000_u16);
        driver.set(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
        assert_eq!(driver.interrupted(), VIRTIO_MMIO_INT_CONFIG);

        driver.set(VIRTIO_MMIO_STATUS, 0);
        driver.set(VIRTIO_MMIO_QUEUE_DESC_HIGH, 1);
        driver.start();
        assert_eq!(driver.interrupted(), VIRTIO_MMIO_INT_CONFIG);
    }

    /// The VMM can end.
    #[test]
    fn a_driver_that_makes_requests_for_ever_does_not_keep_the_server() {
        let (entered, is_in) = mpsc::channel();
        let mut driver = Driver::new(kind(), move |Request { memory, .. }: Request<'_>| {
            let at = GuestAddress(AVAIL_INDEX);
            let index: u16 = memory.read_obj(at).unwrap();
            memory.write_obj(index.wrapping_add(1), at).unwrap();
            let _ = entered.send(());
            Some(0)
        });
        driver.send(&[b"abc"], &[]);
        is_in.recv().unwrap();
        let end = thread::spawn(move || drop(driver));
        wait_until(|| end.is_finished());
    }

    #[test]
    fn a_driver_is_told_that_nobody_serves_it_any_more() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        for has_begun in [true, false] {
            // With nothing to read, which is an error.
            let eventfds = [(); 2].map(|()| EventFd::new(EFD_NONBLOCK).unwrap());
            let [interrupt, notified] = eventfds;
            let seen = interrupt.try_clone().unwrap();
            let device = Device::new(kind(), InterruptStatus::own(), interrupt, notified);
            if has_begun {
                device.lock().status = VIRTIO_CONFIG_S_DRIVER_OK;
            }
            let served = device.run(&memory, |_: Request<'_>| Some(0));
            assert!(served.is_err());
            assert_ne!(device.lock().status & VIRTIO_CONFIG_S_NEEDS_RESET, 0);
            assert_eq!(seen.read().is_ok(), has_begun);
        }
    }

    #[test]
    fn a_request_that_takes_long_does_not_hide_others() {
        let (entered, is_in) = mpsc::channel();
        let (leave, may_leave) = mpsc::channel();
        let mut driver = Driver::new(kind(), move |mut request: Request<'_>| {
            request.announce_others();
            entered.send(()).unwrap();
            let _ = may_leave.recv_timeout(PATIENCE);
            Some(0)
        });
        driver.send(&[b"abc"], &[]);
        is_in.recv().unwrap();
        // Nothing has been served.
        assert!(driver.interrupt.read().is_err());
        driver.send(&[b"abc"], &[]);
        leave.send(()).unwrap();
        is_in.recv().unwrap();
        assert_eq!(driver.interrupted(), VIRTIO_MMIO_INT_VRING);
        assert_eq!(driver.find::<u16>(USED_INDEX), 1);
        leave.send(()).unwrap();
        // The driver has not asked to be told of the second.
        wait_until(|| driver.find::<u16>(USED_INDEX) == 2);
        assert!(driver.interrupt.read().is_err());
    }

    /// When a reset is over nothing of the device's comes any more, though a request was served.
    /// The next request does not begin before it.
    #[test]
    fn a_reset_waits_for_the_end_of_a_request() {
        let (entered, is_in) = mpsc::channel();
        let (leave, may_leave) = mpsc::channel();
        let mut driver = Driver::new(kind(), move |_: Request<'_>| {
            entered.send(()).unwrap();
            // For a while only, so that this test can fail.
            let _ = may_leave.recv_timeout(PATIENCE);
            Some(0)
        });
        driver.send(&[b"abc"], &[]);
        is_in.recv().unwrap();
        driver.send(&[b"abc"], &[]);
        let device = Arc::clone(&driver.device);
        let reset = thread::spawn(move || device.store(VIRTIO_MMIO_STATUS, 0));
        wait_until(|| driver.device.waiting.load(Ordering::SeqCst) == 1);
        assert!(!reset.is_finished());
        // These do not wait.
        assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
        driver.set(VIRTIO_MMIO_INTERRUPT_ACK, 1);
        driver.set(VIRTIO_MMIO_QUEUE_NOTIFY, 0);

        leave.send(()).unwrap();
        wait_until(|| reset.is_finished());
        assert!(is_in.try_recv().is_err());
        assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
        assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 0);
        assert_eq!(driver.find::<u16>(USED_INDEX), 1);
        // It may have been signalled before the reset, and is not afterwards.
        let _ = driver.interrupt.read();
        driver.set(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
        thread::sleep(Duration::from_millis(50));
        assert!(driver.interrupt.read().is_err());
    }
}
