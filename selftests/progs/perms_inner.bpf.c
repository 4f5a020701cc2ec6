// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Maps whose values have a timer (for reads) and a work queue (for writes): the programs name
 * only the maps of maps that they are in.  A read starts the timer.
 */
#include "kvm_bpf.h"

#define CLOCK_MONOTONIC 1

KVM_BPF_MMIO_DEVICE(0x1000, 0, "kvm-bpf,test");

__u64 rung;

struct timed {
	struct bpf_timer timer;
};

struct timed_map {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct timed);
} timed SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, struct timed_map);
} timers SEC(".maps") = {
	.values = {&timed},
};

struct queued {
	struct bpf_wq wq;
	__u64 value;
};

struct queued_map {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct queued);
} queued SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, struct queued_map);
} queues SEC(".maps") = {
	.values = {&queued},
};

static int on_timer(void *map, __u32 *key, struct timed *value)
{
	__sync_fetch_and_add(&rung, 1);
	return 0;
}

KVM_IO_READ
int with_inner_timer(struct bpf_kvm_io_ctx *ctx)
{
	__u32 zero = 0;
	void *map = bpf_map_lookup_elem(&timers, &zero);
	struct timed *value = map ? bpf_map_lookup_elem(map, &zero) : 0;

	if (!value)
		return 1;
	bpf_timer_init(&value->timer, map, CLOCK_MONOTONIC);
	bpf_timer_set_callback(&value->timer, on_timer);
	bpf_timer_start(&value->timer, 0, 0);
	*(__u64 *)ctx->buf = rung;
	return 0;
}

KVM_IO_WRITE
int with_inner_workqueue(struct bpf_kvm_io_ctx *ctx)
{
	__u32 zero = 0;
	void *map = bpf_map_lookup_elem(&queues, &zero);
	struct queued *value = map ? bpf_map_lookup_elem(map, &zero) : 0;

	if (value)
		value->value = *(__u64 *)ctx->buf;
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
