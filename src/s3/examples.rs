//! AWS's examples of signed requests, for the tests of this room.

use std::time::{Duration, SystemTime};

use super::keys::Keys;

/// The sha256 of an empty body.
pub const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/// The key of AWS's examples.
pub fn keys() -> Keys {
    Keys::parse("AKIAIOSFODNN7EXAMPLE wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY").unwrap()
}

/// So many seconds after the time of AWS's examples, 2013-05-24 00:00:00.
pub fn after(seconds: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_369_353_600_i64.checked_add(seconds).unwrap() as u64)
}

/// The headers of a request, which signs all of them but Authorization. They are given sorted, separated by `|`.
pub fn headers(text: &str, signature: &str) -> Vec<(String, String)> {
    let split = |field: &str| field.split_once(':').map(|(name, value)| (name.to_string(), value.to_string()));
    let mut headers: Vec<_> = text.split('|').filter_map(split).collect();
    let names: Vec<String> = headers.iter().map(|(name, _)| name.to_lowercase()).collect();
    let value = format!(
        "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request,SignedHeaders={}, Signature={signature}",
        names.join(";")
    );
    headers.push(("Authorization".into(), value));
    headers
}

/// docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html and sigv4-streaming….html
pub const EXAMPLES: [(&str, &str, &str, &str); 6] = [
    (
        "GET",
        "/test.txt",
        "Host:examplebucket.s3.amazonaws.com|Range:bytes=0-9|x-amz-content-sha256:EMPTY|x-amz-date:20130524T000000Z",
        "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
    ),
    (
        "PUT",
        "/test$file.text",
        "Date:Fri, 24 May 2013 00:00:00 GMT|Host:examplebucket.s3.amazonaws.com|\
         x-amz-content-sha256:44ce7dd67c959e0d3524ffac1771dfbba87d2b6b4b4e99e42034a8b803f8b072|\
         x-amz-date:20130524T000000Z|x-amz-storage-class: REDUCED_REDUNDANCY ",
        "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd",
    ),
    (
        "GET",
        "/?lifecycle",
        "Host:examplebucket.s3.amazonaws.com|x-amz-content-sha256:EMPTY|x-amz-date:20130524T000000Z",
        "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543",
    ),
    (
        "GET",
        "/?prefix=%4A&max-keys=2",
        "Host:examplebucket.s3.amazonaws.com|x-amz-content-sha256:EMPTY|x-amz-date:20130524T000000Z",
        "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7",
    ),
    (
        "PUT",
        "/examplebucket/chunkObject.txt",
        "Content-Encoding:aws-chunked|Content-Length:66824|Host:s3.amazonaws.com|\
         x-amz-content-sha256:STREAMING-AWS4-HMAC-SHA256-PAYLOAD|x-amz-date:20130524T000000Z|\
         x-amz-decoded-content-length:66560|x-amz-storage-class:REDUCED_REDUNDANCY",
        "4f232c4386841ef735655705268965c44a0e4690baa4adea153f7db9fa80a0a9",
    ),
    (
        "PUT",
        "/examplebucket/chunkObject.txt",
        "Content-Encoding:aws-chunked|Host:s3.amazonaws.com|\
         x-amz-content-sha256:STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER|x-amz-date:20130524T000000Z|\
         x-amz-decoded-content-length:66560|x-amz-storage-class:REDUCED_REDUNDANCY|\
         x-amz-trailer:x-amz-checksum-crc32c",
        "106e2a8a18243abcf37539882f36619c00e2dfc72633413f02d3b74544bfeb8e",
    ),
];

/// The n-th of AWS's examples: method, target, headers.
pub fn example(n: usize) -> (&'static str, &'static str, Vec<(String, String)>) {
    let (method, target, text, signature) = EXAMPLES[n];
    (method, target, headers(&text.replace("EMPTY", EMPTY), signature))
}

/// Headers as `Head` takes them.
pub fn fields(headers: &[(String, String)]) -> Vec<(&str, &str)> {
    headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect()
}
