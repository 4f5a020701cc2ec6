// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * A device with state of every kind, which the others of its name include in
 * another version: what of it do new programs go on with?  8-byte registers:
 *
 *	0x00	RW	the first field of a map, 32 bits
 *	0x08	RW	the second one
 *	0x10	RW	a field of another map
 *	0x18	RW	a global variable, 0 at first
 *	0x20	RW	one that is 7 at first
 *	0x28	RO	a constant: the version
 */
#include "kvm_bpf.h"

#ifndef VERSION
#define VERSION 1
#endif
#ifndef FIELDS
#define FIELDS __u32 first, second
#endif
#ifndef FLAGS
#define FLAGS 0
#endif

KVM_BPF_MMIO_DEVICE(0x1000, 0, "kvm-bpf,test");

struct state {
	FIELDS;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, FLAGS);
	__type(key, __u32);
	__type(value, struct state);
} state SEC(".maps");

#ifndef WITHOUT_OTHER
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8);
	__type(key, __u32);
	__type(value, __u64);
} other SEC(".maps");

static __always_inline __u64 other_value(void)
{
	__u32 zero = 0;
	__u64 *value = bpf_map_lookup_elem(&other, &zero);

	return value ? *value : 0;
}
#endif

__u64 zeroed;
__u64 preset = 7;
const volatile __u64 version = VERSION;

KVM_IO_READ
int carry_read(struct bpf_kvm_io_ctx *ctx)
{
	__u32 zero = 0;
	struct state *fields = bpf_map_lookup_elem(&state, &zero);
	__u64 value = 0;

	if (!fields)
		return 1;
	switch (ctx->offset) {
	case 0x00:
		value = fields->first;
		break;
	case 0x08:
		value = fields->second;
		break;
#ifndef WITHOUT_OTHER
	case 0x10:
		value = other_value();
		break;
#endif
	case 0x18:
		value = zeroed;
		break;
	case 0x20:
		value = preset;
		break;
	case 0x28:
		value = version;
		break;
	}
	*(__u64 *)ctx->buf = value;
	return 0;
}

#ifndef WITHOUT_WRITE
KVM_IO_WRITE
int carry_write(struct bpf_kvm_io_ctx *ctx)
{
	__u64 data = *(__u64 *)ctx->buf;
	__u32 zero = 0;
	struct state *fields = bpf_map_lookup_elem(&state, &zero);

	if (!fields)
		return 1;
	switch (ctx->offset) {
	case 0x00:
		fields->first = data;
		break;
	case 0x08:
		fields->second = data;
		break;
#ifndef WITHOUT_OTHER
	case 0x10:
		bpf_map_update_elem(&other, &zero, &data, 0);
		break;
#endif
	case 0x18:
		zeroed = data;
		break;
	case 0x20:
		preset = data;
		break;
	}
	return 0;
}
#endif

char _license[] SEC("license") = "Dual BSD/GPL";
