// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A guest of twenty instructions: it reads the clock's time again and again, and arms its alarm
//! when it is told to.

use std::arch::global_asm;
use std::io;
use std::mem::offset_of;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

/// Where the guest has the clock's registers.
pub const CLOCK: u64 = 0xd000_0000;
/// Its memory, from 0 on: a page that it shares with the VMM, and one of code.
const SIZE: usize = 0x2000;
const CODE: usize = 0x1000;

/// What guest and VMM tell each other, at the beginning of memory. Offsets are in the assembly.
#[repr(C)]
#[derive(Debug)]
pub struct Shared {
    /// The guest is to arm the alarm so many seconds ahead, and then makes this 0.
    pub alarm: AtomicU32,
    /// The guest is to leave the clock alone.
    pub quiet: AtomicU32,
    /// How often it has read the time.
    pub reads: AtomicU32,
    /// The time that it read last.
    pub time: AtomicU32,
    /// How often a time was before the last.
    pub backwards: AtomicU32,
    /// It goes up as long as the guest runs.
    pub rounds: AtomicU32,
}

const _: () = assert!(offset_of!(Shared, rounds) == 20);

// Registers of a PL031: 0 the time, 4 the alarm, 16 whether it interrupts, 28 ends the interrupt.
#[cfg(target_arch = "x86_64")]
global_asm!(
    r#"
    .pushsection .rodata.kvm_bpf_jailed, "a"
    .code32
    .global kvm_bpf_jailed_guest, kvm_bpf_jailed_guest_end
kvm_bpf_jailed_guest:
    mov ebx, 0xd0000000
    xor esi, esi
1:  inc dword ptr [esi + 20]
    mov ecx, [esi]
    test ecx, ecx
    jz 2f
    mov eax, 1
    mov [ebx + 28], eax
    mov [ebx + 16], eax
    mov eax, [ebx]
    add eax, ecx
    mov [ebx + 4], eax
    mov dword ptr [esi], 0
2:  cmp dword ptr [esi + 4], 0
    jne 1b
    mov eax, [ebx]
    cmp eax, [esi + 12]
    jae 3f
    inc dword ptr [esi + 16]
3:  mov [esi + 12], eax
    inc dword ptr [esi + 8]
    jmp 1b
kvm_bpf_jailed_guest_end:
    .code64
    .popsection
    "#
);

#[cfg(target_arch = "aarch64")]
global_asm!(
    r#"
    .macro increase at
        ldr w4, [x1, #\at]
        add w4, w4, #1
        str w4, [x1, #\at]
    .endm
    .pushsection .rodata.kvm_bpf_jailed, "a"
    .balign 4
    .global kvm_bpf_jailed_guest, kvm_bpf_jailed_guest_end
kvm_bpf_jailed_guest:
    mov x0, #0xd0000000
    mov x1, #0
1:  increase 20
    ldr w2, [x1]
    cbz w2, 2f
    mov w3, #1
    str w3, [x0, #28]
    str w3, [x0, #16]
    ldr w3, [x0]
    add w3, w3, w2
    str w3, [x0, #4]
    str wzr, [x1]
2:  ldr w2, [x1, #4]
    cbnz w2, 1b
    ldr w3, [x0]
    ldr w2, [x1, #12]
    cmp w3, w2
    b.hs 3f
    increase 16
3:  str w3, [x1, #12]
    increase 8
    b 1b
kvm_bpf_jailed_guest_end:
    .popsection
    "#
);

unsafe extern "C" {
    static kvm_bpf_jailed_guest: u8;
    static kvm_bpf_jailed_guest_end: u8;
}

/// The guest's memory.
#[derive(Debug)]
pub struct Memory(NonNull<u8>);

// SAFETY: all that this process accesses of it once it is made is atomic.
unsafe impl Send for Memory {}
// SAFETY: likewise.
unsafe impl Sync for Memory {}

impl Memory {
    /// Memory with the guest's code.
    pub fn new() -> io::Result<Self> {
        let (protection, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
        );
        // SAFETY: a new mapping takes nothing from anyone.
        let start = unsafe { libc::mmap(ptr::null_mut(), SIZE, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start: NonNull<u8> = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let first = &raw const kvm_bpf_jailed_guest;
        let len = &raw const kvm_bpf_jailed_guest_end as usize - first as usize;
        // SAFETY: the code is between the two symbols, and is shorter than its page.
        unsafe { ptr::copy_nonoverlapping(first, start.as_ptr().add(CODE), len) };
        Ok(Memory(start))
    }

    /// Its beginning.
    pub fn shared(&self) -> &Shared {
        // SAFETY: the first page is there as long as this, and any bytes are such a structure.
        unsafe { self.0.cast().as_ref() }
    }

    /// Gives it to a VM, which must be gone before this is.
    pub fn give(&self, vm: &VmFd) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: SIZE as u64,
            userspace_addr: self.0.as_ptr() as u64,
        };
        // SAFETY: the region is mapped memory of that size, as long as `self` is there.
        Ok(unsafe { vm.set_user_memory_region(region) }?)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no VM has it any more.
        unsafe { libc::munmap(self.0.as_ptr().cast(), SIZE) };
    }
}

/// Waits until the guest has made `is_done` true; false if a minute was not enough.
pub fn wait_until(is_done: impl Fn() -> bool) -> bool {
    for _ in 0..6000 {
        if is_done() {
            return true;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    false
}

impl Shared {
    /// Has the guest arm the alarm; false if it does not.
    pub fn arm(&self, seconds: u32) -> bool {
        self.alarm.store(seconds, SeqCst);
        wait_until(|| self.alarm.load(SeqCst) == 0)
    }

    /// Has the guest leave the clock alone, or not; false if it does not run.
    pub fn set_quiet(&self, quiet: bool) -> bool {
        self.quiet.store(quiet.into(), SeqCst);
        // The round that has begun may still read the clock.
        let first = self.rounds.load(SeqCst);
        wait_until(|| self.rounds.load(SeqCst).wrapping_sub(first) >= 2)
    }
}

/// Creates the only vCPU, at the guest's first instruction.
#[cfg(target_arch = "x86_64")]
pub fn vcpu(_kvm: &Kvm, vm: &VmFd) -> io::Result<VcpuFd> {
    const PROTECTED: u64 = 1;

    let vcpu = vm.create_vcpu(0)?;
    let mut sregs = vcpu.get_sregs()?;
    // 32 bits without paging: every segment is all of memory.
    let segment = |segment: &mut kvm_bindings::kvm_segment, type_| {
        *segment = kvm_bindings::kvm_segment {
            base: 0,
            limit: u32::MAX,
            selector: 8,
            type_,
            present: 1,
            db: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
    };
    segment(&mut sregs.cs, 11);
    for data in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        segment(data, 3);
    }
    sregs.cr0 |= PROTECTED;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_bindings::kvm_regs {
        rip: CODE as u64,
        rflags: 2,
        ..Default::default()
    })?;
    Ok(vcpu)
}

/// Creates the only vCPU, at the guest's first instruction.
#[cfg(target_arch = "aarch64")]
pub fn vcpu(_kvm: &Kvm, vm: &VmFd) -> io::Result<VcpuFd> {
    /// `KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE`, and the program counter.
    const PC: u64 = 0x6030_0000_0010_0000 | 64;

    let vcpu = vm.create_vcpu(0)?;
    let mut init = kvm_bindings::kvm_vcpu_init::default();
    vm.get_preferred_target(&mut init)?;
    vcpu.vcpu_init(&init)?;
    vcpu.set_one_reg(PC, &(CODE as u64).to_le_bytes())?;
    Ok(vcpu)
}
