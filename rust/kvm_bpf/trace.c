// SPDX-License-Identifier: GPL-2.0-only
/* The tracepoints that kvm_bpf's Rust code uses. */

#define CREATE_TRACE_POINTS
#define CREATE_RUST_TRACE_POINTS
#include <trace/events/kvm_bpf.h>
