//! GETs whose bytes do not go through the master: by the front (`-accel`), or by a redirect (`-s3redirect`).
//!
//! The front is the nginx of `deploy/front.conf`. The response names its location `@volume` and tells it in headers of its
//! own what to fetch and what to say of it: `X-Mkv-Blob` the URL without `http://`, `X-Mkv-Replica` what the front reports
//! in `X-Mkv-Failed` if it cannot read it, `X-Mkv-Range`, and the object's headers under names of `CARRIED`. nginx cannot
//! carry a header whose name it does not know, nor an empty one: such objects are streamed by the master.

use super::answer::{Outcome, empty};
use super::get::{Headers, Object, Range};
use super::route::Operation;
use super::{Call, S3};
use crate::error::Error;
use crate::http::Response;

/// Headers of objects, and the names under which the front takes them.
const CARRIED: [(&str, &str); 23] = [
    ("etag", "X-Mkv-Etag"),
    ("last-modified", "X-Mkv-Modified"),
    ("content-type", "X-Mkv-Type"),
    ("content-disposition", "X-Mkv-Disposition"),
    ("content-encoding", "X-Mkv-Encoding"),
    ("content-language", "X-Mkv-Language"),
    ("cache-control", "X-Mkv-Cache"),
    ("expires", "X-Mkv-Expires"),
    ("x-amz-checksum-crc32", "X-Mkv-Crc32"),
    ("x-amz-checksum-crc32c", "X-Mkv-Crc32c"),
    ("x-amz-checksum-crc64nvme", "X-Mkv-Crc64nvme"),
    ("x-amz-checksum-sha1", "X-Mkv-Sha1"),
    ("x-amz-checksum-sha256", "X-Mkv-Sha256"),
    // rclone, s3cmd, s3fs-fuse, JuiceFS and litestream.
    ("x-amz-meta-mtime", "X-Mkv-Meta-Mtime"),
    ("x-amz-meta-md5chksum", "X-Mkv-Meta-Md5chksum"),
    ("x-amz-meta-s3cmd-attrs", "X-Mkv-Meta-S3cmd-Attrs"),
    ("x-amz-meta-mode", "X-Mkv-Meta-Mode"),
    ("x-amz-meta-uid", "X-Mkv-Meta-Uid"),
    ("x-amz-meta-gid", "X-Mkv-Meta-Gid"),
    ("x-amz-meta-ctime", "X-Mkv-Meta-Ctime"),
    ("x-amz-meta-atime", "X-Mkv-Meta-Atime"),
    ("x-amz-meta-crc32c", "X-Mkv-Meta-Crc32c"),
    ("x-amz-meta-litestream-timestamp", "X-Mkv-Meta-Litestream-Timestamp"),
];

/// Clients that follow the redirect of a GET, by a part of their User-Agent: pyarrow, s3fs and dvc, minio-py, polars and
/// deltalake, rclone, s5cmd, litestream and docker-registry, JuiceFS, s3fs-fuse. boto3, the AWS CLI, restic, s3cmd and
/// others do not.
const FOLLOWERS: [&str; 8] =
    ["aws-sdk-cpp/", "aiobotocore/", "minio-py/", "object_store/", "rclone/", "aws-sdk-go", "JuiceFS", "s3fs/"];

impl S3 {
    /// The response that sends a reader, or the front, to a volume. `None`: the master has to stream the value. Fails with
    /// an error of the store if the object has changed, too.
    pub(super) fn send_to_volume<'a>(
        &'a self,
        call: &Call,
        key: &[u8],
        object: &Object,
        range: Range,
        headers: &Headers,
    ) -> Outcome<Option<Response<'a>>> {
        // A volume with passwords would need the master's own, which no client may see.
        if self.store.own_auth().is_some() && !self.store.volumes.are_signed() {
            return Ok(None);
        }
        let is_front = self.config.accel && call.head.header("x-mkv-front").is_some();
        let carried = if is_front { carried(headers) } else { None };
        if carried.is_none() && (is_front || !self.config.redirect || !follows(call, object)) {
            return Ok(None);
        }
        let failed: Vec<_> = call.head.header("x-mkv-failed").unwrap_or_default().split_whitespace().collect();
        let located = self.store.get(key, self.store.own_auth(), if is_front { &failed } else { &[] })?;
        let Some(located) = located.filter(|located| located.record == object.record) else {
            return Err(Error::Unavailable("the object has changed meanwhile".into()).into());
        };
        let (replica, path, time) = (&located.replica, &located.path, self.config.linktime);
        let Some(mut headers) = carried else {
            let link = format!("http://{}", self.store.volumes.link(replica, path, time));
            let headers = vec![("Location", link), ("Cache-Control", "no-store".to_string())];
            return Ok(Some(Response { headers, ..empty(307) }));
        };
        headers.push(("X-Accel-Redirect", "@volume".to_string()));
        headers.push(("X-Mkv-Blob", self.store.volumes.link_by_address(replica, path, time)?));
        headers.push(("X-Mkv-Replica", format!("{replica}{path}")));
        headers.push(("X-Mkv-Id", call.id.to_string()));
        if let Range::Part(first, last) = range {
            headers.push(("X-Mkv-Range", format!("bytes={first}-{last}")));
        }
        Ok(Some(Response { headers, ..empty(200) }))
    }
}

/// The headers under the names that the front takes. `None`: it does not know one of them.
fn carried(headers: &Headers) -> Option<Vec<(&'static str, String)>> {
    let carry = |(name, value): &(String, String)| {
        let (_, carried) = CARRIED.iter().find(|(known, _)| known == name)?;
        (!value.is_empty()).then(|| (*carried, value.clone()))
    };
    headers.iter().map(carry).collect()
}

/// Whether the client follows a redirect and loses nothing by it: the volume knows neither the object's headers nor its
/// ETag.
fn follows(call: &Call, object: &Object) -> bool {
    let conditions = ["if-match", "if-none-match", "if-modified-since", "if-unmodified-since", "if-range"];
    call.route.operation == Operation::Get
        && call.head.header("user-agent").is_some_and(|agent| FOLLOWERS.iter().any(|known| agent.contains(known)))
        && !conditions.iter().any(|name| call.head.header(name).is_some())
        && !call.query.0.iter().any(|(name, _)| name.starts_with("response-"))
        && object.meta.get("content-encoding").is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(names: &[(&str, &str)]) -> Headers {
        names.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
    }

    #[test]
    fn the_front_gets_an_object_only_with_all_its_headers() {
        let known = headers(&[("etag", "\"x\""), ("x-amz-meta-mtime", "1")]);
        let carried_known = vec![("X-Mkv-Etag", "\"x\"".to_string()), ("X-Mkv-Meta-Mtime", "1".to_string())];
        assert_eq!(carried(&known), Some(carried_known));
        assert_eq!(carried(&headers(&[("etag", "\"x\""), ("x-amz-meta-colour", "red")])), None);
        assert_eq!(carried(&headers(&[("etag", "\"x\""), ("x-amz-meta-mtime", "")])), None);
    }

    #[test]
    fn the_front_knows_every_header_that_can_be_carried() {
        let conf = include_str!("../../deploy/front.conf");
        for (name, carried) in CARRIED {
            let variable = format!("$upstream_http_{};", carried.to_ascii_lowercase().replace('-', "_"));
            assert!(conf.contains(&variable), "{carried}");
            let added = format!("add_header {name} $").to_ascii_lowercase();
            assert!(conf.to_ascii_lowercase().contains(&added), "{name}");
        }
    }
}
