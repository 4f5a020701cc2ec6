// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Its "restore" changes the state, and always has more to do. */
#include "state.bpf.c"

KVM_IO_WORK(0, restore)
int state_restore(struct bpf_kvm_io_ctx *ctx)
{
	__u32 zero = 0;
	struct changing *fields = bpf_map_lookup_elem(&changing, &zero);
	__u64 *unsaved = bpf_map_lookup_elem(&scratch, &zero);

	if (!fields || !unsaved)
		return 1;
	*unsaved = fields->count;
	preset++;
	return 1;
}
