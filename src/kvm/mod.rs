//! The machine behind /dev/kvm: the KVM of the running kernel, with one of its VM types.
//!
//! One file per kind of descriptor, in the manner of rust-vmm's kvm-ioctls, which makes the calls that it has; the calls
//! that it lacks, or whose errno it drops, are issued here. Every call returns its errno as a value and nothing is
//! retried or asserted on behalf of the caller: a test sees what the kernel said.
//!
//! | file | descriptor or subject |
//! |---|---|
//! | `system` | /dev/kvm: [`KvmMachine`] |
//! | `vm` | a VM: slots, attributes, capabilities |
//! | `payload` | the guest's program in a VM, and the start of its vCPUs |
//! | `tdx` | the sub-commands of KVM_MEMORY_ENCRYPT_OP, and a TD with the payload |
//! | `vcpu`, `exit`, `kick` | a vCPU: KVM_RUN, what its exit says, and how another thread ends it |
//! | `gmem`, `file_op` | a guest_memfd and the system calls on it |
//! | `mapping`, `host_access`, `hold`, `pagemap` | memory of this process and what may be done to it |
//! | `stats` | KVM_GET_STATS_FD |
//! | `facility`, `host_facility` | what the kernel and the host offer, and what each missing piece would need |

mod exit;
mod facility;
mod file_op;
pub mod gmem;
mod hold;
mod host_access;
mod host_facility;
mod ioctl;
mod kick;
mod mapping;
mod page;
mod page_struct;
mod pagemap;
mod payload;
mod stats;
mod system;
mod tdx;
mod vcpu;
mod vm;

pub use gmem::KvmGuestMemfd;
pub use system::KvmMachine;
