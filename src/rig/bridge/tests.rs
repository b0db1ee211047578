//! The bridge against a kernel that is played here: the mailboxes' rules, a TD's life, and what breaks the rules.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::mailbox::{ANSWERED, REQUEST, SIZE};
use super::ram::Ram;
use super::{Bridge, Notice};
use crate::guest::mailbox::{command, status, word};
use crate::guest::{image, layout};
use crate::inject::ModuleClient;
use crate::machine::{Errno, ModuleFault, TdxModule};
use crate::rig::init::module::Broker;
use crate::sim::tdx_module::td::TDCS_PAGES;
use crate::sim::tdx_module::vcpu::TDVPS_PAGES;
use crate::sim::tdx_module::{Code, Leaf, Reg, Regs, Status};

const RAM: u64 = 2 << 30;
const PAGE: u64 = 4096;
const CPUS: u32 = 2;
const MAILBOXES: u64 = 0x10_0000;
const PAMT: u64 = 1 << 30;
const PAMT_ROOM: u64 = 16 << 20;
/// Where host pages are taken from.
const PAGES: u64 = 64 << 20;
/// The host's side of the TD's mailbox.
const TD_MAILBOX: u64 = 0x20_0000;
const SHARED: u64 = 1 << 47;
/// SHARED_EPT_POINTER as Linux names it.
const SHARED_EPT_POINTER: u64 = 0x203C;
/// The management field of an NMI to inject.
const PEND_NMI: u64 = 0x20 << 56 | 11;
const PATIENCE: Duration = Duration::from_secs(60);

struct Kernel {
    ram: Ram,
    bell: UnixStream,
    notices: Receiver<Notice>,
    next_page: u64,
    tdr: u64,
    tdvpr: u64,
    channel: UnixStream,
    _bridge: Bridge,
}

impl Kernel {
    fn power_on() -> Kernel {
        let ram = Ram::new(RAM).unwrap();
        let own = Ram::of(ram.file().try_clone().unwrap(), RAM).unwrap();
        let (bell, doorbell) = UnixStream::pair().unwrap();
        let (channel, far) = UnixStream::pair().unwrap();
        let (sender, notices) = mpsc::channel();
        let bridge =
            Bridge::start(ram, CPUS, doorbell, far, Box::new(move |notice| drop(sender.send(notice)))).unwrap();
        Kernel { ram: own, bell, notices, next_page: PAGES, tdr: 0, tdvpr: 0, channel, _bridge: bridge }
    }

    /// The init's broker, at the other end of the channel.
    fn broker(&self) -> Arc<Broker> {
        Arc::new(Broker::new(File::from(OwnedFd::from(self.channel.try_clone().unwrap()))))
    }

    fn hello(&mut self, pa: u64, count: u32) {
        self.bell.write_all(b"GMT1").unwrap();
        self.bell.write_all(&pa.to_le_bytes()).unwrap();
        self.bell.write_all(&count.to_le_bytes()).unwrap();
    }

    /// What the kernel is told it did wrong.
    fn complaint(&self) -> String {
        loop {
            match self.notices.recv_timeout(PATIENCE).expect("a complaint") {
                Notice::Broken(why) => return why,
                Notice::Hello { .. } | Notice::Remark(_) => {}
                Notice::Failed(why) => panic!("{why}"),
            }
        }
    }

    fn set(&self, pa: u64, value: u64) {
        self.ram.word64(pa).unwrap().store(value, Ordering::SeqCst);
    }

    fn get(&self, pa: u64) -> u64 {
        self.ram.word64(pa).unwrap().load(Ordering::SeqCst)
    }

    fn state(&self, cpu: u32, state: u32) {
        self.ram.word32(MAILBOXES + u64::from(cpu) * SIZE).unwrap().store(state, Ordering::Release);
    }

    fn request(&mut self, cpu: u32, leaf: Leaf, registers: &[(Reg, u64)]) {
        let mailbox = MAILBOXES + u64::from(cpu) * SIZE;
        let mut regs = Regs { rax: leaf.number().into(), ..Regs::default() };
        registers.iter().for_each(|&(reg, value)| regs[reg] = value);
        Reg::ALL.into_iter().for_each(|reg| self.set(mailbox + 0x10 + 8 * reg as u64, regs[reg]));
        self.set(mailbox + 8, self.get(mailbox + 8) + 1);
        self.ram.word32(mailbox + 4).unwrap().store(0, Ordering::Relaxed);
        self.state(cpu, REQUEST);
        self.bell.write_all(&[cpu as u8]).unwrap();
    }

    fn answer(&self, cpu: u32) -> Regs {
        let mailbox = MAILBOXES + u64::from(cpu) * SIZE;
        let start = Instant::now();
        while self.ram.word32(mailbox).unwrap().load(Ordering::Acquire) != ANSWERED {
            assert!(start.elapsed() < PATIENCE, "no answer: {:?}", self.notices.try_iter().collect::<Vec<_>>());
            std::thread::yield_now();
        }
        let mut regs = Regs::default();
        Reg::ALL.into_iter().for_each(|reg| regs[reg] = self.get(mailbox + 0x10 + 8 * reg as u64));
        self.state(cpu, 0);
        regs
    }

    fn call(&mut self, cpu: u32, leaf: Leaf, registers: &[(Reg, u64)]) -> Regs {
        self.request(cpu, leaf, registers);
        self.answer(cpu)
    }

    #[track_caller]
    fn must(&mut self, leaf: Leaf, registers: &[(Reg, u64)]) -> Regs {
        let regs = self.call(0, leaf, registers);
        assert_eq!(regs.rax, 0, "{} {registers:x?}", leaf.name());
        regs
    }

    #[track_caller]
    fn on_every_package(&mut self, leaf: Leaf, registers: &[(Reg, u64)]) {
        for cpu in 0..CPUS {
            assert_eq!(self.call(cpu, leaf, registers).rax, 0, "{} on CPU {cpu}", leaf.name());
        }
    }

    fn page(&mut self) -> u64 {
        self.next_page += PAGE;
        self.next_page - PAGE
    }

    fn bring_up(&mut self) {
        self.hello(MAILBOXES, CPUS);
        self.must(Leaf::SysInit, &[]);
        self.on_every_package(Leaf::SysLpInit, &[]);
        let (list, info) = (0x30_0000, 0x30_1000);
        self.set(list, info);
        let areas = [(PAMT, PAGE), (PAMT + PAGE, 4 * PAGE), (PAMT + 8 * PAGE, (RAM / PAGE) * 16)];
        let words = [0, RAM].into_iter().chain(areas.into_iter().flat_map(|(base, size)| [base, size]));
        let reserved = [0, 1 << 20, PAMT, PAMT_ROOM];
        for (n, word) in words.chain(reserved).enumerate() {
            self.set(info + 8 * n as u64, word);
        }
        self.must(Leaf::SysConfig, &[(Reg::Rcx, list), (Reg::Rdx, 1), (Reg::R8, 32)]);
        self.on_every_package(Leaf::SysKeyConfig, &[]);
        while self.must(Leaf::SysTdmrInit, &[(Reg::Rcx, 0)]).rdx < RAM {}
    }

    /// A TD with the payload and one vCPU.
    fn build_td(&mut self, code: &[u8]) {
        let tdr = self.page();
        self.tdr = tdr;
        self.must(Leaf::MngCreate, &[(Reg::Rcx, tdr), (Reg::Rdx, 33)]);
        self.on_every_package(Leaf::MngKeyConfig, &[(Reg::Rcx, tdr)]);
        for _ in 0..TDCS_PAGES {
            let page = self.page();
            self.must(Leaf::MngAddcx, &[(Reg::Rcx, page), (Reg::Rdx, tdr)]);
        }
        let params = 0x30_2000;
        for (offset, word) in [(0, 1 << 28), (8, 3), (16, 2), (24, 0x1e), (40, 100)] {
            self.set(params + offset, word);
        }
        self.must(Leaf::MngInit, &[(Reg::Rcx, tdr), (Reg::Rdx, params)]);
        let tdvpr = self.page();
        self.tdvpr = tdvpr;
        self.must(Leaf::VpCreate, &[(Reg::Rcx, tdvpr), (Reg::Rdx, tdr)]);
        for _ in 1..TDVPS_PAGES {
            let page = self.page();
            self.must(Leaf::VpAddcx, &[(Reg::Rcx, page), (Reg::Rdx, tdvpr)]);
        }
        self.must(Leaf::VpInit, &[(Reg::Rcx, tdvpr), (Reg::Rdx, 2)]);
        for (gpa, level) in [(0, 3), (0, 2), (0, 1), (3 << 30, 2), (layout::BASE & !(layout::HUGE - 1), 1)] {
            let page = self.page();
            self.must(Leaf::MemSeptAdd, &[(Reg::Rcx, gpa | level), (Reg::Rdx, tdr), (Reg::R8, page)]);
        }
        let areas = (1..7).map(|page| (layout::BASE + page * PAGE, None));
        let pieces = code.chunks(PAGE as usize).zip(0..).map(|(bytes, page)| (layout::CODE + page * PAGE, Some(bytes)));
        for (gpa, bytes) in areas.chain(pieces) {
            let (source, page) = (self.page(), self.page());
            for (n, word) in bytes.unwrap_or_default().chunks(8).enumerate() {
                self.set(source + 8 * n as u64, u64::from_le_bytes(word.try_into().unwrap()));
            }
            self.must(Leaf::MemPageAdd, &[(Reg::Rcx, gpa), (Reg::Rdx, tdr), (Reg::R8, page), (Reg::R9, source)]);
        }
        self.must(Leaf::MrFinalize, &[(Reg::Rcx, tdr)]);
        self.map_shared(layout::area(0) + layout::MAILBOX, TD_MAILBOX);
    }

    /// KVM's EPT: one page.
    fn map_shared(&mut self, gpa: u64, page: u64) {
        let tables = [self.page(), self.page(), self.page(), self.page()];
        let gpa = gpa | SHARED;
        for (n, table) in tables.into_iter().enumerate() {
            (0..512).for_each(|entry| self.set(table + 8 * entry, 1 << 63));
            let next = tables.get(n + 1).copied().unwrap_or(page);
            self.set(table + (gpa >> (39 - 9 * n) & 511) * 8, next | 7);
        }
        let (tdvpr, root) = (self.tdvpr, tables[0]);
        let write = [(Reg::Rcx, tdvpr), (Reg::Rdx, SHARED_EPT_POINTER), (Reg::R8, root), (Reg::R9, u64::MAX)];
        self.must(Leaf::VpWr, &write);
    }

    fn post(&self, number: u64, gpa: u64, len: u64, value: u64) {
        let words = [
            (word::COMMAND, number),
            (word::GPA, gpa),
            (word::LEN, len),
            (word::VALUE, value),
            (word::STATUS, status::NONE),
            (word::STOP, 0),
        ];
        words.into_iter().for_each(|(offset, value)| self.set(TD_MAILBOX + offset, value));
    }

    fn enter(&mut self) -> Regs {
        let tdvpr = self.tdvpr;
        self.call(0, Leaf::VpEnter, &[(Reg::Rcx, tdvpr)])
    }

    /// An entry that must end in the payload's report; the result.
    #[track_caller]
    fn report(&mut self) -> (u64, u64) {
        let exit = self.enter();
        assert_eq!((exit.rax, exit.r11, exit.r14), (77, 30, layout::REPORT_PORT.into()), "{exit:?}");
        (self.get(TD_MAILBOX + word::STATUS), self.get(TD_MAILBOX + word::RESULT))
    }
}

#[test]
fn a_td_runs_the_payload_with_the_exits_of_the_real_thing() {
    let mut kernel = Kernel::power_on();
    kernel.bring_up();
    kernel.build_td(image::bytes());
    kernel.post(command::WRITE, 0x1004, 8, 0x1122_3344_5566_7788);
    let exit = kernel.enter();
    assert_eq!((exit.rax, exit.rcx & 7, exit.r8), (48, 1, 0x1000), "{exit:?}");
    let (page, tdr) = (kernel.page(), kernel.tdr);
    kernel.must(Leaf::MemPageAug, &[(Reg::Rcx, 0x1000), (Reg::Rdx, tdr), (Reg::R8, page)]);
    // SEPT_VE_DISABLE: a page that was not accepted is an exit of its own type.
    let exit = kernel.enter();
    assert_eq!((exit.rax, exit.rdx & 15, exit.r8), (48, 6, 0x1000), "{exit:?}");
    // An NMI takes the payload out of the store, to its next command.
    let nmi = [(Reg::Rcx, kernel.tdvpr), (Reg::Rdx, PEND_NMI), (Reg::R8, 1), (Reg::R9, u64::MAX)];
    kernel.must(Leaf::VpWr, &nmi);
    assert_eq!((kernel.report().0, kernel.get(TD_MAILBOX + word::VECTOR)), (status::EXCEPTION, 2));
    kernel.post(command::ACCEPT, 0x1000, 4096, 0);
    assert_eq!(kernel.report(), (status::DONE, 0));
    kernel.post(command::WRITE, 0x1004, 8, 0x1122_3344_5566_7788);
    assert_eq!(kernel.report(), (status::DONE, 0));
    kernel.post(command::READ, 0x1000, 8, 0);
    assert_eq!(kernel.report(), (status::DONE, 0x5566_7788_0000_0000));
    kernel.post(command::CHECK, 0x1000, 4096, 0);
    let mismatch = kernel.report();
    assert_eq!((mismatch, kernel.get(TD_MAILBOX + word::RESULT2)), ((status::MISMATCH, 0x1004), 0x88));
    kernel.post(command::FILL, 0x1001, 4094, 0x0707_0707_0707_0707);
    assert_eq!(kernel.report(), (status::DONE, 0));
    kernel.post(command::CHECK, 0x1001, 4094, 0x0707_0707_0707_0707);
    assert_eq!(kernel.report(), (status::DONE, 0));
    // A shared address that KVM has not mapped: a TD exit, unless KVM wants it emulated.
    kernel.post(command::READ, 0x5000 | SHARED, 8, 0);
    let exit = kernel.enter();
    assert_eq!((exit.rax, exit.rcx & 7, exit.r8), (48, 1, 0x5000 | SHARED), "{exit:?}");
}

#[test]
fn an_interrupt_ends_a_long_stay_and_other_cpus_go_on_meanwhile() {
    let mut kernel = Kernel::power_on();
    kernel.bring_up();
    kernel.build_td(image::bytes());
    kernel.post(command::READ_WHILE, TD_MAILBOX_GPA + 0x800, 8, 0);
    let tdvpr = kernel.tdvpr;
    kernel.request(0, Leaf::VpEnter, &[(Reg::Rcx, tdvpr)]);
    let start = Instant::now();
    while kernel.get(TD_MAILBOX + word::ITERATIONS) < 1000 {
        assert!(start.elapsed() < PATIENCE);
        let read = kernel.call(1, Leaf::SysRd, &[(Reg::Rdx, 0x0800_0001_0000_0004)]);
        assert_eq!((read.rax, read.r8), (0, 1));
    }
    kernel.ram.word32(MAILBOXES + 4).unwrap().store(1, Ordering::Release);
    let exit = kernel.answer(0);
    assert_eq!((exit.rax, exit.r9), (6, 0), "{exit:?}");
    kernel.set(TD_MAILBOX + 0x800, 7);
    assert_eq!(kernel.report(), (status::DONE, 7));
    kernel.post(command::MAP_GPA, 0x20_0000, 2, 0);
    let exit = kernel.enter();
    assert_eq!((exit.rax, exit.r11, exit.r12, exit.r13), (77, 0x10001, 0x20_0000 | SHARED, 8192));
    let back = [(Reg::Rcx, tdvpr), (Reg::R10, 1), (Reg::R11, 0x20_1000)];
    let exit = kernel.call(0, Leaf::VpEnter, &back);
    assert_eq!((exit.rax, exit.r11), (77, 30));
    let words = [word::RESULT, word::RESULT2].map(|word| kernel.get(TD_MAILBOX + word));
    assert_eq!(words, [1, 0x20_1000]);
}

/// The payload's own mailbox, as a shared address: its page has room behind the words.
const TD_MAILBOX_GPA: u64 = layout::BASE | SHARED;

#[test]
fn a_guest_with_other_code_triple_faults_and_is_told_of() {
    let mut kernel = Kernel::power_on();
    kernel.bring_up();
    let mut code = image::bytes().to_vec();
    code[0x1400] ^= 1;
    kernel.build_td(&code);
    let exit = kernel.enter();
    assert!(Status(exit.rax).is(Code::NonRecoverableVcpu), "{exit:?}");
    let told =
        kernel.notices.try_iter().any(|notice| matches!(notice, Notice::Remark(text) if text.contains("exception")));
    assert!(told);
}

#[test]
fn a_kernel_that_breaks_the_rules_is_told_which() {
    type Misdeed = fn(&mut Kernel);
    let misdeeds: [(Misdeed, &str); 7] = [
        (|kernel| kernel.bell.write_all(&[0; 16]).unwrap(), "its first words are"),
        (|kernel| kernel.hello(1 << 40, 2), "mailboxes at 0x10000000000"),
        (|kernel| kernel.hello(RAM - PAGE, 2), "not page-aligned memory of the machine"),
        (|kernel| kernel.hello(MAILBOXES, 3), "3 mailboxes on a machine with 2 CPUs"),
        (
            |kernel| {
                kernel.hello(MAILBOXES, 2);
                kernel.bell.write_all(&[9]).unwrap();
            },
            "CPU 9 rings",
        ),
        (
            |kernel| {
                kernel.hello(MAILBOXES, 2);
                kernel.bell.write_all(&[1]).unwrap();
            },
            "CPU 1 rings without a request",
        ),
        (
            |kernel| {
                kernel.hello(MAILBOXES, 2);
                kernel.state(0, 0xdead);
                kernel.bell.write_all(&[0]).unwrap();
            },
            "CPU 0 is in state 0xdead",
        ),
    ];
    for (misdeed, part) in misdeeds {
        let mut kernel = Kernel::power_on();
        misdeed(&mut kernel);
        let complaint = kernel.complaint();
        assert!(complaint.contains(part), "{complaint}");
    }
}

/// A test's process in the guest: its connection goes over the init's broker.
fn connect(broker: &Arc<Broker>) -> (ModuleClient, JoinHandle<()>) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("module");
    let listener = UnixListener::bind(&path).unwrap();
    let client = ModuleClient::connect(&path).unwrap();
    let (stream, _) = listener.accept().unwrap();
    let broker = Arc::clone(broker);
    (client, std::thread::spawn(move || broker.converse(stream)))
}

#[test]
fn a_process_sees_the_module_and_its_faults_end_with_it() {
    let mut kernel = Kernel::power_on();
    let broker = kernel.broker();
    let (client, end) = connect(&broker);
    assert_eq!(client.position(), Err(Errno::ENODEV));
    kernel.bring_up();
    let read = |kernel: &mut Kernel| kernel.call(1, Leaf::SysRd, &[(Reg::Rdx, 0x0800_0001_0000_0004)]).rax;
    let from = client.position().unwrap();
    let fault = client.add_fault(&ModuleFault::always(Leaf::SysRd.number(), 0x8000_0200_0000_0000)).unwrap();
    assert_eq!(read(&mut kernel), 0x8000_0200_0000_0000);
    assert_eq!((client.fault_hits(fault), client.fault_hits(fault + 1)), (Ok(1), Err(Errno::ENOENT)));
    let calls = client.calls_since(from).unwrap();
    assert_eq!(calls.len(), 1);
    assert_eq!((calls[0].processor, calls[0].leaf, calls[0].status), (1, 34, 0x8000_0200_0000_0000));
    // More calls than one answer holds: the bring-up.
    assert_eq!(client.calls_since(0).unwrap().len() as u64, from + 1);
    assert_eq!(client.violations(), Ok(Vec::new()));
    let page = kernel.page();
    assert!(client.page_owner(page / PAGE).unwrap().is_free());
    assert_eq!(client.page_owner(RAM / PAGE), Err(Errno::ENXIO));
    kernel.must(Leaf::MngCreate, &[(Reg::Rcx, page), (Reg::Rdx, 33)]);
    assert_eq!(client.page_owner(page / PAGE).unwrap().page_type, 4);
    // A process that dies says nothing any more; what it planned is taken back all the same.
    client.hang_up();
    end.join().unwrap();
    assert_eq!(read(&mut kernel), 0);
}

#[test]
fn a_process_that_begins_alone_finds_nothing_of_those_before_it() {
    let mut kernel = Kernel::power_on();
    let broker = kernel.broker();
    kernel.bring_up();
    let (first, end) = connect(&broker);
    first.begin().unwrap();
    kernel.build_td(image::bytes());
    let (tdr, page) = (kernel.tdr, kernel.page());
    kernel.must(Leaf::MemSeptAdd, &[(Reg::Rcx, 1 << 30 | 2), (Reg::Rdx, tdr), (Reg::R8, page)]);
    let fault = ModuleFault::always(Leaf::MngVpflushdone.number(), 0x8000_0200_0000_0001);
    first.add_fault(&fault).unwrap();
    // Beside another process it takes nothing away.
    let (second, second_end) = connect(&broker);
    second.begin().unwrap();
    let owner = second.page_owner(page / PAGE).unwrap();
    assert_eq!((owner.page_type, owner.tdr), (8, tdr));
    assert_eq!(second.measurement(tdr).map(|mrtd| mrtd != [0; 48]), Ok(true));
    first.hang_up();
    second.hang_up();
    // The broker need not have noticed yet that they are gone.
    let (third, third_end) = connect(&broker);
    third.begin().unwrap();
    for frame in [page, tdr, kernel.tdvpr].map(|address| address / PAGE) {
        assert!(third.page_owner(frame).unwrap().is_free());
    }
    assert_eq!(third.measurement(tdr), Err(Errno::ENOENT));
    assert_eq!((third.fault_hits(0), third.violations()), (Err(Errno::ENOENT), Ok(Vec::new())));
    // The key id and the pages serve again.
    kernel.build_td(image::bytes());
    third.hang_up();
    [end, second_end, third_end].into_iter().for_each(|end| end.join().unwrap());
}

#[test]
fn a_leaf_that_is_none_is_the_modules_to_refuse() {
    let mut kernel = Kernel::power_on();
    kernel.bring_up();
    let (cpu, mailbox) = (0, MAILBOXES);
    kernel.request(cpu, Leaf::SysRd, &[(Reg::Rax, 0xffff)]);
    assert_eq!(kernel.answer(cpu).rax >> 32, 0xC000_0100);
    // No P-SEAMLDR: the instruction fails.
    kernel.request(cpu, Leaf::SysRd, &[(Reg::Rax, 1 << 63)]);
    assert_eq!((kernel.answer(cpu).rax, kernel.get(mailbox + 8) > 0), (0x8000_FF00_FFFF_0000, true));
}
