// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* As mem, with room for one byte more than a call copies at most. */
#define DATA_SIZE 0x100001
#include "mem.bpf.c"
