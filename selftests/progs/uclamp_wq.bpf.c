// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Calls a kfunc that is for the vCPU's own thread from a kernel thread. */
#include "answer.h"

KVM_BPF_MMIO_DEVICE(0x1000, 0, "kvm-bpf,test");

extern int bpf_wq_init(struct bpf_wq *wq, void *map, unsigned int flags) __ksym;
extern int bpf_wq_start(struct bpf_wq *wq, unsigned int flags) __ksym;
extern int bpf_wq_set_callback(struct bpf_wq *wq,
			       int (*callback)(void *, int *, void *),
			       unsigned int flags) __ksym;

struct element {
	struct bpf_wq work;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct element);
} works SEC(".maps");

static int callback(void *map, int *key, void *value)
{
	set_answer(bpf_set_current_uclamp(0, 1024));
	return 0;
}

KVM_IO_WRITE_SLEEPABLE
int start_work(struct bpf_kvm_io_ctx *ctx)
{
	__u32 zero = 0;
	struct element *element = bpf_map_lookup_elem(&works, &zero);

	if (!element)
		return 1;
	set_answer(1);
	if (bpf_wq_init(&element->work, &works, 0))
		return 1;
	if (bpf_wq_set_callback(&element->work, callback, 0))
		return 1;
	return bpf_wq_start(&element->work, 0);
}

char _license[] SEC("license") = "Dual BSD/GPL";
