//! `guest` and `hold`.

use super::args::Args;
use super::ast::{AccessKind, Action, Guest, GuestOperation};
use super::error::Complaint;
use super::expr::{self, Binary, Expr};
use super::parse::{call, leaf_number, registers};
use crate::sim::tdx_module::leaf::TDCALL_LEAVES;
use crate::sim::tdx_module::{Reg, TdcallLeaf};

const EXAMPLE: &str = "guest V read gpa=0x0, or guest V accept gpa=0x0 level=0";

/// Words that hold a guest's TDCALL, which have no other number of registers than a page and its level.
fn tdcall_of(word: &str) -> Option<TdcallLeaf> {
    Some(match word {
        "accept" => TdcallLeaf::MemPageAccept,
        "release" => TdcallLeaf::MemPageRelease,
        "attr.rd" | "attr-rd" => TdcallLeaf::MemPageAttrRd,
        "attr.wr" | "attr-wr" => TdcallLeaf::MemPageAttrWr,
        "vmcall" => TdcallLeaf::VpVmcall,
        "veinfo" | "veinfo.get" => TdcallLeaf::VpVeinfoGet,
        "info" => TdcallLeaf::VpInfo,
        "rtmr.extend" | "rtmr-extend" => TdcallLeaf::MrRtmrExtend,
        _ => return None,
    })
}

fn tdcall_number(text: &str) -> Result<u16, Complaint> {
    if let Some(number) = expr::number(text) {
        return u16::try_from(number)
            .map_err(|_| Complaint::new(format!("leaf {text} does not fit in 16 bits"), "use rax= for a whole RAX"));
    }
    TDCALL_LEAVES
        .iter()
        .find(|leaf| {
            leaf.name.eq_ignore_ascii_case(text)
                || leaf.name.strip_prefix("TDG.").is_some_and(|name| name.eq_ignore_ascii_case(text))
        })
        .map(|leaf| leaf.number)
        .ok_or_else(|| {
            Complaint::new(
                format!("`{text}` is no TDCALL leaf"),
                "write a name such as TDG.MEM.PAGE.ACCEPT, or a leaf number",
            )
        })
}

/// `guest V OPERATION ..`, or `tdcall V LEAF ..`.
pub(super) fn guest(mut args: Args, keyword: &str) -> Result<Guest, Complaint> {
    let vcpu = Expr::parse(&args.needed("a vCPU", EXAMPLE)?)?;
    let operation = match keyword {
        "tdcall" => tdcall(&mut args)?,
        _ => {
            let verb = args.needed("an operation", EXAMPLE)?;
            operation(&verb, &mut args)?
        }
    };
    args.finish(EXAMPLE)?;
    Ok(Guest { vcpu, operation })
}

fn tdcall(args: &mut Args) -> Result<GuestOperation, Complaint> {
    let rax = args.expr(&["rax"])?;
    let leaf = match (args.bare(), &rax) {
        (Some(text), _) => tdcall_number(&text)?,
        (None, Some(_)) => 0,
        (None, None) => {
            return Err(Complaint::new("`tdcall` needs a leaf", "write guest V tdcall TDG.VP.INFO, or a leaf number"));
        }
    };
    Ok(GuestOperation::Tdcall { leaf, rax, regs: registers(args)? })
}

fn operation(verb: &str, args: &mut Args) -> Result<GuestOperation, Complaint> {
    let lower = verb.to_ascii_lowercase();
    if let Some(leaf) = tdcall_of(&lower).or_else(|| TdcallLeaf::from_name(verb)) {
        return page_call(leaf, args);
    }
    let kind = match lower.as_str() {
        "read" => AccessKind::Read,
        "write" => AccessKind::Write,
        "fetch" | "execute" => AccessKind::Fetch,
        "access" if args.flag("write") => AccessKind::Write,
        "access" if args.flag("fetch") => AccessKind::Fetch,
        "access" if args.flag("read") => AccessKind::Read,
        "access" => match args.text(&["kind"]).as_deref() {
            None => AccessKind::Touch,
            Some("read") => AccessKind::Read,
            Some("write") => AccessKind::Write,
            Some("fetch") => AccessKind::Fetch,
            Some(other) => {
                return Err(Complaint::new(
                    format!("`{other}` is no kind of access"),
                    "write kind=read, kind=write or kind=fetch",
                ));
            }
        },
        "tdcall" => return tdcall(args),
        "step" | "run" => return Ok(GuestOperation::Step),
        _ => {
            return Err(Complaint::new(
                format!("a guest cannot `{verb}`"),
                "write read, write, fetch, access, accept, release, attr.rd, attr.wr, vmcall, veinfo, info, tdcall or step",
            ));
        }
    };
    let gpa = args.needed_expr(&["gpa"], "an address", EXAMPLE)?;
    Ok(GuestOperation::Access { kind, gpa, value: args.expr(&["value"])? })
}

/// A TDCALL by its short name: gpa and level go into RCX, the rest are registers.
fn page_call(leaf: TdcallLeaf, args: &mut Args) -> Result<GuestOperation, Complaint> {
    let gpa = args.expr(&["gpa"])?;
    let level = args.expr(&["level", "lvl"])?;
    let attributes = args.expr(&["attributes", "attr"])?;
    let mut regs = registers(args)?;
    let rcx = match (gpa, level) {
        (Some(gpa), Some(level)) => Some(Expr::Binary(Binary::Or, Box::new(gpa), Box::new(level))),
        (gpa, level) => gpa.or(level),
    };
    for (reg, value) in [(Reg::Rcx, rcx), (Reg::Rdx, attributes)] {
        let Some(value) = value else { continue };
        if regs.iter().any(|(known, _)| *known == reg) {
            return Err(Complaint::new(
                format!("{} is given twice", reg.name()),
                "write either gpa= and level=, or rcx=",
            ));
        }
        regs.push((reg, value));
    }
    let needs_page = matches!(
        leaf,
        TdcallLeaf::MemPageAccept | TdcallLeaf::MemPageRelease | TdcallLeaf::MemPageAttrRd | TdcallLeaf::MemPageAttrWr
    );
    if needs_page && !regs.iter().any(|(reg, _)| *reg == Reg::Rcx) {
        return Err(Complaint::new(format!("{} needs gpa=", leaf.name()), "write guest V accept gpa=0x0 level=0"));
    }
    Ok(GuestOperation::Tdcall { leaf: leaf.number(), rax: None, regs })
}

/// `hold LEAF .. by=lp1 at=POINT`, or `hold V accept gpa=0 at=POINT`.
pub(super) fn hold(mut args: Args) -> Result<Action, Complaint> {
    let point = args.text(&["at", "point"]).map(|text| text.to_ascii_lowercase().replace('_', "-"));
    args.flag("guest");
    args.flag("call");
    let first = args.peek_bare().unwrap_or_default().to_string();
    if args.peek_bare().is_some() && leaf_number(&first).is_err() {
        let vcpu = Expr::parse(&args.needed("a leaf", EXAMPLE)?)?;
        let Some(verb) = args.bare() else {
            return Err(Complaint::new(
                format!("`{first}` is no SEAMCALL leaf"),
                "write hold TDH.MEM.PAGE.AUG .. by=lp1, or hold V accept gpa=0x0",
            ));
        };
        let operation = operation(&verb, &mut args)?;
        args.finish("hold V accept gpa=0x0 at=entry")?;
        return Ok(Action::HoldGuest(Guest { vcpu, operation }, point));
    }
    let call = call(&mut args)?;
    let registers = !call.regs.is_empty() || call.rax.is_some();
    Ok(if registers { Action::Hold(call, point) } else { Action::HoldNext(call.leaf, call.lp, point) })
}
