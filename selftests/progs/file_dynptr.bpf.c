// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Reads from the first file that the calling process has mapped and that can be read, which is the
 * program that it runs.
 * No device's: it shows that offsets into files are as without the series.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#define OFFSET 4097

/* As types that are only declared, libbpf does not take them for the kernel's. */
struct task_struct {
};

struct file {
};

struct vm_area_struct {
	struct file *vm_file;
} __attribute__((preserve_access_index));

struct bpf_iter_task_vma {
	__u64 opaque[1];
} __attribute__((aligned(8)));

extern int bpf_iter_task_vma_new(struct bpf_iter_task_vma *it,
				 struct task_struct *task, __u64 addr) __ksym;
extern struct vm_area_struct *
bpf_iter_task_vma_next(struct bpf_iter_task_vma *it) __ksym;
extern void bpf_iter_task_vma_destroy(struct bpf_iter_task_vma *it) __ksym;
extern int bpf_dynptr_from_file(struct file *file, __u32 flags,
				struct bpf_dynptr *ptr) __ksym;
extern int bpf_dynptr_file_discard(struct bpf_dynptr *ptr) __ksym;
extern int bpf_dynptr_adjust(const struct bpf_dynptr *ptr, __u64 start,
			     __u64 end) __ksym;

/* What the test looks at. */
struct {
	/* At OFFSET, and the first one of the part from there on. */
	__u8 bytes[8];
	__u8 first[8];
	/* Results of reading, of taking that part, of reading it, and of reading past its end. */
	int results[4];
} found;

static int read_file(struct file *file)
{
	struct bpf_dynptr ptr;
	int error;

	error = bpf_dynptr_from_file(file, 0, &ptr);
	found.results[0] =
		error ?: bpf_dynptr_read(found.bytes, 8, &ptr, OFFSET, 0);
	if (!error) {
		found.results[1] = bpf_dynptr_adjust(&ptr, OFFSET, OFFSET + 1);
		found.results[2] = bpf_dynptr_read(found.first, 1, &ptr, 0, 0);
		found.results[3] =
			bpf_dynptr_read(found.first + 1, 2, &ptr, 0, 0);
	}
	bpf_dynptr_file_discard(&ptr);
	return found.results[0];
}

SEC("syscall")
int read_first_file(void *ctx)
{
	struct bpf_iter_task_vma it;
	struct vm_area_struct *vma;

	bpf_iter_task_vma_new(&it, bpf_get_current_task_btf(), 0);
	while ((vma = bpf_iter_task_vma_next(&it))) {
		struct file *file = vma->vm_file;

		if (file && !read_file(file))
			break;
	}
	bpf_iter_task_vma_destroy(&it);
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
