//! The checksums that clients send with a body: `x-amz-checksum-NAME`, the base64 of the digest in network order.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha1::Sha1;
use sha2::{Digest, Sha256};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    Crc32,
    Crc32c,
    Crc64nvme,
    Sha1,
    Sha256,
}

impl Algorithm {
    const ALL: [Algorithm; 5] =
        [Algorithm::Crc32, Algorithm::Crc32c, Algorithm::Crc64nvme, Algorithm::Sha1, Algorithm::Sha256];

    /// The algorithm of this name, in letters of either case.
    pub fn parse(name: &str) -> Option<Algorithm> {
        Algorithm::ALL.into_iter().find(|algorithm| algorithm.name().eq_ignore_ascii_case(name))
    }

    pub fn name(self) -> &'static str {
        &self.header()["x-amz-checksum-".len()..]
    }

    /// The header or trailer with the checksum, its element in XML, and the bytes of a digest.
    fn form(self) -> (&'static str, &'static str, usize) {
        match self {
            Algorithm::Crc32 => ("x-amz-checksum-crc32", "ChecksumCRC32", 4),
            Algorithm::Crc32c => ("x-amz-checksum-crc32c", "ChecksumCRC32C", 4),
            Algorithm::Crc64nvme => ("x-amz-checksum-crc64nvme", "ChecksumCRC64NVME", 8),
            Algorithm::Sha1 => ("x-amz-checksum-sha1", "ChecksumSHA1", 20),
            Algorithm::Sha256 => ("x-amz-checksum-sha256", "ChecksumSHA256", 32),
        }
    }

    /// The header or trailer with the checksum.
    pub fn header(self) -> &'static str {
        self.form().0
    }

    /// The element in XML with the checksum.
    pub fn element(self) -> &'static str {
        self.form().1
    }

    /// The digest that a client sent as base64. `None`: this is no digest of the algorithm.
    pub fn decode(self, text: &str) -> Option<Vec<u8>> {
        STANDARD.decode(text).ok().filter(|digest| digest.len() == self.form().2)
    }
}

pub enum Hasher {
    Crc32(crc32fast::Hasher),
    Crc32c(u32),
    Crc64nvme(crc64fast_nvme::Digest),
    Sha1(Sha1),
    Sha256(Sha256),
}

impl Hasher {
    pub fn new(algorithm: Algorithm) -> Hasher {
        match algorithm {
            Algorithm::Crc32 => Hasher::Crc32(crc32fast::Hasher::new()),
            Algorithm::Crc32c => Hasher::Crc32c(0),
            Algorithm::Crc64nvme => Hasher::Crc64nvme(crc64fast_nvme::Digest::new()),
            Algorithm::Sha1 => Hasher::Sha1(Sha1::new()),
            Algorithm::Sha256 => Hasher::Sha256(Sha256::new()),
        }
    }

    pub fn update(&mut self, data: &[u8]) {
        match self {
            Hasher::Crc32(hasher) => hasher.update(data),
            Hasher::Crc32c(crc) => *crc = crc32c::crc32c_append(*crc, data),
            Hasher::Crc64nvme(hasher) => hasher.write(data),
            Hasher::Sha1(hasher) => hasher.update(data),
            Hasher::Sha256(hasher) => hasher.update(data),
        }
    }

    pub fn finish(self) -> Vec<u8> {
        match self {
            Hasher::Crc32(hasher) => hasher.finalize().to_be_bytes().to_vec(),
            Hasher::Crc32c(crc) => crc.to_be_bytes().to_vec(),
            Hasher::Crc64nvme(hasher) => hasher.sum64().to_be_bytes().to_vec(),
            Hasher::Sha1(hasher) => hasher.finalize().to_vec(),
            Hasher::Sha256(hasher) => hasher.finalize().to_vec(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The check values of the CRC catalogue, and sha1sum and sha256sum, of `123456789`.
    #[test]
    fn golden_checksums_are_made_from_any_pieces() {
        for (name, expected) in [
            ("crc32", "y/Q5Jg=="),
            ("CRC32C", "4waSgw=="),
            ("crc64nvme", "rosUhgp5mIg="),
            ("SHA1", "98O8HYCOBHMq32eZZczDTKeuNEE="),
            ("sha256", "FeKw08M4keuw8e9gnsQZQgwg4yDOlMZfvIwzEkSOsiU="),
        ] {
            let algorithm = Algorithm::parse(name).unwrap();
            assert_eq!(algorithm.name(), name.to_lowercase());
            for cut in 0..=9 {
                let (mut hasher, (first, second)) = (Hasher::new(algorithm), b"123456789".split_at(cut));
                hasher.update(first);
                hasher.update(second);
                let digest = hasher.finish();
                assert_eq!(STANDARD.encode(&digest), expected, "{name}");
                assert_eq!(algorithm.decode(expected), Some(digest));
            }
            for wrong in ["", "AAAA", "y/Q5Jh==", "y/Q5Jg", " y/Q5Jg==", "y_Q5Jg=="] {
                assert_eq!(algorithm.decode(wrong), None, "{name} {wrong:?}");
            }
        }
        assert_eq!(Algorithm::parse("sha512"), None);
    }
}
