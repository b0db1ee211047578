//! KVM_CREATE_GUEST_MEMFD: what it refuses, and what it makes.

use std::process::ExitCode;

use gmemtest::harness::{Context, TestResult};
use gmemtest::machine::{Errno, VmConfig};
use gmemtest::{claim_eq, claim_err, claim_ok};

gmemtest::suite! {
    /// KVM_CREATE_GUEST_MEMFD: what it refuses, and what it makes.
    pub static SUITE: gmem_create needs [Vm, GuestMemfd] {
        /// A size that is zero, negative as a signed number, or not a multiple of the page size is refused with EINVAL
        /// (kvm_gmem_create()). A failure means that a file can be made whose end lies inside a page, or nowhere.
        size_is_refused[REFUSED_SIZES];

        /// A file of one page has that size, and nothing in it yet (kvm_gmem_create() allocates no page). A failure means
        /// that the size of a guest_memfd is not what was asked for.
        file_has_the_size_asked_for_and_no_pages;
    }
}

/// Size in bytes.
const REFUSED_SIZES: &[(&str, u64)] = &[
    ("zero", 0),
    ("one_byte", 1),
    ("page_less_one_byte", 4095),
    ("page_and_one_byte", 4097),
    ("sign_bit", 1 << 63),
    ("all_ones_page_aligned", !4095),
];

fn size_is_refused(cx: &Context, &size: &u64) -> TestResult {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    claim_err!(vm.create_guest_memfd(size, 0), Errno::EINVAL, "a guest_memfd of {size:#x} bytes");
    Ok(())
}

fn file_has_the_size_asked_for_and_no_pages(cx: &Context) -> TestResult {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let gmem = claim_ok!(vm.create_guest_memfd(4096, 0), "a guest_memfd of one page");
    let stat = gmem.stat()?;
    claim_eq!(stat.size, 4096, "st_size");
    claim_eq!(stat.blocks, 0, "st_blocks");
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
