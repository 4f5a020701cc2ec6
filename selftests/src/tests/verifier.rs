// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The verifier's code for narrow loads of context fields, which our own
//! program types avoid: shown with types that have such fields. And the
//! kernel's own selftests of the verifier that the series adds.

use std::collections::HashMap;
use std::fs::File;
use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::{io, mem, ptr};

use Reg::{R0, R1, R6, R7};
use kvm_bpf_selftests::bpf::{
    self, Index, Insn, LoadOptions, Map, Prog, ProgType, Reg, call_kfunc, exit, jump_if_ne, load,
    load_signed, load_variable, lookup, mov, store, variable,
};
use kvm_bpf_selftests::harness::{CAP_BPF, Errno, in_a_thread, set_capabilities, skip};
use kvm_bpf_selftests::programs::{ret, test_path};
use libbpf_rs::btf::Btf;
use libbpf_rs::btf::types::DeclTag;
use libbpf_rs::{Object, ObjectBuilder, ProgramInput, ReferencesType, libbpf_sys as sys};

use super::beside_this_program;
use super::kfunc::required;

tests!(
    narrow_load_past_the_kernel_field,
    narrow_load_of_half_a_64_bit_field,
    narrow_loads_of_the_remote_port,
    narrow_loads_of_the_kernels_own_selftest,
    narrow_loads_as_the_kernels_own_selftest_says,
    with_cap_bpf_alone,
    contexts_as_the_kernels_own_selftest_says,
);

/// `__sk_buff.protocol` has 4 bytes, the kernel's field 2: the others are 0.
fn narrow_load_past_the_kernel_field() {
    const SCHED_CLS: ProgType = ProgType(sys::BPF_PROG_TYPE_SCHED_CLS);
    /// `offsetof(struct __sk_buff, protocol)`.
    const PROTOCOL: i16 = 16;

    // An Ethernet frame; its protocol, 0x8899, is big endian and has two sign bits.
    let mut frame = [0; 64];
    frame[12..14].copy_from_slice(&[0x88, 0x99]);
    let field = u32::from(u16::from_ne_bytes([0x88, 0x99])).to_ne_bytes();

    let mut wrong = Vec::new();
    for (offset, width) in [(0, 4), (0, 2), (2, 2), (0, 1), (1, 1), (2, 1), (3, 1)] {
        let mut bytes = [0; 4];
        let part = &field[offset..offset + width];
        if cfg!(target_endian = "little") {
            bytes[..width].copy_from_slice(part);
        } else {
            bytes[4 - width..].copy_from_slice(part);
        }
        let zero_extended = u32::from_ne_bytes(bytes);
        let unused = 32 - 8 * width as u32;
        let sign_extended = ((zero_extended << unused) as i32 >> unused) as u32;

        let at = PROTOCOL + offset as i16;
        for (insn, wanted) in [
            (load(width, R0, R1, at), zero_extended),
            (load_signed(width, R0, R1, at), sign_extended),
        ] {
            let prog = Prog::load(SCHED_CLS, &[insn, exit()]);
            let got = match prog.test_run(&frame) {
                Ok(got) => got,
                Err(Errno(libc::EOPNOTSUPP)) => skip("this kernel cannot test-run tc programs"),
                Err(errno) => panic!("BPF_PROG_TEST_RUN: {errno:?}"),
            };
            if got != wanted {
                wrong.push(format!(
                    "{width} bytes at protocol + {offset} ({insn:?}): wanted {wanted:#x}, got {got:#x}"
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The address of a page fault, whose halves both have bits set, seen by a perf program.
fn narrow_load_of_half_a_64_bit_field() {
    const PERF_EVENT: ProgType = ProgType(sys::BPF_PROG_TYPE_PERF_EVENT);
    /// `offsetof(struct bpf_perf_event_data, addr)`: registers and one word come first.
    const ADDR: i16 = 8 * if cfg!(target_arch = "x86_64") {
        21 + 1
    } else {
        34 + 1
    };

    let map = Map::new(1, 3);
    let mut insns = vec![mov(R6, R1)];
    insns.extend(lookup(&map, Index::Imm(0)));
    for (word, insn) in [
        load(8, R7, R6, ADDR),
        load(4, R7, R6, ADDR),
        load(4, R7, R6, ADDR + 4),
    ]
    .into_iter()
    .enumerate()
    {
        insns.extend([insn, store(8, R0, 8 * word as i16, R7)]);
    }
    insns.extend(ret(0));
    let prog = match Prog::try_load(PERF_EVENT, &insns, LoadOptions::default()) {
        Ok(prog) => prog,
        Err(refused) if refused.log.is_empty() => skip("this kernel has no perf programs"),
        Err(refused) => panic!("wanted a perf program to load, got {refused}"),
    };

    let page = fault_with(&prog);
    let [whole, low, high] = map.get(0)[..] else {
        unreachable!("three words");
    };
    assert!(
        whole & !0xfff == page && whole >> 32 != 0,
        "wanted a fault at {page:#x}, got {whole:#x}"
    );
    let (lower, upper) = (whole & u64::from(u32::MAX), whole >> 32);
    let wanted = if cfg!(target_endian = "little") {
        (lower, upper)
    } else {
        (upper, lower)
    };
    assert_got!((low, high), wanted, "loads at +0 and +4 of {whole:#x}");
}

/// `__sk_buff.remote_port` has the port of a connected socket in one half: the other is 0, and so
/// is what a narrow load's register has beyond it.
fn narrow_loads_of_the_remote_port() {
    const CGROUP_SKB: ProgType = ProgType(sys::BPF_PROG_TYPE_CGROUP_SKB);
    /// `offsetof(struct __sk_buff, remote_port)`, and the port of the receiving socket.
    const REMOTE_PORT: i16 = 132;
    const LOCAL_PORT: i16 = 136;

    let [one, other] = [0; 2].map(|_| UdpSocket::bind("127.0.0.1:0").expect("a socket"));
    let address = |socket: &UdpSocket| socket.local_addr().expect("its address");
    one.connect(address(&other)).expect("connecting");
    other.connect(address(&one)).expect("connecting");

    let map = Map::new(1, 3);
    // Only packets to `other`: the six instructions below are for them.
    let local = i32::from(address(&other).port());
    let mut insns = vec![mov(R6, R1)];
    insns.extend(lookup(&map, Index::Imm(0)));
    insns.extend([load(4, R7, R6, LOCAL_PORT), jump_if_ne(R7, local, 6)]);
    for (word, (width, offset)) in [(2, 0), (2, 2), (4, 0)].into_iter().enumerate() {
        let at = REMOTE_PORT + offset;
        insns.extend([load(width, R7, R6, at), store(8, R0, 8 * word as i16, R7)]);
    }
    // Let the packet pass.
    insns.extend(ret(1));
    let prog = Prog::load(CGROUP_SKB, &insns);
    let cgroup = File::open("/sys/fs/cgroup").expect("the root of cgroups");
    let attach = sys::BPF_CGROUP_INET_INGRESS;
    // SAFETY: no pointers.
    let attached = unsafe { sys::bpf_prog_attach(prog.as_raw_fd(), cgroup.as_raw_fd(), attach, 0) };
    assert_got!(attached, 0, "BPF_PROG_ATTACH");
    let sent = one.send(b"x");
    let mut byte = [0];
    let received = other.recv(&mut byte);
    // SAFETY: no pointers.
    unsafe { sys::bpf_prog_detach2(prog.as_raw_fd(), cgroup.as_raw_fd(), attach) };
    assert_got!((sent.ok(), received.ok()), (Some(1), Some(1)), "bytes");

    // The number is that of the port in network order, in the bytes that come last in memory.
    let port = u64::from(address(&one).port().to_be());
    let whole = if cfg!(target_endian = "little") {
        port << 16
    } else {
        port
    };
    assert_got!(
        map.get(0),
        [0, port, whole],
        "loads of 2 bytes at +0, +2, and of 4"
    );
}

/// Those programs of the kernel's `verifier_ctx.c` that the series adds, run as its test loader
/// does.
fn narrow_loads_of_the_kernels_own_selftest() {
    const ADDED: [&str; 3] = [
        "narrow_load_low_half",
        "narrow_load_high_half",
        "narrow_load_high_byte",
    ];

    let path = test_path("verifier_ctx");
    let wanted = retvals(&path);
    let object = load_only(&path, &ADDED);

    let mut wrong = Vec::new();
    for name in ADDED {
        let program = object
            .progs_mut()
            .find(|program| program.name() == name)
            .unwrap_or_else(|| panic!("{}: no program {name}", path.display()));
        let wanted = *wanted
            .get(name)
            .unwrap_or_else(|| panic!("{name}: no __retval"));
        let input = ProgramInput {
            data_in: Some(&[0; 64]),
            ..Default::default()
        };
        let got = match program.test_run(input) {
            Ok(output) => output.return_value,
            Err(error) => panic!("{name}: BPF_PROG_TEST_RUN: {error}"),
        };
        if got != wanted {
            wrong.push(format!("{name}: wanted {wanted:#x}, got {got:#x}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Those of them that say what the verifier makes of their instructions, shown by bpftool.
fn narrow_loads_as_the_kernels_own_selftest_says() {
    const ADDED: [&str; 2] = [
        "narrow_load_remote_port_low_half",
        "narrow_load_remote_port_high_half",
    ];

    let path = test_path("verifier_ctx");
    let wanted = tags(&path, ":test_expect_xlated=");
    let object = load_only(&path, &ADDED);
    for name in ADDED {
        let program = object
            .progs()
            .find(|program| program.name() == name)
            .unwrap_or_else(|| panic!("{}: no program {name}", path.display()));
        assert_shown(program.as_fd(), name, &wanted, 4);
    }
}

/// bpftool shows what the verifier has made of a program as at least `least` of the file's
/// patterns for it say.
fn assert_shown(program: BorrowedFd<'_>, name: &str, wanted: &[(String, String)], least: usize) {
    let id = bpf::program_id(program.as_raw_fd()).to_string();
    let shown = beside_this_program("bpftool")
        .args(["prog", "dump", "xlated", "id", &id])
        .output()
        .expect("bpftool");
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    let patterns: Vec<_> = wanted.iter().filter(|(of, _)| of == name).collect();
    assert!(patterns.len() >= least, "{name}: got {patterns:?}");
    for (_, pattern) in patterns {
        // Lines as "   0: (79) r2 = *(u64 *)(r1 +24)", but for the code.
        let found = shown
            .lines()
            .filter_map(|line| {
                let (number, rest) = line.trim().split_once(": (")?;
                let insn = rest.split_once(") ")?.1;
                Some((format!("{number}: {insn}"), insn))
            })
            .any(|(line, insn)| matches(pattern, &line) || matches(pattern, insn));
        assert!(found, "{name}: wanted {pattern:?}, got {shown}");
    }
}

/// Those programs of the kernel's own selftests that the series adds for loaders without
/// `CAP_PERFMON`, loaded by such a one: the verifier makes of them what they say.
fn with_cap_bpf_alone() {
    for (file, name, patterns) in [
        ("verifier_spin_lock", "computed_address_of_the_lock", 0),
        ("verifier_loops1", "loop_that_speculation_does_not_end", 1),
        (
            "verifier_loops1",
            "loop_of_nops_that_speculation_does_not_end",
            2,
        ),
        (
            "verifier_array_access",
            "index_past_a_mispredicted_check",
            4,
        ),
    ] {
        in_a_thread(move || {
            let path = test_path(file);
            let wanted = tags(&path, ":test_expect_xlated_unpriv=");
            set_capabilities(&[CAP_BPF]);
            let object = load_only(&path, &[name]);
            let program = object
                .progs()
                .find(|program| program.name() == name)
                .unwrap_or_else(|| panic!("{file}: no program {name}"));
            assert_shown(program.as_fd(), name, &wanted, patterns);
        });
    }
}

/// The programs of the kernel's `verifier_kvm_io.c`, each loaded alone: it loads, or is refused with
/// the message that it names.
fn contexts_as_the_kernels_own_selftest_says() {
    const CALL: u32 = sys::BPF_JMP | sys::BPF_CALL;
    const LD_IMM64: u32 = sys::BPF_LD | sys::BPF_IMM | sys::BPF_DW;

    let path = test_path("verifier_kvm_io");
    let messages = tags(&path, ":test_expect_msg=");
    let refused: Vec<_> = tags(&path, ":test_expect_failure");
    let object = ObjectBuilder::default()
        .open_file(&path)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));

    let mut wrong = Vec::new();
    let mut seen = (0, 0);
    for program in object.progs() {
        let name = program.name().to_string_lossy().into_owned();
        // As libbpf does when it loads: there is one kernel function only, and one variable.
        let resolved = |insn: &sys::bpf_insn| match (u32::from(insn.code), insn.imm) {
            (CALL, -1) => call_kfunc(required("bpf_set_current_uclamp")),
            (LD_IMM64, 0) => {
                let id = variable("bpf_prog_active").expect("the kernel's BTF has bpf_prog_active");
                load_variable(Reg::R1, id)[0]
            }
            _ => Insn::from(insn),
        };
        let insns: Vec<_> = program.insns().iter().map(resolved).collect();
        // libbpf as released does not know these sections.
        let kind = match program.section().to_str() {
            Some("kvm_io_read") => ProgType::READ,
            Some("kvm_io_write") => ProgType::WRITE,
            Some("kvm_io_work") => ProgType::WORK,
            other => panic!("{name}: section {other:?}"),
        };
        let is_refused = refused.iter().any(|(of, _)| *of == name);
        match Prog::try_load(kind, &insns, LoadOptions::default()) {
            Ok(_) if is_refused => wrong.push(format!("{name}: loads")),
            Ok(_) => seen.0 += 1,
            Err(refused) => {
                let mut wanted = messages.iter().filter(|(of, _)| *of == name);
                if !is_refused || !wanted.all(|(_, message)| refused.log.contains(message)) {
                    wrong.push(format!("{name}: {refused}"));
                }
                seen.1 += 1;
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(seen.0 >= 4 && seen.1 >= 21, "got {seen:?} programs");
    assert_got!(messages.len(), refused.len(), "messages");
}

/// Loads these programs of a file; the others are for another test, and most must not load.
#[track_caller]
fn load_only(path: &Path, names: &[&str]) -> Object {
    let mut object = ObjectBuilder::default()
        .open_file(path)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    for mut program in object.progs_mut() {
        let wanted = program.name().to_str().is_some_and(|n| names.contains(&n));
        program.set_autoload(wanted);
    }
    object
        .load()
        .unwrap_or_else(|error| panic!("wanted {names:?} to load, got {error:#}"))
}

/// Whether a line is as a pattern says, in which `{{[0-9]+}}` stands for a number.
fn matches(pattern: &str, line: &str) -> bool {
    let mut rest = line;
    for (index, part) in pattern.split("{{[0-9]+}}").enumerate() {
        if index > 0 {
            let digits = rest.trim_start_matches(|c: char| c.is_ascii_digit());
            if digits.len() == rest.len() {
                return false;
            }
            rest = digits;
        }
        let Some(after) = rest.strip_prefix(part) else {
            return false;
        };
        rest = after;
    }
    rest.is_empty()
}

/// What an object of the kernel's selftests says of its programs: `bpf_misc.h` makes of
/// `__retval(1)` the tag `comment:7:test_retval=1`.
fn tags(object: &Path, kind: &str) -> Vec<(String, String)> {
    let btf = Btf::from_path(object).unwrap_or_else(|error| panic!("its BTF: {error}"));
    let tag = |tag: DeclTag<'_>| {
        let function = tag.referenced_type().name()?.to_str()?.to_owned();
        let (_, value) = tag.name()?.to_str()?.split_once(kind)?;
        Some((function, value.to_owned()))
    };
    btf.type_by_kind().filter_map(tag).collect()
}

fn retvals(object: &Path) -> HashMap<String, u32> {
    let number = |value: &str| match value.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => value.parse(),
    };
    tags(object, ":test_retval=")
        .into_iter()
        .filter_map(|(function, value)| Some((function, number(&value).ok()?)))
        .collect()
}

// `_IO('$', 0)`, `_IO('$', 1)` and `_IOW('$', 8, __u32)`.
const PERF_EVENT_IOC_ENABLE: libc::c_ulong = 0x2400;
const PERF_EVENT_IOC_DISABLE: libc::c_ulong = 0x2401;
const PERF_EVENT_IOC_SET_BPF: libc::c_ulong = 0x4004_2408;

/// Runs a perf program on the fault of a new page; returns the page's address.
fn fault_with(prog: &Prog) -> u64 {
    let page = 4096;
    // SAFETY: a new anonymous mapping touches no other memory.
    let memory = unsafe {
        libc::mmap(
            ptr::null_mut(),
            page,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    assert!(
        memory != libc::MAP_FAILED,
        "mmap: {}",
        io::Error::last_os_error()
    );

    let mut attr = sys::perf_event_attr {
        type_: sys::PERF_TYPE_SOFTWARE,
        size: mem::size_of::<sys::perf_event_attr>() as u32,
        config: sys::PERF_COUNT_SW_PAGE_FAULTS.into(),
        ..Default::default()
    };
    attr.__bindgen_anon_1.sample_period = 1;
    attr.set_disabled(1);
    // SAFETY: `attr` is as large as it says; the event is this thread's on any CPU.
    let fd = unsafe { libc::syscall(libc::SYS_perf_event_open, &raw const attr, 0, -1, -1, 0) };
    if fd < 0 {
        skip(format!("perf_event_open: {}", io::Error::last_os_error()));
    }
    // SAFETY: the kernel just gave us this fd.
    let event = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let ioctl = |request: libc::c_ulong, argument: i32| {
        // SAFETY: these requests take no pointers.
        let result = unsafe { libc::ioctl(event.as_raw_fd(), request, argument) };
        assert!(
            result == 0,
            "ioctl {request:#x}: {}",
            io::Error::last_os_error()
        );
    };
    ioctl(PERF_EVENT_IOC_SET_BPF, prog.as_raw_fd());
    ioctl(PERF_EVENT_IOC_ENABLE, 0);
    // SAFETY: the page is ours.
    unsafe { memory.cast::<u8>().write_volatile(1) };
    ioctl(PERF_EVENT_IOC_DISABLE, 0);
    // SAFETY: nothing refers to the page.
    unsafe { libc::munmap(memory, page) };
    memory as u64
}
