// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Doorbells with a payload, for a device that another process serves.
 *
 * Doorbell n is at offset 8 * n.  A write of 1, 2, 4 or 8 bytes there stores the value,
 * extended by zeroes, in element n of the map "values" and then signals interrupt n of
 * the device, which is none: the VMM sets an eventfd that the other process waits for.
 * A read gives what this process has put into element n of "completions".  Elsewhere
 * writes are ignored, and reads give 0.
 *
 * The process gets the fds of both maps, and maps their memory: element n is at 8 * n.
 * It either gets the eventfd as well, or has made it and sends it to the VMM.  Several
 * doorbells may have one, and a doorbell none: the value is stored still, for a process
 * that polls.
 *
 * The order is the value, then the signal, and an eventfd's count is read and written
 * under its lock: who has read a count sees the value of the last of these signals, or a
 * newer one.  Signals that nobody has read yet become one count, and of their values the
 * last one stays.  So a doorbell is for what replaces what was there before: the tail
 * of a queue, not its entries.
 *
 * The maps outlive the process.  The one that comes next has missed nothing, if it looks
 * at all values before it waits.
 */
#include "kvm_bpf.h"

#define DOORBELLS 64
#define STRIDE 8
#define SIZE (DOORBELLS * STRIDE)

KVM_BPF_MMIO_DEVICE(SIZE, 0, "kvm-bpf,doorbell");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, DOORBELLS);
	__type(key, __u32);
	__type(value, __u64);
} values SEC(".maps"), completions SEC(".maps");

KVM_IO_READ
int doorbell_read(struct bpf_kvm_io_ctx *ctx)
{
	__u32 index = ctx->offset / STRIDE;
	__u64 *completion = bpf_map_lookup_elem(&completions, &index);

	if (completion && !(ctx->offset % STRIDE))
		*(__u64 *)ctx->buf = *(volatile __u64 *)completion;
	return 0;
}

KVM_IO_WRITE
int doorbell_write(struct bpf_kvm_io_ctx *ctx)
{
	__u32 index = ctx->offset / STRIDE;
	__u64 *value = bpf_map_lookup_elem(&values, &index);

	if (value && !(ctx->offset % STRIDE)) {
		*(volatile __u64 *)value = *(__u64 *)ctx->buf;
		bpf_kvm_irq_signal(ctx, index);
	}
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
