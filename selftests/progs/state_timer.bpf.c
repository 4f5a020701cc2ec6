// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* A device with a timer that nothing saves. */
#include "kvm_bpf.h"

KVM_BPF_MMIO_DEVICE(0x1000, 0, "kvm-bpf,test");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct timed { struct bpf_timer timers[2]; });
} alarm SEC(".maps");

__u64 registers;

KVM_IO_READ
int timer_read(struct bpf_kvm_io_ctx *ctx)
{
	__u32 zero = 0;

	*(__u64 *)ctx->buf = registers;
	return !bpf_map_lookup_elem(&alarm, &zero);
}

char _license[] SEC("license") = "Dual BSD/GPL";
