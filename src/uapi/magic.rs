//! `linux/magic.h`: file system types.

/// `GUEST_MEMFD_MAGIC`: `f_type` of a guest_memfd. 6.19 (guest_memfd has an inode cache of its own since then).
pub const GUEST_MEMFD_MAGIC: i64 = 0x474d_454d;
