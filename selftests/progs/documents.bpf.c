// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * What the documents that the series adds to the kernel show as C: bpf/prog_kvm_io.rst
 * and virt/kvm/devices/bpf.rst.  scripts/commands compares the lines; here they are
 * compiled, and structures must be those of the headers, byte by byte.
 */
#include "kvm_bpf.h"

#include <linux/kvm.h>

KVM_BPF_MMIO_DEVICE(0x1000, 1, "kvm-bpf,documents");

/* A structure of a document has the name DOCUMENTED_(name) here. */
#define SAME_SIZE(name)                                          \
	_Static_assert(sizeof(struct name) ==                    \
			       sizeof(struct documented_##name), \
		       #name)
#define SAME(name, field)                                                    \
	_Static_assert(                                                      \
		__builtin_offsetof(struct name, field) ==                    \
				__builtin_offsetof(struct documented_##name, \
						   field) &&                 \
			__builtin_types_compatible_p(                        \
				typeof(((struct name *)0)->field),           \
				typeof(((struct documented_##name *)0)       \
					       ->field)),                    \
		#name "." #field)

/* clang-format off */

/* virt/kvm/devices/bpf.rst */

#define kvm_bpf_user_region documented_kvm_bpf_user_region
	struct kvm_bpf_user_region {
		__u64	addr;
		__u64	size;
		__s32	bpf_readfd;
		__s32	bpf_writefd;
	};
#undef kvm_bpf_user_region
SAME_SIZE(kvm_bpf_user_region);
SAME(kvm_bpf_user_region, addr);
SAME(kvm_bpf_user_region, size);
SAME(kvm_bpf_user_region, bpf_readfd);
SAME(kvm_bpf_user_region, bpf_writefd);

#define kvm_bpf_user_irq documented_kvm_bpf_user_irq
	struct kvm_bpf_user_irq {
		__s32	eventfd;
		__u32	flags;
	};
#undef kvm_bpf_user_irq
SAME_SIZE(kvm_bpf_user_irq);
SAME(kvm_bpf_user_irq, eventfd);
SAME(kvm_bpf_user_irq, flags);

#define kvm_bpf_user_mem documented_kvm_bpf_user_mem
	struct kvm_bpf_user_mem {
		__u64	addr;
		__u64	size;
		__u32	flags;
		__u32	pad;
	};
#undef kvm_bpf_user_mem
SAME_SIZE(kvm_bpf_user_mem);
SAME(kvm_bpf_user_mem, addr);
SAME(kvm_bpf_user_mem, size);
SAME(kvm_bpf_user_mem, flags);
SAME(kvm_bpf_user_mem, pad);

#define kvm_bpf_user_work documented_kvm_bpf_user_work
	struct kvm_bpf_user_work {
		__s32	bpf_fd;
		__s32	eventfd;
		__u32	flags;
		__u32	pad;
	};
#undef kvm_bpf_user_work
SAME_SIZE(kvm_bpf_user_work);
SAME(kvm_bpf_user_work, bpf_fd);
SAME(kvm_bpf_user_work, eventfd);
SAME(kvm_bpf_user_work, flags);
SAME(kvm_bpf_user_work, pad);

#define kvm_bpf_user_run documented_kvm_bpf_user_run
	struct kvm_bpf_user_run {
		__u64	arg;
	};
#undef kvm_bpf_user_run
SAME_SIZE(kvm_bpf_user_run);
SAME(kvm_bpf_user_run, arg);

#define kvm_bpf_user_perms documented_kvm_bpf_user_perms
	struct kvm_bpf_user_perms {
		__u64	allow;
		__u64	require;
	};
#undef kvm_bpf_user_perms
SAME_SIZE(kvm_bpf_user_perms);
SAME(kvm_bpf_user_perms, allow);
SAME(kvm_bpf_user_perms, require);

#define kvm_bpf_info documented_kvm_bpf_info
	struct kvm_bpf_info {
		__u64	addr;
		__u64	size;
		__u32	kind;
		__u32	read_id;
		__u32	write_id;
		__u32	flags;
		__u8	read_tag[8];
		__u8	write_tag[8];
	};
#undef kvm_bpf_info
SAME_SIZE(kvm_bpf_info);
SAME(kvm_bpf_info, addr);
SAME(kvm_bpf_info, size);
SAME(kvm_bpf_info, kind);
SAME(kvm_bpf_info, read_id);
SAME(kvm_bpf_info, write_id);
SAME(kvm_bpf_info, flags);
SAME(kvm_bpf_info, read_tag);
SAME(kvm_bpf_info, write_tag);

/* bpf/prog_kvm_io.rst */

#define bpf_kvm_io_ctx documented_bpf_kvm_io_ctx
    struct bpf_kvm_io_ctx {
            __u8    buf[8];
            __u64   offset;
            __u8    len;
            __u32   :24;
            __u32   vcpu_id;
            __u32   region;
            __u32   :32;
    };
#undef bpf_kvm_io_ctx
SAME_SIZE(bpf_kvm_io_ctx);
SAME(bpf_kvm_io_ctx, buf);
SAME(bpf_kvm_io_ctx, offset);
SAME(bpf_kvm_io_ctx, len);
SAME(bpf_kvm_io_ctx, vcpu_id);
SAME(bpf_kvm_io_ctx, region);

/* kvm_bpf.h declares them too, so another type is an error. */
typedef __u64 u64;
typedef __u32 u32;
#pragma push_macro("bpf_kvm_mem_read")
#pragma push_macro("bpf_kvm_mem_write")
#pragma push_macro("bpf_kvm_mem_read_nofault")
#pragma push_macro("bpf_kvm_mem_write_nofault")
#undef bpf_kvm_mem_read
#undef bpf_kvm_mem_write
#undef bpf_kvm_mem_read_nofault
#undef bpf_kvm_mem_write_nofault
#define ctx struct bpf_kvm_io_ctx_kern *
    int bpf_kvm_mem_read(ctx, u64 gpa, void *buf, u32 len);
    int bpf_kvm_mem_write(ctx, u64 gpa, void *buf, u32 len);
    int bpf_kvm_mem_read_nofault(ctx, u64 gpa, void *buf, u32 len);
    int bpf_kvm_mem_write_nofault(ctx, u64 gpa, void *buf, u32 len);
#undef ctx
#pragma pop_macro("bpf_kvm_mem_read")
#pragma pop_macro("bpf_kvm_mem_write")
#pragma pop_macro("bpf_kvm_mem_read_nofault")
#pragma pop_macro("bpf_kvm_mem_write_nofault")

    struct alarm {
            struct bpf_timer timer;
            struct bpf_kvm_irq __kptr *irq;
    };

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct alarm);
} alarms SEC(".maps");

/* The document takes the kernel's context itself. */
#pragma push_macro("bpf_kvm_irq_acquire")
#undef bpf_kvm_irq_acquire
KVM_IO_WRITE
int documents_write(struct bpf_kvm_io_ctx *ctx)
{
	__u32 zero = 0;
	struct alarm *alarm = bpf_map_lookup_elem(&alarms, &zero);
	struct bpf_kvm_irq *irq;

	if (!alarm)
		return 0;
    /* in a program */
    irq = bpf_kvm_irq_acquire(bpf_cast_to_kern_ctx(ctx), 0);
    irq = irq ? bpf_kptr_xchg(&alarm->irq, irq) : NULL;
    if (irq)
            bpf_kvm_irq_release(irq);
	return 0;
}
#pragma pop_macro("bpf_kvm_irq_acquire")

static int on_timer(void *map, __u32 *key, struct alarm *alarm)
{
	struct bpf_kvm_irq *irq;

    /* in the callback */
    irq = alarm->irq;
    if (irq)
            bpf_kvm_irq_signal_kept(irq);
	return 0;
}

    SEC("kvm_io_read")
    int read(struct bpf_kvm_io_ctx *ctx)
    {
            if (ctx->offset != 0 || ctx->len != 4)
                    return 1;       /* to user space */

            *(__u32 *)ctx->buf = ctx->vcpu_id;
            return 0;
    }
/* clang-format on */

KVM_IO_WORK(0, restore)
int documents_restore(struct bpf_kvm_io_ctx *ctx)
{
	__u32 zero = 0;
	struct alarm *alarm = bpf_map_lookup_elem(&alarms, &zero);

	if (!alarm)
		return 0;
	bpf_timer_init(&alarm->timer, &alarms, 1);
	bpf_timer_set_callback(&alarm->timer, on_timer);
	bpf_timer_start(&alarm->timer, 0, 0);
	return 0;
}

KVM_IO_WORK(1, save)
int documents_save(struct bpf_kvm_io_ctx *ctx)
{
	__u32 zero = 0;
	struct alarm *alarm = bpf_map_lookup_elem(&alarms, &zero);

	if (alarm)
		bpf_timer_cancel(&alarm->timer);
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
