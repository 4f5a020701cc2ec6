// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * A device after all types of the kernel it is for: scripts/userspace has them
 * written to a vmlinux.h, where it can.  It begins as in
 * Documentation/writing-a-device.md, word for word: scripts/commands compares them.
 */

/* clang-format off */
struct __attribute__((preserve_static_offset)) bpf_kvm_io_ctx;  /* "Reading and writing registers" says why */
#include "vmlinux.h"
#include "kvm_bpf.h"
/* clang-format on */

#include "after_vmlinux.h"
