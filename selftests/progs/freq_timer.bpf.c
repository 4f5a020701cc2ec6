// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Asks for the frequencies of the CPU that was written, or its own, in a timer. */
#include "kvm_bpf.h"

#define CLOCK_MONOTONIC 1
#define THIS_CPU 0xfffffffe

KVM_BPF_MMIO_DEVICE(0x1000, 0, "kvm-bpf,test");

struct element {
	struct bpf_timer timer;
	__u32 cpu;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct element);
} timers SEC(".maps");

struct answers {
	__s64 freq;
	__s64 max_hw_freq;
	__s64 scale;
	__s64 done;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct answers);
} answers SEC(".maps");

static int callback(void *map, __u32 *key, struct element *element)
{
	__u32 zero = 0;
	struct answers *to = bpf_map_lookup_elem(&answers, &zero);
	__u32 cpu = element->cpu;

	if (!to)
		return 0;
	if (cpu == THIS_CPU)
		cpu = bpf_get_smp_processor_id();
	to->freq = bpf_get_cpu_freq(cpu);
	to->max_hw_freq = bpf_get_cpu_max_hw_freq(cpu);
	to->scale = bpf_get_cpu_scale(cpu);
	__sync_fetch_and_add(&to->done, 1);
	return 0;
}

KVM_IO_WRITE
int start_timer(struct bpf_kvm_io_ctx *ctx)
{
	__u32 zero = 0;
	struct element *element = bpf_map_lookup_elem(&timers, &zero);
	struct answers *to = bpf_map_lookup_elem(&answers, &zero);

	if (!element || !to)
		return 1;
	element->cpu = *(__u32 *)ctx->buf;
	to->done = 0;
	bpf_timer_init(&element->timer, &timers, CLOCK_MONOTONIC);
	bpf_timer_set_callback(&element->timer, callback);
	return bpf_timer_start(&element->timer, 0, 0);
}

char _license[] SEC("license") = "Dual BSD/GPL";
