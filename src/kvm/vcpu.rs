//! A vCPU of the running kernel.

use super::kick::{Interrupted, Kicker, TimeLimit};
use super::{exit, ioctl, stats};
use crate::machine::{Errno, Exit, GuestOp, PreFault, Reply, Vcpu, VcpuControl};
use crate::uapi::bindings::kvm_run;
use crate::uapi::kvm::{KVM_EXIT_UNKNOWN, KVM_PRE_FAULT_MEMORY, KVM_RUN, KvmPreFaultMemory};
use kvm_ioctls::{VcpuFd, VmFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

/// The time limit of one run where the test sets none.
const DEFAULT_TIME_LIMIT: Duration = Duration::from_secs(20);

/// A vCPU.
pub(super) struct KvmVcpu {
    fd: VcpuFd,
    id: u32,
    limit: Duration,
    control: Arc<Control>,
}

/// The handle for other threads.
struct Control {
    kicker: Kicker,
}

impl VcpuControl for Control {
    fn stop(&self) {}

    fn kick(&self) {
        self.kicker.kick();
    }

    fn iterations(&self) -> u64 {
        0
    }
}

impl KvmVcpu {
    /// KVM_CREATE_VCPU.
    pub(super) fn create(vm: &VmFd, id: u32) -> Result<KvmVcpu, Errno> {
        let mut fd = vm.create_vcpu(u64::from(id)).map_err(|error| Errno::from_raw(error.errno()))?;
        let flag = NonNull::from(&mut fd.get_kvm_run().immediate_exit);
        Ok(KvmVcpu { fd, id, limit: DEFAULT_TIME_LIMIT, control: Arc::new(Control { kicker: Kicker::new(flag) }) })
    }

    /// KVM_RUN until the guest leaves, is kicked, or its time is up.
    fn enter(&mut self) -> Exit {
        let limit = match TimeLimit::start(self.limit) {
            Ok(limit) => limit,
            Err(errno) => return Exit::Failed { errno, reason: KVM_EXIT_UNKNOWN },
        };
        loop {
            self.run_area().exit_reason = KVM_EXIT_UNKNOWN;
            self.control.kicker.begin();
            let result = ioctl::with_value(&self.fd, KVM_RUN, 0).map(drop);
            let interrupted = if result == Err(Errno::EINTR) { Interrupted::Yes } else { Interrupted::No };
            let kicked = self.control.kicker.end(interrupted);
            if interrupted == Interrupted::Yes && !kicked {
                if limit.is_over() {
                    return Exit::TimedOut;
                }
                // Some signal that is not ours to report.
                continue;
            }
            return exit::decode(result, self.run_area());
        }
    }

    fn run_area(&mut self) -> &mut kvm_run {
        self.fd.get_kvm_run()
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        self.control.kicker.detach();
    }
}

impl Vcpu for KvmVcpu {
    fn id(&self) -> u32 {
        self.id
    }

    fn execute(&mut self, _op: GuestOp) -> Exit {
        Exit::Failed { errno: Errno::EOPNOTSUPP, reason: KVM_EXIT_UNKNOWN }
    }

    fn resume(&mut self, reply: Reply) -> Exit {
        let data = &mut self.run_area().__bindgen_anon_1;
        match reply {
            Reply::None => {}
            Reply::MmioRead(value) => data.mmio.data = value.to_le_bytes(),
            Reply::Hypercall(value) => data.hypercall.ret = value,
        }
        self.enter()
    }

    fn set_time_limit(&mut self, limit: Duration) {
        self.limit = limit;
    }

    fn pre_fault(&mut self, gpa: u64, size: u64, flags: u64) -> PreFault {
        let mut argument = KvmPreFaultMemory { gpa, size, flags, ..Default::default() };
        // SAFETY: the structure is the ioctl's and holds no pointers.
        let result = unsafe { ioctl::with_struct(&self.fd, KVM_PRE_FAULT_MEMORY, &mut argument) }.map(drop);
        PreFault { result, gpa: argument.gpa, size: argument.size }
    }

    fn control(&self) -> Arc<dyn VcpuControl> {
        Arc::clone(&self.control) as Arc<dyn VcpuControl>
    }

    fn statistic(&self, name: &str) -> Result<u64, Errno> {
        stats::read(&self.fd, name)
    }
}
