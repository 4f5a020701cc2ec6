// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Random programs of the three types: the verifier takes them or not, and those that it takes run.
//!
//! Half of the programs only calculate, with their context and their stack. What such a program does
//! is told by an interpreter here, so that neither the rewrite of context accesses nor the compiler
//! of the kernel is trusted. The others use maps, helpers and kfuncs as well; of them nothing more
//! is wanted than that an access is handled or exits, and that the kernel has nothing to say.

use std::collections::BTreeMap;

use kvm_bpf::uapi::{KVM_BPF_MEM_READ, KVM_BPF_MEM_WRITE, kvm_bpf_user_mem};
use kvm_bpf_selftests::bpf::{Census, Insn, LoadOptions, Map, Prog, ProgType};
use kvm_bpf_selftests::device::{Device, region, work};
use kvm_bpf_selftests::guest::{Exit, Guest, USER_ANSWER, Vcpu, mask};
use kvm_bpf_selftests::harness::{Errno, Random};
use kvm_bpf_selftests::programs::CTX_SIZE;
use vmm_sys_util::eventfd::EventFd;

use super::super::eventfd;
use super::{loads, one_of, seed};
use generator::Program;

mod generator;
mod machine;

/// A region so large that all bytes of offsets count.
const ADDR: u64 = 0x4000_0000;
const SIZE: u64 = 0x7fff_0000;
const REGION: u64 = 0xa5;
const WORK: u64 = 0xb;
const VCPU: u32 = 0xc3;

/// `ENOTSUPP`, which user space has no name for.
const ENOTSUPP: i32 = 524;

/// A guest and a device to run them.
struct Bench {
    vcpu: Vcpu,
    device: Device,
    map: Map,
    _irq: EventFd,
}

impl Bench {
    fn new() -> Self {
        let guest = Guest::new();
        let device = Device::new(guest.vm());
        let irq = eventfd();
        device.set_irq(0, std::os::fd::AsRawFd::as_raw_fd(&irq));
        let window = kvm_bpf_user_mem {
            addr: 0xc000,
            size: 0x4000,
            flags: KVM_BPF_MEM_READ | KVM_BPF_MEM_WRITE,
            pad: 0,
        };
        device.set_mem(0, &window);
        Bench {
            vcpu: guest.vcpu(VCPU),
            device,
            map: Map::new(5, 4),
            _irq: irq,
        }
    }

    /// Runs a program on one access or request, and compares what comes of it; returns whether
    /// there was something to compare with.
    fn run(&mut self, kind: ProgType, program: &Program, prog: &Prog, random: &mut Random) -> bool {
        const UNTOUCHED: u64 = 0x5555_5555_5555_5555;

        self.map.set(4, &[UNTOUCHED; 4]);
        let width = 1 << random.below(4);
        let offset = random.below(SIZE / 16) * 16 + random.below(16 / width) * width;
        let (width, addr, data) = (width as usize, ADDR + offset, random.next() << 16 | 0x8001);
        let mut context = [0; CTX_SIZE as usize];
        if kind != ProgType::READ {
            let data = if kind == ProgType::WORK {
                data
            } else {
                data & mask(width)
            };
            context[..8].copy_from_slice(&data.to_le_bytes());
        }
        let index = if kind == ProgType::WORK { WORK } else { REGION };
        context[8..16].copy_from_slice(&offset.to_le_bytes());
        context[16] = width as u8;
        context[20..24].copy_from_slice(&VCPU.to_le_bytes());
        context[24..28].copy_from_slice(&(index as u32).to_le_bytes());
        let outcome = match program.pure {
            true => program.outcome(context),
            false => None,
        };

        let (result, value) = if kind == ProgType::READ {
            self.device
                .set_region(REGION, &region(ADDR, SIZE, Some(prog), None));
            let read = self.vcpu.read(addr, width);
            match read.exits.len() {
                0 => (0, Some(read.value)),
                _ => {
                    assert_got!(read.exits, [Exit::Read(addr, width)]);
                    assert_got!(read.value, USER_ANSWER & mask(width));
                    (1, None)
                }
            }
        } else if kind == ProgType::WRITE {
            self.device
                .set_region(REGION, &region(ADDR, SIZE, None, Some(prog)));
            let exits = self.vcpu.write(addr, width, data);
            if !exits.is_empty() {
                assert_got!(exits, [Exit::Write(addr, width, data & mask(width))]);
            }
            (exits.len() as u64, None)
        } else {
            self.device.set_work(WORK, &work(Some(prog), None));
            match self.device.run(WORK, data) {
                Ok(()) => (0, None),
                Err(Errno(libc::EAGAIN)) => (1, None),
                Err(errno) => panic!("RUN: {errno:?}"),
            }
        };
        let Some((wanted, kept, buf)) = outcome else {
            return false;
        };
        let what = format!(
            "KVM_BPF_SEED={}: {kind:?}, {width} bytes at offset {offset:#x}, data {data:#x}, {}",
            seed(),
            hex(&program.body)
        );
        assert_got!(result, wanted, "the result of {what}");
        assert_got!(self.map.get(4)[0], kept, "r9 of {what}");
        if let Some(value) = value {
            assert_got!(value, buf & mask(width), "what the guest reads by {what}");
        }
        true
    }
}

/// Instructions as the kernel has them, byte by byte.
fn hex(insns: &[Insn]) -> String {
    let insn = |insn: &Insn| {
        let (code, dst, src, off, imm) = insn.parts();
        let bytes = [
            u64::from(code),
            u64::from(src << 4 | dst) << 8,
            u64::from(off as u16) << 16,
            u64::from(imm as u32) << 32,
        ];
        format!("{:016x}", bytes.into_iter().sum::<u64>().swap_bytes())
    };
    insns.iter().map(insn).collect::<Vec<_>>().join(" ")
}

/// What the verifier says no with.
const REFUSALS: [i32; 9] = [
    libc::EACCES,
    libc::EINVAL,
    libc::EPERM,
    libc::E2BIG,
    libc::ENOENT,
    libc::EOPNOTSUPP,
    // Where the number of a map is damaged, and the module of a kfunc.
    libc::EBADF,
    libc::EPROTO,
    ENOTSUPP,
];

pub(super) fn programs() {
    let census = Census::now();
    let mut random = Random::new(seed());
    let (mut accepted, mut compared) = (0, 0);
    let mut refused = BTreeMap::<i32, u64>::new();
    {
        let mut bench = Bench::new();
        for number in 0..loads() {
            // Each has numbers of its own, whatever becomes of the others.
            let random = &mut Random::new(random.next());
            let kind = one_of(random, &[ProgType::READ, ProgType::WRITE, ProgType::WORK]);
            let program = Program::random(kind, &bench.map, random);
            let options = LoadOptions {
                sleepable: random.below(4) == 0,
                without_log: true,
                ..Default::default()
            };
            match Prog::try_load(kind, &program.insns(&bench.map), options) {
                Ok(prog) => {
                    accepted += 1;
                    for _ in 0..2 {
                        compared += u64::from(bench.run(kind, &program, &prog, random));
                    }
                }
                Err(error) => {
                    // Among them is EFAULT, with which the verifier owns up to a defect.
                    assert!(
                        REFUSALS.contains(&error.errno.0),
                        "KVM_BPF_SEED={} program {number}: got {:?} for {}",
                        seed(),
                        error.errno,
                        hex(&program.insns(&bench.map))
                    );
                    *refused.entry(error.errno.0).or_default() += 1;
                }
            }
        }
    }
    println!(
        "KVM_BPF_SEED={}: {} programs, {accepted} accepted, {compared} runs compared, refused with {refused:?}",
        seed(),
        loads()
    );
    // A generator of which nothing loads finds nothing.
    assert!(
        accepted * 4 > loads(),
        "wanted a quarter to load, got {accepted}"
    );
    assert!(
        compared * 10 > loads(),
        "wanted some to be compared, got {compared}"
    );
    census.wait_for_newer(0, 0);
}
