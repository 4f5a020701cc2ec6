// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * PrimeCell Real Time Clock PL031 (Arm DDI 0224).
 *
 *	offset	name	access	meaning
 *	0x000	DR	RO	the time, in seconds
 *	0x004	MR	RW	match: the time of the alarm
 *	0x008	LR	RW	load: sets the time; reads as last written
 *	0x00c	CR	RW	bit 0: the clock runs; always 1 here
 *	0x010	IMSC	RW	bit 0: let the interrupt through
 *	0x014	RIS	RO	bit 0: interrupt, raw
 *	0x018	MIS	RO	bit 0: interrupt, masked: RIS & IMSC
 *	0x01c	ICR	WO	bit 0: clear RIS
 *	0xfe0	ID	RO	8 registers of one byte: peripheral, PrimeCell
 *
 * Registers have 32 bits, and all drivers known access them so.  Any other
 * access reads 0 and is ignored when written: another width, an offset that is
 * no multiple of 4, an unknown register, the wrong direction.
 *
 * The clock runs from the start, as if firmware had set it: DR is the time of
 * day, CR reads 1, and writes of CR change nothing (the manual says so of a
 * clock that runs).  A counter, the seconds of the time of day, is behind DR;
 * LR sets the difference to it.  So DR has the new value at once, and its next
 * step is that of the counter: up to a second later.
 *
 * All state is in the map "pl031", and nothing in it depends on when this host
 * has booted: that is in "clock" alone, a parameter.  So a VMM may put
 * the state of another host there, and run "restore", which starts the timer.
 * Time has passed since, as for any clock: an alarm that was due meanwhile rings.
 * "reset" is that of the machine, through which the clock runs on.
 *
 * RIS is an event: it is set when DR becomes equal to MR, by the passing of
 * time or by a write of either, and stays until ICR clears it.  A match that
 * lies in the past waits for DR to wrap around.
 *
 * The interrupt is wired edge-triggered: it is signalled whenever MIS goes from
 * 0 to 1, once, by an access or by a timer, whichever finds it first.  On a
 * kernel without bpf_kvm_irq_acquire() there is no timer, and an alarm waits for
 * the guest's next access.
 */
#include "kvm_bpf.h"

#define PL031_SIZE 0x1000
#define PL031_IRQS 1
#define PL031_IRQ 0

#define DR 0x000
#define MR 0x004
#define LR 0x008
#define CR 0x00c
#define IMSC 0x010
#define RIS 0x014
#define MIS 0x018
#define ICR 0x01c
#define ID_FIRST 0xfe0
#define ID_LAST 0xffc

#define CR_START 1
#define INTERRUPT 1

/* A byte for each of the registers from ID_FIRST, the lowest first. */
#define IDS 0xb105f00d00041031ULL

#define CLOCK_BOOTTIME 7
#define NSEC_PER_SEC 1000000000ULL

/* How often to start the timer anew when another vCPU has changed the alarm
 * meanwhile. */
#define START_TRIES 8

KVM_BPF_MMIO_DEVICE(PL031_SIZE, PL031_IRQS, "arm,pl031\0arm,primecell");

/* What to add to bpf_ktime_get_boot_ns() to get the time of day, in nanoseconds.
 * A map of its own: it is the host's, and no state. */
KVM_BPF_REQUIRED_PARAM("clock");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} clock SEC(".maps");

struct pl031 {
	__u32 mr;
	__u32 lr;
	/* DR less the counter. */
	__u32 offset;
	__u32 imsc;
	__u32 ris;
	/* The counter at the last look.  RIS knows of all matches up to it. */
	__u64 counter;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct pl031);
} pl031 SEC(".maps");

/* What locks and what rings is this host's, and no state: apart from it. */

struct rtc_lock {
	struct bpf_spin_lock lock;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct rtc_lock);
} locks SEC(".maps");

/* Fires at the next alarm; too early or without need does no harm. */
struct alarm {
	struct bpf_timer timer;
};

/* The VMM has to keep this map open: else the kernel cancels the timer. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct alarm);
} alarms SEC(".maps");

/* For the timer, which has no context. */
struct alarm_irq {
	struct bpf_kvm_irq __kptr *irq;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct alarm_irq);
} alarm_irqs SEC(".maps");

static __always_inline struct pl031 *rtc_state(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&pl031, &zero);
}

static __always_inline struct rtc_lock *rtc_lock(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&locks, &zero);
}

static __always_inline struct alarm *rtc_timer(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&alarms, &zero);
}

static __always_inline struct alarm_irq *rtc_irq(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&alarm_irqs, &zero);
}

static __always_inline __u64 clock_offset(void)
{
	__u32 zero = 0;
	__u64 *offset = bpf_map_lookup_elem(&clock, &zero);

	return offset ? *offset : 0;
}

/* The functions from here to the next such comment run under the lock. */

static __always_inline __u32 rtc_dr(const struct pl031 *rtc)
{
	return rtc->counter + rtc->offset;
}

static __always_inline __u32 rtc_mis(const struct pl031 *rtc)
{
	return rtc->ris & rtc->imsc;
}

/* Seconds from the counter's value to the next match, at least 1. */
static __always_inline __u64 rtc_until_match(const struct pl031 *rtc)
{
	__u32 seconds = rtc->mr - rtc_dr(rtc);

	return seconds ? seconds : 1ULL << 32;
}

/*
 * Let time pass up to @counter; true if that raises the interrupt.  If that is
 * in the past, as the VMM has set the clock back, matches happen again.
 */
static __always_inline _Bool rtc_advance(struct pl031 *rtc, __u64 counter)
{
	__u32 before = rtc_mis(rtc);

	if (counter > rtc->counter &&
	    counter - rtc->counter >= rtc_until_match(rtc))
		rtc->ris = INTERRUPT;
	rtc->counter = counter;
	return !before && rtc_mis(rtc);
}

/* When the interrupt will rise by itself, as the timer counts; 0: never. */
static __always_inline __u64 rtc_alarm(const struct pl031 *rtc, __u64 clock_ns)
{
	if (rtc->ris || !rtc->imsc)
		return 0;
	return (rtc->counter + rtc_until_match(rtc)) * NSEC_PER_SEC - clock_ns;
}

static __always_inline __u32 rtc_read(const struct pl031 *rtc, __u64 offset)
{
	switch (offset) {
	case DR:
		return rtc_dr(rtc);
	case MR:
		return rtc->mr;
	case LR:
		return rtc->lr;
	case CR:
		return CR_START;
	case IMSC:
		return rtc->imsc;
	case RIS:
		return rtc->ris;
	case MIS:
		return rtc_mis(rtc);
	}
	return 0;
}

/* True if the write raises the interrupt. */
static __always_inline _Bool rtc_write(struct pl031 *rtc, __u64 offset,
				       __u32 value)
{
	__u32 before = rtc_mis(rtc);

	switch (offset) {
	case MR:
		rtc->mr = value;
		break;
	case LR:
		rtc->lr = value;
		rtc->offset = value - (__u32)rtc->counter;
		break;
	case IMSC:
		rtc->imsc = value & INTERRUPT;
		break;
	case ICR:
		rtc->ris &= ~value;
		break;
	}
	if ((offset == MR || offset == LR) && rtc->mr == rtc_dr(rtc))
		rtc->ris = INTERRUPT;
	return !before && rtc_mis(rtc);
}

/* Without the lock from here. */

/* The seconds of the time of day. */
static __always_inline __u64 look_at_clock(void)
{
	return (bpf_ktime_get_boot_ns() + clock_offset()) / NSEC_PER_SEC;
}

/*
 * Take the lock and let time pass; true if that raises the interrupt.
 *
 * Helpers may not be called under the lock, so the look at the clock is before
 * that, and who comes in between may have looked later: a look that is behind
 * the counter is no reason to go back, so look again.  If that is behind too,
 * somebody has moved the counter once more, or the clock has been set back.
 */
static __always_inline _Bool lock_and_advance(struct pl031 *rtc,
					      struct rtc_lock *lock)
{
	__u64 counter = look_at_clock();
	__u64 seen;

	bpf_spin_lock(&lock->lock);
	if (counter < rtc->counter) {
		seen = rtc->counter;
		bpf_spin_unlock(&lock->lock);
		counter = look_at_clock();
		bpf_spin_lock(&lock->lock);
		if (counter < rtc->counter && rtc->counter != seen)
			counter = rtc->counter;
	}
	return rtc_advance(rtc, counter);
}

static __always_inline void signal_irq(struct bpf_kvm_io_ctx *ctx)
{
	if (bpf_ksym_exists(bpf_kvm_irq_signal))
		bpf_kvm_irq_signal(ctx, PL031_IRQ);
}

/*
 * Start the timer for @alarm_ns, and again should that no longer be the next
 * alarm: two vCPUs may start it in the other order than they changed the
 * registers.  Who starts it last finds it right.
 */
static __always_inline void start_timer(struct pl031 *rtc,
					struct rtc_lock *lock,
					struct alarm *alarm, __u64 clock_ns,
					__u64 alarm_ns)
{
	for (int try = 0; try < START_TRIES; try++) {
		__u64 started = alarm_ns;

		if (!alarm_ns)
			break;
		bpf_timer_start(&alarm->timer, alarm_ns, BPF_F_TIMER_ABS);
		bpf_spin_lock(&lock->lock);
		alarm_ns = rtc_alarm(rtc, clock_ns);
		bpf_spin_unlock(&lock->lock);
		if (alarm_ns == started)
			break;
	}
}

static int on_timer(void *map, __u32 *key, struct alarm *alarm)
{
	struct alarm_irq *kept = rtc_irq();
	__u64 clock_ns = clock_offset();
	struct rtc_lock *lock = rtc_lock();
	struct pl031 *rtc = rtc_state();
	struct bpf_kvm_irq *irq;
	__u64 alarm_ns;
	_Bool raised;

	if (!rtc || !lock || !kept)
		return 0;
	raised = lock_and_advance(rtc, lock);
	alarm_ns = rtc_alarm(rtc, clock_ns);
	bpf_spin_unlock(&lock->lock);

	irq = kept->irq;
	if (raised && irq && bpf_ksym_exists(bpf_kvm_irq_signal_kept))
		bpf_kvm_irq_signal_kept(irq);
	start_timer(rtc, lock, alarm, clock_ns, alarm_ns);
	return 0;
}

/*
 * Prepare for on_timer(), each time anew, so that the callback is the latest
 * program's and the interrupt the latest device's.
 */
static __always_inline void prepare_timer(struct bpf_kvm_io_ctx *ctx,
					  struct alarm *alarm)
{
	struct alarm_irq *kept = rtc_irq();
	struct bpf_kvm_irq *irq;

	if (!kept || !bpf_ksym_exists(bpf_kvm_irq_acquire))
		return;
	irq = bpf_kvm_irq_acquire(ctx, PL031_IRQ);
	if (!irq)
		return;
	irq = bpf_kptr_xchg(&kept->irq, irq);
	if (irq)
		bpf_kvm_irq_release(irq);

	/* It may exist already. */
	bpf_timer_init(&alarm->timer, &alarms, CLOCK_BOOTTIME);
	bpf_timer_set_callback(&alarm->timer, on_timer);
}

KVM_IO_READ
int pl031_read(struct bpf_kvm_io_ctx *ctx)
{
	struct rtc_lock *lock = rtc_lock();
	struct pl031 *rtc = rtc_state();
	__u64 offset = ctx->offset;
	_Bool raised;
	__u32 value;

	if (!rtc || !lock || ctx->len != 4 || offset & 3)
		return 0;
	if (offset >= ID_FIRST && offset <= ID_LAST) {
		*(__u64 *)ctx->buf = IDS >> (offset - ID_FIRST) * 2 & 0xff;
		return 0;
	}

	raised = lock_and_advance(rtc, lock);
	value = rtc_read(rtc, offset);
	bpf_spin_unlock(&lock->lock);

	*(__u64 *)ctx->buf = value;
	if (raised)
		signal_irq(ctx);
	return 0;
}

KVM_IO_WRITE
int pl031_write(struct bpf_kvm_io_ctx *ctx)
{
	struct rtc_lock *lock = rtc_lock();
	__u64 clock_ns = clock_offset();
	struct pl031 *rtc = rtc_state();
	struct alarm *alarm = rtc_timer();
	__u64 data = *(__u64 *)ctx->buf;
	__u64 offset = ctx->offset;
	__u64 alarm_ns;
	_Bool raised;

	if (!rtc || !lock || !alarm || ctx->len != 4)
		return 0;

	/* If time raises the interrupt, the write can only lower it again: the
	 * edge has been, and is signalled. */
	raised = lock_and_advance(rtc, lock);
	raised |= rtc_write(rtc, offset, data);
	alarm_ns = rtc_alarm(rtc, clock_ns);
	bpf_spin_unlock(&lock->lock);

	if (raised)
		signal_irq(ctx);
	if (alarm_ns) {
		prepare_timer(ctx, alarm);
		start_timer(rtc, lock, alarm, clock_ns, alarm_ns);
	}
	return 0;
}

/* Ring if it is time to, and start the timer for the next time. */
static __always_inline void go_on(struct bpf_kvm_io_ctx *ctx)
{
	struct rtc_lock *lock = rtc_lock();
	__u64 clock_ns = clock_offset();
	struct pl031 *rtc = rtc_state();
	struct alarm *alarm = rtc_timer();
	__u64 alarm_ns;
	_Bool raised;

	if (!rtc || !lock || !alarm)
		return;
	raised = lock_and_advance(rtc, lock);
	alarm_ns = rtc_alarm(rtc, clock_ns);
	bpf_spin_unlock(&lock->lock);

	/* Also if there is no alarm: no old callback is to run any more. */
	prepare_timer(ctx, alarm);
	if (raised)
		signal_irq(ctx);
	start_timer(rtc, lock, alarm, clock_ns, alarm_ns);
}

/* A timer that rings no more; waits for a callback that runs. */
static __always_inline void stop_timer(void)
{
	struct alarm *alarm = rtc_timer();

	if (alarm)
		bpf_timer_cancel(&alarm->timer);
}

KVM_IO_WORK(0, reset)
int pl031_reset(struct bpf_kvm_io_ctx *ctx)
{
	struct rtc_lock *lock = rtc_lock();
	struct pl031 *rtc = rtc_state();

	if (!rtc || !lock)
		return 0;
	stop_timer();
	bpf_spin_lock(&lock->lock);
	rtc->mr = 0;
	rtc->lr = 0;
	rtc->imsc = 0;
	rtc->ris = 0;
	bpf_spin_unlock(&lock->lock);
	return 0;
}

/* The state is in its map already, and stays as it is from here. */
KVM_IO_WORK(1, save)
int pl031_save(struct bpf_kvm_io_ctx *ctx)
{
	stop_timer();
	return 0;
}

KVM_IO_WORK(2, restore)
int pl031_restore(struct bpf_kvm_io_ctx *ctx)
{
	go_on(ctx);
	return 0;
}

KVM_IO_WORK(3, replaced)
int pl031_replaced(struct bpf_kvm_io_ctx *ctx)
{
	/* An old callback may be running. */
	stop_timer();
	go_on(ctx);
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
