//! One number for everything the module knows, to see that a call changed nothing (TDX module spec 15.3, invariant 8).

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};

use sha2::Digest;

use super::module::Module;
use super::pamt::PageType;
use super::regs::Reg;
use super::sept::{ENTRIES, SeptEntry};

impl Module {
    /// A digest of the state that leaves read and write: system, key table, PAMT, TDs, vCPUs, every Secure EPT, the processors' state.
    /// Lock words and host-priority requests are not part of it, nor are page contents, counters and the record of calls.
    pub fn fingerprint(&self) -> u64 {
        let mut hash = DefaultHasher::new();
        (self.sys.state, self.sys.global_hkid, self.sys.key_config_bitmap).hash(&mut hash);
        for entry in self.kot.entries() {
            (entry.state, entry.wbinvd_bitmap).hash(&mut hash);
        }
        let mut tables = Vec::new();
        self.pamt.visit(|level, pa, entry| {
            if entry.ty() != PageType::Nda {
                (level, pa, entry.ty(), entry.owner(), entry.bepoch).hash(&mut hash);
            }
            if entry.ty() == PageType::Ept {
                tables.push(pa);
            }
        });
        self.pamt.bitmap.hash(&mut hash);
        self.pamt.tdmrs().iter().for_each(|tdmr| tdmr.initialized_to.hash(&mut hash));
        for td in self.tds() {
            (td.tdr_pa, td.fatal, td.lifecycle, td.hkid, td.pkg_config_bitmap, &td.tdcx_pa).hash(&mut hash);
            (td.chldcnt, td.op_state, td.num_vcpus, td.num_assoc_vcpus, td.root_pa, td.root_level).hash(&mut hash);
            (td.attributes, td.xfam, td.max_vcpus, td.td_ctls, td.config_flags, td.notify_enables).hash(&mut hash);
            (td.epoch, td.refcount, td.measured_blocks, td.mrtd, td.rtmr, &td.vcpus).hash(&mut hash);
            td.measurement.clone().finalize().hash(&mut hash);
            tables.extend((td.root_pa != 0).then_some(td.root_pa));
        }
        for table in tables {
            for i in 0..ENTRIES {
                SeptEntry(self.memory.read_u64(table + 8 * i)).unlocked().hash(&mut hash);
            }
        }
        for vcpu in self.vcpus() {
            (vcpu.tdvpr_pa, vcpu.state, &vcpu.tdcx_pa, vcpu.epoch, vcpu.assoc, vcpu.index).hash(&mut hash);
            (vcpu.x2apic_id, vcpu.ve_info.valid, vcpu.rip, &vcpu.epf_list, vcpu.epf_count, &vcpu.fields)
                .hash(&mut hash);
            Reg::ALL.iter().for_each(|reg| vcpu.gpr[*reg].hash(&mut hash));
        }
        for lp in &self.lps {
            (lp.init_done, lp.last_tdvpr).hash(&mut hash);
        }
        hash.finish()
    }
}
