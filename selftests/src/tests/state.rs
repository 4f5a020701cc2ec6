// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What is saved of a device, and restored elsewhere.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use kvm_bpf::device::Error;
use kvm_bpf::{ImageDevice, OnLoss, Programs, State, image, state};
use kvm_bpf_selftests::guest::Guest;
use kvm_bpf_selftests::harness::{
    Random, forbid_bpf, number_from_env, skip, status_of_a_process, trial_within, unpaused,
};
use kvm_bpf_selftests::programs::{plug, test_image};
use libtest_mimic::Trial;
use serde_json::{Map, Value, json};

use super::{ADDR, beside_this_program};

tests!(
    as_bpftool_says,
    of_another_device,
    of_another_layout,
    with_less_room,
    of_a_newer_version,
    any_text,
    without_bpf,
    timers_need_a_program,
    work_has_a_name,
);

/// What a debug kernel needs more time for.
pub(super) fn slow() -> Vec<Trial> {
    let limit = Duration::from_secs(1200);
    [trial_within("state::undone", limit, undone)].into()
}

/// The maps with state and how many entries they have.
const MAPS: [(&str, u32); 6] = [
    (".bss", 1),
    (".data", 1),
    (".data.own", 1),
    ("changing", 1),
    ("kinds", 3),
    ("raw", 2),
];

/// A device, without a vCPU.
struct Setup {
    device: ImageDevice,
    _guest: Guest,
}

impl Setup {
    fn new(file: &str) -> Self {
        let guest = Guest::new();
        Setup {
            device: plug(guest.vm(), ADDR, test_image(file)),
            _guest: guest,
        }
    }

    #[track_caller]
    fn save(&self) -> State {
        match self.device.save() {
            Ok(state) => state,
            Err(error) => panic!("wanted the device to be saved, got {error:#?}"),
        }
    }

    #[track_caller]
    fn restore(&mut self, state: &State) {
        if let Err(error) = self.device.restore(state) {
            panic!("wanted the device to be restored, got {error:#?}");
        }
    }

    /// Fails unless the state is refused, for that reason, and the device goes on as it was.
    #[track_caller]
    fn assert_refused(&mut self, state: &State, wanted: &str) {
        let before = contents(self.device.programs());
        match self.device.restore(state) {
            Err(Error::State(error)) if error.to_string().contains(wanted) => {}
            other => panic!("wanted {wanted:?}, got {other:#?}"),
        }
        assert_got!(contents(self.device.programs()), before, "maps, {wanted}");
    }

    /// Puts random bytes into all maps; every so often such as there are many of.
    fn fill(&self, random: &mut Random) {
        let (and, or) = match random.below(6) {
            0 => (0, 0),
            1 => (0xff, 0xff),
            2 => (1, 0),
            3 => (0x7f, 0x20),
            _ => (0xff, 0),
        };
        for (name, entries) in MAPS {
            let map = self.device.programs().map(name).expect("the map");
            for entry in 0..entries {
                let bytes: Vec<_> = (0..map.value_size())
                    .map(|_| random.next() as u8 & and | or)
                    .collect();
                map.update(&entry.to_ne_bytes(), &bytes)
                    .expect("BPF_MAP_UPDATE_ELEM");
            }
        }
    }
}

/// All bytes of all maps, as bpf(2) has them.
fn contents(image: &Programs) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for (name, entries) in MAPS {
        let map = image.map(name).expect("the map");
        for entry in 0..entries {
            let bytes = map.lookup(&entry.to_ne_bytes());
            all.extend(bytes.expect("BPF_MAP_LOOKUP_ELEM"));
        }
    }
    all
}

/// What bpftool says of the entries of a map.
fn dumped(image: &Programs, name: &str) -> Vec<Value> {
    let map = image.map(name).expect("the map");
    let id = map.id();
    let output = beside_this_program("bpftool")
        .args(["--json", "map", "dump", "id", &id.to_string()])
        .output()
        .expect("bpftool");
    assert!(output.status.success(), "bpftool: {output:?}");
    let entries: Value = serde_json::from_slice(&output.stdout).expect("JSON from bpftool");
    let value = |entry: &Value| match entry.get("formatted") {
        Some(formatted) => formatted["value"].clone(),
        None => entry["value"].clone(),
    };
    let entries = entries.as_array().expect("a list of entries");
    entries.iter().map(value).collect()
}

/// A state's text, without the clocks, which go on.
fn json_of(state: &State) -> Value {
    let text = state.to_json().expect("text of the state");
    let mut json: Value = serde_json::from_slice(&text).expect("JSON of the state");
    json.as_object_mut().expect("an object").remove("clock");
    json
}

/// A number, as it is or as text; bpftool's of bits have no sign, its of an enum always.
fn number(value: &Value) -> Option<i128> {
    match value {
        Value::Number(number) => number.to_string().parse().ok(),
        Value::String(text) => match text.strip_prefix("0x") {
            Some(digits) => i128::from_str_radix(digits, 16).ok(),
            None => text.parse().ok(),
        },
        Value::Bool(is_set) => Some((*is_set).into()),
        _ => None,
    }
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let byte = |at| u8::from_str_radix(text.get(at..at + 2)?, 16).ok();
    (0..text.len()).step_by(2).map(byte).collect()
}

/// Whether a value of ours says the same as one of bpftool's.
fn is_same(ours: &Value, theirs: &Value) -> bool {
    match (ours, theirs) {
        (Value::Object(ours), Value::Object(theirs)) => {
            let of_theirs = |(name, ours): (&String, &Value)| match name.as_str() {
                // bpftool has a field without a name.
                "inside" => is_same(ours, &theirs[""][name]),
                "word|half" => {
                    let bytes = ours.as_str().and_then(from_hex).expect("bytes");
                    let word = u32::from_le_bytes(bytes.try_into().expect("4 bytes"));
                    theirs[""]["word"] == json!(word) && theirs[""]["half"] == json!(word as u16)
                }
                _ => theirs.get(name).is_some_and(|theirs| is_same(ours, theirs)),
            };
            let is_known =
                |name: &String| name.is_empty() || name == "pointer" || ours.contains_key(name);
            ours.iter().all(of_theirs) && theirs.keys().all(is_known)
        }
        (Value::Array(ours), Value::Array(theirs)) => {
            let mut pairs = ours.iter().zip(theirs);
            ours.len() == theirs.len() && pairs.all(|(ours, theirs)| is_same(ours, theirs))
        }
        (Value::String(ours), Value::Array(theirs)) => {
            let bytes: Option<Vec<_>> = theirs
                .iter()
                .map(|byte| number(byte).map(|byte| byte as u8))
                .collect();
            from_hex(ours) == bytes && bytes.is_some()
        }
        _ if ours == theirs => true,
        (Value::String(digits), Value::String(text)) if !text.starts_with("0x") => {
            let wanted = [text.as_bytes(), &[0]].concat();
            from_hex(digits).is_some_and(|bytes| bytes.starts_with(&wanted))
        }
        _ => match (number(ours), number(theirs)) {
            (Some(ours), Some(theirs)) => {
                // Of the two, one takes the highest bit for a sign.
                let (less, more) = (ours.min(theirs), ours.max(theirs));
                let is_without_sign = |bits: u32| less + (1 << bits) == more;
                less == more || less < 0 && (1..=64).any(is_without_sign)
            }
            _ => false,
        },
    }
}

/// Random values of every kind, compared with the kernel's bpftool; in another device they are
/// the same, and so is its text.
fn as_bpftool_says() {
    let mut random = Random::new(number_from_env("KVM_BPF_SEED", 1));
    let first = Setup::new("state");
    let mut other = Setup::new("state");
    for round in 0..12 {
        first.fill(&mut random);
        other.fill(&mut random);
        let state = first.save();
        let json = json_of(&state);
        let saved: BTreeMap<_, _> = json["maps"]
            .as_array()
            .expect("a list of maps")
            .iter()
            .map(|map| (map["name"].as_str().expect("a name"), &map["values"]))
            .collect();
        let names: Vec<_> = saved.keys().copied().collect();
        assert_got!(names, MAPS.map(|(name, _)| name), "maps that are saved");

        let text = state.to_json().expect("text of the state");
        let read = State::from_json(&text).expect("the state from its text");
        assert_got!(read, state, "round {round}: the state from its text");
        other.restore(&read);
        for (name, _) in MAPS {
            let mut dump = dumped(first.device.programs(), name);
            let restored = dumped(other.device.programs(), name);
            // A pointer is not saved.
            let without_pointers = |dump: &[Value]| {
                let text = serde_json::to_string(dump).expect("JSON");
                let mut parts = text.split("\"pointer\":");
                let first = parts.next().unwrap_or_default().to_string();
                parts.fold(first, |all, part| {
                    all + part.trim_start_matches(|letter: char| letter != '}')
                })
            };
            assert_got!(
                without_pointers(&restored),
                without_pointers(&dump),
                "round {round}: what bpftool says of {name}"
            );
            // Of a section it says a list of variables, below its name.
            if name.starts_with('.') {
                let variables = dump[0][name].as_array().expect("a list of variables");
                let merged: Map<_, _> = variables
                    .iter()
                    .filter_map(Value::as_object)
                    .flat_map(Map::clone)
                    .collect();
                dump = vec![Value::Object(merged)];
            }
            let (ours, theirs) = (saved[name], Value::Array(dump));
            assert!(
                is_same(ours, &theirs),
                "round {round}: {name}: wanted {theirs}, got {ours}"
            );
        }
        assert_got!(json_of(&other.save()), json, "round {round}: saved again");
    }
}

fn of_another_device() {
    let state = Setup::new("state").save();
    let mut other = Setup::new("state");
    let mut changed = state.clone();
    changed.device.compatible[0] = "kvm-bpf,test".to_string();
    other.assert_refused(&changed, "of another device");
    changed = state.clone();
    changed.device.nr_irqs = 3;
    other.assert_refused(&changed, "of another device");
    changed = state.clone();
    changed.device.regions[0].size = 0x800;
    other.assert_refused(&changed, "of another device");
    changed = state.clone();
    let map = changed.maps.remove("kinds").expect("the map");
    other.assert_refused(&changed, "kinds: the state has no such map");
    changed.maps.insert("more".to_string(), map.clone());
    changed.maps.insert("kinds".to_string(), map);
    other.assert_refused(&changed, "more: the device has no such map");
    other.restore(&state);
}

/// Sets a field of the only entry of the map that changes.
fn set(state: &mut State, field: &str, value: state::Value) {
    let map = state.maps.get_mut("changing").expect("the map");
    let state::Value::Fields(fields) = &mut map.values[0] else {
        panic!("wanted fields, got {map:?}");
    };
    fields.insert(field.to_string(), value);
}

fn get<'a>(state: &'a State, map: &str, field: &str) -> Option<&'a state::Value> {
    match &state.maps[map].values[0] {
        state::Value::Fields(fields) => fields.get(field),
        other => panic!("wanted fields, got {other:?}"),
    }
}

/// A list of numbers.
fn list<const N: usize>(numbers: [i64; N]) -> state::Value {
    state::Value::List(numbers.map(state::Value::Number).into())
}

fn of_another_layout() {
    use state::Value::{Number, Text};

    let mut state = Setup::new("state").save();
    set(&mut state, "count", Number(77));
    set(&mut state, "numbers", list([1, 2, 3]));
    set(&mut state, "removed", Number(0));
    set(&mut state, "name", Text("01020304".to_string()));

    let reason = "changing: it has value.count at bit 0: 32 bits, unsigned, \
                  the new one value.count at bit 0: 64 bits, unsigned";
    Setup::new("state_changed").assert_refused(&state, reason);

    let mut second = Setup::new("state_v2");
    second.fill(&mut Random::new(1));
    second.restore(&state);
    let went_on = second.save();
    assert_got!(went_on.device.state_version, 2);
    for (map, field, wanted) in [
        ("changing", "count", Number(77)),
        ("changing", "numbers", list([1, 2, 3, 0])),
        ("changing", "name", Text("01020304".to_string())),
        // What is new is as in a new device.
        ("changing", "added", Number(0)),
        (".data", "later", Number(11)),
        (".data", "preset", Number(7)),
    ] {
        assert_got!(get(&went_on, map, field), Some(&wanted), "{field}");
    }
    assert_got!(get(&went_on, "changing", "removed"), None);
    for map in [".bss", ".data.own", "kinds", "raw"] {
        assert_got!(went_on.maps[map], state.maps[map], "{map}");
    }

    set(&mut state, "removed", Number(1));
    second.assert_refused(
        &state,
        "changing[0].removed: there is no such field any more",
    );
    set(&mut state, "removed", Number(0));
    set(&mut state, "name", Number(1));
    second.assert_refused(&state, "changing[0].name: 1 is not 4 bytes");
    set(&mut state, "name", Text("0102030405".to_string()));
    second.assert_refused(&state, "changing[0].name");
    set(&mut state, "name", Text("0102030400".to_string()));
    second.restore(&state);
}

fn with_less_room() {
    use state::Value::Number;

    let mut state = Setup::new("state").save();
    let mut narrow = Setup::new("state_narrow");
    for (count, numbers, wanted) in [
        (255, [1, 0, 0], None),
        (
            256,
            [1, 0, 0],
            Some("changing[0].count: 256 is not a number of 8 bits, unsigned"),
        ),
        (-1, [1, 0, 0], Some("changing[0].count: -1 is not")),
        (
            0,
            [1, 0, 1],
            Some("changing[0].numbers[2]: there is no such element any more"),
        ),
    ] {
        set(&mut state, "count", Number(count));
        set(&mut state, "numbers", list(numbers));
        match wanted {
            Some(reason) => narrow.assert_refused(&state, reason),
            None => narrow.restore(&state),
        }
    }
}

fn of_a_newer_version() {
    let state = Setup::new("state_v2").save();
    let reason = "the state has version 2, the device loads 0 to 0";
    Setup::new("state").assert_refused(&state, reason);
}

/// Something in a tree of JSON becomes something else.
fn change(value: &mut Value, random: &mut Random) {
    let inner = match value {
        Value::Array(list) if !list.is_empty() => {
            let at = random.below(list.len() as u64) as usize;
            list.get_mut(at)
        }
        Value::Object(fields) if !fields.is_empty() => {
            let at = random.below(fields.len() as u64) as usize;
            fields.values_mut().nth(at)
        }
        _ => None,
    };
    if let Some(inner) = inner
        && random.below(8) != 0
    {
        return change(inner, random);
    }
    let other = match random.below(12) {
        0 => json!(null),
        1 => json!(true),
        2 => json!(-1),
        3 => json!(u64::MAX),
        4 => json!(0.5),
        5 => json!("0x"),
        6 => json!("340282366920938463463374607431768211456"),
        7 => json!("\u{0}\u{ffff}"),
        8 => json!([[], {}]),
        9 => json!({ "count": 1 }),
        10 => json!("zz"),
        _ => json!("00"),
    };
    match value {
        Value::Array(list) if random.below(2) == 0 => list.push(other),
        Value::Object(fields) if random.below(2) == 0 => {
            fields.insert("count".to_string(), other);
        }
        _ => *value = other,
    }
}

/// A few bytes of a text become others, more or less.
fn damage(text: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..=random.below(3) {
        let at = random.below(text.len() as u64) as usize;
        let end = text.len().min(at + random.below(16) as usize);
        match random.below(4) {
            0 => text[at] ^= 1 << random.below(8),
            1 => text[at] = b"\"\\{}[],:-0e."[random.below(12) as usize],
            2 => drop(text.drain(at..end)),
            _ => {
                let copy = text[at..end].to_vec();
                text.splice(at..at, copy);
            }
        }
        if text.is_empty() {
            return;
        }
    }
}

/// Whatever the text: no panic, and the maps have what they had, unless all of it was right.
fn any_text() {
    let rounds = number_from_env("KVM_BPF_ACCESSES", 4000);
    let mut random = Random::new(number_from_env("KVM_BPF_SEED", 1));
    let mut setup = Setup::new("state_v2");
    setup.fill(&mut random);
    let good = setup.save();
    let text = good.to_json().expect("text of the state");
    let tree: Value = serde_json::from_slice(&text).expect("JSON of the state");
    setup.restore(&good);
    let before = contents(setup.device.programs());

    let [mut unread, mut refused, mut restored] = [0; 3];
    for round in 0..rounds {
        let text = match random.below(2) {
            0 => {
                let mut text = text.clone();
                damage(&mut text, &mut random);
                text
            }
            _ => {
                let mut tree = tree.clone();
                change(&mut tree, &mut random);
                serde_json::to_vec(&tree).expect("JSON")
            }
        };
        let Ok(state) = State::from_json(&text) else {
            unread += 1;
            continue;
        };
        match setup.device.restore(&state) {
            Err(_) => refused += 1,
            Ok(()) => {
                restored += 1;
                setup.restore(&good);
            }
        }
        assert_got!(
            contents(setup.device.programs()),
            before,
            "round {round}: maps"
        );
    }
    println!("{unread} are no state, {refused} are refused, {restored} are restored");
    assert!(
        [unread, refused, restored].iter().all(|&count| count > 0),
        "wanted some of each, got {unread}, {refused}, {restored}"
    );
}

/// When all is loaded, saving, restoring and a swap are without bpf(2), with WORK programs and a
/// conversion of the state.
fn without_bpf() {
    if !Path::new("/proc/sys/kernel/seccomp").exists() {
        skip("a kernel without CONFIG_SECCOMP_FILTER");
    }
    let status = status_of_a_process(|| {
        forbid_bpf().expect("a filter");
        // SAFETY: the kernel kills the process.
        unsafe { libc::syscall(libc::SYS_bpf, -1, 0, 0) };
    });
    assert!(
        libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSYS,
        "wanted SIGSYS, got status {status:#x}"
    );

    let status = status_of_a_process(|| {
        let mut setup = Setup::new("state");
        setup.fill(&mut Random::new(1));
        let replacement = setup
            .device
            .load(test_image("state"), OnLoss::Refuse)
            .expect("the same programs");
        let mut works = Setup::new("convert");
        let converting = works
            .device
            .load(test_image("convert_v2"), OnLoss::Refuse)
            .expect("programs with other types");
        forbid_bpf().expect("a filter");
        let state = setup.save();
        let text = state.to_json().expect("text of the state");
        setup.restore(&State::from_json(&text).expect("the state from its text"));
        setup
            .device
            .swap(replacement, OnLoss::Refuse, unpaused)
            .expect("the swap");
        assert_got!(json_of(&setup.save()), json_of(&state), "after the swap");
        setup.restore(&state);

        let counts = |works: &Setup, names: [&str; 3]| {
            let json = json_of(&works.save());
            names.map(|name| json["maps"][0]["values"][0][name].as_u64())
        };
        let names = ["saved", "restored", "replaced"];
        assert_got!(counts(&works, names), [Some(1), Some(0), Some(0)]);
        works.device.resume().expect("a run of \"restore\"");
        let mut pauses = 0;
        let changes = works.device.swap(converting, OnLoss::Refuse, |swap| {
            pauses += 1;
            swap();
        });
        assert_got!(changes.expect("a conversion").converted, ["counts"]);
        assert_got!(pauses, 1, "pauses");
        // "save" of the old programs, "restore" and "save" of the new ones.
        assert_got!(counts(&works, names), [Some(3), Some(2), Some(0)]);
    });
    assert_got!(status, 0, "the process under a filter");
}

fn timers_need_a_program() {
    let guest = Guest::new();
    let device = plug(guest.vm(), ADDR, test_image("state_timer"));
    match device.save() {
        Err(Error::State(state::Error::TimersWithoutSave { map, what }))
            if (map.as_str(), what.as_str()) == ("alarm", "bpf_timer") => {}
        other => panic!("wanted its timer to be in the way, got {other:#?}"),
    }
}

/// The note and the sections name the same programs.
fn work_has_a_name() {
    match test_image("work_unnamed").load() {
        Err(image::Error::UnnamedWork(name)) if name == "reset" => {}
        other => panic!("wanted UnnamedWork, got {other:#?}"),
    }
    match test_image("work_missing").load() {
        Err(image::Error::MissingWork(name)) if name == "reset" => {}
        other => panic!("wanted MissingWork, got {other:#?}"),
    }
}

/// A device whose "restore" does not end, as the library finds after a million runs, keeps what its
/// maps had, whatever that program has put there.
fn undone() {
    let mut random = Random::new(1);
    let other = Setup::new("state");
    other.fill(&mut random);
    let state = other.save();
    let mut endless = Setup::new("state_endless");
    endless.fill(&mut random);
    let before = contents(endless.device.programs());
    match endless.device.restore(&state) {
        Err(Error::Endless(name)) if name == "restore" => {}
        result => panic!("wanted a restore without an end, got {result:#?}"),
    }
    assert_got!(contents(endless.device.programs()), before, "maps");
    // It has run, and seen what was restored.
    let seen = super::element(endless.device.programs(), "scratch");
    let count = get(&state, "changing", "count");
    let wanted = state::Value::Number(i64::from_ne_bytes(seen.try_into().expect("8 bytes")));
    assert_got!(count, Some(&wanted), "what \"restore\" has seen");
}
