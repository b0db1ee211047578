//! What the KVM of the running kernel offers to one VM type, and what each missing piece would need.

use super::system::KvmMachine;
use super::{host_facility, vm};
use crate::kvm::gmem::KvmGuestMemfd;
use crate::machine::{Availability, Errno, Facility, GuestMemfd, Machine, PAGE_SIZE, Release, SkipKind, VmType};
use crate::uapi::kvm::{
    GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP, KVM_CAP_BINARY_STATS_FD, KVM_CAP_DISABLE_QUIRKS2,
    KVM_CAP_EXIT_HYPERCALL, KVM_CAP_GUEST_MEMFD, KVM_CAP_GUEST_MEMFD_FLAGS, KVM_CAP_MEMORY_ATTRIBUTES,
    KVM_CAP_MEMORY_FAULT_INFO, KVM_CAP_MULTI_ADDRESS_SPACE, KVM_CAP_PRE_FAULT_MEMORY, KVM_CAP_USER_MEMORY2,
    KVM_CAP_VM_TYPES, KVM_CHECK_EXTENSION, KVM_MEMORY_ATTRIBUTE_PRIVATE,
};
use crate::uapi::kvm_para::KVM_HC_MAP_GPA_RANGE;
use crate::uapi::kvm_x86::KVM_X86_QUIRK_SLOT_ZAP_ALL;
use std::collections::BTreeMap;
use std::path::Path;

/// The capabilities that are asked of a VM, because their value depends on its type.
const VM_CAPABILITIES: [u32; 11] = [
    KVM_CAP_MULTI_ADDRESS_SPACE,
    KVM_CAP_EXIT_HYPERCALL,
    KVM_CAP_BINARY_STATS_FD,
    KVM_CAP_DISABLE_QUIRKS2,
    KVM_CAP_USER_MEMORY2,
    KVM_CAP_MEMORY_FAULT_INFO,
    KVM_CAP_MEMORY_ATTRIBUTES,
    KVM_CAP_GUEST_MEMFD,
    KVM_CAP_VM_TYPES,
    KVM_CAP_PRE_FAULT_MEMORY,
    KVM_CAP_GUEST_MEMFD_FLAGS,
];

/// The answers for one VM type, found out with one VM that is closed again.
pub(super) struct Facilities {
    vm_type: VmType,
    release: Release,
    /// Whether /dev/kvm could be opened.
    device: Result<(), Errno>,
    /// What a VM of the type said, by capability.
    capabilities: Result<BTreeMap<u32, i32>, Errno>,
    /// What KVM_SET_MEMORY_ATTRIBUTES2 with an empty range said to a guest_memfd.
    convert: Result<(), Errno>,
    /// Whether kernel-mode guest code is emulated instruction by instruction (kvm_pvm, for guests that know nothing of it).
    emulated_kernel_mode: bool,
}

impl Facilities {
    /// Asks the kernel.
    pub(super) fn of(machine: &KvmMachine) -> Facilities {
        let device = machine.kvm().map(drop);
        let vm = machine.kvm().and_then(|kvm| vm::create_vm_fd(kvm, machine.vm_type().number()));
        let capabilities = vm.as_ref().map_err(|&errno| errno).map(|vm| {
            let ask = |&capability: &u32| {
                let value = super::ioctl::with_value(vm, KVM_CHECK_EXTENSION, u64::from(capability));
                (capability, value.unwrap_or(0))
            };
            VM_CAPABILITIES.iter().map(ask).collect()
        });
        let convert = vm.and_then(|vm| {
            let gmem = KvmGuestMemfd::create(&vm, PAGE_SIZE, 0, [0; 6])?;
            gmem.convert(0, 0, 0).map_err(|error| error.errno)
        });
        Facilities {
            vm_type: machine.vm_type(),
            release: machine.release(),
            device,
            capabilities,
            convert,
            emulated_kernel_mode: Path::new("/sys/module/kvm_pvm").exists(),
        }
    }

    /// The answer for one facility.
    pub(super) fn availability(&self, facility: Facility) -> Availability {
        match facility {
            Facility::RealFiles | Facility::LazyAccept => Availability::present(),
            Facility::Vm => self.vm(),
            Facility::Guest => self.guest(),
            Facility::PrivateMemory => self.private_memory(),
            Facility::Tdx => self.tdx(),
            // Nothing splits a folio of guest_memfd but a conversion in place.
            Facility::InPlaceConversion | Facility::SplitMappedFolio => self.in_place_conversion(),
            Facility::GuestMemfd => self.capability(&GUEST_MEMFD),
            Facility::GmemMmap => self.capability(&GMEM_MMAP),
            Facility::GmemInitShared => self.init_shared(),
            Facility::UserMemory2 => self.capability(&USER_MEMORY2),
            Facility::MemoryFaultInfo => self.capability(&MEMORY_FAULT_INFO),
            Facility::MemoryAttributes => self.memory_attributes(),
            Facility::PreFault => self.pre_fault(),
            Facility::ExitHypercall => self.exit_hypercall(),
            Facility::VmTypes => self.capability(&VM_TYPES),
            Facility::SlotZapAllQuirk => self.capability(&SLOT_ZAP_ALL),
            Facility::SecondAddressSpace => self.second_address_space(),
            Facility::KvmStats => self.capability(&STATS),
            Facility::ModuleInjection => self.module_injection(),
            _ => host_facility::availability(facility),
        }
    }

    fn vm(&self) -> Availability {
        if let Err(errno) = self.device {
            return no_device(errno);
        }
        match &self.capabilities {
            Ok(_) => Availability::present(),
            Err(errno) => self.no_vm(*errno),
        }
    }

    /// Why KVM_CREATE_VM of the type failed.
    fn no_vm(&self, errno: Errno) -> Availability {
        let why = format!("KVM_CREATE_VM of type {} ({}): {errno}", self.vm_type.number(), self.vm_type.name());
        if errno != Errno::EINVAL {
            return Availability::absent(SkipKind::ConfigOff, why, "see the kernel log");
        }
        match self.vm_type {
            VmType::Default => Availability::absent(SkipKind::ConfigOff, why, "CONFIG_KVM for this architecture"),
            VmType::SwProtected if self.release < Release::series(6, 8) => {
                Availability::absent(SkipKind::UnsupportedKernel, why, "Linux 6.8 with CONFIG_KVM_SW_PROTECTED_VM")
            }
            VmType::SwProtected if self.emulated_kernel_mode => Availability::absent(
                SkipKind::NoHardware,
                why,
                "a host with VMX or SVM and CONFIG_KVM_SW_PROTECTED_VM=y (kvm_pvm has no two-dimensional paging)",
            ),
            VmType::SwProtected => Availability::absent(
                SkipKind::ConfigOff,
                why,
                "CONFIG_KVM_SW_PROTECTED_VM=y (needs CONFIG_EXPERT), kvm.tdp_mmu=1, and kvm_amd.npt=1 or kvm_intel.ept=1",
            ),
            VmType::Tdx if self.release < Release::series(6, 16) => {
                Availability::absent(SkipKind::UnsupportedKernel, why, "Linux 6.16 with CONFIG_KVM_INTEL_TDX")
            }
            VmType::Tdx if !host_facility::cpu_flag("tdx_host_platform") => Availability::absent(
                SkipKind::NoHardware,
                why,
                "an Intel CPU with TDX enabled in firmware, and CONFIG_INTEL_TDX_HOST=y",
            ),
            VmType::Tdx => Availability::absent(
                SkipKind::ConfigOff,
                why,
                "CONFIG_KVM_INTEL_TDX=y and kvm_intel.tdx=1, and a TDX module that the kernel can initialise",
            ),
        }
    }

    fn guest(&self) -> Availability {
        self.vm()
    }

    fn private_memory(&self) -> Availability {
        if self.vm_type.has_private_memory() {
            return Availability::present();
        }
        Availability::absent(
            SkipKind::Declined,
            format!("a {} VM has no private memory", self.vm_type.name()),
            "kvm:sw-protected or kvm:tdx",
        )
    }

    fn tdx(&self) -> Availability {
        if self.vm_type == VmType::Tdx {
            return self.vm();
        }
        let why = format!("a {} VM is no TD", self.vm_type.name());
        Availability::absent(SkipKind::Declined, why, "kvm:tdx or sim:tdx")
    }

    fn module_injection(&self) -> Availability {
        if self.vm_type != VmType::Tdx {
            return Availability::absent(
                SkipKind::Declined,
                format!("there is no TDX module under a {} VM", self.vm_type.name()),
                "sim:tdx",
            );
        }
        Availability::absent(
            SkipKind::NoHardwareInjection,
            "the TDX module of this host cannot be made to fail, and does not show its calls",
            "sim:tdx",
        )
    }

    fn in_place_conversion(&self) -> Availability {
        let vm = self.vm();
        if !vm.is_present() {
            return vm;
        }
        match self.convert {
            Err(Errno::ENOTTY) => Availability::absent(
                SkipKind::UnsupportedKernel,
                "KVM_SET_MEMORY_ATTRIBUTES2 on a guest_memfd: ENOTTY",
                "a kernel with the guest_memfd in-place conversion series, which is not merged as of 7.3",
            ),
            answer => Availability::with(match answer {
                Ok(()) => "KVM_SET_MEMORY_ATTRIBUTES2".to_owned(),
                Err(errno) => format!("KVM_SET_MEMORY_ATTRIBUTES2, empty range: {errno}"),
            }),
        }
    }

    fn init_shared(&self) -> Availability {
        if self.vm_type.has_private_memory() && self.value(KVM_CAP_GUEST_MEMFD_FLAGS) & 1 != 0 {
            let value = self.value(KVM_CAP_GUEST_MEMFD_FLAGS);
            if u64::from(value) & GUEST_MEMFD_FLAG_INIT_SHARED == 0 {
                return Availability::absent(
                    SkipKind::Declined,
                    format!(
                        "KVM_CAP_GUEST_MEMFD_FLAGS is {value:#x}: KVM offers no INIT_SHARED to a VM with private memory"
                    ),
                    "kvm:default, or a kernel with the in-place conversion series",
                );
            }
        }
        self.capability(&GMEM_INIT_SHARED)
    }

    fn memory_attributes(&self) -> Availability {
        let vm = self.vm();
        if vm.is_present() && !self.vm_type.has_private_memory() {
            return self.private_memory();
        }
        self.capability(&MEMORY_ATTRIBUTES)
    }

    fn pre_fault(&self) -> Availability {
        if self.release >= PRE_FAULT.since && self.emulated_kernel_mode && self.value(KVM_CAP_PRE_FAULT_MEMORY) == 0 {
            return Availability::absent(
                SkipKind::NoHardware,
                "KVM_CAP_PRE_FAULT_MEMORY is 0: kvm_pvm has no two-dimensional paging",
                "a host with VMX and EPT, or SVM and NPT",
            );
        }
        self.capability(&PRE_FAULT)
    }

    fn exit_hypercall(&self) -> Availability {
        let offered = self.capability(&EXIT_HYPERCALL);
        if offered.is_present() && self.emulated_kernel_mode {
            // Its emulator rewrites VMCALL and VMMCALL and executes them again, without end.
            return Availability::absent(
                SkipKind::NoHardware,
                format!(
                    "KVM_CAP_EXIT_HYPERCALL is {:#x}, but kvm_pvm emulates kernel-mode guest code, where a hypercall never completes",
                    self.value(KVM_CAP_EXIT_HYPERCALL)
                ),
                "a host with VMX or SVM",
            );
        }
        offered
    }

    fn second_address_space(&self) -> Availability {
        let vm = self.vm();
        if !vm.is_present() {
            return vm;
        }
        match self.value(KVM_CAP_MULTI_ADDRESS_SPACE) {
            0 | 1 if self.vm_type.has_private_memory() => Availability::absent(
                SkipKind::Declined,
                "a VM with private memory has one address space",
                "kvm:default",
            ),
            0 | 1 => Availability::absent(
                SkipKind::ConfigOff,
                "KVM_CAP_MULTI_ADDRESS_SPACE is not above 1",
                "CONFIG_KVM_SMM=y",
            ),
            count => Availability::with(count.to_string()),
        }
    }

    fn value(&self, capability: u32) -> u32 {
        self.capabilities.as_ref().map_or(0, |values| values[&capability] as u32)
    }

    fn capability(&self, wanted: &Wanted) -> Availability {
        let vm = self.vm();
        if !vm.is_present() {
            return vm;
        }
        let value = self.value(wanted.number);
        if value & wanted.mask != 0 {
            return Availability::with(if value == 1 { String::new() } else { format!("{value:#x}") });
        }
        let why = format!("{} is {value:#x} at VM scope", wanted.name);
        if self.release < wanted.since {
            Availability::absent(
                SkipKind::UnsupportedKernel,
                why,
                format!("Linux {}.{}", wanted.since.major, wanted.since.minor),
            )
        } else {
            Availability::absent(SkipKind::ConfigOff, why, wanted.mend)
        }
    }
}

/// Why /dev/kvm could not be opened.
fn no_device(errno: Errno) -> Availability {
    let why = format!("open /dev/kvm: {errno}");
    match errno {
        Errno::EACCES | Errno::EPERM => {
            Availability::absent(SkipKind::NoPrivilege, why, "root, or membership of the group of /dev/kvm")
        }
        Errno::ENOENT => Availability::absent(
            SkipKind::ConfigOff,
            why,
            "CONFIG_KVM with kvm_intel or kvm_amd loaded, on a CPU with virtualisation enabled in firmware",
        ),
        _ => Availability::absent(SkipKind::NoHardware, why, "a CPU with virtualisation enabled in firmware"),
    }
}

/// A capability, the bits of it that are wanted, and what provides them.
struct Wanted {
    name: &'static str,
    number: u32,
    mask: u32,
    since: Release,
    /// What is missing on a kernel that is new enough.
    mend: &'static str,
}

macro_rules! wanted {
    ($($name:ident = $cap:ident, $mask:expr, ($major:literal, $minor:literal), $mend:literal;)+) => {
        $(const $name: Wanted = Wanted {
            name: stringify!($cap),
            number: $cap,
            mask: $mask as u32,
            since: Release::series($major, $minor),
            mend: $mend,
        };)+
    };
}

wanted! {
    GUEST_MEMFD = KVM_CAP_GUEST_MEMFD, u32::MAX, (6, 8), "CONFIG_KVM_GUEST_MEMFD (until 6.17: CONFIG_KVM_PRIVATE_MEM, selected by CONFIG_KVM_SW_PROTECTED_VM, CONFIG_KVM_INTEL_TDX or CONFIG_KVM_AMD_SEV)";
    GMEM_MMAP = KVM_CAP_GUEST_MEMFD_FLAGS, GUEST_MEMFD_FLAG_MMAP, (6, 18), "CONFIG_KVM_GUEST_MEMFD";
    GMEM_INIT_SHARED = KVM_CAP_GUEST_MEMFD_FLAGS, GUEST_MEMFD_FLAG_INIT_SHARED, (6, 18), "CONFIG_KVM_GUEST_MEMFD";
    USER_MEMORY2 = KVM_CAP_USER_MEMORY2, u32::MAX, (6, 8), "CONFIG_KVM";
    MEMORY_FAULT_INFO = KVM_CAP_MEMORY_FAULT_INFO, u32::MAX, (6, 8), "CONFIG_KVM";
    MEMORY_ATTRIBUTES = KVM_CAP_MEMORY_ATTRIBUTES, KVM_MEMORY_ATTRIBUTE_PRIVATE, (6, 8), "CONFIG_KVM_SW_PROTECTED_VM, CONFIG_KVM_INTEL_TDX or CONFIG_KVM_AMD_SEV, which select CONFIG_KVM_GENERIC_MEMORY_ATTRIBUTES";
    PRE_FAULT = KVM_CAP_PRE_FAULT_MEMORY, u32::MAX, (6, 11), "two-dimensional paging: kvm_amd.npt=1 or kvm_intel.ept=1";
    EXIT_HYPERCALL = KVM_CAP_EXIT_HYPERCALL, 1u32 << KVM_HC_MAP_GPA_RANGE, (5, 14), "CONFIG_KVM";
    VM_TYPES = KVM_CAP_VM_TYPES, u32::MAX, (6, 8), "CONFIG_KVM";
    SLOT_ZAP_ALL = KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_SLOT_ZAP_ALL, (6, 12), "CONFIG_KVM for x86";
    STATS = KVM_CAP_BINARY_STATS_FD, u32::MAX, (5, 14), "CONFIG_KVM";
}
