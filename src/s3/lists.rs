//! Lists of objects, V1 and V2. The cost of a page depends on its entries only: one seek skips all keys below a common
//! prefix, and everything comes from the index.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use super::answer::{Answer, Outcome, document, iso};
use super::buckets::owner;
use super::failure::{Code, Failure};
use super::meta::{Meta, etag};
use super::xml::Document;
use super::{Call, S3};
use crate::error::Result;
use crate::format::percent_encoded;
use crate::format::record::Record;
use crate::store::Step;

/// The longest page, in keys and common prefixes.
const PAGE_MAX: u64 = 1000;

/// Which page of a bucket's objects.
struct PageRequest {
    prefix: Vec<u8>,
    delimiter: Vec<u8>,
    most: usize,
    /// The page begins behind this key or common prefix.
    after: Vec<u8>,
}

/// An object's name and what a list shows of it, or a common prefix and `None`.
type Item = (Vec<u8>, Option<Listing>);

/// The record itself can have 30 KiB of metadata.
struct Listing {
    etag: String,
    /// Bytes.
    size: u64,
    /// Seconds since 1970.
    time: u64,
}

impl Listing {
    fn of(record: &Record) -> Result<Listing> {
        let etag = etag(record, &Meta::decode(&record.meta)?);
        Ok(Listing { etag, size: record.size.unwrap_or_default(), time: record.time.unwrap_or_default() })
    }
}

impl PageRequest {
    /// The first name that can be on the page.
    fn start(&self) -> Vec<u8> {
        match self.common_prefix(&self.after) {
            // The last page ended with this prefix: all keys below it are known.
            Some(prefix) if prefix == self.after => successor(prefix).unwrap_or_else(|| prefix.to_vec()),
            _ if self.after.is_empty() => self.prefix.clone(),
            _ => [&self.after, b"\0".as_slice()].concat(),
        }
    }

    fn common_prefix<'n>(&self, name: &'n [u8]) -> Option<&'n [u8]> {
        common_prefix(name, &self.prefix, &self.delimiter)
    }
}

/// The common prefix that stands for a name, and for all others below it, in a list of the names that begin with
/// `prefix`. `None`: the name stands there itself.
pub fn common_prefix<'n>(name: &'n [u8], prefix: &[u8], delimiter: &[u8]) -> Option<&'n [u8]> {
    let rest = name.strip_prefix(prefix).filter(|_| !delimiter.is_empty())?;
    let at = rest.windows(delimiter.len()).position(|part| part == delimiter)?;
    Some(&name[..prefix.len() + at + delimiter.len()])
}

/// The first text above all that begin with this one; `None`: there is none.
fn successor(prefix: &[u8]) -> Option<Vec<u8>> {
    let last = prefix.iter().rposition(|byte| *byte < 0xff)?;
    let mut next = prefix[..=last].to_vec();
    next[last] += 1;
    Some(next)
}

impl S3 {
    /// The page's items, and whether more follow.
    fn page(&self, bucket: &[u8], wanted: &PageRequest) -> Result<(Vec<Item>, bool)> {
        let (mut items, mut more) = (Vec::new(), false);
        if wanted.most == 0 {
            return Ok((items, more));
        }
        let (prefix, start) = ([bucket, &wanted.prefix].concat(), [bucket, &wanted.start()].concat());
        self.store.scan(&prefix, &start, |key, record| {
            let name = &key[bucket.len()..];
            // The bucket's marker.
            if name.is_empty() {
                return Ok(Step::Next);
            }
            if items.len() == wanted.most {
                more = true;
                return Ok(Step::Stop);
            }
            let Some(prefix) = wanted.common_prefix(name) else {
                items.push((name.to_vec(), Some(Listing::of(&record)?)));
                return Ok(Step::Next);
            };
            items.push((prefix.to_vec(), None));
            Ok(successor(prefix).map_or(Step::Stop, |next| Step::SkipTo([bucket, &next].concat())))
        })?;
        Ok((items, more))
    }

    pub(super) fn list_objects<'a>(&'a self, call: &Call, is_v2: bool) -> Answer<'a> {
        let text = |name| call.query.get(name);
        let bytes = |name| text(name).unwrap_or_default().as_bytes().to_vec();
        let encoding = Encoding::of(call)?;
        let most = page_size(call, "max-keys")?;
        let token = text("continuation-token").filter(|token| is_v2 && !token.is_empty());
        let after = match token {
            Some(token) => read_token(token)?,
            None => bytes(if is_v2 { "start-after" } else { "marker" }),
        };
        let wanted = PageRequest { prefix: bytes("prefix"), delimiter: bytes("delimiter"), most, after };
        let (items, more) = self.page(&call.route.key(), &wanted)?;
        if items.is_empty() {
            self.check_bucket(call)?;
        }
        let mut list = Document::new("ListBucketResult");
        list.element("Name", &call.route.bucket).element("Prefix", encoding.shown(&wanted.prefix));
        if is_v2 {
            self.write_v2(call, &mut list, &encoding, &items, more);
        } else {
            list.element("Marker", encoding.shown(&wanted.after));
            if let Some((last, _)) = items.last().filter(|_| more && !wanted.delimiter.is_empty()) {
                list.element("NextMarker", encoding.shown(last));
            }
        }
        list.element("MaxKeys", most).element("IsTruncated", more);
        if !wanted.delimiter.is_empty() {
            list.element("Delimiter", encoding.shown(&wanted.delimiter));
        }
        encoding.write(&mut list);
        let with_owner = !is_v2 || text("fetch-owner") == Some("true");
        for item in &items {
            write_item(&mut list, item, &encoding, with_owner);
        }
        document(list)
    }

    fn write_v2(&self, call: &Call, list: &mut Document, encoding: &Encoding, items: &[Item], more: bool) {
        list.element("KeyCount", items.len());
        if let Some(after) = call.query.get("start-after") {
            list.element("StartAfter", encoding.shown(after.as_bytes()));
        }
        if let Some(token) = call.query.get("continuation-token") {
            list.element("ContinuationToken", token);
        }
        if let Some((last, _)) = items.last().filter(|_| more) {
            list.element("NextContinuationToken", URL_SAFE_NO_PAD.encode(last));
        }
    }
}

fn write_item(list: &mut Document, (name, listing): &Item, encoding: &Encoding, with_owner: bool) {
    let Some(Listing { etag, size, time }) = listing else {
        list.open("CommonPrefixes").element("Prefix", encoding.shown(name)).close();
        return;
    };
    list.open("Contents").element("Key", encoding.shown(name)).element("LastModified", iso(*time));
    list.element("ETag", format!("\"{etag}\"")).element("Size", size);
    if with_owner {
        owner(list, "Owner");
    }
    list.element("StorageClass", "STANDARD").close();
}

/// How keys stand in the XML: as text, or percent-encoded with `encoding-type=url`, which every byte survives.
pub struct Encoding {
    is_url: bool,
}

impl Encoding {
    pub fn of(call: &Call) -> Outcome<Encoding, Failure> {
        match call.query.get("encoding-type") {
            None | Some("") => Ok(Encoding { is_url: false }),
            Some(text) if text.eq_ignore_ascii_case("url") => Ok(Encoding { is_url: true }),
            Some(_) => Err(Failure::new(Code::InvalidArgument, "encoding-type is url or absent")),
        }
    }

    pub fn shown(&self, name: &[u8]) -> String {
        match self.is_url {
            true => percent_encoded(name).to_string(),
            false => String::from_utf8_lossy(name).into_owned(),
        }
    }

    pub fn write(&self, list: &mut Document) {
        if self.is_url {
            list.element("EncodingType", "url");
        }
    }
}

/// How many entries a page may have.
pub fn page_size(call: &Call, name: &str) -> Outcome<usize, Failure> {
    let most = call.query.number(name, 0..=i32::MAX as u64)?;
    Ok(most.unwrap_or(PAGE_MAX).min(PAGE_MAX) as usize)
}

fn read_token(token: &str) -> Outcome<Vec<u8>, Failure> {
    let wrong = |_| Failure::new(Code::InvalidArgument, "the continuation token is not one of this server's");
    URL_SAFE_NO_PAD.decode(token).map_err(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(prefix: &str, delimiter: &str, after: &str) -> PageRequest {
        PageRequest { prefix: prefix.into(), delimiter: delimiter.into(), most: 1000, after: after.into() }
    }

    #[test]
    fn keys_below_a_delimiter_are_one_prefix() {
        for (prefix, delimiter, name, common) in [
            ("", "", "a/b", None),
            ("", "/", "a", None),
            ("", "/", "a/b/c", Some("a/")),
            ("", "/", "/a", Some("/")),
            ("a/", "/", "a/b/c", Some("a/b/")),
            ("a/", "/", "a/b", None),
            ("a", "/", "a/b", Some("a/")),
            ("", "--", "a-b--c", Some("a-b--")),
        ] {
            let found = common_prefix(name.as_bytes(), prefix.as_bytes(), delimiter.as_bytes());
            assert_eq!(found, common.map(str::as_bytes), "{prefix} {delimiter} {name}");
        }
    }

    #[test]
    fn a_page_begins_behind_the_last_one() {
        for (prefix, delimiter, after, start) in [
            ("", "", "", ""),
            ("p", "/", "", "p"),
            ("", "/", "a", "a\0"),
            ("", "/", "a/", "a0"),
            ("", "", "a/", "a/\0"),
            ("", "/", "a/b", "a/b\0"),
            ("a/", "/", "a/b/", "a/b0"),
        ] {
            assert_eq!(wanted(prefix, delimiter, after).start(), start.as_bytes(), "{prefix} {delimiter} {after}");
        }
        assert_eq!(successor(b"a\xff\xff"), Some(b"b".to_vec()));
        assert_eq!(successor(b"\xff"), None);
    }

    #[test]
    fn names_are_shown_as_text_or_percent_encoded() {
        let (plain, url) = (Encoding { is_url: false }, Encoding { is_url: true });
        assert_eq!(plain.shown(b"a b+c/\xff"), "a b+c/\u{fffd}");
        assert_eq!(url.shown(b"a b+c/\xff"), "a%20b%2Bc/%FF");
    }
}
