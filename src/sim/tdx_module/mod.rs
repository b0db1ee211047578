//! The simulated TDX module: SEAMCALLs in, completion status out.
