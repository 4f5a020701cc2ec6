// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Another layout, which does not say what it loads. */
#define COUNT __u64 count
#include "state.bpf.c"
