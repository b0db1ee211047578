//! The SEAMCALL leaves, a file for each family (TDX module spec 5).

use super::call::{Call, Stop};
use super::dispatch::LeafResult;
use super::leaf::Leaf;
use super::module::Module;
use super::operand::Operand;
use super::status::invalid;

/// Whether the leaf returns error information in RCX and RDX, which it zeroes first (TDX module spec 3.4).
pub(crate) fn zeroes_error_info(leaf: Leaf) -> bool {
    use Leaf::*;
    matches!(
        leaf,
        MemSeptAdd
            | MemSeptRemove
            | MemSeptRd
            | MemPageAdd
            | MemPageAug
            | MemPageRemove
            | MemPageRelocate
            | MemPagePromote
            | MemPageDemote
            | MemRangeBlock
            | MemRangeUnblock
            | MemRd
            | MemWr
            | MrExtend
    )
}

/// Runs a leaf that passed the dispatcher.
pub(crate) fn run(module: &mut Module, call: &mut Call, leaf: Leaf) -> LeafResult {
    if zeroes_error_info(leaf) {
        (call.regs.rcx, call.regs.rdx) = (0, 0);
    }
    let _ = module;
    Err(Stop::Fail(invalid(Operand::RAX)))
}
