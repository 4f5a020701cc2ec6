// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A device's state, apart from the host that it is on.
//!
//! State is what is in a device's state maps: arrays that user space can map
//! (`BPF_MAP_TYPE_ARRAY` with `BPF_F_MMAPABLE`), and the sections of global data `.bss` and `.data`.
//! What is in other maps, the device's WORK program `save` puts there and `restore` takes from there.
//! The library maps them when it loads the object, so it saves and restores without bpf(2).
//!
//! [`State`] has all fields by their names, from the object's BTF: as JSON,
//!
//! ```json
//! {
//!   "clock": { "boottime_ns": 81234567890, "monotonic_ns": 71234567890, "realtime_ns": "1795686667123456789" },
//!   "device": { "compatible": ["kvm-bpf,test"], "nr_irqs": 1, "regions": [{ "region": 0, "size": 4096, "space": "memory" }], "state_version": 2 },
//!   "format": "kvm-bpf-state",
//!   "maps": [
//!     {
//!       "name": ".bss",
//!       "schema": "sha256:b1c5...",
//!       "types": ["variable count at byte 0: 32 bits, unsigned", "..."],
//!       "values": [{ "count": 7, "mode": "IDLE", "serial": "0011aaff" }]
//!     }
//!   ],
//!   "version": 1,
//!   "zeroes": ["IDLE"]
//! }
//! ```
//!
//! A map has a value per entry. What is a number in C is one here, or decimal text where a JavaScript
//! reader would round it (beyond 2^53 - 1); text may be hexadecimal too (`0x1f`). An enum is the name
//! of its value, or the number of one without; `zeroes` lists those of these names that are 0. Arrays
//! of bytes are hexadecimal digits, two per byte, and so are unions and floats; other arrays are
//! lists. Members of anonymous structs count as those of what these are in; an anonymous union goes by
//! the names of its members, with `|` in between. Pointers and padding are not saved. Maps and fields
//! are sorted: the same state has the same text. `types` is for people, and for the error that names
//! a field which has become another: nothing else depends on it.
//!
//! A state is not to be trusted: it may come from anywhere. Sizes are limited, and it is restored as
//! a whole or not at all.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::{fmt, io};

use crate::clock::HostClock;
use crate::mapping::Words;
use crate::maps::Layout;
use crate::note::{Note, Space, StateVersion};
use crate::programs::Map;
use crate::schema::{self, Encoding, Field, Kind, Type};

#[cfg(feature = "serde")]
mod json;
#[cfg(feature = "serde")]
pub(crate) use json::check_json;
#[cfg(feature = "serde")]
pub use json::check_size;
#[cfg(feature = "serde")]
use json::{Envelope, number};

/// The most bytes of a state as JSON.
pub const MAX_FILE_SIZE: u64 = 64 << 20;
/// The most values in a state, those that contain others included.
pub const MAX_VALUES: usize = 1 << 20;
/// How deep values may be in each other: types of maps are less.
pub(crate) const MAX_DEPTH: usize = 2 * schema::MAX_DEPTH;

/// The greatest number that JavaScript, and so many a reader of JSON, does not round.
const MAX_NUMBER: i128 = (1 << 53) - 1;

/// Why a state cannot be saved, read or restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file cannot be read or written, or is not a regular one.
    #[error("cannot access the file of the state")]
    File(#[source] io::Error),
    /// The state is larger than one of a device.
    #[error("the state has more than {} MiB, {max_values} values or {MAX_DEPTH} levels", MAX_FILE_SIZE >> 20)]
    Size {
        /// The most values.
        max_values: usize,
    },
    /// The text is no JSON, or not of a state.
    #[error("not the state of a device")]
    Json(#[source] io::Error),
    /// Something in a map would be lost: the device cannot say what it is.
    #[error(
        "map {map} has a {what}, and the device no WORK program \"save\" that saves what it is for"
    )]
    TimersWithoutSave {
        /// The map.
        map: String,
        /// What runs later: `bpf_timer`, say.
        what: String,
    },
    /// Nothing says what is in a map, as in those of [`Programs::from_fds`](crate::Programs::from_fds).
    #[error("nothing says what is in map {0}, so it cannot be saved")]
    UnknownTypes(String),
    /// The state is of another device.
    #[error("the state is of another device: {saved:?} instead of {running:?}")]
    OtherDevice {
        /// The device that was saved.
        saved: Box<Identity>,
        /// The device that should go on.
        running: Box<Identity>,
    },
    /// The device does not load states of that version.
    #[error("the state has version {saved}, the device loads {oldest} to {newest}")]
    Version {
        /// The state's version.
        saved: u32,
        /// The oldest that the device loads.
        oldest: u32,
        /// The newest, the device's own.
        newest: u32,
    },
    /// A map cannot be saved, or not go on with what was saved.
    #[error("{path}: {why}")]
    Map {
        /// The map, and where in it: `regs[3].mode`.
        path: String,
        /// What is wrong with it.
        why: String,
    },
}

type Result<T> = std::result::Result<T, Error>;

/// A device's state. See the [module](self) for what it looks like as JSON.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(into = "Envelope", try_from = "Envelope"))]
pub struct State {
    /// The host's clocks when it was saved.
    pub clock: Clock,
    /// Which device it is of.
    pub device: Identity,
    /// What is in the maps, by name.
    pub maps: BTreeMap<String, MapState>,
    /// Names of enums' values in the maps that are 0.
    pub zeroes: Zeroes,
}

/// Names that are 0: so who does not know an enum can tell.
pub type Zeroes = BTreeSet<String>;

/// The host's clocks, in nanoseconds: what programs see, too, whatever time namespace the process
/// is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct Clock {
    /// `CLOCK_BOOTTIME`: since the host's boot.
    #[cfg_attr(feature = "serde", serde(with = "number"))]
    pub boottime_ns: u64,
    /// `CLOCK_MONOTONIC`: the same without the time that the host was suspended.
    #[cfg_attr(feature = "serde", serde(with = "number"))]
    pub monotonic_ns: u64,
    /// `CLOCK_REALTIME`: since 1970, UTC.
    #[cfg_attr(feature = "serde", serde(with = "number"))]
    pub realtime_ns: u64,
}

/// What a device is to a guest, and the version of its state.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct Identity {
    /// Device-tree `compatible` strings.
    pub compatible: Vec<String>,
    /// Number of interrupts.
    pub nr_irqs: u32,
    /// Its regions.
    pub regions: Vec<Region>,
    /// Version of its state; 0 where the device does not say.
    pub state_version: u32,
}

/// A region of the device, without its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct Region {
    /// Its index.
    pub region: u32,
    /// Bytes or ports.
    #[cfg_attr(feature = "serde", serde(with = "number"))]
    pub size: u64,
    /// Memory or ports.
    pub space: Space,
}

/// What is in a map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapState {
    /// Hash of the types of what is in it, as `sha256:` and digits.
    pub schema: String,
    /// What its fields are and where, in words; none if nobody has written it down.
    pub types: Vec<String>,
    /// The value of each entry.
    pub values: Vec<Value>,
}

/// A value in a map.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(untagged))]
pub enum Value {
    /// Of a `bool`.
    Bool(bool),
    /// At most 2^53 - 1 in size.
    Number(i64),
    /// A greater number, the name of an enum's value, or bytes as hexadecimal digits.
    Text(String),
    /// An array.
    List(Vec<Value>),
    /// A struct by its fields, or a section by its variables.
    Fields(BTreeMap<String, Value>),
}

/// As JSON, on one line; text without escapes.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Bool(is_set) => write!(f, "{is_set}"),
            Value::Number(number) => write!(f, "{number}"),
            Value::Text(text) => write!(f, "\"{text}\""),
            Value::List(values) => {
                f.write_str("[")?;
                for (at, value) in values.iter().enumerate() {
                    write!(f, "{}{value}", if at == 0 { "" } else { "," })?;
                }
                f.write_str("]")
            }
            Value::Fields(fields) => {
                f.write_str("{")?;
                for (at, (name, value)) in fields.iter().enumerate() {
                    let separator = if at == 0 { "" } else { "," };
                    write!(f, "{separator}\"{name}\":{value}")?;
                }
                f.write_str("}")
            }
        }
    }
}

impl Value {
    fn from_number(number: i128) -> Self {
        match i64::try_from(number) {
            Ok(small) if number.abs() <= MAX_NUMBER => Value::Number(small),
            _ => Value::Text(number.to_string()),
        }
    }

    /// The number that it is, or that its text says.
    fn to_number(&self) -> Option<i128> {
        match self {
            Value::Number(number) => Some((*number).into()),
            Value::Text(text) => match text.strip_prefix("0x") {
                // No sign: from_str_radix() would take one.
                Some(digits) if digits.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
                    i128::from_str_radix(digits, 16).ok()
                }
                Some(_) => None,
                None => text.parse().ok(),
            },
            _ => None,
        }
    }

    /// Whether a device that does not know it may do without it.
    fn is_zero(&self, zeroes: &Zeroes) -> bool {
        match self {
            Value::Bool(is_set) => !is_set,
            Value::Number(number) => *number == 0,
            Value::Text(text) => text.bytes().all(|byte| byte == b'0') || zeroes.contains(text),
            Value::List(values) => values.iter().all(|value| value.is_zero(zeroes)),
            Value::Fields(fields) => fields.values().all(|value| value.is_zero(zeroes)),
        }
    }
}

/// What [`Clock`] is read from, without opening a file each time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clocks {
    boottime: HostClock,
    monotonic: HostClock,
    realtime: HostClock,
}

impl Clocks {
    /// In the time namespace of this process, which it cannot leave while it has threads.
    pub fn new() -> Self {
        Clocks {
            boottime: HostClock::new(libc::CLOCK_BOOTTIME),
            monotonic: HostClock::new(libc::CLOCK_MONOTONIC),
            realtime: HostClock::new(libc::CLOCK_REALTIME),
        }
    }

    fn now(&self) -> Clock {
        let read = |clock: &HostClock| clock.now().as_nanos() as u64;
        Clock {
            boottime_ns: read(&self.boottime),
            monotonic_ns: read(&self.monotonic),
            realtime_ns: read(&self.realtime),
        }
    }
}

impl Identity {
    /// That of the device that a note describes.
    pub fn of_note(note: &Note) -> Self {
        let mut regions: Vec<_> = note
            .regions()
            .iter()
            .map(|range| Region {
                region: range.region,
                size: range.size,
                space: range.space,
            })
            .collect();
        regions.sort_by_key(|region| region.region);
        Identity {
            compatible: note.compatible.clone(),
            nr_irqs: note.nr_irqs,
            regions,
            state_version: note.state_version.unwrap_or_default().version,
        }
    }
}

/// A map with state, and the memory that it is in.
#[derive(Debug)]
pub(crate) struct StateMap {
    shape: Shape,
    memory: Arc<Words>,
}

/// What a map with state has, and where.
#[derive(Debug)]
struct Shape {
    name: String,
    ty: Type,
    entries: usize,
    schema: String,
    types: Vec<String>,
    /// What it has in a new device; zeroes behind that.
    initial: Vec<u8>,
}

impl StateMap {
    /// Of a map that is in memory. Its entries have `initial` at first, or zeroes.
    pub fn new(layout: &Layout, map: &Map, initial: Vec<u8>) -> io::Result<Self> {
        let shape = Shape::new(&layout.name, layout.value.clone(), layout.entries, initial);
        let (info, value) = (map.info, layout.value.size);
        if !map.is_array()
            || info.value_size as usize != value
            || info.max_entries as usize != layout.entries
            || shape.initial.len() > shape.len()
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "of type {}, {} entries of {} bytes, not an array of {} entries of {value} bytes",
                    info.map_type, info.max_entries, info.value_size, layout.entries
                ),
            ));
        }
        let memory = match map.words() {
            Some(memory) => Arc::clone(memory),
            // For the kernel's error.
            None => Arc::new(Words::new(map.as_fd(), shape.len())?),
        };
        Ok(StateMap { shape, memory })
    }

    pub fn name(&self) -> &str {
        &self.shape.name
    }

    /// Its name, and what it has in a new device.
    #[cfg(feature = "serde")]
    pub fn initial(&self) -> (&str, &[u8]) {
        (&self.shape.name, &self.shape.initial)
    }
}

impl Shape {
    fn new(name: &str, ty: Type, entries: usize, initial: Vec<u8>) -> Self {
        let lines = schema::lines(&ty, entries);
        Shape {
            name: name.to_string(),
            schema: schema::hash(&lines),
            types: lines
                .into_iter()
                .filter(|line| !line.has_parts)
                .map(|line| line.text)
                .collect(),
            ty,
            entries,
            initial,
        }
    }

    /// Bytes from one entry to the next.
    fn stride(&self) -> usize {
        self.ty.size.next_multiple_of(8)
    }

    /// Bytes of all entries.
    fn len(&self) -> usize {
        self.stride().saturating_mul(self.entries)
    }

    fn new_bytes(&self) -> Vec<u8> {
        let mut bytes = self.initial.clone();
        bytes.resize(self.len(), 0);
        bytes
    }

    fn save(&self, bytes: &[u8], found: &mut Found) -> Result<MapState> {
        let mut values = Vec::new();
        for (at, bytes) in bytes.chunks_exact(self.stride()).enumerate() {
            let value = encode(&self.ty, &bytes[..self.ty.size], found);
            values.push(value.map_err(|fault| fault.at(at).within(&self.name))?);
        }
        Ok(MapState {
            schema: self.schema.clone(),
            types: self.types.clone(),
            values,
        })
    }

    /// How it differs from a saved map of another schema: by a field, where one differs.
    fn difference(&self, saved: &MapState) -> String {
        let by_field = match saved.types.is_empty() {
            true => None,
            false => schema::difference(&saved.types, &self.types),
        };
        let count = saved.values.len();
        by_field.unwrap_or_else(|| match count == self.entries {
            true => format!(
                "it has schema {}, the new one {}",
                saved.schema, self.schema
            ),
            false => format!("it has {count} values, the new one {}", self.entries),
        })
    }

    /// The bytes of a saved map. With the state's names of zero it may be of another schema.
    fn restore(&self, saved: &MapState, zeroes: Option<&Zeroes>) -> Result<Vec<u8>> {
        let fault = |why: String| Fault::new(why).within(&self.name);
        let is_same = saved.schema == self.schema;
        let convert = zeroes.filter(|_| !is_same);
        if !is_same && convert.is_none() {
            return Err(fault(format!(
                "{}; the device loads no state of other types",
                self.difference(saved)
            )));
        }
        let count = saved.values.len();
        if is_same && count != self.entries {
            return Err(fault(format!("{count} values instead of {}", self.entries)));
        }
        let mut bytes = self.new_bytes();
        for (at, value) in saved.values.iter().enumerate() {
            let within = |fault: Fault| fault.at(at).within(&self.name);
            if at >= self.entries {
                if !convert.is_some_and(|zeroes| value.is_zero(zeroes)) {
                    return Err(within(Fault::new("there is no such entry any more")));
                }
                continue;
            }
            let start = at * self.stride();
            let bytes = &mut bytes[start..start + self.ty.size];
            decode(&self.ty, value, bytes, convert).map_err(within)?;
        }
        Ok(bytes)
    }
}

/// What the state maps have now.
pub(crate) fn save(note: &Note, maps: &[StateMap], clocks: &Clocks) -> Result<State> {
    let mut found = Found::default();
    let mut saved = BTreeMap::new();
    for StateMap { shape, memory } in maps {
        saved.insert(shape.name.clone(), shape.save(&memory.copy(), &mut found)?);
    }
    Ok(State {
        clock: clocks.now(),
        device: Identity::of_note(note),
        maps: saved,
        zeroes: found.zeroes,
    })
}

/// What the state maps are to have, one after the other; nothing is changed yet.
fn plan<'a>(
    note: &Note,
    shapes: impl Iterator<Item = &'a Shape> + Clone,
    state: &State,
) -> Result<Vec<Vec<u8>>> {
    let running = Identity::of_note(note);
    let saved = Identity {
        state_version: running.state_version,
        ..state.device.clone()
    };
    if saved != running {
        return Err(Error::OtherDevice {
            saved: Box::new(state.device.clone()),
            running: Box::new(running),
        });
    }
    let StateVersion { version, oldest } = note.state_version.unwrap_or_default();
    let saved = state.device.state_version;
    if !(oldest..=version).contains(&saved) {
        return Err(Error::Version {
            saved,
            oldest,
            newest: version,
        });
    }
    let convert = note.state_version.map(|_| &state.zeroes);
    for (name, map) in &state.maps {
        let is_zero = |zeroes| map.values.iter().all(|value| value.is_zero(zeroes));
        let is_lost = !convert.is_some_and(is_zero);
        if is_lost && !shapes.clone().any(|shape| shape.name == *name) {
            return Err(Fault::new("the device has no such map").within(name));
        }
    }
    shapes
        .map(|shape| match state.maps.get(&shape.name) {
            Some(map) => shape.restore(map, convert),
            None if convert.is_some() => Ok(shape.new_bytes()),
            None => Err(Fault::new("the state has no such map").within(&shape.name)),
        })
        .collect()
}

/// What the state maps had before a state was restored.
#[derive(Debug)]
pub(crate) struct Before(Vec<Vec<u8>>);

/// Puts a state into the maps: all of it, or on an error nothing.
pub(crate) fn restore(note: &Note, maps: &[StateMap], state: &State) -> Result<Before> {
    let new = plan(note, maps.iter().map(|map| &map.shape), state)?;
    let before = maps.iter().map(|map| map.memory.copy()).collect();
    write(maps, &new);
    Ok(Before(before))
}

/// Puts back what the maps had.
pub(crate) fn undo(maps: &[StateMap], before: &Before) {
    write(maps, &before.0);
}

/// Puts the state of running programs into the maps of those that are to replace them, but for those
/// that are carried over. On an error it changes nothing.
pub(crate) fn convert(
    note: &Note,
    maps: &[StateMap],
    state: &State,
    carried: &[String],
) -> Result<()> {
    let new = plan(note, maps.iter().map(|map| &map.shape), state)?;
    for (map, bytes) in maps.iter().zip(&new) {
        if !carried.iter().any(|name| name == map.name()) {
            map.memory.write(0, bytes);
        }
    }
    Ok(())
}

fn write(maps: &[StateMap], bytes: &[Vec<u8>]) {
    for (map, bytes) in maps.iter().zip(bytes) {
        map.memory.write(0, bytes);
    }
}

/// What is wrong with a value, and where in its map.
#[derive(Debug)]
struct Fault {
    path: String,
    why: String,
}

impl Fault {
    fn new(why: impl Into<String>) -> Self {
        Fault {
            path: String::new(),
            why: why.into(),
        }
    }

    fn wanted(what: impl fmt::Display, value: &Value) -> Self {
        let mut text = value.to_string();
        if text.len() > 40 {
            text = text.chars().take(40).chain("...".chars()).collect();
        }
        Self::new(format!("{text} is not {what}"))
    }

    /// In an element of an array.
    fn at(mut self, index: usize) -> Self {
        self.path = format!("[{index}]{}", self.path);
        self
    }

    /// In a field.
    fn of(mut self, name: &str) -> Self {
        self.path = format!(".{name}{}", self.path);
        self
    }

    fn within(self, map: &str) -> Error {
        Error::Map {
            path: format!("{map}{}", self.path),
            why: self.why,
        }
    }
}

/// How a value of a type is written.
enum Form<'a> {
    Bool,
    /// Of an int or enum, signed or not.
    Number {
        is_signed: bool,
        names: &'a [schema::Enumerator],
    },
    /// As hexadecimal digits.
    Bytes,
    List(&'a Type, usize),
    Fields(&'a [Field]),
    /// Not at all.
    Nothing,
}

/// The form of a type, or why it has none.
fn form(ty: &Type) -> std::result::Result<Form<'_>, Fault> {
    let is_number = matches!(ty.size, 1 | 2 | 4 | 8);
    Ok(match &ty.kind {
        Kind::Int { bits, encoding } if is_number && usize::from(*bits) == 8 * ty.size => {
            match encoding {
                Encoding::Bool => Form::Bool,
                _ => Form::Number {
                    is_signed: *encoding == Encoding::Signed,
                    names: &[],
                },
            }
        }
        Kind::Enum { is_signed, values } if is_number => Form::Number {
            is_signed: *is_signed,
            names: values,
        },
        Kind::Array { count, element } => match (form(element)?, &element.kind) {
            (Form::Number { .. }, Kind::Int { .. }) if element.size == 1 => Form::Bytes,
            (Form::Nothing, _) => Form::Nothing,
            _ => Form::List(element, *count),
        },
        Kind::Struct { fields, .. } | Kind::Section(fields) => Form::Fields(fields),
        Kind::Pointer { .. } => Form::Nothing,
        Kind::Union { .. } if ty.has_pointer() => {
            return Err(Fault::new("a union with a pointer cannot be saved"));
        }
        Kind::Union { .. } | Kind::Int { .. } | Kind::Enum { .. } | Kind::Bytes(_) => Form::Bytes,
    })
}

/// A field under the name that it has in a state.
struct Named<'a> {
    name: String,
    /// Bits before it.
    offset: usize,
    bits: Option<u8>,
    ty: &'a Type,
}

/// All fields that are saved; those of anonymous structs are those of what these are in.
fn named_fields(fields: &[Field]) -> std::result::Result<Vec<Named<'_>>, Fault> {
    fn add<'a>(fields: &'a [Field], offset: usize, all: &mut Vec<Named<'a>>) {
        for field in fields {
            let offset = offset + field.offset;
            let name = match (&field.name, &field.ty.kind) {
                (name, Kind::Struct { fields, .. }) if name.is_empty() => {
                    add(fields, offset, all);
                    continue;
                }
                (name, Kind::Union { fields, .. }) if name.is_empty() => {
                    let mut members = Vec::new();
                    add(fields, 0, &mut members);
                    let names: Vec<_> = members.into_iter().map(|member| member.name).collect();
                    names.join("|")
                }
                (name, _) => name.clone(),
            };
            // Bits without a name are padding.
            if !name.is_empty() {
                all.push(Named {
                    name,
                    offset,
                    bits: field.bits,
                    ty: &field.ty,
                });
            }
        }
    }

    let mut all = Vec::new();
    add(fields, 0, &mut all);
    let mut saved = Vec::new();
    for field in all {
        let form = form(field.ty).map_err(|fault| fault.of(&field.name))?;
        if !matches!(form, Form::Nothing) {
            saved.push(field);
        }
    }
    Ok(saved)
}

/// The bytes at `offset`, or why they are not there: types may say anything.
fn part(bytes: &[u8], offset: usize, len: usize) -> std::result::Result<&[u8], Fault> {
    let end = offset.checked_add(len);
    end.and_then(|end| bytes.get(offset..end))
        .ok_or_else(|| Fault::new("it reaches out of what it is in"))
}

fn part_mut(bytes: &mut [u8], offset: usize, len: usize) -> std::result::Result<&mut [u8], Fault> {
    let end = offset.checked_add(len);
    end.and_then(|end| bytes.get_mut(offset..end))
        .ok_or_else(|| Fault::new("it reaches out of what it is in"))
}

/// Up to 64 bits anywhere, and where their bytes are: at most 9 of them.
fn bit_bytes(offset: usize, bits: u8) -> std::result::Result<(usize, usize), Fault> {
    if !(1..=64).contains(&bits) {
        return Err(Fault::new(format!("a field of {bits} bits")));
    }
    let start = offset / 8;
    let end = (offset + usize::from(bits)).div_ceil(8);
    Ok((start, end - start))
}

fn from_le(bytes: &[u8]) -> u128 {
    bytes
        .iter()
        .rev()
        .fold(0, |number, &byte| number << 8 | u128::from(byte))
}

/// `bits` bits as a number.
fn extended(number: u128, bits: usize, is_signed: bool) -> i128 {
    let number = (number & ((1 << bits) - 1)) as i128;
    match is_signed && number >> (bits - 1) != 0 {
        true => number - (1 << bits),
        false => number,
    }
}

/// What of a state has been found so far.
#[derive(Debug)]
struct Found {
    /// How many values there may be yet.
    room: usize,
    zeroes: Zeroes,
}

impl Default for Found {
    fn default() -> Self {
        Found {
            room: MAX_VALUES,
            zeroes: Zeroes::new(),
        }
    }
}

impl Found {
    fn value(&mut self) -> std::result::Result<(), Fault> {
        let too_many = || Fault::new(format!("more than {MAX_VALUES} values of the state"));
        self.room = self.room.checked_sub(1).ok_or_else(too_many)?;
        Ok(())
    }

    fn number(&mut self, number: i128, names: &[schema::Enumerator]) -> Value {
        let Some(one) = names.iter().find(|one| one.value == number) else {
            return Value::from_number(number);
        };
        // What may be bytes elsewhere must not count as 0.
        if number == 0 && hex::decode(&one.name).is_err() {
            self.zeroes.insert(one.name.clone());
        }
        Value::Text(one.name.clone())
    }
}

/// The value of a type that bytes are.
fn encode(ty: &Type, bytes: &[u8], found: &mut Found) -> std::result::Result<Value, Fault> {
    found.value()?;
    let own = part(bytes, 0, ty.size)?;
    Ok(match form(ty)? {
        Form::Bool => Value::Bool(own[0] != 0),
        Form::Number { is_signed, names } => {
            found.number(extended(from_le(own), 8 * ty.size, is_signed), names)
        }
        Form::Bytes => Value::Text(hex::encode(own)),
        Form::List(element, count) => {
            let mut values = Vec::new();
            for at in 0..count {
                let value = part(own, at * element.size, element.size)
                    .and_then(|bytes| encode(element, bytes, found));
                values.push(value.map_err(|fault| fault.at(at))?);
            }
            Value::List(values)
        }
        Form::Fields(fields) => {
            let mut values = BTreeMap::new();
            for field in named_fields(fields)? {
                let value = encode_field(&field, own, found);
                let value = value.map_err(|fault| fault.of(&field.name))?;
                if values.insert(field.name.clone(), value).is_some() {
                    return Err(Fault::new("two fields of that name").of(&field.name));
                }
            }
            Value::Fields(values)
        }
        Form::Nothing => return Err(Fault::new("a pointer cannot be saved")),
    })
}

fn encode_field(
    field: &Named<'_>,
    bytes: &[u8],
    found: &mut Found,
) -> std::result::Result<Value, Fault> {
    let Some(bits) = field.bits else {
        return encode(
            field.ty,
            part(bytes, field.offset / 8, field.ty.size)?,
            found,
        );
    };
    let (start, len) = bit_bytes(field.offset, bits)?;
    let number = from_le(part(bytes, start, len)?) >> (field.offset % 8);
    let bits = usize::from(bits);
    match form(field.ty)? {
        Form::Bool => Ok(Value::Bool(extended(number, bits, false) != 0)),
        Form::Number { is_signed, names } => {
            Ok(found.number(extended(number, bits, is_signed), names))
        }
        _ => Err(Fault::new("bits of a type that has none")),
    }
}

/// Puts a value of a type into bytes. With `convert`, the names of zero, it may be of another schema:
/// what the value does not have stays as it is, and what the type does not have must be 0.
fn decode(
    ty: &Type,
    value: &Value,
    bytes: &mut [u8],
    convert: Option<&Zeroes>,
) -> std::result::Result<(), Fault> {
    let own = part_mut(bytes, 0, ty.size)?;
    match form(ty)? {
        Form::Bool => {
            let Value::Bool(is_set) = value else {
                return Err(Fault::wanted("true or false", value));
            };
            own.fill(0);
            own[0] = (*is_set).into();
        }
        Form::Number { is_signed, names } => {
            let number = number_of(value, 8 * ty.size, is_signed, names)?;
            own.copy_from_slice(&number.to_le_bytes()[..own.len()]);
        }
        Form::Bytes => {
            let new = match value {
                Value::Text(text) => hex::decode(text).ok(),
                _ => None,
            };
            let is_array = matches!(ty.kind, Kind::Array { .. });
            let is_good = |new: &Vec<u8>| {
                let rest = new.get(own.len()..).unwrap_or_default();
                new.len() == own.len()
                    || convert.is_some() && is_array && rest.iter().all(|&byte| byte == 0)
            };
            let Some(new) = new.filter(is_good) else {
                let what = format!("{} bytes as hexadecimal digits", own.len());
                return Err(Fault::wanted(what, value));
            };
            let len = new.len().min(own.len());
            own[..len].copy_from_slice(&new[..len]);
        }
        Form::List(element, count) => {
            let Value::List(values) = value else {
                return Err(Fault::wanted(format_args!("a list of {count}"), value));
            };
            if convert.is_none() && values.len() != count {
                let why = format!("{} elements instead of {count}", values.len());
                return Err(Fault::new(why));
            }
            for (at, value) in values.iter().enumerate() {
                let result = match at < count {
                    true => part_mut(own, at * element.size, element.size)
                        .and_then(|bytes| decode(element, value, bytes, convert)),
                    false if convert.is_some_and(|zeroes| value.is_zero(zeroes)) => Ok(()),
                    false => Err(Fault::new(
                        "there is no such element any more, and it is not 0",
                    )),
                };
                result.map_err(|fault| fault.at(at))?;
            }
        }
        Form::Fields(fields) => {
            let Value::Fields(values) = value else {
                return Err(Fault::wanted("fields", value));
            };
            let fields = named_fields(fields)?;
            for (name, value) in values {
                let result = match fields.iter().find(|field| field.name == *name) {
                    Some(field) => decode_field(field, value, own, convert),
                    None if convert.is_some_and(|zeroes| value.is_zero(zeroes)) => Ok(()),
                    None if convert.is_some() => Err(Fault::new(
                        "there is no such field any more, and it is not 0",
                    )),
                    None => Err(Fault::new("there is no such field")),
                };
                result.map_err(|fault| fault.of(name))?;
            }
            let is_missing = |field: &&Named<'_>| !values.contains_key(&field.name);
            if let Some(field) = fields.iter().find(is_missing).filter(|_| convert.is_none()) {
                return Err(Fault::new("the state does not have it").of(&field.name));
            }
        }
        Form::Nothing => return Err(Fault::new("a pointer cannot be restored")),
    }
    Ok(())
}

/// The number that a value is, if so many bits can hold it.
fn number_of(
    value: &Value,
    bits: usize,
    is_signed: bool,
    names: &[schema::Enumerator],
) -> std::result::Result<i128, Fault> {
    let by_name = match value {
        Value::Text(text) => names.iter().find(|one| one.name == *text),
        _ => None,
    };
    let number = match by_name {
        Some(one) => Some(one.value),
        None => value.to_number(),
    };
    let (min, max) = match is_signed {
        true => (-(1 << (bits - 1)), (1 << (bits - 1)) - 1),
        false => (0, (1 << bits) - 1),
    };
    let fits = |number: &i128| (min..=max).contains(number);
    number.filter(fits).ok_or_else(|| {
        let sign = if is_signed { "" } else { "un" };
        let names = match names {
            [] => "",
            _ => ", nor the name of one",
        };
        Fault::wanted(
            format_args!("a number of {bits} bits, {sign}signed{names}"),
            value,
        )
    })
}

fn decode_field(
    field: &Named<'_>,
    value: &Value,
    bytes: &mut [u8],
    convert: Option<&Zeroes>,
) -> std::result::Result<(), Fault> {
    let Some(bits) = field.bits else {
        let own = part_mut(bytes, field.offset / 8, field.ty.size)?;
        return decode(field.ty, value, own, convert);
    };
    let (start, len) = bit_bytes(field.offset, bits)?;
    let own = part_mut(bytes, start, len)?;
    let number = match (form(field.ty)?, value) {
        (Form::Bool, Value::Bool(is_set)) => (*is_set).into(),
        (Form::Bool, _) => return Err(Fault::wanted("true or false", value)),
        (Form::Number { is_signed, names }, _) => number_of(value, bits.into(), is_signed, names)?,
        _ => return Err(Fault::new("bits of a type that has none")),
    };
    let shift = field.offset % 8;
    let mask = ((1_u128 << bits) - 1) << shift;
    let new = from_le(own) & !mask | (number as u128) << shift & mask;
    own.copy_from_slice(&new.to_le_bytes()[..len]);
    Ok(())
}

#[cfg(all(test, feature = "serde"))]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::note::{Note, Param, Range};
    use crate::schema::Enumerator;
    use crate::schema::tests::{array, field, int, structure, ty};

    /// Numbers that look random (xorshift64*).
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
        }

        fn below(&mut self, limit: usize) -> usize {
            (self.next() % limit as u64) as usize
        }

        fn bytes(&mut self, len: usize) -> Vec<u8> {
            (0..len).map(|_| self.next() as u8).collect()
        }
    }

    fn enumeration(size: usize, is_signed: bool) -> Type {
        let one = |name: &str, value| Enumerator {
            name: name.to_string(),
            value,
        };
        let values = vec![one("IDLE", 0), one("BUSY", 7), one("LAST", 0x7f)];
        ty(Kind::Enum { is_signed, values }, size)
    }

    fn union(fields: Vec<Field>, size: usize) -> Type {
        let name = "u".to_string();
        ty(Kind::Union { name, fields }, size)
    }

    fn pointer() -> Type {
        let to = "Void ".to_string();
        let is_tagged = false;
        ty(Kind::Pointer { to, is_tagged }, 8)
    }

    /// A type of any kind, with types in it down to a depth.
    fn any_type(random: &mut Random, depth: usize) -> Type {
        let size = 1 << random.below(4);
        match random.below(if depth == 0 { 6 } else { 10 }) {
            0 => int(size, Encoding::Unsigned),
            1 => int(size, Encoding::Signed),
            2 => int(1, Encoding::Bool),
            3 => int(1, Encoding::Char),
            4 => enumeration(size, random.below(2) == 0),
            5 => ty(Kind::Bytes("Float double".to_string()), 8),
            6 => {
                let count = random.below(4);
                array(any_type(random, depth - 1), count)
            }
            7 => union(vec![field("a", 0, int(4, Encoding::Unsigned))], 8),
            what => {
                let (mut fields, mut at) = (Vec::new(), 0);
                for number in 0..random.below(5) {
                    let name = format!("f{number}");
                    let bits = 1 + random.below(60) as u8;
                    if what == 8 && random.below(3) == 0 {
                        let is_signed = random.below(2) == 0;
                        let sign = [Encoding::Unsigned, Encoding::Signed][usize::from(is_signed)];
                        let offset = 8 * at + random.below(8);
                        fields.push(Field {
                            name,
                            offset,
                            bits: Some(bits),
                            ty: int(8, sign),
                        });
                        at = (offset + usize::from(bits)).div_ceil(8);
                        continue;
                    }
                    let ty = any_type(random, depth - 1);
                    at += random.below(2);
                    let end = at + ty.size;
                    fields.push(field(&name, at, ty));
                    at = end;
                }
                match what {
                    8 => structure(fields, at),
                    _ => ty(Kind::Section(fields), at),
                }
            }
        }
    }

    #[track_caller]
    fn encoded(ty: &Type, bytes: &[u8]) -> Value {
        encode(ty, bytes, &mut Found::default()).unwrap_or_else(|fault| panic!("{ty:?}: {fault:?}"))
    }

    #[test]
    fn random_values_of_every_kind_come_back() {
        let mut random = Random(1);
        for _ in 0..20_000 {
            let ty = any_type(&mut random, 4);
            let bytes = random.bytes(ty.size);
            let value = encoded(&ty, &bytes);
            let text = serde_json::to_string(&value).unwrap();
            let read: Value = serde_json::from_str(&text).unwrap();
            assert_eq!(read, value);
            // Into whatever was there.
            let mut new = random.bytes(ty.size);
            decode(&ty, &read, &mut new, None).unwrap();
            assert_eq!(encoded(&ty, &new), value, "{ty:?}");
            if matches!(ty.kind, Kind::Int { encoding, .. } if encoding != Encoding::Bool) {
                assert_eq!(new, bytes);
            }
        }
    }

    /// Any value for any type: an error, never a panic.
    #[test]
    fn values_of_other_types_are_refused() {
        let mut random = Random(2);
        let mut refused = 0;
        for _ in 0..20_000 {
            let (first, other) = (any_type(&mut random, 3), any_type(&mut random, 3));
            let value = encoded(&first, &random.bytes(first.size));
            let mut bytes = random.bytes(other.size);
            let zeroes = Zeroes::new();
            let convert = (random.below(2) == 0).then_some(&zeroes);
            refused += usize::from(decode(&other, &value, &mut bytes, convert).is_err());
        }
        assert!((1_000..19_000).contains(&refused), "{refused}");
    }

    #[test]
    fn types_may_say_anything() {
        let number = || int(4, Encoding::Unsigned);
        let mut bits = field("a", 3, number());
        bits.bits = Some(20);
        let mut no_bits = field("a", 0, number());
        no_bits.bits = Some(0);
        let mut many = array(number(), 2);
        many.size = 4;
        for bad in [
            structure(vec![field("a", 1, number())], 4),
            structure(vec![field("a", usize::MAX / 8, number())], 4),
            structure(vec![bits], 4),
            structure(vec![no_bits], 4),
            structure(vec![field("a", 0, number()), field("a", 0, number())], 4),
            structure(vec![field("a", 0, many)], 4),
            structure(
                vec![field("a", 0, union(vec![field("p", 0, pointer())], 8))],
                8,
            ),
        ] {
            let fault = encode(&bad, &[0; 8], &mut Found::default()).unwrap_err();
            assert!(fault.path.starts_with(".a"), "{fault:?}");
        }
        // As many values of no size as there may be.
        let empty = array(structure(vec![], 0), usize::MAX);
        let mut found = Found {
            room: 1000,
            ..Found::default()
        };
        assert!(encode(&empty, &[], &mut found).is_err());
    }

    #[test]
    fn fields_have_names_and_pointers_are_left_out() {
        let byte = || int(1, Encoding::Unsigned);
        let mut bits = field("bits", 8, int(4, Encoding::Signed));
        (bits.offset, bits.bits) = (8 * 8 + 3, Some(7));
        let fields = vec![
            field("number", 0, int(8, Encoding::Unsigned)),
            bits,
            field("", 10, structure(vec![field("inner", 1, byte())], 2)),
            field(
                "",
                12,
                union(vec![field("a", 0, byte()), field("b", 0, byte())], 2),
            ),
            field("mode", 14, enumeration(1, false)),
            field("flag", 15, int(1, Encoding::Bool)),
            field("pointer", 16, pointer()),
            field("pointers", 24, array(pointer(), 2)),
            field("pairs", 40, array(array(int(2, Encoding::Signed), 2), 2)),
            field("bytes", 48, array(byte(), 3)),
        ];
        let ty = structure(fields, 52);
        let mut bytes = vec![0xaa; 52];
        bytes[..8].copy_from_slice(&(1_u64 << 53).to_le_bytes());
        bytes[8..10].copy_from_slice(&(0x41_u16 << 3).to_le_bytes());
        bytes[11..16].copy_from_slice(&[9, 1, 2, 7, 1]);
        bytes[40..51].copy_from_slice(&[1, 0, 0xff, 0xff, 3, 0, 0, 0x80, 0xde, 0xad, 5]);
        let value = encoded(&ty, &bytes);
        assert_eq!(
            serde_json::to_string(&value).unwrap(),
            r#"{"a|b":"0102","bits":-63,"bytes":"dead05","flag":true,"inner":9,"mode":"BUSY","#
                .to_string()
                + r#""number":"9007199254740992","pairs":[[1,-1],[3,-32768]]}"#
        );
        let mut new = vec![0; 52];
        decode(&ty, &value, &mut new, None).unwrap();
        // What is not saved stays: padding and pointers.
        for (at, byte) in bytes.iter_mut().enumerate() {
            match at {
                9 => *byte &= 3,
                10 | 16..40 | 51 => *byte = 0,
                _ => {}
            }
        }
        assert_eq!(new, bytes);
    }

    #[test]
    fn numbers_are_safe() {
        let unsigned = int(8, Encoding::Unsigned);
        for (number, text) in [
            ((1 << 53) - 1, "9007199254740991"),
            (1 << 53, r#""9007199254740992""#),
            (u64::MAX, r#""18446744073709551615""#),
        ] {
            let value = encoded(&unsigned, &number.to_le_bytes());
            assert_eq!(serde_json::to_string(&value).unwrap(), text);
        }
        let least = encoded(&int(8, Encoding::Signed), &i64::MIN.to_le_bytes());
        assert_eq!(least, Value::Text("-9223372036854775808".to_string()));

        let read = |text: &str, ty: &Type| {
            let value = serde_json::from_str(text).ok()?;
            let mut bytes = [0; 8];
            decode(ty, &value, &mut bytes[..ty.size], None).ok()?;
            Some(u64::from_le_bytes(bytes))
        };
        // Both forms, whatever the number.
        for text in ["255", r#""255""#, r#""0xff""#, r#""0x00FF""#] {
            assert_eq!(read(text, &unsigned), Some(255), "{text}");
        }
        assert_eq!(read("18446744073709551615", &unsigned), Some(u64::MAX));
        assert_eq!(read(r#""0xffffffffffffffff""#, &unsigned), Some(u64::MAX));
        for text in [
            "-1",
            "0.0",
            "1e3",
            "true",
            "null",
            "[]",
            r#""""#,
            r#""0x""#,
            r#""0x-1""#,
            r#"" 1""#,
            r#""ff""#,
            r#""18446744073709551616""#,
            "18446744073709551616",
        ] {
            assert_eq!(read(text, &unsigned), None, "{text}");
        }
        let byte = int(1, Encoding::Signed);
        let fits = [-129, -128, 127, 128].map(|number| read(&number.to_string(), &byte).is_some());
        assert_eq!(fits, [false, true, true, false]);
        let mode = enumeration(1, false);
        for (text, wanted) in [
            (r#""BUSY""#, Some(7)),
            ("7", Some(7)),
            ("200", Some(200)),
            ("256", None),
            (r#""busy""#, None),
        ] {
            assert_eq!(read(text, &mode), wanted, "{text}");
        }
    }

    fn note() -> Note {
        Note {
            mmio_size: 0x1000,
            nr_irqs: 1,
            compatible: vec!["a,b".to_string()],
            ranges: vec![Range {
                space: Space::Ports,
                region: 2,
                size: 8,
            }],
            read_pages: vec![],
            works: vec![],
            window: None,
            doorbells: vec![],
            state_version: None,
            params: vec![],
        }
    }

    fn state() -> State {
        let shape = Shape::new(".bss", int(8, Encoding::Unsigned), 1, vec![]);
        let map = shape.save(&5_u64.to_le_bytes(), &mut Found::default());
        let map = map.unwrap();
        State {
            clock: Clock {
                boottime_ns: 1,
                monotonic_ns: 2,
                realtime_ns: u64::MAX,
            },
            device: Identity::of_note(&note()),
            maps: [(".bss".to_string(), map)].into(),
            zeroes: Zeroes::new(),
        }
    }

    #[test]
    fn the_text_is_sorted_and_the_same() {
        let state = state();
        let json = state.to_json().unwrap();
        let hash = &state.maps[".bss"].schema;
        let wanted = format!(
            r#"{{"clock":{{"boottime_ns":1,"monotonic_ns":2,"realtime_ns":"18446744073709551615"}},"device":{{"compatible":["a,b"],"nr_irqs":1,"regions":[{{"region":0,"size":4096,"space":"memory"}},{{"region":2,"size":8,"space":"ports"}}],"state_version":0}},"format":"kvm-bpf-state","maps":[{{"name":".bss","schema":"{hash}","types":["value: 64 bits, unsigned"],"values":[5]}}],"version":1}}"#
        );
        assert_eq!(serde_json::to_string(&state).unwrap(), wanted);
        assert_eq!(State::from_json(&json).unwrap(), state);
        assert_eq!(State::from_json(wanted.as_bytes()).unwrap(), state);

        for (from, to) in [
            ("kvm-bpf-state", "kvm-bpf-stat"),
            (r#""version":1"#, r#""version":2"#),
            (r#""version":1"#, r#""version":1,"more":1"#),
            (r#""version":1"#, r#""version":1,"version":1"#),
            (r#""nr_irqs":1,"#, ""),
            (r#""nr_irqs":1"#, r#""nr_irqs":4294967296"#),
            ("memory", "Memory"),
            ("[5]", r#"[{"a":1,"a":1}]"#),
            ("[5]", "[5.0]"),
            ("[5]", "[null]"),
            (r#""boottime_ns":1"#, r#""boottime_ns":-1"#),
        ] {
            assert!(wanted.contains(from));
            let changed = wanted.replacen(from, to, 1);
            let error = State::from_json(changed.as_bytes()).unwrap_err();
            assert!(matches!(error, Error::Json(_)), "{changed}: {error:?}");
        }
        for len in 0..wanted.len() {
            assert!(State::from_json(&wanted.as_bytes()[..len]).is_err());
        }
        // A newer one is named, though it has what is not known here.
        let newer = wanted.replacen(r#""version":1"#, r#""version":2"#, 1);
        let newer = newer.replacen(r#"{"clock":"#, r#"{"at":[],"clock":"#, 1);
        let error = State::from_json(newer.as_bytes()).unwrap_err();
        let text = std::error::Error::source(&error).unwrap().to_string();
        assert!(text.contains("version 2, instead of"), "{text}");
    }

    #[test]
    fn all_is_decided_before_anything_changes() {
        let shape = |name| Shape::new(name, int(8, Encoding::Unsigned), 1, vec![]);
        let shapes = [shape(".bss")];
        let mut saved = state();
        assert_eq!(
            plan(&note(), shapes.iter(), &saved).unwrap(),
            [5_u64.to_le_bytes()]
        );

        // It is of before the device had parameters.
        let mut with_params = note();
        with_params.params.push(Param {
            name: "clock".to_string(),
            required: true,
        });
        plan(&with_params, shapes.iter(), &saved).unwrap();

        // A version that the device does not load, and those that it does.
        let versioned = |version, oldest| Note {
            state_version: Some(StateVersion { version, oldest }),
            ..note()
        };
        for (version, oldest, is_good) in [(1, 0, true), (0, 0, true), (1, 1, false)] {
            let planned = plan(&versioned(version, oldest), shapes.iter(), &saved);
            assert_eq!(planned.is_ok(), is_good, "{planned:?}");
        }
        saved.device.state_version = 1;
        assert!(plan(&note(), shapes.iter(), &saved).is_err());

        // A map that is gone must have been 0, one that is new is as at first.
        let new = Shape::new(".data", int(8, Encoding::Unsigned), 1, vec![9]);
        let gone = plan(&versioned(1, 0), [&new].into_iter(), &saved);
        assert_eq!(
            gone.unwrap_err().to_string(),
            ".bss: the device has no such map"
        );
        saved.maps.get_mut(".bss").unwrap().values = vec![Value::Number(0)];
        let went = plan(&versioned(1, 0), [&new].into_iter(), &saved).unwrap();
        assert_eq!(went, [9_u64.to_le_bytes()]);

        // More entries, and less of them.
        let mut many = Shape::new(".bss", int(4, Encoding::Unsigned), 3, vec![]);
        saved.maps.get_mut(".bss").unwrap().values = vec![Value::Number(1), Value::Number(2)];
        let planned = plan(&versioned(1, 0), [&many].into_iter(), &saved).unwrap();
        let wanted = [1_u64, 2, 0].map(u64::to_le_bytes).concat();
        assert_eq!(planned, [wanted]);
        saved.maps.get_mut(".bss").unwrap().schema = many.schema.clone();
        let counted = plan(&versioned(1, 0), [&many].into_iter(), &saved);
        assert_eq!(
            counted.unwrap_err().to_string(),
            ".bss: 2 values instead of 3"
        );
        many = Shape::new(".bss", int(4, Encoding::Unsigned), 1, vec![]);
        let lost = plan(&versioned(1, 0), [&many].into_iter(), &saved);
        assert_eq!(
            lost.unwrap_err().to_string(),
            ".bss[1]: there is no such entry any more"
        );
    }

    #[test]
    fn a_field_of_another_type_is_named() {
        let field = |name, byte, size| field(name, byte, int(size, Encoding::Unsigned));
        let of = |fields, entries| Shape::new("map", structure(fields, 16), entries, vec![]);
        let old = of(vec![field("a", 0, 4), field("b", 4, 4)], 1);
        let mut saved = old.save(&[0; 16], &mut Found::default()).unwrap();
        for (fields, entries, why) in [
            (
                vec![field("a", 0, 4), field("b", 4, 2)],
                1,
                "it has value.b at bit 32: 32 bits, unsigned, \
                 the new one value.b at bit 32: 16 bits, unsigned",
            ),
            (
                vec![field("a", 0, 4)],
                1,
                "it has value.b at bit 32: 32 bits, unsigned, which the new one lacks",
            ),
            (
                vec![field("a", 0, 4), field("b", 4, 4), field("c", 8, 8)],
                1,
                "it lacks value.c at bit 64: 64 bits, unsigned, which the new one has",
            ),
            (
                vec![field("a", 0, 4), field("b", 4, 4)],
                2,
                "it has 1 values, the new one 2",
            ),
        ] {
            let error = of(fields, entries).restore(&saved, None).unwrap_err();
            let wanted = format!("map: {why}; the device loads no state of other types");
            assert_eq!(error.to_string(), wanted);
        }
        // Nobody has said what the types were.
        saved.types.clear();
        let error = of(vec![field("a", 0, 4)], 1).restore(&saved, None);
        let error = error.unwrap_err().to_string();
        assert!(error.starts_with("map: it has schema sha256:"), "{error}");
    }

    /// A field that is gone had a name which only the device that was saved knows.
    #[test]
    fn names_of_zero_are_known() {
        let one = |name: &str, value| Enumerator {
            name: name.to_string(),
            value,
        };
        let values = vec![one("IDLE", 0), one("dead", 0), one("BUSY", 7)];
        let is_signed = false;
        let mode = ty(Kind::Enum { is_signed, values }, 1);
        let mut bits = field("bits", 4, mode.clone());
        bits.bits = Some(3);
        let old = structure(
            vec![
                field("count", 0, int(4, Encoding::Unsigned)),
                bits,
                field("modes", 5, array(mode, 3)),
            ],
            8,
        );
        let old = Shape::new("map", old, 1, vec![]);
        let new = structure(vec![field("count", 0, int(4, Encoding::Unsigned))], 4);
        let new = Shape::new("map", new, 1, vec![]);
        let converted = |bytes: &[u8; 8]| {
            let mut found = Found::default();
            let map = old.save(bytes, &mut found).unwrap();
            let state = State {
                maps: [("map".to_string(), map)].into(),
                zeroes: found.zeroes,
                ..state()
            };
            let read = State::from_json(&state.to_json().unwrap()).unwrap();
            assert_eq!(read, state);
            (new.restore(&state.maps["map"], Some(&state.zeroes)), state)
        };
        let (restored, state) = converted(&[3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(restored.unwrap(), [3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(state.zeroes, ["IDLE".to_string()].into());
        let text = String::from_utf8(state.to_json().unwrap()).unwrap();
        assert!(text.contains("\"zeroes\": [\n    \"IDLE\"\n  ]"), "{text}");
        for (bytes, path) in [
            ([3, 0, 0, 0, 7, 0, 0, 0], "bits"),
            ([3, 0, 0, 0, 0, 0, 7, 0], "modes"),
        ] {
            let error = converted(&bytes).0.unwrap_err().to_string();
            assert!(error.starts_with(&format!("map[0].{path}: ")), "{error}");
        }
        // Bytes are not taken for a name.
        let values = vec![one("dead", 0)];
        let mode = Shape::new("map", ty(Kind::Enum { is_signed, values }, 1), 1, vec![]);
        let mut found = Found::default();
        let map = mode.save(&[0; 8], &mut found).unwrap();
        assert_eq!(map.values, [Value::Text("dead".to_string())]);
        assert!(found.zeroes.is_empty());
    }

    #[test]
    fn there_are_limits() {
        let nested = |depth| ["[".repeat(depth), "]".repeat(depth)].concat();
        assert!(matches!(
            State::from_json(nested(MAX_DEPTH).as_bytes()),
            Err(Error::Json(_))
        ));
        assert!(matches!(
            State::from_json(nested(MAX_DEPTH + 1).as_bytes()),
            Err(Error::Size { .. })
        ));
        for (values, is_size) in [(MAX_VALUES - 1, false), (MAX_VALUES, true)] {
            let list = format!("[{}0]", "0,".repeat(values));
            let error = State::from_json(list.as_bytes()).unwrap_err();
            assert_eq!(matches!(error, Error::Size { .. }), is_size, "{values}");
        }
        // Text is not counted.
        let text = format!(r#""\"{}""#, "[,".repeat(MAX_VALUES));
        assert!(matches!(
            State::from_json(text.as_bytes()),
            Err(Error::Json(_))
        ));
        let mut long = vec![b' '; MAX_FILE_SIZE as usize + 1];
        assert!(matches!(State::from_json(&long), Err(Error::Size { .. })));
        long.pop();
        assert!(matches!(State::from_json(&long), Err(Error::Json(_))));
        // What could not be read is not written.
        let mut state = state();
        let map = state.maps.get_mut(".bss").unwrap();
        map.values = vec![Value::Number(0); MAX_VALUES];
        assert!(matches!(state.to_json(), Err(Error::Size { .. })));
        let shape = Shape::new(
            "many",
            array(int(4, Encoding::Signed), MAX_VALUES),
            1,
            vec![],
        );
        let error = shape.save(&vec![0; 4 * MAX_VALUES], &mut Found::default());
        let error = error.unwrap_err();
        assert!(error.to_string().starts_with("many[0]["), "{error}");
    }

    #[test]
    fn files_are_regular_and_the_owners() {
        use std::os::unix::fs::PermissionsExt;

        let directory = vmm_sys_util::tempdir::TempDir::new().unwrap();
        let path = directory.as_path().join("state.json");
        let state = state();
        state.to_file(&path).unwrap();
        assert_eq!(State::from_file(&path).unwrap(), state);
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        // Another takes its place.
        state.to_file(&path).unwrap();
        let nowhere = directory.as_path().join("nothing/state.json");
        assert!(matches!(state.to_file(&nowhere), Err(Error::File(_))));
        for other in [Path::new("/dev/zero"), directory.as_path()] {
            assert!(matches!(State::from_file(other), Err(Error::File(_))));
        }
    }
}
