// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Part of a device whose other part is elsewhere: no programs, and no note. */
#include "kvm_bpf.h"

__u64 part_of_a_device(__u64 value)
{
	return value + 1;
}

char _license[] SEC("license") = "Dual BSD/GPL";
