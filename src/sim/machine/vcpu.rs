//! The vCPU handle: runs operations to their exits.

use super::super::mmu::VmId;
use super::Shared;
use super::exec::{Operation, Step};
use crate::machine::{
    CpuidEntry, Errno, Exit, GuestOp, PreFault, Reply, TdxAnswer, TdxCommand, TdxVcpu, Vcpu, VcpuControl, VmType,
};
use crate::uapi::kvm::KVM_INTERNAL_ERROR_EMULATION;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// KVM_EXIT_INTR.
const EXIT_INTR: u32 = 10;

/// What other threads may do to a running vCPU.
#[derive(Debug, Default)]
pub(super) struct Control {
    pub(super) stop: AtomicBool,
    pub(super) kick: AtomicBool,
    pub(super) iterations: AtomicU64,
}

impl VcpuControl for Control {
    fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
    }

    fn kick(&self) {
        self.kick.store(true, Ordering::SeqCst);
    }

    fn iterations(&self) -> u64 {
        self.iterations.load(Ordering::SeqCst)
    }
}

/// A vCPU file descriptor.
#[derive(Debug)]
pub(super) struct SimVcpu {
    shared: Arc<Shared>,
    vm: VmId,
    id: u32,
    control: Arc<Control>,
    operation: Option<Operation>,
    limit: Duration,
    reason: u32,
}

impl SimVcpu {
    pub(super) fn new(shared: &Arc<Shared>, vm: VmId, id: u32) -> SimVcpu {
        let control = Arc::new(Control::default());
        let limit = Duration::from_secs(20);
        SimVcpu { shared: shared.clone(), vm, id, control, operation: None, limit, reason: 0 }
    }

    /// KVM_RUN until an exit.
    fn go(&mut self) -> Exit {
        let start = Instant::now();
        loop {
            if self.control.kick.swap(false, Ordering::SeqCst) {
                self.reason = EXIT_INTR;
                return Exit::Failed { errno: Errno::EINTR, reason: EXIT_INTR };
            }
            if self.shared.with(|world| world.td_cannot_run(self.vm, self.id)) {
                return Exit::Failed { errno: Errno::EINVAL, reason: self.reason };
            }
            let Some(operation) = &mut self.operation else {
                return Exit::InternalError { suberror: KVM_INTERNAL_ERROR_EMULATION, data: Vec::new() };
            };
            let (vm, id, control) = (self.vm, self.id, &self.control);
            let step = self.shared.with(|world| {
                if world.live_vm(vm).is_err() {
                    return Step::Dead;
                }
                operation.step(world, vm, id, control)
            });
            match step {
                Step::Dead => return Exit::Failed { errno: Errno::EIO, reason: self.reason },
                Step::Continue if start.elapsed() >= self.limit => return Exit::TimedOut,
                Step::Continue => self.shared.give_way(),
                Step::Exit(exit) => {
                    self.reason = 0;
                    return exit;
                }
            }
        }
    }
}

impl Drop for SimVcpu {
    fn drop(&mut self) {
        self.shared.with(|world| world.close_vcpu(self.vm, self.id));
    }
}

impl Vcpu for SimVcpu {
    fn id(&self) -> u32 {
        self.id
    }

    fn execute(&mut self, op: GuestOp) -> Exit {
        self.control.iterations.store(0, Ordering::SeqCst);
        let serves = self.shared.with(|world| world.vm(self.vm).is_some_and(|vm| vm.payload_vcpus.is_some()));
        self.operation = serves.then(|| Operation::new(op));
        self.go()
    }

    fn resume(&mut self, reply: Reply) -> Exit {
        if let Some(operation) = &mut self.operation {
            operation.take_reply(reply);
        }
        self.go()
    }

    fn set_time_limit(&mut self, limit: Duration) {
        self.limit = limit;
    }

    fn pre_fault(&mut self, gpa: u64, size: u64, flags: u64) -> PreFault {
        self.shared.with(|world| world.pre_fault(self.vm, gpa, size, flags))
    }

    fn control(&self) -> Arc<dyn VcpuControl> {
        self.control.clone()
    }

    fn tdx(&mut self) -> Option<&mut dyn TdxVcpu> {
        Some(self)
    }

    fn statistic(&self, name: &str) -> Result<u64, Errno> {
        self.shared.with(|world| {
            let stats = *world.live_vm(self.vm)?.vcpus.get(&self.id).ok_or(Errno::ENOENT)?;
            match name {
                "pf_taken" => Ok(stats.taken),
                "pf_fixed" => Ok(stats.fixed),
                "pf_emulate" => Ok(stats.emulated),
                "pf_spurious" | "pf_fast" => Ok(0),
                "exits" => Ok(stats.exits),
                "mmio_exits" => Ok(stats.mmio_exits),
                "hypercalls" => Ok(stats.hypercalls),
                _ => Err(Errno::ENOENT),
            }
        })
    }
}

impl TdxVcpu for SimVcpu {
    fn command(&mut self, command: TdxCommand<'_>) -> TdxAnswer {
        self.shared.with(|world| world.tdx_vcpu_command(self.vm, self.id, command))
    }

    fn unreadable_command(&mut self) -> Result<(), Errno> {
        self.shared.with(|world| {
            let of_td = world.live_vm(self.vm)?.vm_type == VmType::Tdx;
            Err(if of_td && world.takes_vcpu_commands(self.vm)? { Errno::EFAULT } else { Errno::EINVAL })
        })
    }

    fn set_cpuid(&mut self, entries: &[CpuidEntry]) -> Result<(), Errno> {
        self.shared.with(|world| world.set_cpuid(self.vm, self.id, entries))
    }
}
