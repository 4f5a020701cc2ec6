// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Wider counts, which go on with what the first version has. */
#define STATE_VERSION 1
#define WORD __u64
#include "work_timer.bpf.c"
