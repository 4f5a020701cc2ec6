// SPDX-License-Identifier: Apache-2.0 OR MIT

//! String instructions, whose elements programs handle or decline.

use Reg::{R0, R1, R2, R6, R7, R8, R9};
use kvm_bpf_selftests::bpf::{
    Index, Map, Prog, ProgType, Reg, add, add_imm, exit, jump_if_ge, load, lookup, mov, mov_imm,
    mov_imm64, store,
};
use kvm_bpf_selftests::device::Device;
use kvm_bpf_selftests::guest::{Args, Guest, PortExit, Routine, user_byte};
use kvm_bpf_selftests::programs::{CTX_BUF, ret};

use super::super::PATTERN;
use super::{PORT, PORTS, WIDTHS, ports};

/// Where string instructions have their data in the guest's memory: at a page's start.
const STRING: u64 = 0xb000;
/// KVM reads ahead so many bytes.
const BLOCK: usize = 1024;

/// Programs that number the elements of a string: `read` gives element n the value `PATTERN + n`,
/// `write` notes its data; both decline those from `decline.start` up to `decline.end`.
struct Series {
    state: Map,
    data: Map,
    read: Prog,
    write: Prog,
}

impl Series {
    fn new(decline: std::ops::Range<u64>) -> Self {
        let (state, data) = (Map::new(1, 3), Map::new(4096, 1));
        state.set(0, &[0, decline.start, decline.end]);
        let [read, write] = [ProgType::READ, ProgType::WRITE].map(|kind| {
            let mut insns = vec![mov(R6, R1)];
            insns.extend(lookup(&state, Index::Imm(0)));
            insns.extend([
                load(8, R7, R0, 0),
                load(8, R8, R0, 8),
                load(8, R9, R0, 16),
                mov(R1, R7),
                add_imm(R1, 1),
                store(8, R0, 0, R1),
            ]);
            if kind == ProgType::READ {
                insns.extend(mov_imm64(R2, PATTERN));
                insns.extend([add(R2, R7), store(8, R6, CTX_BUF, R2)]);
            } else {
                insns.extend(lookup(&data, Index::Reg(R7)));
                insns.extend([load(8, R1, R6, CTX_BUF), store(8, R0, 0, R1)]);
            }
            insns.push(jump_if_ge(R7, R8, 2));
            insns.extend(ret(0));
            insns.push(jump_if_ge(R7, R9, 2));
            insns.extend(ret(1));
            insns.extend([mov_imm(R0, 0), exit()]);
            Prog::load(kind, &insns)
        });
        Series {
            state,
            data,
            read,
            write,
        }
    }

    /// How often a program ran.
    fn runs(&self) -> u64 {
        self.state.get(0)[0]
    }

    /// What `rep ins` of so many elements leaves in memory, and what user space saw.
    fn string_in(&self, width: usize, count: u64) -> (Vec<u8>, Vec<PortExit>) {
        let (bytes, exits) = self.run(Routine::InString, width, count, |_| 0xaa);
        // Nothing behind it.
        let (data, rest) = bytes.split_at(width * count as usize);
        assert!(rest.iter().all(|&byte| byte == 0xaa), "got {rest:x?}");
        (data.to_vec(), exits)
    }

    /// The same for any routine, with what is in memory before.
    fn run(
        &self,
        routine: Routine,
        width: usize,
        count: u64,
        byte: fn(usize) -> u8,
    ) -> (Vec<u8>, Vec<PortExit>) {
        let guest = Guest::new();
        let mut vcpu = guest.vcpu(0);
        let device = Device::new(guest.vm());
        let range = ports(PORT, PORTS, Some(&self.read), Some(&self.write));
        device.set_ports(0, &range);
        let bytes: [u8; 0x4000] = std::array::from_fn(byte);
        guest.write_ram(STRING, &bytes);
        let args = Args {
            addr: PORT.into(),
            count,
            pair: [STRING, 0],
            ..Default::default()
        };
        let (results, exits) = vcpu.ports(routine, width, args);
        assert_got!(results.count, 0, "elements left");
        (guest.read_ram::<0x4000>(STRING).to_vec(), exits)
    }
}

/// Byte `at` of what `rep outs` writes.
fn out_byte(at: usize) -> u8 {
    (at * 7 + at / 256) as u8
}

/// Elements `first` up to `end` of it.
fn out_bytes(width: usize, element: u64) -> Vec<u8> {
    let first = width * element as usize;
    (first..first + width).map(out_byte).collect()
}

/// `rep outs`: each element runs the program once, and those it declines exit one by one.
fn assert_string_out(decline: std::ops::Range<u64>, count: u64) {
    for width in WIDTHS {
        let series = Series::new(decline.clone());
        let (_, exits) = series.run(Routine::OutString, width, count, out_byte);
        let wanted: Vec<_> = (decline.start..decline.end.min(count))
            .map(|element| PortExit::Out(PORT, width, out_bytes(width, element)))
            .collect();
        assert_got!(exits, wanted, "width {width}");
        assert_got!(series.runs(), count, "runs, width {width}");
        for element in 0..count {
            let mut wanted = out_bytes(width, element);
            wanted.resize(8, 0);
            let got = series.data.get(element as u32)[0].to_le_bytes().to_vec();
            assert_got!(got, wanted, "element {element}, width {width}");
        }
    }
}

pub(super) fn string_out_handled() {
    assert_string_out(0..0, 1);
    // More than KVM does at once.
    assert_string_out(0..0, 1500);
}

pub(super) fn string_out_declined() {
    assert_string_out(0..u64::MAX, 100);
}

pub(super) fn string_out_declined_in_the_middle() {
    assert_string_out(10..20, 100);
    assert_string_out(99..100, 100);
}

/// Elements from `first` on as the read program gives them.
fn elements(width: usize, first: u64, count: u64) -> Vec<u8> {
    (first..first + count)
        .flat_map(|element| (PATTERN + element).to_le_bytes()[..width].to_vec())
        .collect()
}

/// What user space gives for a block of so many bytes.
fn user_bytes(len: usize) -> Vec<u8> {
    (0..len).map(user_byte).collect()
}

pub(super) fn string_in_handled() {
    for width in WIDTHS {
        for count in [1, 100, 1500] {
            let series = Series::new(0..0);
            let (data, exits) = series.string_in(width, count);
            assert_got!(exits, [], "width {width}");
            assert_got!(data, elements(width, 0, count), "width {width}");
            assert_got!(series.runs(), count, "runs, width {width}");
        }
    }
}

/// Whole blocks exit, and the program runs once for each.
pub(super) fn string_in_declined() {
    for width in WIDTHS {
        let series = Series::new(0..u64::MAX);
        let block = BLOCK / width;
        let (data, exits) = series.string_in(width, 2 * block as u64 + 10);
        let exit = |count| PortExit::In(PORT, width, count);
        assert_got!(exits, [exit(block), exit(block), exit(10)], "width {width}");
        let parts = [BLOCK, BLOCK, 10 * width].map(user_bytes);
        assert_got!(data, parts.concat(), "width {width}");
        assert_got!(series.runs(), 3, "runs, width {width}");
    }
}

/// From that element to the end of its block all is 0, without a run or an exit.
pub(super) fn string_in_declined_in_the_middle() {
    for width in WIDTHS {
        for declined in [1, 10] {
            let series = Series::new(declined..declined + 1);
            let block = (BLOCK / width) as u64;
            let (data, exits) = series.string_in(width, block + 10);
            assert_got!(exits, [], "width {width}");
            let mut wanted = elements(width, 0, declined);
            wanted.resize(BLOCK, 0);
            wanted.extend(elements(width, declined + 1, 10));
            assert_got!(data, wanted, "width {width}");
            assert_got!(series.runs(), declined + 11, "runs, width {width}");
        }
    }
}

/// The first element of a later block: that block exits, those around it do not.
pub(super) fn string_in_declined_at_a_block() {
    for width in WIDTHS {
        let block = (BLOCK / width) as u64;
        let series = Series::new(block..block + 1);
        let (data, exits) = series.string_in(width, 2 * block + 10);
        let wanted = [PortExit::In(PORT, width, block as usize)];
        assert_got!(exits, wanted, "width {width}");
        let mut wanted = elements(width, 0, block);
        wanted.extend(user_bytes(BLOCK));
        wanted.extend(elements(width, block + 1, 10));
        assert_got!(data, wanted, "width {width}");
        assert_got!(series.runs(), block + 11, "runs, width {width}");
    }
}
