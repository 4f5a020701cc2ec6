// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The virtual machine: memory, devices, vCPU threads, and how it all ends.

use std::fs::File;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_bindings::{
    KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_userspace_memory_region,
};
use kvm_bpf::device::only_region;
use kvm_bpf::image::open_regular;
use kvm_bpf::note::Space;
use kvm_bpf::{Device, Image, ImageDevice, MapChanges, OnLoss, OpenImage, Place};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::arch;
#[cfg(target_arch = "x86_64")]
use crate::arch::PortWrite;
use crate::boot;
use crate::bus::{Bus, Conflict, Range, check_ranges, check_reach};
use crate::cli::{Args, At, Bpf};
use crate::provide::{self, Provided};
use crate::report::{Report, Server, Vcpu};
use crate::serial::Serial;
use crate::userspace::{self, uclamp};

/// Why the VM could not be made, or stopped before the guest ended it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot open /dev/kvm")]
    OpenKvm(#[source] errno::Error),
    #[error("this host's KVM has no {0}")]
    Capability(&'static str),
    #[error("{}: cannot read the file", .0.display())]
    Read(PathBuf, #[source] io::Error),
    #[error("{}: {size} bytes are more than the guest's memory of {memory} MiB", .path.display())]
    TooLarge {
        path: PathBuf,
        size: u64,
        memory: u64,
    },
    #[error("{0}")]
    Device(String, #[source] kvm_bpf::device::Error),
    #[error("{0}: user-space devices, fallbacks too, are for memory, not for ports")]
    NoUserspacePorts(String),
    #[error("{0}: it has no ring buffer \"output\" and is no ns16550a: no output")]
    NoOutput(String),
    #[error("{}: cannot write its output there", .0.display())]
    Output(PathBuf, #[source] io::Error),
    #[error("{0}: cannot take its output")]
    TakeOutput(String, #[source] io::Error),
    #[error("{0}: no such user-space device, only {names}", names = userspace::NAMES.join(", "))]
    NoSuchDevice(String),
    #[error("{device}: has {has} interrupts, and its fallback {fallback} {needed}")]
    FallbackInterrupts {
        device: String,
        fallback: String,
        has: u32,
        needed: u32,
    },
    #[error("{device}: cannot fill its map {map}")]
    Provide {
        device: String,
        map: &'static str,
        #[source]
        source: libbpf_rs::Error,
    },
    #[error(transparent)]
    Conflict(#[from] Conflict),
    #[error("{0}: for guests of at most {1} CPUs")]
    TooManyCpus(String, u64),
    #[error("{0}: no interrupt line is left for it")]
    NoInterruptLine(String),
    #[error("{0}: cannot wire its interrupt")]
    WireInterrupt(String, #[source] io::Error),
    #[error("cannot create the VM")]
    CreateVm(#[source] errno::Error),
    #[error("cannot get {0} MiB of guest memory")]
    Memory(u64, #[source] vm_memory::mmap::FromRangesError),
    #[error("cannot give the VM its memory")]
    SetMemory(#[source] errno::Error),
    #[error("cannot tell how many bits the guest's addresses have")]
    AddressBits(#[source] boot::Error),
    #[error("cannot prepare the guest's hardware")]
    Platform(#[source] boot::Error),
    #[error("{}: cannot boot it", .0.display())]
    Load(PathBuf, #[source] boot::Error),
    #[error("cannot create the vCPUs")]
    CreateVcpu(#[source] errno::Error),
    #[error("cannot set up vCPU {0}")]
    SetupVcpu(u8, #[source] boot::Error),
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    #[error("cannot handle signals")]
    Signal(#[source] errno::Error),
    #[error("vCPU {0} cannot run")]
    RunVcpu(usize, #[source] errno::Error),
    #[error("vCPU {0} stopped: {1}")]
    UnexpectedExit(usize, String),
    #[error("the guest crashed: triple fault of vCPU {0}")]
    TripleFault(usize),
}

/// How a guest ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It asked for a reset.
    Reset,
    /// It switched itself off.
    PowerOff,
}

impl End {
    fn describe(self) -> &'static str {
        match self {
            End::Reset => "reset",
            End::PowerOff => "power off",
        }
    }
}

/// What the guest is told of a device.
#[derive(Clone, Debug)]
pub struct GuestDevice {
    /// Its registers.
    pub range: Range,
    /// Device-tree `compatible` strings.
    pub compatible: Vec<String>,
    /// Its interrupts, edge-triggered.
    pub gsis: Vec<u32>,
}

/// A device that the kernel serves, and the file that it came from.
struct BpfDevice {
    path: PathBuf,
    device: ImageDevice,
    /// Who takes what it puts out.
    serial: Option<Serial>,
    /// Open as long as the device: when an eventfd's last fd is closed, KVM ends its irqfd.
    _irqs: Vec<EventFd>,
}

/// What can happen while the guest runs.
pub enum Event {
    /// Replace the programs by those in the files now.
    Reload,
    /// A vCPU's thread is done.
    Vcpu(Result<Option<End>, Error>),
}

/// A VM that is ready to run.
pub struct Vm {
    vcpus: Vec<VcpuFd>,
    bpf_devices: Vec<BpfDevice>,
    provided: Provided,
    on_loss: OnLoss,
    bus: Bus,
    /// The devices at ports; on x86 only.
    ports: Bus,
    platform: arch::Platform,
    // The last ones: nothing above may outlive them.
    _vm: VmFd,
    _memory: GuestMemoryMmap,
}

impl Vm {
    /// Makes the VM that the command line describes.
    pub fn new(args: &Args) -> Result<Self, Error> {
        // What needs no KVM first, so that a wrong file is told from a wrong host.
        let memory_size = args.memory << 20;
        let images = args
            .bpf
            .iter()
            .map(|bpf| open_image(Path::new(&bpf.at.what)))
            .collect::<Result<Vec<_>, _>>()?;
        let mut devices = Vec::new();
        for (bpf, image) in args.bpf.iter().zip(&images) {
            let note = image.note();
            check_fallback(bpf, note.nr_irqs)?;
            let region = only_region(note, bpf.at.place.space())
                .map_err(|source| Error::Device(bpf.at.what.clone(), source))?;
            if bpf.output.is_some() && !Serial::is_one(note) {
                return Err(Error::NoOutput(bpf.at.what.clone()));
            }
            devices.push(guest_device(&bpf.at, region.size, note.compatible.clone()));
        }
        let mut userspace_irqs = Vec::new();
        for at in &args.userspace {
            let info = describe(&at.what)?;
            if at.place.space() == Space::Ports {
                return Err(Error::NoUserspacePorts(at.what.clone()));
            }
            let compatible = info.compatible.iter().map(|name| name.to_string());
            devices.push(guest_device(at, info.size, compatible.collect()));
            userspace_irqs.push(info.nr_irqs);
        }
        let mut taken = arch::reserved_ranges();
        taken.push(Range::new("guest RAM", arch::RAM_START, memory_size));
        let ranges: Vec<_> = devices.iter().map(|device| device.range.clone()).collect();
        check_ranges(&taken, &ranges)?;
        for device in &devices {
            let max = provide::max_cpus(&device.compatible, device.range.size);
            if let Some(max) = max.filter(|&max| max < args.cpus.into()) {
                return Err(Error::TooManyCpus(device.range.name.clone(), max));
            }
        }
        let open = |path| open_at_most(path, args.memory);
        let mut kernel = open(&args.kernel)?;
        let mut initrd = args.initrd.as_deref().map(open).transpose()?;

        let kvm = Kvm::new().map_err(Error::OpenKvm)?;
        for (capability, name) in arch::CAPABILITIES {
            if !kvm.check_extension(capability) {
                return Err(Error::Capability(name));
            }
        }
        let vm = kvm.create_vm().map_err(Error::CreateVm)?;
        let platform = arch::Platform::new(&vm).map_err(Error::Platform)?;
        let vcpus = (0..args.cpus)
            .map(|id| vm.create_vcpu(id.into()))
            .collect::<Result<Vec<_>, _>>()
            .map_err(Error::CreateVcpu)?;
        let bits = arch::address_bits(&kvm, &vm, &vcpus[0]).map_err(Error::AddressBits)?;
        check_reach(taken.iter().chain(&ranges), bits)?;
        let memory = create_memory(&vm, memory_size)?;
        platform.wire(&vm).map_err(Error::Platform)?;

        let table = args.perf_table.as_ref().map(|table| table.0.as_slice());
        let provided = Provided::new(table);
        let (mut bus, mut ports) = (Bus::default(), Bus::default());
        let mut bpf_devices = Vec::new();
        let mut free_gsis = arch::DEVICE_GSIS;
        let (bpf, userspace) = devices.split_at_mut(images.len());
        for ((info, image), args) in bpf.iter_mut().zip(images).zip(&args.bpf) {
            let name = info.range.name.clone();
            let device_error = |source| Error::Device(name.clone(), source);
            let device = Device::new(&vm).map_err(device_error)?;
            let image = image.load().map_err(|error| device_error(error.into()))?;
            provide_to(&name, &image, &provided)?;
            let irqs = wire_interrupts(&vm, info, image.note().nr_irqs, &mut free_gsis)?;
            for (index, irq) in (0..).zip(&irqs) {
                device.set_irq(index, irq).map_err(device_error)?;
            }
            let fallback = args.fallback.as_deref();
            let fallback = fallback
                .map(|fallback| {
                    let irqs = irqs
                        .iter()
                        .map(EventFd::try_clone)
                        .collect::<Result<_, _>>();
                    let irqs = irqs.map_err(|error| Error::WireInterrupt(name.clone(), error))?;
                    create_model(fallback, irqs, &provided)
                })
                .transpose()?;
            match info.range.space {
                Space::Memory => bus.add(info.range.clone(), Server::Bpf, fallback),
                Space::Ports => ports.add(info.range.clone(), Server::Bpf, fallback),
            }
            let serial = Serial::new(&name, &image, args.output.as_deref(), &platform)?;
            // From here on the guest's accesses run programs.
            let device = ImageDevice::new(device, args.at.place, image).map_err(device_error)?;
            bpf_devices.push(BpfDevice {
                path: PathBuf::from(&name),
                device,
                serial,
                _irqs: irqs,
            });
        }
        for (info, nr_irqs) in userspace.iter_mut().zip(userspace_irqs) {
            let irqs = wire_interrupts(&vm, info, nr_irqs, &mut free_gsis)?;
            let model = create_model(&info.range.name, irqs, &provided)?;
            bus.add(info.range.clone(), Server::Userspace, Some(model));
        }

        let cmdline = format!("{} {}", arch::CMDLINE, args.append);
        let entry = arch::load(
            &memory,
            &mut kernel,
            initrd.as_mut(),
            cmdline.trim_end(),
            args.cpus,
            &devices,
        )
        .map_err(|source| Error::Load(args.kernel.clone(), source))?;

        for (id, vcpu) in (0..).zip(&vcpus) {
            arch::setup_vcpu(&kvm, &vm, vcpu, id, args.cpus, entry)
                .map_err(|source| Error::SetupVcpu(id, source))?;
        }

        Ok(Vm {
            vcpus,
            bpf_devices,
            provided,
            on_loss: match args.reload_fresh {
                true => OnLoss::Accept,
                false => OnLoss::Refuse,
            },
            bus,
            ports,
            platform,
            _vm: vm,
            _memory: memory,
        })
    }

    /// Runs the guest to its end.
    ///
    /// Others may send [`Event::Reload`] through `sender`.
    pub fn run(mut self, sender: Sender<Event>, events: Receiver<Event>) -> Result<Report, Error> {
        register_signal_handler(SIGRTMIN(), interrupt_vcpu).map_err(Error::Signal)?;
        let shared = Arc::new(Shared {
            bus: self.bus,
            ports: self.ports,
            platform: self.platform,
            stop: AtomicBool::new(false),
        });
        let mut threads = Vec::new();
        let mut started = Ok(());
        for (id, vcpu) in self.vcpus.into_iter().enumerate() {
            match start_vcpu(id, vcpu, shared.clone(), sender.clone()) {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    started = Err(error);
                    break;
                }
            }
        }

        let mut reloads = 0;
        let end = started.and_then(|()| {
            loop {
                match events.recv() {
                    Ok(Event::Reload) => {
                        for device in &mut self.bpf_devices {
                            match device.reload(&self.provided, self.on_loss) {
                                Ok(changes) => {
                                    reloads += 1;
                                    let path = device.path.display();
                                    crate::say(&format!("kvm-bpf-vmm: reload: {path}: {changes}"));
                                }
                                Err(error) => crate::print_error("reload", &error),
                            }
                        }
                    }
                    Ok(Event::Vcpu(Ok(None))) => (),
                    Ok(Event::Vcpu(Ok(Some(end)))) => break Ok(end),
                    Ok(Event::Vcpu(Err(error))) => break Err(error),
                    Err(mpsc::RecvError) => unreachable!("this function holds a sender"),
                }
            }
        });

        // Also those that run while another one could not be started.
        shared.stop.store(true, Ordering::SeqCst);
        let vcpus = stop_vcpus(threads);
        let lost =
            |device: &mut BpfDevice| Some(device.serial.take()?.finish(device.device.image()));
        let mut console_bytes_lost: u64 = self.bpf_devices.iter_mut().filter_map(lost).sum();
        console_bytes_lost += shared.platform.finish();
        let mut devices = shared.bus.report();
        devices.extend(shared.ports.report());
        end.map(|end| Report {
            end: end.describe(),
            reloads,
            unclaimed_exits: shared.bus.unclaimed(),
            console_bytes_lost,
            devices,
            vcpus,
        })
    }
}

impl BpfDevice {
    fn reload(&mut self, provided: &Provided, on_loss: OnLoss) -> Result<MapChanges, Error> {
        crate::forget_warnings();
        let image = open_image(&self.path)?;
        let name = self.path.display().to_string();
        let device_error = |source| Error::Device(name.clone(), source);
        let replacement = self.device.load(image, on_loss).map_err(device_error)?;
        provide_to(&name, replacement.image(), provided)?;
        if let Some(serial) = &mut self.serial {
            serial.follow(&name, replacement.image())?;
        }
        self.device.swap(replacement).map_err(device_error)
    }
}

/// Opens a file that goes into guest memory, of so many MiB.
fn open_at_most(path: &Path, memory: u64) -> Result<File, Error> {
    let unreadable = |source| Error::Read(path.to_path_buf(), source);
    let file = open_regular(path).map_err(unreadable)?;
    let size = file.metadata().map_err(unreadable)?.len();
    if size > memory << 20 {
        return Err(Error::TooLarge {
            path: path.to_path_buf(),
            size,
            memory,
        });
    }
    Ok(file)
}

fn open_image(path: &Path) -> Result<OpenImage, Error> {
    OpenImage::open_file(path)
        .map_err(|source| Error::Device(path.display().to_string(), source.into()))
}

fn describe(device: &str) -> Result<userspace::Description, Error> {
    userspace::describe(device).ok_or_else(|| Error::NoSuchDevice(device.to_string()))
}

/// Checks that a device with so many interrupts can share them with its fallback.
fn check_fallback(bpf: &Bpf, has: u32) -> Result<(), Error> {
    let Some(fallback) = &bpf.fallback else {
        return Ok(());
    };
    if bpf.at.place.space() == Space::Ports {
        return Err(Error::NoUserspacePorts(fallback.clone()));
    }
    let needed = describe(fallback)?.nr_irqs;
    if needed > has {
        return Err(Error::FallbackInterrupts {
            device: bpf.at.what.clone(),
            fallback: fallback.clone(),
            has,
            needed,
        });
    }
    Ok(())
}

fn create_model(
    device: &str,
    irqs: Vec<EventFd>,
    provided: &Provided,
) -> Result<Box<dyn userspace::MmioDevice>, Error> {
    userspace::create(device, irqs, &provided.perf_table)
        .ok_or_else(|| Error::NoSuchDevice(device.to_string()))
}

fn provide_to(device: &str, image: &Image, provided: &Provided) -> Result<(), Error> {
    provided
        .fill(image)
        .map_err(|(map, source)| Error::Provide {
            device: device.to_string(),
            map,
            source,
        })
}

fn guest_device(at: &At, size: u64, compatible: Vec<String>) -> GuestDevice {
    GuestDevice {
        range: match at.place {
            Place::Memory(addr) => Range::new(&at.what, addr, size),
            Place::Port(port) => Range::of_ports(&at.what, port, size),
        },
        compatible,
        gsis: Vec::new(),
    }
}

fn create_memory(vm: &VmFd, size: u64) -> Result<GuestMemoryMmap, Error> {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(arch::RAM_START), size as usize)])
        .map_err(|source| Error::Memory(size >> 20, source))?;
    for (slot, region) in memory.iter().enumerate() {
        let kvm_region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the region is mapped memory of that size, and `Vm` keeps the
        // mapping until the vCPUs' threads, the only ones to use it, are gone.
        unsafe { vm.set_user_memory_region(kvm_region) }.map_err(Error::SetMemory)?;
    }
    Ok(memory)
}

/// Gives a device its interrupt lines; returns an eventfd for each, which raises it.
fn wire_interrupts(
    vm: &VmFd,
    device: &mut GuestDevice,
    count: u32,
    free: &mut impl Iterator<Item = u32>,
) -> Result<Vec<EventFd>, Error> {
    let mut irqs = Vec::new();
    for _ in 0..count {
        let (gsi, irq) = wire_interrupt(vm, &device.range.name, free)?;
        device.gsis.push(gsi);
        irqs.push(irq);
    }
    Ok(irqs)
}

/// Takes an interrupt line and makes an eventfd that raises it.
fn wire_interrupt(
    vm: &VmFd,
    device: &str,
    free: &mut impl Iterator<Item = u32>,
) -> Result<(u32, EventFd), Error> {
    let gsi = free
        .next()
        .ok_or_else(|| Error::NoInterruptLine(device.to_string()))?;
    let irq = EventFd::new(libc::EFD_NONBLOCK)
        .and_then(|irq| {
            vm.register_irqfd(&irq, gsi)
                .map_err(Into::into)
                .map(|()| irq)
        })
        .map_err(|source| Error::WireInterrupt(device.to_string(), source))?;
    Ok((gsi, irq))
}

/// What all vCPU threads use.
struct Shared {
    bus: Bus,
    ports: Bus,
    platform: arch::Platform,
    stop: AtomicBool,
}

fn start_vcpu(
    id: usize,
    mut vcpu: VcpuFd,
    shared: Arc<Shared>,
    sender: Sender<Event>,
) -> Result<JoinHandle<Option<Vcpu>>, Error> {
    thread::Builder::new()
        .name(format!("vcpu{id}"))
        .spawn(move || {
            let result = catch_unwind(AssertUnwindSafe(|| run_vcpu(id, &mut vcpu, &shared)))
                .unwrap_or_else(|_| Err(Error::UnexpectedExit(id, "its thread panicked".into())));
            // Nobody listens any more when another vCPU ended the guest first.
            let _ = sender.send(Event::Vcpu(result));
            // A thread may ask this of itself as long as it is there, so at its end.
            let (uclamp_min, uclamp_max) = uclamp::of_thread(0).ok()?;
            Some(Vcpu {
                id,
                uclamp_min,
                uclamp_max,
            })
        })
        .map_err(Error::Thread)
}

/// Runs a vCPU until the guest ends; `None` when another vCPU ended it.
fn run_vcpu(id: usize, vcpu: &mut VcpuFd, shared: &Shared) -> Result<Option<End>, Error> {
    while !shared.stop.load(Ordering::SeqCst) {
        let end = match vcpu.run() {
            Ok(VcpuExit::MmioRead(addr, data)) => {
                if !shared.platform.mmio_read(addr, data) {
                    shared.bus.read(id, addr, data);
                }
                None
            }
            Ok(VcpuExit::MmioWrite(addr, data)) => {
                if !shared.platform.mmio_write(addr, data) {
                    shared.bus.write(id, addr, data);
                }
                None
            }
            #[cfg(target_arch = "x86_64")]
            Ok(VcpuExit::IoIn(port, data)) => {
                if !shared.platform.port_read(port, data) {
                    shared.ports.read(id, port.into(), data);
                }
                None
            }
            #[cfg(target_arch = "x86_64")]
            Ok(VcpuExit::IoOut(port, data)) => match shared.platform.port_write(port, data) {
                PortWrite::Ends(end) => Some(end),
                PortWrite::Taken => None,
                PortWrite::PassOn => {
                    shared.ports.write(id, port.into(), data);
                    None
                }
            },
            Ok(VcpuExit::Shutdown) => return Err(Error::TripleFault(id)),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => Some(End::PowerOff),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => Some(End::Reset),
            Ok(VcpuExit::InternalError) => {
                return Err(Error::UnexpectedExit(id, internal_error(vcpu)));
            }
            #[cfg(target_arch = "aarch64")]
            Ok(VcpuExit::Unsupported(kvm_bindings::KVM_EXIT_ARM_NISV)) => {
                arch::abort_access(vcpu).map_err(|source| Error::RunVcpu(id, source))?;
                None
            }
            Ok(exit) => return Err(Error::UnexpectedExit(id, format!("{exit:?}"))),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => None,
            Err(error) => return Err(Error::RunVcpu(id, error)),
        };
        if end.is_some() {
            return Ok(end);
        }
    }
    Ok(None)
}

/// What KVM says of an error of its own.
fn internal_error(vcpu: &mut VcpuFd) -> String {
    // SAFETY: the exit reason was `KVM_EXIT_INTERNAL_ERROR`, for which KVM fills this member.
    let internal = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal };
    let data = internal.data.get(..internal.ndata as usize).unwrap_or(&[]);
    format!("KVM internal error {}, {data:x?}", internal.suberror)
}

/// Makes the threads leave `KVM_RUN` and waits for them; returns what they tell of themselves.
fn stop_vcpus(threads: Vec<JoinHandle<Option<Vcpu>>>) -> Vec<Vcpu> {
    let stop = |thread: JoinHandle<Option<Vcpu>>| {
        // A signal that arrives just before KVM_RUN does not interrupt it, so
        // send it until the thread is gone.
        while !thread.is_finished() {
            // It fails only for a thread that is gone.
            let _ = thread.kill(SIGRTMIN());
            thread::sleep(Duration::from_millis(1));
        }
        // A panic has been printed already.
        thread.join().ok().flatten()
    };
    threads.into_iter().filter_map(stop).collect()
}

/// The signal is there to interrupt `KVM_RUN`; there is nothing to do in its handler.
extern "C" fn interrupt_vcpu(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
