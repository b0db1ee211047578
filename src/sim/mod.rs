//! The machine in this process.

pub mod tdx_module;
