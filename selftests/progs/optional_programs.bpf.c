// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Programs that libbpf does not load if nobody asks it to, beside one that it
 * does: of the other direction, of the same, and of a type that is no handler's.
 */
#include "kvm_bpf.h"

KVM_BPF_MMIO_DEVICE(0x1000, 0, "kvm-bpf,test");

KVM_IO_READ
int optional_read(struct bpf_kvm_io_ctx *ctx)
{
	*(__u64 *)ctx->buf = 42;
	return 0;
}

SEC("?kvm_io_write")
int optional_write(struct bpf_kvm_io_ctx *ctx)
{
	return 0;
}

SEC("?kvm_io_read.s")
int optional_sleepable_read(struct bpf_kvm_io_ctx *ctx)
{
	return 0;
}

SEC("?socket")
int optional_socket(void *ctx)
{
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
