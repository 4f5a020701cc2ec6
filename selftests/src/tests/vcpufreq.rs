// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The virtual CPU frequency of `samples/devices`: its registers, what a request does to
//! the vCPU's thread, and the same accesses on the model in user space.

use std::sync::mpsc;
use std::{fs, thread};

use kvm_bpf::{Device, ImageDevice, OnLoss, Place, Programs};
use kvm_bpf_selftests::bpf::Census;
use kvm_bpf_selftests::guest::{Guest, Vcpu};
use kvm_bpf_selftests::harness::{Random, in_a_thread, number_from_env, stay_on, unpaused};
use kvm_bpf_selftests::programs::{loaded, sample};
use kvm_bpf_vmm::userspace::{self, uclamp};

use super::{ADDR, assert_described, other_accesses_of};

tests!(
    registers,
    other_accesses,
    selection_is_per_cpu,
    tables_of_every_length,
    no_table,
    request_clamps_the_thread,
    requests_out_of_range,
    request_for_another_cpu,
    page_of_its_last_reader,
    threads_inherit_the_clamp,
    current_frequency,
    table_and_requests_stay_when_replaced,
    as_the_model_in_user_space,
);

const CPUS: u64 = 8;
const CPU_SIZE: u64 = 0x1000;

const CUR_PERF: u64 = 0x00;
const SET_PERF: u64 = 0x04;
const PERFTBL_LEN: u64 = 0x08;
const PERFTBL_SEL: u64 = 0x0c;
const PERFTBL_RD: u64 = 0x10;
const PERF_DOMAIN: u64 = 0x14;

/// The most entries that a table has.
const PERFTBL_MAX: usize = 64;

/// A guest with the device.
struct Setup {
    guest: Guest,
    vcpu: Vcpu,
    device: ImageDevice,
}

impl Setup {
    fn new(table: &[u32]) -> Self {
        let guest = Guest::new();
        let programs = loaded(sample("vcpufreq"));
        fill(&programs, table);
        let device = Device::new(guest.vm()).expect("KVM_CREATE_DEVICE");
        let device = ImageDevice::builder(device, programs)
            .plug(Place::Memory(ADDR))
            .expect("the region");
        Setup {
            vcpu: guest.vcpu(0),
            guest,
            device,
        }
    }

    /// Fills the table, with zeroes after its end.
    fn fill(&self, table: &[u32]) {
        fill(self.device.programs(), table);
    }

    /// What a VMM sees of a page: request, selection, the last clamp, the errno of that.
    fn state(&self, cpu: u32) -> [i32; 4] {
        let map = self.device.programs().map("vcpus").expect("the CPUs");
        let value = map
            .lookup(&cpu.to_ne_bytes())
            .expect("BPF_MAP_LOOKUP_ELEM")
            .expect("the CPU");
        let word = |index: usize| {
            let bytes = value[4 * index..][..4].try_into().expect("4 bytes");
            i32::from_ne_bytes(bytes)
        };
        // The clamp is the lower half of a word of 8 bytes.
        let clamped = u64::from_ne_bytes(value[16..].try_into().expect("8 bytes"));
        [word(0), word(1), clamped as i32, word(3)]
    }

    fn read(&mut self, cpu: u64, register: u64) -> u32 {
        read(&mut self.vcpu, cpu, register)
    }

    fn write(&mut self, cpu: u64, register: u64, value: u32) {
        write(&mut self.vcpu, cpu, register, value);
    }
}

fn fill(programs: &Programs, table: &[u32]) {
    let table = table.iter().copied().map(u64::from);
    programs.param("perf_table", table).expect("the parameter");
}

fn read(vcpu: &mut Vcpu, cpu: u64, register: u64) -> u32 {
    let read = vcpu.read(ADDR + cpu * CPU_SIZE + register, 4);
    assert_got!(
        read.exits,
        [],
        "exits of a read of {register:#x}, CPU {cpu}"
    );
    read.value as u32
}

fn write(vcpu: &mut Vcpu, cpu: u64, register: u64, value: u32) {
    let exits = vcpu.write(ADDR + cpu * CPU_SIZE + register, 4, value.into());
    assert_got!(exits, [], "exits of a write of {register:#x}, CPU {cpu}");
}

/// The calling thread's clamps; a vCPU that it runs has the same.
fn clamps() -> (u32, u32) {
    uclamp::of_thread(0).expect("sched_getattr")
}

/// A number that the host tells of its first CPU.
fn cpu_0(file: &str) -> Option<u64> {
    fs::read_to_string(format!("/sys/devices/system/cpu/cpu0/{file}"))
        .ok()?
        .trim()
        .parse()
        .ok()
}

/// The file with the governor of the first CPU's frequency.
const GOVERNOR: &str = "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor";

/// What the first CPU's frequency can be, if the host decides about it.
fn frequencies_of_cpu_0() -> Option<Vec<u64>> {
    let path = "/sys/devices/system/cpu/cpu0/cpufreq/scaling_available_frequencies";
    let list = fs::read_to_string(path).ok()?;
    let numbers = list.split_whitespace().map(|khz| khz.parse().ok());
    numbers.collect()
}

/// Whether the host knows the frequency of its CPUs.
fn host_has_cpufreq() -> bool {
    cpu_0("cpufreq/cpuinfo_max_freq").is_some()
}

fn registers() {
    let mut setup = Setup::new(&[300_000, 600_000, 1_200_000]);
    for cpu in 0..CPUS {
        assert_got!(setup.read(cpu, PERFTBL_LEN), 3, "length, CPU {cpu}");
        assert_got!(
            setup.read(cpu, PERF_DOMAIN),
            cpu as u32,
            "domain, CPU {cpu}"
        );
        assert_got!(setup.read(cpu, PERFTBL_RD), 300_000, "entry 0, CPU {cpu}");
        // Write-only ones.
        assert_got!(setup.read(cpu, SET_PERF), 0, "set_perf, CPU {cpu}");
        assert_got!(setup.read(cpu, PERFTBL_SEL), 0, "perftbl_sel, CPU {cpu}");
        // Read-only ones.
        for register in [PERFTBL_LEN, PERFTBL_RD, PERF_DOMAIN] {
            let before = setup.read(cpu, register);
            setup.write(cpu, register, !before);
            let after = setup.read(cpu, register);
            assert_got!(after, before, "register {register:#x}, CPU {cpu}");
        }
        setup.write(cpu, CUR_PERF, 1);
        assert_got!(setup.state(cpu as u32), [0; 4], "state of CPU {cpu}");
    }
    // The region ends there.
    let after = ADDR + CPUS * CPU_SIZE;
    assert_got!(
        setup.vcpu.read(after, 4).exits.len(),
        1,
        "exits past the end"
    );
}

/// What is no access to a register: reads 0, is ignored, never leaves the kernel.
fn other_accesses() {
    let mut setup = Setup::new(&[1000, 2000]);
    setup.write(0, PERFTBL_SEL, 1);
    for offset in [0x18, 0x1c, 0x100, 0xffc] {
        setup.write(0, offset, u32::MAX);
        assert_got!(setup.read(0, offset), 0, "unknown register {offset:#x}");
    }
    for register in [CUR_PERF, SET_PERF, PERFTBL_LEN, PERFTBL_SEL, PERFTBL_RD] {
        other_accesses_of(&mut setup.vcpu, ADDR + register);
    }
    assert_got!(setup.state(0), [0, 1, 0, 0], "after all this");
}

/// The driver reads every CPU's table on one CPU.
fn selection_is_per_cpu() {
    let table: Vec<u32> = (1..=8).map(|step| step * 100_000).collect();
    let mut setup = Setup::new(&table);
    let mut other = setup.guest.vcpu(5);
    for cpu in 0..CPUS {
        write(&mut other, cpu, PERFTBL_SEL, cpu as u32);
    }
    for cpu in 0..CPUS {
        let wanted = table[cpu as usize];
        assert_got!(setup.read(cpu, PERFTBL_RD), wanted, "entry, CPU {cpu}");
        assert_got!(
            read(&mut other, cpu, PERFTBL_RD),
            wanted,
            "entry, CPU {cpu}"
        );
    }
    for index in [8, 9, 63, 64, 65, 1 << 31, u32::MAX] {
        setup.write(2, PERFTBL_SEL, index);
        assert_got!(setup.read(2, PERFTBL_RD), 0, "entry {index}");
    }
}

fn tables_of_every_length() {
    let mut setup = Setup::new(&[]);
    for len in 1..=PERFTBL_MAX {
        let table: Vec<u32> = (1..=len as u32).map(|step| step * 50_000).collect();
        setup.fill(&table);
        assert_got!(setup.read(1, PERFTBL_LEN), len as u32, "length");
        // The entries at the ends; all of them, of the longest.
        let indices = if len == PERFTBL_MAX {
            0..len
        } else {
            len - 1..len
        };
        for index in indices.chain([0]) {
            setup.write(1, PERFTBL_SEL, index as u32);
            let got = setup.read(1, PERFTBL_RD);
            assert_got!(got, table[index], "entry {index} of {len}");
        }
        // With no request so far, the highest, or what the host's is in proportion to it.
        let max = table[len - 1];
        let got = setup.read(1, CUR_PERF);
        let right = got == max || host_has_cpufreq() && (1..max).contains(&got);
        assert!(right, "cur_perf with {len} entries up to {max}: {got}");
    }
}

/// Before the VMM has filled it; the driver then finds no device.
fn no_table() {
    in_a_thread(|| {
        let mut setup = Setup::new(&[]);
        let before = clamps();
        setup.write(0, SET_PERF, 1000);
        assert_got!(clamps(), before);
        for register in [PERFTBL_LEN, PERFTBL_RD, CUR_PERF] {
            assert_got!(setup.read(0, register), 0, "register {register:#x}");
        }
        assert_got!(setup.state(0), [0; 4]);
    });
}

fn request_clamps_the_thread() {
    in_a_thread(|| {
        // The table's last entry stands for 1024; parts of a unit are rounded up.
        for (table, requests) in [
            (
                &[500_000, 1_000_000, 2_000_000][..],
                &[
                    (500_000, 256),
                    (2_000_000, 1024),
                    (1_000_000, 512),
                    (1, 1),
                    (1_953, 1),
                    (1_954, 2),
                    (1_999_999, 1024),
                ][..],
            ),
            (&[3], &[(1, 342), (2, 683), (3, 1024)]),
            (&[u32::MAX], &[(1, 1), (1 << 31, 513), (u32::MAX, 1024)]),
        ] {
            let mut setup = Setup::new(table);
            for &(khz, clamp) in requests {
                setup.write(0, SET_PERF, khz);
                assert_got!(clamps(), (clamp, clamp), "{khz} kHz of {table:?}");
                let state = [khz as i32, 0, clamp as i32, 0];
                assert_got!(setup.state(0), state, "{khz} kHz of {table:?}");
            }
        }
    });
}

fn requests_out_of_range() {
    in_a_thread(|| {
        let mut setup = Setup::new(&[1000, 2000]);
        setup.write(0, SET_PERF, 1000);
        assert_got!(clamps(), (512, 512));
        // 0 is no frequency.
        setup.write(0, SET_PERF, 0);
        assert_got!(clamps(), (512, 512), "after a request for 0");
        assert_got!(setup.state(0), [1000, 0, 512, 0], "after a request for 0");
        for khz in [2001, 1 << 31, u32::MAX] {
            setup.write(0, SET_PERF, 1000);
            setup.write(0, SET_PERF, khz);
            assert_got!(clamps(), (1024, 1024), "after a request for {khz}");
            assert_got!(setup.state(0), [2000, 0, 1024, 0]);
        }
    });
}

/// A vCPU's program reaches no thread but its own.
fn request_for_another_cpu() {
    in_a_thread(|| {
        let mut setup = Setup::new(&[1000]);
        let mut other = setup.guest.vcpu(3);
        let before = clamps();
        for cpu in 1..CPUS {
            setup.write(cpu, SET_PERF, 250);
            assert_got!(clamps(), before, "after a request for CPU {cpu}");
            assert_got!(setup.state(cpu as u32), [250, 0, 0, 0], "CPU {cpu}");
        }
        // It takes effect when that CPU looks at its frequency, on its thread.
        read(&mut other, 3, PERFTBL_LEN);
        assert_got!(clamps(), before, "CPU 3 before it looks");
        read(&mut other, 3, CUR_PERF);
        assert_got!(clamps(), (256, 256), "CPU 3 has looked");
        assert_got!(setup.state(3), [250, 0, 256, 0]);
        write(&mut other, 3, SET_PERF, 500);
        assert_got!(clamps(), (512, 512), "CPU 3 asks for itself");
        assert_got!(setup.state(3), [500, 0, 512, 0]);
        assert_got!(setup.state(0), [0; 4]);
    });
}

/// The first CPU of a kernel may be another vCPU than number 0, as a kdump kernel's: the page is
/// for the one that reads its frequency there.
fn page_of_its_last_reader() {
    in_a_thread(|| {
        let mut setup = Setup::new(&[1000]);
        let mut second = setup.guest.vcpu(1);
        // On a thread of its own, as a vCPU is: what one is clamped to, the other is not.
        let (to_second, work) = mpsc::channel::<fn(&mut Vcpu)>();
        let (to_test, results) = mpsc::channel();
        let second = thread::spawn(move || {
            for access in work {
                access(&mut second);
                to_test.send(clamps()).expect("a test that waits");
            }
        });
        let on_second = |access| {
            to_second.send(access).expect("a thread that works");
            results.recv().expect("the thread's clamps")
        };
        let none = clamps();

        let clamped = on_second(|vcpu| write(vcpu, 0, SET_PERF, 250));
        assert_got!(clamped, none, "a request before it has looked");
        let look: fn(&mut Vcpu) = |vcpu| {
            read(vcpu, 0, CUR_PERF);
        };
        assert_got!(on_second(look), (256, 256), "it has looked");
        let clamped = on_second(|vcpu| write(vcpu, 0, SET_PERF, 500));
        assert_got!(clamped, (512, 512), "a request on its page");
        assert_got!(clamps(), none, "the first vCPU");

        // The first vCPU's request waits for the second to look.
        setup.write(0, SET_PERF, 750);
        assert_got!(clamps(), none, "the first vCPU after its request");
        assert_got!(on_second(look), (768, 768), "it has looked again");

        // It takes the page back.
        setup.read(0, CUR_PERF);
        assert_got!(clamps(), (768, 768), "the first vCPU has looked");
        setup.write(0, SET_PERF, 125);
        assert_got!(clamps(), (128, 128), "the first vCPU after its request");
        let clamped = on_second(|vcpu| write(vcpu, 0, SET_PERF, 1000));
        assert_got!(clamped, (768, 768), "the second vCPU keeps its clamp");

        drop(to_second);
        second.join().expect("the second vCPU's thread");
    });
}

/// As with sched_setattr(2).
fn threads_inherit_the_clamp() {
    in_a_thread(|| {
        let mut setup = Setup::new(&[1000]);
        setup.write(0, SET_PERF, 250);
        assert_got!(clamps(), (256, 256));
        let child = thread::spawn(clamps).join().expect("a thread");
        assert_got!(child, (256, 256), "clamps of a thread that it starts");
    });
}

fn current_frequency() {
    in_a_thread(|| {
        let mut setup = Setup::new(&[1_000_000, 2_000_000]);
        if host_has_cpufreq() {
            stay_on(0);
            let highest = cpu_0("cpufreq/cpuinfo_max_freq").expect("a frequency");
            let scale = cpu_0("cpu_capacity").unwrap_or(1024);
            let wanted = |now: u64| 2_000_000 * scale / 1024 * now.min(highest) / highest;
            // Without a list the CPU decides, and only the range is known.
            let steps = frequencies_of_cpu_0().unwrap_or_default();
            let own = fs::read_to_string(GOVERNOR).expect("a governor");
            // Whatever it was, and each end of what the host has.
            for governor in [own.trim(), "powersave", "performance", own.trim()] {
                // A host may not have it, and then stays as it is.
                let stays = fs::write(GOVERNOR, governor).is_ok() && governor != own.trim();
                for round in 0..50 {
                    let khz = [1_000_000, 2_000_000][round % 2];
                    setup.write(0, SET_PERF, khz);
                    let got = u64::from(setup.read(0, CUR_PERF));
                    assert!((1..=2_000_000).contains(&got), "got {got} kHz");
                    if steps.is_empty() {
                        continue;
                    }
                    if stays {
                        let now = cpu_0("cpufreq/scaling_cur_freq").expect("a frequency");
                        assert_got!(got, wanted(now), "{governor}, at {now} of {highest} kHz");
                    } else {
                        let possible: Vec<_> = steps.iter().copied().map(wanted).collect();
                        assert!(
                            possible.contains(&got),
                            "{governor}: wanted one of {possible:?} kHz, got {got}"
                        );
                    }
                }
            }
        } else {
            assert_got!(setup.read(0, CUR_PERF), 2_000_000, "before any request");
            for khz in [1, 1_000_000, 1_234_567, 2_000_000] {
                setup.write(0, SET_PERF, khz);
                assert_got!(setup.read(0, CUR_PERF), khz, "after a request");
            }
        }
    });
}

fn table_and_requests_stay_when_replaced() {
    let census = Census::now();
    in_a_thread(move || {
        let mut setup = Setup::new(&[1000, 4000]);
        setup.write(0, SET_PERF, 1000);
        setup.write(0, PERFTBL_SEL, 1);
        let changes = setup
            .device
            .replace(sample("vcpufreq"), OnLoss::Refuse, unpaused);
        let changes = changes.expect("replacing");
        assert_got!(changes.carried, ["perf_table", "vcpus"], "maps that go on");
        assert_got!(setup.state(0), [1000, 1, 256, 0]);
        assert_got!(setup.read(0, PERFTBL_LEN), 2);
        assert_got!(setup.read(0, PERFTBL_RD), 4000);
        // For reads and writes, "reset" and "restore".
        census.wait_for_newer(4, 2);
        drop(setup);
        census.wait_for_newer(0, 0);
    });
}

/// Both have the same registers and formulas, and clamp the same thread.
fn as_the_model_in_user_space() {
    in_a_thread(|| {
        let seed = number_from_env("KVM_BPF_SEED", 1);
        let accesses = number_from_env("KVM_BPF_ACCESSES", 5000) / 5;
        let mut random = Random::new(seed);
        let table: Vec<u32> = (1..=21).map(|step| step * 123_456).collect();
        let setup = Setup::new(&table);
        // The second has another number than that of the page it uses most.
        let ids = [0, 9];
        let mut vcpus = [setup.vcpu, setup.guest.vcpu(ids[1])];
        let mut model =
            userspace::create("vcpufreq", Vec::new(), &table).expect("the model in user space");
        assert_described("vcpufreq", setup.device.programs().note());

        let cpufreq = host_has_cpufreq();
        for number in 0..accesses {
            let width = [1, 2, 4, 4, 4, 4, 4, 8][random.below(8) as usize];
            let register = match random.below(8) {
                7 => random.below(CPU_SIZE / 8) * 8,
                index => 4 * index,
            };
            let offset = (random.below(CPUS) * CPU_SIZE + register) & !(width as u64 - 1);
            let value = match random.below(4) {
                0 => random.next(),
                1 => random.below(30),
                _ => random.below(3_000_000),
            };
            let write = random.below(2) == 0;
            let index = random.below(2) as usize;
            let id = ids[index] as usize;
            let what = format!(
                "access {number} of seed {seed}: {width} bytes at {offset:#x} by vCPU {id}"
            );
            // The one, then the other, from the same clamps.
            let before = clamps();
            let got = if write {
                let exits = vcpus[index].write(ADDR + offset, width, value);
                assert_got!(exits, [], "{what}: exits");
                0
            } else {
                let read = vcpus[index].read(ADDR + offset, width);
                assert_got!(read.exits, [], "{what}: exits");
                read.value
            };
            let got_clamps = clamps();
            uclamp::set_current(before.0, before.1).expect("sched_setattr");
            let wanted = if write {
                model.write(id, offset, &value.to_le_bytes()[..width]);
                0
            } else {
                let mut data = [0; 8];
                model.read(id, offset, &mut data[..width]);
                u64::from_le_bytes(data)
            };
            assert_got!(got_clamps, clamps(), "{what}, {value:#x}: clamps");
            if cpufreq && !write && offset % CPU_SIZE == CUR_PERF && width == 4 {
                let range = 1..=u64::from(table[20]);
                assert!(range.contains(&got), "{what}: {got}");
                assert!(range.contains(&wanted), "{what}: {wanted}");
            } else {
                assert_got!(got, wanted, "{what}");
            }
        }
    });
}
