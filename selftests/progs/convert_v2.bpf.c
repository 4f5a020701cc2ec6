// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Fields of other sizes, in another order, and one more. */
#define VERSION 2
#define FIELDS                                   \
	__u64 replaced, restored, added, writes; \
	__u32 saved
#include "convert.bpf.c"
