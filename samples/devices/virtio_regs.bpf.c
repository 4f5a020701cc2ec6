// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The registers that a driver of virtio-mmio (virtio 1.3, 4.2: version 2) accesses for
 * each request, of a device that user space serves.  All other ones are declined.
 *
 *	offset	name		bits	access	meaning
 *	0x50	QueueNotify	32	WO	signals the eventfd of the queue
 *	0x60	InterruptStatus	32	RO	the first word of the map "interrupt_status"
 *	0x64	InterruptACK	32	WO	clears there the bits that are written
 *
 * The region ends where a device's configuration begins, so this is for devices of any
 * kind.  What it takes and what the VMM has to do:
 *
 *  - Index n of the device's irqs is no interrupt, but the eventfd of queue n, for which
 *    who serves the queue waits.  A notification of a queue without one is declined, and
 *    so is one with VIRTIO_F_NOTIFICATION_DATA, whose values are no numbers of queues:
 *    do not offer that feature.  A notification may come when the queue is not ready;
 *    QueueNotify itself knows nothing of the device's status.
 *
 *  - Who serves a queue writes the used ring, then sets a bit of the word, and then
 *    signals the interrupt, an irqfd.  The bit is set by an atomic operation that
 *    returns the old value, with the order of "sequentially consistent": the driver
 *    clears bits at the same time.  So a driver that has the interrupt finds the bit,
 *    and one that has cleared the bit finds what was in the ring when it was set.
 *    The word is never written otherwise, but for a reset.
 *
 *  - An acknowledgement may come between bit and interrupt.  Then the driver already
 *    sees the ring, and later an interrupt without a bit, as with every such device
 *    whose interrupt is an edge.
 *
 *  - A reset, a write of 0 to Status, is declined as all of Status is.  The VMM returns
 *    from it when nobody serves a queue any more, nor will: first it stops that, then
 *    it writes 0 to the word.  In the other order a bit could appear after the reset.
 *
 *  - The word is all state there is.
 */
#include "kvm_bpf.h"

#include <linux/virtio_mmio.h>

KVM_BPF_MMIO_DEVICE(VIRTIO_MMIO_CONFIG, 0, "kvm-bpf,virtio-registers");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} interrupt_status SEC(".maps");

static __always_inline __u32 *status_word(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&interrupt_status, &zero);
}

KVM_IO_READ
int virtio_regs_read(struct bpf_kvm_io_ctx *ctx)
{
	__u32 *status = status_word();

	if (!status || ctx->len != 4 ||
	    ctx->offset != VIRTIO_MMIO_INTERRUPT_STATUS)
		return 1;
	*(__u64 *)ctx->buf = *(volatile __u32 *)status;
	return 0;
}

KVM_IO_WRITE
int virtio_regs_write(struct bpf_kvm_io_ctx *ctx)
{
	__u32 *status = status_word();
	__u32 value = *(__u64 *)ctx->buf;

	if (!status || ctx->len != 4)
		return 1;
	switch (ctx->offset) {
	case VIRTIO_MMIO_QUEUE_NOTIFY:
		return bpf_kvm_irq_signal(ctx, value);
	case VIRTIO_MMIO_INTERRUPT_ACK:
		/* One that returns the old value is also a full barrier. */
		value = __sync_fetch_and_and(status, ~value);
		barrier_var(value);
		return 0;
	}
	return 1;
}

char _license[] SEC("license") = "Dual BSD/GPL";
