//! What no host can do and no module does: a TD goes out of the books in whatever state it is.
//!
//! A kernel that could not take a page back gives the TD up half-way, and the module has its pages for as long as it runs. That is
//! what tests are about; but the next test needs a module that has nothing which the kernel takes for its own.

use super::lp::Activity;
use super::module::Module;
use super::pamt::PageType;
use super::state::{HkidState, Lifecycle};

impl Module {
    /// Forgets a TD: its pages, its vCPUs, its translations and its key id are free at once, without TDH.PHYMEM.PAGE.RECLAIM or any
    /// other call. `None`, with nothing done, where there is no such TD, a processor is inside of it, or a leaf is held half-way;
    /// else how many entries of the PAMT it had.
    pub fn forget_td(&mut self, tdr: u64) -> Option<usize> {
        let td = self.td(tdr)?;
        let (hkid, lifecycle) = (td.hkid, td.lifecycle);
        let inside = |activity: &Activity| match activity {
            Activity::Host => false,
            Activity::Held(_) => true,
            Activity::Guest { tdvpr } => self.vcpu(*tdvpr).is_none_or(|vcpu| vcpu.tdr_pa == tdr),
        };
        if self.lps.iter().any(|lp| inside(&lp.activity) || !lp.hand_locks.is_empty()) {
            return None;
        }
        let mut pages = Vec::new();
        self.pamt.visit(|level, pa, entry| {
            let its = match entry.ty() {
                PageType::Nda | PageType::Rsvd | PageType::Pamt => false,
                PageType::Tdr => pa == tdr,
                _ => entry.owner() == tdr,
            };
            if its {
                pages.push((level, pa));
            }
        });
        for &(level, pa) in &pages {
            self.pamt.free(level, pa);
        }
        let vcpus: Vec<u64> = self.vcpus().filter(|vcpu| vcpu.tdr_pa == tdr).map(|vcpu| vcpu.tdvpr_pa).collect();
        for lp in &mut self.lps {
            lp.tlbs.remove(&tdr);
            lp.last_tdvpr = lp.last_tdvpr.filter(|last| !vcpus.contains(last));
        }
        vcpus.into_iter().for_each(|tdvpr| self.vcpus.remove(tdvpr));
        // In TEARDOWN the key id is free, and may be another TD's.
        if lifecycle != Lifecycle::Teardown {
            self.flush_hkid(hkid);
            if let Some(entry) = self.kot.entry_mut(hkid) {
                (entry.state, entry.wbinvd_bitmap) = (HkidState::Free, 0);
            }
        }
        self.tds.remove(tdr);
        Some(pages.len())
    }
}
