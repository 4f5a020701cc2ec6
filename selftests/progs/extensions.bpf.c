// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Programs to replace the function of extended.bpf.c. */
#include "kvm_bpf.h"

struct {
	__uint(type, BPF_MAP_TYPE_ARENA);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
} arena SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} array SEC(".maps");

SEC("freplace/value")
int with_array(__u64 offset)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&array, &zero) ? offset + 2 : 0;
}

SEC("freplace/value")
int with_arena(__u64 offset)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&arena, &zero) ? offset + 2 : 0;
}

SEC("freplace/value")
int with_task(__u64 offset)
{
	return offset + (bpf_get_current_task() != 0);
}

char _license[] SEC("license") = "Dual BSD/GPL";
