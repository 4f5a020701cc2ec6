// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the documentation shows is what is compiled here.

/// The Rust code of a page, piece by piece.
fn rust_of(page: &str) -> Vec<&str> {
    let begin = page.split("```rust\n").skip(1);
    let code = begin.map(|rest| rest.split_once("```\n").expect("an end of the code").0);
    code.collect()
}

#[test]
fn first_vm_is_the_page_for_authors_of_vmms() {
    let page = include_str!("../../../Documentation/vmm-authors.md");
    let program = include_str!("../examples/first_vm.rs");
    let pieces = rust_of(page);
    assert!(pieces.len() > 5, "{} pieces", pieces.len());
    let (_, code) = program
        .split_once("\n\nuse ")
        .expect("a first line of code");
    assert_eq!(format!("use {code}"), pieces.join("\n"));
}
