// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * A device with three interrupts, the first of which Linux has a driver for on
 * every architecture: as much of a virtio console behind virtio-mmio as its
 * driver needs to come up and to take an interrupt. It has no queue that anyone
 * serves, so nobody may write to the console.
 *
 *	0xf00	a write signals the interrupt that was written; the first one tells
 *		the driver that the configuration has changed
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

#define MAGIC 0x74726976 /* "virt" */
#define CONSOLE 3
#define CONFIG_CHANGED 2
/* VIRTIO_F_VERSION_1, bit 32, in the second half of the features. */
#define FEATURES_1 1

KVM_BPF_MMIO_DEVICE(0x1000, 3, "virtio,mmio");

struct state {
	__u32 status;
	__u32 features_sel;
	__u32 pending;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
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
		state->pending &= ~value;
		break;
	case STATUS:
		state->status = value;
		break;
	case SIGNAL:
		if (value == 0)
			state->pending |= CONFIG_CHANGED;
		bpf_kvm_irq_signal(ctx, value);
		break;
	}
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
