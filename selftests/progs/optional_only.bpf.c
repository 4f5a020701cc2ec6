// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* A device without a program that libbpf loads. */
#include "kvm_bpf.h"

KVM_BPF_MMIO_DEVICE(0x1000, 0, "kvm-bpf,test");

SEC("?kvm_io_write")
int optional_write(struct bpf_kvm_io_ctx *ctx)
{
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
