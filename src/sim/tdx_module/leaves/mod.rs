//! The SEAMCALL leaves, a file for each family (TDX module spec 5).

mod config;
mod debug;
mod demote;
mod dpamt;
mod enter;
mod metadata;
mod mng;
mod mr;
mod page;
mod page_move;
mod phymem;
mod promote;
mod range;
mod sept;
mod sys;
mod td_params;
mod teardown;
mod vp;

use super::call::Call;
use super::dispatch::LeafResult;
use super::leaf::Leaf;
use super::module::Module;

/// All ones: no page (TDX module spec 0).
pub(crate) const NULL_PA: u64 = u64::MAX;

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
    match leaf {
        Leaf::VpEnter => module.vp_enter(call),
        Leaf::MngAddcx => module.mng_addcx(call),
        Leaf::MemPageAdd => module.mem_page_add(call),
        Leaf::MemSeptAdd => module.mem_sept_add(call),
        Leaf::VpAddcx => module.vp_addcx(call),
        Leaf::MemPageRelocate => module.mem_page_relocate(call),
        Leaf::MemPageAug => module.mem_page_aug(call),
        Leaf::MemRangeBlock => module.mem_range_block(call),
        Leaf::MngKeyConfig => module.mng_key_config(call),
        Leaf::MngCreate => module.mng_create(call),
        Leaf::VpCreate => module.vp_create(call),
        Leaf::MngRd => module.mng_rd(call),
        Leaf::MemRd => module.mem_rd(call),
        Leaf::MemWr => module.mem_wr(call),
        Leaf::MemPageDemote => module.mem_page_demote(call),
        Leaf::MrExtend => module.mr_extend(call),
        Leaf::MrFinalize => module.mr_finalize(call),
        Leaf::VpFlush => module.vp_flush(call),
        Leaf::MngVpflushdone => module.mng_vpflushdone(call),
        Leaf::MngKeyFreeid => module.mng_key_freeid(call),
        Leaf::MngInit => module.mng_init(call),
        Leaf::VpInit => module.vp_init(call),
        Leaf::MemPagePromote => module.mem_page_promote(call),
        Leaf::PhymemPageRdmd => module.phymem_page_rdmd(call),
        Leaf::MemSeptRd => module.mem_sept_rd(call),
        Leaf::VpRd => module.vp_rd(call),
        Leaf::MngKeyReclaimid => super::dispatch::DONE,
        Leaf::PhymemPageReclaim => module.phymem_page_reclaim(call),
        Leaf::MemPageRemove => module.mem_page_remove(call),
        Leaf::MemSeptRemove => module.mem_sept_remove(call),
        Leaf::SysKeyConfig => module.sys_key_config(call),
        Leaf::SysInit => module.sys_init(call),
        Leaf::SysRd => module.sys_rd(call),
        Leaf::SysLpInit => module.sys_lp_init(call),
        Leaf::SysTdmrInit => module.sys_tdmr_init(call),
        Leaf::MemTrack => module.mem_track(call),
        Leaf::MemRangeUnblock => module.mem_range_unblock(call),
        Leaf::PhymemCacheWb => module.phymem_cache_wb(call),
        Leaf::PhymemPageWbinvd => module.phymem_page_wbinvd(call),
        Leaf::VpWr => module.vp_wr(call),
        Leaf::SysLpShutdown => module.sys_lp_shutdown(call),
        Leaf::SysConfig => module.sys_config(call),
        Leaf::SysShutdown => module.sys_shutdown(call),
        Leaf::PhymemPamtAdd => module.phymem_pamt_add(call),
        Leaf::PhymemPamtRemove => module.phymem_pamt_remove(call),
    }
}
