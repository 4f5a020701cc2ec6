// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* A parameter without a map. */
#include "params.bpf.c"

KVM_BPF_PARAM("absent");
