//! `fault`: plans of faults.

use super::args::Args;
use super::ast::{Action, Fault, FaultMoment};
use super::error::Complaint;
use super::expect::StatusPattern;
use super::expr::{self, Binary, Expr};
use crate::sim::tdx_module::fault::Preset;
use crate::sim::tdx_module::{AnyLeaf, Leaf};

const EXAMPLE: &str = "fault leaf=TDH.MEM.PAGE.REMOVE nth=1 status=TDX_OPERAND_BUSY|SEPT_TREE when=before";

pub(super) fn fault(mut args: Args) -> Result<Action, Complaint> {
    if args.flag("off") || args.flag("clear") || args.flag("none") {
        args.finish("fault off")?;
        return Ok(Action::FaultOff);
    }
    let mut fault = Fault { every: args.flag("every"), ..Fault::default() };
    if args.text(&["every"]).is_some() {
        fault.every = true;
    }
    fault.preset = args.bare().or_else(|| args.text(&["preset"])).map(|name| preset(&name)).transpose()?;
    fault.leaf = args.text(&["leaf"]).map(|text| leaf(&text)).transpose()?;
    fault.nth = args.expr(&["nth"])?;
    fault.times = args.expr(&["times", "count"])?;
    fault.percent = args.text(&["probability", "p"]).map(|text| percent(&text)).transpose()?;
    fault.seed = args.expr(&["seed"])?;
    fault.gpa = args.expr(&["gpa"])?;
    fault.level = args.expr(&["level", "lvl"])?;
    fault.td = args.expr(&["td", "tdr"])?;
    fault.page = args.expr(&["page", "hpa"])?;
    fault.status = args.text(&["status"]).map(|text| status(&text)).transpose()?;
    fault.when = match args.text(&["when"]).map(|text| text.to_ascii_lowercase()).as_deref() {
        None | Some("instead" | "before") => FaultMoment::InsteadOfEffect,
        Some("after") => FaultMoment::AfterEffect,
        Some(other) => {
            return Err(Complaint::new(
                format!("`when={other}` is no moment of a fault"),
                "write when=instead (nothing is done) or when=after (all is done, the status is returned all the same)",
            ));
        }
    };
    args.finish(EXAMPLE)?;
    if fault.preset.is_none() && fault.status.is_none() {
        return Err(Complaint::new(
            "`fault` has neither a preset nor status=",
            format!("write {EXAMPLE}, or fault busy-once"),
        ));
    }
    if fault.leaf.is_none() && fault.preset == Some(Preset::Stuck) {
        fault.leaf = Some(AnyLeaf::Seamcall(Leaf::MemPageRemove));
    }
    if fault.leaf.is_none() {
        return Err(Complaint::new("`fault` has no leaf=", format!("write {EXAMPLE}")));
    }
    Ok(Action::Fault(fault))
}

fn preset(name: &str) -> Result<Preset, Complaint> {
    Preset::from_name(&name.to_ascii_lowercase().replace('_', "-")).ok_or_else(|| {
        let names = Preset::ALL.map(Preset::name).join(", ");
        Complaint::new(format!("`{name}` is no preset of faults"), format!("write one of {names}"))
    })
}

fn leaf(text: &str) -> Result<AnyLeaf, Complaint> {
    let numbered = expr::number(text).and_then(|number| u16::try_from(number).ok()).and_then(Leaf::from_number);
    numbered.map(AnyLeaf::Seamcall).or_else(|| AnyLeaf::from_name(text)).ok_or_else(|| {
        Complaint::new(
            format!("`{text}` is no leaf the module models"),
            "write a name such as TDH.MEM.PAGE.REMOVE or TDG.MEM.PAGE.ACCEPT",
        )
    })
}

fn percent(text: &str) -> Result<u8, Complaint> {
    let wrong = || {
        Complaint::new(
            format!("`{text}` is no probability"),
            "write a part of 1 such as 0.25, or a percentage such as 25%",
        )
    };
    let number = match text.strip_suffix('%') {
        Some(percent) => percent.parse::<f64>().map_err(|_| wrong())?,
        None => text.parse::<f64>().map_err(|_| wrong())? * 100.0,
    };
    if (0.0..=100.0).contains(&number) { Ok(number.round() as u8) } else { Err(wrong()) }
}

fn status(text: &str) -> Result<Expr, Complaint> {
    Ok(match StatusPattern::parse(text)? {
        Some(StatusPattern::Upper(upper)) => Expr::Number(u64::from(upper) << 32),
        Some(StatusPattern::Full(full)) => Expr::Number(full),
        Some(StatusPattern::Both(upper, details)) => {
            Expr::Binary(Binary::Or, Box::new(Expr::Number(u64::from(upper) << 32)), Box::new(details))
        }
        None => Expr::parse(text)?,
    })
}
