// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What libbpf prints goes to the crate `log`.

#![cfg(feature = "log")]

use std::sync::Mutex;

use kvm_bpf::OpenImage;
use log::{LevelFilter, Log, Metadata, Record};

static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Collect;

impl Log for Collect {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let line = format!("{} {}: {}", record.level(), record.target(), record.args());
        LINES.lock().unwrap().push(line);
    }

    fn flush(&self) {}
}

#[test]
fn libbpf_prints_to_the_log() {
    let file = include_bytes!("../../../selftests/fuzz/seeds/object/doorbell.bpf.o");
    log::set_logger(&Collect).unwrap();
    log::set_max_level(LevelFilter::Trace);
    OpenImage::open("before", file).unwrap();
    assert!(LINES.lock().unwrap().is_empty());
    kvm_bpf::image::log_libbpf();
    OpenImage::open("seed", file).unwrap();
    let lines = LINES.lock().unwrap();
    let says = |what: &str| lines.iter().any(|line| line.contains(what));
    assert!(
        says("DEBUG libbpf: libbpf: ") && says("doorbell_write"),
        "{lines:#?}"
    );
}
