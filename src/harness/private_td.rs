//! A TD with private memory in use, and everything that may take that memory away: [`PrivateTd`].

use std::fmt;
use std::sync::Arc;

use super::{Context, TestResult};
use crate::inject::seamcall::{self, Mapping};
use crate::inject::{Policy, SeamcallFault};
use crate::machine::{
    Errno, Exit, Facility, GuestMemfd, GuestOp, Machine, MemoryAttributes, MemoryRegion, ModuleCall, PAGE_SIZE,
    TdxModule, Vcpu, Vm, VmConfig,
};
use crate::uapi::kvm::{GUEST_MEMFD_FLAG_MMAP, KVM_MEMORY_ATTRIBUTE_PRIVATE};
use crate::{claim, claim_eq, claim_ok, skip};

/// GUEST_MEMFD_FLAG_HUGETLB with pages of 2 MiB, as posted with the 1G guest_memfd series.
const HUGETLB_2M: u64 = 1 << 2 | 21 << 26;

/// The size of private mappings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Size {
    /// 4 KiB.
    Base,
    /// 2 MiB.
    Huge,
}

impl Size {
    /// Bytes.
    pub const fn bytes(self) -> u64 {
        self.pages() * PAGE_SIZE
    }

    /// Base pages.
    pub const fn pages(self) -> u64 {
        match self {
            Size::Base => 1,
            Size::Huge => 512,
        }
    }

    /// Level of the S-EPT entry.
    pub const fn level(self) -> u8 {
        match self {
            Size::Base => 0,
            Size::Huge => 1,
        }
    }

    fn flags(self) -> u64 {
        match self {
            Size::Base => 0,
            Size::Huge => HUGETLB_2M,
        }
    }
}

/// What takes private memory away from a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// Conversion to shared of the whole range: on the file where the kernel has that, else on the VM.
    Convert,
    /// Punch hole over the whole range.
    Punch,
    /// Close of the file.
    Close,
    /// Deletion of the slot.
    DeleteSlot,
    /// Close of the vCPU, the VM and then the file, which takes the TD down.
    Destroy,
    /// Memory failure in the page.
    MemoryFailure,
}

impl Event {
    /// Every event.
    pub const ALL: [Event; 6] =
        [Event::Convert, Event::Punch, Event::Close, Event::DeleteSlot, Event::Destroy, Event::MemoryFailure];

    /// A part of names of rows.
    pub fn name(self) -> &'static str {
        match self {
            Event::Convert => "convert",
            Event::Punch => "punch",
            Event::Close => "close",
            Event::DeleteSlot => "delete_slot",
            Event::Destroy => "destroy",
            Event::MemoryFailure => "memory_failure",
        }
    }
}

/// What came of an [`Event`].
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// What the call returned.
    pub result: Result<(), Errno>,
    /// `error_offset` of a conversion on the file.
    pub offset: Option<u64>,
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.result)?;
        self.offset.map_or(Ok(()), |offset| write!(f, " at {offset:#x}"))
    }
}

/// A TD with one slot over the whole of one file, every mapping of which the guest has accepted and written to.
pub struct PrivateTd {
    /// The vCPU.
    pub vcpu: Option<Box<dyn Vcpu>>,
    /// The VM.
    pub vm: Option<Arc<dyn Vm>>,
    /// The file, bound from its first byte.
    pub file: Option<Arc<dyn GuestMemfd>>,
    /// The TDX module under it.
    pub module: Arc<dyn TdxModule>,
    /// Size of the mappings.
    pub size: Size,
    /// First frame of each mapping, by the module's own account.
    pub frames: Vec<u64>,
    /// Frame of the TD's root page.
    pub tdr: u64,
}

impl PrivateTd {
    /// Where the slot begins.
    pub const GPA: u64 = 1 << 32;
    /// What the guest wrote to the first bytes of every mapping.
    pub const SECRET: u64 = 0x5ec2_e75e_c2e7_5ec2;

    /// Builds it with `count` mappings.
    ///
    /// # Errors
    /// The failure of any step, or a skip where the machine has no such mappings.
    pub fn new(cx: &Context, size: Size, count: u64) -> TestResult<PrivateTd> {
        let module = module_of(cx)?;
        let machine = cx.machine();
        let vm = claim_ok!(machine.create_vm(VmConfig::Payload { vcpus: 1 }));
        let mut vcpu = claim_ok!(vm.create_vcpu(0));
        let len = count * size.bytes();
        let file = create_file(cx, &*vm, size, len)?;
        claim_ok!(vm.set_memory_region(&MemoryRegion::new(0, PrivateTd::GPA, len).bound_to(&*file, 0)));
        if !cx.has(Facility::InPlaceConversion) {
            let attributes = KVM_MEMORY_ATTRIBUTE_PRIVATE;
            let range = MemoryAttributes { address: PrivateTd::GPA, size: len, attributes, flags: 0 };
            claim_ok!(vm.set_memory_attributes(&range));
        }
        let mark = module.position()?;
        let accept = GuestOp::Accept { gpa: PrivateTd::GPA, len, level: size.level() };
        claim_eq!(vcpu.execute(accept), Exit::Done(0), "ACCEPT of the whole range");
        let (frames, tdr) = mapped(&module.calls_since(mark)?, size, count);
        claim_eq!(frames.len() as u64, count, "mappings that TDH.MEM.PAGE.AUG made");
        let mut td = PrivateTd { vcpu: Some(vcpu), vm: Some(vm), file: Some(file), module, size, frames, tdr };
        for i in 0..count {
            claim_eq!(td.write(i, PrivateTd::SECRET), Exit::Done(0), "a store to mapping {i}");
        }
        if cx.has(Facility::DropCaches) {
            claim_ok!(machine.drain_lru());
        }
        Ok(td)
    }

    /// Bytes of the file and the slot.
    pub fn len(&self) -> u64 {
        self.count() * self.size.bytes()
    }

    /// Whether there is no mapping, which [`PrivateTd::new`] is not asked for.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// How many mappings.
    pub fn count(&self) -> u64 {
        self.frames.len() as u64
    }

    /// Guest-physical address of a mapping.
    pub fn gpa(&self, index: u64) -> u64 {
        PrivateTd::GPA + index * self.size.bytes()
    }

    /// The file.
    ///
    /// # Errors
    /// A failure of the test when it is closed.
    pub fn file(&self) -> TestResult<&dyn GuestMemfd> {
        Ok(&**claim_ok!(self.file.as_ref().ok_or("closed"), "the file is open"))
    }

    /// The guest stores 8 bytes at the start of a mapping.
    pub fn write(&mut self, index: u64, value: u64) -> Exit {
        self.execute(GuestOp::write_u64(self.gpa(index), value))
    }

    /// The guest loads 8 bytes at the start of a mapping.
    pub fn read(&mut self, index: u64) -> Exit {
        self.execute(GuestOp::read_u64(self.gpa(index)))
    }

    /// The guest accepts a mapping that it lost.
    pub fn accept(&mut self, index: u64) -> Exit {
        let (gpa, len, level) = (self.gpa(index), self.size.bytes(), self.size.level());
        self.execute(GuestOp::Accept { gpa, len, level })
    }

    /// The guest executes something.
    pub fn execute(&mut self, op: GuestOp) -> Exit {
        match &mut self.vcpu {
            Some(vcpu) => vcpu.execute(op),
            None => Exit::Failed { errno: Errno::EBADF, reason: 0 },
        }
    }

    /// Plans a fault for the unmap of a mapping: `before` others are unmapped before it. The value is the first planned
    /// fault's name.
    ///
    /// # Errors
    /// The failure of the module's answer.
    pub fn plan(&self, fault: &SeamcallFault, index: u64, before: u64) -> TestResult<u64> {
        let plans = fault.plan(Mapping { gpa: self.gpa(index), level: self.size.level(), before });
        let mut first = None;
        for plan in &plans {
            let name = claim_ok!(self.module.add_fault(plan), "{plan:x?}");
            first.get_or_insert(name);
        }
        Ok(claim_ok!(first.ok_or("no fault"), "a planned fault"))
    }

    /// Does what takes the memory away; `index` is the page in which memory fails.
    ///
    /// # Errors
    /// A skip when the machine cannot do it.
    pub fn meet(&mut self, cx: &Context, event: Event, index: u64) -> TestResult<Answer> {
        let plain = |result| Answer { result, offset: None };
        Ok(match event {
            Event::Convert => self.convert(cx, 0, self.len(), 0)?,
            Event::Punch => plain(self.file()?.punch_hole(0, self.len())),
            Event::Close => {
                self.file = None;
                plain(Ok(()))
            }
            Event::DeleteSlot => {
                let vm = claim_ok!(self.vm.as_ref().ok_or("closed"), "the VM is open");
                plain(vm.set_memory_region(&MemoryRegion::deletion(0)))
            }
            Event::Destroy => {
                self.take_down();
                plain(Ok(()))
            }
            Event::MemoryFailure => {
                cx.require(Facility::HwPoison)?;
                let result = cx.machine().memory_failure(self.frames[index as usize]);
                if result == Err(Errno::ENOENT) {
                    skip!(
                        ConfigOff,
                        "no way to a memory failure: CONFIG_MEMORY_HOTPLUG, or CONFIG_HWPOISON_INJECT and debugfs"
                    );
                }
                plain(result)
            }
        })
    }

    /// Converts bytes of the file: on the file where the kernel has that, else on the VM.
    ///
    /// # Errors
    /// A failure of the test when what is to be converted is closed.
    pub fn convert(&self, cx: &Context, offset: u64, len: u64, attributes: u64) -> TestResult<Answer> {
        if cx.has(Facility::InPlaceConversion) {
            let result = self.file()?.convert(offset, len, attributes);
            let offset = result.err().and_then(|error| error.offset);
            return Ok(Answer { result: result.map_err(|error| error.errno), offset });
        }
        let vm = claim_ok!(self.vm.as_ref().ok_or("closed"), "the VM is open");
        let range = MemoryAttributes { address: PrivateTd::GPA + offset, size: len, attributes, flags: 0 };
        Ok(Answer { result: vm.set_memory_attributes(&range), offset: None })
    }

    /// Closes the vCPU, the VM, and last the file, if they are not closed yet.
    pub fn take_down(&mut self) {
        self.vcpu = None;
        self.vm = None;
        self.file = None;
    }

    /// Whether every ioctl of the VM fails with EIO; `None` when it is closed.
    pub fn is_dead(&self) -> Option<bool> {
        const KVM_CAP_NR_MEMSLOTS: u32 = 10;
        Some(self.vm.as_ref()?.capability(KVM_CAP_NR_MEMSLOTS) == Err(Errno::EIO))
    }

    /// Whether the module still has the frame of a mapping.
    ///
    /// # Errors
    /// The failure of the module's answer.
    pub fn is_owned(&self, index: u64) -> TestResult<bool> {
        is_owned(&*self.module, self.frames[index as usize])
    }
}

/// The TDX module of the machine, without planned faults.
///
/// # Errors
/// A skip where there is none.
pub fn module_of(cx: &Context) -> TestResult<Arc<dyn TdxModule>> {
    let Some(module) = cx.machine().tdx_module() else {
        skip!(NoHardwareInjection, "the TDX module under {} cannot be reached", cx.machine().spec());
    };
    claim_ok!(module.clear_faults());
    Ok(module)
}

/// Whether a TD has a frame.
///
/// # Errors
/// The failure of the module's answer.
pub fn is_owned(module: &dyn TdxModule, frame: u64) -> TestResult<bool> {
    Ok(!claim_ok!(module.page_owner(frame), "owner of frame {frame:#x}").is_free())
}

/// Claims that the module does not contradict itself.
///
/// # Errors
/// What it says, as a failure.
pub fn claim_module_is_sound(module: &dyn TdxModule) -> TestResult {
    let violations = claim_ok!(module.violations());
    claim!(violations.is_empty(), "the module's invariants: {violations:?}");
    Ok(())
}

/// A file for private memory: one that the host may map once a part of it is shared, where conversion is on the file.
///
/// # Errors
/// The failure of the call, or a skip where there are no files of that size of page.
pub fn create_file(cx: &Context, vm: &dyn Vm, size: Size, len: u64) -> TestResult<Arc<dyn GuestMemfd>> {
    let mmap = if cx.has(Facility::InPlaceConversion) { GUEST_MEMFD_FLAG_MMAP } else { 0 };
    match (vm.create_guest_memfd(len, mmap | size.flags()), size) {
        (Err(Errno::EINVAL), Size::Huge) => {
            skip!(UnsupportedKernel, "no guest_memfd of 2M pages (the 1G guest_memfd series, kernel=huge)")
        }
        (file, _) => Ok(claim_ok!(file, "a guest_memfd of {len:#x} bytes")),
    }
}

/// First frames of the mappings that calls of TDH.MEM.PAGE.AUG made in the slot, by address, and the frame of the TDR.
fn mapped(calls: &[ModuleCall], size: Size, count: u64) -> (Vec<u64>, u64) {
    let mut tdr = 0;
    let mut frames = Vec::new();
    for i in 0..count {
        let rcx = (PrivateTd::GPA + i * size.bytes()) | u64::from(size.level());
        let made = |call: &&ModuleCall| call.leaf == seamcall::AUG && call.operands[0] == rcx && call.status == 0;
        if let Some(call) = calls.iter().filter(|call| !call.guest).find(made) {
            frames.push(call.operands[2] / PAGE_SIZE);
            tdr = call.operands[1] / PAGE_SIZE;
        }
    }
    (frames, tdr)
}

/// Frames that the kernel hands out next, for another VM's file of the same pages.
///
/// # Errors
/// The failure of a step.
pub fn next_frames(cx: &Context, size: Size, count: u64) -> TestResult<Vec<u64>> {
    let vm = claim_ok!(cx.machine().create_vm(VmConfig::Bare));
    let file = create_file(cx, &*vm, size, count * size.bytes())?;
    claim_ok!(file.allocate(0, count * size.bytes()));
    let frame = |i: u64| cx.machine().page_account(&*file, i * size.bytes());
    let mut frames = Vec::new();
    for i in 0..count {
        let account = claim_ok!(frame(i), "account of page {i}");
        frames.extend(account.map(|account| account.frame));
    }
    Ok(frames)
}

/// What the module and the kernel say of a frame, in one line: whose it is by the PAMT, its references, its flags.
///
/// # Errors
/// The failure of the module's answer.
pub fn evidence(cx: &Context, module: &dyn TdxModule, frame: u64) -> TestResult<String> {
    /// KPF_* bits that tell what becomes of a frame (Documentation/admin-guide/mm/pagemap.rst).
    const FLAGS: [(u32, &str); 7] =
        [(4, "DIRTY"), (5, "LRU"), (10, "BUDDY"), (17, "HUGE"), (19, "HWPOISON"), (20, "NOPAGE"), (24, "ZERO_PAGE")];
    let owner = claim_ok!(module.page_owner(frame), "owner of frame {frame:#x}");
    let module_says = match owner.page_type {
        0 => "nobody's (PT_NDA)".to_owned(),
        3 => format!("the TD's (PT_REG, TDR {:#x})", owner.tdr),
        other => format!("the TD's (page type {other}, TDR {:#x})", owner.tdr),
    };
    let machine = cx.machine();
    let references = machine.page_references(frame).map_or_else(|errno| errno.to_string(), |count| count.to_string());
    let flags = machine.page_flags(frame).map_or_else(
        |errno| errno.to_string(),
        |flags| {
            let set = FLAGS.iter().filter(|(bit, _)| flags >> bit & 1 == 1).map(|&(_, name)| name);
            format!("{flags:#x} {}", set.collect::<Vec<_>>().join("+"))
        },
    );
    Ok(format!("PAMT: {module_says}; kernel: references {references}, page flags {}", flags.trim_end()))
}

/// How many complaints the kernel has made, where that can be told.
pub fn complaints(machine: &dyn Machine) -> Option<u64> {
    machine.complaints().ok()
}

/// The answer to a failed unmap that the machine is expected to give, noted with the result.
pub fn expected_policy(cx: &Context) -> Policy {
    let policy = crate::inject::expected_policy(cx.machine());
    cx.note(format_args!("expecting the policy {}", policy.name()));
    policy
}
