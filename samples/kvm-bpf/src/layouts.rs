// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the maps of an object file are like.

use libbpf_rs::btf::Btf;
use libbpf_rs::{AsRawLibbpf, MapType, OpenMap, OpenObject, libbpf_sys};

use crate::image::{Error, foreign};
use crate::maps::Layout;
use crate::schema::{Line, Type};

/// Structures that make something run later.
const ASYNC: [&str; 3] = ["bpf_timer", "bpf_wq", "bpf_task_work"];
/// Structures that the kernel looks after, so that user space cannot map what has one.
const KERNELS: [&str; 7] = [
    "bpf_spin_lock",
    "bpf_res_spin_lock",
    "bpf_refcount",
    "bpf_list_head",
    "bpf_list_node",
    "bpf_rb_root",
    "bpf_rb_node",
];

impl Layout {
    /// Those of an object's maps that do not belong to its programs. Global data that user space
    /// could map becomes such that it can.
    ///
    /// Of an object that carries no map over yet: libbpf replaces what it knows of such a map by
    /// what the kernel does, with the type ids of the object that created it.
    pub fn of_object(object: &mut OpenObject) -> Result<Vec<Self>, Error> {
        let layouts = Self::read_all(object)?;
        for (at, layout) in layouts.iter().enumerate() {
            if layouts[..at].iter().any(|other| other.name == layout.name) {
                return Err(Error::SameName(layout.name.clone()));
            }
        }
        // libbpf asks for that only where a variable is not static.
        for mut map in object.maps_mut() {
            let full = map.name().to_string_lossy().into_owned();
            let flags = map.map_flags() | libbpf_sys::BPF_F_MMAPABLE;
            let of_map = |layout: &&Layout| layout.name == short_name(&full);
            if layouts
                .iter()
                .find(of_map)
                .is_some_and(Layout::is_plain_data)
            {
                map.set_map_flags(flags)
                    .map_err(|error| Error::Open(foreign(error)))?;
            }
        }
        Self::read_all(object)
    }

    fn read_all(object: &OpenObject) -> Result<Vec<Self>, Error> {
        // SAFETY: the object lives as long as `object` is borrowed.
        let raw = unsafe { object.as_libbpf_object().as_ref() };
        let btf = Btf::from_bpf_object(raw).map_err(|error| Error::Open(foreign(error)))?;
        object
            .maps()
            .filter(|map| map.autocreate() && !belongs_to_programs(map))
            .map(|map| Layout::of_map(&map, btf.as_ref()))
            .collect()
    }

    /// Whether it is a section of global data that can be mapped.
    fn is_plain_data(&self) -> bool {
        let is_data = self.name == ".bss" || self.name.starts_with(".data");
        is_data && self.is_plain()
    }

    /// Whether there is nothing in it that the kernel looks after.
    fn is_plain(&self) -> bool {
        self.runs_later.is_none()
            && self.value.contains(&KERNELS).is_none()
            && !self.value.has_tagged_pointer()
    }

    fn of_map(map: &OpenMap<'_>, btf: Option<&Btf<'_>>) -> Result<Self, Error> {
        let name = short_name(&map.name().to_string_lossy()).to_string();
        let mut facts = Vec::new();
        let Some(values) = add_map(map, btf, "", &mut facts) else {
            return Err(Error::MapTypes(name));
        };
        let is_array = map.map_type() == MapType::Array;
        let runs_later = values.iter().find_map(|ty| ty.contains(&ASYNC));
        // The kernel ignores types of another size.
        let size = map.value_size() as usize;
        let value = values.into_iter().next().filter(|ty| ty.size == size);
        let mut layout = Layout {
            name,
            facts,
            entries: map.max_entries() as usize,
            is_state: is_array && map.map_flags() & libbpf_sys::BPF_F_MMAPABLE != 0,
            is_shared: false,
            runs_later: runs_later.map(str::to_string),
            value: value.unwrap_or_else(|| Type::bytes(size)),
        };
        // The kernel makes such a map with the flag, but lets nobody map it.
        layout.is_state &= layout.is_plain();
        Ok(layout)
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

/// Adds what there is to say of a map: sizes, and what is where in its types. Returns the type of
/// its values, and behind it that of the values of maps inside; none if one is nested too deeply, or
/// holds too much.
fn add_map(
    map: &OpenMap<'_>,
    btf: Option<&Btf<'_>>,
    prefix: &str,
    facts: &mut Vec<Line>,
) -> Option<Vec<Type>> {
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
    let of_map = [
        format!("{prefix}type {:?} ({number})", map.map_type()),
        format!("{prefix}key of {} bytes", map.key_size()),
        format!("{prefix}value of {} bytes", map.value_size()),
        format!("{prefix}{} entries", map.max_entries()),
        format!("{prefix}flags {:#x}", map.map_flags()),
        format!("{prefix}extra {extra:#x}"),
    ];
    facts.extend(of_map.map(Line::whole));
    let mut values = vec![Type::bytes(map.value_size() as usize)];
    for (what, id) in [("key", key), ("value", value)] {
        // 0 is no type: the size has to do then.
        if id != 0 {
            let path = format!("{prefix}{what}");
            let ty = Type::from_btf(btf?, id.into())?;
            ty.describe(&path, &path, facts);
            if what == "value" {
                values[0] = ty;
            }
        }
    }
    if let Some(inner) = inner {
        values.extend(add_map(&OpenMap::new(inner), btf, "inner ", facts)?);
    }
    Some(values)
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
}
