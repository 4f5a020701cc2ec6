// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Pages of a device that the guest reads without an exit, and all that must be the same without.
//!
//! Where the host can have none, the tests see that the library says so, and look at the values.

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use kvm_bindings::kvm_enable_cap;
use kvm_bpf::{ImageDevice, Map, NoSlot, OnLoss, OpenImage, Programs, image, programs};
use kvm_bpf_selftests::bpf::{Census, RunCounts};
use kvm_bpf_selftests::guest::{Args, Exit, Guest, Routine, Vcpu, mask};
use kvm_bpf_selftests::harness::{Random, meanwhile, number_from_env, skip, unpaused};
use kvm_bpf_selftests::programs::{loaded, plug, sample, test_image, test_path};
use kvm_ioctls::VmFd;

use super::{ADDR, PATTERN, SIZE};

tests!(
    loads_run_no_program,
    stores_change_what_loads_see,
    same_values_without_a_slot,
    swap_while_vcpus_read,
    the_same_map_keeps_its_slot,
    removal_while_vcpus_read,
    the_slot_goes_with_the_device,
    wrong_maps_are_refused,
    places_without_a_slot,
    the_host_decides,
    #[cfg(target_arch = "aarch64")]
    protected_guests_have_none,
    tagged_guests_have_none,
);

/// The slot of the guest's RAM is 0.
const SLOT: u32 = 1;

/// Registers of `samples/devices/pagebank.bpf.c`.
const ID: u64 = ADDR;
const SCRATCH: u64 = ADDR + 0x08;
const WRITES: u64 = ADDR + 0x10;
const SELECT: u64 = ADDR + 0x18;
const CHOICE: u64 = ADDR + 0x1c;
const REGISTERS_END: u64 = 0x20;

/// Register ID, with VERSION above it, of a version of the device.
fn identity(version: u64) -> u64 {
    version << 32 | 0x4b42_5050
}

/// Whether the host can have slots of maps, by the rules of the documents.
fn has_slots(vm: &VmFd) -> bool {
    const KVM_CAP_READONLY_MEM: libc::c_ulong = 81;
    const KVM_CAP_ARM_CACHEABLE_PFNMAP_SUPPORTED: libc::c_ulong = 243;

    vm.check_extension_raw(KVM_CAP_READONLY_MEM) > 0
        && (cfg!(target_arch = "x86_64")
            || vm.check_extension_raw(KVM_CAP_ARM_CACHEABLE_PFNMAP_SUPPORTED) > 0)
}

/// The bank at [`ADDR`], with its slot where the host has such.
struct Setup {
    device: ImageDevice,
    guest: Guest,
    has_slot: bool,
}

impl Setup {
    fn new() -> Self {
        let guest = Guest::new();
        let mut device = plug(guest.vm(), ADDR, sample("pagebank"));
        let result = set_page(&mut device, guest.vm(), SLOT);
        let has_slot = has_slots(guest.vm());
        assert_got!(
            result.is_ok(),
            has_slot,
            "{result:?}: whether there is a slot"
        );
        let page = &device.read_pages()[0];
        assert_got!((page.addr(), page.size()), (ADDR, SIZE), "the page");
        assert_got!(page.slot(), has_slot.then_some(SLOT), "its slot");
        let said = page.why_no_slot().map(ToString::to_string);
        assert_got!(said, result.err(), "why it has none");
        Setup {
            device,
            guest,
            has_slot,
        }
    }

    /// For what means nothing without.
    fn with_slot() -> Self {
        let setup = Self::new();
        if !setup.has_slot {
            skip("the host can have no slots of maps, and the library says so");
        }
        setup
    }
}

/// Has the guest read the device's page through a slot, or says why not.
fn set_page(device: &mut ImageDevice, vm: &VmFd, slot: u32) -> Result<(), String> {
    device
        .set_read_page(vm, 0, slot)
        .map_err(ToString::to_string)
}

/// Reads, which no exit to user space may serve.
#[track_caller]
fn value(vcpu: &mut Vcpu, addr: u64, width: usize) -> u64 {
    let read = vcpu.read(addr, width);
    assert_got!(read.exits, [], "exits of a {width}-byte read at {addr:#x}");
    read.value
}

/// A page of a device as the kernel has it now.
fn page_of(map: &Map) -> Vec<u8> {
    let page = map.lookup(&[0; 4]);
    page.expect("BPF_MAP_LOOKUP_ELEM").expect("element 0")
}

fn writes_in(map: &Map) -> u64 {
    let page = page_of(map);
    u64::from_ne_bytes(page[0x10..0x18].try_into().expect("eight bytes"))
}

fn page_map(image: &Programs) -> Map {
    let map = image.map(".data.page").expect("the page's map");
    map.try_clone().expect("another handle of it")
}

/// Loads neither leave the guest nor run a program; without a slot each does both.
fn loads_run_no_program() {
    const LOADS: u64 = 20_000;

    let mut setup = Setup::with_slot();
    let mut vcpu = setup.guest.vcpu(0);
    let counts = RunCounts::start();
    let mut cost = |device: &ImageDevice, addr| {
        // Faults the page in, and caches what KVM knows of it.
        assert_got!(value(&mut vcpu, addr, 4), identity(1) & mask(4));
        let program = device.programs().read_program().expect("a read program");
        let before = (vcpu.exits(), counts.of(program));
        let args = Args {
            addr,
            count: LOADS,
            ..Default::default()
        };
        let (results, exits) = vcpu.call(Routine::ReadLoop, args);
        assert_got!((results.count, exits), (0, vec![]), "loads at {addr:#x}");
        (vcpu.exits() - before.0, counts.of(program) - before.1)
    };
    let (exits, runs) = cost(&setup.device, ID);
    assert_got!(runs, 0, "runs of the read program");
    // Those of the loop's end, and of the host's own interrupts.
    assert!(exits < LOADS / 20, "{LOADS} loads had {exits} exits");

    setup.device.unset_read_page(0).expect("no slot");
    let (exits, runs) = cost(&setup.device, ID);
    assert_got!(runs, LOADS, "runs of the read program without a slot");
    assert!(
        exits >= LOADS,
        "{LOADS} loads without a slot had {exits} exits"
    );
}

/// Each store runs the write program once, and the next load sees what it has done.
fn stores_change_what_loads_see() {
    let setup = Setup::with_slot();
    let mut vcpu = setup.guest.vcpu(0);
    let counts = RunCounts::start();
    let image = setup.device.programs();
    let runs = || {
        let (read, write) = (image.read_program(), image.write_program());
        [read, write].map(|program| counts.of(program.expect("a program")))
    };
    assert_got!(value(&mut vcpu, CHOICE, 4), 0x1111_1111, "CHOICE at first");
    for (select, choice) in [(1, 0x2222_2222), (2, 0x3333_3333), (3, 0), (0, 0x1111_1111)] {
        assert_got!(vcpu.write(SELECT, 4, select), []);
        assert_got!(value(&mut vcpu, CHOICE, 4), choice, "CHOICE of {select}");
        assert_got!(value(&mut vcpu, SELECT, 4), 0, "SELECT");
    }
    for (number, width) in (5..).zip([8, 4, 2, 1]) {
        let data = PATTERN.rotate_left(number as u32) & mask(width);
        assert_got!(vcpu.write(SCRATCH, width, data), []);
        assert_got!(value(&mut vcpu, SCRATCH, width), data, "{width} bytes");
        assert_got!(value(&mut vcpu, WRITES, 8), number, "WRITES");
    }
    assert_got!(runs(), [0, 8], "runs of the read and the write program");
}

/// A bank with its slot, one without, and the map of either: the same bytes for the same stores, of
/// every width and at every offset.
fn same_values_without_a_slot() {
    let seed = number_from_env("KVM_BPF_SEED", 1);
    let accesses = number_from_env("KVM_BPF_ACCESSES", 5000);
    let mut random = Random::new(seed);

    let setup = Setup::new();
    let other = ADDR + 0x10_0000;
    let without = plug(setup.guest.vm(), other, sample("pagebank"));
    let mut vcpu = setup.guest.vcpu(0);
    for number in 0..accesses {
        let width = [1, 2, 4, 8][random.below(4) as usize];
        let mut offset = match random.below(8) {
            0 => random.below(SIZE - 8),
            1 => SIZE - width as u64,
            2 => SELECT - ADDR,
            _ => random.below(REGISTERS_END),
        };
        // The others do not reach KVM on arm64: a guest without MMU takes a fault.
        if !cfg!(target_arch = "x86_64") || random.below(2) == 0 {
            offset &= !(width as u64 - 1);
        }
        let what = format!("access {number} of seed {seed}: {width} bytes at {offset:#x}");
        if random.below(3) == 0 {
            let data = match random.below(2) {
                0 => random.below(4),
                _ => random.next() << 16 ^ random.next(),
            };
            for addr in [ADDR, other] {
                let exits = vcpu.write(addr + offset, width, data);
                assert_got!(exits, [], "{what}: exits of a store");
            }
        } else {
            let got = value(&mut vcpu, ADDR + offset, width);
            let wanted = value(&mut vcpu, other + offset, width);
            assert_got!(got, wanted, "{what}: with a slot, and without");
            let at = offset as usize;
            let page = page_of(&page_map(setup.device.programs()));
            let mut bytes = [0; 8];
            bytes[..width].copy_from_slice(&page[at..at + width]);
            assert_got!(got, u64::from_le_bytes(bytes), "{what}: as in the map");
        }
    }
    let pages = [&setup.device, &without].map(|device| page_of(&page_map(device.programs())));
    assert_got!(pages[0], pages[1], "both pages in the end");
}

/// So that faults from before there was a slot meet pages that others have mapped since.
const VCPUS: u32 = 4;
const BATCH: u64 = 100;

/// Runs `action` while several vCPUs write and read ID, whose answer must be that of a version of
/// the device, without an exit to user space; returns how often they wrote.
fn under_load(guest: &Guest, action: impl FnOnce()) -> u64 {
    let args = Args {
        value: 1,
        addr: ID,
        count: BATCH,
        pair: [identity(1), identity(2)],
    };
    let written = AtomicU64::new(0);
    let workers = (0..VCPUS).map(|id| {
        let mut vcpu = guest.vcpu(id);
        let written = &written;
        move || {
            let (results, exits) = vcpu.call(Routine::Hammer, args);
            assert_got!(exits, [], "exits of vCPU {id}");
            assert_got!(results.count, 0, "{results:x?} of vCPU {id}: left");
            written.fetch_add(BATCH, SeqCst);
        }
    });
    meanwhile(workers, action);
    written.into_inner()
}

/// The programs and the page are replaced by those of another version, or by the same again, while
/// vCPUs use them: every load has a value of one version, every store runs one program once.
fn swap_while_vcpus_read() {
    let census = Census::now();
    let swaps = number_from_env("KVM_BPF_SWAPS", 1000) / 50;
    let Setup {
        mut device,
        guest,
        has_slot,
    } = Setup::new();
    let mut maps = vec![page_map(device.programs())];
    let mut exchanged = 0;
    let mut vcpu = guest.vcpu(VCPUS);
    let written = under_load(&guest, || {
        for swap in 1..=swaps {
            // 2, 2, 1, 1: each second time the map goes on.
            let (version, image) = match swap.div_ceil(2) % 2 {
                1 => (2, test_image("pagebank_v2")),
                _ => (1, sample("pagebank")),
            };
            let before = device.read_pages()[0].host_addr();
            let changes = device.replace(image, OnLoss::Accept, unpaused);
            let changes = changes.unwrap_or_else(|error| panic!("swap {swap}: {error:#?}"));
            let page = &device.read_pages()[0];
            assert_got!(
                page.slot(),
                has_slot.then_some(SLOT),
                "slot after swap {swap}"
            );
            let goes_on = changes.carried.contains(&".data.page".to_string());
            assert_got!(
                goes_on,
                swap % 2 == 0,
                "{changes}: swap {swap}, the map goes on"
            );
            assert_got!(
                page.host_addr() == before,
                goes_on,
                "swap {swap}: its address"
            );
            if !goes_on {
                maps.push(page_map(device.programs()));
                exchanged += 1;
            }
            // From here on nothing is the old version's.
            assert_got!(value(&mut vcpu, ID, 8), identity(version), "swap {swap}");
            assert_got!(vcpu.write(SCRATCH, 8, swap), []);
            assert_got!(value(&mut vcpu, SCRATCH, 8), swap, "SCRATCH");
        }
    });
    assert_got!(exchanged, swaps.div_ceil(2), "exchanges of the map");
    let counted: u64 = maps.iter().map(writes_in).sum();
    assert_got!(counted, written + swaps, "stores that ran a program");
    drop((device, guest, vcpu, maps));
    census.wait_for_newer(0, 0);
}

/// New programs with the same page leave its slot alone, and its content.
fn the_same_map_keeps_its_slot() {
    let Setup {
        mut device, guest, ..
    } = Setup::with_slot();
    let mut vcpu = guest.vcpu(0);
    assert_got!(vcpu.write(SCRATCH, 8, PATTERN), []);
    let before = device.read_pages()[0].host_addr();
    let counts = RunCounts::start();
    device
        .replace(sample("pagebank"), OnLoss::Refuse, unpaused)
        .unwrap_or_else(|error| panic!("wanted the same device to do, got {error:#?}"));
    let page = &device.read_pages()[0];
    assert_got!(
        (page.slot(), page.host_addr()),
        (Some(SLOT), before),
        "the page"
    );
    assert_got!(value(&mut vcpu, SCRATCH, 8), PATTERN, "SCRATCH");
    let program = device.programs().read_program().expect("a read program");
    assert_got!(counts.of(program), 0, "runs of the new read program");

    // What does not replace it leaves all as it was.
    let error = device.replace(test_image("pagebank_v2"), OnLoss::Refuse, unpaused);
    error.expect_err("another page is a loss");
    assert_got!(value(&mut vcpu, SCRATCH, 8), PATTERN, "SCRATCH");
    assert_got!(device.read_pages()[0].slot(), Some(SLOT), "the slot");
}

/// The slot comes and goes while vCPUs use the page.
fn removal_while_vcpus_read() {
    let Setup {
        mut device, guest, ..
    } = Setup::with_slot();
    let changes = number_from_env("KVM_BPF_SWAPS", 1000) / 50;
    let written = under_load(&guest, || {
        for number in 0..changes {
            device.unset_read_page(0).expect("no slot");
            assert_got!(device.read_pages()[0].slot(), None, "slot, time {number}");
            // Also where there is none.
            device.unset_read_page(0).expect("no slot");
            let slot = SLOT + number as u32 % 2;
            let set = device.set_read_page(guest.vm(), 0, slot);
            set.unwrap_or_else(|why| panic!("time {number}: {why}"));
            // In another slot than before, too.
            if number % 3 == 0 {
                let set = device.set_read_page(guest.vm(), 0, slot + 2);
                set.unwrap_or_else(|why| panic!("time {number}: {why}"));
            }
        }
    });
    let map = page_map(device.programs());
    assert_got!(writes_in(&map), written, "stores that ran a program");
}

/// Without the device nothing is there, also for a guest that runs on.
fn the_slot_goes_with_the_device() {
    let census = Census::now();
    let setup = Setup::new();
    let mut vcpu = setup.guest.vcpu(0);
    assert_got!(value(&mut vcpu, ID, 8), identity(1));
    drop(setup.device);
    assert_got!(vcpu.read(ID, 8).exits, [Exit::Read(ID, 8)]);
    assert_got!(vcpu.write(ID, 8, 1), [Exit::Write(ID, 8, 1)]);
    // The number is free again, and so is the address.
    let mut next = plug(setup.guest.vm(), ADDR, sample("pagebank"));
    let set = next.set_read_page(setup.guest.vm(), 0, SLOT);
    assert_got!(set.is_ok(), setup.has_slot, "{set:?}");
    assert_got!(value(&mut vcpu, ID, 8), identity(1));
    drop(next);
    census.wait_for_newer(0, 0);
}

/// What the note names must be an array that can be mapped, of whole pages that have room.
fn wrong_maps_are_refused() {
    /// Kind and length of the item.
    const ITEM: &[u8] = &[3, 0, 32, 0];
    const OFFSET: usize = ITEM.len() + 8;
    const NAME: usize = OFFSET + 8;

    let file = fs::read(test_path("page_maps")).expect("the test's device");
    let name = file.windows(5).position(|window| window == b"good\0");
    let item = (0..file.len())
        .filter(|&at| file[at..].starts_with(ITEM) && file[at + NAME..].starts_with(b"good\0"))
        .collect::<Vec<_>>();
    let [item] = item[..] else {
        panic!("wanted one read page, got {item:x?}; the name is at {name:x?}");
    };
    let with = |map: &str, offset: u64| {
        let mut file = file.clone();
        let field = &mut file[item + NAME..item + NAME + 16];
        field.fill(0);
        field[..map.len()].copy_from_slice(map.as_bytes());
        file[item + OFFSET..item + OFFSET + 8].copy_from_slice(&offset.to_le_bytes());
        OpenImage::open("page_maps", &file)
            .unwrap_or_else(|error| panic!("{map} at {offset:#x}: {error:#?}"))
    };
    for (map, offset) in [("good", SIZE), ("words", SIZE), ("good", 0), ("large", 0)] {
        let image = loaded(with(map, offset));
        assert_got!(image.note().read_pages[0].map, map, "the page's map");
    }
    for (map, offset, wanted) in [
        ("nowhere", SIZE, "there is no such map"),
        ("hash", SIZE, "it is no array, but of type 1"),
        ("per_cpu", SIZE, "it is no array, but of type 6"),
        ("not_mapped", SIZE, "it has no flag BPF_F_MMAPABLE"),
        (
            "small",
            SIZE,
            "1 elements of 8 bytes are no whole pages of 0x1000 bytes",
        ),
        (
            "padded",
            SIZE,
            "1024 elements of 4 bytes are no whole pages of 0x1000 bytes",
        ),
        (
            "large",
            SIZE,
            "its 0x2000 bytes are more than the 0x1000 that region 0 has from 0x1000 on",
        ),
    ] {
        match with(map, offset).load() {
            Err(image::Error::Programs(programs::Error::ReadPage { map: name, why }))
                if name == map && why == wanted => {}
            result => panic!("{map}: wanted {wanted:?}, got {result:?}"),
        }
    }
    // The kernel's word, which it gives when the map is there.
    match with("locked", SIZE).load() {
        Err(image::Error::Programs(programs::Error::MapReadPage { map, .. }))
            if map == "locked" => {}
        result => panic!("locked: wanted MapReadPage, got {result:?}"),
    }
    // A host without slots would have nothing for loads.
    match test_image("page_unread").load() {
        Err(image::Error::Programs(programs::Error::ReadPage { map, why }))
            if map == "page" && why.starts_with("no read program") => {}
        result => panic!("wanted a read program to be missing, got {result:?}"),
    }
}

/// Where no slot can be the library says why, and the read program gives the values.
fn places_without_a_slot() {
    let setup = Setup::with_slot();
    let guest = &setup.guest;
    let mut vcpu = guest.vcpu(0);
    let plug_at = |addr| plug(guest.vm(), addr, sample("pagebank"));

    // In the middle of a page.
    let addr = ADDR + 0x10_0800;
    let mut device = plug_at(addr);
    match device.set_read_page(guest.vm(), 0, SLOT + 1) {
        Err(NoSlot::PartsOfPages {
            addr: at,
            size,
            page,
        }) if (*at, *size, *page) == (addr, SIZE, SIZE) => {}
        why => panic!("wanted parts of pages, got {why:?}"),
    }
    let said = device.read_pages()[0].why_no_slot();
    assert!(
        matches!(said, Some(NoSlot::PartsOfPages { .. })),
        "{said:?}"
    );
    assert_got!(value(&mut vcpu, addr, 8), identity(1));

    // No such slot; one that another page has; and one over the guest's RAM.
    let refused = |why: Result<(), &NoSlot>, wanted| match why {
        Err(NoSlot::Refused { error, .. }) if error.raw_os_error() == Some(wanted) => {}
        why => panic!("wanted error {wanted}, got {why:?}"),
    };
    let addr = ADDR + 0x20_0000;
    let mut device = plug_at(addr);
    refused(device.set_read_page(guest.vm(), 0, 0x7fff), libc::EINVAL);
    refused(device.set_read_page(guest.vm(), 0, SLOT), libc::EINVAL);
    assert_got!(value(&mut vcpu, addr, 8), identity(1));
    assert_got!(value(&mut vcpu, ID, 8), identity(1));
    let mut over_ram = plug_at(0x4000);
    let why = over_ram.set_read_page(guest.vm(), 0, SLOT + 1);
    refused(why, libc::EEXIST);

    // A swap tries again what was refused before.
    assert_got!(set_page(&mut device, guest.vm(), SLOT + 2), Ok(()));
    device
        .replace(test_image("pagebank_v2"), OnLoss::Accept, unpaused)
        .unwrap_or_else(|error| panic!("wanted the next version to do, got {error:#?}"));
    assert_got!(device.read_pages()[0].slot(), Some(SLOT + 2));
    assert_got!(value(&mut vcpu, addr, 8), identity(2));
}

/// The library sets a slot where the host's capabilities allow it, and nowhere else.
fn the_host_decides() {
    let setup = Setup::new();
    let mut vcpu = setup.guest.vcpu(0);
    let why = setup.device.read_pages()[0].why_no_slot();
    println!("slots of maps: {}", setup.has_slot);
    match why {
        None => assert!(setup.has_slot),
        Some(NoSlot::Uncached) if cfg!(target_arch = "aarch64") => {}
        Some(NoSlot::NoReadOnlyMemory) => {}
        why => panic!("wanted what the host lacks, got {why:?}"),
    }
    assert_got!(value(&mut vcpu, ID, 8), identity(1));
}

#[cfg(target_arch = "aarch64")]
fn protected_guests_have_none() {
    let guest = Guest::protected();
    let mut device = plug(guest.vm(), ADDR, sample("pagebank"));
    let why = device.set_read_page(guest.vm(), 0, SLOT);
    assert!(matches!(why, Err(NoSlot::NoReadOnlyMemory)), "{why:?}");
    let page = &device.read_pages()[0];
    assert_got!(page.slot(), None);
    let why = page.why_no_slot();
    assert!(matches!(why, Some(NoSlot::NoReadOnlyMemory)), "{why:?}");
}

/// Memory of a map has no tags, which all memory of such a guest must have.
fn tagged_guests_have_none() {
    const KVM_CAP_ARM_MTE: u32 = 205;

    let guest = Guest::new();
    let cap = kvm_enable_cap {
        cap: KVM_CAP_ARM_MTE,
        ..Default::default()
    };
    if !cfg!(target_arch = "aarch64") || guest.vm().enable_cap(&cap).is_err() {
        skip("the host has no memory tags");
    }
    let mut device = plug(guest.vm(), ADDR, sample("pagebank"));
    let why = device.set_read_page(guest.vm(), 0, SLOT);
    match why {
        Err(NoSlot::Refused { slot: SLOT, error })
            if error.raw_os_error() == Some(libc::EINVAL) => {}
        why => panic!("wanted it refused, got {why:?}"),
    }
    let why = device.read_pages()[0].why_no_slot().expect("no reason");
    assert!(why.to_string().contains("tagging"), "{why}");
    assert_got!(value(&mut guest.vcpu(0), ID, 8), identity(1));
}
