// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A device in a VM: made from programs, replaced, saved and restored.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use crate::device::{Device, Error, Place, Ran, Window, only_region};
#[cfg(feature = "loader")]
use crate::image::OpenImage;
use crate::maps::{self, MapChanges, OnLoss};
use crate::note::Note;
use crate::page::{NoSlot, ReadPage};
use crate::programs::{Programs, Work};
use crate::state::{self, Clocks, State, StateMap};
use crate::sys;

/// How often a program may say that there is more to do, before it counts as one that never ends.
const MAX_RUNS: u32 = 1 << 20;

type Result<T> = std::result::Result<T, Error>;

/// A device that the guest does not see yet: all that it needs, one after the other, and at last
/// [`Self::plug`].
///
/// Until then no program runs, and dropping it leaves nothing behind. What the note asks for is for
/// the VMM to give: its interrupts ([`Note::nr_irqs`]), guest memory ([`Note::window`]), and its
/// parameters ([`Note::params`]).
#[derive(Debug)]
#[must_use = "the guest sees the device only when it is plugged"]
pub struct Builder {
    device: Device,
    programs: Programs,
    irqs: BTreeMap<u32, OwnedFd>,
    /// By the name of the WORK program, what also runs it.
    eventfds: BTreeMap<String, OwnedFd>,
    /// The guest memory that the VMM has let it access, by index.
    windows: BTreeMap<u32, Window>,
    is_restored: bool,
}

impl Builder {
    /// Connects an interrupt of the device to `eventfd`.
    ///
    /// The device keeps a duplicate open as long as it lives: KVM ends an irqfd when its last file
    /// descriptor is closed. So the caller may close its own.
    ///
    /// # Errors
    ///
    /// [`NoSuchIrq`](Error::NoSuchIrq), [`Duplicate`](Error::Duplicate), and those of
    /// [`Device::set_irq`].
    pub fn irq(mut self, index: u32, eventfd: &impl AsRawFd) -> Result<Self> {
        let eventfd = set_irq(&self.device, self.programs.note(), index, eventfd)?;
        self.irqs.insert(index, eventfd);
        Ok(self)
    }

    /// Connects an index that is neither an interrupt nor a doorbell of the note to `eventfd`, for the
    /// programs to signal: a thread of the VMM waits for it, say. The device keeps a duplicate open.
    ///
    /// The index is not below [`Note::nr_irqs`].
    ///
    /// # Errors
    ///
    /// [`IsIrq`](Error::IsIrq), [`IsDoorbell`](Error::IsDoorbell),
    /// [`Duplicate`](Error::Duplicate), and those of [`Device::set_irq`].
    pub fn signal(mut self, index: u32, eventfd: &impl AsRawFd) -> Result<Self> {
        let note = self.programs.note();
        if index < note.nr_irqs {
            return Err(Error::IsIrq(index));
        }
        if note.doorbells.iter().any(|bell| bell.irq == index) {
            return Err(Error::IsDoorbell(index));
        }
        let eventfd = sys::duplicate(eventfd).map_err(Error::Duplicate)?;
        self.device.set_irq(index, &eventfd)?;
        self.irqs.insert(index, eventfd);
        Ok(self)
    }

    /// Lets the device's programs access guest memory, as [`Device::set_window`] does.
    ///
    /// [`Self::plug`] wants one for each access that [`Note::window`] has. There need not be memory
    /// yet.
    ///
    /// # Errors
    ///
    /// Those of [`Device::set_window`].
    pub fn window(mut self, index: u32, window: Window) -> Result<Self> {
        self.device.set_window(index, window)?;
        self.windows.insert(index, window);
        Ok(self)
    }

    /// Gives a parameter its values, as [`Programs::param`] does. It checks all values first: if one is
    /// wrong, the map does not change.
    ///
    /// It may be given again, and what comes last counts. A parameter whose map is state, as user
    /// space can map it, is given by [`Self::state`] as well.
    ///
    /// # Errors
    ///
    /// Those of [`Programs::param`].
    pub fn param(self, name: &str, values: impl IntoIterator<Item = u64>) -> Result<Self> {
        self.programs.param(name, values)?;
        Ok(self)
    }

    /// Sets the first values of an array, as [`Programs::fill`] does; if it is a parameter's, this
    /// gives it.
    ///
    /// # Errors
    ///
    /// Those of [`Programs::fill`], which may have set some of the values.
    pub fn fill<V: AsRef<[u8]>>(
        self,
        map: &str,
        values: impl IntoIterator<Item = V>,
    ) -> Result<Self> {
        self.programs.fill(map, values)?;
        Ok(self)
    }

    /// Connects a WORK program to `eventfd`, whose signals run it, as
    /// [`ImageDevice::set_work_eventfd`] does. The device keeps a duplicate.
    ///
    /// # Errors
    ///
    /// [`NoSuchWork`](Error::NoSuchWork) and [`Duplicate`](Error::Duplicate); what the kernel says
    /// of the eventfd is an error of [`Self::plug`].
    pub fn work_eventfd(mut self, name: &str, eventfd: &impl AsRawFd) -> Result<Self> {
        if self.programs.work(name).is_none() {
            return Err(Error::NoSuchWork(name.to_string()));
        }
        let eventfd = sys::duplicate(eventfd).map_err(Error::Duplicate)?;
        self.eventfds.insert(name.to_string(), eventfd);
        Ok(self)
    }

    /// Starts the device from a saved state: the maps have it now, and [`Self::plug`] runs the WORK
    /// program `restore`, where there is one, before the guest sees the device.
    ///
    /// A parameter whose map the state has is given by it: it has the values of where the state was
    /// saved, unless [`Self::param`] comes after.
    ///
    /// # Errors
    ///
    /// [`State`](Error::State): it is the state of another device, or does not fit. The maps are as
    /// before.
    pub fn state(mut self, state: &State) -> Result<Self> {
        state::restore(self.programs.note(), self.programs.states(), state)?;
        for map in self.programs.states().iter().map(StateMap::name) {
            if state.maps.contains_key(map) {
                self.programs.set_given(map);
            }
        }
        self.is_restored = true;
        Ok(self)
    }

    /// The programs and maps.
    pub fn programs(&self) -> &Programs {
        &self.programs
    }

    /// The KVM device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Plugs the device in: from now on its programs handle the guest's accesses at that place.
    ///
    /// What is known before is checked before any program runs; whether the place is free is not. An
    /// interrupt that the VMM has not given is no error: signalling it is one for the program.
    ///
    /// # Errors
    ///
    /// - [`SeveralRanges`](Error::SeveralRanges), [`WrongSpace`](Error::WrongSpace) or
    ///   [`NoRoom`](Error::NoRoom): the device cannot be at that place.
    /// - [`MissingParam`](crate::programs::Error::MissingParam): the note requires a parameter that
    ///   has no values.
    /// - [`MissingWindow`](Error::MissingWindow): the device accesses guest memory, and no
    ///   [`Self::window`] lets it.
    /// - [`Doorbell`](Error::Doorbell), and those of [`Device::set_irq`] and [`Device::set_work`].
    /// - Those of [`ImageDevice::run`], if `restore` fails.
    /// - Those of [`Device::set_region`]: the place is taken, say. `restore` has run then.
    ///
    /// After an error the guest has not seen the device, and nothing is left of it.
    pub fn plug(self, place: Place) -> Result<ImageDevice> {
        self.check(place)?;
        let Builder {
            device,
            programs,
            irqs,
            mut eventfds,
            windows: _,
            is_restored,
        } = self;
        let read_pages = programs.note().read_pages.iter().zip(&programs.read_pages);
        let read_pages = read_pages
            .map(|(page, mapping)| ReadPage::new(place.addr() + page.offset, Arc::clone(mapping)))
            .collect();
        set_doorbells(&device, &programs, None, &mut eventfds)?;
        let device = ImageDevice {
            read_pages,
            device,
            place,
            programs,
            irqs,
            eventfds,
            clocks: Clocks::new(),
        };
        device.set_works()?;
        if is_restored {
            device.resume()?;
        }
        device.set_region()?;
        Ok(device)
    }

    /// Checks what does not need the kernel.
    fn check(&self, place: Place) -> Result<()> {
        let note = self.programs.note();
        let range = only_region(note, place.space())?;
        let last = match place {
            Place::Memory(_) => u64::MAX,
            Place::Port(_) => u16::MAX.into(),
        };
        let size = range.size;
        if size.saturating_sub(1) > last - place.addr() {
            return Err(Error::NoRoom { place, size });
        }
        self.programs.check_given(|_| false)?;
        check_windows(note, self.windows.values())
    }
}

/// Whether a device that accesses guest memory has windows for that.
fn check_windows<'a>(note: &Note, windows: impl Iterator<Item = &'a Window> + Clone) -> Result<()> {
    let Some(rights) = note.window else {
        return Ok(());
    };
    if rights.read && !windows.clone().any(|window| window.read) {
        return Err(Error::MissingWindow("reads"));
    }
    if rights.write && !windows.clone().any(|window| window.write) {
        return Err(Error::MissingWindow("writes to"));
    }
    Ok(())
}

fn set_irq(device: &Device, note: &Note, index: u32, eventfd: &impl AsRawFd) -> Result<OwnedFd> {
    if index >= note.nr_irqs {
        let count = note.nr_irqs;
        return Err(Error::NoSuchIrq { index, count });
    }
    let eventfd = sys::duplicate(eventfd).map_err(Error::Duplicate)?;
    device.set_irq(index, &eventfd)?;
    Ok(eventfd)
}

/// A device that one object file describes, in a VM: a single region, its programs and its maps.
///
/// Dropping it takes it out of the VM, also while vCPUs run; it waits as dropping [`Device`] does. All
/// calls that run a WORK program wait while another thread runs the same one.
#[derive(Debug)]
#[must_use = "dropping it takes the device out of the VM"]
pub struct ImageDevice {
    /// The first to go: a guest that runs on then finds the programs.
    read_pages: Vec<ReadPage>,
    device: Device,
    place: Place,
    programs: Programs,
    /// What the interrupts signal, by index: open, so that KVM's irqfds stay.
    irqs: BTreeMap<u32, OwnedFd>,
    /// By the name of the WORK program, what also runs it.
    eventfds: BTreeMap<String, OwnedFd>,
    /// What a saved state tells of the time.
    clocks: Clocks,
}

impl ImageDevice {
    /// Begins to make a device of these programs.
    pub fn builder(device: Device, programs: Programs) -> Builder {
        Builder {
            device,
            programs,
            irqs: BTreeMap::new(),
            eventfds: BTreeMap::new(),
            windows: BTreeMap::new(),
            is_restored: false,
        }
    }

    /// Goes over to the programs of a new file while the guest runs: [`Self::load`], and then
    /// [`Self::swap`].
    ///
    /// # Errors
    ///
    /// Those of both.
    #[cfg(feature = "loader")]
    pub fn replace(
        &mut self,
        image: OpenImage,
        on_loss: OnLoss,
        paused: impl FnOnce(&mut dyn FnMut()),
    ) -> Result<MapChanges> {
        let programs = self.load(image, on_loss)?;
        self.swap(programs, on_loss, paused)
    }

    /// Loads a new file for [`Self::swap`], with the maps that it has in common with the running
    /// one. The caller fills the others in between, with [`Programs::param`].
    ///
    /// Where [`OpenImage::set_abi`] has not been called, the programs are of the types that
    /// [`Device::with_abi`] was told of.
    ///
    /// # Errors
    ///
    /// [`OtherDevice`](Error::OtherDevice), [`IsDoorbell`](Error::IsDoorbell), and those of
    /// [`OpenImage::reuse_maps`] and [`OpenImage::load`]. The running device goes on.
    #[cfg(feature = "loader")]
    pub fn load(&self, mut image: OpenImage, on_loss: OnLoss) -> Result<Programs> {
        self.check(image.note())?;
        image.set_default_abi(self.device.abi());
        image.reuse_maps(&self.programs, on_loss)?;
        Ok(image.load()?)
    }

    /// What becomes of the maps if [`Self::swap`] goes over to these programs, or why it would not.
    ///
    /// [`MapChanges::needs_pause`] says whether the vCPUs will have to be paused. The new programs'
    /// parameters may still be given.
    ///
    /// # Errors
    ///
    /// [`OtherDevice`](Error::OtherDevice), [`IsDoorbell`](Error::IsDoorbell), and of
    /// [`programs::Error`](crate::programs::Error) those about what would be lost.
    pub fn changes(&self, new: &Programs, on_loss: OnLoss) -> Result<MapChanges> {
        self.check(new.note())?;
        Ok(maps::changes(&self.programs, new, on_loss)?)
    }

    fn check(&self, new: &Note) -> Result<()> {
        if !new.is_same_device(self.programs.note()) {
            return Err(Error::OtherDevice {
                running: Box::new(self.programs.note().clone()),
                new: Box::new(new.clone()),
            });
        }
        // It would take the place of what the VMM waits for.
        let mut bells = new.doorbells.iter();
        match bells.find(|bell| self.irqs.contains_key(&bell.irq)) {
            Some(bell) => Err(Error::IsDoorbell(bell.irq)),
            None => Ok(()),
        }
    }

    /// Goes over to new programs while the guest runs, and runs their WORK program `replaced`; or
    /// `restore`, where the state is converted after a run of the old `save`. They are those of
    /// `load()`, or of another process, which has made them for [`Self::programs`].
    ///
    /// `paused` is called only where the state has other types than before and the new programs load
    /// the version of the old one. It has to call what it is given, once, while no vCPU is in
    /// `KVM_RUN`. When this returns, no callback of the old programs runs or is to run: the old WORK
    /// program `save`, and `replaced` or `restore` of the new ones, see to that.
    ///
    /// Memory slots of read pages stay where the page's map is carried over. Of others they are
    /// taken away before and set with the new map after; in between, loads run the read program.
    ///
    /// It waits until no vCPU runs the old programs, as [`Device::set_region`] says. It calls neither
    /// bpf(2) nor libbpf; eventfd2(2) where the new programs have a doorbell that the old ones have
    /// not, and write(2) where a WORK program with an eventfd gets another index.
    ///
    /// A required parameter of the new programs must have its values: from the running device where
    /// its map goes on, or else from the caller.
    ///
    /// Of an eventfd whose WORK program there still is, no signal is lost. One that gets another
    /// index may run once without a signal.
    ///
    /// # Errors
    ///
    /// [`Swapped`](Error::Swapped): the new programs run, and `replaced` or `restore` has failed. On
    /// all others the old programs run: those of [`Self::changes`],
    /// [`MissingParam`](crate::programs::Error::MissingParam), [`NotPaused`](Error::NotPaused),
    /// [`UnsetReadPage`](Error::UnsetReadPage), [`Doorbell`](Error::Doorbell), those of
    /// [`Device::set_irq`], [`Device::set_work`] and [`Device::set_region`]; where the state is
    /// converted also those of [`Self::save`], and [`State`](Error::State).
    pub fn swap(
        &mut self,
        new: Programs,
        on_loss: OnLoss,
        paused: impl FnOnce(&mut dyn FnMut()),
    ) -> Result<MapChanges> {
        let changes = self.changes(&new, on_loss)?;
        new.check_given(|name| changes.converted.iter().any(|map| map == name))?;
        if !changes.needs_pause() {
            self.set_programs(new)?;
            self.start("replaced")?;
            return Ok(changes);
        }
        let mut new = Some(new);
        let mut result = Err(Error::NotPaused);
        paused(&mut || {
            if let Some(new) = new.take() {
                result = self.convert(new, &changes.carried);
            }
        });
        result.map(|()| changes)
    }

    /// Runs the WORK program with which new programs begin.
    fn start(&self, name: &'static str) -> Result<()> {
        match self.run(name, 0) {
            Ok(_) => Ok(()),
            Err(source) => Err(Error::Swapped {
                name,
                source: Box::new(source),
            }),
        }
    }

    /// Has the programs of `new` handle accesses and the rest.
    fn set_programs(&mut self, new: Programs) -> Result<()> {
        let swapped = self.swap_programs(new);
        // With the old maps, where the old programs go on.
        self.read_pages.iter_mut().for_each(ReadPage::set_again);
        swapped
    }

    /// The same, with the state by the names of its fields, while no vCPU is in `KVM_RUN`.
    /// Maps that are carried over have all that they had, also what is in no state.
    fn convert(&mut self, new: Programs, carried: &[String]) -> Result<()> {
        let state = self.save()?;
        let taken = state::convert(new.note(), new.states(), &state, carried);
        if let Err(error) = taken
            .map_err(Error::from)
            .and_then(|()| self.set_programs(new))
        {
            // Why it goes on with the old programs is the news.
            let _ = self.resume();
            return Err(error);
        }
        self.start("restore")
    }

    fn swap_programs(&mut self, new: Programs) -> Result<()> {
        // No load must see the old map when a store has run a new program.
        for (page, mapping) in self.read_pages.iter_mut().zip(&new.read_pages) {
            if !page.is_same_map(mapping) {
                suspend(page)?;
            }
        }
        let names: Vec<_> = self.eventfds.keys().cloned().collect();
        let old = std::mem::replace(&mut self.programs, new);
        if let Err(error) = self.go_over(&old) {
            let new = std::mem::replace(&mut self.programs, old);
            self.eventfds.retain(|name, _| names.contains(name));
            // They were set before: that the kernel refuses them now is less news than the first.
            let _ = self.go_over(&new);
            return Err(error);
        }
        for (page, mapping) in self.read_pages.iter_mut().zip(&self.programs.read_pages) {
            if !page.is_same_map(mapping) {
                page.exchange(Arc::clone(mapping));
            }
        }
        self.eventfds
            .retain(|name, _| self.programs.work(name).is_some());
        Ok(())
    }

    /// Has the image's programs handle accesses and the rest, instead of those of `from`.
    fn go_over(&mut self, from: &Programs) -> Result<()> {
        set_doorbells(&self.device, &self.programs, Some(from), &mut self.eventfds)?;
        self.free_eventfds(from);
        self.set_works()?;
        self.signal_moved(from);
        self.set_region()?;
        self.unset_works(from);
        self.unset_doorbells(from);
        Ok(())
    }

    fn set_region(&self) -> Result<()> {
        let range = only_region(self.programs.note(), self.place.space())?;
        self.device.set_region(
            range.region,
            self.place,
            range.size,
            self.programs.read_program(),
            self.programs.write_program(),
        )
    }

    fn set_works(&self) -> Result<()> {
        self.programs.works().try_for_each(|work| {
            let eventfd = self.eventfds.get(work.name);
            let eventfd = eventfd.map(|eventfd| eventfd as &dyn AsRawFd);
            self.device.set_work(work.index, work.program, eventfd)
        })
    }

    /// Whether a WORK program of `from` has an eventfd, and another index now.
    fn is_moved(&self, old: &Work<'_>) -> bool {
        let new = self.programs.work(old.name);
        self.eventfds.contains_key(old.name) && new.is_some_and(|new| new.index != old.index)
    }

    /// An eventfd is one program's: has `from` give up those that go to another index.
    fn free_eventfds(&self, from: &Programs) {
        self.remove_works(from, |old| self.is_moved(old));
    }

    /// Signals the eventfds that went to another index: what the kernel had already taken of them,
    /// for the old one, is gone.
    fn signal_moved(&self, from: &Programs) {
        for work in from.works().filter(|old| self.is_moved(old)) {
            // It fails only where the eventfd has too many signals as it is.
            let _ = sys::signal(&self.eventfds[work.name]);
        }
    }

    /// Removes those of `from` that have no successor.
    fn unset_works(&self, from: &Programs) {
        self.remove_works(from, |old| {
            !self.programs.works().any(|new| new.index == old.index)
        });
    }

    fn remove_works(&self, from: &Programs, is_gone: impl Fn(&Work<'_>) -> bool) {
        for work in from.works().filter(is_gone) {
            // It fails only where there is none.
            let _ = self.device.unset_work(work.index);
        }
    }

    /// Takes the eventfds from the doorbells that only `from` has.
    fn unset_doorbells(&self, from: &Programs) {
        let own = &self.programs.note().doorbells;
        for bell in &from.note().doorbells {
            if !own.iter().any(|other| other.irq == bell.irq) {
                // It fails only where there is none.
                let _ = self.device.unset_irq(bell.irq);
            }
        }
    }

    /// Connects a WORK program to `eventfd`, whose signals run it, or disconnects it.
    ///
    /// It stays with the name when the programs are replaced. It may be one that the device's other
    /// programs signal, at an index of [`Builder::irq`] or [`Builder::signal`]; but not an irqfd,
    /// which is `EBUSY`: an eventfd has one consumer.
    ///
    /// The note's doorbell of the program, where it has one, goes over to `eventfd`, or without one
    /// to a new eventfd of the device's; the program may then run once without a signal. Otherwise
    /// signals of an earlier eventfd that the program has not seen yet are lost.
    ///
    /// # Errors
    ///
    /// [`NoSuchWork`](Error::NoSuchWork), [`Duplicate`](Error::Duplicate),
    /// [`Doorbell`](Error::Doorbell), and those of [`Device::set_irq`] and [`Device::set_work`]. The
    /// program goes on with the eventfd that it had.
    pub fn set_work_eventfd(&mut self, name: &str, eventfd: Option<&dyn AsRawFd>) -> Result<()> {
        let no_such = || Error::NoSuchWork(name.to_string());
        let work = self.programs.work(name).ok_or_else(no_such)?;
        let mut bells = self.programs.note().doorbells.iter();
        let bell = bells.find(|bell| bell.work == work.index);
        let eventfd = match (eventfd, bell) {
            (Some(eventfd), _) => {
                Some(sys::duplicate(&eventfd.as_raw_fd()).map_err(Error::Duplicate)?)
            }
            (None, Some(bell)) => Some(new_eventfd(bell.irq)?),
            (None, None) => None,
        };
        // First: signals wait in the eventfd until the program has it.
        if let (Some(bell), Some(eventfd)) = (bell, &eventfd) {
            self.device.set_irq(bell.irq, eventfd)?;
        }
        let set = self.device.set_work(
            work.index,
            work.program,
            eventfd.as_ref().map(|eventfd| eventfd as &dyn AsRawFd),
        );
        if let Err(error) = set {
            if let (Some(bell), Some(before)) = (bell, self.eventfds.get(name)) {
                // It was set before: that the kernel refuses it now is less news than the first.
                let _ = self.device.set_irq(bell.irq, before);
            }
            return Err(error);
        }
        if let (Some(_), Some(eventfd)) = (bell, &eventfd) {
            // For those that the kernel had taken of the eventfd before. It fails only where there
            // are too many as it is.
            let _ = sys::signal(eventfd);
        }
        match eventfd {
            Some(eventfd) => self.eventfds.insert(name.to_string(), eventfd),
            None => self.eventfds.remove(name),
        };
        Ok(())
    }

    /// Connects an interrupt of the device to `eventfd` instead of an earlier one, as
    /// [`Builder::irq`] does. It waits as [`Device::set_irq`] does.
    ///
    /// # Errors
    ///
    /// Those of [`Builder::irq`]. The interrupt goes on to signal the earlier one.
    pub fn set_irq(&mut self, index: u32, eventfd: &impl AsRawFd) -> Result<()> {
        let eventfd = set_irq(&self.device, self.programs.note(), index, eventfd)?;
        self.irqs.insert(index, eventfd);
        Ok(())
    }

    /// Runs the WORK program of that name, until it has no more to do; returns whether there is one.
    ///
    /// # Errors
    ///
    /// [`Run`](Error::Run), and [`Endless`](Error::Endless) after a million runs.
    pub fn run(&self, name: &str, arg: u64) -> Result<bool> {
        let Some(work) = self.programs.work(name) else {
            return Ok(false);
        };
        for _ in 0..MAX_RUNS {
            if self.device.run(work.index, arg)? == Ran::Done {
                return Ok(true);
            }
        }
        Err(Error::Endless(name.to_string()))
    }

    /// Puts the device into the state of a new one, where it has a WORK program `reset`; returns
    /// whether it has.
    ///
    /// # Errors
    ///
    /// Those of [`Self::run`].
    pub fn reset(&self) -> Result<bool> {
        self.run("reset", 0)
    }

    /// Sets an input of the device to a level, where it has a WORK program `input`; returns whether it
    /// has.
    ///
    /// # Errors
    ///
    /// Those of [`Self::run`].
    pub fn input(&self, line: u32, level: bool) -> Result<bool> {
        self.run("input", u64::from(line) | u64::from(level) << 32)
    }

    /// The state of the device, after a run of its WORK program `save` where it has one.
    ///
    /// No vCPU may be in `KVM_RUN`, from before until [`Self::resume`], where the device goes on
    /// here. Calls neither bpf(2) nor libbpf.
    ///
    /// # Errors
    ///
    /// Those of [`Self::run`], and [`State`](Error::State): something that runs later cannot be
    /// saved without `save`, say. The device goes on.
    pub fn save(&self) -> Result<State> {
        if self.programs.work("save").is_none()
            && let Some((map, what)) = self.programs.runs_later()
        {
            let (map, what) = (map.to_string(), what.to_string());
            return Err(state::Error::TimersWithoutSave { map, what }.into());
        }
        if let Some(map) = self.programs.unknown() {
            return Err(state::Error::UnknownTypes(map.to_string()).into());
        }
        let saved = self.run("save", 0).and_then(|_| {
            let (note, maps) = (self.programs.note(), self.programs.states());
            Ok(state::save(note, maps, &self.clocks)?)
        });
        if saved.is_err() {
            // What kept the state from being saved is the news.
            let _ = self.resume();
        }
        saved
    }

    /// Resumes the device after [`Self::save`] or [`Self::prepare`], with a run of its WORK program
    /// `restore` where it has one.
    ///
    /// # Errors
    ///
    /// Those of [`Self::run`].
    pub fn resume(&self) -> Result<()> {
        self.run("restore", 0).map(drop)
    }

    /// Puts a saved state into the device, and runs its WORK program `restore` where it has one.
    ///
    /// No vCPU may be in `KVM_RUN`. Calls neither bpf(2) nor libbpf.
    ///
    /// # Errors
    ///
    /// [`State`](Error::State): it is the state of another device, or does not fit. Those of
    /// [`Self::run`]: what else `restore` did is done. The state maps are as before.
    pub fn restore(&mut self, state: &State) -> Result<()> {
        let maps = self.programs.states();
        let before = state::restore(self.programs.note(), maps, state)?;
        if let Err(error) = self.run("restore", 0) {
            state::undo(maps, &before);
            return Err(error);
        }
        Ok(())
    }

    /// The first half of [`Self::restore`]: puts the state into the maps. [`Self::resume`] is the other.
    ///
    /// So the device does nothing yet, while it is not certain that the guest goes on here: from
    /// `restore` on it may access guest memory, which may still be another's too.
    ///
    /// # Errors
    ///
    /// [`State`](Error::State): it is the state of another device, or does not fit. The maps are as
    /// before.
    pub fn prepare(&mut self, state: &State) -> Result<()> {
        state::restore(self.programs.note(), self.programs.states(), state)?;
        Ok(())
    }

    /// The pages whose loads have no side effect, in the note's order.
    pub fn read_pages(&self) -> &[ReadPage] {
        &self.read_pages
    }

    /// Maps a page, by its index in [`Self::read_pages`], into the guest, through a read-only memory
    /// slot of that number, which is free: loads then leave the guest no more.
    ///
    /// The slot goes with the device, or with [`Self::unset_read_page`]; it must not be set
    /// otherwise.
    ///
    /// # Errors
    ///
    /// The page has no slot. All is the same, but for the cost: go on.
    ///
    /// # Panics
    ///
    /// If there is no such page.
    pub fn set_read_page(
        &mut self,
        vm: &impl AsRawFd,
        index: usize,
        slot: u32,
    ) -> std::result::Result<(), &NoSlot> {
        self.read_pages[index].set(vm, slot)
    }

    /// Takes the memory slot of a page away, if it has one: loads run the read program from then on.
    ///
    /// # Errors
    ///
    /// [`UnsetReadPage`](Error::UnsetReadPage): the page has its slot as before.
    ///
    /// # Panics
    ///
    /// If there is no such page.
    pub fn unset_read_page(&mut self, index: usize) -> Result<()> {
        let page = &mut self.read_pages[index];
        let addr = page.addr();
        let unset = page.unset();
        unset.map_err(|source| Error::UnsetReadPage { addr, source })
    }

    /// Where it is.
    pub fn place(&self) -> Place {
        self.place
    }

    /// The running programs and maps.
    pub fn programs(&self) -> &Programs {
        &self.programs
    }

    /// The KVM device, for regions and windows of the VMM's own. Its region, WORK programs and
    /// doorbells are this value's: they must not be set otherwise.
    pub fn device(&self) -> &Device {
        &self.device
    }
}

/// The WORK program that a doorbell runs.
fn rung(programs: &Programs, irq: u32) -> Option<Work<'_>> {
    let mut bells = programs.note().doorbells.iter();
    let bell = bells.find(|bell| bell.irq == irq)?;
    programs.works().find(|work| work.index == bell.work)
}

/// Connects each doorbell to the eventfd of its WORK program, and makes those that are not there. It
/// leaves those alone that ran the program of that name with `from`.
fn set_doorbells(
    device: &Device,
    programs: &Programs,
    from: Option<&Programs>,
    eventfds: &mut BTreeMap<String, OwnedFd>,
) -> Result<()> {
    for bell in &programs.note().doorbells {
        let Some(work) = rung(programs, bell.irq) else {
            continue;
        };
        let before = from.and_then(|from| rung(from, bell.irq));
        if before.is_some_and(|before| before.name == work.name) {
            continue;
        }
        let eventfd = match eventfds.entry(work.name.to_string()) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(new_eventfd(bell.irq)?),
        };
        device.set_irq(bell.irq, eventfd)?;
    }
    Ok(())
}

fn new_eventfd(bell: u32) -> Result<OwnedFd> {
    sys::eventfd().map_err(|error| Error::Doorbell(bell, error))
}

fn suspend(page: &mut ReadPage) -> Result<()> {
    let addr = page.addr();
    let suspended = page.suspend();
    suspended.map_err(|source| Error::UnsetReadPage { addr, source })
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::Map;
    use crate::note::{Doorbell, Rights, Space, WorkName};
    use crate::state::{Clock, Identity, MapState, Value, Zeroes};
    use crate::sys::{MapInfo, map_type};

    fn file() -> OwnedFd {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    /// Of no device: what asks the kernel fails.
    fn builder(note: Note) -> Builder {
        let works = [(0, file())];
        let programs = Programs::from_fds(note, Some(file()), None, works, Vec::new());
        ImageDevice::builder(Device::from_fd(file()), programs.unwrap())
    }

    fn note() -> Note {
        let mut note = Note::default();
        (note.mmio_size, note.nr_irqs) = (0x1000, 1);
        note.works.push(WorkName::new(0, "serve"));
        note.doorbells.push(Doorbell { irq: 7, work: 0 });
        note
    }

    #[test]
    fn what_is_known_before_is_checked_before() {
        let plug = |note, place| builder(note).plug(place).unwrap_err();
        let error = plug(note(), Place::Port(0));
        assert!(matches!(error, Error::WrongSpace(Space::Memory)), "{error}");
        let error = plug(note(), Place::Memory(u64::MAX - 0xffe));
        let wanted = "a device of 0x1000 bytes has no room at 0xfffffffffffff001";
        assert_eq!(error.to_string(), wanted);
        let mut with_window = note();
        with_window.window = Some(Rights {
            read: false,
            write: true,
        });
        let error = plug(with_window, Place::Memory(0));
        assert!(
            matches!(error, Error::MissingWindow("writes to")),
            "{error}"
        );
        // Only now the kernel is asked.
        let error = plug(note(), Place::Memory(u64::MAX - 0xfff));
        assert!(matches!(error, Error::SetIrq { index: 7, .. }), "{error}");
    }

    fn array(name: &str, info: MapInfo) -> Map {
        let info = MapInfo {
            map_type: map_type::ARRAY,
            key_size: 4,
            value_size: 8,
            max_entries: 1,
            ..info
        };
        Map::with_info(name, file(), info)
    }

    fn programs(note: Note, maps: Vec<Map>) -> Programs {
        Programs::from_fds(note, Some(file()), None, [], maps).unwrap()
    }

    /// Zeroes are nothing lost, where the device knows versions: but nobody has written them.
    #[test]
    fn a_state_gives_the_parameters_that_it_holds() {
        let mut note = Note::default();
        note.ranges
            .push(crate::note::Range::new(Space::Memory, 0, 8));
        note.state_version = Some(crate::note::StateVersion::default());
        note.params.push(crate::note::Param::new("clock", true));
        let maps = vec![array("clock", MapInfo::default())];
        let builder = ImageDevice::builder(Device::from_fd(file()), programs(note.clone(), maps));
        let zero = MapState {
            schema: String::new(),
            types: Vec::new(),
            values: vec![Value::Number(0)],
        };
        let state = State {
            clock: Clock {
                boottime_ns: 0,
                monotonic_ns: 0,
                realtime_ns: 0,
            },
            device: Identity::of_note(&note),
            maps: BTreeMap::from([("clock".to_string(), zero)]),
            zeroes: Zeroes::new(),
        };
        let error = builder.state(&state).unwrap().plug(Place::Memory(0));
        let error = error.unwrap_err().to_string();
        assert!(error.contains("not given parameter clock"), "{error}");
    }

    /// What is in a map nobody knows: it is saved by nobody, and goes on as a whole or is lost.
    #[test]
    fn maps_without_types_are_not_lost() {
        let map = |name, id, flags| {
            let info = MapInfo::default();
            array(name, MapInfo { id, flags, ..info })
        };
        let with = |maps| programs(Note::default(), maps);
        let constants = || map("constants", 9, sys::BPF_F_RDONLY_PROG);
        let old = with(vec![map("state", 1, 0), constants()]);
        assert_eq!(old.unknown(), Some("state"));
        let changes = |new: &Programs, on_loss| {
            let changes = maps::changes(&old, new, on_loss);
            changes.map_err(|error| error.to_string())
        };
        for (maps, wanted) in [
            (vec![], "the new file has none of that name"),
            (vec![map("state", 2, 0)], "nothing says what is in it"),
        ] {
            let new = with(maps);
            let wanted = format!("map state of the running device would be lost: {wanted}");
            assert_eq!(changes(&new, OnLoss::Refuse), Err(wanted));
            assert!(changes(&new, OnLoss::Accept).is_ok());
        }
        let same = changes(&with(vec![map("state", 1, 0)]), OnLoss::Refuse);
        assert_eq!(same.unwrap().carried, ["state"]);
        assert_eq!(with(vec![constants()]).unknown(), None);
    }

    /// "An older kernel" is what the kernel says of a group, and not any failure.
    #[test]
    fn other_errors_are_not_taken_for_an_older_kernel() {
        let device = Device::from_fd(file());
        let window = Window {
            addr: 0,
            size: 1,
            read: true,
            write: false,
        };
        let program = file();
        for error in [
            device.set_window(0, window),
            device.set_work(0, program.as_fd(), None),
            device.set_region(0, Place::Port(0), 1, Some(program.as_fd()), None),
        ] {
            let error = error.unwrap_err();
            let source = std::error::Error::source(&error).expect("the kernel's error");
            let source = source.downcast_ref::<std::io::Error>().unwrap();
            assert_eq!(source.raw_os_error(), Some(libc::ENOTTY), "{error}");
        }
    }

    #[test]
    fn ports_end_before_addresses_do() {
        let mut note = Note::default();
        note.ranges
            .push(crate::note::Range::new(Space::Ports, 0, 8));
        let programs = Programs::from_fds(note, Some(file()), None, [], Vec::new()).unwrap();
        let builder = ImageDevice::builder(Device::from_fd(file()), programs);
        assert!(builder.check(Place::Port(0xfff8)).is_ok());
        let error = builder.check(Place::Port(0xfff9)).unwrap_err();
        assert!(matches!(error, Error::NoRoom { size: 8, .. }), "{error}");
    }

    #[test]
    fn windows_do_what_the_note_says() {
        let mut note = note();
        let window = |read, write| Window {
            addr: 0,
            size: 1,
            read,
            write,
        };
        let is_good = |note: &Note, windows: &[Window]| check_windows(note, windows.iter()).is_ok();
        assert!(is_good(&note, &[]));
        note.window = Some(Rights {
            read: true,
            write: true,
        });
        for (windows, wanted) in [
            (&[window(true, true)][..], true),
            (&[window(true, false), window(false, true)], true),
            (&[window(true, false)], false),
            (&[window(false, true)], false),
            (&[], false),
        ] {
            assert_eq!(is_good(&note, windows), wanted, "{windows:?}");
        }
    }

    #[test]
    fn indices_are_one_things() {
        for (index, wanted) in [
            (0, "index 0 is an interrupt of the device"),
            (
                7,
                "index 7 is a doorbell of the device, which runs a WORK program",
            ),
            (8, "cannot set interrupt 8"),
        ] {
            let error = builder(note()).signal(index, &file()).unwrap_err();
            assert_eq!(error.to_string(), wanted);
        }
    }
}
