/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * A virtio device behind registers in memory (virtio 1.3, 4.2: version 2), made of
 * eBPF programs: the registers, split virtqueues with indirect descriptors, the
 * note, and all programs.  A device is what is left, a file that defines
 *
 *	VIRTIO_ID		its number (virtio_ids.h)
 *	VIRTIO_QUEUES		how many queues it has
 *	VIRTIO_QUEUE_MAX	the most entries of a queue, a power of 2, at most 256
 *	VIRTIO_FEATURES		the bits of its kind, 0 to 23 and 50 to 63; an expression
 *	VIRTIO_CONFIG		the type of its configuration, where it has one
 *	VIRTIO_BUDGET_BYTES	the budget of a notification, where 64 KiB take too long
 *
 * then includes this, and then has
 *
 *	int virtio_request(struct bpf_kvm_io_ctx *ctx, struct virtq_chain *chain)
 *
 * which takes the descriptors of one request of queue chain->queue by virtq_next(),
 * does what they say, adds to chain->bytes what it copies, and returns how many bytes
 * it wrote for the driver; or a negative number if the driver broke the rules,
 * whereupon the device does nothing more until it is reset.  One request copies a few
 * hundred KiB at most.  Where there is a configuration, virtio_config() fills it; the
 * driver cannot write to it.
 *
 * All state is in the map "virtio".  What is in "virtio_run" has a meaning only while
 * programs run.
 *
 * A queue is served where the driver notifies it, on the vCPU's thread, up to the
 * budget of a notification; what is left then the WORK program "queues" serves, in
 * runs of the same budget.  Who wants to serve a queue sets "pending" and takes
 * "busy".  Who finds it taken goes: the one that has it looks at "pending" once more
 * after it has given it back, so nothing is left behind and nobody waits.  A lock
 * could not be held here: an access of guest memory may sleep.
 *
 * What the verifier wants of such programs:
 *
 *  - A function with a loop is global ("__noinline", not static), so that it is
 *    verified once, for all arguments, and not again on each path that leads to it.
 *    Such a function takes the context with __arg_ctx, and memory with
 *    __arg_nonnull: the verifier knows nothing of what is there, so numbers that
 *    grow belong there or into a map, not into variables of the loop.
 *  - It takes the index of a queue rather than a pointer to it: the verifier lets
 *    nobody add a variable to a pointer that is an argument.
 *  - What a loop needs follows from its counter: "addr + i * 512", not a sum.
 *  - bpf_for() has at most 8 million iterations, which is no limit for a vCPU's
 *    thread.  The budget is.
 *  - The stack has 512 bytes, for all functions that call each other.
 */
#ifndef VIRTIO_BPF_H
#define VIRTIO_BPF_H

#include "kvm_bpf.h"

#include <linux/virtio_config.h>
#include <linux/virtio_ids.h>
#include <linux/virtio_mmio.h>
#include <linux/virtio_ring.h>

/* Virtio is little endian, and so are these objects: nothing is ever swapped. */
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error virtio_bpf.h is for little-endian eBPF
#endif

/* As many interrupts as a driver of virtio-mmio takes, and one that is none. */
#define VIRTIO_IRQ 0
#define VIRTIO_DOORBELL 1

KVM_BPF_MMIO_DEVICE(0x200, 1, "virtio,mmio");
KVM_BPF_WINDOW(KVM_BPF_MEMORY_READ | KVM_BPF_MEMORY_WRITE);
KVM_BPF_DOORBELL(VIRTIO_DOORBELL, 0);

/* Of one request, those in an indirect table included. */
#define VIRTIO_CHAIN_MAX 256
/* How often a loop takes the next one: virtq_next() refuses the last. */
#define VIRTIO_CHAIN_ENDS (VIRTIO_CHAIN_MAX + 1)

/*
 * No request is begun in a notification, or in a run of "queues", that has copied so
 * many bytes or taken so many descriptors.
 */
#ifndef VIRTIO_BUDGET_BYTES
#define VIRTIO_BUDGET_BYTES (64 * 1024)
#endif
#define VIRTIO_BUDGET_DESCS 256

/*
 * What "ready" of a queue is: whoever serves it next begins with its first entry, so
 * that a driver waits for nobody who still has the queue.
 */
#define VIRTQ_RUNS 1
#define VIRTQ_NEW 2

/* How often a notification looks again whether there was another one. */
#define VIRTIO_ROUNDS 8
/* How often a reset tries to find no queue busy, before it leaves the rest to others. */
#define VIRTIO_RESET_TRIES 8192

/* Of the registers, all but these are the driver's. */
#define VIRTIO_MAGIC 0x74726976
#define VIRTIO_VENDOR 0x4b425042

#define VIRTIO_ALL_FEATURES                                        \
	((VIRTIO_FEATURES) | 1ULL << VIRTIO_RING_F_INDIRECT_DESC | \
	 1ULL << VIRTIO_F_VERSION_1)

struct virtq {
	/* Guest-physical addresses of the three parts. */
	__u64 desc;
	__u64 avail;
	__u64 used;
	__u32 num;
	/* 0, VIRTQ_NEW or VIRTQ_RUNS. */
	__u32 ready;
	/* There may be requests that nobody has looked for. */
	__u32 pending;
	/* The next entry of "avail" to take, the next one of "used" to fill. */
	__u16 next_avail;
	__u16 next_used;
};

struct virtio {
	__u64 driver_features;
	__u32 status;
	/* The driver broke the rules. */
	__u32 needs_reset;
	__u32 interrupt_status;
	__u32 device_features_sel;
	__u32 driver_features_sel;
	__u32 queue_sel;
	struct virtq queues[VIRTIO_QUEUES];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct virtio);
} virtio SEC(".maps");

struct virtio_run {
	/* 1 while someone serves the queue, or resets it. */
	__u32 busy[VIRTIO_QUEUES];
	/* The state is being saved. */
	__u32 paused;
	/* A reset waits for the end of a request. */
	__u32 resetting;
#ifdef VIRTIO_CONFIG
	VIRTIO_CONFIG config;
	/* A load may begin with the last byte. */
	__u64 behind;
#endif
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct virtio_run);
} virtio_run SEC(".maps");

/* A request on its way through its descriptors. */
struct virtq_chain {
	/* The current one. */
	struct vring_desc desc;
	/* Where it is from, and how many are there. */
	__u64 table;
	__u32 size;
	__u32 next;
	__u32 more;
	/* No table may come any more. */
	__u32 no_indirect;
	/* How many there were. */
	__u32 descs;
	/* How many bytes were copied. */
	__u32 bytes;
	/* The queue's index, for devices with more than one. */
	__u32 queue;
};

/* What a notification has spent. */
struct virtio_spent {
	__u32 bytes;
	__u32 descs;
};

/* For the device to define. */
int virtio_request(struct bpf_kvm_io_ctx *ctx __arg_ctx,
		   struct virtq_chain *chain __arg_nonnull);
#ifdef VIRTIO_CONFIG
static __always_inline void virtio_config(VIRTIO_CONFIG *config);
#endif

static __always_inline struct virtio *virtio_state(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&virtio, &zero);
}

static __always_inline struct virtio_run *virtio_run_state(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&virtio_run, &zero);
}

/*
 * One access, where and when it is written: others change the same words, and clang
 * may join two accesses into one of an address that it computes.
 */
#define VIRTIO_LOAD(x) (*(volatile typeof(x) *)&(x))
#define VIRTIO_STORE(x, value) (VIRTIO_LOAD(x) = (value))

/* Stores, with a full barrier on both sides, and returns what was there. */
static __always_inline __u32 virtio_xchg(__u32 *word, __u32 value)
{
	return __sync_lock_test_and_set(word, value);
}

/* A full barrier, which every atomic operation is that returns a value. */
static __always_inline void virtio_mb(void)
{
	__u32 word = 0;

	barrier_var(word);
	word = __sync_fetch_and_add(&word, 1);
	barrier_var(word);
}

static __always_inline void virtio_signal(struct bpf_kvm_io_ctx *ctx,
					  struct virtio *v, __u32 why)
{
	__sync_fetch_and_or(&v->interrupt_status, why);
	bpf_kvm_irq_signal(ctx, VIRTIO_IRQ);
}

static __always_inline _Bool virtio_is_spent(const struct virtio_spent *spent)
{
	return spent->bytes >= VIRTIO_BUDGET_BYTES ||
	       spent->descs >= VIRTIO_BUDGET_DESCS;
}

/*
 * Fetch the next descriptor of a request into chain->desc: 0; 1 if there is none, and
 * a negative number if the driver broke the rules.
 */
__noinline int virtq_next(struct bpf_kvm_io_ctx *ctx __arg_ctx,
			  struct virtq_chain *chain __arg_nonnull)
{
	if (!chain->more)
		return 1;
	if (chain->next >= chain->size || chain->descs >= VIRTIO_CHAIN_MAX)
		return -1;
	chain->descs++;
	if (bpf_kvm_mem_read(ctx, chain->table + chain->next * 16ULL,
			     &chain->desc, sizeof(chain->desc)))
		return -1;
	if (chain->desc.flags & VRING_DESC_F_INDIRECT) {
		if (chain->no_indirect || !chain->desc.len ||
		    chain->desc.len % 16 ||
		    chain->desc.flags & VRING_DESC_F_NEXT)
			return -1;
		chain->no_indirect = 1;
		chain->table = chain->desc.addr;
		chain->size = chain->desc.len / 16;
		if (bpf_kvm_mem_read(ctx, chain->table, &chain->desc,
				     sizeof(chain->desc)))
			return -1;
		if (chain->desc.flags & VRING_DESC_F_INDIRECT)
			return -1;
	}
	chain->more = chain->desc.flags & VRING_DESC_F_NEXT;
	chain->next = chain->desc.next;
	return 0;
}

/* Serve the next request of a queue; negative if the driver broke the rules. */
__noinline int virtq_serve(struct bpf_kvm_io_ctx *ctx __arg_ctx, __u32 index,
			   struct virtio_spent *spent __arg_nonnull)
{
	struct virtio *v = virtio_state();
	struct vring_used_elem done = {};
	struct virtq_chain chain = {};
	struct virtq *q;
	__u16 head = 0;
	__u32 num;
	int len;

	if (!v || index >= VIRTIO_QUEUES)
		return -1;
	q = &v->queues[index];
	num = VIRTIO_LOAD(q->num);
	if (!num || num > VIRTIO_QUEUE_MAX || num & (num - 1))
		return -1;
	if (bpf_kvm_mem_read(ctx,
			     q->avail + 4 + 2ULL * (q->next_avail & (num - 1)),
			     &head, sizeof(head)))
		return -1;
	chain.table = q->desc;
	chain.size = num;
	chain.next = head;
	chain.more = 1;
	chain.queue = index;
	chain.no_indirect =
		!(v->driver_features >> VIRTIO_RING_F_INDIRECT_DESC & 1);
	len = virtio_request(ctx, &chain);
	spent->bytes += chain.bytes;
	spent->descs += chain.descs;
	if (len < 0)
		return -1;
	done.id = head;
	done.len = len;
	if (bpf_kvm_mem_write(ctx,
			      q->used + 4 + 8ULL * (q->next_used & (num - 1)),
			      &done, sizeof(done)))
		return -1;
	q->next_avail++;
	q->next_used++;
	return 0;
}

/*
 * Serve the requests of a queue that is ours, and tell the driver; 1 if there may be
 * more of them.
 */
__noinline int virtq_drain(struct bpf_kvm_io_ctx *ctx __arg_ctx, __u32 index,
			   struct virtio_spent *spent __arg_nonnull)
{
	struct virtio_run *run = virtio_run_state();
	struct virtio *v = virtio_state();
	__u16 avail = 0, used, flags = 0;
	_Bool bad = 0, more = 0;
	struct virtq *q;
	__u32 i;

	if (!v || !run || index >= VIRTIO_QUEUES)
		return 0;
	q = &v->queues[index];
	/* Who has come here late may find a driver that is not there yet. */
	if (!(VIRTIO_LOAD(v->status) & VIRTIO_CONFIG_S_DRIVER_OK) ||
	    !VIRTIO_LOAD(q->ready) || VIRTIO_LOAD(v->needs_reset))
		return 0;
	if (__sync_val_compare_and_swap(&q->ready, VIRTQ_NEW, VIRTQ_RUNS) ==
	    VIRTQ_NEW) {
		q->next_avail = 0;
		q->next_used = 0;
	}
	used = q->next_used;
	/* A read is an acquire: what it stands for is there. */
	if (bpf_kvm_mem_read(ctx, q->avail + 2, &avail, sizeof(avail)) ||
	    (__u16)(avail - q->next_avail) > q->num)
		bad = 1;
	/* Few enough rounds for the verifier; bpf_for() calls the kernel for each. */
	for (i = 0; i < VIRTIO_QUEUE_MAX && !bad; i++) {
		if (q->next_avail == avail ||
		    VIRTIO_LOAD(q->ready) != VIRTQ_RUNS)
			break;
		if (virtio_is_spent(spent) || VIRTIO_LOAD(run->paused) ||
		    VIRTIO_LOAD(run->resetting)) {
			more = 1;
			break;
		}
		if (virtq_serve(ctx, index, spent)) {
			bad = 1;
			break;
		}
	}
	if (used != q->next_used && VIRTIO_LOAD(q->ready) == VIRTQ_RUNS) {
		used = q->next_used;
		/* A write is a release: the entries are there before the index. */
		if (bpf_kvm_mem_write(ctx, q->used + 2, &used, sizeof(used)))
			bad = 1;
		/* The driver allows interrupts, and then looks at the index. */
		virtio_mb();
		if (bpf_kvm_mem_read(ctx, q->avail, &flags, sizeof(flags)))
			bad = 1;
		if (!(flags & VRING_AVAIL_F_NO_INTERRUPT))
			virtio_signal(ctx, v, VIRTIO_MMIO_INT_VRING);
	}
	if (bad) {
		virtio_xchg(&v->needs_reset, 1);
		virtio_signal(ctx, v, VIRTIO_MMIO_INT_CONFIG);
	}
	return more && !bad;
}

/*
 * Reset the device, if nobody has done so meanwhile and no queue is busy; 1 if one is,
 * whose holder does it then.
 */
__noinline int virtio_try_reset(void)
{
	struct virtio_run *run = virtio_run_state();
	struct virtio *v = virtio_state();
	_Bool all = 1;
	__u32 taken = 0, i;

	if (!v || !run)
		return 0;
	for (i = 0; i < VIRTIO_QUEUES && all; i++) {
		if (__sync_val_compare_and_swap(&run->busy[i], 0, 1))
			all = 0;
		else
			taken |= 1 << i;
	}
	if (all && VIRTIO_LOAD(run->resetting)) {
		for (i = 0; i < VIRTIO_QUEUES; i++)
			__builtin_memset(&v->queues[i], 0,
					 sizeof(v->queues[i]));
		v->driver_features = 0;
		v->needs_reset = 0;
		v->interrupt_status = 0;
		v->device_features_sel = 0;
		v->driver_features_sel = 0;
		v->queue_sel = 0;
		virtio_xchg(&run->resetting, 0);
		/* The driver goes on when it sees that. */
		virtio_xchg(&v->status, 0);
	}
	for (i = 0; i < VIRTIO_QUEUES; i++) {
		if (taken & 1 << i)
			virtio_xchg(&run->busy[i], 0);
	}
	return !all;
}

/*
 * End a reset.  Who is in a request ends it first, which is soon, but for a page of the
 * guest that does not come: then the one who has the queue comes here later.  So does
 * the last of two who have been in each other's way.
 */
__noinline int virtio_end_reset(void)
{
	struct virtio_run *run = virtio_run_state();
	__u32 i;

	if (!run)
		return 0;
	bpf_for(i, 0, VIRTIO_RESET_TRIES)
	{
		if (!VIRTIO_LOAD(run->resetting) || !virtio_try_reset())
			break;
	}
	return 0;
}

/* Serve a queue, if nobody does; 1 if there is more to do than the budget allows. */
__noinline int virtq_run(struct bpf_kvm_io_ctx *ctx __arg_ctx, __u32 index)
{
	struct virtio_run *run = virtio_run_state();
	struct virtio *v = virtio_state();
	struct virtio_spent spent = {};
	struct virtq *q;
	__u32 *busy;
	__u32 i;

	if (!v || !run || index >= VIRTIO_QUEUES)
		return 0;
	q = &v->queues[index];
	busy = &run->busy[index];
	/* As above. */
	for (i = 0; i < VIRTIO_ROUNDS; i++) {
		int more = 0;

		if (!VIRTIO_LOAD(q->pending) || VIRTIO_LOAD(run->paused))
			return 0;
		if (__sync_val_compare_and_swap(busy, 0, 1))
			return 0;
		/* "save" has seen that the queue is busy, or it is paused here. */
		if (!VIRTIO_LOAD(run->paused) && virtio_xchg(&q->pending, 0))
			more = virtq_drain(ctx, index, &spent);
		if (more)
			virtio_xchg(&q->pending, 1);
		virtio_xchg(busy, 0);
		if (VIRTIO_LOAD(run->resetting))
			virtio_end_reset();
		if (more)
			break;
	}
	/* Of what is saved the program "restore" takes care. */
	return VIRTIO_LOAD(q->pending) && !VIRTIO_LOAD(run->paused);
}

/* The same with all queues. */
__noinline int virtio_run_all(struct bpf_kvm_io_ctx *ctx __arg_ctx)
{
	__u32 more = 0, i;

	for (i = 0; i < VIRTIO_QUEUES; i++)
		more |= virtq_run(ctx, i);
	return !!more;
}

/* Reset the device; 1 if there is more to do than the budget allows. */
static __always_inline int virtio_reset(struct bpf_kvm_io_ctx *ctx,
					struct virtio_run *run)
{
	virtio_xchg(&run->resetting, 1);
	virtio_end_reset();
	/* The next driver may have notified while the queues were taken. */
	return virtio_run_all(ctx);
}

static __always_inline __u32 virtio_half(__u64 value, __u32 half)
{
	return half < 2 ? value >> half * 32 : 0;
}

static __always_inline void virtio_set_half(__u64 *word, __u32 half,
					    __u32 value)
{
	__u64 old = VIRTIO_LOAD(*word);

	if (half == 0)
		old = (old & ~0xffffffffULL) | value;
	else
		old = (__u32)old | (__u64)value << 32;
	VIRTIO_STORE(*word, old);
}

static __always_inline __u64 virtio_load_register(const struct virtio *v,
						  const struct virtio_run *run,
						  __u64 offset)
{
	__u32 index = VIRTIO_LOAD(v->queue_sel);

	switch (offset) {
	case VIRTIO_MMIO_MAGIC_VALUE:
		return VIRTIO_MAGIC;
	case VIRTIO_MMIO_VERSION:
		return 2;
	case VIRTIO_MMIO_DEVICE_ID:
		return VIRTIO_ID;
	case VIRTIO_MMIO_VENDOR_ID:
		return VIRTIO_VENDOR;
	case VIRTIO_MMIO_DEVICE_FEATURES:
		return virtio_half(VIRTIO_ALL_FEATURES,
				   VIRTIO_LOAD(v->device_features_sel));
	case VIRTIO_MMIO_QUEUE_NUM_MAX:
		return index < VIRTIO_QUEUES ? VIRTIO_QUEUE_MAX : 0;
	case VIRTIO_MMIO_QUEUE_READY:
		if (index >= VIRTIO_QUEUES)
			return 0;
		return !!VIRTIO_LOAD(v->queues[index].ready);
	case VIRTIO_MMIO_INTERRUPT_STATUS:
		return VIRTIO_LOAD(v->interrupt_status);
	case VIRTIO_MMIO_STATUS:
		return VIRTIO_LOAD(v->status) |
		       (VIRTIO_LOAD(v->needs_reset) ||
					VIRTIO_LOAD(run->resetting)
				? VIRTIO_CONFIG_S_NEEDS_RESET
				: 0);
	case VIRTIO_MMIO_SHM_LEN_LOW:
	case VIRTIO_MMIO_SHM_LEN_HIGH:
	case VIRTIO_MMIO_SHM_BASE_LOW:
	case VIRTIO_MMIO_SHM_BASE_HIGH:
		/* There is no such memory. */
		return 0xffffffff;
	}
	return 0;
}

/* Features that the device has, version 1 among them. */
static __always_inline _Bool virtio_good_features(const struct virtio *v)
{
	__u64 features = VIRTIO_LOAD(v->driver_features);

	return !(features & ~VIRTIO_ALL_FEATURES) &&
	       features >> VIRTIO_F_VERSION_1 & 1;
}

/* 1 if there is more to do than the budget allows. */
static __always_inline int virtio_set_status(struct bpf_kvm_io_ctx *ctx,
					     struct virtio *v,
					     struct virtio_run *run,
					     __u32 status)
{
	__u32 i;

	if (!status)
		return virtio_reset(ctx, run);
	/* Not every driver waits until the status is 0. */
	if (VIRTIO_LOAD(run->resetting))
		virtio_end_reset();
	if (VIRTIO_LOAD(run->resetting))
		return 0;
	if (!virtio_good_features(v))
		status &= ~VIRTIO_CONFIG_S_FEATURES_OK;
	if (!(status & VIRTIO_CONFIG_S_FEATURES_OK))
		status &= ~VIRTIO_CONFIG_S_DRIVER_OK;
	virtio_xchg(&v->status, status & 0xff & ~VIRTIO_CONFIG_S_NEEDS_RESET);
	if (!(status & VIRTIO_CONFIG_S_DRIVER_OK))
		return 0;
	/* It may have notified before. */
	for (i = 0; i < VIRTIO_QUEUES; i++)
		virtio_xchg(&v->queues[i].pending, 1);
	return virtio_run_all(ctx);
}

static __always_inline int virtio_notify(struct bpf_kvm_io_ctx *ctx,
					 struct virtio *v, __u32 index)
{
	if (index >= VIRTIO_QUEUES)
		return 0;
	virtio_xchg(&v->queues[index].pending, 1);
	if (!(VIRTIO_LOAD(v->status) & VIRTIO_CONFIG_S_DRIVER_OK))
		return 0;
	return virtq_run(ctx, index);
}

static __always_inline void virtq_store_register(struct virtq *q, __u64 offset,
						 __u32 value)
{
	/* Who serves it stops before the next request. */
	if (offset == VIRTIO_MMIO_QUEUE_READY && !(value & 1))
		virtio_xchg(&q->ready, 0);
	if (VIRTIO_LOAD(q->ready))
		return;
	switch (offset) {
	case VIRTIO_MMIO_QUEUE_READY:
		if (value & 1)
			virtio_xchg(&q->ready, VIRTQ_NEW);
		break;
	case VIRTIO_MMIO_QUEUE_NUM:
		if (value && value <= VIRTIO_QUEUE_MAX &&
		    !(value & (value - 1)))
			VIRTIO_STORE(q->num, value);
		break;
	case VIRTIO_MMIO_QUEUE_DESC_LOW:
		virtio_set_half(&q->desc, 0, value);
		break;
	case VIRTIO_MMIO_QUEUE_DESC_HIGH:
		virtio_set_half(&q->desc, 1, value);
		break;
	case VIRTIO_MMIO_QUEUE_AVAIL_LOW:
		virtio_set_half(&q->avail, 0, value);
		break;
	case VIRTIO_MMIO_QUEUE_AVAIL_HIGH:
		virtio_set_half(&q->avail, 1, value);
		break;
	case VIRTIO_MMIO_QUEUE_USED_LOW:
		virtio_set_half(&q->used, 0, value);
		break;
	case VIRTIO_MMIO_QUEUE_USED_HIGH:
		virtio_set_half(&q->used, 1, value);
		break;
	}
}

KVM_IO_READ
int virtio_read(struct bpf_kvm_io_ctx *ctx)
{
	struct virtio_run *run = virtio_run_state();
	struct virtio *v = virtio_state();
	__u64 offset = ctx->offset;
	__u64 value = 0;

	if (!v || !run)
		return 0;
	if (offset < VIRTIO_MMIO_CONFIG) {
		if (ctx->len == 4)
			value = virtio_load_register(v, run, offset);
	} else {
#ifdef VIRTIO_CONFIG
		offset -= VIRTIO_MMIO_CONFIG;
		virtio_config(&run->config);
		if (offset < sizeof(run->config))
			__builtin_memcpy(&value, (__u8 *)&run->config + offset,
					 sizeof(value));
#endif
	}
	*(__u64 *)ctx->buf = value;
	return 0;
}

KVM_IO_WRITE_SLEEPABLE
int virtio_write(struct bpf_kvm_io_ctx *ctx)
{
	struct virtio_run *run = virtio_run_state();
	struct virtio *v = virtio_state();
	__u32 value = *(__u64 *)ctx->buf;
	__u64 offset = ctx->offset;
	__u32 index;
	int more = 0;

	if (!v || !run || ctx->len != 4)
		return 0;
	switch (offset) {
	case VIRTIO_MMIO_DEVICE_FEATURES_SEL:
		VIRTIO_STORE(v->device_features_sel, value);
		break;
	case VIRTIO_MMIO_DRIVER_FEATURES_SEL:
		VIRTIO_STORE(v->driver_features_sel, value);
		break;
	case VIRTIO_MMIO_DRIVER_FEATURES:
		index = VIRTIO_LOAD(v->driver_features_sel);
		if (index < 2 &&
		    !(VIRTIO_LOAD(v->status) & VIRTIO_CONFIG_S_FEATURES_OK))
			virtio_set_half(&v->driver_features, index, value);
		break;
	case VIRTIO_MMIO_QUEUE_SEL:
		VIRTIO_STORE(v->queue_sel, value);
		break;
	case VIRTIO_MMIO_INTERRUPT_ACK:
		__sync_fetch_and_and(&v->interrupt_status, ~value);
		break;
	case VIRTIO_MMIO_STATUS:
		more = virtio_set_status(ctx, v, run, value);
		break;
	case VIRTIO_MMIO_QUEUE_NOTIFY:
		more = virtio_notify(ctx, v, value);
		break;
	default:
		index = VIRTIO_LOAD(v->queue_sel);
		if (index < VIRTIO_QUEUES)
			virtq_store_register(&v->queues[index], offset, value);
		break;
	}
	if (more)
		bpf_kvm_irq_signal(ctx, VIRTIO_DOORBELL);
	return 0;
}

/* The verifier knows nothing of what a global function returns, and wants 0 or 1. */
static __always_inline int virtio_more(int more)
{
	barrier_var(more);
	return more ? 1 : 0;
}

/* What notifications left. */
KVM_IO_WORK_SLEEPABLE(0, queues)
int virtio_queues(struct bpf_kvm_io_ctx *ctx)
{
	return virtio_more(virtio_run_all(ctx));
}

/* Nobody is in a request, and nobody begins one. */
KVM_IO_WORK(1, save)
int virtio_save(struct bpf_kvm_io_ctx *ctx)
{
	struct virtio_run *run = virtio_run_state();
	__u32 busy = 0, i;

	if (!run)
		return 0;
	virtio_xchg(&run->paused, 1);
	/* Who resets has the queues until all is done, and says before that it is. */
	busy = VIRTIO_LOAD(run->resetting);
	virtio_mb();
	for (i = 0; i < VIRTIO_QUEUES; i++)
		busy |= VIRTIO_LOAD(run->busy[i]);
	return busy ? 1 : 0;
}

/* The eventfds are others, and the interrupt controller may be: once too often is fine. */
KVM_IO_WORK(2, restore)
int virtio_restore(struct bpf_kvm_io_ctx *ctx)
{
	struct virtio_run *run = virtio_run_state();
	struct virtio *v = virtio_state();

	if (!v || !run)
		return 0;
	virtio_xchg(&run->paused, 0);
	bpf_kvm_irq_signal(ctx, VIRTIO_DOORBELL);
	if (VIRTIO_LOAD(v->interrupt_status))
		bpf_kvm_irq_signal(ctx, VIRTIO_IRQ);
	return 0;
}

KVM_IO_WORK(3, reset)
int virtio_reset_work(struct bpf_kvm_io_ctx *ctx)
{
	struct virtio_run *run = virtio_run_state();

	if (!run)
		return 0;
	virtio_xchg(&run->resetting, 1);
	return virtio_more(virtio_try_reset());
}

#endif /* VIRTIO_BPF_H */
