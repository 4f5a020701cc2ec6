// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The fast half of the register bank of samples/devices: ID, VERSION, TIME and
 * IRQ.  All else is for the slow path, the VMM's model of the bank, which has
 * all the state: no register is in both.
 */
#include "kvm_bpf.h"

#define SLOT_ID 0x00
#define SLOT_TIME 0x18
#define IRQ 0x20
#define SLOT_MASK 0x07

KVM_BPF_MMIO_DEVICE(0x1000, 1, "kvm-bpf,regbank");

KVM_IO_READ
int half_read(struct bpf_kvm_io_ctx *ctx)
{
	__u64 offset = ctx->offset;
	__u64 slot;

	/* Nothing has happened yet that the VMM would do again. */
	if (offset & (ctx->len - 1))
		return 1;
	switch (offset & ~SLOT_MASK) {
	case SLOT_ID:
		slot = 1ULL << 32 | 0x4b425042;
		break;
	case SLOT_TIME:
		slot = bpf_ktime_get_ns();
		break;
	default:
		return 1;
	}
	*(__u64 *)ctx->buf = slot >> (offset & SLOT_MASK) * 8;
	return 0;
}

KVM_IO_WRITE
int half_write(struct bpf_kvm_io_ctx *ctx)
{
	if (ctx->offset != IRQ)
		return 1;
	/* There is no such interrupt, or the VMM has set none: it counts that. */
	return bpf_kvm_irq_signal(ctx, *(__u32 *)ctx->buf);
}

char _license[] SEC("license") = "Dual BSD/GPL";
