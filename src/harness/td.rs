//! A TD that a test builds step by step: [`Td`].

use std::sync::Arc;

use super::{Context, TestResult};
use crate::machine::{
    CpuidEntry, Errno, GuestMemfd, HostMemory, Mapping, MemoryAttributes, MemoryRegion, PAGE_SIZE, TdxAnswer,
    TdxCapabilities, TdxCommand, TdxCpuid, TdxData, TdxInitVm, Vcpu, Vm, VmConfig, tdx_cpuid,
};
use crate::uapi::kvm::{KVM_CAP_SPLIT_IRQCHIP, KVM_MEMORY_ATTRIBUTE_PRIVATE};
use crate::uapi::kvm_x86::{
    KVM_TDX_CAPABILITIES, KVM_TDX_FINALIZE_VM, KVM_TDX_GET_CPUID, KVM_TDX_INIT_MEM_REGION, KVM_TDX_INIT_VCPU,
    KVM_TDX_INIT_VM, KvmTdxInitMemRegion,
};
use crate::{claim_eq, claim_ok, fail};

/// ATTRIBUTES.SEPT_VE_DISABLE.
const SEPT_VE_DISABLE: u64 = 1 << 28;
/// The most entries a CPUID list has.
const MAX_ENTRIES: u32 = 256;
/// XFAM of x87 and SSE, which every TD has.
const XFAM: u64 = 3;

/// A VM of type 5, at whatever step of its life the test wants: no step is taken that was not asked for.
pub struct Td {
    /// The VM.
    pub vm: Arc<dyn Vm>,
    supported: Vec<CpuidEntry>,
}

/// A sub-command on a vCPU.
///
/// # Errors
/// A failure when the machine's vCPUs know no sub-commands.
pub fn command_on(vcpu: &mut dyn Vcpu, command: TdxCommand<'_>) -> TestResult<TdxAnswer> {
    match vcpu.tdx() {
        Some(tdx) => Ok(tdx.command(command)),
        None => fail!("the machine's vCPUs have no KVM_MEMORY_ENCRYPT_OP"),
    }
}

impl Td {
    /// The guest-physical address of the slots that [`Td::memory`] makes: 4 GiB.
    pub const GPA: u64 = 1 << 32;
    /// The id of the slot that [`Td::memory`] makes.
    pub const SLOT: u32 = 1;

    /// KVM_CREATE_VM and nothing else.
    ///
    /// # Errors
    /// The failure of the call.
    pub fn bare(cx: &Context) -> TestResult<Td> {
        Td::with(cx, VmConfig::Bare)
    }

    /// With the payload and vCPUs that have run through KVM_TDX_INIT_VCPU; not finalised.
    ///
    /// # Errors
    /// The failure of a step.
    pub fn with_payload(cx: &Context, vcpus: u32) -> TestResult<Td> {
        Td::with(cx, VmConfig::PayloadUnfinalized { vcpus })
    }

    /// Up to KVM_TDX_INIT_VM: a split irqchip, and a configuration that suits the module.
    ///
    /// # Errors
    /// The failure of a step.
    pub fn initialized(cx: &Context) -> TestResult<Td> {
        let td = Td::bare(cx)?;
        td.split_irqchip()?;
        let init = td.configuration()?;
        claim_eq!(td.init_vm(&init)?, TdxAnswer::OK, "KVM_TDX_INIT_VM");
        Ok(td)
    }

    fn with(cx: &Context, config: VmConfig) -> TestResult<Td> {
        let vm = claim_ok!(cx.machine().create_vm(config));
        let supported = claim_ok!(cx.machine().supported_cpuid());
        Ok(Td { vm, supported })
    }

    /// A sub-command on the VM.
    ///
    /// # Errors
    /// A failure when the machine's VMs know no sub-commands.
    pub fn command(&self, command: TdxCommand<'_>) -> TestResult<TdxAnswer> {
        match self.vm.tdx() {
            Some(tdx) => Ok(tdx.command(command)),
            None => fail!("the machine's VMs have no KVM_MEMORY_ENCRYPT_OP"),
        }
    }

    /// KVM_ENABLE_CAP of KVM_CAP_SPLIT_IRQCHIP.
    ///
    /// # Errors
    /// The failure of the call.
    pub fn split_irqchip(&self) -> TestResult {
        claim_ok!(self.vm.enable_capability(KVM_CAP_SPLIT_IRQCHIP, [24, 0, 0, 0]));
        Ok(())
    }

    /// KVM_TDX_CAPABILITIES with room enough.
    ///
    /// # Errors
    /// The failure of the call.
    pub fn capabilities(&self) -> TestResult<TdxCapabilities> {
        let mut capabilities = TdxCapabilities::with_room(MAX_ENTRIES);
        let command = TdxCommand::new(KVM_TDX_CAPABILITIES, TdxData::Capabilities(&mut capabilities));
        claim_eq!(self.command(command)?, TdxAnswer::OK, "KVM_TDX_CAPABILITIES with room for {MAX_ENTRIES} entries");
        Ok(capabilities)
    }

    /// An argument that KVM_TDX_INIT_VM takes.
    ///
    /// # Errors
    /// The failure of KVM_TDX_CAPABILITIES.
    pub fn configuration(&self) -> TestResult<TdxInitVm> {
        let capabilities = self.capabilities()?;
        let entries = tdx_cpuid::configured(&capabilities.entries, &self.supported);
        Ok(TdxInitVm::new(SEPT_VE_DISABLE & capabilities.fixed.supported_attrs, XFAM, entries))
    }

    /// KVM_TDX_INIT_VM.
    ///
    /// # Errors
    /// None of its own.
    pub fn init_vm(&self, init: &TdxInitVm) -> TestResult<TdxAnswer> {
        self.command(TdxCommand::new(KVM_TDX_INIT_VM, TdxData::InitVm(init)))
    }

    /// KVM_CREATE_VCPU and nothing else; with the payload, a vCPU that is waiting.
    ///
    /// # Errors
    /// The failure of the call.
    pub fn vcpu(&self, id: u32) -> TestResult<Box<dyn Vcpu>> {
        Ok(claim_ok!(self.vm.create_vcpu(id)))
    }

    /// The argument of KVM_SET_CPUID2 for a vCPU: with x2APIC.
    ///
    /// # Errors
    /// The failure of KVM_TDX_GET_CPUID.
    pub fn vcpu_cpuid(&self, vcpu: &mut dyn Vcpu) -> TestResult<Vec<CpuidEntry>> {
        let mut seen = TdxCpuid::with_room(MAX_ENTRIES);
        let answer = command_on(vcpu, TdxCommand::new(KVM_TDX_GET_CPUID, TdxData::Cpuid(&mut seen)))?;
        claim_eq!(answer, TdxAnswer::OK, "KVM_TDX_GET_CPUID with room for {MAX_ENTRIES} entries");
        Ok(tdx_cpuid::of_vcpu(&seen.entries, &self.supported))
    }

    /// A vCPU that has run through KVM_SET_CPUID2 and KVM_TDX_INIT_VCPU.
    ///
    /// # Errors
    /// The failure of a step.
    pub fn ready_vcpu(&self, id: u32) -> TestResult<Box<dyn Vcpu>> {
        let mut vcpu = self.vcpu(id)?;
        let cpuid = self.vcpu_cpuid(&mut *vcpu)?;
        set_cpuid(&mut *vcpu, &cpuid)?;
        let answer = command_on(&mut *vcpu, TdxCommand::new(KVM_TDX_INIT_VCPU, TdxData::Value(0)))?;
        claim_eq!(answer, TdxAnswer::OK, "KVM_TDX_INIT_VCPU of vCPU {id}");
        Ok(vcpu)
    }

    /// KVM_TDX_FINALIZE_VM.
    ///
    /// # Errors
    /// None of its own.
    pub fn finalize(&self) -> TestResult<TdxAnswer> {
        self.command(TdxCommand::new(KVM_TDX_FINALIZE_VM, TdxData::Value(0)))
    }

    /// A slot of some pages at [`Td::GPA`], private as a whole, and memory that its pages can be initialised from.
    ///
    /// # Errors
    /// The failure of a call.
    pub fn memory(&self, cx: &Context, pages: u64) -> TestResult<TdMemory> {
        let len = pages * PAGE_SIZE;
        let gmem = claim_ok!(self.vm.create_guest_memfd(len, 0));
        let shared = claim_ok!(cx.machine().host_memory(HostMemory::Anonymous, len));
        let source = claim_ok!(cx.machine().host_memory(HostMemory::Anonymous, len));
        let region = MemoryRegion::new(Td::SLOT, Td::GPA, len).at(shared.addr()).bound_to(&*gmem, 0);
        claim_ok!(self.vm.set_memory_region(&region));
        self.set_private(cx, &*gmem, 0, pages)?;
        Ok(TdMemory { gmem, shared, source, pages })
    }

    /// Makes pages of the slot at [`Td::GPA`] private.
    ///
    /// # Errors
    /// The failure of the call.
    pub fn set_private(&self, cx: &Context, gmem: &dyn GuestMemfd, page: u64, pages: u64) -> TestResult {
        let (offset, size, attributes) = (page * PAGE_SIZE, pages * PAGE_SIZE, KVM_MEMORY_ATTRIBUTE_PRIVATE);
        if cx.has(crate::machine::Facility::InPlaceConversion) {
            claim_ok!(gmem.convert(offset, size, attributes));
        } else {
            let range = MemoryAttributes { address: Td::GPA + offset, size, attributes, flags: 0 };
            claim_ok!(self.vm.set_memory_attributes(&range));
        }
        Ok(())
    }
}

/// KVM_SET_CPUID2.
///
/// # Errors
/// The failure of the call.
pub fn set_cpuid(vcpu: &mut dyn Vcpu, entries: &[CpuidEntry]) -> TestResult {
    match vcpu.tdx() {
        Some(tdx) => claim_ok!(tdx.set_cpuid(entries), "KVM_SET_CPUID2"),
        None => fail!("the machine's vCPUs have no KVM_SET_CPUID2"),
    }
    Ok(())
}

/// Memory of a TD: what [`Td::memory`] makes.
pub struct TdMemory {
    /// The private side.
    pub gmem: Arc<dyn GuestMemfd>,
    /// The shared side.
    pub shared: Box<dyn Mapping>,
    /// Where initial contents come from.
    pub source: Box<dyn Mapping>,
    /// How many pages the slot has.
    pub pages: u64,
}

impl TdMemory {
    /// The guest-physical address of a page.
    pub fn gpa(&self, page: u64) -> u64 {
        Td::GPA + page * PAGE_SIZE
    }

    /// The argument of KVM_TDX_INIT_MEM_REGION for some pages, from the same pages of the source.
    pub fn region(&self, page: u64, pages: u64) -> KvmTdxInitMemRegion {
        KvmTdxInitMemRegion {
            source_addr: self.source.addr() + page * PAGE_SIZE,
            gpa: self.gpa(page),
            nr_pages: pages,
        }
    }
}

/// KVM_TDX_INIT_MEM_REGION of a region, which tells the progress afterwards.
///
/// # Errors
/// A failure when the machine's vCPUs know no sub-commands.
pub fn init_mem_region(
    vcpu: &mut dyn Vcpu,
    region: &mut KvmTdxInitMemRegion,
    flags: u32,
) -> TestResult<Result<(), Errno>> {
    let command = TdxCommand::new(KVM_TDX_INIT_MEM_REGION, TdxData::Region(region)).with_flags(flags);
    Ok(command_on(vcpu, command)?.result)
}
