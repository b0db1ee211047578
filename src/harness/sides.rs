//! A VM whose memory changes sides by whichever call its kernel has: [`TwoSided`].

use std::sync::Arc;

use super::{Context, GmemVm, InPlaceVm, Side, TestResult};
use crate::machine::{Exit, Facility, GuestMemfd, GuestOp, Mapping, PAGE_SIZE, Vcpu, Vm, VmType};
use crate::{claim_eq, claim_matches};

/// The call that converts.
enum Dialect {
    /// KVM_SET_MEMORY_ATTRIBUTES of the VM: each side has memory of its own.
    Vm(GmemVm, Box<dyn Vcpu>),
    /// KVM_SET_MEMORY_ATTRIBUTES2 of the file: both sides are the file's pages.
    File(InPlaceVm),
}

/// What a page holds for the guest once it is private again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Return {
    /// Zeroes: a TD accepts it anew.
    Fresh,
    /// What the guest had written while it was private before: the shared side was elsewhere.
    Former,
    /// What it held while it was shared: it is the same page.
    Same,
}

/// A guest with memory that is private at first.
pub struct TwoSided {
    dialect: Dialect,
    returns: Return,
}

impl TwoSided {
    /// Guest-physical address of the memory.
    pub const GPA: u64 = GmemVm::GPA;

    /// A guest with `pages` private pages.
    ///
    /// # Errors
    /// The failure of any call, or a skip when the machine has no private memory.
    pub fn new(cx: &Context, pages: u64) -> TestResult<TwoSided> {
        cx.require(Facility::PrivateMemory)?;
        let is_td = cx.machine().spec().vm_type == VmType::Tdx;
        if cx.has(Facility::InPlaceConversion) {
            let returns = if is_td { Return::Fresh } else { Return::Same };
            return Ok(TwoSided { dialect: Dialect::File(InPlaceVm::new(cx, pages, Side::Private)?), returns });
        }
        let vm = GmemVm::private(cx, pages)?;
        let vcpu = vm.vcpu(0)?;
        let returns = if is_td { Return::Fresh } else { Return::Former };
        Ok(TwoSided { dialect: Dialect::Vm(vm, vcpu), returns })
    }

    /// What a page holds once it is private again.
    pub fn returns(&self) -> Return {
        self.returns
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        match &self.dialect {
            Dialect::Vm(vm, _) => vm.len,
            Dialect::File(vm) => vm.len,
        }
    }

    /// The VM.
    pub fn vm(&self) -> &dyn Vm {
        match &self.dialect {
            Dialect::Vm(vm, _) => &*vm.vm,
            Dialect::File(vm) => &*vm.vm,
        }
    }

    /// The vCPU.
    pub fn vcpu(&mut self) -> &mut dyn Vcpu {
        match &mut self.dialect {
            Dialect::Vm(_, vcpu) => &mut **vcpu,
            Dialect::File(vm) => &mut *vm.vcpu,
        }
    }

    /// The file with the private pages.
    pub fn gmem(&self) -> &dyn GuestMemfd {
        match &self.dialect {
            Dialect::Vm(vm, _) => &*vm.gmem,
            Dialect::File(vm) => &*vm.gmem,
        }
    }

    /// The VM, for another thread.
    pub fn vm_handle(&self) -> Arc<dyn Vm> {
        match &self.dialect {
            Dialect::Vm(vm, _) => vm.vm.clone(),
            Dialect::File(vm) => vm.vm.clone(),
        }
    }

    /// The file, for another thread.
    pub fn gmem_handle(&self) -> Arc<dyn GuestMemfd> {
        match &self.dialect {
            Dialect::Vm(vm, _) => vm.gmem.clone(),
            Dialect::File(vm) => vm.gmem.clone(),
        }
    }

    /// The shared side in the host process.
    pub fn host(&self) -> &dyn Mapping {
        match &self.dialect {
            Dialect::Vm(vm, _) => &*vm.shared,
            Dialect::File(vm) => &*vm.map,
        }
    }

    /// The guest-physical address with which the guest reaches byte `at` as memory of `side`.
    pub fn gpa(&self, at: u64, side: Side) -> u64 {
        let bit = if side == Side::Shared { self.vm().shared_bit() } else { 0 };
        (TwoSided::GPA + at) | bit
    }

    /// Converts a range.
    ///
    /// # Errors
    /// The failure of the call.
    pub fn convert(&self, at: u64, len: u64, side: Side) -> TestResult {
        match &self.dialect {
            Dialect::Vm(vm, _) => vm.set_attributes(at, len, side.attributes()),
            Dialect::File(vm) => vm.convert(at, len, side),
        }
    }

    /// The guest stores `byte` over a range.
    ///
    /// # Errors
    /// When it cannot.
    pub fn fill(&mut self, at: u64, len: u64, side: Side, byte: u8) -> TestResult {
        let fill = GuestOp::Fill { gpa: self.gpa(at, side), len, byte };
        claim_matches!(self.vcpu().execute(fill), Exit::Done(_), "{side:?} stores over {len:#x} bytes at {at:#x}");
        Ok(())
    }

    /// Claims that the guest finds `byte` everywhere in a range.
    ///
    /// # Errors
    /// When it does not.
    pub fn claim_guest(&mut self, at: u64, len: u64, side: Side, byte: u8) -> TestResult {
        let check = GuestOp::Check { gpa: self.gpa(at, side), len, byte };
        let what = format_args!("{byte:#x} to the guest in {len:#x} {side:?} bytes at {at:#x}");
        claim_eq!(self.vcpu().execute(check), Exit::Done(0), "{what}");
        Ok(())
    }

    /// Claims that the host finds `byte` everywhere in a range of shared memory.
    ///
    /// # Errors
    /// When it does not.
    pub fn claim_host(&self, at: u64, len: u64, byte: u8) -> TestResult {
        let found = self.host().find_mismatch(at, len, byte)?;
        claim_eq!(found, None, "{byte:#x} to the host in {len:#x} bytes at {at:#x}");
        Ok(())
    }

    /// Pages.
    pub fn pages(&self) -> u64 {
        self.size() / PAGE_SIZE
    }
}
