// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The next version of the device, whose WORK program has another index. */
#define INDEX 3
#include "bell.bpf.c"
