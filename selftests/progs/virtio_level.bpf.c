// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Its interrupt is a level. */
#define LEVEL
#include "virtio_irqs.bpf.c"
