//! The seam: what a test may do to a machine, and the values that cross it.
//!
//! A [`Machine`] creates [`Vm`]s. A [`Vm`] creates [`GuestMemfd`]s and [`Vcpu`]s and sets memory regions and memory
//! attributes. A [`GuestMemfd`] is allocated, punched, converted, mapped and stat'ed. A [`Vcpu`] executes guest
//! operations and returns an [`Exit`] for each. Whatever a test asserts on comes back as a value: [`Errno`] for calls,
//! [`Exit`] for guest runs, [`HostFault`] for a host access that was a signal. Nothing is asserted on text.
//!
//! Two families implement it: the KVM of the running kernel, and the model in this process. A test that needs more than
//! every machine has names it as a [`Facility`], and is skipped with the reason that [`Availability`] carries.
//!
//! Dropping a handle is closing it: the last `Arc<dyn Vm>` is the VM file descriptor, the last `Arc<dyn GuestMemfd>` the
//! guest_memfd file descriptor, a `Box<dyn Vcpu>` the vCPU file descriptor, a `Box<dyn Mapping>` the VMA. No handle keeps
//! another one open, so that tests can close in any order.

mod account;
mod facility;
mod gmem;
mod host;
mod module;
mod spec;
mod tdx;
pub mod tdx_cpuid;
mod vcpu;
mod vm;

pub use account::PageAccount;
pub use facility::{Availability, Facility, SkipKind};
pub use gmem::{CacheStat, ConvertError, FileOp, FileStat, GuestMemfd, Protection};
pub use host::{HoldKind, HostFault, HostMemory, Mapping};
pub use module::{FaultEffect, FaultWhen, ModuleCall, ModuleFault, PageOwner, TdxModule};
pub use nix::errno::Errno;
pub use spec::{Family, MachineSpec, Release, SpecError, VmType};
pub use tdx::{CpuidEntry, TdxAnswer, TdxCapabilities, TdxCommand, TdxCpuid, TdxData, TdxInitVm, TdxVcpu, TdxVm};
pub use vcpu::{Exit, GuestOp, PreFault, Reply, Vcpu, VcpuControl};
pub use vm::{GmemBinding, MemoryAttributes, MemoryRegion, RegionFile, Vm, VmConfig};

use std::sync::Arc;

/// Bytes of a base page on x86-64.
pub const PAGE_SIZE: u64 = 4096;

/// Something that can create VMs: a VM type of the running kernel's KVM, or of the model.
pub trait Machine: Send + Sync {
    /// The spec that names this machine on every result line.
    fn spec(&self) -> &MachineSpec;

    /// The kernel release whose behaviour this machine shows: of the running kernel, or of the model's profile.
    fn release(&self) -> Release;

    /// Whether the machine has what a test needs, and if not, what would provide it.
    fn facility(&self, facility: Facility) -> Availability;

    /// KVM_CHECK_EXTENSION at system scope. Unknown capabilities are 0.
    fn capability(&self, capability: u32) -> Result<i32, Errno>;

    /// KVM_CREATE_VM with this machine's VM type, then whatever the configuration asks for.
    fn create_vm(&self, config: VmConfig) -> Result<Arc<dyn Vm>, Errno>;

    /// KVM_CREATE_VM with any type number, closed again at once.
    fn try_vm_type(&self, vm_type: u64) -> Result<(), Errno>;

    /// Memory of the host process, outside guest_memfd: the shared side of a memslot.
    fn host_memory(&self, kind: HostMemory, len: u64) -> Result<Box<dyn Mapping>, Errno>;

    /// The KPF_* bits of a page frame, as in /proc/kpageflags. Machines without [`Facility::PageFlags`] answer ENOSYS.
    fn page_flags(&self, _frame: u64) -> Result<u64, Errno> {
        Err(Errno::ENOSYS)
    }

    /// How many page table entries map a page frame, as in /proc/kpagecount: not its reference count. Machines without
    /// [`Facility::PageMapCount`] answer ENOSYS.
    fn page_map_count(&self, _frame: u64) -> Result<u64, Errno> {
        Err(Errno::ENOSYS)
    }

    /// Empties the per-CPU batches in which new pages wait for their LRU list (lru_add_drain_all()). A page that waits
    /// there has a reference more and no KPF_LRU. Machines without [`Facility::DropCaches`] answer ENOSYS.
    fn drain_lru(&self) -> Result<(), Errno> {
        Err(Errno::ENOSYS)
    }

    /// The references to the page at byte `offset` of a guest_memfd; `None` where no page is allocated. Machines without
    /// [`Facility::PageAccount`] answer ENOSYS.
    fn page_account(&self, _file: &dyn GuestMemfd, _offset: u64) -> Result<Option<PageAccount>, Errno> {
        Err(Errno::ENOSYS)
    }

    /// KVM_GET_SUPPORTED_CPUID: what a guest may be shown. Machines without vCPUs of their own kind answer ENOSYS.
    fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>, Errno> {
        Err(Errno::ENOSYS)
    }

    /// The references to a page frame, whether a file has it or not; `None` for a frame that nobody holds. Machines
    /// with neither [`Facility::PageAccount`] nor [`Facility::Kcore`] answer an errno, and so do kernels that do not
    /// tell where their `struct page`s are.
    fn frame_account(&self, _frame: u64) -> Result<Option<PageAccount>, Errno> {
        Err(Errno::ENOSYS)
    }

    /// `_refcount` of the folio to which a page frame belongs: 0 for one that is free. Machines without [`Facility::Kcore`] or
    /// [`Facility::PageAccount`] answer ENOSYS.
    fn page_references(&self, frame: u64) -> Result<u32, Errno> {
        Ok(self.frame_account(frame)?.map_or(0, |account| account.refs))
    }

    /// A memory failure in a page frame (memory_failure()), also of one that nobody maps. EHWPOISON for a frame that is
    /// poisoned already, EBUSY where it is poisoned now and could not be taken away from its users. Machines without
    /// [`Facility::HwPoison`] answer ENOSYS.
    fn memory_failure(&self, _frame: u64) -> Result<(), Errno> {
        Err(Errno::ENOSYS)
    }

    /// How many failed SEAMCALLs and pages lost to the TDX module the kernel has reported since it runs. ENOSYS where
    /// its log is not read.
    fn complaints(&self) -> Result<u64, Errno> {
        Err(Errno::ENOSYS)
    }

    /// The TDX module under the machine, on machines with [`Facility::ModuleInjection`].
    fn tdx_module(&self) -> Option<Arc<dyn TdxModule>> {
        None
    }
}
