// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* A parameter in a map that is no array. */
#include "params.bpf.c"

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} hash SEC(".maps");

KVM_BPF_PARAM("hash");
