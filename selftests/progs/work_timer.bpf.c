// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * A timer whose callback takes a while and starts it again.  The other one of its name
 * includes it with the state in other types.
 */
#include "kvm_bpf.h"

#ifndef WORD
#define WORD __u32
#endif

#define CLOCK_MONOTONIC 1
/* Nearly always at work, with a pause for what else the CPU has to do. */
#define BUSY_NS 10000000
#define PAUSE_NS 1000000
#define MAX_ROUNDS 1000000

KVM_BPF_MMIO_DEVICE(0x1000, 0, "kvm-bpf,timer");
#ifdef STATE_VERSION
KVM_BPF_STATE_VERSION(STATE_VERSION, 0);
#endif

/* Whose callbacks count: the test sets it before it loads the programs. */
const volatile __u32 generation;

/* By generation. */
struct progress {
	WORD begun[2];
	WORD ended[2];
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

/* Whether it has been long enough. */
static long work(__u64 round, __u64 *start)
{
	return bpf_ktime_get_ns() - *start > BUSY_NS;
}

static int on_timer(void *map, __u32 *key, struct alarm *alarm)
{
	__u32 zero = 0;
	struct progress *p = bpf_map_lookup_elem(&progress, &zero);
	__u64 start = bpf_ktime_get_ns();

	if (!p)
		return 0;
	__sync_fetch_and_add(&p->begun[generation & 1], 1);
	bpf_loop(MAX_ROUNDS, work, &start, 0);
	__sync_fetch_and_add(&p->ended[generation & 1], 1);
	bpf_timer_start(&alarm->timer, PAUSE_NS, 0);
	return 0;
}

static __always_inline struct alarm *the_alarm(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&alarms, &zero);
}

static __always_inline void start(struct alarm *alarm)
{
	bpf_timer_init(&alarm->timer, &alarms, CLOCK_MONOTONIC);
	bpf_timer_set_callback(&alarm->timer, on_timer);
	bpf_timer_start(&alarm->timer, 0, 0);
}

KVM_IO_READ
int timer_read(struct bpf_kvm_io_ctx *ctx)
{
	return 0;
}

KVM_IO_WORK(0, save)
int timer_save(struct bpf_kvm_io_ctx *ctx)
{
	struct alarm *alarm = the_alarm();

	if (alarm)
		bpf_timer_cancel(&alarm->timer);
	return 0;
}

KVM_IO_WORK(1, restore)
int timer_restore(struct bpf_kvm_io_ctx *ctx)
{
	struct alarm *alarm = the_alarm();

	if (alarm)
		start(alarm);
	return 0;
}

KVM_IO_WORK(2, replaced)
int timer_replaced(struct bpf_kvm_io_ctx *ctx)
{
	struct alarm *alarm = the_alarm();

	if (!alarm)
		return 0;
	/* An old callback may be running. */
	bpf_timer_cancel(&alarm->timer);
	start(alarm);
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
