// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The pieces of Documentation/writing-a-device.md that are no device by themselves, word for word:
 * scripts/commands compares them.  A page begins with ID and VERSION; a write puts into its words
 * 0 and 1
 *
 *	at 0, 4	the lower half of the data, twice
 *	at 8	the number of the vCPU, and the lower half
 *	at 0x10	the lower half, twice
 *	at 0x14	the upper half, and the lower one
 */
#include "kvm_bpf.h"

#define ID 42
#define VERSION 1

KVM_BPF_MMIO_DEVICE(0x1000, 0, "kvm-bpf,test");

__u32 seconds_left;
__u64 last;

/* clang-format off */
KVM_BPF_READ_PAGE(0, 0, ".data.page");          /* region 0, from its start on */

struct { __u32 id, version; __u64 words[511]; } page SEC(".data.page") = { .id = ID, .version = VERSION };       /* 4096 bytes, not static */

KVM_IO_WRITE
int excerpts_write(struct bpf_kvm_io_ctx *ctx)
{
	struct words { __u32 low, high; } *words = (void *)ctx->buf;  /* words->low in one branch, words->high in the other */
	__u64 data = *(__u64 *)ctx->buf;        /* write program */
	__u8 wants_vcpu = ctx->offset == 8;
	__u32 value;

	if (ctx->offset & 16) {
		value = ctx->offset & 4 ? *(__u32 *)(ctx->buf + 4) : *(__u32 *)ctx->buf;
	} else {
		value = wants_vcpu ? ctx->vcpu_id : *(__u32 *)ctx->buf;
	}
	page.words[0] = value;
	page.words[1] = words->low;
	last = data;
	return 0;
}

KVM_IO_READ
int excerpts_read(struct bpf_kvm_io_ctx *ctx)
{
	__u64 *words = (__u64 *)&page;
	__u64 value = words[ctx->offset / 8 % 512] >> ctx->offset % 8 * 8;

	*(__u64 *)ctx->buf = value;             /* read program */
	return 0;
}

KVM_IO_WORK(0, save)
int alarm_save(struct bpf_kvm_io_ctx *ctx)
{
	seconds_left = last >> 32;     /* a global variable */
	return 0;               /* 1: there is more to do, run it again */
}

char _license[] SEC("license") = "Dual BSD/GPL";
