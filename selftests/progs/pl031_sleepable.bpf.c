// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The clock, of programs that may sleep. */
#include "kvm_bpf.h"
#undef KVM_IO_READ
#undef KVM_IO_WRITE
#define KVM_IO_READ KVM_IO_READ_SLEEPABLE
#define KVM_IO_WRITE KVM_IO_WRITE_SLEEPABLE
#include "../../samples/devices/pl031.bpf.c"
