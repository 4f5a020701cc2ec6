/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * As much of a kernel's types as tools/testing/selftests/bpf/progs/verifier_ctx.c
 * needs to compile.  The programs that are loaded from it use struct __sk_buff
 * alone, which is user ABI; a real vmlinux.h would want a kernel that is built,
 * and a bpftool of the machine's own.  It has a folder of its own, since
 * ../after_vmlinux.c includes such a real one.
 */
#ifndef VMLINUX_H
#define VMLINUX_H

#include <linux/bpf.h>
#include <linux/socket.h>
#include <linux/types.h>

typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
typedef _Bool bool;

typedef struct {
	int counter;
} refcount_t;

struct callback_head {
	struct callback_head *next;
	void (*func)(struct callback_head *head);
};

struct bpf_nf_ctx {
	const void *state;
	void *skb;
};

/* The one function that a program calls is in a test module, which is not there. */
#pragma weak bpf_kfunc_call_test_mem_len_pass1

/* Parameters of functions that nothing here calls. */
struct prog_test_member1;
struct sk_buff_head;
struct sock;
struct sock_common;
struct vm_area_struct;

#endif /* VMLINUX_H */
