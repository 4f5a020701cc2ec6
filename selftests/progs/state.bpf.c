// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * A device with state of every kind of type, which the others of its name include
 * with another layout: what of it is saved, and what goes on with it?
 */
#include "kvm_bpf.h"

KVM_BPF_MMIO_DEVICE(0x1000, 2, "kvm-bpf,state\0kvm-bpf,test");
#ifdef STATE_VERSION
KVM_BPF_STATE_VERSION(STATE_VERSION, STATE_OLDEST);
#endif

#ifndef COUNT
#define COUNT __u32 count
#endif
#ifndef ADDED
#define ADDED
#endif
#ifndef REMOVED
#define REMOVED __u16 removed;
#endif
#ifndef NUMBERS
#define NUMBERS 3
#endif

enum mode { MODE_IDLE, MODE_BUSY = 7, MODE_FAILED = -1 };
enum wide { WIDE_ONE = 1, WIDE_BIG = 1ULL << 40 };
typedef __s16 sample;

struct pair {
	__u8 first;
	__u32 second;
};

struct kinds {
	__u8 unsigned8;
	__s8 signed8;
	__u16 unsigned16;
	__s16 signed16;
	__u32 unsigned32;
	__s32 signed32;
	__u64 unsigned64;
	__s64 signed64;
	_Bool flag;
	char letter;
	enum mode mode;
	enum wide wide;
	__u32 low : 3;
	__s32 middle : 7;
	__u32 across : 20;
	_Bool bit : 1;
	__u64 long_bits : 61;
	sample table[2][3];
	const volatile __u64 qualified;
	__u8 bytes[5];
	char text[7];
	struct pair pair;
	struct pair pairs[2];
	struct {
		__u8 around;
		struct {
			__u32 inside;
		};
	} outer;
	union {
		__u32 word;
		__u16 half;
	};
	void *pointer;
};

struct changing {
	COUNT;
	ADDED
	REMOVED
	__u64 numbers[NUMBERS];
	__u8 name[4];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 3);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct kinds);
} kinds SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct changing);
} changing SEC(".maps");

/* Without types. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(key_size, 4);
	__uint(value_size, 12);
} raw SEC(".maps");

/* No state: user space cannot map it. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} scratch SEC(".maps");

struct kinds global;
__u64 preset = 7;
static __u64 hidden SEC(".data.own");
#ifdef WITH_LATER
__u32 later = 11;
#endif
const volatile __u64 constant = 5;

KVM_IO_READ
int state_read(struct bpf_kvm_io_ctx *ctx)
{
	__u32 zero = 0;
	struct changing *fields = bpf_map_lookup_elem(&changing, &zero);
	__u64 *unsaved = bpf_map_lookup_elem(&scratch, &zero);
	void *bytes = bpf_map_lookup_elem(&raw, &zero);
	struct kinds *all = bpf_map_lookup_elem(&kinds, &zero);

	if (!fields || !unsaved || !bytes || !all)
		return 1;
	switch (ctx->offset) {
	case 0x00:
		*(__u64 *)ctx->buf = fields->count;
		break;
	case 0x08:
		*(__u64 *)ctx->buf = preset;
		break;
	case 0x10:
		*(__u64 *)ctx->buf = hidden;
		break;
	case 0x18:
		*(__u64 *)ctx->buf = global.unsigned64;
		break;
	case 0x20:
		*(__u64 *)ctx->buf = constant + *unsaved;
		break;
	}
	return 0;
}

KVM_IO_WRITE
int state_write(struct bpf_kvm_io_ctx *ctx)
{
	hidden = *(__u64 *)ctx->buf;
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
