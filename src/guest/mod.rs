//! The payload: the program that runs in the guest, and the protocol between it and this process.
//!
//! The payload is x86-64 code that is assembled into this program ([`image`]) for one fixed place in the guest: the last
//! megabyte below 4 GiB ([`layout`]). A vCPU starts it in the state in which a TD's vCPU starts ([`boot`]): 32-bit
//! protected mode, flat, paging off, at the reset vector, with its index in RSI and the boot parameter in RCX. It builds
//! its page tables, goes to long mode, and from then on obeys one command after the other from a mailbox page
//! ([`mailbox`]), one mailbox a vCPU, and reports each by an exit.
//!
//! ```text
//! 0xfff0_0000  area of vCPU 0    +0x0000 mailbox        shared with the host
//! 0xfff0_8000  area of vCPU 1    +0x1000 PML4           +0x2000 PDPT        +0x3000 page directory
//!     ...      (16 areas)        +0x4000 TSS, variables +0x5000 kernel stack +0x6000 user stack
//! 0xffff_c000  GDT, IDT
//! 0xffff_d000  code
//! 0xffff_fff0  reset vector
//! ```
//!
//! Memory accesses on behalf of a test (read, write, fill, check, touch, execute, and the loops) run at CPL 3, on every VM
//! type. On a host whose KVM is kvm_pvm, guest code at CPL 0 is emulated instruction by instruction: measured on 6.18.44,
//! 0.94 us an instruction against 0.38 ns natively at CPL 3, and the emulator reaches guest memory through a slot's
//! `userspace_addr`, never through its guest_memfd, so that a test would look at the wrong memory. What needs CPL 0
//! (INVLPG, TDCALL, hypercalls, HLT) is a few instructions behind INT3.
//!
//! Any guest-physical address is reached through a window: two 2 MiB entries of the vCPU's own page directory, which the
//! payload points at the address and flushes.

pub mod boot;
pub mod image;
pub mod layout;
pub mod mailbox;

pub use boot::{BootParameter, InitialState};
pub use mailbox::{Mailbox, Outcome};
