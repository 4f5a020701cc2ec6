// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What bpf(2) tells of programs and maps, and how often a program handled an access.

use std::ffi::{CStr, c_char, c_void};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::{io, ptr};

use libbpf_rs::btf::types::Func;
use libbpf_rs::btf::{Btf, TypeId};
use libbpf_rs::query::{ProgInfoIter, ProgInfoQueryOptions, ProgramInfo};
use libbpf_rs::{MapCore, MapFlags, MapHandle, MapType, Program as BpfProgram, libbpf_sys as sys};

/// What the kernel has to say of a program.
#[derive(Debug)]
pub struct Program {
    /// Its function's name.
    pub name: String,
    pub map_ids: Vec<u32>,
    /// How often it ran and for how long, since somebody had the kernel count it.
    pub run_cnt: u64,
    pub run_time_ns: u64,
    id: u32,
    /// The type of its function.
    function: u32,
}

impl Program {
    /// All that the kernel has of these numbers.
    pub fn with_ids(ids: &[u32]) -> Vec<Self> {
        let options = ProgInfoQueryOptions::default()
            .include_func_info(true)
            .include_map_ids(true);
        ProgInfoIter::with_query_opts(options)
            .filter(|info| ids.contains(&info.id))
            .map(|info| Program::new(&info))
            .collect()
    }

    fn new(info: &ProgramInfo) -> Self {
        let function = info
            .func_info
            .first()
            .map_or(0, |function| function.type_id);
        // The kernel keeps 15 characters of a program's name, and all of a function's.
        let full = Btf::from_prog_id(info.id).ok().and_then(|btf| {
            let function: Func<'_> = btf.type_by_id(TypeId::from(function))?;
            Some(function.name()?.to_string_lossy().into_owned())
        });
        Program {
            name: full.unwrap_or_else(|| info.name.to_string_lossy().into_owned()),
            map_ids: info.map_ids.clone(),
            run_cnt: info.run_cnt,
            run_time_ns: info.run_time_ns,
            id: info.id,
            function,
        }
    }

    /// Whether it has come with BTF, which says what can be attached to it.
    pub fn has_types(&self) -> bool {
        self.function != 0
    }

    pub fn id(&self) -> u32 {
        self.id
    }
}

/// How often a program returned 0, and how often something else, from the time when this is made.
///
/// Of an access that is whether it was handled; a program without one returns 1 to be run again.
#[derive(Debug)]
pub struct Counter {
    counts: MapHandle,
    _link: OwnedFd,
}

impl Counter {
    /// Has a program of its own count the results of a program.
    pub fn new(program: &Program) -> io::Result<Self> {
        let target = BpfProgram::fd_from_id(program.id).map_err(io::Error::other)?;
        let options = sys::bpf_map_create_opts {
            sz: size_of::<sys::bpf_map_create_opts>() as sys::size_t,
            ..Default::default()
        };
        let counts = MapHandle::create(MapType::Array, Some("kvm_bpf_counts"), 4, 8, 2, &options)
            .map_err(io::Error::other)?;
        let counter = load_counter(&counts, target.as_fd(), program.function)?;
        // SAFETY: a tracing program knows what it is attached to.
        let link =
            owned(unsafe { sys::bpf_raw_tracepoint_open(ptr::null(), counter.as_raw_fd()) })?;
        Ok(Counter {
            counts,
            _link: link,
        })
    }

    /// How often it returned 0, and how often something else.
    pub fn get(&self) -> io::Result<[u64; 2]> {
        let count = |index: u32| {
            let value = self.counts.lookup(&index.to_ne_bytes(), MapFlags::ANY);
            let value = value.map_err(io::Error::other)?.unwrap_or_default();
            let bytes = value.try_into().map_err(|_| io::ErrorKind::InvalidData)?;
            Ok::<u64, io::Error>(u64::from_ne_bytes(bytes))
        };
        Ok([count(0)?, count(1)?])
    }
}

fn owned(fd: i32) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::from_raw_os_error(-fd));
    }
    // SAFETY: the kernel has just given it to us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Loads a program that runs when `target` has run, and counts by whether its result is 0.
fn load_counter(counts: &MapHandle, target: BorrowedFd<'_>, function: u32) -> io::Result<OwnedFd> {
    const R0: u8 = 0;
    const R1: u8 = 1;
    const R2: u8 = 2;
    const R10: u8 = 10;
    let insn = |code: u32, dst: u8, src: u32, off: i16, imm: i32| {
        let mut insn = sys::bpf_insn {
            code: code as u8,
            off,
            imm,
            ..Default::default()
        };
        insn.set_dst_reg(dst);
        insn.set_src_reg(src as u8);
        insn
    };
    let map = counts.as_fd().as_raw_fd();
    let insns = [
        // Behind the target's one argument is its result.
        insn(
            sys::BPF_LDX | sys::BPF_MEM | sys::BPF_DW,
            R1,
            R1.into(),
            8,
            0,
        ),
        insn(
            sys::BPF_ALU | sys::BPF_MOV | sys::BPF_X,
            R1,
            R1.into(),
            0,
            0,
        ),
        insn(sys::BPF_ST | sys::BPF_MEM | sys::BPF_W, R10, 0, -4, 0),
        insn(sys::BPF_JMP | sys::BPF_JEQ | sys::BPF_K, R1, 0, 1, 0),
        insn(sys::BPF_ST | sys::BPF_MEM | sys::BPF_W, R10, 0, -4, 1),
        insn(
            sys::BPF_LD | sys::BPF_IMM | sys::BPF_DW,
            R1,
            sys::BPF_PSEUDO_MAP_FD,
            0,
            map,
        ),
        insn(0, 0, 0, 0, 0),
        insn(
            sys::BPF_ALU64 | sys::BPF_MOV | sys::BPF_X,
            R2,
            R10.into(),
            0,
            0,
        ),
        insn(sys::BPF_ALU64 | sys::BPF_ADD | sys::BPF_K, R2, 0, 0, -4),
        insn(
            sys::BPF_JMP | sys::BPF_CALL,
            0,
            0,
            0,
            sys::BPF_FUNC_map_lookup_elem as i32,
        ),
        insn(sys::BPF_JMP | sys::BPF_JEQ | sys::BPF_K, R0, 0, 2, 0),
        insn(sys::BPF_ALU64 | sys::BPF_MOV | sys::BPF_K, R1, 0, 0, 1),
        // An atomic addition: vCPUs run the target side by side.
        insn(
            sys::BPF_STX | sys::BPF_ATOMIC | sys::BPF_DW,
            R0,
            R1.into(),
            0,
            sys::BPF_ADD as i32,
        ),
        insn(sys::BPF_ALU64 | sys::BPF_MOV | sys::BPF_K, R0, 0, 0, 0),
        insn(sys::BPF_JMP | sys::BPF_EXIT, 0, 0, 0, 0),
    ];
    let mut options = sys::bpf_prog_load_opts {
        sz: size_of::<sys::bpf_prog_load_opts>() as sys::size_t,
        expected_attach_type: sys::BPF_TRACE_FEXIT,
        attach_prog_fd: target.as_raw_fd() as u32,
        attach_btf_id: function,
        ..Default::default()
    };
    let name: &CStr = c"kvm_bpf_count";
    let license: &CStr = c"Dual BSD/GPL";
    // SAFETY: all pointers are to what lives until the call returns.
    owned(unsafe {
        sys::bpf_prog_load(
            sys::BPF_PROG_TYPE_TRACING,
            name.as_ptr(),
            license.as_ptr(),
            insns.as_ptr(),
            insns.len() as sys::size_t,
            &mut options,
        )
    })
}

/// A map of a program.
#[derive(Debug)]
pub struct Map {
    handle: MapHandle,
    info: libbpf_rs::MapInfo,
}

impl Map {
    pub fn with_id(id: u32) -> io::Result<Self> {
        let handle = MapHandle::from_map_id(id).map_err(io::Error::other)?;
        let info = handle.info().map_err(io::Error::other)?;
        Ok(Map { handle, info })
    }

    /// Its name and what it is.
    pub fn describe(&self) -> String {
        let info = &self.info.info;
        format!(
            "{} (map {}, {:?}): {} of {} bytes",
            self.handle.name().to_string_lossy(),
            info.id,
            self.handle.map_type(),
            info.max_entries,
            info.value_size
        )
    }

    /// Its first entries, in the words of the program's source: of arrays and hash tables whose
    /// types the program has brought along.
    pub fn entries(&self, most: u32) -> io::Result<Vec<String>> {
        let info = &self.info.info;
        let is_array = match self.handle.map_type() {
            MapType::Array => true,
            MapType::Hash | MapType::LruHash => false,
            _ => return Ok(Vec::new()),
        };
        if info.btf_id == 0 {
            return Ok(Vec::new());
        }
        let btf = Types::of_map(info.btf_id)?;
        let value = |key: &[u8]| {
            let bytes = self.handle.lookup(key, MapFlags::ANY);
            // An entry of a hash table may be gone by now.
            let bytes = bytes.map_err(io::Error::other)?;
            let dumped = bytes.map(|bytes| dump(&btf, info.btf_value_type_id, &bytes));
            dumped.transpose()
        };
        if is_array {
            let entries = (0..info.max_entries.min(most)).map(|index| {
                let value = value(&index.to_ne_bytes())?.unwrap_or_default();
                Ok(format!("{index}: {value}"))
            });
            return entries.collect();
        }
        let entries = self.handle.keys().take(most as usize).filter_map(|key| {
            let entry = dump(&btf, info.btf_key_type_id, &key)
                .and_then(|words| Ok(value(&key)?.map(|value| format!("{words}: {value}"))));
            entry.transpose()
        });
        entries.collect()
    }
}

/// Types that a program has brought along.
struct Types(*mut sys::btf);

impl Types {
    fn of_map(id: u32) -> io::Result<Self> {
        // SAFETY: a number.
        let btf = unsafe { sys::btf__load_from_kernel_by_id(id) };
        if btf.is_null() {
            return Err(io::Error::last_os_error());
        }
        Ok(Types(btf))
    }
}

impl Drop for Types {
    fn drop(&mut self) {
        // SAFETY: it is ours, and nobody uses it any more.
        unsafe { sys::btf__free(self.0) };
    }
}

/// What libbpf calls to print, with the list of arguments as a pointer: its type in the bindings
/// is not the same on all architectures, and is passed as one on those of ours.
type Print = unsafe extern "C" fn(*mut c_void, *const c_char, *mut c_void);

/// libbpf's text for bytes of a type.
fn dump(btf: &Types, ty: u32, bytes: &[u8]) -> io::Result<String> {
    unsafe extern "C" fn append(text: *mut c_void, format: *const c_char, args: *mut c_void) {
        // SAFETY: `text` is what `btf_dump__new()` was given; libbpf's format fits its arguments.
        unsafe {
            if let Ok(more) = vsprintf::vsprintf(format, args) {
                (*text.cast::<String>()).push_str(&more);
            }
        }
    }

    let mut text = String::new();
    // SAFETY: only the type of the last argument differs, which is passed the same.
    let append =
        unsafe { std::mem::transmute::<Print, sys::btf_dump_printf_fn_t>(append as Print) };
    // SAFETY: `text` outlives what this returns.
    let dump = unsafe { sys::btf_dump__new(btf.0, append, (&raw mut text).cast(), ptr::null()) };
    if dump.is_null() {
        return Err(io::Error::last_os_error());
    }
    let options = sys::btf_dump_type_data_opts {
        sz: size_of::<sys::btf_dump_type_data_opts>() as sys::size_t,
        compact: true,
        ..Default::default()
    };
    // SAFETY: `bytes` lives; libbpf reads no more of it.
    let result = unsafe {
        sys::btf_dump__dump_type_data(
            dump,
            ty,
            bytes.as_ptr().cast(),
            bytes.len() as sys::size_t,
            &options,
        )
    };
    // SAFETY: it is ours.
    unsafe { sys::btf_dump__free(dump) };
    match result {
        0.. => Ok(text),
        errno => Err(io::Error::from_raw_os_error(-errno)),
    }
}
