// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * A device that keeps its VMM busy while the guest resets, so that what else is asked of the
 * VMM meanwhile comes before that. It has no WORK program "reset". 4-byte registers:
 *
 *	0x00	RW	what was written
 *	0x04	RO	1: its VMM is busy with an input
 *	0x08	WO	a write has that end three seconds later
 */
#include "kvm_bpf.h"

#define KEPT 0x00
#define BUSY 0x04
#define ENDS 0x08

#define SECOND 1000000000ULL

KVM_BPF_MMIO_DEVICE(0x1000, 0, "kvm-bpf,test");

__u32 kept;
__u32 busy;
/* When that ends, in nanoseconds since the host's boot; 0: nobody knows. */
__u64 ends;

KVM_IO_READ
int busy_read(struct bpf_kvm_io_ctx *ctx)
{
	__u64 value = 0;

	switch (ctx->offset) {
	case KEPT:
		value = kept;
		break;
	case BUSY:
		value = busy;
		break;
	}
	*(__u64 *)ctx->buf = value;
	return 0;
}

KVM_IO_WRITE
int busy_write(struct bpf_kvm_io_ctx *ctx)
{
	__u32 value = *(__u32 *)ctx->buf;

	switch (ctx->offset) {
	case KEPT:
		kept = value;
		break;
	case ENDS:
		ends = bpf_ktime_get_ns() + 3 * SECOND;
		break;
	}
	return 0;
}

static int nothing(__u64 index, void *context)
{
	return 0;
}

KVM_IO_WORK(0, input)
int busy_input(struct bpf_kvm_io_ctx *ctx)
{
	busy = 1;
	/* The VMM runs it for a million times at most. */
	bpf_loop(100000, nothing, NULL, 0);
	if (!ends || bpf_ktime_get_ns() < ends)
		return 1;
	busy = 0;
	ends = 0;
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
