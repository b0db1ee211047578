//! The `gmemtest` command.

fn main() {}
