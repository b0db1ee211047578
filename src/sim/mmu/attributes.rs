//! KVM_SET_MEMORY_ATTRIBUTES.

use super::super::World;
use super::super::mutant::Mutant;
use super::super::schedule::{Lock, SchedulePoint};
use super::tdx::UnmapError;
use super::tdx::unmap::ZapContext;
use super::{VmId, ZapFilter};
use crate::machine::{Errno, MemoryAttributes, PAGE_SIZE};
use crate::uapi::kvm::KVM_MEMORY_ATTRIBUTE_PRIVATE;

impl World {
    /// KVM_SET_MEMORY_ATTRIBUTES.
    ///
    /// # Errors
    /// EIO, then EINVAL: flags, attributes, size and wrap, alignment. EFAULT when a private page cannot be unmapped and the
    /// policy reports it; nothing is stored then.
    pub fn set_attributes(&mut self, vm: VmId, argument: &MemoryAttributes) -> Result<(), Errno> {
        let kernel = self.profile.kernel;
        let has_private_memory = self.live_vm(vm)?.vm_type.has_private_memory();
        let MemoryAttributes { address, size, attributes, flags } = *argument;
        if flags != 0 && !self.mutant(Mutant::AttributesIgnoreFlags) {
            return Err(Errno::EINVAL);
        }
        let supported =
            if has_private_memory || self.mutant(Mutant::AttributesOnDefaultVm) { kernel.vm_attributes() } else { 0 };
        if attributes & !supported != 0 {
            return Err(Errno::EINVAL);
        }
        if size == 0 && self.mutant(Mutant::AttributesAcceptNothing) {
            return Ok(());
        }
        if size == 0 || address.checked_add(size).is_none() {
            return Err(Errno::EINVAL);
        }
        let aligned = address.is_multiple_of(PAGE_SIZE) && size.is_multiple_of(PAGE_SIZE);
        if !aligned && !self.mutant(Mutant::AttributesIgnoreAlignment) {
            return Err(Errno::EINVAL);
        }
        let (first, last) = (address / PAGE_SIZE, (address + size) / PAGE_SIZE);
        if self.vms[&vm].attributes.all(first, last, attributes) {
            return Ok(());
        }
        self.invalidate_begin(vm, first, last);
        let stored = self.unmap_and_store(vm, first, last, attributes);
        self.invalidate_end(vm, first, last);
        stored
    }

    fn unmap_and_store(&mut self, vm: VmId, first: u64, mut last: u64, attributes: u64) -> Result<(), Errno> {
        if !self.mutant(Mutant::AttributesSkipZap) {
            let end = match () {
                () if self.mutant(Mutant::AttributesZapOneShort) => last - 1,
                () if self.mutant(Mutant::AttributesZapOneLong) => last + 1,
                () => last,
            };
            self.zap_for_attributes(vm, first, end, attributes).map_err(|error| error.errno)?;
        }
        self.schedule_point(SchedulePoint::ConversionUnmapped, &[Lock::Slots(vm)]);
        if self.mutant(Mutant::AttributesPunch) {
            self.punch_gfns(vm, first, last);
        }
        if self.mutant(Mutant::AttributesOnePageShort) {
            last -= 1;
        }
        let everywhere = self.mutant(Mutant::AttributesOneVmForAll);
        for (_, state) in self.vms.iter_mut().filter(|(id, _)| **id == vm || everywhere) {
            state.attributes.set(first, last, attributes);
        }
        Ok(())
    }

    /// Going private unmaps shared mappings, going shared private ones, in every slot of the range.
    fn zap_for_attributes(&mut self, vm: VmId, first: u64, last: u64, attributes: u64) -> Result<(), UnmapError> {
        let filter =
            if attributes & KVM_MEMORY_ATTRIBUTE_PRIVATE != 0 { ZapFilter::Shared } else { ZapFilter::Private };
        for space in 0..self.vms[&vm].address_spaces() as u16 {
            for (_, from, to) in self.vms[&vm].slots.overlaps(space, first, last) {
                self.zap_gfns(vm, from, to, filter, ZapContext::Fallible)?;
            }
        }
        Ok(())
    }

    fn punch_gfns(&mut self, vm: VmId, first: u64, last: u64) {
        for (key, from, to) in self.vms[&vm].slots.overlaps(0, first, last) {
            let Some(slot) = self.vms[&vm].slots.get(key) else { continue };
            if let Some(inode) = slot.file.and_then(|file| self.gmem.files.get(&file)).map(|file| file.inode) {
                let index = slot.pgoff + (from - slot.base_gfn);
                self.gmem_truncate(inode, index, index + (to - from));
            }
        }
    }
}
