//! Accesses to memory that may raise SIGBUS or SIGSEGV, with the signal as a value.
//!
//! Each accessor is a few instructions of assembly of which one touches the memory. A handler for both signals looks
//! whether the interrupted instruction is one of those; if so it puts signal and code into a register and continues at the
//! accessor's fixup, which returns. Nothing is unwound and no Rust code is left half-way, any thread may fault at any
//! time, and a fault anywhere else goes to the handler that was there before (Rust's stack overflow report, or the default
//! action). The accessors use `rep movsb` and `rep stosb`, which leave in RCX how many bytes were not done.
//!
//! This is not a read through /proc/self/mem: the processor itself walks the process's page tables, so that the page fault
//! path of the kernel is the one that a VMM takes.

use crate::machine::HostFault;
use std::arch::global_asm;
use std::sync::Once;

global_asm!(
    ".pushsection .text.gmemtest_host_access, \"ax\", @progbits",
    // (destination: rdi, source: rsi, length: rdx) -> (rax: bytes not copied, rdx: signal << 32 | code)
    ".globl gmemtest_host_copy",
    "gmemtest_host_copy:",
    "mov rcx, rdx",
    ".globl gmemtest_host_copy_access",
    "gmemtest_host_copy_access:",
    "rep movsb",
    "xor eax, eax",
    "xor edx, edx",
    "ret",
    // (destination: rdi, byte: rsi, length: rdx) -> the same
    ".globl gmemtest_host_fill",
    "gmemtest_host_fill:",
    "mov rcx, rdx",
    "mov eax, esi",
    ".globl gmemtest_host_fill_access",
    "gmemtest_host_fill_access:",
    "rep stosb",
    "xor eax, eax",
    "xor edx, edx",
    "ret",
    // (source: rdi, destination: rsi) -> the same; one load of 8 bytes
    ".globl gmemtest_host_load",
    "gmemtest_host_load:",
    "mov ecx, 8",
    ".globl gmemtest_host_load_access",
    "gmemtest_host_load_access:",
    "mov rax, [rdi]",
    "mov [rsi], rax",
    "xor eax, eax",
    "xor edx, edx",
    "ret",
    // (destination: rdi, value: rsi) -> the same; one store of 8 bytes
    ".globl gmemtest_host_store",
    "gmemtest_host_store:",
    "mov ecx, 8",
    ".globl gmemtest_host_store_access",
    "gmemtest_host_store_access:",
    "mov [rdi], rsi",
    "xor eax, eax",
    "xor edx, edx",
    "ret",
    // The handler arrives here, with signal and code in rdx.
    ".globl gmemtest_host_fixup",
    "gmemtest_host_fixup:",
    "mov rax, rcx",
    "ret",
    ".popsection",
);

/// What an accessor returns in RAX and RDX.
#[repr(C)]
struct Outcome {
    left: u64,
    signal_and_code: u64,
}

unsafe extern "sysv64" {
    fn gmemtest_host_copy(destination: *mut u8, source: *const u8, len: u64) -> Outcome;
    fn gmemtest_host_fill(destination: *mut u8, byte: u64, len: u64) -> Outcome;
    fn gmemtest_host_load(source: *const u8, destination: *mut u64) -> Outcome;
    fn gmemtest_host_store(destination: *mut u8, value: u64) -> Outcome;
    static gmemtest_host_copy_access: u8;
    static gmemtest_host_fill_access: u8;
    static gmemtest_host_load_access: u8;
    static gmemtest_host_store_access: u8;
    static gmemtest_host_fixup: u8;
}

/// The instructions that may fault.
fn access_instructions() -> [u64; 4] {
    [
        &raw const gmemtest_host_copy_access,
        &raw const gmemtest_host_fill_access,
        &raw const gmemtest_host_load_access,
        &raw const gmemtest_host_store_access,
    ]
    .map(|instruction| instruction as u64)
}

impl Outcome {
    /// As a result, for an access of `len` bytes at byte `at` of a mapping.
    fn of(self, at: u64, len: u64) -> Result<(), HostFault> {
        if self.signal_and_code == 0 {
            return Ok(());
        }
        Err(HostFault {
            signal: (self.signal_and_code >> 32) as i32,
            code: self.signal_and_code as u32 as i32,
            offset: at + (len - self.left),
        })
    }
}

/// Reads `buf.len()` bytes from `base + at`. On a fault the bytes before it are in `buf`.
///
/// # Safety
/// The range must be memory that nothing in this process uses as Rust objects; it need not be accessible.
pub(super) unsafe fn read(base: *const u8, at: u64, buf: &mut [u8]) -> Result<(), HostFault> {
    install_handler();
    let len = buf.len() as u64;
    // SAFETY: the destination is `buf`; a fault at the source ends in the fixup.
    unsafe { gmemtest_host_copy(buf.as_mut_ptr(), base.add(at as usize), len) }.of(at, len)
}

/// Writes `data` at `base + at`.
///
/// # Safety
/// As for [`read`].
pub(super) unsafe fn write(base: *mut u8, at: u64, data: &[u8]) -> Result<(), HostFault> {
    install_handler();
    let len = data.len() as u64;
    // SAFETY: the source is `data`; the caller promises that the destination holds no Rust objects.
    unsafe { gmemtest_host_copy(base.add(at as usize), data.as_ptr(), len) }.of(at, len)
}

/// Writes `len` bytes of `byte` at `base + at`.
///
/// # Safety
/// As for [`read`].
pub(super) unsafe fn fill(base: *mut u8, at: u64, len: u64, byte: u8) -> Result<(), HostFault> {
    install_handler();
    // SAFETY: the caller promises that the destination holds no Rust objects.
    unsafe { gmemtest_host_fill(base.add(at as usize), u64::from(byte), len) }.of(at, len)
}

/// Loads 8 bytes at `base + at` with one instruction.
///
/// # Safety
/// As for [`read`].
pub(super) unsafe fn load(base: *const u8, at: u64) -> Result<u64, HostFault> {
    install_handler();
    let mut value = 0;
    // SAFETY: the destination is `value`; a fault at the source ends in the fixup.
    unsafe { gmemtest_host_load(base.add(at as usize), &mut value) }.of(at, 8)?;
    Ok(value)
}

/// Stores 8 bytes at `base + at` with one instruction.
///
/// # Safety
/// As for [`read`].
pub(super) unsafe fn store(base: *mut u8, at: u64, value: u64) -> Result<(), HostFault> {
    install_handler();
    // SAFETY: the caller promises that the destination holds no Rust objects.
    unsafe { gmemtest_host_store(base.add(at as usize), value) }.of(at, 8)
}

/// The handlers that were there before, for faults that are not an accessor's.
static mut PREVIOUS: [Option<libc::sigaction>; 2] = [None; 2];

const SIGNALS: [i32; 2] = [libc::SIGBUS, libc::SIGSEGV];

/// Installs the handler for SIGBUS and SIGSEGV, once a process.
fn install_handler() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        for (slot, signal) in SIGNALS.into_iter().enumerate() {
            // SAFETY: all-zero is a valid sigaction.
            let mut previous: libc::sigaction = unsafe { std::mem::zeroed() };
            // SAFETY: queries the action into `previous`.
            unsafe { libc::sigaction(signal, std::ptr::null(), &mut previous) };
            // SAFETY: the handler that reads this is installed below, and `Once` lets one thread in.
            unsafe { PREVIOUS[slot] = Some(previous) };
            // SAFETY: all-zero is a valid sigaction.
            let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
            action.sa_sigaction = handle as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            // SAFETY: `handle` has the SA_SIGINFO signature and does only async-signal-safe things.
            unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) };
        }
    });
}

extern "C" fn handle(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo and, with SA_SIGINFO, a ucontext that it restores on return.
    let (code, registers) = unsafe { ((*info).si_code, &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs) };
    let rip = registers[libc::REG_RIP as usize] as u64;
    // Codes of 0 and below were sent by a process, and BUS_MCEERR_AO is not about the interrupted instruction.
    let synchronous = code > 0 && !(signal == libc::SIGBUS && code == libc::BUS_MCEERR_AO);
    if synchronous && access_instructions().contains(&rip) {
        registers[libc::REG_RDX as usize] = ((signal as i64) << 32) | i64::from(code as u32);
        registers[libc::REG_RIP as usize] = &raw const gmemtest_host_fixup as i64;
        return;
    }
    let slot = usize::from(signal == libc::SIGSEGV);
    // SAFETY: written once before this handler was installed, only read since.
    let previous = unsafe { (&raw const PREVIOUS).read()[slot] };
    match previous {
        Some(action) if action.sa_sigaction != libc::SIG_DFL && action.sa_sigaction != libc::SIG_IGN => {
            if action.sa_flags & libc::SA_SIGINFO != 0 {
                // SAFETY: an action with SA_SIGINFO holds a function of this signature.
                let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
                    unsafe { std::mem::transmute(action.sa_sigaction) };
                handler(signal, info, context);
            } else {
                // SAFETY: an action without SA_SIGINFO holds a function of this signature.
                let handler: extern "C" fn(i32) = unsafe { std::mem::transmute(action.sa_sigaction) };
                handler(signal);
            }
        }
        _ => {
            // The default action takes the process down when the instruction faults again. A signal that was sent by a
            // process does not come again by itself, so it is raised.
            // SAFETY: sigaction and raise are async-signal-safe.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = libc::SIG_DFL;
                libc::sigaction(signal, &action, std::ptr::null_mut());
                if !synchronous {
                    libc::raise(signal);
                }
            }
        }
    }
}
