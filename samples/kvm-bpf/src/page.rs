// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Pages of a device that the guest reads itself: a read-only memory slot over a part of a region.
//!
//! Loads of the page then are those of memory: no exit, no program. Stores still run the write
//! program, which changes the page. Where there is no slot, the read program gives the same values.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::mapping::Mapping;
use crate::note::{self, MIN_PAGE};
use crate::programs::{Error, Map};
use crate::sys::{self, BPF_F_MMAPABLE, MapInfo, map_type};

/// `KVM_CAP_READONLY_MEM`.
const KVM_CAP_READONLY_MEM: u64 = 81;
/// `KVM_CAP_ARM_CACHEABLE_PFNMAP_SUPPORTED`.
const KVM_CAP_ARM_CACHEABLE_PFNMAP_SUPPORTED: u64 = 243;

/// Why a page has no memory slot, so that loads of it run the read program.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NoSlot {
    /// KVM has none that the guest may only read: not for this guest, or for none.
    #[error("KVM has no read-only memory for this guest")]
    NoReadOnlyMemory,
    /// The guest's loads may go past the cache that the programs' stores are in.
    #[error(
        "the guest could read around the host's cache (no KVM_CAP_ARM_CACHEABLE_PFNMAP_SUPPORTED)"
    )]
    Uncached,
    /// Address and size are none of whole pages.
    #[error("{size:#x} bytes at {addr:#x} are no whole pages: the host's have {page:#x} bytes")]
    PartsOfPages {
        /// Where the guest has the page.
        addr: u64,
        /// Bytes of it.
        size: u64,
        /// Bytes of a page of the host.
        page: u64,
    },
    /// KVM does not take the slot; on arm64 it takes none of maps for guests with memory tagging
    /// (`EINVAL`), and none to read only for protected ones (`EPERM`).
    #[error("KVM refuses memory slot {slot}: {error}{}", hint(error))]
    Refused {
        /// Number of the slot.
        slot: u32,
        /// The kernel's error.
        error: io::Error,
    },
    /// The VM's file descriptor cannot be duplicated.
    #[error("cannot keep the VM open: {0}")]
    KeepVm(io::Error),
}

/// What the error may mean.
fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EINVAL) if cfg!(target_arch = "aarch64") => {
            " (guests with memory tagging get none of maps)"
        }
        Some(libc::EPERM) if cfg!(target_arch = "aarch64") => {
            " (protected guests get none to read only)"
        }
        _ => "",
    }
}

/// The memory of a read page's map, which this process never accesses itself.
#[derive(Debug)]
pub(crate) struct PageMap {
    memory: Mapping,
    /// The kernel's number of the map.
    id: u32,
}

impl PageMap {
    /// Maps all of a map that is loaded.
    pub fn new(map: &Map) -> io::Result<Self> {
        // check() has found whole pages.
        let size = map.info.value_size as usize * map.info.max_entries as usize;
        Ok(PageMap {
            memory: Mapping::new(map.as_fd(), size, libc::PROT_READ)?,
            id: map.info.id,
        })
    }

    fn size(&self) -> u64 {
        self.memory.len() as u64
    }

    fn host_addr(&self) -> *const u8 {
        self.memory.start().as_ptr().cast()
    }
}

/// Checks that a file has, for each of its note's read pages, a map that can be it.
pub(crate) fn check(
    note: &note::Note,
    find: impl Fn(&str) -> Option<MapInfo>,
) -> Result<(), Error> {
    let regions = note.regions();
    let mut ends: Vec<(u32, u64, u64)> = Vec::new();
    for page in &note.read_pages {
        let refuse = |why: String| {
            Err(Error::ReadPage {
                map: page.map.clone(),
                why,
            })
        };
        let Some(map) = find(&page.map) else {
            return refuse("there is no such map".to_string());
        };
        if map.map_type != map_type::ARRAY {
            return refuse(format!("it is no array, but of type {}", map.map_type));
        }
        if map.flags & BPF_F_MMAPABLE == 0 {
            return refuse("it has no flag BPF_F_MMAPABLE".to_string());
        }
        // The kernel pads elements, which the guest would see.
        let (value, entries) = (map.value_size, map.max_entries);
        let size = u64::from(value) * u64::from(entries);
        if !value.is_multiple_of(8) || size == 0 || !size.is_multiple_of(MIN_PAGE) {
            return refuse(format!(
                "{entries} elements of {value} bytes are no whole pages of {MIN_PAGE:#x} bytes"
            ));
        }
        let region = regions.iter().find(|range| range.region == page.region);
        let room = region.map_or(0, |range| range.size.saturating_sub(page.offset));
        if size > room {
            return refuse(format!(
                "its {size:#x} bytes are more than the {room:#x} that region {} has from {:#x} on",
                page.region, page.offset
            ));
        }
        let (start, end) = (page.offset, page.offset + size);
        let overlaps = |&(region, from, to): &(u32, u64, u64)| {
            region == page.region && start < to && from < end
        };
        if ends.iter().any(overlaps) {
            return refuse(format!("another read page overlaps it at {start:#x}"));
        }
        ends.push((page.region, start, end));
    }
    Ok(())
}

/// A memory slot that shows a mapping to the guest; gone when this is.
#[derive(Debug)]
struct Slot {
    vm: Arc<OwnedFd>,
    number: u32,
    addr: u64,
    mapping: Arc<PageMap>,
    gone: bool,
}

impl Slot {
    fn set(vm: Arc<OwnedFd>, number: u32, addr: u64, mapping: Arc<PageMap>) -> io::Result<Self> {
        set_memory(vm.as_fd(), number, addr, &mapping, mapping.size())?;
        Ok(Slot {
            vm,
            number,
            addr,
            mapping,
            gone: false,
        })
    }

    fn unset(&mut self) -> io::Result<()> {
        set_memory(self.vm.as_fd(), self.number, self.addr, &self.mapping, 0)?;
        self.gone = true;
        Ok(())
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // The guest may go on to read there: then nothing else must come to be at the address.
        if !self.gone && self.unset().is_err() {
            std::mem::forget(Arc::clone(&self.mapping));
        }
    }
}

/// Sets a slot that shows so much of a mapping; nothing removes it.
fn set_memory(
    vm: BorrowedFd<'_>,
    slot: u32,
    guest_phys_addr: u64,
    mapping: &PageMap,
    memory_size: u64,
) -> io::Result<()> {
    let mut region = sys::MemoryRegion {
        slot,
        flags: sys::KVM_MEM_READONLY,
        guest_phys_addr,
        memory_size,
        userspace_addr: mapping.host_addr() as u64,
    };
    // SAFETY: the guest may only read the mapping, which stays until no slot has it any more.
    unsafe { sys::set_memory(vm, &mut region) }
}

/// What decides whether a guest can have slots of maps.
struct Host {
    /// KVM has memory that this guest may only read.
    read_only_memory: bool,
    /// The guest's loads see what the host has stored, whatever kind of memory the guest takes it for.
    coherent: bool,
    /// Bytes of a page.
    page: u64,
}

impl Host {
    fn of(vm: &impl AsRawFd) -> Self {
        let has = |extension| sys::check_extension(vm.as_raw_fd(), extension) > 0;
        // On arm64 a guest that maps registers as a device's, as drivers do, reads around the cache
        // unless the host's own attributes prevail (FEAT_S2FWB, which the capability implies).
        let coherent = cfg!(target_arch = "x86_64")
            || cfg!(target_arch = "aarch64") && has(KVM_CAP_ARM_CACHEABLE_PFNMAP_SUPPORTED);
        Host {
            read_only_memory: has(KVM_CAP_READONLY_MEM),
            coherent,
            page: sys::page_size() as u64,
        }
    }
}

/// Whether a page at an address of the guest can have a slot, as far as that is known before.
fn check_host(host: &Host, addr: u64, size: u64) -> Result<(), NoSlot> {
    let &Host {
        read_only_memory,
        coherent,
        page,
    } = host;
    match () {
        () if !read_only_memory => Err(NoSlot::NoReadOnlyMemory),
        () if !coherent => Err(NoSlot::Uncached),
        () if !addr.is_multiple_of(page) || !size.is_multiple_of(page) => {
            Err(NoSlot::PartsOfPages { addr, size, page })
        }
        () => Ok(()),
    }
}

/// What the VMM has asked for: a slot of its VM.
#[derive(Clone, Debug)]
struct Wanted {
    vm: Arc<OwnedFd>,
    number: u32,
}

#[derive(Debug)]
enum State {
    /// Nobody asked.
    Unset,
    Set(Slot),
    /// It could not be.
    Failed(NoSlot),
}

/// A page of a device: some of its registers, whose loads have no side effect.
#[derive(Debug)]
pub struct ReadPage {
    addr: u64,
    mapping: Arc<PageMap>,
    wanted: Option<Wanted>,
    state: State,
}

impl ReadPage {
    pub(crate) fn new(addr: u64, mapping: Arc<PageMap>) -> Self {
        ReadPage {
            addr,
            mapping,
            wanted: None,
            state: State::Unset,
        }
    }

    /// Where the guest has it.
    pub fn addr(&self) -> u64 {
        self.addr
    }

    /// Its bytes.
    pub fn size(&self) -> u64 {
        self.mapping.size()
    }

    /// Where this process has it, to read: until the device goes or its programs are replaced.
    pub fn host_addr(&self) -> *const u8 {
        self.mapping.host_addr()
    }

    /// The number of the memory slot that the guest reads it through; none if loads run the read
    /// program.
    pub fn slot(&self) -> Option<u32> {
        match &self.state {
            State::Set(slot) => Some(slot.number),
            _ => None,
        }
    }

    /// Why it has none, if the VMM has asked for one.
    pub fn why_no_slot(&self) -> Option<&NoSlot> {
        match &self.state {
            State::Failed(why) => Some(why),
            _ => None,
        }
    }

    pub(crate) fn set(&mut self, vm: &impl AsRawFd, number: u32) -> Result<(), &NoSlot> {
        if let Err(why) = self.try_set(vm, number) {
            self.state = State::Failed(why);
        }
        match &self.state {
            State::Failed(why) => Err(why),
            _ => Ok(()),
        }
    }

    fn try_set(&mut self, vm: &impl AsRawFd, number: u32) -> Result<(), NoSlot> {
        let refused = |error| NoSlot::Refused {
            slot: number,
            error,
        };
        self.unset().map_err(refused)?;
        check_host(&Host::of(vm), self.addr, self.size())?;
        let vm = sys::duplicate(vm).map_err(NoSlot::KeepVm)?;
        self.wanted = Some(Wanted {
            vm: Arc::new(vm),
            number,
        });
        self.set_again();
        Ok(())
    }

    /// Takes the slot away; the VMM does not want it any more.
    pub(crate) fn unset(&mut self) -> io::Result<()> {
        self.suspend()?;
        self.wanted = None;
        Ok(())
    }

    /// Takes the slot away until [`Self::set_again`], or leaves all as it is.
    pub(crate) fn suspend(&mut self) -> io::Result<()> {
        if let State::Set(slot) = &mut self.state {
            slot.unset()?;
            self.state = State::Unset;
        }
        Ok(())
    }

    /// Sets the slot that the VMM wants, if it wants one and it is not there.
    pub(crate) fn set_again(&mut self) {
        let Some(Wanted { vm, number }) = self.wanted.clone() else {
            return;
        };
        if self.slot().is_some() {
            return;
        }
        let slot = Slot::set(vm, number, self.addr, Arc::clone(&self.mapping));
        self.state = match slot {
            Ok(slot) => State::Set(slot),
            Err(error) => State::Failed(NoSlot::Refused {
                slot: number,
                error,
            }),
        };
    }

    /// Whether both are the same map's.
    pub(crate) fn is_same_map(&self, mapping: &PageMap) -> bool {
        self.mapping.id == mapping.id
    }

    /// Goes over to another map; the slot is not there.
    pub(crate) fn exchange(&mut self, mapping: Arc<PageMap>) {
        self.mapping = mapping;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: Host = Host {
        read_only_memory: true,
        coherent: true,
        page: 0x1000,
    };

    /// In words, or nothing.
    fn why(host: &Host, addr: u64, size: u64) -> String {
        let why = check_host(host, addr, size).err();
        why.map(|why| why.to_string()).unwrap_or_default()
    }

    #[test]
    fn a_host_that_can_has_slots() {
        assert_eq!(why(&HOST, 0xd000_0000, 0x1000), "");
        assert_eq!(why(&HOST, 0xd000_3000, 0x2000), "");
    }

    #[test]
    fn what_a_host_lacks_is_said() {
        let without = Host {
            read_only_memory: false,
            ..HOST
        };
        let got = why(&without, 0x1000, 0x1000);
        assert_eq!(got, "KVM has no read-only memory for this guest");
        let without = Host {
            coherent: false,
            ..HOST
        };
        let got = why(&without, 0x1000, 0x1000);
        assert!(got.contains("around the host's cache"), "{got}");
    }

    #[test]
    fn pages_are_the_hosts() {
        let large = Host {
            page: 0x1_0000,
            ..HOST
        };
        assert_eq!(why(&large, 0x1_0000, 0x1_0000), "");
        for (addr, size) in [(0x1_0000, 0x1000), (0x1000, 0x1_0000)] {
            assert_eq!(
                why(&large, addr, size),
                format!(
                    "{size:#x} bytes at {addr:#x} are no whole pages: the host's have 0x10000 bytes"
                )
            );
        }
        assert_eq!(
            why(&HOST, 0x1800, 0x1000),
            "0x1000 bytes at 0x1800 are no whole pages: the host's have 0x1000 bytes"
        );
    }

    #[test]
    fn refusals_have_an_error_and_maybe_a_hint() {
        let refused = |errno| NoSlot::Refused {
            slot: 7,
            error: io::Error::from_raw_os_error(errno),
        };
        let text = refused(libc::EEXIST).to_string();
        assert_eq!(text, "KVM refuses memory slot 7: File exists (os error 17)");
        let text = refused(libc::EINVAL).to_string();
        assert_eq!(text.contains("tagging"), cfg!(target_arch = "aarch64"));
    }
}
