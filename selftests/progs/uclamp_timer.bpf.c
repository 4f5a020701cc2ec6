// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Calls a kfunc that sleeps from a timer's callback: the verifier must refuse.
 */
#include "kvm_bpf.h"

#define CLOCK_MONOTONIC 1

KVM_BPF_MMIO_DEVICE(0x1000, 0, "kvm-bpf,test");

struct element {
	struct bpf_timer timer;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct element);
} timers SEC(".maps");

static int callback(void *map, __u32 *key, struct element *element)
{
	bpf_set_current_uclamp(0, 1024);
	return 0;
}

KVM_IO_WRITE_SLEEPABLE
int start_timer(struct bpf_kvm_io_ctx *ctx)
{
	__u32 zero = 0;
	struct element *element = bpf_map_lookup_elem(&timers, &zero);

	if (!element)
		return 1;
	bpf_timer_init(&element->timer, &timers, CLOCK_MONOTONIC);
	bpf_timer_set_callback(&element->timer, callback);
	return bpf_timer_start(&element->timer, 0, 0);
}

char _license[] SEC("license") = "Dual BSD/GPL";
