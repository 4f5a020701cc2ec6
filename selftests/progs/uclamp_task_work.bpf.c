// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Calls a kfunc that is for programs from task work of the vCPU's own thread, if
 * the verifier lets it have that.
 */
#include "answer.h"

KVM_BPF_MMIO_DEVICE(0x1000, 0, "kvm-bpf,test");

/* Not just declared: libbpf compares the types with the kernel's. */
struct task_struct {
};
struct bpf_map {
};

extern int bpf_task_work_schedule_resume(
	struct task_struct *task, struct bpf_task_work *work, void *map,
	int (*callback)(struct bpf_map *, void *, void *)) __ksym;

struct element {
	struct bpf_task_work work;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct element);
} works SEC(".maps");

static int callback(struct bpf_map *map, void *key, void *value)
{
	set_answer(bpf_set_current_uclamp(100, 900));
	return 0;
}

KVM_IO_WRITE_SLEEPABLE
int schedule_work(struct bpf_kvm_io_ctx *ctx)
{
	__u32 zero = 0;
	struct element *element = bpf_map_lookup_elem(&works, &zero);

	if (!element)
		return 1;
	set_answer(1);
	return bpf_task_work_schedule_resume(bpf_get_current_task_btf(),
					     &element->work, &works, callback);
}

char _license[] SEC("license") = "Dual BSD/GPL";
