//! KVM_TDX_INIT_MEM_REGION: initial memory, page by page, with PAGE.ADD and MR.EXTEND.

use super::map::NewLeaf;
use super::{SHARED_BIT, TdState};
use crate::machine::{Errno, PAGE_SIZE, TdxData};
use crate::sim::World;
use crate::sim::gmem::fault::Access;
use crate::sim::host::{Cpu, Order};
use crate::sim::mmu::VmId;
use crate::sim::mmu::fault::Fault;
use crate::sim::tdx_module::{Leaf, Reg};
use crate::uapi::kvm_x86::{KVM_TDX_MEASURE_MEMORY_REGION, KvmTdxInitMemRegion};

/// TDX_EXTENDMR_CHUNKSIZE.
const EXTEND_CHUNK: u64 = 256;
/// How often a busy module is asked again before the call ends as if a signal had come.
const RETRIES: u32 = 1000;

impl World {
    /// KVM_TDX_INIT_MEM_REGION. Progress is reported in the region, also beside an error.
    ///
    /// # Errors
    /// Those of KVM spec 5.5.
    pub(super) fn tdx_init_mem_region(
        &mut self,
        vm: VmId,
        vcpu: u32,
        flags: u32,
        data: TdxData<'_>,
    ) -> Result<(), Errno> {
        let td = self.live_vm(vm)?.td.as_ref().filter(|td| td.state == TdState::Initialized).ok_or(Errno::EINVAL)?;
        if !td.vcpus.contains_key(&vcpu) || flags & !KVM_TDX_MEASURE_MEMORY_REGION != 0 {
            return Err(Errno::EINVAL);
        }
        let TdxData::Region(region) = data else { return Err(Errno::EFAULT) };
        self.check_initial_region(region)?;
        while region.nr_pages > 0 {
            self.populate_page(vm, region, flags)?;
            if region.source_addr != 0 {
                region.source_addr += PAGE_SIZE;
            }
            region.gpa += PAGE_SIZE;
            region.nr_pages -= 1;
        }
        Ok(())
    }

    fn check_initial_region(&self, region: &KvmTdxInitMemRegion) -> Result<(), Errno> {
        let &KvmTdxInitMemRegion { source_addr, gpa, nr_pages } = region;
        let aligned = source_addr.is_multiple_of(PAGE_SIZE) && gpa.is_multiple_of(PAGE_SIZE);
        // A source is needed unless the contents are in place already. Before 6.19 nothing but its pages is looked at.
        let kernel = self.profile.kernel;
        let sourced = source_addr != 0 || kernel.converts_in_place() || kernel.has_first_tdx_code();
        let end = gpa.wrapping_add(nr_pages.wrapping_mul(PAGE_SIZE));
        if !aligned || !sourced || nr_pages == 0 || end <= gpa || (gpa | (end - 1)) & SHARED_BIT != 0 {
            return Err(Errno::EINVAL);
        }
        Ok(())
    }

    /// The frame of the source page, where there is to be one.
    fn source_of(&mut self, region: &KvmTdxInitMemRegion) -> Result<Option<u64>, Errno> {
        if region.source_addr == 0 && self.profile.kernel.converts_in_place() {
            return Ok(None);
        }
        self.host_translate(region.source_addr, Access::Read, Cpu::Host).map(Some).map_err(|_| Errno::EFAULT)
    }

    /// kvm_gmem_populate() of one page.
    fn populate_page(&mut self, vm: VmId, region: &KvmTdxInitMemRegion, flags: u32) -> Result<(), Errno> {
        let gfn = region.gpa / PAGE_SIZE;
        let slot = self.live_vm(vm)?.slots.at(gfn).map(|(_, slot)| slot.clone());
        let slot = slot.filter(|slot| slot.has_gmem()).ok_or(Errno::EINVAL)?;
        if slot.file.is_none_or(|file| !self.gmem.files.contains_key(&file)) {
            return Err(Errno::EFAULT);
        }
        let first_code = self.profile.kernel.has_first_tdx_code();
        let source = if first_code { None } else { self.source_of(region)? };
        let pfn = self.gmem_get_pfn(slot.file, slot.pgoff + (gfn - slot.base_gfn))?;
        let there = self.live_vm(vm)?.mirror.get(gfn).is_some();
        let prepared = self.live_vm(vm)?.td.as_ref().is_some_and(|td| td.prepared.contains(&gfn));
        if first_code && (there || prepared) {
            return Err(Errno::EEXIST);
        }
        if !self.gfn_is_private(vm, gfn) {
            return Err(Errno::EINVAL);
        }
        let source = if first_code { self.source_of(region)? } else { source };
        if there {
            return Err(Errno::EIO);
        }
        let add = NewLeaf::Add { source: source.unwrap_or(pfn * PAGE_SIZE) };
        let mut mapped = self.tdx_map_leaf(vm, gfn, pfn, Order::Base, add);
        for _ in 0..RETRIES {
            if mapped != Err(Fault::Retry) {
                break;
            }
            mapped = self.tdx_map_leaf(vm, gfn, pfn, Order::Base, add);
        }
        if let (Err(_), Some(td)) = (&mapped, self.vms.get_mut(&vm).and_then(|state| state.td.as_mut())) {
            td.prepared.insert(gfn);
        }
        match mapped {
            Ok(()) => {}
            Err(Fault::Retry) => return Err(Errno::EINTR),
            Err(Fault::Failed(errno)) => return Err(errno),
            Err(_) => return Err(Errno::EIO),
        }
        if flags & KVM_TDX_MEASURE_MEMORY_REGION == 0 {
            return Ok(());
        }
        let tdr = self.td_of(vm).ok_or(Errno::EIO)?.tdr_pa();
        for offset in (0..PAGE_SIZE).step_by(EXTEND_CHUNK as usize) {
            let operands = [(Reg::Rcx, region.gpa + offset), (Reg::Rdx, tdr)];
            let status = self.tdh(Leaf::MrExtend, &operands).status;
            if !status.is_zero() {
                if !first_code {
                    self.tdx_bug_on(vm, Leaf::MrExtend, status);
                }
                return Err(Errno::EIO);
            }
        }
        Ok(())
    }
}
