// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Whose memory it is: what a VMM makes is charged to its cgroup, programs and maps to their
//! loader's.
//!
//! What the kernel has more, of all kinds of its memory, is compared with what the cgroup is
//! charged with.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::fs;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use kvm_bpf::{Device as LibraryDevice, ImageDevice, Place, Programs};
use kvm_bpf_selftests::bpf::{Insn, Prog, ProgType, Reg, mov_imm};
use kvm_bpf_selftests::cgroup::Cgroup;
use kvm_bpf_selftests::device::{Device, region, work};
use kvm_bpf_selftests::guest::Guest;
use kvm_bpf_selftests::harness::{Errno, in_a_process, status_of_a_process, wait_for};
use kvm_bpf_selftests::programs::{answer, loaded, only_return, ret, test_image};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use super::{ADDR, SIZE};

tests!(
    what_a_vmm_makes,
    programs_and_maps_to_their_loader,
    a_limit_ends_a_vmm,
);

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// The kernel's memory, in bytes, but for what is neither a process's nor an object's.
fn of_the_kernel() -> u64 {
    // What each CPU has counted for itself.
    fs::write("/proc/sys/vm/stat_refresh", "1").expect("stat_refresh");
    let text = fs::read_to_string("/proc/meminfo").expect("meminfo");
    // Stacks are in VmallocUsed.
    let parts = ["Slab:", "PageTables:", "Percpu:", "VmallocUsed:"];
    let lines = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let is_part = parts.contains(&words.next()?);
        is_part.then(|| words.next()?.parse::<u64>().ok())?
    });
    let numbers: Vec<_> = lines.collect();
    assert_got!(numbers.len(), parts.len(), "lines of meminfo");
    numbers.iter().sum::<u64>() * KIB
}

fn charged_to(cgroup: &Cgroup) -> u64 {
    cgroup.number("memory.stat", "kernel")
}

/// The bytes of the objects in each of the kernel's caches, as slabinfo tells.
fn objects() -> HashMap<String, u64> {
    let text = fs::read_to_string("/proc/slabinfo").unwrap_or_default();
    let lines = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let name = words.next()?.to_string();
        let mut number = || words.next()?.parse::<u64>().ok();
        let (active, _, size) = (number()?, number()?, number()?);
        Some((name, active * size))
    });
    lines.collect()
}

fn bytes_of(objects: &HashMap<String, u64>, cache: &str) -> u64 {
    objects.get(cache).copied().unwrap_or_default()
}

fn grown(before: &HashMap<String, u64>) -> Vec<(String, u64)> {
    let more = objects().into_iter().map(|(name, bytes)| {
        let before = bytes_of(before, &name);
        (name, bytes.saturating_sub(before))
    });
    let mut more: Vec<_> = more.filter(|&(_, bytes)| bytes > 0).collect();
    more.sort_by_key(|&(_, bytes)| Reverse(bytes));
    more.truncate(8);
    more
}

/// May have so many files open, and keeps those below that are there.
fn allow_files(count: u64) {
    let limit = libc::rlimit {
        rlim_cur: count,
        rlim_max: count,
    };
    // SAFETY: the limit is a local.
    let set = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) };
    assert_got!(set, 0, "RLIMIT_NOFILE");
}

/// A device that closes waits; those that close at once wait as long as one.
fn close(devices: Vec<Device>) {
    thread::scope(|scope| {
        for device in devices {
            scope.spawn(|| drop(device));
        }
    });
}

/// What a VMM makes, how many, and how many bytes it is charged with for each, at least. What is
/// not charged has a limit of bytes, too.
struct Kind {
    name: &'static str,
    count: u64,
    least: u64,
    uncharged: u64,
    /// Those from a number on.
    make: fn(&VmFd, Range<u64>) -> Vec<Device>,
}

/// The counter of an eventfd, which Linux charges to nobody.
const COUNTER: u64 = 64;

const KINDS: [Kind; 5] = [
    Kind {
        name: "devices",
        count: 300,
        least: 4 * KIB,
        uncharged: 0,
        make: |vm, which| which.map(|_| Device::new(vm)).collect(),
    },
    Kind {
        name: "regions",
        count: 450,
        least: 128,
        uncharged: 0,
        make: |vm, which| {
            let read = answer(1);
            let mut devices = Vec::new();
            for n in which {
                let index = n % 225;
                if index == 0 {
                    devices.push(Device::new(vm));
                }
                let device = devices.last().expect("the first is at index 0");
                device.set_region(index, &region(ADDR + n * SIZE, SIZE, Some(&read), None));
            }
            devices
        },
    },
    Kind {
        name: "devices with windows",
        count: 100,
        least: 4 * KIB,
        uncharged: 0,
        make: |vm, which| {
            let make = |_| {
                let device = Device::new(vm);
                for index in 0..32 {
                    device.set_mem(index, &super::perms::WINDOW);
                }
                device
            };
            which.map(make).collect()
        },
    },
    Kind {
        name: "interrupts",
        count: 20 * 256,
        least: 16,
        uncharged: COUNTER,
        make: |vm, which| {
            let make = |_| {
                let device = Device::new(vm);
                for index in 0..256 {
                    let eventfd = EventFd::new(0).expect("eventfd");
                    device.set_irq(index, eventfd.as_raw_fd());
                }
                device
            };
            which.step_by(256).map(make).collect()
        },
    },
    Kind {
        name: "WORK programs with eventfds",
        count: 40 * 16,
        least: KIB,
        uncharged: COUNTER,
        make: |vm, which| {
            let run = only_return(ProgType::WORK, 0);
            let make = |_| {
                let device = Device::new(vm);
                for index in 0..16 {
                    let eventfd = EventFd::new(0).expect("eventfd");
                    device.set_work(index, &work(Some(&run), Some(&eventfd)));
                }
                device
            };
            which.step_by(16).map(make).collect()
        },
    },
];

/// Of all that the kernel has more, the VMM's cgroup is charged with nearly all, and gets it back.
fn what_a_vmm_makes() {
    for kind in KINDS {
        let cgroup = Cgroup::new("kvm-bpf-vmm", "memory");
        in_a_process(|| {
            cgroup.join();
            allow_files(10_000);
            let guest = Guest::new();
            // What the kernel keeps for later, it has with these.
            let first = (kind.make)(guest.vm(), 0..kind.count);
            thread::sleep(Duration::from_millis(500));
            let caches = objects();
            let before = (of_the_kernel(), charged_to(&cgroup));
            let devices = (kind.make)(guest.vm(), kind.count..2 * kind.count);
            // What has been replaced meanwhile is freed later.
            thread::sleep(Duration::from_millis(500));
            let after = (of_the_kernel(), charged_to(&cgroup));
            // What kmemleak remembers of each object, in kernels that have it, is nobody's.
            let kmemleak = bytes_of(&objects(), "kmemleak_object");
            let kmemleak = kmemleak.saturating_sub(bytes_of(&caches, "kmemleak_object"));
            let more = after.0.saturating_sub(before.0 + kmemleak);
            let charged = after.1.saturating_sub(before.1);
            println!(
                "{} {}: the kernel has {more} bytes more, charged are {charged}",
                kind.count, kind.name
            );
            assert!(
                charged >= kind.least * kind.count,
                "wanted {} bytes at least, got {charged}",
                kind.least * kind.count
            );
            let known = charged + kind.uncharged * kind.count;
            assert!(
                10 * known >= 9 * more,
                "wanted nearly all of {more} bytes to be charged, got {charged}; of the kernel's \
                caches these have grown most: {:?}",
                grown(&caches)
            );
            close(first);
            close(devices);
            // Stacks and page tables of this process, which has had threads, stay.
            wait_for("what was charged to be given back", true, || {
                charged_to(&cgroup) < before.1
            });
        });
    }
}

/// How many elements the guest has the hash table get.
const ELEMENTS: u64 = 3000;

/// For as long as the VMM has them, and for what the maps get later, while the VMM runs.
fn programs_and_maps_to_their_loader() {
    let [loader, vmm] =
        ["loader", "vmm"].map(|name| Cgroup::new(&format!("kvm-bpf-{name}"), "memory"));
    let (ours, theirs) = UnixStream::pair().expect("socketpair");
    let before = of_the_kernel();
    in_a_process(|| {
        loader.join();
        let programs = loaded(test_image("charged"));
        programs.send(&theirs).expect("programs on their way");
    });
    // The loader is gone.
    let programs = Programs::recv(&ours).expect("its programs");
    let maps = charged_to(&loader);
    println!(
        "loaded: the kernel has {} bytes more, charged are {maps}",
        of_the_kernel() - before
    );
    assert!(
        maps >= 4 * MIB,
        "wanted 4 MiB of the loader's cgroup, got {maps} bytes"
    );
    in_a_process(|| {
        vmm.join();
        let guest = Guest::new();
        let mut vcpu = guest.vcpu(0);
        let before = (charged_to(&loader), charged_to(&vmm));
        let device = LibraryDevice::new(guest.vm()).expect("KVM_CREATE_DEVICE");
        let device = ImageDevice::builder(device, programs)
            .plug(Place::Memory(ADDR))
            .expect("plugging it in");
        for key in 0..ELEMENTS {
            assert_got!(vcpu.write(ADDR, 4, key), [], "key {key}");
        }
        let more = [
            charged_to(&loader).saturating_sub(before.0),
            charged_to(&vmm).saturating_sub(before.1),
        ];
        println!(
            "{ELEMENTS} elements: the loader is charged with {}, the VMM with {}",
            more[0], more[1]
        );
        assert!(
            more[0] >= ELEMENTS * KIB && more[1] < MIB,
            "wanted {ELEMENTS} KiB of the loader's, got {} bytes, and {} of the VMM's",
            more[0],
            more[1]
        );
        drop(device);
    });
    wait_for("what was charged to be given back", true, || {
        charged_to(&loader) < MIB
    });
    let before = (of_the_kernel(), charged_to(&loader));
    in_a_process(|| {
        loader.join();
        // 4000 instructions each.
        let insns: Vec<Insn> = std::iter::repeat_n(mov_imm(Reg::R0, 0), 3998)
            .chain(ret(0))
            .collect();
        let programs: Vec<_> = (0..100)
            .map(|_| Prog::load(ProgType::READ, &insns))
            .collect();
        let after = (of_the_kernel(), charged_to(&loader));
        println!(
            "100 programs of 4000 instructions: the kernel has {} bytes more, charged are {}",
            after.0 - before.0,
            after.1 - before.1
        );
        let least = 100 * 4000 * size_of::<Insn>() as u64;
        assert!(
            after.1 - before.1 >= least,
            "wanted {least} bytes for instructions, got {}",
            after.1 - before.1
        );
        drop(programs);
    });
}

/// A VMM that makes devices without end meets the limit of its cgroup, and nobody else's.
fn a_limit_ends_a_vmm() {
    const LIMIT: u64 = 12 * MIB;
    /// Their memory is more than the limit.
    const DEVICES: u64 = 5_000;

    let other = Guest::new();
    let mut vcpu = other.vcpu(0);
    let device = Device::new(other.vm());
    device.set_region(0, &region(ADDR, SIZE, Some(&answer(7)), None));
    let cgroup = Cgroup::new("kvm-bpf-vmm", "memory");
    cgroup.write("memory.max", LIMIT);
    let status = status_of_a_process(|| {
        cgroup.join();
        allow_files(2 * DEVICES);
        let guest = Guest::new();
        let devices: Vec<_> = (0..DEVICES).map(|_| Device::try_new(guest.vm())).collect();
        let made = devices.iter().filter(|device| device.is_ok()).count();
        panic!("wanted the limit to end this process, got {made} devices");
    });
    assert_got!(
        (libc::WIFSIGNALED(status), libc::WTERMSIG(status)),
        (true, libc::SIGKILL),
        "its end"
    );
    assert_got!(
        cgroup.number("memory.events", "oom_kill"),
        1,
        "processes that the limit has ended"
    );
    assert_got!(vcpu.read(ADDR, 8).value, 7, "another VMM's device");
    wait_for("what was charged to be given back", true, || {
        charged_to(&cgroup) < MIB
    });
    assert_got!(
        Device::try_new(other.vm()).map(drop),
        Ok::<(), Errno>(()),
        "another VMM's new device"
    );
}
