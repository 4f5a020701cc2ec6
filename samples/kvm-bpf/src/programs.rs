// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The programs and maps of a device, in the kernel: what a VMM holds.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::mapping::Words;
use crate::maps::Layout;
use crate::note::{self, Note};
use crate::page::{self, PageMap};
use crate::param;
use crate::state::StateMap;
use crate::sys::{self, FdInfo, MapInfo, map_type};

/// Why programs and maps cannot be those of a device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is neither a read nor a write handler.
    #[error("there is no program for reads or writes")]
    NoProgram,
    /// There is a WORK program that the note does not name, or it names one that is not there.
    #[error("the note and the programs do not agree about WORK program {0}")]
    Work(u32),
    /// There is no map of that name.
    #[error("there is no map {0}")]
    NoSuchMap(String),
    /// Two maps cannot be told apart.
    #[error("two maps are named {0}")]
    SameName(String),
    /// A map cannot be read or written, or the value is none of it.
    #[error("cannot access map {map}")]
    Access {
        /// The map.
        map: String,
        /// What is wrong.
        #[source]
        source: io::Error,
    },
    /// A map with state cannot be mapped into memory.
    #[error("cannot map {map}, whose state is to be saved")]
    MapState {
        /// The map.
        map: String,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// A map cannot be what the note says, a page that the guest may read.
    #[error("map {map} cannot be a read page: {why}")]
    ReadPage {
        /// The map's name in the note.
        map: String,
        /// What is wrong.
        why: String,
    },
    /// The kernel does not let a map be mapped: one with locks or timers, say.
    #[error("cannot map the read page {map}")]
    MapReadPage {
        /// The map.
        map: String,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// A map cannot be what the note says, a parameter.
    #[error("map {map} cannot be a parameter: {why}")]
    Param {
        /// The map's name in the note.
        map: String,
        /// What is wrong.
        why: String,
    },
    /// The note has no parameter of that name.
    #[error("the device has no parameter {name}, {}", param::list(.there))]
    NoSuchParam {
        /// The name.
        name: String,
        /// The names that the note has.
        there: Vec<String>,
    },
    /// A parameter has fewer values.
    #[error("more than {max} values for parameter {param}, which has no room for them")]
    TooManyValues {
        /// The parameter.
        param: String,
        /// How many it has.
        max: u32,
    },
    /// A value is no number of as many bytes.
    #[error("value {index} of parameter {param}, {value}, does not fit into {bytes} bytes")]
    ValueTooLarge {
        /// The parameter.
        param: String,
        /// Which value, from 0 on.
        index: u32,
        /// The value.
        value: u64,
        /// Bytes that each value of the parameter has.
        bytes: u32,
    },
    /// A parameter that the note says is required has no values yet.
    #[error("the VMM has not given parameter {0}, without which the device cannot work")]
    MissingParam(String),
    /// The running device has a map that would start anew, or not be there any more.
    #[error("map {map} of the running device would be lost: {why}")]
    LostMap {
        /// The map.
        map: String,
        /// What is different.
        why: String,
    },
    /// What the running device's programs have started would run on.
    #[error(
        "map {map} has a {what}, and the new file no WORK program \"{stops}\" that stops what the \
         running device has started"
    )]
    RunsOn {
        /// The map.
        map: String,
        /// What runs later: `bpf_timer`, say.
        what: String,
        /// The WORK program.
        stops: &'static str,
    },
    /// The running device handles accesses that would exit to the VMM.
    #[error("the running device has a program for {0}, the new file none")]
    LostDirection(&'static str),
}

/// A map of a device.
#[derive(Debug)]
pub struct Map {
    name: String,
    pub(crate) info: MapInfo,
    fd: OwnedFd,
    memory: Option<Arc<Words>>,
}

impl Map {
    /// A map under that name. It asks the kernel what it is, with bpf(2).
    pub fn from_fd(name: &str, fd: OwnedFd) -> io::Result<Self> {
        let info = sys::map_info(fd.as_fd())?;
        Ok(Self::with_info(name, fd, info))
    }

    /// A map that is pinned in a bpf file system, with bpf(2). It needs the right to read and write
    /// the file.
    pub fn from_pinned(path: &Path) -> io::Result<Self> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        Self::from_fd(&name, sys::get_pinned(path)?)
    }

    /// A map that the kernel has told of: whatever it is, its memory must not end before `info` says so.
    /// What can be mapped is: that needs no bpf(2).
    pub(crate) fn with_info(name: &str, fd: OwnedFd, info: MapInfo) -> Self {
        let is_open = info.map_type == map_type::ARRAY && info.flags & sys::BPF_F_MMAPABLE != 0;
        let len = info.stride().checked_mul(info.max_entries as usize);
        // It is not for constants, nor for what has something that the kernel looks after.
        let memory = len
            .filter(|_| is_open)
            .map(|len| Words::new(fd.as_fd(), len));
        Map {
            name: name.to_string(),
            info,
            memory: memory.and_then(Result::ok).map(Arc::new),
            fd,
        }
    }

    /// Another handle of the same map, with a file descriptor of its own.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Map {
            name: self.name.clone(),
            info: self.info,
            fd: self.fd.try_clone()?,
            memory: self.memory.clone(),
        })
    }

    /// Its name in the source, or the section whose global data it holds: `.bss`, say.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The number of its type: `BPF_MAP_TYPE_ARRAY` is 2.
    pub fn map_type(&self) -> u32 {
        self.info.map_type
    }

    /// The kernel's number of it, the same for all who have it.
    pub fn id(&self) -> u32 {
        self.info.id
    }

    /// Bytes of a key.
    pub fn key_size(&self) -> u32 {
        self.info.key_size
    }

    /// Bytes of a value; of a ring buffer 0.
    pub fn value_size(&self) -> u32 {
        self.info.value_size
    }

    /// How many entries it can have; of a ring buffer bytes.
    pub fn max_entries(&self) -> u32 {
        self.info.max_entries
    }

    /// Its flags, `BPF_F_MMAPABLE` and others.
    pub fn flags(&self) -> u32 {
        self.info.flags
    }

    /// Whether it is an array, with indices as keys.
    pub fn is_array(&self) -> bool {
        self.info.map_type == map_type::ARRAY
    }

    /// Its memory, where this process has it: that of an array with `BPF_F_MMAPABLE` which is not
    /// read-only and has nothing that the kernel looks after, such as locks and timers.
    pub fn words(&self) -> Option<&Arc<Words>> {
        self.memory.as_ref()
    }

    /// The value of that index, where this process has the map's memory. No system call.
    pub fn value(&self, index: u32) -> Option<Vec<u8>> {
        let memory = self
            .memory
            .as_ref()
            .filter(|_| index < self.info.max_entries)?;
        let start = self.info.stride() * index as usize;
        Some(memory.read(start, self.info.value_size as usize))
    }

    /// The value of a key, none if there is none. It calls bpf(2), which needs no rights.
    ///
    /// `InvalidInput`: a key of another size, or a map whose values have several copies.
    pub fn lookup(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        self.check("key", key, self.info.key_size)?;
        let mut value = vec![0; self.info.value_size as usize];
        let found = sys::map_lookup(self.fd.as_fd(), key, &mut value)?;
        Ok(found.then_some(value))
    }

    /// Sets the value of a key. It calls bpf(2), which needs no rights.
    ///
    /// In an array this cancels what the old value has started. `InvalidInput`: a key or value of
    /// another size, or a map whose values have several copies.
    pub fn update(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        self.check("key", key, self.info.key_size)?;
        self.check("value", value, self.info.value_size)?;
        sys::map_update(self.fd.as_fd(), key, value)
    }

    /// Sets the first values of an array, in its memory or as [`Self::update`].
    ///
    /// # Errors
    ///
    /// `InvalidInput`: it is no array, or has fewer values, or ones of another size. Those of
    /// [`Self::update`]. The values before the one that is refused are set.
    pub fn fill<V: AsRef<[u8]>>(&self, values: impl IntoIterator<Item = V>) -> io::Result<()> {
        if !self.is_array() {
            return Err(invalid(format!(
                "no array, but of type {}",
                self.info.map_type
            )));
        }
        for (index, value) in (0..).zip(values) {
            let value = value.as_ref();
            self.check("value", value, self.info.value_size)?;
            if index >= self.info.max_entries {
                return Err(invalid(format!("it has {} values", self.info.max_entries)));
            }
            match &self.memory {
                Some(memory) => memory.write(self.info.stride() * index as usize, value),
                None => self.update(&index.to_ne_bytes(), value)?,
            }
        }
        Ok(())
    }

    fn check(&self, what: &str, bytes: &[u8], wanted: u32) -> io::Result<()> {
        if matches!(
            self.info.map_type,
            map_type::PERCPU_ARRAY
                | map_type::PERCPU_HASH
                | map_type::LRU_PERCPU_HASH
                | map_type::PERCPU_CGROUP_STORAGE
        ) {
            return Err(invalid(
                "a map whose values have a copy per CPU".to_string(),
            ));
        }
        match bytes.len() == wanted as usize {
            true => Ok(()),
            false => Err(invalid(format!(
                "{what} of {} bytes, not {wanted}",
                bytes.len()
            ))),
        }
    }
}

impl AsFd for Map {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Map {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

fn invalid(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

/// A program that runs without a guest's access.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Work<'a> {
    /// Its index in the device.
    pub index: u32,
    /// Its name, which says what it is for.
    pub name: &'a str,
    /// The program.
    pub program: BorrowedFd<'a>,
}

/// What the kernel has counted of a program.
///
/// It counts runs and their time only while `kernel.bpf_stats_enabled` is 1, or somebody has
/// `BPF_ENABLE_STATS`; without, both stay as they are, 0 at first.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProgramStats {
    /// What it is for: `read`, `write`, or the name of a WORK program.
    pub name: String,
    /// The kernel's number of it.
    pub id: u32,
    /// How often it has run.
    pub run_count: u64,
    /// Nanoseconds that it has run for.
    pub run_time_ns: u64,
    /// Instructions that the verifier went through.
    pub verified_insns: u64,
}

/// The programs and maps of a device: verified, in the kernel, and perhaps another process's too.
///
/// They are file descriptors, and memory of the maps that user space can map. Timers of a map go
/// when its last file descriptor does, so who has the programs has the maps.
#[derive(Debug)]
pub struct Programs {
    note: Note,
    read: Option<OwnedFd>,
    write: Option<OwnedFd>,
    /// By index.
    works: BTreeMap<u32, OwnedFd>,
    maps: Vec<Map>,
    /// What the maps are like that do not belong to the programs.
    layouts: Vec<Layout>,
    /// Those of them that are saved.
    states: Vec<StateMap>,
    /// The read pages of the note, in its order.
    pub(crate) read_pages: Vec<Arc<PageMap>>,
    /// Whether somebody has given the parameters of the note, in its order.
    given: Vec<AtomicBool>,
}

/// All that [`Programs`] are made of.
#[derive(Debug)]
pub(crate) struct Parts {
    pub note: Note,
    pub read: Option<OwnedFd>,
    pub write: Option<OwnedFd>,
    pub works: BTreeMap<u32, OwnedFd>,
    pub maps: Vec<Map>,
    pub layouts: Vec<Layout>,
    /// What global data has at first, by section.
    pub initial: BTreeMap<String, Vec<u8>>,
    /// The parameters whose maps have their values already.
    pub given: Vec<String>,
}

impl Programs {
    /// Programs that somebody else has loaded, with maps of these names.
    ///
    /// Nothing says what is in the maps. So a device of them cannot be saved, unless its programs only
    /// read them; and with [`OnLoss::Refuse`](crate::OnLoss::Refuse) it can be replaced only by
    /// programs that have the same maps. What its programs have started, such as timers, is not known
    /// either: it runs on. `OpenImage::load()` and `recv()` know more.
    ///
    /// # Errors
    ///
    /// [`NoProgram`](Error::NoProgram), [`Work`](Error::Work), and those about what the note says of
    /// maps: [`ReadPage`](Error::ReadPage), [`MapReadPage`](Error::MapReadPage),
    /// [`Param`](Error::Param).
    pub fn from_fds(
        note: Note,
        read: Option<OwnedFd>,
        write: Option<OwnedFd>,
        works: impl IntoIterator<Item = (u32, OwnedFd)>,
        maps: Vec<Map>,
    ) -> Result<Self, Error> {
        Self::new(Parts {
            note,
            read,
            write,
            works: works.into_iter().collect(),
            maps,
            layouts: Vec::new(),
            initial: BTreeMap::new(),
            given: Vec::new(),
        })
    }

    /// Checks what the parts say of each other, and maps what is state or a read page. It calls no
    /// bpf(2).
    pub(crate) fn new(parts: Parts) -> Result<Self, Error> {
        let Parts {
            note,
            read,
            write,
            works,
            maps,
            mut layouts,
            mut initial,
            given,
        } = parts;
        if read.is_none() && write.is_none() {
            return Err(Error::NoProgram);
        }
        let named = note.works.iter().map(|work| work.index);
        let is_one = |index: &u32| note.works.iter().any(|work| work.index == *index);
        let odd = works.keys().copied().find(|index| !is_one(index));
        let missing = named.clone().find(|index| !works.contains_key(index));
        if let Some(index) = odd.or(missing) {
            return Err(Error::Work(index));
        }
        for (at, layout) in layouts.iter().enumerate() {
            if layouts[..at].iter().any(|other| other.name == layout.name) {
                return Err(Error::SameName(layout.name.clone()));
            }
        }
        let find = |name: &str| maps.iter().find(|map| map.name == name);
        let is_unknown = |map: &&Map| !layouts.iter().any(|layout| layout.name == map.name);
        let unknown: Vec<_> = maps.iter().filter(is_unknown).collect();
        layouts.extend(unknown.into_iter().filter_map(Layout::unknown));
        page::check(&note, |name| find(name).map(|map| map.info))?;
        param::check(&note, |name| find(name).map(|map| map.info))?;
        check_pages_have_program(&note, read.is_some())?;
        let mut states = Vec::new();
        for layout in layouts.iter().filter(|layout| layout.is_state) {
            let name = &layout.name;
            let map = find(name).ok_or_else(|| Error::NoSuchMap(name.clone()))?;
            let initial = initial.remove(name).unwrap_or_default();
            let state = StateMap::new(layout, map, initial);
            states.push(state.map_err(|source| Error::MapState {
                map: name.clone(),
                source,
            })?);
        }
        let mut read_pages = Vec::new();
        for page in &note.read_pages {
            let map = find(&page.map).expect("page::check() has found it");
            let mapping = PageMap::new(map).map_err(|source| Error::MapReadPage {
                map: page.map.clone(),
                source,
            })?;
            read_pages.push(Arc::new(mapping));
        }
        let is_given = |param: &note::Param| AtomicBool::new(given.contains(&param.name));
        Ok(Programs {
            given: note.params.iter().map(is_given).collect(),
            note,
            read,
            write,
            works,
            maps,
            layouts,
            states,
            read_pages,
        })
    }

    /// What the file says about the device.
    pub fn note(&self) -> &Note {
        &self.note
    }

    /// The program that handles guest reads.
    pub fn read_program(&self) -> Option<BorrowedFd<'_>> {
        self.read.as_ref().map(OwnedFd::as_fd)
    }

    /// The program that handles guest writes.
    pub fn write_program(&self) -> Option<BorrowedFd<'_>> {
        self.write.as_ref().map(OwnedFd::as_fd)
    }

    /// The programs that run without a guest's access.
    pub fn works(&self) -> impl Iterator<Item = Work<'_>> {
        self.note.works.iter().filter_map(|item| {
            Some(Work {
                index: item.index,
                name: &item.name,
                program: self.works.get(&item.index)?.as_fd(),
            })
        })
    }

    /// The one of that name.
    pub fn work(&self, name: &str) -> Option<Work<'_>> {
        self.works().find(|work| work.name == name)
    }

    /// All maps, those that belong to the programs too.
    pub fn maps(&self) -> impl Iterator<Item = &Map> {
        self.maps.iter()
    }

    /// The map of that name, to read or change the device's state.
    ///
    /// Maps of global data are found by the name of their section.
    pub fn map(&self, name: &str) -> Option<&Map> {
        self.maps.iter().find(|map| map.name == name)
    }

    /// Sets the first values of an array, as [`Map::fill`] does; if it is a parameter's, this gives
    /// it.
    ///
    /// # Errors
    ///
    /// [`NoSuchMap`](Error::NoSuchMap). [`Access`](Error::Access): the values before the one that is
    /// refused are set, and a parameter is not given.
    pub fn fill<V: AsRef<[u8]>>(
        &self,
        map: &str,
        values: impl IntoIterator<Item = V>,
    ) -> Result<(), Error> {
        let no_such = || Error::NoSuchMap(map.to_string());
        let filled = self.map(map).ok_or_else(no_such)?.fill(values);
        filled.map_err(|source| Error::Access {
            map: map.to_string(),
            source,
        })?;
        self.set_given(map);
        Ok(())
    }

    /// Gives a parameter of the device its values, one for each element of the map; those behind
    /// are 0. It calls bpf(2), unless the map is one with memory ([`Map::words`]).
    ///
    /// What a value means, its unit too, is between the device and the VMM.
    ///
    /// # Errors
    ///
    /// - [`NoSuchParam`](Error::NoSuchParam).
    /// - [`TooManyValues`](Error::TooManyValues): more than the map has elements.
    /// - [`ValueTooLarge`](Error::ValueTooLarge): one needs more bytes than an element has.
    /// - [`Access`](Error::Access): bpf(2) refuses one. Only then some of the others may be set.
    pub fn param(&self, name: &str, values: impl IntoIterator<Item = u64>) -> Result<(), Error> {
        let map = self
            .note
            .param(name)
            .and_then(|param| self.map(&param.name));
        let map = map.ok_or_else(|| Error::NoSuchParam {
            name: name.to_string(),
            there: self
                .note
                .params
                .iter()
                .map(|one| one.name.clone())
                .collect(),
        })?;
        self.fill(name, param::encode(map, values)?)
    }

    /// Notes that the map of that name has its values, if it is a parameter's.
    pub(crate) fn set_given(&self, map: &str) {
        for (param, given) in self.note.params.iter().zip(&self.given) {
            if param.name == map {
                given.store(true, Ordering::Relaxed);
            }
        }
    }

    /// The names of the parameters whose maps have their values.
    pub(crate) fn given(&self) -> impl Iterator<Item = &str> {
        let params = self.note.params.iter().zip(&self.given);
        params
            .filter(|(_, given)| given.load(Ordering::Relaxed))
            .map(|(param, _)| param.name.as_str())
    }

    /// Checks that the required parameters have their values, or get them by what else is known.
    pub(crate) fn check_given(&self, gets: impl Fn(&str) -> bool) -> Result<(), Error> {
        let mut required = self.note.params.iter().filter(|param| param.required);
        let is_missing = |param: &&note::Param| {
            !self.given().any(|given| given == param.name) && !gets(&param.name)
        };
        match required.find(is_missing) {
            Some(param) => Err(Error::MissingParam(param.name.clone())),
            None => Ok(()),
        }
    }

    /// What the kernel has counted of each program, from `/proc/self/fdinfo`: no bpf(2).
    ///
    /// It fails where `/proc` is not mounted or does not show it, with an error that says so.
    pub fn stats(&self) -> io::Result<Vec<ProgramStats>> {
        let handlers = [("read", &self.read), ("write", &self.write)];
        let handlers = handlers
            .into_iter()
            .filter_map(|(name, program)| Some((name, program.as_ref()?.as_fd())));
        let works = self.works().map(|work| (work.name, work.program));
        handlers
            .chain(works)
            .map(|(name, program)| {
                let info = FdInfo::of(program)?;
                let number = |line| {
                    let missing = || io::Error::other(format!("no line {line} of a program"));
                    info.number(line).ok_or_else(missing)
                };
                Ok(ProgramStats {
                    name: name.to_string(),
                    id: number("prog_id")? as u32,
                    run_count: number("run_cnt")?,
                    run_time_ns: number("run_time_ns")?,
                    // Older kernels do not tell.
                    verified_insns: info.number("verified_insns").unwrap_or(0),
                })
            })
            .collect()
    }

    pub(crate) fn layouts(&self) -> &[Layout] {
        &self.layouts
    }

    pub(crate) fn states(&self) -> &[StateMap] {
        &self.states
    }

    /// A map of which nothing says what is in it.
    pub(crate) fn unknown(&self) -> Option<&str> {
        let mut layouts = self.layouts.iter();
        let unknown = layouts.find(|layout| !layout.is_known());
        unknown.map(|layout| layout.name.as_str())
    }

    /// A map with something that runs later by itself, and what that is.
    pub(crate) fn runs_later(&self) -> Option<(&str, &str)> {
        self.layouts
            .iter()
            .find_map(|layout| Some((layout.name.as_str(), layout.runs_later.as_deref()?)))
    }
}

/// A page has the same values where the guest has no slot of it.
pub(crate) fn check_pages_have_program(note: &Note, reads: bool) -> Result<(), Error> {
    match &note.read_pages[..] {
        [note::ReadPage { map, .. }, ..] if !reads => Err(Error::ReadPage {
            map: map.clone(),
            why: "no read program has its values while the guest has no slot".to_string(),
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::note::WorkName;

    fn note() -> Note {
        let mut note = Note::default();
        (note.mmio_size, note.compatible) = (0x1000, vec!["kvm-bpf,test".to_string()]);
        note
    }

    fn file() -> OwnedFd {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn threads_may_share_all() {
        fn is_shared<T: Send + Sync>() {}

        is_shared::<Programs>();
        is_shared::<crate::ImageDevice>();
        is_shared::<crate::Builder>();
        is_shared::<crate::Device>();
        is_shared::<crate::RingBuffer>();
        is_shared::<Words>();
    }

    #[test]
    fn the_note_names_the_programs() {
        let none = Programs::from_fds(note(), None, None, [], Vec::new());
        assert!(matches!(none, Err(Error::NoProgram)), "{none:?}");
        let odd = Programs::from_fds(note(), Some(file()), None, [(3, file())], Vec::new());
        assert!(matches!(odd, Err(Error::Work(3))), "{odd:?}");
        let mut with_work = note();
        with_work.works.push(WorkName {
            index: 5,
            name: "save".to_string(),
        });
        let missing = Programs::from_fds(with_work.clone(), None, Some(file()), [], Vec::new());
        assert!(matches!(missing, Err(Error::Work(5))), "{missing:?}");
        let good = Programs::from_fds(with_work, None, Some(file()), [(5, file())], Vec::new());
        let good = good.unwrap();
        assert!(good.read_program().is_none() && good.write_program().is_some());
        assert_eq!(good.work("save").unwrap().index, 5);
        assert!(good.map("x").is_none());
    }

    #[test]
    fn what_is_no_program_has_no_counts() {
        let programs = Programs::from_fds(note(), Some(file()), None, [], Vec::new()).unwrap();
        let error = programs.stats().unwrap_err();
        assert_eq!(error.to_string(), "no line prog_id of a program");
    }

    #[test]
    fn values_have_sizes() {
        let map = |map_type| {
            let info = MapInfo {
                map_type,
                key_size: 4,
                value_size: 12,
                max_entries: 2,
                ..MapInfo::default()
            };
            Map::with_info("m", file(), info)
        };
        let array = map(map_type::ARRAY);
        assert!(array.words().is_none() && array.value(0).is_none());
        for (result, wanted) in [
            (array.lookup(&[0; 3]).map(drop), "key of 3 bytes, not 4"),
            (array.update(&[0; 4], &[0; 8]), "value of 8 bytes, not 12"),
            (array.fill([[0; 8]]), "value of 8 bytes, not 12"),
            (
                map(map_type::HASH).fill([[0; 12]]),
                "no array, but of type 1",
            ),
            (
                map(map_type::PERCPU_ARRAY).lookup(&[0; 4]).map(drop),
                "a map whose values have a copy per CPU",
            ),
        ] {
            let error = result.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
            assert_eq!(error.to_string(), wanted);
        }
    }
}
