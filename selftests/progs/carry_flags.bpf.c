// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* User space may map it. */
#define FLAGS BPF_F_MMAPABLE
#include "carry.bpf.c"
