//! The per-CPU batches of folios on their way to the LRU lists.

use super::Pfn;

/// How many folios a batch takes before it is drained (PAGEVEC_SIZE).
pub const BATCH_SIZE: usize = 31;

/// The CPUs of the model: system calls run on one, vCPUs on the other, so that draining one batch is not draining all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cpu {
    /// Where the host process makes its system calls.
    Host,
    /// Where vCPUs run.
    Guest,
}

impl Cpu {
    /// Every CPU.
    pub const ALL: [Cpu; 2] = [Cpu::Host, Cpu::Guest];
}

/// The batches, one a CPU.
#[derive(Debug, Default)]
pub struct LruBatches {
    batches: [Vec<Pfn>; 2],
}

impl LruBatches {
    /// Adds a folio; the answer is whether the batch is full now.
    pub fn add(&mut self, cpu: Cpu, head: Pfn) -> bool {
        let batch = &mut self.batches[cpu as usize];
        batch.push(head);
        batch.len() == BATCH_SIZE
    }

    /// Empties a batch.
    pub fn take(&mut self, cpu: Cpu) -> Vec<Pfn> {
        std::mem::take(&mut self.batches[cpu as usize])
    }

    /// Whether no batch holds anything.
    pub fn is_empty(&self) -> bool {
        self.batches.iter().all(Vec::is_empty)
    }
}
