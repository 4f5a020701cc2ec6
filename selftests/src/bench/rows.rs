// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What is measured: every row is a guest, something that handles its accesses, and a loop.

use std::any::Any;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use kvm_bpf::uapi::{KVM_BPF_MEM_READ, KVM_DEV_BPF_ATTR_GROUP_MEM, kvm_bpf_user_mem};
use kvm_bpf::{Device, ImageDevice, Place};
use kvm_bpf_selftests::bpf::{
    Index, Insn, Map, Prog, ProgType, Reg, add_imm, atomic_add, call_kfunc, kfunc, lookup, mov,
    mov_imm, store_imm,
};
use kvm_bpf_selftests::device::{self, region, work};
use kvm_bpf_selftests::guest::{Access, Args, Guest, RAM_SIZE, Routine, Vcpu};
use kvm_bpf_selftests::programs::{answer_insns, loaded, ret, sample};
use kvm_bpf_vmm::userspace;
use kvm_ioctls::{IoEventAddress, NoDatamatch};
use vmm_sys_util::eventfd::EventFd;

use crate::block;
use crate::echo::{self, Server};
use crate::host::{self, run_at_once, run_in_turn};
use crate::request::{self, Way};

/// Where the guest's loop accesses what is measured.
pub const ADDR: u64 = 0xd000_0000;
const SIZE: u64 = 0x1000;
/// The port of the floor, which no chip of KVM's has.
#[cfg(target_arch = "x86_64")]
const PORT: u64 = 0x500;

/// Frequencies in kHz, of the device that wants some.
const PERF_TABLE: [u32; 3] = [500_000, 1_000_000, 2_000_000];

/// The most regions that one device has.
const REGIONS_PER_DEVICE: u64 = 256;

/// The kind of access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Write,
    Read,
}

/// What an eBPF program does.
#[derive(Clone, Copy, Debug)]
pub enum Program {
    /// As little as it can.
    Smallest,
    /// The same; it might sleep.
    Sleepable,
    /// Looks an element of an array up, which the verifier makes instructions of the program's.
    Array,
    /// Looks an element of a hash table up, which is a call.
    Hash,
    /// Counts in an array that all vCPUs share.
    Count,
    /// Signals an interrupt, as an eventfd that nobody waits for.
    Irq,
    /// Reads a word of 2 bytes of guest memory; it might sleep.
    GuestWord,
    /// The same with a page.
    GuestPage,
}

/// Who handles an access.
#[derive(Clone, Copy, Debug)]
pub enum Handler {
    Program(Program),
    /// An eventfd: nobody waits, or a thread does.
    Ioeventfd {
        waiter: bool,
    },
    /// The loop around `KVM_RUN`.
    User,
    /// So many regions side by side, of which the loop accesses one after the other.
    Regions {
        count: u64,
        size: u64,
    },
    /// A sample device, and its model in user space.
    Sample {
        name: &'static str,
        offset: u64,
        user: bool,
    },
    /// The loop around `KVM_RUN`, which wakes up a thread by an eventfd and waits for another one:
    /// the device's, on which a program runs, or one of ours. Both have a real-time policy, or
    /// are "fair", as threads are by default.
    RoundTrip {
        device: bool,
        fair: bool,
    },
    /// The device of `Documentation/choosing.md`, with an interrupt or without.
    Echo {
        server: Server,
        irq: bool,
    },
    /// The registers of a virtio device in user space, once per request.
    Request {
        way: Way,
        at_once: bool,
    },
    /// A disk in memory, served in several ways.
    Block(block::Kind),
    /// The sample device with a page that the guest reads itself; or does not, all the same.
    Page {
        slot: bool,
    },
    /// KVM alone, at an instruction that always exits.
    Exit,
    /// An eventfd at a port: what KVM hands on without emulating an instruction.
    #[cfg(target_arch = "x86_64")]
    Port,
    /// The smallest program there.
    #[cfg(target_arch = "x86_64")]
    PortProgram,
}

/// What kind of guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// Interrupt controllers are user space's; paging is on, where KVM has to look.
    Plain,
    /// Interrupt controllers are KVM's.
    Irqchip,
    /// As plain, with paging off: KVM's emulator needs no walk to fetch the instruction, as with
    /// processors that say what it was.
    #[cfg(target_arch = "x86_64")]
    Unpaged,
}

impl Machine {
    const ALL: &[Machine] = &[
        Machine::Plain,
        Machine::Irqchip,
        #[cfg(target_arch = "x86_64")]
        Machine::Unpaged,
    ];

    fn suffix(self) -> &'static str {
        match self {
            Machine::Plain => "",
            Machine::Irqchip => "/irqchip",
            #[cfg(target_arch = "x86_64")]
            Machine::Unpaged => "/unpaged",
        }
    }
}

/// One line of the table.
#[derive(Clone, Debug)]
pub struct Row {
    pub name: String,
    pub what: &'static str,
    pub handler: Handler,
    direction: Direction,
    machine: Machine,
}

/// All of them, in the table's order.
pub fn all() -> Vec<Row> {
    use Direction::{Read, Write};

    let mut rows = Vec::new();
    let mut add = |name: &str, what, handler, direction, machine: Machine| {
        rows.push(Row {
            name: format!("{name}{}", machine.suffix()),
            what,
            handler,
            direction,
            machine,
        });
    };

    let exit = if cfg!(target_arch = "x86_64") {
        ("cpuid", "floor: cpuid, nothing is looked up")
    } else {
        ("hvc", "floor: SMCCC_VERSION, nothing is looked up")
    };
    add(exit.0, exit.1, Handler::Exit, Write, Machine::Plain);
    #[cfg(target_arch = "x86_64")]
    add(
        "out",
        "floor: out to a port's ioeventfd",
        Handler::Port,
        Write,
        Machine::Plain,
    );
    #[cfg(target_arch = "x86_64")]
    add(
        "ebpf-out",
        "the smallest program, at a port",
        Handler::PortProgram,
        Write,
        Machine::Plain,
    );

    let least = Handler::Program(Program::Smallest);
    let sleepable = Handler::Program(Program::Sleepable);
    let count = Handler::Program(Program::Count);
    let nobody = Handler::Ioeventfd { waiter: false };
    for &machine in Machine::ALL {
        for (name, what, handler, direction) in [
            ("ebpf-write", "the smallest program", least, Write),
            ("ebpf-read", "the same, for a read", least, Read),
            ("ebpf-write-sleepable", "it may sleep", sleepable, Write),
            ("ebpf-write-count", "it counts in an array", count, Write),
            ("ioeventfd-write", "an eventfd, nobody waits", nobody, Write),
            ("user-write", "a loop around KVM_RUN", Handler::User, Write),
            ("user-read", "a loop around KVM_RUN", Handler::User, Read),
        ] {
            add(name, what, handler, direction, machine);
        }
    }
    for (name, what, program, direction) in [
        (
            "ebpf-read-sleepable",
            "it may sleep",
            Program::Sleepable,
            Read,
        ),
        (
            "ebpf-write-array",
            "it looks into an array",
            Program::Array,
            Write,
        ),
        (
            "ebpf-write-hash",
            "it looks into a hash table",
            Program::Hash,
            Write,
        ),
        (
            "ebpf-write-irq",
            "it signals an eventfd",
            Program::Irq,
            Write,
        ),
        (
            "ebpf-guest-word",
            "reads 2 bytes of guest memory, might sleep",
            Program::GuestWord,
            Write,
        ),
        (
            "ebpf-guest-page",
            "reads a page of guest memory, might sleep",
            Program::GuestPage,
            Write,
        ),
    ] {
        let handler = Handler::Program(program);
        add(name, what, handler, direction, Machine::Plain);
    }
    let (name, what) = ("ioeventfd-write-waiter", "an eventfd that a thread reads");
    let handler = Handler::Ioeventfd { waiter: true };
    add(name, what, handler, Write, Machine::Plain);
    for (name, what, count, size) in [
        ("regions-1", "one region", 1, 4),
        ("regions-10", "one after the other, in one page", 10, 4),
        ("regions-100", "one after the other, in one page", 100, 4),
        ("regions-900", "one after the other, in one page", 900, 4),
        ("regions-10-pages", "each in a page of its own", 10, SIZE),
    ] {
        let handler = Handler::Regions { count, size };
        add(name, what, handler, Write, Machine::Plain);
    }
    // The registers of sample devices that drivers access most.
    for (row, what, name, offset, direction) in [
        ("pl031-time", "PL031, the time", "pl031", 0, Read),
        (
            "vcpufreq-frequency",
            "vCPUFreq, the current frequency",
            "vcpufreq",
            0,
            Read,
        ),
        (
            "vcpufreq-request",
            "vCPUFreq, a request",
            "vcpufreq",
            4,
            Write,
        ),
    ] {
        for user in [false, true] {
            let suffix = if user { "-user" } else { "" };
            let sample = Handler::Sample { name, offset, user };
            let row = format!("{row}{suffix}");
            add(&row, what, sample, direction, Machine::Plain);
        }
    }
    for (name, what, direction) in [
        (
            "doorbell-write",
            "a value and an eventfd, nobody waits",
            Write,
        ),
        ("doorbell-read", "what another process has put there", Read),
    ] {
        let doorbell = Handler::Sample {
            name: "doorbell",
            offset: 0,
            user: false,
        };
        add(name, what, doorbell, direction, Machine::Plain);
    }
    for (name, what, device) in [
        (
            "work-round-trip",
            "user space, which has a program run on the device's thread and waits for it",
            true,
        ),
        (
            "thread-round-trip",
            "the same with a thread of its own",
            false,
        ),
    ] {
        for fair in [false, true] {
            let suffix = if fair { "-fair" } else { "" };
            let row = format!("{name}{suffix}");
            let handler = Handler::RoundTrip { device, fair };
            add(&row, what, handler, Read, Machine::Plain);
        }
    }
    for (name, what, handler) in echo::rows().chain(request::rows()) {
        add(name, what, handler, Write, Machine::Plain);
    }
    for (name, what, handler) in block::rows() {
        add(&name, what, handler, Write, Machine::Plain);
    }
    for (name, what, slot) in [
        ("page", "pagebank, SCRATCH", true),
        ("page-trapped", "the same without a slot", false),
    ] {
        for (suffix, direction) in [("read", Read), ("write", Write)] {
            let name = format!("{name}-{suffix}");
            add(
                &name,
                what,
                Handler::Page { slot },
                direction,
                Machine::Plain,
            );
        }
    }
    rows
}

/// What user space does where an access reaches it.
pub type Serve = Box<dyn FnMut(Access<'_>) + Send>;

/// A vCPU that is ready to run a row's loop.
#[allow(missing_debug_implementations)]
pub struct Loop {
    vcpu: Vcpu,
    routine: Routine,
    args: Args,
    /// The loop goes round so many addresses.
    round: u64,
    serve: Serve,
}

impl Loop {
    /// A loop whose accesses are all of the same addresses.
    pub fn new(vcpu: Vcpu, routine: Routine, args: Args, serve: Serve) -> Self {
        Loop {
            vcpu,
            routine,
            args,
            round: 1,
            serve,
        }
    }

    /// Has the loop run a multiple of so often only.
    pub fn in_rounds_of(mut self, round: u64) -> Self {
        self.round = round;
        self
    }

    /// Runs the loop so often; accesses that reach user space are served there.
    pub fn run(&mut self, count: u64) {
        let args = Args { count, ..self.args };
        self.vcpu.serve(self.routine, args, &mut self.serve);
    }

    /// The same, and returns how many accesses reached user space.
    fn count_exits(&mut self, count: u64) -> u64 {
        let mut exits = 0;
        let args = Args { count, ..self.args };
        self.vcpu.serve(self.routine, args, |access| {
            exits += 1;
            (self.serve)(access);
        });
        exits
    }

    /// The next number of accesses for which every address has the same share.
    pub fn whole_rounds(&self, count: u64) -> u64 {
        count.next_multiple_of(self.round)
    }
}

/// A guest with what handles its accesses; that is gone with it.
#[allow(missing_debug_implementations)]
pub struct Case {
    pub loops: Vec<Loop>,
    _handler: Box<dyn Any>,
    _guest: Guest,
    /// Another process that takes part.
    peer: Option<u32>,
}

impl Case {
    pub fn new(target: Loop, handler: Box<dyn Any>, guest: Guest, peer: Option<u32>) -> Self {
        Case {
            loops: vec![target],
            _handler: handler,
            _guest: guest,
            peer,
        }
    }

    /// Exits to user space, and how often one thread of ours had to make room for another, per
    /// access of the first loop.
    pub fn count(&mut self) -> [f64; 2] {
        /// Enough that a switch for something else does not count.
        const ACCESSES: u64 = 200;

        let before = host::switches(self.peer);
        let exits = self.loops[0].count_exits(ACCESSES);
        let switches = host::switches(self.peer) - before;
        [exits, switches].map(|count| count as f64 / ACCESSES as f64)
    }
}

impl Row {
    /// How many accesses a round has.
    pub fn default_accesses(&self) -> u64 {
        let all = host::default_accesses();
        // More than half of the rounds have no tick of the host's clock within.
        match self.handler {
            _ if !host::counts_instructions() => all,
            Handler::Block(kind) => all / kind.share(),
            Handler::RoundTrip { .. } | Handler::Echo { .. } | Handler::Request { .. } => all / 10,
            _ => all,
        }
    }

    /// Sets the row up, with so many vCPUs; or says why it cannot be.
    pub fn set_up(&self, vcpus: u32) -> Result<Case, String> {
        let has_own_guest = matches!(
            self.handler,
            Handler::Echo { .. }
                | Handler::Request { .. }
                | Handler::Block(_)
                | Handler::RoundTrip { .. }
        );
        if has_own_guest && vcpus != 1 {
            return Err("its guest has one vCPU".to_string());
        }
        // The row before may have left another policy.
        run_in_turn();
        match self.handler {
            Handler::Echo { server, irq } => return Ok(echo::set_up(server, irq)),
            Handler::Request { way, at_once } => return Ok(request::set_up(way, at_once)),
            Handler::Block(kind) => return Ok(block::set_up(kind)),
            Handler::RoundTrip { device, fair } => return set_up_round_trip(device, fair),
            _ => (),
        }
        let guest = match self.machine {
            Machine::Plain => Guest::new(),
            Machine::Irqchip => Guest::with_irqchip(),
            #[cfg(target_arch = "x86_64")]
            Machine::Unpaged => Guest::new().without_paging(),
        };
        let handler = self.plug(&guest)?;
        let mut vcpus: Vec<_> = (0..vcpus).map(|id| guest.vcpu(id)).collect();
        if self.machine == Machine::Irqchip {
            vcpus.iter_mut().for_each(|vcpu| guest.connect(vcpu));
        }
        let loops = vcpus.into_iter().map(|vcpu| self.loop_of(vcpu)).collect();
        Ok(Case {
            loops,
            _handler: handler,
            _guest: guest,
            peer: None,
        })
    }

    /// Whether the row makes sense with several vCPUs.
    pub fn scales(&self) -> bool {
        self.machine != Machine::Irqchip
            && matches!(
                self.handler,
                Handler::Program(_) | Handler::Ioeventfd { waiter: false } | Handler::User
            )
    }

    /// Plugs the handler into the guest.
    fn plug(&self, guest: &Guest) -> Result<Box<dyn Any>, String> {
        Ok(match self.handler {
            Handler::Program(program) => {
                let device = device::Device::new(guest.vm());
                let (prog, keep) = load(program, self.direction)?;
                let (read, write) = match self.direction {
                    Direction::Read => (Some(&prog), None),
                    Direction::Write => (None, Some(&prog)),
                };
                device.set_region(0, &region(ADDR, SIZE, read, write));
                let irq = EventFd::new(0).expect("eventfd");
                if matches!(program, Program::Irq) {
                    device.set_irq(0, irq.as_raw_fd());
                }
                if matches!(program, Program::GuestWord | Program::GuestPage) {
                    let window = kvm_bpf_user_mem {
                        addr: 0,
                        size: RAM_SIZE,
                        flags: KVM_BPF_MEM_READ,
                        pad: 0,
                    };
                    let addr = (&raw const window) as u64;
                    device
                        .set_attr(KVM_DEV_BPF_ATTR_GROUP_MEM, 0, addr)
                        .map_err(|errno| format!("a window: {errno:?}"))?;
                }
                Box::new((device, keep, irq))
            }
            Handler::Ioeventfd { waiter } => {
                let eventfd = EventFd::new(0).expect("eventfd");
                register(guest, &eventfd, &IoEventAddress::Mmio(ADDR));
                if waiter {
                    // It runs at once on one CPU, too, and always.
                    Box::new(Waiter::new(eventfd, run_at_once, || ()))
                } else {
                    Box::new(eventfd)
                }
            }
            #[cfg(target_arch = "x86_64")]
            Handler::Port => {
                let eventfd = EventFd::new(0).expect("eventfd");
                register(guest, &eventfd, &IoEventAddress::Pio(PORT));
                Box::new(eventfd)
            }
            #[cfg(target_arch = "x86_64")]
            Handler::PortProgram => {
                let device = device::Device::new(guest.vm());
                let (prog, _) = load(Program::Smallest, Direction::Write)?;
                device.set_ports(0, &region(PORT, 4, None, Some(&prog)));
                Box::new(device)
            }
            Handler::Regions { count, size } => {
                let (prog, _) = load(Program::Smallest, Direction::Write)?;
                let devices: Vec<_> = (0..count.div_ceil(REGIONS_PER_DEVICE))
                    .map(|_| device::Device::new(guest.vm()))
                    .collect();
                for index in 0..count {
                    let region = region(ADDR + index * size, size, None, Some(&prog));
                    devices[(index / REGIONS_PER_DEVICE) as usize]
                        .set_region(index % REGIONS_PER_DEVICE, &region);
                }
                Box::new(devices)
            }
            Handler::Sample {
                name, user: false, ..
            } => {
                let device = load_sample(guest, name);
                let irq = EventFd::new(0).expect("eventfd");
                device.device().set_irq(0, &irq).expect("KVM_BPF_IRQ");
                Box::new(device)
            }
            Handler::Page { slot } => {
                let mut device = load_sample(guest, "pagebank");
                if slot {
                    // The slot of the guest's memory is 0.
                    let set = device.set_read_page(guest.vm(), 0, 1);
                    set.map_err(|why| why.to_string())?;
                }
                Box::new(device)
            }
            Handler::Sample { user: true, .. } | Handler::User | Handler::Exit => Box::new(()),
            Handler::RoundTrip { .. }
            | Handler::Echo { .. }
            | Handler::Request { .. }
            | Handler::Block(_) => {
                unreachable!("it has a guest of its own")
            }
        })
    }

    fn loop_of(&self, vcpu: Vcpu) -> Loop {
        let mut routine = match self.direction {
            Direction::Read => Routine::ReadLoop,
            Direction::Write => Routine::WriteLoop,
        };
        let mut args = Args {
            addr: ADDR,
            ..Default::default()
        };
        let mut round = 1;
        let mut serve: Serve = Box::new(answer_all);
        match self.handler {
            Handler::Regions { count, size } => {
                routine = Routine::Walk;
                args.pair = [size, ADDR + count * size];
                round = count;
            }
            Handler::Exit => routine = Routine::ExitLoop,
            #[cfg(target_arch = "x86_64")]
            Handler::Port | Handler::PortProgram => {
                routine = Routine::OutLoop;
                args.addr = PORT;
            }
            Handler::Page { .. } => args.addr += 8,
            Handler::Sample { name, offset, user } => {
                args.addr += offset;
                args.value = PERF_TABLE[1].into();
                if user {
                    let irq = EventFd::new(0).expect("eventfd");
                    let mut model =
                        userspace::create(name, vec![irq], &PERF_TABLE).expect("its model");
                    serve = Box::new(move |access| match access {
                        Access::Read(addr, data) => model.read(0, addr - ADDR, data),
                        Access::Write(addr, data) => model.write(0, addr - ADDR, data),
                        #[cfg(target_arch = "x86_64")]
                        access => panic!("wanted an access of memory, got {access:?}"),
                    });
                }
            }
            _ => (),
        }
        Loop {
            vcpu,
            routine,
            args,
            round,
            serve,
        }
    }
}

/// Reads that are served by a program on the device's thread, by two eventfds.
fn set_up_round_trip(by_device: bool, fair: bool) -> Result<Case, String> {
    // The other thread runs as the one that makes it does: so nobody takes the processor from
    // the caller until it waits.
    if !fair {
        run_at_once();
    }
    let guest = Guest::new();
    let eventfd = || EventFd::new(0).expect("eventfd");
    let (wake, done) = (eventfd(), eventfd());
    let clone = |eventfd: &EventFd| eventfd.try_clone().expect("a clone of an eventfd");
    let other: Box<dyn Any> = if by_device {
        let device = device::Device::new(guest.vm());
        let mut insns = signal_insns()?;
        insns.extend(ret(0));
        let prog = Prog::load(ProgType::WORK, &insns);
        device.set_irq(0, done.as_raw_fd());
        device.set_work(0, &work(Some(&prog), Some(&wake)));
        Box::new(device)
    } else {
        let done = clone(&done);
        let signal = move || done.write(1).expect("signalling an eventfd");
        Box::new(Waiter::new(clone(&wake), || (), signal))
    };
    let serve = move |access: Access<'_>| {
        wake.write(1).expect("signalling an eventfd");
        done.read().expect("waiting for an eventfd");
        answer_all(access);
    };
    let args = Args {
        addr: ADDR,
        ..Default::default()
    };
    let target = Loop::new(guest.vcpu(0), Routine::ReadLoop, args, Box::new(serve));
    Ok(Case::new(target, other, guest, None))
}

/// Gives every read the same answer.
fn answer_all(access: Access<'_>) {
    if let Access::Read(_, data) = access {
        data.fill(0xee);
    }
}

/// Has an eventfd signalled by writes to an address.
pub fn register(guest: &Guest, eventfd: &EventFd, addr: &IoEventAddress) {
    guest
        .vm()
        .register_ioevent(eventfd, addr, NoDatamatch)
        .expect("KVM_IOEVENTFD");
}

/// A program, and the map that it uses.
fn load(program: Program, direction: Direction) -> Result<(Prog, Option<Map>), String> {
    let (kind, end) = match direction {
        Direction::Read => (ProgType::READ, answer_insns(0)),
        Direction::Write => (ProgType::WRITE, ret(0).to_vec()),
    };
    let with_map = |map: Map| {
        let mut insns = lookup(&map, Index::Imm(0));
        insns.extend(end.iter());
        (Prog::load(kind, &insns), Some(map))
    };
    Ok(match program {
        Program::Smallest => (Prog::load(kind, &end), None),
        Program::Sleepable => (Prog::load_sleepable(kind, &end), None),
        Program::Array => with_map(Map::new(1, 1)),
        Program::Hash => with_map(Map::hash(1, 1)),
        Program::Count => {
            let map = Map::new(1, 1);
            let mut insns = lookup(&map, Index::Imm(0));
            insns.extend([mov_imm(Reg::R1, 1), atomic_add(8, Reg::R0, 0, Reg::R1)]);
            insns.extend(end);
            (Prog::load(kind, &insns), Some(map))
        }
        Program::GuestWord => {
            let mut insns = vec![store_imm(8, Reg::R10, -8, 0), mov(Reg::R3, Reg::R10)];
            insns.push(add_imm(Reg::R3, -8));
            insns.extend(read_insns(2)?);
            insns.extend(end);
            (Prog::load_sleepable(kind, &insns), None)
        }
        Program::GuestPage => {
            let map = Map::new(1, 512);
            let mut insns = vec![mov(Reg::R6, Reg::R1)];
            insns.extend(lookup(&map, Index::Imm(0)));
            insns.extend([mov(Reg::R3, Reg::R0), mov(Reg::R1, Reg::R6)]);
            insns.extend(read_insns(4096)?);
            insns.extend(end);
            (Prog::load_sleepable(kind, &insns), Some(map))
        }
        Program::Irq => {
            let mut insns = signal_insns()?;
            insns.extend(end);
            (Prog::load(kind, &insns), None)
        }
    })
}

/// Signals irq 0; `r1` is the program's context, of which the kfunc takes the kernel's side.
fn signal_insns() -> Result<Vec<Insn>, String> {
    let required =
        |name| kfunc(name).ok_or_else(|| format!("this kernel has no function {name}()"));
    Ok(vec![
        call_kfunc(required("bpf_cast_to_kern_ctx")?),
        mov(Reg::R1, Reg::R0),
        mov_imm(Reg::R2, 0),
        call_kfunc(required("bpf_kvm_irq_signal")?),
    ])
}

/// Reads so many bytes of the guest's memory to where `r3` points; `r1` is the context.
fn read_insns(len: i32) -> Result<Vec<Insn>, String> {
    let required =
        |name| kfunc(name).ok_or_else(|| format!("this kernel has no function {name}()"));
    Ok(vec![
        mov(Reg::R7, Reg::R3),
        call_kfunc(required("bpf_cast_to_kern_ctx")?),
        mov(Reg::R1, Reg::R0),
        mov_imm(Reg::R2, 0x1000),
        mov(Reg::R3, Reg::R7),
        mov_imm(Reg::R4, len),
        call_kfunc(required("bpf_kvm_mem_read")?),
    ])
}

/// A sample device at [`ADDR`], with the parameters that it has.
fn load_sample(guest: &Guest, name: &str) -> ImageDevice {
    let image = loaded(sample(name));
    for param in &image.note().params {
        let values = match param.name.as_str() {
            "perf_table" => PERF_TABLE.iter().copied().map(u64::from).collect(),
            // It starts with the host.
            _ => Vec::new(),
        };
        image.param(&param.name, values).expect("a parameter");
    }
    let device = Device::new(guest.vm()).expect("KVM_CREATE_DEVICE");
    ImageDevice::builder(device, image)
        .plug(Place::Memory(ADDR))
        .expect("a sample device")
}

/// A thread that waits for an eventfd, and then does something, again and again.
struct Waiter {
    eventfd: Arc<EventFd>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Waiter {
    fn new(eventfd: EventFd, first: fn(), then: impl Fn() + Send + 'static) -> Self {
        let eventfd = Arc::new(eventfd);
        let over = Arc::new(AtomicBool::new(false));
        let thread = {
            let (eventfd, over) = (Arc::clone(&eventfd), Arc::clone(&over));
            thread::spawn(move || {
                first();
                while !over.load(Ordering::Relaxed) {
                    eventfd.read().expect("read of an eventfd");
                    then();
                }
            })
        };
        Waiter {
            eventfd,
            over,
            thread: Some(thread),
        }
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        self.eventfd.write(1).expect("write to an eventfd");
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the thread that waits");
        }
    }
}
