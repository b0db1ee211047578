//! KVM_MEMORY_ENCRYPT_OP: arguments in the layout of the ABI.

use super::super::ioctl;
use crate::machine::{CpuidEntry, Errno, TdxAnswer, TdxCommand, TdxData};
use crate::uapi::kvm::KVM_MEMORY_ENCRYPT_OP;
use crate::uapi::kvm_x86::{KvmCpuid2Head, KvmTdxCapabilities, KvmTdxCmd, KvmTdxInitVm};
use crate::uapi::tdx_status::TdxStatus;
use std::mem::size_of;
use std::os::fd::AsRawFd;

/// The most entries that the kernel writes into a list: KVM_MAX_CPUID_ENTRIES.
const MAX_ENTRIES: usize = 256;

/// Issues a sub-command on a VM or a vCPU.
pub(in crate::kvm) fn issue(fd: &impl AsRawFd, command: TdxCommand<'_>) -> TdxAnswer {
    let TdxCommand { id, flags, data, hw_error } = command;
    let mut argument = KvmTdxCmd { id, flags, data: 0, hw_error };
    let mut call = |data: u64| {
        argument.data = data;
        // SAFETY: the structure is the ioctl's. What `data` points to is a buffer of the layout and of at least the size
        // that the sub-command has, or a number that the kernel fails to copy from.
        let result = unsafe { ioctl::with_struct(fd, KVM_MEMORY_ENCRYPT_OP, &mut argument) };
        TdxAnswer { result: result.map(drop), hw_error: TdxStatus(argument.hw_error) }
    };
    match data {
        TdxData::Value(value) => call(value),
        TdxData::Region(region) => call(std::ptr::from_mut(region) as u64),
        TdxData::InitVm(init) => {
            let list = List::new(&init.fixed, init.fixed.cpuid.nent, &init.entries);
            call(list.address())
        }
        TdxData::Capabilities(capabilities) => {
            let list = List::new(&capabilities.fixed, capabilities.fixed.cpuid.nent, &capabilities.entries);
            let answer = call(list.address());
            capabilities.fixed = list.head::<KvmTdxCapabilities>();
            if answer.result.is_ok() {
                capabilities.entries = list.entries::<KvmTdxCapabilities>(capabilities.fixed.cpuid.nent);
            }
            answer
        }
        TdxData::Cpuid(cpuid) => {
            let list = List::new(&cpuid.head, cpuid.head.nent, &cpuid.entries);
            let answer = call(list.address());
            cpuid.head = list.head::<KvmCpuid2Head>();
            if answer.result.is_ok() {
                cpuid.entries = list.entries::<KvmCpuid2Head>(cpuid.head.nent);
            }
            answer
        }
    }
}

/// The same with an argument at an address where nothing is mapped.
pub(in crate::kvm) fn issue_unreadable(fd: &impl AsRawFd) -> Result<(), Errno> {
    const NOWHERE: u64 = 8;
    ioctl::with_value(fd, KVM_MEMORY_ENCRYPT_OP, NOWHERE).map(drop)
}

/// A head of the ABI that CPUID entries follow, in memory that the kernel may read and write up to the most entries.
struct List {
    words: Vec<u64>,
}

/// The heads that have entries behind them.
trait Head: Copy {}
impl Head for KvmTdxCapabilities {}
impl Head for KvmTdxInitVm {}
impl Head for KvmCpuid2Head {}

impl List {
    /// `nent` is what the kernel is told: there is room for as many, even where fewer are given.
    fn new<H: Head>(head: &H, nent: u32, entries: &[CpuidEntry]) -> List {
        let room = (nent as usize).min(MAX_ENTRIES).max(entries.len());
        let bytes = size_of::<H>() + room * size_of::<CpuidEntry>();
        let mut words = vec![0u64; bytes.div_ceil(8)];
        let start = words.as_mut_ptr().cast::<u8>();
        // SAFETY: the buffer has room for the head and for all entries after it; both are plain integers.
        unsafe {
            std::ptr::copy_nonoverlapping(std::ptr::from_ref(head).cast::<u8>(), start, size_of::<H>());
            let bytes = size_of_val(entries);
            std::ptr::copy_nonoverlapping(entries.as_ptr().cast::<u8>(), start.add(size_of::<H>()), bytes);
        }
        List { words }
    }

    fn address(&self) -> u64 {
        self.words.as_ptr() as u64
    }

    fn head<H: Head>(&self) -> H {
        // SAFETY: the buffer begins with a head, and any bits are one. The kernel wrote behind the compiler's back, before
        // the system call returned.
        unsafe { std::ptr::read_volatile(self.words.as_ptr().cast()) }
    }

    fn entries<H: Head>(&self, nent: u32) -> Vec<CpuidEntry> {
        let room = (self.words.len() * 8 - size_of::<H>()) / size_of::<CpuidEntry>();
        let entry = |index: usize| {
            let offset = size_of::<H>() + index * size_of::<CpuidEntry>();
            // SAFETY: the index is below the room; as in `head`. Entries are 4-byte aligned, as is their offset.
            unsafe { std::ptr::read_volatile(self.words.as_ptr().cast::<u8>().add(offset).cast()) }
        };
        (0..(nent as usize).min(room)).map(entry).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_has_room_for_what_the_kernel_is_told() {
        let entry = CpuidEntry { function: 7, eax: 1, edx: 4, ..Default::default() };
        let head = KvmCpuid2Head { nent: 5, padding: 0 };
        let list = List::new(&head, 5, &[entry]);
        assert_eq!(list.words.len() * 8, 8 + 5 * 40);
        assert_eq!(list.head::<KvmCpuid2Head>(), head);
        let read = list.entries::<KvmCpuid2Head>(5);
        assert_eq!((read.len(), read[0].function, read[0].edx, read[4].function), (5, 7, 4, 0));
        assert_eq!(list.entries::<KvmCpuid2Head>(900).len(), 5);
        assert_eq!(List::new(&head, u32::MAX, &[]).words.len() * 8, 8 + 256 * 40);
    }
}
