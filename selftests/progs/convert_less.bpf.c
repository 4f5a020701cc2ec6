// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* One field less, which must be 0 for that. */
#define VERSION 2
#define FIELDS __u64 writes, restored, replaced
#define WITHOUT_SAVED
#include "convert.bpf.c"
