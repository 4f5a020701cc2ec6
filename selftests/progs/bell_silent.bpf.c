// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The device without its doorbell. */
#define WITHOUT_DOORBELL
#include "bell.bpf.c"
