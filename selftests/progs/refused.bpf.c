// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* A device that the verifier refuses: it stores to the guest's offset. */
#include "kvm_bpf.h"

KVM_BPF_MMIO_DEVICE(0x1000, 0, "kvm-bpf,test");

KVM_IO_READ
int refused_read(struct bpf_kvm_io_ctx *ctx)
{
	ctx->offset = 0;
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
