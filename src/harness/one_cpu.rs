//! Tests that want back what they have just freed: [`OneCpu`].

use nix::sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use nix::unistd::Pid;

/// Keeps the calling thread on the CPU it runs on, until it is dropped.
pub struct OneCpu(Option<CpuSet>);

impl OneCpu {
    /// Stays on the CPU on which the call is made.
    pub fn stay() -> OneCpu {
        let this = Pid::from_raw(0);
        let before = sched_getaffinity(this).ok();
        let mut only = CpuSet::new();
        let stays = sched_getcpu().and_then(|cpu| only.set(cpu)).and_then(|()| sched_setaffinity(this, &only));
        OneCpu(before.filter(|_| stays.is_ok()))
    }
}

impl Drop for OneCpu {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // The mask was this thread's own: only a CPU that went offline meanwhile could be in the way.
            let _ = sched_setaffinity(Pid::from_raw(0), before);
        }
    }
}
