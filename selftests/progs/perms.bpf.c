// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Contains one of the things that a device may be denied, somewhere. What the
 * constants exclude is removed by the verifier.
 */
#include "kvm_bpf.h"

KVM_BPF_MMIO_DEVICE(0x1000, 0, "kvm-bpf,test");

enum {
	NOTHING,
	SIGNAL,
	ACQUIRE,
	FREQ,
	MAX_HW_FREQ,
	SCALE,
	UCLAMP,
	READ,
	WRITE,
	READ_NOFAULT,
	WRITE_NOFAULT,
	RANDOM,
	SIGNAL_KEPT
};
enum { MAIN, SUBPROGRAM, CALLBACK, NEVER };

const volatile __u32 what = NOTHING;
const volatile __u32 where = MAIN;

static __always_inline long contain(struct bpf_kvm_io_ctx *ctx)
{
	struct bpf_kvm_irq *irq;
	__u64 buf = 0;

	switch (what) {
	case SIGNAL:
		return bpf_kvm_irq_signal(ctx, 0);
	case ACQUIRE:
		irq = bpf_kvm_irq_acquire(ctx, 0);
		if (irq)
			bpf_kvm_irq_release(irq);
		return 0;
	case FREQ:
		return bpf_get_cpu_freq(0);
	case MAX_HW_FREQ:
		return bpf_get_cpu_max_hw_freq(0);
	case SCALE:
		return bpf_get_cpu_scale(0);
	case UCLAMP:
		return bpf_set_current_uclamp(0, 1024);
	case READ:
		return bpf_kvm_mem_read(ctx, 0, &buf, sizeof(buf));
	case WRITE:
		return bpf_kvm_mem_write(ctx, 0, &buf, sizeof(buf));
	case READ_NOFAULT:
		return bpf_kvm_mem_read_nofault(ctx, 0, &buf, sizeof(buf));
	case WRITE_NOFAULT:
		return bpf_kvm_mem_write_nofault(ctx, 0, &buf, sizeof(buf));
	case RANDOM:
		return bpf_kvm_random(&buf, sizeof(buf));
	case SIGNAL_KEPT:
		irq = bpf_kvm_irq_acquire(ctx, 0);
		if (irq) {
			bpf_kvm_irq_signal_kept(irq);
			bpf_kvm_irq_release(irq);
		}
		return 0;
	default:
		return 0;
	}
}

static __attribute__((noinline)) long subprogram(struct bpf_kvm_io_ctx *ctx)
{
	return contain(ctx);
}

struct args {
	struct bpf_kvm_io_ctx *ctx;
};

static long callback(__u64 index, struct args *args)
{
	contain(args->ctx);
	return 0;
}

KVM_IO_READ_SLEEPABLE
int perms_read(struct bpf_kvm_io_ctx *ctx)
{
	struct args args = {ctx};

	switch (where) {
	case MAIN:
		contain(ctx);
		break;
	case SUBPROGRAM:
		subprogram(ctx);
		break;
	case CALLBACK:
		bpf_loop(1, callback, &args, 0);
		break;
	case NEVER:
		if (what == NOTHING)
			bpf_kvm_irq_signal(ctx, 0);
		break;
	}
	*(__u64 *)ctx->buf = 42;
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
