// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* A device with a function that another program may replace. */
#include "kvm_bpf.h"

KVM_BPF_MMIO_DEVICE(0x1000, 0, "kvm-bpf,test");

int value(__u64 offset);

__attribute__((noinline)) int value(__u64 offset)
{
	return offset + 1;
}

KVM_IO_READ
int extended_read(struct bpf_kvm_io_ctx *ctx)
{
	*(__u64 *)ctx->buf = value(ctx->offset);
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
