//! What the leaves do together, group by group in the order of TDX module spec 13.

mod faults;
mod large;
mod lifecycle;
mod locks;
mod measure;
mod memory;
mod unmap;

use super::fixture::Fixture;
use super::guest::GuestOutcome;
use super::{Leaf, LpId, Outcome};

/// The status a text names.
fn status(text: &str) -> super::Status {
    text.parse().unwrap()
}

/// A call on `lp0` must end with the status `text` names; returns the registers.
#[track_caller]
fn expect(f: &mut Fixture, leaf: Leaf, registers: &[(&str, u64)], text: &str) -> super::Regs {
    expect_on(f, LpId(0), leaf, registers, text)
}

/// As [`expect`], on another processor. Afterwards every invariant must hold.
#[track_caller]
fn expect_on(f: &mut Fixture, lp: LpId, leaf: Leaf, registers: &[(&str, u64)], text: &str) -> super::Regs {
    let (outcome, regs) = f.call_on(lp, leaf, registers);
    assert_eq!(outcome, Outcome::Done(status(text)), "{}", leaf.name());
    check(f);
    regs
}

#[track_caller]
fn check(f: &Fixture) {
    let violations: Vec<String> = f.module.check().iter().map(ToString::to_string).collect();
    assert!(violations.is_empty(), "{violations:#?}");
}

/// Enters the fixture's vCPU on `lp`.
#[track_caller]
fn enter(f: &mut Fixture, lp: LpId) {
    let vcpu = f.vcpu;
    assert_eq!(f.call_on(lp, Leaf::VpEnter, &[("rcx", vcpu)]).0, Outcome::Entered);
    check(f);
}

/// A 4K page at `gpa`, given and accepted by the guest on `lp1`, which is left again. Returns the page.
#[track_caller]
fn mapped_page(f: &mut Fixture, gpa: u64) -> u64 {
    let (page, tdr) = (f.page(), f.tdr);
    expect(f, Leaf::MemPageAug, &[("rcx", gpa), ("rdx", tdr), ("r8", page)], "TDX_SUCCESS");
    enter(f, LpId(1));
    let accepted = f.module.guest_accept(LpId(1), gpa, 0).unwrap();
    assert_eq!(accepted, GuestOutcome::Tdcall(status("TDX_SUCCESS")));
    f.module.kick(LpId(1)).unwrap();
    page
}
