//! What a request says of its signature, in the header Authorization or in a presigned URL.

use std::time::{Duration, SystemTime};

use jiff::civil::DateTime;
use jiff::{Timestamp, tz::TimeZone};

use super::failure::{Code, Failure};
use super::head::{Head, Query};

pub const ALGORITHM: &str = "AWS4-HMAC-SHA256";

/// The longest life of a presigned URL, in seconds: a week.
const EXPIRES_MAX: u64 = 604_800;

pub struct Claim {
    /// Access key, date, region, service, `aws4_request`.
    pub credential: String,
    pub signed_headers: String,
    pub signature: String,
    /// The time of the request, and how it is signed: as `20130524T000000Z`.
    pub time: SystemTime,
    pub timestamp: String,
    pub payload: String,
    /// The life of a presigned URL.
    pub expires: Option<Duration>,
    /// The code of the error if the claim makes no sense.
    pub malformed: Code,
}

impl Claim {
    /// The claim in the header Authorization, which has this value.
    pub fn of_header(head: &Head, value: &str) -> Result<Claim, Failure> {
        let malformed = |why: &str| Failure::new(Code::AuthorizationHeaderMalformed, format!("Authorization {why}"));
        let Some(fields) = value.strip_prefix(ALGORITHM).filter(|rest| rest.starts_with(' ')) else {
            return Err(match value.split(' ').next() {
                Some("AWS") => {
                    Failure::new(Code::InvalidRequest, format!("sign with {ALGORITHM}: SigV2 is not supported"))
                }
                Some(ALGORITHM) => malformed("has no Credential"),
                _ => Failure::new(Code::InvalidArgument, format!("sign with {ALGORITHM}")),
            });
        };
        let mut found = [const { None }; 3];
        for field in fields.split(',') {
            let (name, value) = field.trim().split_once('=').ok_or_else(|| malformed("is not made of NAME=VALUE"))?;
            let place = ["Credential", "SignedHeaders", "Signature"].iter().position(|its| *its == name);
            let place = place.ok_or_else(|| malformed("has an unknown field"))?;
            if found[place].replace(value.to_string()).is_some() {
                return Err(malformed("has a field twice"));
            }
        }
        let [Some(credential), Some(signed_headers), Some(signature)] = found else {
            return Err(malformed("needs Credential, SignedHeaders and Signature"));
        };
        let payload = head.content_sha256().ok_or_else(|| {
            Failure::new(Code::InvalidRequest, "a signed request needs the header x-amz-content-sha256")
        })?;
        let no_time = || Failure::new(Code::AccessDenied, "a signed request needs a valid x-amz-date or Date");
        let (time, timestamp) = timestamp(head).ok_or_else(no_time)?;
        Ok(Claim {
            credential,
            signed_headers,
            signature,
            time,
            timestamp,
            payload,
            expires: None,
            malformed: Code::AuthorizationHeaderMalformed,
        })
    }

    /// The claim of a presigned URL.
    pub fn of_query(head: &Head, query: &Query) -> Result<Claim, Failure> {
        let malformed = |why: &str| Failure::new(Code::AuthorizationQueryParametersError, why);
        let get = |name: &str| {
            let missing = || malformed(&format!("a presigned URL needs {name}"));
            query.get(name).map(String::from).ok_or_else(missing)
        };
        if get("X-Amz-Algorithm")? != ALGORITHM {
            return Err(malformed("X-Amz-Algorithm is not AWS4-HMAC-SHA256"));
        }
        let timestamp = get("X-Amz-Date")?;
        let time = parse_timestamp(&timestamp);
        let expires = get("X-Amz-Expires")?.parse().ok().filter(|seconds| (1..=EXPIRES_MAX).contains(seconds));
        let expires = expires.ok_or_else(|| malformed("X-Amz-Expires is not one of 1 to 604800 seconds"))?;
        Ok(Claim {
            credential: get("X-Amz-Credential")?,
            signed_headers: get("X-Amz-SignedHeaders")?,
            signature: get("X-Amz-Signature")?,
            time: time.ok_or_else(|| malformed("X-Amz-Date is no time such as 20130524T000000Z"))?,
            timestamp,
            payload: head.content_sha256().unwrap_or_else(|| "UNSIGNED-PAYLOAD".into()),
            expires: Some(Duration::from_secs(expires)),
            malformed: Code::AuthorizationQueryParametersError,
        })
    }
}

/// The time of a request, as it is signed.
fn timestamp(head: &Head) -> Option<(SystemTime, String)> {
    let text = head.header("x-amz-date").or_else(|| head.header("Date"))?;
    match httpdate::parse_http_date(text) {
        Ok(time) => Some((time, Timestamp::try_from(time).ok()?.strftime("%Y%m%dT%H%M%SZ").to_string())),
        Err(_) => Some((parse_timestamp(text)?, text.to_string())),
    }
}

fn parse_timestamp(text: &str) -> Option<SystemTime> {
    let time = DateTime::strptime("%Y%m%dT%H%M%SZ", text).ok().filter(|_| text.len() == 16)?;
    time.to_zoned(TimeZone::UTC).ok().map(|time| time.timestamp().into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::s3::examples::after;

    #[test]
    fn the_time_of_a_request_is_x_amz_date_or_date() {
        let date = |x_amz_date: Option<&str>, date: Option<&str>| {
            let headers: Vec<_> = [("x-amz-date", x_amz_date), ("date", date)].into_iter().collect();
            let headers: Vec<_> = headers.iter().filter_map(|(name, value)| Some((*name, (*value)?))).collect();
            let (time, text) = timestamp(&Head { method: "GET", target: "/", headers: &headers })?;
            assert_eq!(time, after(0));
            Some(text)
        };
        assert_eq!(date(None, Some("Fri, 24 May 2013 00:00:00 GMT")).as_deref(), Some("20130524T000000Z"));
        assert_eq!(date(Some("20130524T000000Z"), Some("x")).as_deref(), Some("20130524T000000Z"));
        for wrong in ["", "20130524", "20130524T000000", "20130532T000000Z", "2013-05-24T00:00:00Z", "-0130524T000000Z"]
        {
            assert_eq!(date(Some(wrong), None), None, "{wrong}");
        }
        assert_eq!(date(None, None), None);
    }
}
