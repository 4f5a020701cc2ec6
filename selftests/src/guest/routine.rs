// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the guest's code does, and what it takes and gives.

/// The guest's code; the numbers are those in the assembly.
#[derive(Clone, Copy, Debug)]
pub enum Routine {
    /// Reads 1 byte; the routines for 2, 4 and 8 follow.
    Read = 0,
    /// Writes 1 byte; the routines for 2, 4 and 8 follow.
    Write = 4,
    /// Writes `value` and reads, 8 bytes each, `count` times.  Ends early when
    /// an answer is none of `pair`, with the answer as the result.
    Hammer = 8,
    /// Reads 4 bytes, `count` times.
    ReadLoop = 9,
    /// Writes 4 bytes, `count` times.
    WriteLoop = 10,
    /// Writes 8 bytes, then waits until it took `count` interrupts.
    AwaitInterrupts = 11,
    /// Counts an interrupt and writes `pair.1` to address `pair.0`, if not 0.
    InterruptHandler = 12,
    /// Makes the call `value` of the hypervisor with one argument, `addr`.
    #[cfg(target_arch = "aarch64")]
    Call = 13,
    /// Reads 4 bytes, and has an exception whose stack is there.
    #[cfg(target_arch = "x86_64")]
    ExceptionOnStack = 13,
    /// `in` of 1 byte from port `addr`; the routines for 2 and 4 follow.
    #[cfg(target_arch = "x86_64")]
    In = 14,
    /// `out` of 1 byte; the routines for 2 and 4 follow.
    #[cfg(target_arch = "x86_64")]
    Out = 17,
    /// `rep ins` of `count` times 1 byte to address `pair.0`; the routines for 2 and 4 follow.
    #[cfg(target_arch = "x86_64")]
    InString = 20,
    /// `rep outs` from there; the routines for 2 and 4 follow.
    #[cfg(target_arch = "x86_64")]
    OutString = 23,
    /// `Hammer` with a port, 4 bytes.
    #[cfg(target_arch = "x86_64")]
    PortHammer = 26,
    /// Does what always exits to KVM and no further, `count` times: `cpuid`, or the call
    /// `SMCCC_VERSION`.
    ExitLoop = 27,
    /// Writes 4 bytes to the port `addr`, `count` times.
    #[cfg(target_arch = "x86_64")]
    OutLoop = 28,
    /// Writes 4 bytes `count` times, to addresses that go round from `addr` to `pair.1` in steps
    /// of `pair.0`.
    Walk = 29,
    /// Writes 8 bytes `count` times: `value`, and each time one more.
    Increase = 30,
    /// `count` times: writes a command of 4 bytes to `addr`, and reads `pair.1` until the result,
    /// the command's complement, is there. All of these use two numbers.
    Commands = 32,
    /// The same, which waits for an interrupt before it reads; `pair.0` is 0.
    CommandsInterrupt = 34,
    /// The same with a command that is in memory, behind the result, before `addr` is written to.
    CommandsMemory = 36,
    /// Both.
    CommandsMemoryInterrupt = 38,
    /// `count` times: writes a 0 of 4 bytes to `addr`, waits for an interrupt, reads 4 bytes at
    /// `pair.1` and writes them behind. `pair.0` is 0.
    Requests = 40,
    /// The same, and idles until the interrupt comes.
    RequestsIdle = 42,
    /// `count` requests of a disk, `value` of them at a time: copies them from [`QUEUE_TEMPLATE`]
    /// into the queue at `pair.1`, makes them available, notifies at `addr`, waits for an interrupt,
    /// reads the status behind and acknowledges it, until all are used. `pair.0` is 0.
    Disk = 44,
    /// The same, and idles until the interrupt comes.
    DiskIdle = 48,
    /// `count` times: makes the next `value` entries of the queue at `pair.1` available, as they
    /// are, and notifies at `addr`.
    Notifications = 52,
    /// Reads two registers of 8 bytes at once.
    #[cfg(target_arch = "aarch64")]
    ReadPair = 53,
    /// Writes two.
    #[cfg(target_arch = "aarch64")]
    WritePair = 54,
    /// Reads 4 bytes and begins an exclusive access.
    #[cfg(target_arch = "aarch64")]
    ReadExclusive = 55,
    /// Writes 4 bytes and adds to the address.
    #[cfg(target_arch = "aarch64")]
    WriteBack = 56,
    /// Exchanges 4 bytes with `value`.
    #[cfg(target_arch = "x86_64")]
    Exchange = 53,
    /// Adds `value` to 8 bytes, locked; the result is what was there.
    #[cfg(target_arch = "x86_64")]
    LockedAdd = 54,
    /// Adds `value` to 4 bytes.
    #[cfg(target_arch = "x86_64")]
    Add = 55,
    /// Copies `count` bytes to `pair.0`, one after the other.
    #[cfg(target_arch = "x86_64")]
    CopyBytes = 56,
    /// Copies `count` times 4 bytes.
    #[cfg(target_arch = "x86_64")]
    CopyWords = 57,
    /// Writes `value` `count` times, 4 bytes one after the other.
    #[cfg(target_arch = "x86_64")]
    Fill = 58,
    /// Reads 16 bytes at once: the result, and in place of the rounds that are left the upper half.
    #[cfg(target_arch = "x86_64")]
    ReadVector = 59,
    /// Writes 16 bytes at once, `value` and `pair.0`.
    #[cfg(target_arch = "x86_64")]
    WriteVector = 60,
    /// Reads 4 bytes and extends the sign.
    #[cfg(target_arch = "x86_64")]
    ReadSigned = 61,
}

/// What the routines for a disk have in the queue's page; numbers are those in the assembly.
/// Request *n* has the descriptors from 4 *n* on, in place of the fourth its header.
pub const QUEUE_AVAIL: u64 = 0x800;
/// The device's part.
pub const QUEUE_USED: u64 = 0xa00;
/// In the page behind: what is copied to the descriptors.
pub const QUEUE_TEMPLATE: u64 = 0x1000;
/// Entries of the queue of [`Routine::Disk`].
pub const QUEUE_ENTRIES: u16 = 32;
/// How many descriptors each request has there.
pub const QUEUE_PER_REQUEST: u16 = 4;

impl Routine {
    /// Distance of a routine from the first.
    pub fn offset(self) -> u64 {
        64 * self as u64
    }
}

/// Arguments of a routine.
#[derive(Clone, Copy, Debug, Default)]
pub struct Args {
    /// What to write.
    pub value: u64,
    /// Where to read or write.
    pub addr: u64,
    /// How often.
    pub count: u64,
    /// Meaning depends on the routine.
    pub pair: [u64; 2],
}

/// Results of a routine.
#[derive(Clone, Copy, Debug)]
pub struct Results {
    /// What was read last.
    pub value: u64,
    /// How many rounds were left.
    pub count: u64,
}
