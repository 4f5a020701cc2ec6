// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * A device with parameters of each size, which the guest reads: 0x100 * n + 8 * m is
 * value m of parameter n.  The others of its name include it with more.
 */
#include "kvm_bpf.h"

KVM_BPF_MMIO_DEVICE(0x1000, 0, "kvm-bpf,params");

#define ARRAY(name, entries, type_, flags)        \
	struct {                                  \
		__uint(type, BPF_MAP_TYPE_ARRAY); \
		__uint(map_flags, flags);         \
		__uint(max_entries, entries);     \
		__type(key, __u32);               \
		__type(value, type_);             \
	} name SEC(".maps")

ARRAY(bytes, 3, __u8, 0);
ARRAY(halves, 3, __u16, 0);
ARRAY(words, 3, __u32, 0);
/* User space cannot map it: no state. */
ARRAY(longs, 3, __u64, 0);
/* State. */
ARRAY(mapped, 3, __u32, BPF_F_MMAPABLE);

KVM_BPF_PARAM("bytes");
KVM_BPF_PARAM("halves");
KVM_BPF_PARAM("words");
KVM_BPF_REQUIRED_PARAM("longs");
KVM_BPF_REQUIRED_PARAM("mapped");

#define VALUE(name, index)                                  \
	({                                                  \
		typeof(*name.value) *value =                \
			bpf_map_lookup_elem(&name, &index); \
		value ? *value : ~0ULL;                     \
	})

KVM_IO_READ
int params_read(struct bpf_kvm_io_ctx *ctx)
{
	__u32 index = ctx->offset % 0x100 / 8;
	__u64 value = ~0ULL;

	switch (ctx->offset / 0x100) {
	case 0:
		value = VALUE(bytes, index);
		break;
	case 1:
		value = VALUE(halves, index);
		break;
	case 2:
		value = VALUE(words, index);
		break;
	case 3:
		value = VALUE(longs, index);
		break;
	case 4:
		value = VALUE(mapped, index);
		break;
#ifdef ADDED
	case 5:
		value = VALUE(ADDED, index);
		break;
#endif
	}
	*(__u64 *)ctx->buf = value;
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
