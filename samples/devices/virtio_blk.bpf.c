// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * A block device (virtio 1.3, 5.2) on memory of the host: the map "disk", which is
 * part of the device's state.  What the VMM may say is in "disk_options", before a
 * vCPU runs; two devices that only read may have one "disk".
 *
 * Requests have the shape that drivers give them: a descriptor of 16 bytes, those of
 * the data, and one of a byte.  Of another shape they are the end of the device,
 * until it is reset.
 */
#include <linux/types.h>
#include <linux/virtio_blk.h>

#define BLK_PAGE 4096
#define BLK_SECTOR 512
#define BLK_SECTORS_PER_PAGE 8

/* 8 MiB, if the VMM does not resize the map. */
#define BLK_PAGES 2048

/* Descriptors of data, and bytes in them all: what one request copies at most. */
#define BLK_SEG_MAX 32
#define BLK_SIZE_MAX 4096
#define BLK_BYTES_MAX (BLK_SEG_MAX * BLK_SIZE_MAX)

static __always_inline __u64 blk_features(void);

#define VIRTIO_ID VIRTIO_ID_BLOCK
#define VIRTIO_QUEUES 1
#define VIRTIO_QUEUE_MAX 128
#define VIRTIO_FEATURES blk_features()
#define VIRTIO_CONFIG struct virtio_blk_config
#include "virtio_bpf.h"

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, BLK_PAGES);
	__type(key, __u32);
	__type(value, __u8[BLK_PAGE]);
} disk SEC(".maps");

struct disk_options {
	/* How many there are; 0 for BLK_PAGES. */
	__u64 sectors;
	/* Not 0: the guest writes nothing. */
	__u32 read_only;
	/* What the guest calls the serial number. */
	char id[VIRTIO_BLK_ID_BYTES];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct disk_options);
} disk_options SEC(".maps");

static __always_inline struct disk_options *blk_options(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&disk_options, &zero);
}

static __always_inline __u64 blk_sectors(const struct disk_options *options)
{
	if (options && options->sectors)
		return options->sectors;
	return BLK_PAGES * BLK_SECTORS_PER_PAGE;
}

static __always_inline __u64 blk_features(void)
{
	const struct disk_options *options = blk_options();
	__u64 features =
		1ULL << VIRTIO_BLK_F_SIZE_MAX | 1ULL << VIRTIO_BLK_F_SEG_MAX |
		1ULL << VIRTIO_BLK_F_BLK_SIZE | 1ULL << VIRTIO_BLK_F_FLUSH;

	if (options && options->read_only)
		features |= 1ULL << VIRTIO_BLK_F_RO;
	return features;
}

static __always_inline void virtio_config(struct virtio_blk_config *config)
{
	config->capacity = blk_sectors(blk_options());
	config->size_max = BLK_SIZE_MAX;
	config->seg_max = BLK_SEG_MAX;
	config->blk_size = BLK_SECTOR;
}

/* A request, from its first descriptor on. */
struct blk_request {
	struct virtio_blk_outhdr header;
	/* Of what is left of the data. */
	__u64 sector;
	__u32 status;
	/* Bytes for the driver, without the status. */
	__u32 written;
};

/* Copy a page or a sector; 0, or negative. */
static __always_inline int blk_copy_one(struct bpf_kvm_io_ctx *ctx,
					__u64 sector, __u64 addr,
					_Bool whole_page, __u32 to_guest)
{
	__u32 offset = sector % BLK_SECTORS_PER_PAGE * BLK_SECTOR;
	__u32 index = sector / BLK_SECTORS_PER_PAGE;
	__u8 *page = bpf_map_lookup_elem(&disk, &index);

	if (!page)
		return -1;
	if (whole_page && to_guest)
		return bpf_kvm_mem_write(ctx, addr, page, BLK_PAGE);
	if (whole_page)
		return bpf_kvm_mem_read(ctx, addr, page, BLK_PAGE);
	if (to_guest)
		return bpf_kvm_mem_write(ctx, addr, page + offset, BLK_SECTOR);
	return bpf_kvm_mem_read(ctx, addr, page + offset, BLK_SECTOR);
}

/* Copy data between the disk and the guest, whole sectors; 0, or negative. */
__noinline int blk_copy(struct bpf_kvm_io_ctx *ctx __arg_ctx, __u64 sector,
			__u64 addr, __u32 len, __u32 to_guest)
{
	_Bool pages = !(sector % BLK_SECTORS_PER_PAGE) && !(len % BLK_PAGE);
	__u32 count = pages ? len / BLK_PAGE : len / BLK_SECTOR;
	__u32 i;

	/* What drivers have most often takes no loop, which has a price. */
	if (count == 1)
		return blk_copy_one(ctx, sector, addr, pages, to_guest);
	bpf_for(i, 0, BLK_BYTES_MAX / BLK_SECTOR)
	{
		__u64 at = sector + (pages ? i * BLK_SECTORS_PER_PAGE : i);

		if (i >= count)
			return 0;
		if (blk_copy_one(ctx, at, addr + (at - sector) * BLK_SECTOR,
				 pages, to_guest))
			return -1;
	}
	return count > BLK_BYTES_MAX / BLK_SECTOR ? -1 : 0;
}

/* The data of one descriptor of a request to read or to write; a status. */
static __always_inline __u32 blk_data(struct bpf_kvm_io_ctx *ctx,
				      struct virtq_chain *chain,
				      struct blk_request *r, _Bool to_guest)
{
	const struct disk_options *options = blk_options();
	__u64 sectors = blk_sectors(options);
	__u32 len = chain->desc.len;
	__u32 count = len / BLK_SECTOR;

	if (!options || (!to_guest && options->read_only))
		return VIRTIO_BLK_S_IOERR;
	if (to_guest != !!(chain->desc.flags & VRING_DESC_F_WRITE))
		return VIRTIO_BLK_S_IOERR;
	if (len % BLK_SECTOR || len > BLK_BYTES_MAX ||
	    chain->bytes + len > BLK_BYTES_MAX)
		return VIRTIO_BLK_S_IOERR;
	if (r->sector > sectors || count > sectors - r->sector)
		return VIRTIO_BLK_S_IOERR;
	chain->bytes += len;
	if (blk_copy(ctx, r->sector, chain->desc.addr, len, to_guest))
		return VIRTIO_BLK_S_IOERR;
	r->sector += count;
	if (to_guest)
		r->written += len;
	return VIRTIO_BLK_S_OK;
}

static __always_inline __u32 blk_id(struct bpf_kvm_io_ctx *ctx,
				    struct virtq_chain *chain,
				    struct blk_request *r)
{
	struct disk_options *options = blk_options();

	if (!options || !(chain->desc.flags & VRING_DESC_F_WRITE) ||
	    chain->desc.len < sizeof(options->id) ||
	    bpf_kvm_mem_write(ctx, chain->desc.addr, options->id,
			      sizeof(options->id)))
		return VIRTIO_BLK_S_IOERR;
	r->written += sizeof(options->id);
	return VIRTIO_BLK_S_OK;
}

/* What one descriptor of data asks for; a status. */
__noinline int blk_serve(struct bpf_kvm_io_ctx *ctx __arg_ctx,
			 struct virtq_chain *chain __arg_nonnull,
			 struct blk_request *r __arg_nonnull)
{
	switch (r->header.type) {
	case VIRTIO_BLK_T_IN:
		return blk_data(ctx, chain, r, 1);
	case VIRTIO_BLK_T_OUT:
		return blk_data(ctx, chain, r, 0);
	case VIRTIO_BLK_T_GET_ID:
		return blk_id(ctx, chain, r);
	}
	return VIRTIO_BLK_S_UNSUPP;
}

__noinline int virtio_request(struct bpf_kvm_io_ctx *ctx __arg_ctx,
			      struct virtq_chain *chain __arg_nonnull)
{
	struct blk_request r = {};
	__u8 status;
	__u32 i;

	if (virtq_next(ctx, chain) || chain->desc.flags & VRING_DESC_F_WRITE ||
	    chain->desc.len != sizeof(r.header) ||
	    bpf_kvm_mem_read(ctx, chain->desc.addr, &r.header,
			     sizeof(r.header)))
		return -1;
	r.sector = r.header.sector;
	bpf_for(i, 0, VIRTIO_CHAIN_ENDS)
	{
		if (virtq_next(ctx, chain))
			return -1;
		if (!chain->more)
			break;
		if (r.status == VIRTIO_BLK_S_OK)
			r.status = blk_serve(ctx, chain, &r);
	}
	if (chain->desc.len != 1 || !(chain->desc.flags & VRING_DESC_F_WRITE))
		return -1;
	/* Those without data have come by nothing yet. */
	if (r.status == VIRTIO_BLK_S_OK && r.header.type != VIRTIO_BLK_T_IN &&
	    r.header.type != VIRTIO_BLK_T_OUT &&
	    r.header.type != VIRTIO_BLK_T_GET_ID &&
	    r.header.type != VIRTIO_BLK_T_FLUSH)
		r.status = VIRTIO_BLK_S_UNSUPP;
	status = r.status;
	if (bpf_kvm_mem_write(ctx, chain->desc.addr, &status, sizeof(status)))
		return -1;
	return r.written + sizeof(status);
}

char _license[] SEC("license") = "Dual BSD/GPL";
