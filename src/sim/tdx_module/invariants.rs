//! What must hold after every call (TDX module spec 15.3).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::lock::{HeldLock, LockId, Mode};
use super::lp::Activity;
use super::module::Module;
use super::pamt::PageType;
use super::sept::{ENTRIES, SeptEntry, SeptState};
use super::state::{HkidState, Lifecycle, OpState};
use super::td::Td;

/// An invariant that does not hold, with the pages involved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Number in TDX module spec 15.3.
    pub invariant: u8,
    /// What is wrong.
    pub what: String,
    /// Physical pages involved.
    pub pages: Vec<u64>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "invariant {}: {}", self.invariant, self.what)?;
        for page in &self.pages {
            write!(f, " [{page:#x}]")?;
        }
        Ok(())
    }
}

/// What the PAMT says is in use: level, type, owner and BEPOCH by address.
type Assigned = BTreeMap<u64, (u8, PageType, u64)>;

struct Checker<'a> {
    module: &'a Module,
    assigned: Assigned,
    found: Vec<Violation>,
}

impl Module {
    /// Every invariant that does not hold now; empty in a correct model, whatever was called. Costs time in proportion to the pages
    /// in use.
    ///
    /// Invariants 8 (a failing leaf changes nothing) and 10 (what changes MRTD) are about two states; [`Module::fingerprint`] and
    /// [`Td::measured_blocks`] let a caller compare them.
    pub fn check(&self) -> Vec<Violation> {
        let mut checker = Checker { module: self, assigned: BTreeMap::new(), found: Vec::new() };
        checker.read_pamt();
        for td in self.tds() {
            checker.check_chldcnt(td);
            if td.root_pa != 0 && td.op_state != OpState::Uninitialized && td.lifecycle != Lifecycle::Teardown {
                checker.check_sept(td);
            }
            checker.check_refcounts(td);
            checker.check_hkid(td);
        }
        checker.check_translations();
        checker.check_locks();
        checker.found
    }

    /// Every lock held right now: by leaves held half-way, by running guests, by hand.
    pub fn locks_held(&self) -> Vec<HeldLock> {
        let mut held = Vec::new();
        for lp in &self.lps {
            held.extend(lp.run_locks.iter().chain(&lp.hand_locks));
            if let Activity::Held(call) = &lp.activity {
                held.extend(&call.locks);
            }
        }
        held
    }
}

impl Checker<'_> {
    fn report(&mut self, invariant: u8, what: String, pages: &[u64]) {
        self.found.push(Violation { invariant, what, pages: pages.to_vec() });
    }

    /// Reads the PAMT, and on the way checks that nothing lies below a large page (3).
    fn read_pamt(&mut self) {
        let mut assigned = Assigned::new();
        let mut below = Vec::new();
        self.module.pamt.visit(|level, pa, entry| {
            if matches!(entry.ty(), PageType::Nda | PageType::Rsvd | PageType::Pamt) {
                return;
            }
            let above = (level + 1..3)
                .any(|upper| self.module.pamt.entry(upper, pa).is_some_and(|entry| entry.ty() == PageType::Reg));
            if above {
                below.push(pa);
            }
            assigned.insert(pa, (level, entry.ty(), entry.owner()));
        });
        self.assigned = assigned;
        for pa in below {
            self.report(3, "a page below a large PT_REG page is in use".into(), &[pa]);
        }
    }

    fn check_chldcnt(&mut self, td: &Td) {
        let owned = self.assigned.values().filter(|(_, ty, owner)| *ty != PageType::Tdr && *owner == td.tdr_pa);
        let units: u64 = owned.map(|(level, ..)| 1u64 << (9 * level)).sum();
        if units != td.chldcnt {
            self.report(1, format!("chldcnt is {}, the PAMT has {units} 4K units of the TD", td.chldcnt), &[td.tdr_pa]);
        }
    }

    /// Walks the whole Secure EPT: every entry legal (4), every page and table referenced exactly once (2).
    fn check_sept(&mut self, td: &Td) {
        let mut seen = BTreeSet::new();
        self.check_table(td, td.root_pa, td.root_level, &mut seen);
        let unseen: Vec<u64> = self
            .assigned
            .iter()
            .filter(|(pa, (_, ty, owner))| {
                matches!(ty, PageType::Reg | PageType::Ept) && *owner == td.tdr_pa && !seen.contains(*pa)
            })
            .map(|(pa, _)| *pa)
            .collect();
        for pa in unseen {
            self.report(2, "a page of the TD is in no entry of its Secure EPT".into(), &[pa, td.tdr_pa]);
        }
    }

    fn check_table(&mut self, td: &Td, table: u64, level: u8, seen: &mut BTreeSet<u64>) {
        for i in 0..ENTRIES {
            let entry_pa = table + 8 * i;
            let entry = SeptEntry(self.module.memory.read_u64(entry_pa));
            let Some(state) = entry.state() else {
                self.report(4, format!("entry {entry:?} has no legal state"), &[table]);
                continue;
            };
            let allowed = SeptEntry::HPA | SeptEntry::TDEL | SeptEntry::TDHP;
            if entry.0 & !allowed != state.raw() {
                self.report(4, format!("entry {entry:?} has other bits than its state"), &[table]);
            }
            if matches!(state, SeptState::Free | SeptState::Removed) {
                continue;
            }
            let hpa = entry.hpa(level);
            if !seen.insert(hpa) {
                self.report(2, "two entries refer to the page".into(), &[hpa, table]);
            }
            let wanted =
                if state.is_leaf() { (level, PageType::Reg, td.tdr_pa) } else { (0, PageType::Ept, td.tdr_pa) };
            if self.assigned.get(&hpa) != Some(&wanted) {
                self.report(2, format!("entry {entry:?} refers to a page that is not the TD's"), &[hpa, table]);
            } else if !state.is_leaf() && level > 0 {
                self.check_table(td, hpa, level - 1, seen);
            }
        }
    }

    /// The reference counts are those of the vCPUs inside, none older than one epoch (6). A fatal TD's are left as they were.
    fn check_refcounts(&mut self, td: &Td) {
        if td.fatal {
            return;
        }
        let mut inside = [0u16; 2];
        for lp in &self.module.lps {
            let tdvpr = match &lp.activity {
                Activity::Guest { tdvpr } => Some(*tdvpr),
                Activity::Held(call) if call.epoch_counted => Some(call.input.rcx & SeptEntry::HPA),
                Activity::Held(call) => call.tdvpr,
                Activity::Host => None,
            };
            let vcpu = tdvpr.and_then(|tdvpr| self.module.vcpu(tdvpr));
            let Some(vcpu) = vcpu.filter(|vcpu| vcpu.tdr_pa == td.tdr_pa) else { continue };
            inside[(vcpu.epoch & 1) as usize] += 1;
            if vcpu.epoch > td.epoch || vcpu.epoch + 1 < td.epoch {
                let what = format!("a vCPU runs in epoch {} while the TD's is {}", vcpu.epoch, td.epoch);
                self.report(6, what, &[vcpu.tdvpr_pa, td.tdr_pa]);
            }
        }
        if inside != td.refcount {
            self.report(6, format!("refcount is {:?}, vCPUs inside {inside:?}", td.refcount), &[td.tdr_pa]);
        }
    }

    /// A TD in TEARDOWN has given its key id back, and the caches hold nothing of it (9).
    fn check_hkid(&mut self, td: &Td) {
        let state = self.module.kot.entry(td.hkid).map(|entry| entry.state);
        let legal = match td.lifecycle {
            Lifecycle::HkidAssigned | Lifecycle::KeysConfigured => state == Some(HkidState::Assigned),
            Lifecycle::Blocked => state == Some(HkidState::Flushed),
            Lifecycle::Teardown => true,
        };
        if !legal {
            self.report(9, format!("the TD is {} and its key id {state:?}", td.lifecycle.name()), &[td.tdr_pa]);
        }
        let reused = self.module.tds().any(|other| other.hkid == td.hkid && other.lifecycle != Lifecycle::Teardown);
        if td.lifecycle == Lifecycle::Teardown && !reused && self.module.dirty_line_count(td.hkid) > 0 {
            self.report(9, "dirty lines of the key id of a TD in TEARDOWN".into(), &[td.tdr_pa]);
        }
    }

    /// No translation a guest could still use leads to a page that is not the TD's (5). Those of a processor outside the guest count
    /// if an entry of the vCPU that ran there last would not flush them.
    fn check_translations(&mut self) {
        for (n, lp) in self.module.lps.iter().enumerate() {
            for (tdr, tlb) in &lp.tlbs {
                let Some(td) = self.module.td(*tdr) else { continue };
                if td.fatal || td.lifecycle != Lifecycle::KeysConfigured {
                    continue;
                }
                let last = lp.last_tdvpr.and_then(|tdvpr| self.module.vcpu(tdvpr)).filter(|vcpu| vcpu.tdr_pa == *tdr);
                let running =
                    matches!(&lp.activity, Activity::Guest { tdvpr } if last.is_some_and(|v| v.tdvpr_pa == *tdvpr));
                let usable = running || last.is_some_and(|vcpu| vcpu.epoch == td.epoch);
                if !usable {
                    continue;
                }
                for (gpa, translation) in tlb.iter() {
                    let page = self.module.pamt.lookup(translation.hpa);
                    if page.is_none_or(|page| page.ty != PageType::Reg || page.owner != *tdr) {
                        let what = format!("lp{n} can still reach the page through GPA {gpa:#x}");
                        self.report(5, what, &[translation.hpa, *tdr]);
                    }
                }
            }
        }
    }

    /// Locks are those that leaves in flight, running guests and hands hold, no more and no less (7). Host-priority bits may stick.
    fn check_locks(&mut self) {
        let mut wanted: BTreeMap<LockId, (u16, bool)> = BTreeMap::new();
        for lock in self.module.locks_held() {
            let count = wanted.entry(lock.id).or_default();
            match lock.mode {
                Mode::Shared => count.0 += 1,
                Mode::Exclusive => count.1 = true,
            }
        }
        let mut actual: BTreeMap<LockId, (u16, bool)> = BTreeMap::new();
        let mut note = |id, word: super::lock::LockWord| {
            if !word.is_free() {
                actual.insert(id, (word.readers(), word.is_exclusive()));
            }
        };
        note(LockId::Sys, self.module.sys.lock);
        note(LockId::Kot, self.module.kot.lock);
        note(LockId::Ket, self.module.kot.ket_lock);
        for (n, wbcache) in self.module.wbcache.iter().enumerate() {
            note(LockId::Wbcache(n as u8), wbcache.lock);
        }
        for (n, tdmr) in self.module.pamt.tdmrs.iter().enumerate() {
            note(LockId::Tdmr(n as u8), tdmr.lock);
        }
        for td in self.module.tds() {
            note(LockId::OpState(td.tdr_pa), td.op_state_lock);
            note(LockId::SeptTree(td.tdr_pa), td.tree_lock);
            note(LockId::Epoch(td.tdr_pa), td.epoch_lock);
        }
        self.module.pamt.visit(|level, pa, entry| note(LockId::Pamt(level, pa), entry.lock()));
        for table in self.tables() {
            for entry_pa in (table..table + 8 * ENTRIES).step_by(8) {
                if SeptEntry(self.module.memory.read_u64(entry_pa)).is_locked() {
                    actual.insert(LockId::SeptEntry(entry_pa), (0, true));
                }
            }
        }
        for (id, held) in &actual {
            if wanted.get(id) != Some(held) {
                self.report(7, format!("{id:?} is held as {held:?}, by right {:?}", wanted.get(id)), &[]);
            }
        }
        for id in wanted.keys().filter(|id| !actual.contains_key(id)) {
            self.report(7, format!("{id:?} should be held and is free"), &[]);
        }
    }

    /// Every page of a Secure EPT in use.
    fn tables(&self) -> Vec<u64> {
        let ept = self.assigned.iter().filter(|(_, (_, ty, _))| *ty == PageType::Ept).map(|(pa, _)| *pa);
        let initialized = |td: &&Td| td.op_state != OpState::Uninitialized && td.lifecycle != Lifecycle::Teardown;
        let roots = self.module.tds().filter(initialized).map(|td| td.root_pa);
        let alive = |pa: &u64| {
            let owner = self.assigned.get(pa).map(|(_, _, owner)| *owner);
            owner.and_then(|owner| self.module.td(owner)).is_some_and(|td| td.lifecycle != Lifecycle::Teardown)
        };
        ept.filter(alive).chain(roots).collect()
    }
}
