//! Memory that is taken away from a TD: by the module's own books it is the host's again, and it went the way that the TDX
//! module asks for. Where that is not so, the failure names the call that is missing, or that failed.

use std::fmt;
use std::process::ExitCode;

use gmemtest::harness::private_td::{Answer, Event, PrivateTd, Size, claim_module_is_sound, is_owned, module_of};
use gmemtest::harness::{AtFault, Context, GmemVm, GuestWriter, Td, TestResult};
use gmemtest::inject::seamcall::{AUG, BLOCK, BUSY, EPOCH_OPERAND_BUSY, REMOVE, SEPT_ADD, TRACK, VP_ENTER, WBINVD};
use gmemtest::machine::{
    FaultWhen, MemoryAttributes, ModuleCall, ModuleFault, PAGE_SIZE, PageOwner, TdxAnswer, TdxModule,
};
use gmemtest::uapi::kvm::KVM_MEMORY_ATTRIBUTE_PRIVATE;
use gmemtest::uapi::tdx_status::TdxStatus;
use gmemtest::{claim, claim_eq, claim_ok, fail};

gmemtest::suite! {
    /// Private memory of a TD that goes (arch/x86/kvm/vmx/tdx.c, tdx_sept_remove_leaf_spte()), judged by what the module was
    /// asked and by whose the pages are afterwards.
    pub static SUITE: tdx_unmap needs [Vm, Guest, PrivateMemory, ModuleInjection] {
        /// A page is removed after its mapping was blocked and a new TLB epoch begun, with success (TDX module: "TLB
        /// tracking"). A failure is a page that a vCPU may still reach through its TLB, or that stays the TD's; it names the
        /// call that is missing or failed.
        page_is_removed_after_block_and_track[EVENTS] runs Alone;

        /// After the call that takes the pages away the PAMT says of each that nobody has it, and the module's books are in
        /// order. A failure names the page, its owner and why it was not removed: the kernel uses memory that the module has.
        page_is_the_hosts_in_the_pamt[EVENTS] runs Alone;

        /// The cache lines of a removed page are written back under the TD's key id before the page is used
        /// (TDH.PHYMEM.PAGE.WBINVD). A failure is a page whose new owner loses data to late write-backs.
        removed_page_is_written_back[EVENTS] runs Alone;

        /// 64 MiB are mapped page by page, converted, punched and taken down with the TD; the module's books say so after
        /// each step. A failure is a page that is lost among many.
        no_page_of_64_mib_is_lost needs [PreFault, MemoryAttributes] timeout 300 runs Alone;

        /// While two vCPUs store to memory that is converted to and fro, every seventh call of each kind that KVM makes on
        /// the S-EPT, and every seventh entry, is busy. Both go on after each conversion, and the VM lives. A failure is a
        /// wake-up that was lost, or a TD that ends for a matter of timing.
        vcpus_go_on_under_conversions_while_the_module_is_busy needs [MemoryAttributes, LazyAccept]
            timeout 300 runs Alone;
    }
}

const EVENTS: &[(&str, Event)] = &[
    ("convert", Event::Convert),
    ("punch", Event::Punch),
    ("close", Event::Close),
    ("delete_slot", Event::DeleteSlot),
    ("destroy", Event::Destroy),
];

/// The words for an event, after "the".
fn words(event: Event) -> &'static str {
    match event {
        Event::Convert => "conversion to shared",
        Event::Punch => "punch",
        Event::Close => "close of the file",
        Event::DeleteSlot => "deletion of the slot",
        Event::Destroy => "close of the VM",
        Event::MemoryFailure => "memory failure",
    }
}

/// What became of one page, as the module was asked.
struct Removal<'a> {
    gpa: u64,
    /// Calls about this page, and every TRACK.
    calls: Vec<&'a ModuleCall>,
}

impl<'a> Removal<'a> {
    fn of(calls: &'a [ModuleCall], gpa: u64, frame: u64) -> Removal<'a> {
        let about = |call: &&ModuleCall| match call.leaf {
            _ if call.guest => false,
            BLOCK | REMOVE => call.operands[0] & !0xfff == gpa,
            // The key id stands above the address.
            WBINVD => (call.operands[0] / PAGE_SIZE) & ((1 << 34) - 1) == frame,
            leaf => leaf == TRACK,
        };
        Removal { gpa, calls: calls.iter().filter(about).collect() }
    }

    fn position(&self, leaf: u16) -> Option<usize> {
        self.calls.iter().position(|call| call.leaf == leaf && call.status == 0)
    }

    /// What kept the page from being removed by the rules.
    fn defect(&self) -> Option<Defect> {
        let (block, track, remove) = (self.position(BLOCK), self.position(TRACK), self.position(REMOVE));
        let asked = self.calls.iter().rposition(|call| call.leaf == REMOVE);
        let Some(asked) = asked else { return Some(self.missing(REMOVE)) };
        if block.is_none_or(|block| block > asked) {
            return Some(self.missing(BLOCK));
        }
        // The epoch has to be one that began after the block.
        let between = self.calls.iter().take(asked).skip(block.unwrap_or(0));
        if !between.into_iter().any(|call| call.leaf == TRACK && call.status == 0) {
            let failed = track.is_none() && self.calls.iter().any(|call| call.leaf == TRACK);
            return Some(if failed { self.missing(TRACK) } else { Defect::Without(TRACK, self.answer(REMOVE)) });
        }
        remove.is_none().then(|| self.missing(REMOVE))
    }

    /// The last answer to a leaf.
    fn answer(&self, leaf: u16) -> Option<TdxStatus> {
        self.calls.iter().rev().find(|call| call.leaf == leaf).map(|call| TdxStatus(call.status))
    }

    fn missing(&self, leaf: u16) -> Defect {
        self.answer(leaf).map_or(Defect::NotCalled(leaf), |status| Defect::Failed(leaf, status))
    }
}

/// Why a page was not removed, or not safely.
enum Defect {
    NotCalled(u16),
    Failed(u16, TdxStatus),
    /// The removal came without this call before it, and was answered so.
    Without(u16, Option<TdxStatus>),
}

fn leaf_name(leaf: u16) -> &'static str {
    match leaf {
        BLOCK => "TDH.MEM.RANGE.BLOCK",
        TRACK => "TDH.MEM.TRACK",
        REMOVE => "TDH.MEM.PAGE.REMOVE",
        WBINVD => "TDH.PHYMEM.PAGE.WBINVD",
        _ => "a SEAMCALL",
    }
}

impl fmt::Display for Defect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Defect::NotCalled(leaf) => write!(f, "{} was not called", leaf_name(*leaf)),
            Defect::Failed(leaf, status) => write!(f, "{} answered {status}", leaf_name(*leaf)),
            Defect::Without(leaf, status) => {
                write!(f, "page removed without {}", leaf_name(*leaf))?;
                status.map_or(Ok(()), |status| write!(f, ", and TDH.MEM.PAGE.REMOVE answered {status}"))
            }
        }
    }
}

/// A TD that has lost its pages, and what the module was asked for that.
struct Lost {
    td: PrivateTd,
    gpas: Vec<u64>,
    answer: Answer,
    calls: Vec<ModuleCall>,
}

fn lose(cx: &Context, event: Event) -> TestResult<Lost> {
    let mut td = PrivateTd::new(cx, Size::Base, 3)?;
    let gpas = (0..td.count()).map(|page| td.gpa(page)).collect();
    let from = claim_ok!(td.module.position());
    let answer = td.meet(cx, event, 0)?;
    let calls = claim_ok!(td.module.calls_since(from));
    Ok(Lost { td, gpas, answer, calls })
}

impl Lost {
    fn removals(&self) -> impl Iterator<Item = (Removal<'_>, u64)> {
        let pages = self.gpas.iter().zip(&self.td.frames);
        pages.map(|(&gpa, &frame)| (Removal::of(&self.calls, gpa, frame), frame))
    }
}

fn page_is_removed_after_block_and_track(cx: &Context, &event: &Event) -> TestResult {
    let lost = lose(cx, event)?;
    for (removal, _) in lost.removals() {
        if let Some(defect) = removal.defect() {
            fail!("{defect}: GPA {:#x}, at the {}", removal.gpa, words(event));
        }
    }
    claim_eq!(lost.answer.result, Ok(()), "the {}", words(event));
    Ok(())
}

fn page_is_the_hosts_in_the_pamt(cx: &Context, &event: &Event) -> TestResult {
    let lost = lose(cx, event)?;
    for (removal, frame) in lost.removals() {
        let owner = claim_ok!(lost.td.module.page_owner(frame));
        if owner.is_free() {
            continue;
        }
        let why = removal.defect().map_or_else(|| "all calls succeeded".to_owned(), |defect| defect.to_string());
        let PageOwner { page_type, tdr, .. } = owner;
        fail!(
            "page at GPA {:#x} still owned by the TD in the PAMT after the {}: {why} (frame {frame:#x}, page type {page_type}, TDR {tdr:#x})",
            removal.gpa,
            words(event)
        );
    }
    claim_module_is_sound(&*lost.td.module)
}

fn removed_page_is_written_back(cx: &Context, &event: &Event) -> TestResult {
    let lost = lose(cx, event)?;
    for (removal, frame) in lost.removals() {
        let (removed, written) = (removal.position(REMOVE), removal.position(WBINVD));
        let Some(removed) = removed else {
            let why = removal.missing(REMOVE);
            fail!("page at GPA {:#x} was not removed at the {}: {why}", removal.gpa, words(event));
        };
        if written.is_none_or(|written| written < removed) {
            let why = removal.missing(WBINVD);
            fail!("frame {frame:#x} of GPA {:#x} was given back with lines in the cache: {why}", removal.gpa);
        }
    }
    Ok(())
}

/// 64 MiB.
const MANY: u64 = 64 << 8;
/// Of so many pages one is looked up in the PAMT.
const SAMPLE: usize = 61;

/// Frames that TDH.MEM.PAGE.AUG mapped, one in [`SAMPLE`].
fn mapped_frames(module: &dyn TdxModule, from: u64) -> TestResult<(u64, Vec<u64>)> {
    let calls = claim_ok!(module.calls_since(from));
    let mapped: Vec<u64> = calls
        .iter()
        .filter(|call| !call.guest && call.leaf == AUG && call.status == 0)
        .map(|call| call.operands[2] / PAGE_SIZE)
        .collect();
    Ok((mapped.len() as u64, mapped.into_iter().step_by(SAMPLE).collect()))
}

fn no_page_of_64_mib_is_lost(cx: &Context) -> TestResult {
    let module = module_of(cx)?;
    let td = Td::initialized(cx)?;
    let mut vcpu = td.ready_vcpu(0)?;
    let memory = td.memory(cx, MANY)?;
    claim_eq!(td.finalize()?, TdxAnswer::OK, "KVM_TDX_FINALIZE_VM");
    let from = claim_ok!(module.position());
    let done = vcpu.pre_fault(memory.gpa(0), MANY * PAGE_SIZE, 0);
    claim_eq!((done.result, done.size), (Ok(()), 0), "KVM_PRE_FAULT_MEMORY");
    let (count, frames) = mapped_frames(&*module, from)?;
    claim_eq!(count, MANY, "pages that were mapped");
    let owned = |what: &str, from: usize, wanted: bool| -> TestResult {
        for &frame in &frames[from..] {
            claim_eq!(is_owned(&*module, frame)?, wanted, "the TD has frame {frame:#x} after the {what}");
        }
        Ok(())
    };
    owned("pre-fault", 0, true)?;
    let half = MANY / 2 * PAGE_SIZE;
    let convert = |attributes| MemoryAttributes { address: memory.gpa(0), size: half, attributes, flags: 0 };
    claim_ok!(td.vm.set_memory_attributes(&convert(0)), "the first half to shared");
    let converted = frames.len().div_ceil(2);
    owned("conversion of the other half", converted, true)?;
    claim_ok!(td.vm.set_memory_attributes(&convert(KVM_MEMORY_ATTRIBUTE_PRIVATE)), "and back");
    claim_ok!(memory.gmem.punch_hole(half, half), "the second half");
    owned("conversion and the punch", 0, false)?;
    claim_module_is_sound(&*module)?;
    // Something is there when the TD goes.
    let done = vcpu.pre_fault(memory.gpa(0), half, 0);
    claim_eq!((done.result, done.size), (Ok(()), 0), "KVM_PRE_FAULT_MEMORY of the first half");
    drop((vcpu, memory, td));
    owned("end of the TD", 0, false)?;
    claim_module_is_sound(&*module)
}

/// Conversions to and fro under the running vCPUs.
const CONVERSIONS: u64 = 40;

fn vcpus_go_on_under_conversions_while_the_module_is_busy(cx: &Context) -> TestResult {
    let module = module_of(cx)?;
    let vm = GmemVm::convertible(cx, 4)?;
    vm.set_attributes(0, vm.len, KVM_MEMORY_ATTRIBUTE_PRIVATE)?;
    let mut faults = Vec::new();
    for (leaf, status) in
        [(AUG, BUSY), (SEPT_ADD, BUSY), (BLOCK, BUSY), (TRACK, BUSY), (REMOVE, BUSY), (VP_ENTER, EPOCH_OPERAND_BUSY)]
    {
        let fault = ModuleFault::always(leaf, status).when(FaultWhen::Every(7));
        faults.push((leaf, claim_ok!(module.add_fault(&fault))));
    }
    let writers = [0, 1].map(|id| {
        vm.vcpu(id).map(|vcpu| GuestWriter::start(vcpu, vm.gpa(u64::from(id) * PAGE_SIZE), AtFault::TryAgain))
    });
    let [first, second] = writers;
    let writers = [first?, second?];
    for round in 0..CONVERSIONS {
        vm.set_attributes(0, vm.len, 0)?;
        vm.set_attributes(0, vm.len, KVM_MEMORY_ATTRIBUTE_PRIVATE)?;
        for (id, writer) in writers.iter().enumerate() {
            let went_on = writer.next();
            claim!(went_on.is_ok(), "vCPU {id} goes on after conversion {round}: {went_on:?}");
        }
    }
    for writer in writers {
        writer.finish()?;
    }
    for (leaf, fault) in faults {
        let hits = claim_ok!(module.fault_hits(fault));
        // There are few tables.
        claim!(hits > 0 || leaf == SEPT_ADD, "leaf {leaf} was busy now and then");
    }
    claim_ok!(module.clear_faults());
    claim_ok!(vm.vm.capability(0), "the VM lives");
    claim_module_is_sound(&*module)
}

/// The stand-alone binary.
pub fn main() -> ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
