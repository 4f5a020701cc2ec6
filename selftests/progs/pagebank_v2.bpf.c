// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The next version of the bank that the guest reads from a map, whose page is another one. */
#define VERSION 2
#define unused reserved
#include "../../samples/devices/pagebank.bpf.c"
