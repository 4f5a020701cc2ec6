// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Which maps of a running device go on when its programs are replaced.

use std::fmt;

use crate::note::Note;
use crate::programs::{Error, Map, Programs};
use crate::schema::{self, Line, Type};
use crate::sys;

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
#[non_exhaustive]
pub struct MapChanges {
    /// They keep their content.
    pub carried: Vec<String>,
    /// They have the content by the names of its fields: the device loads the state of the running
    /// one.
    pub converted: Vec<String>,
    /// They start anew: the running device has none of that name, or it could not be carried over.
    pub fresh: Vec<String>,
    /// The new programs have none of that name.
    pub dropped: Vec<String>,
}

impl MapChanges {
    /// Whether the vCPUs must be paused for it.
    pub fn needs_pause(&self) -> bool {
        !self.converted.is_empty()
    }
}

impl fmt::Display for MapChanges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for (what, maps) in [
            ("carried over", &self.carried),
            ("converted", &self.converted),
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

/// A map that does not belong to the programs, and all that must be the same for another to go on
/// with its content.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Layout {
    /// Its name, or the section whose global data it holds.
    pub name: String,
    pub facts: Vec<Line>,
    /// What its values are, where the object says so.
    pub value: Type,
    pub entries: usize,
    /// Whether it is state that user space saves: it can map it.
    pub is_state: bool,
    /// Whether others have it too.
    pub is_shared: bool,
    /// What in its values runs later by itself.
    pub runs_later: Option<String>,
}

impl Layout {
    /// Of a map of which nothing is known but what the kernel says, so that only the map itself can
    /// go on. None for one that no program can change, and for a table of programs.
    pub fn unknown(map: &Map) -> Option<Self> {
        let is_fixed = map.flags() & sys::BPF_F_RDONLY_PROG != 0
            || map.map_type() == sys::map_type::PROG_ARRAY;
        (!is_fixed).then(|| Layout {
            name: map.name().to_string(),
            facts: Vec::new(),
            value: Type::bytes(map.value_size() as usize),
            entries: map.max_entries() as usize,
            is_state: false,
            is_shared: false,
            runs_later: None,
        })
    }

    /// Whether anything says what is in it.
    pub fn is_known(&self) -> bool {
        !self.facts.is_empty()
    }

    /// Has it be a map that others have too, and so no state of the device.
    pub fn share(&mut self) {
        self.is_shared = true;
        self.is_state = false;
    }

    /// Why a map like this cannot go on with the content of one like `old`: by a field, where one
    /// differs.
    pub fn difference(&self, old: &Self) -> Option<String> {
        if !old.is_known() || !self.is_known() {
            return Some("nothing says what is in it".to_string());
        }
        let by = |has_parts| {
            let [old, new] = [old, self].map(|layout| layout.texts(has_parts));
            schema::difference(&old, &new)
        };
        by(false).or_else(|| by(true))
    }

    /// The facts that have parts, or those that have none.
    fn texts(&self, has_parts: bool) -> Vec<&str> {
        let facts = self.facts.iter();
        facts
            .filter(|fact| fact.has_parts == has_parts)
            .map(|fact| fact.text.as_str())
            .collect()
    }
}

/// What one has of the programs that run and of those that are to.
pub(crate) struct Side<'a> {
    pub note: &'a Note,
    pub layouts: &'a [Layout],
    pub reads: bool,
    pub writes: bool,
}

/// What becomes of the maps of `old` with new programs. `why_not` says why a map cannot be carried
/// over, with what a map of the same name is to be.
pub(crate) fn plan(
    old: &Side<'_>,
    new: &Side<'_>,
    on_loss: OnLoss,
    why_not: impl Fn(&Layout, &Layout) -> Option<String>,
) -> Result<MapChanges, Error> {
    if on_loss == OnLoss::Refuse {
        if old.reads && !new.reads {
            return Err(Error::LostDirection("reads"));
        }
        if old.writes && !new.writes {
            return Err(Error::LostDirection("writes"));
        }
    }
    let mut changes = MapChanges::default();
    let loads = new.note.loads_state_of(old.note);
    for old in old.layouts {
        let new = new.layouts.iter().find(|new| new.name == old.name);
        let why = match new {
            Some(new) => why_not(old, new),
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
    let names = new.layouts.iter().map(|new| new.name.clone());
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

    let runs_on =
        |layout: &&Layout| layout.runs_later.is_some() && changes.carried.contains(&layout.name);
    // "restore" does it for one that is converted.
    let stops = match changes.needs_pause() {
        false => "replaced",
        true => "restore",
    };
    if on_loss == OnLoss::Refuse
        && let Some(layout) = new.layouts.iter().find(runs_on)
        && new.note.work_index(stops).is_none()
    {
        return Err(Error::RunsOn {
            map: layout.name.clone(),
            what: layout.runs_later.clone().unwrap_or_default(),
            stops,
        });
    }
    Ok(changes)
}

impl Programs {
    pub(crate) fn side(&self) -> Side<'_> {
        Side {
            note: self.note(),
            layouts: self.layouts(),
            reads: self.read_program().is_some(),
            writes: self.write_program().is_some(),
        }
    }
}

/// What becomes of the maps of running programs: carried over is what both have.
pub(crate) fn changes(
    old: &Programs,
    new: &Programs,
    on_loss: OnLoss,
) -> Result<MapChanges, Error> {
    let id = |programs: &Programs, name: &str| programs.map(name).map(|map| map.info.id);
    plan(
        &old.side(),
        &new.side(),
        on_loss,
        |old_layout, new_layout| {
            let name = &old_layout.name;
            if id(old, name) == id(new, name) {
                return None;
            }
            let other = || "the new programs have another map of that name".to_string();
            Some(new_layout.difference(old_layout).unwrap_or_else(other))
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_told_first() {
        let layout = |facts: &[(&str, bool)]| Layout {
            name: "state".to_string(),
            facts: facts
                .iter()
                .map(|&(text, has_parts)| Line {
                    text: text.to_string(),
                    has_parts,
                })
                .collect(),
            value: Type::bytes(8),
            entries: 1,
            is_state: false,
            is_shared: false,
            runs_later: None,
        };
        let old = layout(&[("8 bytes", true), ("value.a at bit 0", false)]);
        assert_eq!(old.difference(&old), None);
        let new = layout(&[
            ("16 bytes", true),
            ("value.a at bit 0", false),
            ("value.b at bit 64", false),
        ]);
        let why = new.difference(&old).unwrap();
        assert_eq!(why, "it lacks value.b at bit 64, which the new one has");
        let why = old.difference(&new).unwrap();
        assert_eq!(why, "it has value.b at bit 64, which the new one lacks");
        // The rest, where all fields are the same.
        let new = layout(&[("16 bytes", true), ("value.a at bit 0", false)]);
        let why = new.difference(&old).unwrap();
        assert_eq!(why, "it has 8 bytes, the new one 16 bytes");
    }

    #[test]
    fn changes_are_told_by_kind() {
        let mut changes = MapChanges::default();
        assert_eq!(changes.to_string(), "no maps");
        changes.carried = vec!["a".to_string(), ".bss".to_string()];
        assert_eq!(changes.to_string(), "carried over: a, .bss");
        changes.dropped = vec!["b".to_string()];
        assert_eq!(changes.to_string(), "carried over: a, .bss; dropped: b");
        changes.converted = vec!["c".to_string()];
        let text = "carried over: a, .bss; converted: c; dropped: b";
        assert_eq!(changes.to_string(), text);
    }
}
