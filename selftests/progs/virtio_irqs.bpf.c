// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * A device with three interrupts, the first of which Linux has a driver for on
 * every architecture: as much of a virtio console behind virtio-mmio as its
 * driver needs to come up and to take an interrupt. It has no queue that anyone
 * serves, so nobody may write to the console.
 *
 *	0xf00	a write signals the interrupt that was written; the first one tells
 *		the driver that the configuration has changed
 *
 * With LEVEL it has that interrupt only, as a level:
 *
 *	0xf00	a write of n has the interrupt wanted until the driver has
 *		acknowledged it n times
 *	0xf04	a read gives how many times it has, of all
 *	0xf08	a read gives how often the device has been restored
 */
#include "kvm_bpf.h"

#define MAGIC_VALUE 0x000
#define VERSION 0x004
#define DEVICE_ID 0x008
#define DEVICE_FEATURES 0x010
#define DEVICE_FEATURES_SEL 0x014
#define QUEUE_NUM_MAX 0x034
#define INTERRUPT_STATUS 0x060
#define INTERRUPT_ACK 0x064
#define STATUS 0x070
#define SIGNAL 0xf00
#define ACKS 0xf04
#define MOVES 0xf08

#define MAGIC 0x74726976 /* "virt" */
#define CONSOLE 3
#define CONFIG_CHANGED 2
/* VIRTIO_F_VERSION_1, bit 32, in the second half of the features. */
#define FEATURES_1 1

#ifdef LEVEL
#define IRQS 1
#else
#define IRQS 3
#endif

KVM_BPF_MMIO_DEVICE(0x1000, IRQS, "virtio,mmio");

struct state {
	__u32 status;
	__u32 features_sel;
	__u32 pending;
	/* With LEVEL. */
	__u32 wanted;
	__u32 acks;
	__u32 moves;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct state);
} state SEC(".maps");

static __always_inline struct state *get_state(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&state, &zero);
}

KVM_IO_READ
int virtio_read(struct bpf_kvm_io_ctx *ctx)
{
	struct state *state = get_state();
	__u64 value = 0;

	if (!state)
		return 1;
	switch (ctx->offset) {
	case MAGIC_VALUE:
		value = MAGIC;
		break;
	case VERSION:
		value = 2;
		break;
	case DEVICE_ID:
		value = CONSOLE;
		break;
	case DEVICE_FEATURES:
		value = state->features_sel == 1 ? FEATURES_1 : 0;
		break;
	case QUEUE_NUM_MAX:
		value = 8;
		break;
	case INTERRUPT_STATUS:
		value = state->pending;
		break;
	case STATUS:
		value = state->status;
		break;
	case ACKS:
		value = state->acks;
		break;
	case MOVES:
		value = state->moves;
		break;
	}
	*(__u64 *)ctx->buf = value;
	return 0;
}

KVM_IO_WRITE
int virtio_write(struct bpf_kvm_io_ctx *ctx)
{
	__u32 value = *(__u32 *)ctx->buf;
	struct state *state = get_state();

	if (!state)
		return 1;
	switch (ctx->offset) {
	case DEVICE_FEATURES_SEL:
		state->features_sel = value;
		break;
	case INTERRUPT_ACK:
#ifdef LEVEL
		state->acks++;
		if (state->wanted && --state->wanted)
			break;
#endif
		state->pending &= ~value;
		break;
	case STATUS:
		state->status = value;
		break;
	case SIGNAL:
#ifdef LEVEL
		state->wanted = value;
		if (state->pending)
			break;
		value = 0;
#endif
		if (value == 0)
			state->pending |= CONFIG_CHANGED;
		bpf_kvm_irq_signal(ctx, value);
		break;
	}
	return 0;
}

#ifdef LEVEL
static __always_inline int signal_if_pending(struct bpf_kvm_io_ctx *ctx)
{
	struct state *state = get_state();

	if (state && state->pending)
		bpf_kvm_irq_signal(ctx, 0);
	return 0;
}

KVM_IO_WORK(0, resample)
int virtio_resample(struct bpf_kvm_io_ctx *ctx)
{
	return signal_if_pending(ctx);
}

KVM_IO_WORK(1, restore)
int virtio_restore(struct bpf_kvm_io_ctx *ctx)
{
	struct state *state = get_state();

	if (state)
		state->moves++;
	return signal_if_pending(ctx);
}
#endif

char _license[] SEC("license") = "Dual BSD/GPL";
