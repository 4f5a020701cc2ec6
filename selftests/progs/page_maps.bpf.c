// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * A device whose page may be the map "good" and none of the others; the tests
 * put their names into the note.
 */
#include "kvm_bpf.h"

#define PAGE 0x1000

KVM_BPF_MMIO_DEVICE(2 * PAGE, 0, "kvm-bpf,test");
KVM_BPF_READ_PAGE(0, 0x1000, "good");

struct page {
	__u64 words[PAGE / 8];
};

struct locked_page {
	struct bpf_spin_lock lock;
	__u64 words[PAGE / 8 - 1];
};

#define PAGE_MAP(name, _type, entries, _value, flags) \
	struct {                                      \
		__uint(type, _type);                  \
		__uint(max_entries, entries);         \
		__type(key, __u32);                   \
		__type(value, _value);                \
		__uint(map_flags, flags);             \
	} name SEC(".maps")

PAGE_MAP(good, BPF_MAP_TYPE_ARRAY, 1, struct page, BPF_F_MMAPABLE);
PAGE_MAP(words, BPF_MAP_TYPE_ARRAY, PAGE / 8, __u64, BPF_F_MMAPABLE);
PAGE_MAP(hash, BPF_MAP_TYPE_HASH, 1, struct page, 0);
PAGE_MAP(per_cpu, BPF_MAP_TYPE_PERCPU_ARRAY, 1, struct page, 0);
PAGE_MAP(not_mapped, BPF_MAP_TYPE_ARRAY, 1, struct page, 0);
PAGE_MAP(small, BPF_MAP_TYPE_ARRAY, 1, __u64, BPF_F_MMAPABLE);
PAGE_MAP(padded, BPF_MAP_TYPE_ARRAY, PAGE / 4, __u32, BPF_F_MMAPABLE);
PAGE_MAP(large, BPF_MAP_TYPE_ARRAY, 2, struct page, BPF_F_MMAPABLE);
PAGE_MAP(locked, BPF_MAP_TYPE_ARRAY, 1, struct locked_page, BPF_F_MMAPABLE);

KVM_IO_READ
int maps_read(struct bpf_kvm_io_ctx *ctx)
{
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
