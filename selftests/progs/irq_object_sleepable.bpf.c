// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * irq_object in a program that may sleep: the verifier must refuse to signal an
 * interrupt that only RCU would protect.
 */
#include "kvm_bpf.h"
#undef KVM_IO_WRITE
#define KVM_IO_WRITE KVM_IO_WRITE_SLEEPABLE
#include "irq_object.bpf.c"
