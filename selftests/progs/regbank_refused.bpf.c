// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The register bank, but the verifier refuses it: it stores to the offset. */
#define VERSION (ctx->offset = 0, 2ULL)
#include "../../samples/devices/regbank.bpf.c"
