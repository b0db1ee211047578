//! KVM_PRE_FAULT_MEMORY.

use super::super::World;
use super::super::gmem::fault::Access;
use super::super::mutant::Mutant;
use super::VmId;
use super::fault::{Fault, Origin, Request};
use super::tdx::{SHARED_BIT, TdState};
use crate::machine::{Errno, PAGE_SIZE, PreFault};

/// How often a busy module is asked again before the call ends as if a signal had come.
const RETRIES: u32 = 1000;

impl World {
    /// KVM_PRE_FAULT_MEMORY on a vCPU of a VM.
    pub fn pre_fault(&mut self, vm: VmId, gpa: u64, size: u64, flags: u64) -> PreFault {
        let untouched = |errno| PreFault { result: Err(errno), gpa, size };
        if let Err(errno) = self.live_vm(vm) {
            return untouched(errno);
        }
        let aligned = gpa.is_multiple_of(PAGE_SIZE) && size.is_multiple_of(PAGE_SIZE);
        if size == 0 && self.mutant(Mutant::PreFaultAcceptsNothing) {
            return PreFault { result: Ok(()), gpa, size };
        }
        if flags != 0 || !aligned || gpa.checked_add(size).is_none_or(|end| end <= gpa) {
            return untouched(Errno::EINVAL);
        }
        if self.vms[&vm].has_mirror() {
            if self.vms[&vm].td.as_ref().is_none_or(|td| td.state != TdState::Runnable) {
                return untouched(Errno::EOPNOTSUPP);
            }
            if gpa & SHARED_BIT != 0 {
                return untouched(Errno::EINVAL);
            }
        }
        let end = gpa + size;
        let mut at = gpa;
        while at < end {
            match self.pre_fault_page(vm, at / PAGE_SIZE) {
                Ok(next_gfn) => at = (next_gfn * PAGE_SIZE).min(end),
                Err(errno) if at == gpa || self.mutant(Mutant::PreFaultHidesProgress) => {
                    return PreFault { result: Err(errno), gpa: at, size: end - at };
                }
                Err(_) => break,
            }
        }
        PreFault { result: Ok(()), gpa: at, size: end - at }
    }

    /// Maps one page or the rest of the huge page it is in; the answer is the next gfn.
    fn pre_fault_page(&mut self, vm: VmId, gfn: u64) -> Result<u64, Errno> {
        let private = self.gfn_is_private(vm, gfn);
        let state = &self.vms[&vm];
        let root = if private && state.has_mirror() { &state.mirror } else { &state.direct };
        if let Some((first, spte)) = root.get(gfn) {
            return Ok(first + spte.order.pages());
        }
        let request = Request { gfn, private, access: Access::Read, origin: Origin::PreFault };
        let mut result = self.handle_fault(vm, request);
        for _ in 0..RETRIES {
            if result != Err(Fault::Retry) {
                break;
            }
            result = self.handle_fault(vm, request);
        }
        match result {
            Ok((first, spte)) => Ok(first + spte.order.pages()),
            Err(Fault::Mmio) if self.mutant(Mutant::PreFaultMmioIsEfault) => Err(Errno::EFAULT),
            Err(Fault::Mmio) => Err(Errno::ENOENT),
            Err(Fault::Memory { errno, .. } | Fault::Failed(errno)) => Err(errno),
            Err(Fault::Retry) => Err(Errno::EINTR),
            Err(Fault::Exit(_)) => Err(Errno::EIO),
        }
    }
}
