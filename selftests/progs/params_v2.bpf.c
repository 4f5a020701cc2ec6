// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* One more parameter, without which it cannot work. */
#include "kvm_bpf.h"

KVM_BPF_REQUIRED_PARAM("added");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} added SEC(".maps");

#define ADDED added
#include "params.bpf.c"
