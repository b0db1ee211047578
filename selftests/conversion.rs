//! Conversions that the guest asks for: KVM_HC_MAP_GPA_RANGE, and the data on both sides of them.

use gmemtest::harness::{Context, GmemVm, Side, TestResult};
use gmemtest::machine::{Errno, Exit, GuestOp, PAGE_SIZE, Reply, Vcpu, VmConfig, VmType};
use gmemtest::uapi::kvm_para::{
    KVM_ENOSYS, KVM_EXIT_HYPERCALL_LONG_MODE, KVM_HC_MAP_GPA_RANGE, KVM_MAP_GPA_RANGE_DECRYPTED,
    KVM_MAP_GPA_RANGE_ENCRYPTED,
};
use gmemtest::uapi::tdvmcall;
use gmemtest::{claim_eq, claim_matches, claim_ok, fail};
use kvm_bindings::KVM_CAP_EXIT_HYPERCALL;

gmemtest::suite! {
    /// KVM_HC_MAP_GPA_RANGE as an exit, and explicit conversions through it (private_mem_conversions_test).
    pub static SUITE: conversion needs [Vm, Guest, ExitHypercall] {
        /// KVM_CAP_EXIT_HYPERCALL takes the hypercalls that it advertises and no other bit: EINVAL
        /// (kvm_vm_ioctl_enable_cap()). A failure means that a hypercall can be asked for that KVM does not hand out.
        only_advertised_hypercalls_can_be_enabled[MASKS];

        /// Without the capability enabled the guest gets -KVM_ENOSYS, in a TD TDVMCALL_STATUS_SUBFUNC_UNSUPPORTED
        /// (tdx_map_gpa()), and user space hears nothing. A failure means that user space gets exits that it did not ask
        /// for.
        hypercall_is_unknown_until_enabled;

        /// The mask replaces the one before: 0 disables the exit again. A failure leaves an exit on for ever.
        mask_replaces_the_one_before;

        /// The exit carries the address, the number of pages and the attributes as the guest gave them, and the flag for
        /// 64-bit mode; the attributes are not looked at (kvm_emulate_hypercall()). A TD gives no attributes but an address
        /// with or without the SHARED bit: the exit has the address without it and ENCRYPTED or nothing (tdx_map_gpa()). A
        /// failure makes a VMM convert something else.
        exit_carries_the_arguments[ARGUMENTS];

        /// What user space writes to hypercall.ret is what the guest gets; 0 is there already. In a TD EAGAIN becomes
        /// TDVMCALL_STATUS_RETRY, EINVAL becomes TDVMCALL_STATUS_INVALID_OPERAND, and any other value makes KVM_RUN fail with
        /// EINVAL (tdx_complete_vmcall_map_gpa()). A failure means that a guest believes a conversion that did not happen.
        guest_gets_the_value_of_user_space[VALUES];

        /// A range that is unaligned, empty or wraps is -KVM_EINVAL to the guest without an exit; in a TD the statuses are
        /// TDVMCALL_STATUS_ALIGN_ERROR and TDVMCALL_STATUS_INVALID_OPERAND (tdx_map_gpa()). A failure hands garbage to user
        /// space.
        wrong_range_is_refused_without_an_exit[WRONG];

        /// A range converted to private and back keeps both of its contents, and the memory around it is untouched
        /// (private_mem_conversions_test: guest_test_explicit_conversion). A failure leaks or loses data.
        explicit_conversion_keeps_both_sides[RANGES] needs [GuestMemfd, MemoryAttributes];

        /// The same when user space frees the private page with every conversion to shared and allocates it with every
        /// conversion to private: the private side is then fresh each time. A failure leaks the former private contents.
        explicit_conversion_with_fallocate_starts_fresh[RANGES] needs [GuestMemfd, MemoryAttributes];

        /// A punched range reads zero when only it was mapped, and when all memory was (guest_test_punch_hole). A failure
        /// means that the guest keeps a freed page.
        punched_range_is_zero[PUNCHES] needs [GuestMemfd, MemoryAttributes];

        /// One conversion may cover two slots. A failure leaves a part of a range on its old side.
        conversion_spans_slots needs [GuestMemfd, MemoryAttributes];

        /// Two vCPUs that convert ranges of their own at the same time do not disturb each other. A failure is a race in
        /// the attributes or in the zapping.
        vcpus_convert_side_by_side needs [GuestMemfd, MemoryAttributes] timeout 60;
    }
}

const BASE: u64 = GmemVm::GPA;
const MIB2: u64 = 2 << 20;
const PAGES: u64 = MIB2 / PAGE_SIZE + 1;
const ENABLE: u64 = 1 << KVM_HC_MAP_GPA_RANGE;

type Mask = (u64, Result<(), Errno>);

const MASKS: &[(&str, Mask)] = &[
    ("none", (0, Ok(()))),
    ("map_gpa_range", (ENABLE, Ok(()))),
    ("map_gpa_range_and_bit_11", (ENABLE | 1 << 11, Err(Errno::EINVAL))),
    ("bit_0", (1, Err(Errno::EINVAL))),
    ("bit_13", (1 << 13, Err(Errno::EINVAL))),
    ("bit_63", (1 << 63, Err(Errno::EINVAL))),
];

fn only_advertised_hypercalls_can_be_enabled(cx: &Context, &(mask, result): &Mask) -> TestResult {
    let vm = claim_ok!(cx.machine().create_vm(VmConfig::Bare));
    claim_eq!(vm.enable_capability(KVM_CAP_EXIT_HYPERCALL, [mask, 0, 0, 0]), result, "mask {mask:#x}");
    Ok(())
}

/// A vCPU in a VM for which the exit was enabled with each of `masks` in turn.
fn vcpu_with(cx: &Context, masks: &[u64]) -> TestResult<Box<dyn Vcpu>> {
    let vm = claim_ok!(cx.machine().create_vm(VmConfig::Payload { vcpus: 1 }));
    for &mask in masks {
        claim_ok!(vm.enable_capability(KVM_CAP_EXIT_HYPERCALL, [mask, 0, 0, 0]));
    }
    Ok(claim_ok!(vm.create_vcpu(0)))
}

const ONE_PAGE: GuestOp = GuestOp::MapGpa { gpa: BASE, pages: 1, attributes: KVM_MAP_GPA_RANGE_ENCRYPTED };

fn is_td(cx: &Context) -> bool {
    cx.machine().spec().vm_type == VmType::Tdx
}

/// What the guest gets for a hypercall that is not enabled.
fn no_such_call(cx: &Context) -> Exit {
    Exit::Done(if is_td(cx) { tdvmcall::STATUS_SUBFUNC_UNSUPPORTED } else { KVM_ENOSYS.wrapping_neg() })
}

fn hypercall_is_unknown_until_enabled(cx: &Context) -> TestResult {
    let mut vcpu = vcpu_with(cx, &[])?;
    claim_eq!(vcpu.execute(ONE_PAGE), no_such_call(cx), "the hypercall in a VM that did not enable it");
    Ok(())
}

fn mask_replaces_the_one_before(cx: &Context) -> TestResult {
    claim_matches!(vcpu_with(cx, &[0, ENABLE])?.execute(ONE_PAGE), Exit::Hypercall { .. }, "enabled");
    claim_eq!(vcpu_with(cx, &[ENABLE, 0])?.execute(ONE_PAGE), no_such_call(cx), "enabled and disabled");
    Ok(())
}

/// Address, pages and attributes.
const ARGUMENTS: &[(&str, [u64; 3])] = &[
    ("one_page_private", [BASE, 1, KVM_MAP_GPA_RANGE_ENCRYPTED]),
    ("one_page_shared", [BASE, 1, KVM_MAP_GPA_RANGE_DECRYPTED]),
    ("frame_zero", [0, 1, KVM_MAP_GPA_RANGE_ENCRYPTED]),
    ("large_pages", [BASE, 512, KVM_MAP_GPA_RANGE_ENCRYPTED | 1]),
    ("no_slot", [BASE + (1 << 39), 7, KVM_MAP_GPA_RANGE_ENCRYPTED]),
    ("unknown_attributes", [BASE, 1, 0xFFFF_FFFF_FFFF_FFEF]),
    ("many_pages", [BASE, 1 << 40, 0]),
];
/// More pages than there are on one side of a TD's SHARED bit, which is bit 51 at most.
const TD_PAGES: u64 = (1 << 51) / PAGE_SIZE;

fn exit_carries_the_arguments(cx: &Context, &[gpa, pages, attributes]: &[u64; 3]) -> TestResult {
    let mut vcpu = vcpu_with(cx, &[ENABLE])?;
    let exit = vcpu.execute(GuestOp::MapGpa { gpa, pages, attributes });
    if is_td(cx) && pages > TD_PAGES {
        claim_eq!(exit, Exit::Done(tdvmcall::STATUS_INVALID_OPERAND), "a range on both sides of the SHARED bit");
        return Ok(());
    }
    let handed_out = if is_td(cx) { attributes & KVM_MAP_GPA_RANGE_ENCRYPTED } else { attributes };
    match exit {
        Exit::Hypercall { nr, args, flags } => {
            claim_eq!(nr, KVM_HC_MAP_GPA_RANGE, "the number");
            claim_eq!([args[0], args[1], args[2]], [gpa, pages, handed_out], "the arguments");
            claim_eq!(flags, KVM_EXIT_HYPERCALL_LONG_MODE, "the flags");
        }
        other => fail!("expected KVM_EXIT_HYPERCALL, the guest ended in {other:x?}"),
    }
    claim_eq!(vcpu.resume(Reply::Hypercall(0)), Exit::Done(0), "the guest goes on");
    Ok(())
}

/// The reply, what the guest gets, and what a TD gets: `None` where KVM_RUN is EINVAL.
type Answer = (Reply, u64, Option<u64>);

const VALUES: &[(&str, Answer)] = &[
    ("nothing", (Reply::None, 0, Some(0))),
    ("zero", (Reply::Hypercall(0), 0, Some(0))),
    ("eagain", (Reply::Hypercall(11), 11, Some(tdvmcall::STATUS_RETRY))),
    ("einval", (Reply::Hypercall(22), 22, Some(tdvmcall::STATUS_INVALID_OPERAND))),
    ("negative_einval", (Reply::Hypercall(-22_i64 as u64), -22_i64 as u64, None)),
    ("large", (Reply::Hypercall(0x1234_5678_9ABC_DEF0), 0x1234_5678_9ABC_DEF0, None)),
];

fn guest_gets_the_value_of_user_space(cx: &Context, row: &Answer) -> TestResult {
    let &(reply, value, status) = row;
    let mut vcpu = vcpu_with(cx, &[ENABLE])?;
    claim_matches!(vcpu.execute(ONE_PAGE), Exit::Hypercall { .. });
    let exit = vcpu.resume(reply);
    let expected = match is_td(cx) {
        // Until 6.18 there is one status for whatever user space answers.
        true if value != 0 => cx.by_release(&[((6, 16), Some(tdvmcall::STATUS_INVALID_OPERAND)), ((6, 19), status)])?,
        true => status,
        false => Some(value),
    };
    match expected {
        Some(value) => claim_eq!(exit, Exit::Done(value), "what the hypercall returned to the guest"),
        None => {
            claim_matches!(exit, Exit::Failed { errno: Errno::EINVAL, .. }, "KVM_RUN after a reply that means nothing");
            return Ok(());
        }
    }
    claim_matches!(vcpu.execute(ONE_PAGE), Exit::Hypercall { .. }, "the next hypercall");
    Ok(())
}

/// Address and number of pages.
const WRONG: &[(&str, (u64, u64))] = &[
    ("unaligned", (BASE + 1, 1)),
    ("empty", (BASE, 0)),
    ("wraps_to_frame_zero", (BASE, (BASE / PAGE_SIZE).wrapping_neg())),
    ("all_pages", (BASE, u64::MAX)),
];

fn wrong_range_is_refused_without_an_exit(cx: &Context, &(gpa, pages): &(u64, u64)) -> TestResult {
    let mut vcpu = vcpu_with(cx, &[ENABLE])?;
    let refused = match () {
        () if !is_td(cx) => -(Errno::EINVAL as i64) as u64,
        () if gpa.is_multiple_of(PAGE_SIZE) => tdvmcall::STATUS_INVALID_OPERAND,
        () => tdvmcall::STATUS_ALIGN_ERROR,
    };
    let exit = vcpu.execute(GuestOp::MapGpa { gpa, pages, attributes: 0 });
    claim_eq!(exit, Exit::Done(refused), "{pages:#x} pages at {gpa:#x}");
    Ok(())
}

/// What user space does with the file when the guest converts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Backing {
    Keep,
    Fallocate,
}

/// A guest whose memory is shared at first, and its vCPU.
struct Guest {
    vm: GmemVm,
    vcpu: Box<dyn Vcpu>,
    backing: Backing,
    /// The side on which the guest reaches each page now.
    sides: Vec<Side>,
    /// What happens to the private contents in a conversion to shared and back: they stay in the file, but a TD's are
    /// gone, since the module gives every page that is accepted as zeroes.
    loses_private: bool,
}

impl Guest {
    fn new(cx: &Context, backing: Backing) -> TestResult<Guest> {
        let vm = GmemVm::convertible(cx, PAGES)?;
        claim_ok!(vm.vm.enable_capability(KVM_CAP_EXIT_HYPERCALL, [ENABLE, 0, 0, 0]));
        let vcpu = vm.vcpu(0)?;
        let loses_private = is_td(cx) || backing == Backing::Fallocate;
        Ok(Guest { vm, vcpu, backing, sides: vec![Side::Shared; PAGES as usize], loses_private })
    }

    /// The guest asks for a conversion, and user space does it.
    fn convert(&mut self, at: u64, len: u64, side: Side) -> TestResult {
        convert(&self.vm, &mut *self.vcpu, at, len, side)?;
        self.sides[(at / PAGE_SIZE) as usize..((at + len) / PAGE_SIZE) as usize].fill(side);
        match (self.backing, side) {
            (Backing::Keep, _) => {}
            (Backing::Fallocate, Side::Private) => claim_ok!(self.vm.gmem.allocate(at, len)),
            (Backing::Fallocate, Side::Shared) => claim_ok!(self.vm.gmem.punch_hole(at, len)),
        }
        Ok(())
    }

    /// The stretches of a range of whole pages that are on one side: guest address, length.
    fn stretches(&self, at: u64, len: u64) -> Vec<(u64, u64)> {
        let mut stretches = Vec::new();
        let mut from = at;
        for page in (at..at + len).step_by(PAGE_SIZE as usize) {
            let side = self.sides[(page / PAGE_SIZE) as usize];
            let end = page + PAGE_SIZE;
            if end == at + len || self.sides[(end / PAGE_SIZE) as usize] != side {
                stretches.push((self.vm.address(from, side), end - from));
                from = end;
            }
        }
        stretches
    }

    fn fill(&mut self, at: u64, len: u64, byte: u8) -> TestResult {
        for (gpa, len) in self.stretches(at, len) {
            claim_matches!(self.vcpu.execute(GuestOp::Fill { gpa, len, byte }), Exit::Done(_));
        }
        Ok(())
    }

    fn claim_guest_sees(&mut self, at: u64, len: u64, byte: u8) -> TestResult {
        for (gpa, len) in self.stretches(at, len) {
            let check = GuestOp::Check { gpa, len, byte };
            claim_eq!(
                self.vcpu.execute(check),
                Exit::Done(0),
                "the guest sees {byte:#x} in {len:#x} bytes at {gpa:#x}"
            );
        }
        Ok(())
    }

    fn claim_host_sees(&self, at: u64, len: u64, byte: u8) -> TestResult {
        let different = self.vm.shared.find_mismatch(at, len, byte)?;
        claim_eq!(different, None, "the shared side has {byte:#x} in {len:#x} bytes at {at:#x}");
        Ok(())
    }
}

fn convert(vm: &GmemVm, vcpu: &mut dyn Vcpu, at: u64, len: u64, side: Side) -> TestResult {
    let attributes = match side {
        Side::Private => KVM_MAP_GPA_RANGE_ENCRYPTED,
        Side::Shared => KVM_MAP_GPA_RANGE_DECRYPTED,
    };
    let mut exit = vcpu.execute(GuestOp::MapGpa { gpa: vm.slot_gpa(at), pages: len / PAGE_SIZE, attributes });
    let mut done = 0;
    // A TD asks for at most 2 MiB at a time.
    while let Exit::Hypercall { nr: KVM_HC_MAP_GPA_RANGE, args: [gpa, pages, ..], .. } = exit {
        claim_eq!(gpa, vm.slot_gpa(at + done), "the next part of the range");
        vm.set_attributes(at + done, pages * PAGE_SIZE, side.attributes())?;
        done += pages * PAGE_SIZE;
        exit = vcpu.resume(Reply::Hypercall(0));
    }
    claim_eq!(done, len, "bytes that the guest asked to be {side:?}");
    claim_eq!(exit, Exit::Done(0), "the guest goes on as {side:?}");
    Ok(())
}

/// Offset and length of the range, in memory of 2 MiB and a page.
const RANGES: &[(&str, (u64, u64))] = &[
    ("first_page", (0, PAGE_SIZE)),
    ("first_2_mib", (0, MIB2)),
    ("second_page", (PAGE_SIZE, PAGE_SIZE)),
    ("2_mib_from_the_second_page", (PAGE_SIZE, MIB2)),
    ("page_after_2_mib", (MIB2, PAGE_SIZE)),
];

fn explicit_conversion_keeps_both_sides(cx: &Context, range: &(u64, u64)) -> TestResult {
    explicit_conversion(cx, *range, Backing::Keep)
}

fn explicit_conversion_with_fallocate_starts_fresh(cx: &Context, range: &(u64, u64)) -> TestResult {
    explicit_conversion(cx, *range, Backing::Fallocate)
}

fn explicit_conversion(cx: &Context, (at, len): (u64, u64), backing: Backing) -> TestResult {
    let mut guest = Guest::new(cx, backing)?;
    let all = guest.vm.len;
    guest.fill(0, all, 0xAA)?;
    guest.claim_host_sees(0, all, 0xAA)?;
    guest.vm.shared.fill(0, all, 0xCC)?;
    guest.claim_guest_sees(0, all, 0xCC)?;

    guest.fill(at, len, 0x11)?;
    guest.convert(at, len, Side::Private)?;
    guest.claim_guest_sees(at, len, 0)?;
    guest.fill(at, len, 0x22)?;
    guest.claim_host_sees(at, len, 0x11)?;
    guest.claim_guest_sees(at, len, 0x22)?;
    guest.claim_guest_sees(0, at, 0xCC)?;
    guest.claim_guest_sees(at + len, all - at - len, 0xCC)?;

    // Every 61st page back to shared, one by one, and private again.
    for page in (at..at + len).step_by(61 * PAGE_SIZE as usize) {
        guest.convert(page, PAGE_SIZE, Side::Shared)?;
        guest.claim_guest_sees(page, PAGE_SIZE, 0x11)?;
        guest.convert(page, PAGE_SIZE, Side::Private)?;
        let left = if guest.loses_private { 0 } else { 0x22 };
        guest.claim_guest_sees(page, PAGE_SIZE, left)?;
    }

    guest.convert(at, len, Side::Shared)?;
    guest.claim_guest_sees(at, len, 0x11)?;
    guest.fill(at, len, 0x33)?;
    guest.claim_host_sees(at, len, 0x33)?;
    guest.vm.shared.fill(at, len, 0x44)?;
    guest.claim_guest_sees(at, len, 0x44)
}

/// What of the private memory the guest has touched before the punch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Touched {
    Range,
    All,
}

/// Offset and length of the hole.
const PUNCHES: &[(&str, (u64, u64, Touched))] = &[
    ("first_page_of_all", (0, PAGE_SIZE, Touched::All)),
    ("first_2_mib_of_all", (0, MIB2, Touched::All)),
    ("second_page_of_all", (PAGE_SIZE, PAGE_SIZE, Touched::All)),
    ("2_mib_from_the_second_page_of_all", (PAGE_SIZE, MIB2, Touched::All)),
    ("page_after_2_mib_of_all", (MIB2, PAGE_SIZE, Touched::All)),
    ("first_page_alone", (0, PAGE_SIZE, Touched::Range)),
    ("first_2_mib_alone", (0, MIB2, Touched::Range)),
    ("second_page_alone", (PAGE_SIZE, PAGE_SIZE, Touched::Range)),
    ("2_mib_from_the_second_page_alone", (PAGE_SIZE, MIB2, Touched::Range)),
    ("page_after_2_mib_alone", (MIB2, PAGE_SIZE, Touched::Range)),
];

fn punched_range_is_zero(cx: &Context, &(at, len, touched): &(u64, u64, Touched)) -> TestResult {
    let mut guest = Guest::new(cx, Backing::Keep)?;
    let all = guest.vm.len;
    guest.convert(0, all, Side::Private)?;
    let (from, to) = if touched == Touched::All { (0, all) } else { (at, at + len) };
    guest.fill(from, to - from, 0xCC)?;
    claim_ok!(guest.vm.gmem.punch_hole(at, len));
    guest.claim_guest_sees(at, len, 0)?;
    guest.claim_guest_sees(from, at - from, 0xCC)?;
    guest.claim_guest_sees(at + len, to - at - len, 0xCC)
}

fn conversion_spans_slots(cx: &Context) -> TestResult {
    let mut guest = Guest::new(cx, Backing::Keep)?;
    guest.vm.delete_slot()?;
    let half = 256 * PAGE_SIZE;
    let whole = guest.vm.region();
    let first = gmemtest::machine::MemoryRegion { size: half, ..whole };
    let second = gmemtest::machine::MemoryRegion {
        slot: GmemVm::SLOT + 1,
        gpa: BASE + half,
        size: guest.vm.len - half,
        userspace_addr: whole.userspace_addr + half,
        ..whole
    };
    claim_ok!(guest.vm.vm.set_memory_region(&first));
    claim_ok!(guest.vm.vm.set_memory_region(&second.bound_to(&*guest.vm.gmem, half)));
    guest.fill(0, 2 * half, 0x11)?;
    guest.convert(half - 2 * PAGE_SIZE, 4 * PAGE_SIZE, Side::Private)?;
    guest.claim_guest_sees(half - 2 * PAGE_SIZE, 4 * PAGE_SIZE, 0)?;
    guest.fill(half - 2 * PAGE_SIZE, 4 * PAGE_SIZE, 0x22)?;
    guest.claim_host_sees(0, 2 * half, 0x11)?;
    guest.convert(half - PAGE_SIZE, 2 * PAGE_SIZE, Side::Shared)?;
    guest.claim_guest_sees(half - PAGE_SIZE, 2 * PAGE_SIZE, 0x11)?;
    guest.claim_guest_sees(half - 2 * PAGE_SIZE, PAGE_SIZE, 0x22)?;
    guest.claim_guest_sees(half + PAGE_SIZE, PAGE_SIZE, 0x22)
}

fn vcpus_convert_side_by_side(cx: &Context) -> TestResult {
    let Guest { vm, vcpu, loses_private, .. } = Guest::new(cx, Backing::Keep)?;
    let vcpus = [vcpu, vm.vcpu(1)?];
    std::thread::scope(|scope| {
        let vm = &vm;
        let threads = vcpus.map(|vcpu| scope.spawn(move || convert_own_pages(vm, vcpu, loses_private)));
        for thread in threads {
            match thread.join() {
                Ok(result) => result?,
                Err(_) => fail!("the thread of a vCPU panicked"),
            }
        }
        Ok(())
    })
}

/// Even pages for vCPU 0 and odd ones for vCPU 1: to private and back, again and again.
fn convert_own_pages(vm: &GmemVm, mut vcpu: Box<dyn Vcpu>, loses_private: bool) -> TestResult {
    let id = u64::from(vcpu.id());
    for round in 1..=5 {
        for page in (id..16).step_by(2) {
            let at = page * PAGE_SIZE;
            let (private, shared) = (vm.address(at, Side::Private), vm.address(at, Side::Shared));
            let stamp = round << 32 | page << 8 | id;
            vm.shared.write_u64(at, stamp)?;
            convert(vm, &mut *vcpu, at, PAGE_SIZE, Side::Private)?;
            let old = if round == 1 || loses_private { 0 } else { !((round - 1) << 32 | page << 8 | id) };
            claim_eq!(vcpu.execute(GuestOp::read_u64(private)), Exit::Done(old), "private page {page}, round {round}");
            claim_matches!(vcpu.execute(GuestOp::write_u64(private, !stamp)), Exit::Done(_));
            convert(vm, &mut *vcpu, at, PAGE_SIZE, Side::Shared)?;
            claim_eq!(vcpu.execute(GuestOp::read_u64(shared)), Exit::Done(stamp), "shared page {page}, round {round}");
        }
    }
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> std::process::ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
