//! NUMA policy of a guest_memfd: which node its pages come from.

use std::fs;
use std::process::ExitCode;
use std::sync::Arc;

use gmemtest::harness::{Context, Stop, TestResult};
use gmemtest::machine::{Errno, GuestMemfd, Mapping, PAGE_SIZE, Protection, Vm, VmConfig};
use gmemtest::uapi::kvm::{GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP};
use gmemtest::{claim_eq, claim_err, claim_ne, claim_ok};

gmemtest::suite! {
    /// Since 6.19 a guest_memfd has a NUMA policy of its own, by page, set with mbind(2) through a mapping and kept in
    /// the inode (kvm_gmem_set_policy()). It decides where pages come from, and moves none that is there.
    pub static SUITE: gmem_numa needs [Vm, GuestMemfd, GmemMmap, NumaNodes, RealFiles] {
        /// What mbind(2) sets on a range, get_mempolicy(MPOL_F_ADDR) reads back there, and nowhere else
        /// (guest_memfd_test). A failure means that a policy is lost, or spreads to memory that nobody named.
        policy_is_read_back_on_its_range;

        /// MPOL_DEFAULT takes a policy away (guest_memfd_test). A failure means that a policy once set cannot be got
        /// rid of.
        default_policy_takes_another_away;

        /// A mode that no kernel knows is EINVAL (guest_memfd_test). A failure means that future modes cannot be told
        /// from garbage.
        unknown_mode_is_einval;

        /// The policy is the file's: a second mapping shows it, and one that is made when none is left does too. A
        /// failure means that a guest's placement changes with the mappings of its VMM.
        policy_belongs_to_the_file;

        /// Without a policy of the file get_mempolicy says MPOL_DEFAULT, whatever the policy of the task is. A failure
        /// means that the policy of whoever asks is taken for that of the file.
        policy_of_the_task_is_not_shown;

        /// Pages come from the node that the policy names, however they come (guest_memfd_test). A failure means that a
        /// guest's memory is on the wrong node.
        pages_come_from_the_node_of_the_policy[WAYS] needs [GmemInitShared];

        /// A page that is there stays where it is when the policy changes; after a punch the next one comes from the
        /// new node (guest_memfd_test). A failure means that a page moves that cannot be moved, or that a new policy is
        /// without effect.
        policy_moves_no_page_but_the_next_one needs [GmemInitShared];

        /// mbind with MPOL_MF_MOVE and MPOL_MF_STRICT is EIO where a page is on another node: guest_memfd pages do not
        /// migrate. A failure means that a page moved that KVM may have mapped.
        strict_move_of_a_page_on_another_node_is_eio needs [GmemInitShared];

        /// move_pages(2) cannot move a page either. A failure means that a page moves away under the guest's page
        /// tables.
        move_pages_leaves_the_page_where_it_is needs [GmemInitShared];
    }
}

const P: u64 = PAGE_SIZE;
const MPOL_DEFAULT: i32 = 0;
const MPOL_BIND: i32 = 2;
const MPOL_INTERLEAVE: i32 = 3;
const MPOL_F_ADDR: u64 = 2;
const MPOL_MF_STRICT: u32 = 1;
const MPOL_MF_MOVE: u32 = 2;
/// Nodes in a mask of one word, and the spare bit that the kernel subtracts.
const MAX_NODE: usize = 65;

type File = (Arc<dyn Vm>, Arc<dyn GuestMemfd>);

/// A file of four pages with `flags`, and a mapping of all of it; skipped before guest_memfd had a policy.
fn mapped(cx: &Context, flags: u64) -> TestResult<(File, Box<dyn Mapping>)> {
    // "KVM: guest_memfd: Enforce NUMA mempolicy using shared policy", 6.19.
    cx.by_release(&[((6, 19), ())])?;
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let gmem = vm.create_guest_memfd(4 * P, flags)?;
    let mapping = gmem.map(4 * P, 0, Protection::SHARED_RW)?;
    Ok(((vm, gmem), mapping))
}

const SHARED: u64 = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED;

/// The first two nodes that have memory.
fn two_nodes() -> TestResult<[u32; 2]> {
    let list = fs::read_to_string("/sys/devices/system/node/has_memory")?;
    let mut nodes = list.trim().split(',').flat_map(|part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        first.parse().unwrap_or(0)..=last.parse().unwrap_or(0)
    });
    match (nodes.next(), nodes.next()) {
        (Some(one), Some(two)) if two < 64 => Ok([one, two]),
        _ => Err(Stop::fail(format!("two nodes below 64 with memory, in '{}'", list.trim()))),
    }
}

/// mbind(2) of a range to the nodes of a mask.
fn bind(mapping: &dyn Mapping, at: u64, len: u64, mode: i32, nodes: u64, flags: u32) -> Result<(), Errno> {
    // SAFETY: the mask is one word, as the maximum says; the call changes policy, not contents.
    let result = unsafe { libc::syscall(libc::SYS_mbind, mapping.addr() + at, len, mode, &nodes, MAX_NODE, flags) };
    Errno::result(result).map(drop)
}

/// get_mempolicy(2) of an address: mode and nodes.
fn policy(mapping: &dyn Mapping, at: u64) -> Result<(i32, u64), Errno> {
    let (mut mode, mut nodes) = (-1i32, 0u64);
    // SAFETY: both pointers lead to what the call writes, a mask of one word among them.
    let result = unsafe {
        libc::syscall(libc::SYS_get_mempolicy, &mut mode, &mut nodes, MAX_NODE, mapping.addr() + at, MPOL_F_ADDR)
    };
    Errno::result(result).map(|_| (mode, nodes))
}

/// move_pages(2) of one page to a node, or only asking; gives the node, or the error, that the kernel reports.
fn move_page(mapping: &dyn Mapping, at: u64, to: Option<u32>) -> Result<i32, Errno> {
    let pages = [mapping.addr() + at];
    let target = [to.unwrap_or(0)];
    let target = if to.is_some() { target.as_ptr() } else { std::ptr::null() };
    let mut status = [i32::MIN];
    // SAFETY: each pointer leads to one element, or to none where the call is to report only.
    let result = unsafe {
        libc::syscall(libc::SYS_move_pages, 0, 1usize, pages.as_ptr(), target, status.as_mut_ptr(), MPOL_MF_MOVE)
    };
    Errno::result(result).map(|_| status[0])
}

fn policy_is_read_back_on_its_range(cx: &Context) -> TestResult {
    let (_file, mapping) = mapped(cx, GUEST_MEMFD_FLAG_MMAP)?;
    let [one, two] = two_nodes()?;
    let both = 1 << one | 1 << two;
    claim_ok!(bind(&*mapping, 0, 2 * P, MPOL_INTERLEAVE, both, 0), "MPOL_INTERLEAVE on the first two pages");
    claim_ok!(bind(&*mapping, 2 * P, P, MPOL_BIND, 1 << one, 0), "MPOL_BIND on the third");
    let read = (0..4).map(|page| policy(&*mapping, page * P)).collect::<Result<Vec<_>, _>>()?;
    let expected = [(MPOL_INTERLEAVE, both), (MPOL_INTERLEAVE, both), (MPOL_BIND, 1 << one), (MPOL_DEFAULT, 0)];
    claim_eq!(read, expected, "mode and nodes of each page");
    Ok(())
}

fn default_policy_takes_another_away(cx: &Context) -> TestResult {
    let (_file, mapping) = mapped(cx, GUEST_MEMFD_FLAG_MMAP)?;
    let [one, _] = two_nodes()?;
    bind(&*mapping, 0, 4 * P, MPOL_BIND, 1 << one, 0)?;
    claim_ok!(bind(&*mapping, 0, 4 * P, MPOL_DEFAULT, 0, 0), "MPOL_DEFAULT");
    claim_eq!(policy(&*mapping, 0), Ok((MPOL_DEFAULT, 0)), "policy of the first page");
    claim_eq!(policy(&*mapping, 3 * P), Ok((MPOL_DEFAULT, 0)), "policy of the last page");
    Ok(())
}

fn unknown_mode_is_einval(cx: &Context) -> TestResult {
    let (_file, mapping) = mapped(cx, GUEST_MEMFD_FLAG_MMAP)?;
    claim_err!(bind(&*mapping, 0, P, 999, 1, 0), Errno::EINVAL, "mode 999");
    Ok(())
}

fn policy_belongs_to_the_file(cx: &Context) -> TestResult {
    let ((_vm, gmem), mapping) = mapped(cx, GUEST_MEMFD_FLAG_MMAP)?;
    let [_, two] = two_nodes()?;
    bind(&*mapping, P, P, MPOL_BIND, 1 << two, 0)?;
    let second = gmem.map(2 * P, P, Protection::SHARED_RW)?;
    claim_eq!(policy(&*second, 0), Ok((MPOL_BIND, 1 << two)), "through a second mapping");
    claim_eq!(policy(&*second, P), Ok((MPOL_DEFAULT, 0)), "through it, the page after");
    drop((mapping, second));
    let third = gmem.map(4 * P, 0, Protection::SHARED_RW)?;
    claim_eq!(policy(&*third, P), Ok((MPOL_BIND, 1 << two)), "through a third, made when none was left");
    Ok(())
}

fn policy_of_the_task_is_not_shown(cx: &Context) -> TestResult {
    let (_file, mapping) = mapped(cx, GUEST_MEMFD_FLAG_MMAP)?;
    let [_, two] = two_nodes()?;
    let set = |mode: i32, nodes: u64| {
        // SAFETY: the mask is one word, as the maximum says; the policy is this thread's.
        Errno::result(unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, &nodes, MAX_NODE) })
    };
    set(MPOL_BIND, 1 << two)?;
    let shown = policy(&*mapping, 0);
    set(MPOL_DEFAULT, 0)?;
    claim_eq!(shown, Ok((MPOL_DEFAULT, 0)), "policy of the file, in a task bound to node {two}");
    Ok(())
}

/// How a page comes into the file.
#[derive(Clone, Copy)]
enum Way {
    ReadFault,
    WriteFault,
    Fallocate,
    Populate,
}

const WAYS: &[(&str, Way)] = &[
    ("read_fault", Way::ReadFault),
    ("write_fault", Way::WriteFault),
    ("fallocate", Way::Fallocate),
    ("populate", Way::Populate),
];

fn pages_come_from_the_node_of_the_policy(cx: &Context, &way: &Way) -> TestResult {
    let ((_vm, gmem), mapping) = mapped(cx, SHARED)?;
    for node in two_nodes()? {
        gmem.punch_hole(0, 4 * P)?;
        bind(&*mapping, 0, 4 * P, MPOL_BIND, 1 << node, 0)?;
        match way {
            Way::ReadFault => drop(mapping.read_u64(0)?),
            Way::WriteFault => mapping.write_u64(0, 1)?,
            Way::Fallocate => gmem.allocate(0, P)?,
            Way::Populate => mapping.advise(0, P, libc::MADV_POPULATE_READ)?,
        }
        mapping.read_u64(0)?;
        claim_eq!(move_page(&*mapping, 0, None), Ok(node as i32), "node of the page, bound to node {node}");
    }
    Ok(())
}

fn policy_moves_no_page_but_the_next_one(cx: &Context) -> TestResult {
    let ((_vm, gmem), mapping) = mapped(cx, SHARED)?;
    let [one, two] = two_nodes()?;
    bind(&*mapping, 0, P, MPOL_BIND, 1 << one, 0)?;
    mapping.write_u64(0, 1)?;
    bind(&*mapping, 0, P, MPOL_BIND, 1 << two, 0)?;
    mapping.read_u64(0)?;
    claim_eq!(move_page(&*mapping, 0, None), Ok(one as i32), "node of the page that was there");
    gmem.punch_hole(0, P)?;
    mapping.read_u64(0)?;
    claim_eq!(move_page(&*mapping, 0, None), Ok(two as i32), "node of the next page");
    Ok(())
}

fn strict_move_of_a_page_on_another_node_is_eio(cx: &Context) -> TestResult {
    let (_file, mapping) = mapped(cx, SHARED)?;
    let [one, two] = two_nodes()?;
    bind(&*mapping, 0, P, MPOL_BIND, 1 << one, 0)?;
    mapping.write_u64(0, 7)?;
    let strict = MPOL_MF_MOVE | MPOL_MF_STRICT;
    claim_err!(bind(&*mapping, 0, P, MPOL_BIND, 1 << two, strict), Errno::EIO, "MPOL_MF_MOVE | MPOL_MF_STRICT");
    claim_eq!(move_page(&*mapping, 0, None), Ok(one as i32), "node of the page");
    claim_eq!(mapping.read_u64(0)?, 7, "contents");
    Ok(())
}

fn move_pages_leaves_the_page_where_it_is(cx: &Context) -> TestResult {
    let (_file, mapping) = mapped(cx, SHARED)?;
    let [one, two] = two_nodes()?;
    bind(&*mapping, 0, P, MPOL_BIND, 1 << one, 0)?;
    mapping.write_u64(0, 7)?;
    let moved = move_page(&*mapping, 0, Some(two));
    claim_ne!(moved, Ok(two as i32), "node of the page as move_pages(2) reports it after the move");
    claim_eq!(move_page(&*mapping, 0, None), Ok(one as i32), "node of the page");
    claim_eq!(mapping.read_u64(0)?, 7, "contents");
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
