// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The bare guest on x86-64: long mode, ring 0, the low 4 GiB mapped one to one.

use std::arch::global_asm;
use std::os::fd::AsRawFd;
use std::slice;

use kvm_bindings::{
    KVM_EXIT_IO_IN, KVM_IRQ_ROUTING_MSI, KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_RUNNABLE,
    KvmIrqRouting, kvm_irq_routing_entry, kvm_mp_state, kvm_regs, kvm_run, kvm_segment,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use super::{Args, CODE, Ram, Results, Routine};
use crate::harness::Errno;

// rax = value, rbx = address, rcx = count, r8 and r9 = expected or acknowledge.
global_asm!(
    r#"
    .pushsection .rodata.kvm_bpf_guest, "a"
    .macro routine number
        .org kvm_bpf_guest + 64 * \number, 0xcc
    .endm
    .macro done
        out 0xf0, al
    .endm
    .balign 64
    .global kvm_bpf_guest
kvm_bpf_guest:
    routine 0
        mov al, [rbx]
        done
    routine 1
        mov ax, [rbx]
        done
    routine 2
        mov eax, [rbx]
        done
    routine 3
        mov rax, [rbx]
        done
    routine 4
        mov [rbx], al
        done
    routine 5
        mov [rbx], ax
        done
    routine 6
        mov [rbx], eax
        done
    routine 7
        mov [rbx], rax
        done
    routine 8       // hammer: write, read, stop at an answer that is neither r8 nor r9
2:      mov [rbx], rax
        mov rdx, [rbx]
        cmp rdx, r8
        je 3f
        cmp rdx, r9
        jne 4f
3:      dec rcx
        jnz 2b
4:      mov rax, rdx
        done
    // The loops 9, 10, 14 and 15 are the same bytes for a processor without paging, in 32 bits.
    routine 9       // read loop
2:      mov eax, [rbx]
        dec ecx
        jnz 2b
        done
    routine 10      // write loop
2:      mov [rbx], eax
        dec ecx
        jnz 2b
        done
    routine 11      // write, then wait until rcx interrupts were taken
        xor r12d, r12d
        sti
        mov [rbx], rax
2:      pause
        cmp r12, rcx
        jb 2b
        cli
        mov rax, r12
        done
    routine 12      // interrupt handler: tell the device at r8, if any; end of interrupt
        // QEMU's VMRUN leaves the vector that it delivers as one still to deliver, and a
        // request to leave its loop then delivers it again, at the handler's first
        // instruction. No processor takes an interrupt with interrupts off.
        test dword ptr [rsp + 16], 1 << 9
        jz 3f
        inc r12
        test r8, r8
        jz 2f
        mov [r8], r9
2:      mov r13d, 0xfee000b0
        mov dword ptr [r13], 0
3:      iretq
    routine 13      // an exception whose stack is at rbx, which is read before
        mov eax, [rbx]
        lea rsp, [rbx + 0x800]
        ud2
    .macro port_routine number, insns:vararg
    routine \number
        mov edx, ebx
        mov rsi, r8
        mov rdi, r8
        \insns
        done
    .endm
    port_routine 14, in al, dx
    port_routine 15, in ax, dx
    port_routine 16, in eax, dx
    port_routine 17, out dx, al
    port_routine 18, out dx, ax
    port_routine 19, out dx, eax
    port_routine 20, rep insb
    port_routine 21, rep insw
    port_routine 22, rep insd
    port_routine 23, rep outsb
    port_routine 24, rep outsw
    port_routine 25, rep outsd
    routine 26      // hammer a port: the same as the other hammer, 4 bytes at a time
        mov edx, ebx
2:      out dx, eax
        in eax, dx
        cmp eax, r8d
        je 3f
        cmp eax, r9d
        jne 4f
3:      dec rcx
        jnz 2b
4:      done
    routine 27      // loop of the instruction that always exits
        mov esi, ecx
2:      xor eax, eax
        cpuid
        dec esi
        jnz 2b
        done
    routine 28      // loop of writes to the port in bx
        mov edx, ebx
2:      out dx, eax
        dec ecx
        jnz 2b
        done
    routine 29      // writes that go round from rbx to r9 in steps of r8
        mov rdx, rbx
2:      mov [rbx], eax
        add rbx, r8
        cmp rbx, r9
        cmovae rbx, rdx
        dec ecx
        jnz 2b
        done
    routine 30      // writes of rax, which increases
2:      mov [rbx], rax
        inc rax
        dec rcx
        jnz 2b
        done
    .macro next_interrupt       // or the end: how many there were
        dec ecx
        jnz 2b
        cli
        mov rax, r12
        done
    .endm
    // Commands that differ, and the result of each. With memory, the command is in the word
    // after the one at r9 where the result comes, and the write to rbx but a doorbell.
    .macro commands number, memory, interrupt
    routine \number
        xor r12d, r12d
        xor esi, esi
        .if \interrupt
        sti
        .endif
2:      mov edx, ecx
        .if \memory
        mov [r9 + 4], edx
        .endif
        mov [rbx], edx
        .if \interrupt
        inc rsi
3:      pause
        cmp r12, rsi
        jb 3b
        .endif
        not edx
4:      mov eax, [r9]
        cmp eax, edx
        jne 4b
        next_interrupt
    .endm
    commands 32, 0, 0
    commands 34, 0, 1
    commands 36, 1, 0
    commands 38, 1, 1
    // Waits for interrupt number rsi: halts until it comes, or looks for it all the time.
    .macro await_interrupt idle
3:
        .if \idle
        cli
        cmp r12, rsi
        jae 4f
        sti
        hlt
        jmp 3b
4:      sti
        .else
        pause
        cmp r12, rsi
        jb 3b
        .endif
    .endm
    // Notifies at rbx, waits for the interrupt, reads its status at r9, and acknowledges.
    .macro requests number, idle
    routine \number
        xor r12d, r12d
        xor esi, esi
2:      sti
        mov dword ptr [rbx], 0
        inc rsi
        await_interrupt \idle
        mov eax, [r9]
        mov [r9 + 4], eax
        next_interrupt
    .endm
    requests 40, 0
    requests 42, 1
    // eax requests of a disk at a time: see "Routine::Disk".
    .macro disk number, idle
    routine \number
        xor r12d, r12d
        xor esi, esi
2:      sti
        lea edi, [8 * rax]
        xor edx, edx
5:      mov r10, [r9 + 8 * rdx + 0x1000]
        mov [r9 + 8 * rdx], r10
        inc edx
        cmp edx, edi
        jb 5b
        movzx edx, word ptr [r9 + 0x802]
        xor r10d, r10d
6:      mov edi, edx
        and edi, 31
        mov [r9 + 2 * rdi + 0x804], r10w
        inc edx
        add r10d, 4
        lea edi, [4 * rax]
        cmp r10d, edi
        jb 6b
        mov [r9 + 0x802], dx
        mov dword ptr [rbx], 0
7:      inc rsi
        await_interrupt \idle
        mov edi, [rbx + 0x10]
        mov [rbx + 0x14], edi
        cmp [r9 + 0xa02], dx
        jne 7b
        sub ecx, eax
        ja 2b
        cli
        done
    .endm
    disk 44, 0
    disk 48, 1
    routine 52      // eax entries more, and a notification
2:      add [r9 + 0x802], ax
        mov dword ptr [rbx], 0
        dec ecx
        jnz 2b
        done
    routine 53      // what reads and writes: exchanges, adds with and without a lock
        xchg [rbx], eax
        done
    routine 54
        lock xadd [rbx], rax
        done
    routine 55
        add [rbx], eax
        done
    .macro string_routine number, insns:vararg
    routine \number
        mov rsi, rbx
        mov rdi, r8
        \insns
        done
    .endm
    string_routine 56, rep movsb
    string_routine 57, rep movsd
    routine 58      // fills
        mov rdi, rbx
        rep stosd
        done
    routine 59      // reads 16 bytes into rax and rcx
        movups xmm0, [rbx]
        movq rax, xmm0
        psrldq xmm0, 8
        movq rcx, xmm0
        done
    routine 60      // writes 16 bytes, of rax and r8
        movq xmm0, rax
        movq xmm1, r8
        punpcklqdq xmm0, xmm1
        movups [rbx], xmm0
        done
    routine 61      // reads 4 bytes, with their sign
        movsxd rax, dword ptr [rbx]
        done
    routine 62
    .global kvm_bpf_guest_end
kvm_bpf_guest_end:
    .popsection
    "#
);

/// Port of the `done` macro above.
const DONE_PORT: u16 = 0xf0;

const PML4: usize = 0x1000;
const PDPT: usize = 0x2000;
const PAGE_DIRECTORIES: usize = 0x3000; // four of them
const GDT: usize = 0x7000;
const IDT: usize = 0x7800;
const STACK_TOP: u64 = 0xa000;

const CODE_SELECTOR: u16 = 8;
const DATA_SELECTOR: u16 = 16;

/// Present, writable, accessed and dirty: nothing is left for the processor to note.
const PAGE: u64 = 0x63;
const LARGE_PAGE: u64 = 1 << 7;

const CR0_PROTECTION: u64 = 1;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
/// Vector registers.
const CR4_OSFXSR: u64 = 1 << 9;
const EFER_LONG_MODE: u64 = (1 << 8) | (1 << 10);

/// The vector whose handler is the guest's interrupt routine.
const VECTOR: u8 = 0x40;
/// And one of an exception, with the same handler.
const INVALID_OPCODE: u8 = 6;

pub(super) fn create_vm(kvm: &Kvm) -> VmFd {
    kvm.create_vm().expect("KVM_CREATE_VM")
}

/// Writes the tables that the processor reads: pages, segments, interrupts.
pub(super) fn prepare_ram(ram: &Ram) {
    let put = |at: usize, index: usize, entry: u64| ram.write(at + 8 * index, &entry.to_le_bytes());

    put(PML4, 0, PDPT as u64 | PAGE);
    for directory in 0..4 {
        let page = PAGE_DIRECTORIES + directory * 0x1000;
        put(PDPT, directory, page as u64 | PAGE);
        for entry in 0..512 {
            let address = ((directory * 512 + entry) as u64) << 21;
            put(page, entry, address | PAGE | LARGE_PAGE);
        }
    }

    put(GDT, 1, 0x00af_9b00_0000_ffff); // 64-bit code
    put(GDT, 2, 0x00cf_9300_0000_ffff); // data

    let handler = CODE + Routine::InterruptHandler.offset();
    let gate = 0x8e00 << 32 // present, interrupt gate
        | (handler & 0xffff_0000) << 32
        | u64::from(CODE_SELECTOR) << 16
        | handler & 0xffff;
    for vector in [INVALID_OPCODE, VECTOR] {
        put(IDT, 2 * usize::from(vector), gate);
    }
}

/// In 64-bit mode, or in 32 bits without paging.
pub(super) fn prepare_vcpu(kvm: &Kvm, _vm: &VmFd, vcpu: &VcpuFd, paging: bool) {
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .expect("KVM_GET_SUPPORTED_CPUID");
    vcpu.set_cpuid2(&cpuid).expect("KVM_SET_CPUID2");

    let code = kvm_segment {
        selector: CODE_SELECTOR,
        limit: u32::MAX,
        type_: 11,
        present: 1,
        s: 1,
        l: paging.into(),
        db: (!paging).into(),
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment {
        selector: DATA_SELECTOR,
        type_: 3,
        l: 0,
        db: 1,
        ..code
    };

    let mut sregs = vcpu.get_sregs().expect("KVM_GET_SREGS");
    sregs.cs = code;
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = data;
    }
    sregs.gdt.base = GDT as u64;
    sregs.gdt.limit = 3 * 8 - 1;
    sregs.idt.base = IDT as u64;
    sregs.idt.limit = 16 * (u16::from(VECTOR) + 1) - 1;
    sregs.cr0 |= CR0_PROTECTION;
    if paging {
        sregs.cr0 |= CR0_PAGING;
        sregs.cr3 = PML4 as u64;
        sregs.cr4 |= CR4_PAE | CR4_OSFXSR;
        sregs.efer |= EFER_LONG_MODE;
    }
    vcpu.set_sregs(&sregs).expect("KVM_SET_SREGS");
}

/// For the registers that no routine uses: no other vCPU has these values in them.
fn unused(vcpu: &VcpuFd) -> [u64; 4] {
    let fd = vcpu.as_raw_fd() as u64;
    [1, 2, 3, 4].map(|number| 0x5a00_0000 | fd << 8 | number)
}

pub(super) fn set_registers(vcpu: &VcpuFd, pc: u64, args: &Args) {
    let [rbp, r11, r14, r15] = unused(vcpu);
    let regs = kvm_regs {
        rbp,
        r11,
        r14,
        r15,
        rip: pc,
        rax: args.value,
        rbx: args.addr,
        rcx: args.count,
        r8: args.pair[0],
        r9: args.pair[1],
        rsp: STACK_TOP,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs).expect("KVM_SET_REGS");
}

/// Fails where the emulation has given the guest another one's registers
/// (Documentation/emulation.md); `scripts/test` knows the message.
pub(super) fn results(vcpu: &VcpuFd) -> Results {
    let regs = vcpu.get_regs().expect("KVM_GET_REGS");
    let got = [regs.rbp, regs.r11, regs.r14, regs.r15];
    assert_eq!(got, unused(vcpu), "registers that no routine uses");
    Results {
        value: regs.rax,
        count: regs.rcx,
    }
}

/// Where a vCPU is, for messages.
pub(super) fn pc(vcpu: &VcpuFd) -> u64 {
    vcpu.get_regs().expect("KVM_GET_REGS").rip
}

pub(super) fn is_done(exit: &VcpuExit<'_>) -> bool {
    matches!(exit, VcpuExit::IoOut(DONE_PORT, _))
}

/// The access that a vCPU's exit for ports, its last one, is about.
pub(super) fn port_access(vcpu: &mut VcpuFd) -> super::Access<'_> {
    let run: *mut kvm_run = vcpu.get_kvm_run();
    // SAFETY: the exit was `KVM_EXIT_IO`, for which KVM fills this member; the data is where it
    // says, in the memory that is mapped with the structure, and the vCPU's as long as it is
    // borrowed.
    unsafe {
        let io = (*run).__bindgen_anon_1.io;
        let size = usize::from(io.size);
        let data = run.cast::<u8>().add(io.data_offset as usize);
        let data = slice::from_raw_parts_mut(data, size * io.count as usize);
        match u32::from(io.direction) {
            KVM_EXIT_IO_IN => super::Access::In(io.port, size, data),
            _ => super::Access::Out(io.port, size, data),
        }
    }
}

/// What a register that held `preset` holds after reading `value`: 1 and 2
/// bytes leave the rest alone, 4 bytes clear it.
pub fn register_after_read(preset: u64, value: u64, width: usize) -> u64 {
    match width {
        1 | 2 => preset & !super::mask(width) | value,
        _ => value,
    }
}

/// The host's instruction counter under QEMU's `-icount`; elsewhere a clock.
pub fn ticks() -> u64 {
    // SAFETY: every x86-64 processor has the instruction.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// The IOAPIC's registers.
pub const IRQCHIP_ADDR: u64 = 0xfec0_0000;

/// KVM's PICs, IOAPIC and local APICs.
pub(super) struct Irqchip;

impl Irqchip {
    pub(super) fn new(vm: &VmFd) -> Result<Self, Errno> {
        match vm.create_irq_chip() {
            Ok(()) => Ok(Irqchip),
            Err(error) => Err(Errno(error.errno())),
        }
    }

    /// Makes the local APIC accept interrupts.
    pub(super) fn connect(&self, vcpu: &mut super::Vcpu) {
        const SPURIOUS_VECTOR: u64 = 0xfee0_00f0;
        const ENABLE: u64 = 0x1ff;

        // All but the first would wait for the first to start them.
        let runnable = kvm_mp_state {
            mp_state: KVM_MP_STATE_RUNNABLE,
        };
        vcpu.fd.set_mp_state(runnable).expect("KVM_SET_MP_STATE");
        vcpu.write(SPURIOUS_VECTOR, 4, ENABLE);
    }

    /// Has a GSI send [`VECTOR`] as a message.
    pub(super) fn route_edge(&self, vm: &VmFd, _vcpu: &mut super::Vcpu, gsi: u32) {
        let mut entry = kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_MSI,
            ..Default::default()
        };
        entry.u.msi.address_lo = 0xfee0_0000;
        entry.u.msi.data = VECTOR.into();
        let routing = KvmIrqRouting::from_entries(&[entry]).expect("one entry");
        vm.set_gsi_routing(&routing).expect("KVM_SET_GSI_ROUTING");
    }

    /// Programs a pin of the IOAPIC to raise [`VECTOR`].
    pub(super) fn route_line(&self, vcpu: &mut super::Vcpu, pin: u32, level: bool) {
        const SELECT: u64 = IRQCHIP_ADDR;
        const WINDOW: u64 = IRQCHIP_ADDR + 0x10;

        let low = u64::from(VECTOR) | u64::from(level) << 15;
        for (register, value) in [(0x11 + 2 * pin, 0), (0x10 + 2 * pin, low)] {
            vcpu.write(SELECT, 4, u64::from(register));
            vcpu.write(WINDOW, 4, value);
        }
    }
}
