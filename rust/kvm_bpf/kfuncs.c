// SPDX-License-Identifier: GPL-2.0-only
/*
 * Kernel functions for the programs of BPF devices. In C, as the
 * verifier knows them by their BTF, which Rust code does not get.
 *
 * Those that want the context take what the kernel runs programs on, and not
 * what programs see. No other program can have one, nor make one up.
 */

#include <linux/bpf.h>
#include <linux/bpf_verifier.h>
#include <linux/btf.h>
#include <linux/btf_ids.h>
#include <linux/cpufreq.h>
#include <linux/export.h>
#include <linux/init.h>
#include <linux/kvm_bpf.h>
#include <linux/kvm_host.h>
#include <linux/nospec.h>
#include <linux/random.h>
#include <linux/sched.h>
#include <linux/sched/topology.h>

/* A program may have been told the number by the guest. */
static bool known_cpu(u32 *cpu)
{
	if (*cpu >= nr_cpu_ids)
		return false;
	*cpu = array_index_nospec(*cpu, nr_cpu_ids);

	return cpu_possible(*cpu);
}

/* What one call copies at most, in bytes: the VM's slots do not change meanwhile. */
#define MEM_MAX		SZ_1M
#define MEM_NOFAULT_MAX	PAGE_SIZE

static __always_inline int copy_mem(struct bpf_kvm_io_ctx_kern *ctx, u64 gpa, void *buf,
				    u32 len, u32 flags)
{
	const struct kvm_bpf_mem *mem = ctx->binding->mem;
	int ret = -E2BIG;

	if (len <= (flags & KVM_COPY_NOFAULT ? MEM_NOFAULT_MAX : MEM_MAX))
		ret = mem->copy(ctx, gpa, buf, len, flags, mem);
	if (ret && !(flags & KVM_COPY_TO_GUEST))
		memset(buf, 0, len);
	return ret;
}

__bpf_kfunc_start_defs();

/**
 * bpf_kvm_irq_signal() - Signal an interrupt of the program's own device
 * @ctx: The program's context, from bpf_cast_to_kern_ctx().
 * @irq: Which one, the index that user space has used with
 *       KVM_DEV_BPF_ATTR_GROUP_IRQ.
 *
 * Signals the eventfd that user space has set for @irq.
 *
 * Return: 0, or a negative error number:
 * * -ENOENT: user space has set no eventfd for it
 * * -EDEADLK: called by what an eventfd has woken up
 */
__bpf_kfunc int bpf_kvm_irq_signal(struct bpf_kvm_io_ctx_kern *ctx, u32 irq)
{
	return kvm_bpf_irq_signal(ctx, irq);
}

/**
 * bpf_kvm_irq_acquire() - Take an interrupt of the program's own device
 * @ctx: The program's context, from bpf_cast_to_kern_ctx().
 * @irq: Which one, as for bpf_kvm_irq_signal(). It need not have an eventfd yet.
 *
 * For where there is no context, as in a timer's callback: keep it in a map with
 * bpf_kptr_xchg(), and use bpf_kvm_irq_signal_kept() there.
 *
 * Return: A reference, to be released with bpf_kvm_irq_release(); NULL if @irq
 * is KVM_DEV_BPF_MAX_IRQS or more.
 */
__bpf_kfunc struct bpf_kvm_irq *
bpf_kvm_irq_acquire(struct bpf_kvm_io_ctx_kern *ctx, u32 irq)
{
	return kvm_bpf_irq_acquire(ctx, irq);
}

/**
 * bpf_kvm_irq_release() - Release a reference to an interrupt
 * @irq: The reference.
 */
__bpf_kfunc void bpf_kvm_irq_release(struct bpf_kvm_irq *irq)
{
	kvm_bpf_irq_release(irq);
}

/* For maps that are freed. */
__bpf_kfunc void bpf_kvm_irq_release_dtor(void *irq)
{
	kvm_bpf_irq_release(irq);
}

CFI_NOSEAL(bpf_kvm_irq_release_dtor);

/**
 * bpf_kvm_irq_signal_kept() - Signal an interrupt that was taken before
 * @irq: The interrupt: a reference, or found in a map under RCU.
 *
 * Return: 0, or a negative error number:
 * * -ENOENT: user space has set no eventfd for it, or has closed the device
 * * -EDEADLK: called by what an eventfd has woken up
 */
__bpf_kfunc int bpf_kvm_irq_signal_kept(struct bpf_kvm_irq *irq)
{
	return kvm_bpf_irq_signal_kept(irq);
}

/**
 * bpf_kvm_mem_read() - Read guest memory
 * @ctx: The program's context, from bpf_cast_to_kern_ctx().
 * @gpa: The guest-physical address.
 * @buf: Where to put the bytes. If the call fails, zeroes.
 * @buf__sz: How many, at most 1 MiB.
 *
 * The range has to lie inside one window (KVM_DEV_BPF_ATTR_GROUP_MEM) that may be
 * read. An aligned access of 1, 2, 4 or 8 bytes is a single one. What the program
 * reads afterwards is not read before.
 *
 * Return: 0, or a negative error number:
 * * -E2BIG: it is too much for one call
 * * -EACCES: no window
 * * -EFAULT: there is no memory, or it cannot be accessed
 */
__bpf_kfunc int bpf_kvm_mem_read(struct bpf_kvm_io_ctx_kern *ctx, u64 gpa, void *buf,
				 u32 buf__sz)
{
	return copy_mem(ctx, gpa, buf, buf__sz, 0);
}

/**
 * bpf_kvm_mem_write() - Write guest memory
 * @ctx: The program's context, from bpf_cast_to_kern_ctx().
 * @gpa: The guest-physical address.
 * @buf: The bytes. Nothing is written there, but it has to be writable.
 * @buf__sz: How many, at most 1 MiB.
 *
 * The range has to lie inside one window that may be written. An aligned access of 1,
 * 2, 4 or 8 bytes is a single one. What the program has read or written before is read
 * or written before. The pages are marked in the slot's dirty bitmap.
 *
 * Return: 0, or a negative error number: those of bpf_kvm_mem_read(), and
 * * -EFAULT: the memory is read-only for the guest. Pages before may be written.
 * * -EOPNOTSUPP: the VM has dirty rings without bitmaps
 */
__bpf_kfunc int bpf_kvm_mem_write(struct bpf_kvm_io_ctx_kern *ctx, u64 gpa, void *buf,
				  u32 buf__sz)
{
	return copy_mem(ctx, gpa, buf, buf__sz, KVM_COPY_TO_GUEST);
}

/**
 * bpf_kvm_mem_read_nofault() - Read guest memory that is there
 * @ctx: As for bpf_kvm_mem_read().
 * @gpa: Likewise.
 * @buf: Likewise.
 * @buf__sz: How many bytes, at most a page.
 *
 * For programs that may not sleep.
 *
 * Return: As for bpf_kvm_mem_read(); -EFAULT also if the memory would have to be
 * brought in first, which bpf_kvm_mem_read() does.
 */
__bpf_kfunc int bpf_kvm_mem_read_nofault(struct bpf_kvm_io_ctx_kern *ctx, u64 gpa,
					 void *buf, u32 buf__sz)
{
	return copy_mem(ctx, gpa, buf, buf__sz, KVM_COPY_NOFAULT);
}

/**
 * bpf_kvm_mem_write_nofault() - Write guest memory that is there
 * @ctx: As for bpf_kvm_mem_write().
 * @gpa: Likewise.
 * @buf: Likewise.
 * @buf__sz: How many bytes, at most a page.
 *
 * For programs that may not sleep.
 *
 * Return: As for bpf_kvm_mem_write(); -EFAULT also if the memory would have to be
 * brought in, or copied, first, which bpf_kvm_mem_write() does.
 */
__bpf_kfunc int bpf_kvm_mem_write_nofault(struct bpf_kvm_io_ctx_kern *ctx, u64 gpa,
					  void *buf, u32 buf__sz)
{
	return copy_mem(ctx, gpa, buf, buf__sz,
			KVM_COPY_TO_GUEST | KVM_COPY_NOFAULT);
}

/**
 * bpf_kvm_random() - Get random bytes
 * @buf: Where to put them.
 * @buf__sz: How many, at most a page.
 *
 * They are as good as those of /dev/urandom, for a guest to seed its own generator.
 *
 * Return: 0, or -E2BIG.
 */
__bpf_kfunc int bpf_kvm_random(void *buf, u32 buf__sz)
{
	if (buf__sz > PAGE_SIZE)
		return -E2BIG;
	get_random_bytes(buf, buf__sz);
	return 0;
}

/**
 * bpf_get_cpu_freq() - Get the frequency that this CPU runs at
 * @cpu: The CPU's number, from bpf_get_smp_processor_id().
 *
 * The frequency of other CPUs tells of other tenants, and is not for guests.
 *
 * Return: The frequency in kHz, measured where the CPU counts its cycles (x86),
 * else as the CPU's cpufreq policy last saw it; 0 if it has no policy; -EINVAL if
 * there is no such CPU; -EPERM if the caller is on another one.
 */
__bpf_kfunc s64 bpf_get_cpu_freq(u32 cpu)
{
	unsigned int policy_freq;
	int freq = 0;

	if (!known_cpu(&cpu))
		return -EINVAL;
	/* Programs and their callbacks do not migrate. */
	if (cpu != raw_smp_processor_id())
		return -EPERM;

	policy_freq = cpufreq_quick_get(cpu);
	/* Drivers that leave the choice to the CPU do not keep the policy's up to date. */
	if (IS_ENABLED(CONFIG_CPUFREQ_ARCH_CUR_FREQ) && policy_freq)
		freq = arch_freq_get_on_cpu(cpu);

	return freq > 0 ? freq : policy_freq;
}

/**
 * bpf_get_cpu_max_hw_freq() - Get the highest frequency of a host CPU
 * @cpu: The CPU's number.
 *
 * Return: The frequency in kHz that the hardware can reach; 0 if the CPU has no
 * cpufreq policy; -EINVAL if there is no such CPU.
 */
__bpf_kfunc s64 bpf_get_cpu_max_hw_freq(u32 cpu)
{
	if (!known_cpu(&cpu))
		return -EINVAL;

	return cpufreq_get_hw_max_freq(cpu);
}

/**
 * bpf_get_cpu_scale() - Get the compute capacity of a host CPU
 * @cpu: The CPU's number.
 *
 * Return: The capacity at the highest frequency, relative to the system's
 * fastest CPU, which has 1024; -EINVAL if there is no such CPU.
 */
__bpf_kfunc s64 bpf_get_cpu_scale(u32 cpu)
{
	if (!known_cpu(&cpu))
		return -EINVAL;

	return arch_scale_cpu_capacity(cpu);
}

/**
 * bpf_set_current_uclamp() - Set the utilization clamps of the current thread
 * @min: What the scheduler takes as the least utilization, 0 to 1024.
 * @max: What it takes as the greatest, @min to 1024.
 *
 * Acts on the vCPU's thread, whose MMIO access the program handles; programs that
 * run without an access may not call it. Clamps of its cgroup still apply. All
 * other scheduling parameters stay. The clamps stay when the program is replaced
 * or the device is closed, until someone sets others.
 *
 * Return: 0, or a negative error number:
 * * -EINVAL: @min or @max is out of range, or this is a deadline task
 * * -EPERM: called from a callback (timer, workqueue)
 * * -EOPNOTSUPP: the kernel has no utilization clamping
 */
__bpf_kfunc int bpf_set_current_uclamp(u32 min, u32 max)
{
	/*
	 * Set while bpf_prog_run_in_task() runs a program, but not for the
	 * callbacks that a program schedules, which may run on any task.
	 */
	if (!current->bpf_ctx)
		return -EPERM;
	if (max > SCHED_CAPACITY_SCALE || min > max)
		return -EINVAL;

	return sched_uclamp_set_current(min, max);
}

__bpf_kfunc_end_defs();

/*
 * For programs that may sleep, before they are run. The first request for a clamp
 * switches the scheduler's clamping on, which takes the CPU hotplug lock. A program
 * runs with migration disabled, and taking a CPU down waits for that.
 */
void kvm_bpf_kfuncs_prepare(void)
{
	sched_uclamp_prepare();
}
EXPORT_SYMBOL_FOR_MODULES(kvm_bpf_kfuncs_prepare, "kvm_bpf");

/*
 * For the thread that runs a device's work, at its start: a vCPU's thread that made
 * it has passed on its clamps, which a program may have set.
 */
void kvm_bpf_unclamp_current(void)
{
	sched_uclamp_reset_current();
}
EXPORT_SYMBOL_FOR_MODULES(kvm_bpf_unclamp_current, "kvm_bpf");

BTF_KFUNCS_START(kvm_io_kfunc_ids)
BTF_ID_FLAGS(func, bpf_kvm_irq_signal)
BTF_ID_FLAGS(func, bpf_kvm_irq_acquire, KF_ACQUIRE | KF_RET_NULL)
BTF_ID_FLAGS(func, bpf_kvm_irq_release, KF_RELEASE)
BTF_ID_FLAGS(func, bpf_kvm_irq_signal_kept, KF_RCU)
BTF_ID_FLAGS(func, bpf_kvm_mem_read, KF_SLEEPABLE)
BTF_ID_FLAGS(func, bpf_kvm_mem_write, KF_SLEEPABLE)
BTF_ID_FLAGS(func, bpf_kvm_mem_read_nofault)
BTF_ID_FLAGS(func, bpf_kvm_mem_write_nofault)
BTF_ID_FLAGS(func, bpf_kvm_random)
BTF_ID_FLAGS(func, bpf_get_cpu_freq)
BTF_ID_FLAGS(func, bpf_get_cpu_max_hw_freq)
BTF_ID_FLAGS(func, bpf_get_cpu_scale)
BTF_ID_FLAGS(func, bpf_set_current_uclamp, KF_SLEEPABLE)
BTF_KFUNCS_END(kvm_io_kfunc_ids)

/* What a program must be allowed to call. */
static const struct {
	void *kfunc;
	u32 allow;
} kvm_io_kfunc_allows[] = {
	{ bpf_kvm_irq_signal,		KVM_BPF_ALLOW_IRQ },
	{ bpf_kvm_irq_acquire,		KVM_BPF_ALLOW_IRQ },
	{ bpf_kvm_irq_release,		KVM_BPF_ALLOW_IRQ },
	{ bpf_kvm_irq_signal_kept,	KVM_BPF_ALLOW_IRQ },
	{ bpf_kvm_mem_read,		KVM_BPF_ALLOW_MEM_R },
	{ bpf_kvm_mem_read_nofault,	KVM_BPF_ALLOW_MEM_R },
	{ bpf_kvm_mem_write,		KVM_BPF_ALLOW_MEM_W },
	{ bpf_kvm_mem_write_nofault,	KVM_BPF_ALLOW_MEM_W },
	{ bpf_get_cpu_freq,		KVM_BPF_ALLOW_HOST_CPU },
	{ bpf_get_cpu_max_hw_freq,	KVM_BPF_ALLOW_HOST_CPU },
	{ bpf_get_cpu_scale,		KVM_BPF_ALLOW_HOST_CPU },
	{ bpf_set_current_uclamp,	KVM_BPF_ALLOW_UCLAMP },
};

static u32 kfunc_allow(const void *kfunc)
{
	for (int i = 0; i < ARRAY_SIZE(kvm_io_kfunc_allows); i++) {
		if (kvm_io_kfunc_allows[i].kfunc == kfunc)
			return kvm_io_kfunc_allows[i].allow;
	}
	return KVM_BPF_ALLOW_OTHER_KFUNC;
}

static u32 map_allow(const struct bpf_map *map)
{
	const struct bpf_map *values = map->inner_map_meta ?: map;
	u32 allow = 0;

	if (map->inner_map_meta)
		allow |= KVM_BPF_ALLOW_INNER_MAPS;
	if (map->map_type == BPF_MAP_TYPE_ARENA)
		allow |= KVM_BPF_ALLOW_ARENA;
	if (btf_record_has_field(values->record,
				 BPF_TIMER | BPF_WORKQUEUE | BPF_TASK_WORK))
		allow |= KVM_BPF_ALLOW_ASYNC;
	return allow;
}

/*
 * What a device must allow for @prog: the KVM_BPF_ALLOW_* of all that its
 * instructions contain, callbacks and subprograms included. They are all in
 * insnsi, after the verifier has removed those that are never reached, and have no
 * far calls where KVM_BPF can be built. Of its maps this looks at all that it names.
 */
u32 kvm_bpf_prog_needs(const struct bpf_prog *prog)
{
	u32 allow = prog->sleepable ? KVM_BPF_ALLOW_SLEEP : 0;

	for (u32 i = 0; i < prog->len; i++) {
		const struct bpf_insn *insn = &prog->insnsi[i];

		if (insn->code == (BPF_JMP | BPF_TAIL_CALL))
			allow |= KVM_BPF_ALLOW_TAIL_CALL;
		else if (bpf_pseudo_kfunc_call(insn))
			allow |= kfunc_allow((void *)__bpf_call_base + insn->imm);
	}

	guard(mutex)(&prog->aux->used_maps_mutex);
	for (u32 i = 0; i < prog->aux->used_map_cnt; i++)
		allow |= map_allow(prog->aux->used_maps[i]);

	return allow;
}
EXPORT_SYMBOL_FOR_MODULES(kvm_bpf_prog_needs, "kvm_bpf");

BTF_ID_LIST_SINGLE(kvm_io_uclamp_id, func, bpf_set_current_uclamp)

/* The thread that work runs on is not a vCPU's. */
static int kvm_io_kfunc_filter(const struct bpf_prog *prog, u32 kfunc_id)
{
	if (resolve_prog_type(prog) == BPF_PROG_TYPE_KVM_IO_WORK &&
	    kfunc_id == kvm_io_uclamp_id[0])
		return -EACCES;
	return 0;
}

static const struct btf_kfunc_id_set kvm_io_kfunc_set = {
	.owner	= THIS_MODULE,
	.set	= &kvm_io_kfunc_ids,
	.filter	= kvm_io_kfunc_filter,
};

BTF_ID_LIST(kvm_irq_dtor_ids)
BTF_ID(struct, bpf_kvm_irq)
BTF_ID(func, bpf_kvm_irq_release_dtor)

static int __init kvm_bpf_kfuncs_init(void)
{
	const struct btf_id_dtor_kfunc dtor = {
		.btf_id		= kvm_irq_dtor_ids[0],
		.kfunc_btf_id	= kvm_irq_dtor_ids[1],
	};
	int ret;

	/* All our program types have the same hook, so this serves them all. */
	ret = register_btf_kfunc_id_set(BPF_PROG_TYPE_KVM_IO_READ,
					&kvm_io_kfunc_set);
	return ret ?: register_btf_id_dtor_kfuncs(&dtor, 1, THIS_MODULE);
}
late_initcall(kvm_bpf_kfuncs_init);
