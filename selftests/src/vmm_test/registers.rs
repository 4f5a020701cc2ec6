// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Devices of which programs serve a part: the VMM has the rest, or nobody; and a page that the
//! guest reads itself.

use kvm_bpf_selftests::vmm::{Finished, fields, program, sample};
use libtest_mimic::Trial;

use super::{AT, accessing, at};

pub fn all() -> Vec<Trial> {
    tests!(
        fallback_takes_what_programs_decline,
        nobody_takes_what_programs_decline,
        guest_reads_a_page_itself,
    )
}

/// Fails unless the guest has read all those from the bank: low digits of the address, bits, value.
#[track_caller]
fn assert_read(got: &Finished, accesses: &[&str]) {
    for access in accesses {
        let [low, bits, value] = fields(access);
        got.assert_has(&format!("ACCESS 0xd00000{low} {bits} read {value}"));
    }
}

/// What the programs decline exits, with the data, and the report counts it.
#[track_caller]
fn half(option: &str) -> Finished {
    let got = accessing(&(at(&program("half_bank"), AT) + option)).run();
    got.assert_well();
    let device = got.device(AT);
    assert_eq!(device["exits"], 6, "exits");
    assert_eq!(device["server"], "bpf", "the server");
    // Four are the programs' own: two of ID, two of TIME.
    let registers = device["registers"].as_array().expect("registers");
    for register in registers {
        let offset = register["offset"].as_u64().expect("an offset");
        assert!(![0, 4, 24].contains(&offset), "exits at offset {offset}");
    }
    assert_read(&got, &["00 32 0x4B425042"]);
    got
}

fn fallback_takes_what_programs_decline() {
    let got = half(",fallback=regbank");
    assert_read(
        &got,
        &[
            "08 64 0x11223344556677AA",
            "28 32 0x00000000",
            "10 64 0x0000000000000006",
        ],
    );
}

fn nobody_takes_what_programs_decline() {
    let got = half("");
    assert_read(&got, &["08 64 0xFFFFFFFFFFFFFFFF", "28 32 0xFFFFFFFF"]);
}

/// The guest's loads are none that the host counts, and its stores are the programs'.  The values
/// are those of either way.
fn guest_reads_a_page_itself() {
    let got = accessing(&at(&sample("pagebank"), AT)).run();
    got.assert_well();
    assert_read(
        &got,
        &[
            "00 32 0x4B425050",
            "04 32 0x00000001",
            "08 64 0x11223344556677AA",
            "0a 16 0x5566",
            "18 64 0x1111111100000000",
            "28 32 0x00000000",
            "10 64 0x0000000000000002",
        ],
    );
    got.assert_no_exits(1);
    assert_reads_itself(&got);
}

/// Fails unless the guest has read the page through a memory slot.
#[track_caller]
pub fn assert_reads_itself(got: &Finished) {
    let pages = &got.device(AT)["read_pages"];
    assert_eq!(pages[0]["slot"], true, "the slot of a page in {pages}");
}
