// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* A device with a use for all that the library's builder gives one. */
#include "kvm_bpf.h"

KVM_BPF_MMIO_DEVICE(0x1000, 1, "kvm-bpf,builder");
KVM_BPF_WINDOW(KVM_BPF_MEMORY_READ);

struct builder {
	/* What the guest has written to offset 0. */
	__u64 value;
	/* Runs of the WORK programs, and what the last one of "kick" found. */
	__u64 restores;
	__u64 kicks;
	__u64 kick;
	/* What the last access of guest memory, and the last signal, came to. */
	__s64 memory;
	__s64 signal;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct builder);
} builder SEC(".maps");

/* No state: the VMM fills it. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 4);
	__type(key, __u32);
	__type(value, __u64);
} table SEC(".maps");

static __always_inline struct builder *the_builder(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&builder, &zero);
}

/* Offset 0 is the value, 8 * n from 0x100 on an entry of the table. */
KVM_IO_READ
int builder_read(struct bpf_kvm_io_ctx *ctx)
{
	struct builder *b = the_builder();
	__u32 index = (ctx->offset - 0x100) / 8;
	__u64 *entry = bpf_map_lookup_elem(&table, &index);

	if (b && !ctx->offset)
		*(__u64 *)ctx->buf = b->value;
	else if (entry)
		*(__u64 *)ctx->buf = *entry;
	return 0;
}

/* Offset 0 is the value; to 8 an address of guest memory, to 0x10 an index to signal. */
KVM_IO_WRITE_SLEEPABLE
int builder_write(struct bpf_kvm_io_ctx *ctx)
{
	struct builder *b = the_builder();
	__u64 data = *(__u64 *)ctx->buf;
	__u64 word = 0;

	if (!b)
		return 0;
	switch (ctx->offset) {
	case 0:
		b->value = data;
		break;
	case 8:
		b->memory = bpf_kvm_mem_read(ctx, data, &word, sizeof(word));
		break;
	case 0x10:
		b->signal = bpf_kvm_irq_signal(ctx, data);
		break;
	}
	return 0;
}

KVM_IO_WORK(0, restore)
int builder_restore(struct bpf_kvm_io_ctx *ctx)
{
	struct builder *b = the_builder();

	if (b)
		b->restores++;
	return 0;
}

KVM_IO_WORK(1, kick)
int builder_kick(struct bpf_kvm_io_ctx *ctx)
{
	struct builder *b = the_builder();

	if (!b)
		return 0;
	b->kick = *(__u64 *)ctx->buf;
	__sync_fetch_and_add(&b->kicks, 1);
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
