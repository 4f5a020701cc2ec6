// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The device of README.md, word for word: scripts/commands compares them. */

/* clang-format off */
/* answer.bpf.c */
#include "kvm_bpf.h"

KVM_BPF_MMIO_DEVICE(0x1000, 0, "example,answer");   /* size, interrupts, "compatible" */

KVM_IO_READ
int answer_read(struct bpf_kvm_io_ctx *ctx)
{
	*(__u64 *)ctx->buf = ctx->offset == 0 ? 42 : 0;
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
