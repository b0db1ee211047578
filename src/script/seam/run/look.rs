//! Looking at the machine, and the host's hand in its memory.

use std::fmt::Write as _;

use super::super::ast::{HostAccess, HostAccessKind, Look};
use super::super::error::Complaint;
use super::super::expect::Exception;
use super::super::expr::Expr;
use super::call::default_lp;
use super::outcome::{Field, Kind, Outcome};
use super::{Ran, Runner, Stop};
use crate::sim::tdx_module::memory::PAGE_SIZE;
use crate::sim::tdx_module::pamt::PageType;
use crate::sim::tdx_module::vcpu::LastExit;
use crate::sim::tdx_module::{Leaf, MAX_PA, Outcome as LeafOutcome, Regs};

const LINE: u64 = 64;

/// Refuses an address no 8 bytes of memory can have.
fn reachable(pa: u64) -> Result<(), Complaint> {
    if pa.is_multiple_of(8) && pa < MAX_PA {
        return Ok(());
    }
    Err(Complaint::new(format!("no memory is at {pa:#x}"), "write a multiple of 8 below 1<<52"))
}

/// A level of the Secure EPT.
pub(super) fn sept_level(level: u64) -> Result<u8, Complaint> {
    match u8::try_from(level) {
        Ok(level @ 0..=4) => Ok(level),
        _ => Err(Complaint::new(
            format!("there is no level {level}"),
            "write level=0 for 4K to level=4 for the root of 5 levels",
        )),
    }
}

/// What is looked at, for a mismatch.
pub(super) fn subject(look: &Look) -> &'static str {
    match look {
        Look::Rdmd(..) => "TDH.PHYMEM.PAGE.RDMD",
        Look::Sept { .. } => "sept",
        Look::Td(_) => "look td",
        Look::Vcpu(_) => "look vcpu",
        Look::Hkid(_) => "look hkid",
        Look::Sys => "look sys",
        Look::Line(_) => "look line",
    }
}

impl Runner<'_> {
    pub(super) fn look(&mut self, look: &Look) -> Ran {
        match look {
            Look::Rdmd(page, level) => {
                let page = self.value(page)?;
                let level = level.as_ref().map(|level| self.value(level)).transpose()?.unwrap_or(0);
                self.rdmd(page | level)
            }
            Look::Sept { gpa, level, td } => {
                let (gpa, level) = (self.value(gpa)?, self.value(level)?);
                let tdr = self.tdr(td.as_ref())?;
                self.sept(tdr, gpa, level)
            }
            Look::Td(td) => {
                let tdr = self.tdr(td.as_ref())?;
                self.td(tdr)
            }
            Look::Vcpu(vcpu) => {
                let tdvpr = self.value(vcpu)?;
                self.vcpu_state(tdvpr)
            }
            Look::Hkid(hkid) => {
                let hkid = self.value(hkid)?;
                let kot = self.machine()?.module.kot();
                let entry = u16::try_from(hkid).ok().and_then(|hkid| kot.entry(hkid));
                let entry = entry
                    .ok_or_else(|| Complaint::new(format!("there is no key id {hkid}"), "write look hkid hkid"))?;
                let (name, number) = (entry.state.name(), entry.state as u64);
                Ok(Outcome::new(Kind::State(name, number))
                    .field("state", Field::Named(number, name))
                    .number("wbinvd", entry.wbinvd_bitmap))
            }
            Look::Sys => {
                let state = self.machine()?.module.sys_state();
                let (name, number) = (state.name(), state as u64);
                Ok(Outcome::new(Kind::State(name, number)).field("state", Field::Named(number, name)))
            }
            Look::Line(pa) => {
                let pa = self.value(pa)?;
                reachable(pa)?;
                let tag = self.machine()?.module.line_tag(pa);
                let word = self.machine()?.module.memory().read_u64(pa & !7);
                Ok(Outcome::new(Kind::Done)
                    .number("hkid", tag.hkid)
                    .number("td", tag.td)
                    .number("poison", tag.poison)
                    .number("value", word))
            }
        }
    }

    fn tdr(&mut self, td: Option<&Expr>) -> Result<u64, Stop> {
        match td {
            Some(td) => self.value(td),
            None => self.value(&Expr::Name("tdr".to_string())),
        }
    }

    fn rdmd(&mut self, operand: u64) -> Ran {
        let module = &mut self.machine()?.module;
        let lp = default_lp(module, None)?;
        let mut regs = Regs { rax: u64::from(Leaf::PhymemPageRdmd.number()), rcx: operand, ..Regs::default() };
        let status = match module.seamcall(lp, &mut regs)? {
            LeafOutcome::Done(status) => status,
            LeafOutcome::Entered | LeafOutcome::Held => return Ok(Outcome::with_regs(Kind::Held, regs)),
        };
        if !status.is_zero() {
            return Ok(Outcome::with_regs(Kind::Status(status.0), regs));
        }
        let name = u8::try_from(regs.rcx).ok().and_then(PageType::from_number).map_or("unknown", PageType::name);
        Ok(Outcome::with_regs(Kind::State(name, regs.rcx), regs)
            .field("type", Field::Named(regs.rcx, name))
            .number("owner", regs.rdx)
            .number("size", regs.r8)
            .number("bepoch", regs.r9))
    }

    fn sept(&mut self, tdr: u64, gpa: u64, level: u64) -> Ran {
        let module = &self.machine()?.module;
        let level = sept_level(level)?;
        let (reached, at, entry) = match module.sept_entry(tdr, gpa, level) {
            Some(Ok(entry)) => (true, level, entry),
            Some(Err((stopped, entry))) => (false, stopped, entry),
            None => {
                return Err(Complaint::new("this TD has no Secure EPT", "write `sept gpa=0x0 level=0 td=tdr`").into());
            }
        };
        let number = entry.state().map_or(0, |state| u64::from(state.public()));
        let name = entry.state().map_or("no state", |state| state.name());
        let counter = if at > 0 && entry.is_leaf() { entry.accept_counter() } else { 0 };
        Ok(Outcome::new(Kind::State(if reached { name } else { "NOT_REACHED" }, number))
            .field("state", Field::Named(number, name))
            .number("raw", entry.unlocked().0)
            .number("entry", entry.architectural())
            .number("info", entry.info(at))
            .number("level", at)
            .number("hpa", entry.hpa(at))
            .number("leaf", entry.is_leaf())
            .number("counter", counter)
            .number("locked", entry.is_locked())
            .number("priority", entry.host_priority()))
    }

    fn td(&mut self, tdr: u64) -> Ran {
        let Some(td) = self.machine()?.module.td(tdr) else {
            return Err(Complaint::new(format!("there is no TD at {tdr:#x}"), "write look td tdr").into());
        };
        let mut mrtd = String::new();
        for byte in td.mrtd {
            let _ = write!(mrtd, "{byte:02x}");
        }
        let (op, life) = (td.op_state, td.lifecycle);
        Ok(Outcome::new(Kind::State(op.name(), op as u64))
            .number("chldcnt", td.chldcnt)
            .number("epoch", td.epoch)
            .number("refcount0", td.refcount[0])
            .number("refcount1", td.refcount[1])
            .field("op", Field::Named(op as u64, op.name()))
            .field("life", Field::Named(life as u64, life.name()))
            .number("fatal", td.fatal)
            .number("hkid", td.hkid)
            .number("num_vcpus", td.num_vcpus)
            .number("num_assoc_vcpus", td.num_assoc_vcpus)
            .number("num_tdcx", td.tdcx_pa.len() as u64)
            .field("mrtd", Field::Text(mrtd)))
    }

    fn vcpu_state(&mut self, tdvpr: u64) -> Ran {
        let Some(vcpu) = self.machine()?.module.vcpu(tdvpr) else {
            return Err(Complaint::new(format!("there is no vCPU at {tdvpr:#x}"), "write look vcpu V").into());
        };
        let (name, number) = (vcpu.state.name(), vcpu.state as u64);
        let last_exit = match vcpu.last_exit {
            LastExit::None => (0, "NONE"),
            LastExit::AsyncFault => (1, "ASYNC_FAULT"),
            LastExit::AsyncTrap => (2, "ASYNC_TRAP"),
            LastExit::Tdvmcall => (3, "TDVMCALL"),
        };
        Ok(Outcome::new(Kind::State(name, number))
            .field("state", Field::Named(number, name))
            .number("epoch", vcpu.epoch)
            .number("assoc", vcpu.assoc.map_or(u64::MAX, |lp| u64::from(lp.0)))
            .number("index", vcpu.index)
            .number("rip", vcpu.rip)
            .field("last_exit", Field::Named(last_exit.0, last_exit.1)))
    }

    pub(super) fn host(&mut self, access: &HostAccess) -> Ran {
        let pa = self.value(&access.pa)?;
        let value = access.value.as_ref().map(|value| self.value(value)).transpose()?.unwrap_or(0);
        let module = &mut self.machine()?.module;
        let page = pa & !(PAGE_SIZE - 1);
        reachable(pa)?;
        match access.kind {
            HostAccessKind::Read => {
                return Ok(match module.host_read(pa) {
                    Ok(value) => Outcome::new(Kind::Value(value)).number("value", value),
                    Err(_) => Outcome::new(Kind::Exception(Exception::MachineCheck)),
                });
            }
            HostAccessKind::WritePartial => module.host_write(pa, value),
            HostAccessKind::WriteLine => module.host_write_line(pa & !(LINE - 1), &[value; 8]),
            HostAccessKind::WritePage => module.host_reset(page, PAGE_SIZE),
            HostAccessKind::Pattern => {
                for line in 0..PAGE_SIZE / LINE {
                    let byte = |at: u64| (line * LINE + at) as u8;
                    let words = std::array::from_fn(|word| {
                        u64::from_le_bytes(std::array::from_fn(|i| byte(word as u64 * 8 + i as u64)))
                    });
                    module.host_write_line(page + line * LINE, &words);
                }
            }
            HostAccessKind::Flush => module.host_flush(page, PAGE_SIZE),
            HostAccessKind::Evict => while module.evict_line(0) {},
        }
        Ok(Outcome::new(Kind::Done))
    }
}
