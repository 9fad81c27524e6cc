//! The headers of a tar, for regular files with short names ("ustar Interchange Format" of POSIX.1-2017, pax).
//!
//! ```text
//! tar    = *( header content padding ) end
//! header = 512 bytes: name, size, time, a checksum
//! end    = 1024 zero bytes
//! ```
//!
//! Content is padded with zeros to a multiple of 512 bytes. A size of 8 GiB and more is a binary number, as GNU tar,
//! bsdtar and Python write and read it.

pub const BLOCK: usize = 512;

/// The first size that does not fit into 11 octal digits, in bytes.
const BINARY: u64 = 8 << 30;

/// A regular file in a tar.
#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    /// At most 100 bytes.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// mtime, in seconds since 1970.
    pub time: u64,
}

impl Member {
    pub fn encode(&self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        let name = self.name.as_bytes();
        put(&mut block, 0, &name[..name.len().min(100)]);
        put(&mut block, 100, b"0000644\x000000000\x000000000\0");
        if self.size < BINARY {
            put(&mut block, 124, format!("{:011o}\0", self.size).as_bytes());
        } else {
            block[124] = 0x80;
            put(&mut block, 128, &self.size.to_be_bytes());
        }
        put(&mut block, 136, format!("{:011o}\0", self.time).as_bytes());
        put(&mut block, 156, b"0");
        put(&mut block, 257, b"ustar\x0000");
        let sum = checksum(&block);
        put(&mut block, 148, format!("{sum:06o}\0 ").as_bytes());
        block
    }

    /// Decodes a header; `None` if it is damaged or not that of a regular file.
    pub fn decode(block: &[u8; BLOCK]) -> Option<Member> {
        let is_file = matches!(block[156], b'0' | 0) && block[257..262] == *b"ustar" && block[345] == 0;
        if !is_file || octal(&block[148..156])? != checksum(block) {
            return None;
        }
        let name = block[..100].split(|byte| *byte == 0).next()?;
        let size = match block[124] {
            0x80 => u64::from_be_bytes(block[128..136].try_into().ok()?),
            _ => octal(&block[124..136])?,
        };
        Some(Member { name: std::str::from_utf8(name).ok()?.into(), size, time: octal(&block[136..148])? })
    }
}

/// How many zeros follow a content of this many bytes.
pub fn padding(size: u64) -> usize {
    (size.next_multiple_of(BLOCK as u64) - size) as usize
}

fn put(block: &mut [u8; BLOCK], at: usize, bytes: &[u8]) {
    block[at..at + bytes.len()].copy_from_slice(bytes);
}

/// The sum of all bytes, those of the checksum taken as spaces.
fn checksum(block: &[u8; BLOCK]) -> u64 {
    let sum = |bytes: &[u8]| bytes.iter().map(|byte| u64::from(*byte)).sum::<u64>();
    sum(&block[..148]) + 8 * u64::from(b' ') + sum(&block[156..])
}

fn octal(field: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(field).ok()?;
    u64::from_str_radix(text.trim_matches(['\0', ' ']), 8).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_gives_back_its_member() {
        for size in [0, 1, 511, 512, BINARY - 1, BINARY, u64::MAX >> 1] {
            let member = Member { name: "index/000012.sst".into(), size, time: 1_700_000_000 };
            assert_eq!(Member::decode(&member.encode()), Some(member));
        }
        assert_eq!([0, 1, 511, 512, 513].map(padding), [0, 511, 1, 0, 511]);
    }

    #[test]
    fn a_damaged_header_does_not_decode() {
        let member = Member { name: "index/CURRENT".into(), size: 16, time: 1 };
        for at in (0..BLOCK).filter(|at| !(148..156).contains(at)) {
            let mut block = member.encode();
            block[at] ^= 1;
            assert_eq!(Member::decode(&block), None, "byte {at}");
        }
        assert_eq!(Member::decode(&[0; BLOCK]), None);
    }
}
