// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a guest does that goes on in another VMM, whose device's programs are replaced, or that
//! starts again.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::{self, sleep};
use std::time::Duration;

use kvm_bpf_selftests::harness::stay_on;
use nix::sys::reboot::RebootMode;
use nix::unistd::{SysconfVar, sysconf};

use crate::clocks::{Clock, tell_alarm};
use crate::disks::{GUEST_IO, device};
use crate::registers::{COUNT, Registers, SCRATCH};
use crate::system::{self, number, parts, program, virtio_interrupts, wait_until, wrong};

const SHORTLY: Duration = Duration::from_millis(200);
const SECOND: Duration = Duration::from_secs(1);

/// `goes-on=ADDRESS,CLOCK,SECONDS`: accesses a bank for a while, until the alarm of a clock rings
/// that is set for so many seconds ahead. The clock is one of /sys/class/rtc, or the address of a
/// PL031 that no driver has.
///
/// "ROUND number" each time; at the end "RTC since_epoch" and "RTC alarm" as of `rtc`, and "GOES-ON
/// rounds wrong accesses": how often SCRATCH was not as written, and how many accesses COUNT has
/// counted, which are two in a round.
pub fn goes_on(args: &[&str]) -> io::Result<()> {
    let [addr, clock, seconds] = parts(args)?;
    let bank = Registers::at(number(addr)?)?;
    let clock = Clock::new(clock)?;
    let before = clock.alarms();
    clock.set_alarm(number(seconds)? as u32)?;
    let alarm = clock.alarm();
    let (mut wrong, mut round) = (0, 0);
    let count = bank.read::<u64>(COUNT);
    while round < 20 || (round < 1000 && clock.alarms() == before) {
        round += 1;
        bank.write::<u64>(SCRATCH, round);
        println!("ROUND {round}");
        sleep(SHORTLY);
        wrong += u64::from(bank.read::<u64>(SCRATCH) != round);
    }
    let count = bank.read::<u64>(COUNT) - count;
    let now = clock.now();
    println!("RTC since_epoch {now}");
    tell_alarm(&clock, &alarm, &now, before);
    println!("GOES-ON {round} {wrong} {count}");
    Ok(())
}

/// When there is this file, a load ends.
const STOP: &str = "/stop";

/// `io-moves=NAME,ADDRESS,TIMES`: loads a disk as `io` does, with 64 requests in flight of 32 pages
/// at most, and reads /dev/hwrng, until a `selftests/progs/convert` has gone on so often after a
/// move or an attempt.
///
/// "IO-MOVES" when it begins; at the end "RANDOM reads short zeroes": how many reads of 4 KiB there
/// were, how many had less, and how many had 64 zeroes; and the line "IO ...".
pub fn io_moves(args: &[&str]) -> io::Result<()> {
    const RESTORED: u64 = 0x18;

    let [name, addr, times] = parts(args)?;
    let counts = Registers::at(number(addr)?)?;
    let times = number(times)?;
    let load = program(GUEST_IO, &[&device(name), "64", "32", STOP])
        .stdout(Stdio::piped())
        .spawn()?;
    let random = thread::spawn(random_reads);
    println!("IO-MOVES");
    while counts.read::<u64>(RESTORED) < times {
        sleep(SHORTLY);
    }
    File::create(STOP)?;
    let load = load.wait_with_output()?;
    let random = random.join().map_err(|_| wrong("/dev/hwrng"))?;
    println!("{}", random?);
    print!("{}", String::from_utf8_lossy(&load.stdout));
    fs::remove_file(STOP)
}

fn random_reads() -> io::Result<String> {
    const ROW: usize = 64;

    let mut device = File::open("/dev/hwrng")?;
    let (mut reads, mut short, mut zeroes) = (0, 0, 0);
    while !Path::new(STOP).exists() {
        let mut bytes = Vec::new();
        reads += 1;
        device.by_ref().take(4096).read_to_end(&mut bytes)?;
        short += u64::from(bytes.len() < 4096);
        zeroes += u64::from(bytes.chunks(ROW).any(|row| *row == [0; ROW]));
    }
    Ok(format!("RANDOM {reads} {short} {zeroes}"))
}

/// `level=ADDRESS`: has the interrupt of a `selftests/progs/virtio_level` wanted all the time until
/// the guest has moved twice; then once, while there is no driver and the guest moves.
///
/// "LEVEL acknowledged" meanwhile, and "MOVED times" when it goes on after that; "HELD" without a
/// driver; at the end "LEVELS more acknowledged HW:COUNT", with how often it was since "HELD", and
/// counts as of `irqs`.
pub fn level(args: &[&str]) -> io::Result<()> {
    const WANTED: u64 = 0xf00;
    const ACKS: u64 = 0xf04;
    const MOVES: u64 = 0xf08;

    let [addr] = parts(args)?;
    let device = Registers::at(number(addr)?)?;
    let acks = || device.read::<u32>(ACKS);
    let moved = |times| device.read::<u32>(MOVES) >= times;
    device.write::<u32>(WANTED, 0x7fff_ffff);
    for times in [1, 2] {
        while !moved(times) {
            println!("LEVEL {}", acks());
            sleep(SHORTLY);
        }
        let before = acks();
        if wait_until(300, SHORTLY, || acks() >= before + 10) {
            println!("MOVED {times}");
        }
    }
    device.write::<u32>(WANTED, 10);
    sleep(SECOND);
    let driver = Path::new("/sys/bus/platform/drivers/virtio-mmio");
    let name = fs::read_dir(driver)?
        .filter_map(Result::ok)
        .find(|it| it.path().join("driver").exists())
        .ok_or_else(|| wrong("no virtio device"))?
        .file_name();
    fs::write(driver.join("unbind"), name.as_encoded_bytes())?;
    let before = acks();
    device.write::<u32>(WANTED, 1);
    println!("HELD");
    while !moved(3) {
        sleep(SHORTLY);
    }
    fs::write(driver.join("bind"), name.as_encoded_bytes())?;
    // One too many would come now.
    sleep(SECOND);
    let (more, acks) = (acks() - before, acks());
    println!("LEVELS {more} {acks}{}", virtio_interrupts());
    Ok(())
}

/// `writes=ADDRESS`: writes to a `selftests/progs/convert` from two CPUs, until another version has
/// counted for a while.
///
/// "WRITES" at first, and at the end "WRITES version written counted saved restored replaced".
pub fn writes(args: &[&str]) -> io::Result<()> {
    const VERSION: u64 = 0x00;
    const WRITES: u64 = 0x08;

    let [addr] = parts(args)?;
    let addr = number(addr)?;
    let device = Registers::at(addr)?;
    println!("WRITES");
    let stop = AtomicBool::new(false);
    let write_on = |cpu| -> io::Result<u64> {
        stay_on(cpu);
        let device = Registers::at(addr)?;
        let mut written = 0;
        while !stop.load(Relaxed) {
            device.write::<u64>(WRITES, 1);
            written += 1;
        }
        Ok(written)
    };
    let version = || device.read::<u64>(VERSION);
    let first = version();
    let written: io::Result<u64> = thread::scope(|scope| {
        let write_on = &write_on;
        let threads = [0, 1].map(|cpu| scope.spawn(move || write_on(cpu)));
        wait_until(240, Duration::from_millis(500), || version() != first);
        sleep(2 * SECOND);
        stop.store(true, Relaxed);
        let joined = threads.map(|thread| thread.join().expect("a thread that writes"));
        joined.into_iter().sum()
    });
    let [counted, saved, restored, replaced] =
        [WRITES, 0x10, 0x18, 0x20].map(|register| device.read::<u64>(register));
    let (version, written) = (version(), written?);
    println!("WRITES {version} {written} {counted} {saved} {restored} {replaced}");
    Ok(())
}

/// `reboots=ADDRESS,TIMES[,NAME]`: resets so often, which a bank tells, then switches the machine
/// off. Each boot makes three accesses of the bank.
///
/// "BOOT number scratch cpus" with what SCRATCH has at first; with a clock "RTC since_epoch" as of
/// `rtc`, and "RTC left alarm interrupts": the alarm that is set, and how many interrupts come in the
/// time until the one of the boot before was to ring.
pub fn reboots(args: &[&str]) -> io::Result<()> {
    let (addr, times, clock) = match *args {
        [addr, times] => (addr, times, None),
        [addr, times, name] => (addr, times, Some(Clock::new(name)?)),
        _ => return Err(wrong(args.join(","))),
    };
    let bank = Registers::at(number(addr)?)?;
    let times = number(times)?;
    let scratch = bank.read::<u64>(SCRATCH);
    let boot = (bank.read::<u64>(COUNT) - 2) / 3;
    let cpus = sysconf(SysconfVar::_NPROCESSORS_CONF)?.unwrap_or(0);
    println!("BOOT {boot} {scratch:#018X} {cpus}");
    bank.write::<u64>(SCRATCH, 0x1122_3344_5566_7788);
    if let Some(clock) = clock {
        println!("RTC since_epoch {}", clock.now());
        let left = clock.alarm();
        if boot > 0 {
            sleep(9 * SECOND);
        }
        println!("RTC left {left} {}", clock.alarms());
        if boot != times {
            clock.set_alarm(8)?;
        }
    }
    system::end(match boot < times {
        true => RebootMode::RB_AUTOBOOT,
        false => RebootMode::RB_POWER_OFF,
    })
}

/// `busy=ADDRESS`: a `selftests/progs/busy` counts boots; the first two reset while the VMM is busy.
///
/// "BOOT number", and "BUSY number" some seconds before it resets.
pub fn busy(args: &[&str]) -> io::Result<()> {
    const KEPT: u64 = 0x00;
    const BUSY: u64 = 0x04;
    const ENDS: u64 = 0x08;

    let [addr] = parts(args)?;
    let device = Registers::at(number(addr)?)?;
    let boot = device.read::<u32>(KEPT) + 1;
    device.write::<u32>(KEPT, boot);
    println!("BOOT {boot}");
    if boot > 2 {
        return Ok(());
    }
    while device.read::<u32>(BUSY) == 0 {
        sleep(SHORTLY);
    }
    println!("BUSY {boot}");
    // Another process has to be there for the second one.
    sleep(boot * 10 * SECOND);
    device.write::<u32>(ENDS, 1);
    system::end(RebootMode::RB_AUTOBOOT)
}
