// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * A bank of registers whose reads cost nothing: the guest reads them from a map.
 *
 *	offset	name	bits	access	meaning
 *	0x00	ID	32	RO	identification, 0x4b425050
 *	0x04	VERSION	32	RO	version of this register map, 1
 *	0x08	SCRATCH	64	RW	holds what was written
 *	0x10	WRITES	64	RO	writes to the bank so far, by all vCPUs
 *	0x18	SELECT	32	WO	chooses what CHOICE is
 *	0x1c	CHOICE	32	RO	of SELECT 0, 1 and 2: 0x11111111, 0x22222222 and
 *				0x33333333; else 0
 *
 * Registers are little endian.  The rest of the bank, and SELECT, read as 0.  A
 * read of any width and at any offset gives the bytes that are there, as that of
 * memory does.  A naturally aligned write of 1, 2, 4 or 8 bytes to SCRATCH
 * reaches the bytes it names, one of 4 bytes to SELECT chooses; all others are
 * ignored, and counted too.
 *
 * SELECT and CHOICE are how virtio-mmio shows features: a write of one register
 * changes another one in the page.
 */
#include "kvm_bpf.h"

#define PAGEBANK_SIZE 0x1000
#define PAGEBANK_WORDS (PAGEBANK_SIZE / 8)

#define SCRATCH 0x08
#define SELECT 0x18

#define ID 0x4b425050
#ifndef VERSION
#define VERSION 1
#endif

KVM_BPF_MMIO_DEVICE(PAGEBANK_SIZE, 0, "kvm-bpf,pagebank");
KVM_BPF_READ_PAGE(0, 0, ".data.page");

/* All that the guest may read, and nothing else: it sees every byte. */
struct page {
	__u32 id;
	__u32 version;
	__u64 scratch;
	__u64 writes;
	__u32 select_reads_as_0;
	__u32 choice;
	__u64 unused[PAGEBANK_WORDS - 4];
};

union {
	struct page registers;
	__u64 words[PAGEBANK_WORDS];
} page SEC(".data.page") = {
	.registers =
		{
			.id = ID,
			.version = VERSION,
			.choice = 0x11111111,
		},
};

/* For where the page cannot be the guest's, and while the device is replaced. */
KVM_IO_READ
int pagebank_read(struct bpf_kvm_io_ctx *ctx)
{
	__u64 offset = ctx->offset;
	__u64 word = offset / 8 % PAGEBANK_WORDS;
	__u64 shift = offset % 8 * 8;
	__u64 value = page.words[word] >> shift;

	/* Behind the page's end there is nothing that an access could reach. */
	if (shift)
		value |= page.words[(word + 1) % PAGEBANK_WORDS]
			 << (64 - shift);
	*(__u64 *)ctx->buf = value;
	return 0;
}

/* Store by the access's own width: no vCPU reads half of it, nor undoes another's bytes. */
static __always_inline void scratch_write(__u64 offset, __u8 len, __u64 data)
{
	__u8 *bytes = (__u8 *)&page.registers.scratch;

	switch (len) {
	case 1:
		*(volatile __u8 *)(bytes + (offset & 7)) = data;
		break;
	case 2:
		*(volatile __u16 *)(bytes + (offset & 6)) = data;
		break;
	case 4:
		*(volatile __u32 *)(bytes + (offset & 4)) = data;
		break;
	case 8:
		*(volatile __u64 *)bytes = data;
		break;
	}
}

static __always_inline __u32 choice(__u32 select)
{
	return select < 3 ? 0x11111111 * (select + 1) : 0;
}

KVM_IO_WRITE
int pagebank_write(struct bpf_kvm_io_ctx *ctx)
{
	__u64 data = *(__u64 *)ctx->buf;
	__u64 offset = ctx->offset;
	__u8 len = ctx->len;

	if (!(offset & (len - 1)) && (offset & ~7ULL) == SCRATCH)
		scratch_write(offset, len, data);
	else if (offset == SELECT && len == 4)
		page.registers.choice = choice(data);
	__sync_fetch_and_add(&page.registers.writes, 1);
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
