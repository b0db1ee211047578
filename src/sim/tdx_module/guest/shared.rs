//! Accesses of the guest to shared memory: the walk of the EPT that the host keeps (TDX module spec 9.5).
//!
//! Its root is what the host wrote to SHARED_EPT_POINTER with TDH.VP.WR; the module does not look into it. A module that runs without
//! such a host has no root, and every shared access is a violation.

use super::super::lp::LpId;
use super::super::module::Module;
use super::access::Store;
use super::exit::{Extended, Report};
use super::{Access, GuestException, GuestOutcome};

/// VMCS field SHARED_EPT_POINTER, by class and code.
const SHARED_EPT_POINTER: u64 = 0x203C;
/// Physical address of a table or page.
const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;
/// R, W and X.
const RWX: u64 = 7;
/// An entry above the last level maps a page.
const LARGE: u64 = 1 << 7;
/// A violation by this entry is a TD exit, not a #VE in the guest.
const SUPPRESS_VE: u64 = 1 << 63;

/// Why an address is not mapped for an access: the entry where the walk ended.
struct Unmapped {
    entry: u64,
}

impl Module {
    pub(super) fn shared_access(
        &mut self,
        lp: LpId,
        tdvpr: u64,
        gpa: u64,
        access: Access,
        store: Store,
    ) -> GuestOutcome {
        let root =
            self.vcpu(tdvpr).and_then(|vcpu| vcpu.fields.get(&SHARED_EPT_POINTER)).map_or(0, |root| root & ADDRESS);
        if root == 0 {
            return self.fault_exit(lp, tdvpr, Report::violation(gpa, access as u64, Extended::None));
        }
        // A TD cannot fetch from shared memory: the CPU does not get as far as the EPT.
        if access == Access::Fetch {
            return GuestOutcome::Exception(GuestException::ReservedPageFault);
        }
        let root_level = self.vcpu(tdvpr).and_then(|vcpu| self.td(vcpu.tdr_pa)).map_or(3, |td| td.root_level);
        let pa = match self.walk_shared(root, root_level, gpa, access) {
            Ok(pa) => pa & !7,
            Err(Unmapped { entry }) => {
                let qualification = access as u64 | (entry & RWX) << 3;
                if entry & RWX == 0 && entry & SUPPRESS_VE == 0 {
                    return self.raise_ve(tdvpr, gpa, qualification);
                }
                return self.fault_exit(lp, tdvpr, Report::violation(gpa, qualification, Extended::None));
            }
        };
        let outcome = match access {
            Access::Write => {
                self.memory.update_u64(pa, store.mask, store.value);
                GuestOutcome::Done
            }
            Access::Read | Access::Fetch => match self.read_as(pa, 0) {
                Ok(value) => GuestOutcome::Value(value),
                Err(_) => return self.machine_check_exit(lp, tdvpr),
            },
        };
        self.step(tdvpr);
        outcome
    }

    /// Physical address behind a shared guest-physical one, by the host's tables as they are now.
    fn walk_shared(&self, root: u64, root_level: u8, gpa: u64, access: Access) -> Result<u64, Unmapped> {
        let mut table = root;
        for level in (0..=root_level).rev() {
            let shift = 12 + 9 * u32::from(level);
            let entry = self.memory.read_u64(table + (gpa >> shift & 511) * 8);
            if entry & RWX == 0 || entry & access as u64 == 0 {
                return Err(Unmapped { entry });
            }
            if level == 0 || entry & LARGE != 0 {
                let within = (1 << shift) - 1;
                return Ok(entry & ADDRESS & !within | gpa & within);
            }
            table = entry & ADDRESS;
        }
        Err(Unmapped { entry: SUPPRESS_VE })
    }
}
