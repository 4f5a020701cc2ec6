// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Virtual CPU frequency: the device of Linux's drivers/cpufreq/virtual-cpufreq.c.
 *
 * Each of the guest's CPUs has a page of 32-bit registers, little endian; CPU n's
 * begins at n * 0x1000:
 *
 *	offset	name		access	meaning
 *	0x00	cur_perf	RO	what the vCPU runs at now, in kHz
 *	0x04	set_perf	WO	what the guest asks for, in kHz
 *	0x08	perftbl_len	RO	entries in the table of frequencies
 *	0x0c	perftbl_sel	WO	which entry to read; one selection per CPU
 *	0x10	perftbl_rd	RO	the selected entry in kHz, 0 past the end
 *	0x14	perf_domain	RO	CPUs with the same number share a frequency
 *
 * Any other access reads 0 and is ignored when written.
 *
 * The table is the VMM's, the same for all CPUs.  Its last entry, "max" below,
 * stands for the fastest CPU of the host at its highest frequency, which is
 * also what the scheduler counts as 1024.  So the two directions are
 *
 *	set_perf kHz:	clamp the vCPU's thread to 1024 * kHz / max, rounded up,
 *			as its lowest and highest utilization
 *	cur_perf:	max * (host CPU's current / highest frequency)
 *			    * (host CPU's capacity / 1024)
 *
 * and what a request means does not depend on the host CPU that the vCPU is on
 * at that moment.  Every CPU is a domain of its own.
 *
 * A page is for the vCPU that last read its cur_perf, as Linux does in every tick
 * of a CPU, on its own page; before anyone has, for the vCPU with the page's
 * number.  The two numbers differ in a kernel that begins on another CPU than
 * the first, as kdump's may.
 *
 * A vCPU's program can clamp no thread but its own.  So a request takes effect at
 * once if it comes from the vCPU that the page is for, else when that one next
 * reads cur_perf.  The clamp stays when a page goes to another vCPU, and threads
 * that the vCPU's thread starts inherit it, as with sched_setattr(2).
 *
 * Where the host does not know the frequency, cur_perf is the last request, or max
 * before any.  A guest has at most 8 CPUs: the driver reads a page for each.
 */
#include "kvm_bpf.h"

#define MAX_CPUS 8
#define CPU_SHIFT 12
#define CPU_SIZE (1 << CPU_SHIFT)

#define CUR_PERF 0x00
#define SET_PERF 0x04
#define PERFTBL_LEN 0x08
#define PERFTBL_SEL 0x0c
#define PERFTBL_RD 0x10
#define PERF_DOMAIN 0x14

#define PERFTBL_MAX 64
#define CAPACITY_SCALE 1024

KVM_BPF_MMIO_DEVICE(MAX_CPUS *CPU_SIZE, 0, "qemu,virtual-cpufreq");

/* Frequencies in kHz, ascending, with zeroes after the last; without one the
 * driver's probe fails with -ENODEV. */
KVM_BPF_REQUIRED_PARAM("perf_table");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, PERFTBL_MAX);
	__type(key, __u32);
	__type(value, __u32);
} perf_table SEC(".maps");

struct vcpufreq {
	/* The last frequency asked for, in kHz, at most max; 0: none yet. */
	__u32 request;
	/* perftbl_sel */
	__u32 sel;
	/* The vCPU that last read cur_perf, plus 1; 0: none so far. */
	__u32 reader;
	/* The errno of the last attempt to clamp, negative, or 0. */
	__s32 error;
	/* That attempt: the vCPU, plus 1, and below it 32 bits for the clamp, 0 to
	 * 1024.  One word, since vCPUs may take the page from each other. */
	__u64 clamped;
};

/* By page. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, MAX_CPUS);
	__type(key, __u32);
	__type(value, struct vcpufreq);
} vcpus SEC(".maps");

static __always_inline __u32 table_entry(__u32 index)
{
	__u32 *entry = bpf_map_lookup_elem(&perf_table, &index);

	return entry ? *entry : 0;
}

/* Number of entries: where the zeroes begin, found by halves since cur_perf is
 * read in every tick of the guest. */
static __always_inline __u32 table_len(void)
{
	__u32 len = 0;

#pragma unroll
	for (__u32 step = PERFTBL_MAX; step; step /= 2)
		if (table_entry(len + step - 1))
			len += step;
	return len;
}

static __always_inline __u32 table_max(void)
{
	__u32 len = table_len();

	return len ? table_entry(len - 1) : 0;
}

/* What the calling vCPU runs at, in kHz, where 1024 is @max; 0: not known. */
static __always_inline __u32 host_perf(__u32 max)
{
	__u32 cpu = bpf_get_smp_processor_id();
	__s64 now, highest, scale;

	if (!bpf_ksym_exists(bpf_get_cpu_freq) ||
	    !bpf_ksym_exists(bpf_get_cpu_max_hw_freq) ||
	    !bpf_ksym_exists(bpf_get_cpu_scale))
		return 0;
	now = bpf_get_cpu_freq(cpu);
	highest = bpf_get_cpu_max_hw_freq(cpu);
	scale = bpf_get_cpu_scale(cpu);
	if (now <= 0 || highest <= 0 || scale <= 0)
		return 0;
	/* A boost may go past what cpufreq calls the highest. */
	if (now > highest)
		now = highest;
	if (scale > CAPACITY_SCALE)
		scale = CAPACITY_SCALE;
	/* 32 bits times 11, less 10, times 32: it fits 64. */
	return (__u64)max * (__u64)scale / CAPACITY_SCALE * (__u64)now /
	       (__u64)highest;
}

/* Utilization for a frequency, 0 to 1024. */
static __always_inline __u32 to_clamp(__u32 khz, __u32 max)
{
	return max ? ((__u64)khz * CAPACITY_SCALE + max - 1) / max : 0;
}

/*
 * Clamp the thread of the calling vCPU as the page asks for, but not again: it is
 * called in every tick, and what has failed fails again.
 */
static __always_inline void comply(struct vcpufreq *page, __u32 vcpu_id,
				   __u32 max)
{
	__u32 clamp = to_clamp(page->request, max);
	__u64 wanted = ((__u64)vcpu_id + 1) << 32 | clamp;

	if (!clamp || page->clamped == wanted ||
	    !bpf_ksym_exists(bpf_set_current_uclamp))
		return;
	page->clamped = wanted;
	page->error = bpf_set_current_uclamp(clamp, clamp);
}

static __always_inline void set_perf(struct vcpufreq *page, __u32 number,
				     __u32 vcpu_id, __u32 khz)
{
	__u32 reader = page->reader;
	__u32 max = table_max();

	if (!khz || !max)
		return;
	page->request = khz < max ? khz : max;
	if (vcpu_id == (reader ? reader - 1 : number)) {
		/* Also if others have changed the clamp since. */
		page->clamped = 0;
		comply(page, vcpu_id, max);
	}
}

static __always_inline __u32 cur_perf(struct vcpufreq *page, __u32 vcpu_id)
{
	__u32 max = table_max();
	__u32 perf;

	page->reader = vcpu_id + 1;
	comply(page, vcpu_id, max);
	perf = host_perf(max);
	if (!perf)
		perf = page->request ? page->request : max;
	return perf;
}

/* Sleepable, as the other, for the clamp. */
KVM_IO_READ_SLEEPABLE
int vcpufreq_read(struct bpf_kvm_io_ctx *ctx)
{
	__u64 offset = ctx->offset;
	__u32 number = offset >> CPU_SHIFT;
	struct vcpufreq *page = bpf_map_lookup_elem(&vcpus, &number);
	__u32 value = 0;

	if (!page || ctx->len != 4)
		return 0;
	switch (offset & (CPU_SIZE - 1)) {
	case CUR_PERF:
		value = cur_perf(page, ctx->vcpu_id);
		break;
	case PERFTBL_LEN:
		value = table_len();
		break;
	case PERFTBL_RD:
		value = table_entry(page->sel);
		break;
	case PERF_DOMAIN:
		value = number;
		break;
	}
	*(__u64 *)ctx->buf = value;
	return 0;
}

KVM_IO_WRITE_SLEEPABLE
int vcpufreq_write(struct bpf_kvm_io_ctx *ctx)
{
	__u64 data = *(__u64 *)ctx->buf;
	__u64 offset = ctx->offset;
	__u32 number = offset >> CPU_SHIFT;
	struct vcpufreq *page = bpf_map_lookup_elem(&vcpus, &number);

	if (!page || ctx->len != 4)
		return 0;
	switch (offset & (CPU_SIZE - 1)) {
	case SET_PERF:
		set_perf(page, number, ctx->vcpu_id, data);
		break;
	case PERFTBL_SEL:
		page->sel = data;
		break;
	}
	return 0;
}

static __always_inline struct vcpufreq *page_of(__u32 number)
{
	return bpf_map_lookup_elem(&vcpus, &number);
}

KVM_IO_WORK(0, reset)
int vcpufreq_reset(struct bpf_kvm_io_ctx *ctx)
{
	for (__u32 number = 0; number < MAX_CPUS; number++) {
		struct vcpufreq *page = page_of(number);

		if (page)
			*page = (struct vcpufreq){};
	}
	return 0;
}

/* The threads of this VM have no clamps yet. */
KVM_IO_WORK(1, restore)
int vcpufreq_restore(struct bpf_kvm_io_ctx *ctx)
{
	for (__u32 number = 0; number < MAX_CPUS; number++) {
		struct vcpufreq *page = page_of(number);

		if (!page)
			continue;
		page->clamped = 0;
		page->error = 0;
	}
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
