// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* A name in the note, and no WORK program of it. */
#include "kvm_bpf.h"

KVM_BPF_MMIO_DEVICE(0x1000, 0, "kvm-bpf,test");
KVM_IO_WORK_ITEM(0, reset);

KVM_IO_READ
int missing_read(struct bpf_kvm_io_ctx *ctx)
{
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
