//! Shared mappings of a TD that outlive their pages.

use gmemtest::harness::{Context, Td, TestResult};
use gmemtest::machine::{
    Facility, GuestMemfd, HostMemory, Mapping, MemoryAttributes, MemoryRegion, PAGE_SIZE, TdxAnswer, Vcpu,
};
use gmemtest::uapi::kvm::{GUEST_MEMFD_FLAG_MMAP, KVM_MEMORY_ATTRIBUTE_PRIVATE};
use gmemtest::{claim, claim_eq, claim_ok, skip};
use std::sync::Arc;

gmemtest::suite! {
    /// A slot of a TD that is bound to a guest_memfd with GUEST_MEMFD_FLAG_MMAP (6.18): shared accesses of the guest use
    /// pages of the file too (KVM_MEMSLOT_GMEM_ONLY), through the shared EPT. Whatever takes a page from the file has to
    /// take it from there as well.
    pub static SUITE: tdx_stale needs [Vm, Tdx, GuestMemfd, GmemMmap, MemoryAttributes, PreFault, KvmStats] {
        /// No mapping of a page is left when the page leaves its file, or its slot, or becomes private: the statistic
        /// pages_4k is what it was before the page was mapped. A failure is a guest that reads and writes memory which is
        /// not its own any more: a freed page, that the kernel gives to whoever asks next.
        shared_mapping_goes_with_its_page[LOSSES];

        /// The same for a page that is private. A failure is the same, for the module's side.
        private_mapping_goes_with_its_page[LOSSES];
    }
}

const PAGES: u64 = 4;

/// How the guest loses its pages.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Loss {
    /// FALLOC_FL_PUNCH_HOLE.
    PunchHole,
    /// The last descriptor of the file is closed.
    Close,
    /// KVM_SET_USER_MEMORY_REGION2 with size 0.
    DeleteSlot,
    /// KVM_SET_MEMORY_ATTRIBUTES to the other kind of memory.
    Convert,
}

const LOSSES: &[(&str, Loss)] = &[
    ("punch_hole", Loss::PunchHole),
    ("close", Loss::Close),
    ("slot_deletion", Loss::DeleteSlot),
    ("conversion", Loss::Convert),
];

/// A finalised TD with a slot on a mappable file, nothing of it mapped.
struct Scene {
    gmem: Option<Arc<dyn GuestMemfd>>,
    vcpu: Box<dyn Vcpu>,
    _shared: Box<dyn Mapping>,
    td: Td,
}

impl Scene {
    fn new(cx: &Context) -> TestResult<Scene> {
        let td = Td::initialized(cx)?;
        let vcpu = td.ready_vcpu(0)?;
        let len = PAGES * PAGE_SIZE;
        let gmem = claim_ok!(td.vm.create_guest_memfd(len, GUEST_MEMFD_FLAG_MMAP), "a mappable file of a TD");
        // Memory that nobody may touch: what is mapped can come from the file only.
        let shared = claim_ok!(cx.machine().host_memory(HostMemory::NoAccess, len));
        let region = MemoryRegion::new(Td::SLOT, Td::GPA, len).at(shared.addr()).bound_to(&*gmem, 0);
        claim_ok!(td.vm.set_memory_region(&region));
        claim_eq!(td.finalize()?, TdxAnswer::OK, "KVM_TDX_FINALIZE_VM");
        Ok(Scene { gmem: Some(gmem), vcpu, _shared: shared, td })
    }

    fn mapped(&self) -> TestResult<u64> {
        Ok(claim_ok!(self.td.vm.statistic("pages_4k")))
    }

    fn set_attributes(&self, attributes: u64) -> TestResult {
        let range = MemoryAttributes { address: Td::GPA, size: PAGES * PAGE_SIZE, attributes, flags: 0 };
        claim_ok!(self.td.vm.set_memory_attributes(&range));
        Ok(())
    }
}

/// Maps the slot, takes its pages away, and claims that no mapping is left.
fn mapping_goes(cx: &Context, loss: Loss, attributes: u64) -> TestResult {
    let mut scene = Scene::new(cx)?;
    scene.set_attributes(attributes)?;
    let before = scene.mapped()?;
    let mapped = scene.vcpu.pre_fault(Td::GPA, PAGES * PAGE_SIZE, 0);
    claim_eq!((mapped.result, mapped.size), (Ok(()), 0), "KVM_PRE_FAULT_MEMORY of the slot");
    claim_eq!(scene.mapped()? - before, PAGES, "pages mapped");
    let Some(gmem) = scene.gmem.take() else { skip!(Declined, "the file is closed") };
    if cx.has(Facility::Cachestat) {
        claim_eq!(claim_ok!(gmem.cache_stat(0, 0)).cached, PAGES, "pages of the file: the guest uses them");
    }
    match loss {
        Loss::PunchHole => {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            claim_ok!(gmem.fallocate(mode, 0, (PAGES * PAGE_SIZE) as i64), "punching a hole");
            if cx.has(Facility::Cachestat) {
                claim_eq!(claim_ok!(gmem.cache_stat(0, 0)).cached, 0, "pages of the file afterwards");
            }
        }
        Loss::Close => drop(gmem),
        Loss::DeleteSlot => claim_ok!(scene.td.vm.set_memory_region(&MemoryRegion::deletion(Td::SLOT))),
        Loss::Convert => scene.set_attributes(attributes ^ KVM_MEMORY_ATTRIBUTE_PRIVATE)?,
    }
    let left = scene.mapped()?.saturating_sub(before);
    claim!(left == 0, "no mapping is left: {left} stale mappings of {PAGES} pages");
    Ok(())
}

fn shared_mapping_goes_with_its_page(cx: &Context, &loss: &Loss) -> TestResult {
    mapping_goes(cx, loss, 0)
}

fn private_mapping_goes_with_its_page(cx: &Context, &loss: &Loss) -> TestResult {
    mapping_goes(cx, loss, KVM_MEMORY_ATTRIBUTE_PRIVATE)
}

/// The stand-alone binary.
pub fn main() -> std::process::ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
