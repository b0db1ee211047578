//! The processes below a process, and which test they belong to.
//!
//! Every test's process is a subreaper (PR_SET_CHILD_SUBREAPER), and so is the runner: what loses its parent below a test
//! becomes the test's child, and the runner's when the test ends. So a child that the runner did not start comes from a
//! test that has just ended. When two end at once, the process group, the mark that a test leaves in the environment of
//! what it executes, and the pipe to the runner, which its forks hold, tell whose it is.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::sync::{Mutex, PoisonError};

use super::outcome::StuckThread;
use super::wire::TEST_VARIABLE;

/// What `/proc/PID/stat` says of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stat {
    /// `comm`.
    pub name: String,
    /// The state letter.
    pub state: char,
    /// Parent.
    pub parent: i32,
    /// Process group.
    pub group: i32,
}

/// Reads `/proc/PID/stat`; `None` when there is no such process.
pub fn stat(pid: i32) -> Option<Stat> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn parse_stat(text: &str) -> Option<Stat> {
    // The name is in parentheses and may hold any character, parentheses too.
    let (name, rest) = (text.find('(')?, text.rfind(')')?);
    let mut fields = text.get(rest + 1..)?.split_whitespace();
    Some(Stat {
        name: text.get(name + 1..rest)?.to_owned(),
        state: fields.next()?.chars().next()?,
        parent: fields.next()?.parse().ok()?,
        group: fields.next()?.parse().ok()?,
    })
}

/// The children of a process, zombies included.
pub fn children(pid: i32) -> Vec<i32> {
    // CONFIG_PROC_CHILDREN gives a file per thread; without it every process has to be asked for its parent.
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for thread in threads.flatten() {
        match fs::read_to_string(thread.path().join("children")) {
            Ok(list) => found.extend(list.split_whitespace().filter_map(|child| child.parse::<i32>().ok())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return children_by_parent(pid),
            Err(_) => {}
        }
    }
    found
}

/// The kernel's own threads, as far as they have been met: most of the processes of a small machine, and never anybody's
/// child.
static KERNEL_THREADS: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());
/// Process number of kthreadd, the parent of kernel threads; in a PID namespace of its own somebody else may have it.
const KTHREADD: i32 = 2;

fn children_by_parent(parent: i32) -> Vec<i32> {
    let there = numbers_in("/proc");
    let mut threads = KERNEL_THREADS.lock().unwrap_or_else(PoisonError::into_inner);
    // A number that is gone may come back as somebody's child.
    threads.retain(|thread| there.contains(thread));
    let kthreadd = stat(KTHREADD).is_some_and(|stat| stat.parent == 0 && stat.name == "kthreadd");
    let mut found = Vec::new();
    for pid in there {
        if threads.contains(&pid) {
            continue;
        }
        match stat(pid).map(|stat| stat.parent) {
            Some(its) if its == parent => found.push(pid),
            Some(KTHREADD) if kthreadd => {
                threads.insert(pid);
            }
            _ => {}
        }
    }
    found
}

/// A process and everything below it.
pub fn with_descendants(pid: i32) -> Vec<i32> {
    let mut found = vec![pid];
    let mut next = 0;
    while next < found.len() {
        for child in children(found[next]) {
            if !found.contains(&child) {
                found.push(child);
            }
        }
        next += 1;
    }
    found
}

/// The mark that the process inherited from the test it was started in (see [`TEST_VARIABLE`]).
pub fn mark(pid: i32) -> Option<String> {
    let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
    environment.split(|&byte| byte == 0).find_map(|entry| {
        let value = entry.strip_prefix(TEST_VARIABLE.as_bytes())?.strip_prefix(b"=")?;
        Some(std::ffi::OsStr::from_bytes(value).to_string_lossy().into_owned())
    })
}

/// Whether the process has a descriptor of the pipe with that inode.
pub fn holds_pipe(pid: i32, inode: u64) -> bool {
    let name = format!("pipe:[{inode}]");
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    descriptors.filter_map(|entry| fs::read_link(entry.path()).ok()).any(|target| target.as_os_str() == name.as_str())
}

/// Where every thread of `pids` is now.
pub fn threads(pids: &[i32]) -> Vec<StuckThread> {
    let mut found = Vec::new();
    for &pid in pids {
        for tid in numbers_in(&format!("/proc/{pid}/task")) {
            let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/task/{tid}/{file}")).unwrap_or_default();
            let Some(stat) = parse_stat(&read("stat")) else {
                continue;
            };
            found.push(StuckThread {
                pid,
                tid,
                name: stat.name,
                state: stat.state.to_string(),
                // The kernel prints 0 for a thread that runs.
                wchan: Some(read("wchan")).filter(|wchan| wchan != "0").unwrap_or_default(),
                syscall: read("syscall").trim_end().to_owned(),
                stack: read("stack").lines().map(str::to_owned).collect(),
            });
        }
    }
    found
}

fn numbers_in(directory: &str) -> Vec<i32> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_hold_parentheses_and_spaces() {
        let stat = parse_stat("17 (a) b (c) S 3 16 16 0 -1").unwrap();
        assert_eq!(stat, Stat { name: "a) b (c".to_owned(), state: 'S', parent: 3, group: 16 });
    }

    #[test]
    fn the_children_of_a_process_are_found_either_way() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let (me, pid) = (std::process::id() as i32, child.id() as i32);
        let found = (children(me), children_by_parent(me), with_descendants(me));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(found.0.contains(&pid) && found.1.contains(&pid) && found.2.contains(&pid), "{found:?}");
    }
}
