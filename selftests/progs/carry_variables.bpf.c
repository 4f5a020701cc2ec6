// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The variable that is 0 at first has another name. */
#define zeroed renamed
#include "carry.bpf.c"
