//! From statements to actions.

use super::args::{self, Args};
use super::ast::{
    Action, Call, ExitCause, Fixture, Interrupt, Lock, LockMode, LockObject, Lp, PageKind, Position, Script, Setup,
    Side, Statement,
};
use super::error::{Complaint, ScriptError};
use super::expect::{Expectation, exit_reason};
use super::expr::{self, Expr, is_name};
use super::lex::{self, RawStatement};
use super::parse_fault::fault;
use super::parse_guest::{guest, hold};
use super::parse_look::{host, look};
use crate::sim::tdx_module::leaf::SEAMCALL_LEAVES;
use crate::sim::tdx_module::{Reg, Switches};

/// Every word a statement can begin with.
pub const KEYWORDS: [&str; 28] = [
    "test",
    "setup",
    "page",
    "range",
    "gigapage",
    "shared",
    "td",
    "vcpu",
    "let",
    "call",
    "hold",
    "release",
    "guest",
    "enter",
    "exit",
    "interrupt",
    "lock",
    "unlock",
    "fault",
    "switch",
    "expect-invariants",
    "invariants",
    "rdmd",
    "sept",
    "look",
    "host",
    "advance",
    "repeat",
];

/// Reads a script. `file` is only named in messages.
///
/// # Errors
/// The first mistake: a malformed statement, an unknown leaf, register or name.
pub fn parse(file: &str, text: &str) -> Result<Script, ScriptError> {
    let mut statements = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let number = index + 1;
        let parsed = lex::statements(line).and_then(|raw| line_of(raw, number));
        statements.extend(parsed.map_err(|complaint| complaint.at(file, number))?);
    }
    Ok(Script { file: file.to_string(), statements })
}

fn line_of(raw: Vec<RawStatement>, line: usize) -> Result<Vec<Statement>, Complaint> {
    let mut statements = Vec::new();
    let mut raw = raw.into_iter();
    while let Some(first) = raw.next() {
        let mut statement = statement(first, line)?;
        if let Action::Repeat(_, _, body) = &mut statement.action {
            body.extend(line_of(raw.by_ref().collect(), line)?);
        }
        statements.push(statement);
    }
    Ok(statements)
}

fn statement(raw: RawStatement, line: usize) -> Result<Statement, Complaint> {
    let args = Args::new(raw.words)?;
    if args.keyword() == "repeat" {
        let action = repeat(args, raw.expectation, line, &raw.text)?;
        return Ok(Statement { line, text: raw.text, action, expectation: None });
    }
    let expectation = raw.expectation.as_deref().map(Expectation::parse).transpose()?;
    Ok(Statement { line, text: raw.text, action: action(args)?, expectation })
}

fn repeat(mut args: Args, expectation: Option<String>, line: usize, text: &str) -> Result<Action, Complaint> {
    const EXAMPLE: &str = "repeat 512 i call TDH.MEM.PAGE.AUG rcx=i*4K rdx=tdr r8=r+i*4K -> 0";
    let count = Expr::parse(&args.needed("a count", EXAMPLE)?)?;
    let mut name = None;
    while let Some(word) = args.peek_bare() {
        if KEYWORDS.contains(&word.to_ascii_lowercase().as_str()) {
            break;
        }
        let word = word.trim_end_matches(':').to_string();
        args.bare();
        if word.is_empty() || word == "as" {
            continue;
        }
        name = Some(new_name(&word)?);
    }
    let words = args.rest();
    if words.is_empty() {
        return Err(Complaint::new("`repeat` repeats nothing", format!("write {EXAMPLE}")));
    }
    let body = statement(RawStatement { words, expectation, text: text.to_string() }, line)?;
    Ok(Action::Repeat(count, name, vec![body]))
}

fn action(mut args: Args) -> Result<Action, Complaint> {
    let keyword = args.keyword();
    match keyword.as_str() {
        "test" => {
            let name = args.needed("a name", "test T62")?;
            args.rest();
            return Ok(Action::Test(name));
        }
        "setup" => return setup(args),
        "call" | "seamcall" => {
            let point = args.text(&["hold"]);
            let call = call(&mut args)?;
            return Ok(match point {
                Some(point) => Action::Hold(call, Some(point)),
                None => Action::Call(call),
            });
        }
        "hold" => return hold(args),
        "guest" | "tdcall" => return guest(args, &keyword).map(Action::Guest),
        "lock" => return Ok(Action::Lock(lock(args)?)),
        "unlock" => return Ok(Action::Unlock(lock(args)?)),
        "fault" | "inject" => return fault(args),
        "rdmd" | "sept" | "look" => return look(args, &keyword).map(Action::Look),
        "host" => return host(args).map(Action::Host),
        _ => {}
    }
    let (action, example) = match keyword.as_str() {
        "page" => (pages(&mut args, PageKind::Free)?, "page p"),
        "shared" => (pages(&mut args, PageKind::Shared)?, "shared s"),
        "range" => (pages(&mut args, PageKind::Range2M)?, "range r"),
        "gigapage" => (pages(&mut args, PageKind::Range1G)?, "gigapage g"),
        "td" => {
            let name = new_name(&args.needed("a name", "td B setup=S2")?)?;
            let level = match args.text(&["setup", "fixture"]).or_else(|| args.bare()) {
                Some(text) => Some(fixture(&text)?),
                None => None,
            };
            (Action::Td(name, level), "td B setup=S2")
        }
        "vcpu" => {
            let name = new_name(&args.needed("a name", "vcpu W td=B")?)?;
            (Action::Vcpu(name, args.expr(&["td", "vm"])?), "vcpu W td=B")
        }
        "let" => (let_name(&mut args)?, "let n=4K"),
        "release" => {
            let by = match args.lp()? {
                Some(lp) => Some(lp),
                None => args.peek_bare().and_then(|word| args::lp(word).ok()),
            };
            args.bare();
            (Action::Release(by), "release lp1 -> 0")
        }
        "enter" => {
            let vcpu = Expr::parse(&args.needed("a vCPU", "enter V lp=lp0")?)?;
            (Action::Enter(vcpu, args.lp()?), "enter V lp=lp0")
        }
        "exit" => {
            let vcpu = Expr::parse(&args.needed("a vCPU", "exit V triple-fault")?)?;
            let cause = match args.text(&["reason"]).or_else(|| args.bare()) {
                Some(text) => exit_cause(&text)?,
                None => ExitCause::Interrupt,
            };
            (Action::Exit(vcpu, cause), "exit V triple-fault")
        }
        "interrupt" => {
            const EXAMPLE: &str = "interrupt on lp=lp1";
            let after = args.expr(&["after"])?;
            let position = match args.peek_bare() {
                None if after.is_some() => Position::On,
                _ => args.position(EXAMPLE)?,
            };
            (Action::Interrupt(Interrupt { position, lp: args.lp()?, after }), EXAMPLE)
        }
        "switch" => {
            let name = switch_name(&args.needed("a name", "switch dpamt on")?)?;
            (Action::Switch(name, args.position("switch dpamt on")?), "switch dpamt on")
        }
        "expect-invariants" => (Action::ExpectInvariants, "expect-invariants"),
        "invariants" => (Action::Invariants(args.position("invariants off")?), "invariants off"),
        "advance" => (Action::Advance(duration(&args.needed("a duration", "advance 1s")?)?), "advance 1s"),
        _ => {
            return Err(Complaint::new(
                format!("`{keyword}` is no statement"),
                format!("begin with one of {}", KEYWORDS.join(", ")),
            ));
        }
    };
    args.finish(example)?;
    Ok(action)
}

/// One page for every name.
fn pages(args: &mut Args, kind: PageKind) -> Result<Action, Complaint> {
    let kind = if args.flag("shared") { PageKind::Shared } else { kind };
    let mut names = vec![new_name(&args.needed("a name", "page p")?)?];
    while let Some(name) = args.bare() {
        names.push(new_name(&name)?);
    }
    Ok(Action::Page(names, kind))
}

/// A name a statement makes.
pub(super) fn new_name(text: &str) -> Result<String, Complaint> {
    if is_name(text) && Reg::from_name(text).is_none() {
        return Ok(text.to_string());
    }
    Err(Complaint::new(
        format!("`{text}` cannot be a name"),
        "write a letter, then letters, digits, _ or . , and no register's name",
    ))
}

fn let_name(args: &mut Args) -> Result<Action, Complaint> {
    let mut pairs = args.pairs().into_iter();
    let (Some((name, value)), None) = (pairs.next(), pairs.next()) else {
        return Err(Complaint::new("`let` needs one name and its value", "write let n=4K"));
    };
    Ok(Action::Let(new_name(&name)?, Expr::parse(&value)?))
}

fn fixture(text: &str) -> Result<Fixture, Complaint> {
    Ok(match text.to_ascii_lowercase().as_str() {
        "none" => Fixture::None,
        "ready" | "s0" => Fixture::Ready,
        "created" => Fixture::Created,
        "keyed" | "keys" => Fixture::Keyed,
        "tdcs" => Fixture::Tdcs,
        "s1" => Fixture::S1,
        "built" => Fixture::Built,
        "s2" => Fixture::S2,
        _ => {
            return Err(Complaint::new(
                format!("`{text}` is no fixture"),
                "write one of none, ready, created, keyed, tdcs, S1, built, S2",
            ));
        }
    })
}

/// Options of `setup` that are values; the others are switches.
pub(super) const SETUP_OPTIONS: [&str; 7] =
    ["packages", "lps", "vcpus", "gpaw", "attributes", "max_vcpus", "config_flags"];

fn setup(mut args: Args) -> Result<Action, Complaint> {
    const EXAMPLE: &str = "setup S2 vcpus=2 dpamt=on";
    let fixture = fixture(&args.needed("a fixture", EXAMPLE)?)?;
    let mut setup = Setup { fixture, options: Vec::new(), switches: Vec::new() };
    for (name, value) in args.pairs() {
        let lower = name.to_ascii_lowercase().replace('-', "_");
        if SETUP_OPTIONS.contains(&lower.as_str()) {
            setup.options.push((lower, Expr::parse(&value)?));
        } else {
            setup.switches.push((switch_name(&name)?, args::position(&value, EXAMPLE)?));
        }
    }
    args.finish(EXAMPLE)?;
    Ok(Action::Setup(setup))
}

/// The switch of the TD's attributes, next to those of the module.
pub(super) const SEPT_VE_DISABLE: &str = "sept-ve-disable";

fn switch_name(text: &str) -> Result<String, Complaint> {
    let name = text.to_ascii_lowercase().replace('_', "-");
    let name = match name.as_str() {
        "erratum" | "pw-erratum" | "pw-mce" => "partial-write-erratum".to_string(),
        _ => name,
    };
    if name == SEPT_VE_DISABLE || Switches::NAMES.contains(&name.as_str()) {
        return Ok(name);
    }
    Err(Complaint::new(
        format!("`{text}` is no switch"),
        format!("write one of {}, {SEPT_VE_DISABLE}", Switches::NAMES.join(", ")),
    ))
}

/// A leaf by name, with or without its prefix, or by number.
pub(super) fn leaf_number(text: &str) -> Result<u16, Complaint> {
    if let Some(number) = expr::number(text) {
        return u16::try_from(number)
            .map_err(|_| Complaint::new(format!("leaf {text} does not fit in 16 bits"), "use rax= for a whole RAX"));
    }
    SEAMCALL_LEAVES
        .iter()
        .find(|leaf| {
            leaf.name.eq_ignore_ascii_case(text)
                || leaf.name.strip_prefix("TDH.").is_some_and(|name| name.eq_ignore_ascii_case(text))
        })
        .map(|leaf| leaf.number)
        .ok_or_else(|| {
            Complaint::new(
                format!("`{text}` is no SEAMCALL leaf"),
                "write a name such as TDH.MEM.PAGE.AUG, or a leaf number",
            )
        })
}

/// Input registers: every pair that is left.
pub(super) fn registers(args: &mut Args) -> Result<Vec<(Reg, Expr)>, Complaint> {
    let mut regs: Vec<(Reg, Expr)> = Vec::new();
    for (name, value) in args.pairs() {
        let Some(reg) = Reg::from_name(&name) else {
            return Err(Complaint::new(
                format!("`{name}` is no register"),
                "write rax, rbx, rcx, rdx, rsi, rdi, rbp or r8 to r15, or version= or lp=",
            ));
        };
        if regs.iter().any(|(known, _)| *known == reg) {
            return Err(Complaint::new(format!("`{name}` is given twice"), "write each register once"));
        }
        regs.push((reg, Expr::parse(&value)?));
    }
    Ok(regs)
}

/// The leaf and registers of a call.
pub(super) fn call(args: &mut Args) -> Result<Call, Complaint> {
    const EXAMPLE: &str = "call TDH.MEM.PAGE.AUG rcx=0x0 rdx=tdr r8=p";
    let rax = args.expr(&["rax"])?;
    let leaf = match (&rax, args.bare()) {
        (_, Some(text)) => leaf_number(&text)?,
        (Some(_), None) => 0,
        (None, None) => return Err(Complaint::new("`call` needs a leaf", format!("write {EXAMPLE}"))),
    };
    let version = args.expr(&["version", "v"])?;
    let lp = args.lp()?;
    let regs = registers(args)?;
    if let Some(word) = args.bare() {
        return Err(Complaint::new(format!("`call` does not know `{word}`"), format!("write {EXAMPLE}")));
    }
    Ok(Call { leaf, version, rax, regs, lp })
}

fn exit_cause(text: &str) -> Result<ExitCause, Complaint> {
    Ok(match text.to_ascii_lowercase().as_str() {
        "mc" | "#mc" | "machine-check" => ExitCause::MachineCheck,
        "triple-fault" | "2" => ExitCause::TripleFault,
        "hlt" | "12" => ExitCause::Hlt,
        "interrupt" | "external-interrupt" | "1" => ExitCause::Interrupt,
        other => match exit_reason(other).or_else(|| expr::number(other)).map(u32::try_from) {
            Some(Ok(number)) => ExitCause::Other(number),
            _ => {
                return Err(Complaint::new(
                    format!("`{text}` is no reason to leave a guest"),
                    "write interrupt, nmi, hlt, triple-fault, machine-check, or a VMX exit reason",
                ));
            }
        },
    })
}

fn lock(mut args: Args) -> Result<Lock, Complaint> {
    const EXAMPLE: &str = "lock sept-tree exclusive by=lp1";
    let name = args.needed("what to lock", EXAMPLE)?;
    let gpa = args.expr(&["gpa"])?;
    let level = args.expr(&["level", "lvl"])?.unwrap_or(Expr::Number(0));
    let page = args.expr(&["page", "pa", "hpa"])?;
    let td = args.expr(&["td"])?;
    let object = match name.to_ascii_lowercase().replace('_', "-").as_str() {
        "sept-tree" | "tree" | "sept" => LockObject::SeptTree,
        "sept-entry" | "entry" => match gpa {
            Some(gpa) => LockObject::SeptEntry { gpa, level },
            None => {
                return Err(Complaint::new("`sept-entry` needs gpa=", "write lock sept-entry gpa=0x0 level=0 by=lp1"));
            }
        },
        "td-epoch" | "epoch" => LockObject::TdEpoch,
        "op-state" => LockObject::OpState,
        "kot" => LockObject::Kot,
        "ket" => LockObject::Ket,
        "wbcache" => LockObject::Wbcache,
        "sys" => LockObject::Sys,
        "tdr" => LockObject::Pamt {
            page: td.clone().unwrap_or_else(|| Expr::Name("tdr".to_string())),
            level: Expr::Number(0),
        },
        "tdvpr" => {
            LockObject::Pamt { page: page.unwrap_or_else(|| Expr::Name("tdvpr".to_string())), level: Expr::Number(0) }
        }
        "pamt" | "page" => match page.map(Ok).or_else(|| args.bare().map(|word| Expr::parse(&word))) {
            Some(page) => LockObject::Pamt { page: page?, level },
            None => return Err(Complaint::new("`pamt` needs page=", "write lock pamt page=p level=0 by=lp1")),
        },
        _ => {
            return Err(Complaint::new(
                format!("`{name}` is no lock"),
                "write one of sept-tree, sept-entry, td-epoch, op-state, kot, ket, wbcache, sys, tdr, tdvpr, pamt",
            ));
        }
    };
    let side = if args.flag("guest") { Side::Guest } else { Side::Host };
    let mode = match args.bare().map(|word| word.to_ascii_lowercase()).as_deref() {
        None | Some("exclusive" | "ex") => LockMode::Exclusive,
        Some("shared" | "sh") => LockMode::Shared,
        Some(other) => {
            return Err(Complaint::new(format!("`{other}` is no lock mode"), "write shared or exclusive"));
        }
    };
    let lp = args.lp()?.unwrap_or(Lp(1));
    args.finish(EXAMPLE)?;
    Ok(Lock { object, mode, td, lp, side })
}

/// A duration in nanoseconds.
fn duration(text: &str) -> Result<u64, Complaint> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let unit = match &text[end..] {
        "ns" => Some(1),
        "us" => Some(1_000),
        "ms" => Some(1_000_000),
        "s" => Some(1_000_000_000),
        "m" | "min" => Some(60_000_000_000),
        _ => None,
    };
    unit.and_then(|unit: u64| text[..end].parse::<u64>().ok()?.checked_mul(unit)).ok_or_else(|| {
        Complaint::new(format!("`{text}` is no duration"), "write a number with ns, us, ms or s, such as 1s")
    })
}
