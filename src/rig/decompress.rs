//! What the kernel compresses: boot images and modules, in gzip, xz or zstd.

use std::io::{self, Read};

/// Unpacks `bytes` by their magic; bytes without a known magic come back as `None`.
///
/// Whatever follows the compressed stream is left alone: a boot image has four bytes of length there.
pub fn decompress(bytes: &[u8]) -> Option<io::Result<Vec<u8>>> {
    let mut unpacked = Vec::new();
    let read = match bytes {
        [0x1f, 0x8b, ..] => flate2::read::GzDecoder::new(bytes).read_to_end(&mut unpacked),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => lzma_rust2::XzReader::new(bytes, false).read_to_end(&mut unpacked),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => match ruzstd::decoding::StreamingDecoder::new(bytes) {
            Ok(mut decoder) => decoder.read_to_end(&mut unpacked),
            Err(error) => Err(io::Error::other(error)),
        },
        _ => return None,
    };
    Some(read.map(|_| unpacked))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn what_follows_the_stream_is_left_alone() {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(b"kernel").unwrap();
        let mut bytes = encoder.finish().unwrap();
        bytes.extend_from_slice(&6u32.to_le_bytes());
        assert_eq!(decompress(&bytes).unwrap().unwrap(), b"kernel");
    }

    #[test]
    fn unknown_bytes_are_not_compressed_and_cut_ones_are_an_error() {
        assert!(decompress(b"\x7fELF").is_none());
        assert!(decompress(b"").is_none());
        assert!(decompress(&[0x1f, 0x8b, 8, 0]).unwrap().is_err());
        assert!(decompress(&[0xfd, b'7', b'z', b'X', b'Z', 0, 0]).unwrap().is_err());
        assert!(decompress(&[0x28, 0xb5, 0x2f, 0xfd]).unwrap().is_err());
    }
}
