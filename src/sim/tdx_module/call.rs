//! A leaf in flight: its registers, its locks, and the ways it can stop.

use super::leaf::{Leaf, TdcallLeaf};
use super::lock::HeldLock;
use super::lp::{HoldPoint, LpId};
use super::regs::Regs;
use super::status::{Code, Status};

/// Which leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum AnyLeaf {
    /// Called by the host.
    Seamcall(Leaf),
    /// Called by the guest.
    Tdcall(TdcallLeaf),
}

impl AnyLeaf {
    /// The leaf's name.
    pub fn name(self) -> &'static str {
        match self {
            AnyLeaf::Seamcall(leaf) => leaf.name(),
            AnyLeaf::Tdcall(leaf) => leaf.name(),
        }
    }

    /// The leaf called `name`: a SEAMCALL leaf, or a TDCALL leaf.
    pub fn from_name(name: &str) -> Option<AnyLeaf> {
        let is_tdcall = name.len() > 4 && name[..4].eq_ignore_ascii_case("TDG.");
        match Leaf::from_name(name) {
            Some(leaf) if !is_tdcall => Some(AnyLeaf::Seamcall(leaf)),
            _ => TdcallLeaf::from_name(name).map(AnyLeaf::Tdcall),
        }
    }
}

/// Why a leaf's work ended before its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// With this status.
    Fail(Status),
    /// At a hold point, locks kept.
    Held,
}

impl From<Status> for Stop {
    fn from(status: Status) -> Stop {
        Stop::Fail(status)
    }
}

impl From<Code> for Stop {
    fn from(code: Code) -> Stop {
        Stop::Fail(code.into())
    }
}

/// A leaf in flight.
pub(crate) struct Call {
    pub lp: LpId,
    pub leaf: AnyLeaf,
    pub version: u8,
    /// Registers as the caller passed them.
    pub input: Regs,
    /// Registers as they will be returned, status apart.
    pub regs: Regs,
    pub locks: Vec<HeldLock>,
    /// Running again after having been held: locks are found, not taken.
    pub replaying: bool,
    pub hold: Option<HoldPoint>,
    /// Where it was held.
    pub held_at: Option<HoldPoint>,
    /// The vCPU that executes a TDCALL, by TDVPR address.
    pub tdvpr: Option<u64>,
    /// VP.ENTER has made a new association.
    pub new_association: bool,
    /// VP.ENTER has counted the vCPU in the epoch.
    pub epoch_counted: bool,
}

impl Call {
    #[inline]
    pub fn new(
        lp: LpId,
        leaf: AnyLeaf,
        version: u8,
        input: Regs,
        locks: Vec<HeldLock>,
        hold: Option<HoldPoint>,
    ) -> Call {
        Call {
            lp,
            leaf,
            version,
            input,
            regs: input,
            locks,
            replaying: false,
            hold,
            held_at: None,
            tdvpr: None,
            new_association: false,
            epoch_counted: false,
        }
    }

    /// Stops here if the leaf is to be held at `point`.
    #[inline]
    pub fn point(&mut self, point: HoldPoint) -> Result<(), Stop> {
        if self.hold == Some(point) {
            self.hold = None;
            self.held_at = Some(point);
            return Err(Stop::Held);
        }
        Ok(())
    }
}

/// What became of a SEAMCALL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The leaf is over; the registers hold its answer.
    Done(Status),
    /// VP.ENTER entered the guest: the processor runs the vCPU until a guest operation or an interrupt exits.
    Entered,
    /// The leaf is held at the point asked for, its locks with it.
    Held,
}

impl Outcome {
    /// The status of a leaf that is over.
    pub fn status(self) -> Option<Status> {
        match self {
            Outcome::Done(status) => Some(status),
            Outcome::Entered | Outcome::Held => None,
        }
    }
}

/// Why a processor cannot do what it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LpError {
    /// There is no such processor.
    NoSuchLp(LpId),
    /// It runs a guest: the host has no control of it until a TD exit.
    InGuest(LpId),
    /// It runs no guest.
    NotInGuest(LpId),
    /// A leaf is held half-way on it.
    HoldsLeaf(LpId),
    /// No leaf is held on it.
    HoldsNothing(LpId),
}

impl std::fmt::Display for LpError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            LpError::NoSuchLp(lp) => write!(f, "there is no logical processor {lp}"),
            LpError::InGuest(lp) => write!(f, "{lp} is running a guest; make it exit first"),
            LpError::NotInGuest(lp) => write!(f, "{lp} is not running a guest; enter a vCPU first"),
            LpError::HoldsLeaf(lp) => write!(f, "{lp} has a leaf held half-way; release it first"),
            LpError::HoldsNothing(lp) => write!(f, "{lp} has no leaf held half-way"),
        }
    }
}

impl std::error::Error for LpError {}
