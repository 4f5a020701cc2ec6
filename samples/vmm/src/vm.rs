// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The virtual machine: memory, devices, vCPU threads, and how it all ends.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
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
use kvm_bpf::file::open_regular;
use kvm_bpf::note::{Note, Space};
use kvm_bpf::{Abi, Device, ImageDevice, Map, OnLoss, OpenImage, Place, Programs, State, Window};
use kvm_ioctls::{IoEventAddress, Kvm, VcpuExit, VcpuFd, VmFd};
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_QUEUE_NOTIFY};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::arch;
#[cfg(target_arch = "x86_64")]
use crate::arch::PortWrite;
use crate::boot;
use crate::bus::{Bus, Conflict, Range, check_ranges, check_reach};
use crate::cli::{self, Args, At, Bpf, Registers};
use crate::console;
use crate::disk::Disk;
use crate::input::{self, Input};
use crate::provide::{self, Provided};
use crate::report::{ReadPage, Report, Server, Vcpu};
use crate::serial::Serial;
use crate::snapshot::{self, Machine, Snapshot, Source};
use crate::userspace::{self, uclamp};
use crate::virtio::{self, InterruptStatus};

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
    #[error("cannot have devices made of eBPF programs")]
    Abi(#[from] kvm_bpf::abi::Error),
    #[error("{0}: user-space devices, fallbacks too, are for memory, not for ports")]
    NoUserspacePorts(String),
    #[error("{}: cannot use it as a map of {device}", .path.display())]
    PinnedMap {
        device: String,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{0}: no output, as it is no ns16550a with a ring buffer \"output\"")]
    NoOutput(String),
    #[error("{}: cannot write its output there", .0.display())]
    Output(PathBuf, #[source] io::Error),
    #[error("{0}: no input, as it has no WORK program \"input\"")]
    NoInput(String),
    #[error("{}: no inputs come from there any more", .0.display())]
    Input(PathBuf, #[source] io::Error),
    #[error("{}: cannot take inputs from there", .0.display())]
    Inputs(PathBuf, #[source] io::Error),
    #[error("{0}: it has a WORK program \"{RESAMPLE}\", but no interrupt")]
    NoLevel(String),
    #[error("{0}: uio is for a line, 0 to 7, of a GPIO controller arm,pl061 in a device tree")]
    NoLine(String),
    #[error("{0}: cannot take its output")]
    TakeOutput(String, #[source] io::Error),
    #[error("{0}: cannot use it as a disk")]
    Disk(String, #[source] io::Error),
    #[error("{0}: its programs do not serve a virtio device's registers")]
    NoRegisters(String),
    #[error("{0}: has {1:#x} bytes, and a virtio device's registers are {VIRTIO_MMIO_CONFIG:#x}")]
    PastRegisters(String, u64),
    #[error("{0}: cannot map its words")]
    Words(String),
    #[error("{0}: cannot have the kernel take its notifications")]
    Ioeventfd(String, #[source] io::Error),
    #[error("{0}: no such user-space device, only {names}", names = userspace::NAMES.join(", "))]
    NoSuchDevice(String),
    #[error("{device}: has {has} interrupts, and its fallback {fallback} {needed}")]
    FallbackInterrupts {
        device: String,
        fallback: String,
        has: u32,
        needed: u32,
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
    Memory(u64, #[source] snapshot::Error),
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
    #[error("{0}: a user-space device, whose state cannot be saved")]
    NotSaved(String),
    #[error("{0}: a user-space device, whose state cannot be reset")]
    NotReset(String),
    #[error("cannot clear the guest's memory")]
    ClearMemory(#[source] snapshot::Error),
    #[error("cannot save the guest")]
    Save(#[source] boot::Error),
    #[error("cannot keep what the guest's hardware has at first")]
    Keep(#[source] boot::Error),
    #[error("cannot hold an interrupt back")]
    HoldInterrupt(#[source] io::Error),
    #[error("{}: cannot save the guest there", .0.display())]
    SaveTo(PathBuf, #[source] snapshot::Error),
    #[error("{}: cannot go on with it", .0.display())]
    Restore(PathBuf, #[source] snapshot::Error),
    #[error("{}: cannot connect to a process that hands over", .0.display())]
    Connect(PathBuf, #[source] io::Error),
    #[error("{}: cannot listen there", .0.display())]
    Listen(PathBuf, #[source] io::Error),
    #[error("cannot hand over the guest")]
    HandOver(#[source] snapshot::Error),
    #[error("cannot restore the guest's hardware")]
    RestorePlatform(#[source] boot::Error),
    #[error("cannot restore vCPU {0}")]
    RestoreVcpu(usize, #[source] boot::Error),
    #[error("cannot restore the console")]
    RestoreConsole(#[source] io::Error),
    #[error("the thread of a vCPU is gone")]
    LostVcpu,
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
    /// It goes on from a file.
    Saved,
    /// It goes on in another process.
    HandedOver,
}

impl End {
    fn describe(self) -> &'static str {
        match self {
            End::Reset => "reset",
            End::PowerOff => "power off",
            End::Saved => "saved",
            End::HandedOver => "handed over",
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
    /// But the first one is level-triggered, active high.
    pub is_level: bool,
    /// Of a GPIO controller: the line that is the interrupt of a device for programs.
    pub uio: Option<u32>,
}

/// The WORK program that runs when a guest is done with the level-triggered interrupt.
const RESAMPLE: &str = "resample";

/// An interrupt line, and what raises it.
struct Line {
    gsi: u32,
    /// Open as long as the line: when an eventfd's last fd is closed, KVM ends its irqfd.
    irq: EventFd,
    /// For a level-triggered one: what KVM signals when the guest is done.
    resample: Option<EventFd>,
}

impl Line {
    fn connect(&self, vm: &VmFd) -> Result<(), errno::Error> {
        match &self.resample {
            Some(resample) => vm.register_irqfd_with_resample(&self.irq, resample, self.gsi),
            None => vm.register_irqfd(&self.irq, self.gsi),
        }
    }

    /// Waits for the work that signals have queued, and lowers a level.
    fn disconnect(&self, vm: &VmFd) -> Result<(), errno::Error> {
        vm.unregister_irqfd(&self.irq, self.gsi)
    }
}

/// A device that the kernel serves, and the file that it came from.
struct BpfDevice {
    /// The file, as the command line has it.
    name: String,
    /// For what is in it later.
    abi: Abi,
    device: ImageDevice,
    /// Who takes what it puts out.
    serial: Option<Serial>,
    /// By interrupt.
    lines: Vec<Line>,
    /// What drives its inputs, until that begins.
    inputs: Option<input::Source>,
    /// Parameters that the command line gives it.
    params: Vec<cli::Param>,
}

/// A disk that this process serves.
struct DiskDevice {
    addr: u64,
    registers: Arc<virtio::Device>,
    /// What serves its requests, until that begins.
    disk: Option<Disk>,
    server: Option<virtio::Server>,
    /// What serves some of the registers.
    _programs: Option<ImageDevice>,
}

/// The first memory slot that a device may have; those of the guest's RAM are below.
const FIRST_DEVICE_SLOT: u32 = 16;

/// A process that wants the guest.
pub struct Taker {
    pub stream: UnixStream,
    /// Goes when this one has it, or has not: only then another one may ask.
    pub _waiting: Sender<()>,
}

/// What can happen while the guest runs.
pub enum Event {
    /// Replace the programs by those in the files now.
    Reload,
    /// Save the guest now.
    Save,
    /// Give the guest to the process at the other end.
    HandOver(Taker),
    /// An input of the device of that number is at a level.
    Input {
        device: usize,
        input: Input,
        /// Is sent something when the device knows.
        done: Sender<()>,
    },
    /// A vCPU's thread is done.
    Vcpu(Result<Option<End>, Error>),
}

/// What the guest starts from.
struct Boot {
    path: PathBuf,
    kernel: File,
    initrd: Option<File>,
    cmdline: String,
    devices: Vec<GuestDevice>,
}

/// All that a guest has when it starts, for one that starts again.
struct Start {
    boot: Boot,
    vcpus: Vec<arch::VcpuState>,
    platform: arch::PlatformState,
    console: console::State,
}

/// A VM that is ready to run.
pub struct Vm {
    vcpus: Vec<VcpuFd>,
    bpf_devices: Vec<BpfDevice>,
    disks: Vec<DiskDevice>,
    provided: Provided,
    on_loss: OnLoss,
    /// What the command line makes of it.
    machine: Machine,
    /// Bounds of the utilization of the vCPUs' threads, where there are such.
    clamps: Vec<Option<(u32, u32)>>,
    save: Option<PathBuf>,
    /// What a guest that resets goes back to, if not to its end.
    start: Option<Start>,
    shared: Arc<Shared>,
    kvm: Kvm,
    // The last ones: nothing above may outlive them.
    vm: VmFd,
    memory: GuestMemoryMmap,
}

impl Vm {
    /// Makes the VM that the command line describes.
    pub fn new(args: &Args) -> Result<Self, Error> {
        // What needs no KVM first, so that a wrong file is told from a wrong host.
        let memory_size = args.memory << 20;
        let images = args
            .bpf
            .iter()
            .map(open_device)
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
            let has = |name| note.work_index(name).is_some();
            if bpf.input.is_some() && !has("input") {
                return Err(Error::NoInput(bpf.at.what.clone()));
            }
            let mut device = guest_device(&bpf.at, region.size, note.compatible.clone());
            device.is_level = has(RESAMPLE);
            if device.is_level && note.nr_irqs == 0 {
                return Err(Error::NoLevel(bpf.at.what.clone()));
            }
            device.uio = bpf.uio;
            if device
                .uio
                .is_some_and(|line| !arch::has_line(&device, line))
            {
                return Err(Error::NoLine(bpf.at.what.clone()));
            }
            devices.push(device);
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
        let mut disks = Vec::new();
        for args in &args.disk {
            let name = &args.at.what;
            if args.at.place.space() == Space::Ports {
                return Err(Error::NoUserspacePorts(name.clone()));
            }
            let unusable = |error| Error::Disk(name.clone(), error);
            let disk = Disk::open(Path::new(name)).map_err(unusable)?;
            let image = match &args.registers {
                Registers::Programs(file) => Some(open_registers(file)?),
                Registers::Userspace | Registers::Ioeventfd => None,
            };
            let compatible = vec![virtio::COMPATIBLE.to_string()];
            devices.push(guest_device(&args.at, virtio::SIZE, compatible));
            disks.push((disk, image));
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
        let kernel = args.kernel.as_deref().map(open).transpose()?;
        let initrd = args.initrd.as_deref().map(open).transpose()?;
        let fallbacks = args.bpf.iter().filter_map(|bpf| bpf.fallback.as_ref());
        let disk_names = args.disk.iter().map(|disk| &disk.at.what);
        let models = args.userspace.iter().map(|at| &at.what);
        match models.chain(fallbacks).chain(disk_names).next() {
            Some(name) if args.moves() => return Err(Error::NotSaved(name.clone())),
            Some(name) if args.reboot => return Err(Error::NotReset(name.clone())),
            _ => (),
        }
        let restore = args.restore.as_deref();
        let saved = restore
            .map(|path| Source::open(path).map_err(|source| Error::Restore(path.into(), source)))
            .transpose()?;

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
        platform.wire(&vm).map_err(Error::Platform)?;

        let table = args.perf_table.as_ref().map(|table| table.0.as_slice());
        let provided = Provided::new(table);
        let (mut bus, mut ports) = (Bus::default(), Bus::default());
        let mut bpf_devices = Vec::new();
        let mut free_gsis = arch::DEVICE_GSIS;
        let mut free_slots = FIRST_DEVICE_SLOT..;
        let (bpf, others) = devices.split_at_mut(images.len());
        let (userspace, with_disks) = others.split_at_mut(args.userspace.len());
        let has_programs = !images.is_empty() || disks.iter().any(|(_, image)| image.is_some());
        let abi = match has_programs {
            true => Abi::from_running_kernel()?,
            false => Abi::default(),
        };
        for ((info, mut image), args) in bpf.iter_mut().zip(images).zip(&args.bpf) {
            image.set_abi(&abi);
            let name = info.range.name.clone();
            let device_error = |source| Error::Device(name.clone(), source);
            let device = Device::with_abi(&vm, &abi).map_err(device_error)?;
            let programs = image.load().map_err(|error| device_error(error.into()))?;
            provided
                .give(&programs, &args.params)
                .map_err(|error| device_error(error.into()))?;
            let lines = wire_interrupts(&vm, info, programs.note().nr_irqs, &mut free_gsis)?;
            let serial = Serial::new(&name, &programs, args.output.as_deref(), &platform)?;
            let window = programs.note().window;
            let mut builder = ImageDevice::builder(device, programs);
            for (index, line) in (0..).zip(&lines) {
                builder = builder.irq(index, &line.irq).map_err(device_error)?;
            }
            if let Some(rights) = window {
                // All of it: nothing here knows which part its driver gives it.
                let window = Window {
                    addr: arch::RAM_START,
                    size: memory_size,
                    read: rights.read,
                    write: rights.write,
                };
                builder = builder.window(0, window).map_err(device_error)?;
            }
            let fallback = args.fallback.as_deref();
            let fallback = fallback
                .map(|fallback| {
                    let irqs = lines
                        .iter()
                        .map(|line| line.irq.try_clone())
                        .collect::<Result<_, _>>();
                    let irqs = irqs.map_err(|error| Error::WireInterrupt(name.clone(), error))?;
                    create_model(fallback, irqs, &provided)
                })
                .transpose()?;
            match info.range.space {
                Space::Memory => bus.add(info.range.clone(), Server::Bpf, fallback),
                Space::Ports => ports.add(info.range.clone(), Server::Bpf, fallback),
            }
            let resample = lines.first().and_then(|line| line.resample.as_ref());
            if let Some(resample) = resample {
                builder = builder
                    .work_eventfd(RESAMPLE, resample)
                    .map_err(device_error)?;
            }
            // From here on the guest's accesses run programs.
            let mut device = builder.plug(args.at.place).map_err(device_error)?;
            for (page, slot) in (0..device.read_pages().len()).zip(&mut free_slots) {
                // Without one programs go on to give the values; the report says why.
                let _ = device.set_read_page(&vm, page, slot);
            }
            let inputs = args.input.as_deref();
            let inputs = inputs
                .map(|path| {
                    let inputs = input::Source::new(path);
                    inputs.map_err(|error| Error::Inputs(path.to_path_buf(), error))
                })
                .transpose()?;
            bpf_devices.push(BpfDevice {
                name,
                abi,
                device,
                serial,
                lines,
                inputs,
                params: args.params.clone(),
            });
        }
        for (info, nr_irqs) in userspace.iter_mut().zip(userspace_irqs) {
            let lines = wire_interrupts(&vm, info, nr_irqs, &mut free_gsis)?;
            let irqs = lines.into_iter().map(|line| line.irq).collect();
            let model = create_model(&info.range.name, irqs, &provided)?;
            bus.add(info.range.clone(), Server::Userspace, Some(model));
        }
        let mut disk_devices = Vec::new();
        for ((info, (disk, image)), args) in with_disks.iter_mut().zip(disks).zip(&args.disk) {
            let line = wire_interrupt(&vm, &info.range.name, false, &mut free_gsis)?;
            info.gsis.push(line.gsi);
            let server = match image {
                Some(_) => Server::Bpf,
                None => Server::Userspace,
            };
            let device = DiskDevice::new(&vm, args, disk, image, abi, line.irq)?;
            let registers = virtio::Registers(Arc::clone(&device.registers));
            bus.add(info.range.clone(), server, Some(Box::new(registers)));
            disk_devices.push(device);
        }

        let machine = Machine {
            cpus: args.cpus,
            memory: args.memory,
            perf_table: provided.perf_table.clone(),
            devices: devices[..bpf_devices.len()]
                .iter()
                .map(Into::into)
                .collect(),
        };
        for (id, vcpu) in (0..).zip(&vcpus) {
            arch::setup_vcpu(&kvm, &vm, vcpu, id, args.cpus)
                .map_err(|source| Error::SetupVcpu(id, source))?;
        }
        let shared_memory = args.hand_over.is_some();
        let no_memory = |source| Error::Memory(args.memory, source);
        let mut vm = Vm {
            clamps: vec![None; vcpus.len()],
            vcpus,
            bpf_devices,
            disks: disk_devices,
            provided,
            on_loss: match args.reload_fresh {
                true => OnLoss::Accept,
                false => OnLoss::Refuse,
            },
            machine,
            save: args.save.clone(),
            start: None,
            shared: Arc::new(Shared {
                bus,
                ports,
                platform,
                stop: AtomicBool::new(false),
            }),
            kvm,
            vm,
            memory: GuestMemoryMmap::default(),
        };
        if let (Some(path), Some(kernel)) = (&args.kernel, kernel) {
            let cmdline = format!("{} {}", arch::CMDLINE, args.append);
            let mut boot = Boot {
                path: path.clone(),
                kernel,
                initrd,
                cmdline: cmdline.trim_end().to_string(),
                devices,
            };
            vm.set_memory(snapshot::create_memory(memory_size, shared_memory).map_err(no_memory)?)?;
            // What is kept is that of CPUs which have not been told where to begin.
            let start = args
                .reboot
                .then(|| vm.hardware().map_err(Error::Keep))
                .transpose()?;
            vm.load(&mut boot)?;
            vm.start = start.map(|(vcpus, platform, console)| Start {
                boot,
                vcpus,
                platform,
                console,
            });
        }
        let own_table = args.perf_table.is_some();
        if let (Some(path), Some(saved)) = (&args.restore, saved) {
            vm.restore(path, &saved, own_table, shared_memory)?;
            vm.access_memory()?;
        }
        if let Some(path) = &args.take_over {
            // The guest stands still from here on.
            let stream =
                UnixStream::connect(path).map_err(|error| Error::Connect(path.clone(), error))?;
            let failed = |source| Error::Restore(path.clone(), source);
            let source = Source::receive(&stream).map_err(failed)?;
            vm.restore(path, &source, own_table, shared_memory)?;
            snapshot::take(&stream).map_err(failed)?;
            // Until now the guest's memory was the other's.
            vm.access_memory()?;
        }
        Ok(vm)
    }

    /// Gives the VM its memory.
    fn set_memory(&mut self, memory: GuestMemoryMmap) -> Result<(), Error> {
        self.memory = memory;
        for (slot, region) in self.memory.iter().enumerate() {
            let kvm_region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the region is mapped memory of that size, and `self` keeps the
            // mapping until the vCPUs' threads, the only ones to use it, are gone.
            unsafe { self.vm.set_user_memory_region(kvm_region) }.map_err(Error::SetMemory)?;
        }
        Ok(())
    }

    /// Has the first vCPU of a VM whose memory is zeroes begin with the kernel.
    fn load(&self, boot: &mut Boot) -> Result<(), Error> {
        let entry = arch::load(
            &self.memory,
            &mut boot.kernel,
            boot.initrd.as_mut(),
            &boot.cmdline,
            self.machine.cpus,
            &boot.devices,
        )
        .map_err(|source| Error::Load(boot.path.clone(), source))?;
        arch::enter(&self.vcpus[0], entry).map_err(|source| Error::SetupVcpu(0, source))
    }

    /// The state of stopped vCPUs, of what no vCPU has for itself, and of the console.
    fn hardware(
        &self,
    ) -> Result<(Vec<arch::VcpuState>, arch::PlatformState, console::State), boot::Error> {
        let platform = &self.shared.platform;
        let saved = platform.save(&self.vm, &self.vcpus)?;
        let vcpus = self.vcpus.iter();
        let vcpus = vcpus.map(|vcpu| arch::VcpuState::save(&self.kvm, vcpu));
        let (console, _) = platform.console_line();
        Ok((vcpus.collect::<Result<_, _>>()?, saved, console.save()))
    }

    /// Starts the guest again, when its vCPUs have stopped.
    fn reboot(&mut self, start: &mut Start) -> Result<(), Error> {
        let platform = &self.shared.platform;
        let (console, _) = platform.console_line();
        let mut kept = Vec::new();
        self.hold_interrupts(|lines| {
            for device in &self.bpf_devices {
                if !device.reset()? {
                    kept.push(device.name.as_str());
                }
            }
            for ((id, vcpu), new) in (0..).zip(&self.vcpus).zip(&start.vcpus) {
                arch::setup_vcpu(&self.kvm, &self.vm, vcpu, id, self.machine.cpus)
                    .and_then(|()| new.restore(vcpu))
                    .map_err(|source| Error::RestoreVcpu(id.into(), source))?;
            }
            platform
                .restore(&self.vm, &self.vcpus, &start.platform)
                .map_err(Error::RestorePlatform)?;
            console
                .restore(&start.console)
                .map_err(Error::RestoreConsole)?;
            // Nobody is there who asked for these.
            for line in lines {
                match line.irq.read() {
                    Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                        return Err(Error::HoldInterrupt(error));
                    }
                    _ => (),
                }
            }
            snapshot::clear_memory(&self.memory).map_err(Error::ClearMemory)?;
            self.load(&mut start.boot)?;
            start
                .platform
                .restore_clock(&self.vm, &self.vcpus)
                .map_err(Error::RestorePlatform)
        })?;
        let kept = match kept.as_slice() {
            [] => String::new(),
            names => format!("; not reset: {}", names.join(", ")),
        };
        crate::say(&format!("kvm-bpf-vmm: the guest starts again{kept}"));
        self.clamps.fill(None);
        Ok(())
    }

    /// Makes a VM that has not run go on with a saved guest, all but [`Self::access_memory`].
    ///
    /// Frequencies are the saved VM's, if they are not the command line's own.
    fn restore(
        &mut self,
        path: &Path,
        source: &Source,
        own_table: bool,
        shared_memory: bool,
    ) -> Result<(), Error> {
        let failed = |source| Error::Restore(path.to_path_buf(), source);
        let saved = &source.snapshot;
        if !own_table {
            self.machine.perf_table = saved.machine.perf_table.clone();
            self.provided.perf_table = saved.machine.perf_table.clone();
        }
        saved.check(&self.machine).map_err(failed)?;
        let memory = source.memory(self.machine.memory << 20, shared_memory);
        self.set_memory(memory.map_err(failed)?)?;
        for (id, (vcpu, saved)) in self.vcpus.iter().zip(&saved.vcpus).enumerate() {
            let restored = saved.state.restore(vcpu);
            restored.map_err(|source| Error::RestoreVcpu(id, source))?;
            self.clamps[id] = saved.uclamp;
        }
        // Interrupts come from here on, so there must be something that takes them.
        let platform = &self.shared.platform;
        platform
            .restore(&self.vm, &self.vcpus, &saved.platform)
            .map_err(Error::RestorePlatform)?;
        let (console, _) = platform.console_line();
        console
            .restore(&saved.console)
            .map_err(Error::RestoreConsole)?;
        for (device, state) in self.bpf_devices.iter_mut().zip(&saved.devices) {
            device.restore(&self.provided, state)?;
        }
        saved
            .platform
            .restore_clock(&self.vm, &self.vcpus)
            .map_err(Error::RestorePlatform)
    }

    /// Has the devices go on that access the memory of a restored guest: with requests of it, say.
    fn access_memory(&self) -> Result<(), Error> {
        let mut devices = self.bpf_devices.iter();
        devices.try_for_each(|device| match device.accesses_memory() {
            true => device.resume(),
            false => Ok(()),
        })
    }

    /// Gives `take` all of the guest but its memory, when its vCPUs have stopped. Where that fails,
    /// the devices go on here.
    fn give(&self, take: impl FnOnce(&Snapshot) -> Result<(), Error>) -> Result<(), Error> {
        let mut saved = 0;
        // The devices first: one that is to interrupt the guest after this does so when it is
        // restored, and one that already has is no longer asked.
        let states = self.bpf_devices.iter().map(|device| {
            let state = device.save()?;
            saved += 1;
            Ok(state)
        });
        let states = states.collect::<Result<_, _>>();
        let given = states.and_then(|states| take(&self.snapshot(states)?));
        if given.is_err() {
            // Saving has stopped their timers.
            for device in &self.bpf_devices[..saved] {
                if let Err(error) = device.resume() {
                    crate::print_error("a device does not go on", &error);
                }
            }
        }
        given
    }

    /// Reads all of the guest but its memory, whose devices have been saved.
    fn snapshot(&self, devices: Vec<State>) -> Result<Snapshot, Error> {
        let platform = &self.shared.platform;
        let (console, _) = platform.console_line();
        let (platform, vcpus) = self.hold_interrupts(|_| {
            let platform = platform.save(&self.vm, &self.vcpus);
            let vcpus = self.vcpus.iter().zip(&self.clamps);
            let vcpus = vcpus.map(|(vcpu, clamp)| {
                Ok(snapshot::Vcpu {
                    state: arch::VcpuState::save(&self.kvm, vcpu)?,
                    uclamp: *clamp,
                })
            });
            let vcpus: Result<_, _> = vcpus.collect();
            Ok((platform.map_err(Error::Save)?, vcpus.map_err(Error::Save)?))
        })?;
        Ok(Snapshot {
            machine: self.machine.clone(),
            platform,
            console: console.save(),
            vcpus,
            devices,
        })
    }

    /// Does something while no interrupt of a device is on its way to the interrupt controller.
    ///
    /// What has been signalled before has arrived there; what is signalled meanwhile waits. Lines of
    /// levels go down: a device that still wants its interrupt signals again when it goes on.
    fn hold_interrupts<T>(
        &self,
        work: impl FnOnce(&[&Line]) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let (console, gsi) = self.shared.platform.console_line();
        let console = Line {
            gsi,
            irq: console.irq().map_err(Error::HoldInterrupt)?,
            resample: None,
        };
        let lines = self.bpf_devices.iter().flat_map(|device| &device.lines);
        let lines: Vec<_> = lines.chain([&console]).collect();
        let mut held = 0;
        let mut holding = Ok(());
        for line in &lines {
            holding = line.disconnect(&self.vm);
            if holding.is_err() {
                break;
            }
            held += 1;
        }
        let failed = |error: errno::Error| Error::HoldInterrupt(error.into());
        let result = holding.map_err(failed).and_then(|()| work(&lines));
        let mut connected = Ok(());
        for line in &lines[..held] {
            connected = connected.and(line.connect(&self.vm));
        }
        let value = result?;
        connected.map_err(failed)?;
        Ok(value)
    }

    /// Runs the guest to its end, or until it goes on elsewhere.
    ///
    /// Others may send events through `sender`.
    pub fn run(mut self, sender: Sender<Event>, events: Receiver<Event>) -> Result<Report, Error> {
        register_signal_handler(SIGRTMIN(), interrupt_vcpu).map_err(Error::Signal)?;
        for (index, device) in self.bpf_devices.iter_mut().enumerate() {
            if let Some(inputs) = device.inputs.take() {
                inputs.start(index, sender.clone())?;
            }
        }
        for disk in &mut self.disks {
            disk.start(&self.memory)?;
        }
        let (mut reloads, mut reboots) = (0, 0);
        let mut waiting = VecDeque::new();
        let end = loop {
            let stop = match self.run_vcpus(&sender, &events, &mut waiting, &mut reloads) {
                Ok(stop) => stop,
                Err(error) => break Err(error),
            };
            if let Some(end) = stop.end {
                let Some(mut start) = self.start.take_if(|_| end == End::Reset) else {
                    break Ok(end);
                };
                if let Err(error) = self.reboot(&mut start) {
                    break Err(error);
                }
                self.start = Some(start);
                reboots += 1;
            }
            let moved = match stop.request {
                None => continue,
                Some(Request::Swap(pausing)) => {
                    for (index, programs) in pausing {
                        reloads += self.bpf_devices[index].swap(programs, self.on_loss);
                    }
                    continue;
                }
                Some(Request::Save(path)) => self
                    .give(|snapshot| {
                        let saved = snapshot.save(&path, &self.memory);
                        saved.map_err(|source| Error::SaveTo(path, source))
                    })
                    .map(|()| End::Saved),
                Some(Request::HandOver(taker)) => self
                    .give(|snapshot| self.hand_over(snapshot, &taker.stream))
                    .map(|()| End::HandedOver),
            };
            match moved {
                Ok(end) => break Ok(end),
                Err(error) => crate::print_error("the guest goes on here", &error),
            }
        };

        let lost =
            |device: &mut BpfDevice| Some(device.serial.take()?.finish(device.device.programs()));
        let mut console_bytes_lost: u64 = self.bpf_devices.iter_mut().filter_map(lost).sum();
        let shared = &self.shared;
        console_bytes_lost += shared.platform.finish();
        let mut devices = shared.bus.report();
        devices.extend(shared.ports.report());
        for device in &self.bpf_devices {
            let place = device.device.place();
            let mut here = devices.iter_mut();
            if let Some(entry) = here.find(|entry| entry.is_at(place.space(), place.addr())) {
                entry.set_read_pages(device.read_pages());
            }
        }
        for disk in &self.disks {
            let mut here = devices.iter_mut();
            let entry = here.find(|entry| entry.is_at(Space::Memory, disk.addr));
            if let (Some(entry), Some(server)) = (entry, &disk.server) {
                entry.set_requests(server.requests());
            }
        }
        let vcpus = self.clamps.iter().enumerate().filter_map(|(id, clamp)| {
            let (uclamp_min, uclamp_max) = (*clamp)?;
            Some(Vcpu {
                id,
                uclamp_min,
                uclamp_max,
            })
        });
        end.map(|end| Report {
            end: end.describe(),
            reloads,
            reboots,
            unclaimed_exits: shared.bus.unclaimed(),
            console_bytes_lost,
            devices,
            vcpus: vcpus.collect(),
        })
    }

    /// Runs the vCPUs until there is something to do that needs them stopped; then they have
    /// completed what they were at.
    ///
    /// `waiting` are events from the time in which they stopped.
    fn run_vcpus(
        &mut self,
        sender: &Sender<Event>,
        events: &Receiver<Event>,
        waiting: &mut VecDeque<Event>,
        reloads: &mut u64,
    ) -> Result<Stop, Error> {
        let count = self.vcpus.len();
        self.shared.stop.store(false, Ordering::SeqCst);
        let mut threads = Vec::new();
        let mut started = Ok(());
        let vcpus = self.vcpus.drain(..).zip(&self.clamps).enumerate();
        for (id, (vcpu, clamp)) in vcpus {
            match start_vcpu(id, vcpu, *clamp, self.shared.clone(), sender.clone()) {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    started = Err(error);
                    break;
                }
            }
        }
        let request = |request| Stop {
            request: Some(request),
            end: None,
        };
        let mut stop = started.and_then(|()| {
            loop {
                let event = waiting.pop_front().map_or_else(|| events.recv(), Ok);
                match event {
                    Ok(Event::Reload) => {
                        let (count, pausing) = self.reload();
                        *reloads += count;
                        if !pausing.is_empty() {
                            break Ok(request(Request::Swap(pausing)));
                        }
                    }
                    Ok(Event::Save) => {
                        if let Some(path) = &self.save {
                            break Ok(request(Request::Save(path.clone())));
                        }
                    }
                    Ok(Event::HandOver(taker)) => {
                        break Ok(request(Request::HandOver(taker)));
                    }
                    Ok(Event::Input {
                        device,
                        input,
                        done,
                    }) => {
                        if let Err(error) = self.bpf_devices[device].input(input) {
                            crate::print_error("input", &error);
                        }
                        // Nobody waits where the file's thread is gone.
                        let _ = done.send(());
                    }
                    Ok(Event::Vcpu(Ok(None))) => (),
                    Ok(Event::Vcpu(Ok(end @ Some(_)))) => break Ok(Stop { request: None, end }),
                    Ok(Event::Vcpu(Err(error))) => break Err(error),
                    Err(mpsc::RecvError) => unreachable!("the caller holds a sender"),
                }
            }
        });

        // Also those that run while another one could not be started.
        self.shared.stop.store(true, Ordering::SeqCst);
        for (id, stopped) in stop_vcpus(threads).into_iter().enumerate() {
            self.vcpus.push(stopped.vcpu);
            self.clamps[id] = stopped.clamp;
        }
        if self.vcpus.len() < count {
            return stop.and(Err(Error::LostVcpu));
        }
        // The guest may have ended as its vCPUs stopped.
        while let Ok(event) = events.try_recv() {
            match event {
                Event::Vcpu(Ok(None)) => (),
                Event::Vcpu(Ok(end)) => stop = stop.map(|stop| Stop { end, ..stop }),
                Event::Vcpu(Err(error)) => stop = stop.and(Err(error)),
                other => waiting.push_back(other),
            }
        }
        stop
    }

    /// Replaces the programs of all devices whose files allow it. Returns how many it replaced, and
    /// by number the devices that have to wait until the vCPUs have stopped.
    fn reload(&mut self) -> (u64, Vec<(usize, Programs)>) {
        let (mut reloads, mut pausing) = (0, Vec::new());
        for (index, device) in self.bpf_devices.iter_mut().enumerate() {
            match device.load(&self.provided, self.on_loss) {
                Ok((programs, true)) => pausing.push((index, programs)),
                Ok((programs, false)) => reloads += device.swap(programs, self.on_loss),
                Err(error) => crate::print_error("reload", &error),
            }
        }
        (reloads, pausing)
    }

    fn hand_over(&self, snapshot: &Snapshot, stream: &UnixStream) -> Result<(), Error> {
        let memory = snapshot::memory_file(&self.memory)
            .ok_or(snapshot::Error::Memory("it is no file"))
            .map_err(Error::HandOver)?;
        snapshot.send(stream, memory).map_err(Error::HandOver)
    }
}

/// Why the vCPUs have stopped: for one of both reasons, or for both.
struct Stop {
    /// The guest has ended.
    end: Option<End>,
    /// There is something to do. Where the guest starts again, that comes first.
    request: Option<Request>,
}

/// What needs the vCPUs stopped.
enum Request {
    /// The guest is to be saved.
    Save(PathBuf),
    /// It is to go on at the other end.
    HandOver(Taker),
    /// Devices are to have other programs, by number.
    Swap(Vec<(usize, Programs)>),
}

impl DiskDevice {
    /// Plugs a disk into the VM. `image` is there if the command line says so.
    fn new(
        vm: &VmFd,
        args: &cli::Disk,
        disk: Disk,
        image: Option<OpenImage>,
        abi: Abi,
        interrupt: EventFd,
    ) -> Result<Self, Error> {
        let name = &args.at.what;
        let addr = args.at.place.addr();
        let no_ioeventfd = |error: errno::Error| Error::Ioeventfd(name.clone(), error.into());
        let notified = EventFd::new(0).map_err(|error| Error::Disk(name.clone(), error))?;
        if args.registers == Registers::Ioeventfd {
            let notify = IoEventAddress::Mmio(addr + u64::from(VIRTIO_MMIO_QUEUE_NOTIFY));
            vm.register_ioevent(&notified, &notify, 0_u32)
                .map_err(no_ioeventfd)?;
        }
        let (mut status, mut programs) = (InterruptStatus::own(), None);
        if let (Some(mut image), Registers::Programs(file)) = (image, &args.registers) {
            let failed = |source| Error::Device(file.clone(), source);
            let device = Device::with_abi(vm, &abi).map_err(failed)?;
            image.set_abi(&abi);
            let loaded = image.load().map_err(|error| failed(error.into()))?;
            let map = loaded.map(virtio::STATUS_MAP);
            let map = map.ok_or_else(|| Error::NoRegisters(file.clone()))?;
            let words = map.words().ok_or_else(|| Error::Words(file.clone()))?;
            status = InterruptStatus::Map(Arc::clone(words));
            let builder = ImageDevice::builder(device, loaded).signal(0, &notified);
            let device = builder.and_then(|builder| builder.plug(args.at.place));
            programs = Some(device.map_err(failed)?);
        }
        let registers = virtio::Device::new(disk.kind(), status, interrupt, notified);
        Ok(DiskDevice {
            addr,
            registers: Arc::new(registers),
            disk: Some(disk),
            server: None,
            _programs: programs,
        })
    }

    /// Begins to serve its requests.
    fn start(&mut self, memory: &GuestMemoryMmap) -> Result<(), Error> {
        if let Some(mut disk) = self.disk.take() {
            let serve = move |request: virtio::Request<'_>| disk.serve(request);
            let server = virtio::Server::start("disk", &self.registers, memory, serve);
            self.server = Some(server.map_err(Error::Thread)?);
        }
        Ok(())
    }
}

impl BpfDevice {
    /// Reads its programs' state.
    fn save(&self) -> Result<State, Error> {
        self.device.save().map_err(|source| self.error(source))
    }

    /// Puts it into the state of a new one; returns whether its programs can.
    fn reset(&self) -> Result<bool, Error> {
        self.device.reset().map_err(|source| self.error(source))
    }

    /// Has one of its inputs be at a level.
    fn input(&self, input: Input) -> Result<(), Error> {
        let Input { line, level } = input;
        match self.device.input(line, level) {
            Ok(true) => Ok(()),
            // A file that it was replaced by may have no such program.
            Ok(false) => Err(Error::NoInput(self.name.clone())),
            Err(source) => Err(self.error(source)),
        }
    }

    fn error(&self, source: kvm_bpf::device::Error) -> Error {
        Error::Device(self.name.clone(), source)
    }

    /// Has its programs go on here after all.
    fn resume(&self) -> Result<(), Error> {
        self.device.resume().map_err(|source| self.error(source))
    }

    /// Has its programs go on from a state, with what they cannot know on this host. Those that
    /// access guest memory go on with [`Self::resume`].
    fn restore(&mut self, provided: &Provided, state: &State) -> Result<(), Error> {
        self.give(provided, self.device.programs())?;
        let restored = match self.accesses_memory() {
            true => self.device.prepare(state),
            false => self.device.restore(state),
        };
        restored.map_err(|source| self.error(source))
    }

    /// Gives its programs, or those that replace them, their parameters.
    fn give(&self, provided: &Provided, programs: &Programs) -> Result<(), Error> {
        let given = provided.give(programs, &self.params);
        given.map_err(|source| self.error(source.into()))
    }

    fn accesses_memory(&self) -> bool {
        self.device.programs().note().window.is_some()
    }

    fn read_pages(&self) -> Vec<ReadPage> {
        let pages = self.device.read_pages().iter();
        pages
            .map(|page| ReadPage {
                addr: page.addr(),
                size: page.size(),
                slot: page.slot().is_some(),
                why_not: page.why_no_slot().map(|why| why.to_string()),
            })
            .collect()
    }

    /// Loads what is in its file now; also says whether the vCPUs must be paused for it.
    fn load(&mut self, provided: &Provided, on_loss: OnLoss) -> Result<(Programs, bool), Error> {
        crate::forget_warnings();
        let mut image = open_image(&self.name)?;
        image.set_abi(&self.abi);
        let loaded = self.device.load(image, on_loss);
        let programs = loaded.map_err(|source| self.error(source))?;
        let changes = self.device.changes(&programs, on_loss);
        let changes = changes.map_err(|source| self.error(source))?;
        self.give(provided, &programs)?;
        Ok((programs, changes.needs_pause()))
    }

    /// Goes over to these programs; no vCPU is in `KVM_RUN` if they need that. Returns how many
    /// reloads that makes: one, or none where the old programs go on.
    fn swap(&mut self, programs: Programs, on_loss: OnLoss) -> u64 {
        match self.device.swap(programs, on_loss, |swap| swap()) {
            Ok(changes) => {
                crate::say(&format!("kvm-bpf-vmm: reload: {}: {changes}", self.name));
                if let Some(serial) = &mut self.serial
                    && let Err(error) = serial.follow(&self.name, self.device.programs())
                {
                    crate::print_error("reload", &error);
                }
                1
            }
            Err(source) => {
                let swapped = matches!(source, kvm_bpf::device::Error::Swapped { .. });
                crate::print_error("reload", &self.error(source));
                u64::from(swapped)
            }
        }
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

fn open_image(name: &str) -> Result<OpenImage, Error> {
    OpenImage::open_file(Path::new(name))
        .map_err(|source| Error::Device(name.to_string(), source.into()))
}

/// Opens the file of a device, which has the maps that the command line says.
fn open_device(bpf: &Bpf) -> Result<OpenImage, Error> {
    let name = &bpf.at.what;
    let mut image = open_image(name)?;
    for (map, path) in &bpf.maps {
        let pinned = Map::from_pinned(path).map_err(|source| Error::PinnedMap {
            device: name.clone(),
            path: path.clone(),
            source,
        })?;
        image
            .share_map(map, &pinned)
            .map_err(|source| Error::Device(name.clone(), source.into()))?;
    }
    Ok(image)
}

/// Opens a file that serves registers of a virtio device.
fn open_registers(name: &str) -> Result<OpenImage, Error> {
    let image = open_image(name)?;
    let note = image.note();
    if !note.compatible.iter().any(|own| own == virtio::PROGRAMS) {
        return Err(Error::NoRegisters(name.to_string()));
    }
    check_registers(name, note)?;
    Ok(image)
}

/// Checks that programs serve registers in memory only, and not a device's configuration.
fn check_registers(name: &str, note: &Note) -> Result<(), Error> {
    let region = only_region(note, Space::Memory)
        .map_err(|source| Error::Device(name.to_string(), source))?;
    if region.size > VIRTIO_MMIO_CONFIG.into() {
        return Err(Error::PastRegisters(name.to_string(), region.size));
    }
    Ok(())
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

fn guest_device(at: &At, size: u64, compatible: Vec<String>) -> GuestDevice {
    GuestDevice {
        range: match at.place {
            Place::Memory(addr) => Range::new(&at.what, addr, size),
            Place::Port(port) => Range::of_ports(&at.what, port, size),
        },
        compatible,
        gsis: Vec::new(),
        is_level: false,
        uio: None,
    }
}

/// Gives a device its interrupt lines.
fn wire_interrupts(
    vm: &VmFd,
    device: &mut GuestDevice,
    count: u32,
    free: &mut impl Iterator<Item = u32>,
) -> Result<Vec<Line>, Error> {
    let mut lines = Vec::new();
    for index in 0..count {
        let is_level = device.is_level && index == 0;
        let line = wire_interrupt(vm, &device.range.name, is_level, free)?;
        device.gsis.push(line.gsi);
        lines.push(line);
    }
    Ok(lines)
}

/// Takes an interrupt line and makes an eventfd that raises it.
fn wire_interrupt(
    vm: &VmFd,
    device: &str,
    is_level: bool,
    free: &mut impl Iterator<Item = u32>,
) -> Result<Line, Error> {
    let gsi = free
        .next()
        .ok_or_else(|| Error::NoInterruptLine(device.to_string()))?;
    let eventfd = || EventFd::new(libc::EFD_NONBLOCK);
    let wire = || {
        let line = Line {
            gsi,
            irq: eventfd()?,
            resample: is_level.then(eventfd).transpose()?,
        };
        line.connect(vm)?;
        Ok(line)
    };
    wire().map_err(|source: io::Error| Error::WireInterrupt(device.to_string(), source))
}

/// What all vCPU threads use.
struct Shared {
    bus: Bus,
    ports: Bus,
    platform: arch::Platform,
    stop: AtomicBool,
}

/// A vCPU whose thread is gone.
struct Stopped {
    vcpu: VcpuFd,
    /// Bounds of the utilization that the scheduler assumed for the thread.
    clamp: Option<(u32, u32)>,
}

fn start_vcpu(
    id: usize,
    mut vcpu: VcpuFd,
    clamp: Option<(u32, u32)>,
    shared: Arc<Shared>,
    sender: Sender<Event>,
) -> Result<JoinHandle<Stopped>, Error> {
    thread::Builder::new()
        .name(format!("vcpu{id}"))
        .spawn(move || {
            // What the thread had of a guest that goes on. A host need not have clamps.
            if let Some((min, max)) = clamp {
                let _ = uclamp::set_current(min, max);
            }
            let result = catch_unwind(AssertUnwindSafe(|| run_vcpu(id, &mut vcpu, &shared)))
                .unwrap_or_else(|_| Err(Error::UnexpectedExit(id, "its thread panicked".into())));
            // Nobody listens any more when another vCPU ended the guest first.
            let _ = sender.send(Event::Vcpu(result));
            // A thread may ask this of itself as long as it is there, so at its end.
            let clamp = uclamp::of_thread(0).ok();
            Stopped { vcpu, clamp }
        })
        .map_err(Error::Thread)
}

/// Runs a vCPU until the guest ends; `None` when it is to stop, with its last access completed.
fn run_vcpu(id: usize, vcpu: &mut VcpuFd, shared: &Shared) -> Result<Option<End>, Error> {
    loop {
        // KVM completes an access when it is called again, and with this it does no more. There may
        // be another exit for the same access.
        let stop = shared.stop.load(Ordering::SeqCst);
        vcpu.set_kvm_immediate_exit(stop.into());
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
            Err(error) if stop && error.errno() == libc::EINTR => return Ok(None),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => None,
            Err(error) => return Err(Error::RunVcpu(id, error)),
        };
        if end.is_some() {
            return Ok(end);
        }
    }
}

/// What KVM says of an error of its own.
fn internal_error(vcpu: &mut VcpuFd) -> String {
    // SAFETY: the exit reason was `KVM_EXIT_INTERNAL_ERROR`, for which KVM fills this member.
    let internal = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal };
    let data = internal.data.get(..internal.ndata as usize).unwrap_or(&[]);
    format!("KVM internal error {}, {data:x?}", internal.suberror)
}

/// Makes the threads leave `KVM_RUN` and waits for them; returns the vCPUs.
fn stop_vcpus(threads: Vec<JoinHandle<Stopped>>) -> Vec<Stopped> {
    let stop = |thread: JoinHandle<Stopped>| {
        // A signal that arrives just before KVM_RUN does not interrupt it, so
        // send it until the thread is gone.
        while !thread.is_finished() {
            // It fails only for a thread that is gone.
            let _ = thread.kill(SIGRTMIN());
            thread::sleep(Duration::from_millis(1));
        }
        // A panic has been printed already.
        thread.join().ok()
    };
    threads.into_iter().filter_map(stop).collect()
}

/// The signal is there to interrupt `KVM_RUN`; there is nothing to do in its handler.
extern "C" fn interrupt_vcpu(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use kvm_bpf::note::Range;

    use super::*;

    fn note(space: Space, size: u64) -> Note {
        let mut note = Note::default();
        note.compatible.push(virtio::PROGRAMS.to_string());
        note.ranges.push(Range::new(space, 0, size));
        note
    }

    #[test]
    fn programs_for_registers_end_where_the_configuration_begins() {
        for size in [0x68, 0x100] {
            check_registers("a.o", &note(Space::Memory, size)).unwrap();
        }
        let error = check_registers("a.o", &note(Space::Memory, 0x101)).unwrap_err();
        let wanted = "a.o: has 0x101 bytes, and a virtio device's registers are 0x100";
        assert_eq!(error.to_string(), wanted);
        let error = check_registers("a.o", &note(Space::Ports, 0x100)).unwrap_err();
        let why = error.source().unwrap().to_string();
        assert!(why.contains("ports"), "{why}");
    }
}
