// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Clocks, and the frequencies of CPUs.

use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};
use std::{fs, io};

use kvm_bpf_selftests::harness::{in_a_thread, stay_on};

use crate::registers::Registers;
use crate::system::{fact, interrupts, number, parts, program, status, wait_until, wrong};

/// A clock with an alarm.
pub enum Clock {
    /// One that a driver has: what sysfs has of it.
    OfDriver(PathBuf),
    /// The registers of a PL031 that no driver has.
    Pl031(Registers),
}

impl Clock {
    /// The time.
    const DR: u64 = 0x00;
    /// The alarm's.
    const MR: u64 = 0x04;
    /// Whether the alarm interrupts.
    const IMSC: u64 = 0x10;
    /// Whether it does now.
    const MIS: u64 = 0x18;

    /// By its name in /sys/class/rtc, or by its address.
    pub fn new(name: &str) -> io::Result<Self> {
        if name.starts_with("0x") {
            return Ok(Clock::Pl031(Registers::at(number(name)?)?));
        }
        Ok(Clock::OfDriver(PathBuf::from("/sys/class/rtc").join(name)))
    }

    /// Seconds since 1970.
    pub fn now(&self) -> String {
        match self {
            Clock::OfDriver(directory) => fact(directory.join("since_epoch")),
            Clock::Pl031(registers) => registers.read::<u32>(Self::DR).to_string(),
        }
    }

    /// Sets the alarm, so many seconds ahead.
    pub fn set_alarm(&self, seconds: u32) -> io::Result<()> {
        match self {
            Clock::OfDriver(directory) => {
                fs::write(directory.join("wakealarm"), format!("+{seconds}"))?;
            }
            Clock::Pl031(registers) => {
                let now = registers.read::<u32>(Self::DR);
                registers.write::<u32>(Self::MR, now.wrapping_add(seconds));
                registers.write::<u32>(Self::IMSC, 1);
            }
        }
        Ok(())
    }

    /// For when the alarm is set: a time as above, or "none".
    pub fn alarm(&self) -> String {
        match self {
            Clock::OfDriver(directory) => fact(directory.join("wakealarm")),
            Clock::Pl031(registers) => registers.read::<u32>(Self::MR).to_string(),
        }
    }

    /// How many interrupts of the alarm there were; of registers, whether there is one now.
    pub fn alarms(&self) -> u64 {
        match self {
            Clock::OfDriver(_) => interrupts(|name| name == "rtc-pl031"),
            Clock::Pl031(registers) => registers.read::<u32>(Self::MIS).into(),
        }
    }
}

/// `rtc=NAME`: reads a clock of /sys/class/rtc and sets its alarm.
///
/// "RTC driver ...", "RTC hwclock ..." with what that program says, "RTC since_epoch seconds", and
/// "RTC alarm set now interrupts": when it was set for, when its interrupt had come, both in seconds
/// since 1970, and how many interrupts came.
pub fn rtc(args: &[&str]) -> io::Result<()> {
    let [name] = parts(args)?;
    let clock = Clock::new(name)?;
    println!("RTC driver {}", fact(format!("/sys/class/rtc/{name}/name")));
    let device = format!("/dev/{name}");
    let hwclock = program("busybox", &["hwclock", "-r", "-u", "-f", &device]).output()?;
    let said = [hwclock.stdout, hwclock.stderr].concat();
    println!("RTC hwclock {}", String::from_utf8_lossy(&said).trim_end());
    println!("RTC since_epoch {}", clock.now());
    let before = clock.alarms();
    clock.set_alarm(2)?;
    let alarm = clock.alarm();
    wait_until(40, Duration::from_millis(250), || clock.alarms() > before);
    let now = clock.now();
    tell_alarm(&clock, &alarm, &now, before);
    Ok(())
}

/// Says when an alarm was set for, when its interrupt had come, and how many came.
pub fn tell_alarm(clock: &Clock, alarm: &str, now: &str, before: u64) {
    // One too many would come now.
    sleep(Duration::from_secs(1));
    println!("RTC alarm {alarm} {now} {}", clock.alarms() - before);
}

/// `rtctest=NAME`: runs the kernel's own tests of clocks on one, which take minutes.
///
/// What they print, and "RTCTEST status".
pub fn rtctest(args: &[&str]) -> io::Result<()> {
    let [name] = parts(args)?;
    let status = status(program("rtctest", &[&format!("/dev/{name}")]))?;
    println!("RTCTEST {status}");
    Ok(())
}

/// `cpufreq=CPU`: changes the governor of a CPU, as in cpu0.
///
/// "CPUFREQ cpu governor current highest" for each governor; frequencies are in kHz.
pub fn cpufreq(args: &[&str]) -> io::Result<()> {
    let [cpu] = parts(args)?;
    let directory = PathBuf::from(format!("/sys/devices/system/cpu/{cpu}/cpufreq"));
    let fact = |name| fact(directory.join(name));
    for governor in ["performance", "powersave"] {
        fs::write(directory.join("scaling_governor"), governor)?;
        let governor = fact("scaling_governor");
        let (current, highest) = (fact("scaling_cur_freq"), fact("cpuinfo_max_freq"));
        println!("CPUFREQ {cpu} {governor} {current} {highest}");
    }
    // A CPU complies in its next tick, which an idle one has none of.
    let number = cpu.strip_prefix("cpu").and_then(|it| it.parse().ok());
    let number = number.ok_or_else(|| wrong(cpu))?;
    in_a_thread(move || {
        stay_on(number);
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(1) {}
    });
    Ok(())
}
