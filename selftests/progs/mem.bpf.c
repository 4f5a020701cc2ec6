// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Accesses guest memory, in programs that may sleep. */
#include "mem.h"

KVM_BPF_MMIO_DEVICE(0x1000, 0, "kvm-bpf,mem");

static __always_inline int serve(struct bpf_kvm_io_ctx *ctx)
{
	struct request *r = the_request();
	__u32 len;

	if (!r)
		return 0;
	len = r->len;
	if (len > DATA_SIZE)
		return 0;
	switch (r->op) {
	case READ:
		r->result = bpf_kvm_mem_read(ctx, r->gpa, r->data, len);
		break;
	case WRITE:
		r->result = bpf_kvm_mem_write(ctx, r->gpa, r->data, len);
		break;
	case READ_NOFAULT:
		r->result = bpf_kvm_mem_read_nofault(ctx, r->gpa, r->data, len);
		break;
	case WRITE_NOFAULT:
		r->result =
			bpf_kvm_mem_write_nofault(ctx, r->gpa, r->data, len);
		break;
	case RANDOM:
		r->result = bpf_kvm_random(r->data, len);
		break;
	}
	__sync_fetch_and_add(&r->done, 1);
	return 0;
}

KVM_IO_WRITE_SLEEPABLE
int mem_write(struct bpf_kvm_io_ctx *ctx)
{
	return serve(ctx);
}

KVM_IO_WORK_SLEEPABLE(0, work)
int mem_work(struct bpf_kvm_io_ctx *ctx)
{
	return serve(ctx);
}

char _license[] SEC("license") = "Dual BSD/GPL";
