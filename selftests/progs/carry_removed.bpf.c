// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* A map less. */
#define WITHOUT_OTHER
#include "carry.bpf.c"
