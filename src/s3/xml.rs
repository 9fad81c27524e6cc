//! XML of requests and responses.
//!
//! Requests are read without building a tree, and attributes are skipped unread, so time and memory grow with the text
//! only. Namespaces are optional, unknown elements are passed over, and a DTD is refused.

use std::fmt::Display;

use quick_xml::Reader;
use quick_xml::escape::resolve_xml_entity;
use quick_xml::events::{BytesRef, Event};

use super::failure::{Code, Failure};

pub const DECLARATION: &str = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n";

const NAMESPACE: &str = "http://s3.amazonaws.com/doc/2006-03-01/";

/// The most objects of one DeleteObjects.
const OBJECTS_MAX: usize = 1_000;

/// The most parts of one upload, and the highest number of a part.
const PARTS_MAX: usize = 10_000;

/// How deep elements may lie in each other, and the longest name of one: limits for `parse`.
const DEPTH_MAX: usize = 16;
const NAME_MAX: usize = 64;

/// A document that is being written.
pub struct Document {
    text: String,
    open: Vec<&'static str>,
}

impl Document {
    /// `root`, as each tag, is the element's name, and its attributes if it has some.
    pub fn new(root: &'static str) -> Document {
        let mut document = Document::without_namespace(root);
        document.text.truncate(document.text.len() - 1);
        document.text.push_str(&format!(" xmlns=\"{NAMESPACE}\">"));
        document
    }

    pub fn without_namespace(root: &'static str) -> Document {
        let mut document = Document { text: DECLARATION.to_string(), open: Vec::new() };
        document.open(root);
        document
    }

    pub fn open(&mut self, tag: &'static str) -> &mut Document {
        self.text.push_str(&format!("<{tag}>"));
        self.open.push(tag.split(' ').next().unwrap_or(tag));
        self
    }

    /// Closes the element that was opened last.
    pub fn close(&mut self) -> &mut Document {
        if let Some(name) = self.open.pop() {
            self.text.push_str(&format!("</{name}>"));
        }
        self
    }

    /// Writes an element that holds only text.
    pub fn element(&mut self, name: &'static str, text: impl Display) -> &mut Document {
        self.text.push_str(&format!("<{name}>{}</{name}>", escape(&text.to_string())));
        self
    }

    /// Closes all that is open.
    pub fn finish(mut self) -> String {
        while !self.open.is_empty() {
            self.close();
        }
        self.text
    }
}

/// Text as it stands in a document. A character that XML cannot hold becomes U+FFFD.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '&' => escaped.push_str("&amp;"),
            '"' => escaped.push_str("&quot;"),
            // A parser reads a bare one as a line feed.
            '\r' => escaped.push_str("&#13;"),
            '\0'..' ' | '\u{FFFE}' | '\u{FFFF}' if !matches!(c, '\n' | '\t') => escaped.push('\u{FFFD}'),
            _ => escaped.push(c),
        }
    }
    escaped
}

/// DeleteObjects.
#[derive(Debug, Default, PartialEq)]
pub struct Delete {
    /// Tell only of failures.
    pub quiet: bool,
    pub objects: Vec<Object>,
}

#[derive(Debug, Clone, Default, PartialEq)]
pub struct Object {
    /// Not empty.
    pub key: String,
    /// `None` also for `null`, the version that objects of a bucket without versions have.
    pub version: Option<String>,
    /// Delete the object only if this is its ETag, which is given without quotes.
    pub etag: Option<String>,
}

pub fn parse_delete(text: &str) -> Result<Delete, Failure> {
    let (mut delete, mut object, mut key) = (Delete::default(), Object::default(), None);
    parse(text, "Delete", |path, text| {
        match path {
            "Quiet" => delete.quiet = text.trim() == "true",
            "Object Key" if key.replace(text.to_string()).is_some() => return Err(malformed("an object has two keys")),
            "Object VersionId" => object.version = Some(text.to_string()).filter(|id| id != "null" && !id.is_empty()),
            "Object ETag" => object.etag = Some(unquote(text)),
            "Object LastModifiedTime" | "Object Size" => {
                return Err(Failure::new(Code::NotImplemented, "deleting by time or size is not implemented"));
            }
            "Object" => {
                let mut object = std::mem::take(&mut object);
                object.key =
                    key.take().filter(|key| !key.is_empty()).ok_or_else(|| malformed("an object has no key"))?;
                delete.objects.push(object);
                if delete.objects.len() > OBJECTS_MAX {
                    return Err(malformed("a request deletes 1 to 1,000 objects"));
                }
            }
            _ => {}
        }
        Ok(())
    })?;
    match delete.objects.is_empty() {
        true => Err(malformed("a request deletes 1 to 1,000 objects")),
        false => Ok(delete),
    }
}

/// CompleteMultipartUpload: the number and the ETag, without quotes, of each part, in the order of the request.
pub fn parse_complete(text: &str) -> Result<Vec<(u16, String)>, Failure> {
    let (mut parts, mut number, mut etag) = (Vec::new(), None, None);
    parse(text, "CompleteMultipartUpload", |path, text| {
        match path {
            "Part PartNumber" => {
                let parsed = text.trim().parse().ok().filter(|number| (1..=PARTS_MAX as u16).contains(number));
                number = Some(parsed.ok_or_else(|| malformed("a part's number is not one of 1 to 10,000"))?);
            }
            "Part ETag" => etag = Some(unquote(text)),
            "Part" => {
                let (Some(number), Some(etag)) = (number.take(), etag.take()) else {
                    return Err(malformed("a part has no number or no ETag"));
                };
                parts.push((number, etag));
            }
            _ => {}
        }
        Ok(())
    })?;
    match parts.len() {
        1..=PARTS_MAX => Ok(parts),
        _ => Err(malformed("an upload has 1 to 10,000 parts")),
    }
}

/// CreateBucket. The region that it may name is ignored.
pub fn parse_create_bucket(text: &str) -> Result<(), Failure> {
    if text.trim().is_empty() { Ok(()) } else { parse(text, "CreateBucketConfiguration", |_, _| Ok(())) }
}

fn unquote(etag: &str) -> String {
    let etag = etag.trim();
    etag.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(etag).to_string()
}

fn malformed(why: &str) -> Failure {
    Failure::new(Code::MalformedXML, format!("the XML of the request is not what it should be: {why}"))
}

/// Calls `visit` at the end of each element below the root, with the names that lead to it, separated by spaces, and the
/// text in it. An element holds text or elements, not both.
fn parse(text: &str, root: &str, mut visit: impl FnMut(&str, &str) -> Result<(), Failure>) -> Result<(), Failure> {
    let mut reader = Reader::from_str(text);
    reader.config_mut().expand_empty_elements = true;
    // The names of the open elements; the text since the last tag; whether that tag opened an element.
    let (mut path, mut inner, mut opened) = (Vec::new(), String::new(), false);
    let mut ended = false;
    loop {
        let piece = match reader.read_event().map_err(|e| malformed(&e.to_string()))? {
            Event::Start(tag) => {
                let name = tag.local_name().into_inner().to_string();
                let is_root = path.is_empty() && !ended && name == root;
                let is_inner =
                    (1..DEPTH_MAX).contains(&path.len()) && name.len() <= NAME_MAX && inner.trim().is_empty();
                if !is_root && !is_inner {
                    return Err(malformed(&format!("it is not one {root}, or there is text between its elements")));
                }
                path.push(name);
                opened = true;
                inner.clear();
                continue;
            }
            Event::End(_) => {
                if path.len() > 1 {
                    visit(&path[1..].join(" "), &inner)?;
                }
                path.pop();
                (opened, ended) = (false, path.is_empty());
                inner.clear();
                continue;
            }
            Event::Text(piece) => piece.into_inner(),
            Event::CData(piece) => piece.into_inner(),
            Event::GeneralRef(name) => resolve(&name)?.into(),
            Event::DocType(_) => return Err(malformed("it has a DTD")),
            // An empty element comes as Start and End.
            Event::Decl(_) | Event::Comment(_) | Event::PI(_) | Event::Empty(_) => continue,
            Event::Eof if ended => return Ok(()),
            Event::Eof => return Err(malformed("it is cut short")),
        };
        if opened {
            inner.push_str(&piece);
        } else if !piece.trim().is_empty() {
            return Err(malformed("there is text between its elements"));
        }
    }
}

/// The text that `&name;` stands for. Unlike XML, this takes control characters: keys may have them.
fn resolve(name: &BytesRef) -> Result<String, Failure> {
    match name.resolve_char_ref() {
        Ok(Some(c)) => Ok(c.to_string()),
        Ok(None) => {
            resolve_xml_entity(name).map(String::from).ok_or_else(|| malformed("it has an entity that is not defined"))
        }
        Err(e) => Err(malformed(&e.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_written() {
        let mut document = Document::new("ListBucketResult");
        document.element("MaxKeys", 7).open("Contents a=\"b\"").element("Key", "<é>\r\n\u{1}").close();
        document.open("Owner").open("ID");
        let expected = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<ListBucketResult \
                        xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><MaxKeys>7</MaxKeys><Contents a=\"b\">\
                        <Key>&lt;é&gt;&#13;\n\u{FFFD}</Key></Contents><Owner><ID></ID></Owner></ListBucketResult>";
        assert_eq!(document.finish(), expected);
    }

    fn object(key: &str) -> Object {
        Object { key: key.into(), ..Object::default() }
    }

    #[test]
    fn deletes_are_read() {
        let text = "\u{FEFF}<?xml version='1.0'?>\n<!-- x --><s:Delete xmlns:s=\"y\" xmlns='http://s3.amazonaws.com/doc/2006-03-01/'>\
                    <s:Object><s:Key>a b</s:Key ></s:Object>\n <Object> <VersionId>null</VersionId><Key>&lt;&#x1;&#13;\r\n&quot;é</Key>\
                    <Other><Key>x</Key></Other><ETag/></Object><Object><Key><![CDATA[<c>&]]><!-- -->&amp;</Key><VersionId>7</VersionId>\
                    <ETag>&quot;e&quot;</ETag></Object><Quiet> true </Quiet></s:Delete>\n";
        let objects = vec![
            object("a b"),
            Object { etag: Some("".into()), ..object("<\u{1}\r\r\n\"é") },
            Object { version: Some("7".into()), etag: Some("e".into()), ..object("<c>&&") },
        ];
        assert_eq!(parse_delete(text), Ok(Delete { quiet: true, objects }));
        let of = |count| format!("<Delete>{}</Delete>", "<Object><Key> </Key></Object>".repeat(count));
        assert_eq!(parse_delete(&of(1_000)).unwrap(), Delete { quiet: false, objects: vec![object(" "); 1_000] });
        assert_eq!(parse_delete(&of(1_001)).unwrap_err().code, Code::MalformedXML);
        let by_size = "<Delete><Object><Key>a</Key><Size>1</Size></Object></Delete>";
        assert_eq!(parse_delete(by_size).unwrap_err().code, Code::NotImplemented);
    }

    #[test]
    fn malformed_deletes_are_refused() {
        let good = "<Delete><Object><Key>a</Key></Object></Delete>";
        assert!(parse_delete(good).is_ok());
        for (from, to) in [
            (good, ""),
            (good, "x"),
            ("<Object><Key>a</Key></Object>", ""),
            ("<Key>a</Key>", ""),
            ("<Key>a</Key>", "<Key></Key>"),
            ("<Key>a</Key>", "<Key>a</Key><Key>b</Key>"),
            ("<Key>a</Key>", "<Key>a<b/></Key>"),
            ("<Key>a</Key>", "<Key><b/>a</Key>"),
            ("<Key>a</Key>", "<Key>&other;</Key>"),
            ("<Key>a</Key>", "<Key>&#0;</Key>"),
            ("<Key>a</Key>", "<Key>& </Key>"),
            ("<Key>a</Key>", "<Key>a</Kex>"),
            ("<Key>a</Key>", "x<Key>a</Key>"),
            ("<Delete>", "<!DOCTYPE d [<!ENTITY x \"y\">]><Delete>"),
            ("<Delete>", "<Deletes>"),
            ("<Delete>", "x<Delete>"),
            ("</Delete>", ""),
            ("</Delete>", "</Delete>x"),
            ("</Delete>", "</Delete><Delete/>"),
            ("</Delete>", "</Delete></Delete>"),
            ("<Key>", &"<Key>".repeat(1_000)),
        ] {
            assert_eq!(
                parse_delete(&good.replacen(from, to, 1)).unwrap_err().code,
                Code::MalformedXML,
                "{from} -> {to}"
            );
        }
    }

    #[test]
    fn parts_are_read_in_their_order() {
        let text = "<CompleteMultipartUpload><Part><PartNumber>10000</PartNumber><ETag>\"a\"</ETag>\
                    <ChecksumCRC32>AAAAAA==</ChecksumCRC32></Part><Part><ETag>b</ETag><PartNumber> 1 </PartNumber></Part>\
                    </CompleteMultipartUpload>";
        assert_eq!(parse_complete(text), Ok(vec![(10_000, "a".into()), (1, "b".into())]));
        for (from, to) in [
            ("10000", "0"),
            ("10000", "10001"),
            ("10000", "65537"),
            ("10000", ""),
            ("<ETag>b</ETag>", ""),
            (text, "<CompleteMultipartUpload/>"),
        ] {
            assert_eq!(
                parse_complete(&text.replacen(from, to, 1)).unwrap_err().code,
                Code::MalformedXML,
                "{from} -> {to}"
            );
        }
        let of = |count| {
            let part = "<Part><PartNumber>1</PartNumber><ETag>a</ETag></Part>".repeat(count);
            parse_complete(&format!("<CompleteMultipartUpload>{part}</CompleteMultipartUpload>")).is_ok()
        };
        assert!(of(10_000) && !of(10_001));
    }

    #[test]
    fn a_bucket_may_name_its_region() {
        let of = |inner: &str| {
            parse_create_bucket(&format!("<CreateBucketConfiguration>{inner}</CreateBucketConfiguration>"))
        };
        assert_eq!(of("<LocationConstraint>eu-x-1</LocationConstraint>"), Ok(()));
        assert_eq!((of(""), of("<LocationConstraint/>"), parse_create_bucket(" \n")), (Ok(()), Ok(()), Ok(())));
        assert_eq!(parse_create_bucket("<Other/>").unwrap_err().code, Code::MalformedXML);
    }

    #[test]
    fn no_input_makes_it_panic() {
        let seed = std::env::var("MKV_SEED").map_or_else(|_| fastrand::u64(..), |s| s.parse().unwrap());
        println!("MKV_SEED={seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        let parts = "<Delete>|</Delete>|<Object>|</Object>|<Key>|</Key>|<Key/>|<Part>|</Part>|<PartNumber>|7|\
                     </PartNumber>|<CompleteMultipartUpload>|</CompleteMultipartUpload>|<ETag>\"|\"</ETag>|&|;|\
                     &amp;|&#x|&#1114112;|<![CDATA[|]]>|<!--|-->|<?|?>|<!DOCTYPE|<|>|/|é|\0|\u{FEFF}|=|:";
        let parts: Vec<&str> = parts.split('|').collect();
        let mut right = 0;
        for _ in 0..20_000 {
            let inner: String = (0..random.usize(..10)).map(|_| parts[random.usize(..parts.len())]).collect();
            let text =
                if random.bool() { inner } else { format!("<Delete><Object><Key>k</Key>{inner}</Object></Delete>") };
            right += parse_delete(&text).is_ok() as usize;
            let _ = (parse_complete(&text), parse_create_bucket(&text));
            let mut document = Document::new("x");
            document.element("y", &text);
            assert!(parse(&document.finish(), "x", |_, _| Ok(())).is_ok(), "{text}");
        }
        assert!(right > 0);
    }
}
