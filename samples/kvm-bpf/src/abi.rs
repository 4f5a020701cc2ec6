// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The numbers of the device's and the programs' types, which may differ from kernel to kernel.
//!
//! As long as they are not upstream, a kernel may have others than the headers of this library, and
//! give theirs to something else. A kernel tells its own in its BTF, by name.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::uapi::{
    BPF_PROG_TYPE_KVM_IO_READ, BPF_PROG_TYPE_KVM_IO_WORK, BPF_PROG_TYPE_KVM_IO_WRITE,
    KVM_DEV_TYPE_BPF,
};

/// Where a kernel has its BTF, and that of its modules.
const DIRECTORY: &str = "/sys/kernel/btf";
/// The modules that may have what the kernel itself has not.
const MODULES: [&str; 2] = ["kvm", "kvm_bpf"];
/// The most bytes of a file of BTF; that of a kernel has some 7 million.
const MAX_FILE_SIZE: u64 = 64 << 20;

/// Why a kernel's numbers are not known.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The kernel's BTF cannot be read: it has none, or `/sys` is not there.
    #[error("cannot read {}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The error.
        #[source]
        source: io::Error,
    },
    /// What is there is no BTF.
    #[error("damaged BTF: {0}")]
    Damaged(&'static str),
    /// The kernel has types of this kind, but not this one: it is without the series.
    #[error("this kernel knows no {0}: it has no KVM devices made of eBPF programs")]
    Missing(&'static str),
}

/// The numbers of types that the library gives to the kernel.
///
/// [`Abi::default`] has those of the headers that it was made with. A VMM asks the kernel before it
/// goes into its jail, where there is no `/sys`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Abi {
    /// `KVM_DEV_TYPE_BPF` of `enum kvm_device_type`.
    pub device_type: u32,
    /// `BPF_PROG_TYPE_KVM_IO_READ` of `enum bpf_prog_type`.
    pub read_type: u32,
    /// `BPF_PROG_TYPE_KVM_IO_WRITE`.
    pub write_type: u32,
    /// `BPF_PROG_TYPE_KVM_IO_WORK`.
    pub work_type: u32,
}

impl Default for Abi {
    fn default() -> Self {
        Abi {
            device_type: KVM_DEV_TYPE_BPF,
            read_type: BPF_PROG_TYPE_KVM_IO_READ,
            write_type: BPF_PROG_TYPE_KVM_IO_WRITE,
            work_type: BPF_PROG_TYPE_KVM_IO_WORK,
        }
    }
}

impl Abi {
    /// The numbers of the running kernel, from its BTF and that of its modules `kvm` and `kvm_bpf`.
    ///
    /// It takes milliseconds, memory of the size of `/sys/kernel/btf/vmlinux`, and no rights.
    ///
    /// # Errors
    ///
    /// [`Read`](Error::Read): there is no `/sys`, or the kernel has no BTF.
    /// [`Missing`](Error::Missing): the kernel is without the series.
    /// [`Damaged`](Error::Damaged).
    pub fn from_running_kernel() -> Result<Self, Error> {
        Self::from_directory(Path::new(DIRECTORY))
    }

    /// The same, of BTF that is in files of that directory: `vmlinux`, and per module one.
    pub fn from_directory(directory: &Path) -> Result<Self, Error> {
        let read = |file: &str| {
            let mut bytes = Vec::new();
            let path = directory.join(file);
            match File::open(&path)
                .and_then(|file| file.take(MAX_FILE_SIZE).read_to_end(&mut bytes))
            {
                Ok(_) => Ok(bytes),
                Err(source) => Err(Error::Read { path, source }),
            }
        };
        let base = read("vmlinux")?;
        let mut modules = Vec::new();
        for module in MODULES {
            match read(module) {
                Ok(bytes) => modules.push(bytes),
                // It is built in, or not loaded.
                Err(Error::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Self::from_btf(&base, modules.iter().map(Vec::as_slice))
    }

    /// The numbers in a kernel's BTF, and in that of modules, which goes on from the kernel's.
    ///
    /// Where nothing at all tells of `enum kvm_device_type`, as KVM is not loaded yet, the device's
    /// type is the default.
    pub fn from_btf<'a>(
        base: &[u8],
        modules: impl IntoIterator<Item = &'a [u8]>,
    ) -> Result<Self, Error> {
        let base = Btf::new(base, &[])?;
        let mut all = vec![base];
        for module in modules {
            all.push(Btf::new(module, base.strings)?);
        }
        let find = |enumeration: &'static str, name: &'static str| {
            let mut is_there = false;
            for btf in &all {
                let found = btf.enumerator(enumeration, name)?;
                if let Found::Value(value) = found {
                    return Ok(Some(value));
                }
                is_there |= matches!(found, Found::OnlyTheEnum);
            }
            match is_there {
                true => Err(Error::Missing(name)),
                false => Ok(None),
            }
        };
        let program = |name| find("bpf_prog_type", name)?.ok_or(Error::Missing(name));
        let device = find("kvm_device_type", "KVM_DEV_TYPE_BPF")?;
        Ok(Abi {
            device_type: device.unwrap_or(KVM_DEV_TYPE_BPF),
            read_type: program("BPF_PROG_TYPE_KVM_IO_READ")?,
            write_type: program("BPF_PROG_TYPE_KVM_IO_WRITE")?,
            work_type: program("BPF_PROG_TYPE_KVM_IO_WORK")?,
        })
    }
}

/// What a name was found to be.
enum Found {
    Value(u32),
    /// There is such an enum, without the name.
    OnlyTheEnum,
    Nothing,
}

/// The types and strings of BTF (`Documentation/bpf/btf.rst` of the kernel).
#[derive(Clone, Copy)]
struct Btf<'a> {
    types: &'a [u8],
    /// Those that its numbers of strings begin with.
    base: &'a [u8],
    strings: &'a [u8],
}

impl<'a> Btf<'a> {
    const MAGIC: u16 = 0xeb9f;
    const HEADER_LEN: usize = 24;
    /// Bytes of what each type begins with.
    const TYPE_LEN: usize = 12;

    fn new(bytes: &'a [u8], base: &'a [u8]) -> Result<Self, Error> {
        let header = bytes
            .get(..Self::HEADER_LEN)
            .ok_or(Error::Damaged("no room for its header"))?;
        if u16::from_ne_bytes([header[0], header[1]]) != Self::MAGIC {
            return Err(Error::Damaged(
                "no magic number, or of the other endianness",
            ));
        }
        let header_len = word(header, 4) as usize;
        let section = |offset: usize, what| {
            let start = header_len.checked_add(word(header, offset) as usize);
            let end = start.and_then(|start| start.checked_add(word(header, offset + 4) as usize));
            let section = start
                .zip(end)
                .and_then(|(start, end)| bytes.get(start..end));
            section.ok_or(Error::Damaged(what))
        };
        Ok(Btf {
            types: section(8, "types outside of the file")?,
            base,
            strings: section(16, "strings outside of the file")?,
        })
    }

    /// The string that begins there, without its NUL.
    fn string(&self, offset: u32) -> &'a [u8] {
        let offset = offset as usize;
        let own = match offset.checked_sub(self.base.len()) {
            Some(offset) => self.strings.get(offset..),
            None => self.base.get(offset..),
        };
        let own = own.unwrap_or_default();
        own.split(|&byte| byte == 0).next().unwrap_or_default()
    }

    /// The value of an enumerator, by the names of the enum and its own.
    fn enumerator(&self, enumeration: &str, name: &str) -> Result<Found, Error> {
        let mut found = Found::Nothing;
        let mut rest = self.types;
        while !rest.is_empty() {
            let cut = Error::Damaged("a type that ends too early");
            let Some((head, behind)) = rest.split_at_checked(Self::TYPE_LEN) else {
                return Err(cut);
            };
            let info = word(head, 4);
            let (kind, count) = (info >> 24 & 0x7f, (info & 0xff_ffff) as usize);
            // How many bytes each kind has behind what all have.
            let len = match kind {
                // Pointers, names, qualifiers, forward declarations, functions, floats, tags of types.
                2 | 7..=12 | 16 | 18 => 0,
                // Int, variable, tag of a declaration.
                1 | 14 | 17 => 4,
                3 => 12,
                // Struct, union, section of data, enum of 64 bits.
                4 | 5 | 15 | 19 => 12 * count,
                // Enum, parameters.
                6 | 13 => 8 * count,
                _ => return Err(Error::Damaged("a kind of type that is not known")),
            };
            let Some((own, next)) = behind.split_at_checked(len) else {
                return Err(cut);
            };
            if kind == 6 && self.string(word(head, 0)) == enumeration.as_bytes() {
                found = Found::OnlyTheEnum;
                let mut all = own.chunks_exact(8);
                let is_it = |one: &&[u8]| self.string(word(one, 0)) == name.as_bytes();
                if let Some(one) = all.find(is_it) {
                    return Ok(Found::Value(word(one, 4)));
                }
            }
            rest = next;
        }
        Ok(found)
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes BTF: of an int, a struct with two members, and enums.
    struct Maker {
        /// How many bytes of strings the kernel has, where it is a module's.
        base_len: u32,
        types: Vec<u8>,
        strings: Vec<u8>,
    }

    impl Maker {
        fn new(base: Option<&Maker>) -> Self {
            let base_len = base.map_or(0, |base| base.strings.len() as u32);
            let strings = if base.is_none() { vec![0] } else { Vec::new() };
            let mut maker = Maker {
                base_len,
                types: Vec::new(),
                strings,
            };
            // A module's does not begin with one that is damaged where numbers are the kernel's.
            maker.add("int", 1, 0, &[32]);
            maker.add("pair", 4, 2, &[0, 1, 0, 0, 1, 32]);
            maker.add("typedef", 8, 0, &[]);
            maker
        }

        fn name(&mut self, name: &str) -> u32 {
            let at = self.base_len + self.strings.len() as u32;
            self.strings.extend(name.as_bytes());
            self.strings.push(0);
            at
        }

        fn add(&mut self, name: &str, kind: u32, count: u32, behind: &[u32]) {
            let name = self.name(name);
            let words = [name, kind << 24 | count, 4];
            for word in words.iter().chain(behind) {
                self.types.extend(word.to_ne_bytes());
            }
        }

        fn enumeration(&mut self, name: &str, values: &[(&str, u32)]) {
            let behind: Vec<_> = values
                .iter()
                .flat_map(|&(name, value)| [self.name(name), value])
                .collect();
            self.add(name, 6, values.len() as u32, &behind);
        }

        fn bytes(&self) -> Vec<u8> {
            let (types, strings) = (self.types.len() as u32, self.strings.len() as u32);
            let mut bytes = vec![0x9f, 0xeb, 1, 0];
            if cfg!(target_endian = "big") {
                bytes.swap(0, 1);
            }
            for word in [24, 0, types, types, strings] {
                bytes.extend(word.to_ne_bytes());
            }
            bytes.extend(&self.types);
            bytes.extend(&self.strings);
            bytes
        }
    }

    fn kernel() -> Maker {
        let mut kernel = Maker::new(None);
        kernel.enumeration(
            "bpf_prog_type",
            &[
                ("BPF_PROG_TYPE_UNSPEC", 0),
                ("BPF_PROG_TYPE_OTHER", BPF_PROG_TYPE_KVM_IO_READ),
                ("BPF_PROG_TYPE_KVM_IO_READ", 40),
                ("BPF_PROG_TYPE_KVM_IO_WRITE", 41),
                ("BPF_PROG_TYPE_KVM_IO_WORK", 43),
            ],
        );
        kernel
    }

    const DEVICE: [(&str, u32); 2] = [("KVM_DEV_TYPE_OTHER", 17), ("KVM_DEV_TYPE_BPF", 19)];

    #[test]
    fn numbers_are_the_kernels() {
        let mut kernel = kernel();
        kernel.enumeration("kvm_device_type", &DEVICE);
        let abi = Abi::from_btf(&kernel.bytes(), []).unwrap();
        let wanted = Abi {
            device_type: 19,
            read_type: 40,
            write_type: 41,
            work_type: 43,
        };
        assert_eq!(abi, wanted);
        assert_ne!(abi, Abi::default());
    }

    #[test]
    fn modules_go_on_from_the_kernel() {
        let kernel = kernel();
        let mut module = Maker::new(Some(&kernel));
        module.enumeration("kvm_device_type", &DEVICE);
        let (kernel, module) = (kernel.bytes(), module.bytes());
        let abi = Abi::from_btf(&kernel, [&module[..]]).unwrap();
        assert_eq!((abi.device_type, abi.read_type), (19, 40));
        // KVM is not there yet.
        let abi = Abi::from_btf(&kernel, []).unwrap();
        assert_eq!((abi.device_type, abi.read_type), (KVM_DEV_TYPE_BPF, 40));
    }

    #[test]
    fn files_are_read() {
        let dir = std::env::temp_dir().join(format!("kvm-bpf-btf-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let kernel = kernel();
        let mut module = Maker::new(Some(&kernel));
        module.enumeration("kvm_device_type", &DEVICE);
        std::fs::write(dir.join("vmlinux"), kernel.bytes()).unwrap();
        std::fs::write(dir.join("kvm"), module.bytes()).unwrap();
        let abi = Abi::from_directory(&dir).unwrap();
        assert_eq!((abi.device_type, abi.work_type), (19, 43));
        std::fs::remove_file(dir.join("vmlinux")).unwrap();
        let error = Abi::from_directory(&dir).unwrap_err();
        std::fs::remove_dir_all(&dir).unwrap();
        let wanted = format!("cannot read {}/vmlinux", dir.display());
        assert_eq!(error.to_string(), wanted);
    }

    #[test]
    fn what_a_kernel_lacks_is_said() {
        let mut other = Maker::new(None);
        other.enumeration("bpf_prog_type", &[("BPF_PROG_TYPE_OTHER", 33)]);
        let error = Abi::from_btf(&other.bytes(), []).unwrap_err();
        assert!(
            matches!(error, Error::Missing("BPF_PROG_TYPE_KVM_IO_READ")),
            "{error}"
        );
        let mut kernel = kernel();
        kernel.enumeration("kvm_device_type", &[("KVM_DEV_TYPE_OTHER", 17)]);
        let error = Abi::from_btf(&kernel.bytes(), []).unwrap_err();
        assert!(
            matches!(error, Error::Missing("KVM_DEV_TYPE_BPF")),
            "{error}"
        );
    }

    #[test]
    fn damaged_btf_is_refused() {
        let mut kernel = kernel();
        kernel.enumeration("kvm_device_type", &DEVICE);
        let good = kernel.bytes();
        for len in 0..good.len() {
            assert!(Abi::from_btf(&good[..len], []).is_err(), "{len} bytes");
        }
        // No flipped byte is worse than a wrong number.
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0xff;
            let _ = Abi::from_btf(&bad, []);
        }
        let error = Abi::from_btf(b"\x7fELF and more of this, long enough", []).unwrap_err();
        assert!(matches!(error, Error::Damaged(_)), "{error}");
    }
}
