// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The part of the VMM that others use too: the benchmark and the tests.

pub mod userspace;
