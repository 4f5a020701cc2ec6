// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Which maps of a running device go on when its programs are replaced.

use std::ffi::OsStr;
use std::fmt;

use libbpf_rs::btf::types::{
    Array, Composite, DataSec, Enum, Enum64, Fwd, Int, IntEncoding, MemberAttr,
};
use libbpf_rs::btf::{Btf, BtfKind, BtfType, HasSize, TypeId};
use libbpf_rs::{AsRawLibbpf, MapType, OpenMap, OpenObject, libbpf_sys};

use crate::image::Error;

/// How deep types may be nested; the kernel's own limit.
const MAX_DEPTH: usize = 32;
/// How many facts there may be of one map: types that contain each other often have many.
const MAX_FACTS: usize = 1 << 16;

/// What to do where a new file would lose what the running device has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnLoss {
    /// Refuse the file.
    #[default]
    Refuse,
    /// Start maps anew that cannot be carried over, and leave a direction without program to the
    /// VMM.
    Accept,
}

/// What became of the maps when programs were replaced, by name, in alphabetical order.
///
/// Those that belong to the programs are not among them: constants and tables of programs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MapChanges {
    /// They keep their content.
    pub carried: Vec<String>,
    /// They start anew: the running device has none of that name, or it could not be carried over.
    pub fresh: Vec<String>,
    /// The new programs have none of that name.
    pub dropped: Vec<String>,
}

impl fmt::Display for MapChanges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for (what, maps) in [
            ("carried over", &self.carried),
            ("starts anew", &self.fresh),
            ("dropped", &self.dropped),
        ] {
            if !maps.is_empty() {
                write!(f, "{separator}{what}: {}", maps.join(", "))?;
                separator = "; ";
            }
        }
        if separator.is_empty() {
            f.write_str("no maps")?;
        }
        Ok(())
    }
}

/// A map with state, and all that must be the same for another to go on with its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Its name, or the section whose global data it holds.
    pub name: String,
    facts: Vec<String>,
}

impl Layout {
    /// Those of an object's maps that hold state.
    ///
    /// Of an object that carries no map over yet: libbpf replaces what it knows of such a map by
    /// what the kernel does, with the type ids of the object that created it.
    pub fn of_object(object: &OpenObject) -> Result<Vec<Self>, Error> {
        // SAFETY: the object lives as long as `object` is borrowed.
        let raw = unsafe { object.as_libbpf_object().as_ref() };
        let btf = Btf::from_bpf_object(raw).map_err(Error::Open)?;
        let layouts = object
            .maps()
            .filter(|map| map.autocreate() && !belongs_to_programs(map))
            .map(|map| Layout::of_map(&map, btf.as_ref()))
            .collect::<Result<Vec<_>, _>>()?;
        for (at, layout) in layouts.iter().enumerate() {
            if layouts[..at].iter().any(|other| other.name == layout.name) {
                return Err(Error::SameName(layout.name.clone()));
            }
        }
        Ok(layouts)
    }

    fn of_map(map: &OpenMap<'_>, btf: Option<&Btf<'_>>) -> Result<Self, Error> {
        let name = short_name(&map.name().to_string_lossy()).to_string();
        let mut facts = Facts {
            btf,
            all: Vec::new(),
        };
        match facts.add_map(map, "") {
            Some(()) => Ok(Layout {
                name,
                facts: facts.all,
            }),
            None => Err(Error::MapTypes(name)),
        }
    }

    /// Why a map like this cannot go on with the content of one like `old`.
    pub fn difference(&self, old: &Self) -> Option<String> {
        let none = "nothing".to_string();
        let count = self.facts.len().max(old.facts.len());
        (0..count)
            .map(|at| (old.facts.get(at), self.facts.get(at)))
            .find(|(old, new)| old != new)
            .map(|(old, new)| {
                let (old, new) = (old.unwrap_or(&none), new.unwrap_or(&none));
                format!("it has {old}, the new one {new}")
            })
    }
}

/// A map's name in the source, or the section whose global data it holds.
///
/// libbpf puts the object's name before a section's, but for sections like `.data.x`.
pub(crate) fn short_name(full: &str) -> &str {
    match full.rfind('.') {
        Some(at) if !full.starts_with('.') => &full[at..],
        _ => full,
    }
}

/// Whether a map's content comes with the programs: constants, of which libbpf makes a map per
/// section (`.rodata.str1.1`), and tables of programs.
fn belongs_to_programs(map: &OpenMap<'_>) -> bool {
    let full = map.name().to_string_lossy();
    let name = short_name(&full);
    name.starts_with(".rodata")
        || name == ".kconfig"
        || matches!(map.map_type(), MapType::ProgArray | MapType::StructOps)
}

/// Facts of a map, one after the other: sizes, and what is where in its types, with names but
/// without the numbers of types, which each object has its own of.
struct Facts<'a> {
    btf: Option<&'a Btf<'a>>,
    all: Vec<String>,
}

impl<'a> Facts<'a> {
    /// Adds those of a map; none if its types are nested too deeply, or hold too much.
    fn add_map(&mut self, map: &OpenMap<'_>, prefix: &str) -> Option<()> {
        let raw = map.as_libbpf_object().as_ptr();
        // SAFETY: `raw` is the map that `map` borrows; the calls only read from it.
        let (number, extra, key, value, inner) = unsafe {
            (
                libbpf_sys::bpf_map__type(raw),
                libbpf_sys::bpf_map__map_extra(raw),
                libbpf_sys::bpf_map__btf_key_type_id(raw),
                libbpf_sys::bpf_map__btf_value_type_id(raw),
                libbpf_sys::bpf_map__inner_map(raw).as_ref(),
            )
        };
        self.all.extend([
            format!("{prefix}type {:?} ({number})", map.map_type()),
            format!("{prefix}key of {} bytes", map.key_size()),
            format!("{prefix}value of {} bytes", map.value_size()),
            format!("{prefix}{} entries", map.max_entries()),
            format!("{prefix}flags {:#x}", map.map_flags()),
            format!("{prefix}extra {extra:#x}"),
        ]);
        for (what, id) in [("key", key), ("value", value)] {
            // 0 is no type: the size has to do then.
            if id != 0 {
                let path = format!("{prefix}{what}");
                self.add(self.type_by_id(id.into())?, &path, &path, 0)?;
            }
        }
        match inner {
            Some(inner) => self.add_map(&OpenMap::new(inner), "inner "),
            None => Some(()),
        }
    }

    fn type_by_id(&self, id: TypeId) -> Option<BtfType<'a>> {
        self.btf?.type_by_id(id)
    }

    /// Adds those of a type; `what` is `path` with its place in what it is part of.
    fn add(&mut self, ty: BtfType<'a>, path: &str, what: &str, depth: usize) -> Option<()> {
        if depth > MAX_DEPTH || self.all.len() >= MAX_FACTS {
            return None;
        }
        let (ty, tags) = look_through(ty)?;
        let name = |ty: BtfType<'_>| ty.name().unwrap_or_default().to_string_lossy().into_owned();
        let depth = depth + 1;
        match ty.kind() {
            BtfKind::Int => {
                let int = Int::try_from(ty).ok()?;
                let encoding = match int.encoding {
                    IntEncoding::None => "unsigned",
                    IntEncoding::Signed => "signed",
                    IntEncoding::Char => "char",
                    IntEncoding::Bool => "bool",
                };
                self.push(format!("{what}: {} bits, {encoding}", int.bits));
            }
            BtfKind::Struct | BtfKind::Union => {
                let composite = Composite::try_from(ty).ok()?;
                let kind = format!("{:?}", ty.kind()).to_lowercase();
                let size = composite.size();
                self.push(format!("{what}: {kind} {} of {size} bytes", name(ty)));
                for member in composite.iter() {
                    let name = member.name.unwrap_or_default().to_string_lossy();
                    let path = format!("{path}.{name}");
                    let what = match member.attr {
                        MemberAttr::Normal { offset } => format!("{path} at bit {offset}"),
                        MemberAttr::BitField { size, offset } => {
                            format!("{path} at bit {offset}, {size} of them")
                        }
                    };
                    self.add(self.type_by_id(member.ty)?, &path, &what, depth)?;
                }
            }
            BtfKind::DataSec => {
                let section = DataSec::try_from(ty).ok()?;
                for variable in section.iter() {
                    let ty = self.type_by_id(variable.ty)?;
                    let path = format!("variable {}", name(ty));
                    let what = format!("{path} at byte {}", variable.offset);
                    // A variable refers to its type.
                    self.add(ty.next_type()?, &path, &what, depth)?;
                }
            }
            BtfKind::Array => {
                let array = Array::try_from(ty).ok()?;
                self.push(format!("{what}: array of {}", array.capacity()));
                let path = format!("{path}[]");
                self.add(array.contained_type(), &path, &path, depth)?;
            }
            BtfKind::Enum | BtfKind::Enum64 => {
                let (size, values): (_, Vec<_>) = match Enum::try_from(ty) {
                    Ok(all) => {
                        let values = all.iter().map(|one| value_of(one.name, one.value));
                        (all.size(), values.collect())
                    }
                    Err(ty) => {
                        let all = Enum64::try_from(ty).ok()?;
                        let values = all.iter().map(|one| value_of(one.name, one.value));
                        (all.size(), values.collect())
                    }
                };
                self.push(format!("{what}: enum of {size} bytes"));
                for value in values {
                    self.push(format!("{path}: {value}"));
                }
            }
            // What it points to is the kernel's, and its name says all.
            BtfKind::Ptr => {
                let (to, tags) = look_through(ty.next_type()?)?;
                self.push(format!(
                    "{what}: pointer to {tags}{:?} {}",
                    to.kind(),
                    name(to)
                ));
            }
            BtfKind::Fwd => {
                let kind = Fwd::try_from(ty).ok()?.kind();
                self.push(format!("{what}: undefined {kind:?} {}", name(ty)));
            }
            kind => self.push(format!("{what}: {kind:?} {}", name(ty))),
        }
        if !tags.is_empty() {
            self.push(format!("{what}: tags {tags}"));
        }
        Some(())
    }

    fn push(&mut self, fact: String) {
        self.all.push(fact);
    }
}

/// An enumerator.
fn value_of(name: Option<&OsStr>, value: impl fmt::Display) -> String {
    format!("{} is {value}", name.unwrap_or_default().to_string_lossy())
}

/// The type behind names of types and qualifiers, and the tags on the way, each with a blank.
///
/// None if there are more than a good object has.
fn look_through<'a>(mut ty: BtfType<'a>) -> Option<(BtfType<'a>, String)> {
    let mut tags = String::new();
    for _ in 0..MAX_DEPTH {
        match ty.kind() {
            BtfKind::TypeTag => {
                tags += &ty.name()?.to_string_lossy();
                tags.push(' ');
            }
            BtfKind::Typedef | BtfKind::Const | BtfKind::Volatile | BtfKind::Restrict => {}
            _ => return Some((ty, tags)),
        }
        ty = ty.next_type()?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_sections_go_without_the_objects() {
        for (full, short) in [
            ("regbank.bss", ".bss"),
            ("my_objec.rodata", ".rodata"),
            ("a.b.data", ".data"),
            (".data", ".data"),
            (".data.mine", ".data.mine"),
            (".rodata.str1.1", ".rodata.str1.1"),
            ("accesses", "accesses"),
        ] {
            assert_eq!(short_name(full), short, "{full}");
        }
    }

    #[test]
    fn the_first_difference_is_told() {
        let layout = |facts: &[&str]| Layout {
            name: "state".to_string(),
            facts: facts.iter().map(|fact| fact.to_string()).collect(),
        };
        let old = layout(&["flags 0x0", "value: 8 bits, bool"]);
        assert_eq!(old.difference(&old), None);
        let new = layout(&["flags 0x400", "value: 8 bits, char"]);
        let why = new.difference(&old).unwrap();
        assert_eq!(why, "it has flags 0x0, the new one flags 0x400");
        // More or less of them.
        let new = layout(&["flags 0x0"]);
        let why = new.difference(&old).unwrap();
        assert_eq!(why, "it has value: 8 bits, bool, the new one nothing");
        assert!(old.difference(&new).is_some());
    }

    #[test]
    fn changes_are_told_by_kind() {
        let mut changes = MapChanges::default();
        assert_eq!(changes.to_string(), "no maps");
        changes.carried = vec!["a".to_string(), ".bss".to_string()];
        assert_eq!(changes.to_string(), "carried over: a, .bss");
        changes.dropped = vec!["b".to_string()];
        assert_eq!(changes.to_string(), "carried over: a, .bss; dropped: b");
    }
}
