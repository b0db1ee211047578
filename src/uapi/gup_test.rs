//! `mm/gup_test.h`: the debugfs file `gup_test` of kernels with CONFIG_GUP_TEST, whose ioctls take and drop long-term pins.

use libc::Ioctl;
use std::mem::size_of;

/// `PIN_LONGTERM_TEST_START`: pins a range of the caller's memory. 6.3.
pub const PIN_LONGTERM_TEST_START: Ioctl = libc::_IOW::<PinLongtermTest>(b'g' as u32, 7);
/// `PIN_LONGTERM_TEST_STOP`: drops every pin of this file.
pub const PIN_LONGTERM_TEST_STOP: Ioctl = libc::_IO(b'g' as u32, 8);
/// `PIN_LONGTERM_TEST_READ`: copies the pinned pages to the address that the argument points to.
pub const PIN_LONGTERM_TEST_READ: Ioctl = libc::_IOW::<u64>(b'g' as u32, 9);

/// `PIN_LONGTERM_TEST_FLAG_USE_WRITE`: pins for writing.
pub const PIN_LONGTERM_TEST_FLAG_USE_WRITE: u32 = 1;
/// `PIN_LONGTERM_TEST_FLAG_USE_FAST`: takes the lockless path.
pub const PIN_LONGTERM_TEST_FLAG_USE_FAST: u32 = 2;

/// `struct pin_longterm_test`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PinLongtermTest {
    /// First page.
    pub addr: u64,
    /// Bytes.
    pub size: u64,
    /// `PIN_LONGTERM_TEST_FLAG_*`.
    pub flags: u32,
    /// What the compiler adds in C.
    pub padding: u32,
}

const _: () = assert!(size_of::<PinLongtermTest>() == 24);
