//! The VM that most tests of guest accesses start with: [`GmemVm`].
//!
//! It is the place where machines differ in how a page becomes private and how a guest says which side it means, so that a
//! test need not know: KVM_SET_MEMORY_ATTRIBUTES on the VM or KVM_SET_MEMORY_ATTRIBUTES2 on the file, the attribute alone
//! or the SHARED bit of a TD's address.

use std::sync::Arc;

use super::{Context, TestResult};
use crate::claim_ok;
use crate::machine::{
    Facility, GuestMemfd, HostMemory, Mapping, MemoryAttributes, MemoryRegion, PAGE_SIZE, Protection, Vcpu, Vm,
    VmConfig,
};
use crate::uapi::kvm::{
    GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP, KVM_MEMORY_ATTRIBUTE_PRIVATE, KVM_MEMORY_EXIT_FLAG_PRIVATE,
};

/// The side of a guest's memory that an access or a conversion means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Memory that the host can reach.
    Shared,
    /// Memory that only the guest can reach.
    Private,
}

impl Side {
    /// The other one.
    pub fn other(self) -> Side {
        match self {
            Side::Shared => Side::Private,
            Side::Private => Side::Shared,
        }
    }

    /// The KVM_MEMORY_ATTRIBUTE_* bits of the side.
    pub fn attributes(self) -> u64 {
        match self {
            Side::Shared => 0,
            Side::Private => KVM_MEMORY_ATTRIBUTE_PRIVATE,
        }
    }

    /// The `flags` of KVM_EXIT_MEMORY_FAULT for an access to the side.
    pub fn fault_flags(self) -> u64 {
        match self {
            Side::Shared => 0,
            Side::Private => KVM_MEMORY_EXIT_FLAG_PRIVATE,
        }
    }

    /// The address by which a guest of `vm` reaches the side: a TD sets the SHARED bit, every other guest has one address
    /// for both.
    pub fn address(self, vm: &dyn Vm, gpa: u64) -> u64 {
        match self {
            Side::Shared => gpa | vm.shared_bit(),
            Side::Private => gpa,
        }
    }
}

/// A VM with the payload and one slot that is bound to a guest_memfd.
///
/// The fields are the handles, so that a test can close any of them when it wants.
pub struct GmemVm {
    /// The VM.
    pub vm: Arc<dyn Vm>,
    /// The file, bound from its first byte.
    pub gmem: Arc<dyn GuestMemfd>,
    /// What the slot's `userspace_addr` points to: a mapping of the file itself where the file is mappable and shared,
    /// ordinary memory where the guest's memory is private.
    pub shared: Box<dyn Mapping>,
    /// Bytes in the file and in the slot.
    pub len: u64,
    /// The side on which the guest reaches the file.
    pub side: Side,
    /// The KVM_CREATE_GUEST_MEMFD flags of the file.
    pub file_flags: u64,
}

impl GmemVm {
    /// The guest-physical address of the slot: 4 GiB.
    pub const GPA: u64 = 1 << 32;
    /// The id of the slot.
    pub const SLOT: u32 = 1;

    /// A VM whose guest reaches the file, by the way that its type has: [`GmemVm::private`] where the type has private
    /// memory, [`GmemVm::mappable`] otherwise.
    ///
    /// # Errors
    /// The failure of any call, or a skip when the machine has neither way.
    pub fn new(cx: &Context, pages: u64) -> TestResult<GmemVm> {
        if cx.has(Facility::PrivateMemory) { GmemVm::private(cx, pages) } else { GmemVm::mappable(cx, pages) }
    }

    /// A file with GUEST_MEMFD_FLAG_MMAP and GUEST_MEMFD_FLAG_INIT_SHARED: every guest access to the slot uses it, and
    /// the host maps it.
    ///
    /// # Errors
    /// The failure of any call, or a skip when the machine has no such file.
    pub fn mappable(cx: &Context, pages: u64) -> TestResult<GmemVm> {
        cx.require(Facility::GmemMmap)?;
        cx.require(Facility::GmemInitShared)?;
        let vm = claim_ok!(cx.machine().create_vm(VmConfig::Payload { vcpus: 2 }));
        let len = pages * PAGE_SIZE;
        let file_flags = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED;
        let gmem = claim_ok!(vm.create_guest_memfd(len, file_flags));
        let shared = claim_ok!(gmem.map(len, 0, Protection::SHARED_RW));
        GmemVm { vm, gmem, shared, len, side: Side::Shared, file_flags }.with_slot()
    }

    /// A file without flags beside ordinary memory; the whole slot is private, so that every guest access uses the file.
    ///
    /// # Errors
    /// The failure of any call, or a skip when the machine has no private memory.
    pub fn private(cx: &Context, pages: u64) -> TestResult<GmemVm> {
        cx.require(Facility::LazyAccept)?;
        let vm = GmemVm::beside_ordinary_memory(cx, pages)?;
        // A file of a kernel that converts in place starts private and says so itself.
        if !cx.has(Facility::InPlaceConversion) {
            vm.set_attributes(0, vm.len, KVM_MEMORY_ATTRIBUTE_PRIVATE)?;
        }
        Ok(vm)
    }

    /// A file without flags beside ordinary memory; the whole slot is shared until the test makes parts of it private. The
    /// two sides of a page are two pages.
    ///
    /// # Errors
    /// The failure of any call, or a skip when the machine has no private memory, or no two pages for one frame.
    pub fn convertible(cx: &Context, pages: u64) -> TestResult<GmemVm> {
        cx.require(Facility::LazyAccept)?;
        cx.require(Facility::MemoryAttributes)?;
        GmemVm::beside_ordinary_memory(cx, pages)
    }

    fn beside_ordinary_memory(cx: &Context, pages: u64) -> TestResult<GmemVm> {
        cx.require(Facility::PrivateMemory)?;
        let vm = claim_ok!(cx.machine().create_vm(VmConfig::Payload { vcpus: 2 }));
        let len = pages * PAGE_SIZE;
        let gmem = claim_ok!(vm.create_guest_memfd(len, 0));
        let shared = claim_ok!(cx.machine().host_memory(HostMemory::Shmem, len));
        GmemVm { vm, gmem, shared, len, side: Side::Private, file_flags: 0 }.with_slot()
    }

    fn with_slot(self) -> TestResult<GmemVm> {
        self.create_slot()?;
        Ok(self)
    }

    /// The region of the slot.
    pub fn region(&self) -> MemoryRegion<'_> {
        MemoryRegion::new(GmemVm::SLOT, GmemVm::GPA, self.len).at(self.shared.addr()).bound_to(&*self.gmem, 0)
    }

    /// Makes the slot; it exists already after the constructors.
    ///
    /// # Errors
    /// The failure of the call.
    pub fn create_slot(&self) -> TestResult {
        claim_ok!(self.vm.set_memory_region(&self.region()));
        Ok(())
    }

    /// Deletes the slot.
    ///
    /// # Errors
    /// The failure of the call.
    pub fn delete_slot(&self) -> TestResult {
        claim_ok!(self.vm.set_memory_region(&MemoryRegion::deletion(GmemVm::SLOT)));
        Ok(())
    }

    /// Sets the attributes of `len` bytes from byte `offset` of the slot.
    ///
    /// # Errors
    /// The failure of the call.
    pub fn set_attributes(&self, offset: u64, len: u64, attributes: u64) -> TestResult {
        let range = MemoryAttributes { address: GmemVm::GPA + offset, size: len, attributes, flags: 0 };
        claim_ok!(self.vm.set_memory_attributes(&range), "attributes {attributes:#x} for {range:x?}");
        Ok(())
    }

    /// The address by which the guest reaches byte `offset` of the file.
    pub fn gpa(&self, offset: u64) -> u64 {
        self.address(offset, self.side)
    }

    /// The address by which the guest reaches one side of byte `offset` of the slot.
    pub fn address(&self, offset: u64, side: Side) -> u64 {
        side.address(&*self.vm, GmemVm::GPA + offset)
    }

    /// The guest-physical address of byte `offset` of the slot as regions, attributes and exits have it.
    pub fn slot_gpa(&self, offset: u64) -> u64 {
        GmemVm::GPA + offset
    }

    /// The side that an access by [`GmemVm::gpa`] is on once the file is gone: where the file kept the attribute, none is
    /// left to make the frame private, and the access of a guest that does not say by the address what it means is shared
    /// (kvm_gmem_get_memory_attributes() of the in-place conversion series).
    pub fn side_without_a_file(&self, cx: &Context) -> Side {
        let said_by_address = self.vm.shared_bit() != 0;
        if cx.has(Facility::InPlaceConversion) && !said_by_address { Side::Shared } else { self.side }
    }

    /// Another file of the same size and flags.
    ///
    /// # Errors
    /// The failure of the call.
    pub fn new_file(&self) -> TestResult<Arc<dyn GuestMemfd>> {
        Ok(claim_ok!(self.vm.create_guest_memfd(self.len, self.file_flags)))
    }

    /// A vCPU that is ready to execute guest operations.
    ///
    /// # Errors
    /// The failure of the call.
    pub fn vcpu(&self, id: u32) -> TestResult<Box<dyn Vcpu>> {
        Ok(claim_ok!(self.vm.create_vcpu(id)))
    }
}
