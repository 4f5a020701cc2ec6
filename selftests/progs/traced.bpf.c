// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Counts the entries of another program, and how often it returns 0 and how often not. */
#include "kvm_bpf.h"

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 3);
	__type(key, __u32);
	__type(value, __u64);
} counts SEC(".maps");

static __always_inline void count(__u32 index)
{
	__u64 *value = bpf_map_lookup_elem(&counts, &index);

	if (value)
		__sync_fetch_and_add(value, 1);
}

/* What it is attached to is chosen when it is loaded. */
SEC("fentry/program")
int entered(__u64 *args)
{
	count(0);
	return 0;
}

SEC("fexit/program")
int returned(__u64 *args)
{
	/* Behind the program's one argument. */
	count(args[1] ? 2 : 1);
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
