// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Another layout, which goes on with what the first one saved. */
#define STATE_VERSION 2
#define STATE_OLDEST 0
#define COUNT __u64 count
#define ADDED __u8 added;
#define REMOVED
#define NUMBERS 4
#define WITH_LATER
#include "state.bpf.c"
