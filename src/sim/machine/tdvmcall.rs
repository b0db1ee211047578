//! TDVMCALL MapGPA, in chunks of 2 MiB.

use super::super::mmu::capabilities::EXIT_MAP_GPA_RANGE;
use super::super::mmu::tdx::SHARED_BIT;
use super::exec::Wait;
use super::guest::{Guest, Stop};
use crate::machine::{Errno, Exit, PAGE_SIZE};
use crate::uapi::kvm::KVM_EXIT_HYPERCALL;
use crate::uapi::kvm_para::KVM_HC_MAP_GPA_RANGE;

/// TDVMCALL_STATUS_RETRY.
const RETRY: u64 = 1;
/// TDVMCALL_STATUS_INVALID_OPERAND.
const INVALID_OPERAND: u64 = 1 << 63;
/// TDVMCALL_STATUS_ALIGN_ERROR.
const ALIGN_ERROR: u64 = 1 << 63 | 2;
/// TDVMCALL_STATUS_SUBFUNC_UNSUPPORTED.
const SUBFUNC_UNSUPPORTED: u64 = 1 << 63 | 3;
/// Attribute of KVM_HC_MAP_GPA_RANGE for private memory.
const ENCRYPTED: u64 = 1 << 4;
/// Pages of one exit.
const CHUNK: u64 = (2 << 20) / PAGE_SIZE;

/// The address that the payload calls with: without the attribute for private memory it sets the SHARED bit.
pub(super) fn operand(gpa: u64, attributes: u64) -> u64 {
    if attributes & ENCRYPTED == 0 { gpa | SHARED_BIT } else { gpa }
}

/// MapGPA of `pages` pages from `gpa` on, of which `done` are; the SHARED bit of the address says which way.
pub(super) fn map_gpa(
    done: &mut u64,
    wait: &mut Wait,
    answer: &mut Option<u64>,
    guest: &mut Guest<'_>,
    gpa: u64,
    pages: u64,
) -> Result<Option<u64>, Stop> {
    if *wait == Wait::Hypercall {
        *wait = Wait::Nothing;
        match answer.take().unwrap_or(0) {
            0 => *done = (*done + CHUNK).min(pages),
            _ if guest.world.profile.kernel.has_first_tdx_code() => return Ok(Some(INVALID_OPERAND)),
            ret if ret == Errno::EAGAIN as u64 => return Ok(Some(RETRY)),
            ret if ret == Errno::EINVAL as u64 => return Ok(Some(INVALID_OPERAND)),
            _ => return Err(Exit::Failed { errno: Errno::EINVAL, reason: KVM_EXIT_HYPERCALL }.into()),
        }
        if *done == pages {
            return Ok(Some(0));
        }
    } else if let Some(status) = refused(guest, gpa, pages) {
        return Ok(Some(status));
    }
    *wait = Wait::Hypercall;
    let attributes = if gpa & SHARED_BIT == 0 { ENCRYPTED } else { 0 };
    let args = [(gpa & !SHARED_BIT) + *done * PAGE_SIZE, (pages - *done).min(CHUNK), attributes, 0, 0, 0];
    Err(Exit::Hypercall { nr: KVM_HC_MAP_GPA_RANGE, args, flags: 1 }.into())
}

/// The status that KVM gives the guest without asking user space.
fn refused(guest: &mut Guest<'_>, gpa: u64, pages: u64) -> Option<u64> {
    guest.count(|stats| stats.hypercalls += 1);
    let enabled = guest.world.vm(guest.vm).is_some_and(|vm| vm.exit_hypercalls & EXIT_MAP_GPA_RANGE != 0);
    let end = pages.checked_mul(PAGE_SIZE).and_then(|len| gpa.checked_add(len));
    let one_side =
        end.is_some_and(|end| end > gpa && (end - 1) & SHARED_BIT == gpa & SHARED_BIT && end <= 2 * SHARED_BIT);
    match () {
        () if !enabled => Some(SUBFUNC_UNSUPPORTED),
        () if !one_side => Some(INVALID_OPERAND),
        () if !gpa.is_multiple_of(PAGE_SIZE) => Some(ALIGN_ERROR),
        () => None,
    }
}
