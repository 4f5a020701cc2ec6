// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The virtual CPU frequency of `samples/devices/vcpufreq.bpf.c`, served from user space.
//!
//! Registers and formulas are those described there; the host's frequencies come from sysfs.

use std::fs;

use super::{Description, MmioDevice, uclamp};

const MAX_CPUS: usize = 8;
const CPU_SIZE: u64 = 0x1000;

const CUR_PERF: u64 = 0x00;
const SET_PERF: u64 = 0x04;
const PERFTBL_LEN: u64 = 0x08;
const PERFTBL_SEL: u64 = 0x0c;
const PERFTBL_RD: u64 = 0x10;
const PERF_DOMAIN: u64 = 0x14;

const PERFTBL_MAX: usize = 64;
const CAPACITY_SCALE: u64 = 1024;

/// The registers of one of the guest's CPUs.
#[derive(Clone, Copy, Debug, Default)]
struct Page {
    /// The last frequency asked for, in kHz; 0 if none yet.
    request: u32,
    sel: u32,
    /// The vCPU that last read `cur_perf`.
    reader: Option<usize>,
    /// Whose thread was clamped last, and to what.
    clamped: Option<(usize, u32)>,
}

/// The device.
#[derive(Debug)]
pub struct VcpuFreq {
    /// In kHz, ascending.
    table: Vec<u32>,
    pages: [Page; MAX_CPUS],
}

/// A number from a file of a host CPU, if there is one.
fn cpu_file(cpu: u32, file: &str) -> Option<u64> {
    fs::read_to_string(format!("/sys/devices/system/cpu/cpu{cpu}/{file}"))
        .ok()?
        .trim()
        .parse()
        .ok()
}

/// What the calling thread runs at, in kHz, where the fastest CPU has `max`.
fn host_perf(max: u32) -> Option<u32> {
    // SAFETY: no arguments.
    let cpu = u32::try_from(unsafe { libc::sched_getcpu() }).ok()?;
    let now = cpu_file(cpu, "cpufreq/scaling_cur_freq")?;
    let highest = cpu_file(cpu, "cpufreq/cpuinfo_max_freq")?;
    // Only machines with CPUs of several kinds have the file.
    let scale = cpu_file(cpu, "cpu_capacity").unwrap_or(CAPACITY_SCALE);
    scale_perf(max, now, highest, scale)
}

fn scale_perf(max: u32, now: u64, highest: u64, scale: u64) -> Option<u32> {
    let full = u64::from(max) * scale.min(CAPACITY_SCALE) / CAPACITY_SCALE;
    let perf = full
        .checked_mul(now.min(highest))?
        .checked_div(highest)?
        .try_into()
        .ok()?;
    (perf != 0).then_some(perf)
}

/// The utilization of a frequency, 0 to 1024.
fn utilization(khz: u32, max: u32) -> u32 {
    (u64::from(khz) * CAPACITY_SCALE).div_ceil(max.into()) as u32
}

impl VcpuFreq {
    /// What the guest is told of it.
    pub const DESCRIPTION: Description = Description {
        compatible: &["qemu,virtual-cpufreq"],
        size: MAX_CPUS as u64 * CPU_SIZE,
        nr_irqs: 0,
    };

    /// A device with a table of frequencies in kHz; a 0, or the 64th, ends it.
    pub fn new(perf_table: &[u32]) -> Self {
        VcpuFreq {
            table: perf_table
                .iter()
                .copied()
                .take_while(|&khz| khz != 0)
                .take(PERFTBL_MAX)
                .collect(),
            pages: Default::default(),
        }
    }

    fn max(&self) -> u32 {
        self.table.last().copied().unwrap_or(0)
    }

    /// Takes a request on the page of that number from a vCPU, on its thread.
    fn set_perf(&mut self, number: usize, vcpu: usize, khz: u32) {
        let max = self.max();
        if khz == 0 || max == 0 {
            return;
        }
        let page = &mut self.pages[number];
        page.request = khz.min(max);
        if vcpu == page.reader.unwrap_or(number) {
            page.clamped = None;
            self.comply(number, vcpu);
        }
    }

    /// Clamps the vCPU's thread as the page asks for, but not again.
    fn comply(&mut self, number: usize, vcpu: usize) {
        let max = self.max();
        let page = &mut self.pages[number];
        if page.request == 0 || max == 0 {
            return;
        }
        let clamp = utilization(page.request, max);
        if page.clamped != Some((vcpu, clamp)) {
            page.clamped = Some((vcpu, clamp));
            // The guest has no use for the error: a host without clamps is a host like that.
            let _ = uclamp::set_current(clamp, clamp);
        }
    }
}

/// Page and register of an access: all have 32 bits, and any other access is for none.
fn register(offset: u64, len: usize) -> Option<(usize, u64)> {
    let number = usize::try_from(offset / CPU_SIZE).ok()?;
    (len == 4 && number < MAX_CPUS).then_some((number, offset % CPU_SIZE))
}

impl MmioDevice for VcpuFreq {
    fn read(&mut self, vcpu: usize, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Some((number, register)) = register(offset, data.len()) else {
            return;
        };
        let value = match register {
            CUR_PERF => {
                self.pages[number].reader = Some(vcpu);
                self.comply(number, vcpu);
                let max = self.max();
                let request = self.pages[number].request;
                host_perf(max).unwrap_or(if request != 0 { request } else { max })
            }
            PERFTBL_LEN => self.table.len() as u32,
            PERFTBL_RD => {
                let sel = self.pages[number].sel as usize;
                self.table.get(sel).copied().unwrap_or(0)
            }
            PERF_DOMAIN => number as u32,
            _ => 0,
        };
        data.copy_from_slice(&value.to_le_bytes());
    }

    fn write(&mut self, vcpu: usize, offset: u64, data: &[u8]) {
        let (Some((number, register)), Ok(data)) = (register(offset, data.len()), data.try_into())
        else {
            return;
        };
        let value = u32::from_le_bytes(data);
        match register {
            SET_PERF => self.set_perf(number, vcpu, value),
            PERFTBL_SEL => self.pages[number].sel = value,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(device: &mut VcpuFreq, vcpu: usize, offset: u64) -> u32 {
        let mut data = [0xa5; 4];
        device.read(vcpu, offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(device: &mut VcpuFreq, vcpu: usize, offset: u64, value: u32) {
        device.write(vcpu, offset, &value.to_le_bytes());
    }

    #[test]
    fn table_is_read_by_selection() {
        let mut device = VcpuFreq::new(&[100, 200, 300, 0, 400]);
        assert_eq!(read(&mut device, 0, 0x7008), 3);
        // From another CPU, and another selection for each.
        write(&mut device, 0, 0x300c, 2);
        write(&mut device, 0, 0x400c, 1);
        assert_eq!(read(&mut device, 3, 0x3010), 300);
        assert_eq!(read(&mut device, 0, 0x4010), 200);
        assert_eq!(read(&mut device, 0, 0x0010), 100);
        write(&mut device, 0, 0x000c, 3);
        assert_eq!(read(&mut device, 0, 0x0010), 0);
        write(&mut device, 0, 0x000c, u32::MAX);
        assert_eq!(read(&mut device, 0, 0x0010), 0);
        assert_eq!(read(&mut device, 0, 0x5014), 5);
    }

    #[test]
    fn requests_are_kept_within_the_table() {
        let mut device = VcpuFreq::new(&[1000]);
        for (request, kept) in [(600, 600), (0, 600), (u32::MAX, 1000)] {
            write(&mut device, 0, 0x1004, request);
            assert_eq!(device.pages[1].request, kept);
        }
    }

    #[test]
    fn a_page_is_for_its_last_reader() {
        let mut device = VcpuFreq::new(&[1000]);
        // The clamps are those of this thread, where the machine has such.
        let clamped = |device: &VcpuFreq| device.pages[0].clamped;
        write(&mut device, 1, 0x0004, 500);
        assert_eq!(clamped(&device), None, "another vCPU asks");
        read(&mut device, 1, 0x0008);
        assert_eq!(clamped(&device), None, "it reads another register");
        read(&mut device, 1, 0x0000);
        assert_eq!(clamped(&device), Some((1, 512)), "it reads cur_perf");
        write(&mut device, 1, 0x0004, 250);
        assert_eq!(clamped(&device), Some((1, 256)), "it asks again");
        write(&mut device, 0, 0x0004, 1000);
        assert_eq!(clamped(&device), Some((1, 256)), "the first vCPU asks");
        read(&mut device, 0, 0x0000);
        assert_eq!(clamped(&device), Some((0, 1024)), "the first vCPU reads");
    }

    #[test]
    fn other_accesses_are_for_nobody() {
        let mut device = VcpuFreq::new(&[1000; 65]);
        assert_eq!(device.table.len(), 64);
        let mut data = [0xa5; 8];
        device.read(0, 8, &mut data);
        assert_eq!(data, [0; 8]);
        assert_eq!(read(&mut device, 0, 0x0009), 0);
        assert_eq!(read(&mut device, 0, 0x0018), 0);
        assert_eq!(read(&mut device, 0, 0x8008), 0);
        device.write(0, 0x1004, &[1]);
        assert_eq!(device.pages[1].request, 0);
    }

    #[test]
    fn formulas() {
        assert_eq!(utilization(1000, 1000), 1024);
        assert_eq!(utilization(1, 1000), 2);
        assert_eq!(utilization(500, 1000), 512);
        assert_eq!(utilization(u32::MAX, u32::MAX), 1024);
        assert_eq!(scale_perf(2000, 500, 1000, 1024), Some(1000));
        assert_eq!(scale_perf(2000, 1000, 1000, 512), Some(1000));
        assert_eq!(scale_perf(2000, 3000, 1000, 1024), Some(2000));
        assert_eq!(scale_perf(2000, 1, 0, 1024), None);
        assert_eq!(scale_perf(2000, 0, 1000, 1024), None);
    }
}
