// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The fields have changed places: the size is the same. */
#define FIELDS __u32 second, first
#include "carry.bpf.c"
