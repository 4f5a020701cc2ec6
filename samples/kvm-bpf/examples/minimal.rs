// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The smallest VM with a device made of eBPF programs: its guest reads one register, says what it
//! read and stops.
//!
//! ```text
//! minimal regbank.bpf.o           loads the device itself, which needs rights
//! minimal --from /run/manager     takes it from the example "manager", which needs none
//! ```

use std::error::Error;

#[cfg(target_arch = "x86_64")]
fn main() -> Result<(), Box<dyn Error>> {
    use std::os::unix::net::UnixStream;
    use std::path::Path;

    use kvm_bpf::{Abi, Device, ImageDevice, OpenImage, Place, Programs};
    use kvm_ioctls::{Kvm, VcpuExit};
    use vmm_sys_util::eventfd::EventFd;

    /// Where the guest sees the device: it has no memory there, and reaches it in real mode.
    const DEVICE: u64 = 0xd_0000;
    /// Reads the first register, writes it to port 0x10, halts.
    const GUEST: [u8; 13] = [
        0xb8, 0x00, 0xd0, // mov ax, DEVICE >> 4
        0x8e, 0xd8, // mov ds, ax
        0x66, 0xa1, 0x00, 0x00, // mov eax, [0]
        0x66, 0xe7, 0x10, // out 0x10, eax
        0xf4, // hlt
    ];

    let args: Vec<String> = std::env::args().skip(1).collect();
    // What needs rights, or files outside of a jail, comes first.
    let abi = Abi::from_running_kernel()?;
    let programs = match &args[..] {
        [option, socket] if option == "--from" => Programs::recv(&UnixStream::connect(socket)?)?,
        [file] => {
            let mut image = OpenImage::open_file(Path::new(file))?;
            image.set_abi(&abi);
            image.load()?
        }
        _ => return Err("usage: minimal FILE | minimal --from SOCKET".into()),
    };

    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    let memory = Memory::with(&GUEST)?;
    memory.give(&vm)?;

    // The device: interrupts first, at last the guest sees it. Here nobody waits for them; a VM with
    // interrupt controllers makes each eventfd an irqfd.
    let mut builder = ImageDevice::builder(Device::with_abi(&vm, &abi)?, programs);
    for index in 0..builder.programs().note().nr_irqs {
        builder = builder.irq(index, &EventFd::new(0)?)?;
    }
    let device = builder.plug(Place::Memory(DEVICE))?;
    println!(
        "{:?}: {:?}",
        device.place(),
        device.programs().note().compatible
    );

    let mut vcpu = vm.create_vcpu(0)?;
    let mut registers = vcpu.get_sregs()?;
    (registers.cs.base, registers.cs.selector) = (0, 0);
    vcpu.set_sregs(&registers)?;
    let mut registers = vcpu.get_regs()?;
    (registers.rip, registers.rflags) = (0, 2);
    vcpu.set_regs(&registers)?;
    loop {
        match vcpu.run()? {
            VcpuExit::IoOut(_, bytes) => println!("the guest has read {bytes:02x?}"),
            VcpuExit::Hlt => return Ok(()),
            // What no program has handled.
            VcpuExit::MmioRead(addr, bytes) => {
                println!("{addr:#x}: no program handles the read");
                bytes.fill(0xff);
            }
            exit => return Err(format!("an exit that was not expected: {exit:?}").into()),
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn main() -> Result<(), Box<dyn Error>> {
    Err("the guest of this example is code for x86-64".into())
}

/// A page of memory for the guest.
#[cfg(target_arch = "x86_64")]
struct Memory(*mut u8);

#[cfg(target_arch = "x86_64")]
impl Memory {
    const SIZE: usize = 0x1000;

    fn with(code: &[u8]) -> std::io::Result<Self> {
        let (protection, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        );
        // SAFETY: a new mapping takes nothing from anyone.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), Self::SIZE, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: the mapping has room for the code, and nobody else has it.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), start.cast(), code.len()) };
        Ok(Memory(start.cast()))
    }

    /// Has the guest see it from address 0 on, until this process ends.
    fn give(&self, vm: &kvm_ioctls::VmFd) -> Result<(), kvm_ioctls::Error> {
        let region = kvm_bindings::kvm_userspace_memory_region {
            memory_size: Self::SIZE as u64,
            userspace_addr: self.0 as u64,
            ..Default::default()
        };
        // SAFETY: the memory is the guest's from now on, and is never unmapped.
        unsafe { vm.set_user_memory_region(region) }
    }
}
