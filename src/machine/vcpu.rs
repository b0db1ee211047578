//! A vCPU: guest operations in, exits out.

use super::{Errno, TdxVcpu};
use std::sync::Arc;
use std::time::Duration;

/// An operation that the guest executes. Sizes and lengths are bytes, addresses guest-physical.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GuestOp {
    /// Loads 1, 2, 4 or 8 bytes; [`Exit::Done`] carries the value.
    Read {
        /// Where.
        gpa: u64,
        /// 1, 2, 4 or 8.
        size: u8,
    },
    /// Stores 1, 2, 4 or 8 bytes.
    Write {
        /// Where.
        gpa: u64,
        /// 1, 2, 4 or 8.
        size: u8,
        /// The low bytes of this.
        value: u64,
    },
    /// Stores `byte` over a range.
    Fill {
        /// First byte.
        gpa: u64,
        /// How many.
        len: u64,
        /// The value.
        byte: u8,
    },
    /// Compares a range with `byte`: [`Exit::Done`] with 0, or [`Exit::Mismatch`] at the first difference.
    Check {
        /// First byte.
        gpa: u64,
        /// How many.
        len: u64,
        /// The value expected.
        byte: u8,
    },
    /// Loads 8 bytes at the start of each page of a range; [`Exit::Done`] with how many pages.
    Touch {
        /// First page.
        gpa: u64,
        /// A multiple of the page size.
        len: u64,
    },
    /// Calls the code at an address; it must end in a near return, its RAX comes back in [`Exit::Done`].
    Execute {
        /// Where.
        gpa: u64,
    },
    /// Loads 8 bytes again and again while they equal `expect`, until stopped through [`VcpuControl::stop`];
    /// [`Exit::Done`] with the last value read.
    ReadWhile {
        /// Where.
        gpa: u64,
        /// The value that goes on.
        expect: u64,
    },
    /// Stores a counter from 1 up, 8 bytes, until stopped; [`Exit::Done`] with the last value stored.
    WriteUntilStopped {
        /// Where.
        gpa: u64,
    },
    /// TDG.MEM.PAGE.ACCEPT of every page of a range at one level; [`Exit::Done`] with the completion status of the first
    /// that failed, or 0.
    Accept {
        /// First page.
        gpa: u64,
        /// Bytes.
        len: u64,
        /// 0 for 4 KiB, 1 for 2 MiB.
        level: u8,
    },
    /// KVM_HC_MAP_GPA_RANGE, or TDVMCALL MapGPA in a TD; [`Exit::Done`] with what the hypercall returned to the guest.
    MapGpa {
        /// First page.
        gpa: u64,
        /// How many pages of 4 KiB.
        pages: u64,
        /// The third argument of the hypercall, handed through verbatim.
        attributes: u64,
    },
    /// Executes HLT.
    Halt,
}

impl GuestOp {
    /// Loads 8 bytes.
    pub const fn read_u64(gpa: u64) -> GuestOp {
        GuestOp::Read { gpa, size: 8 }
    }

    /// Stores 8 bytes.
    pub const fn write_u64(gpa: u64, value: u64) -> GuestOp {
        GuestOp::Write { gpa, size: 8, value }
    }
}

/// How a guest run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The operation is complete; the value is what the operation says.
    Done(u64),
    /// [`GuestOp::Check`] found a byte that differs.
    Mismatch {
        /// Guest-physical address of the byte.
        gpa: u64,
        /// The byte found.
        byte: u8,
    },
    /// An exception in the guest.
    GuestException {
        /// Vector.
        vector: u8,
        /// Error code, 0 where the vector has none.
        error_code: u64,
        /// RIP of the instruction.
        rip: u64,
        /// CR2.
        cr2: u64,
    },
    /// KVM_EXIT_HLT.
    Halted,
    /// KVM_EXIT_MMIO.
    Mmio {
        /// Guest-physical address.
        gpa: u64,
        /// Bytes, 1 to 8.
        len: u32,
        /// The value stored; `None` for a load.
        write: Option<u64>,
    },
    /// KVM_EXIT_IO on a port that is not the payload's.
    Io {
        /// The port.
        port: u16,
        /// Bytes a transfer.
        size: u8,
    },
    /// KVM_EXIT_HYPERCALL.
    Hypercall {
        /// Number, 12 for KVM_HC_MAP_GPA_RANGE.
        nr: u64,
        /// All six argument words.
        args: [u64; 6],
        /// `flags`.
        flags: u64,
    },
    /// KVM_EXIT_MEMORY_FAULT, valid with EFAULT and EHWPOISON.
    MemoryFault {
        /// What KVM_RUN returned.
        errno: Errno,
        /// KVM_MEMORY_EXIT_FLAG_PRIVATE (8) or 0.
        flags: u64,
        /// Guest-physical address.
        gpa: u64,
        /// Bytes.
        size: u64,
    },
    /// KVM_EXIT_SHUTDOWN: a triple fault.
    Shutdown,
    /// KVM_EXIT_INTERNAL_ERROR.
    InternalError {
        /// KVM_INTERNAL_ERROR_*.
        suberror: u32,
        /// `data[..ndata]`.
        data: Vec<u64>,
    },
    /// KVM_EXIT_FAIL_ENTRY.
    FailEntry {
        /// The hardware's reason.
        reason: u64,
    },
    /// KVM_EXIT_SYSTEM_EVENT.
    SystemEvent {
        /// KVM_SYSTEM_EVENT_*.
        kind: u32,
        /// `data[..ndata]`.
        data: Vec<u64>,
    },
    /// KVM_EXIT_TDX.
    Tdx {
        /// TDVMCALL leaf.
        nr: u64,
        /// The six words of the union.
        data: [u64; 6],
    },
    /// KVM_RUN failed otherwise.
    Failed {
        /// What it returned: EINTR after a kick, EIO of a dead VM, EFAULT without a memory fault exit.
        errno: Errno,
        /// `exit_reason` as it stood then.
        reason: u32,
    },
    /// Any other exit reason.
    Other {
        /// `exit_reason`.
        reason: u32,
    },
    /// The guest did not leave within the time limit and was kicked out.
    TimedOut,
    /// The same, of a guest whose RIP is an address of a kernel, where the payload never is: its registers were taken for
    /// those of the host. QEMU's TCG does that now and then (known issue `tcg-guest-with-the-hosts-registers`).
    Astray {
        /// RIP.
        rip: u64,
    },
}

/// What user space gives back when it lets the vCPU go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Nothing.
    None,
    /// The value of an MMIO load.
    MmioRead(u64),
    /// `hypercall.ret`.
    Hypercall(u64),
}

/// What KVM_PRE_FAULT_MEMORY returned: the call's result, and the range it wrote back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PreFault {
    /// The result of the call; success on partial progress.
    pub result: Result<(), Errno>,
    /// `gpa` after the call.
    pub gpa: u64,
    /// `size` after the call: what is left.
    pub size: u64,
}

/// A handle to a vCPU that may be running in another thread.
pub trait VcpuControl: Send + Sync {
    /// Ends [`GuestOp::ReadWhile`] or [`GuestOp::WriteUntilStopped`] at the guest's next look.
    fn stop(&self);

    /// Makes a running KVM_RUN return EINTR.
    fn kick(&self);

    /// How many iterations the current looping operation has done; 0 before its first.
    fn iterations(&self) -> u64;
}

/// A vCPU file descriptor.
pub trait Vcpu: Send {
    /// The id given to KVM_CREATE_VCPU.
    fn id(&self) -> u32;

    /// Gives the guest an operation and runs it to the first exit.
    fn execute(&mut self, op: GuestOp) -> Exit;

    /// Lets the guest go on after an exit that was not [`Exit::Done`].
    fn resume(&mut self, reply: Reply) -> Exit;

    /// KVM_RUN of a vCPU in whatever state it is: for VMs without the payload.
    fn run(&mut self) -> Exit {
        self.resume(Reply::None)
    }

    /// How long one run may take before the guest is kicked out with [`Exit::TimedOut`], and one pre-fault before a signal
    /// interrupts it. The default is 20 seconds.
    fn set_time_limit(&mut self, limit: Duration);

    /// KVM_PRE_FAULT_MEMORY, one call.
    fn pre_fault(&mut self, gpa: u64, size: u64, flags: u64) -> PreFault;

    /// A handle for other threads.
    fn control(&self) -> Arc<dyn VcpuControl>;

    /// The TDX sub-commands of KVM_MEMORY_ENCRYPT_OP, on machines that know them.
    fn tdx(&mut self) -> Option<&mut dyn TdxVcpu> {
        None
    }

    /// One vCPU statistic of KVM_GET_STATS_FD by name, `pf_fixed` for example.
    fn statistic(&self, name: &str) -> Result<u64, Errno>;
}
