// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * A device that counts writes, which the others of its name include with the state
 * in other types.  8-byte registers, for reads:
 *
 *	0x00	the version
 *	0x08	writes
 *	0x10	runs of "save"
 *	0x18	of "restore"
 *	0x20	of "replaced"
 */
#include "kvm_bpf.h"

#ifndef VERSION
#define VERSION 1
#endif
#ifndef FIELDS
#define FIELDS __u32 writes, saved, restored, replaced
#endif

KVM_BPF_MMIO_DEVICE(0x1000, 0, "kvm-bpf,test");
KVM_BPF_STATE_VERSION(VERSION, 1);

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct counts { FIELDS; });
} counts SEC(".maps");

/* The same in all of them, with padding. */
struct kept {
	__u8 first;
	__u64 last;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct kept);
} kept SEC(".maps");

static __always_inline struct counts *device_counts(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&counts, &zero);
}

KVM_IO_READ
int convert_read(struct bpf_kvm_io_ctx *ctx)
{
	struct counts *counts = device_counts();
	__u64 value = 0;

	if (!counts)
		return 1;
	switch (ctx->offset) {
	case 0x00:
		value = VERSION;
		break;
	case 0x08:
		value = counts->writes;
		break;
	case 0x10:
#ifndef WITHOUT_SAVED
		value = counts->saved;
#endif
		break;
	case 0x18:
		value = counts->restored;
		break;
	case 0x20:
		value = counts->replaced;
		break;
	}
	*(__u64 *)ctx->buf = value;
	return 0;
}

KVM_IO_WRITE
int convert_write(struct bpf_kvm_io_ctx *ctx)
{
	struct counts *counts = device_counts();

	if (!counts)
		return 1;
	__sync_fetch_and_add(&counts->writes, 1);
	return 0;
}

KVM_IO_WORK(0, save)
int convert_save(struct bpf_kvm_io_ctx *ctx)
{
#ifndef WITHOUT_SAVED
	struct counts *counts = device_counts();

	if (counts)
		counts->saved++;
#endif
	return 0;
}

KVM_IO_WORK(1, restore)
int convert_restore(struct bpf_kvm_io_ctx *ctx)
{
	struct counts *counts = device_counts();

	if (counts)
		counts->restored++;
	return 0;
}

KVM_IO_WORK(2, replaced)
int convert_replaced(struct bpf_kvm_io_ctx *ctx)
{
	struct counts *counts = device_counts();

	if (counts)
		counts->replaced++;
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
