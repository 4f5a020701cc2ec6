// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a guest's access costs, by who handles it.
//!
//! Counts the host's instructions when QEMU runs it with `-icount`, else clock ticks.
//! An argument sets the number of accesses.

use std::env;

use kvm_bpf::{Device, ImageDevice, Place};
use kvm_bpf_selftests::bpf::ProgType;
use kvm_bpf_selftests::device::{self, region};
use kvm_bpf_selftests::guest::{Access, Args, Guest, Routine, Vcpu, ticks};
use kvm_bpf_selftests::programs::{answer, loaded, only_return, sample};
use kvm_bpf_vmm::userspace;
use kvm_ioctls::{IoEventAddress, NoDatamatch};
use libbpf_rs::{MapCore, MapFlags};
use vmm_sys_util::eventfd::EventFd;

const BPF: u64 = 0xd000_0000;
const USER: u64 = 0xd100_0000;
const IOEVENTFD: u64 = 0xd200_0000;

/// The registers of sample devices that drivers access most: device, register, its offset.
const REGISTERS: [(&str, &str, Routine, u64); 3] = [
    ("pl031", "DR", Routine::ReadLoop, 0x0),
    ("vcpufreq", "cur_perf", Routine::ReadLoop, 0x0),
    ("vcpufreq", "set_perf", Routine::WriteLoop, 0x4),
];

/// Frequencies in kHz, of the device that wants some.
const PERF_TABLE: [u32; 3] = [500_000, 1_000_000, 2_000_000];

/// Ticks per access of one guest.
struct Bench {
    vcpu: Vcpu,
    count: u64,
}

impl Bench {
    /// Accesses that `serve` handles where they reach user space.
    fn cost(&mut self, routine: Routine, addr: u64, mut serve: impl FnMut(Access<'_>)) -> f64 {
        let mut run = |count| {
            let args = Args {
                value: PERF_TABLE[1].into(),
                addr,
                count,
                ..Default::default()
            };
            let start = ticks();
            self.vcpu.serve(routine, args, &mut serve);
            ticks() - start
        };
        // The first rounds warm up.
        run(self.count / 10 + 1);
        run(self.count) as f64 / self.count as f64
    }
}

/// Gives every read the same answer.
fn answer_all(access: Access<'_>) {
    if let Access::Read(_, data) = access {
        data.fill(0xee);
    }
}

fn main() {
    let count = match env::args().nth(1).map(|arg| arg.parse()) {
        None => 20_000,
        Some(Ok(count)) if count > 0 => count,
        Some(_) => {
            eprintln!("usage: kvm-bpf-bench [ACCESSES]");
            std::process::exit(2);
        }
    };

    libbpf_rs::set_print(None);
    let guest = Guest::new();
    let mut bench = Bench {
        vcpu: guest.vcpu(0),
        count,
    };
    println!("ticks per 4-byte access, {count} accesses");
    handlers(&guest, &mut bench);
    println!();
    devices(&guest, &mut bench);
}

/// The way to a handler and back: the handlers do nothing.
fn handlers(guest: &Guest, bench: &mut Bench) {
    let device = device::Device::new(guest.vm());
    let (read, write) = (answer(0), only_return(ProgType::WRITE, 0));
    device.set_region(0, &region(BPF, 0x1000, Some(&read), Some(&write)));
    let eventfd = EventFd::new(0).expect("eventfd");
    guest
        .vm()
        .register_ioevent(&eventfd, &IoEventAddress::Mmio(IOEVENTFD), NoDatamatch)
        .expect("KVM_IOEVENTFD");

    let both = [Routine::WriteLoop, Routine::ReadLoop];
    let bpf = both.map(|routine| bench.cost(routine, BPF, answer_all));
    let user = both.map(|routine| bench.cost(routine, USER, answer_all));
    let ioeventfd = bench.cost(Routine::WriteLoop, IOEVENTFD, answer_all);

    println!("{:<16} {:>10} {:>10}", "handled by", "write", "read");
    println!("{:<16} {:>10.0} {:>10.0}", "eBPF program", bpf[0], bpf[1]);
    println!("{:<16} {:>10.0} {:>10}", "ioeventfd", ioeventfd, "-");
    println!("{:<16} {:>10.0} {:>10.0}", "user space", user[0], user[1]);
    let ratio = [user[0] / bpf[0], user[1] / bpf[1]];
    println!(
        "{:<16} {:>9.2}x {:>9.2}x",
        "user / eBPF", ratio[0], ratio[1]
    );
}

/// Real devices, against the same in user space.
fn devices(guest: &Guest, bench: &mut Bench) {
    println!(
        "{:<20} {:>12} {:>12} {:>12}",
        "register", "eBPF", "user space", "user / eBPF"
    );
    for (name, register, routine, offset) in REGISTERS {
        let bpf = {
            let _device = load(guest, name);
            bench.cost(routine, BPF + offset, answer_all)
        };
        let irq = EventFd::new(0).expect("eventfd");
        let mut model = userspace::create(name, vec![irq], &PERF_TABLE).expect("its model");
        let user = bench.cost(routine, USER + offset, |access| match access {
            Access::Read(addr, data) => model.read(0, addr - USER, data),
            Access::Write(addr, data) => model.write(0, addr - USER, data),
            #[cfg(target_arch = "x86_64")]
            other => panic!("wanted no ports, got {other:x?}"),
        });
        println!(
            "{:<20} {bpf:>12.0} {user:>12.0} {:>11.2}x",
            format!("{name} {register}"),
            user / bpf
        );
    }
}

/// A sample device at [`BPF`], with a table of frequencies if it has a use for one.
fn load(guest: &Guest, name: &str) -> ImageDevice {
    let image = loaded(sample(name));
    if let Some(table) = image.map("perf_table") {
        for (index, khz) in (0_u32..).zip(PERF_TABLE) {
            table
                .update(&index.to_ne_bytes(), &khz.to_ne_bytes(), MapFlags::ANY)
                .expect("BPF_MAP_UPDATE_ELEM");
        }
    }
    let device = Device::new(guest.vm()).expect("KVM_CREATE_DEVICE");
    ImageDevice::new(device, Place::Memory(BPF), image).expect("a sample device")
}
