// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * A device that knows which values it has seen: a write adds one, a read of
 * offset n says whether n was among them.
 */
#include "kvm_bpf.h"

#ifndef HASHES
#define HASHES 3
#endif

KVM_BPF_MMIO_DEVICE(0x1000, 0, "kvm-bpf,test");

struct {
	__uint(type, BPF_MAP_TYPE_BLOOM_FILTER);
	__uint(max_entries, 64);
	__uint(map_extra, HASHES);
	__type(value, __u64);
} seen SEC(".maps");

KVM_IO_READ
int filter_read(struct bpf_kvm_io_ctx *ctx)
{
	__u64 value = ctx->offset;

	*(__u64 *)ctx->buf = bpf_map_peek_elem(&seen, &value) == 0;
	return 0;
}

KVM_IO_WRITE
int filter_write(struct bpf_kvm_io_ctx *ctx)
{
	__u64 value = *(__u64 *)ctx->buf;

	return bpf_map_push_elem(&seen, &value, BPF_ANY);
}

char _license[] SEC("license") = "Dual BSD/GPL";
