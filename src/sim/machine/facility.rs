//! What the model has.

use super::super::mmu::capabilities::capability;
use super::super::policy::PolicyKind;
use super::super::profile::{FrameModel, Kernel, PendingAccess, Profile};
use crate::machine::{Availability, Facility, SkipKind, VmType};
use crate::uapi::kvm::KVM_CAP_GUEST_MEMFD;
use crate::uapi::kvm::{GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP};

/// Whether a machine with this profile and VM type has a facility.
pub(super) fn of(profile: &Profile, vm_type: VmType, facility: Facility) -> Availability {
    let kernel = profile.kernel;
    let too_old = |mend: &str| {
        Availability::absent(SkipKind::UnsupportedKernel, format!("not in kernel={}", kernel.name()), mend)
    };
    let when = |there: bool, mend: &str| if there { Availability::present() } else { too_old(mend) };
    let not_modelled = |why: &str| Availability::absent(SkipKind::Declined, why, "a kvm machine");
    match facility {
        Facility::GuestMemfd => {
            when(capability(kernel, Some(vm_type), KVM_CAP_GUEST_MEMFD) > 0, "kernel=6.18, or sim:sw-protected")
        }
        Facility::GmemMmap => when(kernel.gmem_flags(Some(vm_type)) & GUEST_MEMFD_FLAG_MMAP != 0, "kernel=6.18"),
        Facility::GmemInitShared if kernel >= Kernel::V6_18 && vm_type.has_private_memory() => when(
            kernel.gmem_flags(Some(vm_type)) & GUEST_MEMFD_FLAG_INIT_SHARED != 0,
            "sim:default, or kernel=in-place",
        ),
        Facility::GmemInitShared => {
            when(kernel.gmem_flags(Some(vm_type)) & GUEST_MEMFD_FLAG_INIT_SHARED != 0, "kernel=6.18")
        }
        Facility::MemoryAttributes if !vm_type.has_private_memory() => not_private(),
        Facility::MemoryAttributes => when(kernel.vm_attributes() != 0, "kernel=7.3 or older"),
        Facility::PrivateMemory if !vm_type.has_private_memory() => not_private(),
        Facility::InPlaceConversion if !vm_type.has_private_memory() => not_private(),
        Facility::InPlaceConversion => when(kernel.converts_in_place(), "kernel=in-place"),
        Facility::SecondAddressSpace if vm_type.has_private_memory() => Availability::absent(
            SkipKind::Declined,
            "VMs with private memory have no second address space",
            "sim:default",
        ),
        Facility::LazyAccept if vm_type == VmType::Tdx && profile.pending == PendingAccess::Exit => {
            Availability::absent(
                SkipKind::Declined,
                "pending=exit: the VM dies of a guest's access to a page that it has not accepted",
                "pending=accept",
            )
        }
        Facility::SplitMappedFolio if vm_type == VmType::Tdx && profile.policy == PolicyKind::PinMapped => {
            Availability::absent(
                SkipKind::Declined,
                "policy=pin-mapped: a TD's mapping of the other pages holds references to the folio, which keep it whole",
                "another policy",
            )
        }
        // Flags are a struct page's, and get_user_pages() refuses memory that has none, for a hold and for MADV_HWPOISON alike.
        Facility::PageFlags | Facility::HwPoison | Facility::HoldGet | Facility::HoldPin
            if profile.frames == FrameModel::PfnMap =>
        {
            Availability::absent(SkipKind::Declined, "frames=pfnmap: there is no struct page", "frames=struct-page")
        }
        Facility::RealFiles => not_modelled("the model's handles are not file descriptors"),
        Facility::Userfaultfd => not_modelled("userfaultfd(2) is not modelled"),
        Facility::NumaNodes => not_modelled("the model has one NUMA node"),
        Facility::Kcore => not_modelled("the model's reference counts are read directly"),
        Facility::GupTest => not_modelled("debugfs is not modelled"),
        Facility::MemoryCgroup => not_modelled("memory cgroups are not modelled"),
        Facility::Tdx if vm_type != VmType::Tdx => {
            Availability::absent(SkipKind::Declined, format!("a {} VM is no TD", vm_type.name()), "sim:tdx")
        }
        Facility::PageAccount | Facility::HoldGet | Facility::HoldPin if profile.frames == FrameModel::PfnMap => {
            Availability::absent(SkipKind::Declined, "frames=pfnmap has no reference counts", "frames=struct-page")
        }
        Facility::ModuleInjection if vm_type != VmType::Tdx => {
            Availability::absent(SkipKind::Declined, "there is no TDX module under this machine", "sim:tdx")
        }
        Facility::Tracefs | Facility::FailFunction | Facility::KernelLog => not_modelled("there is no kernel to trace"),
        _ => Availability::present(),
    }
}

fn not_private() -> Availability {
    Availability::absent(SkipKind::Declined, "a default VM has no private memory", "sim:sw-protected or sim:tdx")
}
