// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Counts of what came of calls and accesses.

use std::collections::BTreeMap;
use std::sync::Mutex;

use kvm_bpf_selftests::harness::Errno;

/// Counts results by call.
#[derive(Default)]
pub(super) struct Tally(pub(super) Mutex<BTreeMap<(&'static str, &'static str), u64>>);

impl Tally {
    pub(super) fn count(&self, what: &'static str, how: &'static str) {
        let mut counts = self.0.lock().expect("no thread has panicked");
        *counts.entry((what, how)).or_default() += 1;
    }

    pub(super) fn of(&self, what: &'static str, how: &'static str) -> u64 {
        let counts = self.0.lock().expect("no thread has panicked");
        counts.get(&(what, how)).copied().unwrap_or(0)
    }

    /// The result of a call, which may fail with these only.
    #[track_caller]
    pub(super) fn check<T>(
        &self,
        what: &'static str,
        result: Result<T, Errno>,
        errnos: &[(i32, &'static str)],
    ) -> Option<T> {
        match result {
            Ok(value) => {
                self.count(what, "ok");
                Some(value)
            }
            Err(Errno(errno)) => {
                let known = errnos.iter().find(|&&(known, _)| known == errno);
                let Some(&(_, name)) = known else {
                    panic!("{what}: wanted success or one of {errnos:?}, got {errno}");
                };
                self.count(what, name);
                None
            }
        }
    }
}
