// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* No program for writes. */
#define WITHOUT_WRITE
#include "carry.bpf.c"
