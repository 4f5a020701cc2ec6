// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* A timer for reads, and a map of maps for writes. */
#include "kvm_bpf.h"

KVM_BPF_MMIO_DEVICE(0x1000, 0, "kvm-bpf,test");

struct element {
	struct bpf_timer timer;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct element);
} timers SEC(".maps");

struct inner {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} inner SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, struct inner);
} outer SEC(".maps") = {
	.values = {&inner},
};

KVM_IO_READ
int with_timer(struct bpf_kvm_io_ctx *ctx)
{
	__u32 zero = 0;
	struct element *element = bpf_map_lookup_elem(&timers, &zero);

	if (element)
		bpf_timer_cancel(&element->timer);
	return 0;
}

KVM_IO_WRITE
int with_inner_map(struct bpf_kvm_io_ctx *ctx)
{
	__u32 zero = 0;
	void *map = bpf_map_lookup_elem(&outer, &zero);
	__u64 *value = map ? bpf_map_lookup_elem(map, &zero) : 0;

	if (value)
		*value = *(__u64 *)ctx->buf;
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
