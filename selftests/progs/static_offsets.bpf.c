// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Accesses of the context whose offsets are constants in the source, in branches
 * that clang joins: into one access at an offset that it computes, if it is not
 * told to preserve them.  A write of 8 bytes leaves in the map, and a read of 8
 * bytes gives, by the bits of its offset
 *
 *	0x08	the upper half of the data rather than the lower
 *	0x10	the number of the vCPU rather than the lower half
 */
#include "kvm_bpf.h"

#define UPPER 0x08
#define VCPU 0x10

#if __has_attribute(preserve_static_offset)
#define COMPATIBLE "kvm-bpf,test"
#else
#define COMPATIBLE "kvm-bpf,old-clang"
#endif

KVM_BPF_MMIO_DEVICE(0x1000, 0, COMPATIBLE);

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} seen SEC(".maps");

KVM_IO_WRITE
int offsets_write(struct bpf_kvm_io_ctx *ctx)
{
	__u32 zero = 0;
	__u64 *value = bpf_map_lookup_elem(&seen, &zero);

	if (!value)
		return 1;
	if (ctx->offset & VCPU)
		*value =
			ctx->offset & UPPER ? ctx->vcpu_id : *(__u32 *)ctx->buf;
	else
		*value = ctx->offset & UPPER ? *(__u32 *)(ctx->buf + 4)
					     : *(__u32 *)ctx->buf;
	return 0;
}

KVM_IO_READ
int offsets_read(struct bpf_kvm_io_ctx *ctx)
{
	if (ctx->offset & UPPER)
		*(__u32 *)(ctx->buf + 4) = 0x11223344;
	else
		*(__u32 *)ctx->buf = 0x11223344;
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
