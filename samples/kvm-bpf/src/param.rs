// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Parameters: array maps that the VMM fills, with values that programs cannot find out.

use crate::note::Note;
use crate::programs::{Error, Map};
use crate::sys::{MapInfo, map_type};

/// The most values of a parameter: all of them are written, with a system call each.
const MAX_VALUES: u32 = 1 << 16;

/// Checks that a file has, for each of its note's parameters, a map that can be it.
pub(crate) fn check(note: &Note, find: impl Fn(&str) -> Option<MapInfo>) -> Result<(), Error> {
    for param in &note.params {
        let refuse = |why: String| {
            Err(Error::Param {
                map: param.name.clone(),
                why,
            })
        };
        let Some(map) = find(&param.name) else {
            return refuse("there is no such map".to_string());
        };
        if map.map_type != map_type::ARRAY {
            return refuse(format!("it is no array, but of type {}", map.map_type));
        }
        if param.name.starts_with(".rodata") || param.name == ".kconfig" {
            return refuse("it holds constants, which the file has".to_string());
        }
        if !matches!(map.value_size, 1 | 2 | 4 | 8) {
            return refuse(format!(
                "its values have {} bytes, not 1, 2, 4 or 8",
                map.value_size
            ));
        }
        if map.max_entries > MAX_VALUES {
            return refuse(format!(
                "{} values, more than {MAX_VALUES}",
                map.max_entries
            ));
        }
    }
    Ok(())
}

/// What a parameter's map is to hold, in the host's byte order: zeroes behind what is given.
pub(crate) fn encode(
    map: &Map,
    values: impl IntoIterator<Item = u64>,
) -> Result<Vec<Vec<u8>>, Error> {
    let (size, max) = (map.value_size() as usize, map.max_entries() as usize);
    let mut bytes = Vec::new();
    for value in values {
        if bytes.len() == max {
            return Err(Error::TooManyValues {
                param: map.name().to_string(),
                max: map.max_entries(),
            });
        }
        let fitting = match size {
            1 => u8::try_from(value).ok().map(|one| one.to_ne_bytes().into()),
            2 => u16::try_from(value)
                .ok()
                .map(|one| one.to_ne_bytes().into()),
            4 => u32::try_from(value)
                .ok()
                .map(|one| one.to_ne_bytes().into()),
            _ => Some(value.to_ne_bytes().to_vec()),
        };
        bytes.push(fitting.ok_or_else(|| Error::ValueTooLarge {
            param: map.name().to_string(),
            index: bytes.len() as u32,
            value,
            bytes: map.value_size(),
        })?);
    }
    bytes.resize(max, vec![0; size]);
    Ok(bytes)
}

/// The names of the parameters that there are, for who looked for another.
pub(crate) fn list(there: &[String]) -> String {
    match there {
        [] => "it has none".to_string(),
        there => format!("only {}", there.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::note::Param;

    fn info(map_type: u32, value_size: u32, max_entries: u32) -> MapInfo {
        MapInfo {
            map_type,
            key_size: 4,
            value_size,
            max_entries,
            ..MapInfo::default()
        }
    }

    fn map(value_size: u32, max_entries: u32) -> Map {
        let file = std::fs::File::open("/dev/null").unwrap();
        let info = info(map_type::ARRAY, value_size, max_entries);
        Map::with_info("table", file.into(), info)
    }

    #[test]
    fn a_parameter_is_an_array_of_numbers() {
        let check = |name: &str, found: Option<MapInfo>| {
            let mut note = Note::default();
            note.params.push(Param {
                name: name.to_string(),
                required: false,
            });
            check(&note, |own| found.filter(|_| own == name)).map_err(|error| error.to_string())
        };
        for size in [1, 2, 4, 8] {
            assert_eq!(check("x", Some(info(map_type::ARRAY, size, 1))), Ok(()));
        }
        assert_eq!(
            check("x", Some(info(map_type::ARRAY, 8, MAX_VALUES))),
            Ok(())
        );
        for (name, found, why) in [
            ("x", None, "there is no such map"),
            (
                "x",
                Some(info(map_type::HASH, 8, 1)),
                "it is no array, but of type 1",
            ),
            (
                "x",
                Some(info(map_type::PERCPU_ARRAY, 8, 1)),
                "it is no array, but of type 6",
            ),
            (
                "x",
                Some(info(map_type::ARRAY, 3, 1)),
                "its values have 3 bytes, not 1, 2, 4 or 8",
            ),
            (
                "x",
                Some(info(map_type::ARRAY, 16, 1)),
                "its values have 16 bytes, not 1, 2, 4 or 8",
            ),
            (
                "x",
                Some(info(map_type::ARRAY, 8, MAX_VALUES + 1)),
                "65537 values, more than 65536",
            ),
            (
                ".rodata",
                Some(info(map_type::ARRAY, 8, 1)),
                "it holds constants, which the file has",
            ),
        ] {
            let wanted = format!("map {name} cannot be a parameter: {why}");
            assert_eq!(check(name, found), Err(wanted));
        }
    }

    #[test]
    fn values_have_the_maps_size() {
        for (size, largest) in [
            (1, u64::from(u8::MAX)),
            (2, u64::from(u16::MAX)),
            (4, u64::from(u32::MAX)),
            (8, u64::MAX),
        ] {
            let own = usize::try_from(size).unwrap();
            let encoded = encode(&map(size, 3), [largest, 1]).unwrap();
            let one = match cfg!(target_endian = "little") {
                true => 1_u64.to_ne_bytes()[..own].to_vec(),
                false => 1_u64.to_ne_bytes()[8 - own..].to_vec(),
            };
            assert_eq!(encoded, [vec![0xff; own], one, vec![0; own]]);
            if size < 8 {
                let error = encode(&map(size, 3), [1, largest + 1]).unwrap_err();
                let wanted = format!(
                    "value 1 of parameter table, {}, does not fit into {size} bytes",
                    largest + 1
                );
                assert_eq!(error.to_string(), wanted);
            }
        }
        assert_eq!(encode(&map(4, 2), []).unwrap(), [[0; 4], [0; 4]]);
        // Of whatever length.
        let error = encode(&map(4, 2), std::iter::repeat(7)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "more than 2 values for parameter table, which has no room for them"
        );
    }

    #[test]
    fn names_are_told() {
        assert_eq!(list(&[]), "it has none");
        assert_eq!(list(&["a".to_string(), "b".to_string()]), "only a, b");
    }
}
