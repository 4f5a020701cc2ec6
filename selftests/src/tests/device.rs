// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The device's life: created, used by several, closed in any order, used without privileges.

use std::ffi::{CStr, c_char};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::{fs, ptr};

use kvm_bpf::uapi::KVM_DEV_TYPE_BPF;
use kvm_bpf_selftests::bpf::{
    Census, Insn, LoadOptions, Prog, ProgType, create_token, program_type,
};
use kvm_bpf_selftests::device::{Device, region, test_create};
use kvm_bpf_selftests::guest::{Exit, Guest, Vcpu, vms};
use kvm_bpf_selftests::harness::{
    CAP_BPF, Errno, in_a_process, in_a_thread, set_capabilities, wait_for,
};
use kvm_bpf_selftests::programs::{
    Recorder, answer, answer_insns, loaded, only_return, ret, sample, test_image,
};
use kvm_ioctls::Kvm;
use libbpf_rs::libbpf_sys as sys;

use super::{
    ADDR, PATTERN, SIZE, assert_errno, beside_this_program, fd_of, open_files, system_call,
};

tests!(
    kernel_has_the_device,
    test_flag_creates_nothing,
    several_devices_in_one_vm,
    program_types_have_their_numbers,
    close_gives_accesses_to_user_space,
    create_and_close_repeatedly,
    close_in_any_order,
    unprivileged_vmm,
    other_processes_get_eio,
    loading_needs_cap_bpf_alone,
    samples_load_with_cap_bpf_alone,
    loading_with_a_token,
    the_kernels_own_selftest,
);

fn kernel_has_the_device() {
    let guest = Guest::new();
    assert_got!(
        test_create(guest.vm(), KVM_DEV_TYPE_BPF),
        Ok(()),
        "KVM_CREATE_DEVICE_TEST: this kernel lacks the series, or kvm_bpf.ko is not loaded"
    );
}

fn test_flag_creates_nothing() {
    let guest = Guest::new();
    let before = open_files();
    assert_got!(test_create(guest.vm(), KVM_DEV_TYPE_BPF), Ok(()));
    assert_got!(
        open_files(),
        before,
        "open fds after KVM_CREATE_DEVICE_TEST"
    );
    assert_errno(
        "an unknown type",
        test_create(guest.vm(), 0xffff),
        libc::ENODEV,
    );
}

/// Fails unless a read of the range gives `value`, without an exit.
#[track_caller]
fn assert_handled(vcpu: &mut Vcpu, addr: u64, value: u64) {
    let read = vcpu.read(addr, 8);
    assert_got!(
        (read.value, read.exits),
        (value, vec![]),
        "8-byte read at {addr:#x}"
    );
}

#[track_caller]
fn assert_exits(vcpu: &mut Vcpu, addr: u64) {
    assert_got!(
        vcpu.read(addr, 8).exits,
        [Exit::Read(addr, 8)],
        "8-byte read at {addr:#x}"
    );
}

fn several_devices_in_one_vm() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let mut devices: Vec<_> = (0..8)
        .map(|number| {
            let device = Device::new(guest.vm());
            let addr = ADDR + SIZE * number;
            device.set_region(0, &region(addr, SIZE, Some(&answer(number)), None));
            (device, addr, number)
        })
        .collect();
    for (_, addr, number) in &devices {
        assert_handled(&mut vcpu, *addr, *number);
    }

    // Closing one leaves the others.
    let (closed, addr, _) = devices.remove(3);
    drop(closed);
    assert_exits(&mut vcpu, addr);
    for (_, addr, number) in &devices {
        assert_handled(&mut vcpu, *addr, *number);
    }
}

fn program_types_have_their_numbers() {
    for kind in [ProgType::READ, ProgType::WRITE] {
        let prog = only_return(kind, 0);
        assert_got!(program_type(prog.as_raw_fd()), kind);
        for expected_attach_type in [1, 62] {
            let options = LoadOptions {
                expected_attach_type,
                ..Default::default()
            };
            let errno = Prog::try_load(kind, &ret(0), options).map_err(|refused| refused.errno);
            assert_errno(
                &format!("{kind:?} with expected_attach_type {expected_attach_type}"),
                errno,
                libc::EINVAL,
            );
        }
    }
}

fn close_gives_accesses_to_user_space() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    let device = Device::new(guest.vm());
    let write = only_return(ProgType::WRITE, 0);
    device.set_region(0, &region(ADDR, SIZE, Some(&answer(PATTERN)), Some(&write)));
    assert_handled(&mut vcpu, ADDR, PATTERN);
    assert_got!(vcpu.write(ADDR, 1, 7), []);

    drop(device);
    assert_exits(&mut vcpu, ADDR);
    assert_got!(vcpu.write(ADDR, 1, 7), [Exit::Write(ADDR, 1, 7)]);
}

fn create_and_close_repeatedly() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    for round in 0..50 {
        let device = Device::new(guest.vm());
        device.set_region(0, &region(ADDR, SIZE, Some(&answer(round)), None));
        assert_handled(&mut vcpu, ADDR, round);
    }
    assert_exits(&mut vcpu, ADDR);
}

fn close_in_any_order() {
    const ORDERS: [[&str; 3]; 6] = [
        ["vm", "vcpu", "device"],
        ["vm", "device", "vcpu"],
        ["vcpu", "vm", "device"],
        ["vcpu", "device", "vm"],
        ["device", "vm", "vcpu"],
        ["device", "vcpu", "vm"],
    ];
    let (census, vms) = (Census::now(), vms());
    for order in ORDERS {
        let guest = Guest::new();
        let mut vcpu = Some(guest.vcpu(0));
        let mut device = Some(Device::new(guest.vm()));
        let mut guest = Some(guest);
        device
            .as_ref()
            .expect("just created")
            .set_region(0, &region(ADDR, SIZE, Some(&answer(PATTERN)), None));

        for fd in order {
            match fd {
                "vm" => drop(guest.take()),
                "vcpu" => drop(vcpu.take()),
                _ => drop(device.take()),
            }
            // Each fd that is left keeps the VM: regions can be set, a vCPU runs.
            if let Some(device) = &device {
                device.set_region(0, &region(ADDR, SIZE, Some(&answer(PATTERN)), None));
            }
            match (&mut vcpu, &device) {
                (Some(vcpu), Some(_)) => assert_handled(vcpu, ADDR, PATTERN),
                (Some(vcpu), None) => assert_exits(vcpu, ADDR),
                (None, _) => {}
            }
        }
        census.wait_for_newer(0, 0);
        wait_for("virtual machines", vms, self::vms);
    }
}

/// A manager loads programs; a VMM without any privilege attaches them.
fn unprivileged_vmm() {
    const NOBODY: libc::uid_t = 65534;

    let kvm = Kvm::new().expect("open /dev/kvm");
    let (read, write) = (answer(PATTERN), only_return(ProgType::WRITE, 0));
    let vmm = move || {
        // SAFETY: the raw system call changes this thread alone, unlike libc's.
        let result = unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) };
        assert_got!(result, 0, "setresuid to nobody");
        let load = Prog::try_load(ProgType::READ, &ret(0), LoadOptions::default());
        assert_errno(
            "loading a program as nobody",
            load.map_err(|refused| refused.errno),
            libc::EPERM,
        );

        let guest = Guest::on(kvm);
        let mut vcpu = guest.vcpu(0);
        let device = Device::new(guest.vm());
        device.set_region(0, &region(ADDR, SIZE, Some(&read), Some(&write)));
        assert_handled(&mut vcpu, ADDR, PATTERN);
        assert_got!(vcpu.write(ADDR, 4, 7), []);
    };
    in_a_thread(vmm);
}

/// Fails unless loading each of the programs, sleepable or not, ends so.
#[track_caller]
fn assert_loading(
    programs: &[(ProgType, Vec<Insn>)],
    token: Option<RawFd>,
    wanted: Result<(), Errno>,
) {
    for (kind, insns) in programs {
        for sleepable in [false, true] {
            let options = LoadOptions {
                sleepable,
                token,
                ..Default::default()
            };
            let got = Prog::try_load(*kind, insns, options);
            let got = got.map(drop).map_err(|refused| refused.errno);
            assert_got!(got, wanted, "{kind:?}, sleepable {sleepable}, {token:?}");
        }
    }
}

/// Whoever has the file descriptors: a VM and its devices are of the process that has created it.
fn other_processes_get_eio() {
    let guest = Guest::new();
    let device = Device::new(guest.vm());
    let read = answer(PATTERN);
    in_a_process(|| {
        let eio = Err(Errno(libc::EIO));
        let region = region(ADDR, SIZE, Some(&read), None);
        assert_got!(device.try_set_region(0, &region), eio, "setting a region");
        assert_got!(device.try_set_perms(0, 0), eio, "giving up permissions");
        assert_got!(device.info(0).map(drop), eio, "asking");
        assert_got!(Device::try_new(guest.vm()).map(drop), eio, "a new device");
    });
    device.set_region(0, &region(ADDR, SIZE, Some(&read), None));
    assert_handled(&mut guest.vcpu(0), ADDR, PATTERN);
}

/// Of all privileges that root has, `CAP_BPF` is enough to load programs of both types.
fn loading_needs_cap_bpf_alone() {
    let recorder = Recorder::new();
    in_a_thread(move || {
        let programs = [
            (ProgType::READ, answer_insns(PATTERN)),
            (ProgType::WRITE, recorder.writes_insns(0)),
        ];
        let with_it: &[u32] = &[CAP_BPF];
        for (capabilities, wanted) in [(with_it, Ok(())), (&[], Err(Errno(libc::EPERM)))] {
            set_capabilities(capabilities);
            assert_loading(&programs, None, wanted);
        }
    });
}

/// The sample devices too, whose programs have maps, locks, timers and kfuncs, and may sleep:
/// without `CAP_PERFMON` the verifier is stricter.
fn samples_load_with_cap_bpf_alone() {
    in_a_thread(|| {
        set_capabilities(&[CAP_BPF]);
        for name in [
            "doorbell",
            "pagebank",
            "pl031",
            "pl061",
            "regbank",
            "uart16550",
            "vcpufreq",
            "virtio_blk",
            "virtio_regs",
            "virtio_rng",
        ] {
            loaded(sample(name));
        }
        for name in ["regbank_sleepable", "pl031_sleepable"] {
            loaded(test_image(name));
        }
        set_capabilities(&[]);
        let error = sample("regbank").load().expect_err("no capability at all");
        let error = format!("{error:#?}");
        assert!(
            error.contains("PermissionDenied"),
            "wanted a refusal, got {error}"
        );
    });
}

/// A user namespace has no privileges, but what a token for its BPF file system gives: the types,
/// and attach type 0, which all programs of these types have.
fn loading_with_a_token() {
    let types = c"kvm_io_read:kvm_io_write";
    load_with_a_token(types, c"0x1", Ok(()));
    load_with_a_token(types, c"any", Ok(()));
    let refused = Err(Errno(libc::EPERM));
    load_with_a_token(types, c"0xfffffffffffffffe", refused);
    load_with_a_token(c"socket_filter", c"any", refused);
}

fn load_with_a_token(types: &CStr, attach_types: &CStr, wanted: Result<(), Errno>) {
    let (mut ours, theirs) = UnixStream::pair().expect("socketpair");
    // Only a process with a single thread gets a namespace.
    //
    // SAFETY: the other threads of this process hold no locks: they wait.
    let child = unsafe { libc::fork() };
    if child == 0 {
        drop(ours);
        let result = catch_unwind(AssertUnwindSafe(|| load_in_a_namespace(theirs, wanted)));
        // SAFETY: ends the process, and nothing of its parent's.
        unsafe { libc::_exit(result.is_err().into()) };
    }
    drop(theirs);

    // The namespace makes the file system, but who delegates is the host's root.
    let mut number = [0; 4];
    ours.read_exact(&mut number).expect("the child's word");
    let context = fd_of(child as u32, RawFd::from_ne_bytes(number));
    for (option, value) in [
        (c"delegate_cmds", c"prog_load"),
        (c"delegate_progs", types),
        (c"delegate_attachs", attach_types),
    ] {
        configure(
            &context,
            FSCONFIG_SET_STRING,
            option.as_ptr(),
            value.as_ptr(),
        );
    }
    configure(&context, FSCONFIG_CMD_CREATE, ptr::null(), ptr::null());
    ours.write_all(&[0]).expect("a word to the child");

    let mut status = 0;
    // SAFETY: the child is ours, and the status a local.
    let waited = unsafe { libc::waitpid(child, &mut status, 0) };
    assert_got!((waited, status), (child, 0), "the child");
}

fn load_in_a_namespace(mut parent: UnixStream, wanted: Result<(), Errno>) {
    // SAFETY: gives this process namespaces of its own.
    let result = unsafe { libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS) };
    assert_got!(result, 0, "unshare");
    let name = c"bpf".as_ptr() as usize;
    let context = system_call("fsopen", libc::SYS_fsopen, [name, 0, 0, 0, 0]);
    let number = context.as_raw_fd();
    parent
        .write_all(&number.to_ne_bytes())
        .expect("a word to the parent");
    parent.read_exact(&mut [0]).expect("the parent's word");
    let root = system_call("fsmount", libc::SYS_fsmount, [number as usize, 0, 0, 0, 0]);
    let root = fs::File::open(format!("/proc/self/fd/{}", root.as_raw_fd())).expect("the root");
    let token = create_token(root.as_fd()).expect("BPF_TOKEN_CREATE");

    let programs = [
        (ProgType::READ, answer_insns(PATTERN)),
        (ProgType::WRITE, ret(0).to_vec()),
    ];
    assert_loading(&programs, None, Err(Errno(libc::EPERM)));
    assert_loading(&programs, Some(token.as_raw_fd()), wanted);
    // No token here is for these.
    let others = [sys::BPF_PROG_TYPE_XDP, sys::BPF_PROG_TYPE_TRACEPOINT];
    let others = others.map(|kind| (ProgType(kind), ret(0).to_vec()));
    let refused = Err(Errno(libc::EPERM));
    assert_loading(&others, Some(token.as_raw_fd()), refused);
}

/// `enum fsconfig_command`
const FSCONFIG_SET_STRING: usize = 1;
/// `enum fsconfig_command`
const FSCONFIG_CMD_CREATE: usize = 6;

fn configure(context: &OwnedFd, command: usize, key: *const c_char, value: *const c_char) {
    let fd = context.as_raw_fd();
    // SAFETY: key and value are strings, or not there.
    let result = unsafe { libc::syscall(libc::SYS_fsconfig, fd, command, key, value, 0) };
    assert_got!(result, 0, "fsconfig {command}");
}

/// `tools/testing/selftests/kvm/bpf_device_test` of the series.
fn the_kernels_own_selftest() {
    let output = beside_this_program("bpf_device_test")
        .output()
        .expect("bpf_device_test");
    assert!(output.status.success(), "{output:?}");
}
