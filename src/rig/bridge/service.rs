//! Requests of the kernel, answered by the module.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use super::guest::{Cpu, Payload, Stop};
use super::mailbox::{self, Mailbox};
use super::platform::platform;
use super::ram::Ram;
use super::timing::{Last, Timing};
use super::{Listener, Notice};
use crate::sim::tdx_module::guest::TdExit;
use crate::sim::tdx_module::{Generation, Leaf, LpId, Module, Outcome, Regs, Switches};

/// Steps of a guest in the doorbell's thread, before its CPU's thread goes on.
const SHORT_STAY: u32 = 256;
/// Steps under one hold of the module's lock.
const STEPS: u32 = 64;
/// Bit of RAX that makes a SEAMCALL one for P-SEAMLDR.
const SEAMLDR: u64 = 1 << 63;
/// TDX_SEAMCALL_VMFAILINVALID: what the kernel makes of VMfailInvalid, the answer of a CPU without a P-SEAMLDR.
const VMFAILINVALID: u64 = 0x8000_FF00_FFFF_0000;
/// Calls that the trace keeps.
const TRACE: usize = 1 << 16;

/// The module and the guests that it runs.
pub struct World {
    /// The module.
    pub module: Module,
    /// Guests outside of their vCPUs' stays, by TDVPR.
    guests: BTreeMap<u64, Payload>,
    timing: Timing,
    last: Vec<Option<Last>>,
}

/// A vCPU that a CPU's thread is to run.
struct Stay {
    tdvpr: u64,
    payload: Payload,
}

/// A CPU of the kernel under test.
#[derive(Default)]
struct Processor {
    stay: Mutex<Option<Stay>>,
    wake: Condvar,
    /// Whether a request of it is being served.
    busy: AtomicBool,
}

/// Where the kernel's mailboxes are.
#[derive(Clone, Copy, Debug)]
struct Mailboxes {
    first: u64,
    count: u32,
}

/// What all threads share.
pub struct Service {
    ram: Ram,
    cpus: u32,
    mailboxes: OnceLock<Mailboxes>,
    world: Mutex<Option<World>>,
    waiting: AtomicU32,
    processors: Vec<Processor>,
    stop: AtomicBool,
    listener: Mutex<Option<Listener>>,
    start: Instant,
}

/// Why the kernel is not served any more.
pub type Broken = String;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Service {
    pub fn new(ram: Ram, cpus: u32, listener: Listener) -> io::Result<Service> {
        Ok(Service {
            ram,
            cpus,
            mailboxes: OnceLock::new(),
            world: Mutex::new(None),
            waiting: AtomicU32::new(0),
            processors: std::iter::repeat_with(Processor::default).take(cpus as usize).collect(),
            stop: AtomicBool::new(false),
            listener: Mutex::new(Some(listener)),
            start: Instant::now(),
        })
    }

    /// Ends every thread that waits for a guest.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        for processor in &self.processors {
            drop(lock(&processor.stay));
            processor.wake.notify_all();
        }
    }

    /// Whether it is to end.
    pub fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    pub fn notify(&self, notice: Notice) {
        if let Some(listener) = &*lock(&self.listener) {
            listener(notice);
        }
    }

    /// The doorbell is closed: nobody is told anything any more.
    pub fn hang_up(&self) {
        lock(&self.listener).take();
    }

    /// What calls took so far.
    pub fn timing(&self) -> Timing {
        self.with(|world| world.timing.clone()).unwrap_or_default()
    }

    /// Does something with the module; `None` before the kernel has said hello.
    pub fn with<R>(&self, action: impl FnOnce(&mut World) -> R) -> Option<R> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let mut world = lock(&self.world);
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        let now = self.start.elapsed().as_nanos() as u64;
        world.as_mut().map(|world| {
            world.module.set_clock_ns(now);
            action(world)
        })
    }

    /// The kernel has said where its mailboxes are: the module is there from now on, with a processor for each.
    pub fn hello(&self, first: u64, count: u32) -> Result<(), Broken> {
        if count == 0 || count > self.cpus {
            return Err(format!("it announces {count} mailboxes on a machine with {} CPUs", self.cpus));
        }
        if !first.is_multiple_of(mailbox::SIZE) || !self.ram.contains(first, u64::from(count) * mailbox::SIZE) {
            return Err(format!(
                "it announces {count} mailboxes at {first:#x}, which is not page-aligned memory of the machine"
            ));
        }
        let memory = self.ram.for_module().map_err(|error| format!("the RAM cannot be mapped: {error}"))?;
        let mut module = Module::new(platform(count, &self.ram), memory);
        // KVM gives TDH.VP.INIT the x2APIC id, which is version 1 of the leaf.
        module.set_switches(Switches { generation: Generation::Newer, ..Switches::default() });
        module.trace_mut().set_capacity(TRACE);
        let last = vec![None; count as usize];
        *lock(&self.world) = Some(World { module, guests: BTreeMap::new(), timing: Timing::default(), last });
        if self.mailboxes.set(Mailboxes { first, count }).is_err() {
            return Err("it announces its mailboxes twice".to_owned());
        }
        self.notify(Notice::Hello { cpus: count });
        Ok(())
    }

    /// How many mailboxes there are.
    pub fn mailbox_count(&self) -> u32 {
        self.mailboxes.get().map_or(0, |mailboxes| mailboxes.count)
    }

    pub fn mailbox(&self, cpu: u32) -> Option<Mailbox<'_>> {
        let mailboxes = self.mailboxes.get().filter(|mailboxes| cpu < mailboxes.count)?;
        Some(Mailbox::new(&self.ram, mailboxes.first + u64::from(cpu) * mailbox::SIZE))
    }

    /// Whether a request of the CPU is being served.
    pub fn busy(&self, cpu: u32) -> bool {
        self.processors[cpu as usize].busy.load(Ordering::Acquire)
    }

    /// Answers the request in a CPU's mailbox, or has its guest run.
    pub fn serve(&self, cpu: u32) -> Result<(), Broken> {
        let Some(mailbox) = self.mailbox(cpu) else { return Err(format!("CPU {cpu} has no mailbox")) };
        let at = Instant::now();
        let processor = &self.processors[cpu as usize];
        processor.busy.store(true, Ordering::Release);
        let mut regs = mailbox.registers();
        let input = regs;
        if input.rax & SEAMLDR != 0 {
            regs.rax = VMFAILINVALID;
            self.answer(cpu, &mailbox, &regs);
            return Ok(());
        }
        let leaf = input.rax as u16;
        let outcome = self.with(|world| {
            let outcome = world.module.seamcall(LpId(cpu), &mut regs);
            if leaf == Leaf::VpInit.number() {
                // A page that was another vCPU's before.
                world.guests.remove(&(input.rcx & !0xfff));
            }
            let now = Last { at, leaf };
            let last = world.last[cpu as usize].replace(now);
            if leaf != Leaf::VpEnter.number() {
                world.timing.add(last, now, at.elapsed(), leaf == Leaf::MrExtend.number());
            }
            outcome.map(|outcome| {
                let tdvpr = world.module.running(LpId(cpu)).unwrap_or(0);
                let entered = outcome == Outcome::Entered;
                let payload = entered.then(|| world.guests.remove(&tdvpr).unwrap_or_default());
                payload.map(|payload| Stay { tdvpr, payload })
            })
        });
        match outcome {
            None => Err("it calls before it says hello".to_owned()),
            Some(Err(error)) => Err(format!("CPU {cpu}: {error}")),
            Some(Ok(None)) => {
                self.answer(cpu, &mailbox, &regs);
                Ok(())
            }
            Some(Ok(Some(mut stay))) => {
                match self.run(cpu, &mailbox, &mut stay, Some(SHORT_STAY))? {
                    Some(exit) => self.leave(cpu, &mailbox, stay, &exit),
                    None => {
                        *lock(&processor.stay) = Some(stay);
                        processor.wake.notify_one();
                    }
                }
                Ok(())
            }
        }
    }

    fn answer(&self, cpu: u32, mailbox: &Mailbox<'_>, regs: &Regs) {
        self.processors[cpu as usize].busy.store(false, Ordering::Release);
        mailbox.answer(regs);
    }

    fn leave(&self, cpu: u32, mailbox: &Mailbox<'_>, stay: Stay, exit: &TdExit) {
        self.with(|world| world.guests.insert(stay.tdvpr, stay.payload));
        self.answer(cpu, mailbox, &exit.regs);
    }

    /// Runs a guest until its exit, or for so many steps.
    fn run(
        &self,
        cpu: u32,
        mailbox: &Mailbox<'_>,
        stay: &mut Stay,
        limit: Option<u32>,
    ) -> Result<Option<TdExit>, Broken> {
        let mut steps = 0;
        while limit.is_none_or(|limit| steps < limit) && !self.stopping() {
            let turn = self.with(|world| self.turn(&mut world.module, cpu, mailbox, stay));
            match turn {
                None => return Err("its guest runs without a module".to_owned()),
                Some(Ok(None)) => steps += STEPS,
                Some(Ok(Some(exit))) => return Ok(Some(exit)),
                Some(Err(why)) => return Err(format!("CPU {cpu}: {why}")),
            }
            // Everyone who waits for the module goes first.
            while self.waiting.load(Ordering::Relaxed) > 0 && !self.stopping() {
                std::thread::yield_now();
            }
        }
        Ok(None)
    }

    fn turn(
        &self,
        module: &mut Module,
        cpu: u32,
        mailbox: &Mailbox<'_>,
        stay: &mut Stay,
    ) -> Result<Option<TdExit>, Broken> {
        for _ in 0..STEPS {
            if mailbox.interrupt() {
                return module.kick_by_smi(LpId(cpu)).map(Some).map_err(|error| error.to_string());
            }
            match stay.payload.step(&mut Cpu::new(module, LpId(cpu), stay.tdvpr)) {
                Ok(()) => {}
                Err((Stop::Exit(exit), remark)) => {
                    if let Some(remark) = remark {
                        self.notify(Notice::Remark(remark));
                    }
                    return Ok(Some(*exit));
                }
                Err((Stop::Lost(error), _)) => return Err(error.to_string()),
                Err((Stop::Exception(_), _)) => return Err("a guest's exception went astray".to_owned()),
            }
        }
        Ok(None)
    }
}

/// The thread of a CPU: runs its guests' longer stays.
pub fn run_guests(service: &Service, cpu: u32) {
    let processor = &service.processors[cpu as usize];
    loop {
        let mut stay = {
            let mut slot = lock(&processor.stay);
            loop {
                if service.stopping() {
                    return;
                }
                match slot.take() {
                    Some(stay) => break stay,
                    None => slot = processor.wake.wait(slot).unwrap_or_else(PoisonError::into_inner),
                }
            }
        };
        let Some(mailbox) = service.mailbox(cpu) else { return };
        let result =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| service.run(cpu, &mailbox, &mut stay, None)));
        match result {
            Ok(Ok(Some(exit))) => service.leave(cpu, &mailbox, stay, &exit),
            Ok(Ok(None)) => return,
            Ok(Err(why)) => return service.notify(Notice::Failed(why)),
            Err(_) => return service.notify(Notice::Failed(format!("the thread of CPU {cpu} panicked"))),
        }
    }
}
