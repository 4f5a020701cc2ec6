/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * A device that uses types and functions of the kernel: a read of 4 bytes gives
 *
 *	0x0	the size of struct task_struct in the running kernel, by CO-RE
 *	0x4	how often the device was written to
 *	0x8	1, if the kernel knows the capacity of the host's first CPU
 *
 * and a write keeps the interrupt that was written, and signals it.
 */
#ifndef AFTER_VMLINUX_H
#define AFTER_VMLINUX_H

#include "kvm_bpf.h"
#include <bpf/bpf_core_read.h>

KVM_BPF_MMIO_DEVICE(0x1000, 1, "kvm-bpf,test");

struct kept {
	struct bpf_kvm_irq __kptr *irq;
	__u32 writes;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct kept);
} kept SEC(".maps");

static __always_inline struct kept *get_kept(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&kept, &zero);
}

KVM_IO_READ
int after_vmlinux_read(struct bpf_kvm_io_ctx *ctx)
{
	struct kept *kept = get_kept();
	__u32 value = 0;

	if (!kept)
		return 1;
	switch (ctx->offset) {
	case 0x0:
		value = bpf_core_type_size(struct task_struct);
		break;
	case 0x4:
		value = kept->writes;
		break;
	case 0x8:
		value = bpf_get_cpu_scale(0) > 0;
		break;
	}
	*(__u64 *)ctx->buf = value;
	return 0;
}

KVM_IO_WRITE
int after_vmlinux_write(struct bpf_kvm_io_ctx *ctx)
{
	__u32 number = *(__u32 *)ctx->buf;
	struct kept *kept = get_kept();
	struct bpf_kvm_irq *irq;

	if (!kept)
		return 1;
	kept->writes++;
	irq = bpf_kvm_irq_acquire(ctx, number);
	if (!irq)
		return 1;
	irq = bpf_kptr_xchg(&kept->irq, irq);
	if (irq)
		bpf_kvm_irq_release(irq);
	bpf_kvm_irq_signal(ctx, number);
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";

#endif /* AFTER_VMLINUX_H */
