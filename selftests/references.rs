//! References to the pages of a guest_memfd, holder by holder, at every step of their life.

use std::process::ExitCode;

use gmemtest::harness::sides::TwoSided;
use gmemtest::harness::{Context, FolioSize, GmemVm, InPlaceVm, Side, TestResult};
use gmemtest::machine::{
    ConvertError, Errno, Exit, Facility, FaultWhen, GuestMemfd, GuestOp, HoldKind, Machine, ModuleFault, PAGE_SIZE,
    PageAccount, Release, VmType,
};
use gmemtest::{claim_eq, claim_matches, claim_ok, fail};

gmemtest::suite! {
    /// The page cache has one reference to a page of a guest_memfd, each host page table entry one, an LRU batch one, GUP
    /// one, a long-term pin 1024; the guest's mappings have none since 6.19. Conversion counts on exactly this.
    pub static SUITE: references needs [Vm, GuestMemfd, PageAccount] {
        /// An allocated page is held by the page cache and by the LRU batch of the CPU that allocated it, until that is
        /// drained.
        allocated_page_is_held_by_its_file_and_a_batch needs [DropCaches];

        /// Each mapping of the host that touched the page has a reference, and gives it back.
        each_host_mapping_has_a_reference needs [GmemMmap, GmemInitShared];

        /// vmsplice(2) takes one reference, an io_uring buffer 1024, each given back whole.
        hold_has_its_references[HOLDS] needs [GmemMmap, GmemInitShared];

        /// A mapping of the guest has no reference: since 6.19 for a TD, for other VMs always. Up to 6.18 the S-EPT has
        /// one for every page (tdx_pin()). A failure leaks pages, or lets them go while a TD uses them.
        guest_mapping_has_the_references_of_its_release needs [Guest];

        /// The reference of a guest mapping goes with the mapping: punch, slot deletion, VM close. Nothing is left.
        guest_mapping_leaves_nothing_behind[ENDS] needs [Guest];

        /// Conversion to private takes the host's references away, conversion to shared gives none back by itself.
        conversion_leaves_the_references_of_the_file needs [Guest, InPlaceConversion, LazyAccept];

        /// A punched page belongs to those who hold it: the file has a new one with references of its own.
        punched_page_is_the_holders[HOLDS] needs [GmemMmap, GmemInitShared];

        /// A split gives each page its own reference, a merge sums them up.
        split_and_merge_keep_the_sum[FOLIOS] needs [InPlaceConversion];

        /// Pages that were dirty and up to date are so after a split, and the folio is after the merge. A failure loses data:
        /// what is not up to date is zeroed.
        split_and_merge_keep_the_flags[FOLIOS] needs [Guest, InPlaceConversion, LazyAccept, SplitMappedFolio];

        /// A part of a folio that the guest has mapped becomes shared, unless the mapping of the rest holds references to
        /// the folio (policy pin-mapped): then the folio cannot be split, and only the whole of it is
        /// converted. EAGAIN is the model's end of a wait that the posted series does not end (spinning on the folio).
        mapped_folio_is_split_unless_its_mapping_holds_it[FOLIOS] needs [Guest, InPlaceConversion, LazyAccept];

        /// A folio that is allocated for shared memory is base pages at once: the host maps and holds single pages.
        shared_memory_is_base_pages[FOLIOS] needs [InPlaceConversion];

        /// A private page is blocked, tracked, removed and written back, in this order, once each. A failure leaves
        /// translations, or dirty cache lines of the TD's key, for the next owner of the page.
        unmap_makes_these_calls needs [Guest, ModuleInjection, LazyAccept];

        /// A module that is busy once is asked again after a kick: the punch succeeds and the VM lives on. A failure bugs
        /// a VM for a lock that somebody else had for a moment.
        busy_module_is_asked_again[LEAVES] needs [Guest, ModuleInjection, LazyAccept];
    }
}

const P: u64 = PAGE_SIZE;

const HOLDS: &[(&str, (HoldKind, &str, u32))] =
    &[("vmsplice", (HoldKind::Get, "get", 1)), ("io_uring", (HoldKind::Pin, "pin", 1024))];

fn account(cx: &Context, gmem: &dyn GuestMemfd, at: u64) -> TestResult<PageAccount> {
    match claim_ok!(cx.machine().page_account(gmem, at)) {
        Some(account) => Ok(account),
        None => fail!("there is no page at {at:#x}"),
    }
}

/// Claims the number of references, and who has them where the machine tells.
fn claim_refs(
    cx: &Context,
    gmem: &dyn GuestMemfd,
    at: u64,
    holders: &[(&'static str, u32)],
    when: &str,
) -> TestResult<u64> {
    let found = account(cx, gmem, at)?;
    let sum: u32 = holders.iter().map(|(_, count)| count).sum();
    if let Some(mut named) = found.holders.clone() {
        named.sort_unstable();
        let mut expected = holders.to_vec();
        expected.sort_unstable();
        claim_eq!(named, expected, "who holds the page at {at:#x}, {when}");
    }
    claim_eq!(found.refs, sum, "references to the page at {at:#x}, {when}");
    Ok(found.frame)
}

const FILE: (&str, u32) = ("page-cache", 1);

fn drain(machine: &dyn Machine) -> TestResult {
    claim_ok!(machine.drain_lru());
    Ok(())
}

fn allocated_page_is_held_by_its_file_and_a_batch(cx: &Context) -> TestResult {
    let vm = GmemVm::new(cx, 2)?;
    claim_ok!(vm.gmem.allocate(0, P));
    claim_refs(cx, &*vm.gmem, 0, &[FILE, ("lru-batch", 1)], "just allocated")?;
    drain(cx.machine())?;
    let frame = claim_refs(cx, &*vm.gmem, 0, &[FILE], "drained")?;
    claim_eq!(claim_ok!(cx.machine().page_account(&*vm.gmem, P)), None, "the page that is not there");
    claim_ok!(vm.gmem.allocate(0, 2 * P));
    claim_eq!(account(cx, &*vm.gmem, 0)?.frame, frame, "the frame after it was allocated again");
    claim_refs(cx, &*vm.gmem, 0, &[FILE], "allocated again")?;
    Ok(())
}

fn each_host_mapping_has_a_reference(cx: &Context) -> TestResult {
    let vm = GmemVm::mappable(cx, 1)?;
    vm.shared.write_u64(0, 1)?;
    drain(cx.machine())?;
    claim_refs(cx, &*vm.gmem, 0, &[FILE, ("pte", 1)], "mapped once")?;
    let second = claim_ok!(vm.gmem.map(P, 0, gmemtest::machine::Protection::SHARED_READ));
    claim_refs(cx, &*vm.gmem, 0, &[FILE, ("pte", 1)], "with a mapping that touched nothing")?;
    second.read_u64(0)?;
    claim_refs(cx, &*vm.gmem, 0, &[FILE, ("pte", 2)], "mapped twice")?;
    claim_eq!(account(cx, &*vm.gmem, 0)?.map_count, 2, "page table entries");
    drop(second);
    claim_refs(cx, &*vm.gmem, 0, &[FILE, ("pte", 1)], "mapped once again")?;
    claim_ok!(vm.shared.advise(0, P, libc::MADV_DONTNEED));
    claim_refs(cx, &*vm.gmem, 0, &[FILE], "after MADV_DONTNEED")?;
    Ok(())
}

fn hold_has_its_references(cx: &Context, &(kind, name, count): &(HoldKind, &'static str, u32)) -> TestResult {
    cx.require(if kind == HoldKind::Get { Facility::HoldGet } else { Facility::HoldPin })?;
    let vm = GmemVm::mappable(cx, 1)?;
    vm.shared.write_u64(0, 1)?;
    drain(cx.machine())?;
    let one = claim_ok!(vm.shared.hold(0, P, kind));
    claim_refs(cx, &*vm.gmem, 0, &[FILE, ("pte", 1), (name, count)], "held once")?;
    let two = claim_ok!(vm.shared.hold(0, P, kind));
    claim_eq!(account(cx, &*vm.gmem, 0)?.refs, 2 + 2 * count, "references when it is held twice");
    drop(one);
    claim_refs(cx, &*vm.gmem, 0, &[FILE, ("pte", 1), (name, count)], "held once again")?;
    drop(two);
    claim_refs(cx, &*vm.gmem, 0, &[FILE, ("pte", 1)], "let go")?;
    Ok(())
}

/// What the S-EPT holds: nothing but in a TD of a release up to 6.18, or with a policy that pins.
fn guest_holder(cx: &Context) -> Option<(&'static str, u32)> {
    let spec = cx.machine().spec();
    let pins = match spec.option("policy") {
        Some(policy) => policy == "pin-mapped",
        None => cx.kernel_release() < Release::series(6, 19),
    };
    (spec.vm_type == VmType::Tdx && pins).then_some(("sept-pin", 1))
}

/// A VM whose guest uses its file, and what the host maps of it.
fn touched(cx: &Context) -> TestResult<(GmemVm, Box<dyn gmemtest::machine::Vcpu>)> {
    let vm = GmemVm::new(cx, 2)?;
    let mut vcpu = vm.vcpu(0)?;
    claim_matches!(vcpu.execute(GuestOp::write_u64(vm.gpa(0), 1)), Exit::Done(_), "a store of the guest");
    drain(cx.machine())?;
    Ok((vm, vcpu))
}

fn guest_mapping_has_the_references_of_its_release(cx: &Context) -> TestResult {
    let (vm, mut vcpu) = touched(cx)?;
    let holders: Vec<_> = [FILE].into_iter().chain(guest_holder(cx)).collect();
    claim_refs(cx, &*vm.gmem, 0, &holders, "mapped by the guest")?;
    claim_matches!(vcpu.execute(GuestOp::read_u64(vm.gpa(0))), Exit::Done(1), "a load of the guest");
    claim_refs(cx, &*vm.gmem, 0, &holders, "used again")?;
    Ok(())
}

/// What takes the guest's mapping away.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Punch,
    SlotDeletion,
    VmClose,
}

const ENDS: &[(&str, End)] = &[("punch", End::Punch), ("slot_deletion", End::SlotDeletion), ("vm_close", End::VmClose)];

fn guest_mapping_leaves_nothing_behind(cx: &Context, &end: &End) -> TestResult {
    let (vm, vcpu) = touched(cx)?;
    let frame = account(cx, &*vm.gmem, 0)?.frame;
    match end {
        End::Punch => {
            claim_ok!(vm.gmem.punch_hole(0, P));
            claim_eq!(claim_ok!(cx.machine().page_account(&*vm.gmem, 0)), None, "the page of the file");
            let mut vcpu = vcpu;
            claim_eq!(vcpu.execute(GuestOp::read_u64(vm.gpa(0))), Exit::Done(0), "a fresh page");
        }
        End::SlotDeletion => {
            vm.delete_slot()?;
            let found = claim_refs(cx, &*vm.gmem, 0, &[FILE], "after its slot was deleted")?;
            claim_eq!(found, frame, "the frame");
        }
        End::VmClose => {
            let GmemVm { vm, gmem, shared, .. } = vm;
            drop((vm, vcpu, shared));
            claim_ok!(gmem.punch_hole(P, P));
            // The file keeps the VM, and with it its slots and what they map.
            let holders: Vec<_> = [FILE].into_iter().chain(guest_holder(cx)).collect();
            claim_refs(cx, &*gmem, 0, &holders, "after the VM's descriptor was closed")?;
            claim_ok!(gmem.punch_hole(0, P));
            claim_eq!(claim_ok!(cx.machine().page_account(&*gmem, 0)), None, "the page of the file");
        }
    }
    Ok(())
}

fn conversion_leaves_the_references_of_the_file(cx: &Context) -> TestResult {
    let mut vm = InPlaceVm::new(cx, 2, Side::Shared)?;
    vm.map.write_u64(0, 1)?;
    vm.claim_guest(0, Side::Shared, 1)?;
    drain(cx.machine())?;
    let frame = claim_refs(cx, &*vm.gmem, 0, &[FILE, ("pte", 1)], "shared")?;
    vm.convert(0, P, Side::Private)?;
    claim_refs(cx, &*vm.gmem, 0, &[FILE], "just private")?;
    vm.guest_write(0, Side::Private, 2)?;
    let holders: Vec<_> = [FILE].into_iter().chain(guest_holder(cx)).collect();
    claim_refs(cx, &*vm.gmem, 0, &holders, "private and mapped by the guest")?;
    vm.convert(0, P, Side::Shared)?;
    claim_eq!(claim_refs(cx, &*vm.gmem, 0, &[FILE], "shared again")?, frame, "the frame");
    Ok(())
}

fn punched_page_is_the_holders(cx: &Context, &(kind, _, _): &(HoldKind, &'static str, u32)) -> TestResult {
    cx.require(if kind == HoldKind::Get { Facility::HoldGet } else { Facility::HoldPin })?;
    let vm = GmemVm::mappable(cx, 1)?;
    vm.shared.write_u64(0, 1)?;
    drain(cx.machine())?;
    let old = account(cx, &*vm.gmem, 0)?.frame;
    let hold = claim_ok!(vm.shared.hold(0, P, kind));
    claim_ok!(vm.gmem.punch_hole(0, P));
    claim_eq!(claim_ok!(cx.machine().page_account(&*vm.gmem, 0)), None, "the page of the file");
    vm.shared.write_u64(0, 2)?;
    drain(cx.machine())?;
    let new = claim_refs(cx, &*vm.gmem, 0, &[FILE, ("pte", 1)], "the new page")?;
    gmemtest::claim_ne!(new, old, "the frame of the new page, while the old one is held");
    drop(hold);
    claim_refs(cx, &*vm.gmem, 0, &[FILE, ("pte", 1)], "when the old one is let go")?;
    Ok(())
}

const FOLIOS: &[(&str, FolioSize)] = &[("of_2_mib", FolioSize::Pmd), ("of_1_gib", FolioSize::Pud)];

fn split_and_merge_keep_the_sum(cx: &Context, &size: &FolioSize) -> TestResult {
    let vm = InPlaceVm::of_folios(cx, size, size.bytes(), Side::Private)?;
    let pages = (size.bytes() / P) as u32;
    claim_ok!(vm.gmem.allocate(0, P));
    drain(cx.machine())?;
    claim_refs(cx, &*vm.gmem, 7 * P, &[("page-cache", pages)], "one folio")?;
    vm.convert(7 * P, P, Side::Shared)?;
    for at in [0, 7 * P, vm.len - P] {
        claim_refs(cx, &*vm.gmem, at, &[FILE], "split")?;
    }
    vm.map.write_u64(7 * P, 1)?;
    claim_refs(cx, &*vm.gmem, 7 * P, &[FILE, ("pte", 1)], "split, and mapped by the host")?;
    let pin = claim_ok!(vm.map.hold(7 * P, P, HoldKind::Pin));
    claim_refs(cx, &*vm.gmem, 7 * P, &[FILE, ("pte", 1), ("pin", 1024)], "split, and pinned")?;
    vm.claim_busy(0, vm.len, 7 * P)?;
    claim_refs(cx, &*vm.gmem, 7 * P, &[FILE, ("pin", 1024)], "after the conversion was refused")?;
    drop(pin);
    vm.convert(7 * P, P, Side::Private)?;
    claim_refs(cx, &*vm.gmem, 7 * P, &[("page-cache", pages)], "one folio again")?;
    Ok(())
}

fn split_and_merge_keep_the_flags(cx: &Context, &size: &FolioSize) -> TestResult {
    const UPTODATE_AND_DIRTY: u64 = 1 << 3 | 1 << 4;
    let mut vm = InPlaceVm::of_folios(cx, size, size.bytes(), Side::Private)?;
    vm.guest_write(0, Side::Private, 1)?;
    let claim_flags = |vm: &InPlaceVm, at: u64, when: &str| -> TestResult {
        let flags = vm.account(cx, at)?.flags;
        claim_eq!(flags & UPTODATE_AND_DIRTY, UPTODATE_AND_DIRTY, "flags {flags:#x} of the page at {at:#x}, {when}");
        Ok(())
    };
    claim_flags(&vm, 0, "written by the guest")?;
    vm.convert(7 * P, P, Side::Shared)?;
    for at in [0, P, 7 * P, vm.len - P] {
        claim_flags(&vm, at, "split")?;
    }
    vm.convert(7 * P, P, Side::Private)?;
    claim_flags(&vm, 9 * P, "merged")
}

fn mapped_folio_is_split_unless_its_mapping_holds_it(cx: &Context, &size: &FolioSize) -> TestResult {
    let mut vm = InPlaceVm::of_folios(cx, size, size.bytes(), Side::Private)?;
    vm.guest_write(0, Side::Private, 0x5EED)?;
    let held = ConvertError { errno: Errno::EAGAIN, offset: Some(7 * P) };
    let expected = if cx.has(Facility::SplitMappedFolio) { Ok(()) } else { Err(held) };
    claim_eq!(vm.try_convert(7 * P, P, Side::Shared), expected, "a page of the folio becomes shared");
    vm.claim_side(7 * P, if expected.is_ok() { Side::Shared } else { Side::Private })?;
    vm.claim_guest(0, Side::Private, 0x5EED)?;
    vm.convert(0, vm.len, Side::Shared)?;
    vm.claim_side(0, Side::Shared)
}

fn shared_memory_is_base_pages(cx: &Context, &size: &FolioSize) -> TestResult {
    let vm = InPlaceVm::of_folios(cx, size, size.bytes(), Side::Shared)?;
    claim_ok!(vm.gmem.allocate(3 * P, P));
    drain(cx.machine())?;
    for at in [0, 3 * P, vm.len - P] {
        claim_refs(cx, &*vm.gmem, at, &[FILE], "allocated for shared memory")?;
    }
    Ok(())
}

fn unmap_makes_these_calls(cx: &Context) -> TestResult {
    const UNMAP: [u16; 4] = [7, 38, 29, 41];
    cx.require(Facility::PrivateMemory)?;
    let Some(module) = cx.machine().tdx_module() else { gmemtest::skip!(NoHardwareInjection, "no module to look at") };
    let mut scene = TwoSided::new(cx, 2)?;
    scene.fill(0, 2 * P, Side::Private, 1)?;
    for convert in [false, true] {
        let position = claim_ok!(module.position());
        if convert {
            scene.convert(P, P, Side::Shared)?;
        } else {
            claim_ok!(scene.gmem().punch_hole(0, P));
        }
        let calls = claim_ok!(module.calls_since(position));
        let made = calls.iter().filter(|call| !call.guest && UNMAP.contains(&call.leaf));
        let made: Vec<(u16, u64)> = made.map(|call| (call.leaf, call.status)).collect();
        claim_eq!(made, UNMAP.map(|leaf| (leaf, 0)), "leaves and statuses, by a conversion: {convert}");
    }
    Ok(())
}

/// Numbers of leaves that an unmap calls.
const LEAVES: &[(&str, u16)] = &[("range_block", 7), ("page_remove", 29), ("track", 38)];
/// TDX_OPERAND_BUSY on the S-EPT tree.
const BUSY: u64 = 0x8000_0200_0000_0092;

fn busy_module_is_asked_again(cx: &Context, &leaf: &u16) -> TestResult {
    cx.require(Facility::PrivateMemory)?;
    let Some(module) = cx.machine().tdx_module() else { gmemtest::skip!(NoHardwareInjection, "no module to look at") };
    let gmem;
    let mut vcpu;
    let _keep: Box<dyn std::any::Any>;
    if cx.has(Facility::InPlaceConversion) {
        let vm = InPlaceVm::new(cx, 2, Side::Private)?;
        (gmem, vcpu) = (vm.gmem, vm.vcpu);
        _keep = Box::new((vm.vm, vm.map));
    } else {
        let (vm, first) = touched(cx)?;
        (gmem, vcpu) = (vm.gmem, first);
        _keep = Box::new((vm.vm, vm.shared));
    }
    claim_matches!(vcpu.execute(GuestOp::write_u64(GmemVm::GPA, 1)), Exit::Done(_), "a store of the guest");
    let fault = claim_ok!(module.add_fault(&ModuleFault::always(leaf, BUSY).when(FaultWhen::First(1))));
    claim_eq!(gmem.punch_hole(0, P), Ok(()), "a punch with the module busy once");
    claim_eq!(claim_ok!(module.fault_hits(fault)), 1, "how often the module was busy");
    claim_eq!(vcpu.execute(GuestOp::read_u64(GmemVm::GPA)), Exit::Done(0), "the guest afterwards");
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
