// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Pages that are not there, and pages that come late: who waits for them, and who does not.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};
use std::{env, thread};

use kvm_bpf::perms::Allow;
use kvm_bpf::uapi::KVM_DEV_BPF_ATTR_GROUP_PERMS;
use kvm_bpf_selftests::bpf::Census;
use kvm_bpf_selftests::device::Device;
use kvm_bpf_selftests::guest::Guest;
use kvm_bpf_selftests::harness::{Victim, wait_for};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{_IOC_READ, _IOC_WRITE, ioctl_expr, ioctl_with_mut_ref};

use super::super::ADDR;
use super::{
    By, PAGE, Pages, READ, READ_NOFAULT, START, Setup, WRITE, WRITE_NOFAULT, request, result,
};

pub(super) fn memory_that_is_not_there() {
    let mut setup = Setup::new("mem", 2);
    setup.window(0, START, 2 * PAGE as u64, true, true);
    for by in [By::Access, By::Run] {
        setup.pages.forget();
        let got = setup.ask(by, READ_NOFAULT, START + 4, &[0x5a; 4]);
        assert_got!(got, (libc::EFAULT, vec![0; 4]));
        assert_got!(
            setup.ask(by, WRITE_NOFAULT, START + 4, &[7; 4]).0,
            libc::EFAULT
        );
        assert_got!(setup.ask(by, WRITE, START + 4, &[7; 4]).0, 0);
        assert_got!(
            setup.ask(by, READ_NOFAULT, START + 4, &[0; 4]),
            (0, vec![7; 4])
        );
        // The next page still is not, nor is a part of what crosses into it.
        let edge = START + PAGE as u64 - 2;
        let got = setup.ask(by, READ_NOFAULT, edge, &[0x5a; 4]);
        assert_got!(got, (libc::EFAULT, vec![0; 4]));
        assert_got!(setup.ask(by, READ, edge, &[0x5a; 4]), (0, vec![0; 4]));
    }
    // Nor will it ever be.
    // SAFETY: the mapping is ours.
    let result = unsafe { libc::mprotect(setup.pages.start.cast(), 2 * PAGE, libc::PROT_NONE) };
    assert_eq!(result, 0, "mprotect");
    assert_got!(setup.read(START, 8), (libc::EFAULT, vec![0; 8]));
    assert_got!(setup.write(START, &[1]), libc::EFAULT);
}

/// Has the pages of a range come when this says so.
struct Late(OwnedFd);

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRegister {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

impl Late {
    /// `_IOWR(UFFDIO, number, size)`.
    const fn ioctl(number: u32, size: usize) -> libc::c_ulong {
        ioctl_expr(_IOC_READ | _IOC_WRITE, 0xaa, number, size as u32)
    }

    fn new(pages: &Pages) -> Self {
        // SAFETY: no pointers.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
        assert!(fd >= 0, "userfaultfd: {}", io::Error::last_os_error());
        // SAFETY: the kernel just gave us this fd.
        let late = Late(unsafe { OwnedFd::from_raw_fd(fd as i32) });
        let mut api = UffdioApi {
            api: 0xaa,
            features: 0,
            ioctls: 0,
        };
        late.call(0x3f, &mut api);
        late.call(
            0,
            &mut UffdioRegister {
                start: pages.start as u64,
                len: pages.len as u64,
                // Pages that are missing.
                mode: 1,
                ioctls: 0,
            },
        );
        late
    }

    fn call<T>(&self, number: u32, arg: &mut T) {
        let request = Self::ioctl(number, size_of::<T>());
        // SAFETY: the kernel reads and writes no more than the structure.
        let result = unsafe { ioctl_with_mut_ref(&self.0, request, arg) };
        assert_eq!(
            result,
            0,
            "ioctl {number:#x}: {}",
            io::Error::last_os_error()
        );
    }

    /// Waits until somebody wants one.
    fn wait(&self) {
        /// `struct uffd_msg`; the event of a page that is missing.
        const SIZE: usize = 32;
        const PAGEFAULT: u8 = 0x12;

        let mut message = [0; SIZE];
        // SAFETY: the buffer is as large as said.
        let len = unsafe { libc::read(self.0.as_raw_fd(), message.as_mut_ptr().cast(), SIZE) };
        assert_got!((len, message[0]), (SIZE as isize, PAGEFAULT));
    }

    /// Has a page come, with that in all bytes.
    fn come(&self, pages: &Pages, page: usize, byte: u8) {
        let from = [byte; PAGE];
        self.call(
            3,
            &mut UffdioCopy {
                dst: pages.at(page * PAGE, PAGE) as u64,
                src: from.as_ptr() as u64,
                len: PAGE as u64,
                mode: 0,
                copy: 0,
            },
        );
    }
}

/// Who may sleep waits for them, and so does closing the device; who may not does not.
pub(super) fn pages_that_come_late() {
    for by in [By::Access, By::Run] {
        let mut setup = Setup::new("mem", 2);
        setup.window(0, START, 2 * PAGE as u64, true, true);
        let late = Late::new(&setup.pages);
        for op in [READ_NOFAULT, WRITE_NOFAULT] {
            assert_got!(setup.ask(by, op, START + 4, &[0x5a; 4]).0, libc::EFAULT);
        }
        let Setup {
            vcpu,
            device,
            guest,
            pages,
        } = setup;
        request(device.programs(), READ, START + 4, &[0x5a; 4]);
        thread::scope(|scope| {
            let ask = scope.spawn(|| {
                let mut vcpu = vcpu;
                match by {
                    By::Access => assert_got!(vcpu.write(ADDR, 4, 0), []),
                    _ => assert!(device.run("work", 0).expect("a run"), "no program"),
                }
            });
            late.wait();
            thread::sleep(Duration::from_millis(20));
            assert!(!ask.is_finished(), "wanted it to wait for the page");
            late.come(&pages, 0, 0x3c);
            ask.join().expect("the access");
        });
        let (result, _, data) = result(device.programs(), 4);
        assert_got!((result, data), (0, vec![0x3c; 4]));

        // A write, on the device's thread; and the device closes meanwhile.
        let wake = EventFd::new(0).expect("eventfd");
        request(device.programs(), WRITE, START + PAGE as u64, &[0x11; 4]);
        let mut device = device;
        device
            .set_work_eventfd("work", Some(&wake))
            .expect("an eventfd");
        wake.write(1).expect("signalling an eventfd");
        late.wait();
        thread::scope(|scope| {
            let close = scope.spawn(|| drop(device));
            thread::sleep(Duration::from_millis(20));
            assert!(!close.is_finished(), "wanted it to wait for the page");
            // That takes the lock with which KVM releases devices.
            let create = scope.spawn(|| Device::new(guest.vm()));
            let is_created = within_patience(|| create.is_finished());
            late.come(&pages, 1, 0x3c);
            close.join().expect("closing");
            assert!(is_created, "wanted another device, while one closes");
        });
        assert_got!(pages.bytes(PAGE, 5), [0x11, 0x11, 0x11, 0x11, 0x3c]);
        drop((guest, late));
    }
}

/// When work is removed, its program does not run, whoever runs it.
pub(super) fn removal_waits_for_a_page_that_is_late() {
    for by in [By::Run, By::Signal] {
        let setup = Setup::new("mem", 1);
        setup.window(0, START, PAGE as u64, true, true);
        let late = Late::new(&setup.pages);
        let Setup {
            mut device,
            guest: _guest,
            pages,
            ..
        } = setup;
        let wake = EventFd::new(0).expect("eventfd");
        let set = device.set_work_eventfd("work", Some(&wake));
        set.expect("the program's eventfd");
        request(device.programs(), READ, START, &[0; 4]);
        thread::scope(|scope| {
            let run = scope.spawn(|| match by {
                By::Signal => wake.write(1).is_ok(),
                _ => device.run("work", 0).is_ok(),
            });
            late.wait();
            let remove = scope.spawn(|| device.device().unset_work(0));
            thread::sleep(Duration::from_millis(50));
            let waits = !remove.is_finished();
            late.come(&pages, 0, 0x3c);
            assert!(waits, "{by:?}: wanted it to wait");
            let removed = remove.join().expect("no panic");
            removed.expect("removing the work");
            let (errno, served, data) = result(device.programs(), 4);
            assert_got!((errno, served, data), (0, 1, vec![0x3c; 4]), "{by:?}");
            assert!(run.join().expect("no panic"), "{by:?}: wanted a run");
        });
    }
}

/// Whether something comes true, on a machine that may be busy.
fn within_patience(is_true: impl Fn() -> bool) -> bool {
    let patience = Instant::now() + Duration::from_secs(20);
    while !is_true() && Instant::now() < patience {
        thread::sleep(Duration::from_millis(1));
    }
    is_true()
}

/// Nobody waits for whoever gets the permissions.
pub(super) fn permissions_for_a_page_that_is_late() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let pages = Pages::new(1);
    let late = Late::new(&pages);
    let eventfd = EventFd::new(0).expect("eventfd");
    let addr = pages.at(0, PAGE) as u64;
    thread::scope(|scope| {
        // SAFETY: the kernel writes the permissions there, and nothing else does meanwhile.
        let get = || unsafe { device.get_attr(KVM_DEV_BPF_ATTR_GROUP_PERMS, 0, addr) };
        let get = scope.spawn(get);
        late.wait();
        let set = scope.spawn(|| device.set_irq(0, eventfd.as_raw_fd()));
        let is_set = within_patience(|| set.is_finished());
        late.come(&pages, 0, 0);
        assert!(is_set, "wanted an interrupt to be set, but it waits");
        assert_got!(get.join().expect("no panic"), Ok(()));
    });
    assert!(pages.bytes(0, 8) != [0; 8], "wanted permissions, got none");
}

/// A run that waits for another one does not take place.
pub(super) fn run_is_given_up_while_it_waits() {
    let setup = Setup::new("mem", 1);
    setup.window(0, START, PAGE as u64, true, true);
    let late = Late::new(&setup.pages);
    let (image, pages) = (&setup.device, &setup.pages);
    request(image.programs(), READ, START, &[0; 4]);
    thread::scope(|scope| {
        let first = scope.spawn(|| image.run("work", 0).is_ok());
        late.wait();
        let second = scope.spawn(|| image.run("work", 0).is_ok());
        thread::sleep(Duration::from_millis(50));
        let waits = !second.is_finished();
        let device = image.device();
        let mut left = device.permissions().expect("the permissions");
        left.allow = left.allow.without(Allow::RUN);
        let given_up = device.restrict(left);
        late.come(pages, 0, 0x3c);
        assert!(waits, "wanted the second run to wait");
        given_up.expect("giving up a permission");
        let ran = [first, second].map(|run| run.join().expect("no panic"));
        assert_got!(ran, [true, false]);
    });
    let (errno, served, data) = result(image.programs(), 4);
    assert_got!((errno, served, data), (0, 1, vec![0x3c; 4]));
}

/// The page never comes, and all threads are in the kernel for it.
pub(super) fn killed_while_a_page_is_late() {
    const VARIABLE: &str = "KVM_BPF_MEM_VICTIM";

    if env::var_os(VARIABLE).is_some() {
        let setup = Setup::new("mem", 1);
        setup.window(0, START, PAGE as u64, true, true);
        let late = Late::new(&setup.pages);
        let wake = EventFd::new(0).expect("eventfd");
        let Setup {
            mut vcpu,
            mut device,
            guest: _guest,
            pages: _pages,
        } = setup;
        device
            .set_work_eventfd("work", Some(&wake))
            .expect("an eventfd");
        request(device.programs(), READ, START, &[0; 4]);
        wake.write(1).expect("signalling an eventfd");
        late.wait();
        thread::scope(|scope| {
            scope.spawn(|| vcpu.write(ADDR, 4, 0));
            scope.spawn(|| device.run("work", 0));
            loop {
                // Whoever else wants the page.
                late.wait();
            }
        });
    }
    let census = Census::now();
    let victim = Victim::new("mem::killed_while_a_page_is_late", VARIABLE, "1");
    let task = format!("/proc/{}/task", victim.id());
    wait_for("programs and threads of the process", true, || {
        let tasks = fs::read_dir(&task).map_or(0, Iterator::count);
        census.newer().0 == 2 && tasks >= 5
    });
    thread::sleep(Duration::from_millis(50));
    victim.kill();
    census.wait_for_newer(0, 0);
}
