/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#ifndef ANSWER_H
#define ANSWER_H

#include "kvm_bpf.h"

/* What a kfunc returned in a callback; 1 until then. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __s64);
} answer SEC(".maps");

static void set_answer(__s64 value)
{
	__u32 zero = 0;
	__s64 *slot = bpf_map_lookup_elem(&answer, &zero);

	if (slot)
		*slot = value;
}

#endif /* ANSWER_H */
