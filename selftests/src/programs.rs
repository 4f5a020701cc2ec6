// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Device programs that several tests share.

use std::env;
use std::path::{Path, PathBuf};

use kvm_bpf::{Device, ImageDevice, OpenImage, Place, Programs};
use kvm_ioctls::VmFd;
use libbpf_rs::libbpf_sys as sys;

use crate::bpf::{
    Index, Insn, Map, Prog, ProgType, Reg, add_imm, atomic_add, call_helper, exit, jump_if_ne,
    load, lookup, mov, mov_imm, mov_imm64, store,
};
use Reg::{R0, R1, R6, R7};

/// `offsetof(struct bpf_kvm_io_ctx, buf)`.
pub const CTX_BUF: i16 = 0;
/// `offsetof(struct bpf_kvm_io_ctx, offset)`.
pub const CTX_OFFSET: i16 = 8;
/// `offsetof(struct bpf_kvm_io_ctx, len)`.
pub const CTX_LEN: i16 = 16;
/// `offsetof(struct bpf_kvm_io_ctx, vcpu_id)`.
pub const CTX_VCPU_ID: i16 = 20;
/// `offsetof(struct bpf_kvm_io_ctx, region)`.
pub const CTX_REGION: i16 = 24;
/// `sizeof(struct bpf_kvm_io_ctx)`.
pub const CTX_SIZE: i16 = 32;

/// A program that counts itself in a map when it starts and, behind that, when it ends, and works for
/// so many rounds between.
pub fn slow_insns(counts: &Map, rounds: i32) -> Vec<Insn> {
    // What takes long, for how little the verifier has to follow and remember.
    const ROUND: [Insn; 20] = [call_helper(sys::BPF_FUNC_ktime_get_ns); 20];

    let mut insns = lookup(counts, Index::Imm(0));
    insns.extend([
        mov(R7, R0),
        mov_imm(R1, 1),
        atomic_add(8, R7, 0, R1),
        mov_imm(R6, rounds),
    ]);
    insns.extend(ROUND);
    insns.extend([
        add_imm(R6, -1),
        jump_if_ne(R6, 0, -2 - ROUND.len() as i16),
        mov_imm(R1, 1),
        atomic_add(8, R7, 8, R1),
    ]);
    insns.extend(ret(0));
    insns
}

/// A device of `samples/devices`; `KVM_BPF_DEVICES` tells where, `/devices` if not set.
#[track_caller]
pub fn sample(name: &str) -> OpenImage {
    open(&sample_path(name))
}

/// A device of `selftests/progs`; `KVM_BPF_PROGS` tells where, `/progs` if not set.
#[track_caller]
pub fn test_image(name: &str) -> OpenImage {
    open(&test_path(name))
}

/// Loads what must load.
#[track_caller]
pub fn loaded(image: OpenImage) -> Programs {
    image
        .load()
        .unwrap_or_else(|error| panic!("wanted the device to load, got {error:#?}"))
}

/// A device whose programs need nothing more than to be loaded.
#[track_caller]
pub fn plug(vm: &VmFd, addr: u64, image: OpenImage) -> ImageDevice {
    let device = Device::new(vm).expect("KVM_CREATE_DEVICE");
    ImageDevice::builder(device, loaded(image))
        .plug(Place::Memory(addr))
        .unwrap_or_else(|error| panic!("wanted the region to be set, got {error:#?}"))
}

/// The file of a device of `samples/devices`.
pub fn sample_path(name: &str) -> PathBuf {
    path("KVM_BPF_DEVICES", "/devices", name)
}

/// The file of a program of `selftests/progs`, or of the kernel's own.
pub fn test_path(name: &str) -> PathBuf {
    path("KVM_BPF_PROGS", "/progs", name)
}

fn path(variable: &str, default: &str, name: &str) -> PathBuf {
    let directory = env::var_os(variable).map_or_else(|| default.into(), PathBuf::from);
    directory.join(Path::new(name).with_extension("bpf.o"))
}

#[track_caller]
fn open(path: &Path) -> OpenImage {
    OpenImage::open_file(path).unwrap_or_else(|error| panic!("{}: {error:#?}", path.display()))
}

/// Returns a value; the end of every program here.
pub fn ret(value: i32) -> [Insn; 2] {
    [mov_imm(R0, value), exit()]
}

/// `*(u64 *)buf = value`, where `r1` is the context.
pub fn answer_insns(value: u64) -> Vec<Insn> {
    let mut insns = mov_imm64(Reg::R2, value).to_vec();
    insns.push(store(8, R1, CTX_BUF, Reg::R2));
    insns.extend(ret(0));
    insns
}

/// A READ program that stores `value`, of which a read takes the low bytes, and returns 0.
pub fn answer(value: u64) -> Prog {
    Prog::load(ProgType::READ, &answer_insns(value))
}

/// A program of either type that does nothing and returns `value`.
pub fn only_return(kind: ProgType, value: i32) -> Prog {
    Prog::load(kind, &ret(value))
}

/// What the programs of a [`Recorder`] saw of the accesses of one length.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// How many there were; the rest tells of the last.
    pub count: u64,
    /// All 8 bytes of `buf`; 0 for reads, which cannot see it.
    pub buf: u64,
    /// `offset`.
    pub offset: u64,
    /// `len`.
    pub len: u64,
    /// `vcpu_id`.
    pub vcpu_id: u64,
}

/// A map in which programs write down what they are told, one [`Record`] per length.
#[derive(Debug)]
pub struct Recorder(Map);

impl Recorder {
    /// With no records.
    pub fn new() -> Self {
        Recorder(Map::new(9, 5))
    }

    /// The record of accesses of a length.
    pub fn of_len(&self, len: usize) -> Record {
        let words = self.0.get(len as u32);
        Record {
            count: words[0],
            buf: words[1],
            offset: words[2],
            len: words[3],
            vcpu_id: words[4],
        }
    }

    /// How many accesses of any length there were.
    pub fn count(&self) -> u64 {
        (0..=8).map(|len| self.of_len(len).count).sum()
    }

    /// A READ program that records, stores `value` and returns `result`.
    pub fn reads(&self, value: u64, result: i32) -> Prog {
        let mut insns = vec![mov(R6, R1)];
        insns.extend(mov_imm64(Reg::R2, value));
        insns.push(store(8, R6, CTX_BUF, Reg::R2));
        insns.extend(self.record());
        insns.extend(ret(result));
        Prog::load(ProgType::READ, &insns)
    }

    /// A WRITE program that records and returns `result`.
    pub fn writes(&self, result: i32) -> Prog {
        Prog::load(ProgType::WRITE, &self.writes_insns(result))
    }

    /// The instructions of [`Self::writes`].
    pub fn writes_insns(&self, result: i32) -> Vec<Insn> {
        let mut insns = vec![mov(R6, R1)];
        insns.extend(self.record());
        insns.extend([load(8, R1, R6, CTX_BUF), store(8, R0, 8, R1)]);
        insns.extend(ret(result));
        insns
    }

    /// Fills the record, all but `buf`; `r6` is the context, `r0` then points to the record.
    fn record(&self) -> Vec<Insn> {
        let mut insns = vec![load(1, R1, R6, CTX_LEN)];
        insns.extend(lookup(&self.0, Index::Reg(R1)));
        insns.extend([
            mov_imm(R1, 1),
            atomic_add(8, R0, 0, R1),
            load(8, R1, R6, CTX_OFFSET),
            store(8, R0, 16, R1),
            load(1, R1, R6, CTX_LEN),
            store(8, R0, 24, R1),
            load(4, R1, R6, CTX_VCPU_ID),
            store(8, R0, 32, R1),
        ]);
        insns
    }
}

impl Default for Recorder {
    fn default() -> Self {
        Self::new()
    }
}
