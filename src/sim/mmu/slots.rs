//! Memslots: KVM_SET_USER_MEMORY_REGION and its second version, with every check in the kernel's order.

use super::super::World;
use super::super::gmem::{Binding, FileId};
use super::super::host::mm::TASK_SIZE;
use super::super::mutant::Mutant;
use super::tdx::SHARED_BIT;
use super::{MAX_GFN, VmId, ZapFilter};
use crate::machine::{Errno, PAGE_SIZE, VmType};
use crate::uapi::kvm::GUEST_MEMFD_FLAG_MMAP;
use crate::uapi::kvm::{KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY};
use std::collections::BTreeMap;

/// KVM_USER_MEM_SLOTS on x86: SHRT_MAX without the three internal slots.
pub const USER_SLOTS: u16 = 32764;
/// KVM_MEM_MAX_NR_PAGES.
const MAX_SLOT_PAGES: u64 = (1 << 31) - 1;

/// Address space and id of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotKey {
    /// The address space.
    pub space: u16,
    /// The id.
    pub id: u16,
}

impl SlotKey {
    /// Takes the `slot` field of the ioctl apart.
    pub fn new(slot: u32) -> SlotKey {
        SlotKey { space: (slot >> 16) as u16, id: slot as u16 }
    }
}

/// A memslot.
#[derive(Clone, Debug)]
pub struct Slot {
    /// First gfn.
    pub base_gfn: u64,
    /// Pages.
    pub pages: u64,
    /// KVM_MEM_* flags.
    pub flags: u32,
    /// Address of the shared side.
    pub userspace_addr: u64,
    /// Page index in the guest_memfd of the first gfn, with KVM_MEM_GUEST_MEMFD.
    pub pgoff: u64,
    /// The guest_memfd; `None` once it is closed.
    pub file: Option<FileId>,
    /// The guest_memfd that the slot was bound to, closed or not.
    pub bound: Option<FileId>,
    /// KVM_MEMSLOT_GMEM_ONLY: shared accesses too use the guest_memfd.
    pub gmem_only: bool,
    /// The dirty bitmap, with KVM_MEM_LOG_DIRTY_PAGES.
    pub dirty: Option<Vec<u64>>,
}

impl Slot {
    /// One past the last gfn.
    pub fn end_gfn(&self) -> u64 {
        self.base_gfn + self.pages
    }

    /// Whether the slot has KVM_MEM_GUEST_MEMFD.
    pub fn has_gmem(&self) -> bool {
        self.flags & KVM_MEM_GUEST_MEMFD != 0
    }

    /// Host virtual address of a gfn.
    pub fn hva(&self, gfn: u64) -> u64 {
        self.userspace_addr + (gfn - self.base_gfn) * PAGE_SIZE
    }
}

/// The slots of a VM.
#[derive(Debug, Default)]
pub struct Slots {
    slots: BTreeMap<SlotKey, Slot>,
    by_gfn: BTreeMap<(u16, u64), SlotKey>,
}

impl Slots {
    /// A slot by its key.
    pub fn get(&self, key: SlotKey) -> Option<&Slot> {
        self.slots.get(&key)
    }

    /// A slot by its key.
    pub fn get_mut(&mut self, key: SlotKey) -> Option<&mut Slot> {
        self.slots.get_mut(&key)
    }

    /// The slot of a gfn in the address space in which guests run.
    pub fn at(&self, gfn: u64) -> Option<(SlotKey, &Slot)> {
        let (_, key) = self.by_gfn.range(..=(0, gfn)).next_back()?;
        let slot = self.slots.get(key)?;
        (gfn < slot.end_gfn()).then_some((*key, slot))
    }

    /// Every slot.
    pub fn iter(&self) -> impl Iterator<Item = (SlotKey, &Slot)> {
        self.slots.iter().map(|(key, slot)| (*key, slot))
    }

    /// The slots of an address space that overlap `first..last`, with the overlap.
    pub fn overlaps(&self, space: u16, first: u64, last: u64) -> Vec<(SlotKey, u64, u64)> {
        let from = self.by_gfn.range(..=(space, first)).next_back().map_or((space, first), |(at, _)| *at);
        self.by_gfn
            .range(from..(space, last))
            .filter(|((at, _), _)| *at == space)
            .filter_map(|(_, key)| Some((*key, self.slots.get(key)?)))
            .map(|(key, slot)| (key, slot.base_gfn.max(first), slot.end_gfn().min(last)))
            .filter(|(_, from, to)| from < to)
            .collect()
    }

    fn insert(&mut self, key: SlotKey, slot: Slot) {
        self.by_gfn.insert((key.space, slot.base_gfn), key);
        self.slots.insert(key, slot);
    }

    fn remove(&mut self, key: SlotKey) -> Option<Slot> {
        let slot = self.slots.remove(&key)?;
        self.by_gfn.remove(&(key.space, slot.base_gfn));
        Some(slot)
    }

    /// Takes a closed file out of the slots that were bound to it.
    pub fn forget_file(&mut self, file: FileId) {
        for slot in self.slots.values_mut().filter(|slot| slot.file == Some(file)) {
            slot.file = None;
        }
    }
}

/// What the `guest_memfd` field of a region names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegionTarget {
    /// A guest_memfd.
    Gmem(FileId),
    /// A descriptor of something else.
    OtherFile,
    /// No open descriptor.
    NotOpen,
}

/// The argument of KVM_SET_USER_MEMORY_REGION2.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// `slot`.
    pub slot: u32,
    /// `flags`.
    pub flags: u32,
    /// `guest_phys_addr`.
    pub gpa: u64,
    /// `memory_size`.
    pub size: u64,
    /// `userspace_addr`.
    pub userspace_addr: u64,
    /// `guest_memfd`.
    pub target: RegionTarget,
    /// `guest_memfd_offset`.
    pub offset: u64,
}

impl World {
    /// KVM_SET_USER_MEMORY_REGION: the first version knows two flags.
    ///
    /// # Errors
    /// EINVAL for other flags, then those of the second version.
    pub fn set_region_v1(&mut self, vm: VmId, region: &Region) -> Result<(), Errno> {
        self.live_vm(vm)?;
        if region.flags & !(KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY) != 0 {
            return Err(Errno::EINVAL);
        }
        self.set_region(vm, region)
    }

    /// KVM_SET_USER_MEMORY_REGION2.
    ///
    /// # Errors
    /// In the order of the checks: EIO, EINVAL (id, flags, geometry), EEXIST (GPA overlap), EBADF and EINVAL (the file),
    /// EINVAL (limits of the address width), EEXIST (the range of the file is bound already).
    pub fn set_region(&mut self, vm: VmId, region: &Region) -> Result<(), Errno> {
        self.live_vm(vm)?;
        self.check_region(vm, region)?;
        let key = SlotKey::new(region.slot);
        let state = &self.vms[&vm];
        let old = state.slots.get(key).cloned();
        if region.size == 0 {
            return match old {
                None => Err(Errno::EINVAL),
                Some(old) => {
                    self.delete_slot(vm, key, &old);
                    Ok(())
                }
            };
        }
        let (base_gfn, pages) = (region.gpa / PAGE_SIZE, region.size / PAGE_SIZE);
        if let Some(old) = &old {
            let immutable = KVM_MEM_READONLY | KVM_MEM_GUEST_MEMFD;
            let changes_kind = (region.flags ^ old.flags) & immutable != 0;
            if region.flags & KVM_MEM_GUEST_MEMFD != 0 && !self.mutant(Mutant::GmemSlotIsMutable) {
                return Err(Errno::EINVAL);
            }
            if region.userspace_addr != old.userspace_addr || pages != old.pages || changes_kind {
                return Err(Errno::EINVAL);
            }
            if base_gfn == old.base_gfn {
                self.change_slot_flags(vm, key, region.flags);
                return Ok(());
            }
        }
        let state = &self.vms[&vm];
        let bad_file = region.flags & KVM_MEM_GUEST_MEMFD != 0 && region.target == RegionTarget::NotOpen;
        if bad_file && self.mutant(Mutant::BindBeforeOverlap) {
            return Err(Errno::EBADF);
        }
        if state.slots.overlaps(key.space, base_gfn, base_gfn + pages).iter().any(|(other, ..)| *other != key) {
            return Err(if self.mutant(Mutant::SlotOverlapIsEinval) { Errno::EINVAL } else { Errno::EEXIST });
        }
        let mut slot = Slot {
            base_gfn,
            pages,
            flags: region.flags,
            userspace_addr: region.userspace_addr,
            pgoff: region.offset / PAGE_SIZE,
            file: None,
            bound: None,
            gmem_only: false,
            dirty: (region.flags & KVM_MEM_LOG_DIRTY_PAGES != 0).then(|| bitmap(pages)),
        };
        let file = if slot.has_gmem() { Some(self.check_binding(vm, region)?) } else { None };
        if base_gfn + pages - 1 > MAX_GFN {
            return Err(Errno::EINVAL);
        }
        if self.vms[&vm].td.is_some() && ((base_gfn + pages - 1) * PAGE_SIZE) & SHARED_BIT != 0 {
            return Err(Errno::EINVAL);
        }
        if let Some(file) = file {
            self.bind(key, file, &slot)?;
            slot.file = Some(file);
            slot.bound = Some(file);
            let node = self.gmem.inode_of(file).expect("an open file has an inode");
            let in_place = self.profile.kernel.converts_in_place();
            slot.gmem_only =
                (node.flags & GUEST_MEMFD_FLAG_MMAP != 0 || in_place) && !self.mutant(Mutant::GmemOnlyIgnored);
        }
        if let Some(old) = old {
            self.zap_slot(vm, &old);
        }
        let state = self.vms.get_mut(&vm).expect("the VM was just found");
        state.slots.remove(key);
        state.slots.insert(key, slot);
        Ok(())
    }

    /// What is checked before the slot is looked for.
    fn check_region(&self, vm: VmId, region: &Region) -> Result<(), Errno> {
        let state = &self.vms[&vm];
        let key = SlotKey::new(region.slot);
        let gmem = region.flags & KVM_MEM_GUEST_MEMFD != 0;
        let mut valid = self.profile.kernel.gmem_slot_flag(state.vm_type);
        if !gmem {
            valid |= KVM_MEM_LOG_DIRTY_PAGES;
        }
        if state.vm_type != VmType::Tdx && (!gmem || self.mutant(Mutant::SlotAcceptsReadonlyGmem)) {
            valid |= KVM_MEM_READONLY;
        }
        let aligned = |value: u64| value.is_multiple_of(PAGE_SIZE);
        let hva_end = region.userspace_addr.checked_add(region.size);
        let bad = key.id >= USER_SLOTS
            || region.flags & !valid != 0
            || !aligned(region.size)
            || !aligned(region.gpa)
            || !aligned(region.userspace_addr)
            || hva_end.is_none_or(|end| end > TASK_SIZE)
            || (gmem && (!aligned(region.offset) || region.offset.checked_add(region.size).is_none()))
            || u32::from(key.space) >= state.address_spaces()
            || region.gpa.checked_add(region.size).is_none()
            || region.size / PAGE_SIZE > MAX_SLOT_PAGES;
        if bad { Err(Errno::EINVAL) } else { Ok(()) }
    }

    /// kvm_gmem_prepare_memory_region() up to the bindings.
    fn check_binding(&self, vm: VmId, region: &Region) -> Result<FileId, Errno> {
        let file = match region.target {
            RegionTarget::NotOpen => return Err(Errno::EBADF),
            RegionTarget::OtherFile => return Err(Errno::EINVAL),
            RegionTarget::Gmem(file) => file,
        };
        let open = self.gmem.files.get(&file).ok_or(Errno::EBADF)?;
        if open.vm != vm && !self.mutant(Mutant::BindIgnoresOwner) {
            return Err(Errno::EINVAL);
        }
        let size = self.gmem.inodes[&open.inode].size;
        let too_long = if self.profile.kernel.binds_with_signed_offset() {
            (region.offset as i64) < 0 || (region.offset.wrapping_add(region.size) as i64) > size as i64
        } else {
            region.offset.checked_add(region.size).is_none_or(|end| end > size)
        };
        if too_long && !self.mutant(Mutant::BindIgnoresSize) {
            return Err(Errno::EINVAL);
        }
        Ok(file)
    }

    fn bind(&mut self, key: SlotKey, file: FileId, slot: &Slot) -> Result<(), Errno> {
        let overlap_errno = self.profile.kernel.bind_overlap_errno();
        let ignore = self.mutant(Mutant::BindIgnoresOverlap);
        let open = self.gmem.files.get_mut(&file).ok_or(Errno::EBADF)?;
        let last = slot.pgoff + slot.pages;
        if !ignore && open.bindings.iter().any(|other| other.pgoff < last && slot.pgoff < other.pgoff + other.pages) {
            return Err(overlap_errno);
        }
        open.bindings.push(Binding { slot: key, pgoff: slot.pgoff, pages: slot.pages });
        Ok(())
    }

    fn change_slot_flags(&mut self, vm: VmId, key: SlotKey, flags: u32) {
        let Some(slot) = self.vms.get_mut(&vm).and_then(|vm| vm.slots.get_mut(key)) else { return };
        if slot.flags == flags {
            return;
        }
        slot.flags = flags;
        slot.dirty = (flags & KVM_MEM_LOG_DIRTY_PAGES != 0).then(|| bitmap(slot.pages));
        let (first, last) = (slot.base_gfn, slot.end_gfn());
        let state = self.vms.get_mut(&vm).expect("the VM was just found");
        let huge: Vec<u64> = state.direct.in_range(first, last);
        for gfn in huge {
            if state.direct.get(gfn).is_some_and(|(_, spte)| spte.order != super::super::host::Order::Base) {
                state.direct.remove(gfn);
            }
        }
    }

    fn delete_slot(&mut self, vm: VmId, key: SlotKey, old: &Slot) {
        if !self.mutant(Mutant::SlotDeleteSkipsZap) {
            self.zap_slot(vm, old);
        }
        if self.mutant(Mutant::SlotDeleteClearsAttributes)
            && let Some(state) = self.vms.get_mut(&vm)
        {
            state.attributes.set(old.base_gfn, old.end_gfn(), 0);
        }
        if let Some(state) = self.vms.get_mut(&vm) {
            state.slots.remove(key);
        }
        let keeps_binding = self.mutant(Mutant::SlotDeleteKeepsBinding);
        if let Some(open) = old.file.and_then(|file| self.gmem.files.get_mut(&file))
            && !keeps_binding
        {
            open.bindings.retain(|binding| binding.slot != key);
        }
    }

    /// Unmaps a slot that goes or moves: only its gfns, or everything on a default VM with KVM_X86_QUIRK_SLOT_ZAP_ALL.
    fn zap_slot(&mut self, vm: VmId, slot: &Slot) {
        let Some(state) = self.vms.get_mut(&vm) else { return };
        let quirk = state.disabled_quirks & crate::uapi::kvm_x86::KVM_X86_QUIRK_SLOT_ZAP_ALL == 0;
        if state.vm_type == VmType::Default && quirk {
            state.invalidate_seq += 1;
            state.direct.clear();
        } else {
            self.zap_gfns_void(vm, slot.base_gfn, slot.end_gfn(), ZapFilter::Both);
        }
    }

    /// KVM_GET_DIRTY_LOG: the bitmap, which is cleared.
    ///
    /// # Errors
    /// EIO, EINVAL for a slot number out of range, ENOENT for a slot without bitmap.
    pub fn dirty_log(&mut self, vm: VmId, slot: u32) -> Result<Vec<u64>, Errno> {
        let state = self.live_vm(vm)?;
        let key = SlotKey::new(slot);
        if u32::from(key.space) >= state.address_spaces() || key.id >= USER_SLOTS {
            return Err(Errno::EINVAL);
        }
        let bits = state.slots.get_mut(key).and_then(|slot| slot.dirty.as_mut()).ok_or(Errno::ENOENT)?;
        let empty = vec![0; bits.len()];
        Ok(std::mem::replace(bits, empty))
    }
}

fn bitmap(pages: u64) -> Vec<u64> {
    vec![0; pages.div_ceil(64) as usize]
}
