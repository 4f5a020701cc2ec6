// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What calls get: file descriptors, and structures of which a part cannot be accessed.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr;

use kvm_bpf::uapi::{KVM_BPF_ALLOW_IRQ, KVM_BPF_ALLOW_SLEEP};
use kvm_bpf_selftests::bpf::{Map, Prog, ProgType, mov_imm};
use kvm_bpf_selftests::guest::Guest;
use kvm_bpf_selftests::harness::Random;
use kvm_bpf_selftests::programs::ret;
use vmm_sys_util::eventfd::EventFd;

use super::super::one_of;
use super::PAGE;
use crate::tests::irq::call_with_context;

/// What a file descriptor is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    None,
    NotOpen,
    /// A program, by its place among those of the test.
    Prog(usize),
    /// An eventfd, likewise.
    Eventfd(usize),
    Other,
}

/// A program, what a device must allow for it, and what else is told of it.
pub(super) struct Program {
    pub(super) prog: Prog,
    kind: ProgType,
    needs: u64,
    pub(super) sleeps: bool,
    pub(super) result: i32,
}

/// All file descriptors that calls get.
pub(super) struct Files {
    pub(super) programs: Vec<Program>,
    eventfds: Vec<EventFd>,
    others: Vec<i32>,
    _map: Map,
    _null: File,
}

impl Files {
    pub(super) fn new(guest: &Guest) -> Self {
        let mut programs = Vec::new();
        for kind in [ProgType::READ, ProgType::WRITE, ProgType::WORK] {
            for (sleeps, signals, result) in [
                (false, false, 0),
                (false, false, 1),
                (true, false, 0),
                (false, true, 0),
            ] {
                let mut insns = Vec::new();
                if signals {
                    insns.push(mov_imm(kvm_bpf_selftests::bpf::Reg::R2, 0));
                    insns.extend(call_with_context("bpf_kvm_irq_signal"));
                }
                insns.extend(ret(result));
                let load = if sleeps {
                    Prog::load_sleepable
                } else {
                    Prog::load
                };
                let mut needs = 0;
                if sleeps {
                    needs |= KVM_BPF_ALLOW_SLEEP;
                }
                if signals {
                    needs |= KVM_BPF_ALLOW_IRQ;
                }
                programs.push(Program {
                    prog: load(kind, &insns),
                    kind,
                    needs,
                    sleeps,
                    result,
                });
            }
        }
        let map = Map::new(1, 1);
        let null = File::open("/dev/null").expect("/dev/null");
        Files {
            programs,
            eventfds: (0..3).map(|_| EventFd::new(0).expect("eventfd")).collect(),
            others: vec![map.as_raw_fd(), null.as_raw_fd(), guest.vm().as_raw_fd()],
            _map: map,
            _null: null,
        }
    }

    pub(super) fn fd(&self, kind: Kind, random: &mut Random) -> i32 {
        match kind {
            Kind::None => -1,
            Kind::NotOpen => one_of(random, &[-2, i32::MIN, i32::MAX, 100_000, -100]),
            Kind::Prog(n) => self.programs[n].prog.as_raw_fd(),
            Kind::Eventfd(n) => self.eventfds[n].as_raw_fd(),
            Kind::Other => one_of(random, &self.others),
        }
    }

    /// A program of the type, most often.
    pub(super) fn program(&self, kind: ProgType, random: &mut Random) -> Kind {
        match random.below(10) {
            0 => Kind::NotOpen,
            1 => Kind::Other,
            2 => Kind::Eventfd(0),
            3 => Kind::Prog(random.below(self.programs.len() as u64) as usize),
            4 => Kind::None,
            _ => {
                let of_kind: Vec<_> = (0..self.programs.len())
                    .filter(|&n| self.programs[n].kind == kind)
                    .collect();
                Kind::Prog(one_of(random, &of_kind))
            }
        }
    }

    pub(super) fn eventfd(&self, random: &mut Random) -> Kind {
        match random.below(9) {
            0 => Kind::NotOpen,
            1 => Kind::Other,
            2 => Kind::Prog(0),
            3..=4 => Kind::None,
            _ => Kind::Eventfd(random.below(self.eventfds.len() as u64) as usize),
        }
    }

    /// Why a file descriptor is not a program of the type.
    pub(super) fn refuse_program(&self, kind: Kind, wanted: ProgType) -> Option<i32> {
        match kind {
            Kind::None => None,
            Kind::NotOpen => Some(libc::EBADF),
            Kind::Prog(n) if self.programs[n].kind == wanted => None,
            _ => Some(libc::EINVAL),
        }
    }

    pub(super) fn refuse_eventfd(kind: Kind) -> Option<i32> {
        match kind {
            Kind::None | Kind::Eventfd(_) => None,
            Kind::NotOpen => Some(libc::EBADF),
            _ => Some(libc::EINVAL),
        }
    }

    pub(super) fn needs(&self, kind: Kind) -> u64 {
        match kind {
            Kind::Prog(n) => self.programs[n].needs,
            _ => 0,
        }
    }
}

/// A structure of the user ABI, in a page behind which nothing is.
pub(super) struct Arena(*mut u8);

impl Arena {
    pub(super) fn new() -> Self {
        // SAFETY: new mappings touch no other memory; the second page of ours goes again.
        let pages = unsafe {
            let pages = libc::mmap(
                ptr::null_mut(),
                2 * PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            assert_ne!(pages, libc::MAP_FAILED, "mmap");
            let behind = pages.cast::<u8>().add(PAGE).cast();
            assert_eq!(libc::mprotect(behind, PAGE, libc::PROT_NONE), 0, "mprotect");
            pages
        };
        Arena(pages.cast())
    }

    /// Puts a structure where it ends `beyond` bytes behind the page; returns its address.
    pub(super) fn put<T: Copy>(&self, value: T, beyond: usize) -> u64 {
        let size = size_of::<T>();
        let at = self.0.wrapping_add(PAGE + beyond - size);
        // SAFETY: so many bytes of it are in the page.
        unsafe { ptr::copy_nonoverlapping((&raw const value).cast::<u8>(), at, size - beyond) };
        at as u64
    }

    pub(super) fn get<T: Copy>(&self) -> T {
        let at = self.0.wrapping_add(PAGE - size_of::<T>());
        // SAFETY: all of it is in the page, and each sequence of bytes is one of these structures.
        unsafe { at.cast::<T>().read_unaligned() }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: both pages are ours.
        unsafe { libc::munmap(self.0.cast(), 2 * PAGE) };
    }
}
