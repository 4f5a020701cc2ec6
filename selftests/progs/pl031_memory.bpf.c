// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The clock, which looks into guest memory where it signals its interrupt. */
#include "kvm_bpf.h"

static __always_inline void look(struct bpf_kvm_io_ctx *ctx)
{
	__u64 buf = 0;

	bpf_kvm_mem_read_nofault(ctx, 0, &buf, sizeof(buf));
}

#undef bpf_kvm_irq_signal
#define bpf_kvm_irq_signal(ctx, irq) \
	(look(ctx), bpf_kvm_irq_signal(kvm_bpf_kern_ctx(ctx), irq))
#include "../../samples/devices/pl031.bpf.c"
