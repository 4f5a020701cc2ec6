// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The serial port with another ring buffer, to replace a running one with. */
#define RING_BYTES (512 * 1024)
#include "../../samples/devices/uart16550.bpf.c"
