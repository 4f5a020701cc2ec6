// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* A timer whose callback takes a while and starts it again. */
#include "kvm_bpf.h"

#define CLOCK_MONOTONIC 1
#define ROUNDS 4000

KVM_BPF_MMIO_DEVICE(0x1000, 0, "kvm-bpf,timer");

struct progress {
	__u64 begun;
	__u64 ended;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct progress);
} progress SEC(".maps");

struct alarm {
	struct bpf_timer timer;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct alarm);
} alarms SEC(".maps");

static int on_timer(void *map, __u32 *key, struct alarm *alarm)
{
	__u32 zero = 0;
	struct progress *p = bpf_map_lookup_elem(&progress, &zero);

	if (!p)
		return 0;
	__sync_fetch_and_add(&p->begun, 1);
	for (int round = 0; round < ROUNDS; round++)
		asm volatile("");
	__sync_fetch_and_add(&p->ended, 1);
	bpf_timer_start(&alarm->timer, 0, 0);
	return 0;
}

KVM_IO_READ
int timer_read(struct bpf_kvm_io_ctx *ctx)
{
	return 0;
}

KVM_IO_WORK(0, save)
int timer_save(struct bpf_kvm_io_ctx *ctx)
{
	__u32 zero = 0;
	struct alarm *alarm = bpf_map_lookup_elem(&alarms, &zero);

	if (alarm)
		bpf_timer_cancel(&alarm->timer);
	return 0;
}

KVM_IO_WORK(1, restore)
int timer_restore(struct bpf_kvm_io_ctx *ctx)
{
	__u32 zero = 0;
	struct alarm *alarm = bpf_map_lookup_elem(&alarms, &zero);

	if (!alarm)
		return 0;
	bpf_timer_init(&alarm->timer, &alarms, CLOCK_MONOTONIC);
	bpf_timer_set_callback(&alarm->timer, on_timer);
	bpf_timer_start(&alarm->timer, 0, 0);
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
