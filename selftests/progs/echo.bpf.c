// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The device of Documentation/choosing.md, which the benchmark also serves in other
 * ways: a write is a command of 32 bits, whose result is its complement.  One of the
 * two command registers has an interrupt tell when the result is there.
 */
#include "kvm_bpf.h"

#define COMMAND 0x0
#define COMMAND_IRQ 0x4
#define RESULT 0x8

KVM_BPF_MMIO_DEVICE(0x1000, 1, "kvm-bpf,echo");

__u32 result;

KVM_IO_READ
int echo_read(struct bpf_kvm_io_ctx *ctx)
{
	if (ctx->offset != RESULT || ctx->len != 4)
		return 1;
	*(__u32 *)ctx->buf = result;
	return 0;
}

KVM_IO_WRITE
int echo_write(struct bpf_kvm_io_ctx *ctx)
{
	__u64 offset = ctx->offset;

	if ((offset != COMMAND && offset != COMMAND_IRQ) || ctx->len != 4)
		return 1;
	result = ~*(__u32 *)ctx->buf;
	if (offset == COMMAND_IRQ)
		bpf_kvm_irq_signal(ctx, 0);
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
