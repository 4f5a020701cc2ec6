// SPDX-License-Identifier: Apache-2.0 OR MIT

//! eBPF instructions, programs and maps, over libbpf's thin system-call wrappers.

use std::collections::HashSet;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::LazyLock;
use std::{fmt, mem, ptr};

use kvm_bpf::uapi::{
    BPF_PROG_TYPE_KVM_IO_READ, BPF_PROG_TYPE_KVM_IO_WORK, BPF_PROG_TYPE_KVM_IO_WRITE,
};
use libbpf_rs::libbpf_sys as sys;

use crate::harness::{Errno, wait_for};

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Insn {
    code: u8,
    registers: u8,
    off: i16,
    imm: i32,
}

impl From<&sys::bpf_insn> for Insn {
    fn from(insn: &sys::bpf_insn) -> Self {
        Self {
            code: insn.code,
            registers: insn.src_reg() << 4 | insn.dst_reg(),
            off: insn.off,
            imm: insn.imm,
        }
    }
}

/// A register: `R0` is the result, `R1` to `R5` arguments, `R6` to `R9`
/// survive calls, `R10` is the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Reg {
    R0,
    R1,
    R2,
    R3,
    R4,
    R5,
    R6,
    R7,
    R8,
    R9,
    R10,
}

use Reg::{R0, R10};

// Operation codes, as the instruction set's specification has them.
const LD_IMM64: u8 = 0x18;
const LDX_MEM: u8 = 0x61;
const LDX_MEMSX: u8 = 0x81;
const ST_MEM: u8 = 0x62;
const STX_MEM: u8 = 0x63;
const STX_ATOMIC: u8 = 0xc3;
/// The kernel's own.
const ST_NOSPEC: u8 = 0xc2;
const ADD64_IMM: u8 = 0x07;
const ADD64_REG: u8 = 0x0f;
const SUB64_IMM: u8 = 0x17;
const AND64_REG: u8 = 0x5f;
const ARSH64_IMM: u8 = 0xc7;
const MOV32_REG: u8 = 0xbc;
const MOV64_IMM: u8 = 0xb7;
const MOV64_REG: u8 = 0xbf;
const JEQ_IMM: u8 = 0x15;
const JNE_IMM: u8 = 0x55;
const JGE_REG: u8 = 0x3d;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;

/// In the source register of `LD_IMM64`: the number is a map's fd.
const PSEUDO_MAP_FD: u8 = 1;
/// In the source register of `CALL`: the number is a kfunc's BTF id.
const PSEUDO_KFUNC_CALL: u8 = 2;
const PSEUDO_BTF_ID: u8 = 3;

const fn insn(code: u8, dst: Reg, src: u8, off: i16, imm: i32) -> Insn {
    Insn {
        code,
        registers: src << 4 | dst as u8,
        off,
        imm,
    }
}

impl Insn {
    /// Any instruction: operation code, destination, source, offset, immediate.
    pub const fn raw(code: u8, dst: u8, src: u8, off: i16, imm: i32) -> Self {
        Insn {
            code,
            registers: src << 4 | dst & 0xf,
            off,
            imm,
        }
    }

    /// The same five.
    pub const fn parts(self) -> (u8, u8, u8, i16, i32) {
        let (dst, src) = (self.registers & 0xf, self.registers >> 4);
        (self.code, dst, src, self.off, self.imm)
    }
}

/// The size bits of a memory instruction.
const fn size(width: usize) -> u8 {
    match width {
        1 => 0x10,
        2 => 0x08,
        4 => 0x00,
        8 => 0x18,
        _ => panic!("no such width"),
    }
}

/// The codes of memory instructions above are those of 4 bytes, whose size bits are 0.
const fn memory(code: u8, width: usize) -> u8 {
    code | size(width)
}

/// `dst = *(src + off)`, zero-extended.
pub const fn load(width: usize, dst: Reg, src: Reg, off: i16) -> Insn {
    insn(memory(LDX_MEM, width), dst, src as u8, off, 0)
}

/// The same, sign-extended.  There is none for 8 bytes: the kernel refuses it.
pub const fn load_signed(width: usize, dst: Reg, src: Reg, off: i16) -> Insn {
    insn(memory(LDX_MEMSX, width), dst, src as u8, off, 0)
}

/// `*(dst + off) = src`.
pub const fn store(width: usize, dst: Reg, off: i16, src: Reg) -> Insn {
    insn(memory(STX_MEM, width), dst, src as u8, off, 0)
}

/// `*(dst + off) = imm`, sign-extended to the width.
pub const fn store_imm(width: usize, dst: Reg, off: i16, imm: i32) -> Insn {
    insn(memory(ST_MEM, width), dst, 0, off, imm)
}

/// What an instruction does atomically, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Atomic {
    Add = 0x00,
    FetchAdd = 0x01,
    Or = 0x40,
    FetchOr = 0x41,
    And = 0x50,
    FetchAnd = 0x51,
    Xor = 0xa0,
    FetchXor = 0xa1,
    Exchange = 0xe1,
    /// With `r0`.
    CompareExchange = 0xf1,
    /// From `src`, to `dst`.
    LoadAcquire = 0x100,
    StoreRelease = 0x110,
}

/// An atomic operation with `src` on `*(dst + off)`.
pub const fn atomic(op: Atomic, width: usize, dst: Reg, off: i16, src: Reg) -> Insn {
    insn(memory(STX_ATOMIC, width), dst, src as u8, off, op as i32)
}

/// `*(dst + off) += src`, atomically.
pub const fn atomic_add(width: usize, dst: Reg, off: i16, src: Reg) -> Insn {
    atomic(Atomic::Add, width, dst, off, src)
}

/// `dst = src`.
pub const fn mov(dst: Reg, src: Reg) -> Insn {
    insn(MOV64_REG, dst, src as u8, 0, 0)
}

/// `dst = src`'s low 32 bits, sign-extended.
pub const fn mov_signed32(dst: Reg, src: Reg) -> Insn {
    insn(MOV64_REG, dst, src as u8, 32, 0)
}

/// `dst = imm`, sign-extended.
pub const fn mov_imm(dst: Reg, imm: i32) -> Insn {
    insn(MOV64_IMM, dst, 0, 0, imm)
}

/// `dst += imm`.
pub const fn add_imm(dst: Reg, imm: i32) -> Insn {
    insn(ADD64_IMM, dst, 0, 0, imm)
}

/// `dst += src`.
pub const fn add(dst: Reg, src: Reg) -> Insn {
    insn(ADD64_REG, dst, src as u8, 0, 0)
}

/// `dst -= imm`.
pub const fn sub_imm(dst: Reg, imm: i32) -> Insn {
    insn(SUB64_IMM, dst, 0, 0, imm)
}

/// `dst >>= imm`, which keeps the sign.
pub const fn shift_right_signed_imm(dst: Reg, imm: i32) -> Insn {
    insn(ARSH64_IMM, dst, 0, 0, imm)
}

/// `dst &= src`.
pub const fn and(dst: Reg, src: Reg) -> Insn {
    insn(AND64_REG, dst, src as u8, 0, 0)
}

/// `dst = src`'s low 32 bits, zero-extended.
pub const fn mov32(dst: Reg, src: Reg) -> Insn {
    insn(MOV32_REG, dst, src as u8, 0, 0)
}

/// `dst = imm`, all 64 bits.
pub const fn mov_imm64(dst: Reg, imm: u64) -> [Insn; 2] {
    [
        insn(LD_IMM64, dst, 0, 0, imm as i32),
        insn(0, R0, 0, 0, (imm >> 32) as i32),
    ]
}

/// `dst = ` the map.
pub fn load_map(dst: Reg, map: &Map) -> [Insn; 2] {
    [
        insn(LD_IMM64, dst, PSEUDO_MAP_FD, 0, map.fd.as_raw_fd()),
        insn(0, R0, 0, 0, 0),
    ]
}

/// `dst = ` the address of a variable of vmlinux.
pub const fn load_variable(dst: Reg, btf_id: i32) -> [Insn; 2] {
    [
        insn(LD_IMM64, dst, PSEUDO_BTF_ID, 0, btf_id),
        insn(0, R0, 0, 0, 0),
    ]
}

/// Skips `off` instructions (more than 0: forward) if `dst == imm`.
pub const fn jump_if_eq(dst: Reg, imm: i32, off: i16) -> Insn {
    insn(JEQ_IMM, dst, 0, off, imm)
}

/// Skips `off` instructions if `dst != imm`.
pub const fn jump_if_ne(dst: Reg, imm: i32, off: i16) -> Insn {
    insn(JNE_IMM, dst, 0, off, imm)
}

/// Skips `off` instructions if `dst >= src`, unsigned.
pub const fn jump_if_ge(dst: Reg, src: Reg, off: i16) -> Insn {
    insn(JGE_REG, dst, src as u8, off, 0)
}

/// Calls a helper, `BPF_FUNC_*`.
pub const fn call_helper(id: u32) -> Insn {
    insn(CALL, R0, 0, 0, id as i32)
}

/// Calls a kfunc of vmlinux.
pub const fn call_kfunc(btf_id: i32) -> Insn {
    insn(CALL, R0, PSEUDO_KFUNC_CALL, 0, btf_id)
}

/// What the verifier puts where a CPU must not run ahead.  It takes none from a program.
pub const fn speculation_barrier() -> Insn {
    insn(ST_NOSPEC, R0, 0, 0, 0)
}

/// Returns `r0`.
pub const fn exit() -> Insn {
    insn(EXIT, R0, 0, 0, 0)
}

/// `r0 = ` pointer to the map's element number `index`; uses the frame and `r1` to `r5`.
pub fn lookup(map: &Map, index: Index) -> Vec<Insn> {
    let mut insns = vec![match index {
        Index::Imm(imm) => store_imm(4, R10, -4, imm),
        Index::Reg(reg) => store(4, R10, -4, reg),
    }];
    insns.extend(load_map(Reg::R1, map));
    insns.extend([
        mov(Reg::R2, R10),
        add_imm(Reg::R2, -4),
        call_helper(sys::BPF_FUNC_map_lookup_elem),
        // An index out of range: r0 is 0, which would mean "handled".
        jump_if_ne(R0, 0, 2),
        mov_imm(R0, 1),
        exit(),
    ]);
    insns
}

/// Which element of an array.
#[derive(Clone, Copy, Debug)]
pub enum Index {
    /// This one.
    Imm(i32),
    /// The one that the register tells.
    Reg(Reg),
}

/// BTF id of a kfunc in vmlinux.
pub fn kfunc(name: &str) -> Option<i32> {
    in_vmlinux(name, sys::BTF_KIND_FUNC)
}

/// BTF id of a variable in vmlinux.
pub fn variable(name: &str) -> Option<i32> {
    in_vmlinux(name, sys::BTF_KIND_VAR)
}

fn in_vmlinux(name: &str, kind: u32) -> Option<i32> {
    static VMLINUX: LazyLock<usize> = LazyLock::new(|| {
        // SAFETY: no arguments; the result is kept for the life of the process.
        unsafe { sys::btf__load_vmlinux_btf() as usize }
    });
    assert_ne!(
        *VMLINUX, 0,
        "wanted BTF in /sys/kernel/btf/vmlinux, got none"
    );
    let name = CString::new(name).expect("a name without NUL");
    // SAFETY: the BTF is never freed, the name is a C string.
    let id =
        unsafe { sys::btf__find_by_name_kind(*VMLINUX as *const sys::btf, name.as_ptr(), kind) };
    (id > 0).then_some(id)
}

/// `BPF_PROG_TYPE_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProgType(pub u32);

impl ProgType {
    /// Handles a guest's reads.
    pub const READ: Self = Self(BPF_PROG_TYPE_KVM_IO_READ);
    /// Handles a guest's writes.
    pub const WRITE: Self = Self(BPF_PROG_TYPE_KVM_IO_WRITE);
    /// Runs without a guest's access.
    pub const WORK: Self = Self(BPF_PROG_TYPE_KVM_IO_WORK);
}

/// What `BPF_PROG_LOAD` takes besides the instructions.
#[derive(Clone, Copy, Debug, Default)]
pub struct LoadOptions {
    /// Set `BPF_F_SLEEPABLE`.
    pub sleepable: bool,
    /// `BPF_*`, an attach type.
    pub expected_attach_type: u32,
    /// Do not ask why a program is refused, which takes as long again.
    pub without_log: bool,
    /// A BPF token that gives the privilege.
    pub token: Option<RawFd>,
}

/// `BPF_TOKEN_CREATE`: what the BPF file system with that root directory delegates.
pub fn create_token(root: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    // SAFETY: there are no options to point to.
    owned(unsafe { sys::bpf_token_create(root.as_raw_fd(), ptr::null_mut()) })
}

/// The kernel did not take a program.
#[derive(Debug)]
pub struct Refused {
    /// Why.
    pub errno: Errno,
    /// The verifier's log.
    pub log: String,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}\n{}", self.errno, self.log)
    }
}

/// A loaded program.
#[derive(Debug)]
pub struct Prog(OwnedFd);

/// Loads a program that must load.
pub type Load = fn(ProgType, &[Insn]) -> Prog;

/// Programs run under RCU, or under tasks trace RCU if they may sleep.
pub const LOADERS: [Load; 2] = [Prog::load, Prog::load_sleepable];

impl Prog {
    /// Loads a program that the kernel must take.
    #[track_caller]
    pub fn load(kind: ProgType, insns: &[Insn]) -> Self {
        Self::try_load(kind, insns, LoadOptions::default())
            .unwrap_or_else(|refused| panic!("wanted {kind:?} to load, got {refused}\n{insns:?}"))
    }

    /// Loads a program that may sleep.
    #[track_caller]
    pub fn load_sleepable(kind: ProgType, insns: &[Insn]) -> Self {
        let options = LoadOptions {
            sleepable: true,
            ..Default::default()
        };
        Self::try_load(kind, insns, options)
            .unwrap_or_else(|refused| panic!("wanted sleepable {kind:?} to load, got {refused}"))
    }

    /// Loads a program.
    pub fn try_load(kind: ProgType, insns: &[Insn], options: LoadOptions) -> Result<Self, Refused> {
        let mut log = vec![0_u8; if options.without_log { 0 } else { 1 << 20 }];
        let mut prog_flags = 0;
        if options.sleepable {
            prog_flags |= sys::BPF_F_SLEEPABLE;
        }
        if options.token.is_some() {
            prog_flags |= sys::BPF_F_TOKEN_FD;
        }
        let mut opts = sys::bpf_prog_load_opts {
            sz: mem::size_of::<sys::bpf_prog_load_opts>() as _,
            expected_attach_type: options.expected_attach_type,
            prog_flags,
            token_fd: options.token.unwrap_or(0) as u32,
            // libbpf tries a second time for the log, when the first failed.
            log_level: 0,
            log_size: log.len() as u32,
            log_buf: if options.without_log {
                ptr::null_mut()
            } else {
                log.as_mut_ptr().cast::<c_char>()
            },
            // One try: a program that the verifier refuses stays refused.
            attempts: 1,
            ..Default::default()
        };
        // SAFETY: every pointer is to a local that outlives the call; `Insn` is `bpf_insn`.
        let fd = unsafe {
            sys::bpf_prog_load(
                kind.0,
                c"kvm_bpf_test".as_ptr(),
                c"Dual BSD/GPL".as_ptr(),
                insns.as_ptr().cast(),
                insns.len() as _,
                &mut opts,
            )
        };
        match owned(fd) {
            Ok(fd) => Ok(Prog(fd)),
            Err(errno) => Err(Refused {
                errno,
                log: CStr::from_bytes_until_nul(&log)
                    .map(|log| log.to_string_lossy().into_owned())
                    .unwrap_or_default(),
            }),
        }
    }

    /// The instructions that the verifier has made of the program's.
    pub fn rewritten(&self) -> Vec<Insn> {
        let mut insns = vec![exit(); 4096];
        let mut info = sys::bpf_prog_info {
            xlated_prog_insns: insns.as_mut_ptr() as u64,
            xlated_prog_len: size_of_val(&insns[..]) as u32,
            ..Default::default()
        };
        let mut size = size_of_val(&info) as u32;
        // SAFETY: `info` is as large as `size` says; `Insn` is `bpf_insn`, and the vector has as
        // many of them as `info` says.
        let result =
            unsafe { sys::bpf_prog_get_info_by_fd(self.as_raw_fd(), &mut info, &mut size) };
        assert_eq!(result, 0, "BPF_OBJ_GET_INFO_BY_FD of a program");
        insns.truncate(info.xlated_prog_len as usize / size_of::<Insn>());
        assert!(
            !insns.is_empty(),
            "wanted the program's instructions, got none"
        );
        insns
    }

    /// Runs a program once with `BPF_PROG_TEST_RUN`; returns what it returned.
    pub fn test_run(&self, data: &[u8]) -> Result<u32, Errno> {
        let mut opts = sys::bpf_test_run_opts {
            sz: mem::size_of::<sys::bpf_test_run_opts>() as _,
            data_in: data.as_ptr().cast(),
            data_size_in: data.len() as u32,
            ..Default::default()
        };
        // SAFETY: `opts` and `data` outlive the call.
        let result = unsafe { sys::bpf_prog_test_run_opts(self.as_raw_fd(), &mut opts) };
        if result < 0 {
            Err(Errno(-result))
        } else {
            Ok(opts.retval)
        }
    }
}

impl AsFd for Prog {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Prog {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Elements of some 64-bit words each, by number.
#[derive(Debug)]
pub struct Map {
    fd: OwnedFd,
    elements: u32,
    words: usize,
}

/// Name of every [`Map`], to count them by.
const MAP_NAME: &CStr = c"kvm_bpf_test";
/// The maps of those of `samples/devices` that tests load, and of one of `selftests/progs`.
const SAMPLE_MAP_NAMES: [&CStr; 13] = [
    c".data.page",
    c"clock",
    c"pl031",
    c"locks",
    c"alarms",
    c"alarm_irqs",
    c"perf_table",
    c"vcpus",
    c"output",
    c"uart",
    c"lost",
    // Of builder.bpf.c.
    c"builder",
    c"table",
];

/// A map of a kind; `sizes` are those of a key and a value.
fn create_map(kind: u32, sizes: [u32; 2], elements: u32, map_flags: u32) -> OwnedFd {
    let options = sys::bpf_map_create_opts {
        sz: mem::size_of::<sys::bpf_map_create_opts>() as _,
        map_flags,
        ..Default::default()
    };
    // SAFETY: the name is a C string.
    let fd = unsafe {
        sys::bpf_map_create(
            kind,
            MAP_NAME.as_ptr(),
            sizes[0],
            sizes[1],
            elements,
            &options,
        )
    };
    owned(fd).unwrap_or_else(|errno| panic!("BPF_MAP_CREATE: {errno:?}"))
}

impl Map {
    /// An array of `elements` elements of `words` words, all 0.
    pub fn new(elements: u32, words: usize) -> Self {
        Self::of_type(sys::BPF_MAP_TYPE_ARRAY, elements, words)
    }

    /// A hash table of the same elements: where look-ups in an array are a few instructions of
    /// the program's own, those in a hash table are calls that want a read-side section of RCU.
    pub fn hash(elements: u32, words: usize) -> Self {
        let map = Self::of_type(sys::BPF_MAP_TYPE_HASH, elements, words);
        for index in 0..elements {
            map.set(index, &vec![0; words]);
        }
        map
    }

    /// An array with the elements of each CPU.
    pub fn per_cpu(elements: u32, words: usize) -> Self {
        Self::of_type(sys::BPF_MAP_TYPE_PERCPU_ARRAY, elements, words)
    }

    /// An array of programs, for tail calls.
    pub fn of_programs(elements: u32) -> Self {
        // A program takes 4 bytes, which `set()` and `get()` do not know.
        Self::with_value_size(sys::BPF_MAP_TYPE_PROG_ARRAY, elements, 4, 0)
    }

    fn of_type(kind: u32, elements: u32, words: usize) -> Self {
        Self::with_value_size(kind, elements, 8 * words as u32, words)
    }

    /// Memory of so many pages that programs and user space share.
    pub fn arena(pages: u32) -> Self {
        Map {
            fd: create_map(sys::BPF_MAP_TYPE_ARENA, [0, 0], pages, sys::BPF_F_MMAPABLE),
            elements: 0,
            words: 0,
        }
    }

    fn with_value_size(kind: u32, elements: u32, value_size: u32, words: usize) -> Self {
        Map {
            fd: create_map(kind, [4, value_size], elements, 0),
            elements,
            words,
        }
    }

    /// How many elements it has.
    pub fn elements(&self) -> u32 {
        self.elements
    }

    /// An element's words.
    pub fn get(&self, index: u32) -> Vec<u64> {
        let mut words = vec![0_u64; self.words];
        // SAFETY: the key is 4 bytes, the buffer as large as an element.
        let result = unsafe {
            sys::bpf_map_lookup_elem(
                self.fd.as_raw_fd(),
                (&raw const index).cast::<c_void>(),
                words.as_mut_ptr().cast::<c_void>(),
            )
        };
        assert_eq!(result, 0, "BPF_MAP_LOOKUP_ELEM of element {index}");
        words
    }

    /// Puts a program into an array of programs.
    pub fn set_program(&self, index: u32, program: impl AsRawFd) -> Result<(), Errno> {
        let fd = program.as_raw_fd();
        // SAFETY: the key and the value have 4 bytes.
        let result = unsafe {
            sys::bpf_map_update_elem(
                self.fd.as_raw_fd(),
                (&raw const index).cast::<c_void>(),
                (&raw const fd).cast::<c_void>(),
                0,
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(Errno(-result))
        }
    }

    /// Overwrites an element.
    pub fn set(&self, index: u32, words: &[u64]) {
        assert_eq!(words.len(), self.words, "words of an element");
        // SAFETY: the key is 4 bytes, the buffer as large as an element.
        let result = unsafe {
            sys::bpf_map_update_elem(
                self.fd.as_raw_fd(),
                (&raw const index).cast::<c_void>(),
                words.as_ptr().cast::<c_void>(),
                0,
            )
        };
        assert_eq!(result, 0, "BPF_MAP_UPDATE_ELEM of element {index}");
    }
}

impl AsRawFd for Map {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

fn owned(fd: c_int) -> Result<OwnedFd, Errno> {
    if fd < 0 {
        return Err(Errno(-fd));
    }
    // SAFETY: the kernel just gave us this fd.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `BPF_{PROG,MAP}_GET_NEXT_ID`.
type NextId = unsafe extern "C" fn(u32, *mut u32) -> c_int;
/// `BPF_{PROG,MAP}_GET_FD_BY_ID`.
type FdById = unsafe extern "C" fn(u32) -> c_int;

/// The ids of those of the kernel's objects that the closure accepts.
fn objects(next_id: NextId, fd_by_id: FdById, accept: impl Fn(RawFd) -> bool) -> HashSet<u32> {
    let mut id = 0;
    let mut ids = HashSet::new();
    // SAFETY: `id` is a local.
    while unsafe { next_id(id, &mut id) } == 0 {
        // SAFETY: no pointers.  An object may be gone by now: then there is no fd.
        let fd = unsafe { fd_by_id(id) };
        if owned(fd).is_ok_and(|fd| accept(fd.as_raw_fd())) {
            ids.insert(id);
        }
    }
    ids
}

/// Which programs of the KVM types and which maps of the tests the kernel has.
///
/// Ids tell better than numbers: the kernel may still be freeing those of an earlier test.
#[derive(Debug)]
pub struct Census {
    programs: HashSet<u32>,
    maps: HashSet<u32>,
}

impl Census {
    /// Those of this moment.
    pub fn now() -> Self {
        Census {
            programs: objects(
                sys::bpf_prog_get_next_id,
                sys::bpf_prog_get_fd_by_id,
                |fd| {
                    let kinds = [ProgType::READ, ProgType::WRITE, ProgType::WORK];
                    kinds.contains(&program_type(fd))
                },
            ),
            maps: objects(
                sys::bpf_map_get_next_id,
                sys::bpf_map_get_fd_by_id,
                is_map_of_the_tests,
            ),
        }
    }

    /// How many programs and maps there are that were not then.
    pub fn newer(&self) -> (usize, usize) {
        let now = Self::now();
        (
            now.programs.difference(&self.programs).count(),
            now.maps.difference(&self.maps).count(),
        )
    }

    /// Waits until there are so many newer programs and maps.
    #[track_caller]
    pub fn wait_for_newer(&self, programs: usize, maps: usize) {
        wait_for("programs and maps of this test", (programs, maps), || {
            self.newer()
        });
    }
}

fn is_map_of_the_tests(fd: RawFd) -> bool {
    let mut info = sys::bpf_map_info::default();
    let mut size = mem::size_of_val(&info) as u32;
    // SAFETY: `info` is as large as `size` says and holds no pointers.
    let result = unsafe { sys::bpf_map_get_info_by_fd(fd, &mut info, &mut size) };
    // SAFETY: the kernel ends the name with a NUL.
    let name = unsafe { CStr::from_ptr(info.name.as_ptr()) };
    result == 0 && (name == MAP_NAME || SAMPLE_MAP_NAMES.contains(&name))
}

fn program_info(fd: RawFd) -> sys::bpf_prog_info {
    let mut info = sys::bpf_prog_info::default();
    let mut size = mem::size_of_val(&info) as u32;
    // SAFETY: `info` is as large as `size` says and holds no pointers.
    let result = unsafe { sys::bpf_prog_get_info_by_fd(fd, &mut info, &mut size) };
    assert_eq!(result, 0, "BPF_OBJ_GET_INFO_BY_FD of a program");
    info
}

/// The type of the program behind an fd, as tools see it.
pub fn program_type(fd: RawFd) -> ProgType {
    ProgType(program_info(fd).type_)
}

/// Has the kernel count how often programs run, as long as this is there.
#[derive(Debug)]
pub struct RunCounts(#[allow(dead_code)] OwnedFd);

impl RunCounts {
    /// Counts from now on.
    pub fn start() -> Self {
        // SAFETY: makes a file descriptor, which is ours.
        let fd = unsafe { sys::bpf_enable_stats(sys::BPF_STATS_RUN_TIME) };
        assert!(fd >= 0, "BPF_ENABLE_STATS: {:?}", Errno(-fd));
        // SAFETY: as above.
        RunCounts(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// How often a program has run while there was one of these.
    pub fn of(&self, program: impl AsRawFd) -> u64 {
        program_info(program.as_raw_fd()).run_cnt
    }
}

/// The number by which tools know it.
pub fn program_id(fd: RawFd) -> u32 {
    program_info(fd).id
}

/// The hash of its instructions by which tools know it.
pub fn program_tag(fd: RawFd) -> [u8; 8] {
    program_info(fd).tag
}

#[cfg(test)]
mod tests {
    use super::*;
    use Reg::{R1, R2};

    /// By the tables of the instruction set's specification.
    #[test]
    fn encodings() {
        let bytes = |insn: Insn| {
            let mut bytes = [0; 8];
            bytes[0] = insn.code;
            bytes[1] = insn.registers;
            bytes[2..4].copy_from_slice(&insn.off.to_le_bytes());
            bytes[4..].copy_from_slice(&insn.imm.to_le_bytes());
            bytes
        };
        let cases = [
            (load(1, R2, R1, 3), [0x71, 0x12, 3, 0, 0, 0, 0, 0]),
            (load(2, R2, R1, 3), [0x69, 0x12, 3, 0, 0, 0, 0, 0]),
            (load(4, R2, R1, 3), [0x61, 0x12, 3, 0, 0, 0, 0, 0]),
            (load(8, R2, R1, 3), [0x79, 0x12, 3, 0, 0, 0, 0, 0]),
            (load_signed(1, R2, R1, 0), [0x91, 0x12, 0, 0, 0, 0, 0, 0]),
            (load_signed(4, R2, R1, 0), [0x81, 0x12, 0, 0, 0, 0, 0, 0]),
            (store(8, R1, -8, R2), [0x7b, 0x21, 0xf8, 0xff, 0, 0, 0, 0]),
            (
                store_imm(1, R1, 0, -1),
                [0x72, 1, 0, 0, 0xff, 0xff, 0xff, 0xff],
            ),
            (store_imm(8, R1, 0, 1), [0x7a, 1, 0, 0, 1, 0, 0, 0]),
            (atomic_add(4, R1, 0, R2), [0xc3, 0x21, 0, 0, 0, 0, 0, 0]),
            (atomic_add(8, R1, 0, R2), [0xdb, 0x21, 0, 0, 0, 0, 0, 0]),
            (
                atomic(Atomic::CompareExchange, 8, R1, 0, R2),
                [0xdb, 0x21, 0, 0, 0xf1, 0, 0, 0],
            ),
            (
                atomic(Atomic::LoadAcquire, 1, R2, 3, R1),
                [0xd3, 0x12, 3, 0, 0, 1, 0, 0],
            ),
            (
                atomic(Atomic::StoreRelease, 2, R1, 3, R2),
                [0xcb, 0x21, 3, 0, 0x10, 1, 0, 0],
            ),
            (mov(R2, R1), [0xbf, 0x12, 0, 0, 0, 0, 0, 0]),
            (mov_signed32(R2, R1), [0xbf, 0x12, 32, 0, 0, 0, 0, 0]),
            (exit(), [0x95, 0, 0, 0, 0, 0, 0, 0]),
        ];
        for (insn, wanted) in cases {
            assert_eq!(bytes(insn), wanted, "{insn:?}");
        }
    }
}
