//! What the machine does when a private page cannot be unmapped, found out by making one unmap fail.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::OneCpu;
use crate::inject::Policy;
use crate::inject::seamcall::{AUG, INVALID, REMOVE, SEPT_ADD};
use crate::machine::{
    Errno, GuestMemfd, HostMemory, Machine, Mapping, MemoryAttributes, MemoryRegion, ModuleCall, ModuleFault,
    PAGE_SIZE, TdxModule, Vcpu, Vm, VmConfig,
};
use crate::uapi::kvm::KVM_MEMORY_ATTRIBUTE_PRIVATE;

/// Where the page is in the guest.
const GPA: u64 = 1 << 32;
/// Pages that are mapped: the one whose unmap fails, and the one that is unmapped before, to see how that goes.
const MAPPED: u64 = 2;
/// Pages that another TD takes from the allocator, to see whether the stuck one is among them.
const SEARCHED: u64 = 128;
/// KPF_BUDDY.
const BUDDY: u64 = 1 << 10;
/// KPF_HWPOISON.
const HWPOISON: u64 = 1 << 19;
/// KPF_NOPAGE.
const NOPAGE: u64 = 1 << 20;

/// What was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnmapFailure {
    /// What the conversion to shared returned, where the machine converts.
    pub conversion: Result<(), Errno>,
    /// What FALLOC_FL_PUNCH_HOLE returned.
    pub punch: Result<(), Errno>,
    /// Whether the ioctls of the VM are EIO afterwards.
    pub vm_dead: bool,
    /// Whether the module still counts the page as the TD's.
    pub owned: bool,
    /// Whether the page is the kernel's again, to be given to whoever asks.
    pub freed: bool,
    /// Whether the page is marked poisoned.
    pub poisoned: bool,
    /// References to the page: mapped, and after the conversion failed. `None` where they are not counted.
    pub references: Option<(u32, u32)>,
    /// Whether one of them was the mapping's, before anything failed: a page that was unmapped without failure has one less.
    pub pinned: Option<bool>,
}

impl UnmapFailure {
    /// The name of the answer, as in the machine option `policy=`, and what becomes of the page.
    pub fn answer(&self) -> String {
        let page = match (self.freed, self.owned) {
            (true, true) => "page reused while owned",
            (true, false) => "page reused",
            (false, _) => "page kept",
        };
        let name = match (self.freed, self.pinned, self.references) {
            _ if self.punch.is_err() => Policy::FailUnmap.name(),
            (true, _, _) if self.vm_dead => Policy::BugVm.name(),
            (true, _, _) => "none",
            _ if self.poisoned => Policy::Poison.name(),
            (_, Some(true), _) => Policy::PinMapped.name(),
            (_, _, Some((mapped, failed))) if failed > mapped => Policy::HoldOnError.name(),
            (_, _, Some(_)) => Policy::GfnCount.name(),
            (_, _, None) => "pin-mapped or hold-on-error",
        };
        match self.punch {
            Err(errno) => format!("{name} ({errno}, {page})"),
            Ok(()) => format!("{name} ({page})"),
        }
    }
}

impl fmt::Display for UnmapFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = |yes: bool| if yes { "yes" } else { "no" };
        write!(f, "conversion {}, punch hole {}", shown(&self.conversion), shown(&self.punch))?;
        write!(f, ", VM dead: {}, still the TD's: {}", word(self.vm_dead), word(self.owned))?;
        write!(f, ", free: {}, poisoned: {}", word(self.freed), word(self.poisoned))?;
        if let Some((mapped, failed)) = self.references {
            write!(f, ", references {mapped} then {failed}")?;
        }
        Ok(())
    }
}

fn shown(result: &Result<(), Errno>) -> String {
    result.map_or_else(|errno| errno.to_string(), |()| "0".to_owned())
}

/// Lets TDH.MEM.PAGE.REMOVE fail for one page of a new TD, converts the page, punches it out of its file, and looks. Another
/// page is converted without failure before, to see whether its mapping held a reference.
///
/// The page stays the TD's in the module's books for as long as the machine runs. `None` on machines whose module cannot
/// be made to fail.
///
/// # Errors
/// What failed before the unmap did, in one line.
pub fn measure(machine: &dyn Machine) -> Option<Result<UnmapFailure, String>> {
    let module = machine.tdx_module()?;
    let measured = measure_with(machine, &*module);
    let cleared = module.clear_faults().map_err(|errno| format!("taking back the fault: {errno}"));
    Some(measured.and_then(|seen| cleared.map(|()| seen)))
}

/// Says which step failed.
fn step<T>(what: &'static str) -> impl FnOnce(Errno) -> Result<T, String> {
    move |errno| Err(format!("{what}: {errno}"))
}

/// A TD with a private slot.
struct Subject {
    vm: Arc<dyn Vm>,
    vcpu: Box<dyn Vcpu>,
    gmem: Arc<dyn GuestMemfd>,
    _shared: Box<dyn Mapping>,
}

impl Subject {
    fn new(machine: &dyn Machine, pages: u64) -> Result<Subject, String> {
        let len = pages * PAGE_SIZE;
        let vm = machine.create_vm(VmConfig::Payload { vcpus: 1 }).or_else(step("a TD"))?;
        let gmem = vm.create_guest_memfd(len, 0).or_else(step("a guest_memfd"))?;
        let shared = machine.host_memory(HostMemory::Shmem, len).or_else(step("shared memory"))?;
        let region = MemoryRegion::new(1, GPA, len).at(shared.addr()).bound_to(&*gmem, 0);
        vm.set_memory_region(&region).or_else(step("a slot"))?;
        convert(&*vm, &*gmem, 0..pages, KVM_MEMORY_ATTRIBUTE_PRIVATE).or_else(step("the conversion to private"))?;
        let vcpu = vm.create_vcpu(0).or_else(step("a vCPU"))?;
        let mut subject = Subject { vm, vcpu, gmem, _shared: shared };
        subject.vcpu.pre_fault(GPA, MAPPED * PAGE_SIZE, 0).result.or_else(step("KVM_PRE_FAULT_MEMORY"))?;
        Ok(subject)
    }
}

fn measure_with(machine: &dyn Machine, module: &dyn TdxModule) -> Result<UnmapFailure, String> {
    // What is freed on a CPU is given out there first.
    let _here = OneCpu::stay();
    // The next owner is there before, with everything that KVM allocates for it.
    let mut next = Subject::new(machine, SEARCHED)?;
    let start = module.position().or_else(step("the module's calls"))?;
    let Subject { vm, gmem, .. } = &Subject::new(machine, MAPPED)?;
    let calls = module.calls_since(start).or_else(step("the module's calls"))?;
    let frame_of = |page: u64| {
        let gpa = GPA + page * PAGE_SIZE;
        let maps = |call: &&ModuleCall| !call.guest && call.leaf == AUG && call.operands[0] & !0xfff == gpa;
        let mapped = calls.iter().rev().find(maps).ok_or("a page was not mapped by TDH.MEM.PAGE.AUG")?;
        Ok::<u64, String>(mapped.operands[2] / PAGE_SIZE)
    };
    let (frame, other) = (frame_of(0)?, frame_of(1)?);
    let refs = |frame: u64| references(machine, frame);

    let other_mapped = refs(other);
    convert(&**vm, &**gmem, 1..2, 0).or_else(step("a conversion without failure"))?;
    let pinned = other_mapped.zip(refs(other)).map(|(mapped, unmapped)| unmapped < mapped);

    let before = refs(frame);
    module.add_fault(&ModuleFault::always(REMOVE, INVALID).at(GPA)).or_else(step("a fault"))?;
    let conversion = convert(&**vm, &**gmem, 0..1, 0);
    let failed = refs(frame);
    let poisoned_in_file = machine.page_flags(frame).unwrap_or(0) & HWPOISON != 0;
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let punch = gmem.fallocate(mode, 0, PAGE_SIZE as i64);
    let given_out = punch.is_ok() && is_given_out(module, &mut next, frame)?;
    let owner = module.page_owner(frame).or_else(step("the page's owner"))?;
    let flags = machine.page_flags(frame).unwrap_or(0);
    // A poisoned page is taken out when it is freed, and then it is none any more.
    let poisoned = poisoned_in_file || flags & HWPOISON != 0;
    let free = flags & (BUDDY | NOPAGE) != 0;
    Ok(UnmapFailure {
        conversion,
        punch,
        vm_dead: vm.capability(0) == Err(Errno::EIO),
        owned: !owner.is_free(),
        freed: punch.is_ok() && !poisoned && (free || given_out),
        poisoned,
        references: before.zip(failed),
        pinned,
    })
}

/// Conversion of pages, by the VM where it keeps the attributes, by the file where that does.
fn convert(vm: &dyn Vm, gmem: &dyn GuestMemfd, pages: Range<u64>, attributes: u64) -> Result<(), Errno> {
    let (offset, size) = (pages.start * PAGE_SIZE, (pages.end - pages.start) * PAGE_SIZE);
    let range = MemoryAttributes { address: GPA + offset, size, attributes, flags: 0 };
    match vm.set_memory_attributes(&range) {
        Err(Errno::EINVAL | Errno::ENOTTY) => gmem.convert(offset, size, attributes).map_err(|error| error.errno),
        result => result,
    }
}

/// The references to a frame, where they are counted.
fn references(machine: &dyn Machine, frame: u64) -> Option<u32> {
    // A new page waits for its LRU list with a reference more.
    let _ = machine.drain_lru();
    machine.frame_account(frame).ok().map(|account| account.map_or(0, |account| account.refs))
}

/// Whether the kernel gives a frame to the next TD: its pages are mapped, and the module's calls say where they lie. A frame
/// that is another TD's is refused by the module, which ends the next TD too.
fn is_given_out(module: &dyn TdxModule, next: &mut Subject, frame: u64) -> Result<bool, String> {
    let start = module.position().or_else(step("the module's calls"))?;
    let _ = next.vcpu.pre_fault(GPA + MAPPED * PAGE_SIZE, (SEARCHED - MAPPED) * PAGE_SIZE, 0);
    let calls = module.calls_since(start).or_else(step("the module's calls"))?;
    let maps = |call: &&ModuleCall| !call.guest && matches!(call.leaf, AUG | SEPT_ADD);
    Ok(calls.iter().filter(maps).any(|call| call.operands[2] / PAGE_SIZE == frame))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::SimMachine;

    #[test]
    fn every_answer_of_the_model_is_recognised() {
        for (spec, answer) in [
            ("sim:tdx", "bug-vm (page reused while owned)"),
            ("sim:tdx,kernel=6.16", "pin-mapped (page kept)"),
            ("sim:tdx,kernel=6.18", "pin-mapped (page kept)"),
            ("sim:tdx,policy=hold-on-error", "hold-on-error (page kept)"),
            ("sim:tdx,policy=gfn-count", "gfn-count (page kept)"),
            ("sim:tdx,policy=poison", "poison (page kept)"),
            ("sim:tdx,policy=fail-unmap", "fail-unmap (EFAULT: Bad address, page kept)"),
        ] {
            let machine = SimMachine::open(&spec.parse().unwrap()).unwrap();
            let seen = measure(&machine).unwrap().unwrap();
            assert_eq!(seen.answer(), answer, "{spec}: {seen}");
            assert!(seen.owned, "{spec}");
        }
        let machine = SimMachine::open(&"sim:default".parse().unwrap()).unwrap();
        assert!(measure(&machine).is_none());
    }
}
