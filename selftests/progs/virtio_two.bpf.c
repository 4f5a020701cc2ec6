// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * A virtio device with two queues.  A request of queue 0 has numbers of 8 bytes to add
 * up, one at the start of each descriptor, whose length counts for the budget; one of
 * queue 1 is told the sum, in 8 bytes.
 */
#define VIRTIO_ID VIRTIO_ID_CONSOLE
#define VIRTIO_QUEUES 2
#define VIRTIO_QUEUE_MAX 64
#define VIRTIO_FEATURES 0ULL
#include "virtio_bpf.h"

#define ADD 0
#define TELL 1

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} sum SEC(".maps");

static __always_inline int add(struct bpf_kvm_io_ctx *ctx,
			       struct virtq_chain *chain, __u64 *total)
{
	__u64 number = 0;

	if (chain->desc.flags & VRING_DESC_F_WRITE ||
	    chain->desc.len < sizeof(number) ||
	    bpf_kvm_mem_read(ctx, chain->desc.addr, &number, sizeof(number)))
		return -1;
	__sync_fetch_and_add(total, number);
	chain->bytes += chain->desc.len;
	return 0;
}

static __always_inline int tell(struct bpf_kvm_io_ctx *ctx,
				struct virtq_chain *chain, __u64 *total)
{
	__u64 number = VIRTIO_LOAD(*total);

	if (!(chain->desc.flags & VRING_DESC_F_WRITE) ||
	    chain->desc.len != sizeof(number) || chain->more ||
	    bpf_kvm_mem_write(ctx, chain->desc.addr, &number, sizeof(number)))
		return -1;
	return sizeof(number);
}

__noinline int virtio_request(struct bpf_kvm_io_ctx *ctx __arg_ctx,
			      struct virtq_chain *chain __arg_nonnull)
{
	__u32 zero = 0, i;
	__u64 *total = bpf_map_lookup_elem(&sum, &zero);

	if (!total)
		return -1;
	bpf_for(i, 0, VIRTIO_CHAIN_ENDS)
	{
		int next = virtq_next(ctx, chain);

		if (next < 0)
			return -1;
		if (next > 0)
			break;
		if (chain->queue == TELL)
			return tell(ctx, chain, total);
		if (add(ctx, chain, total))
			return -1;
	}
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
