// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* A device with two functions that other programs may replace. */
#include "kvm_bpf.h"

KVM_BPF_MMIO_DEVICE(0x1000, 0, "kvm-bpf,test");

int value(__u64 offset);
int more(__u64 offset);

__attribute__((noinline)) int value(__u64 offset)
{
	return offset + 1;
}

__attribute__((noinline)) int more(__u64 offset)
{
	return offset;
}

KVM_IO_READ
int extended_read(struct bpf_kvm_io_ctx *ctx)
{
	*(__u64 *)ctx->buf = value(more(ctx->offset));
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
