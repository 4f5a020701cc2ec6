// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* A field has become a signed one. */
#define FIELDS       \
	__u32 first; \
	__s32 second
#include "carry.bpf.c"
