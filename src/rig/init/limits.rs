//! Resource limits of the command: none that a test would meet.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises what tests use up: files, locked memory, processes.
pub fn raise() {
    // fs.nr_open is the ceiling of RLIMIT_NOFILE.
    let files = std::fs::read_to_string("/proc/sys/fs/nr_open").ok().and_then(|text| text.trim().parse().ok());
    for (resource, wanted) in [
        (Resource::RLIMIT_NOFILE, files.unwrap_or(1 << 20)),
        (Resource::RLIMIT_MEMLOCK, libc::RLIM_INFINITY),
        (Resource::RLIMIT_NPROC, libc::RLIM_INFINITY),
    ] {
        // PID 1 has CAP_SYS_RESOURCE; where a limit cannot be raised, the old one stays.
        if setrlimit(resource, wanted, wanted).is_err()
            && let Ok((_, hard)) = getrlimit(resource)
        {
            let _ = setrlimit(resource, hard, hard);
        }
    }
}
