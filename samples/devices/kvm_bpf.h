/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What a virtual device made of eBPF programs includes, and all it includes, but
 * for a vmlinux.h before it where it wants one.
 *
 * A device is one object file: at most one program per direction, maps that
 * hold its state, and a note that tells the VMM how large the device is:
 *
 *	KVM_BPF_MMIO_DEVICE(0x1000, 1, "vendor,device");
 *
 *	KVM_IO_READ
 *	int device_read(struct bpf_kvm_io_ctx *ctx)
 *	{
 *		*(__u64 *)ctx->buf = 42;
 *		return 0;
 *	}
 *
 *	char _license[] SEC("license") = "Dual BSD/GPL";
 *
 * A program returns 0 when it handled the access; with anything else the
 * access goes on to the VMM, so return non-zero before changing any state.
 *
 * ctx->buf holds the guest's bytes in memory order and is written by read
 * programs and read by write programs only.  Bytes past ctx->len read as 0
 * and are ignored when written, so one 8-byte access does for every width.
 */
#ifndef KVM_BPF_H
#define KVM_BPF_H

/*
 * A vmlinux.h before this has all the types.
 *
 * The attribute has each access of the context keep the constant offset that it
 * has in the source, as the verifier wants it; without it clang may compute in
 * two branches where to load from, and then load once.  Clang takes it only
 * ahead of the definition, so also write that line before a vmlinux.h.
 */
#ifndef __VMLINUX_H__
#if __has_attribute(preserve_static_offset)
struct __attribute__((preserve_static_offset)) bpf_kvm_io_ctx;
#endif
#include <linux/bpf.h>
#endif
#include <bpf/bpf_helpers.h>

/* Handlers of guest reads and writes, and those that may sleep. */
#define KVM_IO_READ SEC("kvm_io_read")
#define KVM_IO_WRITE SEC("kvm_io_write")
#define KVM_IO_READ_SLEEPABLE SEC("kvm_io_read.s")
#define KVM_IO_WRITE_SLEEPABLE SEC("kvm_io_write.s")

#define KVM_BPF_NOTE_OWNER "kvm-bpf"
#define KVM_BPF_NOTE_MMIO_DEVICE 1
#define KVM_BPF_NOTE_VERSION 1

/*
 * KVM_BPF_MMIO_DEVICE - describe the device to the VMM
 * @size:	bytes of guest-physical address space, 1 to INT_MAX: region 0; or 0
 *		where KVM_BPF_RANGES() has the regions
 * @irqs:	number of interrupts, indices 0 to @irqs - 1, at most 256
 * @compat:	device-tree "compatible" strings as one literal, "a\0b" for two
 *
 * Write it once per file.  Clang gives a section whose name starts with
 * ".note" the type SHT_NOTE, which libbpf passes over, so the object needs no
 * further step.  "nodebug" keeps the note out of BTF: it describes the file
 * and is no data of the programs.
 */
/* clang-format off */
#define KVM_BPF_MMIO_DEVICE(size, irqs, compat)				\
	_Static_assert((size) >= 0 && (size) <= 0x7fffffff, "MMIO size");\
	_Static_assert((irqs) >= 0 && (irqs) <= 256, "number of irqs");	\
	static const struct {						\
		__u32 namesz;						\
		__u32 descsz;						\
		__u32 type;						\
		char name[sizeof(KVM_BPF_NOTE_OWNER)];			\
		struct {						\
			__u32 version;					\
			__u32 nr_irqs;					\
			__u64 mmio_size;				\
			char compatible[sizeof(compat)];		\
		} __attribute__((packed)) desc;				\
	} __attribute__((packed, aligned(4))) kvm_bpf_mmio_device	\
		__attribute__((section(".note.kvm-bpf.mmio-device")))	\
		__attribute__((used, nodebug)) = {			\
		.namesz = sizeof(KVM_BPF_NOTE_OWNER),			\
		.descsz = sizeof(kvm_bpf_mmio_device.desc),		\
		.type = KVM_BPF_NOTE_MMIO_DEVICE,			\
		.name = KVM_BPF_NOTE_OWNER,				\
		.desc.version = KVM_BPF_NOTE_VERSION,			\
		.desc.nr_irqs = (irqs),					\
		.desc.mmio_size = (size),				\
		.desc.compatible = compat,				\
	}
/* clang-format on */

#define KVM_BPF_NOTE_ITEMS 2

/* Kinds of items. */
#define KVM_BPF_NOTE_MMIO_RANGE 1
#define KVM_BPF_NOTE_PORT_RANGE 2
#define KVM_BPF_NOTE_READ_PAGE 3
#define KVM_BPF_NOTE_DOORBELL 4
#define KVM_BPF_NOTE_WINDOW 5
#define KVM_BPF_NOTE_WORK_NAME 6
#define KVM_BPF_NOTE_STATE_VERSION 7
#define KVM_BPF_NOTE_PARAM 8
/* With this bit, a VMM that does not know the kind refuses the device. */
#define KVM_BPF_NOTE_REQUIRED 0x8000

struct kvm_bpf_note_range {
	__u16 kind;
	/* Bytes behind it. */
	__u16 len;
	__u32 region;
	__u32 flags;
	__u64 size;
} __attribute__((packed, aligned(4)));

/* clang-format off */
#define KVM_BPF_RANGE(_kind, _region, _size, max)			\
	{								\
		.kind = (_kind),					\
		.len = sizeof(struct kvm_bpf_note_range) - 4,		\
		.region = (_region),					\
		/* No array has so few elements: the numbers are wrong. */ \
		.size = (_size) + 0 * sizeof(char[(_size) > 0 &&	\
			(_size) <= (max) && (_region) >= 0 &&		\
			(_region) < 256 ? 1 : -1]),			\
	}

/*
 * KVM_BPF_RANGES - further regions of the device, which all have the same programs
 *
 * A list of KVM_BPF_MMIO(region, size) and KVM_BPF_PORTS(region, size), with the
 * region's index, ctx->region, 0 to 255, and its bytes or ports.  No index may be
 * there twice, nor be 0 where KVM_BPF_MMIO_DEVICE() has a size.  A device with
 * registers at eight ports and nowhere else:
 *
 *	KVM_BPF_MMIO_DEVICE(0, 1, "vendor,device");
 *	KVM_BPF_RANGES(KVM_BPF_PORTS(0, 8));
 *
 * Write it once per file.
 */
#define KVM_BPF_MMIO(region, size)					\
	KVM_BPF_RANGE(KVM_BPF_NOTE_MMIO_RANGE, region, size, 0x7fffffff)
#define KVM_BPF_PORTS(region, size)					\
	KVM_BPF_RANGE(KVM_BPF_NOTE_PORT_RANGE, region, size, 0x10000)
#define KVM_BPF_RANGES(...)						\
	static const struct {						\
		__u32 namesz;						\
		__u32 descsz;						\
		__u32 type;						\
		char name[sizeof(KVM_BPF_NOTE_OWNER)];			\
		struct kvm_bpf_note_range desc[				\
			sizeof((struct kvm_bpf_note_range[]){ __VA_ARGS__ }) / \
			sizeof(struct kvm_bpf_note_range)];		\
	} __attribute__((packed, aligned(4))) kvm_bpf_ranges		\
		__attribute__((section(".note.kvm-bpf.mmio-device")))	\
		__attribute__((used, nodebug)) = {			\
		.namesz = sizeof(KVM_BPF_NOTE_OWNER),			\
		.descsz = sizeof(kvm_bpf_ranges.desc),			\
		.type = KVM_BPF_NOTE_ITEMS,				\
		.name = KVM_BPF_NOTE_OWNER,				\
		.desc = { __VA_ARGS__ },				\
	}
/* clang-format on */

#define KVM_BPF_WORK_NAME_LEN 16

struct kvm_bpf_note_work {
	__u16 kind;
	/* Bytes behind it. */
	__u16 len;
	__u32 index;
	__u32 flags;
	char name[KVM_BPF_WORK_NAME_LEN];
} __attribute__((packed, aligned(4)));

struct kvm_bpf_note_read_page {
	__u16 kind;
	/* Bytes behind it. */
	__u16 len;
	__u32 region;
	__u32 flags;
	__u64 offset;
	char map[16];
} __attribute__((packed, aligned(4)));

struct kvm_bpf_note_window {
	__u16 kind;
	/* Bytes behind it. */
	__u16 len;
	__u32 rights;
} __attribute__((packed, aligned(4)));

struct kvm_bpf_note_doorbell {
	__u16 kind;
	/* Bytes behind it. */
	__u16 len;
	__u32 irq;
	__u32 work;
} __attribute__((packed, aligned(4)));

struct kvm_bpf_note_state_version {
	__u16 kind;
	/* Bytes behind it. */
	__u16 len;
	__u32 version;
	__u32 oldest;
} __attribute__((packed, aligned(4)));

struct kvm_bpf_note_param {
	__u16 kind;
	/* Bytes behind it. */
	__u16 len;
	char map[16];
	__u32 flags;
} __attribute__((packed, aligned(4)));

#define KVM_BPF_PASTE_(a, b) a##b
#define KVM_BPF_PASTE(a, b) KVM_BPF_PASTE_(a, b)

/* clang-format off */
/* A note with one item: "struct type", its kind, its fields. */
#define KVM_BPF_ITEM(_var, _type, _kind, ...)				\
	static const struct {						\
		__u32 namesz;						\
		__u32 descsz;						\
		__u32 type;						\
		char name[sizeof(KVM_BPF_NOTE_OWNER)];			\
		struct _type desc;					\
	} __attribute__((packed, aligned(4))) _var			\
		__attribute__((section(".note.kvm-bpf.mmio-device")))	\
		__attribute__((used, nodebug)) = {			\
		.namesz = sizeof(KVM_BPF_NOTE_OWNER),			\
		.descsz = sizeof(struct _type),				\
		.type = KVM_BPF_NOTE_ITEMS,				\
		.name = KVM_BPF_NOTE_OWNER,				\
		.desc = {						\
			.kind = (_kind),				\
			.len = sizeof(struct _type) - 4,		\
			__VA_ARGS__					\
		},							\
	}

/*
 * KVM_BPF_READ_PAGE - bytes of a region that the guest may read from a map
 * @_region:	index of the region, which is one of memory
 * @_offset:	where in the region they begin, a multiple of 4096
 * @_map:	name of the map as a literal, at most 15 characters: an array with
 *		BPF_F_MMAPABLE and of whole pages, which fits into the region from there
 *		on; or a section of global data, ".data.page"
 *
 * Where the VMM can, it lets the guest read the map itself, so that a load costs
 * nothing and runs no program; a store runs the write program.  Elsewhere, and for a
 * moment when programs are replaced, loads run the read program, which has to give
 * the same values.  So no load may have a side effect, nor a value that nothing
 * stores, and the map holds nothing that the guest must not read.
 *
 * May be there several times.
 */
#define KVM_BPF_READ_PAGE(_region, _offset, _map)			\
	_Static_assert((_region) >= 0 && (_region) < 256, "region");	\
	_Static_assert((_offset) >= 0 && !((_offset) & 0xfff), "offset of a page"); \
	_Static_assert(sizeof(_map) > 1 && sizeof(_map) <= 16, "name of a map"); \
	KVM_BPF_ITEM(KVM_BPF_PASTE(kvm_bpf_read_page_, __LINE__),	\
		     kvm_bpf_note_read_page, KVM_BPF_NOTE_READ_PAGE,	\
		     .region = (_region), .offset = (_offset), .map = _map)

/*
 * KVM_IO_WORK - a program that runs without a guest's access
 * @index:	0 to 15, each once
 * @name:	1 to 15 of a to z, 0 to 9 and _, each once
 *
 * Before a function, as KVM_IO_READ is; of ctx it may use buf, as a write program
 * may, and region, which is @index:
 *
 *	KVM_IO_WORK(0, reset)
 *	int device_reset(struct bpf_kvm_io_ctx *ctx)
 *	{
 *		registers = 0;
 *		return 0;
 *	}
 *
 * It returns 0, or 1 if there is more to do: then it runs again.  The VMM runs it by
 * its name, with a number that it finds in ctx->buf, and may have an eventfd run it,
 * with the count of its signals there.  These names have a meaning:
 *
 *	reset		The device is as at first again: the guest restarts.
 *	save		State goes into the maps that the VMM saves, from all that
 *			the VMM cannot: what is left of timers, say, which are
 *			cancelled.  No vCPU runs.  Nothing changes afterwards.
 *	restore		These maps have come from elsewhere, or the device goes on
 *			here after "save": start timers, take interrupts.  No vCPU
 *			runs.
 *	replaced	The programs are new, and what maps they share with those
 *			before them has what these have left.  vCPUs may run.
 *	resample	The guest has acknowledged interrupt 0, whose line the VMM has
 *			made one of a level for the sake of this program: signal it
 *			again if it is still wanted.  vCPUs may run.
 *	input		Line (__u32)data of the device's inputs is at level data >> 32,
 *			1 or 0, with data = *(__u64 *)ctx->buf.  vCPUs may run.
 *
 * Others are between the device and its VMM.
 */
#define KVM_IO_WORK_ITEM(_index, _name)					\
	_Static_assert((_index) >= 0 && (_index) < 16, "index of a WORK program"); \
	_Static_assert(sizeof(#_name) > 1 &&				\
		       sizeof(#_name) <= KVM_BPF_WORK_NAME_LEN,		\
		       "name of a WORK program");			\
	KVM_BPF_ITEM(kvm_bpf_work_##_name, kvm_bpf_note_work,		\
		     KVM_BPF_NOTE_WORK_NAME,				\
		     .index = (_index), .name = #_name)
#define KVM_IO_WORK(index, name)					\
	KVM_IO_WORK_ITEM(index, name);					\
	SEC("kvm_io_work/" #name)
#define KVM_IO_WORK_SLEEPABLE(index, name)				\
	KVM_IO_WORK_ITEM(index, name);					\
	SEC("kvm_io_work.s/" #name)

/*
 * KVM_BPF_STATE_VERSION - which states the device can load
 * @version:	of the state that it saves itself
 * @oldest:	that it can load, at most @version
 *
 * A device without has version 0.  The VMM loads a state with other fields than
 * the device has only if this is there: fields go by their names, new ones have what
 * a new device has, and one that is gone must have been 0.  Write it once per file.
 */
#define KVM_BPF_STATE_VERSION(_version, _oldest)			\
	_Static_assert((_oldest) >= 0 && (_oldest) <= (_version),	\
		       "versions of the state");			\
	KVM_BPF_ITEM(kvm_bpf_state_version, kvm_bpf_note_state_version,	\
		     KVM_BPF_NOTE_STATE_VERSION,			\
		     .version = (_version), .oldest = (_oldest))

/*
 * KVM_BPF_WINDOW - the device accesses guest memory
 * @_rights:	KVM_BPF_MEMORY_READ, KVM_BPF_MEMORY_WRITE, or both
 *
 * The VMM lets it access what memory it chooses with these rights: all, where it does
 * not know better.  Write it once per file.
 */
#define KVM_BPF_MEMORY_READ 1
#define KVM_BPF_MEMORY_WRITE 2
#define KVM_BPF_WINDOW(_rights)						\
	_Static_assert((_rights) >= 1 && (_rights) <= 3, "rights of a window"); \
	KVM_BPF_ITEM(kvm_bpf_window, kvm_bpf_note_window,		\
		     KVM_BPF_NOTE_WINDOW | KVM_BPF_NOTE_REQUIRED,	\
		     .rights = (_rights))

/*
 * KVM_BPF_DOORBELL - an index of interrupts that is none: it runs a WORK program
 * @_irq:	what bpf_kvm_irq_signal() takes, not below the number of interrupts
 * @_work:	index of the WORK program
 *
 * The library makes the eventfd.  A program that has more to do than it may do on
 * the vCPU's thread signals it.  Write it once per file.
 */
#define KVM_BPF_DOORBELL(_irq, _work)					\
	_Static_assert((_irq) >= 0 && (_irq) < 256, "index of a doorbell"); \
	_Static_assert((_work) >= 0 && (_work) < 16, "index of a WORK program"); \
	KVM_BPF_ITEM(kvm_bpf_doorbell, kvm_bpf_note_doorbell,		\
		     KVM_BPF_NOTE_DOORBELL | KVM_BPF_NOTE_REQUIRED,	\
		     .irq = (_irq), .work = (_work))

/*
 * KVM_BPF_PARAM - values that programs cannot find out, and that the VMM may give
 * KVM_BPF_REQUIRED_PARAM - the same, and without them the device cannot work
 * @_map:	name of the map as a literal, at most 15 characters: an array of values
 *		of 1, 2, 4 or 8 bytes, at most 65536
 *
 * The name says to the VMM what the values are; what they mean, and in which unit, is
 * between the device and its VMM.  The VMM fills the map before the guest sees the
 * device, with zeroes behind what it has, and again where the programs are replaced.
 * Values that hold on one host only belong into a map without BPF_F_MMAPABLE, as
 * the VMM does not save that.
 *
 * May be there several times, for one map each.
 */
#define KVM_BPF_PARAM_ITEM(_map, _required)				\
	_Static_assert(sizeof(_map) > 1 && sizeof(_map) <= 16, "name of a map"); \
	KVM_BPF_ITEM(KVM_BPF_PASTE(kvm_bpf_param_, __LINE__),		\
		     kvm_bpf_note_param, KVM_BPF_NOTE_PARAM | (_required), \
		     .map = _map)
#define KVM_BPF_PARAM(_map) KVM_BPF_PARAM_ITEM(_map, 0)
#define KVM_BPF_REQUIRED_PARAM(_map)					\
	KVM_BPF_PARAM_ITEM(_map, KVM_BPF_NOTE_REQUIRED)
/* clang-format on */

/* libbpf has it from 1.2. */
#ifndef bpf_ksym_exists
#define bpf_ksym_exists(sym) (!!(sym))
#endif

/*
 * Kernel functions.  Each is weak, so a device that calls one still loads on a
 * kernel without it: ask bpf_ksym_exists() first.  For a bad argument they return
 * a negative errno.
 */

/*
 * What the kernel has instead of a program's context, which the kernel functions
 * take.  Opaque, but not just declared: libbpf compares types by their BTF.
 */
#ifndef __VMLINUX_H__
struct bpf_kvm_io_ctx_kern {
} __attribute__((preserve_access_index));
#endif
extern void *bpf_cast_to_kern_ctx(void *ctx) __ksym __weak;

static __always_inline struct bpf_kvm_io_ctx_kern *
kvm_bpf_kern_ctx(struct bpf_kvm_io_ctx *ctx)
{
	return bpf_cast_to_kern_ctx(ctx);
}

/* Signal interrupt @irq of the device that @ctx, the program's context, belongs to. */
extern int bpf_kvm_irq_signal(struct bpf_kvm_io_ctx_kern *ctx,
			      __u32 irq) __ksym __weak;
#define bpf_kvm_irq_signal(ctx, irq) \
	bpf_kvm_irq_signal(kvm_bpf_kern_ctx(ctx), irq)

/*
 * An interrupt of a device, for what runs without a context: the callbacks of
 * timers and work queues.  Keep it in a map:
 *
 *	struct bpf_kvm_irq __kptr *irq;
 *
 * bpf_kptr_xchg() stores and takes it; the kernel frees what the map still
 * holds in the end.  Non-sleepable programs and timer callbacks may also load
 * it, and use it if it is not NULL.  Opaque, but not just declared: the type of
 * a kptr has to be in BTF.
 */
#ifndef __VMLINUX_H__
struct bpf_kvm_irq {
} __attribute__((preserve_access_index));
#endif

/*
 * A reference to interrupt @irq of the device that @ctx belongs to, NULL if
 * there is no such index.  Release it, or leave it to a map.
 */
extern struct bpf_kvm_irq *bpf_kvm_irq_acquire(struct bpf_kvm_io_ctx_kern *ctx,
					       __u32 irq) __ksym __weak;
#define bpf_kvm_irq_acquire(ctx, irq) \
	bpf_kvm_irq_acquire(kvm_bpf_kern_ctx(ctx), irq)
extern void bpf_kvm_irq_release(struct bpf_kvm_irq *irq) __ksym __weak;

/* Signal it; -ENOENT if it has no eventfd, or the device is gone. */
extern int bpf_kvm_irq_signal_kept(struct bpf_kvm_irq *irq) __ksym __weak;

/*
 * Copy @len bytes from or to guest memory at the guest-physical address @gpa; 0, or a
 * negative errno, and then @buf has zeroes:
 *
 *	-EACCES		not inside one window of the device that allows it
 *	-EFAULT		no memory, or it cannot be accessed
 *	-E2BIG		more than 1 MiB, or a page for those of the second pair
 *	-EOPNOTSUPP	a write, and the VM has dirty rings without bitmaps
 *
 * An aligned access of 1, 2, 4 or 8 bytes is a single one.  A read is an acquire, a
 * write a release: what is before or after it in the program is so for the guest too.
 * What is written comes from memory that could be written, so not from constants.
 *
 * The first two are for sleepable programs, the others for any; those fail where
 * memory is not there, as it has never been touched or is swapped out.
 */
extern int bpf_kvm_mem_read(struct bpf_kvm_io_ctx_kern *ctx, __u64 gpa,
			    void *buf, __u32 len) __ksym __weak;
extern int bpf_kvm_mem_write(struct bpf_kvm_io_ctx_kern *ctx, __u64 gpa,
			     void *buf, __u32 len) __ksym __weak;
extern int bpf_kvm_mem_read_nofault(struct bpf_kvm_io_ctx_kern *ctx, __u64 gpa,
				    void *buf, __u32 len) __ksym __weak;
extern int bpf_kvm_mem_write_nofault(struct bpf_kvm_io_ctx_kern *ctx, __u64 gpa,
				     void *buf, __u32 len) __ksym __weak;
#define bpf_kvm_mem_read(ctx, gpa, buf, len) \
	bpf_kvm_mem_read(kvm_bpf_kern_ctx(ctx), gpa, buf, len)
#define bpf_kvm_mem_write(ctx, gpa, buf, len) \
	bpf_kvm_mem_write(kvm_bpf_kern_ctx(ctx), gpa, buf, len)
#define bpf_kvm_mem_read_nofault(ctx, gpa, buf, len) \
	bpf_kvm_mem_read_nofault(kvm_bpf_kern_ctx(ctx), gpa, buf, len)
#define bpf_kvm_mem_write_nofault(ctx, gpa, buf, len) \
	bpf_kvm_mem_write_nofault(kvm_bpf_kern_ctx(ctx), gpa, buf, len)

/* Random bytes for a guest, at most a page. */
extern int bpf_kvm_random(void *buf, __u32 len) __ksym __weak;

/* Current and highest frequency of a host CPU, in kHz. */
extern __s64 bpf_get_cpu_freq(__u32 cpu) __ksym __weak;
extern __s64 bpf_get_cpu_max_hw_freq(__u32 cpu) __ksym __weak;

/* Capacity of a host CPU relative to the largest one, 0 to 1024. */
extern __s64 bpf_get_cpu_scale(__u32 cpu) __ksym __weak;

/*
 * Clamp the utilization that the scheduler assumes for the calling vCPU's
 * thread, 0 to 1024.  For sleepable programs.
 */
extern int bpf_set_current_uclamp(__u32 min, __u32 max) __ksym __weak;

#endif /* KVM_BPF_H */
