// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The transmitter of a 16550A UART (TI, PC16550D), at eight ports of x86.
 *
 *	port	DLAB	read			write
 *	0	0	RBR: always 0		THR: sends a byte
 *	1	0	IER			IER: bits 0 to 3
 *	0, 1	1	DLL, DLM: divisor	likewise; no rate follows from it
 *	2		IIR			FCR: bit 0 says that there are FIFOs
 *	3		LCR			LCR: bit 7 is DLAB
 *	4		MCR			MCR: bits 0 to 4
 *	5		LSR			ignored
 *	6		MSR			ignored
 *	7		SCR			SCR
 *
 * Registers have 8 bits, and all drivers known access them so.  Any other access
 * reads 0 and is ignored when written.
 *
 * A byte is sent at once: it goes into the ring buffer "output", and THR is empty
 * again.  Where the ring is full, because nobody takes the bytes, they are counted
 * in "lost" and dropped, as by a line that nobody listens to; the guest never waits.
 * With loopback (MCR bit 4) nothing is sent.  There is no receiver: no data is
 * ready, ever, and the modem at the other end is ready and stays so.
 *
 * The one interrupt there is says that THR is empty.  As on the chip it is pending
 * from a byte that is sent, or from IER's bit 1 going from 0 to 1, until IIR is read,
 * and OUT2 (MCR bit 3) lets it out, as on a PC.  It is wired edge-triggered: it is
 * signalled whenever it goes from off to on.
 */
#include "kvm_bpf.h"

#define UART_PORTS 8
#define UART_IRQS 1
#define UART_IRQ 0

/* DLL and DLM are where THR and IER are, FCR where IIR is. */
#define THR 0
#define IER 1
#define IIR 2
#define LCR 3
#define MCR 4
#define LSR 5
#define MSR 6
#define SCR 7

#define IER_THRE 0x02
#define IER_MASK 0x0f

#define IIR_NONE 0x01
#define IIR_THRE 0x02
#define IIR_FIFOS 0xc0

#define FCR_FIFOS 0x01

#define LCR_DLAB 0x80

#define MCR_DTR 0x01
#define MCR_RTS 0x02
#define MCR_OUT1 0x04
#define MCR_OUT2 0x08
#define MCR_LOOP 0x10
#define MCR_MASK 0x1f

/* Transmitter and THR are empty. */
#define LSR_EMPTY 0x60

#define MSR_CTS 0x10
#define MSR_DSR 0x20
#define MSR_RI 0x40
#define MSR_DCD 0x80

/* Bytes of the ring; each that is sent takes 16 there until it is taken. */
#ifndef RING_BYTES
#define RING_BYTES (256 * 1024)
#endif

KVM_BPF_MMIO_DEVICE(0, UART_IRQS, "ns16550a");
KVM_BPF_RANGES(KVM_BPF_PORTS(0, UART_PORTS));

/* What the guest sends, a byte each.  The VMM takes it. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, RING_BYTES);
} output SEC(".maps");

struct uart {
	__u8 ier;
	__u8 fcr;
	__u8 lcr;
	__u8 mcr;
	__u8 scr;
	__u8 dll;
	__u8 dlm;
	/* THR has become empty, and nobody has looked. */
	__u8 pending;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct uart);
} uart SEC(".maps");

struct uart_lock {
	struct bpf_spin_lock lock;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct uart_lock);
} locks SEC(".maps");

/* Bytes for which there was no room. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} lost SEC(".maps");

static __always_inline struct uart *uart_state(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&uart, &zero);
}

static __always_inline struct uart_lock *uart_lock(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&locks, &zero);
}

static __always_inline void send(__u8 byte)
{
	__u32 zero = 0;
	__u64 *count;

	if (!bpf_ringbuf_output(&output, &byte, sizeof(byte), 0))
		return;
	count = bpf_map_lookup_elem(&lost, &zero);
	if (count)
		__sync_fetch_and_add(count, 1);
}

/*
 * A register's value.  Two branches that load different registers clang may join
 * into one load of an address that it computes, which the verifier does not take
 * of such programs; it does not join these.
 */
static __always_inline __u8 load(const __u8 *reg)
{
	__u64 value = *reg;

	asm volatile("" : "+r"(value));
	return value;
}

/* The same with a store. */
static __always_inline void store(__u8 *reg, __u8 value)
{
	*reg = value;
	asm volatile("" ::: "memory");
}

/* The functions from here to the next such comment run under the lock. */

static __always_inline _Bool uart_irq(const struct uart *u)
{
	return u->pending && (u->ier & IER_THRE) && (u->mcr & MCR_OUT2);
}

static __always_inline __u8 uart_iir(struct uart *u)
{
	__u8 iir = IIR_NONE;

	if (u->pending && (u->ier & IER_THRE)) {
		u->pending = 0;
		iir = IIR_THRE;
	}
	return u->fcr & FCR_FIFOS ? iir | IIR_FIFOS : iir;
}

static __always_inline __u8 uart_msr(const struct uart *u)
{
	__u8 msr = 0;

	if (!(u->mcr & MCR_LOOP))
		return MSR_CTS | MSR_DSR | MSR_DCD;
	if (u->mcr & MCR_RTS)
		msr |= MSR_CTS;
	if (u->mcr & MCR_DTR)
		msr |= MSR_DSR;
	if (u->mcr & MCR_OUT1)
		msr |= MSR_RI;
	if (u->mcr & MCR_OUT2)
		msr |= MSR_DCD;
	return msr;
}

static __always_inline __u8 uart_get(struct uart *u, __u64 port)
{
	_Bool dlab = u->lcr & LCR_DLAB;

	switch (port) {
	case THR:
		return dlab ? load(&u->dll) : 0;
	case IER:
		return dlab ? load(&u->dlm) : load(&u->ier);
	case IIR:
		return uart_iir(u);
	case LCR:
		return load(&u->lcr);
	case MCR:
		return load(&u->mcr);
	case LSR:
		return LSR_EMPTY;
	case MSR:
		return uart_msr(u);
	case SCR:
		return load(&u->scr);
	default:
		return 0;
	}
}

/* True if the byte is to be sent. */
static __always_inline _Bool uart_set(struct uart *u, __u64 port, __u8 byte)
{
	_Bool dlab = u->lcr & LCR_DLAB;

	switch (port) {
	case THR:
		if (dlab) {
			store(&u->dll, byte);
			break;
		}
		store(&u->pending, 1);
		return !(u->mcr & MCR_LOOP);
	case IER:
		if (dlab) {
			store(&u->dlm, byte);
			break;
		}
		if (byte & ~u->ier & IER_THRE)
			store(&u->pending, 1);
		store(&u->ier, byte & IER_MASK);
		break;
	case IIR:
		store(&u->fcr, byte);
		break;
	case LCR:
		store(&u->lcr, byte);
		break;
	case MCR:
		store(&u->mcr, byte & MCR_MASK);
		break;
	case SCR:
		store(&u->scr, byte);
		break;
	}
	return 0;
}

/* The functions from here on take the lock. */

KVM_IO_READ
int uart16550_read(struct bpf_kvm_io_ctx *ctx)
{
	struct uart_lock *lock = uart_lock();
	struct uart *u = uart_state();
	__u64 port = ctx->offset;
	__u8 byte;

	if (!u || !lock || ctx->len != 1)
		return 0;
	/* No read turns the interrupt on. */
	bpf_spin_lock(&lock->lock);
	byte = uart_get(u, port);
	bpf_spin_unlock(&lock->lock);
	*(__u64 *)ctx->buf = byte;
	return 0;
}

KVM_IO_WRITE
int uart16550_write(struct bpf_kvm_io_ctx *ctx)
{
	struct uart_lock *lock = uart_lock();
	struct uart *u = uart_state();
	__u8 byte = *(__u64 *)ctx->buf;
	__u64 port = ctx->offset;
	_Bool before, after, is_data;

	if (!u || !lock || ctx->len != 1)
		return 0;
	bpf_spin_lock(&lock->lock);
	before = uart_irq(u);
	is_data = uart_set(u, port, byte);
	after = uart_irq(u);
	bpf_spin_unlock(&lock->lock);
	if (is_data)
		send(byte);
	if (after && !before && bpf_ksym_exists(bpf_kvm_irq_signal))
		bpf_kvm_irq_signal(ctx, UART_IRQ);
	return 0;
}

KVM_IO_WORK(0, reset)
int uart16550_reset(struct bpf_kvm_io_ctx *ctx)
{
	struct uart_lock *lock = uart_lock();
	struct uart *u = uart_state();

	if (!u || !lock)
		return 0;
	bpf_spin_lock(&lock->lock);
	*u = (struct uart){};
	bpf_spin_unlock(&lock->lock);
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
