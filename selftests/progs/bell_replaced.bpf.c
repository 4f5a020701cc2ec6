// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The next version of the device, with a program that runs when it takes over. */
#define REPLACED 1
#include "bell.bpf.c"
