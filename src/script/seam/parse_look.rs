//! `rdmd`, `sept`, `look` and `host`.

use super::args::Args;
use super::ast::{HostAccess, HostAccessKind, Look};
use super::error::Complaint;
use super::expr::{self, Expr};

pub(super) fn look(mut args: Args, keyword: &str) -> Result<Look, Complaint> {
    let (look, example) = match keyword {
        "rdmd" => {
            let page = args.needed_expr(&["page", "hpa"], "a page", "rdmd p -> type=REG, owner=tdr")?;
            (Look::Rdmd(page, args.expr(&["level", "lvl"])?), "rdmd p -> type=REG, owner=tdr")
        }
        "sept" => {
            const EXAMPLE: &str = "sept gpa=0x0 level=0 -> MAPPED";
            let gpa = args.needed_expr(&["gpa"], "an address", EXAMPLE)?;
            let level = args.expr(&["level", "lvl"])?.unwrap_or(Expr::Number(0));
            let td = match args.text(&["td"]).or_else(|| args.bare()) {
                Some(td) => Some(Expr::parse(&td)?),
                None => None,
            };
            (Look::Sept { gpa, level, td }, EXAMPLE)
        }
        _ => {
            const EXAMPLE: &str = "look td, look vcpu V, look hkid 1, look sys or look line p";
            let object = args.needed("what to look at", EXAMPLE)?;
            let look = match object.to_ascii_lowercase().as_str() {
                "td" => Look::Td(args.bare().map(|word| Expr::parse(&word)).transpose()?),
                "vcpu" => Look::Vcpu(args.needed_expr(&["vcpu"], "a vCPU", "look vcpu V")?),
                "hkid" => Look::Hkid(args.needed_expr(&["hkid"], "a key id", "look hkid 1")?),
                "sys" => Look::Sys,
                "line" => {
                    let page = args.needed_expr(&["page", "pa"], "a page", "look line p offset=64")?;
                    Look::Line(at_offset(page, args.expr(&["offset", "at"])?))
                }
                _ => {
                    return Err(Complaint::new(format!("`look` does not know `{object}`"), format!("write {EXAMPLE}")));
                }
            };
            (look, EXAMPLE)
        }
    };
    args.finish(example)?;
    Ok(look)
}

fn at_offset(page: Expr, offset: Option<Expr>) -> Expr {
    match offset {
        Some(offset) => Expr::Binary(expr::Binary::Add, Box::new(page), Box::new(offset)),
        None => page,
    }
}

pub(super) fn host(mut args: Args) -> Result<HostAccess, Complaint> {
    const EXAMPLE: &str = "host write p partial offset=8 value=1";
    let verb = args.needed("read, write, zero, pattern, flush or evict", EXAMPLE)?.to_ascii_lowercase();
    let partial = args.flag("partial");
    let full = args.flag("full") || args.flag("line");
    let kind = match verb.as_str() {
        "read" => HostAccessKind::Read,
        "write" if partial || !full => HostAccessKind::WritePartial,
        "write" | "movdir64b" => HostAccessKind::WriteLine,
        "zero" | "clear" => HostAccessKind::WritePage,
        "pattern" => HostAccessKind::Pattern,
        "flush" => HostAccessKind::Flush,
        "evict" => HostAccessKind::Evict,
        _ => {
            return Err(Complaint::new(
                format!("the host cannot `{verb}` memory"),
                "write host read, write, movdir64b, zero, pattern, flush or evict, then a page",
            ));
        }
    };
    let page = args.needed_expr(&["page", "pa"], "a page", EXAMPLE)?;
    let pa = at_offset(page, args.expr(&["offset", "at"])?);
    let value = args.expr(&["value"])?;
    args.finish(EXAMPLE)?;
    Ok(HostAccess { kind, pa, value })
}
