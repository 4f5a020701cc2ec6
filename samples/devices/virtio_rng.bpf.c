// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * A source of random numbers (virtio 1.3, 5.4): the kernel's, as getrandom(2) has
 * them.  One queue, whose buffers are filled; of one request at most 4 KiB, as a
 * driver has to cope with less than it wants.
 */
#define VIRTIO_ID VIRTIO_ID_RNG
#define VIRTIO_QUEUES 1
#define VIRTIO_QUEUE_MAX 64
#define VIRTIO_FEATURES 0ULL
/* A byte costs more than fifty instructions. */
#define VIRTIO_BUDGET_BYTES 4096
#include "virtio_bpf.h"

/* What goes over the stack at once, and how often for one request. */
#define CHUNK 64
#define CHUNKS 64

/* Fill a buffer, up to @most chunks; the bytes, or negative. */
__noinline int rng_fill(struct bpf_kvm_io_ctx *ctx __arg_ctx, __u64 addr,
			__u32 len, __u32 most)
{
	__u32 i;

	if (len > most * CHUNK)
		len = most * CHUNK;
	bpf_for(i, 0, CHUNKS)
	{
		__u8 bytes[CHUNK] = {};
		__u32 rest;

		if (i * CHUNK >= len)
			break;
		rest = len - i * CHUNK;
		if (bpf_kvm_random(bytes, sizeof(bytes)))
			return -1;
		if (rest >= CHUNK)
			rest = CHUNK;
		barrier_var(rest);
		if (rest > CHUNK)
			return -1;
		if (bpf_kvm_mem_write(ctx, addr + i * CHUNK, bytes, rest))
			return -1;
	}
	return len;
}

__noinline int virtio_request(struct bpf_kvm_io_ctx *ctx __arg_ctx,
			      struct virtq_chain *chain __arg_nonnull)
{
	__u32 written, i;

	bpf_for(i, 0, VIRTIO_CHAIN_ENDS)
	{
		int next = virtq_next(ctx, chain);
		int filled;

		if (next < 0)
			return -1;
		if (next > 0)
			break;
		if (!(chain->desc.flags & VRING_DESC_F_WRITE))
			return -1;
		filled = rng_fill(ctx, chain->desc.addr, chain->desc.len,
				  CHUNKS - chain->bytes / CHUNK);
		if (filled < 0)
			return -1;
		chain->bytes += filled;
		/* Behind one that is not full comes nothing. */
		if (filled % CHUNK || filled < chain->desc.len)
			break;
	}
	written = chain->bytes;
	/* A part of a chunk costs what a whole one does. */
	chain->bytes = (written + CHUNK - 1) / CHUNK * CHUNK;
	return written;
}

char _license[] SEC("license") = "Dual BSD/GPL";
