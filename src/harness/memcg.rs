//! What a test costs the system: [`MemoryGroup`], a memory cgroup that the test's process moves into.
//!
//! The kernel charges pages of a guest_memfd, and what KVM allocates for a VM, to the cgroup of the process that asked for
//! them. Nothing else in the system disturbs that count, as it does MemFree.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use nix::sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use nix::unistd::Pid;

use super::{Stop, TestResult};
use crate::machine::SkipKind;

const ROOT: &str = "/sys/fs/cgroup";
/// The group's name is this and the process's number.
const PREFIX: &str = "gmemtest-";
/// An empty group that says that the memory controller was not handed down from the root before.
const MARK: &str = "gmemtest-hands-back";

/// The memory controller below the root of cgroup2. Whoever is the last to drop it hands the controller back, if it was not
/// handed down before the first; a process that was killed has dropped it too, and is made up for by the next.
#[derive(Debug)]
struct Controller {
    /// The root, locked shared: it can be locked exclusively when nobody else needs the controller.
    root: File,
}

impl Controller {
    fn hand_down() -> TestResult<Controller> {
        let root = File::open(ROOT)?;
        root.lock_shared()?;
        let controller = Controller { root };
        if !hands_down_memory()? {
            make(&Path::new(ROOT).join(MARK))?;
            fs::write(control(), "+memory").map_err(|error| refused("+memory to cgroup.subtree_control", error))?;
        }
        Ok(controller)
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        // Nobody is left to tell: what cannot be undone here, the end of the run undoes.
        let _ = self.root.unlock();
        hand_back(&self.root);
    }
}

/// Hands the controller back, unless somebody still needs it.
fn hand_back(root: &File) {
    if root.try_lock().is_ok() && fs::remove_dir(Path::new(ROOT).join(MARK)).is_ok() {
        let _ = fs::write(control(), "-memory");
    }
}

fn control() -> PathBuf {
    Path::new(ROOT).join("cgroup.subtree_control")
}

fn hands_down_memory() -> std::io::Result<bool> {
    Ok(fs::read_to_string(control())?.split_ascii_whitespace().any(|name| name == "memory"))
}

/// Makes a group; one that is there already will do.
fn make(path: &Path) -> TestResult {
    match fs::create_dir(path) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(refused("mkdir", error)),
        _ => Ok(()),
    }
}

fn refused(what: &str, error: std::io::Error) -> Stop {
    let kind = match error.kind() {
        std::io::ErrorKind::PermissionDenied => SkipKind::NoPrivilege,
        _ => SkipKind::ConfigOff,
    };
    Stop::skip(kind, format!("{what}: {error} (the root of cgroup2, writable, on {ROOT})"))
}

/// Undoes what tests that were killed left of their groups. A system where none ever was is not touched.
pub(super) fn clear_away() {
    remove_old_groups();
    if Path::new(ROOT).join(MARK).exists()
        && let Ok(root) = File::open(ROOT)
    {
        hand_back(&root);
    }
}

/// A memory cgroup with this process in it, on one CPU: the kernel charges in advance, 64 pages for each CPU. Dropped, the
/// process is where it was, and the group is gone.
#[derive(Debug)]
pub struct MemoryGroup {
    path: PathBuf,
    before: PathBuf,
    cpus: CpuSet,
    /// Dropped after the group has gone.
    _controller: Controller,
}

impl MemoryGroup {
    /// Makes a group below the root of cgroup2 and enters it. Groups that killed tests left behind are removed first.
    ///
    /// # Errors
    /// A skip when the kernel lets this process make none (cgroup2 in a container, for example).
    pub fn enter() -> TestResult<MemoryGroup> {
        remove_old_groups();
        let own = fs::read_to_string("/proc/self/cgroup")?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/").to_owned();
        let controller = Controller::hand_down()?;
        let path = Path::new(ROOT).join(format!("{PREFIX}{}", std::process::id()));
        let cpus = sched_getaffinity(Pid::from_raw(0))?;
        let before = Path::new(ROOT).join(own.trim_start_matches('/'));
        let group = MemoryGroup { path, before, cpus, _controller: controller };
        make(&group.path)?;
        fs::write(group.path.join("cgroup.procs"), "0").map_err(|error| refused("cgroup.procs", error))?;
        let mut one = CpuSet::new();
        one.set(sched_getcpu()?)?;
        sched_setaffinity(Pid::from_raw(0), &one)?;
        Ok(group)
    }

    /// Bytes that are charged to the group now (memory.current).
    ///
    /// # Errors
    /// What reading the file returns.
    pub fn charged(&self) -> TestResult<u64> {
        let text = fs::read_to_string(self.path.join("memory.current"))?;
        text.trim().parse().map_err(|error| Stop::fail(format!("memory.current is '{}': {error}", text.trim())))
    }

    /// One count of memory.stat, `file` for example; 0 where the kernel has none of that name.
    ///
    /// # Errors
    /// What reading the file returns.
    pub fn statistic(&self, name: &str) -> TestResult<u64> {
        let text = fs::read_to_string(self.path.join("memory.stat"))?;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
        Ok(value.unwrap_or(0))
    }

    /// Sets the limit (memory.max), in bytes, and keeps the kernel from killing this process at it: what cannot be charged
    /// then fails.
    ///
    /// # Errors
    /// What writing the files returns.
    pub fn limit(&self, bytes: u64) -> TestResult {
        fs::write("/proc/self/oom_score_adj", "-1000")?;
        // Nor is anything paged out; a kernel without swap has no such file.
        let _ = fs::write(self.path.join("memory.swap.max"), "0");
        Ok(fs::write(self.path.join("memory.max"), bytes.to_string())?)
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        // Nobody is left to tell: what cannot be undone here, the next test or the end of the run undoes.
        let _ = sched_setaffinity(Pid::from_raw(0), &self.cpus);
        let _ = fs::write(self.before.join("cgroup.procs"), "0");
        let _ = fs::remove_dir(&self.path);
    }
}

/// Removes the groups whose process is gone; one that is in use stays by itself (EBUSY).
fn remove_old_groups() {
    for entry in fs::read_dir(ROOT).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(PREFIX)).and_then(|pid| pid.parse::<i32>().ok());
        if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            let _ = fs::remove_dir(entry.path());
        }
    }
}
