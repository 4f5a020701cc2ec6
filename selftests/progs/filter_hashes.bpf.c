// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Values are looked for in other places. */
#define HASHES 5
#include "filter.bpf.c"
