// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * PrimeCell General Purpose Input/Output PL061 (Arm DDI 0190): eight lines.
 *
 *	offset	name	access	meaning, a bit for each line
 *	0x000	DATA	RW	levels; 0x000 to 0x3fc: bits 9 to 2 of the offset say
 *				which lines the access is for
 *	0x400	DIR	RW	1: an output, 0: an input
 *	0x404	IS	RW	interrupt by: 1 a level, 0 an edge
 *	0x408	IBE	RW	1: by both edges
 *	0x40c	IEV	RW	1: by a rising edge or high level, 0: falling, low
 *	0x410	IE	RW	1: let the interrupt through
 *	0x414	RIS	RO	interrupt, raw
 *	0x418	MIS	RO	interrupt, masked: RIS & IE
 *	0x41c	IC	WO	clear RIS where it came from an edge
 *	0x420	AFSEL	RW	1: under hardware control; keeps what is written
 *	0xfe0	ID	RO	8 registers of one byte: peripheral, PrimeCell
 *
 * Drivers access registers with 8 bits, or with 32.  Bits above the eighth are 0.
 * Any other access reads 0 and is ignored when written: another width, an offset
 * that is no multiple of 4, an unknown register, the wrong direction.
 *
 * The VMM drives the inputs: "input" sets the level of one.  What the guest drives is
 * in the map "pl061", "out & dir".
 *
 * The interrupt is one for all lines, active as long as MIS is not 0: the VMM wires
 * it level-triggered and has "resample" run when the guest has acknowledged it.
 */
#include "kvm_bpf.h"

#define PL061_SIZE 0x1000
#define PL061_IRQS 1
#define PL061_IRQ 0

#define DATA_LAST 0x3fc
#define DIR 0x400
#define IS 0x404
#define IBE 0x408
#define IEV 0x40c
#define IE 0x410
#define RIS 0x414
#define MIS 0x418
#define IC 0x41c
#define AFSEL 0x420
#define ID_FIRST 0xfe0
#define ID_LAST 0xffc

#define LINES 8

/* A byte for each of the registers from ID_FIRST, the lowest first. */
#define IDS 0xb105f00d00041061ULL

KVM_BPF_MMIO_DEVICE(PL061_SIZE, PL061_IRQS, "arm,pl061\0arm,primecell");

/* All but "in" and "edges" are registers. */
struct pl061 {
	/* Levels that come from outside. */
	__u8 in;
	__u8 out;
	__u8 dir;
	__u8 is;
	__u8 ibe;
	__u8 iev;
	__u8 ie;
	__u8 afsel;
	/* Edges that nobody has cleared. */
	__u8 edges;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct pl061);
} pl061 SEC(".maps");

struct gpio_lock {
	struct bpf_spin_lock lock;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct gpio_lock);
} locks SEC(".maps");

static __always_inline struct pl061 *gpio_state(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&pl061, &zero);
}

static __always_inline struct gpio_lock *gpio_lock(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&locks, &zero);
}

/* The functions from here to the next such comment run under the lock. */

/* What the lines are at, whoever drives them. */
static __always_inline __u8 gpio_levels(const struct pl061 *gpio)
{
	return (gpio->in & ~gpio->dir) | (gpio->out & gpio->dir);
}

static __always_inline __u8 gpio_ris(const struct pl061 *gpio)
{
	__u8 levels = gpio_levels(gpio);

	return (gpio->edges & ~gpio->is) | ((levels ^ ~gpio->iev) & gpio->is);
}

static __always_inline __u8 gpio_mis(const struct pl061 *gpio)
{
	return gpio_ris(gpio) & gpio->ie;
}

/* Take note of the edges since the lines were at @before. */
static __always_inline void gpio_edges(struct pl061 *gpio, __u8 before)
{
	__u8 levels = gpio_levels(gpio);
	__u8 rose = levels & ~before;
	__u8 fell = ~levels & before;
	__u8 wanted = gpio->ibe & (rose | fell);

	wanted |= ~gpio->ibe & ((rose & gpio->iev) | (fell & ~gpio->iev));
	gpio->edges |= wanted & ~gpio->is;
}

/*
 * Which register of a byte an access is for.  Two branches that access different
 * registers clang may join into one access of an address that it computes, which
 * the verifier does not take of such programs; it does not join these.
 */
static __always_inline __u8 load(const __u8 *reg)
{
	__u64 value = *reg;

	asm volatile("" : "+r"(value));
	return value;
}

static __always_inline void store(__u8 *reg, __u8 value)
{
	*reg = value;
	asm volatile("" ::: "memory");
}

static __always_inline __u8 gpio_read(const struct pl061 *gpio, __u64 offset)
{
	if (offset <= DATA_LAST)
		return gpio_levels(gpio) & offset >> 2;
	switch (offset) {
	case DIR:
		return load(&gpio->dir);
	case IS:
		return load(&gpio->is);
	case IBE:
		return load(&gpio->ibe);
	case IEV:
		return load(&gpio->iev);
	case IE:
		return load(&gpio->ie);
	case RIS:
		return gpio_ris(gpio);
	case MIS:
		return gpio_mis(gpio);
	case AFSEL:
		return load(&gpio->afsel);
	}
	return 0;
}

static __always_inline void gpio_write(struct pl061 *gpio, __u64 offset,
				       __u8 value)
{
	__u8 before = gpio_levels(gpio);

	if (offset <= DATA_LAST) {
		__u8 lines = offset >> 2;

		store(&gpio->out, (gpio->out & ~lines) | (value & lines));
	} else {
		switch (offset) {
		case DIR:
			store(&gpio->dir, value);
			break;
		case IS:
			store(&gpio->is, value);
			break;
		case IBE:
			store(&gpio->ibe, value);
			break;
		case IEV:
			store(&gpio->iev, value);
			break;
		case IE:
			store(&gpio->ie, value);
			break;
		case IC:
			store(&gpio->edges, gpio->edges & ~value);
			break;
		case AFSEL:
			store(&gpio->afsel, value);
			break;
		}
	}
	gpio_edges(gpio, before);
}

/* Without the lock from here. */

static __always_inline void signal_irq(struct bpf_kvm_io_ctx *ctx)
{
	if (bpf_ksym_exists(bpf_kvm_irq_signal))
		bpf_kvm_irq_signal(ctx, PL061_IRQ);
}

static __always_inline _Bool is_register(__u64 offset, __u8 len)
{
	return (len == 1 || len == 4) && !(offset & 3);
}

KVM_IO_READ
int pl061_read(struct bpf_kvm_io_ctx *ctx)
{
	struct gpio_lock *lock = gpio_lock();
	struct pl061 *gpio = gpio_state();
	__u64 offset = ctx->offset;
	__u8 value;

	if (!gpio || !lock || !is_register(offset, ctx->len))
		return 0;
	if (offset >= ID_FIRST && offset <= ID_LAST) {
		*(__u64 *)ctx->buf = IDS >> (offset - ID_FIRST) * 2 & 0xff;
		return 0;
	}
	bpf_spin_lock(&lock->lock);
	value = gpio_read(gpio, offset);
	bpf_spin_unlock(&lock->lock);
	*(__u64 *)ctx->buf = value;
	return 0;
}

KVM_IO_WRITE
int pl061_write(struct bpf_kvm_io_ctx *ctx)
{
	struct gpio_lock *lock = gpio_lock();
	struct pl061 *gpio = gpio_state();
	__u8 value = *(__u64 *)ctx->buf;
	__u64 offset = ctx->offset;
	__u8 before, after;

	if (!gpio || !lock || !is_register(offset, ctx->len))
		return 0;
	bpf_spin_lock(&lock->lock);
	before = gpio_mis(gpio);
	gpio_write(gpio, offset, value);
	after = gpio_mis(gpio);
	bpf_spin_unlock(&lock->lock);
	if (after && !before)
		signal_irq(ctx);
	return 0;
}

/* A bit for @line at its new level. */
static __always_inline __u8 with_line(__u8 levels, __u32 line, _Bool high)
{
	__u8 bit = 1 << line;

	return high ? levels | bit : levels & ~bit;
}

KVM_IO_WORK(0, input)
int pl061_input(struct bpf_kvm_io_ctx *ctx)
{
	struct gpio_lock *lock = gpio_lock();
	struct pl061 *gpio = gpio_state();
	__u64 data = *(__u64 *)ctx->buf;
	__u32 line = data;
	__u8 before, after, levels;

	if (!gpio || !lock || line >= LINES)
		return 0;
	bpf_spin_lock(&lock->lock);
	before = gpio_mis(gpio);
	levels = gpio_levels(gpio);
	gpio->in = with_line(gpio->in, line, data >> 32);
	gpio_edges(gpio, levels);
	after = gpio_mis(gpio);
	bpf_spin_unlock(&lock->lock);
	if (after && !before)
		signal_irq(ctx);
	return 0;
}

/* The interrupt is not active any more: is it still wanted? */
static __always_inline int signal_again(struct bpf_kvm_io_ctx *ctx)
{
	struct gpio_lock *lock = gpio_lock();
	struct pl061 *gpio = gpio_state();
	__u8 mis;

	if (!gpio || !lock)
		return 0;
	bpf_spin_lock(&lock->lock);
	mis = gpio_mis(gpio);
	bpf_spin_unlock(&lock->lock);
	if (mis)
		signal_irq(ctx);
	return 0;
}

KVM_IO_WORK(1, resample)
int pl061_resample(struct bpf_kvm_io_ctx *ctx)
{
	return signal_again(ctx);
}

/* Whatever the old interrupt controller knew. */
KVM_IO_WORK(2, restore)
int pl061_restore(struct bpf_kvm_io_ctx *ctx)
{
	return signal_again(ctx);
}

/* What comes from outside stays as it is. */
KVM_IO_WORK(3, reset)
int pl061_reset(struct bpf_kvm_io_ctx *ctx)
{
	struct gpio_lock *lock = gpio_lock();
	struct pl061 *gpio = gpio_state();

	if (!gpio || !lock)
		return 0;
	bpf_spin_lock(&lock->lock);
	*gpio = (struct pl061){.in = gpio->in};
	bpf_spin_unlock(&lock->lock);
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
