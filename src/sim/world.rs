//! The whole state of a simulated machine, behind one lock.

use super::gmem::GmemState;
use super::host::Allocator;
use super::host::{Cpu, Flags, HostState, Pfn};
use super::mmu::tdx::TdxHost;
use super::mmu::{Vm, VmId};
use super::mutant::Mutant;
use super::policy::Costs;
use super::profile::{Kernel, Profile};
use super::schedule::Scheduler;
use super::tdx_module::Switches;
use crate::machine::{Errno, Release};
use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

/// State of a machine: the host, the guest_memfd files, the VMs.
#[derive(Debug)]
pub struct World {
    /// Which kernel this is.
    pub profile: Profile,
    /// Frames, page cache folios, host page tables.
    pub host: HostState,
    /// guest_memfd inodes and files.
    pub gmem: GmemState,
    /// VMs by id.
    pub vms: BTreeMap<VmId, Vm>,
    /// The TDX module and what the kernel around it keeps, on a TDX machine.
    pub tdx: Option<Box<TdxHost>>,
    /// What the policy did besides unmapping.
    pub costs: Costs,
    /// Looks at a reference count while waiting to split or merge a folio.
    pub freeze_spins: u64,
    /// Huge S-EPT mappings that were split.
    pub splits: u64,
    /// Frames that were handed out while the TDX module owned them.
    pub reused_while_owned: Vec<Pfn>,
    /// What the kernel would have logged.
    pub log: Vec<String>,
    /// Who runs when operations can be interrupted.
    pub scheduler: Scheduler,
    /// Whether every operation checks the model's invariants.
    pub checks: bool,
    next_id: u64,
}

impl World {
    /// An empty machine.
    pub fn new(profile: Profile) -> World {
        let scheduler = Scheduler::new(profile.schedule);
        World {
            scheduler,
            profile,
            host: HostState::default(),
            gmem: GmemState::default(),
            vms: BTreeMap::new(),
            tdx: None,
            costs: Costs::default(),
            freeze_spins: 0,
            splits: 0,
            reused_while_owned: Vec::new(),
            log: Vec::new(),
            checks: true,
            next_id: 1,
        }
    }

    /// An empty machine with a TDX module, and frames of each order of folio for as many GiB.
    pub fn with_tdx(profile: Profile, base_gib: u64, pmd_gib: u64, pud_gib: u64) -> World {
        let enhanced_demote = profile.kernel == Kernel::Huge;
        let switches = Switches { enhanced_demote, ..Switches::default() };
        let mut world = World::new(profile);
        let regions = TdxHost::regions(base_gib, pmd_gib, pud_gib);
        world.host.allocator = Allocator::new(regions);
        world.tdx = Some(Box::new(TdxHost::boot(&regions, switches)));
        world
    }

    /// A number that was not used before.
    pub fn fresh_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id - 1
    }

    /// Whether a defect is switched on.
    pub fn mutant(&self, mutant: Mutant) -> bool {
        self.profile.mutant == Some(mutant)
    }

    /// The release that the profile shows.
    pub fn release(&self) -> Release {
        self.profile.kernel.release()
    }

    /// Nanoseconds since the epoch, as the kernel would write them into an inode.
    pub fn now_ns(&self) -> i128 {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_nanos() as i128)
    }

    /// A VM that still exists.
    pub fn vm(&self, id: VmId) -> Option<&Vm> {
        self.vms.get(&id)
    }

    /// A VM for an ioctl on one of its descriptors.
    ///
    /// # Errors
    /// EIO when it is dead.
    pub fn live_vm(&mut self, id: VmId) -> Result<&mut Vm, Errno> {
        let answers = self.mutant(Mutant::DeadVmAnswers);
        self.vms.get_mut(&id).filter(|vm| answers || !vm.dead).ok_or(Errno::EIO)
    }

    /// Zeroes a folio that was never used and marks it up to date.
    pub fn make_uptodate(&mut self, pfn: Pfn) {
        if self.host.frames.flags(pfn).contains(Flags::UPTODATE) {
            return;
        }
        if !self.mutant(Mutant::SkipZeroing) {
            self.zero_folio(pfn);
        }
        self.host.frames.set_flags(pfn, Flags::UPTODATE);
    }

    /// Reads the reference count of a frame as a conversion does, with speculative references coming to their end.
    pub fn look_at_refs(&mut self, pfn: Pfn) -> u32 {
        let (refs, over) = self.host.frames.look(pfn);
        for holder in over {
            self.host.put(pfn, holder, 1);
        }
        refs
    }

    /// Checks the invariants that an operation may have broken.
    ///
    /// # Errors
    /// The first that is broken, in words.
    pub fn check(&mut self) -> Result<(), String> {
        self.host.frames.check_touched()?;
        for vm in self.vms.values() {
            vm.check()?;
        }
        Ok(())
    }

    /// Drains the LRU batch of the CPU that makes system calls.
    pub fn drain_local_lru(&mut self) {
        self.host.drain_lru(Cpu::Host);
    }
}
