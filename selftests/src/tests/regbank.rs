// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The register bank of `samples/devices`: the same accesses on the model in user space.

use kvm_bpf::clock::HostClock;
use kvm_bpf_selftests::guest::{Guest, mask};
use kvm_bpf_selftests::harness::{Random, number_from_env};
use kvm_bpf_selftests::programs::{plug, sample};
use kvm_bpf_vmm::userspace::{MmioDevice, RegisterBank};

use super::{ADDR, assert_described, element, eventfd, taken};

tests!(as_the_model_in_user_space);

const TIME: u64 = 0x18;
const IRQ: u64 = 0x20;
/// Where the last register ends.
const REGISTERS_END: u64 = 0x24;

/// How far the clock of programs may be from that of user space while the kernel updates both.
const SLACK_NS: u64 = 1_000_000;

/// `KVM_BPF_SEED` and `KVM_BPF_ACCESSES` set the accesses.
fn as_the_model_in_user_space() {
    let seed = number_from_env("KVM_BPF_SEED", 1);
    let accesses = number_from_env("KVM_BPF_ACCESSES", 5000);
    let mut random = Random::new(seed);

    let guest = Guest::new();
    let device = plug(guest.vm(), ADDR, sample("regbank"));
    assert_described("regbank", device.programs().note());
    let irq = eventfd();
    device.device().set_irq(0, &irq).expect("interrupt 0");
    let model_irq = eventfd();
    let mut model = RegisterBank::new(model_irq.try_clone().expect("dup"));
    let mut vcpus = [guest.vcpu(0), guest.vcpu(1)];

    // The clock of the register TIME.
    let clock = HostClock::new(libc::CLOCK_MONOTONIC);
    let now_ns = || clock.now().as_nanos() as u64;
    let size = device.programs().note().mmio_size;
    let mut signals = 0;
    for number in 0..accesses {
        let width = [1, 2, 4, 8][random.below(4) as usize];
        let mut offset = match random.below(8) {
            0 => random.below(size - 8),
            1 | 2 => IRQ,
            _ => random.below(REGISTERS_END),
        };
        // The others do not reach KVM on arm64: a guest without MMU takes a fault.
        if !cfg!(target_arch = "x86_64") || random.below(4) > 0 {
            offset &= !(width as u64 - 1);
        }
        let value = match random.below(3) {
            0 => 0,
            1 => random.below(300),
            _ => random.next() << 16 ^ random.next(),
        };
        let index = random.below(2) as usize;
        let what = format!("access {number} of seed {seed}: {width} bytes at {offset:#x}");

        let vcpu = &mut vcpus[index];
        if random.below(2) == 0 {
            let exits = vcpu.write(ADDR + offset, width, value);
            assert_got!(exits, [], "{what}, {value:#x} written: exits");
            model.write(index, offset, &value.to_le_bytes()[..width]);
        } else {
            let before = now_ns() - SLACK_NS;
            let read = vcpu.read(ADDR + offset, width);
            let after = now_ns() + SLACK_NS;
            assert_got!(read.exits, [], "{what}: exits");
            let mut wanted = [0; 8];
            model.read(index, offset, &mut wanted[..width]);
            if offset & !7 == TIME && offset.is_multiple_of(width as u64) {
                let lane = offset % 8 * 8;
                let since = read.value.wrapping_sub(before >> lane) & mask(width);
                let most = (after >> lane) - (before >> lane);
                assert!(
                    since <= most,
                    "{what}: {read:x?}, {before:#x} to {after:#x}"
                );
            } else {
                assert_got!(read.value, u64::from_le_bytes(wanted), "{what}");
            }
        }
        let signalled = taken(&irq);
        assert_got!(signalled, taken(&model_irq), "{what}, {value:#x}: signals");
        signals += signalled;
    }

    // The numbers of those that reached none.
    let state = element(device.programs(), "regbank");
    let unknown: Vec<u8> = model
        .unknown()
        .iter()
        .flat_map(|n| n.to_ne_bytes())
        .collect();
    assert_got!(state[8..], unknown[..], "accesses that reached no register");
    assert!(signals > 0 || accesses < 100, "no access signalled");
}
