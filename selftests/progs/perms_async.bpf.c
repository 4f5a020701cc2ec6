// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * A map with a workqueue for reads, and one with task work for writes: the map
 * is what counts, whether or not the program starts what it has.
 */
#include "kvm_bpf.h"

KVM_BPF_MMIO_DEVICE(0x1000, 0, "kvm-bpf,test");

struct queued {
	struct bpf_wq wq;
	__u64 value;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct queued);
} queues SEC(".maps");

struct worked {
	struct bpf_task_work work;
	__u64 value;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct worked);
} works SEC(".maps");

KVM_IO_READ
int with_workqueue(struct bpf_kvm_io_ctx *ctx)
{
	__u32 zero = 0;
	struct queued *queued = bpf_map_lookup_elem(&queues, &zero);

	if (queued)
		*(__u64 *)ctx->buf = queued->value;
	return 0;
}

KVM_IO_WRITE
int with_task_work(struct bpf_kvm_io_ctx *ctx)
{
	__u32 zero = 0;
	struct worked *worked = bpf_map_lookup_elem(&works, &zero);

	if (worked)
		worked->value = *(__u64 *)ctx->buf;
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
