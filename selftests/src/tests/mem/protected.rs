// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Memory of a protected guest, which the host may touch only where the guest says so.

use kvm_bpf_selftests::guest::Guest;
use kvm_bpf_selftests::harness::{meanwhile, wait_for};
use vmm_sys_util::eventfd::EventFd;

use super::{By, PAGE, READ, READ_NOFAULT, START, Setup, WRITE, WRITE_NOFAULT, request, result};

/// What the host puts into all pages first, and a word of it.
const FIRST: u8 = 0xe1;
const FIRST_WORD: u64 = u64::from_ne_bytes([FIRST; 8]);

impl Setup {
    /// With a protected guest, and a window over all of its pages.
    fn protected(pages: usize) -> Self {
        let setup = Setup::of(Guest::protected(), "mem", pages);
        setup.pages.fill(std::iter::repeat(FIRST));
        setup.window(0, START, (pages * PAGE) as u64, true, true);
        setup
    }

    /// The guest stores a word in its memory.
    #[track_caller]
    fn store(&mut self, gpa: u64, word: u64) {
        assert_got!(self.vcpu.write(gpa, 8, word), [], "a store to {gpa:#x}");
    }

    /// The guest finds it there.
    #[track_caller]
    fn assert_loads(&mut self, gpa: u64, word: u64) {
        let read = self.vcpu.read(gpa, 8);
        let got = (read.value, read.exits);
        assert_got!(got, (word, vec![]), "a load from {gpa:#x}");
    }

    /// Programs find it there.
    #[track_caller]
    fn assert_reads(&mut self, gpa: u64, word: u64) {
        assert_got!(self.read(gpa, 8), (0, word.to_le_bytes().into()));
    }

    /// Programs access nothing there, with none of the ways to copy that lengths have.
    #[track_caller]
    fn assert_private(&mut self, gpa: u64) {
        for len in [1, 2, 4, 8, 7, 16, 0x100] {
            let got = self.read(gpa, len);
            assert_got!(got, (libc::EFAULT, vec![0; len]), "{len} at {gpa:#x}");
            let got = self.write(gpa, &vec![0x5a; len]);
            assert_got!(got, libc::EFAULT, "{len} at {gpa:#x}");
        }
    }
}

/// To the host, an access of what is not shared is a fault; to a program it is an errno, and to
/// the guest nothing at all.
pub(super) fn protected_guest_shares_a_page() {
    let mut setup = Setup::protected(3);
    let [private, shared, later] = [0, 1, 2].map(|page| START + page * PAGE as u64);
    let words = [0x1112_1314_1516_1718, 0x2122_2324_2526_2728];

    // Pages become the guest's, with what is there, as it touches them.
    for (page, word) in [private, shared].into_iter().zip(words) {
        setup.assert_reads(page, FIRST_WORD);
        setup.assert_loads(page, FIRST_WORD);
        setup.store(page, word);
        setup.assert_private(page);
        setup.assert_loads(page, word);
    }
    assert_got!(setup.write(later, &words[0].to_le_bytes()), 0);

    // Of shared ones, both sides see what the other has stored.
    setup.vcpu.share_page(shared);
    setup.assert_reads(shared, words[1]);
    assert_got!(setup.write(shared, &words[0].to_le_bytes()), 0);
    setup.assert_loads(shared, words[0]);
    setup.store(shared + 8, words[1]);
    setup.assert_reads(shared + 8, words[1]);
    assert_got!(setup.write(shared + 0x21, &[0x44; 0x101]), 0);
    assert_got!(setup.read(shared + 0x21, 0x101), (0, vec![0x44; 0x101]));
    setup.assert_loads(shared + 0x28, 0x4444_4444_4444_4444);
    setup.assert_private(private);
    setup.assert_loads(private, words[0]);

    // Over an edge nothing is read, and no private byte is written.
    setup.store(shared - 8, words[1]);
    for gpa in [shared - 8, shared - 2] {
        assert_got!(setup.read(gpa, 16), (libc::EFAULT, vec![0; 16]));
        assert_got!(setup.write(gpa, &[0x55; 16]), libc::EFAULT);
    }
    setup.assert_loads(shared - 8, words[1]);
    setup.assert_loads(shared, words[0]);
    setup.assert_loads(later, words[0]);
    setup.store(later - 8, words[1]);
    assert_got!(setup.read(later - 4, 8), (libc::EFAULT, vec![0; 8]));
    assert_got!(setup.write(later - 4, &[0x66; 8]), libc::EFAULT);
    // What is before the page that failed has been.
    setup.assert_loads(later - 8, words[1] & 0xffff_ffff | 0x6666_6666 << 32);
    setup.assert_loads(later, words[0]);

    // The same on the device's own thread.
    let wake = EventFd::new(0).expect("eventfd");
    let set = setup.device.set_work_eventfd("work", Some(&wake));
    set.expect("an eventfd");
    for op in [READ, WRITE, READ_NOFAULT, WRITE_NOFAULT] {
        for (gpa, wanted) in [(private, -libc::EFAULT), (shared, 0)] {
            let image = setup.device.programs();
            let done = request(image, op, gpa, &words[0].to_le_bytes());
            wake.write(1).expect("signalling an eventfd");
            wait_for("requests that were served", done + 1, || result(image, 8).1);
            assert_got!(result(image, 8).0, wanted, "{op} at {gpa:#x}");
        }
    }
    setup.assert_loads(private, words[0]);

    // And taken back.
    setup.vcpu.unshare_page(shared);
    setup.assert_private(shared);
    setup.assert_loads(shared, words[0]);
    setup.vcpu.share_page(shared);
    setup.assert_reads(shared, words[0]);
    setup.vcpu.share_page(private);
    setup.assert_reads(private, words[0]);
}

/// An access finds the page shared, or does nothing.
pub(super) fn protected_guest_shares_while_programs_access() {
    const BYTES: [u8; 0x100] = [FIRST; 0x100];

    let mut setup = Setup::protected(1);
    let mut other = setup.guest.vcpu(1);
    setup.assert_loads(START, FIRST_WORD);
    let mut seen = [0_u64; 2];
    meanwhile(
        [|| {
            other.share_page(START);
            other.unshare_page(START);
        }],
        || {
            for round in 0..400 {
                let op = [READ, WRITE, READ_NOFAULT, WRITE_NOFAULT][round % 4];
                let by = [By::Access, By::Run][round / 4 % 2];
                let (errno, data) = setup.ask(by, op, START, &BYTES);
                let is_read = op == READ || op == READ_NOFAULT;
                let wanted = match errno {
                    0 => BYTES,
                    libc::EFAULT if is_read => [0; 0x100],
                    libc::EFAULT => BYTES,
                    errno => panic!("wanted 0 or EFAULT, got {errno}"),
                };
                assert_got!(data, wanted, "{by:?} {op} with errno {errno}");
                seen[usize::from(errno != 0)] += 1;
            }
        },
    );
    assert!(
        seen.iter().all(|&count| count > 0),
        "wanted some to succeed and some to fail, got {seen:?}"
    );
    setup.assert_loads(START, FIRST_WORD);
}
