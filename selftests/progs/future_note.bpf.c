// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* A device whose note has a version that does not exist yet. */
#include "kvm_bpf.h"

#undef KVM_BPF_NOTE_VERSION
#define KVM_BPF_NOTE_VERSION 2

KVM_BPF_MMIO_DEVICE(0x1000, 0, "kvm-bpf,test");

KVM_IO_READ
int future_read(struct bpf_kvm_io_ctx *ctx)
{
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
