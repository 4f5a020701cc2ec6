// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What is where in the maps of an object: its types, read from BTF once and without the numbers
//! that each object has its own of.

use std::fmt;

use sha2::{Digest, Sha256};

/// How deep types may be nested; the kernel's own limit.
pub(crate) const MAX_DEPTH: usize = 32;
/// How many types, fields and enumerators there may be in one map: types that contain each other
/// often have many.
pub(crate) const MAX_PARTS: usize = 1 << 16;

/// How many bytes of text the places of all parts may have, those of all types of a description
/// together.
#[cfg(feature = "serde")]
const MAX_TEXT: usize = 16 << 20;

/// A type, with all that it contains.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Type {
    pub kind: Kind,
    /// Bytes of a value; 0 if that is not known.
    pub size: usize,
    /// Tags of the type, each with a blank behind it.
    pub tags: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) enum Kind {
    Int {
        bits: u8,
        encoding: Encoding,
    },
    Enum {
        is_signed: bool,
        values: Vec<Enumerator>,
    },
    Array {
        count: usize,
        element: Box<Type>,
    },
    Struct {
        name: String,
        fields: Vec<Field>,
    },
    Union {
        name: String,
        fields: Vec<Field>,
    },
    /// Global data: all variables of a section.
    Section(Vec<Field>),
    Pointer {
        /// What it points to, by name: that is the kernel's, and its name says all.
        to: String,
        /// Whether what it points to has a tag.
        is_tagged: bool,
    },
    /// Bytes of which no more is known; how to call them.
    Bytes(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) enum Encoding {
    Unsigned,
    Signed,
    Char,
    Bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Enumerator {
    pub name: String,
    pub value: i128,
}

/// A member of a struct or union, or a variable of a section.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Field {
    /// Empty for an anonymous struct or union.
    pub name: String,
    /// Bits before it in what it is part of.
    pub offset: usize,
    /// How many bits it has, if that is not a matter of its type.
    pub bits: Option<u8>,
    pub ty: Type,
}

impl Type {
    /// Bytes whose type nobody has written down.
    pub fn bytes(size: usize) -> Self {
        Type {
            kind: Kind::Bytes("bytes".to_string()),
            size,
            tags: String::new(),
        }
    }

    /// Whether another's word for it can be worked with: not nested too deeply, with no more parts
    /// than an object's has, no numbers that no object has, and text that there is room for. That
    /// room is then less.
    #[cfg(feature = "serde")]
    pub fn is_sound(&self, text: &mut Text) -> bool {
        let mut room = Room {
            parts: MAX_PARTS,
            text: text.0,
        };
        let is_sound = self.takes(&mut room, 0, 0).is_some();
        text.0 = room.text;
        is_sound
    }

    /// What it takes of what there is room for; `path` is the length of its place in words.
    #[cfg(feature = "serde")]
    fn takes(&self, room: &mut Room, depth: usize, path: usize) -> Option<()> {
        let is_small = |number: usize| u32::try_from(number).is_ok();
        if depth > MAX_DEPTH || !is_small(self.size) {
            return None;
        }
        room.take(path + self.tags.len())?;
        match &self.kind {
            Kind::Int { .. } => {}
            Kind::Enum { values, .. } => values
                .iter()
                .try_for_each(|one| room.take(path + one.name.len()))?,
            Kind::Array { count, element } => {
                is_small(*count).then_some(())?;
                element.takes(room, depth + 1, path + "[]".len())?;
            }
            Kind::Struct { name, fields } | Kind::Union { name, fields } => {
                room.take(path + name.len())?;
                for field in fields {
                    is_small(field.offset / 8).then_some(())?;
                    let path = path + 1 + field.name.len();
                    field.ty.takes(room, depth + 1, path)?;
                }
            }
            Kind::Section(variables) => {
                for variable in variables {
                    is_small(variable.offset / 8).then_some(())?;
                    variable.ty.takes(room, depth + 1, variable.name.len())?;
                }
            }
            Kind::Pointer { to: name, .. } | Kind::Bytes(name) => room.take(path + name.len())?,
        }
        Some(())
    }

    /// What `look` finds first in the type itself and all that it contains.
    fn find<T>(&self, look: &impl Fn(&Kind) -> Option<T>) -> Option<T> {
        look(&self.kind).or_else(|| match &self.kind {
            Kind::Array { element, .. } => element.find(look),
            Kind::Struct { fields, .. } | Kind::Union { fields, .. } | Kind::Section(fields) => {
                fields.iter().find_map(|field| field.ty.find(look))
            }
            _ => None,
        })
    }

    /// Whether it contains, anywhere, a structure of one of these names; returns which.
    pub fn contains<'n>(&self, names: &[&'n str]) -> Option<&'n str> {
        self.find(&|kind| match kind {
            Kind::Struct { name, .. } | Kind::Union { name, .. } => {
                names.iter().copied().find(|wanted| wanted == name)
            }
            _ => None,
        })
    }

    /// Whether it contains a pointer, anywhere.
    pub fn has_pointer(&self) -> bool {
        self.has(|kind| matches!(kind, Kind::Pointer { .. }))
    }

    /// Whether it contains, anywhere, a pointer with a tag: the kernel looks after such.
    pub fn has_tagged_pointer(&self) -> bool {
        self.has(|kind| matches!(kind, Kind::Pointer { is_tagged, .. } if *is_tagged))
    }

    fn has(&self, is_one: impl Fn(&Kind) -> bool) -> bool {
        self.find(&|kind| is_one(kind).then_some(())).is_some()
    }

    /// Adds a line for each part of it, in order, with its place: the same lines say the same type.
    ///
    /// `what` is `path` with its place in what it is part of.
    pub fn describe(&self, path: &str, what: &str, lines: &mut Vec<Line>) {
        let size = self.size;
        match &self.kind {
            Kind::Int { bits, encoding } => {
                lines.push(Line::part(format!("{what}: {bits} bits, {encoding}")));
            }
            Kind::Enum { values, .. } => {
                lines.push(Line::part(format!("{what}: enum of {size} bytes")));
                for Enumerator { name, value } in values {
                    lines.push(Line::part(format!("{path}: {name} is {value}")));
                }
            }
            Kind::Array { count, element } => {
                lines.push(Line::part(format!("{what}: array of {count}")));
                let path = format!("{path}[]");
                element.describe(&path, &path, lines);
            }
            Kind::Struct { name, fields } => {
                let text = format!("{what}: struct {name} of {size} bytes");
                lines.push(Line::whole(text));
                describe_members(fields, path, lines);
            }
            Kind::Union { name, fields } => {
                let text = format!("{what}: union {name} of {size} bytes");
                lines.push(Line::whole(text));
                describe_members(fields, path, lines);
            }
            Kind::Section(variables) => {
                for variable in variables {
                    let path = format!("variable {}", variable.name);
                    let what = format!("{path} at byte {}", variable.offset / 8);
                    variable.ty.describe(&path, &what, lines);
                }
            }
            Kind::Pointer { to, .. } => {
                lines.push(Line::part(format!("{what}: pointer to {to}")));
            }
            Kind::Bytes(name) => lines.push(Line::part(format!("{what}: {name}"))),
        }
        if !self.tags.is_empty() {
            lines.push(Line::part(format!("{what}: tags {}", self.tags)));
        }
    }
}

/// Bytes of text that the types of one description may have yet: all of it is kept.
#[cfg(feature = "serde")]
pub(crate) struct Text(usize);

#[cfg(feature = "serde")]
impl Default for Text {
    fn default() -> Self {
        Text(MAX_TEXT)
    }
}

/// What a type may take yet.
#[cfg(feature = "serde")]
struct Room {
    parts: usize,
    text: usize,
}

#[cfg(feature = "serde")]
impl Room {
    /// For a part with so many bytes of text.
    fn take(&mut self, text: usize) -> Option<()> {
        self.parts = self.parts.checked_sub(1)?;
        self.text = self.text.checked_sub(text)?;
        Some(())
    }
}

/// What there is to say of a map or a type, of which another may differ.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Line {
    pub text: String,
    /// Whether other lines tell of what is inside: a difference there tells more.
    pub has_parts: bool,
}

impl Line {
    fn part(text: String) -> Self {
        let has_parts = false;
        Line { text, has_parts }
    }

    pub fn whole(text: String) -> Self {
        let has_parts = true;
        Line { text, has_parts }
    }
}

/// The first that one of two lists has and the other has not there, in words.
pub(crate) fn difference<S: AsRef<str> + PartialEq>(old: &[S], new: &[S]) -> Option<String> {
    let same = old.iter().zip(new).take_while(|(old, new)| old == new);
    let same = same.count();
    let (old, new) = (&old[same..], &new[same..]);
    let (first, other) = match (old.first(), new.first()) {
        // What is one's own stands before what both have.
        (Some(first), other) if new.contains(first) => (None, other),
        (first, Some(other)) if old.contains(other) => (first, None),
        firsts => firsts,
    };
    Some(match (first.map(S::as_ref), other.map(S::as_ref)) {
        (Some(old), Some(new)) => format!("it has {old}, the new one {new}"),
        (Some(old), None) => format!("it has {old}, which the new one lacks"),
        (None, Some(new)) => format!("it lacks {new}, which the new one has"),
        (None, None) => return None,
    })
}

fn describe_members(fields: &[Field], path: &str, lines: &mut Vec<Line>) {
    for field in fields {
        let path = format!("{path}.{}", field.name);
        let what = match field.bits {
            None => format!("{path} at bit {}", field.offset),
            Some(bits) => format!("{path} at bit {}, {bits} of them", field.offset),
        };
        field.ty.describe(&path, &what, lines);
    }
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Encoding::Unsigned => "unsigned",
            Encoding::Signed => "signed",
            Encoding::Char => "char",
            Encoding::Bool => "bool",
        })
    }
}

/// What a map's entries are, and how many there are.
pub(crate) fn lines(ty: &Type, entries: usize) -> Vec<Line> {
    let first = format!("{entries} entries of {} bytes", ty.size);
    let mut lines = vec![Line::whole(first)];
    ty.describe("value", "value", &mut lines);
    lines
}

/// The hash of these lines, as text.
pub(crate) fn hash(lines: &[Line]) -> String {
    let mut hash = Sha256::new();
    for line in lines {
        hash.update(&line.text);
        hash.update("\n");
    }
    format!("sha256:{:x}", hash.finalize())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub fn ty(kind: Kind, size: usize) -> Type {
        let tags = String::new();
        Type { kind, size, tags }
    }

    pub fn int(size: usize, encoding: Encoding) -> Type {
        let bits = 8 * size as u8;
        ty(Kind::Int { bits, encoding }, size)
    }

    pub fn array(element: Type, count: usize) -> Type {
        let size = element.size * count;
        let element = Box::new(element);
        ty(Kind::Array { count, element }, size)
    }

    /// A field at a byte.
    pub fn field(name: &str, byte: usize, ty: Type) -> Field {
        Field {
            name: name.to_string(),
            offset: 8 * byte,
            bits: None,
            ty,
        }
    }

    pub fn structure(fields: Vec<Field>, size: usize) -> Type {
        let name = "s".to_string();
        ty(Kind::Struct { name, fields }, size)
    }

    /// All that a reader of the bytes must know changes it.
    #[test]
    fn the_hash_is_of_all_that_matters() {
        let number = || int(4, Encoding::Unsigned);
        let of = |name, byte, ty| structure(vec![field(name, byte, ty)], 8);
        let enumeration = |value| {
            let name = "a".to_string();
            let values = vec![Enumerator { name, value }];
            let is_signed = true;
            ty(Kind::Enum { is_signed, values }, 4)
        };
        let mut bits = field("a", 0, number());
        bits.bits = Some(3);
        let pointer = ty(
            Kind::Pointer {
                to: "Struct a".to_string(),
                is_tagged: false,
            },
            8,
        );
        let all = [
            of("a", 0, number()),
            of("b", 0, number()),
            of("a", 4, number()),
            of("a", 0, int(4, Encoding::Signed)),
            of("a", 0, int(8, Encoding::Unsigned)),
            structure(vec![field("a", 0, number())], 12),
            structure(vec![bits], 8),
            ty(
                Kind::Union {
                    name: "s".to_string(),
                    fields: vec![field("a", 0, number())],
                },
                8,
            ),
            ty(Kind::Section(vec![field("a", 0, number())]), 8),
            of("a", 0, array(number(), 1)),
            of("a", 0, array(number(), 2)),
            of("a", 0, enumeration(1)),
            of("a", 0, enumeration(2)),
            of("a", 0, pointer),
            Type::bytes(8),
        ];
        let hash = |ty: &Type, entries| hash(&lines(ty, entries));
        let hashes: Vec<_> = all.iter().map(|ty| hash(ty, 1)).collect();
        for (at, one) in hashes.iter().enumerate() {
            assert!(!hashes[..at].contains(one), "{:?}", all[at]);
            assert_eq!(one.len(), "sha256:".len() + 64);
        }
        assert_ne!(hash(&all[0], 1), hash(&all[0], 2));
        // It is the same wherever it is made.
        assert_eq!(hash(&all[0].clone(), 1), hashes[0]);
    }

    #[test]
    fn the_first_difference_is_told() {
        let (a, b, c) = ("a at 0", "b at 4", "c at 4");
        assert_eq!(difference(&[a, b], &[a, b]), None);
        for (old, new, wanted) in [
            (
                &[a, b][..],
                &[a, c][..],
                "it has b at 4, the new one c at 4",
            ),
            (&[a], &[a, b], "it lacks b at 4, which the new one has"),
            (&[a, b], &[a], "it has b at 4, which the new one lacks"),
            // In the middle.
            (
                &[a, c],
                &[a, b, c],
                "it lacks b at 4, which the new one has",
            ),
            (
                &[a, b, c],
                &[a, c],
                "it has b at 4, which the new one lacks",
            ),
        ] {
            assert_eq!(difference(old, new).unwrap(), wanted, "{old:?}, {new:?}");
        }
    }

    #[test]
    fn what_is_inside_is_found() {
        let timer = ty(
            Kind::Struct {
                name: "bpf_timer".to_string(),
                fields: vec![],
            },
            16,
        );
        let inside = structure(vec![field("", 0, array(timer, 2))], 32);
        assert_eq!(inside.contains(&["bpf_wq", "bpf_timer"]), Some("bpf_timer"));
        assert_eq!(inside.contains(&["bpf_wq"]), None);
        let section = ty(Kind::Section(vec![field("a", 0, inside)]), 32);
        assert_eq!(section.contains(&["bpf_timer"]), Some("bpf_timer"));
        assert!(!section.has_tagged_pointer());
        let kptr = ty(
            Kind::Pointer {
                to: "kptr Struct bpf_kvm_irq".to_string(),
                is_tagged: true,
            },
            8,
        );
        let holder = structure(vec![field("irq", 0, array(kptr, 2))], 16);
        assert!(holder.has_tagged_pointer());
    }
}
