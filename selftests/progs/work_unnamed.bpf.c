// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* A WORK program that the note does not name. */
#include "kvm_bpf.h"

KVM_BPF_MMIO_DEVICE(0x1000, 0, "kvm-bpf,test");

KVM_IO_READ
int unnamed_read(struct bpf_kvm_io_ctx *ctx)
{
	return 0;
}

SEC("kvm_io_work/reset")
int unnamed_reset(struct bpf_kvm_io_ctx *ctx)
{
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
