//! One question and one answer, a line of JSON each.

use serde::{Deserialize, Serialize};

use crate::machine::{FaultEffect, FaultWhen, ModuleCall, ModuleFault, PageOwner};

/// What is asked of the module: the methods of [`crate::machine::TdxModule`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Question {
    /// `add_fault`
    AddFault(Fault),
    /// `fault_hits`
    FaultHits(u64),
    /// `clear_faults`
    ClearFaults,
    /// `position`
    Position,
    /// `calls_since`
    CallsSince(u64),
    /// `page_owner`
    PageOwner(u64),
    /// `measurement`
    Measurement(u64),
    /// `violations`
    Violations,
    /// Not of a test: its process has come, and no other one is there. What the tests before it planned and what the
    /// kernel left behind in the module of their TDs is over.
    Begin,
}

/// What it answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Done.
    Done,
    /// A number.
    Number(u64),
    /// Calls; `more` when the answer would have been too long and the next question has to go on behind the last one.
    Calls {
        /// Oldest first.
        calls: Vec<Call>,
        /// Whether there are more.
        more: bool,
    },
    /// Type, owner and size of a page.
    Owner(u8, u64, u8),
    /// MRTD: 48 bytes.
    Measurement(Vec<u8>),
    /// Lines of text.
    Lines(Vec<String>),
    /// The method's errno.
    Errno(i32),
}

/// Most calls in one answer.
pub const CALLS: usize = 512;

/// [`ModuleFault`] as it is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    leaf: u16,
    gpa: Option<u64>,
    level: Option<u8>,
    page: Option<u64>,
    when: When,
    after: bool,
    status: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum When {
    Nth(u64),
    First(u64),
    From(u64),
    Every(u64),
    Always,
}

impl From<&ModuleFault> for Fault {
    fn from(fault: &ModuleFault) -> Fault {
        let when = match fault.when {
            FaultWhen::Nth(n) => When::Nth(n),
            FaultWhen::First(n) => When::First(n),
            FaultWhen::From(n) => When::From(n),
            FaultWhen::Every(n) => When::Every(n),
            FaultWhen::Always => When::Always,
        };
        let after = fault.effect == FaultEffect::After;
        let ModuleFault { leaf, gpa, level, page, status, .. } = *fault;
        Fault { leaf, gpa, level, page, when, after, status }
    }
}

impl From<Fault> for ModuleFault {
    fn from(fault: Fault) -> ModuleFault {
        let when = match fault.when {
            When::Nth(n) => FaultWhen::Nth(n),
            When::First(n) => FaultWhen::First(n),
            When::From(n) => FaultWhen::From(n),
            When::Every(n) => FaultWhen::Every(n),
            When::Always => FaultWhen::Always,
        };
        let effect = if fault.after { FaultEffect::After } else { FaultEffect::InsteadOf };
        let Fault { leaf, gpa, level, page, status, .. } = fault;
        ModuleFault { leaf, gpa, level, page, when, effect, status }
    }
}

/// [`ModuleCall`] as it is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call(u64, u32, u16, bool, [u64; 4], u64);

impl From<ModuleCall> for Call {
    fn from(call: ModuleCall) -> Call {
        Call(call.seq, call.processor, call.leaf, call.guest, call.operands, call.status)
    }
}

impl From<Call> for ModuleCall {
    fn from(Call(seq, processor, leaf, guest, operands, status): Call) -> ModuleCall {
        ModuleCall { seq, processor, leaf, guest, operands, status }
    }
}

impl From<PageOwner> for Answer {
    fn from(owner: PageOwner) -> Answer {
        Answer::Owner(owner.page_type, owner.tdr, owner.size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_survives_the_way() {
        for when in [FaultWhen::Nth(2), FaultWhen::First(1), FaultWhen::From(3), FaultWhen::Every(7), FaultWhen::Always]
        {
            let fault = ModuleFault {
                level: Some(1),
                page: Some(0x5000),
                effect: FaultEffect::After,
                ..ModuleFault::always(29, 0x8000_0200_0000_0092).when(when).at(0x1_0000_0000)
            };
            let line = serde_json::to_string(&Question::AddFault(Fault::from(&fault))).unwrap();
            let Ok(Question::AddFault(back)) = serde_json::from_str(&line) else { panic!("{line}") };
            assert_eq!(ModuleFault::from(back), fault);
        }
    }
}
