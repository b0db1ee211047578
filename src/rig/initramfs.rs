//! The initramfs: this program as `/init`, what it is to do, and the modules it has to load. Nothing else.
//!
//! It is not compressed: under TCG, unpacking would cost more than reading.

use std::io::{self, Write};
use std::path::Path;

use cpio::newc::Builder;
use object::read::elf::{FileHeader, ProgramHeader};
use object::{Endianness, elf};

/// An archive in the making.
#[derive(Debug, Default)]
pub struct Initramfs {
    archive: Vec<u8>,
    inode: u32,
}

impl Initramfs {
    /// An archive with `program` as `/init`, and the console device that the kernel opens for it.
    pub fn new(program: &[u8]) -> io::Result<Initramfs> {
        let mut initramfs = Initramfs::default();
        initramfs.directory("dev")?;
        initramfs.add(Builder::new("dev/console").mode(0o020_600).rdev_major(5).rdev_minor(1), &[])?;
        initramfs.add(Builder::new("init").mode(0o100_755), program)?;
        Ok(initramfs)
    }

    /// Adds a directory; its parent must be there.
    pub fn directory(&mut self, path: &str) -> io::Result<()> {
        self.add(Builder::new(path).mode(0o040_755).nlink(2), &[])
    }

    /// Adds a file; its directory must be there.
    pub fn file(&mut self, path: &str, bytes: &[u8]) -> io::Result<()> {
        self.add(Builder::new(path).mode(0o100_644), bytes)
    }

    /// The archive.
    pub fn finish(self) -> io::Result<Vec<u8>> {
        cpio::newc::trailer(self.archive)
    }

    fn add(&mut self, entry: Builder, bytes: &[u8]) -> io::Result<()> {
        self.inode += 1;
        let size = u32::try_from(bytes.len()).map_err(|_| io::Error::other("a file of 4 GiB in an initramfs"))?;
        let mut writer = entry.ino(self.inode).write(std::mem::take(&mut self.archive), size);
        writer.write_all(bytes)?;
        self.archive = writer.finish()?;
        Ok(())
    }
}

/// The running program as it goes into the archive: the ELF file up to the end of what is loaded, without the debugging
/// information behind it.
pub fn own_program() -> io::Result<Vec<u8>> {
    let path = Path::new("/proc/self/exe");
    let program = std::fs::read(path)?;
    match loaded_part(&program) {
        Ok(Loaded::Static(end)) => {
            let mut program = program;
            program.truncate(end);
            forget_sections(&mut program);
            Ok(program)
        }
        Ok(Loaded::Dynamic) => Err(io::Error::other(
            "this gmemtest is linked dynamically and cannot be an init; build it in its repository, which links statically",
        )),
        Err(error) => Err(io::Error::other(format!("this program is not an ELF file that can be read: {error}"))),
    }
}

enum Loaded {
    /// A static program that is loaded up to this file offset.
    Static(usize),
    /// It asks for an interpreter.
    Dynamic,
}

fn loaded_part(program: &[u8]) -> object::read::Result<Loaded> {
    let header = elf::FileHeader64::<Endianness>::parse(program)?;
    let endian = header.endian()?;
    let mut end = 0;
    for segment in header.program_headers(endian, program)? {
        match segment.p_type(endian) {
            elf::PT_INTERP => return Ok(Loaded::Dynamic),
            elf::PT_LOAD => end = end.max(segment.p_offset(endian) + segment.p_filesz(endian)),
            _ => {}
        }
    }
    Ok(Loaded::Static(end as usize))
}

/// Zeroes e_shoff, e_shnum and e_shstrndx: the section table was cut off.
fn forget_sections(program: &mut [u8]) {
    program[0x28..0x30].fill(0);
    program[0x3c..0x40].fill(0);
}

/// A program that powers the machine off at once, as the yardstick of `--timing`: reboot(2) with
/// LINUX_REBOOT_CMD_POWER_OFF, and nothing else.
pub fn power_off_program() -> Vec<u8> {
    let code: &[u8] = &[
        0xb8, 0xa9, 0x00, 0x00, 0x00, // mov eax, 169 (reboot)
        0xbf, 0xad, 0xde, 0xe1, 0xfe, // mov edi, LINUX_REBOOT_MAGIC1
        0xbe, 0x69, 0x19, 0x12, 0x28, // mov esi, LINUX_REBOOT_MAGIC2
        0xba, 0xdc, 0xfe, 0x21, 0x43, // mov edx, LINUX_REBOOT_CMD_POWER_OFF
        0x0f, 0x05, // syscall
        0xeb, 0xfe, // jmp .
    ];
    let address = 0x40_0000u64;
    let headers = 64 + 56;
    let mut program = Vec::new();
    program.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    program.extend_from_slice(&2u16.to_le_bytes()); // ET_EXEC
    program.extend_from_slice(&62u16.to_le_bytes()); // EM_X86_64
    program.extend_from_slice(&1u32.to_le_bytes());
    program.extend_from_slice(&(address + headers).to_le_bytes()); // e_entry
    program.extend_from_slice(&64u64.to_le_bytes()); // e_phoff
    program.extend_from_slice(&[0; 12]); // e_shoff, e_flags
    for half in [64u16, 56, 1, 0, 0, 0] {
        program.extend_from_slice(&half.to_le_bytes());
    }
    let size = headers + code.len() as u64;
    program.extend_from_slice(&1u32.to_le_bytes()); // PT_LOAD
    program.extend_from_slice(&5u32.to_le_bytes()); // PF_R | PF_X
    for long in [0, address, address, size, size, 0x1000] {
        program.extend_from_slice(&long.to_le_bytes());
    }
    program.extend_from_slice(code);
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_reads_back_with_init_executable_and_the_console_a_device() {
        let mut initramfs = Initramfs::new(b"program").unwrap();
        initramfs.directory("rig").unwrap();
        initramfs.file("rig/task", b"{}").unwrap();
        let archive = initramfs.finish().unwrap();
        let mut entries = Vec::new();
        let mut rest = &archive[..];
        loop {
            let mut reader = cpio::NewcReader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            let mut bytes = Vec::new();
            io::Read::read_to_end(&mut reader, &mut bytes).unwrap();
            entries.push((reader.entry().name().to_owned(), reader.entry().mode(), bytes));
            rest = reader.finish().unwrap();
        }
        let names: Vec<&str> = entries.iter().map(|(name, ..)| name.as_str()).collect();
        assert_eq!(names, ["dev", "dev/console", "init", "rig", "rig/task"]);
        assert_eq!(entries[1].1, 0o020_600);
        assert_eq!((entries[2].1, &entries[2].2[..]), (0o100_755, &b"program"[..]));
        assert_eq!(entries[4].2, b"{}");
    }

    #[test]
    fn the_power_off_program_is_a_static_executable() {
        let program = power_off_program();
        assert!(matches!(loaded_part(&program), Ok(Loaded::Static(end)) if end == program.len()));
    }

    #[test]
    fn a_cut_program_still_parses() {
        let mut program = power_off_program();
        program[0x28..0x30].fill(7);
        forget_sections(&mut program);
        assert!(matches!(loaded_part(&program), Ok(Loaded::Static(_))));
    }
}
