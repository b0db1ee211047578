//! What the running kernel says of itself: what it is, whether it is tainted, and what it complains about in its log.

mod environment;
mod kernel_log;
mod processor;
mod taint;

pub use environment::{Environment, KernelConfig, ModuleParameters};
pub use kernel_log::{KernelLog, REPORT_LINES, complaints, is_complaint, is_report_end};
pub use processor::emulated_by_tcg;
pub use taint::{Taint, TaintFile, TaintFlag};
