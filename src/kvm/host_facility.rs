//! What the running kernel offers beside KVM, and what each missing piece would need.

use super::mapping::KvmMapping;
use super::{gmem, hold, mapping, page, pagemap};
use crate::machine::{Availability, Errno, Facility, HoldKind, HostMemory, Mapping, PAGE_SIZE, SkipKind};
use std::fs;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

/// The answer for a facility that does not depend on KVM.
pub(super) fn availability(facility: Facility) -> Availability {
    match facility {
        Facility::Cachestat => cachestat(),
        Facility::Userfaultfd => userfaultfd(),
        Facility::TransparentHugePages => transparent_huge_pages(),
        Facility::NumaNodes => numa_nodes(),
        Facility::Pagemap => pagemap_frames(),
        Facility::PageFlags => readable("/proc/kpageflags", "CONFIG_PROC_PAGE_MONITOR=y", "root with CAP_SYS_ADMIN"),
        Facility::PageMapCount => readable("/proc/kpagecount", "CONFIG_PROC_PAGE_MONITOR=y", "root with CAP_SYS_ADMIN"),
        Facility::Kcore => {
            readable("/proc/kcore", "CONFIG_PROC_KCORE=y", "root with CAP_SYS_RAWIO, and no kernel lockdown")
        }
        Facility::DropCaches => drop_caches(),
        Facility::HwPoison => hwpoison(),
        Facility::HoldGet => hold_get(),
        Facility::HoldPin => hold_pin(),
        Facility::GupTest => readable(
            "/sys/kernel/debug/gup_test",
            "CONFIG_GUP_TEST=y, and debugfs mounted on /sys/kernel/debug",
            "root",
        ),
        Facility::MemoryCgroup => memory_cgroup(),
        Facility::Tracefs => readable(
            "/sys/kernel/tracing/events/kvmmmu/enable",
            "CONFIG_FTRACE=y and CONFIG_TRACEPOINTS=y, and tracefs mounted on /sys/kernel/tracing",
            "root",
        ),
        Facility::FailFunction => readable(
            "/sys/kernel/debug/fail_function/inject",
            "CONFIG_FAIL_FUNCTION=y and CONFIG_FUNCTION_ERROR_INJECTION=y, and debugfs mounted on /sys/kernel/debug",
            "root",
        ),
        Facility::KernelLog => kernel_log(),
        Facility::PageAccount => Availability::absent(
            SkipKind::Declined,
            "references to pages that the host cannot map are not counted here",
            "a sim machine",
        ),
        other => unreachable!("{other} depends on KVM"),
    }
}

/// Whether /proc/cpuinfo lists a flag.
pub(super) fn cpu_flag(flag: &str) -> bool {
    fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| {
        let flags = text.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
        flags.split_ascii_whitespace().any(|word| word == flag)
    })
}

/// A file that must be there and readable.
fn readable(path: &str, config: &str, privilege: &str) -> Availability {
    let opened = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    match opened.map_err(mapping::errno_of) {
        Ok(_) => Availability::present(),
        Err(errno) => refused(&format!("open {path}"), errno, config, privilege),
    }
}

fn refused(call: &str, errno: Errno, config: &str, privilege: &str) -> Availability {
    let why = format!("{call}: {errno}");
    match errno {
        Errno::EACCES | Errno::EPERM => Availability::absent(SkipKind::NoPrivilege, why, privilege),
        _ => Availability::absent(SkipKind::ConfigOff, why, config),
    }
}

fn cachestat() -> Availability {
    // No file: a kernel that has the call looks at the descriptor first and says EBADF.
    match gmem::cachestat(&-1, 0, 0) {
        Ok(_) | Err(Errno::EBADF) => Availability::present(),
        Err(errno) => refused(
            "cachestat(2)",
            errno,
            "Linux 6.5 with CONFIG_CACHESTAT_SYSCALL=y",
            "a seccomp filter that lets cachestat pass",
        ),
    }
}

fn userfaultfd() -> Availability {
    // SAFETY: takes a number.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    match Errno::result(fd) {
        Ok(fd) => {
            // SAFETY: a new descriptor that nobody else owns.
            drop(unsafe { OwnedFd::from_raw_fd(fd as i32) });
            Availability::present()
        }
        Err(errno) => refused(
            "userfaultfd(2)",
            errno,
            "CONFIG_USERFAULTFD=y",
            "root with CAP_SYS_PTRACE, or sysctl vm.unprivileged_userfaultfd=1",
        ),
    }
}

fn transparent_huge_pages() -> Availability {
    match KvmMapping::of_host_memory(HostMemory::TransparentHuge, 2 << 20) {
        Ok(_) => Availability::present(),
        Err(errno) => refused("madvise(MADV_HUGEPAGE)", errno, "CONFIG_TRANSPARENT_HUGEPAGE=y", "root"),
    }
}

fn numa_nodes() -> Availability {
    let nodes = fs::read_to_string("/sys/devices/system/node/has_memory").unwrap_or_default();
    let count = count_in_list(nodes.trim());
    if count >= 2 {
        return Availability::with(format!("{count} nodes"));
    }
    Availability::absent(
        SkipKind::NoHardware,
        format!("{count} NUMA nodes with memory"),
        "a machine with two nodes, or CONFIG_NUMA_EMU=y and numa=fake=2 on the kernel's command line",
    )
}

/// How many numbers a list such as `0-2,5` has.
fn count_in_list(list: &str) -> usize {
    let numbers = |part: &str| -> Option<usize> {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(last.parse::<usize>().ok()? - first.parse::<usize>().ok()? + 1)
    };
    list.split(',').filter_map(numbers).sum()
}

fn pagemap_frames() -> Availability {
    let here = 0u8;
    match pagemap::frame(&raw const here as u64) {
        Ok(_) => Availability::present(),
        Err(errno) => refused(
            "the page frame number in /proc/self/pagemap",
            errno,
            "CONFIG_PROC_PAGE_MONITOR=y",
            "root with CAP_SYS_ADMIN",
        ),
    }
}

fn drop_caches() -> Availability {
    const PATH: &str = "/proc/sys/vm/drop_caches";
    if page::move_to_its_own_node().is_ok() {
        return Availability::with("move_pages(2)");
    }
    match fs::OpenOptions::new().write(true).open(PATH).map_err(mapping::errno_of) {
        Ok(_) => Availability::with(PATH),
        Err(errno) => refused(&format!("open {PATH}"), errno, "CONFIG_SYSCTL=y and /proc mounted", "root"),
    }
}

fn hwpoison() -> Availability {
    let config = readable("/proc/sys/vm/memory_failure_early_kill", "CONFIG_MEMORY_FAILURE=y", "root");
    if !config.is_present() {
        return config;
    }
    /// Bit of CAP_SYS_ADMIN in a capability set.
    const CAP_SYS_ADMIN: u64 = 1 << 21;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap_or_default();
    match u64::from_str_radix(effective.trim(), 16) {
        Ok(set) if set & CAP_SYS_ADMIN != 0 => Availability::present(),
        _ => {
            Availability::absent(SkipKind::NoPrivilege, "MADV_HWPOISON needs CAP_SYS_ADMIN", "root with CAP_SYS_ADMIN")
        }
    }
}

fn hold_get() -> Availability {
    let held = KvmMapping::of_host_memory(HostMemory::Anonymous, PAGE_SIZE).and_then(|page| {
        page.write_u64(0, 1).map_err(|_| Errno::EFAULT)?;
        page.hold(0, PAGE_SIZE, HoldKind::Get).map(drop)
    });
    match held {
        Ok(()) => Availability::present(),
        Err(errno) => refused("vmsplice(2)", errno, "CONFIG_MMU=y", "a seccomp filter that lets vmsplice pass"),
    }
}

fn hold_pin() -> Availability {
    match hold::io_uring_works() {
        Ok(()) => Availability::present(),
        Err(errno) => refused(
            "io_uring_setup(2)",
            errno,
            "CONFIG_IO_URING=y",
            "sysctl kernel.io_uring_disabled=0, and a seccomp filter that lets io_uring pass",
        ),
    }
}

fn memory_cgroup() -> Availability {
    const ROOT: &str = "/sys/fs/cgroup";
    let controllers = match fs::read_to_string(format!("{ROOT}/cgroup.controllers")) {
        Ok(text) => text,
        Err(error) => {
            let errno = mapping::errno_of(error);
            return refused(
                &format!("open {ROOT}/cgroup.controllers"),
                errno,
                "CONFIG_MEMCG=y, and cgroup2 mounted on /sys/fs/cgroup",
                "root",
            );
        }
    };
    if !controllers.split_ascii_whitespace().any(|name| name == "memory") {
        return Availability::absent(
            SkipKind::ConfigOff,
            format!("the controllers of {ROOT} are '{}'", controllers.trim()),
            "CONFIG_MEMCG=y, and the memory controller not bound to cgroup v1 or disabled on the command line",
        );
    }
    match nix::unistd::access(ROOT, nix::unistd::AccessFlags::W_OK) {
        Ok(()) => Availability::present(),
        Err(errno) => refused(&format!("write to {ROOT}"), errno, "cgroup2 mounted writable", "root"),
    }
}

fn kernel_log() -> Availability {
    readable("/dev/kmsg", "CONFIG_PRINTK=y and /dev mounted", "root, or sysctl kernel.dmesg_restrict=0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_lists_are_counted() {
        assert_eq!(count_in_list(""), 0);
        assert_eq!(count_in_list("0"), 1);
        assert_eq!(count_in_list("0-2,5"), 4);
    }

    #[test]
    fn every_absence_says_why_and_what_would_help() {
        let machine = crate::kvm::KvmMachine::new(crate::machine::VmType::Tdx);
        for &facility in Facility::ALL {
            if let Availability::Absent { why, mend, .. } = crate::machine::Machine::facility(&machine, facility) {
                assert!(!why.is_empty() && !mend.is_empty(), "{facility}");
            }
        }
    }
}
