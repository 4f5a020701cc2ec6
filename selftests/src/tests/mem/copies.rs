// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What calls copy: all of memory against a model, words, the most at once, and random bytes.

use kvm_bpf_selftests::harness::{Random, meanwhile, number_from_env};

use super::super::element;
use super::{
    By, DATA_SIZE, PAGE, RANDOM, READ, READ_NOFAULT, START, Setup, WRITE, WRITE_NOFAULT, pattern,
    request, result,
};

/// Random accesses, against a copy of the memory.
pub(super) fn all_of_memory_as_the_model_says() {
    let seed = number_from_env("KVM_BPF_SEED", 1);
    let count = number_from_env("KVM_BPF_ACCESSES", 2000);
    let mut random = Random::new(seed);
    let mut setup = Setup::new("mem", 4);
    let mut model: Vec<u8> = (0..4 * PAGE).map(pattern).collect();
    setup.pages.fill(model.iter().copied());
    setup.window(0, START, 4 * PAGE as u64, true, true);
    for number in 0..count {
        let len = match random.below(4) {
            0 => 1 << random.below(4),
            1 => random.below(17),
            2 => random.below(600),
            _ => random.below(PAGE as u64 + 1),
        } as usize;
        let offset = match random.below(2) {
            0 => random.below((4 * PAGE - len) as u64) & !7,
            _ => random.below((4 * PAGE - len) as u64 + 1),
        } as usize;
        let by = if random.below(4) == 0 {
            By::Access
        } else {
            By::Run
        };
        let op = random.below(4) as u32;
        let data: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
        let (errno, got) = setup.ask(by, op, START + offset as u64, &data);
        let what = format!("access {number} of seed {seed}: {by:?} {op} {len} at {offset:#x}");
        assert_got!(errno, 0, "{what}");
        if op == WRITE || op == WRITE_NOFAULT {
            model[offset..][..len].copy_from_slice(&data);
        } else {
            assert_got!(got, model[offset..][..len], "{what}");
        }
    }
    assert_got!(setup.pages.bytes(0, 4 * PAGE), model);
}

/// A guest changes all bytes of a word at once, and a program sees one value or the other.
pub(super) fn words_are_whole() {
    let reads = number_from_env("KVM_BPF_ACCESSES", 20_000);

    for (len, pair) in [
        (2, [0x00ff, 0x0100]),
        (4, [0x00ff_ffff, 0x0100_0000]),
        (8, [0x00ff_ffff_ffff_ffff_u64, 0x0100_0000_0000_0000]),
    ] {
        let setup = Setup::new("mem_word", 1);
        setup.window(0, START, PAGE as u64, true, false);
        let data: Vec<u8> = pair
            .iter()
            .flat_map(|word: &u64| word.to_le_bytes())
            .collect();
        let image = setup.device.programs();
        request(image, READ, START + 8, &data);
        let map = image.map("request").expect("the program's map");
        let mut value = element(image, "request");
        value[4..8].copy_from_slice(&(len as u32).to_le_bytes());
        map.update(&[0; 4], &value).expect("BPF_MAP_UPDATE_ELEM");
        let pages = &setup.pages;
        let store = |value: u64| {
            let word = pages.at(8, 8);
            // SAFETY: it is inside, and aligned; each is one store.
            unsafe {
                match len {
                    2 => word.cast::<u16>().write_volatile(value as u16),
                    4 => word.cast::<u32>().write_volatile(value as u32),
                    _ => word.cast::<u64>().write_volatile(value),
                }
            }
        };
        store(pair[0]);
        let torn = meanwhile(
            [|| {
                for _ in 0..100 {
                    store(pair[1]);
                    store(pair[0]);
                }
            }],
            || {
                assert!(
                    setup.device.run("work", reads).expect("a run"),
                    "no program"
                );
                result(image, 16)
            },
        );
        assert_got!(
            (torn.0, torn.1),
            (0, 0),
            "result, and torn words of {len} bytes"
        );
    }
}

pub(super) fn too_much_at_once() {
    let mut setup = Setup::new("mem", 4);
    setup.window(0, START, 4 * PAGE as u64, true, true);
    let data = vec![0x5a; DATA_SIZE];
    assert_got!(setup.ask(By::Run, WRITE, START + 1, &data).0, 0);
    assert_got!(
        setup
            .ask(By::Run, WRITE_NOFAULT, START + 1, &data[..PAGE])
            .0,
        0
    );
    let (errno, got) = setup.ask(By::Run, READ_NOFAULT, START, &data[..PAGE + 1]);
    assert_got!((errno, got), (libc::E2BIG, vec![0; PAGE + 1]));
    let got = setup.ask(By::Run, WRITE_NOFAULT, START, &data[..PAGE + 1]);
    assert_got!(got.0, libc::E2BIG);
}

/// What a call copies at most if it may sleep.
pub(super) fn a_mebibyte_at_once() {
    const MOST: usize = 1 << 20;

    let mut setup = Setup::new("mem_large", MOST / PAGE + 1);
    setup.window(0, START, (MOST + PAGE) as u64, true, true);
    setup.pages.fill((0..).map(pattern));
    for by in [By::Access, By::Run] {
        let before = setup.pages.bytes(1, MOST);
        let got = setup.ask(by, READ, START + 1, &vec![0x5a; MOST]);
        assert!(got == (0, before), "{by:?}: reading a mebibyte");
        let got = setup.ask(by, READ, START, &vec![0x5a; MOST + 1]);
        let wanted = (libc::E2BIG, vec![0; MOST + 1]);
        assert!(got == wanted, "{by:?}: reading a byte more, {}", got.0);

        let data: Vec<_> = (0..MOST).map(|at| !pattern(at)).collect();
        assert_got!(setup.ask(by, WRITE, START + 1, &data).0, 0);
        assert!(
            setup.pages.bytes(1, MOST) == data,
            "{by:?}: a mebibyte written"
        );
        let more = vec![0x5a; MOST + 1];
        assert_got!(setup.ask(by, WRITE, START + 1, &more).0, libc::E2BIG);
        assert!(
            setup.pages.bytes(1, MOST) == data,
            "{by:?}: a byte more has been written"
        );
        setup.pages.fill((0..).map(pattern));
    }
}

pub(super) fn random_bytes() {
    let mut setup = Setup::new("mem", 1);
    let mut ask = |len| setup.ask_all_differ(len);
    let (first, second) = ask(PAGE);
    assert_ne!(first, second, "two times the same");
    let ones: u32 = first.iter().map(|byte| byte.count_ones()).sum();
    let half = (4 * PAGE) as u32;
    // A hundred times what chance does.
    assert!(ones.abs_diff(half) < 9_000, "{ones} ones of {}", 2 * half);
    let (errno, got) = setup.ask(By::Run, RANDOM, 0, &vec![0x5a; PAGE + 1]);
    assert_got!((errno, got), (libc::E2BIG, vec![0x5a; PAGE + 1]));
}

impl Setup {
    /// Random bytes by each means.
    fn ask_all_differ(&mut self, len: usize) -> (Vec<u8>, Vec<u8>) {
        let mut ask = |by| {
            let (errno, data) = self.ask(by, RANDOM, 0, &vec![0; len]);
            assert_got!(errno, 0);
            data
        };
        (ask(By::Access), ask(By::Run))
    }
}
