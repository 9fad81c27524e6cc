//! S3's error codes, their HTTP statuses, and their XML.
//!
//! The code is AWS's where AWS has one for the case, because clients decide by it whether to try again.

use std::fmt::{self, Display};
use std::io;

use super::xml::Document;

macro_rules! codes {
    ($($status:literal: $($code:ident)*;)*) => {
        /// An error code of S3.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Code { $($($code,)*)* }

        impl Code {
            pub fn name(self) -> &'static str {
                match self { $($(Code::$code => stringify!($code),)*)* }
            }

            /// The HTTP status.
            pub fn status(self) -> u16 {
                match self { $($(Code::$code)|* => $status,)* }
            }
        }
    };
}

codes! {
    400: AuthorizationHeaderMalformed AuthorizationQueryParametersError BadDigest EntityTooLarge EntityTooSmall
        IncompleteBody InvalidArgument InvalidBucketName InvalidDigest InvalidPart InvalidPartOrder InvalidRequest
        InvalidURI KeyTooLongError MalformedTrailerError MalformedXML MetadataTooLarge RequestTimeout
        XAmzContentSHA256Mismatch;
    403: AccessDenied InvalidAccessKeyId RequestTimeTooSkewed SignatureDoesNotMatch;
    404: NoSuchBucket NoSuchBucketPolicy NoSuchCORSConfiguration NoSuchKey NoSuchLifecycleConfiguration NoSuchTagSet
        NoSuchUpload NoSuchVersion ServerSideEncryptionConfigurationNotFoundError;
    405: MethodNotAllowed;
    409: BucketNotEmpty;
    411: MissingContentLength;
    412: PreconditionFailed;
    416: InvalidRange;
    500: InternalError;
    501: NotImplemented;
    503: ServiceUnavailable SlowDown;
}

/// Why a request failed, as the client hears it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub code: Code,
    /// A sentence in plain English.
    pub message: String,
}

impl Failure {
    pub fn new(code: Code, message: impl Into<String>) -> Failure {
        Failure { code, message: message.into() }
    }

    /// The failure in an error of `Payload::read`, if it is one.
    pub(super) fn of(error: &io::Error) -> Option<&Failure> {
        error.get_ref()?.downcast_ref()
    }

    pub fn status(&self) -> u16 {
        self.code.status()
    }

    /// The XML to send, but not with HEAD and 304. `resource` is the path of the request, as the client sent it.
    pub fn body(&self, resource: &str, request_id: &str) -> String {
        let mut document = Document::without_namespace("Error");
        document.element("Code", self.code.name()).element("Message", &self.message);
        document.element("Resource", resource).element("RequestId", request_id);
        document.finish()
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}: {}", self.code.name(), self.message)
    }
}

impl std::error::Error for Failure {}

impl From<Failure> for io::Error {
    fn from(failure: Failure) -> io::Error {
        io::Error::other(failure)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_written_as_xml() {
        let failure = Failure::new(Code::NoSuchKey, "there is no <key> & no \"value\"");
        assert_eq!((failure.status(), failure.code.name()), (404, "NoSuchKey"));
        assert_eq!(
            failure.body("/b/a%20b&c", "17"),
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>NoSuchKey</Code>\
             <Message>there is no &lt;key&gt; &amp; no &quot;value&quot;</Message>\
             <Resource>/b/a%20b&amp;c</Resource><RequestId>17</RequestId></Error>"
        );
    }
}
