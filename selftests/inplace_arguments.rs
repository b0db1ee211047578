//! The arguments of KVM_SET_MEMORY_ATTRIBUTES2 on a guest_memfd, and what comes back in them.

use std::process::ExitCode;

use gmemtest::harness::{Context, InPlaceVm, Side, TestResult};
use gmemtest::machine::{Errno, Facility, HoldKind, MemoryAttributes, PAGE_SIZE, Release, VmConfig};
use gmemtest::uapi::kvm::KVM_MEMORY_ATTRIBUTE_PRIVATE;
use gmemtest::{claim, claim_eq, claim_ok};

gmemtest::suite! {
    /// KVM_SET_MEMORY_ATTRIBUTES2 checks every word of its argument, and writes one back.
    pub static SUITE: inplace_arguments needs [Vm, GuestMemfd] {
        /// The ioctl is ENOTTY on a kernel without it and EINVAL on a VM without private memory. A failure means that a
        /// VMM takes the feature for there when it is not.
        file_that_cannot_be_converted_says_why;

        /// Arguments that cannot be are EINVAL, and nothing is converted. A failure converts something else.
        wrong_argument_is_refused[WRONG] needs [InPlaceConversion];

        /// error_offset is written with EAGAIN only, in bytes; else the argument comes back as it was.
        error_offset_is_written_when_a_page_is_in_the_way needs [InPlaceConversion];

        /// KVM_SET_MEMORY_ATTRIBUTES of the VM does not know PRIVATE where the file keeps it: EINVAL.
        vm_does_not_take_the_attribute needs [InPlaceConversion];
    }
}

const P: u64 = PAGE_SIZE;
const PAGES: u64 = 4;

/// Offset, size, attributes, flags, and which reserved word is not 0.
#[derive(Clone, Copy)]
struct Argument {
    offset: u64,
    size: u64,
    attributes: u64,
    flags: u64,
    reserved: Option<usize>,
}

const GOOD: Argument =
    Argument { offset: 0, size: P, attributes: KVM_MEMORY_ATTRIBUTE_PRIVATE, flags: 0, reserved: None };

const WRONG: &[(&str, Argument)] = &[
    ("flag_bit_0", Argument { flags: 1, ..GOOD }),
    ("flag_bit_63", Argument { flags: 1 << 63, ..GOOD }),
    ("first_reserved_word", Argument { reserved: Some(0), ..GOOD }),
    ("last_reserved_word", Argument { reserved: Some(10), ..GOOD }),
    ("attribute_bit_0", Argument { attributes: 1, ..GOOD }),
    ("attribute_bit_4_with_private", Argument { attributes: 0x18, ..GOOD }),
    ("attribute_bit_63", Argument { attributes: 1 << 63, ..GOOD }),
    ("size_zero", Argument { size: 0, ..GOOD }),
    ("size_zero_at_the_end", Argument { offset: PAGES * P, size: 0, ..GOOD }),
    ("range_wraps", Argument { offset: P, size: P.wrapping_neg(), ..GOOD }),
    ("range_wraps_past_zero", Argument { offset: P, size: !(P - 1), ..GOOD }),
    ("unaligned_offset", Argument { offset: 1, ..GOOD }),
    ("unaligned_size", Argument { size: P + 1, ..GOOD }),
    ("size_below_a_page", Argument { size: 1, ..GOOD }),
    ("starts_at_the_end", Argument { offset: PAGES * P, ..GOOD }),
    ("starts_beyond_the_end", Argument { offset: (PAGES + 1) * P, ..GOOD }),
    ("ends_beyond_the_end", Argument { offset: 3 * P, size: 2 * P, ..GOOD }),
    ("all_and_a_page", Argument { size: (PAGES + 1) * P, ..GOOD }),
];

/// A page offset that none is: it stays where the kernel reports none.
const LEFT_ALONE: u64 = 0xABC;

impl Argument {
    fn words(self) -> [u64; 16] {
        let mut words = [0; 16];
        words[..5].copy_from_slice(&[self.offset, self.size, self.attributes, self.flags, LEFT_ALONE]);
        if let Some(index) = self.reserved {
            words[5 + index] = 1;
        }
        words
    }
}

fn file_that_cannot_be_converted_says_why(cx: &Context) -> TestResult {
    let vm = claim_ok!(cx.machine().create_vm(VmConfig::Bare));
    let gmem = claim_ok!(vm.create_guest_memfd(P, 0));
    let result = gmem.convert(0, P, Side::Private.attributes());
    if cx.has(Facility::InPlaceConversion) {
        claim_eq!(result, Ok(()), "the file of a VM with private memory is private already");
        return Ok(());
    }
    if cx.kernel_release() < Release::series(7, 4) {
        claim_eq!(result, Err(Errno::ENOTTY.into()), "a kernel without the ioctl");
    } else if result != Err(Errno::ENOTTY.into()) {
        claim!(!cx.has(Facility::PrivateMemory), "the machine converts in place");
        claim_eq!(result, Err(Errno::EINVAL.into()), "a VM without private memory");
    } else {
        gmemtest::skip!(ConfigOff, "kvm.gmem_in_place_conversion is off");
    }
    Ok(())
}

fn wrong_argument_is_refused(cx: &Context, argument: &Argument) -> TestResult {
    let vm = InPlaceVm::new(cx, PAGES, Side::Shared)?;
    vm.map.fill(0, vm.len, 0x5A)?;
    let mut words = argument.words();
    claim_eq!(vm.gmem.convert_words(&mut words), Err(Errno::EINVAL), "words {:x?}", argument.words());
    claim_eq!(words, argument.words(), "the argument comes back as it was");
    claim_eq!(vm.map.find_mismatch(0, vm.len, 0x5A)?, None, "nothing was converted");
    Ok(())
}

fn error_offset_is_written_when_a_page_is_in_the_way(cx: &Context) -> TestResult {
    cx.require(Facility::HoldGet)?;
    let vm = InPlaceVm::new(cx, PAGES, Side::Shared)?;
    vm.map.fill(0, vm.len, 0x5A)?;
    let hold = claim_ok!(vm.map.hold(2 * P, P, HoldKind::Get));
    let all = Argument { offset: P, size: 3 * P, ..GOOD };
    let mut words = all.words();
    claim_eq!(vm.gmem.convert_words(&mut words), Err(Errno::EAGAIN), "a range with a held page");
    let mut expected = all.words();
    expected[4] = 2 * P;
    claim_eq!(words, expected, "the argument after EAGAIN");
    drop(hold);
    let mut words = all.words();
    claim_eq!(vm.gmem.convert_words(&mut words), Ok(()), "the same range when the page is let go");
    claim_eq!(words, all.words(), "the argument after success");
    Ok(())
}

fn vm_does_not_take_the_attribute(cx: &Context) -> TestResult {
    let vm = InPlaceVm::new(cx, PAGES, Side::Shared)?;
    let private = KVM_MEMORY_ATTRIBUTE_PRIVATE;
    let range = MemoryAttributes { address: InPlaceVm::GPA, size: P, attributes: private, flags: 0 };
    claim_eq!(vm.vm.set_memory_attributes(&range), Err(Errno::EINVAL), "PRIVATE for the VM");
    vm.claim_side(0, Side::Shared)
}

/// The stand-alone binary.
pub fn main() -> ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
