//! The VM that tests of in-place conversion start with: [`InPlaceVm`].

use std::sync::Arc;

use super::{Context, Side, TestResult};
use crate::machine::{
    ConvertError, Errno, Exit, Facility, GuestMemfd, GuestOp, Mapping, MemoryRegion, PAGE_SIZE, PageAccount,
    Protection, Vcpu, Vm, VmConfig, VmType,
};
use crate::sim::profile::{GMEM_FLAG_HUGETLB, GMEM_HUGE_SHIFT};
use crate::uapi::kvm::{GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP};
use crate::{claim_eq, claim_matches, claim_ok, fail, skip};

/// The folios that a file is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FolioSize {
    /// Base pages: what every guest_memfd has.
    Base,
    /// 2 MiB, as posted with the 1G guest_memfd series.
    Pmd,
    /// 1 GiB.
    Pud,
}

impl FolioSize {
    /// Bytes.
    pub fn bytes(self) -> u64 {
        match self {
            FolioSize::Base => PAGE_SIZE,
            FolioSize::Pmd => 2 << 20,
            FolioSize::Pud => 1 << 30,
        }
    }

    fn creation_flags(self) -> u64 {
        match self {
            FolioSize::Base => 0,
            FolioSize::Pmd | FolioSize::Pud => {
                GMEM_FLAG_HUGETLB | u64::from(self.bytes().trailing_zeros()) << GMEM_HUGE_SHIFT
            }
        }
    }
}

/// A VM with one vCPU and one slot, whose file keeps the attribute of every page and is mapped by the host.
///
/// The fields are the handles, so that a test can close any of them when it wants.
pub struct InPlaceVm {
    /// The vCPU.
    pub vcpu: Box<dyn Vcpu>,
    /// The whole file in the host process.
    pub map: Box<dyn Mapping>,
    /// The file, bound from its first byte.
    pub gmem: Arc<dyn GuestMemfd>,
    /// The VM.
    pub vm: Arc<dyn Vm>,
    /// Bytes in the file and in the slot.
    pub len: u64,
}

impl InPlaceVm {
    /// The guest-physical address of the slot: 4 GiB.
    pub const GPA: u64 = 1 << 32;
    /// The id of the slot.
    pub const SLOT: u32 = 1;

    /// A file of `pages` base pages, all of which begin on `side`.
    ///
    /// # Errors
    /// The failure of any call, or a skip when the machine does not convert in place.
    pub fn new(cx: &Context, pages: u64, side: Side) -> TestResult<InPlaceVm> {
        InPlaceVm::of_folios(cx, FolioSize::Base, pages * PAGE_SIZE, side)
    }

    /// A file of `len` bytes in folios of `size`.
    ///
    /// # Errors
    /// The failure of any call, or a skip when the machine does not convert in place or has no such folios.
    pub fn of_folios(cx: &Context, size: FolioSize, len: u64, side: Side) -> TestResult<InPlaceVm> {
        cx.require(Facility::InPlaceConversion)?;
        cx.require(Facility::GmemMmap)?;
        let vm = claim_ok!(cx.machine().create_vm(VmConfig::Payload { vcpus: 2 }));
        let shared = if side == Side::Shared { GUEST_MEMFD_FLAG_INIT_SHARED } else { 0 };
        let gmem = match vm.create_guest_memfd(len, GUEST_MEMFD_FLAG_MMAP | shared | size.creation_flags()) {
            Err(Errno::EINVAL) if size != FolioSize::Base => {
                skip!(UnsupportedKernel, "no guest_memfd of {size:?} folios; the 1G guest_memfd series is not merged")
            }
            created => claim_ok!(created),
        };
        let map = claim_ok!(gmem.map(len, 0, Protection::SHARED_RW));
        let region = MemoryRegion::new(InPlaceVm::SLOT, InPlaceVm::GPA, len).at(map.addr());
        claim_ok!(vm.set_memory_region(&region.bound_to(&*gmem, 0)));
        let vcpu = claim_ok!(vm.create_vcpu(0));
        Ok(InPlaceVm { vcpu, map, gmem, vm, len })
    }

    /// The guest-physical address with which the guest reaches byte `at` as memory of `side`.
    pub fn gpa(&self, at: u64, side: Side) -> u64 {
        let bit = if side == Side::Shared { self.vm.shared_bit() } else { 0 };
        (InPlaceVm::GPA + at) | bit
    }

    /// KVM_SET_MEMORY_ATTRIBUTES2.
    ///
    /// # Errors
    /// What it returns.
    pub fn try_convert(&self, at: u64, len: u64, side: Side) -> Result<(), ConvertError> {
        self.gmem.convert(at, len, side.attributes())
    }

    /// KVM_SET_MEMORY_ATTRIBUTES2, which has to succeed.
    ///
    /// # Errors
    /// When it fails.
    pub fn convert(&self, at: u64, len: u64, side: Side) -> TestResult {
        claim_ok!(self.try_convert(at, len, side), "{len:#x} bytes at {at:#x} become {side:?}");
        Ok(())
    }

    /// Claims that a conversion to private is refused because of the page at `page`: EAGAIN, with its offset.
    ///
    /// # Errors
    /// When it is not.
    pub fn claim_busy(&self, at: u64, len: u64, page: u64) -> TestResult {
        let busy = ConvertError { errno: Errno::EAGAIN, offset: Some(page) };
        let result = self.try_convert(at, len, Side::Private);
        claim_eq!(result, Err(busy), "{len:#x} bytes at {at:#x} to private while the page at {page:#x} is held");
        Ok(())
    }

    /// The guest stores 8 bytes.
    ///
    /// # Errors
    /// When it cannot.
    pub fn guest_write(&mut self, at: u64, side: Side, value: u64) -> TestResult {
        let gpa = self.gpa(at, side);
        claim_matches!(self.vcpu.execute(GuestOp::write_u64(gpa, value)), Exit::Done(_), "a {side:?} store at {at:#x}");
        Ok(())
    }

    /// Claims what the guest loads.
    ///
    /// # Errors
    /// When it loads something else, or cannot load.
    pub fn claim_guest(&mut self, at: u64, side: Side, value: u64) -> TestResult {
        let gpa = self.gpa(at, side);
        claim_eq!(self.vcpu.execute(GuestOp::read_u64(gpa)), Exit::Done(value), "the guest's {side:?} load at {at:#x}");
        Ok(())
    }

    /// The guest stores `byte` over a range.
    ///
    /// # Errors
    /// When it cannot.
    pub fn guest_fill(&mut self, at: u64, len: u64, side: Side, byte: u8) -> TestResult {
        let fill = GuestOp::Fill { gpa: self.gpa(at, side), len, byte };
        claim_matches!(self.vcpu.execute(fill), Exit::Done(_), "{side:?} stores over {len:#x} bytes at {at:#x}");
        Ok(())
    }

    /// Claims that the guest finds `byte` in every byte of a range.
    ///
    /// # Errors
    /// When it finds something else, or cannot load.
    pub fn claim_guest_range(&mut self, at: u64, len: u64, side: Side, byte: u8) -> TestResult {
        let check = GuestOp::Check { gpa: self.gpa(at, side), len, byte };
        claim_eq!(self.vcpu.execute(check), Exit::Done(0), "{byte:#x} to the guest in {len:#x} bytes at {at:#x}");
        Ok(())
    }

    /// Claims what the host loads.
    ///
    /// # Errors
    /// When it loads something else, or gets a signal.
    pub fn claim_host(&self, at: u64, value: u64) -> TestResult {
        claim_eq!(self.map.read_u64(at), Ok(value), "the host's load at {at:#x}");
        Ok(())
    }

    /// Claims that the host gets SIGBUS for a load.
    ///
    /// # Errors
    /// When it does not.
    pub fn claim_sigbus(&self, at: u64) -> TestResult {
        match self.map.read_u64(at) {
            Err(fault) if fault.signal == libc::SIGBUS => Ok(()),
            other => fail!("the host's load of private memory at {at:#x} is SIGBUS: it was {other:x?}"),
        }
    }

    /// Claims that the page at `at` is of `side`, by what the host gets.
    ///
    /// # Errors
    /// When it is not.
    pub fn claim_side(&self, at: u64, side: Side) -> TestResult {
        match side {
            Side::Private => self.claim_sigbus(at),
            Side::Shared => {
                claim_ok!(self.map.read_u64(at), "the host's load of shared memory at {at:#x}");
                Ok(())
            }
        }
    }

    /// The references to the page at `at`.
    ///
    /// # Errors
    /// When the machine cannot tell, or there is no page.
    pub fn account(&self, cx: &Context, at: u64) -> TestResult<PageAccount> {
        match cx.machine().page_account(&*self.gmem, at)? {
            Some(account) => Ok(account),
            None => fail!("there is no page at {at:#x}"),
        }
    }

    /// Whether private memory keeps what it held when it changes sides: not in a TD, which accepts its pages zeroed.
    pub fn keeps_contents(cx: &Context) -> bool {
        cx.machine().spec().vm_type != VmType::Tdx
    }
}
