//! KVM_GET_STATS_FD: the statistics of a VM or a vCPU by name.

use super::ioctl;
use super::mapping::errno_of;
use crate::machine::Errno;
use crate::uapi::bindings::{kvm_stats_desc, kvm_stats_header};
use crate::uapi::kvm::KVM_GET_STATS_FD;
use std::fs::File;
use std::mem::{offset_of, size_of};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

/// The first value of one statistic.
///
/// # Errors
/// ENOENT when the kernel has no statistic of that name; EIO of a dead VM or a file that ends early.
pub(super) fn read(fd: &impl AsRawFd, name: &str) -> Result<u64, Errno> {
    let stats = ioctl::with_value(fd, KVM_GET_STATS_FD, 0)?;
    // SAFETY: a new descriptor that nobody else owns.
    let stats = unsafe { File::from_raw_fd(stats) };
    let mut header = [0; size_of::<kvm_stats_header>()];
    read_at(&stats, &mut header, 0)?;
    let field = |offset: usize| u32_at(&header, offset);
    let name_size = field(offset_of!(kvm_stats_header, name_size)) as usize;
    let count = field(offset_of!(kvm_stats_header, num_desc)) as usize;
    let data = u64::from(field(offset_of!(kvm_stats_header, data_offset)));
    let record = size_of::<kvm_stats_desc>() + name_size;
    let mut descriptors = vec![0; record * count];
    read_at(&stats, &mut descriptors, u64::from(field(offset_of!(kvm_stats_header, desc_offset))))?;
    for descriptor in descriptors.chunks_exact(record) {
        let text = &descriptor[size_of::<kvm_stats_desc>()..];
        if text.split(|&byte| byte == 0).next() == Some(name.as_bytes()) {
            let mut value = [0; 8];
            let offset = u32_at(descriptor, offset_of!(kvm_stats_desc, offset));
            read_at(&stats, &mut value, data + u64::from(offset))?;
            return Ok(u64::from_le_bytes(value));
        }
    }
    Err(Errno::ENOENT)
}

fn read_at(file: &File, buf: &mut [u8], offset: u64) -> Result<(), Errno> {
    file.read_exact_at(buf, offset).map_err(errno_of)
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().expect("four bytes"))
}
