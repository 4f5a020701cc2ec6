// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What is x86-64's own: boot, CPUs, interrupt controllers, ports.
//!
//! The guest enters a bzImage at its 64-bit entry point, as the kernel's
//! boot protocol (Documentation/arch/x86/boot.rst) describes it.

mod acpi;
mod state;

use std::fs::File;
use std::ops::RangeInclusive;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, Msrs, kvm_cpuid_entry2, kvm_msr_entry,
    kvm_pit_config, kvm_regs, kvm_segment,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::bzimage::BzImage;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::errno;

pub use self::state::{PlatformState, VcpuState};
use crate::boot::{Error, kvm, load_initrd};
use crate::bus::Range;
use crate::console::Console;
use crate::output::Output;
use crate::vm::{End, GuestDevice};

/// What the VMM needs of KVM here.
pub const CAPABILITIES: [(Cap, &str); 4] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
];

/// Command line that every guest gets; with `reboot=k`, a reset differs from a triple fault.
pub const CMDLINE: &str = "console=ttyS0 reboot=k panic=-1";

/// IOAPIC pins for devices: all but those of the timer, the console and COM2.
pub const DEVICE_GSIS: RangeInclusive<u32> = 5..=23;

/// First address of RAM.
pub const RAM_START: u64 = 0;

const IOAPIC_ADDR: u64 = 0xfec0_0000;
const LOCAL_APIC_ADDR: u64 = 0xfee0_0000;
/// Pages that KVM needs on Intel for guests in real mode.
const IDENTITY_MAP_ADDR: u64 = 0xfffb_c000;
const TSS_ADDR: u64 = 0xfffb_d000;
const TSS_LEN: u64 = 3 * 0x1000;

const COM1_PORT: u16 = 0x3f8;
const COM1_LAST: u16 = COM1_PORT + Console::SIZE as u16 - 1;
const COM1_GSI: u32 = 4;
/// The keyboard controller's command port, and its command to reset the CPU.
const RESET_PORT: u16 = 0x64;
const RESET_VALUE: u8 = 0xfe;
/// ACPI sleep registers; the value that Linux writes is type << 2 | enable.
const SLEEP_CONTROL_PORT: u16 = 0x600;
const SLEEP_STATUS_PORT: u16 = 0x601;
const SLEEP_TYPE_OFF: u8 = 5;
const SLEEP_OFF: u8 = SLEEP_TYPE_OFF << 2 | 1 << 5;

/// Where things are in the guest's first MiB.
const GDT: u64 = 0x500;
const ZERO_PAGE: u64 = 0x7000;
const STACK_TOP: u64 = 0x8ff0;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PAGE_DIRECTORY: u64 = 0xb000;
const CMDLINE_ADDR: u64 = 0x2_0000;
const LOW_RAM_END: u64 = 0xa_0000;
const ACPI_TABLES: u64 = 0xe_0000;
const HIGH_RAM: u64 = 0x10_0000;

/// Selectors that the boot protocol wants, and flat descriptors for them.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const GDT_ENTRIES: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

const E820_RAM: u32 = 1;
const E820_ACPI: u32 = 3;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const PAGE_PRESENT_WRITABLE: u64 = 0b11;
const PAGE_LARGE: u64 = 1 << 7;

const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, memory write-back; off, the guest would take its RAM as uncached.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// xloadflags: the kernel has a 64-bit entry point, 0x200 into its image.
const XLF_KERNEL_64: u16 = 1 << 0;
const ENTRY_64: u64 = 0x200;

/// Whether a device's lines can be interrupts of others: no ACPI object says that.
pub fn has_line(_device: &GuestDevice, _line: u32) -> bool {
    false
}

/// Ranges that no device may have, apart from RAM.
pub fn reserved_ranges() -> Vec<Range> {
    vec![
        Range::new("the IOAPIC", IOAPIC_ADDR, 0x1000),
        Range::new("the local APIC", LOCAL_APIC_ADDR, 0x1000),
        Range::new(
            "KVM's own pages",
            IDENTITY_MAP_ADDR,
            TSS_ADDR + TSS_LEN - IDENTITY_MAP_ADDR,
        ),
        Range::of_ports("the first PIC", 0x20, 2),
        Range::of_ports("the timer", 0x40, 4),
        // KVM's speaker has more ports than one.
        Range::of_ports("the speaker and the keyboard controller", 0x60, 5),
        Range::of_ports("the second PIC", 0xa0, 2),
        Range::of_ports("COM1", COM1_PORT, Console::SIZE),
        Range::of_ports("the PICs' trigger modes", 0x4d0, 2),
        Range::of_ports("the sleep registers", SLEEP_CONTROL_PORT, 2),
    ]
}

/// What became of a write to a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortWrite {
    /// It is for others.
    PassOn,
    /// That was all.
    Taken,
    /// It ends the guest.
    Ends(End),
}

/// The console and the ports that end the guest.
pub struct Platform {
    console: Console,
}

impl Platform {
    /// Creates the interrupt controllers, which must be there before the vCPUs, and the console.
    pub fn new(vm: &VmFd) -> Result<Self, Error> {
        vm.set_identity_map_address(IDENTITY_MAP_ADDR)
            .map_err(kvm("place KVM's identity map"))?;
        vm.set_tss_address(TSS_ADDR as usize)
            .map_err(kvm("place KVM's TSS"))?;
        vm.create_irq_chip()
            .map_err(kvm("create the interrupt controllers"))?;
        // No interrupt comes from it: a kernel without kvm-clock measures its TSC with it.
        vm.create_pit2(kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        })
        .map_err(kvm("create the timer"))?;

        let console = Console::new()
            .map_err(|error| Error::Kvm("create the console's interrupt", error.into()))?;
        Ok(Platform { console })
    }

    /// Makes interrupts work; call it when all vCPUs are created, and before an irqfd is.
    pub fn wire(&self, vm: &VmFd) -> Result<(), Error> {
        self.console
            .wire(vm, COM1_GSI)
            .map_err(kvm("wire the console's interrupt"))
    }

    /// The console, and its interrupt line.
    pub fn console_line(&self) -> (&Console, u32) {
        (&self.console, COM1_GSI)
    }

    /// Reads what KVM keeps for the guest, when all vCPUs are out of `KVM_RUN`.
    pub fn save(&self, vm: &VmFd, _vcpus: &[VcpuFd]) -> Result<PlatformState, Error> {
        PlatformState::save(vm)
    }

    /// Gives it to a VM whose vCPUs are out of `KVM_RUN`.
    pub fn restore(
        &self,
        vm: &VmFd,
        _vcpus: &[VcpuFd],
        state: &PlatformState,
    ) -> Result<(), Error> {
        state.restore(vm)
    }

    /// Handles a read of the platform's own devices, of which none is at an address here.
    pub fn mmio_read(&self, _addr: u64, _data: &mut [u8]) -> bool {
        false
    }

    /// Takes a write to the platform's own devices, likewise.
    pub fn mmio_write(&self, _addr: u64, _data: &[u8]) -> bool {
        false
    }

    /// Handles a read from a port of the platform's own.
    pub fn port_read(&self, port: u16, data: &mut [u8]) -> bool {
        match port {
            COM1_PORT..=COM1_LAST => self.console.read((port - COM1_PORT).into(), data),
            // The keyboard controller is ready for a command; the sleep status is clear.
            RESET_PORT | SLEEP_STATUS_PORT => data.fill(0),
            _ => return false,
        }
        true
    }

    /// Waits for the console's output to be taken; returns how many bytes are lost.
    pub fn finish(&self) -> u64 {
        self.console.finish()
    }

    /// Takes a write to a port of the platform's own.
    pub fn port_write(&self, port: u16, data: &[u8]) -> PortWrite {
        match (port, data) {
            (COM1_PORT..=COM1_LAST, _) => {
                self.console.write((port - COM1_PORT).into(), data);
                PortWrite::Taken
            }
            (RESET_PORT, [RESET_VALUE]) => PortWrite::Ends(End::Reset),
            (SLEEP_CONTROL_PORT, [SLEEP_OFF]) => PortWrite::Ends(End::PowerOff),
            (RESET_PORT | SLEEP_CONTROL_PORT | SLEEP_STATUS_PORT, _) => PortWrite::Taken,
            _ => PortWrite::PassOn,
        }
    }

    /// Where other devices may write what is for the console.
    pub fn console(&self) -> Output {
        self.console.output()
    }
}

/// Address that the guest starts at.
pub type Entry = u64;

/// Loads kernel, initramfs, command line and tables.
pub fn load(
    memory: &GuestMemoryMmap,
    kernel: &mut File,
    initrd: Option<&mut File>,
    cmdline: &str,
    cpus: u8,
    devices: &[GuestDevice],
) -> Result<Entry, Error> {
    let loaded =
        BzImage::load(memory, None, kernel, Some(GuestAddress(HIGH_RAM))).map_err(Error::Kernel)?;
    let mut params = boot_params {
        hdr: loaded.setup_header.unwrap_or_default(),
        ..Default::default()
    };
    if params.hdr.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(Error::No64BitEntry);
    }
    // The kernel unpacks itself to where it prefers to be; the file may say anything.
    let memory_end = memory.last_addr().raw_value() + 1;
    let init_size = params.hdr.init_size.into();
    let kernel_end = { params.hdr.pref_address }.saturating_add(init_size);
    if kernel_end > memory_end {
        return Err(Error::SmallMemory {
            needed: kernel_end.div_ceil(1 << 20),
            have: memory_end >> 20,
        });
    }

    if let Some(initrd) = initrd {
        // As high as the kernel takes it; the header's fields have 32 bits.
        let end = memory_end.min(u64::from(params.hdr.initrd_addr_max) + 1);
        let (addr, size) = load_initrd(memory, initrd, kernel_end, end)?;
        params.hdr.ramdisk_image = addr as u32;
        params.hdr.ramdisk_size = size as u32;
    }

    let max = params.hdr.cmdline_size as usize;
    if cmdline.len() > max {
        return Err(Error::Cmdline {
            len: cmdline.len(),
            max,
        });
    }
    memory.write_slice(cmdline.as_bytes(), GuestAddress(CMDLINE_ADDR))?;
    memory.write_obj(0u8, GuestAddress(CMDLINE_ADDR + cmdline.len() as u64))?;

    let tables = acpi::tables(ACPI_TABLES, cpus, devices)?;
    if tables.len() as u64 > HIGH_RAM - ACPI_TABLES {
        return Err(Error::AcpiSize(tables.len()));
    }
    memory.write_slice(&tables, GuestAddress(ACPI_TABLES))?;

    params.hdr.type_of_loader = 0xff; // no assigned number
    params.hdr.cmd_line_ptr = CMDLINE_ADDR as u32;
    params.acpi_rsdp_addr = ACPI_TABLES;
    for (entry, (addr, end, r#type)) in params.e820_table.iter_mut().zip(e820(memory_end)) {
        *entry = boot_e820_entry {
            addr,
            size: end - addr,
            r#type,
        };
        params.e820_entries += 1;
    }
    memory.write_obj(params, GuestAddress(ZERO_PAGE))?;

    write_page_tables(memory)?;
    for (index, entry) in GDT_ENTRIES.iter().enumerate() {
        memory.write_obj(*entry, GuestAddress(GDT + 8 * index as u64))?;
    }
    Ok(loaded.kernel_load.raw_value() + ENTRY_64)
}

/// The guest's memory map: first address, end, type.
fn e820(memory_end: u64) -> [(u64, u64, u32); 3] {
    [
        (0, LOW_RAM_END, E820_RAM),
        (ACPI_TABLES, HIGH_RAM, E820_ACPI),
        (HIGH_RAM, memory_end, E820_RAM),
    ]
}

/// Maps the first GiB to itself, in pages of 2 MiB.
fn write_page_tables(memory: &GuestMemoryMmap) -> Result<(), Error> {
    memory.write_obj(PDPT | PAGE_PRESENT_WRITABLE, GuestAddress(PML4))?;
    memory.write_obj(PAGE_DIRECTORY | PAGE_PRESENT_WRITABLE, GuestAddress(PDPT))?;
    for index in 0..512u64 {
        let page = index << 21 | PAGE_LARGE | PAGE_PRESENT_WRITABLE;
        memory.write_obj(page, GuestAddress(PAGE_DIRECTORY + 8 * index))?;
    }
    Ok(())
}

/// How many bits the guest's addresses have, by the CPUID that its CPUs get.
pub fn address_bits(kvm_fd: &Kvm, _vm: &VmFd, _vcpu: &VcpuFd) -> Result<u8, Error> {
    Ok(cpuid_address_bits(supported_cpuid(kvm_fd)?.as_slice()))
}

fn cpuid_address_bits(entries: &[kvm_cpuid_entry2]) -> u8 {
    /// What CPUs without the leaf have.
    const DEFAULT: u32 = 36;

    let leaf = entries.iter().find(|entry| entry.function == 0x8000_0008);
    let eax = leaf.map_or(DEFAULT, |entry| entry.eax);
    // The third byte: what nested paging can map, if that is less.
    let [physical, _, guest_physical, _] = eax.to_le_bytes();
    match guest_physical {
        0 => physical,
        _ => physical.min(guest_physical),
    }
}

fn supported_cpuid(kvm_fd: &Kvm) -> Result<CpuId, Error> {
    kvm_fd
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(kvm("ask for the supported CPUID"))
}

/// Sets up a vCPU, also one that has run; all but the first wait for it.
pub fn setup_vcpu(kvm_fd: &Kvm, _vm: &VmFd, vcpu: &VcpuFd, id: u8, cpus: u8) -> Result<(), Error> {
    let entries = cpuid(supported_cpuid(kvm_fd)?.as_slice(), id, cpus);
    let cpuid = CpuId::from_entries(&entries)
        .map_err(|_| Error::Kvm("build the CPUID", errno::Error::new(libc::E2BIG)))?;
    vcpu.set_cpuid2(&cpuid).map_err(kvm("set the CPUID"))
}

/// Has the first vCPU enter the kernel.
pub fn enter(vcpu: &VcpuFd, entry: Entry) -> Result<(), Error> {
    let msrs = Msrs::from_entries(&[kvm_msr_entry {
        index: MSR_MTRR_DEF_TYPE,
        data: MTRR_ENABLED_WRITE_BACK,
        ..Default::default()
    }])
    .map_err(|_| Error::Kvm("build the MSRs", errno::Error::new(libc::E2BIG)))?;
    vcpu.set_msrs(&msrs).map_err(kvm("set the MSRs"))?;

    let mut sregs = vcpu.get_sregs().map_err(kvm("read the system registers"))?;
    let data = segment(DATA_SELECTOR, 3);
    sregs.cs = kvm_segment {
        l: 1,
        db: 0,
        ..segment(CODE_SELECTOR, 11)
    };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt.base = GDT;
    sregs.gdt.limit = size_of_val(&GDT_ENTRIES) as u16 - 1;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = PML4;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
    vcpu.set_sregs(&sregs)
        .map_err(kvm("set the system registers"))?;

    vcpu.set_regs(&kvm_regs {
        rip: entry,
        rsi: ZERO_PAGE,
        rsp: STACK_TOP,
        rflags: 1 << 1, // always 1
        ..Default::default()
    })
    .map_err(kvm("set the registers"))
}

/// A flat segment of 4 GiB, as its descriptor in the GDT says.
fn segment(selector: u16, r#type: u8) -> kvm_segment {
    kvm_segment {
        selector,
        type_: r#type,
        base: 0,
        limit: 0xffff_ffff,
        present: 1,
        s: 1,
        g: 1,
        db: 1,
        ..Default::default()
    }
}

/// What KVM supports, with this vCPU's APIC id and one package of `cpus` cores.
fn cpuid(supported: &[kvm_cpuid_entry2], id: u8, cpus: u8) -> Vec<kvm_cpuid_entry2> {
    const TOPOLOGY_LEAVES: [u32; 2] = [0xb, 0x1f];
    const HYPERVISOR: u32 = 1 << 31;
    const TSC_DEADLINE: u32 = 1 << 24;

    let apic_id = u32::from(id);
    let cores = u32::from(cpus);
    let id_bits = cores.next_power_of_two().trailing_zeros();

    let mut entries = supported.to_vec();
    entries.retain(|entry| !TOPOLOGY_LEAVES.contains(&entry.function));
    for entry in &mut entries {
        match entry.function {
            0x1 => {
                entry.ebx = entry.ebx & 0xffff | cores << 16 | apic_id << 24;
                entry.ecx |= HYPERVISOR | TSC_DEADLINE;
            }
            0x8000_0008 => entry.ecx = id_bits << 12 | (cores - 1),
            0x8000_001e => {
                entry.eax = apic_id;
                entry.ebx = apic_id;
                entry.ecx = 0;
            }
            _ => (),
        }
    }

    // One thread per core, then the cores; a level of type 0 ends the list.
    let levels = [(1, 0, 1), (2, id_bits, cores), (0, 0, 0)];
    let last_leaf = entries.iter().find(|entry| entry.function == 0);
    let last_leaf = last_leaf.map_or(0, |entry| entry.eax);
    for function in TOPOLOGY_LEAVES
        .into_iter()
        .filter(|&leaf| leaf <= last_leaf)
    {
        for (index, (r#type, shift, count)) in levels.into_iter().enumerate() {
            entries.push(kvm_cpuid_entry2 {
                function,
                index: index as u32,
                flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax: shift,
                ebx: count,
                ecx: r#type << 8 | index as u32,
                edx: apic_id,
                ..Default::default()
            });
        }
    }
    entries
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vmm_sys_util::tempfile::TempFile;

    use super::*;

    /// The file's header says where the kernel goes, and the sum need not be a number of 64 bits.
    #[test]
    fn a_kernel_beyond_all_memory_is_refused() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let mut bytes = vec![0; 0x1000];
        bytes[0x1f1] = 1; // setup_sects
        bytes[0x202..0x206].copy_from_slice(b"HdrS");
        bytes[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes()); // version
        bytes[0x211] = 1; // loadflags: above 1 MiB
        bytes[0x214..0x218].copy_from_slice(&(HIGH_RAM as u32).to_le_bytes()); // code32_start
        bytes[0x236] = XLF_KERNEL_64 as u8;
        bytes[0x258..0x260].copy_from_slice(&(u64::MAX - 1).to_le_bytes()); // pref_address
        bytes[0x260..0x264].copy_from_slice(&u32::MAX.to_le_bytes()); // init_size
        let mut kernel = TempFile::new().unwrap().into_file();
        kernel.write_all(&bytes).unwrap();
        let error = load(&memory, &mut kernel, None, "", 1, &[]).unwrap_err();
        assert!(matches!(error, Error::SmallMemory { .. }), "{error:?}");
    }

    #[test]
    fn the_first_gib_is_mapped_to_itself() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        write_page_tables(&memory).unwrap();
        let entry = |addr| memory.read_obj::<u64>(GuestAddress(addr)).unwrap();
        assert_eq!(entry(PML4), PDPT | 3);
        assert_eq!(entry(PDPT), PAGE_DIRECTORY | 3);
        assert_eq!(entry(PAGE_DIRECTORY), 0x83);
        assert_eq!(entry(PAGE_DIRECTORY + 8 * 511), 511 << 21 | 0x83);
    }

    #[test]
    fn the_memory_map_is_in_order() {
        let map = e820(0x1000_0000);
        for pair in map.windows(2) {
            assert!(pair[0].1 <= pair[1].0);
        }
        assert_eq!(map[2].1, 0x1000_0000);
    }

    #[test]
    fn ports_end_the_guest() {
        assert_eq!(SLEEP_OFF, 0x34);
        let platform = Platform {
            console: Console::new().unwrap(),
        };
        assert_eq!(
            platform.port_write(0x64, &[0xfe]),
            PortWrite::Ends(End::Reset)
        );
        assert_eq!(platform.port_write(0x64, &[0xff]), PortWrite::Taken);
        assert_eq!(
            platform.port_write(0x600, &[0x34]),
            PortWrite::Ends(End::PowerOff)
        );
        assert_eq!(platform.port_write(0x80, &[0]), PortWrite::PassOn);
        let mut data = [0];
        assert!(platform.port_read(0x64, &mut data));
        assert_eq!(data, [0]);
        assert!(platform.port_read(COM1_PORT + 5, &mut data));
        assert_eq!(data, [0x60], "transmitter empty");
        assert!(!platform.port_read(0x80, &mut data));
    }

    #[test]
    fn address_bits_are_the_fewer() {
        let bits = |eax| {
            cpuid_address_bits(&[kvm_cpuid_entry2 {
                function: 0x8000_0008,
                eax,
                ..Default::default()
            }])
        };
        assert_eq!(bits(0x3028), 40);
        assert_eq!(bits(0x0030_3934), 48);
        assert_eq!(bits(0x0034_3930), 48);
        assert_eq!(cpuid_address_bits(&[]), 36);
    }

    #[test]
    fn cpuid_tells_each_cpu_who_it_is() {
        let leaf = |function, eax| kvm_cpuid_entry2 {
            function,
            eax,
            ebx: 0x1234_5678,
            ..Default::default()
        };
        let supported = [leaf(0, 0xd), leaf(1, 0), leaf(0xb, 7), leaf(0x8000_001e, 9)];
        let entries = cpuid(&supported, 2, 3);
        let find = |function, index| {
            *entries
                .iter()
                .find(|entry| entry.function == function && entry.index == index)
                .unwrap()
        };
        assert_eq!(find(1, 0).ebx, 0x0203_5678);
        assert_eq!(find(1, 0).ecx, 1 << 31 | 1 << 24);
        assert_eq!(find(0x8000_001e, 0).eax, 2);
        let cores = find(0xb, 1);
        assert_eq!(
            (cores.eax, cores.ebx, cores.ecx, cores.edx),
            (2, 3, 0x201, 2)
        );
        assert_eq!(find(0xb, 2).ecx, 2);
        assert!(entries.iter().all(|entry| entry.function != 0x1f));
    }
}
