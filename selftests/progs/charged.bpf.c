// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * An array of 4 MiB, and a hash table whose elements are allocated one by one, as the
 * guest writes their keys: 1 KiB for each.
 */
#include "kvm_bpf.h"

KVM_BPF_MMIO_DEVICE(0x1000, 0, "kvm-bpf,test");

struct block {
	__u64 words[128];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, struct block);
} at_once SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct block);
} later SEC(".maps");

KVM_IO_WRITE
int charged_write(struct bpf_kvm_io_ctx *ctx)
{
	__u32 key = *(__u32 *)ctx->buf, zero = 0;
	struct block *block = bpf_map_lookup_elem(&at_once, &zero);

	if (!block)
		return 1;
	/* No memory: the access goes on to user space. */
	return bpf_map_update_elem(&later, &key, block, BPF_ANY) ? 1 : 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
