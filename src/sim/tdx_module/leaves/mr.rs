//! Measurement: MR.EXTEND, MR.FINALIZE, and what PAGE.ADD adds (TDX module spec 5.7, 5.8, 10.3).

use sha2::Digest;

use super::super::call::{Call, Stop};
use super::super::check::sept_fail;
use super::super::dispatch::{DONE, LeafResult};
use super::super::leaf::Leaf;
use super::super::lock::Mode;
use super::super::lp::HoldPoint;
use super::super::module::Module;
use super::super::operand::Operand;
use super::super::sept::{SeptOp, span, walk};
use super::super::state::OpState;
use super::super::status::{Code, invalid};
use super::super::td::Td;

/// Bytes one MR.EXTEND measures.
pub(super) const EXTEND_CHUNK: u64 = 256;

/// Feeds one 128-byte block: the operation's name, then its GPA at byte 16.
pub(super) fn measure_block(td: &mut Td, name: &str, gpa: u64) {
    let mut block = [0; 128];
    block[..name.len()].copy_from_slice(name.as_bytes());
    block[16..24].copy_from_slice(&gpa.to_le_bytes());
    td.measurement.update(block);
    td.measured_blocks += 1;
}

impl Module {
    pub(super) fn mr_extend(&mut self, call: &mut Call) -> LeafResult {
        let (gpa, tdr) = (call.input.rcx, call.input.rdx);
        self.explicit_tdr(call, tdr, Operand::RDX, Mode::Exclusive)?;
        self.td_state(call, tdr, Leaf::MrExtend, None)?;
        let td = self.td_ref(tdr)?;
        if !gpa.is_multiple_of(EXTEND_CHUNK) || !td.gpaw.is_private(gpa) {
            return Err(invalid(Operand::RCX).into());
        }
        let hkid = td.hkid;
        let at = walk::walk_to_leaf(&*self.memory, td.root_pa, td.root_level, gpa)
            .map_err(|stop| sept_fail(call, Code::EptEntryNotPresent, stop))?;
        if !self.sept_ref(tdr, gpa, at)?.state.allows(SeptOp::MrExtend) {
            return Err(Code::EptEntryNotPresent.into());
        }
        call.point(HoldPoint::Commit)?;
        let hpa = at.entry.hpa(at.level) + gpa % span(at.level);
        let mut chunk = [0; EXTEND_CHUNK as usize];
        for (n, bytes) in chunk.chunks_exact_mut(8).enumerate() {
            let word = self.read_as(hpa + 8 * n as u64, hkid).map_err(|_| Stop::from(Code::TdFatal));
            if word.is_err() {
                self.td_mut(tdr)?.fatal = true;
            }
            bytes.copy_from_slice(&word?.to_le_bytes());
        }
        let td = self.td_mut(tdr)?;
        measure_block(td, "MR.EXTEND", gpa);
        td.measurement.update(chunk);
        td.measured_blocks += 2;
        DONE
    }

    pub(super) fn mr_finalize(&mut self, call: &mut Call) -> LeafResult {
        let tdr = self.explicit_tdr(call, call.input.rcx, Operand::RCX, Mode::Exclusive)?;
        self.td_state(call, tdr, Leaf::MrFinalize, None)?;
        if self.td_ref(tdr)?.num_vcpus == 0 {
            return Err(Code::NoVcpus.into());
        }
        call.point(HoldPoint::Commit)?;
        let td = self.td_mut(tdr)?;
        td.mrtd = td.measurement.clone().finalize().into();
        td.op_state = OpState::Runnable;
        DONE
    }
}
