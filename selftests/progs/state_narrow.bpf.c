// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* A layout with less room, which goes on with what fits. */
#define STATE_VERSION 3
#define STATE_OLDEST 0
#define COUNT __u8 count
#define NUMBERS 1
#include "state.bpf.c"
