// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* A device with as many interrupts as there may be: more than a VMM has lines. */
#include "kvm_bpf.h"

KVM_BPF_MMIO_DEVICE(0x1000, 256, "kvm-bpf,test");

KVM_IO_READ
int many_irqs_read(struct bpf_kvm_io_ctx *ctx)
{
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
