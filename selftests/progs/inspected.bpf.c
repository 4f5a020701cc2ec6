// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * At ports: reads are handled at offset 0 and declined elsewhere, writes the other way round.
 * The WORK program has more to do whenever it is told an odd number.
 */
#include "kvm_bpf.h"

KVM_BPF_MMIO_DEVICE(0x1000, 0, "kvm-bpf,test");

KVM_IO_READ
int inspected_read(struct bpf_kvm_io_ctx *ctx)
{
	return ctx->offset != 0;
}

KVM_IO_WRITE
int inspected_write(struct bpf_kvm_io_ctx *ctx)
{
	return ctx->offset == 0;
}

KVM_IO_WORK(0, odd)
int inspected_work(struct bpf_kvm_io_ctx *ctx)
{
	return *(__u64 *)ctx->buf & 1;
}

char _license[] SEC("license") = "Dual BSD/GPL";
