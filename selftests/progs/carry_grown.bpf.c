// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* One field more. */
#define FIELDS __u32 first, second, third
#include "carry.bpf.c"
