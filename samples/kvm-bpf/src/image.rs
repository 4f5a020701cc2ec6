// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A device's object file: opened, edited, loaded into the kernel.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use libbpf_rs::{
    AsRawLibbpf, ErrorKind, ObjectBuilder, OpenMap, OpenMapMut, OpenObject, OpenProgramMut,
    libbpf_sys,
};

use crate::abi::Abi;
use crate::file::read_start;
use crate::layouts::short_name;
use crate::maps::{self, Layout, MapChanges, OnLoss, Side};
use crate::note::{self, Note};
use crate::page;
use crate::param;
use crate::programs::{self, Map, Parts, Programs};
use crate::sys::MapInfo;

/// Section of a read handler.
const READ_SECTION: &str = "kvm_io_read";
/// Section of a write handler.
const WRITE_SECTION: &str = "kvm_io_write";
/// Section of a program that runs without a guest's access; `/` and its name follow.
const WORK_SECTION: &str = "kvm_io_work";
/// What follows the section of a program that may sleep.
const SLEEPABLE: &str = ".s";

/// Room for the verifier's log of one program; the kernel keeps the end.
const VERIFIER_LOG_LEN: usize = 1 << 20;

/// The most bytes of an object file; those of the sample devices have some ten thousand.
pub const MAX_FILE_SIZE: u64 = 16 << 20;

/// Why an object file could not become a device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file cannot be opened or read, or is not a regular one.
    #[error("cannot read the file")]
    Read(#[source] io::Error),
    /// The file is larger than a device.
    #[error("the file has more than {} MiB, the most for a device", MAX_FILE_SIZE >> 20)]
    FileSize,
    /// The device note cannot be used.
    #[error(transparent)]
    Note(#[from] note::Error),
    /// libbpf cannot open the object.
    #[error("libbpf cannot open the object")]
    Open(#[source] io::Error),
    /// There is neither a read nor a write handler.
    #[error("no program in section {READ_SECTION} or {WRITE_SECTION}")]
    NoProgram,
    /// Two programs do the same.
    #[error("programs {0} and {1} handle the same direction, or have the same name")]
    TwoPrograms(String, String),
    /// A WORK program has no index.
    #[error("section {WORK_SECTION}/{0} is there, but the device note has no WORK program {0}")]
    UnnamedWork(String),
    /// An index has no WORK program.
    #[error("the device note has WORK program {0}, but there is no section {WORK_SECTION}/{0}")]
    MissingWork(String),
    /// A program is in a section that means nothing for a device.
    #[error("program {program} is in section {section}, which is no handler's")]
    UnknownSection {
        /// The program.
        program: String,
        /// Its section.
        section: String,
    },
    /// libbpf does not take a program's type, flags or log buffer.
    #[error("cannot set up program {program}")]
    SetUp {
        /// The program.
        program: String,
        /// libbpf's error.
        #[source]
        source: io::Error,
    },
    /// The types of a map cannot be compared with others.
    #[error("the types of map {0} are nested too deeply, or hold too much")]
    MapTypes(String),
    /// Two maps cannot be told apart.
    #[error("two maps are named {0}; libbpf cuts the names of sections to 15 characters")]
    SameName(String),
    /// A map cannot go on with the content of that of the running device.
    #[error("map {map} cannot be carried over")]
    ReuseMap {
        /// The map.
        map: String,
        /// libbpf's error.
        #[source]
        source: io::Error,
    },
    /// A map of others cannot be one of the device.
    #[error("map {map} cannot be shared: {why}")]
    ShareMap {
        /// The device's map.
        map: String,
        /// What is wrong.
        why: String,
    },
    /// The kernel's verifier refused a program.
    #[error("the verifier refused program {program}")]
    Verifier {
        /// The program.
        program: String,
        /// What the verifier wrote, many lines.
        log: String,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// The programs and maps cannot be those of the device, or of the running one.
    #[error(transparent)]
    Programs(#[from] programs::Error),
    /// Loading failed for another reason.
    #[error("cannot load the object")]
    Load(#[source] io::Error),
}

/// What a program is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role<'a> {
    Read,
    Write,
    /// A WORK program of that name.
    Work(&'a str),
}

/// What the name of a program's section says: its role, and whether it may sleep.
fn role(section: &str) -> Option<(Role<'_>, bool)> {
    let (kind, name) = match section.split_once('/') {
        Some((kind, name)) => (kind, Some(name)),
        None => (section, None),
    };
    let (kind, sleepable) = match kind.strip_suffix(SLEEPABLE) {
        Some(kind) => (kind, true),
        None => (kind, false),
    };
    let role = match (kind, name) {
        (READ_SECTION, None) => Role::Read,
        (WRITE_SECTION, None) => Role::Write,
        (WORK_SECTION, Some(name)) => Role::Work(name),
        _ => return None,
    };
    Some((role, sleepable))
}

/// What a file has for each role.
#[derive(Debug)]
struct ByRole<T> {
    read: Option<T>,
    write: Option<T>,
    /// By index.
    works: BTreeMap<u32, T>,
}

impl<T> ByRole<T> {
    fn new() -> Self {
        ByRole {
            read: None,
            write: None,
            works: BTreeMap::new(),
        }
    }
}

/// An object file before it is loaded, when its data can still be edited.
#[derive(Debug)]
pub struct OpenImage {
    note: Note,
    object: OpenObject,
    /// The maps' names, in the object's order. libbpf has the kernel's of one that is carried over,
    /// which has none where its loader had a token.
    map_names: Vec<String>,
    /// What the maps were like before some were carried over.
    layouts: Option<Vec<Layout>>,
    /// The maps that others use too, by name, with the kernel's numbers of them.
    shared: BTreeMap<String, u32>,
    /// The maps that have what somebody has put into them.
    given: Vec<String>,
    abi: Option<Abi>,
}

impl OpenImage {
    /// Opens an object file: a regular one of at most [`MAX_FILE_SIZE`] bytes.
    ///
    /// # Errors
    ///
    /// [`Read`](Error::Read), and those of [`Self::open`].
    pub fn open_file(path: &Path) -> Result<Self, Error> {
        let bytes = read_start(path, MAX_FILE_SIZE + 1).map_err(Error::Read)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        Self::open(name.split('.').next().unwrap_or_default(), &bytes)
    }

    /// Opens the bytes of an object file, at most [`MAX_FILE_SIZE`].
    ///
    /// `name` shows up in the names that tools see of the maps of global data.
    ///
    /// # Errors
    ///
    /// [`FileSize`](Error::FileSize), [`Note`](Error::Note), [`Open`](Error::Open).
    pub fn open(name: &str, file: &[u8]) -> Result<Self, Error> {
        if file.len() as u64 > MAX_FILE_SIZE {
            return Err(Error::FileSize);
        }
        let note = Note::from_elf(file)?;
        let object = ObjectBuilder::default()
            .name(name)
            .and_then(|builder| builder.open_memory(file))
            .map_err(|error| Error::Open(foreign(error)))?;
        let map_name = |map: OpenMap<'_>| map.name().to_string_lossy().into_owned();
        let map_names = object.maps().map(map_name).collect();
        Ok(OpenImage {
            note,
            object,
            map_names,
            layouts: None,
            shared: BTreeMap::new(),
            given: Vec::new(),
            abi: None,
        })
    }

    /// What the file says about the device.
    pub fn note(&self) -> &Note {
        &self.note
    }

    /// Sets the numbers of the programs' types to the running kernel's, from
    /// [`Abi::from_running_kernel`].
    pub fn set_abi(&mut self, abi: &Abi) {
        self.abi = Some(*abi);
    }

    /// The same where [`Self::set_abi`] was not called.
    pub(crate) fn set_default_abi(&mut self, abi: &Abi) {
        self.abi.get_or_insert(*abi);
    }

    /// Changes what a section of global data has at first: to set a tunable in `.rodata`, say.
    ///
    /// Returns whether there is such a section; if not, `change` is not called.
    #[must_use = "without such a section nothing has changed"]
    pub fn edit_initial(&mut self, section: &str, change: impl FnOnce(&mut [u8])) -> bool {
        let Some(mut map) = self.map_mut(section) else {
            return false;
        };
        let Some(value) = map.initial_value_mut() else {
            return false;
        };
        change(value);
        true
    }

    fn map_mut(&mut self, name: &str) -> Option<OpenMapMut<'_>> {
        let mut maps = self.map_names.iter().zip(self.object.maps_mut());
        maps.find_map(|(full, map)| is_named(full, name).then_some(map))
    }

    fn named_maps(&self) -> impl Iterator<Item = (&str, OpenMap<'_>)> {
        self.map_names
            .iter()
            .map(String::as_str)
            .zip(self.object.maps())
    }

    /// What the maps are like. Before any of them is carried over or shared, it is asked of libbpf.
    fn take_layouts(&mut self) -> Result<Vec<Layout>, Error> {
        match self.layouts.take() {
            Some(layouts) => Ok(layouts),
            None => Layout::of_object(&mut self.object),
        }
    }

    /// Gives the device `map`, which others use too, instead of a map of its own of that name.
    ///
    /// It has the same type, and keys and values of the same sizes, but may have any number of
    /// entries. It is no state of the device: it is neither saved nor restored. The device goes on
    /// with it when its programs are replaced, unless the new file shares another one. If it is a
    /// parameter's, who shares it has given that.
    ///
    /// # Errors
    ///
    /// [`ShareMap`](Error::ShareMap): there is no such map, or it is another kind of map.
    /// [`MapTypes`](Error::MapTypes), [`SameName`](Error::SameName) or [`Open`](Error::Open): the
    /// object's maps cannot be those of a device.
    pub fn share_map(&mut self, name: &str, map: &Map) -> Result<(), Error> {
        let failed = |why: String| Error::ShareMap {
            map: name.to_string(),
            why,
        };
        let mut layouts = self.take_layouts()?;
        let layout = layouts.iter_mut().find(|layout| layout.name == name);
        let own = self.map_mut(name);
        let shared = match (layout, own) {
            (Some(layout), Some(mut own)) => {
                let sizes = |ty: u32, key: u32, value: u32| {
                    format!("of type {ty} with keys of {key} bytes and values of {value}")
                };
                let info = info_of(&own);
                let here = sizes(info.map_type, info.key_size, info.value_size);
                let there = sizes(map.map_type(), map.key_size(), map.value_size());
                match here == there {
                    false => Err(failed(format!("it is {there}, and should be {here}"))),
                    true => own
                        .reuse_fd(map.as_fd())
                        .map(|()| layout.share())
                        .map_err(|error| failed(error.to_string())),
                }
            }
            _ => Err(failed("the device has none of that name".to_string())),
        };
        self.layouts = Some(layouts);
        shared?;
        self.shared.insert(name.to_string(), map.id());
        self.given.push(name.to_string());
        Ok(())
    }

    /// Prepares to replace a loaded image: goes on with its maps, so that state survives a change
    /// of programs.
    ///
    /// A map is carried over where type, sizes, flags and the types of key and value are the same,
    /// with the names, places and kinds of all fields. What belongs to the programs, such as
    /// read-only data, is not; nor is one for which [`Self::share_map`] has another map. Maps with
    /// state that have changed are for [`state`](crate::state) to convert, where the device says
    /// that it loads the version of the running one.
    ///
    /// # Errors
    ///
    /// [`Programs`](Error::Programs): with [`OnLoss::Refuse`], what would be lost.
    /// [`ReuseMap`](Error::ReuseMap): libbpf does not take a map. Those about the programs'
    /// sections and the object's maps, as [`Self::load`] has them.
    pub fn reuse_maps(&mut self, from: &Programs, on_loss: OnLoss) -> Result<MapChanges, Error> {
        let programs = self.program_names()?;
        let mut layouts = self.take_layouts()?;
        for layout in &mut layouts {
            let mut old = from.layouts().iter().filter(|old| old.is_shared);
            if old.any(|old| old.name == layout.name) {
                layout.share();
            }
        }
        let new = Side {
            note: &self.note,
            layouts: self.layouts.insert(layouts),
            reads: programs.read.is_some(),
            writes: programs.write.is_some(),
        };
        let is_another = |name: &String| {
            let shared = self.shared.get(name);
            shared.is_some_and(|&id| from.map(name).is_none_or(|old| old.id() != id))
        };
        let changes = maps::plan(&from.side(), &new, on_loss, |old, new| {
            match is_another(&new.name) {
                true => Some("the new file shares another map of that name".to_string()),
                false => new.difference(old),
            }
        })?;
        for (full, mut map) in self.map_names.iter().zip(self.object.maps_mut()) {
            let name = short_name(full).to_string();
            if let Some(old) = from.map(&name)
                && changes.carried.contains(&name)
            {
                map.reuse_fd(old.as_fd()).map_err(|error| Error::ReuseMap {
                    map: name,
                    source: foreign(error),
                })?;
            }
        }
        // A map that was no parameter so far has what the running device works with.
        let is_given = |name: &&String| {
            from.note().param(name).is_none() || from.given().any(|given| given == *name)
        };
        let given = changes.carried.iter().filter(is_given);
        self.given.extend(given.cloned());
        Ok(changes)
    }

    /// The names of the programs.
    ///
    /// A program that libbpf does not load, as one in `SEC("?kvm_io_write")`, is as if not there.
    fn program_names(&self) -> Result<ByRole<String>, Error> {
        let mut programs = ByRole::new();
        let mut unused: Vec<_> = self.note.works.iter().collect();
        for program in self.object.progs() {
            let name = program.name().to_string_lossy().into_owned();
            let section = program.section().to_string_lossy().into_owned();
            let role = role(&section);
            if let Some((Role::Work(work), _)) = role {
                unused.retain(|item| item.name != work);
            }
            if !program.autoload() {
                continue;
            }
            let first = match role {
                Some((Role::Read, _)) => programs.read.replace(name.clone()),
                Some((Role::Write, _)) => programs.write.replace(name.clone()),
                Some((Role::Work(work), _)) => {
                    let index = self.note.work_index(work);
                    let index = index.ok_or_else(|| Error::UnnamedWork(work.to_string()))?;
                    programs.works.insert(index, name.clone())
                }
                None => {
                    return Err(Error::UnknownSection {
                        program: name,
                        section,
                    });
                }
            };
            if let Some(first) = first {
                return Err(Error::TwoPrograms(first, name));
            }
        }
        match unused.first() {
            Some(item) => Err(Error::MissingWork(item.name.clone())),
            None => Ok(programs),
        }
    }

    /// Creates the maps and loads the programs. The verifier may take seconds for that.
    ///
    /// libbpf also prints warnings on stderr when this fails, for the whole process; with feature
    /// `log`, `log_libbpf()` sends them elsewhere.
    ///
    /// # Errors
    ///
    /// - [`Verifier`](Error::Verifier), with the verifier's log.
    /// - [`NoProgram`](Error::NoProgram), [`TwoPrograms`](Error::TwoPrograms),
    ///   [`UnnamedWork`](Error::UnnamedWork), [`MissingWork`](Error::MissingWork),
    ///   [`UnknownSection`](Error::UnknownSection): the programs are none of a device.
    /// - [`Programs`](Error::Programs), [`MapTypes`](Error::MapTypes),
    ///   [`SameName`](Error::SameName), [`Open`](Error::Open): the maps are not what the note says,
    ///   or cannot be those of a device.
    /// - [`SetUp`](Error::SetUp), and [`Load`](Error::Load) for another reason: `EPERM` without the
    ///   right to load, say.
    pub fn load(mut self) -> Result<Programs, Error> {
        let names = self.program_names()?;
        if names.read.is_none() && names.write.is_none() {
            return Err(Error::NoProgram);
        }
        // Before the kernel gets to see anything.
        let find = |name: &str| {
            let mut maps = self.named_maps().filter(|(_, map)| map.autocreate());
            let (_, map) = maps.find(|(full, _)| is_named(full, name))?;
            Some(info_of(&map))
        };
        page::check(&self.note, find)?;
        param::check(&self.note, find)?;
        programs::check_pages_have_program(&self.note, names.read.is_some())?;
        let layouts = self.take_layouts()?;
        let abi = self.abi.unwrap_or_default();
        let initial = self.initial_values();
        let created = self.named_maps().filter(|(_, map)| map.autocreate());
        let created: Vec<_> = created.map(|(name, _)| name.to_string()).collect();
        let mut logs = Vec::new();
        for mut program in self.object.progs_mut() {
            let section = program.section().to_string_lossy().into_owned();
            let Some((role, sleepable)) = role(&section).filter(|_| program.autoload()) else {
                continue;
            };
            let name = program.name().to_string_lossy().into_owned();
            let mut log = vec![0; VERIFIER_LOG_LEN];
            set_up(&mut program, role, sleepable, &abi, &mut log).map_err(|source| {
                Error::SetUp {
                    program: name.clone(),
                    source,
                }
            })?;
            logs.push((name, log));
        }

        let object = self
            .object
            .load()
            .map_err(|error| load_error(foreign(error), &logs))?;
        let mut programs = ByRole::new();
        for program in object.progs().filter(|program| program.autoload()) {
            let fd = program.as_fd().try_clone_to_owned();
            let fd = fd.map_err(Error::Load)?;
            match program.section().to_str().and_then(role) {
                Some((Role::Read, _)) => programs.read = Some(fd),
                Some((Role::Write, _)) => programs.write = Some(fd),
                Some((Role::Work(work), _)) => {
                    let index = self.note.work_index(work);
                    programs.works.extend(index.map(|index| (index, fd)));
                }
                None => {}
            }
        }
        let mut maps = Vec::new();
        for (name, map) in created.iter().zip(object.maps()) {
            let fd = map.as_fd().try_clone_to_owned();
            let map = fd.and_then(|fd| Map::from_fd(short_name(name), fd));
            maps.push(map.map_err(Error::Load)?);
        }
        Ok(Programs::new(Parts {
            note: self.note,
            read: programs.read,
            write: programs.write,
            works: programs.works,
            maps,
            layouts,
            initial,
            given: self.given,
        })?)
    }

    /// What global data has at first, by section.
    fn initial_values(&self) -> BTreeMap<String, Vec<u8>> {
        let of_map = |(full, map): (&str, OpenMap<'_>)| {
            let name = short_name(full).to_string();
            Some((name, map.initial_value()?.to_vec()))
        };
        self.named_maps().filter_map(of_map).collect()
    }
}

/// Whether a map's full name is `name`, or `name` is the section of its global data.
fn is_named(full: &str, name: &str) -> bool {
    full == name || short_name(full) == name
}

/// What a map is to be.
fn info_of(map: &OpenMap<'_>) -> MapInfo {
    let raw = map.as_libbpf_object().as_ptr();
    MapInfo {
        // SAFETY: the map lives as long as it is borrowed; the call only reads from it.
        map_type: unsafe { libbpf_sys::bpf_map__type(raw) },
        id: 0,
        key_size: map.key_size(),
        value_size: map.value_size(),
        max_entries: map.max_entries(),
        flags: map.map_flags(),
    }
}

/// An error of libbpf with all that it says.
pub(crate) fn foreign(error: libbpf_rs::Error) -> io::Error {
    let kind = match error.kind() {
        ErrorKind::NotFound => io::ErrorKind::NotFound,
        ErrorKind::PermissionDenied => io::ErrorKind::PermissionDenied,
        ErrorKind::AlreadyExists => io::ErrorKind::AlreadyExists,
        ErrorKind::InvalidInput => io::ErrorKind::InvalidInput,
        ErrorKind::InvalidData => io::ErrorKind::InvalidData,
        ErrorKind::WouldBlock => io::ErrorKind::WouldBlock,
        ErrorKind::TimedOut => io::ErrorKind::TimedOut,
        ErrorKind::WriteZero => io::ErrorKind::WriteZero,
        ErrorKind::Interrupted => io::ErrorKind::Interrupted,
        ErrorKind::Unsupported => io::ErrorKind::Unsupported,
        ErrorKind::UnexpectedEof => io::ErrorKind::UnexpectedEof,
        ErrorKind::OutOfMemory => io::ErrorKind::OutOfMemory,
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, error)
}

/// Sets what libbpf would know by itself, had it heard of our program types.
fn set_up(
    program: &mut OpenProgramMut<'_>,
    role: Role<'_>,
    sleepable: bool,
    abi: &Abi,
    log: &mut [u8],
) -> io::Result<()> {
    let prog_type = match role {
        Role::Read => abi.read_type,
        Role::Write => abi.write_type,
        Role::Work(_) => abi.work_type,
    };
    let flags = if sleepable {
        libbpf_sys::BPF_F_SLEEPABLE
    } else {
        0
    };
    let raw = program.as_libbpf_object().as_ptr();
    // SAFETY: `raw` is the live program that `program` borrows, of an object
    // that is not loaded yet, and libbpf checks the rest. libbpf keeps the
    // pointer to `log` and writes through it only while it loads the object,
    // and the caller keeps `log` until then.
    let results = unsafe {
        [
            libbpf_sys::bpf_program__set_type(raw, prog_type),
            libbpf_sys::bpf_program__set_flags(raw, flags),
            libbpf_sys::bpf_program__set_log_buf(
                raw,
                log.as_mut_ptr().cast(),
                log.len() as libbpf_sys::size_t,
            ),
        ]
    };
    match results.into_iter().find(|&result| result != 0) {
        Some(errno) => Err(io::Error::from_raw_os_error(-errno)),
        None => Ok(()),
    }
}

/// The first program with a log is the one refused: the verifier is silent about good ones.
fn load_error(source: io::Error, logs: &[(String, Vec<u8>)]) -> Error {
    for (program, log) in logs {
        let text = log.split(|&byte| byte == 0).next().unwrap_or_default();
        if !text.is_empty() {
            return Error::Verifier {
                program: program.clone(),
                log: String::from_utf8_lossy(text).into_owned(),
                source,
            };
        }
    }
    Error::Load(source)
}

/// Sends what libbpf prints, from all of this process, to the crate `log`: warnings, what it tells,
/// and what is for its debugging.
#[cfg(feature = "log")]
pub fn log_libbpf() {
    use libbpf_rs::PrintLevel;

    fn print(level: PrintLevel, text: String) {
        let level = match level {
            PrintLevel::Warn => log::Level::Warn,
            PrintLevel::Info => log::Level::Info,
            PrintLevel::Debug => log::Level::Debug,
        };
        log::log!(target: "libbpf", level, "{}", text.trim_end());
    }
    libbpf_rs::set_print(Some((PrintLevel::Debug, print)));
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn sections_name_roles() {
        assert_eq!(role("kvm_io_read"), Some((Role::Read, false)));
        assert_eq!(role("kvm_io_read.s"), Some((Role::Read, true)));
        assert_eq!(role("kvm_io_write"), Some((Role::Write, false)));
        assert_eq!(role("kvm_io_write.s"), Some((Role::Write, true)));
        assert_eq!(role("kvm_io_work/save"), Some((Role::Work("save"), false)));
        assert_eq!(role("kvm_io_work.s/x"), Some((Role::Work("x"), true)));
        for other in [
            "",
            "kvm_io",
            "kvm_io_read.",
            "kvm_io_reads",
            "kvm_io_read.s.s",
            "kvm_io_read/x",
            "kvm_io_work",
            "kvm_io_work.s",
            "socket",
        ] {
            assert_eq!(role(other), None, "{other}");
        }
    }

    #[test]
    fn global_data_is_found_by_section() {
        assert!(is_named("regbank.rodata", ".rodata"));
        assert!(is_named("accesses", "accesses"));
        assert!(!is_named("accesses", "ses"));
        assert!(!is_named("regbank.bss", ".rodata"));
        assert!(!is_named("regbank.bss", "bss"));
        // A section of its own name is no other.
        assert!(is_named(".data.bss", ".data.bss"));
        assert!(!is_named(".data.bss", ".bss"));
    }

    #[test]
    fn the_refused_program_has_the_log() {
        let denied = || io::Error::from_raw_os_error(libc::EACCES);
        let logs = [
            ("good".to_string(), vec![0; 4]),
            ("bad".to_string(), b"R1 oops\n\0\0".to_vec()),
        ];
        match load_error(denied(), &logs) {
            Error::Verifier { program, log, .. } => {
                assert_eq!((program.as_str(), log.as_str()), ("bad", "R1 oops\n"))
            }
            other => panic!("wanted a verifier error, got {other:?}"),
        }
        assert!(matches!(load_error(denied(), &logs[..1]), Error::Load(_)));
    }

    #[test]
    fn a_file_without_note_is_refused_first() {
        let error = OpenImage::open("x", b"not an object").unwrap_err();
        assert!(matches!(error, Error::Note(note::Error::NotElf)), "{error}");
    }

    #[test]
    fn only_regular_files_are_opened() {
        let pipe = std::env::temp_dir().join(format!("kvm-bpf-pipe-{}", std::process::id()));
        let status = std::process::Command::new("mkfifo").arg(&pipe).status();
        assert!(status.unwrap().success());
        let dir = std::env::temp_dir();
        for (path, kind) in [
            (Path::new("/dev/zero"), "a character device"),
            (&dir, "a directory"),
            (&pipe, "a pipe"),
        ] {
            let error = OpenImage::open_file(path).unwrap_err();
            let Error::Read(error) = error else {
                panic!("{kind}: {error:?}");
            };
            assert!(error.to_string().ends_with(kind), "{kind}: {error}");
        }
        fs::remove_file(&pipe).unwrap();
        let error = OpenImage::open_file(&pipe).unwrap_err();
        assert!(
            matches!(&error, Error::Read(error) if error.kind() == io::ErrorKind::NotFound),
            "{error:?}"
        );
    }

    #[test]
    fn files_have_a_limit() {
        let path = std::env::temp_dir().join(format!("kvm-bpf-size-{}", std::process::id()));
        let file = fs::File::create_new(&path).unwrap();
        for (size, wanted) in [
            (MAX_FILE_SIZE, "not a 64-bit ELF file"),
            (
                MAX_FILE_SIZE + 1,
                "the file has more than 16 MiB, the most for a device",
            ),
            (
                1 << 40,
                "the file has more than 16 MiB, the most for a device",
            ),
        ] {
            file.set_len(size).unwrap();
            let error = OpenImage::open_file(&path).unwrap_err();
            assert_eq!(error.to_string(), wanted, "{size} bytes");
        }
        fs::remove_file(&path).unwrap();
    }
}
