// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * A device with a doorbell, which the others of its name include in another version.  A
 * write to offset 0 sets a value, one to 8 signals that index; the doorbell's WORK
 * program takes the value over, when user space lets it.
 */
#include "kvm_bpf.h"

#ifndef INDEX
#define INDEX 0
#endif
#define ROUNDS 16

KVM_BPF_MMIO_DEVICE(0x1000, 1, "kvm-bpf,bell");
#ifndef WITHOUT_DOORBELL
KVM_BPF_DOORBELL(7, INDEX);
#endif

struct bell {
	__u64 value;
	/* By the WORK program: the value, and how often it has run. */
	__u64 served;
	__u64 runs;
	/* Those that wait, and whether they have to. */
	__u64 inside;
	__u64 closed;
	/* What the last signal came to. */
	__s64 signal;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct bell);
} bell SEC(".maps");

static __always_inline struct bell *the_bell(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&bell, &zero);
}

KVM_IO_WRITE
int bell_write(struct bpf_kvm_io_ctx *ctx)
{
	struct bell *b = the_bell();
	__u64 data = *(__u64 *)ctx->buf;

	if (!b)
		return 0;
	if (ctx->offset == 0)
		b->value = data;
	else
		b->signal = bpf_kvm_irq_signal(ctx, data);
	return 0;
}

static long is_open(__u32 index, void *b)
{
	return *(volatile __u64 *)&(*(struct bell **)b)->closed == 0;
}

static long wait(__u32 round, void *b)
{
	bpf_loop(1 << 23, is_open, b, 0);
	return is_open(round, b);
}

/* Some seconds at most; sleepable, as RCU's other kind complains of readers that take long. */
KVM_IO_WORK_SLEEPABLE(INDEX, serve)
int bell_serve(struct bpf_kvm_io_ctx *ctx)
{
	struct bell *b = the_bell();

	if (!b)
		return 0;
	__sync_fetch_and_add(&b->inside, 1);
	bpf_loop(ROUNDS, wait, &b, 0);
	__sync_fetch_and_sub(&b->inside, 1);
	__sync_fetch_and_add(&b->runs, 1);
	b->served = b->value;
	return 0;
}

#ifdef REPLACED
KVM_IO_WORK(REPLACED, replaced)
int bell_replaced(struct bpf_kvm_io_ctx *ctx)
{
	return 0;
}
#endif

char _license[] SEC("license") = "Dual BSD/GPL";
