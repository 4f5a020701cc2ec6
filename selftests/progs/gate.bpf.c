// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* A read that takes until user space opens the gate; some seconds at most. */
#include "kvm_bpf.h"

#define ROUNDS 16

KVM_BPF_MMIO_DEVICE(0x1000, 0, "kvm-bpf,test");

struct gate {
	__u32 inside;
	__u32 open;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct gate);
} gate SEC(".maps");

static long is_open(__u32 index, void *gate)
{
	return *(volatile __u32 *)&(*(struct gate **)gate)->open != 0;
}

static long wait(__u32 round, void *gate)
{
	bpf_loop(1 << 23, is_open, gate, 0);
	return is_open(round, gate);
}

/* Sleepable, as RCU's other kind complains of readers that take long. */
KVM_IO_READ_SLEEPABLE
int gate_read(struct bpf_kvm_io_ctx *ctx)
{
	__u32 zero = 0;
	struct gate *state = bpf_map_lookup_elem(&gate, &zero);

	if (!state)
		return 1;
	__sync_fetch_and_add(&state->inside, 1);
	bpf_loop(ROUNDS, wait, &state, 0);
	__sync_fetch_and_sub(&state->inside, 1);
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
