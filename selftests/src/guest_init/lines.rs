// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Interrupts, GPIO lines and serial ports.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::thread::sleep;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{SetArg, cfmakeraw, tcdrain, tcgetattr, tcsetattr};

use crate::registers::Registers;
use crate::system::{fact, interrupts, number, parts, program, status, virtio_interrupts};

/// `irqs=ADDRESS`: has a `selftests/progs/virtio_irqs` signal first its interrupts that no driver
/// has requested, then three times the one that one has.
///
/// "IRQS address HW:COUNT..." after each of both, for the interrupts of all such devices.
pub fn irqs(args: &[&str]) -> io::Result<()> {
    const SIGNAL: u64 = 0xf00;

    let [addr] = parts(args)?;
    let device = Registers::at(number(addr)?)?;
    for irq in [1, 2] {
        device.write::<u32>(SIGNAL, irq);
    }
    sleep(Duration::from_secs(1));
    println!("IRQS {addr}{}", virtio_interrupts());
    // With a pause: two signals at once may be one interrupt.
    for _ in 0..3 {
        device.write::<u32>(SIGNAL, 0);
        sleep(Duration::from_millis(500));
    }
    sleep(Duration::from_secs(1));
    println!("IRQS {addr}{}", virtio_interrupts());
    Ok(())
}

/// `gpio=NAME`: GPIO lines, as in gpiochip0. The kernel's gpio-event-mon waits on line 3 for two
/// rising edges, two falling ones and four of both kinds; its gpio-hammer has line 5 high, low and
/// high, and the event monitor waits for line 6 to rise.
///
/// What they print, and "GPIO status" of the hammer.
pub fn gpio(args: &[&str]) -> io::Result<()> {
    let [name] = parts(args)?;
    for (edges, count) in [(&["-r"][..], "2"), (&["-f"], "2"), (&["-r", "-f"], "4")] {
        monitor(name, "3", edges, count)?;
    }
    let hammer = program("gpio-hammer", &["-n", name, "-o", "5", "-c", "3"]);
    println!("GPIO {}", status(hammer)?);
    monitor(name, "6", &["-r"], "1")
}

/// Waits for so many edges of a line.
fn monitor(name: &str, line: &str, edges: &[&str], count: &str) -> io::Result<()> {
    let mut command = program("gpio-event-mon", &["-n", name, "-o", line, "-c", count]);
    command.args(edges);
    status(command)?;
    Ok(())
}

/// `uio=NAME`: an interrupt for programs, as in uio0, of a level-triggered line that is high.
///
/// "UIO wanted", and "UIO again", as it stays high; then the event monitor waits for line 6 of
/// gpiochip0 to rise, before which the line goes low: "UIO quiet"; when it is high again, "UIO
/// wanted".
pub fn uio(args: &[&str]) -> io::Result<()> {
    let [name] = parts(args)?;
    let line = File::options()
        .read(true)
        .write(true)
        .open(format!("/dev/{name}"))?;
    // The driver turns the interrupt off when it comes, until a program wants it again.
    let want = || (&line).write_all(&1_u32.to_ne_bytes());
    let comes_within = |seconds: u16| -> io::Result<bool> {
        let timeout = PollTimeout::try_from(1000 * i32::from(seconds)).expect("a time");
        let comes = poll(&mut [PollFd::new(line.as_fd(), PollFlags::POLLIN)], timeout)? > 0;
        if comes {
            (&line).read_exact(&mut [0; 4])?;
        }
        Ok(comes)
    };
    for (seconds, what) in [(60, "wanted"), (10, "again")] {
        want()?;
        if comes_within(seconds)? {
            println!("UIO {what}");
        }
    }
    monitor("gpiochip0", "6", &["-r"], "1")?;
    want()?;
    if !comes_within(5)? {
        println!("UIO quiet");
    }
    if comes_within(60)? {
        println!("UIO wanted");
    }
    Ok(())
}

/// `serial=NAME`: a serial port, as in ttyS1, to send each byte and a thousand lines with.
///
/// "SERIAL name type port interrupts".
pub fn serial(args: &[&str]) -> io::Result<()> {
    let [name] = parts(args)?;
    let mut port = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open(format!("/dev/{name}"))?;
    let mut settings = tcgetattr(&port)?;
    cfmakeraw(&mut settings);
    tcsetattr(&port, SetArg::TCSANOW, &settings)?;
    let mut bytes: Vec<u8> = (0..=255).collect();
    for line in 1..=1000 {
        writeln!(bytes, "{line}")?;
    }
    port.write_all(&bytes)?;
    tcdrain(&port)?;
    // It has the interrupt only while it is open.
    let interrupts = interrupts(|own| own == name);
    let fact = |what| fact(format!("/sys/class/tty/{name}/{what}"));
    println!(
        "SERIAL {name} {} {} {interrupts}",
        fact("type"),
        fact("port")
    );
    Ok(())
}

/// `flood=KIB`: writes so much to the console.
pub fn flood(args: &[&str]) -> io::Result<()> {
    let [lines] = parts(args)?;
    for _ in 0..number(lines)? {
        println!("{:01023}", 0);
    }
    Ok(())
}
