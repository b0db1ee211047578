//! What a simulated machine behaves like: the options of its spec, checked.

use super::mutant::Mutant;
use super::policy::PolicyKind;
use crate::machine::{Errno, MachineSpec, Release, SpecError, VmType};
use crate::uapi::kvm::{
    GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP, KVM_MEM_GUEST_MEMFD, KVM_MEMORY_ATTRIBUTE_PRIVATE,
};

/// GUEST_MEMFD_FLAG_HUGETLB as posted with the 1G guest_memfd series; only the `huge` profile knows it, and it needs a page
/// size beside it, so that it is not one of the flags of KVM_CAP_GUEST_MEMFD_FLAGS.
pub const GMEM_FLAG_HUGETLB: u64 = 1 << 2;
/// Where the page size of a huge guest_memfd is encoded in the creation flags, as with MAP_HUGE_SHIFT.
pub const GMEM_HUGE_SHIFT: u32 = 26;

/// The most that `memory=` takes.
const MAX_MEMORY_GIB: u64 = 4 << 10;

/// The kernel that a simulated machine behaves like: the option `kernel=`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kernel {
    /// guest_memfd for VMs with private memory only, no TDX.
    V6_12,
    /// TDX, every mapped private page pinned.
    V6_16,
    /// mmap and INIT_SHARED; mapped private pages still pinned.
    V6_18,
    /// No pin.
    V7_3,
    /// Conversion on the guest_memfd (KVM_SET_MEMORY_ATTRIBUTES2), expected in 7.4.
    InPlace,
    /// In-place conversion, 2M and 1G folios, split, merge and TDH.MEM.PAGE.DEMOTE.
    Huge,
}

impl Kernel {
    /// Every kernel, oldest first.
    pub const ALL: [Kernel; 6] =
        [Kernel::V6_12, Kernel::V6_16, Kernel::V6_18, Kernel::V7_3, Kernel::InPlace, Kernel::Huge];

    /// The value of `kernel=`.
    pub fn name(self) -> &'static str {
        match self {
            Kernel::V6_12 => "6.12",
            Kernel::V6_16 => "6.16",
            Kernel::V6_18 => "6.18",
            Kernel::V7_3 => "7.3",
            Kernel::InPlace => "in-place",
            Kernel::Huge => "huge",
        }
    }

    /// The release that tests compare with.
    pub fn release(self) -> Release {
        match self {
            Kernel::V6_12 => Release::series(6, 12),
            Kernel::V6_16 => Release::series(6, 16),
            Kernel::V6_18 => Release::series(6, 18),
            Kernel::V7_3 => Release::series(7, 3),
            Kernel::InPlace | Kernel::Huge => Release::series(7, 4),
        }
    }

    /// Bitmap of KVM_CAP_VM_TYPES.
    pub fn vm_types(self) -> u64 {
        let tdx = if self >= Kernel::V6_16 { 1 << VmType::Tdx.number() } else { 0 };
        1 << VmType::Default.number() | 1 << VmType::SwProtected.number() | tdx
    }

    /// The flags that KVM_CREATE_GUEST_MEMFD accepts for a VM type; the system scope when `None`.
    pub fn gmem_flags(self, vm_type: Option<VmType>) -> u64 {
        let private = vm_type.is_some_and(VmType::has_private_memory);
        match self {
            Kernel::V6_12 | Kernel::V6_16 => 0,
            Kernel::V6_18 | Kernel::V7_3 if private => GUEST_MEMFD_FLAG_MMAP,
            Kernel::V6_18 | Kernel::V7_3 | Kernel::InPlace | Kernel::Huge => {
                GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED
            }
        }
    }

    /// Whether KVM_CAP_GUEST_MEMFD_FLAGS exists.
    pub fn has_gmem_flags_capability(self) -> bool {
        self >= Kernel::V6_18
    }

    /// Slot flags of KVM_SET_USER_MEMORY_REGION2 beyond the first version's: up to 6.17 a VM without private memory
    /// could not use guest_memfd at all.
    pub fn gmem_slot_flag(self, vm_type: VmType) -> u32 {
        if self >= Kernel::V6_18 || vm_type.has_private_memory() { KVM_MEM_GUEST_MEMFD } else { 0 }
    }

    /// Whether `guest_memfd_offset + size` is compared as signed numbers, so that an offset just below 2^63 passes the
    /// size check: a bug of the releases up to 6.18.
    pub fn binds_with_signed_offset(self) -> bool {
        self <= Kernel::V6_18
    }

    /// What binding an already bound range of a guest_memfd fails with.
    pub fn bind_overlap_errno(self) -> Errno {
        if self < Kernel::V7_3 { Errno::EINVAL } else { Errno::EEXIST }
    }

    /// Whether this is KVM's TDX code as it was merged, before the rework of 6.19: a busy or failing PAGE.ADD or MR.EXTEND is
    /// user space's to deal with and does not end the VM, and any answer to MapGPA but 0 is an invalid operand to the
    /// guest. Measured on 6.18.15.
    pub fn has_first_tdx_code(self) -> bool {
        self <= Kernel::V6_18
    }

    /// Whether PRIVATE is kept per guest_memfd, and converted with KVM_SET_MEMORY_ATTRIBUTES2 on the file.
    pub fn converts_in_place(self) -> bool {
        self >= Kernel::InPlace
    }

    /// Attributes that KVM_SET_MEMORY_ATTRIBUTES supports for a VM with private memory.
    pub fn vm_attributes(self) -> u64 {
        if self.converts_in_place() { 0 } else { KVM_MEMORY_ATTRIBUTE_PRIVATE }
    }

    /// `f_type` of fstatfs(2): guest_memfd got a pseudo file system of its own in 6.19.
    pub fn gmem_magic(self) -> i64 {
        if self >= Kernel::V7_3 { 0x474d_454d } else { 0x0904_1934 }
    }

    /// Whether the pseudo file system of a guest_memfd forbids execution; the anonymous one does since 6.16.
    pub fn gmem_is_noexec(self) -> bool {
        self >= Kernel::V6_16
    }
}

/// How guest memory is described: the option `frames=`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FrameModel {
    /// struct page and folios with reference counts.
    StructPage,
    /// Bare PFN ranges without struct page; the metadata is guest_memfd's own.
    PfnMap,
}

/// What a TD's access to a page that it has not accepted comes to: the option `pending=`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PendingAccess {
    /// #VE in the guest, whose handler accepts the page.
    Accept,
    /// A TD exit (ATTRIBUTES.SEPT_VE_DISABLE), after which KVM lets the VM die.
    Exit,
}

/// A defect of KVM that a scenario asks for: the option `kvm-bug=`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvmBug {
    /// One zap path removes a page table without telling TDX about its leaves.
    ForgetRemove,
}

/// The checked options of a `sim` machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    /// `kernel=`.
    pub kernel: Kernel,
    /// `policy=`.
    pub policy: PolicyKind,
    /// `frames=`.
    pub frames: FrameModel,
    /// `pending=`.
    pub pending: PendingAccess,
    /// `kvm-bug=`.
    pub kvm_bug: Option<KvmBug>,
    /// `mutant=`.
    pub mutant: Option<Mutant>,
    /// `memory=`: GiB of frames for folios of each huge size on a TDX machine; base pages have a share besides.
    pub memory_gib: Option<u64>,
    /// `schedule=`: seed of the unrest that every operation of the machine meets.
    pub schedule: Option<u64>,
}

impl Profile {
    /// Reads the options of a spec.
    ///
    /// # Errors
    /// One line that names the machine, the option and the legal values.
    pub fn from_spec(spec: &MachineSpec) -> Result<Profile, SpecError> {
        let mut kernel = Kernel::V7_3;
        let mut policy = None;
        let mut frames = FrameModel::StructPage;
        let mut pending = PendingAccess::Accept;
        let mut kvm_bug = None;
        let mut mutant = None;
        let mut memory_gib = None;
        let mut schedule = None;
        for (name, value) in &spec.options {
            let bad = |legal: String| SpecError(format!("machine '{spec}': {name}={value} is unknown; use {legal}"));
            match name.as_str() {
                "kernel" => {
                    kernel =
                        find(&Kernel::ALL, value, Kernel::name).ok_or_else(|| bad(list(&Kernel::ALL, Kernel::name)))?;
                }
                "policy" => {
                    policy = Some(
                        find(&PolicyKind::ALL, value, PolicyKind::name)
                            .ok_or_else(|| bad(list(&PolicyKind::ALL, PolicyKind::name)))?,
                    );
                }
                "frames" => match value.as_str() {
                    "struct-page" => frames = FrameModel::StructPage,
                    "pfnmap" => frames = FrameModel::PfnMap,
                    _ => return Err(bad("struct-page or pfnmap".into())),
                },
                "pending" => match value.as_str() {
                    "accept" => pending = PendingAccess::Accept,
                    "exit" => pending = PendingAccess::Exit,
                    _ => return Err(bad("accept or exit".into())),
                },
                "kvm-bug" => match value.as_str() {
                    "forget-remove" => kvm_bug = Some(KvmBug::ForgetRemove),
                    _ => return Err(bad("forget-remove".into())),
                },
                "mutant" => {
                    mutant = Some(
                        Mutant::from_name(value).ok_or_else(|| bad("a name that `gmemtest mutants` lists".into()))?,
                    );
                }
                "schedule" => {
                    schedule = Some(value.parse().map_err(|_| bad("a number, the seed".into()))?);
                }
                "memory" => {
                    let gib = parse_gib(value).filter(|gib| (1..=MAX_MEMORY_GIB).contains(gib));
                    memory_gib = Some(gib.ok_or_else(|| bad(format!("1G to {}T", MAX_MEMORY_GIB >> 10)))?);
                }
                _ => {
                    return Err(SpecError(format!(
                        "machine '{spec}': unknown option '{name}'; sim machines take kernel=, policy=, frames=, pending=, kvm-bug=, mutant=, schedule= and memory="
                    )));
                }
            }
        }
        let tdx = spec.vm_type == VmType::Tdx;
        if tdx && kernel < Kernel::V6_16 {
            return Err(SpecError(format!("machine '{spec}': TDX came with 6.16; use kernel=6.16 or later")));
        }
        for option in ["policy", "pending", "kvm-bug"] {
            if !tdx && spec.option(option).is_some() {
                return Err(SpecError(format!("machine '{spec}': {option}= is about the S-EPT and needs sim:tdx")));
            }
        }
        if !tdx && memory_gib.is_some() {
            return Err(SpecError(format!("machine '{spec}': memory= is about TDMRs and needs sim:tdx")));
        }
        let policy = policy.unwrap_or(if kernel <= Kernel::V6_18 { PolicyKind::PinMapped } else { PolicyKind::BugVm });
        if frames == FrameModel::PfnMap && policy.needs_struct_page() {
            return Err(SpecError(format!(
                "machine '{spec}': policy={} needs a struct page for every frame; use frames=struct-page, or one of {}",
                policy.name(),
                list(&PolicyKind::without_struct_page(), PolicyKind::name)
            )));
        }
        Ok(Profile { kernel, policy, frames, pending, kvm_bug, mutant, memory_gib, schedule })
    }
}

/// GiB of a size with the suffix G or T.
fn parse_gib(size: &str) -> Option<u64> {
    let (number, unit) = size.split_at_checked(size.len().checked_sub(1)?)?;
    let gib = match unit {
        "G" | "g" => 1,
        "T" | "t" => 1024,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(gib)
}

fn find<T: Copy>(all: &[T], value: &str, name: fn(T) -> &'static str) -> Option<T> {
    all.iter().copied().find(|item| name(*item) == value)
}

fn list<T: Copy>(all: &[T], name: fn(T) -> &'static str) -> String {
    all.iter().map(|item| name(*item)).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(text: &str) -> Result<Profile, String> {
        Profile::from_spec(&text.parse().unwrap()).map_err(|error| error.to_string())
    }

    #[test]
    fn the_default_is_7_3_and_the_policy_follows_the_kernel() {
        assert_eq!(profile("sim:default").unwrap().kernel, Kernel::V7_3);
        assert_eq!(profile("sim:tdx").unwrap().policy, PolicyKind::BugVm);
        assert_eq!(profile("sim:tdx,kernel=6.16").unwrap().policy, PolicyKind::PinMapped);
        assert_eq!(profile("sim:tdx,kernel=huge,policy=fail-unmap").unwrap().policy, PolicyKind::FailUnmap);
    }

    #[test]
    fn bad_options_name_the_legal_values() {
        for (text, part) in [
            ("sim:default,kernel=5.0", "use 6.12, 6.16, 6.18, 7.3, in-place, huge"),
            ("sim:default,colour=red", "unknown option 'colour'"),
            ("sim:tdx,policy=pray", "use bug-vm, pin-mapped"),
            ("sim:tdx,kernel=6.12", "TDX came with 6.16"),
            ("sim:default,policy=bug-vm", "needs sim:tdx"),
            ("sim:tdx,frames=pfnmap,policy=poison", "needs a struct page"),
            ("sim:tdx,frames=folio", "struct-page or pfnmap"),
            ("sim:tdx,kvm-bug=x", "use forget-remove"),
            ("sim:tdx,memory=0G", "use 1G to 4T"),
            ("sim:default,schedule=x", "use a number, the seed"),
            ("sim:tdx,memory=5", "use 1G to 4T"),
            ("sim:default,memory=1G", "needs sim:tdx"),
        ] {
            let error = profile(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
            assert!(!error.contains('\n'));
        }
    }
}
