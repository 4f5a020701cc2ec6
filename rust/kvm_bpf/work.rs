// SPDX-License-Identifier: GPL-2.0-only

//! Programs that run without a guest's access.
//!
//! A device may have a program for each of a few indices. User space runs one on its own thread
//! ([`Works::run()`]), and may give it an eventfd: then it also runs whenever that is signalled,
//! on a thread of the device's.
//!
//! # Locks
//!
//! [`Works::thread`] is held by who sets and removes programs, and nests like that of regions. Then
//! the turn of one index, which is held while its program runs, then the permissions' lock, then
//! [`Shared::slots`], which is never held while a program runs. Signals come under an eventfd's
//! lock and take none of ours.

use super::{
    info,
    perms::{
        AnyAttached,
        Attached,
        Perms, //
    },
    NO_FD, //
};
use kernel::{
    bpf::Prog,
    eventfd::{
        Consume,
        Consumer,
        EventFd, //
    },
    kvm::{
        irq::Irqs,
        mem::Windows,
        prog::{
            self,
            Binding,
            IoWork, //
        }, //
    },
    new_mutex, nospec,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{
            Atomic,
            Full,
            Relaxed,
            Release, //
        },
        lock::{
            mutex::MutexBackend,
            Guard, //
        },
        Arc,
        Mutex, //
    },
    uapi,
    vhost_task::{
        VhostTask,
        Work, //
    },
};

const MAX_WORKS: usize = uapi::KVM_DEV_BPF_MAX_WORKS as usize;

// `Slots::next()` has them twice in a word.
const _: () = assert!(2 * MAX_WORKS <= u32::BITS as usize);

/// What an eventfd's signals have left to do.
struct Pending {
    /// Signals that the program has not been told of.
    count: Atomic<u64>,
    /// The program has asked to be run again.
    again: Atomic<bool>,
}

impl Pending {
    fn is_any(&self) -> bool {
        self.count.load(Relaxed) != 0 || self.again.load(Relaxed)
    }
}

type Thread = VhostTask<Runner>;

/// Takes the signals of an eventfd.
struct Signal {
    pending: Arc<Pending>,
    thread: Arc<Thread>,
}

impl Consume for Signal {
    type OwnerModule = crate::LocalModule;

    fn signalled(&self, count: u64) {
        let pending = &self.pending.count;
        let mut now = pending.load(Relaxed);

        // At its limit the count stays. The thread may find it before it is woken up: it must find
        // what came before, too.
        while let Err(other) = pending.cmpxchg(now, now.saturating_add(count), Release) {
            now = other;
        }
        self.thread.wake();
    }
}

/// The program of an index.
struct Slot {
    prog: Attached<IoWork>,
    signal: Option<Consumer<Signal>>,
}

impl Slot {
    fn pending(&self) -> Option<&Arc<Pending>> {
        self.signal.as_ref().map(|signal| &signal.get().pending)
    }
}

struct Slots {
    slots: [Option<Slot>; MAX_WORKS],
    /// Bit by index: an eventfd runs the program.
    signalled: u32,
    /// The index at which to look first for a signal, so that each gets its turn.
    first: usize,
}

impl Slots {
    /// Returns an index whose program has something to do.
    fn next(&self) -> Option<usize> {
        // Twice, so that there are all from the first one on.
        let mut rest = (self.signalled | self.signalled << MAX_WORKS) >> self.first;

        for _ in 0..self.signalled.count_ones() {
            let index = (self.first + rest.trailing_zeros() as usize) % MAX_WORKS;
            let pending = self.slots.get(index)?.as_ref().and_then(Slot::pending);

            if pending.is_some_and(|pending| pending.is_any()) {
                return Some(index);
            }
            rest &= rest - 1;
        }
        None
    }

    /// Returns what takes a program's signals.
    fn signal(&self, index: usize) -> Option<&Consumer<Signal>> {
        self.slots.get(index)?.as_ref()?.signal.as_ref()
    }
}

/// What the device and its thread share.
#[pin_data]
struct Shared {
    /// Of each index.
    bindings: [Binding; MAX_WORKS],
    #[pin]
    slots: Mutex<Slots>,
    /// Held while the program of that index runs.
    #[pin]
    turns: [Mutex<()>; MAX_WORKS],
}

impl Shared {
    /// Calls `f` with the place of a program; [`None`] if there is no such index. User space has
    /// chosen it.
    fn with_slot<R>(&self, index: usize, f: impl FnOnce(&mut Option<Slot>) -> R) -> Option<R> {
        let index = nospec::array_index(index, MAX_WORKS)?;
        let mut slots = self.slots.lock();
        let slot = slots.slots.get_mut(index)?;
        let result = f(slot);
        let is_signalled = slot.as_ref().is_some_and(|slot| slot.signal.is_some());

        slots.signalled = slots.signalled & !(1 << index) | u32::from(is_signalled) << index;
        Some(result)
    }

    /// Waits until no program of that index runs, and keeps it so.
    fn turn(&self, index: usize) -> Option<Guard<'_, (), MutexBackend>> {
        let index = nospec::array_index(index, MAX_WORKS)?;

        Some(self.turns.get(index)?.lock())
    }

    /// Drops what was taken from an index, its signals first and its program when it does not run:
    /// until then nobody extends it.
    fn retire(&self, index: usize, old: Slot) {
        let Slot { prog, signal } = old;

        drop(signal);
        drop(self.turn(index));
        drop(prog);
    }

    fn run_prog(&self, index: usize, prog: &Prog<IoWork>, arg: u64) -> bool {
        let binding = nospec::array_index(index, MAX_WORKS).and_then(|i| self.bindings.get(i));

        binding.is_some_and(|binding| prog.run_work(arg, binding))
    }
}

/// What the thread does.
struct Runner {
    shared: Arc<Shared>,
    /// It has run.
    started: Atomic<bool>,
}

impl Work for Runner {
    type OwnerModule = crate::LocalModule;

    fn work(&self) -> bool {
        let shared = &self.shared;

        if !self.started.load(Relaxed) {
            self.started.store(true, Relaxed);
            prog::unclamp_current();
        }
        let next = shared.slots.lock().next();
        let Some(index) = next else {
            return false;
        };
        let _turn = shared.turn(index);
        // Only now, as it may have been changed or removed meanwhile.
        let found = shared.with_slot(index, |slot| {
            let slot = slot.as_ref()?;

            Some((ARef::clone(&slot.prog), slot.pending()?.clone()))
        });
        let Some((prog, pending)) = found.flatten() else {
            return true;
        };
        let again = pending.again.xchg(false, Full);
        let count = pending.count.xchg(0, Full);

        if !again && count == 0 {
            return true;
        }
        if shared.run_prog(index, &prog, count) {
            pending.again.store(true, Relaxed);
        }
        let mut slots = shared.slots.lock();

        if let Some(signal) = slots.signal(index) {
            signal.take_rest();
        }
        slots.first = (index + 1) % MAX_WORKS;
        slots.next().is_some()
    }
}

/// What can be told about a program.
pub(crate) struct Info {
    pub(crate) program: info::Program,
    pub(crate) has_eventfd: bool,
}

/// The programs of a device that run without an access.
#[pin_data]
pub(crate) struct Works {
    /// Made with the first eventfd. Held by who sets and removes programs.
    #[pin]
    thread: Mutex<Option<Arc<Thread>>>,
    shared: Arc<Shared>,
}

impl Works {
    /// No programs, for a device with these interrupts and this guest memory.
    pub(crate) fn new(irqs: ARef<Irqs>, mem: Arc<Windows>) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            thread <- new_mutex!(None),
            shared: Arc::pin_init(
                try_pin_init!(Shared {
                    // CAST: There are few.
                    bindings: core::array::from_fn(|i| {
                        Binding::new(i as u32, irqs.clone(), mem.clone())
                    }),
                    slots <- new_mutex!(Slots {
                        slots: [const { None }; MAX_WORKS],
                        signalled: 0,
                        first: 0,
                    }),
                    turns <- pin_init::pin_init_array_from_fn(|_| new_mutex!(())),
                }),
                GFP_KERNEL_ACCOUNT,
            )?,
        })
    }

    /// Sets, replaces or removes a program.
    ///
    /// When this returns, the one that was there before does not run.
    pub(crate) fn set(
        &self,
        index: usize,
        work: &uapi::kvm_bpf_user_work,
        perms: &Mutex<Perms>,
    ) -> Result {
        if work.flags != 0 || work.pad != 0 {
            return Err(EINVAL);
        }
        let Some(prog) = Attached::from_fd(work.bpf_fd)? else {
            return self.remove(index, work, perms);
        };
        let eventfd = match work.eventfd {
            NO_FD => None,
            fd => Some(EventFd::from_fd(fd)?),
        };
        let mut thread = self.thread.lock();
        // They stay, as whoever changes them takes our lock.
        let perms = *perms.lock();

        perms.check(uapi::KVM_BPF_ALLOW_SET_WORK)?;
        prog.admit(&perms)?;
        // What is pending stays with its eventfd.
        let keep = eventfd.as_ref().is_some_and(|eventfd| {
            let is_same = self.shared.with_slot(index, |slot| {
                Some(slot.as_ref()?.signal.as_ref()?.is_of(eventfd))
            });

            is_same.flatten().unwrap_or(false)
        });
        let mut signal = match eventfd {
            Some(_) if !keep => Some(self.connect(&mut thread, work.eventfd)?),
            _ => None,
        };
        let old = self.shared.with_slot(index, |slot| {
            let mut old = slot.take();

            if let Some(old) = old.as_mut().filter(|_| keep) {
                signal = old.signal.take();
            }
            *slot = Some(Slot { prog, signal });
            old
        });

        // What was signalled before the thread could find the slot has not run the program yet.
        if let Some(task) = thread.as_ref() {
            task.wake();
        }
        drop(thread);
        if let Some(old) = old.flatten() {
            self.shared.retire(index, old);
        }
        Ok(())
    }

    /// Has the thread, a new one if there is none, run when the eventfd is signalled.
    ///
    /// Its index is not known to it: it looks for what is pending.
    fn connect(&self, thread: &mut Option<Arc<Thread>>, fd: i32) -> Result<Consumer<Signal>> {
        let pending = Arc::new(
            Pending {
                count: Atomic::new(0),
                again: Atomic::new(false),
            },
            GFP_KERNEL_ACCOUNT,
        )?;
        let task = match thread {
            Some(task) => task.clone(),
            None => Arc::new(
                VhostTask::new(
                    c"kvm-bpf",
                    Runner {
                        shared: self.shared.clone(),
                        started: Atomic::new(false),
                    },
                )?,
                GFP_KERNEL_ACCOUNT,
            )?,
        };
        let signal = Consumer::new(
            fd,
            Signal {
                pending,
                thread: task.clone(),
            },
        )?;

        *thread = Some(task);
        Ok(signal)
    }

    /// Calls `f` while nobody sets or removes programs.
    pub(crate) fn unchanged<R>(&self, f: impl FnOnce() -> R) -> R {
        let _thread = self.thread.lock();

        f()
    }

    /// Calls `f` with each program.
    pub(crate) fn for_each(&self, f: &mut dyn FnMut(&dyn AnyAttached)) {
        for slot in self.shared.slots.lock().slots.iter().flatten() {
            f(&slot.prog);
        }
    }

    /// Returns what can be told about the program of an index.
    pub(crate) fn info(&self, index: usize) -> Option<Info> {
        self.shared
            .with_slot(index, |slot| {
                slot.as_ref().map(|slot| Info {
                    program: (&**slot.prog).into(),
                    has_eventfd: slot.signal.is_some(),
                })
            })
            .flatten()
    }

    /// Removes all programs of a device that closes. When this returns, none runs.
    pub(crate) fn clear(&self) {
        for index in 0..MAX_WORKS {
            if let Some(old) = self.shared.with_slot(index, |slot| slot.take()).flatten() {
                self.shared.retire(index, old);
            }
        }
        // The last reference, as signals had the others: this waits for what it is at.
        drop(self.thread.lock().take());
    }

    fn remove(&self, index: usize, work: &uapi::kvm_bpf_user_work, perms: &Mutex<Perms>) -> Result {
        if work.eventfd != NO_FD {
            return Err(EINVAL);
        }
        let thread = self.thread.lock();

        perms.lock().check(uapi::KVM_BPF_ALLOW_SET_WORK)?;
        let old = self.shared.with_slot(index, |slot| slot.take());

        drop(thread);
        self.shared.retire(index, old.flatten().ok_or(ENOENT)?);
        Ok(())
    }

    /// Runs a program once, on the current thread, after those who came before.
    pub(crate) fn run(
        &self,
        index: usize,
        run: &uapi::kvm_bpf_user_run,
        perms: &Mutex<Perms>,
    ) -> Result {
        let _turn = self.shared.turn(index);

        // Only now, as it may have been given up meanwhile.
        perms.lock().check(uapi::KVM_BPF_ALLOW_RUN)?;
        let prog = self
            .shared
            .with_slot(index, |slot| {
                slot.as_ref().map(|slot| ARef::clone(&slot.prog))
            })
            .flatten()
            .ok_or(ENOENT)?;

        if self.shared.run_prog(index, &prog, run.arg) {
            return Err(EAGAIN);
        }
        Ok(())
    }
}
