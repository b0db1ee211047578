//! What KVM_RUN returned, as an [`Exit`].

use crate::machine::{Errno, Exit};
use crate::uapi::bindings::kvm_run;
use crate::uapi::kvm::{
    KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_HYPERCALL, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_IO, KVM_EXIT_MEMORY_FAULT,
    KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN, KVM_EXIT_SYSTEM_EVENT, KVM_EXIT_TDX, KVM_RUN_EXIT_OFFSET,
};

/// Decodes one return of KVM_RUN. `exit_reason` must have been 0 before the call, because calls that fail early leave
/// it as it was.
pub(super) fn decode(result: Result<(), Errno>, run: &kvm_run) -> Exit {
    let reason = run.exit_reason;
    if let Err(errno) = result {
        // KVM gives exit_reason a meaning with these two errnos only.
        if reason == KVM_EXIT_MEMORY_FAULT && matches!(errno, Errno::EFAULT | Errno::EHWPOISON) {
            // SAFETY: the exit reason says that this is the live member.
            let fault = unsafe { run.__bindgen_anon_1.memory_fault };
            return Exit::MemoryFault { errno, flags: fault.flags, gpa: fault.gpa, size: fault.size };
        }
        return Exit::Failed { errno, reason };
    }
    // SAFETY: each arm reads the member that the exit reason makes live; all members are plain integers.
    unsafe {
        let data = &run.__bindgen_anon_1;
        match reason {
            KVM_EXIT_IO => Exit::Io { port: data.io.port, size: data.io.size },
            KVM_EXIT_HYPERCALL => Exit::Hypercall {
                nr: data.hypercall.nr,
                args: data.hypercall.args,
                flags: data.hypercall.__bindgen_anon_1.flags,
            },
            KVM_EXIT_HLT => Exit::Halted,
            KVM_EXIT_MMIO => {
                let mmio = data.mmio;
                let len = mmio.len;
                let write = (mmio.is_write != 0).then(|| value(&mmio.data, len));
                Exit::Mmio { gpa: mmio.phys_addr, len, write }
            }
            KVM_EXIT_SHUTDOWN => Exit::Shutdown,
            KVM_EXIT_FAIL_ENTRY => Exit::FailEntry { reason: data.fail_entry.hardware_entry_failure_reason },
            KVM_EXIT_INTERNAL_ERROR => {
                let internal = data.internal;
                let count = (internal.ndata as usize).min(internal.data.len());
                Exit::InternalError { suberror: internal.suberror, data: internal.data[..count].to_vec() }
            }
            KVM_EXIT_SYSTEM_EVENT => {
                let event = data.system_event;
                let words = event.__bindgen_anon_1.data;
                let count = (event.ndata as usize).min(words.len());
                Exit::SystemEvent { kind: event.type_, data: words[..count].to_vec() }
            }
            KVM_EXIT_MEMORY_FAULT => {
                // With success the member has no documented meaning.
                Exit::Other { reason }
            }
            KVM_EXIT_TDX => tdx(run),
            _ => Exit::Other { reason },
        }
    }
}

/// KVM_EXIT_TDX, which kvm-bindings does not know: `flags`, `nr` and six words at the start of the union.
fn tdx(run: &kvm_run) -> Exit {
    let mut words = [0u64; 8];
    // SAFETY: the union is 256 bytes of plain integers at this offset.
    unsafe {
        let union = std::ptr::from_ref(run).cast::<u8>().add(KVM_RUN_EXIT_OFFSET);
        std::ptr::copy_nonoverlapping(union, words.as_mut_ptr().cast(), size_of_val(&words));
    }
    let [_flags, nr, data @ ..] = words;
    Exit::Tdx { nr, data }
}

/// The low `len` bytes of MMIO data.
fn value(data: &[u8; 8], len: u32) -> u64 {
    let mut bytes = [0; 8];
    let len = (len as usize).min(8);
    bytes[..len].copy_from_slice(&data[..len]);
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run_with(reason: u32) -> kvm_run {
        kvm_run { exit_reason: reason, ..Default::default() }
    }

    #[test]
    fn a_memory_fault_keeps_its_errno() {
        let mut run = run_with(KVM_EXIT_MEMORY_FAULT);
        run.__bindgen_anon_1.memory_fault.flags = 8;
        run.__bindgen_anon_1.memory_fault.gpa = 0x1000;
        run.__bindgen_anon_1.memory_fault.size = 4096;
        for errno in [Errno::EFAULT, Errno::EHWPOISON] {
            let exit = Exit::MemoryFault { errno, flags: 8, gpa: 0x1000, size: 4096 };
            assert_eq!(decode(Err(errno), &run), exit);
        }
    }

    #[test]
    fn other_errnos_make_no_memory_fault_of_a_leftover_exit_reason() {
        let run = run_with(KVM_EXIT_MEMORY_FAULT);
        for errno in [Errno::ENOMEM, Errno::EINTR, Errno::EIO] {
            assert_eq!(decode(Err(errno), &run), Exit::Failed { errno, reason: KVM_EXIT_MEMORY_FAULT });
        }
        assert_eq!(decode(Err(Errno::EFAULT), &run_with(0)), Exit::Failed { errno: Errno::EFAULT, reason: 0 });
    }

    #[test]
    fn mmio_of_less_than_eight_bytes_takes_the_low_ones() {
        let mut run = run_with(KVM_EXIT_MMIO);
        run.__bindgen_anon_1.mmio.phys_addr = 0xfee0_0000;
        run.__bindgen_anon_1.mmio.len = 4;
        run.__bindgen_anon_1.mmio.is_write = 1;
        run.__bindgen_anon_1.mmio.data = [0x44, 0x33, 0x22, 0x11, 0xff, 0xff, 0xff, 0xff];
        assert_eq!(decode(Ok(()), &run), Exit::Mmio { gpa: 0xfee0_0000, len: 4, write: Some(0x1122_3344) });
    }

    #[test]
    fn the_tdx_exit_carries_leaf_and_words() {
        let mut run = run_with(KVM_EXIT_TDX);
        run.__bindgen_anon_1.padding = [0; 256];
        let words = [0u64, 0x10002, 1, 2, 3, 4, 5, 6];
        for (i, word) in words.into_iter().enumerate() {
            for (j, byte) in word.to_le_bytes().into_iter().enumerate() {
                // SAFETY: the padding was written above.
                unsafe { run.__bindgen_anon_1.padding[i * 8 + j] = byte as i8 };
            }
        }
        assert_eq!(decode(Ok(()), &run), Exit::Tdx { nr: 0x10002, data: [1, 2, 3, 4, 5, 6] });
    }
}
