//! NMIs that the host has the module inject (TDVPS management field PEND_NMI).

use super::super::call::LpError;
use super::super::lp::LpId;
use super::super::module::Module;

/// PEND_NMI, by class and code.
const PEND_NMI: u64 = 0x20 << 56 | 11;

impl Module {
    /// Whether the guest on `lp` takes an NMI before its next instruction. The field is clear afterwards.
    ///
    /// # Errors
    /// The processor runs no guest, or has a TDCALL held.
    pub fn guest_takes_nmi(&mut self, lp: LpId) -> Result<bool, LpError> {
        let tdvpr = self.guest_on(lp)?;
        let pending = self.vcpu_mut(tdvpr).and_then(|vcpu| vcpu.fields.get_mut(&PEND_NMI)).map(std::mem::take);
        Ok(pending.is_some_and(|pending| pending & 1 != 0))
    }
}
