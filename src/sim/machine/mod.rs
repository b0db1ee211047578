//! The seam's traits on the model.
//!
//! [`SimMachine`] is the machine; `vm`, `gmem`, `mapping` and `vcpu` are its handles, each of which closes what it
//! stands for when it is dropped; `exec` executes guest operations with the accesses of `guest` and the hypercall of
//! `tdvmcall`; `facility` says what the model has.

mod exec;
mod facility;
mod gmem;
mod guest;
mod mapping;
pub mod module;
mod tdvmcall;
mod vcpu;
mod vm;

use super::host::Flags;
use super::mmu::capabilities::capability;
use super::mutant::Mutant;
use super::{FrameModel, Profile, World};
use crate::machine::{
    Availability, CpuidEntry, Errno, Facility, Family, GuestMemfd, HostMemory, Machine, MachineSpec, Mapping,
    PAGE_SIZE, PageAccount, Release, SpecError, TdxModule, Vm, VmConfig, VmType,
};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// What every handle of a machine shares: the state, behind one lock.
#[derive(Debug)]
pub(super) struct Shared {
    world: Mutex<World>,
    waiting: AtomicU32,
}

impl Shared {
    /// Does something with the state and checks its invariants afterwards.
    ///
    /// # Panics
    /// When the model contradicts itself, unless the thread is panicking already.
    pub(super) fn with<R>(&self, action: impl FnOnce(&mut World) -> R) -> R {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let mut world = self.world.lock().unwrap_or_else(PoisonError::into_inner);
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        let result = action(&mut world);
        let checked = if world.checks { world.check() } else { Ok(()) };
        drop(world);
        if let Err(broken) = checked
            && !std::thread::panicking()
        {
            panic!("the model contradicts itself: {broken}");
        }
        result
    }

    /// Lets other threads have the lock: for loops that take it again and again.
    pub(super) fn give_way(&self) {
        std::thread::yield_now();
        if self.waiting.load(Ordering::Relaxed) > 0 {
            std::thread::sleep(std::time::Duration::from_micros(20));
        }
    }
}

/// A machine in this process.
#[derive(Debug)]
pub struct SimMachine {
    spec: MachineSpec,
    profile: Profile,
    shared: Arc<Shared>,
}

impl SimMachine {
    /// The machine that a spec names, new and empty.
    ///
    /// # Errors
    /// One line that names the machine and what is wrong with its options.
    pub fn open(spec: &MachineSpec) -> Result<SimMachine, SpecError> {
        if spec.family != Family::Sim {
            return Err(SpecError(format!("machine '{spec}' is not a sim machine")));
        }
        let profile = Profile::from_spec(spec)?;
        let world = match spec.vm_type {
            VmType::Tdx => match profile.memory_gib {
                None => World::with_tdx(profile.clone(), 4, 4, 8),
                Some(gib) => World::with_tdx(profile.clone(), 4 + gib, gib, gib),
            },
            VmType::Default | VmType::SwProtected => World::new(profile.clone()),
        };
        let world = Mutex::new(world);
        Ok(SimMachine { spec: spec.clone(), profile, shared: Arc::new(Shared { world, waiting: AtomicU32::new(0) }) })
    }

    /// Looks at, or changes, the state behind the traits: allocation failures, speculative references, holders.
    pub fn with_world<R>(&self, action: impl FnOnce(&mut World) -> R) -> R {
        self.shared.with(action)
    }
}

/// What is known of a frame that somebody holds.
fn account(world: &World, frame: u64) -> PageAccount {
    let frames = &world.host.frames;
    PageAccount {
        frame,
        refs: frames.refs(frame),
        map_count: frames.mapcount(frame),
        flags: frames.flags(frame).0,
        holders: Some(frames.holders(frame).iter().map(|(holder, count)| (holder.name(), *count)).collect()),
    }
}

impl Machine for SimMachine {
    fn spec(&self) -> &MachineSpec {
        &self.spec
    }

    fn release(&self) -> Release {
        self.profile.kernel.release()
    }

    fn facility(&self, facility: Facility) -> Availability {
        facility::of(&self.profile, self.spec.vm_type, facility)
    }

    fn capability(&self, number: u32) -> Result<i32, Errno> {
        Ok(capability(self.profile.kernel, None, number))
    }

    fn create_vm(&self, config: VmConfig) -> Result<Arc<dyn Vm>, Errno> {
        vm::SimVm::create(&self.shared, self.spec.vm_type, config)
    }

    fn try_vm_type(&self, vm_type: u64) -> Result<(), Errno> {
        let offered = vm_type < 32 && self.profile.kernel.vm_types() & 1 << vm_type != 0;
        if offered { Ok(()) } else { Err(Errno::EINVAL) }
    }

    fn host_memory(&self, kind: HostMemory, len: u64) -> Result<Box<dyn Mapping>, Errno> {
        let addr = self.shared.with(|world| world.map_host_memory(kind, len))?;
        Ok(mapping::SimMapping::boxed(&self.shared, addr, len))
    }

    fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>, Errno> {
        // What a TD's CPUID can be made of: everything, with the leaves that KVM itself looks at.
        let all = |function: u32, index: u32, flags: u32| CpuidEntry {
            function,
            index,
            flags,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        };
        Ok(vec![all(1, 0, 0), all(7, 0, 1), all(0xd, 1, 1), all(0x8000_0008, 0, 0)])
    }

    fn page_flags(&self, frame: u64) -> Result<u64, Errno> {
        const KPF_MMAP: u64 = 1 << 11;
        const KPF_NOPAGE: u64 = 1 << 20;
        self.shared.with(|world| {
            let folio = world.host.frames.folio(frame).filter(|_| world.profile.frames == FrameModel::StructPage);
            let Some(folio) = folio else { return Ok(KPF_NOPAGE) };
            let lru = folio.flags.contains(Flags::LRU);
            let flags = if lru { folio.flags.0 } else { folio.flags.0 & !Flags::UNEVICTABLE.0 };
            Ok(if folio.mapcount > 0 { flags | KPF_MMAP } else { flags })
        })
    }

    fn page_map_count(&self, frame: u64) -> Result<u64, Errno> {
        Ok(self.shared.with(|world| u64::from(world.host.frames.mapcount(frame))))
    }

    fn drain_lru(&self) -> Result<(), Errno> {
        self.shared.with(|world| {
            if !world.mutant(Mutant::DrainDoesNothing) {
                world.host.drain_all_lru();
            }
        });
        Ok(())
    }

    fn page_account(&self, file: &dyn GuestMemfd, offset: u64) -> Result<Option<PageAccount>, Errno> {
        self.shared.with(|world| {
            let inode = world.gmem.files.get(&file.handle()).ok_or(Errno::EBADF)?.inode;
            Ok(world.gmem_lookup(inode, offset / PAGE_SIZE).map(|frame| account(world, frame)))
        })
    }

    fn frame_account(&self, frame: u64) -> Result<Option<PageAccount>, Errno> {
        Ok(self.shared.with(|world| world.host.frames.folio(frame).is_some().then(|| account(world, frame))))
    }

    fn memory_failure(&self, frame: u64) -> Result<(), Errno> {
        self.shared.with(|world| world.memory_failure(frame))
    }

    fn complaints(&self) -> Result<u64, Errno> {
        Ok(self.shared.with(|world| world.log.len() as u64))
    }

    fn tdx_module(&self) -> Option<Arc<dyn TdxModule>> {
        module::SimModule::of(&self.shared)
    }
}
