//! The file systems that tests and the harness look for.

use std::ffi::CString;
use std::fs;

use nix::errno::Errno;

/// Whether tests can do without a file system.
#[derive(Clone, Copy, PartialEq)]
enum Need {
    /// Told when it is missing.
    Told,
    /// A kernel may be built without it; tests skip for it.
    Optional,
}

/// Type, mount point, options.
const TABLE: [(&str, &str, &str, Need); 12] = [
    ("proc", "/proc", "", Need::Told),
    ("sysfs", "/sys", "", Need::Told),
    ("devtmpfs", "/dev", "mode=0755", Need::Optional),
    ("devpts", "/dev/pts", "mode=0620,ptmxmode=0666", Need::Optional),
    ("tmpfs", "/dev/shm", "mode=1777", Need::Told),
    ("tmpfs", "/tmp", "mode=1777", Need::Told),
    ("tmpfs", "/run", "mode=0755", Need::Told),
    ("debugfs", "/sys/kernel/debug", "", Need::Optional),
    ("tracefs", "/sys/kernel/tracing", "", Need::Optional),
    ("cgroup2", "/sys/fs/cgroup", "", Need::Optional),
    ("configfs", "/sys/kernel/config", "", Need::Optional),
    ("hugetlbfs", "/dev/hugepages", "", Need::Optional),
];

/// Mounts what there is, and says what was needed and is not there.
pub fn mount_all() -> Vec<String> {
    let mut complaints = Vec::new();
    for (kind, target, options, need) in TABLE {
        // Fails on sysfs, where the kernel has made the mount point, or will not have it.
        let _ = fs::create_dir_all(target);
        if let Err(errno) = mount(kind, target, options)
            && need == Need::Told
        {
            complaints.push(format!("{kind} cannot be mounted at {target}: {errno}"));
        }
    }
    for (link, target) in [("/dev/fd", "/proc/self/fd"), ("/dev/stdin", "/proc/self/fd/0")] {
        // devtmpfs may have it.
        let _ = std::os::unix::fs::symlink(target, link);
    }
    complaints
}

fn mount(kind: &str, target: &str, options: &str) -> nix::Result<()> {
    let text = |text: &str| CString::new(text).map_err(|_| Errno::EINVAL);
    let (kind, target, options) = (text(kind)?, text(target)?, text(options)?);
    // SAFETY: the four strings are NUL-terminated and outlive the call.
    let result = unsafe { libc::mount(kind.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, options.as_ptr().cast()) };
    Errno::result(result).map(drop)
}
