// aws-sdk-js: usage: node with_aws_sdk.mjs ENDPOINT NODE_MODULES
import { Readable } from "node:stream";
import assert from "node:assert";
import { createRequire } from "node:module";
const require = createRequire(process.argv[3] + "/");
const aws = require("@aws-sdk/client-s3");

const Bucket = "aws-sdk-js";
const s3 = new aws.S3({ endpoint: process.argv[2], region: "us-east-1", forcePathStyle: true });
await s3.createBucket({ Bucket });
const large = Buffer.alloc(6 << 20, "0123456789");
for (const [Key, Body] of [["a b/é+", "value"], ["large", large], ["empty", ""]]) {
  const put = await s3.putObject({ Bucket, Key, Body, ContentType: "text/x", Metadata: { a: "b" } });
  const got = await s3.getObject({ Bucket, Key });
  assert.equal(got.ETag, put.ETag);
  assert.equal(got.ContentType, "text/x");
  assert.deepEqual(Buffer.from(await got.Body.transformToByteArray()), Buffer.from(Body));
  assert.equal((await s3.headObject({ Bucket, Key })).Metadata.a, "b");
}
const stream = () => Readable.from([Buffer.alloc(100_000, "s"), Buffer.alloc(50_000, "t")]);
await s3.putObject({ Bucket, Key: "stream", Body: stream(), ContentLength: 150_000 });
const range = await s3.getObject({ Bucket, Key: "stream", Range: "bytes=99999-100000" });
assert.equal(await range.Body.transformToString(), "st");
const { UploadId } = await s3.createMultipartUpload({ Bucket, Key: "multi" });
const Parts = [];
for (const [n, Body] of [large, Buffer.from("tail")].entries()) {
  const { ETag } = await s3.uploadPart({ Bucket, Key: "multi", UploadId, PartNumber: n + 1, Body });
  Parts.push({ ETag, PartNumber: n + 1 });
}
await s3.completeMultipartUpload({ Bucket, Key: "multi", UploadId, MultipartUpload: { Parts } });
assert.equal((await s3.headObject({ Bucket, Key: "multi" })).ContentLength, (6 << 20) + 4);
await s3.copyObject({ Bucket, Key: "copy", CopySource: `${Bucket}/${encodeURIComponent("a b/é+")}` });
await assert.rejects(s3.getObject({ Bucket, Key: "none" }), { name: "NoSuchKey" });
await assert.rejects(s3.putObject({ Bucket, Key: "copy", Body: "v", IfNoneMatch: "*" }), { name: "PreconditionFailed" });
const keys = [];
for await (const page of aws.paginateListObjectsV2({ client: s3 }, { Bucket, MaxKeys: 2 })) {
  keys.push(...page.Contents.map((object) => object.Key));
}
assert.deepEqual(keys, ["a b/é+", "copy", "empty", "large", "multi", "stream"]);
const Objects = keys.map((Key) => ({ Key }));
const deleted = await s3.deleteObjects({ Bucket, Delete: { Objects } });
assert.equal(deleted.Deleted.length, 6);
await s3.deleteBucket({ Bucket });
