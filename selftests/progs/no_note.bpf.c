// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* A program, but not a device: there is no note. */
#include "kvm_bpf.h"

KVM_IO_READ
int no_note_read(struct bpf_kvm_io_ctx *ctx)
{
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
