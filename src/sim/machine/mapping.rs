//! The mapping handle: accesses of the host process to its memory.

use super::super::World;
use super::super::gmem::fault::Access;
use super::super::host::{AccessError, Cpu, Locking, Pfn, Poisoned};
use super::Shared;
use crate::machine::{Errno, HoldKind, HostFault, Mapping, PAGE_SIZE};
use std::any::Any;
use std::sync::Arc;

const SEGV_MAPERR: i32 = 1;
const SEGV_ACCERR: i32 = 2;
const BUS_ADRERR: i32 = 2;
const BUS_MCEERR_AR: i32 = 4;

/// A mapping of the host process; dropping it unmaps.
#[derive(Debug)]
pub(super) struct SimMapping {
    shared: Arc<Shared>,
    addr: u64,
    len: u64,
}

/// References to pages, dropped with it.
#[derive(Debug)]
struct Hold {
    shared: Arc<Shared>,
    id: u64,
    frames: Vec<Pfn>,
    kind: HoldKind,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.shared.with(|world| world.release_hold(self.id, &self.frames, self.kind));
    }
}

/// The signal that an access ends in.
fn signal(error: AccessError, offset: u64) -> HostFault {
    let (signal, code) = match error {
        AccessError::NoMapping => (libc::SIGSEGV, SEGV_MAPERR),
        AccessError::Forbidden => (libc::SIGSEGV, SEGV_ACCERR),
        AccessError::Bus | AccessError::OutOfMemory => (libc::SIGBUS, BUS_ADRERR),
        AccessError::Poisoned => (libc::SIGBUS, BUS_MCEERR_AR),
    };
    HostFault { signal, code, offset }
}

impl SimMapping {
    pub(super) fn boxed(shared: &Arc<Shared>, addr: u64, len: u64) -> Box<dyn Mapping> {
        Box::new(SimMapping { shared: shared.clone(), addr, len })
    }

    /// Calls `action` for each piece of a range that lies in one page, with its physical address, its offset from `at`
    /// and its length, until one answers something.
    fn pieces<R>(
        &self,
        at: u64,
        len: u64,
        access: Access,
        mut action: impl FnMut(&mut World, u64, u64, u64) -> Result<Option<R>, Poisoned>,
    ) -> Result<Option<R>, HostFault> {
        self.shared.with(|world| {
            let mut done = 0;
            while done < len {
                let addr = self.addr + at + done;
                let part = (PAGE_SIZE - addr % PAGE_SIZE).min(len - done);
                let pa = world.host_translate(addr, access, Cpu::Host).map_err(|error| signal(error, at + done))?;
                let found = action(world, pa, done, part).map_err(|_| signal(AccessError::Poisoned, at + done))?;
                if let Some(found) = found {
                    return Ok(Some(found));
                }
                done += part;
            }
            Ok(None)
        })
    }
}

impl Drop for SimMapping {
    fn drop(&mut self) {
        let end = self.addr + self.len.next_multiple_of(PAGE_SIZE);
        self.shared.with(|world| world.unmap_host(self.addr, end));
    }
}

impl Mapping for SimMapping {
    fn addr(&self) -> u64 {
        self.addr
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn read(&self, at: u64, buf: &mut [u8]) -> Result<(), HostFault> {
        let len = buf.len() as u64;
        self.pieces(at, len, Access::Read, |world, pa, done, part| {
            world.read_phys(pa, &mut buf[done as usize..(done + part) as usize])?;
            Ok(None::<()>)
        })?;
        Ok(())
    }

    fn write(&self, at: u64, data: &[u8]) -> Result<(), HostFault> {
        self.pieces(at, data.len() as u64, Access::Write, |world, pa, done, part| {
            world.write_phys(pa, &data[done as usize..(done + part) as usize])?;
            Ok(None::<()>)
        })?;
        Ok(())
    }

    fn fill(&self, at: u64, len: u64, byte: u8) -> Result<(), HostFault> {
        self.pieces(at, len, Access::Write, |world, pa, _, part| {
            world.fill_phys(pa, part, byte)?;
            Ok(None::<()>)
        })?;
        Ok(())
    }

    fn find_mismatch(&self, at: u64, len: u64, byte: u8) -> Result<Option<(u64, u8)>, HostFault> {
        self.pieces(at, len, Access::Read, |world, pa, done, part| {
            Ok(world.mismatch_phys(pa, part, byte)?.map(|(offset, found)| (at + done + offset, found)))
        })
    }

    fn advise(&self, at: u64, len: u64, advice: i32) -> Result<(), Errno> {
        self.shared.with(|world| world.advise(self.addr + at, len, advice))
    }

    fn protect(&self, at: u64, len: u64, prot: i32) -> Result<(), Errno> {
        self.shared.with(|world| world.protect_host(self.addr + at, len, prot))
    }

    fn lock(&self, at: u64, len: u64) -> Result<(), Errno> {
        self.shared.with(|world| world.lock_host(self.addr + at, len, Locking::Lock))
    }

    fn unlock(&self, at: u64, len: u64) -> Result<(), Errno> {
        self.shared.with(|world| world.lock_host(self.addr + at, len, Locking::Unlock))
    }

    fn resident(&self, at: u64, len: u64) -> Result<Vec<bool>, Errno> {
        self.shared.with(|world| world.resident(self.addr + at, len))
    }

    fn unmap_part(&self, at: u64, len: u64) -> Result<(), Errno> {
        self.shared.with(|world| {
            let end = world.host_range(self.addr + at, len)?;
            if len == 0 {
                return Err(Errno::EINVAL);
            }
            world.unmap_host(self.addr + at, end);
            Ok(())
        })
    }

    fn kernel_read(&self, at: u64) -> Result<u8, Errno> {
        let mut byte = [0];
        self.read(at, &mut byte).map(|()| byte[0]).map_err(|_| Errno::EFAULT)
    }

    fn hold(&self, at: u64, len: u64, kind: HoldKind) -> Result<Box<dyn Any + Send>, Errno> {
        let (id, frames) = self.shared.with(|world| {
            let id = world.fresh_id();
            world.hold(id, self.addr + at, len, kind).map(|frames| (id, frames))
        })?;
        Ok(Box::new(Hold { shared: self.shared.clone(), id, frames, kind }))
    }

    fn frame(&self, at: u64) -> Result<u64, Errno> {
        self.shared.with(|world| {
            let addr = self.addr + at;
            let pte = world.host.mm.pte(addr).filter(|pte| !pte.poisoned).ok_or(Errno::ENODATA)?;
            Ok(pte.pfn + addr / PAGE_SIZE % pte.order.pages())
        })
    }
}
