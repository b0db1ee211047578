//! A VM: what keeps it alive, whether it is dead, and its state.

use super::super::{RangeMap, World};
use super::tdx::{Td, TdState};
use super::{Root, Slots};
use crate::machine::{Errno, VmType};
use std::collections::{BTreeMap, BTreeSet};

/// Identifies a VM in the model.
pub type VmId = u64;

/// Counters of a vCPU that KVM_GET_STATS_FD shows.
#[derive(Clone, Copy, Debug, Default)]
pub struct VcpuStats {
    /// `pf_taken`.
    pub taken: u64,
    /// `pf_fixed`.
    pub fixed: u64,
    /// `pf_emulate`.
    pub emulated: u64,
    /// `exits`.
    pub exits: u64,
    /// `mmio_exits`.
    pub mmio_exits: u64,
    /// `hypercalls`.
    pub hypercalls: u64,
}

/// A VM.
#[derive(Debug)]
pub struct Vm {
    /// Its type.
    pub vm_type: VmType,
    /// Whether the VM's own descriptor is open.
    pub open: bool,
    /// Open vCPUs with their counters.
    pub vcpus: BTreeMap<u32, VcpuStats>,
    /// vCPU ids that were ever created: an id is not free again while the VM lives.
    pub vcpu_ids: Vec<u32>,
    /// vCPUs that the payload serves.
    pub payload_vcpus: Option<u32>,
    /// Memslots.
    pub slots: Slots,
    /// KVM_MEMORY_ATTRIBUTE_* of gfns.
    pub attributes: RangeMap<u64>,
    /// The page tables; of a TD those of shared memory.
    pub direct: Root,
    /// The mirror of a TD's S-EPT.
    pub mirror: Root,
    /// MMIO entries of a TD's shared page tables, by gfn: made by an access or a pre-fault where no slot is, and taken
    /// away only by a pre-fault that maps the page. The guest gets #VE by such an entry and KVM no fault, so that a slot that
    /// is made there later is not seen.
    pub mmio: BTreeSet<u64>,
    /// The TD, once it is initialised.
    pub td: Option<Td>,
    /// First gfns of the 2M blocks that stay at 4K because the guest accepted a part of them (GUEST_INHIBIT).
    pub huge_inhibited: BTreeSet<u64>,
    /// mmu_invalidate_seq.
    pub invalidate_seq: u64,
    /// Ranges of gfns that are being invalidated (mmu_invalidate_in_progress).
    pub invalidations: Vec<(u64, u64)>,
    /// vm_bugged: KVM_BUG_ON fired.
    pub bugged: bool,
    /// vm_dead: every ioctl fails with EIO.
    pub dead: bool,
    /// Hypercalls that exit to user space.
    pub exit_hypercalls: u64,
    /// Quirks that were disabled.
    pub disabled_quirks: u64,
    /// KVM_CAP_SPLIT_IRQCHIP was enabled.
    pub split_irqchip: bool,
}

impl Vm {
    /// A new VM.
    pub fn new(vm_type: VmType) -> Vm {
        Vm {
            vm_type,
            open: true,
            vcpus: BTreeMap::new(),
            vcpu_ids: Vec::new(),
            payload_vcpus: None,
            slots: Slots::default(),
            attributes: RangeMap::default(),
            direct: Root::default(),
            mirror: Root::default(),
            mmio: BTreeSet::new(),
            td: None,
            huge_inhibited: BTreeSet::new(),
            invalidate_seq: 0,
            invalidations: Vec::new(),
            bugged: false,
            dead: false,
            exit_hypercalls: 0,
            disabled_quirks: 0,
            split_irqchip: false,
        }
    }

    /// kvm_vm_bugged(): dead, and by a bug.
    pub fn bug(&mut self) {
        self.bugged = true;
        self.dead = true;
    }

    /// Number of address spaces: one with private memory, else a second one for SMM.
    pub fn address_spaces(&self) -> u32 {
        if self.vm_type.has_private_memory() { 1 } else { 2 }
    }

    /// Whether private and shared memory have page tables of their own.
    pub fn has_mirror(&self) -> bool {
        self.vm_type == VmType::Tdx
    }

    /// Present leaf entries of a size, over all roots.
    pub fn mapped_leaves(&self, order: super::super::host::Order) -> u64 {
        self.direct.leaves(order) + self.mirror.leaves(order)
    }

    /// Checks what must hold between operations.
    ///
    /// # Errors
    /// What does not, in words.
    pub fn check(&self) -> Result<(), String> {
        if self.bugged && !self.dead {
            return Err("a bugged VM is not dead".into());
        }
        if !self.has_mirror() && !self.mirror.is_empty() {
            return Err("a VM without S-EPT has mirror entries".into());
        }
        Ok(())
    }
}

impl World {
    /// KVM_CREATE_VM.
    ///
    /// # Errors
    /// EINVAL for a type that the kernel does not offer.
    pub fn create_vm(&mut self, vm_type: VmType) -> Result<VmId, Errno> {
        if self.profile.kernel.vm_types() & 1 << vm_type.number() == 0 {
            return Err(Errno::EINVAL);
        }
        let id = self.fresh_id();
        self.vms.insert(id, Vm::new(vm_type));
        Ok(id)
    }

    /// close(2) of the VM's own descriptor.
    pub fn close_vm(&mut self, id: VmId) {
        if let Some(vm) = self.vms.get_mut(&id) {
            vm.open = false;
        }
        self.drop_vm_if_unused(id);
    }

    /// KVM_CREATE_VCPU.
    ///
    /// # Errors
    /// EIO, EINVAL for an id above the limit, EEXIST. Then, of a TD: EIO unless it is exactly INITIALIZED (the payload's vCPUs were
    /// made before it was finalised, and are handed out once), then EINVAL without a split irqchip.
    pub fn create_vcpu(&mut self, id: VmId, vcpu: u32) -> Result<(), Errno> {
        let vm = self.live_vm(id)?;
        if vcpu >= 4096 {
            return Err(Errno::EINVAL);
        }
        if vm.vcpu_ids.contains(&vcpu) {
            return Err(Errno::EEXIST);
        }
        if vm.has_mirror() {
            let td = vm.td.as_ref().ok_or(Errno::EIO)?;
            let waits = vm.payload_vcpus.is_some() && td.vcpus.contains_key(&vcpu);
            if !waits && td.state != TdState::Initialized {
                return Err(Errno::EIO);
            }
            if !vm.split_irqchip {
                return Err(Errno::EINVAL);
            }
        }
        vm.vcpu_ids.push(vcpu);
        vm.vcpus.insert(vcpu, VcpuStats::default());
        Ok(())
    }

    /// close(2) of a vCPU's descriptor.
    pub fn close_vcpu(&mut self, id: VmId, vcpu: u32) {
        if let Some(vm) = self.vms.get_mut(&id) {
            vm.vcpus.remove(&vcpu);
        }
        self.drop_vm_if_unused(id);
    }

    /// Destroys a VM that no descriptor of its own, of a vCPU or of a guest_memfd holds any more.
    pub fn drop_vm_if_unused(&mut self, id: VmId) {
        let Some(vm) = self.vms.get(&id) else { return };
        if vm.open || !vm.vcpus.is_empty() || self.gmem.files.values().any(|file| file.vm == id) {
            return;
        }
        if self.tdx.is_some() {
            self.tdx_destroy(id);
        }
        self.vms.remove(&id);
    }
}
