// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Reads and writes a disk of a Linux guest, past the page cache, with many requests in flight.
//!
//! Arguments: the disk; how many requests are in flight; the most pages of one; and how many
//! requests there are in all, or the file that ends it once it is there. First the whole disk is
//! written, and at last the whole disk is read. In between are as many reads as writes, of random
//! pages, of which no two in flight overlap. What a page is to have follows from its number and from
//! how often it was written; each read is checked, word by word. The last line is
//! "IO DISK requests reads writes deepest wrong", of which "deepest" is how many requests were in
//! flight at once, and "wrong" counts pages that had something else and requests that failed.
//!
//! Or: "copy", a file, another one, of which a disk is accessed directly, bytes of each request, the
//! first of them by number, and the number behind the last. busybox's dd goes through the page cache
//! where it cannot access a disk directly.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::{array, env, mem, slice};

use kvm_bpf_selftests::harness::Random;
use vmm_sys_util::aio::{IOCB_CMD_PREAD, IOCB_CMD_PWRITE, IoContext, IoControlBlock, IoEvent};

const PAGE: usize = 4096;
const WORDS: usize = PAGE / size_of::<u64>();
/// How many wrong pages are told one by one.
const TOLD: u64 = 10;

/// A page of memory that a disk may access directly.
#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u64; WORDS]);

impl Page {
    /// What a page of the disk has after so many writes.
    fn new(number: usize, writes: u32) -> Self {
        let mut random = Random::new((number as u64) << 32 | u64::from(writes));
        let (first, step) = (random.next(), random.next() | 1);
        let word = |at: usize| first.wrapping_add(step.wrapping_mul(at as u64));
        Page(array::from_fn(word))
    }
}

/// When there are enough requests.
enum Until {
    /// There were so many.
    Requests(u64),
    /// The file is there.
    File(PathBuf),
}

/// A request: it is in flight while it has pages.
#[derive(Default)]
struct Slot {
    control: IoControlBlock,
    buffer: Vec<Page>,
    writes: bool,
    first: usize,
    pages: usize,
}

struct Load {
    name: String,
    disk: File,
    context: IoContext,
    slots: Vec<Slot>,
    /// How often each page of the disk was written.
    written: Vec<u32>,
    /// Whether a request of it is in flight.
    busy: Vec<bool>,
    reads: u64,
    writes: u64,
    deepest: usize,
    wrong: u64,
}

impl Load {
    fn new(path: &Path, depth: usize, most: usize) -> io::Result<Self> {
        let mut disk = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(path)?;
        let pages = disk.seek(SeekFrom::End(0))? as usize / PAGE;
        let slot = || Slot {
            buffer: vec![Page([0; WORDS]); most],
            ..Slot::default()
        };
        Ok(Load {
            name: path.file_name().unwrap_or_default().display().to_string(),
            disk,
            context: IoContext::new(depth as u32)?,
            slots: (0..depth).map(|_| slot()).collect(),
            written: vec![0; pages],
            busy: vec![false; pages],
            reads: 0,
            writes: 0,
            deepest: 0,
            wrong: 0,
        })
    }

    /// Runs requests until `next` has none any more, each as (writes, first page, pages).
    fn run(
        &mut self,
        mut next: impl FnMut(&Self) -> Option<(bool, usize, usize)>,
    ) -> io::Result<()> {
        let mut events = vec![IoEvent::default(); self.slots.len()];
        let mut in_flight = 0;
        let mut is_over = false;
        loop {
            let mut begun = Vec::new();
            while !is_over && in_flight + begun.len() < self.slots.len() {
                let Some(request) = next(self) else {
                    is_over = true;
                    break;
                };
                begun.push(self.begin(request));
            }
            self.submit(&begun)?;
            in_flight += begun.len();
            self.deepest = self.deepest.max(in_flight);
            if in_flight == 0 {
                return Ok(());
            }
            let count = self.context.get_events(1, &mut events, None)?;
            for event in &events[..count] {
                self.end(event.data as usize, event.res);
            }
            in_flight -= count;
        }
    }

    /// Prepares a request; returns its slot.
    fn begin(&mut self, (writes, first, pages): (bool, usize, usize)) -> usize {
        let is_free = |slot: &Slot| slot.pages == 0;
        let index = self.slots.iter().position(is_free).expect("a free slot");
        let slot = &mut self.slots[index];
        for (page, number) in slot.buffer.iter_mut().zip(first..first + pages) {
            self.busy[number] = true;
            if writes {
                self.written[number] += 1;
                *page = Page::new(number, self.written[number]);
            }
        }
        (slot.writes, slot.first, slot.pages) = (writes, first, pages);
        let command = match writes {
            true => IOCB_CMD_PWRITE,
            false => IOCB_CMD_PREAD,
        };
        slot.control = IoControlBlock {
            aio_data: index as u64,
            aio_lio_opcode: command as u16,
            aio_fildes: self.disk.as_raw_fd() as u32,
            aio_buf: slot.buffer.as_mut_ptr() as u64,
            aio_nbytes: (pages * PAGE) as u64,
            aio_offset: (first * PAGE) as i64,
            ..IoControlBlock::default()
        };
        index
    }

    /// Gives the kernel requests, all at once where it takes them.
    fn submit(&mut self, indices: &[usize]) -> io::Result<()> {
        let slots = self.slots.iter_mut().enumerate();
        let mut controls: Vec<_> = slots
            .filter(|(index, _)| indices.contains(index))
            .map(|(_, slot)| &mut slot.control)
            .collect();
        while !controls.is_empty() {
            let count = self.context.submit(&controls)?;
            controls.drain(..count);
        }
        Ok(())
    }

    /// Looks at a request that the kernel is done with.
    fn end(&mut self, index: usize, result: i64) {
        let slot = &mut self.slots[index];
        let (first, pages) = (slot.first, mem::take(&mut slot.pages));
        match slot.writes {
            true => self.writes += 1,
            false => self.reads += 1,
        }
        let mut wrong = Vec::new();
        if result != (pages * PAGE) as i64 {
            wrong.push(format!("{pages} pages from {first}: result {result}"));
        }
        for (page, number) in slot.buffer.iter().zip(first..first + pages) {
            self.busy[number] = false;
            let writes = self.written[number];
            if !slot.writes && page.0 != Page::new(number, writes).0 {
                let start = page.0[0];
                wrong.push(format!("page {number}, {writes} writes: begins {start:#x}"));
            }
        }
        for what in wrong {
            self.wrong += 1;
            if self.wrong <= TOLD {
                println!("IO-WRONG {} {what}", self.name);
            }
        }
    }

    /// The whole disk, from the first page on.
    fn all(&mut self, writes: bool) -> io::Result<()> {
        let most = self.slots[0].buffer.len();
        let mut at = 0;
        self.run(|load| {
            let (first, left) = (at, load.busy.len() - at);
            let pages = left.min(most);
            at += pages;
            (pages > 0).then_some((writes, first, pages))
        })
    }

    fn random(&mut self, until: &Until) -> io::Result<()> {
        let most = self.slots[0].buffer.len() as u64;
        let mut random = Random::new(1);
        let mut count = 0;
        self.run(|load| {
            let is_over = match until {
                Until::Requests(requests) => count >= *requests,
                Until::File(path) => path.exists(),
            };
            if is_over {
                return None;
            }
            count += 1;
            loop {
                let pages = 1 + random.below(most) as usize;
                let first = random.below((load.busy.len() - pages + 1) as u64) as usize;
                if !load.busy[first..first + pages].contains(&true) {
                    return Some((random.below(2) == 0, first, pages));
                }
            }
        })
    }
}

/// Copies between a disk and a file, a request at a time.
fn copy(from: &str, to: &str, bytes: usize, requests: Range<usize>) -> io::Result<()> {
    let open = |path: &str, writes: bool| {
        let is_disk = Path::new(path)
            .metadata()
            .is_ok_and(|it| it.file_type().is_block_device());
        let direct = if is_disk { libc::O_DIRECT } else { 0 };
        let mut options = File::options();
        options
            .read(!writes)
            .write(writes)
            .create(writes)
            .truncate(false);
        options.custom_flags(direct).open(path)
    };
    let (from, to) = (open(from, false)?, open(to, true)?);
    let mut pages = vec![Page([0; WORDS]); bytes.div_ceil(PAGE)];
    // SAFETY: they are so long, and any bytes make numbers.
    let buffer = unsafe { slice::from_raw_parts_mut(pages.as_mut_ptr().cast::<u8>(), bytes) };
    for number in requests {
        let at = (number * bytes) as u64;
        from.read_exact_at(buffer, at)?;
        to.write_all_at(buffer, at)?;
    }
    Ok(())
}

fn main() -> io::Result<()> {
    let args: Vec<_> = env::args().skip(1).collect();
    let usage = || {
        io::Error::other(
            "usage: kvm-bpf-guest-io DISK DEPTH PAGES REQUESTS|FILE, or copy FROM TO BYTES FIRST END",
        )
    };
    let number = |text: &str| text.parse::<usize>().map_err(|_| usage());
    if let [command, from, to, bytes, first, end] = args.as_slice()
        && command == "copy"
    {
        return copy(from, to, number(bytes)?, number(first)?..number(end)?);
    }
    let [disk, depth, most, until] = args.as_slice() else {
        return Err(usage());
    };
    let until = match until.starts_with('/') {
        true => Until::File(until.into()),
        false => Until::Requests(number(until)? as u64),
    };
    let mut load = Load::new(Path::new(disk), number(depth)?, number(most)?)?;
    load.all(true)?;
    load.random(&until)?;
    load.all(false)?;
    let Load {
        name,
        reads,
        writes,
        deepest,
        wrong,
        ..
    } = load;
    let requests = reads + writes;
    println!("IO {name} {requests} {reads} {writes} {deepest} {wrong}");
    Ok(())
}
