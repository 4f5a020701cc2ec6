// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Reads a word that the guest changes meanwhile, so often and in so many bytes as the
 * request says, and counts in "done" those that were neither of the two that "data"
 * begins with.
 */
#include "mem.h"

KVM_BPF_MMIO_DEVICE(0x1000, 0, "kvm-bpf,mem");

KVM_IO_READ
int mem_read(struct bpf_kvm_io_ctx *ctx)
{
	return 0;
}

KVM_IO_WORK_SLEEPABLE(0, work)
int mem_work(struct bpf_kvm_io_ctx *ctx)
{
	__u64 count = *(__u64 *)ctx->buf;
	struct request *r = the_request();
	__u64 *pair, torn = 0;
	__u64 i;

	if (!r)
		return 0;
	pair = (__u64 *)r->data;
	bpf_for(i, 0, count)
	{
		__u64 word = 0;

		switch (r->len) {
		case 2:
			r->result = bpf_kvm_mem_read(ctx, r->gpa, &word, 2);
			break;
		case 4:
			r->result = bpf_kvm_mem_read(ctx, r->gpa, &word, 4);
			break;
		default:
			r->result = bpf_kvm_mem_read(ctx, r->gpa, &word, 8);
		}
		if (word != pair[0] && word != pair[1])
			torn++;
	}
	r->done = torn;
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
