// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * A bank of registers: the smallest device that shows every kind of register.
 *
 *	offset	name	bits	access	meaning
 *	0x00	ID	32	RO	identification, 0x4b425042
 *	0x04	VERSION	32	RO	version of this register map, 1
 *	0x08	SCRATCH	64	RW	holds what was written
 *	0x10	COUNT	64	RO	accesses by the calling vCPU, with this one
 *	0x18	TIME	64	RO	nanoseconds, the host's monotonic clock
 *	0x20	IRQ	32	WO	a write of n signals interrupt n
 *
 * Registers are little endian.  Every naturally aligned access of 1, 2, 4 or 8
 * bytes reaches exactly the bytes it names.  Anything else, a write to a
 * read-only register included, reads as 0, is ignored when written, and is
 * counted.  A reset of the machine clears SCRATCH; what is counted goes on.
 */
#include "kvm_bpf.h"

#define REGBANK_SIZE 0x1000
#define REGBANK_IRQS 1
#define MAX_VCPUS 256

/* Each register group is a slot of 8 bytes. */
#define SLOT_ID 0x00
#define SLOT_SCRATCH 0x08
#define SLOT_COUNT 0x10
#define SLOT_TIME 0x18
#define SLOT_IRQ 0x20
#define SLOT_MASK 0x07

#define ID 0x4b425042ULL
#ifndef VERSION
#define VERSION 1ULL
#endif

KVM_BPF_MMIO_DEVICE(REGBANK_SIZE, REGBANK_IRQS, "kvm-bpf,regbank");

struct regbank {
	__u64 scratch;
	__u64 unknown_reads;
	__u64 unknown_writes;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct regbank);
} regbank SEC(".maps");

/* Accesses per vCPU; only the vCPU's own thread writes its entry. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, MAX_VCPUS);
	__type(key, __u32);
	__type(value, __u64);
} accesses SEC(".maps");

static __always_inline struct regbank *regbank_state(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&regbank, &zero);
}

/* Count an access and say how many the vCPU has made; 0 past MAX_VCPUS. */
static __always_inline __u64 count_access(__u32 vcpu_id)
{
	__u64 *count = bpf_map_lookup_elem(&accesses, &vcpu_id);

	return count ? ++*count : 0;
}

static __always_inline int naturally_aligned(__u64 offset, __u8 len)
{
	return (len == 1 || len == 2 || len == 4 || len == 8) &&
	       !(offset & (len - 1));
}

/* Store by the access's own width, so that vCPUs do not undo each other's
 * bytes. */
static __always_inline void scratch_write(__u64 *scratch, __u64 offset,
					  __u8 len, __u64 data)
{
	__u8 *bytes = (__u8 *)scratch;

	switch (len) {
	case 1:
		bytes[offset & 7] = data;
		break;
	case 2:
		*(__u16 *)(bytes + (offset & 6)) = data;
		break;
	case 4:
		*(__u32 *)(bytes + (offset & 4)) = data;
		break;
	case 8:
		*scratch = data;
		break;
	}
}

static __always_inline int irq_write(struct bpf_kvm_io_ctx *ctx, __u32 irq)
{
	if (!bpf_ksym_exists(bpf_kvm_irq_signal))
		return -1;
	return bpf_kvm_irq_signal(ctx, irq);
}

KVM_IO_READ
int regbank_read(struct bpf_kvm_io_ctx *ctx)
{
	struct regbank *state = regbank_state();
	__u64 offset = ctx->offset;
	__u64 count = count_access(ctx->vcpu_id);
	__u64 slot = 0;

	if (!state)
		return 0;
	if (!naturally_aligned(offset, ctx->len))
		goto unknown;

	switch (offset & ~SLOT_MASK) {
	case SLOT_ID:
		slot = VERSION << 32 | ID;
		break;
	case SLOT_SCRATCH:
		slot = state->scratch;
		break;
	case SLOT_COUNT:
		slot = count;
		break;
	case SLOT_TIME:
		slot = bpf_ktime_get_ns();
		break;
	default:
		goto unknown;
	}

	*(__u64 *)ctx->buf = slot >> (offset & SLOT_MASK) * 8;
	return 0;

unknown:
	__sync_fetch_and_add(&state->unknown_reads, 1);
	return 0;
}

KVM_IO_WRITE
int regbank_write(struct bpf_kvm_io_ctx *ctx)
{
	struct regbank *state = regbank_state();
	__u64 data = *(__u64 *)ctx->buf;
	__u64 offset = ctx->offset;
	__u8 len = ctx->len;

	count_access(ctx->vcpu_id);
	if (!state)
		return 0;
	if (!naturally_aligned(offset, len))
		goto unknown;

	switch (offset & ~SLOT_MASK) {
	case SLOT_SCRATCH:
		scratch_write(&state->scratch, offset, len, data);
		return 0;
	case SLOT_IRQ:
		if (offset == SLOT_IRQ && !irq_write(ctx, data))
			return 0;
		break;
	}

unknown:
	__sync_fetch_and_add(&state->unknown_writes, 1);
	return 0;
}

KVM_IO_WORK(0, reset)
int regbank_reset(struct bpf_kvm_io_ctx *ctx)
{
	struct regbank *state = regbank_state();

	if (state)
		state->scratch = 0;
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
