// SPDX-License-Identifier: Apache-2.0 OR MIT

//! [`State`] as JSON; the module [`state`](super) says how it looks.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::io::Write;
use std::path::Path;

use serde::de::value::SeqAccessDeserializer;
use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

use super::{
    Clock, Error, Identity, MAX_DEPTH, MAX_FILE_SIZE, MAX_VALUES, MapState, Result, State, Value,
    Zeroes,
};
use crate::file::{read_start, write_whole};

/// What is in [`State`]'s JSON, and the newest version of it.
const FORMAT: &str = "kvm-bpf-state";
const VERSION: u32 = 1;

/// Which format something has: all that is known of one that is newer.
#[derive(Deserialize)]
struct Kind {
    format: String,
    version: u64,
}

impl Kind {
    fn check(&self) -> std::result::Result<(), String> {
        let Kind { format, version } = self;
        match format == FORMAT && *version == u64::from(VERSION) {
            true => Ok(()),
            false => Err(format!(
                "format {format:?}, version {version}, instead of {FORMAT:?}, {VERSION}"
            )),
        }
    }
}

/// [`State`] as it is written, in the order of the alphabet.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Envelope {
    clock: Clock,
    device: Identity,
    format: String,
    maps: Vec<NamedMap>,
    version: u32,
    #[serde(default, skip_serializing_if = "Zeroes::is_empty")]
    zeroes: Zeroes,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct NamedMap {
    name: String,
    schema: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    types: Vec<String>,
    values: Vec<Value>,
}

impl From<State> for Envelope {
    fn from(state: State) -> Self {
        let named = |(name, map): (_, MapState)| NamedMap {
            name,
            schema: map.schema,
            types: map.types,
            values: map.values,
        };
        Envelope {
            clock: state.clock,
            device: state.device,
            format: FORMAT.to_string(),
            maps: state.maps.into_iter().map(named).collect(),
            version: VERSION,
            zeroes: state.zeroes,
        }
    }
}

impl TryFrom<Envelope> for State {
    type Error = String;

    fn try_from(envelope: Envelope) -> std::result::Result<Self, String> {
        let kind = Kind {
            format: envelope.format,
            version: envelope.version.into(),
        };
        kind.check()?;
        let mut maps = BTreeMap::new();
        for map in envelope.maps {
            let state = MapState {
                schema: map.schema,
                types: map.types,
                values: map.values,
            };
            match maps.entry(map.name) {
                Entry::Vacant(entry) => entry.insert(state),
                Entry::Occupied(entry) => return Err(format!("map {:?} twice", entry.key())),
            };
        }
        Ok(State {
            clock: envelope.clock,
            device: envelope.device,
            maps,
            zeroes: envelope.zeroes,
        })
    }
}

/// 64-bit numbers of which readers may round the greater ones.
pub(super) mod number {
    use super::*;
    use serde::Serializer;

    pub fn serialize<S: Serializer>(
        number: &u64,
        serializer: S,
    ) -> std::result::Result<S::Ok, S::Error> {
        Value::from_number((*number).into()).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> std::result::Result<u64, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let number = value.to_number().and_then(|number| number.try_into().ok());
        number.ok_or_else(|| de::Error::custom("not a number of 64 bits"))
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct OfValue;

        impl<'de> Visitor<'de> for OfValue {
            type Value = Value;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("true, false, a whole number, text, a list or fields")
            }

            fn visit_bool<E>(self, value: bool) -> std::result::Result<Value, E> {
                Ok(Value::Bool(value))
            }

            fn visit_i64<E>(self, value: i64) -> std::result::Result<Value, E> {
                Ok(Value::from_number(value.into()))
            }

            fn visit_u64<E>(self, value: u64) -> std::result::Result<Value, E> {
                Ok(Value::from_number(value.into()))
            }

            fn visit_str<E>(self, value: &str) -> std::result::Result<Value, E> {
                Ok(Value::Text(value.to_string()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> std::result::Result<Value, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(list)).map(Value::List)
            }

            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<Value, A::Error> {
                let mut fields = BTreeMap::new();
                while let Some((name, value)) = map.next_entry::<String, _>()? {
                    if fields.contains_key(&name) {
                        return Err(de::Error::custom(format!("field {name:?} twice")));
                    }
                    fields.insert(name, value);
                }
                Ok(Value::Fields(fields))
            }
        }

        deserializer.deserialize_any(OfValue)
    }
}

impl State {
    /// Reads JSON.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        let failed = |error: serde_json::Error| Error::Json(error.into());
        check_size(json, MAX_VALUES)?;
        // First: another format may have other fields.
        let kind: Kind = serde_json::from_slice(json).map_err(failed)?;
        kind.check().map_err(|why| failed(de::Error::custom(why)))?;
        serde_json::from_slice(json).map_err(failed)
    }

    /// Writes JSON, the same text for the same state.
    pub fn to_json(&self) -> Result<Vec<u8>> {
        let mut json =
            serde_json::to_vec_pretty(self).map_err(|error| Error::Json(error.into()))?;
        json.push(b'\n');
        // What is written can be read.
        check_size(&json, MAX_VALUES)?;
        Ok(json)
    }

    /// Reads a file of JSON: a regular one of at most [`MAX_FILE_SIZE`] bytes.
    pub fn from_file(path: &Path) -> Result<Self> {
        let json = read_start(path, MAX_FILE_SIZE + 1).map_err(Error::File)?;
        Self::from_json(&json)
    }

    /// Writes JSON into a file that only its owner may read, as [`write_whole`] does: it takes the
    /// place of an older one, which stays on an error.
    pub fn to_file(&self, path: &Path) -> Result<()> {
        let json = self.to_json()?;
        write_whole(path, Error::File, |mut file| {
            file.write_all(&json).map_err(Error::File)
        })
    }
}

/// Refuses JSON that has more than a state, or something with several states in it, before it takes
/// memory: more bytes, more levels, or more than so many values.
pub fn check_size(json: &[u8], max_values: usize) -> Result<()> {
    match json.len() as u64 <= MAX_FILE_SIZE && check_json(json, max_values, MAX_DEPTH) {
        true => Ok(()),
        false => Err(Error::Size { max_values }),
    }
}

/// Whether JSON has no more than so many values and levels.
pub(crate) fn check_json(json: &[u8], max_values: usize, max_depth: usize) -> bool {
    let (mut depth, mut values, mut in_text) = (0_usize, 0, false);
    let mut bytes = json.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => in_text = !in_text,
            b'\\' if in_text => {
                bytes.next();
            }
            _ if in_text => {}
            b'[' | b'{' => (depth, values) = (depth + 1, values + 1),
            b']' | b'}' => depth = depth.saturating_sub(1),
            b',' => values += 1,
            _ => {}
        }
        if depth > max_depth || values > max_values {
            return false;
        }
    }
    true
}
