// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The next version: its fields are the same, by other names of their types. */
#define VERSION 2
#define FIELDS      \
	word first; \
	volatile word second

typedef unsigned int word;

#include "carry.bpf.c"
