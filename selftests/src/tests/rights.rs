// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a program may do when root has loaded it: as much as without `CAP_PERFMON`, for a guest
//! chooses what it acts on.

use std::fs;
use std::os::fd::AsRawFd;

use Reg::{R0, R1, R2, R3, R4, R6, R10};
use kvm_bpf_selftests::bpf::{
    Index, Insn, LOADERS, LoadOptions, Map, Prog, ProgType, Reg, add_imm, and, call_helper,
    call_kfunc, exit, load, load_map, load_variable, lookup, mov, mov_imm, mov32,
    shift_right_signed_imm, speculation_barrier, store, sub_imm, variable,
};
use kvm_bpf_selftests::device::{Device, region};
use kvm_bpf_selftests::guest::Guest;
use kvm_bpf_selftests::programs::{CTX_OFFSET, CTX_REGION, ret, test_image, test_path};
use libbpf_rs::{ErrorKind, MapCore, MapFlags, ObjectBuilder, ProgramInput, libbpf_sys as sys};

use super::kfunc::required;
use super::{ADDR, SIZE, assert_refused};

tests!(
    indices_are_masked,
    indices_of_per_cpu_arrays_are_masked,
    indices_of_tail_calls_are_masked,
    masked_look_ups_find_the_same,
    spills_are_not_overtaken,
    no_pointers_leak,
    no_uninitialized_stack,
    offsets_into_files_are_as_they_are,
    no_helpers_that_look_around,
    no_variables_of_the_kernel,
    messages_for_debugging,
    no_kfuncs_that_look_around,
    no_kfuncs_that_allocate,
    no_kfuncs_that_hold_up_the_host,
    no_arenas,
    extensions_have_no_more_rights,
);

const SCHED_CLS: ProgType = ProgType(sys::BPF_PROG_TYPE_SCHED_CLS);
const TYPES: [ProgType; 3] = [ProgType::READ, ProgType::WRITE, ProgType::WORK];

/// Not a power of two: a mask of ones would let an index past the end.
const ELEMENTS: u32 = 5;

/// Keeps an index below [`ELEMENTS`] without a branch.
fn mask(index: Reg, scratch: Reg) -> [Insn; 4] {
    [
        mov32(scratch, index),
        sub_imm(scratch, ELEMENTS as i32),
        shift_right_signed_imm(scratch, 63),
        and(index, scratch),
    ]
}

#[track_caller]
fn assert_masked(what: &str, prog: &Prog, mask: [Insn; 4], wanted: bool) {
    let insns = prog.rewritten();
    let masked = insns.windows(mask.len()).any(|window| window == mask);
    assert_got!(masked, wanted, "{what}: a mask in {insns:#x?}");
}

/// Looks up the element whose number is at `r1 + offset`.
fn look_up_insns(map: &Map, offset: i16) -> Vec<Insn> {
    let mut insns = vec![load(4, R1, R1, offset)];
    insns.extend(lookup(map, Index::Reg(R1)));
    insns.extend(ret(0));
    insns
}

fn indices_are_masked() {
    let map = Map::new(ELEMENTS, 1);
    for kind in TYPES {
        for load in LOADERS {
            let prog = load(kind, &look_up_insns(&map, CTX_REGION));
            assert_masked("an array", &prog, mask(R0, R2), true);
        }
    }
    // Root's programs of a type that trusts its input go without; `len` comes first.
    let prog = Prog::load(SCHED_CLS, &look_up_insns(&map, 0));
    assert_masked("an array, for root's tc", &prog, mask(R0, R2), false);
}

fn indices_of_per_cpu_arrays_are_masked() {
    let map = Map::per_cpu(ELEMENTS, 1);
    // Where the JIT knows per-CPU addresses; elsewhere the kernel's function masks.
    let inlined = cfg!(any(target_arch = "x86_64", target_arch = "aarch64"));
    for kind in TYPES {
        let prog = Prog::load(kind, &look_up_insns(&map, CTX_REGION));
        assert_masked("a per-CPU array", &prog, mask(R0, R2), inlined);
    }
}

fn indices_of_tail_calls_are_masked() {
    let load_call = |kind, offset| {
        // An array of programs takes those of one type.
        let map = Map::of_programs(ELEMENTS);
        let mut insns = vec![load(4, R3, R1, offset)];
        insns.extend(load_map(R2, &map));
        insns.push(call_helper(sys::BPF_FUNC_tail_call));
        insns.extend(ret(0));
        Prog::load(kind, &insns)
    };
    for kind in TYPES {
        let prog = load_call(kind, CTX_REGION);
        assert_masked("a tail call", &prog, mask(R3, R4), true);
    }
    let prog = load_call(SCHED_CLS, 0);
    assert_masked("a tail call, for root's tc", &prog, mask(R3, R4), false);
}

/// Each element, none past the end.
fn masked_look_ups_find_the_same() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(0);
    for map in [Map::new(ELEMENTS, 1), Map::new(8, 1), Map::new(1, 1)] {
        let elements = map.elements();
        for index in 0..elements {
            map.set(index, &[u64::from(index) + 100]);
        }
        let device = Device::new(guest.vm());
        // Declines where there is no element.
        let mut insns = vec![mov(R6, R1), load(4, R1, R1, CTX_OFFSET)];
        insns.extend(lookup(&map, Index::Reg(R1)));
        insns.extend([load(8, R1, R0, 0), store(8, R6, 0, R1)]);
        insns.extend(ret(0));
        let prog = Prog::load(ProgType::READ, &insns);
        device.set_region(0, &region(ADDR, SIZE, Some(&prog), None));
        for index in 0..16 {
            let read = vcpu.read(ADDR + u64::from(index), 1);
            if index < elements {
                let wanted = (u64::from(index) + 100, vec![]);
                assert_got!((read.value, read.exits), wanted, "{index} of {elements}");
            } else {
                assert_got!(read.exits.len(), 1, "{index} of {elements}");
            }
        }
    }
}

/// A load must not get what the stack had before a pointer was stored there.
fn spills_are_not_overtaken() {
    let spill = store(8, R10, -8, R1);
    let mut insns = vec![spill];
    insns.extend(ret(0));
    let has_barrier = |prog: Prog| {
        let pair = [spill, speculation_barrier()];
        prog.rewritten().windows(2).any(|window| window == pair)
    };
    // arm64's JIT leaves it to the processor and its firmware.
    let wanted = cfg!(target_arch = "x86_64");
    for kind in TYPES {
        for load in LOADERS {
            assert_got!(
                has_barrier(load(kind, &insns)),
                wanted,
                "{kind:?}: a barrier"
            );
        }
    }
    let trusted = has_barrier(Prog::load(SCHED_CLS, &insns));
    assert_got!(trusted, false, "a barrier, for root's tc");
}

/// Refused for all sorts of programs of ours, root's, for the same reason as for others.
#[track_caller]
fn assert_all_refused(what: &str, insns: &[Insn], reason: &str) {
    for kind in TYPES {
        for sleepable in [false, true] {
            let options = LoadOptions {
                sleepable,
                ..Default::default()
            };
            assert_refused(what, Prog::try_load(kind, insns, options), reason);
        }
    }
}

fn no_pointers_leak() {
    let map = Map::new(1, 1);
    let mut to_a_map = vec![mov(R6, R1)];
    to_a_map.extend(lookup(&map, Index::Imm(0)));
    to_a_map.push(store(8, R0, 0, R6));
    to_a_map.extend(ret(0));
    assert_all_refused("a pointer to a map", &to_a_map, "R6 leaks addr");

    let returned = [mov(R0, R10), exit()];
    assert_all_refused("a pointer as result", &returned, "R0 leaks addr");
}

fn no_uninitialized_stack() {
    let insns = [load(8, R0, R10, -8), exit()];
    assert_all_refused(
        "stack that was not written",
        &insns,
        "invalid read from stack",
    );
}

/// Offsets are masked to what a dynptr has, and a file has no such size.
fn offsets_into_files_are_as_they_are() {
    const OFFSET: usize = 4097;
    let file = fs::read("/proc/self/exe").expect("/proc/self/exe");
    let object = ObjectBuilder::default().open_file(test_path("file_dynptr"));
    let object = object
        .and_then(|object| object.load())
        .expect("file_dynptr");
    let program = object.progs_mut().next().expect("a program");
    program
        .test_run(ProgramInput::default())
        .expect("BPF_PROG_TEST_RUN");
    let found = object
        .maps()
        .find(|map| map.name().to_string_lossy().ends_with(".bss"));
    let found = found.expect(".bss").lookup(&[0; 4], MapFlags::ANY);
    let found = found.expect("BPF_MAP_LOOKUP_ELEM").expect("the value");
    let results: Vec<_> = found[16..32]
        .chunks(4)
        .map(|result| i32::from_ne_bytes(result.try_into().unwrap()))
        .collect();
    assert_got!(results, [0, 0, 0, -libc::E2BIG]);
    assert_got!(found[..8], file[OFFSET..][..8], "read at {OFFSET}");
    assert_got!(
        found[8],
        file[OFFSET],
        "the first byte of the part from there on"
    );
}

/// With arguments that make sense for none: it is the helper that is refused.
fn no_helpers_that_look_around() {
    for (helper, name) in [
        (sys::BPF_FUNC_probe_read_kernel, "bpf_probe_read_kernel"),
        (
            sys::BPF_FUNC_probe_read_kernel_str,
            "bpf_probe_read_kernel_str",
        ),
        (sys::BPF_FUNC_probe_read_user, "bpf_probe_read_user"),
        (sys::BPF_FUNC_copy_from_user, "bpf_copy_from_user"),
        (sys::BPF_FUNC_copy_from_user_task, "bpf_copy_from_user_task"),
        (sys::BPF_FUNC_get_current_task, "bpf_get_current_task"),
        (
            sys::BPF_FUNC_get_current_task_btf,
            "bpf_get_current_task_btf",
        ),
        (sys::BPF_FUNC_task_pt_regs, "bpf_task_pt_regs"),
        (sys::BPF_FUNC_get_task_stack, "bpf_get_task_stack"),
        (sys::BPF_FUNC_find_vma, "bpf_find_vma"),
        (sys::BPF_FUNC_send_signal, "bpf_send_signal"),
        (sys::BPF_FUNC_snprintf_btf, "bpf_snprintf_btf"),
        (sys::BPF_FUNC_perf_event_read, "bpf_perf_event_read"),
    ] {
        let mut insns = vec![call_helper(helper)];
        insns.extend(ret(0));
        let reason = format!("program of this type cannot use helper {name}");
        assert_all_refused(name, &insns, &reason);
    }
}

/// A pointer in one would be read as a number.
fn no_variables_of_the_kernel() {
    let id = variable("bpf_prog_active").expect("the kernel's BTF has bpf_prog_active");
    let mut insns = load_variable(R1, id).to_vec();
    insns.extend([call_helper(sys::BPF_FUNC_this_cpu_ptr), load(4, R1, R0, 0)]);
    insns.extend(ret(0));
    // There is one: root's programs of a type that trusts its input may.
    Prog::load(SCHED_CLS, &insns);
    let reason = "program of this type cannot use variables of the kernel";
    assert_all_refused("a variable", &insns, reason);
}

fn messages_for_debugging() {
    // "%d", and its length.
    let mut insns = vec![
        mov_imm(R1, 0x0000_6425),
        store(8, R10, -8, R1),
        mov(R1, R10),
        add_imm(R1, -8),
        mov_imm(R2, 8),
        mov_imm(R3, 1),
        call_helper(sys::BPF_FUNC_trace_printk),
    ];
    insns.extend(ret(0));
    for kind in TYPES {
        for load in LOADERS {
            load(kind, &insns);
        }
    }
}

fn kfunc_refused(name: &str, reason: &str) {
    let mut insns = vec![
        mov_imm(R1, 0),
        store(8, R10, -8, R1),
        mov(R1, R10),
        add_imm(R1, -8),
        mov_imm(R2, 0),
        mov_imm(R3, 0),
        call_kfunc(required(name)),
    ];
    insns.extend(ret(0));
    assert_all_refused(name, &insns, reason);
}

fn no_kfuncs_that_look_around() {
    for name in ["bpf_rdonly_cast", "bpf_strlen", "bpf_copy_from_user_str"] {
        kfunc_refused(name, &format!("{name} is allowed only to CAP_PERFMON"));
    }
    for name in [
        "bpf_iter_task_new",
        "bpf_iter_task_vma_new",
        "bpf_iter_css_new",
        "bpf_iter_css_task_new",
        "bpf_iter_kmem_cache_new",
        "bpf_get_root_mem_cgroup",
        "bpf_get_mem_cgroup",
    ] {
        not_allowed(name);
    }
}

fn not_allowed(name: &str) {
    kfunc_refused(
        name,
        &format!("calling kernel function {name} is not allowed"),
    );
}

/// Their memory is charged to nobody, and a guest could have them get more and more.
fn no_kfuncs_that_allocate() {
    for name in [
        "bpf_obj_new_impl",
        "bpf_percpu_obj_new_impl",
        "bpf_cpumask_create",
    ] {
        not_allowed(name);
    }
}

fn no_kfuncs_that_hold_up_the_host() {
    for name in [
        "bpf_preempt_disable",
        "bpf_local_irq_save",
        "bpf_res_spin_lock_irqsave",
    ] {
        kfunc_refused(
            name,
            &format!("calling kernel function {name} is not allowed"),
        );
    }
}

/// So nothing can be denied by `KVM_BPF_ALLOW_ARENA` as long as the verifier says this.
fn no_arenas() {
    let arena = Map::arena(1);
    let mut insns = load_map(R1, &arena).to_vec();
    insns.extend(ret(0));
    let reason = "CAP_BPF and CAP_PERFMON are required to use arena";
    assert_all_refused("a program with an arena", &insns, reason);
}

/// A program that replaces a function of one of ours is verified as that is.
fn extensions_have_no_more_rights() {
    let extended = test_image("extended")
        .load()
        .unwrap_or_else(|error| panic!("loading extended: {error:#?}"));
    let target = extended.read_program().expect("its program").as_raw_fd();
    for (name, refused) in [
        ("with_array", None),
        ("with_arena", Some(ErrorKind::PermissionDenied)),
        ("with_task", Some(ErrorKind::InvalidInput)),
    ] {
        let mut object = ObjectBuilder::default()
            .open_file(test_path("extensions"))
            .expect("extensions");
        for mut program in object.progs_mut() {
            program.set_autoload(program.name() == name);
            program
                .set_attach_target(target, Some("value".to_string()))
                .expect("bpf_program__set_attach_target()");
        }
        let kind = object.load().err().map(|error| error.kind());
        assert_got!(kind, refused, "{name}: the error");
    }
}
