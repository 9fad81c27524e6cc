//! Multipart uploads. An object made of N parts has the ETag `hex(md5(md5s of the parts))-N`, which META keeps together with
//! the upload's id: a Complete that is repeated finds both and gives the same answer.

use std::collections::HashMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use md5::{Digest, Md5};

use super::answer::{Answer, Fault, LONG, Outcome, document, empty, iso, kept_alive, unread, xml};
use super::buckets::owner;
use super::checksum::{Algorithm, Hasher};
use super::conditions::Conditions;
use super::failure::{Code, Failure};
use super::lists::{Encoding, common_prefix, page_size};
use super::meta::{Meta, etag};
use super::objects::{receive, stored};
use super::xml::{Document, parse_complete};
use super::{Call, S3};
use crate::error::{Error, Result};
use crate::format::record::{Hash, Record, hex};
use crate::http::Body;
use crate::store::{MultipartUpload, Part};

/// The most parts of an upload; their numbers begin at 1.
const PARTS_MAX: u64 = 10_000;

/// The fewest bytes of a part that is not the last one.
const PART_MIN: u64 = 5 << 20;

/// The name in an upload's META of the algorithm with which the object gets a checksum of its parts' checksums.
const COMPOSITE: &str = "composite";

impl Call<'_> {
    pub(super) fn part_number(&self) -> Outcome<u16, Failure> {
        let number = self.query.number("partNumber", 1..=PARTS_MAX)?;
        let missing = || Failure::new(Code::InvalidArgument, "partNumber is a number from 1 to 10000");
        number.map(|number| number as u16).ok_or_else(missing)
    }

    /// The upload's id. One that no upload of this store has is `None`.
    fn upload_id(&self) -> Option<u64> {
        let text = self.query.get("uploadId")?;
        u64::from_str_radix(text, 16).ok().filter(|id| id_text(*id) == text)
    }
}

/// An upload's id as clients have it.
fn id_text(id: u64) -> String {
    format!("{id:016x}")
}

impl S3 {
    pub(super) fn create_upload<'a>(&'a self, call: &Call) -> Answer<'a> {
        let mut meta = Meta::of_request(call.head, call.query)?;
        self.check_bucket(call)?;
        let mut headers = Vec::new();
        if let Some(name) = call.amz("x-amz-checksum-algorithm") {
            let unknown = || Failure::new(Code::InvalidRequest, format!("{name} is no algorithm of checksums"));
            let algorithm = Algorithm::parse(name).ok_or_else(unknown)?;
            let is_full = call.amz("x-amz-checksum-type").is_some_and(|of| of.eq_ignore_ascii_case("full_object"));
            if !is_full && algorithm != Algorithm::Crc64nvme {
                meta.set(COMPOSITE, algorithm.name());
            }
            headers.push(("x-amz-checksum-algorithm", name.to_ascii_uppercase()));
        }
        let upload = self.store.create_upload(&call.route.key(), meta.encode())?;
        let mut result = Document::new("InitiateMultipartUploadResult");
        result.element("Bucket", &call.route.bucket).element("Key", String::from_utf8_lossy(&call.route.object));
        result.element("UploadId", id_text(upload.id));
        let mut response = xml(200, result.finish());
        response.headers.append(&mut headers);
        Ok(response)
    }

    /// The upload that a request names.
    pub(super) fn upload(&self, call: &Call) -> Result<MultipartUpload> {
        let upload = call.upload_id().map(|id| self.store.find_upload(&call.route.key(), id)).transpose()?;
        upload.flatten().ok_or(Error::NoSuchUpload)
    }

    pub(super) fn upload_part<'a>(&'a self, call: &Call, body: &mut Body) -> Answer<'a> {
        let number = call.part_number()?;
        let upload = self.upload(call)?;
        let part = receive(call, body, |data, checksum| {
            let encode = || {
                let mut meta = Meta::default();
                meta.set_checksum(checksum());
                meta.encode()
            };
            self.store.put_part(&upload, number, data, encode)
        })?;
        stored(&part.record)
    }

    pub(super) fn abort<'a>(&'a self, call: &Call) -> Answer<'a> {
        self.store.abort_upload(&self.upload(call)?)?;
        Ok(empty(204))
    }

    pub(super) fn complete<'a>(&'a self, call: &Call, body: &mut Body) -> Answer<'a> {
        let id = call.upload_id().ok_or(Error::NoSuchUpload)?;
        let place = Place::of(call);
        let Some(upload) = self.store.find_upload(&place.key, id)? else {
            return Ok(xml(200, self.completed(&place, id)?));
        };
        let named = parse_complete(&self.read_text(call, body, false)?)?;
        let parts = choose(&self.store.parts(&upload)?, &named)?;
        let conditions = Conditions::of(call.head);
        conditions.judge(self.store.object(&place.key)?.as_ref())?;
        let meta = object_meta(&upload, &parts)?;
        if let Some((algorithm, value)) = meta.checksum()
            && call.amz(algorithm.header()).is_some_and(|sent| sent != value)
        {
            return Err(Fault::new(Code::BadDigest, "the object does not have the checksum that was sent"));
        }
        let total: u64 = parts.iter().map(size).sum();
        let work = move || {
            let judge = |old: Option<&Record>| self.judge(&place.bucket, &conditions, old);
            match self.store.complete_upload(&upload, &parts, meta.encode(), &judge) {
                Ok(record) => place.result(&record),
                // The same Complete on another connection may have been faster and removed the parts.
                Err(error) => self.completed(&place, id).map_err(|_| unread(error).into()),
            }
        };
        kept_alive(call, total >= LONG, work)
    }

    /// The result of an upload that was completed before, if the object is still the one that it made.
    fn completed(&self, place: &Place, id: u64) -> Outcome<String> {
        let record = self.store.object(&place.key)?.ok_or(Error::NoSuchUpload)?;
        match Meta::decode(&record.meta)?.get("upload") == Some(&id_text(id)) {
            true => place.result(&record),
            false => Err(Error::NoSuchUpload.into()),
        }
    }

    pub(super) fn list_parts<'a>(&'a self, call: &Call) -> Answer<'a> {
        let upload = self.upload(call)?;
        let (most, encoding) = (page_size(call, "max-parts")?, Encoding::of(call)?);
        let after = call.query.number("part-number-marker", 0..=u64::MAX)?.unwrap_or_default();
        let mut parts = self.store.parts(&upload)?;
        parts.retain(|part| u64::from(part.number) > after);
        let more = parts.len() > most;
        parts.truncate(most);
        let mut list = Document::new("ListPartsResult");
        list.element("Bucket", &call.route.bucket).element("Key", encoding.shown(&call.route.object));
        list.element("UploadId", id_text(upload.id));
        owner(&mut list, "Initiator");
        owner(&mut list, "Owner");
        list.element("StorageClass", "STANDARD").element("PartNumberMarker", after);
        let last = parts.last().map_or(after, |part| part.number.into());
        list.element("NextPartNumberMarker", last).element("MaxParts", most).element("IsTruncated", more);
        encoding.write(&mut list);
        for part in &parts {
            list.open("Part")
                .element("PartNumber", part.number)
                .element("LastModified", iso(part.record.time.unwrap_or_default()));
            list.element("ETag", format!("\"{}\"", md5(part))).element("Size", size(part));
            write_checksum(&mut list, &Meta::decode(&part.record.meta)?);
            list.close();
        }
        document(list)
    }

    pub(super) fn list_uploads<'a>(&'a self, call: &Call) -> Answer<'a> {
        self.check_bucket(call)?;
        let (most, encoding) = (page_size(call, "max-uploads")?, Encoding::of(call)?);
        let text = |name| call.query.get(name).unwrap_or_default();
        let [prefix, delimiter, marker, id_marker] =
            ["prefix", "delimiter", "key-marker", "upload-id-marker"].map(text);
        let bucket = call.route.key();
        let uploads = self.store.uploads(&[&bucket, prefix.as_bytes()].concat())?;
        let mut list = Document::new("ListMultipartUploadsResult");
        list.element("Bucket", &call.route.bucket).element("KeyMarker", encoding.shown(marker.as_bytes()));
        list.element("UploadIdMarker", id_marker).element("Prefix", encoding.shown(prefix.as_bytes()));
        if !delimiter.is_empty() {
            list.element("Delimiter", encoding.shown(delimiter.as_bytes()));
        }
        list.element("MaxUploads", most);
        encoding.write(&mut list);
        let is_after = |upload: &&MultipartUpload| {
            let name = &upload.key[bucket.len()..];
            let is_known = match id_marker {
                "" => name <= marker.as_bytes(),
                id => (name, id_text(upload.id)) <= (marker.as_bytes(), id.to_string()),
            };
            marker.is_empty() || !is_known
        };
        // The page's entries: the common prefix, if it is one, and the last upload that it stands for.
        let mut page: Vec<(Option<&[u8]>, &MultipartUpload)> = Vec::new();
        let mut more = false;
        for upload in uploads.iter().filter(is_after) {
            let common = common_prefix(&upload.key[bucket.len()..], prefix.as_bytes(), delimiter.as_bytes());
            match page.last_mut().filter(|(last, _)| common.is_some() && *last == common) {
                Some((_, last)) => *last = upload,
                None => {
                    if page.len() == most {
                        more = most > 0;
                        break;
                    }
                    page.push((common, upload));
                }
            }
        }
        for (common, upload) in &page {
            match common {
                Some(prefix) => {
                    list.open("CommonPrefixes").element("Prefix", encoding.shown(prefix)).close();
                }
                None => write_upload(&mut list, &encoding.shown(&upload.key[bucket.len()..]), upload),
            }
        }
        if let Some((_, last)) = page.last().filter(|_| more) {
            list.element("NextKeyMarker", encoding.shown(&last.key[bucket.len()..]));
            list.element("NextUploadIdMarker", id_text(last.id));
        }
        list.element("IsTruncated", more);
        document(list)
    }
}

fn write_upload(list: &mut Document, key: &str, upload: &MultipartUpload) {
    list.open("Upload").element("Key", key).element("UploadId", id_text(upload.id));
    owner(list, "Initiator");
    owner(list, "Owner");
    list.element("StorageClass", "STANDARD").element("Initiated", iso(upload.time)).close();
}

/// Where a Complete puts its object.
struct Place {
    key: Vec<u8>,
    bucket: String,
    object: Vec<u8>,
    /// The object's URL.
    location: String,
}

impl Place {
    fn of(call: &Call) -> Place {
        let location = format!("http://{}{}", call.head.header("host").unwrap_or_default(), call.head.path());
        Place { key: call.route.key(), bucket: call.route.bucket.clone(), object: call.route.object.clone(), location }
    }

    fn result(&self, record: &Record) -> Outcome<String> {
        let meta = Meta::decode(&record.meta)?;
        let mut result = Document::new("CompleteMultipartUploadResult");
        result.element("Location", &self.location).element("Bucket", &self.bucket);
        result.element("Key", String::from_utf8_lossy(&self.object));
        result.element("ETag", format!("\"{}\"", etag(record, &meta)));
        write_checksum(&mut result, &meta);
        Ok(result.finish())
    }
}

fn write_checksum(document: &mut Document, meta: &Meta) {
    if let Some((algorithm, value)) = meta.checksum() {
        document.element(algorithm.element(), value);
    }
}

/// Bytes of a part.
fn size(part: &Part) -> u64 {
    part.record.size.unwrap_or_default()
}

/// The ETag of a part. Every part has a hash.
fn md5(part: &Part) -> String {
    part.record.hash.map_or(String::new(), |hash| hex(&hash))
}

/// The parts that a Complete names, in its order.
fn choose(known: &[Part], named: &[(u16, String)]) -> Outcome<Vec<Part>, Failure> {
    if !named.is_sorted_by(|(one, _), (next, _)| one < next) {
        return Err(Failure::new(Code::InvalidPartOrder, "the numbers of the parts do not ascend"));
    }
    let known: HashMap<u16, &Part> = known.iter().map(|part| (part.number, part)).collect();
    let mut parts = Vec::new();
    for (number, etag) in named {
        match known.get(number) {
            Some(part) if md5(part) == *etag => parts.push((*part).clone()),
            _ => {
                let text = format!("part {number} was not uploaded, or has another ETag");
                return Err(Failure::new(Code::InvalidPart, text));
            }
        }
    }
    match parts.iter().rev().skip(1).find(|part| size(part) < PART_MIN) {
        Some(part) => {
            let text = format!("part {} has {} bytes: all but the last need 5 MiB", part.number, size(part));
            Err(Failure::new(Code::EntityTooSmall, text))
        }
        None => Ok(parts),
    }
}

/// META of the object that these parts become.
fn object_meta(upload: &MultipartUpload, parts: &[Part]) -> Result<Meta> {
    let given = Meta::decode(&upload.meta)?;
    let mut meta = given.of_client();
    let hashes: Vec<Hash> = parts.iter().filter_map(|part| part.record.hash).collect();
    meta.set("etag", format!("{}-{}", hex(&Md5::digest(hashes.concat()).into()), parts.len()));
    meta.set("upload", id_text(upload.id));
    let checksums: Vec<Meta> = parts.iter().map(|part| Meta::decode(&part.record.meta)).collect::<Result<_>>()?;
    match (given.get(COMPOSITE).and_then(Algorithm::parse), &checksums[..]) {
        (Some(algorithm), all) => meta.set_checksum(composite(algorithm, all).map(|sum| (algorithm, sum))),
        // The only part is the object.
        (None, [only]) => meta.set_checksum(only.checksum()),
        (None, _) => {}
    }
    Ok(meta)
}

/// The checksum of the parts' checksums. `None`: a part came without one.
fn composite(algorithm: Algorithm, parts: &[Meta]) -> Option<String> {
    let mut hasher = Hasher::new(algorithm);
    for part in parts {
        let value = part.get(algorithm.name())?;
        hasher.update(&algorithm.decode(value)?);
    }
    Some(format!("{}-{}", STANDARD.encode(hasher.finish()), parts.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(number: u16, size: u64) -> Part {
        Part { number, record: Record { size: Some(size), hash: Some([number as u8; 16]), ..Record::default() } }
    }

    fn code(known: &[Part], named: &[(u16, u8)]) -> Outcome<Vec<u16>, Code> {
        let named: Vec<_> = named.iter().map(|(number, of)| (*number, hex(&[*of; 16]))).collect();
        let parts = choose(known, &named).map_err(|failure| failure.code)?;
        Ok(parts.iter().map(|part| part.number).collect())
    }

    #[test]
    fn a_complete_names_parts_that_fit() {
        let known = [part(1, PART_MIN), part(2, PART_MIN - 1), part(7, PART_MIN), part(9, 1)];
        assert_eq!(code(&known, &[(1, 1), (7, 7), (9, 9)]), Ok(vec![1, 7, 9]));
        assert_eq!(code(&known, &[(1, 1), (2, 2)]), Ok(vec![1, 2]), "the last named may be small");
        assert_eq!(code(&known, &[(9, 9)]), Ok(vec![9]));
        assert_eq!(code(&known, &[(2, 2), (7, 7)]), Err(Code::EntityTooSmall));
        assert_eq!(code(&known, &[(7, 7), (1, 1)]), Err(Code::InvalidPartOrder));
        assert_eq!(code(&known, &[(1, 1), (1, 1)]), Err(Code::InvalidPartOrder));
        assert_eq!(code(&known, &[(1, 2)]), Err(Code::InvalidPart));
        assert_eq!(code(&known, &[(3, 3)]), Err(Code::InvalidPart));
    }

    #[test]
    fn the_etag_is_of_the_parts_md5s() {
        let mut upload = MultipartUpload { id: 17, key: b"/b/a".to_vec(), time: 0, meta: "content-type=x".into() };
        let meta = object_meta(&upload, &[part(1, PART_MIN), part(2, 1)]).unwrap();
        let digest = hex(&Md5::digest([[1; 16], [2; 16]].concat()).into());
        assert_eq!(meta.encode(), format!("content-type=x&etag={digest}-2&upload=0000000000000011"));
        upload.meta = "composite=sha256".into();
        assert_eq!(object_meta(&upload, &[part(1, 1)]).unwrap().checksum(), None);
    }
}
