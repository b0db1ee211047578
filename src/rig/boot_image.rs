//! The kernel under test as it comes out of a build: `arch/x86/boot/bzImage`.
//!
//! Field offsets are those of the kernel's `Documentation/arch/x86/boot.rst`.

use std::fmt;
use std::path::{Path, PathBuf};

use object::read::elf::{FileHeader, ProgramHeader};
use object::{Endianness, elf};

use super::decompress::decompress;

/// Number of 512-byte sectors of real-mode code, less the boot sector.
const SETUP_SECTS: usize = 0x1f1;
/// The magic `HdrS`.
const HEADER_MAGIC: usize = 0x202;
/// Boot protocol version; 2.08 (2007) brought the payload fields.
const PROTOCOL: usize = 0x206;
/// Where the version string is, less 0x200.
const KERNEL_VERSION: usize = 0x20e;
/// Offset and length of the compressed kernel, from the end of the real-mode code.
const PAYLOAD: usize = 0x248;
/// The ELF note that holds the 32-bit entry point of a PVH boot (XEN_ELFNOTE_PHYS32_ENTRY).
const PVH_ENTRY_NOTE: elf::NoteType = elf::NoteType(18);

/// A bzImage in memory.
#[derive(Clone)]
pub struct BootImage {
    path: PathBuf,
    version: String,
    bytes: Vec<u8>,
}

/// Why a file is not a kernel that the rig can boot.
#[derive(Debug)]
pub struct ImageError {
    path: PathBuf,
    why: String,
}

impl fmt::Display for ImageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "--kernel {}: {}", self.path.display(), self.why)
    }
}

impl std::error::Error for ImageError {}

impl BootImage {
    /// Reads a bzImage, or the one in a kernel build directory.
    pub fn read(path: &Path) -> Result<BootImage, ImageError> {
        let path = match path.is_dir() {
            true => path.join("arch/x86/boot/bzImage"),
            false => path.to_owned(),
        };
        match std::fs::read(&path) {
            Ok(bytes) => BootImage::new(path, bytes),
            Err(error) => Err(ImageError { path, why: format!("cannot be read: {error}") }),
        }
    }

    fn new(path: PathBuf, bytes: Vec<u8>) -> Result<BootImage, ImageError> {
        let why = match &bytes[..] {
            [0x7f, b'E', b'L', b'F', ..] => "is an ELF file; give the bzImage (arch/x86/boot/bzImage of the build)",
            _ if bytes.get(HEADER_MAGIC..HEADER_MAGIC + 4) != Some(b"HdrS") => {
                "is not a bzImage: no 'HdrS' at offset 0x202 (a bzImage is arch/x86/boot/bzImage or /boot/vmlinuz-*)"
            }
            _ if half(&bytes, PROTOCOL).is_none_or(|version| version < 0x208) => {
                "has a boot protocol older than 2.08 (Linux 2.6.26)"
            }
            _ => {
                let version = version(&bytes).unwrap_or_else(|| "unknown version".to_owned());
                return Ok(BootImage { path, version, bytes });
            }
        };
        Err(ImageError { path, why: why.to_owned() })
    }

    /// Where it was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The version string that `file` shows: release, builder, build number and date.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The release: what `uname -r` will say.
    pub fn release(&self) -> &str {
        self.version.split_whitespace().next().unwrap_or_default()
    }

    /// The file as it is.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The kernel without its decompressor, when it is one that QEMU can start directly: an ELF file with a PVH entry
    /// (CONFIG_PVH). Unpacking here takes a tenth of the time that the kernel's own decompressor takes under TCG.
    /// `None` when the compression is another one, or there is no such entry.
    pub fn unpack(&self) -> Option<Vec<u8>> {
        let sectors = match self.bytes[SETUP_SECTS] {
            0 => 4,
            count => usize::from(count),
        };
        let start = (sectors + 1) * 512 + word(&self.bytes, PAYLOAD)? as usize;
        let length = word(&self.bytes, PAYLOAD + 4)? as usize;
        let kernel = decompress(self.bytes.get(start..start.checked_add(length)?)?)?.ok()?;
        has_pvh_entry(&kernel).then_some(kernel)
    }
}

impl fmt::Debug for BootImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BootImage").field("path", &self.path).field("version", &self.version).finish_non_exhaustive()
    }
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn version(bytes: &[u8]) -> Option<String> {
    let at = usize::from(half(bytes, KERNEL_VERSION)?) + 0x200;
    let text = bytes.get(at..)?.split(|&byte| byte == 0).next()?;
    Some(String::from_utf8_lossy(text).trim().to_owned()).filter(|text| !text.is_empty() && text.len() < 512)
}

fn has_pvh_entry(kernel: &[u8]) -> bool {
    let notes = || -> object::read::Result<bool> {
        let header = elf::FileHeader64::<Endianness>::parse(kernel)?;
        let endian = header.endian()?;
        for segment in header.program_headers(endian, kernel)? {
            let Some(mut notes) = segment.notes(endian, kernel)? else { continue };
            while let Some(note) = notes.next()? {
                if note.name() == b"Xen" && note.n_type(endian) == PVH_ENTRY_NOTE {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    };
    notes().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(edit: impl FnOnce(&mut Vec<u8>)) -> Result<BootImage, ImageError> {
        let mut bytes = vec![0; 0x1000];
        bytes[SETUP_SECTS] = 1;
        bytes[HEADER_MAGIC..HEADER_MAGIC + 4].copy_from_slice(b"HdrS");
        bytes[PROTOCOL..PROTOCOL + 2].copy_from_slice(&0x20fu16.to_le_bytes());
        bytes[KERNEL_VERSION..KERNEL_VERSION + 2].copy_from_slice(&0x100u16.to_le_bytes());
        bytes[0x300..0x30e].copy_from_slice(b"7.3.4 (me@box)");
        edit(&mut bytes);
        BootImage::new(PathBuf::from("k"), bytes)
    }

    #[test]
    fn the_release_is_the_first_word_of_the_version() {
        let image = image(|_| ()).unwrap();
        assert_eq!((image.version(), image.release()), ("7.3.4 (me@box)", "7.3.4"));
    }

    #[test]
    fn other_files_are_named_for_what_they_are() {
        let elf = BootImage::new(PathBuf::from("vmlinux"), b"\x7fELF...".to_vec()).unwrap_err().to_string();
        assert!(elf.starts_with("--kernel vmlinux: is an ELF file"), "{elf}");
        let text = BootImage::new(PathBuf::from("README"), b"hello".to_vec()).unwrap_err().to_string();
        assert!(text.contains("is not a bzImage"), "{text}");
        let old = image(|bytes| bytes[PROTOCOL] = 7).unwrap_err().to_string();
        assert!(old.contains("older than 2.08"), "{old}");
        let missing = BootImage::read(Path::new("/nonexistent/bzImage")).unwrap_err().to_string();
        assert!(missing.contains("cannot be read"), "{missing}");
    }

    #[test]
    fn a_payload_that_lies_outside_the_file_is_not_unpacked() {
        let image = image(|bytes| bytes[PAYLOAD..PAYLOAD + 8].fill(0xff)).unwrap();
        assert!(image.unpack().is_none());
    }
}
