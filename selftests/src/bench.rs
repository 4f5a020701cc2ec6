// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a guest's access costs, by who handles it.
//!
//! Counts the host's instructions when QEMU runs it with `-icount`, else clock ticks.
//! An argument sets the number of accesses.

use std::env;

use kvm_bpf_selftests::bpf::ProgType;
use kvm_bpf_selftests::device::{Device, region};
use kvm_bpf_selftests::guest::{Args, Guest, Routine, ticks};
use kvm_bpf_selftests::programs::{answer, only_return};
use kvm_ioctls::{IoEventAddress, NoDatamatch};
use vmm_sys_util::eventfd::EventFd;

const BPF: u64 = 0xd000_0000;
const USER: u64 = 0xd100_0000;
const IOEVENTFD: u64 = 0xd200_0000;

fn main() {
    let count = match env::args().nth(1).map(|arg| arg.parse()) {
        None => 20_000,
        Some(Ok(count)) if count > 0 => count,
        Some(_) => {
            eprintln!("usage: kvm-bpf-bench [ACCESSES]");
            std::process::exit(2);
        }
    };

    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let device = Device::new(guest.vm());
    let (read, write) = (answer(0), only_return(ProgType::WRITE, 0));
    device.set_region(0, &region(BPF, 0x1000, Some(&read), Some(&write)));
    let eventfd = EventFd::new(0).expect("eventfd");
    guest
        .vm()
        .register_ioevent(&eventfd, &IoEventAddress::Mmio(IOEVENTFD), NoDatamatch)
        .expect("KVM_IOEVENTFD");

    // Ticks per access; the first rounds warm up.
    let mut cost = |routine, addr| {
        let mut run = |count| {
            let args = Args {
                addr,
                count,
                ..Default::default()
            };
            let start = ticks();
            vcpu.call(routine, args);
            ticks() - start
        };
        run(count / 10 + 1);
        run(count) as f64 / count as f64
    };
    let bpf = [Routine::WriteLoop, Routine::ReadLoop].map(|routine| cost(routine, BPF));
    let user = [Routine::WriteLoop, Routine::ReadLoop].map(|routine| cost(routine, USER));
    let ioeventfd = cost(Routine::WriteLoop, IOEVENTFD);

    println!("ticks per 4-byte access, {count} accesses");
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
