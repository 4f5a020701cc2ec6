// SPDX-License-Identifier: Apache-2.0 OR MIT

//! [`kvm_bpf_fuzz::tables`] under libFuzzer.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    kvm_bpf_fuzz::tables(bytes);
});
