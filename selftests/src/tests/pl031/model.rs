// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Thousands of accesses, compared with the clock of the crate `vm-superio`.

use std::thread::sleep;

use kvm_bpf_selftests::harness::{Random, number_from_env};
use vm_superio::Rtc;
use vm_superio::rtc_pl031::{NoEvents, RtcState};

use super::super::SIZE;
use super::super::kfunc::required;
use super::{CR, Clock, DR, ICR, ID_FIRST, IDS, IMSC, LATE, LR, MR, RIS, SECOND, host_time};

/// The clock of vm-superio, with what it lacks added here.
///
/// Where the two differ:
///
/// * A write of 1 to CR resets vm-superio's load register and time; by the manual, as here,
///   it starts the clock and is without effect on one that runs.
/// * vm-superio has no alarm: it sets no RIS, and has no interrupt.
/// * When vm-superio's time does not fit into 32 bits, it goes on with the host's.
/// * vm-superio returns an identification register for reads inside it.
struct Model {
    rtc: Rtc<NoEvents>,
    /// The host's second of the last access; the clock has seen matches up to it.
    second: u32,
}

impl Model {
    fn at(second: u32) -> Self {
        Model {
            rtc: Rtc::new(),
            second,
        }
    }

    /// What DR has in a second of the host's time.
    fn dr(&self, second: u32) -> u32 {
        // vm-superio's own arithmetic, but modulo 2^32.
        second.wrapping_add(self.rtc.state().offset as u32)
    }

    fn mis(&self) -> u32 {
        self.rtc.state().ris & self.rtc.state().imsc
    }

    fn set_ris(&mut self) {
        let state = RtcState {
            ris: 1,
            ..self.rtc.state()
        };
        self.rtc = Rtc::from_state(&state, NoEvents);
    }

    /// Lets time pass; says whether that raised the interrupt.
    fn advance(&mut self, second: u32) -> bool {
        let before = self.mis();
        let passed = second - self.second;
        let until_match = self.rtc.state().mr.wrapping_sub(self.dr(self.second));
        if (1..=passed).contains(&until_match) {
            self.set_ris();
        }
        self.second = second;
        self.mis() > before
    }

    fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.rtc.read(offset as u16, &mut data);
        let got = u32::from_le_bytes(data);
        if offset >= ID_FIRST && !offset.is_multiple_of(4) {
            assert_got!(got, IDS[(offset - ID_FIRST) as usize / 4]);
            return 0;
        }
        if offset == DR {
            let wanted = i64::from(self.second) + self.rtc.state().offset;
            if u32::try_from(wanted).is_err() {
                assert_got!(got, self.second, "vm-superio's DR that does not fit");
                return wanted as u32;
            }
        }
        got
    }

    /// Says whether the write raised the interrupt.
    fn write(&mut self, offset: u64, value: u32) -> bool {
        let before = self.mis();
        let state = self.rtc.state();
        self.rtc.write(offset as u16, &value.to_le_bytes());
        if offset == CR && value == 1 {
            let reset = RtcState {
                lr: 0,
                offset: 0,
                ..state
            };
            assert_got!(self.rtc.state(), reset, "vm-superio after CR = 1");
            self.rtc = Rtc::from_state(&state, NoEvents);
        }
        if (offset == MR || offset == LR) && self.rtc.state().mr == self.dr(self.second) {
            self.set_ris();
        }
        self.mis() > before
    }
}

/// How far the two clocks may be apart, in nanoseconds.
const MARGIN: u32 = 500_000;

/// The second of the host's time, for both clocks: not close to its ends.
fn begin_second() -> u32 {
    loop {
        let now = host_time();
        if (MARGIN..1_000_000_000 - MARGIN).contains(&now.subsec_nanos()) {
            return now.as_secs() as u32;
        }
    }
}

/// Whether it is still this second, for both clocks.
fn is_still(second: u32) -> bool {
    let now = host_time();
    now.as_secs() as u32 == second && now.subsec_nanos() < 1_000_000_000 - MARGIN
}

/// Brings both clocks into the same state.
fn synchronise(clock: &mut Clock) -> Model {
    loop {
        let second = begin_second();
        let mut model = Model::at(second);
        // No match to come soon, and nothing left of an earlier one.
        for (register, value) in [(IMSC, 0), (MR, 0), (LR, 1_000_000), (ICR, 1)] {
            clock.write(register, value);
            model.write(register, value);
        }
        clock.signals();
        if is_still(second) {
            return model;
        }
    }
}

/// A step of the script that both clocks go through.
#[derive(Clone, Copy, Debug)]
enum Step {
    Read(u64),
    Write(u64, u32),
    /// Let the next second begin.
    Wait,
}

/// The next steps: one access most of the time, of the registers and what is beside them.
fn next_steps(random: &mut Random, dr: u32) -> Vec<Step> {
    if random.below(300) == 0 {
        return vec![
            Step::Write(ICR, 1),
            Step::Write(IMSC, random.below(4) as u32),
            Step::Write(MR, dr.wrapping_add(1)),
            Step::Wait,
        ];
    }
    let offset = match random.below(16) {
        index @ 0..8 => 4 * index,
        8..10 => ID_FIRST + 4 * random.below(8),
        10 => 4 * random.below(SIZE / 4),
        11 if cfg!(target_arch = "x86_64") => ID_FIRST + random.below(29),
        12 if cfg!(target_arch = "x86_64") => random.below(SIZE - 4),
        // What makes alarms, more often.
        13 => IMSC,
        14 => MR,
        _ => ICR,
    };
    if random.below(2) == 0 {
        return vec![Step::Read(offset)];
    }
    let value = match random.below(8) {
        0 => random.next() as u32,
        1 => 0,
        2 => u32::MAX - random.below(3) as u32,
        3 | 4 => 1,
        // Near the time, to either side.
        _ => dr.wrapping_add(random.below(6) as u32).wrapping_sub(2),
    };
    vec![Step::Write(offset, value)]
}

/// `KVM_BPF_SEED` and `KVM_BPF_ACCESSES` set the script.
pub(super) fn as_vm_superio() {
    required("bpf_kvm_irq_acquire");
    let seed = number_from_env("KVM_BPF_SEED", 1);
    let accesses = number_from_env("KVM_BPF_ACCESSES", 5000);
    let mut random = Random::new(seed);
    let mut clock = Clock::new();
    let mut model = synchronise(&mut clock);
    let (mut compared, mut alarms, mut alarms_by_time) = (0, 0, 0);
    let mut steps = Vec::new();
    for number in 0..accesses {
        if steps.is_empty() {
            steps = next_steps(&mut random, model.dr(model.second));
            steps.reverse();
        }
        let step = steps.pop().expect("at least one step");
        let what = format!("access {number} of seed {seed}: {step:x?}");

        // A second may begin before the access, and is then known to both.
        let mut second = begin_second();
        while matches!(step, Step::Wait) && second == model.second {
            sleep(SECOND / 100);
            second = begin_second();
        }
        let by_time = model.advance(second);
        let (got, wanted, by_write) = match step {
            Step::Read(offset) => (clock.read(offset), model.read(offset), false),
            Step::Write(offset, value) => {
                clock.write(offset, value);
                (0, 0, model.write(offset, value))
            }
            Step::Wait => (clock.read(RIS), model.read(RIS), false),
        };
        let signals = u64::from(by_time) + u64::from(by_write);
        let mut signalled = clock.signals();
        if !is_still(second) {
            // One began meanwhile: who knows on which side of it the access was.
            model = synchronise(&mut clock);
            continue;
        }
        if signalled < signals {
            // The timer has found the moment, and is about to signal.
            assert!(clock.signalled_within(LATE), "{what}: no signal");
            signalled += clock.signals();
        }
        assert_got!(got, wanted, "{what}");
        assert_got!(signalled, signals, "{what}: signals");
        compared += 1;
        alarms += signals;
        alarms_by_time += u64::from(by_time);
    }
    assert!(
        compared > accesses / 2,
        "wanted most accesses compared, got {compared} of {accesses}"
    );
    // Some of each kind are in the 5000 of all seeds tried.
    assert!(
        accesses < 5000 || (alarms_by_time > 0 && alarms > alarms_by_time),
        "wanted alarms of both kinds compared, got {alarms}, {alarms_by_time} of them by time"
    );
}
