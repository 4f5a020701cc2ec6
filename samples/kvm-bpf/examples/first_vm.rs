// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The program of Documentation/vmm-authors.md, which explains it.

use std::error::Error;
use std::path::Path;

use kvm_bpf::{Abi, Device, ImageDevice, OnLoss, OpenImage, Place};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vmm_sys_util::eventfd::EventFd;

fn main() -> Result<(), Box<dyn Error>> {
    let file = std::env::args().nth(1).ok_or("usage: first_vm FILE")?;
    let file = Path::new(&file);

    let vm = Kvm::new()?.create_vm_with_type(0)?;
    let memory = Box::leak(Box::new(Page([0; 0x1000])));
    memory.0[..CODE.len()].copy_from_slice(CODE);
    let region = kvm_bindings::kvm_userspace_memory_region {
        memory_size: memory.0.len() as u64,
        userspace_addr: memory.0.as_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: the memory is never freed, and only the guest writes to it from here on.
    unsafe { vm.set_user_memory_region(region)? };
    let mut vcpu = vm.create_vcpu(0)?;
    set_up(&vm, &vcpu)?;

    let abi = Abi::from_running_kernel()?;
    let open = || {
        let mut image = OpenImage::open_file(file)?;
        image.set_abi(&abi);
        Ok::<_, kvm_bpf::image::Error>(image)
    };
    let programs = open()?.load()?;
    let irq = EventFd::new(0)?; // with an interrupt controller, also one of `vm.register_irqfd()`
    let mut device = ImageDevice::builder(Device::with_abi(&vm, &abi)?, programs)
        .irq(0, &irq)?
        .plug(Place::Memory(DEVICE))?;

    let read = match vcpu.run()? {
        VcpuExit::MmioWrite(RESULT, data) => u32::from_le_bytes(data.try_into()?),
        exit => return Err(format!("no program handled {exit:?}").into()),
    };
    println!("the guest read {read:#x}");

    let changes = device.replace(open()?, OnLoss::Refuse, |swap| swap())?;
    println!("reloaded: {changes}");

    let state = device.save()?;
    println!("saved: {}", String::from_utf8(state.to_json()?)?);
    Ok(())
}

const DEVICE: u64 = 0xd000_0000;
const RESULT: u64 = DEVICE + 0x8000;

#[repr(align(0x1000))]
struct Page([u8; 0x1000]);

/// `mov eax, [0]` and `mov [0x8000], eax` in real mode, with the device at the data segment.
#[cfg(target_arch = "x86_64")]
const CODE: &[u8] = &[0x66, 0xa1, 0, 0, 0x66, 0xa3, 0, 0x80];

#[cfg(target_arch = "x86_64")]
fn set_up(_: &kvm_ioctls::VmFd, vcpu: &VcpuFd) -> Result<(), Box<dyn Error>> {
    let mut sregs = vcpu.get_sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    sregs.ds.base = DEVICE;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_bindings::kvm_regs {
        rflags: 2,
        ..Default::default()
    })?;
    Ok(())
}

/// `ldr w0, [x1]` and `str w0, [x2]`.
#[cfg(target_arch = "aarch64")]
const CODE: &[u8] = &[0x20, 0, 0x40, 0xb9, 0x40, 0, 0, 0xb9];

#[cfg(target_arch = "aarch64")]
fn set_up(vm: &kvm_ioctls::VmFd, vcpu: &VcpuFd) -> Result<(), Box<dyn Error>> {
    const REGISTER: u64 = 0x6030_0000_0010_0000;

    let mut init = kvm_bindings::kvm_vcpu_init::default();
    vm.get_preferred_target(&mut init)?;
    vcpu.vcpu_init(&init)?;
    for (number, value) in [(1, DEVICE), (2, RESULT), (32, 0)] {
        vcpu.set_one_reg(REGISTER + 2 * number, &value.to_le_bytes())?;
    }
    Ok(())
}
