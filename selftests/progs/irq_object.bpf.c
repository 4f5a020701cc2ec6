// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * An interrupt that is kept, and signalled without a context. A write to
 *
 *	0x0	keeps the interrupt that was written, instead of an earlier one
 *	0x4	signals it from the program
 *	0x8	signals it from a timer, so many nanoseconds later
 *	0xc	gives it up
 *
 * The result of each is in the map.
 */
#include "kvm_bpf.h"

#define CLOCK_MONOTONIC 1

#define NO_IRQ -1000
#define UNKNOWN -1001

KVM_BPF_MMIO_DEVICE(0x1000, 1, "kvm-bpf,test");

struct kept {
	struct bpf_timer timer;
	struct bpf_kvm_irq __kptr *irq;
	__s64 answer;
	__u64 callbacks;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct kept);
} kept SEC(".maps");

static __always_inline __s64 keep(struct kept *kept, struct bpf_kvm_irq *irq)
{
	irq = bpf_kptr_xchg(&kept->irq, irq);
	if (irq)
		bpf_kvm_irq_release(irq);
	return 0;
}

/* The pointer is good here: RCU protects it, no reference is needed. */
static __always_inline __s64 fire(struct kept *kept)
{
	struct bpf_kvm_irq *irq = kept->irq;

	return irq ? bpf_kvm_irq_signal_kept(irq) : NO_IRQ;
}

static int callback(void *map, __u32 *key, struct kept *kept)
{
	kept->answer = fire(kept);
	__sync_fetch_and_add(&kept->callbacks, 1);
	return 0;
}

static __always_inline __s64 start(struct kept *kept, void *map, __u64 delay)
{
	bpf_timer_init(&kept->timer, map, CLOCK_MONOTONIC);
	bpf_timer_set_callback(&kept->timer, callback);
	return bpf_timer_start(&kept->timer, delay, 0);
}

KVM_IO_WRITE
int command(struct bpf_kvm_io_ctx *ctx)
{
	__u32 value = *(__u32 *)ctx->buf;
	struct bpf_kvm_irq *irq;
	__u32 zero = 0;
	struct kept *state = bpf_map_lookup_elem(&kept, &zero);

	if (!state)
		return 1;
	switch (ctx->offset) {
	case 0x0:
		irq = bpf_kvm_irq_acquire(ctx, value);
		state->answer = irq ? keep(state, irq) : NO_IRQ;
		break;
	case 0x4:
		state->answer = fire(state);
		break;
	case 0x8:
		state->answer = start(state, &kept, value);
		break;
	case 0xc:
		state->answer = keep(state, NULL);
		break;
	default:
		state->answer = UNKNOWN;
	}
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
