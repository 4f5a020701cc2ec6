// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * A device after all types of the kernel it is for: scripts/userspace has them
 * written to a vmlinux.h, where it can.
 */
#include <vmlinux.h>
#include "after_vmlinux.h"
