// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A device's object file: opened, edited, loaded into the kernel.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use libbpf_rs::{
    AsRawLibbpf, MapCore, MapHandle, MapType, ObjectBuilder, OpenMap, OpenMapMut, OpenObject,
    OpenProgramMut, libbpf_sys,
};

use crate::maps::{Layout, MapChanges, OnLoss, short_name};
use crate::note::{self, Note};
use crate::page::{self, PageMap};
use crate::state::StateMap;
use crate::uapi::{
    BPF_PROG_TYPE_KVM_IO_READ, BPF_PROG_TYPE_KVM_IO_WORK, BPF_PROG_TYPE_KVM_IO_WRITE,
};

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
    Open(#[source] libbpf_rs::Error),
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
    /// A map with state cannot be mapped into memory.
    #[error("cannot map {map}, whose state is to be saved")]
    MapState {
        /// The map.
        map: String,
        /// The kernel's error.
        #[source]
        source: io::Error,
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
        what: &'static str,
        /// The WORK program.
        stops: &'static str,
    },
    /// The running device handles accesses that would exit to the VMM.
    #[error("the running device has a program for {0}, the new file none")]
    LostDirection(&'static str),
    /// A map cannot go on with the content of that of the running device.
    #[error("map {map} cannot be carried over")]
    ReuseMap {
        /// The map.
        map: String,
        /// libbpf's error.
        #[source]
        source: libbpf_rs::Error,
    },
    /// A map of others cannot be one of the device.
    #[error("map {map} cannot be shared: {why}")]
    ShareMap {
        /// The device's map.
        map: String,
        /// What is wrong.
        why: String,
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
    /// The kernel's verifier refused a program.
    #[error("the verifier refused program {program}")]
    Verifier {
        /// The program.
        program: String,
        /// What the verifier wrote, many lines.
        log: String,
        /// The kernel's error.
        #[source]
        source: libbpf_rs::Error,
    },
    /// Loading failed for another reason.
    #[error("cannot load the object")]
    Load(#[source] libbpf_rs::Error),
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

/// Opens a file to read, if it is a regular one.
///
/// Others may have no end, wait for a writer, or do something because they are opened.
pub fn open_regular(path: &Path) -> io::Result<File> {
    open_regular_to(File::options().read(true), path)
}

/// Opens a file with these options, if it is a regular one.
pub fn open_regular_to(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let check = |metadata: Metadata| {
        let kind = metadata.file_type();
        let kind = match kind {
            _ if kind.is_file() => return Ok(()),
            _ if kind.is_dir() => "a directory",
            _ if kind.is_char_device() => "a character device",
            _ if kind.is_block_device() => "a block device",
            _ if kind.is_fifo() => "a pipe",
            _ => "a socket",
        };
        let message = format!("not a regular file, but {kind}");
        Err(io::Error::new(io::ErrorKind::InvalidInput, message))
    };
    check(fs::metadata(path)?)?;
    // It may have become another one since: then this does not wait.
    let file = options.custom_flags(libc::O_NONBLOCK).open(path)?;
    check(file.metadata()?)?;
    Ok(file)
}

/// Reads so many bytes of a regular file, or all that it has.
pub(crate) fn read_start(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open_regular(path)?.take(max).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// What a file has for each role.
#[derive(Debug)]
struct Programs<T> {
    read: Option<T>,
    write: Option<T>,
    /// By index.
    works: BTreeMap<u32, T>,
}

impl<T> Programs<T> {
    fn new() -> Self {
        Programs {
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
    /// What the maps were like before some were carried over.
    layouts: Option<Vec<Layout>>,
}

impl OpenImage {
    /// Opens an object file: a regular one of at most [`MAX_FILE_SIZE`] bytes.
    pub fn open_file(path: &Path) -> Result<Self, Error> {
        let bytes = read_start(path, MAX_FILE_SIZE + 1).map_err(Error::Read)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        Self::open(name.split('.').next().unwrap_or_default(), &bytes)
    }

    /// Opens the bytes of an object file, at most [`MAX_FILE_SIZE`].
    ///
    /// `name` shows up in the names that tools see of the maps of global data.
    pub fn open(name: &str, file: &[u8]) -> Result<Self, Error> {
        if file.len() as u64 > MAX_FILE_SIZE {
            return Err(Error::FileSize);
        }
        let note = Note::from_elf(file)?;
        let object = ObjectBuilder::default()
            .name(name)
            .and_then(|builder| builder.open_memory(file))
            .map_err(Error::Open)?;
        Ok(OpenImage {
            note,
            object,
            layouts: None,
        })
    }

    /// What the file says about the device.
    pub fn note(&self) -> &Note {
        &self.note
    }

    /// The map of that name, to set a tunable through the initial value of `.rodata`, say.
    ///
    /// Maps of global data are found by the name of their section.
    pub fn map_mut(&mut self, name: &str) -> Option<OpenMapMut<'_>> {
        self.object
            .maps_mut()
            .find(|map| is_named(&map.name().to_string_lossy(), name))
    }

    /// Has the device use `map`, which others use too, instead of a map of its own of that name.
    ///
    /// It has the same type, and keys and values of the same sizes, but may have any number of
    /// entries. It is no state of the device: it is neither saved nor restored. The device goes on
    /// with it when its programs are replaced.
    pub fn share_map(&mut self, name: &str, map: &impl MapCore) -> Result<(), Error> {
        let failed = |why: String| Error::ShareMap {
            map: name.to_string(),
            why,
        };
        let mut layouts = match self.layouts.take() {
            Some(layouts) => layouts,
            None => Layout::of_object(&mut self.object)?,
        };
        let layout = layouts.iter_mut().find(|layout| layout.name == name);
        let own = self.map_mut(name);
        let shared = match (layout, own) {
            (Some(layout), Some(mut own)) => {
                let sizes = |ty: MapType, key: u32, value: u32| {
                    format!("{ty:?} with keys of {key} bytes and values of {value}")
                };
                let here = sizes(own.map_type(), own.key_size(), own.value_size());
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
        shared
    }

    /// Prepares to replace a loaded image: goes on with its maps, so that state survives a change
    /// of programs.
    ///
    /// A map is carried over where type, sizes, flags and the types of key and value are the same,
    /// with the names, places and kinds of all fields. What belongs to the programs, such as
    /// read-only data, is not. Maps with state that have changed are for [`state`](crate::state) to
    /// convert, where the device says that it loads the version of the running one.
    pub fn reuse_maps(&mut self, from: &Image, on_loss: OnLoss) -> Result<MapChanges, Error> {
        if on_loss == OnLoss::Refuse {
            let programs = self.programs()?;
            if from.programs.read.is_some() && programs.read.is_none() {
                return Err(Error::LostDirection("reads"));
            }
            if from.programs.write.is_some() && programs.write.is_none() {
                return Err(Error::LostDirection("writes"));
            }
        }

        let mut layouts = Layout::of_object(&mut self.object)?;
        for layout in &mut layouts {
            let mut old = from.layouts.iter().filter(|old| old.is_shared);
            if old.any(|old| old.name == layout.name) {
                layout.share();
            }
        }
        let mut changes = MapChanges::default();
        let loads = self.note.loads_state_of(&from.note);
        for old in &from.layouts {
            let new = layouts.iter().find(|new| new.name == old.name);
            let why = match new {
                Some(new) => new.difference(old),
                None => Some("the new file has none of that name".to_string()),
            };
            let name = old.name.clone();
            let converts = loads && old.is_state && new.is_none_or(|new| new.is_state);
            match why {
                None => changes.carried.push(name),
                Some(_) if converts => changes.converted.push(name),
                Some(why) if on_loss == OnLoss::Refuse => {
                    return Err(Error::LostMap { map: name, why });
                }
                Some(_) if new.is_none() => changes.dropped.push(name),
                // It starts anew.
                Some(_) => {}
            }
        }
        let names = layouts.iter().map(|new| new.name.clone());
        changes.fresh = names
            .filter(|name| !changes.carried.contains(name) && !changes.converted.contains(name))
            .collect();
        for names in [
            &mut changes.carried,
            &mut changes.converted,
            &mut changes.fresh,
            &mut changes.dropped,
        ] {
            names.sort();
        }

        for mut map in self.object.maps_mut() {
            let full = map.name().to_string_lossy().into_owned();
            let name = short_name(&full).to_string();
            if let Some(old) = from.map(&name)
                && changes.carried.contains(&name)
            {
                map.reuse_fd(old.as_fd())
                    .map_err(|source| Error::ReuseMap { map: name, source })?;
            }
        }
        let runs_later = |layout: &&Layout| {
            layout.runs_later.is_some() && changes.carried.contains(&layout.name)
        };
        // "restore" does it for one that is converted.
        let stops = match changes.converted.is_empty() {
            true => "replaced",
            false => "restore",
        };
        if on_loss == OnLoss::Refuse
            && let Some(layout) = layouts.iter().find(runs_later)
            && self.note.work_index(stops).is_none()
        {
            return Err(Error::RunsOn {
                map: layout.name.clone(),
                what: layout.runs_later.unwrap_or_default(),
                stops,
            });
        }
        self.layouts = Some(layouts);
        Ok(changes)
    }

    /// The names of the programs.
    ///
    /// A program that libbpf does not load, as one in `SEC("?kvm_io_write")`, is as if not there.
    fn programs(&self) -> Result<Programs<String>, Error> {
        let mut programs = Programs::new();
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

    /// Creates the maps and loads the programs.
    ///
    /// libbpf also prints warnings on stderr when this fails; call
    /// [`libbpf_rs::set_print`] to send them elsewhere.
    pub fn load(mut self) -> Result<Image, Error> {
        let names = self.programs()?;
        if names.read.is_none() && names.write.is_none() {
            return Err(Error::NoProgram);
        }
        page::check(&self.note, |name| {
            let mut maps = self.object.maps();
            maps.find(|map| is_named(&map.name().to_string_lossy(), name))
        })?;
        if let (None, [page, ..]) = (&names.read, &self.note.read_pages[..]) {
            return Err(Error::ReadPage {
                map: page.map.clone(),
                why: "no read program has its values while the guest has no slot".to_string(),
            });
        }
        let layouts = match self.layouts.take() {
            Some(layouts) => layouts,
            None => Layout::of_object(&mut self.object)?,
        };
        let initial = self.initial_values();
        let mut logs = Vec::new();
        for mut program in self.object.progs_mut() {
            let section = program.section().to_string_lossy().into_owned();
            let Some((role, sleepable)) = role(&section).filter(|_| program.autoload()) else {
                continue;
            };
            let name = program.name().to_string_lossy().into_owned();
            let mut log = vec![0; VERIFIER_LOG_LEN];
            set_up(&mut program, role, sleepable, &mut log).map_err(|source| Error::SetUp {
                program: name.clone(),
                source,
            })?;
            logs.push((name, log));
        }

        let object = self
            .object
            .load()
            .map_err(|source| load_error(source, &logs))?;
        let mut programs = Programs::new();
        for program in object.progs().filter(|program| program.autoload()) {
            let fd = program.as_fd().try_clone_to_owned();
            let fd = fd.map_err(|error| Error::Load(error.into()))?;
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
        let maps = object
            .maps()
            .map(|map| MapHandle::try_from(&map))
            .collect::<Result<Vec<_>, _>>()
            .map_err(Error::Load)?;
        let mut states = Vec::new();
        for layout in layouts.iter().filter(|layout| layout.is_state) {
            let Some(map) = find_map(&maps, &layout.name) else {
                continue;
            };
            let initial = initial.get(&layout.name).map_or(&[][..], Vec::as_slice);
            let state = StateMap::new(layout, map.as_fd(), initial);
            states.push(state.map_err(|source| Error::MapState {
                map: layout.name.clone(),
                source,
            })?);
        }
        let mut read_pages = Vec::new();
        for page in &self.note.read_pages {
            let map = find_map(&maps, &page.map).expect("page::check() has found it");
            let mapping = PageMap::new(map).map_err(|source| Error::MapReadPage {
                map: page.map.clone(),
                source,
            })?;
            read_pages.push(Arc::new(mapping));
        }
        Ok(Image {
            note: self.note,
            programs,
            maps,
            layouts,
            states,
            read_pages,
        })
    }

    /// What global data has at first, by section.
    fn initial_values(&self) -> BTreeMap<String, Vec<u8>> {
        let of_map = |map: OpenMap<'_>| {
            let name = short_name(&map.name().to_string_lossy()).to_string();
            Some((name, map.initial_value()?.to_vec()))
        };
        self.object.maps().filter_map(of_map).collect()
    }
}

/// Whether a map's full name is `name`, or `name` is the section of its global data.
fn is_named(full: &str, name: &str) -> bool {
    full == name || short_name(full) == name
}

fn find_map<'a>(maps: &'a [MapHandle], name: &str) -> Option<&'a MapHandle> {
    maps.iter()
        .find(|map| is_named(&map.name().to_string_lossy(), name))
}

/// Sets what libbpf would know by itself, had it heard of our program types.
fn set_up(
    program: &mut OpenProgramMut<'_>,
    role: Role<'_>,
    sleepable: bool,
    log: &mut [u8],
) -> io::Result<()> {
    let prog_type = match role {
        Role::Read => BPF_PROG_TYPE_KVM_IO_READ,
        Role::Write => BPF_PROG_TYPE_KVM_IO_WRITE,
        Role::Work(_) => BPF_PROG_TYPE_KVM_IO_WORK,
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
fn load_error(source: libbpf_rs::Error, logs: &[(String, Vec<u8>)]) -> Error {
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

/// A loaded object: its programs are verified, its maps exist.
///
/// libbpf is done with it: what is here are file descriptors, and memory of the maps with state.
#[derive(Debug)]
pub struct Image {
    note: Note,
    programs: Programs<OwnedFd>,
    maps: Vec<MapHandle>,
    /// What the maps are like that do not belong to the programs.
    layouts: Vec<Layout>,
    /// Those of them that are saved.
    states: Vec<StateMap>,
    /// The read pages of the note, in its order.
    pub(crate) read_pages: Vec<Arc<PageMap>>,
}

/// A program that runs without a guest's access.
#[derive(Clone, Copy, Debug)]
pub struct Work<'a> {
    /// Its index in the device.
    pub index: u32,
    /// Its name, which says what it is for.
    pub name: &'a str,
    /// The program.
    pub program: BorrowedFd<'a>,
}

impl Image {
    /// What the file says about the device.
    pub fn note(&self) -> &Note {
        &self.note
    }

    /// The program that handles guest reads.
    pub fn read_program(&self) -> Option<BorrowedFd<'_>> {
        self.programs.read.as_ref().map(OwnedFd::as_fd)
    }

    /// The program that handles guest writes.
    pub fn write_program(&self) -> Option<BorrowedFd<'_>> {
        self.programs.write.as_ref().map(OwnedFd::as_fd)
    }

    /// The programs that run without a guest's access.
    pub fn works(&self) -> impl Iterator<Item = Work<'_>> {
        self.note.works.iter().filter_map(|item| {
            Some(Work {
                index: item.index,
                name: &item.name,
                program: self.programs.works.get(&item.index)?.as_fd(),
            })
        })
    }

    /// The one of that name.
    pub fn work(&self, name: &str) -> Option<Work<'_>> {
        self.works().find(|work| work.name == name)
    }

    /// The map of that name, to read or change the device's state.
    ///
    /// Maps of global data are found by the name of their section.
    pub fn map(&self, name: &str) -> Option<&MapHandle> {
        find_map(&self.maps, name)
    }

    pub(crate) fn states(&self) -> &[StateMap] {
        &self.states
    }

    /// A map with something that runs later by itself, and what that is.
    pub(crate) fn runs_later(&self) -> Option<(&str, &'static str)> {
        self.layouts
            .iter()
            .find_map(|layout| Some((layout.name.as_str(), layout.runs_later?)))
    }
}

#[cfg(test)]
mod tests {
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
        let denied = || libbpf_rs::Error::from(io::Error::from_raw_os_error(libc::EACCES));
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
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap();
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
            file.as_file().set_len(size).unwrap();
            let error = OpenImage::open_file(file.as_path()).unwrap_err();
            assert_eq!(error.to_string(), wanted, "{size} bytes");
        }
    }
}
