//! A vCPU of the running kernel.

use super::kick::{Interrupted, Kicker, TimeLimit};
use super::payload::Payload;
use super::{exit, ioctl, stats, tdx};
use crate::guest::layout::REPORT_PORT;
use crate::guest::{Mailbox, Outcome};
use crate::machine::{
    CpuidEntry, Errno, Exit, GuestMemfd, GuestOp, PreFault, Reply, TdxAnswer, TdxCommand, TdxVcpu, Vcpu, VcpuControl,
};
use crate::uapi::bindings::{CpuId, kvm_run};
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
    guest: Guest,
    /// The private memory of a TD's payload, for as long as there is a vCPU to run it.
    _memory: Option<Arc<dyn GuestMemfd>>,
}

/// Where the payload is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Guest {
    /// The VM has no payload.
    None,
    /// It waits for a command, or starts and then waits.
    Waiting,
    /// It is executing one.
    Busy,
}

/// The handle for other threads. It holds the payload's memory, but no descriptor.
struct Control {
    id: u32,
    kicker: Kicker,
    payload: Option<Arc<Payload>>,
}

impl Control {
    fn mailbox(&self) -> Option<Mailbox<'_>> {
        self.payload.as_ref().map(|payload| payload.mailbox(self.id))
    }
}

impl VcpuControl for Control {
    fn stop(&self) {
        if let Some(mailbox) = self.mailbox() {
            mailbox.stop();
        }
    }

    fn kick(&self) {
        self.kicker.kick();
    }

    fn iterations(&self) -> u64 {
        self.mailbox().map_or(0, |mailbox| mailbox.iterations())
    }
}

impl KvmVcpu {
    /// KVM_CREATE_VCPU; with a payload, the vCPU is made ready to boot it.
    ///
    /// # Errors
    /// EINVAL for an id that the payload has no area for, or the errno of the call that failed.
    pub(super) fn create(vm: &VmFd, id: u32, payload: Option<Arc<Payload>>) -> Result<KvmVcpu, Errno> {
        let fd = vm.create_vcpu(u64::from(id)).map_err(|error| Errno::from_raw(error.errno()))?;
        let guest = match &payload {
            None => Guest::None,
            Some(payload) if id < payload.vcpus() => {
                payload.prepare(&fd)?;
                payload.start(&fd, id)?;
                Guest::Waiting
            }
            Some(_) => return Err(Errno::EINVAL),
        };
        Ok(KvmVcpu::new(fd, id, payload, guest, None))
    }

    /// A vCPU of a TD with the payload, which was created before the TD was finalised.
    pub(super) fn of_td(
        fd: VcpuFd,
        id: u32,
        payload: Option<Arc<Payload>>,
        memory: Option<Arc<dyn GuestMemfd>>,
    ) -> KvmVcpu {
        KvmVcpu::new(fd, id, payload, Guest::Waiting, memory)
    }

    fn new(
        mut fd: VcpuFd,
        id: u32,
        payload: Option<Arc<Payload>>,
        guest: Guest,
        memory: Option<Arc<dyn GuestMemfd>>,
    ) -> KvmVcpu {
        let kicker = Kicker::new(NonNull::from(&mut fd.get_kvm_run().immediate_exit));
        let control = Arc::new(Control { id, kicker, payload });
        KvmVcpu { fd, id, limit: DEFAULT_TIME_LIMIT, control, guest, _memory: memory }
    }

    /// Runs the guest to the first exit, which is the payload's report where it is one.
    fn run_command(&mut self) -> Exit {
        let exit = self.enter();
        let reported = matches!(exit, Exit::Io { port: REPORT_PORT, size: 1 });
        match self.control.mailbox().filter(|_| reported).map(|mailbox| mailbox.take()) {
            Some(Outcome::Ended(exit)) => {
                self.guest = Guest::Waiting;
                exit
            }
            Some(Outcome::Nothing) | None => exit,
        }
    }

    /// Takes the payload out of an operation that a test has given up, by starting the vCPU anew.
    fn restart(&mut self) -> Result<(), Errno> {
        // What user space owes to the last exit must be paid before registers are set: KVM completes it on entry.
        self.run_area().immediate_exit = 1;
        let completed = ioctl::with_value(&self.fd, KVM_RUN, 0);
        self.run_area().immediate_exit = 0;
        if let Err(errno) = completed
            && errno != Errno::EINTR
        {
            return Err(errno);
        }
        let payload = self.control.payload.as_ref().ok_or(Errno::EOPNOTSUPP)?;
        if payload.is_in_td() {
            return self.interrupt_payload();
        }
        payload.start(&self.fd, self.id)
    }

    /// Takes the payload out of an operation in a TD, whose registers cannot be set: with an NMI, which comes before the
    /// instruction that did not complete is tried again. The payload reports it like any exception.
    fn interrupt_payload(&mut self) -> Result<(), Errno> {
        /// `KVM_NMI`.
        const KVM_NMI: libc::Ioctl = libc::_IO(0xae, 0x9a);
        const VECTOR_NMI: u8 = 2;
        // The operation may have ended since, with a report that nobody waits for any more.
        for _ in 0..2 {
            ioctl::with_value(&self.fd, KVM_NMI, 0)?;
            match self.run_command() {
                Exit::GuestException { vector: VECTOR_NMI, .. } => return Ok(()),
                Exit::Failed { errno, .. } => return Err(errno),
                _ => {}
            }
        }
        Err(Errno::EBUSY)
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
                    return self.rip_of_a_kernel().map_or(Exit::TimedOut, |rip| Exit::Astray { rip });
                }
                // Some signal that is not ours to report.
                continue;
            }
            return exit::decode(result, self.run_area());
        }
    }

    /// RIP, when it is in the upper half of the address space; that of a TD is not to be had.
    fn rip_of_a_kernel(&self) -> Option<u64> {
        self.fd.get_regs().ok().map(|registers| registers.rip).filter(|&rip| rip >> 63 == 1)
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

    fn execute(&mut self, op: GuestOp) -> Exit {
        let ready = match self.guest {
            Guest::None => Err(Errno::EOPNOTSUPP),
            Guest::Waiting => Ok(()),
            Guest::Busy => self.restart(),
        };
        if let Err(errno) = ready {
            return Exit::Failed { errno, reason: KVM_EXIT_UNKNOWN };
        }
        if let Some(mailbox) = self.control.mailbox() {
            mailbox.post(op);
        }
        self.guest = Guest::Busy;
        self.run_command()
    }

    fn resume(&mut self, reply: Reply) -> Exit {
        let data = &mut self.run_area().__bindgen_anon_1;
        match reply {
            Reply::None => {}
            Reply::MmioRead(value) => data.mmio.data = value.to_le_bytes(),
            Reply::Hypercall(value) => data.hypercall.ret = value,
        }
        self.run_command()
    }

    fn set_time_limit(&mut self, limit: Duration) {
        self.limit = limit;
    }

    fn pre_fault(&mut self, gpa: u64, size: u64, flags: u64) -> PreFault {
        let mut argument = KvmPreFaultMemory { gpa, size, flags, ..Default::default() };
        let _limit = match TimeLimit::start(self.limit) {
            Ok(limit) => limit,
            Err(errno) => return PreFault { result: Err(errno), gpa, size },
        };
        // SAFETY: the structure is the ioctl's and holds no pointers.
        let result = unsafe { ioctl::with_struct(&self.fd, KVM_PRE_FAULT_MEMORY, &mut argument) }.map(drop);
        PreFault { result, gpa: argument.gpa, size: argument.size }
    }

    fn control(&self) -> Arc<dyn VcpuControl> {
        Arc::clone(&self.control) as Arc<dyn VcpuControl>
    }

    fn tdx(&mut self) -> Option<&mut dyn TdxVcpu> {
        Some(self)
    }

    fn statistic(&self, name: &str) -> Result<u64, Errno> {
        stats::read(&self.fd, name)
    }
}

impl TdxVcpu for KvmVcpu {
    fn command(&mut self, command: TdxCommand<'_>) -> TdxAnswer {
        tdx::issue(&self.fd, command)
    }

    fn unreadable_command(&mut self) -> Result<(), Errno> {
        tdx::issue_unreadable(&self.fd)
    }

    fn set_cpuid(&mut self, entries: &[CpuidEntry]) -> Result<(), Errno> {
        let cpuid = CpuId::from_entries(entries).map_err(|_| Errno::E2BIG)?;
        self.fd.set_cpuid2(&cpuid).map_err(|error| Errno::from_raw(error.errno()))
    }
}
