//! The module's state as a whole and the ways to look at it.

use super::fault::FaultPlan;
use super::kot::{Kot, WbCache};
use super::lock::{Conflict, HeldLock, LockId, LockWord, Mode, Side};
use super::lp::{Activity, Disorder, HoldPoint, Interrupt, Lp, LpId, Tlb, Translation};
use super::memory::PhysicalMemory;
use super::memory::lines::Caches;
use super::pamt::{PageInfo, Pamt};
use super::platform::Platform;
use super::sept::{SeptEntry, walk};
use super::state::SysState;
use super::switches::Switches;
use super::td::Td;
use super::trace::Trace;
use super::vcpu::Vcpu;
use super::{LpError, call::Call};

/// State of the module as a whole.
pub(crate) struct Sys {
    pub state: SysState,
    pub lock: LockWord,
    pub global_hkid: u16,
    pub key_config_bitmap: u64,
}

/// Objects found by the physical address of their root page.
pub(crate) struct ByAddress<T> {
    keys: Vec<u64>,
    items: Vec<T>,
}

impl<T> ByAddress<T> {
    fn new() -> ByAddress<T> {
        ByAddress { keys: Vec::new(), items: Vec::new() }
    }

    #[inline]
    fn get(&self, key: u64) -> Option<&T> {
        let at = self.keys.iter().position(|other| *other == key)?;
        Some(&self.items[at])
    }

    #[inline]
    fn get_mut(&mut self, key: u64) -> Option<&mut T> {
        let at = self.keys.iter().position(|other| *other == key)?;
        Some(&mut self.items[at])
    }

    pub fn insert(&mut self, key: u64, item: T) {
        self.remove(key);
        self.keys.push(key);
        self.items.push(item);
    }

    pub fn remove(&mut self, key: u64) {
        if let Some(at) = self.keys.iter().position(|other| *other == key) {
            self.keys.remove(at);
            self.items.remove(at);
        }
    }

    pub fn iter(&self) -> std::slice::Iter<'_, T> {
        self.items.iter()
    }
}

/// The simulated TDX module and the platform it runs on.
///
/// Everything it knows is in this value: it is `Send`, and any number of modules live side by side.
pub struct Module {
    pub(crate) platform: Platform,
    pub(crate) switches: Switches,
    pub(crate) memory: Box<dyn PhysicalMemory>,
    pub(crate) caches: Caches,
    pub(crate) sys: Sys,
    pub(crate) pamt: Pamt,
    pub(crate) kot: Kot,
    pub(crate) wbcache: Vec<WbCache>,
    pub(crate) tds: ByAddress<Td>,
    pub(crate) vcpus: ByAddress<Vcpu>,
    pub(crate) lps: Vec<Lp>,
    pub(crate) clock_ns: u64,
    pub(crate) entropy_failures: u32,
    pub(crate) faults: FaultPlan,
    pub(crate) trace: Trace,
}

impl Module {
    /// A module that nothing has been called of yet, on `platform`, with `memory` below it.
    pub fn new(platform: Platform, memory: Box<dyn PhysicalMemory>) -> Module {
        let packages = platform.lp_packages.iter().max().map_or(1, |last| *last as usize + 1);
        Module {
            switches: Switches::default(),
            memory,
            caches: Caches::default(),
            sys: Sys { state: SysState::InitPending, lock: LockWord::default(), global_hkid: 0, key_config_bitmap: 0 },
            pamt: Pamt::default(),
            kot: Kot::new(platform.keys()),
            wbcache: std::iter::repeat_with(WbCache::default).take(packages).collect(),
            tds: ByAddress::new(),
            vcpus: ByAddress::new(),
            lps: platform.lp_packages.iter().map(|package| Lp::new(*package)).collect(),
            clock_ns: 0,
            entropy_failures: 0,
            faults: FaultPlan::default(),
            trace: Trace::default(),
            platform,
        }
    }

    #[inline]
    pub(crate) fn td_by_tdr(&self, tdr: u64) -> Option<&Td> {
        self.tds.get(tdr)
    }

    #[inline]
    pub(crate) fn td_by_tdr_mut(&mut self, tdr: u64) -> Option<&mut Td> {
        self.tds.get_mut(tdr)
    }

    pub(crate) fn vcpu_mut(&mut self, tdvpr: u64) -> Option<&mut Vcpu> {
        self.vcpus.get_mut(tdvpr)
    }

    pub(crate) fn lp_mut(&mut self, lp: LpId) -> Result<&mut Lp, LpError> {
        self.lps.get_mut(lp.0 as usize).ok_or(LpError::NoSuchLp(lp))
    }

    /// The hardware.
    pub fn platform(&self) -> &Platform {
        &self.platform
    }

    /// Switchable behaviour in force.
    pub fn switches(&self) -> Switches {
        self.switches
    }

    /// Changes switchable behaviour. `dpamt` takes effect at SYS.CONFIG, the others at once.
    pub fn set_switches(&mut self, switches: Switches) {
        self.switches = switches;
    }

    /// State of the module as a whole.
    pub fn sys_state(&self) -> SysState {
        self.sys.state
    }

    /// The key id the module encrypts its own pages with.
    pub fn global_hkid(&self) -> u16 {
        self.sys.global_hkid
    }

    /// The TD whose TDR lies at `tdr`.
    pub fn td(&self, tdr: u64) -> Option<&Td> {
        self.td_by_tdr(tdr)
    }

    /// Every TD.
    pub fn tds(&self) -> impl Iterator<Item = &Td> {
        self.tds.iter()
    }

    /// The vCPU whose TDVPR lies at `tdvpr`.
    pub fn vcpu(&self, tdvpr: u64) -> Option<&Vcpu> {
        self.vcpus.get(tdvpr)
    }

    /// Every vCPU of every TD.
    pub fn vcpus(&self) -> impl Iterator<Item = &Vcpu> {
        self.vcpus.iter()
    }

    /// The PAMT.
    pub fn pamt(&self) -> &Pamt {
        &self.pamt
    }

    /// What a physical page is, or `None` outside of every TDMR.
    pub fn page(&self, pa: u64) -> Option<PageInfo> {
        self.pamt.lookup(pa)
    }

    /// The key ownership table.
    pub fn kot(&self) -> &Kot {
        &self.kot
    }

    /// The raw Secure EPT entry at `level` for `gpa`, lock bits included; `Err` with the level and the entry where the walk ended above.
    /// `None` for a TD without a Secure EPT.
    pub fn sept_entry(&self, tdr: u64, gpa: u64, level: u8) -> Option<Result<SeptEntry, (u8, SeptEntry)>> {
        let td = self.td(tdr).filter(|td| td.root_pa != 0)?;
        Some(match walk::walk(&*self.memory, td.root_pa, td.root_level, gpa, level) {
            Ok(at) => Ok(at.entry),
            Err(stop) => Err((stop.level, stop.entry)),
        })
    }

    /// The fault plan, to add rules to or clear.
    pub fn faults_mut(&mut self) -> &mut FaultPlan {
        &mut self.faults
    }

    /// The record of calls and their counters.
    pub fn trace(&self) -> &Trace {
        &self.trace
    }

    /// The record of calls and their counters, to resize or reset.
    pub fn trace_mut(&mut self) -> &mut Trace {
        &mut self.trace
    }

    /// The module's clock in nanoseconds; it stands still by itself.
    pub fn clock_ns(&self) -> u64 {
        self.clock_ns
    }

    /// Moves the clock on.
    pub fn advance_clock(&mut self, ns: u64) {
        self.clock_ns += ns;
    }

    /// Sets the clock, back as well: a vCPU that left the guest later than that meets `TDX_TSC_ROLLBACK` at its next entry.
    pub fn set_clock_ns(&mut self, ns: u64) {
        self.clock_ns = ns;
    }

    /// Makes the next `times` leaves that draw random numbers fail for want of entropy.
    pub fn fail_entropy(&mut self, times: u32) {
        self.entropy_failures = times;
    }

    /// Sets the interrupt line of a processor.
    ///
    /// # Errors
    /// [`LpError::NoSuchLp`].
    pub fn set_interrupt(&mut self, lp: LpId, interrupt: Interrupt) -> Result<(), LpError> {
        self.lp_mut(lp)?.interrupt = interrupt;
        Ok(())
    }

    /// Replaces what is wrong with a processor; an empty list puts it in order.
    ///
    /// # Errors
    /// [`LpError::NoSuchLp`].
    pub fn set_disorders(&mut self, lp: LpId, disorders: &[Disorder]) -> Result<(), LpError> {
        self.lp_mut(lp)?.disorders = disorders.iter().copied().collect();
        Ok(())
    }

    /// The vCPU a processor is running, by TDVPR address.
    pub fn running(&self, lp: LpId) -> Option<u64> {
        match &self.lps.get(lp.0 as usize)?.activity {
            Activity::Guest { tdvpr } => Some(*tdvpr),
            Activity::Held(call) => call.tdvpr,
            Activity::Host => None,
        }
    }

    /// The vCPU whose guest can execute an instruction on `lp` now.
    pub(crate) fn guest_on(&self, lp: LpId) -> Result<u64, LpError> {
        match self.lps.get(lp.0 as usize).map(|lp| &lp.activity) {
            Some(Activity::Guest { tdvpr }) => Ok(*tdvpr),
            Some(Activity::Held(_)) => Err(LpError::HoldsLeaf(lp)),
            Some(Activity::Host) => Err(LpError::NotInGuest(lp)),
            None => Err(LpError::NoSuchLp(lp)),
        }
    }

    /// Whether a leaf that can be interrupted sees an interrupt at this point.
    pub(crate) fn interrupt_seen(&mut self, lp: LpId) -> bool {
        let Some(lp) = self.lps.get_mut(lp.0 as usize) else { return false };
        match lp.interrupt {
            Interrupt::None => false,
            Interrupt::Pending => true,
            Interrupt::After(0) => {
                lp.interrupt = Interrupt::None;
                true
            }
            Interrupt::After(n) => {
                lp.interrupt = Interrupt::After(n - 1);
                false
            }
        }
    }

    /// As [`Module::interrupt_seen`], for a leaf that commits after its last look: one that was held at its commit does not look again.
    pub(crate) fn interrupts_leaf(&mut self, call: &Call) -> bool {
        call.held_at != Some(HoldPoint::Commit) && self.interrupt_seen(call.lp)
    }

    /// Where a vCPU runs.
    pub fn runs_on(&self, tdvpr: u64) -> Option<LpId> {
        self.platform.lps().find(|lp| self.running(*lp) == Some(tdvpr))
    }

    /// Asks for the next leaf on `lp` to be held at `point`. Replaced by the next request; used up by the next leaf.
    ///
    /// # Errors
    /// [`LpError::NoSuchLp`], or [`LpError::HoldsLeaf`] when one is held already.
    pub fn hold_next(&mut self, lp: LpId, point: HoldPoint) -> Result<(), LpError> {
        let state = self.lp_mut(lp)?;
        if matches!(state.activity, Activity::Held(_)) {
            return Err(LpError::HoldsLeaf(lp));
        }
        state.hold = Some(point);
        Ok(())
    }

    /// The leaf held on `lp` and the locks it has.
    pub(crate) fn held(&self, lp: LpId) -> Option<&Call> {
        match &self.lps.get(lp.0 as usize)?.activity {
            Activity::Held(call) => Some(call),
            _ => None,
        }
    }

    /// Locks of the leaf held half-way on `lp`.
    pub fn held_locks(&self, lp: LpId) -> Vec<HeldLock> {
        self.held(lp).map(|call| call.locks.clone()).unwrap_or_default()
    }

    /// Takes a lock in the name of a processor, as a leaf of it would, and keeps it until [`Module::unlock_by_hand`].
    ///
    /// # Errors
    /// The outer one for a processor that does not exist, the inner one for a lock that is held.
    pub fn lock_by_hand(
        &mut self,
        lp: LpId,
        id: LockId,
        mode: Mode,
        side: Side,
    ) -> Result<Result<(), Conflict>, LpError> {
        self.lp_mut(lp)?;
        let answer = self.raw_lock(id, mode, side);
        if answer.is_ok() {
            self.lp_mut(lp)?.hand_locks.push(HeldLock::new(id, mode));
        }
        Ok(answer)
    }

    /// Gives back a lock taken by hand; `false` if the processor has no such lock.
    ///
    /// # Errors
    /// [`LpError::NoSuchLp`].
    pub fn unlock_by_hand(&mut self, lp: LpId, id: LockId) -> Result<bool, LpError> {
        let locks = &mut self.lp_mut(lp)?.hand_locks;
        let Some(at) = locks.iter().rposition(|lock| lock.id == id) else { return Ok(false) };
        let lock = locks.remove(at);
        self.raw_unlock(lock);
        Ok(true)
    }

    /// The lock of the Secure EPT entry at `level` for `gpa`, if the walk reaches it.
    pub fn sept_entry_lock(&self, tdr: u64, gpa: u64, level: u8) -> Option<LockId> {
        let td = self.td(tdr).filter(|td| td.root_pa != 0)?;
        walk::walk(&*self.memory, td.root_pa, td.root_level, gpa, level).ok().map(|at| LockId::SeptEntry(at.entry_pa))
    }

    /// The translation a processor has cached for an address of a TD.
    pub fn cached_translation(&self, lp: LpId, tdr: u64, gpa: u64) -> Option<Translation> {
        self.lps.get(lp.0 as usize)?.tlbs.get(&tdr)?.find(gpa)
    }

    /// Translations a processor has cached for a TD: GPA and translation.
    pub fn cached_translations(&self, lp: LpId, tdr: u64) -> Vec<(u64, Translation)> {
        let tlb = self.lps.get(lp.0 as usize).and_then(|lp| lp.tlbs.get(&tdr));
        tlb.map(|tlb| tlb.iter().collect()).unwrap_or_default()
    }

    /// Drops one cached translation of a processor, chosen by `seed`: caches may forget at any time.
    pub fn evict_translation(&mut self, lp: LpId, tdr: u64, seed: u64) {
        let tlb = self.lps.get_mut(lp.0 as usize).and_then(|lp| lp.tlbs.get_mut(&tdr));
        if let Some(tlb) = tlb.filter(|tlb| tlb.len() > 0) {
            let nth = seed % tlb.len() as u64;
            tlb.evict(nth as usize);
        }
    }

    pub(crate) fn flush_translations(&mut self, lp: LpId, tdr: u64) {
        if let Some(lp) = self.lps.get_mut(lp.0 as usize) {
            lp.tlbs.insert(tdr, Tlb::default());
        }
    }

    /// Draws a random number, or not.
    pub(crate) fn entropy(&mut self) -> bool {
        if self.entropy_failures > 0 {
            self.entropy_failures -= 1;
            return false;
        }
        true
    }

    /// Bytes of this process the module, its PAMT and its memory hold at present.
    pub fn resident_bytes(&self) -> u64 {
        self.memory.resident_bytes() + self.pamt.resident_bytes()
    }
}
