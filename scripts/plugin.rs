// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A plugin of QEMU's translator: counts what the emulated machine executes, or what it stores.
//!
//! Built by `scripts/cost` with rustc alone. `kvm-bpf-bench --profile` and `--shared` tell it
//! with instructions of their own ([`Marker`]) when to begin and to end.
//!
//! Arguments: `out=FILE`, and `stores=on` to look at stores instead of at instructions. The file
//! has lines "insn ADDRESS COUNT COUNT", or "store CPU LINE ADDRESS BY COUNT COUNT": a line of 64
//! bytes of physical memory, an address in it, the address of the instruction that wrote there;
//! the counts are those of the two phases. Numbers are hexadecimal but for counts.
//!
//! The functions of QEMU's are those of its qemu-plugin.h, of interface versions 2 to 4.

#![deny(unsafe_op_in_unsafe_fn)]
// The interface is QEMU's.
#![allow(non_upper_case_globals)]

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::fmt::Write as _;
use std::fs;
use std::ptr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{LazyLock, Mutex, OnceLock};

type Id = u64;
/// `enum qemu_plugin_cb_flags`: callbacks read no registers.
const CB_NO_REGS: c_int = 0;
/// `enum qemu_plugin_mem_rw`.
const MEM_W: c_int = 2;

/// `struct qemu_info_t`, the part that is used.
#[repr(C)]
pub struct Info {
    target_name: *const c_char,
    version_min: c_int,
    version_cur: c_int,
}

#[repr(C)]
pub struct Tb([u8; 0]);
#[repr(C)]
pub struct Insn([u8; 0]);
#[repr(C)]
pub struct Hwaddr([u8; 0]);

unsafe extern "C" {
    fn qemu_plugin_register_vcpu_tb_trans_cb(id: Id, cb: extern "C" fn(Id, *mut Tb));
    fn qemu_plugin_register_atexit_cb(
        id: Id,
        cb: extern "C" fn(Id, *mut c_void),
        data: *mut c_void,
    );
    fn qemu_plugin_reset(id: Id, cb: extern "C" fn(Id));
    fn qemu_plugin_tb_n_insns(tb: *const Tb) -> usize;
    fn qemu_plugin_tb_get_insn(tb: *const Tb, index: usize) -> *mut Insn;
    fn qemu_plugin_insn_vaddr(insn: *const Insn) -> u64;
    fn qemu_plugin_insn_size(insn: *const Insn) -> usize;
    fn qemu_plugin_register_vcpu_insn_exec_cb(
        insn: *mut Insn,
        cb: extern "C" fn(c_uint, *mut c_void),
        flags: c_int,
        data: *mut c_void,
    );
    fn qemu_plugin_register_vcpu_mem_cb(
        insn: *mut Insn,
        cb: extern "C" fn(c_uint, u32, u64, *mut c_void),
        flags: c_int,
        rw: c_int,
        data: *mut c_void,
    );
    fn qemu_plugin_get_hwaddr(info: u32, vaddr: u64) -> *mut Hwaddr;
    fn qemu_plugin_hwaddr_phys_addr(addr: *const Hwaddr) -> u64;
    fn qemu_plugin_hwaddr_is_io(addr: *const Hwaddr) -> bool;
    fn qemu_plugin_outs(text: *const c_char);
    /// Takes two more arguments, and returns nothing of interest, from version 3 on.
    fn qemu_plugin_insn_data(insn: *const Insn, dest: *mut c_void, len: usize) -> *const c_void;
}

/// The oldest version that has all of these.
#[unsafe(no_mangle)]
pub static qemu_plugin_version: c_int = 2;

/// The instructions of `selftests/src/marker.rs`.
#[derive(Clone, Copy, PartialEq)]
enum Marker {
    Watch,
    First,
    Second,
    End,
}

const MARKERS: [Marker; 4] = [Marker::Watch, Marker::First, Marker::Second, Marker::End];

impl Marker {
    fn of(arm: bool, bytes: &[u8]) -> Option<Self> {
        MARKERS.into_iter().zip(0_u32..).find_map(|(marker, n)| {
            let is_it = if arm {
                // movz xzr, 0x4b40 + n
                bytes == (0xd280_001f | (0x4b40 + n) << 5).to_le_bytes()
            } else {
                // nop dword ptr [rax + 0x4b425040 + n]
                bytes.starts_with(&[0x0f, 0x1f, 0x80])
                    && bytes[3..] == (0x4b42_5040 + n).to_le_bytes()
            };
            is_it.then_some(marker)
        })
    }
}

/// How often in each phase.
type Counts = [AtomicU64; 2];

struct Plugin {
    out: String,
    stores: bool,
    arm: bool,
    interface: c_int,
}

static PLUGIN: OnceLock<Plugin> = OnceLock::new();
/// 0 and 1 while one of the phases runs.
static PHASE: AtomicUsize = AtomicUsize::new(usize::MAX);
/// Whether code that is translated from now on is looked at.
static WATCHING: AtomicUsize = AtomicUsize::new(0);
static OWN_ID: AtomicU64 = AtomicU64::new(0);
/// How often the instruction at an address was executed. Code keeps the references.
static EXECUTED: LazyLock<Mutex<HashMap<u64, &'static Counts>>> = LazyLock::new(Mutex::default);
/// The same of stores, by CPU, line, address and instruction.
static STORED: LazyLock<Mutex<HashMap<Store, [u64; 2]>>> = LazyLock::new(Mutex::default);

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Store {
    cpu: c_uint,
    line: u64,
    addr: u64,
    by: u64,
}

fn plugin() -> &'static Plugin {
    PLUGIN.get().expect("set when the plugin is installed")
}

fn say(text: &str) {
    let text = CString::new(format!("plugin: {text}\n")).expect("no NUL");
    // SAFETY: a C string.
    unsafe { qemu_plugin_outs(text.as_ptr()) };
}

/// # Safety
///
/// The translator's own, as long as it translates.
unsafe fn bytes_of(insn: *const Insn) -> Vec<u8> {
    // SAFETY: the caller's promise.
    let size = unsafe { qemu_plugin_insn_size(insn) };
    let mut bytes = vec![0; size];
    // SAFETY: the buffer is as large as the call says; older versions take no buffer and return a
    // pointer to as many bytes.
    unsafe {
        let data = qemu_plugin_insn_data(insn, bytes.as_mut_ptr().cast(), size);
        if plugin().interface < 3 {
            ptr::copy_nonoverlapping(data.cast(), bytes.as_mut_ptr(), size);
        }
    }
    bytes
}

extern "C" fn translated(_id: Id, tb: *mut Tb) {
    let plugin = plugin();
    let watching = WATCHING.load(Relaxed) != 0;
    // SAFETY: QEMU's, during this call.
    let insns = unsafe { qemu_plugin_tb_n_insns(tb) };
    for index in 0..insns {
        // SAFETY: the index is below the number.
        let insn = unsafe { qemu_plugin_tb_get_insn(tb, index) };
        // SAFETY: as for the instruction.
        let (vaddr, size) = unsafe { (qemu_plugin_insn_vaddr(insn), qemu_plugin_insn_size(insn)) };
        let wanted = if plugin.arm { 4 } else { 7 };
        if size == wanted {
            // SAFETY: as for the instruction.
            let marker = Marker::of(plugin.arm, &unsafe { bytes_of(insn) });
            if let Some(marker) = marker {
                // SAFETY: the callback takes a number for data.
                unsafe {
                    qemu_plugin_register_vcpu_insn_exec_cb(
                        insn,
                        marked,
                        CB_NO_REGS,
                        marker as usize as *mut c_void,
                    );
                }
            }
        }
        if !watching {
            continue;
        }
        if plugin.stores {
            // SAFETY: as above.
            unsafe {
                qemu_plugin_register_vcpu_mem_cb(
                    insn,
                    stored,
                    CB_NO_REGS,
                    MEM_W,
                    vaddr as *mut c_void,
                );
            }
        } else {
            let mut all = EXECUTED.lock().expect("the counts");
            let counts: &'static Counts = all
                .entry(vaddr)
                .or_insert_with(|| Box::leak(Box::default()));
            // SAFETY: the counts stay for ever.
            unsafe {
                qemu_plugin_register_vcpu_insn_exec_cb(
                    insn,
                    executed,
                    CB_NO_REGS,
                    (&raw const *counts).cast_mut().cast(),
                );
            }
        }
    }
}

extern "C" fn executed(_cpu: c_uint, counts: *mut c_void) {
    // SAFETY: that is what `translated` registers, and they are never freed.
    let counts: &Counts = unsafe { &*counts.cast_const().cast() };
    if let Some(count) = counts.get(PHASE.load(Relaxed)) {
        count.fetch_add(1, Relaxed);
    }
}

extern "C" fn stored(cpu: c_uint, info: u32, vaddr: u64, by: *mut c_void) {
    let phase = PHASE.load(Relaxed);
    if phase > 1 {
        return;
    }
    // SAFETY: called in the callback that was given `info`.
    let addr = unsafe { qemu_plugin_get_hwaddr(info, vaddr) };
    if addr.is_null() {
        return;
    }
    // SAFETY: not null, and used before the callback returns.
    let (phys, io) = unsafe {
        (
            qemu_plugin_hwaddr_phys_addr(addr),
            qemu_plugin_hwaddr_is_io(addr),
        )
    };
    if io {
        return;
    }
    let store = Store {
        cpu,
        line: phys >> 6,
        addr: vaddr,
        by: by as u64,
    };
    STORED.lock().expect("the stores").entry(store).or_default()[phase] += 1;
}

extern "C" fn marked(_cpu: c_uint, marker: *mut c_void) {
    match MARKERS[marker as usize] {
        Marker::Watch => {
            WATCHING.store(1, Relaxed);
            // SAFETY: the id is ours. QEMU forgets all that it has translated, and calls back.
            unsafe { qemu_plugin_reset(OWN_ID.load(Relaxed), start) };
        }
        Marker::First => PHASE.store(0, Relaxed),
        Marker::Second => PHASE.store(1, Relaxed),
        Marker::End => {
            PHASE.store(usize::MAX, Relaxed);
            say(&match write_down() {
                Ok(()) => format!("counts are in {}", plugin().out),
                Err(error) => format!("{}: {error}", plugin().out),
            });
        }
    }
}

fn write_down() -> std::io::Result<()> {
    let mut text = String::new();
    for (vaddr, counts) in &*EXECUTED.lock().expect("the counts") {
        let [first, second] = counts.each_ref().map(|count| count.load(Relaxed));
        if first + second > 0 {
            writeln!(text, "insn {vaddr:x} {first} {second}").expect("no error in memory");
        }
    }
    for (store, [first, second]) in &*STORED.lock().expect("the stores") {
        let Store {
            cpu,
            line,
            addr,
            by,
        } = store;
        writeln!(
            text,
            "store {cpu} {line:x} {addr:x} {by:x} {first} {second}"
        )
        .expect("no error in memory");
    }
    fs::write(&plugin().out, text)
}

extern "C" fn start(id: Id) {
    // SAFETY: the id is ours, the function of the type that is wanted.
    unsafe { qemu_plugin_register_vcpu_tb_trans_cb(id, translated) };
}

extern "C" fn at_exit(_id: Id, _data: *mut c_void) {
    if WATCHING.load(Relaxed) == 0 {
        say("nothing was marked");
    }
}

/// # Safety
///
/// QEMU's only.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qemu_plugin_install(
    id: Id,
    info: *const Info,
    argc: c_int,
    argv: *const *const c_char,
) -> c_int {
    let mut plugin = Plugin {
        out: String::new(),
        stores: false,
        // SAFETY: QEMU's structure, with a C string.
        arm: unsafe { CStr::from_ptr((*info).target_name) } == c"aarch64",
        // SAFETY: as above.
        interface: unsafe { (*info).version_cur },
    };
    for index in 0..argc as usize {
        // SAFETY: there are `argc` C strings.
        let arg = unsafe { CStr::from_ptr(*argv.add(index)) }.to_string_lossy();
        match arg.split_once('=') {
            Some(("out", file)) => plugin.out = file.to_string(),
            Some(("stores", value)) => plugin.stores = value == "on",
            _ => {
                eprintln!("plugin: what is '{arg}'?");
                return -1;
            }
        }
    }
    if plugin.out.is_empty() {
        eprintln!("plugin: out=FILE, please");
        return -1;
    }
    if PLUGIN.set(plugin).is_err() {
        return -1;
    }
    OWN_ID.store(id, Relaxed);
    start(id);
    // SAFETY: the id is ours, the function of the type that is wanted.
    unsafe { qemu_plugin_register_atexit_cb(id, at_exit, ptr::null_mut()) };
    0
}
