//! Memory failure in a guest_memfd: what an injected one returns, what the host finds afterwards, and how a punch gets
//! rid of it.

use std::fs::{self, File};
use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use gmemtest::harness::{Context, Side, TestResult, in_child};
use gmemtest::machine::{
    Errno, Exit, Facility, GuestMemfd, GuestOp, HostFault, Mapping, MemoryRegion, PAGE_SIZE, PageAccount, Protection,
    Reply, Vm, VmConfig,
};
use gmemtest::uapi::kvm::{GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP};
use gmemtest::{claim_eq, claim_err, claim_ok, skip};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

gmemtest::suite! {
    /// A page with a memory failure stays in the file, marked: who touches it is told, and data is not dropped behind
    /// the guest's back (kvm_gmem_error_folio()). Each test takes its poison back through debugfs.
    pub static SUITE: gmem_hwpoison needs [Vm, GuestMemfd, GmemInitShared, HwPoison, Pagemap] {
        /// MADV_HWPOISON of a page that was only read is EBUSY, although the page is poisoned: the page cache keeps its
        /// reference, and that is what memory_failure() reports. No signal is sent.
        poisoning_a_clean_page_is_ebusy_and_sends_no_signal needs [RealFiles];

        /// MADV_HWPOISON of a page that was written sends SIGBUS, BUS_MCEERR_AR with its address, to the caller: data
        /// is lost, and the caller would have consumed it. A failure means that lost data is not reported to the one
        /// who had it mapped.
        poisoning_a_dirty_page_is_sigbus_for_the_caller needs [RealFiles];

        /// The page is marked HWPOISON until the poison is taken back. A failure means that the frame can be used
        /// again.
        poisoned_page_has_its_flag needs [PageFlags];

        /// The next access of the host is SIGBUS, BUS_MCEERR_AR. A failure means that corrupted data is consumed.
        access_to_a_poisoned_page_is_sigbus_mceerr_ar;

        /// So it is through a mapping that is made afterwards. A failure means that poisoned memory is read, which
        /// stops a real machine.
        access_through_a_new_mapping_is_sigbus_mceerr_ar;

        /// System calls that read the page fail with EFAULT. A failure means that the kernel itself reads poisoned
        /// memory.
        kernel_access_to_a_poisoned_page_is_efault;

        /// MADV_POPULATE_READ says EHWPOISON. A failure means that a VMM that prepares memory is not told that it is
        /// broken.
        populating_a_poisoned_page_is_ehwpoison;

        /// The page stays in the file, and so do its neighbours with their contents. A failure means that one broken
        /// page takes others with it, or is silently replaced by zeroes.
        poisoned_page_stays_in_the_file_beside_its_neighbours needs [Cachestat];

        /// A punch takes the poison out of the file: a new mapping finds a page of zeroes on another frame. A failure
        /// means that a guest cannot be given sound memory in the place of broken.
        punch_replaces_a_poisoned_page;

        /// Page table entries of the poisoned page outlive the punch in mappings that are not zapped: they go with
        /// MADV_DONTNEED, and the new page is found there too. A failure means that a VMM has to map its memory anew
        /// after a memory error.
        old_mapping_finds_the_new_page_after_dontneed;

        /// MADV_SOFT_OFFLINE cannot move a guest_memfd page: it is EBUSY, and the page stays where it is. A failure
        /// means that a page is moved that the guest's page tables, or the TDX module, hold.
        soft_offline_leaves_the_page_where_it_is;

        /// memory_failure() keeps a reference of its own to the page, while the page is in the file and after a punch took it
        /// out (get_hwpoison_page()). A failure means that the broken frame goes back to the allocator.
        memory_failure_keeps_a_reference needs [PageAccount];

        /// A guest that touches the page leaves with KVM_EXIT_MEMORY_FAULT and EHWPOISON, and goes on with zeroes once
        /// the page was punched (__kvm_gmem_get_pfn(), kvm_gmem_error_folio()). A failure means that the guest consumes
        /// corrupted data, is stuck with a page that user space replaced, or loses the page beside it.
        guest_access_to_a_poisoned_page_is_ehwpoison[SLOTS] needs [Guest];
    }
}

const P: u64 = PAGE_SIZE;
const BUS_MCEERR_AR: i32 = 4;
const UNPOISON: &str = "/sys/kernel/debug/hwpoison/unpoison-pfn";

type Gmem = (Arc<dyn Vm>, Arc<dyn GuestMemfd>);

/// Takes the poison of a frame back when dropped, once the page is out of its file.
struct Poison {
    frame: u64,
    gmem: Arc<dyn GuestMemfd>,
    /// Where a real frame is given back; the model's frames are lost to nobody.
    debugfs: Option<File>,
}

impl Poison {
    /// Promises to take the poison of the page behind byte `at` back; before it is injected.
    fn undo(cx: &Context, gmem: &Arc<dyn GuestMemfd>, mapping: &dyn Mapping, at: u64) -> TestResult<Poison> {
        let debugfs = if cx.has(Facility::RealFiles) {
            fs::OpenOptions::new().write(true).open(UNPOISON).map(Some)
        } else {
            Ok(None)
        };
        if let Err(error) = &debugfs {
            skip!(
                ConfigOff,
                "{UNPOISON}: {error} (CONFIG_HWPOISON_INJECT=y, and debugfs mounted: without it a page of the host would be lost until it reboots)"
            );
        }
        Ok(Poison { frame: mapping.frame(at)?, gmem: Arc::clone(gmem), debugfs: debugfs? })
    }
}

impl Drop for Poison {
    fn drop(&mut self) {
        let freed = self.gmem.punch_hole(0, 4 * P);
        if let (Ok(()), Some(debugfs)) = (freed, &mut self.debugfs) {
            // One write(2) is one frame. That it may not have been poisoned at all is no error here.
            let _ = debugfs.write_all(format!("{:#x}", self.frame).as_bytes());
        }
    }
}

/// A file of four pages, each of which was read, and a mapping of all of it.
fn read_once(cx: &Context) -> TestResult<(Gmem, Box<dyn Mapping>)> {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let gmem = vm.create_guest_memfd(4 * P, GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED)?;
    let mapping = gmem.map(4 * P, 0, Protection::SHARED_RW)?;
    claim_eq!(mapping.find_mismatch(0, 4 * P, 0)?, None, "a new file");
    Ok(((vm, gmem), mapping))
}

/// The same, with its second page poisoned.
fn poisoned(cx: &Context) -> TestResult<(Gmem, Box<dyn Mapping>, Poison)> {
    let (file, mapping) = read_once(cx)?;
    let poison = Poison::undo(cx, &file.1, &*mapping, P)?;
    claim_err!(mapping.advise(P, P, libc::MADV_HWPOISON), Errno::EBUSY, "MADV_HWPOISON");
    Ok((file, mapping, poison))
}

fn mceerr(offset: u64) -> HostFault {
    HostFault { signal: libc::SIGBUS, code: BUS_MCEERR_AR, offset }
}

/// What the last SIGBUS of this process said: `si_code`, and the address. Written by [`note_signal`].
static SIGNAL_CODE: AtomicI32 = AtomicI32::new(0);
static SIGNAL_ADDRESS: AtomicU64 = AtomicU64::new(0);

extern "C" fn note_signal(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo, and SIGBUS has an address.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as u64) };
    SIGNAL_CODE.store(code, Ordering::Relaxed);
    SIGNAL_ADDRESS.store(address, Ordering::Relaxed);
}

/// MADV_HWPOISON of the second page in a child, after `access` to it; gives the code of the SIGBUS that came, 0 for
/// none. The child fails unless the call gave EBUSY and the signal, if any, named the page.
fn signal_at_injection(
    mapping: &dyn Mapping,
    access: impl FnOnce() -> Result<(), HostFault>,
) -> TestResult<Result<u64, Errno>> {
    in_child(|| {
        access().map_err(|_| Errno::EFAULT)?;
        let action = SigAction::new(SigHandler::SigAction(note_signal), SaFlags::SA_SIGINFO, SigSet::empty());
        // SAFETY: the handler stores two numbers in atomics.
        unsafe { sigaction(Signal::SIGBUS, &action) }?;
        match mapping.advise(P, P, libc::MADV_HWPOISON) {
            Err(Errno::EBUSY) => {}
            other => return Err(other.err().unwrap_or(Errno::ENODATA)),
        }
        let code = SIGNAL_CODE.load(Ordering::Relaxed);
        if code != 0 && SIGNAL_ADDRESS.load(Ordering::Relaxed) & !(P - 1) != mapping.addr() + P {
            return Err(Errno::EFAULT);
        }
        Ok(code as u64)
    })?
    .returned()
}

fn poisoning_a_clean_page_is_ebusy_and_sends_no_signal(cx: &Context) -> TestResult {
    let ((_vm, gmem), mapping) = read_once(cx)?;
    let _poison = Poison::undo(cx, &gmem, &*mapping, P)?;
    let code = signal_at_injection(&*mapping, || mapping.read_u64(P).map(drop))?;
    claim_eq!(code, Ok(0), "si_code of the SIGBUS in a child that read the page, 0 for none");
    Ok(())
}

fn poisoning_a_dirty_page_is_sigbus_for_the_caller(cx: &Context) -> TestResult {
    let ((_vm, gmem), mapping) = read_once(cx)?;
    let _poison = Poison::undo(cx, &gmem, &*mapping, P)?;
    let code = signal_at_injection(&*mapping, || mapping.write_u64(P, 1))?;
    claim_eq!(code, Ok(BUS_MCEERR_AR as u64), "si_code of the SIGBUS in a child that wrote the page, 0 for none");
    Ok(())
}

fn poisoned_page_has_its_flag(cx: &Context) -> TestResult {
    const HWPOISON: u64 = 1 << 19;
    let (_file, mapping, poison) = poisoned(cx)?;
    let frame = poison.frame;
    let flags = cx.machine().page_flags(frame)?;
    claim_eq!(flags & HWPOISON, HWPOISON, "HWPOISON in {flags:#x}");
    drop((mapping, poison));
    if !cx.has(Facility::RealFiles) {
        return Ok(());
    }
    let flags = cx.machine().page_flags(frame)?;
    claim_eq!(flags & HWPOISON, 0, "HWPOISON in {flags:#x}, with the page punched and the poison taken back");
    Ok(())
}

fn access_to_a_poisoned_page_is_sigbus_mceerr_ar(cx: &Context) -> TestResult {
    let (_file, mapping, _poison) = poisoned(cx)?;
    claim_err!(mapping.read(P, &mut [0]), mceerr(P), "a load");
    claim_err!(mapping.write(P, &[1]), mceerr(P), "a store");
    claim_eq!(mapping.find_mismatch(0, P, 0), Ok(None), "the page before");
    claim_eq!(mapping.find_mismatch(2 * P, 2 * P, 0), Ok(None), "the pages after");
    Ok(())
}

fn access_through_a_new_mapping_is_sigbus_mceerr_ar(cx: &Context) -> TestResult {
    let ((_vm, gmem), _mapping, _poison) = poisoned(cx)?;
    let new = gmem.map(4 * P, 0, Protection::SHARED_RW)?;
    claim_err!(new.read(P, &mut [0]), mceerr(P), "a load");
    claim_err!(new.write(P, &[1]), mceerr(P), "a store");
    Ok(())
}

fn kernel_access_to_a_poisoned_page_is_efault(cx: &Context) -> TestResult {
    let ((_vm, gmem), mapping, _poison) = poisoned(cx)?;
    claim_err!(mapping.kernel_read(P), Errno::EFAULT, "through the mapping that was poisoned");
    let new = gmem.map(4 * P, 0, Protection::SHARED_RW)?;
    claim_err!(new.kernel_read(P), Errno::EFAULT, "through a new mapping");
    Ok(())
}

fn populating_a_poisoned_page_is_ehwpoison(cx: &Context) -> TestResult {
    let (_file, mapping, _poison) = poisoned(cx)?;
    claim_err!(mapping.advise(P, P, libc::MADV_POPULATE_READ), Errno::EHWPOISON, "MADV_POPULATE_READ");
    Ok(())
}

fn poisoned_page_stays_in_the_file_beside_its_neighbours(cx: &Context) -> TestResult {
    let ((_vm, gmem), mapping) = read_once(cx)?;
    mapping.fill(0, P, 0x11)?;
    mapping.fill(2 * P, 2 * P, 0x22)?;
    let _poison = Poison::undo(cx, &gmem, &*mapping, P)?;
    claim_err!(mapping.advise(P, P, libc::MADV_HWPOISON), Errno::EBUSY, "MADV_HWPOISON");
    claim_eq!(gmem.cache_stat(0, 0)?.cached, 4, "pages in the file");
    claim_eq!(mapping.find_mismatch(0, P, 0x11), Ok(None), "the page before");
    claim_eq!(mapping.find_mismatch(2 * P, 2 * P, 0x22), Ok(None), "the pages after");
    Ok(())
}

fn punch_replaces_a_poisoned_page(cx: &Context) -> TestResult {
    let ((_vm, gmem), _mapping, poison) = poisoned(cx)?;
    claim_ok!(gmem.punch_hole(P, P), "a punch of the poisoned page");
    let new = gmem.map(4 * P, 0, Protection::SHARED_RW)?;
    claim_eq!(new.find_mismatch(P, P, 0), Ok(None), "contents of the new page");
    gmemtest::claim_ne!(new.frame(P), Ok(poison.frame), "its frame");
    Ok(())
}

fn old_mapping_finds_the_new_page_after_dontneed(cx: &Context) -> TestResult {
    let ((_vm, gmem), mapping, _poison) = poisoned(cx)?;
    gmem.punch_hole(P, P)?;
    claim_err!(mapping.read(P, &mut [0]), mceerr(P), "a load after the punch");
    claim_ok!(mapping.advise(P, P, libc::MADV_DONTNEED), "MADV_DONTNEED");
    claim_eq!(mapping.find_mismatch(P, P, 0), Ok(None), "contents after it");
    Ok(())
}

fn soft_offline_leaves_the_page_where_it_is(cx: &Context) -> TestResult {
    let ((_vm, gmem), mapping) = read_once(cx)?;
    mapping.fill(P, P, 0x33)?;
    let poison = Poison::undo(cx, &gmem, &*mapping, P)?;
    claim_err!(mapping.advise(P, P, libc::MADV_SOFT_OFFLINE), Errno::EBUSY, "MADV_SOFT_OFFLINE");
    claim_eq!(mapping.find_mismatch(P, P, 0x33), Ok(None), "contents");
    claim_eq!(mapping.frame(P), Ok(poison.frame), "frame");
    Ok(())
}

fn memory_failure_keeps_a_reference(cx: &Context) -> TestResult {
    let ((_vm, gmem), _mapping, poison) = poisoned(cx)?;
    let holders = |account: Option<PageAccount>| account.and_then(|account| account.held_by("memory-failure"));
    claim_eq!(holders(cx.machine().page_account(&*gmem, P)?), Some(1), "references of memory_failure() in the file");
    claim_ok!(gmem.punch_hole(P, P));
    claim_eq!(holders(cx.machine().frame_account(poison.frame)?), Some(1), "and after a punch");
    Ok(())
}

/// For each of the slots of a VM: its first page in the file, and its pages. The second page of the file is poisoned.
const SLOTS: &[(&str, &[(u64, u64)])] = &[
    ("slot_from_offset_0", &[(0, 4)]),
    ("slot_from_the_page_on", &[(1, 3)]),
    ("slot_of_the_page_alone", &[(1, 1)]),
    ("last_page_of_a_slot_behind_another", &[(2, 2), (0, 2)]),
    ("first_page_of_a_slot_behind_another", &[(0, 1), (1, 3)]),
];

fn guest_access_to_a_poisoned_page_is_ehwpoison(cx: &Context, &slots: &&[(u64, u64)]) -> TestResult {
    const GPA: u64 = 1 << 32;
    let vm = cx.machine().create_vm(VmConfig::Payload { vcpus: 1 })?;
    let gmem = vm.create_guest_memfd(4 * P, GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED)?;
    let mapping = gmem.map(4 * P, 0, Protection::SHARED_RW)?;
    let mut vcpu = vm.create_vcpu(0)?;
    let (mut next, mut victim, mut others) = (GPA, 0, Vec::new());
    for (id, &(first, pages)) in (1..).zip(slots) {
        vm.set_memory_region(&MemoryRegion::new(id, next, pages * P).bound_to(&*gmem, first * P))?;
        for page in 0..pages {
            let gpa = Side::Shared.address(&*vm, next + page * P);
            claim_eq!(vcpu.execute(GuestOp::read_u64(gpa)), Exit::Done(0), "a guest read before");
            match first + page {
                1 => victim = gpa,
                _ => others.push(gpa),
            }
        }
        next += pages * P;
    }
    mapping.read_u64(P)?;
    let poison = Poison::undo(cx, &gmem, &*mapping, P)?;
    claim_err!(mapping.advise(P, P, libc::MADV_HWPOISON), Errno::EBUSY, "MADV_HWPOISON");
    for gpa in others {
        claim_eq!(vcpu.execute(GuestOp::read_u64(gpa)), Exit::Done(0), "a guest read of the page at {gpa:#x}");
    }
    let shown = victim & !vm.shared_bit();
    let expected = Exit::MemoryFault { errno: Errno::EHWPOISON, flags: 0, gpa: shown, size: P };
    claim_eq!(vcpu.execute(GuestOp::read_u64(victim)), expected, "a guest read of the poisoned page");
    drop(poison);
    claim_eq!(vcpu.resume(Reply::None), Exit::Done(0), "the guest let go on after a punch");
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
