// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The types of an object file's maps, from its BTF.

use libbpf_rs::btf::types::{
    Array, Composite, DataSec, Enum, Enum64, Float, Fwd, Int, IntEncoding, MemberAttr,
};
use libbpf_rs::btf::{Btf, BtfKind, BtfType, HasSize, TypeId};

use crate::schema::{Encoding, Enumerator, Field, Kind, MAX_DEPTH, MAX_PARTS, Type};

impl Type {
    /// The type of that number; none if it is not there, is nested too deeply or holds too much.
    pub fn from_btf(btf: &Btf<'_>, id: TypeId) -> Option<Self> {
        let mut reader = Reader { btf, parts: 0 };
        reader.read(btf.type_by_id(id)?, 0)
    }
}

struct Reader<'a> {
    btf: &'a Btf<'a>,
    parts: usize,
}

impl<'a> Reader<'a> {
    fn by_id(&self, id: TypeId) -> Option<BtfType<'a>> {
        self.btf.type_by_id(id)
    }

    fn count(&mut self, more: usize) -> Option<()> {
        self.parts += more;
        (self.parts <= MAX_PARTS).then_some(())
    }

    fn read(&mut self, ty: BtfType<'a>, depth: usize) -> Option<Type> {
        if depth > MAX_DEPTH {
            return None;
        }
        self.count(1)?;
        let (ty, tags) = look_through(ty)?;
        let depth = depth + 1;
        let (kind, size) = match ty.kind() {
            BtfKind::Int => {
                let int = Int::try_from(ty).ok()?;
                let encoding = match int.encoding {
                    IntEncoding::None => Encoding::Unsigned,
                    IntEncoding::Signed => Encoding::Signed,
                    IntEncoding::Char => Encoding::Char,
                    IntEncoding::Bool => Encoding::Bool,
                };
                let bits = int.bits;
                (Kind::Int { bits, encoding }, int.size())
            }
            BtfKind::Enum | BtfKind::Enum64 => {
                let (is_signed, size, values) = match Enum::try_from(ty) {
                    Ok(all) => {
                        let values = all.iter().map(|one| enumerator(one.name, one.value.into()));
                        (all.is_signed(), all.size(), values.collect::<Vec<_>>())
                    }
                    Err(ty) => {
                        let all = Enum64::try_from(ty).ok()?;
                        let values = all.iter().map(|one| enumerator(one.name, one.value));
                        (all.is_signed(), all.size(), values.collect())
                    }
                };
                self.count(values.len())?;
                (Kind::Enum { is_signed, values }, size)
            }
            BtfKind::Array => {
                let array = Array::try_from(ty).ok()?;
                let element = Box::new(self.read(array.contained_type(), depth)?);
                let count = array.capacity();
                let size = element.size.checked_mul(count)?;
                (Kind::Array { count, element }, size)
            }
            kind @ (BtfKind::Struct | BtfKind::Union) => {
                let composite = Composite::try_from(ty).ok()?;
                let mut fields = Vec::new();
                for member in composite.iter() {
                    let (offset, bits) = match member.attr {
                        MemberAttr::Normal { offset } => (offset, None),
                        MemberAttr::BitField { size, offset } => (offset, Some(size)),
                    };
                    fields.push(Field {
                        name: text(member.name),
                        offset: offset.try_into().ok()?,
                        bits,
                        ty: self.read(self.by_id(member.ty)?, depth)?,
                    });
                }
                let name = name_of(ty);
                let kind = match kind {
                    BtfKind::Struct => Kind::Struct { name, fields },
                    _ => Kind::Union { name, fields },
                };
                (kind, composite.size())
            }
            BtfKind::DataSec => {
                let section = DataSec::try_from(ty).ok()?;
                let mut variables = Vec::new();
                for variable in section.iter() {
                    let ty = self.by_id(variable.ty)?;
                    variables.push(Field {
                        name: name_of(ty),
                        offset: usize::try_from(variable.offset).ok()?.checked_mul(8)?,
                        bits: None,
                        // A variable refers to its type.
                        ty: self.read(ty.next_type()?, depth)?,
                    });
                }
                (Kind::Section(variables), section.size())
            }
            BtfKind::Ptr => {
                let (to, tags) = look_through(ty.next_type()?)?;
                let is_tagged = !tags.is_empty();
                let to = format!("{tags}{:?} {}", to.kind(), name_of(to));
                (Kind::Pointer { to, is_tagged }, size_of::<u64>())
            }
            BtfKind::Fwd => {
                let kind = Fwd::try_from(ty).ok()?.kind();
                let name = format!("undefined {kind:?} {}", name_of(ty));
                (Kind::Bytes(name), 0)
            }
            kind => {
                let size = Float::try_from(ty).map_or(0, |float| float.size());
                (Kind::Bytes(format!("{kind:?} {}", name_of(ty))), size)
            }
        };
        Some(Type { kind, size, tags })
    }
}

fn text(name: Option<&std::ffi::OsStr>) -> String {
    name.unwrap_or_default().to_string_lossy().into_owned()
}

fn name_of(ty: BtfType<'_>) -> String {
    text(ty.name())
}

fn enumerator(name: Option<&std::ffi::OsStr>, value: i128) -> Enumerator {
    let name = text(name);
    Enumerator { name, value }
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
