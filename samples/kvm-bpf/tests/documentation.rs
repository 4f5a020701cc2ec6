// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the documentation shows is what is compiled here.

/// The code of a page in a language, piece by piece.
fn code_of<'page>(page: &'page str, language: &str) -> Vec<&'page str> {
    let fence = format!("```{language}\n");
    let begin = page.split(&fence).skip(1);
    let code = begin.map(|rest| rest.split_once("```\n").expect("an end of the code").0);
    code.collect()
}

#[test]
fn first_vm_is_the_page_for_authors_of_vmms() {
    let page = include_str!("../../../Documentation/vmm-authors.md");
    let program = include_str!("../examples/first_vm.rs");
    let pieces = code_of(page, "rust");
    assert!(pieces.len() > 5, "{} pieces", pieces.len());
    let (_, code) = program
        .split_once("\n\nuse ")
        .expect("a first line of code");
    assert_eq!(format!("use {code}"), pieces.join("\n"));
}

/// What the readme shows, which nothing runs. `scripts/commands` compares them.
#[cfg(all(feature = "loader", feature = "serde"))]
#[expect(dead_code, reason = "it only has to compile")]
#[rustfmt::skip]
mod readme {
    use std::error::Error;
    use std::os::unix::net::UnixStream;

    use kvm_bpf::{OnLoss, Programs};
    use kvm_ioctls::VmFd;
    use vmm_sys_util::eventfd::EventFd;

    use kvm_bpf::{Abi, Device, ImageDevice, OpenImage, Place};

    fn a_device_in_a_vm(vm: VmFd, eventfd: EventFd, offset_ns: u64) -> Result<ImageDevice, Box<dyn Error>> {
        let abi = Abi::from_running_kernel()?;                  // before the jail: reads /sys/kernel/btf
        let mut image = OpenImage::open_file("pl031.bpf.o".as_ref())?;
        image.set_abi(&abi);
        let programs = image.load()?;                           // needs CAP_BPF

        let device = ImageDevice::builder(Device::with_abi(&vm, &abi)?, programs)
            .irq(0, &eventfd)?                                  // a duplicate stays open as long as the device
            .param("clock", [offset_ns])?                       // what its programs cannot find out
            .plug(Place::Memory(0x0901_0000))?;                 // from here on the guest sees it
        Ok(device)
    }

    fn a_vmm_without_rights(
        image: OpenImage,
        mut next: OpenImage,
        mut device: ImageDevice,
        stream: UnixStream,
        (pause, resume): (fn(), fn()),
    ) -> Result<Programs, Box<dyn Error>> {
        // The manager (samples/manager):
        image.load()?.send(&stream)?;
        // The VMM: no C, no CAP_BPF, no bpf(2):
        let programs = Programs::recv(&stream)?;

        // Later, a replacement of what runs. The VMM:
        device.programs().send(&stream)?;
        // The manager:
        let running = Programs::recv(&stream)?;
        next.reuse_maps(&running, OnLoss::Refuse)?;
        next.load()?.send(&stream)?;
        // The VMM:
        let next = Programs::recv(&stream)?;
        device.swap(next, OnLoss::Refuse, |swap| { pause(); swap(); resume() })?;
        Ok(programs)
    }
}

/// A state as it is shown is one, and is written again with the same text.
#[cfg(feature = "serde")]
#[test]
fn the_state_of_the_page_for_authors_of_devices_is_one() {
    let page = include_str!("../../../Documentation/writing-a-device.md");
    let pieces = code_of(page, "json");
    assert_eq!(pieces.len(), 1, "{} pieces", pieces.len());
    let state = kvm_bpf::State::from_json(pieces[0].as_bytes()).unwrap();
    let json = |text| serde_json::from_slice::<serde_json::Value>(text).unwrap();
    assert_eq!(json(pieces[0].as_bytes()), json(&state.to_json().unwrap()));
}
