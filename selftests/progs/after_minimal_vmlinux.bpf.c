// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * A device after a vmlinux.h with no more than it needs, as bpftool writes it:
 * the line before it is for clang, see samples/devices/kvm_bpf.h.
 */
struct __attribute__((preserve_static_offset)) bpf_kvm_io_ctx;

#ifndef __VMLINUX_H__
#define __VMLINUX_H__

#pragma clang attribute push(__attribute__((preserve_access_index)), \
			     apply_to = record)

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef int __s32;
typedef unsigned int __u32;
typedef long long __s64;
typedef unsigned long long __u64;
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u32 __wsum;

enum bpf_map_type {
	BPF_MAP_TYPE_UNSPEC = 0,
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_ARRAY = 2,
};

struct bpf_kvm_io_ctx {
	__u8 buf[8];
	__u64 offset;
	__u8 len;
	__u32 vcpu_id;
	__u32 region;
};

struct bpf_kvm_io_ctx_kern {
	__u32 region;
};

struct bpf_kvm_irq {
	__u32 index;
};

struct task_struct {
	int pid;
};

/* Newer ones have the kernel functions, too. */
extern int bpf_kvm_irq_signal(struct bpf_kvm_io_ctx_kern *ctx, __u32 irq)
	__attribute__((section(".ksyms"), weak));
extern void *bpf_cast_to_kern_ctx(void *obj)
	__attribute__((section(".ksyms"), weak));
extern __s64 bpf_get_cpu_scale(__u32 cpu)
	__attribute__((section(".ksyms"), weak));

#pragma clang attribute pop

#endif /* __VMLINUX_H__ */

#include "after_vmlinux.h"
