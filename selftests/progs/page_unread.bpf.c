// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* A device with a page for loads, which nothing serves where the host has no slot. */
#include "kvm_bpf.h"

#define PAGE 0x1000

KVM_BPF_MMIO_DEVICE(PAGE, 0, "kvm-bpf,test");
KVM_BPF_READ_PAGE(0, 0, "page");

struct page {
	__u64 words[PAGE / 8];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct page);
	__uint(map_flags, BPF_F_MMAPABLE);
} page SEC(".maps");

KVM_IO_WRITE
int unread_write(struct bpf_kvm_io_ctx *ctx)
{
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
