// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Counts the entries of another program, how often it returns 0 and how often
 * not; and keeps the offset and the length of the last access that it handled.
 */
#include "kvm_bpf.h"

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 5);
	__type(key, __u32);
	__type(value, __u64);
} counts SEC(".maps");

/* Who traces sees the kernel's own context; libbpf finds the fields. */
struct bpf_kvm_io_ctx_kern___access {
	__u64 offset;
	__u8 len;
} __attribute__((preserve_access_index));

static __always_inline void count(__u32 index)
{
	__u64 *value = bpf_map_lookup_elem(&counts, &index);

	if (value)
		__sync_fetch_and_add(value, 1);
}

static __always_inline void keep(__u32 index, __u64 value)
{
	bpf_map_update_elem(&counts, &index, &value, BPF_ANY);
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
	/* The program's one argument, its context, and then what it returns. */
	struct bpf_kvm_io_ctx_kern___access *ctx = (void *)args[0];

	count(args[1] ? 2 : 1);
	keep(3, ctx->offset);
	keep(4, ctx->len);
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
