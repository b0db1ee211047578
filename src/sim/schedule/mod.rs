//! Who runs when: races made reproducible.
//!
//! An operation of the model runs from end to end under the lock of its machine, so that by itself nothing ever races. The
//! places where something else can come in between in the kernel have names, [`SchedulePoint`]; an operation that gets to
//! one asks the [`Scheduler`], which may let steps of others run there before it goes on. What the kernel's locks forbid is
//! not let in: a point comes with the [`Lock`]s held at it, a step with those it needs, and a fault that finds the MMU lock
//! taken is tried again.
//!
//! Steps belong to actors: a vCPU, or a thread of the host. [`World::run_actors`] runs all of them to their ends, in the
//! order of a [`Schedule`]: drawn from a seed, or given turn by turn. The same schedule and actors give the same
//! [`Event`]s, always; a seed that finds a bug is kept by turning its events into [`Turn`]s ([`turns`]).
//!
//! ```
//! use gmemtest::sim::schedule::{Actor, Progress, Schedule};
//! use gmemtest::sim::SimMachine;
//!
//! let machine = SimMachine::open(&"sim:sw-protected".parse().unwrap()).unwrap();
//! let events = machine.with_world(|world| {
//!     let drain = Actor::new("host").step("drain", &[], |world| {
//!         world.drain_local_lru();
//!         Progress::Done
//!     });
//!     world.run_actors(Schedule::Seeded(7), vec![drain])
//! });
//! assert_eq!(events[0].to_string(), "host: drain");
//! ```
//!
//! The machine option `schedule=SEED` does the same to everything that is asked of a machine, with what a busy kernel does
//! by itself: at some lookups, drawn from the seed, an invalidation comes in between and the fault is tried again, and every
//! ACCEPT stops for a look around while it holds its entry. No test may notice. The seed is part of the machine's name, so
//! that the name which a failure prints reproduces it.
//!
//! What the model cannot show: two operations that pass each other in the middle. A step that comes in at a point runs to
//! its own end (points on its way may let in further ones) before the operation at the point goes on; only a TDCALL is left
//! standing half-way.

#[cfg(test)]
mod tests;

use super::World;
use super::gmem::InodeId;
use super::mmu::VmId;
use super::tdx_module::LpId;
use super::tdx_module::fault::mix;
use super::tdx_module::guest::GuestOutcome;
use std::collections::{BTreeMap, VecDeque};
use std::fmt;

/// A place in an operation where others can come in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SchedulePoint {
    /// A fault has found its frame, and has not installed it.
    FaultLookedUp,
    /// A private page is blocked, TRACK and REMOVE are to come. The MMU lock is held.
    ZapBlocked,
    /// A private page is blocked and tracked, REMOVE is to come. The MMU lock is held.
    ZapTracked,
    /// A conversion has unmapped its range, and has not stored the attribute.
    ConversionUnmapped,
    /// A punch has unmapped its range, and has not freed its pages.
    PunchUnmapped,
    /// TDG.MEM.PAGE.ACCEPT holds the lock of its S-EPT entry.
    AcceptHolding,
}

impl SchedulePoint {
    /// Every point.
    pub const ALL: [SchedulePoint; 6] = [
        SchedulePoint::FaultLookedUp,
        SchedulePoint::ZapBlocked,
        SchedulePoint::ZapTracked,
        SchedulePoint::ConversionUnmapped,
        SchedulePoint::PunchUnmapped,
        SchedulePoint::AcceptHolding,
    ];

    /// The name in events.
    pub fn name(self) -> &'static str {
        match self {
            SchedulePoint::FaultLookedUp => "fault-looked-up",
            SchedulePoint::ZapBlocked => "zap-blocked",
            SchedulePoint::ZapTracked => "zap-tracked",
            SchedulePoint::ConversionUnmapped => "conversion-unmapped",
            SchedulePoint::PunchUnmapped => "punch-unmapped",
            SchedulePoint::AcceptHolding => "accept-holding",
        }
    }
}

/// A lock of KVM or guest_memfd that an operation can stand at a point with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Lock {
    /// mmu_lock of a VM, for writing.
    Mmu(VmId),
    /// slots_lock of a VM.
    Slots(VmId),
    /// invalidate_lock of an inode's page cache, for writing.
    Invalidate(InodeId),
}

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It is over.
    Done,
    /// It is to be tried again.
    Again,
}

type Action = Box<dyn FnMut(&mut World) -> Progress + Send>;

struct Step {
    name: &'static str,
    needs: Vec<Lock>,
    action: Action,
}

/// Somebody who does one step after the other: a vCPU, or a thread of the host.
pub struct Actor {
    name: &'static str,
    steps: VecDeque<Step>,
    /// A step of it is under way.
    inside: bool,
}

impl Actor {
    /// Somebody with nothing to do.
    pub fn new(name: &'static str) -> Actor {
        Actor { name, steps: VecDeque::new(), inside: false }
    }

    /// Adds a step, with the locks that it takes: it does not run where one of them is held.
    #[must_use]
    pub fn step(
        mut self,
        name: &'static str,
        needs: &[Lock],
        action: impl FnMut(&mut World) -> Progress + Send + 'static,
    ) -> Actor {
        self.steps.push_back(Step { name, needs: needs.to_vec(), action: Box::new(action) });
        self
    }
}

impl fmt::Debug for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let steps: Vec<_> = self.steps.iter().map(|step| step.name).collect();
        f.debug_struct("Actor").field("name", &self.name).field("steps", &steps).finish_non_exhaustive()
    }
}

/// At the `visit`-th visit of a point, counted from 1, this actor has its next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// The point.
    pub point: SchedulePoint,
    /// Which visit.
    pub visit: u32,
    /// Whose step.
    pub actor: &'static str,
}

/// In which order actors run.
#[derive(Clone, Debug)]
pub enum Schedule {
    /// Drawn from a seed, at points and between operations.
    Seeded(u64),
    /// One actor after the other, but for these turns.
    Explicit(Vec<Turn>),
}

/// A step that was let run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Point and visit at which it came in; `None` between operations.
    pub at: Option<(SchedulePoint, u32)>,
    /// Who.
    pub actor: &'static str,
    /// Which step.
    pub step: &'static str,
    /// What it came to.
    pub progress: Progress,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((point, visit)) = self.at {
            write!(f, "at {} {visit}, ", point.name())?;
        }
        let again = if self.progress == Progress::Again { ", again" } else { "" };
        write!(f, "{}: {}{again}", self.actor, self.step)
    }
}

/// The turns that make an explicit schedule do what a seeded one did at its points.
pub fn turns(events: &[Event]) -> Vec<Turn> {
    let turn = |event: &Event| event.at.map(|(point, visit)| Turn { point, visit, actor: event.actor });
    events.iter().filter_map(turn).collect()
}

/// Defects that nothing but an interleaving can show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RaceDefect {
    /// A fault installs what it found although an invalidation came in between.
    FaultIgnoresInvalidation,
    /// A kick does not wait for a TDCALL that the vCPU has under way.
    KickIgnoresTdcall,
}

/// Steps that may come in at one visit of a point.
const MAX_PER_VISIT: usize = 4;
/// Steps that may be tried between operations before the actors are called stuck.
const MAX_STEPS: usize = 100_000;

/// Decides at every point who runs.
#[derive(Debug, Default)]
pub struct Scheduler {
    schedule: Option<Schedule>,
    random: u64,
    actors: Vec<Actor>,
    held: Vec<Lock>,
    visits: BTreeMap<SchedulePoint, u32>,
    events: Vec<Event>,
    /// Seed of `schedule=`, and what was drawn from it so far.
    unrest: Option<u64>,
    held_tdcalls: Vec<LpId>,
    finished_tdcalls: Vec<(LpId, GuestOutcome)>,
    /// The defect that is switched on.
    pub defect: Option<RaceDefect>,
}

impl Scheduler {
    /// The scheduler of a machine with `schedule=`, or without.
    pub fn new(seed: Option<u64>) -> Scheduler {
        Scheduler { unrest: seed.map(mix), ..Scheduler::default() }
    }

    /// Whether an operation can lose the processor at a point.
    pub fn is_active(&self) -> bool {
        self.schedule.is_some() || self.unrest.is_some()
    }

    /// Whether an operation that stands at a point holds a lock.
    pub fn holds(&self, lock: Lock) -> bool {
        self.held.contains(&lock)
    }

    fn draw(&mut self, n: usize) -> usize {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        (mix(self.random) % n.max(1) as u64) as usize
    }

    fn ready(&self) -> Vec<usize> {
        let ready = |actor: &Actor| {
            let free = |step: &Step| step.needs.iter().all(|lock| !self.holds(*lock));
            !actor.inside && actor.steps.front().is_some_and(free)
        };
        (0..self.actors.len()).filter(|i| ready(&self.actors[*i])).collect()
    }

    /// Whose step comes in at a visit of a point.
    fn choose(&mut self, point: SchedulePoint, visit: u32, before: &[usize]) -> Option<usize> {
        let ready = self.ready();
        match self.schedule.as_ref()? {
            Schedule::Seeded(_) => {
                let fresh: Vec<usize> = ready.into_iter().filter(|actor| !before.contains(actor)).collect();
                let drawn = self.draw(2 * fresh.len().max(1));
                fresh.get(drawn).copied()
            }
            Schedule::Explicit(turns) => {
                let here = turns.iter().filter(|turn| turn.point == point && turn.visit == visit);
                let turn = here.into_iter().nth(before.len())?;
                ready.into_iter().find(|actor| self.actors[*actor].name == turn.actor)
            }
        }
    }

    /// Whose step is next between operations.
    fn next(&mut self) -> Option<usize> {
        let ready = self.ready();
        match self.schedule.as_ref()? {
            Schedule::Seeded(_) if !ready.is_empty() => {
                let drawn = self.draw(ready.len());
                Some(ready[drawn])
            }
            _ => ready.first().copied(),
        }
    }

    /// Whether the unrest of `schedule=` strikes, as it does once in `n`.
    fn strikes(&mut self, n: u64) -> bool {
        let Some(state) = &mut self.unrest else { return false };
        *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(*state).is_multiple_of(n)
    }
}

impl World {
    /// Runs the steps of all actors to their ends; the answer is which ran where, in the order in which they began.
    ///
    /// # Panics
    /// When a step is tried again without end.
    pub fn run_actors(&mut self, schedule: Schedule, actors: Vec<Actor>) -> Vec<Event> {
        if let Schedule::Seeded(seed) = schedule {
            self.scheduler.random = mix(seed);
        }
        self.scheduler.schedule = Some(schedule);
        self.scheduler.actors = actors;
        self.scheduler.visits.clear();
        let mut steps = 0;
        while let Some(actor) = self.scheduler.next() {
            self.run_step(actor, None);
            steps += 1;
            assert!(steps < MAX_STEPS, "{:?} is tried again without end", self.scheduler.actors[actor]);
        }
        self.scheduler.schedule = None;
        self.scheduler.actors.clear();
        std::mem::take(&mut self.scheduler.events)
    }

    fn run_step(&mut self, actor: usize, at: Option<(SchedulePoint, u32)>) {
        let whose = &mut self.scheduler.actors[actor];
        let Some(mut step) = whose.steps.pop_front() else { return };
        whose.inside = true;
        let event = Event { at, actor: whose.name, step: step.name, progress: Progress::Done };
        let position = self.scheduler.events.len();
        self.scheduler.events.push(event);
        let progress = (step.action)(self);
        self.scheduler.events[position].progress = progress;
        let whose = &mut self.scheduler.actors[actor];
        whose.inside = false;
        if progress == Progress::Again {
            whose.steps.push_front(step);
        }
    }

    /// An operation is at a point with these locks: others may run.
    pub fn schedule_point(&mut self, point: SchedulePoint, locks: &[Lock]) {
        if self.scheduler.schedule.is_none() {
            return;
        }
        let visits = self.scheduler.visits.entry(point).or_default();
        *visits += 1;
        let visit = *visits;
        self.scheduler.held.extend_from_slice(locks);
        let mut before = Vec::new();
        while before.len() < MAX_PER_VISIT
            && let Some(actor) = self.scheduler.choose(point, visit, &before)
        {
            before.push(actor);
            self.run_step(actor, Some((point, visit)));
        }
        let left = self.scheduler.held.len() - locks.len();
        self.scheduler.held.truncate(left);
    }

    /// Whether the unrest of `schedule=` lets an invalidation come in at a lookup.
    pub fn unrest_at_lookup(&mut self) -> bool {
        self.scheduler.strikes(4)
    }

    /// A processor's TDCALL stands half-way: others may run. The answer is how it ended, when a kick has waited for it.
    pub fn stand_in_tdcall(&mut self, lp: LpId) -> Option<GuestOutcome> {
        self.scheduler.held_tdcalls.push(lp);
        self.schedule_point(SchedulePoint::AcceptHolding, &[]);
        self.scheduler.held_tdcalls.retain(|other| *other != lp);
        let at = self.scheduler.finished_tdcalls.iter().position(|(other, _)| *other == lp)?;
        Some(self.scheduler.finished_tdcalls.remove(at).1)
    }

    /// Whether a kick has to let a TDCALL on a processor run to its end first.
    pub fn kick_waits_for_tdcall(&self, lp: LpId) -> bool {
        self.scheduler.defect != Some(RaceDefect::KickIgnoresTdcall) && self.scheduler.held_tdcalls.contains(&lp)
    }

    /// A kick has waited for a TDCALL, which ended like this.
    pub fn tdcall_is_over(&mut self, lp: LpId, outcome: GuestOutcome) {
        self.scheduler.held_tdcalls.retain(|other| *other != lp);
        self.scheduler.finished_tdcalls.push((lp, outcome));
    }
}
