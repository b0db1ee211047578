//! /dev/kvm: [`KvmMachine`].

use super::facility::Facilities;
use super::mapping::KvmMapping;
use super::vm::KvmVm;
use super::{ioctl, page, page_struct, vm};
use crate::machine::{
    Availability, CpuidEntry, Errno, Facility, Family, HostMemory, Machine, MachineSpec, Mapping, PageAccount, Release,
    TdxModule, Vm, VmConfig, VmType,
};
use crate::uapi::bindings::KVM_MAX_CPUID_ENTRIES;
use crate::uapi::kvm::KVM_CHECK_EXTENSION;
use kvm_ioctls::Kvm;
use std::sync::{Arc, OnceLock};

/// The KVM of the running kernel, with one VM type.
///
/// It can be made on any host: where /dev/kvm is not there, or may not be opened, each call returns that errno and
/// [`Machine::facility`] tells what would help.
pub struct KvmMachine {
    spec: MachineSpec,
    release: Release,
    kvm: Result<Arc<Kvm>, Errno>,
    module: Option<Arc<dyn TdxModule>>,
}

/// What was found out, by VM type: the kernel does not change under a process, nor under the forks that tests run in.
static FOUND: [OnceLock<Facilities>; VmType::Tdx as usize + 1] = [const { OnceLock::new() }; VmType::Tdx as usize + 1];

impl KvmMachine {
    /// Opens /dev/kvm.
    pub fn new(vm_type: VmType) -> KvmMachine {
        let kvm = Kvm::new().map(Arc::new).map_err(|error| Errno::from_raw(error.errno()));
        KvmMachine::with(vm_type, kvm)
    }

    fn with(vm_type: VmType, kvm: Result<Arc<Kvm>, Errno>) -> KvmMachine {
        KvmMachine { spec: MachineSpec::new(Family::Kvm, vm_type), release: running_release(), kvm, module: None }
    }

    /// The same machine under the name `spec`, with a way to its TDX module.
    pub fn with_module(self, spec: MachineSpec, module: Arc<dyn TdxModule>) -> KvmMachine {
        KvmMachine { spec, module: Some(module), ..self }
    }

    /// /dev/kvm, or why it could not be opened.
    pub(super) fn kvm(&self) -> Result<&Arc<Kvm>, Errno> {
        self.kvm.as_ref().map_err(|&errno| errno)
    }

    /// The VM type of this machine.
    pub(super) fn vm_type(&self) -> VmType {
        self.spec.vm_type
    }
}

/// `uname -r`, as far as behaviour depends on it.
fn running_release() -> Release {
    let unknown = Release::series(0, 0);
    nix::sys::utsname::uname()
        .ok()
        .and_then(|name| name.release().to_str().and_then(|release| release.parse().ok()))
        .unwrap_or(unknown)
}

impl Machine for KvmMachine {
    fn spec(&self) -> &MachineSpec {
        &self.spec
    }

    fn release(&self) -> Release {
        self.release
    }

    fn facility(&self, facility: Facility) -> Availability {
        if facility == Facility::ModuleInjection && self.module.is_some() {
            return Availability::present();
        }
        match &self.kvm {
            Ok(_) => FOUND[self.vm_type() as usize].get_or_init(|| Facilities::of(self)).availability(facility),
            Err(_) => Facilities::of(self).availability(facility),
        }
    }

    fn capability(&self, capability: u32) -> Result<i32, Errno> {
        ioctl::with_value(&**self.kvm()?, KVM_CHECK_EXTENSION, u64::from(capability))
    }

    fn create_vm(&self, config: VmConfig) -> Result<Arc<dyn Vm>, Errno> {
        Ok(Arc::new(KvmVm::create(self.kvm()?, self.vm_type(), config)?))
    }

    fn try_vm_type(&self, vm_type: u64) -> Result<(), Errno> {
        vm::create_vm_fd(self.kvm()?, vm_type).map(drop)
    }

    fn host_memory(&self, kind: HostMemory, len: u64) -> Result<Box<dyn Mapping>, Errno> {
        Ok(Box::new(KvmMapping::of_host_memory(kind, len)?))
    }

    fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>, Errno> {
        let supported = self.kvm()?.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
        supported.map(|cpuid| cpuid.as_slice().to_vec()).map_err(|error| Errno::from_raw(error.errno()))
    }

    fn page_flags(&self, frame: u64) -> Result<u64, Errno> {
        page::flags(frame)
    }

    fn page_map_count(&self, frame: u64) -> Result<u64, Errno> {
        page::map_count(frame)
    }

    fn frame_account(&self, frame: u64) -> Result<Option<PageAccount>, Errno> {
        page_struct::account(frame)
    }

    fn tdx_module(&self) -> Option<Arc<dyn TdxModule>> {
        self.module.clone()
    }

    fn drain_lru(&self) -> Result<(), Errno> {
        page::drain_lru()
    }

    fn memory_failure(&self, frame: u64) -> Result<(), Errno> {
        page::memory_failure(frame)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_dev_kvm_every_call_is_an_errno_and_the_skip_says_what_would_help() {
        for (errno, kind) in [
            (Errno::ENOENT, crate::machine::SkipKind::ConfigOff),
            (Errno::EACCES, crate::machine::SkipKind::NoPrivilege),
        ] {
            let machine = KvmMachine::with(VmType::Default, Err(errno));
            assert_eq!(machine.create_vm(VmConfig::Bare).err(), Some(errno));
            assert_eq!(machine.capability(234), Err(errno));
            for &facility in Facility::ALL {
                if let Availability::Absent { why, mend, .. } = machine.facility(facility) {
                    assert!(!why.is_empty() && !mend.is_empty(), "{facility}");
                }
            }
            for facility in [Facility::Vm, Facility::Guest, Facility::GuestMemfd] {
                match machine.facility(facility) {
                    Availability::Absent { kind: found, .. } => assert_eq!(found, kind, "{facility}"),
                    present => panic!("{facility}: {present:?}"),
                }
            }
        }
    }
}
