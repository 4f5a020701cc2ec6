// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The clock, whose reads look into guest memory first. */
#include "kvm_bpf.h"
#undef KVM_IO_READ
#define KVM_IO_READ static __always_inline
#define pl031_read clock_read
#include "../../samples/devices/pl031.bpf.c"
#undef pl031_read

SEC("kvm_io_read")
int pl031_read(struct bpf_kvm_io_ctx *ctx)
{
	__u64 buf = 0;

	bpf_kvm_mem_read_nofault(ctx, 0, &buf, sizeof(buf));
	return clock_read(ctx);
}
