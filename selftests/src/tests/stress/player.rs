// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What vCPUs do.

#[cfg(target_arch = "x86_64")]
use kvm_bpf_selftests::guest::PortExit;
use kvm_bpf_selftests::guest::{Args, Exit, Routine, USER_ANSWER, Vcpu, mask};
use kvm_bpf_selftests::harness::Random;

use super::super::{ADDR, SIZE};
#[cfg(target_arch = "x86_64")]
use super::PORT;
use super::programs::{ANSWERS, MEM_VALUE};
use super::tally::Tally;
use super::{MEM, OWN};

/// What a vCPU does.
pub(super) struct Player<'a> {
    pub(super) vcpu: Vcpu,
    pub(super) random: Random,
    pub(super) tally: &'a Tally,
}

impl Player<'_> {
    pub(super) fn step(&mut self) {
        let random = &mut Random::new(self.random.next());
        let width = 1 << random.below(4);
        let addr = match random.below(6) {
            0 => MEM + random.below(3) * SIZE / 2,
            1..=2 => OWN,
            _ => ADDR + random.below(6) * SIZE / 2,
        } + 8 * random.below(2);
        // Most of the time inside the programs that others take away.
        if random.below(4) == 0 {
            return self.write_often(OWN);
        }
        match random.below(if cfg!(target_arch = "x86_64") { 6 } else { 4 }) {
            0..=1 => self.read(addr, width),
            2 => self.write(addr, width),
            3 => self.write_often(addr),
            #[cfg(target_arch = "x86_64")]
            4 => self.port_in(random),
            #[cfg(target_arch = "x86_64")]
            _ => self.port_out(random),
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("four things"),
        }
    }

    /// What a program or the memory gives.
    #[track_caller]
    fn assert_known(&self, value: u64, width: usize, what: &str) {
        let known = ANSWERS.iter().chain(&[MEM_VALUE, 0]);
        let mut known = known.map(|value| value & mask(width));
        let is_known = known.any(|known| known == value & mask(width));
        assert!(
            is_known,
            "{what}: wanted what some program gives, got {value:#x}"
        );
    }

    fn read(&mut self, addr: u64, width: usize) {
        let read = self.vcpu.read(addr, width);
        let what = format!("{width}-byte read at {addr:#x}");
        if read.exits.is_empty() {
            self.assert_known(read.value, width, &what);
            self.tally.count("read", "handled");
        } else {
            assert_got!(read.exits, [Exit::Read(addr, width)], "{what}");
            assert_got!(read.value, USER_ANSWER & mask(width), "{what}, exited");
            self.tally.count("read", "exit");
        }
    }

    /// Writes what the memory has anyway.
    fn write(&mut self, addr: u64, width: usize) {
        let exits = self.vcpu.write(addr, width, MEM_VALUE);
        if exits.is_empty() {
            self.tally.count("write", "handled");
        } else {
            let exit = Exit::Write(addr, width, MEM_VALUE & mask(width));
            assert_got!(exits, [exit], "{width}-byte write at {addr:#x}");
            self.tally.count("write", "exit");
        }
    }

    fn write_often(&mut self, addr: u64) {
        let args = Args {
            value: MEM_VALUE,
            addr,
            count: 20,
            ..Default::default()
        };
        let (results, exits) = self.vcpu.call(Routine::WriteLoop, args);
        assert_got!(results.count, 0, "writes that are left");
        let exit = Exit::Write(addr, 4, MEM_VALUE & mask(4));
        let is_known = exits.len() <= 20 && exits.iter().all(|&got| got == exit);
        assert!(is_known, "20 writes at {addr:#x}: got {exits:x?}");
        self.tally.count("write", "loop");
    }

    #[cfg(target_arch = "x86_64")]
    fn port_in(&mut self, random: &mut Random) {
        let width = 1 << random.below(3);
        let port = (PORT + 4 * random.below(6)) as u16;
        let (register, exits) = self.vcpu.port_in(port, width);
        let what = format!("in of {width} bytes from {port:#x}");
        if exits.is_empty() {
            self.assert_known(register & mask(width), width, &what);
            self.tally.count("in", "handled");
        } else {
            assert_got!(exits, [PortExit::In(port, width, 1)], "{what}");
            self.tally.count("in", "exit");
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn port_out(&mut self, random: &mut Random) {
        let width = 1 << random.below(3);
        let port = (PORT + 4 * random.below(6)) as u16;
        let exits = self.vcpu.port_out(port, width, MEM_VALUE);
        if exits.is_empty() {
            self.tally.count("out", "handled");
        } else {
            let exit = PortExit::Out(port, width, vec![0x77; width]);
            assert_got!(exits, [exit], "out of {width} bytes to {port:#x}");
            self.tally.count("out", "exit");
        }
    }
}
