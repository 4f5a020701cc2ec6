// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of `KVM_DEV_TYPE_BPF`.  Run as root on the kernel under test; takes
//! the arguments of an ordinary Rust test (`--list`, a filter, `--nocapture`).
//!
//! The environment may set
//!
//! * `KVM_BPF_PROGS`: where the compiled `progs/*.bpf.c` are, `/progs` by default,
//! * `KVM_BPF_DEVICES`: where the compiled `samples/devices` are, `/devices` by default,
//! * `KVM_BPF_SEED`, `KVM_BPF_ACCESSES`: the script by which sample devices are compared with
//!   models in user space, 1 and 5000 by default,
//! * `KVM_BPF_STRESS_MS`, `KVM_BPF_FUZZ_MS`, `KVM_BPF_LOADS`: for how long everything is done at
//!   once (6000), for how long each of calls and accesses is tried (2000), and how many random
//!   programs (400), with the same seed,
//! * `KVM_BPF_SWAPS`: how many swaps under load, 1000 by default,
//! * `KVM_BPF_MODULE`: the file of `kvm_bpf.ko`, to test unloading and loading.

mod tests;

use std::process::ExitCode;

use kvm_bpf_selftests::peer;
use libtest_mimic::Arguments;

fn main() -> ExitCode {
    // What a test has started.
    if let Some(role) = peer::role() {
        if let Err(error) = tests::be_the_peer(&role) {
            eprintln!("kvm-bpf-selftests as the other process, to {role}: {error}");
            return ExitCode::FAILURE;
        }
        return ExitCode::SUCCESS;
    }
    // Refusals are wanted here; a test that does not want one says so itself.
    libbpf_rs::set_print(None);
    let mut args = Arguments::from_args();
    // The tests count the kernel's programs and maps, so by default one at a time.
    args.test_threads = args.test_threads.or(Some(1));
    libtest_mimic::run(&args, tests::all()).exit_code()
}
