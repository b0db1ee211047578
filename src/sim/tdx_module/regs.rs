//! The registers a leaf reads and writes: sixteen general-purpose ones, and the XMM registers that TDG.VP.VMCALL can share.

use std::fmt;
use std::ops::{Index, IndexMut};

/// A general-purpose register, numbered as the instruction set and the TDVMCALL mask number it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Reg {
    Rax = 0,
    Rcx = 1,
    Rdx = 2,
    Rbx = 3,
    Rsp = 4,
    Rbp = 5,
    Rsi = 6,
    Rdi = 7,
    R8 = 8,
    R9 = 9,
    R10 = 10,
    R11 = 11,
    R12 = 12,
    R13 = 13,
    R14 = 14,
    R15 = 15,
}

impl Reg {
    /// All sixteen, by number.
    pub const ALL: [Reg; 16] = [
        Reg::Rax,
        Reg::Rcx,
        Reg::Rdx,
        Reg::Rbx,
        Reg::Rsp,
        Reg::Rbp,
        Reg::Rsi,
        Reg::Rdi,
        Reg::R8,
        Reg::R9,
        Reg::R10,
        Reg::R11,
        Reg::R12,
        Reg::R13,
        Reg::R14,
        Reg::R15,
    ];

    /// `rax`, `rcx`, ... `r15`.
    pub fn name(self) -> &'static str {
        const NAMES: [&str; 16] = [
            "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
            "r15",
        ];
        NAMES[self as usize]
    }

    /// The register called `name`, in either case.
    pub fn from_name(name: &str) -> Option<Reg> {
        Reg::ALL.into_iter().find(|reg| reg.name().eq_ignore_ascii_case(name))
    }
}

/// The sixteen general-purpose registers and the sixteen XMM registers.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs)]
pub struct Regs {
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rbx: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub xmm: [u128; 16],
}

impl Regs {
    /// Takes from `other` the registers that a TDG.VP.VMCALL mask selects: bits 15:0 general-purpose, 31:16 XMM.
    pub(crate) fn take_selected(&mut self, other: &Regs, mask: u64) {
        for reg in Reg::ALL.into_iter().filter(|reg| mask >> *reg as u64 & 1 == 1) {
            self[reg] = other[reg];
        }
        for n in (0..16).filter(|n| mask >> (16 + n) & 1 == 1) {
            self.xmm[n] = other.xmm[n];
        }
    }
}

impl Index<Reg> for Regs {
    type Output = u64;

    fn index(&self, reg: Reg) -> &u64 {
        match reg {
            Reg::Rax => &self.rax,
            Reg::Rcx => &self.rcx,
            Reg::Rdx => &self.rdx,
            Reg::Rbx => &self.rbx,
            Reg::Rsp => &self.rsp,
            Reg::Rbp => &self.rbp,
            Reg::Rsi => &self.rsi,
            Reg::Rdi => &self.rdi,
            Reg::R8 => &self.r8,
            Reg::R9 => &self.r9,
            Reg::R10 => &self.r10,
            Reg::R11 => &self.r11,
            Reg::R12 => &self.r12,
            Reg::R13 => &self.r13,
            Reg::R14 => &self.r14,
            Reg::R15 => &self.r15,
        }
    }
}

impl IndexMut<Reg> for Regs {
    fn index_mut(&mut self, reg: Reg) -> &mut u64 {
        match reg {
            Reg::Rax => &mut self.rax,
            Reg::Rcx => &mut self.rcx,
            Reg::Rdx => &mut self.rdx,
            Reg::Rbx => &mut self.rbx,
            Reg::Rsp => &mut self.rsp,
            Reg::Rbp => &mut self.rbp,
            Reg::Rsi => &mut self.rsi,
            Reg::Rdi => &mut self.rdi,
            Reg::R8 => &mut self.r8,
            Reg::R9 => &mut self.r9,
            Reg::R10 => &mut self.r10,
            Reg::R11 => &mut self.r11,
            Reg::R12 => &mut self.r12,
            Reg::R13 => &mut self.r13,
            Reg::R14 => &mut self.r14,
            Reg::R15 => &mut self.r15,
        }
    }
}

impl fmt::Debug for Regs {
    /// Only the registers that are not zero.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut list = f.debug_struct("Regs");
        for reg in Reg::ALL {
            if self[reg] != 0 {
                list.field(reg.name(), &format_args!("{:#x}", self[reg]));
            }
        }
        for (n, value) in self.xmm.iter().enumerate().filter(|(_, value)| **value != 0) {
            list.field(&format!("xmm{n}"), &format_args!("{value:#x}"));
        }
        list.finish_non_exhaustive()
    }
}
