// SPDX-License-Identifier: Apache-2.0 OR MIT
/*
 * A TDX guest's MMIO read that a device in the kernel handles, without TDX: the
 * kernel's own tdx_mmio_read(), which scripts/test extracts and compiles with
 * uninitialized variables full of a pattern.  A read of n bytes returns n bytes.
 */
#include <stdio.h>
#include <string.h>

#define KVM_MMIO_BUS 0
#define EOPNOTSUPP 95
#define trace_kvm_mmio(...) ((void)0)

typedef unsigned long long gpa_t;
struct kvm_vcpu;

static const unsigned long DATA = 0x8877665544332211;
static unsigned long returned;

static int kvm_io_bus_read(struct kvm_vcpu *vcpu, int bus, gpa_t gpa, int len,
			   void *val)
{
	memcpy(val, &DATA, len);
	return 0;
}

static void tdvmcall_set_return_val(struct kvm_vcpu *vcpu, unsigned long val)
{
	returned = val;
}

#include EXTRACTED

int main(void)
{
	int failed = 0;

	for (int size = 1; size <= 8; size *= 2) {
		unsigned long wanted = DATA << (64 - 8 * size) >> (64 - 8 * size);

		if (tdx_mmio_read(NULL, 0, size) || returned != wanted) {
			printf("%d bytes: wanted %#lx, got %#lx\n", size, wanted, returned);
			failed = 1;
		}
	}
	printf("test tdx::a_read_returns_its_own_bytes ... %s\n", failed ? "FAILED" : "ok");
	printf("test result: %s. %d passed; %d failed; 0 ignored\n", failed ? "FAILED" : "ok",
	       !failed, failed);
	return failed;
}
