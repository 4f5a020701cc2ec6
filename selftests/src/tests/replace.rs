// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a new file keeps of the device that it replaces: all of it, or the file is refused.

use std::fs;
use std::sync::RwLock;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use kvm_bpf::device::Error;
use kvm_bpf::{ImageDevice, Map, MapChanges, OnLoss, OpenImage, Programs, programs, state};
use kvm_bpf_selftests::bpf::Census;
use kvm_bpf_selftests::guest::{Args, Exit, Guest, Routine, Vcpu};
use kvm_bpf_selftests::harness::{in_a_thread, meanwhile, stay_on, unpaused, wait_for};
use kvm_bpf_selftests::programs::{plug, test_image, test_path};

use super::ADDR;

tests!(
    the_same_state_goes_on,
    another_name_of_the_object,
    swapped_fields,
    a_field_of_another_kind,
    one_field_more,
    other_flags,
    another_extra,
    a_map_less,
    a_map_more,
    another_global_variable,
    a_map_that_is_shared,
    a_direction_less,
    again_and_again,
    converted_under_load,
    converted_or_not_at_all,
    what_runs_on_is_refused,
    no_old_callback_runs,
);

const FIRST: u64 = 0x00;
const SECOND: u64 = 0x08;
const OTHER: u64 = 0x10;
const ZEROED: u64 = 0x18;
const PRESET: u64 = 0x20;
const VERSION: u64 = 0x28;

/// Every register with state, what the test writes to it, and what a new device has there.
const REGISTERS: [(u64, u64, u64); 5] = [
    (FIRST, 11, 0),
    (SECOND, 22, 0),
    (OTHER, 33, 0),
    (ZEROED, 44, 0),
    (PRESET, 55, 7),
];

/// All maps with state.
const MAPS: [&str; 4] = [".bss", ".data", "other", "state"];

/// The device of `progs/carry.bpf.c`, with state.
struct Setup {
    device: ImageDevice,
    vcpu: Vcpu,
    _guest: Guest,
}

impl Setup {
    fn new() -> Self {
        let guest = Guest::new();
        let mut setup = Setup {
            device: plug(guest.vm(), ADDR, test_image("carry")),
            vcpu: guest.vcpu(0),
            _guest: guest,
        };
        for (register, value, first) in REGISTERS {
            setup.assert_has(register, first);
            assert_got!(setup.vcpu.write(ADDR + register, 8, value), []);
        }
        setup.assert_state(1, &[]);
        setup
    }

    #[track_caller]
    fn assert_has(&mut self, register: u64, wanted: u64) {
        let read = self.vcpu.read(ADDR + register, 8);
        let got = (read.value, read.exits);
        assert_got!(got, (wanted, vec![]), "register {register:#x}");
    }

    /// Fails unless all registers have what was written, but for those that are as new.
    #[track_caller]
    fn assert_state(&mut self, version: u64, fresh: &[u64]) {
        self.assert_has(VERSION, version);
        for (register, value, first) in REGISTERS {
            let is_fresh = fresh.contains(&register);
            self.assert_has(register, if is_fresh { first } else { value });
        }
    }

    #[track_caller]
    fn replace(&mut self, image: OpenImage, on_loss: OnLoss) -> MapChanges {
        match self.device.replace(image, on_loss, unpaused) {
            Ok(changes) => changes,
            Err(error) => panic!("wanted the device to be replaced, got {error:#?}"),
        }
    }

    /// Fails unless the file is refused because that map would be lost, for that reason, and the
    /// device goes on.
    #[track_caller]
    fn assert_refused(&mut self, file: &str, wanted_map: &str, reason: &str) {
        let census = Census::now();
        match self
            .device
            .replace(test_image(file), OnLoss::default(), unpaused)
        {
            Err(Error::Programs(programs::Error::LostMap { map, why }))
                if map == wanted_map && why.contains(reason) => {}
            result => panic!("{file}: wanted {wanted_map} and {reason:?}, got {result:#?}"),
        }
        self.assert_state(1, &[]);
        census.wait_for_newer(0, 0);
    }

    /// Replaces the device though something is lost: those maps start anew.
    #[track_caller]
    fn assert_accepted(&mut self, file: &str, fresh: &[&str], dropped: &[&str]) {
        let changes = self.replace(test_image(file), OnLoss::Accept);
        let kept = |map: &&str| !fresh.contains(map) && !dropped.contains(map);
        let carried: Vec<_> = MAPS.into_iter().filter(kept).collect();
        assert_got!(changes.carried, carried, "{file}: carried");
        assert_got!(changes.fresh, fresh, "{file}: fresh");
        assert_got!(changes.dropped, dropped, "{file}: dropped");
    }
}

/// With another version of the programs and what is theirs, and other names for types.
fn the_same_state_goes_on() {
    let mut setup = Setup::new();
    let changes = setup.replace(test_image("carry_v2"), OnLoss::Refuse);
    assert_got!(changes.carried, MAPS, "carried");
    assert_got!((changes.fresh, changes.dropped), (vec![], vec![]));
    setup.assert_state(2, &[]);
}

/// Global data are found by their sections.
fn another_name_of_the_object() {
    let file = fs::read(test_path("carry_v2")).expect("the next version");
    let mut setup = Setup::new();
    for name in ["x", "a.name.with.dots", "one_that_is_cut_by_libbpf"] {
        let image = OpenImage::open(name, &file).expect("an object");
        let changes = setup.replace(image, OnLoss::Refuse);
        assert_got!(changes.carried, MAPS, "carried");
        setup.assert_state(2, &[]);
    }
}

/// The size is the same, and what a field means is not.
fn swapped_fields() {
    let mut setup = Setup::new();
    let reason = "value.first at bit 0: 32 bits, unsigned, the new one value.second at bit 0";
    setup.assert_refused("carry_swapped", "state", reason);
    setup.assert_accepted("carry_swapped", &["state"], &[]);
    setup.assert_state(1, &[FIRST, SECOND]);
}

fn a_field_of_another_kind() {
    let mut setup = Setup::new();
    let reason = "value.second at bit 32: 32 bits, unsigned, the new one value.second at bit 32: \
                  32 bits, signed";
    setup.assert_refused("carry_retyped", "state", reason);
    setup.assert_accepted("carry_retyped", &["state"], &[]);
    setup.assert_state(1, &[FIRST, SECOND]);
}

fn one_field_more() {
    let mut setup = Setup::new();
    let reason = "it lacks value.third at bit 64: 32 bits, unsigned, which the new one has";
    setup.assert_refused("carry_grown", "state", reason);
    setup.assert_accepted("carry_grown", &["state"], &[]);
    setup.assert_state(1, &[FIRST, SECOND]);
}

/// A map whose flags are others cannot do what the new programs' VMM may want of it.
fn other_flags() {
    let mut setup = Setup::new();
    setup.assert_refused("carry_flags", "state", "flags 0x0, the new one flags 0x400");
    setup.assert_accepted("carry_flags", &["state"], &[]);
    setup.assert_state(1, &[FIRST, SECOND]);
}

/// What a map has beyond its sizes and flags, as the hashes of a filter: others would not find what
/// it has.
fn another_extra() {
    const VALUE: u64 = 0x48;

    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let mut device = plug(guest.vm(), ADDR, test_image("filter"));
    let mut has = |wanted| {
        let read = vcpu.read(ADDR + VALUE, 8);
        assert_got!(
            (read.value, read.exits),
            (wanted, vec![]),
            "seen {VALUE:#x}"
        );
        vcpu.write(ADDR, 8, VALUE)
    };
    assert_got!(has(0), []);
    let changes = device.replace(test_image("filter"), OnLoss::Refuse, unpaused);
    assert_got!(changes.expect("the same").carried, ["seen"], "carried");
    assert_got!(has(1), []);
    match device.replace(test_image("filter_hashes"), OnLoss::Refuse, unpaused) {
        Err(Error::Programs(programs::Error::LostMap { map, why }))
            if map == "seen" && why.contains("extra 0x3, the new one extra 0x5") => {}
        result => panic!("wanted the number of hashes to be missed, got {result:#?}"),
    }
    assert_got!(has(1), []);
    let changes = device.replace(test_image("filter_hashes"), OnLoss::Accept, unpaused);
    assert_got!(changes.expect("accepted").fresh, ["seen"], "fresh");
    assert_got!(has(0), []);
}

fn a_map_less() {
    let mut setup = Setup::new();
    setup.assert_refused("carry_removed", "other", "none of that name");
    setup.assert_accepted("carry_removed", &[], &["other"]);
    setup.assert_state(1, &[OTHER]);
}

/// Nothing is lost by that.
fn a_map_more() {
    let mut setup = Setup::new();
    setup.assert_accepted("carry_removed", &[], &["other"]);
    let changes = setup.replace(test_image("carry"), OnLoss::Refuse);
    assert_got!(changes.carried, [".bss", ".data", "state"], "carried");
    assert_got!(changes.fresh, ["other"], "fresh");
    setup.assert_state(1, &[OTHER]);
}

fn another_global_variable() {
    let mut setup = Setup::new();
    setup.assert_refused("carry_variables", ".bss", "variable zeroed at byte 0");
    setup.assert_accepted("carry_variables", &[".bss"], &[]);
    setup.assert_state(1, &[ZEROED]);
}

/// A map that the new file shares is not one that the running device has, unless it is the same.
fn a_map_that_is_shared() {
    let sharing = |map: &Map| {
        let mut image = test_image("carry_v2");
        image.share_map("other", map).expect("another one's map");
        image
    };
    let other_guest = Guest::new();
    let other = plug(other_guest.vm(), ADDR, test_image("carry"));
    let theirs = other.programs().map("other").expect("the map");
    let value = 66_u64.to_ne_bytes();
    theirs.update(&[0; 4], &value).expect("a value");

    let mut setup = Setup::new();
    match setup
        .device
        .replace(sharing(theirs), OnLoss::Refuse, unpaused)
    {
        Err(Error::Programs(programs::Error::LostMap { map, .. })) if map == "other" => {}
        result => panic!("wanted other to be lost, got {result:#?}"),
    }
    setup.assert_state(1, &[]);

    let changes = setup.replace(sharing(theirs), OnLoss::Accept);
    assert_got!(changes.carried, [".bss", ".data", "state"], "carried");
    assert_got!(changes.fresh, ["other"], "fresh");
    setup.assert_has(OTHER, 66);
    let own = setup.device.programs().map("other").expect("the map");
    assert_got!(own.id(), theirs.id(), "number of the map");

    // Both are the same now; and so it goes on if nobody says more.
    for image in [sharing(theirs), test_image("carry")] {
        let changes = setup.replace(image, OnLoss::Refuse);
        assert_got!(changes.carried, MAPS, "carried");
        setup.assert_has(OTHER, 66);
    }
    let own = setup.device.programs().map("other").expect("the map");
    assert_got!(own.id(), theirs.id(), "number of the map");
}

/// Without a program for writes they would exit to the VMM.
fn a_direction_less() {
    let census = Census::now();
    let mut setup = Setup::new();
    let result = setup
        .device
        .replace(test_image("carry_read_only"), OnLoss::Refuse, unpaused);
    match result {
        Err(Error::Programs(programs::Error::LostDirection("writes"))) => {}
        result => panic!("wanted LostDirection, got {result:#?}"),
    }
    assert_got!(setup.vcpu.write(ADDR + FIRST, 8, 11), []);
    setup.assert_state(1, &[]);

    setup.assert_accepted("carry_read_only", &[], &[]);
    let exits = setup.vcpu.write(ADDR + FIRST, 8, 12);
    assert_got!(exits, [Exit::Write(ADDR + FIRST, 8, 12)]);
    setup.assert_state(1, &[]);
    // One more is no loss.
    setup.replace(test_image("carry"), OnLoss::Refuse);
    assert_got!(setup.vcpu.write(ADDR + FIRST, 8, 11), []);
    setup.assert_state(1, &[]);
    drop(setup);
    census.wait_for_newer(0, 0);
}

/// A map that was carried over once is compared as what it was at first.
fn again_and_again() {
    let mut setup = Setup::new();
    for (file, version) in [("carry_v2", 2), ("carry", 1), ("carry", 1), ("carry_v2", 2)] {
        let changes = setup.replace(test_image(file), OnLoss::Refuse);
        assert_got!(changes.carried, MAPS, "{file}: carried");
        setup.assert_state(version, &[]);
    }
    setup.replace(test_image("carry"), OnLoss::Refuse);
    let reason = "value.first at bit 0";
    setup.assert_refused("carry_swapped", "state", reason);
    // What user space finds by name is what the programs use.
    let image: &Programs = setup.device.programs();
    for (section, value) in [(".bss", 44), (".data", 55)] {
        let bytes = super::element(image, section);
        assert_got!(bytes[..8], u64::to_ne_bytes(value), "{section}");
    }
}

/// The registers of `progs/convert.bpf.c`: version, writes, runs of "save", "restore", "replaced".
fn counts(vcpu: &mut Vcpu) -> [u64; 5] {
    [0x00, 0x08, 0x10, 0x18, 0x20].map(|register| {
        let read = vcpu.read(ADDR + register, 8);
        assert_got!(read.exits, [], "exits of register {register:#x}");
        read.value
    })
}

/// vCPUs write while the programs go over to others that have the state in other types: they stop
/// for that, no write is lost, and it is the old "save" and the new "restore" that run.
fn converted_under_load() {
    const VCPUS: u32 = 3;
    const BATCH: u64 = 50;

    let census = Census::now();
    let guest = Guest::new();
    let mut device = plug(guest.vm(), ADDR, test_image("convert"));
    let mut reader = guest.vcpu(VCPUS);
    let written = AtomicU64::new(0);
    // vCPUs are in KVM_RUN with a share of it.
    let running = RwLock::new(());
    let workers = (0..VCPUS).map(|id| {
        let mut vcpu = guest.vcpu(id);
        let (written, running) = (&written, &running);
        move || {
            let _share = running.read().expect("no panic");
            let args = Args {
                value: 1,
                addr: ADDR,
                count: BATCH,
                pair: [1, 2],
            };
            let (results, exits) = vcpu.call(Routine::Hammer, args);
            assert_got!((results.count, exits), (0, vec![]), "vCPU {id}");
            written.fetch_add(BATCH, SeqCst);
        }
    });
    let writes_go_on = || {
        let before = written.load(SeqCst);
        wait_for("more writes", true, || {
            written.load(SeqCst) > before + u64::from(VCPUS) * BATCH
        });
    };
    meanwhile(workers, || {
        writes_go_on();
        let mut pauses = 0;
        let changes = device.replace(test_image("convert_v2"), OnLoss::Refuse, |swap| {
            let _all = running.write().expect("no panic");
            pauses += 1;
            swap();
        });
        let changes = changes.unwrap_or_else(|error| panic!("wanted a conversion, got {error:#?}"));
        assert_got!(pauses, 1, "pauses");
        assert_got!(changes.converted, ["counts"], "converted");
        assert_got!(
            (&changes.carried[..], changes.fresh, changes.dropped),
            (&["kept".to_string()][..], vec![], vec![])
        );
        writes_go_on();
        // The same types: no pause.
        let changes = device.replace(test_image("convert_v2"), OnLoss::Refuse, unpaused);
        assert_got!(
            changes.expect("the same").carried,
            ["counts", "kept"],
            "carried"
        );
        writes_go_on();
    });
    let got = counts(&mut reader);
    assert_got!(got, [2, written.into_inner(), 1, 1, 1], "counts");
    drop((device, reader, guest));
    census.wait_for_newer(0, 0);
}

/// Whatever goes wrong, the device goes on as it was. A map that is the same keeps all its bytes, also
/// those that no field has.
fn converted_or_not_at_all() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let mut device = plug(guest.vm(), ADDR, test_image("convert"));
    assert_got!(vcpu.write(ADDR, 8, 0), []);
    let census = Census::now();
    let kept: [u8; 16] = std::array::from_fn(|at| 0xa0 + at as u8);
    let programs = device.programs();
    programs.fill("kept", [kept]).expect("bytes in the map");
    let assert_kept = |device: &ImageDevice, what| {
        let map = device.programs().map("kept").expect("the map");
        assert_got!(map.value(0).expect("its memory"), kept, "{what}");
    };

    let result = device.replace(test_image("convert_v2"), OnLoss::Refuse, |_| ());
    assert!(matches!(result, Err(Error::NotPaused)), "{result:#?}");
    assert_got!(counts(&mut vcpu), [1, 1, 0, 0, 0], "without a pause");
    census.wait_for_newer(0, 0);

    // The field that is gone counts what has just happened.
    let result = device.replace(test_image("convert_less"), OnLoss::Refuse, |swap| swap());
    match result {
        Err(Error::State(state::Error::Map { path, .. })) if path == "counts[0].saved" => {}
        result => panic!("wanted the field saved to be missed, got {result:#?}"),
    }
    assert_got!(counts(&mut vcpu), [1, 1, 1, 1, 0], "with a field less");
    assert_kept(&device, "with a field less");
    assert_got!(vcpu.write(ADDR, 8, 0), []);
    census.wait_for_newer(0, 0);

    let result = device.replace(test_image("convert_v2"), OnLoss::Refuse, |swap| swap());
    assert_got!(result.expect("a conversion").converted, ["counts"]);
    assert_got!(counts(&mut vcpu), [2, 2, 2, 2, 0], "with a pause");
    assert_kept(&device, "with a pause");

    // The first version does not load what the second one has.
    match device.replace(test_image("convert"), OnLoss::Refuse, unpaused) {
        Err(Error::Programs(programs::Error::LostMap { map, .. })) if map == "counts" => {}
        result => panic!("wanted counts to be lost, got {result:#?}"),
    }
    assert_got!(counts(&mut vcpu), [2, 2, 2, 2, 0], "the way back");
}

/// A timer of the old programs that nothing stops.
fn what_runs_on_is_refused() {
    let guest = Guest::new();
    let mut device = plug(guest.vm(), ADDR, test_image("state_timer"));
    match device.replace(test_image("state_timer"), OnLoss::Refuse, unpaused) {
        Err(Error::Programs(programs::Error::RunsOn {
            map,
            what,
            stops: "replaced",
        })) if (map.as_str(), what.as_str()) == ("alarm", "bpf_timer") => {}
        result => panic!("wanted RunsOn, got {result:#?}"),
    }
    let changes = device.replace(test_image("state_timer"), OnLoss::Accept, unpaused);
    let changes = changes.unwrap_or_else(|error| panic!("wanted it accepted, got {error:#?}"));
    assert_got!(changes.carried, [".bss", "alarm"]);
}

/// The programs of `progs/work_timer.bpf.c`, whose callbacks count as those of a generation.
fn timer(file: &str, generation: u32) -> OpenImage {
    let mut image = test_image(file);
    let set = |value: &mut [u8]| value.copy_from_slice(&generation.to_ne_bytes());
    assert!(image.edit_initial(".rodata", set), "the generation");
    image
}

/// How many callbacks of a generation have begun and ended, in a map of that kind.
fn callbacks(progress: &Map, generation: usize) -> [u64; 2] {
    let value = progress.lookup(&[0; 4]);
    let value = value.expect("BPF_MAP_LOOKUP_ELEM").expect("element 0");
    let word = value.len() / 4;
    [generation, 2 + generation].map(|at| {
        let mut bytes = [0; 8];
        bytes[..word].copy_from_slice(&value[at * word..][..word]);
        u64::from_le_bytes(bytes)
    })
}

/// Callbacks run on one CPU all the time while another one replaces their programs: when that is
/// done, the last old one has ended, new ones run, and nothing is left of the old programs.
fn no_old_callback_runs() {
    /// Those of a file; of the maps, the census knows that of the timer.
    const PROGRAMS: usize = 4;
    const MAPS: usize = 1;

    in_a_thread(|| {
        for (file, is_converted) in [("work_timer", false), ("work_timer_v2", true)] {
            let census = Census::now();
            for round in 0..4 {
                let guest = Guest::new();
                let mut device = plug(guest.vm(), ADDR, timer("work_timer", 0));
                let progress = |device: &ImageDevice| {
                    let map = device.programs().map("progress").expect("the map");
                    map.try_clone().expect("another handle of the map")
                };
                // The callbacks come where the timer has been started.
                stay_on(0);
                device.resume().expect("starting the timer");
                stay_on(1);
                let old = progress(&device);
                wait_for("old callbacks", true, || callbacks(&old, 0)[0] > 2);

                let mut pauses = 0;
                let changes = device.replace(timer(file, 1), OnLoss::Refuse, |swap| {
                    pauses += 1;
                    swap();
                });
                let [begun, ended] = callbacks(&old, 0);
                assert_got!(
                    ended,
                    begun,
                    "{file}: old callbacks that have ended, {round}"
                );
                let changes = changes.expect("replacing");
                let converted: &[&str] = if is_converted { &["progress"] } else { &[] };
                assert_got!(changes.converted, converted, "{file}: converted");
                assert_got!(pauses, converted.len(), "{file}: pauses");

                let new = progress(&device);
                let [before, _] = callbacks(&new, 1);
                wait_for("new callbacks", true, || callbacks(&new, 1)[0] > before + 2);
                // Nor does the new map have any that the old programs have not told "save".
                for map in [&old, &new] {
                    let got = callbacks(map, 0);
                    assert_got!(got, [begun, ended], "{file}: old callbacks, {round}");
                }
                assert_got!(callbacks(&old, 1)[0] == 0, is_converted, "{file}: one map");
                census.wait_for_newer(PROGRAMS, MAPS);
                drop((old, new, device, guest));
                census.wait_for_newer(0, 0);
            }
        }
    });
}
