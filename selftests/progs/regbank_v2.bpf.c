// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The next version of the register bank, to replace a running one with. */
#define VERSION 2ULL
#include "../../samples/devices/regbank.bpf.c"
