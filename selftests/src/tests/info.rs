// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What can be learnt of a device from outside: its attribute, fdinfo, tracepoints.

use std::fs;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, id};

use kvm_bpf::uapi::{
    KVM_BPF_INFO_READ_SLEEPS, KVM_BPF_INFO_WRITE_SLEEPS, KVM_BPF_MEM_READ, KVM_BPF_MEM_WRITE,
    KVM_DEV_BPF_ATTR_GROUP_INFO, KVM_DEV_BPF_ATTR_GROUP_PIO, KVM_DEV_BPF_ATTR_GROUP_REGION,
    KVM_DEV_BPF_MAX_REGIONS, kvm_bpf_info, kvm_bpf_user_mem,
};
use kvm_bpf_selftests::bpf::{Prog, ProgType, program_id, program_tag};
use kvm_bpf_selftests::device::{Device, NO_REGION, region, work};
use kvm_bpf_selftests::guest::Guest;
use kvm_bpf_selftests::harness::{Errno, skip};
use kvm_bpf_selftests::programs::{answer, loaded, only_return, plug, ret, test_image, test_path};
use libbpf_rs::{Link, MapCore, MapFlags, Object, ObjectBuilder};
use vmm_sys_util::eventfd::EventFd;

use super::perms::{fd_region, seal};
use super::{ADDR, SIZE};

tests!(
    of_each_region,
    of_ports,
    of_bad_indices,
    fdinfo_has_all,
    fdinfo_of_as_many_regions_as_there_can_be,
    fdinfo_is_for_those_who_may_trace,
    a_line_per_program_that_runs,
    fentry_and_fexit_of_programs,
);

/// What the kernel should tell of a program: its number and its tag.
fn named(prog: Option<&Prog>) -> (u32, [u8; 8]) {
    prog.map_or((0, [0; 8]), |prog| {
        (program_id(prog.as_raw_fd()), program_tag(prog.as_raw_fd()))
    })
}

fn info(
    group: u32,
    addr: u64,
    read: Option<&Prog>,
    write: Option<&Prog>,
    flags: u32,
) -> kvm_bpf_info {
    let ((read_id, read_tag), (write_id, write_tag)) = (named(read), named(write));
    kvm_bpf_info {
        addr,
        size: SIZE,
        kind: group,
        read_id,
        write_id,
        flags,
        read_tag,
        write_tag,
    }
}

fn of_each_region() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let [read, other] = [1, 2].map(answer);
    let sleeps = Prog::load_sleepable(ProgType::READ, &ret(0));
    let write = only_return(ProgType::WRITE, 0);
    let write_sleeps = Prog::load_sleepable(ProgType::WRITE, &ret(0));
    let both = KVM_BPF_INFO_READ_SLEEPS | KVM_BPF_INFO_WRITE_SLEEPS;
    for (read, write, flags) in [
        (Some(&read), None, 0),
        (None, Some(&write), 0),
        (Some(&read), Some(&write), 0),
        (Some(&other), Some(&write), 0),
        (Some(&sleeps), Some(&write), KVM_BPF_INFO_READ_SLEEPS),
        (Some(&read), Some(&write_sleeps), KVM_BPF_INFO_WRITE_SLEEPS),
        (Some(&sleeps), Some(&write_sleeps), both),
    ] {
        for index in [0, 7, KVM_DEV_BPF_MAX_REGIONS - 1] {
            let addr = ADDR + index * SIZE;
            device.set_region(index, &region(addr, SIZE, read, write));
            let wanted = info(KVM_DEV_BPF_ATTR_GROUP_REGION, addr, read, write, flags);
            assert_got!(device.info(index), Ok(wanted), "region {index}");
        }
    }
    // Nobody else has it open.
    let alone = answer(3);
    let wanted = info(KVM_DEV_BPF_ATTR_GROUP_REGION, ADDR, Some(&alone), None, 0);
    device.set_region(0, &region(ADDR, SIZE, Some(&alone), None));
    drop(alone);
    assert_got!(device.info(0), Ok(wanted), "with its program closed");
    device.set_region(0, &NO_REGION);
    assert_got!(device.info(0), Err(Errno(libc::ENOENT)), "removed");
}

fn of_ports() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    if device.has_attr(KVM_DEV_BPF_ATTR_GROUP_PIO, 0).is_err() {
        skip("this architecture has no ports");
    }
    let read = answer(1);
    device.set_ports(9, &region(0x600, 8, Some(&read), None));
    let wanted = kvm_bpf_info {
        size: 8,
        ..info(KVM_DEV_BPF_ATTR_GROUP_PIO, 0x600, Some(&read), None, 0)
    };
    assert_got!(device.info(9), Ok(wanted), "ports");
}

fn of_bad_indices() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    assert_got!(device.info(0), Err(Errno(libc::ENOENT)), "of a free index");
    let enxio = Errno(libc::ENXIO);
    for index in [KVM_DEV_BPF_MAX_REGIONS, 1 << 32, u64::MAX] {
        assert_got!(device.info(index), Err(enxio), "of index {index}");
        assert_got!(
            device.has_attr(KVM_DEV_BPF_ATTR_GROUP_INFO, index),
            Err(enxio)
        );
    }
    assert_got!(device.has_attr(KVM_DEV_BPF_ATTR_GROUP_INFO, 0), Ok(()));
    let value = kvm_bpf_info::default();
    let got = device.set_attr(KVM_DEV_BPF_ATTR_GROUP_INFO, 0, (&raw const value) as u64);
    assert_got!(got, Err(enxio), "setting it");
    device.set_region(0, &region(ADDR, SIZE, Some(&answer(1)), None));
    // SAFETY: nothing is there to be written to.
    let got = unsafe { device.get_attr(KVM_DEV_BPF_ATTR_GROUP_INFO, 0, 8) };
    assert_got!(got, Err(Errno(libc::EFAULT)), "to a bad address");
}

fn fdinfo_path(device: &Device) -> PathBuf {
    format!("/proc/{}/fdinfo/{}", id(), device.as_raw_fd()).into()
}

/// What comes from the device itself: lines as words.
pub(super) fn fdinfo(device: &Device) -> Vec<String> {
    let text = fs::read_to_string(fdinfo_path(device)).expect("fdinfo");
    let ours = [
        "region:", "irq:", "mem:", "work:", "allow:", "require:", "sealed:",
    ];
    text.lines()
        .filter(|line| ours.iter().any(|name| line.starts_with(name)))
        .map(str::to_string)
        .collect()
}

fn words(prog: &Prog) -> String {
    let (id, tag) = named(Some(prog));
    format!("{id} {:016x}", u64::from_be_bytes(tag))
}

fn fdinfo_has_all() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let bare = ["allow:\t0xff07ff", "require:\t0x0", "sealed:\t0"];
    assert_got!(fdinfo(&device), bare, "a new device");

    let other = Guest::new();
    let last = Device::new(other.vm());
    assert_got!(seal(other.vm(), 1, 0), Ok(()), "the seal");
    let sealed = ["allow:\t0xff07ff", "require:\t0x0", "sealed:\t1"];
    assert_got!(fdinfo(&last), sealed, "a device of a VM with the seal");
    assert_got!(fdinfo(&device), bare, "a device of another VM");

    let read = answer(1);
    let write = Prog::load_sleepable(ProgType::WRITE, &ret(0));
    let works = [0, 1].map(|value| only_return(ProgType::WORK, value));
    let eventfd = EventFd::new(0).expect("eventfd");
    let signal = EventFd::new(0).expect("eventfd");
    device.set_region(0, &region(ADDR, SIZE, Some(&read), None));
    device.set_region(2, &region(ADDR + SIZE, 2 * SIZE, Some(&read), Some(&write)));
    device.set_irq(0, eventfd.as_raw_fd());
    device.set_irq(255, eventfd.as_raw_fd());
    for (index, flags) in [
        (0, KVM_BPF_MEM_READ),
        (31, KVM_BPF_MEM_READ | KVM_BPF_MEM_WRITE),
    ] {
        let window = kvm_bpf_user_mem {
            addr: 0x1000,
            size: 0x10,
            flags,
            pad: 0,
        };
        device.set_mem(index, &window);
    }
    device.set_work(0, &work(Some(&works[0]), None));
    device.set_work(15, &work(Some(&works[1]), Some(&signal)));
    device.set_perms(0x10041, 1);
    let wanted = [
        format!("region:\t0 mmio {ADDR:#x} {SIZE:#x} read {}", words(&read)),
        format!(
            "region:\t2 mmio {:#x} {:#x} read {} write {} sleeps",
            ADDR + SIZE,
            2 * SIZE,
            words(&read),
            words(&write)
        ),
        "irq:\t0".to_string(),
        "irq:\t255".to_string(),
        "mem:\t0 0x1000 0x10 r".to_string(),
        "mem:\t31 0x1000 0x10 rw".to_string(),
        format!("work:\t0 {}", words(&works[0])),
        format!("work:\t15 {} eventfd", words(&works[1])),
        "allow:\t0x10041".to_string(),
        "require:\t0x1".to_string(),
        "sealed:\t0".to_string(),
    ];
    assert_got!(fdinfo(&device), wanted, "with all");
}

fn fdinfo_of_as_many_regions_as_there_can_be() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let read = answer(1);
    let mut wanted = Vec::new();
    for index in 0..KVM_DEV_BPF_MAX_REGIONS {
        let addr = ADDR + index * SIZE;
        device.set_region(index, &region(addr, SIZE, Some(&read), None));
        let words = words(&read);
        wanted.push(format!(
            "region:\t{index} mmio {addr:#x} {SIZE:#x} read {words}"
        ));
    }
    let mut got = fdinfo(&device);
    got.truncate(wanted.len());
    assert_got!(got, wanted);
}

/// The same user's processes, and not another user's.
fn fdinfo_is_for_those_who_may_trace() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    device.set_region(0, &region(ADDR, SIZE, Some(&answer(1)), None));
    let path = fdinfo_path(&device);
    let cat = |uid| {
        Command::new("cat")
            .arg(&path)
            .uid(uid)
            .gid(uid)
            .output()
            .expect("cat")
    };
    let same = cat(0);
    assert!(
        same.status.success() && String::from_utf8_lossy(&same.stdout).contains("region:\t0 mmio"),
        "wanted the region, got {same:?}"
    );
    let other = cat(65534);
    assert!(
        !other.status.success() && other.stdout.is_empty(),
        "wanted nothing, got {other:?}"
    );
}

const TRACING: &str = "/sys/kernel/tracing";

/// The tracepoints of this kernel, for as long as it exists.
struct Trace;

impl Trace {
    fn start() -> Self {
        let trace = Trace;
        trace.write("trace", "");
        trace.write("events/kvm_bpf/enable", "1");
        trace
    }

    fn write(&self, file: &str, text: &str) {
        fs::write(Path::new(TRACING).join(file), text)
            .unwrap_or_else(|error| panic!("{file}: {error}"));
    }

    /// What was traced: each event without who, where and when.
    fn events(&self) -> Vec<String> {
        let text = fs::read_to_string(Path::new(TRACING).join("trace")).expect("trace");
        text.lines()
            .filter_map(|line| Some(line[line.find("kvm_bpf_")?..].to_string()))
            .collect()
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        self.write("events/kvm_bpf/enable", "0");
    }
}

fn a_line_per_program_that_runs() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let device = Device::new(guest.vm());
    let read = answer(0x1234);
    let write = only_return(ProgType::WRITE, 1);
    let run = only_return(ProgType::WORK, 1);
    device.set_region(5, &region(ADDR, SIZE, Some(&read), Some(&write)));
    device.set_work(3, &work(Some(&run), None));
    let trace = Trace::start();
    vcpu.read(ADDR + 0x18, 4);
    let exits = vcpu.write(ADDR + 0x20, 8, 0xab).len();
    let ran = device.run(3, 77);
    let events = trace.events();
    drop(trace);
    // Nobody sees these.
    vcpu.read(ADDR, 4);
    assert_got!(
        (exits, ran),
        (1, Err(Errno(libc::EAGAIN))),
        "what came of it"
    );
    let [read, write, run] = [&read, &write, &run].map(|prog| named(Some(prog)).0);
    let wanted = [
        format!("kvm_bpf_enter: prog {read} read vcpu 0 region 5 offset 0x18 len 4 data 0x0"),
        format!("kvm_bpf_exit: prog {read} ret 0 data 0x1234"),
        format!("kvm_bpf_enter: prog {write} write vcpu 0 region 5 offset 0x20 len 8 data 0xab"),
        format!("kvm_bpf_exit: prog {write} ret 1 data 0xab"),
        format!("kvm_bpf_enter: prog {run} work vcpu -1 region 3 offset 0x0 len 0 data 0x4d"),
        format!("kvm_bpf_exit: prog {run} ret 1 data 0x4d"),
    ];
    assert_got!(events, wanted);
}

/// Programs of tracing that count what a program does.
struct Traced {
    object: Object,
    links: Vec<Link>,
}

impl Traced {
    #[track_caller]
    fn new(target: Option<BorrowedFd<'_>>, function: &str) -> Self {
        let target = target.expect("a program to trace").as_raw_fd();
        let mut object = ObjectBuilder::default()
            .open_file(test_path("traced"))
            .expect("traced");
        for mut program in object.progs_mut() {
            program
                .set_attach_target(target, Some(function.to_string()))
                .expect("bpf_program__set_attach_target()");
        }
        let object = object
            .load()
            .unwrap_or_else(|error| panic!("tracing {function}: {error:#}"));
        let links = object
            .progs_mut()
            .map(|program| program.attach().expect("attaching to a program"))
            .collect();
        Traced { object, links }
    }

    /// How often it was entered, returned 0 and returned something else; and the offset and length
    /// of the last access that it has returned from.
    fn counts(&self) -> [u64; 5] {
        let map = self.object.maps().find(|map| map.name() == "counts");
        let map = map.expect("counts");
        [0_u32, 1, 2, 3, 4].map(|index| {
            let value = map.lookup(&index.to_ne_bytes(), MapFlags::ANY);
            let value = value.expect("BPF_MAP_LOOKUP_ELEM").expect("an element");
            u64::from_ne_bytes(value.try_into().expect("eight bytes"))
        })
    }
}

/// As `bpftool prog profile` and others attach: while the device is there, and for as long as they
/// like.
fn fentry_and_fexit_of_programs() {
    let guest = Guest::new();
    // Reads of its identity it handles, writes to that it declines.
    let programs = loaded(test_image("half_bank"));
    let (read, write) = (programs.read_program(), programs.write_program());
    let _device = plug(guest.vm(), ADDR, test_image("half_bank"));
    let device = Device::new(guest.vm());
    device.set_region(0, &fd_region(1, read, write));
    let mut vcpu = guest.vcpu(0);
    vcpu.read(ADDR + SIZE, 4);
    let reads = Traced::new(read, "half_read");
    let mut writes = Traced::new(write, "half_write");
    for _ in 0..3 {
        vcpu.read(ADDR + SIZE + 4, 2);
        // The same programs, loaded a second time, are others.
        vcpu.read(ADDR, 4);
    }
    vcpu.write(ADDR + SIZE + 8, 4, 1);
    writes.links.clear();
    vcpu.write(ADDR + SIZE, 1, 1);
    assert_got!(reads.counts(), [3, 3, 0, 4, 2], "the program for reads");
    assert_got!(writes.counts(), [1, 0, 1, 8, 4], "the program for writes");
}
