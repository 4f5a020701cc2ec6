/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What the test asks of guest memory, by a map and then a guest's write or a run. */
#include "kvm_bpf.h"

#ifndef DATA_SIZE
#define DATA_SIZE 0x2000
#endif

enum op {
	READ,
	WRITE,
	READ_NOFAULT,
	WRITE_NOFAULT,
	RANDOM,
};

struct request {
	__u32 op;
	__u32 len;
	__u64 gpa;
	__s64 result;
	/* How often it was done. */
	__u64 done;
	__u8 data[DATA_SIZE];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct request);
} request SEC(".maps");

static __always_inline struct request *the_request(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&request, &zero);
}
