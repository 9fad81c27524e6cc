"""boto3: usage: with_boto3.py ENDPOINT"""
import datetime, hashlib, io, os, sys, time, urllib.request
import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import ClientError

endpoint = sys.argv[1]
once = Config(retries={"max_attempts": 1}, s3={"addressing_style": "path"})
s3 = boto3.client("s3", endpoint_url=endpoint, config=once, verify=os.environ.get("AWS_CA_BUNDLE"))
bucket = "boto3-" + endpoint.split(":")[0]


def fails(code, call, **arguments):
    try:
        call(**arguments)
    except ClientError as error:
        assert error.response["Error"]["Code"] == code, error
        return
    raise AssertionError(f"{code} was expected")


s3.create_bucket(Bucket=bucket)
s3.head_bucket(Bucket=bucket)
assert bucket in [b["Name"] for b in s3.list_buckets()["Buckets"]]
s3.get_bucket_location(Bucket=bucket)

# Values of any size, under keys of any kind, with their metadata.
started = time.monotonic()
for key, value in [("empty", b""), ("a b/c+d é", b"x"), ("large", os.urandom(3_000_000)), ("dir/", b"")]:
    put = s3.put_object(Bucket=bucket, Key=key, Body=value, ContentType="text/x", Metadata={"mtime": "1.5", "empty": ""})
    assert put["ETag"] == '"%s"' % hashlib.md5(value).hexdigest()
    got = s3.get_object(Bucket=bucket, Key=key)
    assert got["Body"].read() == value and got["ContentType"] == "text/x" and got["ETag"] == put["ETag"]
    head = s3.head_object(Bucket=bucket, Key=key)
    assert head["ContentLength"] == len(value) and head["Metadata"]["mtime"] == "1.5", head
    assert abs(head["LastModified"] - datetime.datetime.now(datetime.timezone.utc)) < datetime.timedelta(minutes=1)
# An empty body that is not accepted with 100 Continue stalls botocore for a minute.
assert time.monotonic() - started < 20
for algorithm in ["CRC32", "SHA1", "SHA256"]:  # those that need no other package
    s3.put_object(Bucket=bucket, Key="sum", Body=b"summed", ChecksumAlgorithm=algorithm)
    got = s3.get_object(Bucket=bucket, Key="sum", ChecksumMode="ENABLED")
    assert got["Body"].read() == b"summed" and "Checksum" + algorithm in got, got
s3.put_object(Bucket=bucket, Key="stream", Body=io.BytesIO(b"s" * 200_000))
assert s3.get_object(Bucket=bucket, Key="stream", Range="bytes=5-9")["Body"].read() == b"sssss"
fails("InvalidRange", s3.get_object, Bucket=bucket, Key="stream", Range="bytes=200000-")
fails("NoSuchKey", s3.get_object, Bucket=bucket, Key="none")
fails("404", s3.head_object, Bucket=bucket, Key="none")
fails("NoSuchBucket", s3.put_object, Bucket="boto3-none", Key="k", Body=b"v")

# Conditions.
fails("PreconditionFailed", s3.put_object, Bucket=bucket, Key="large", Body=b"v", IfNoneMatch="*")
fails("PreconditionFailed", s3.get_object, Bucket=bucket, Key="large", IfMatch='"other"')
fails("304", s3.get_object, Bucket=bucket, Key="empty", IfNoneMatch=s3.head_object(Bucket=bucket, Key="empty")["ETag"])
s3.put_object(Bucket=bucket, Key="created", Body=b"v", IfNoneMatch="*")

# Managed transfers: multipart both ways, and a copy by parts.
config = TransferConfig(multipart_threshold=6 << 20, multipart_chunksize=5 << 20, max_concurrency=4)
value = os.urandom(17 << 20)
s3.upload_fileobj(io.BytesIO(value), bucket, "multi", Config=config, ExtraArgs={"Metadata": {"a": "b"}})
head = s3.head_object(Bucket=bucket, Key="multi")
assert head["ETag"].endswith('-4"') and head["Metadata"] == {"a": "b"}, head
copied = {"Bucket": bucket, "Key": "multi"}
s3.copy(copied, bucket, "multi copy", Config=config)
s3.copy_object(Bucket=bucket, Key="small copy", CopySource={"Bucket": bucket, "Key": "a b/c+d é"})
for key in ["multi", "multi copy"]:
    out = io.BytesIO()
    s3.download_fileobj(bucket, key, out, Config=config)
    assert out.getvalue() == value
upload = s3.create_multipart_upload(Bucket=bucket, Key="aborted")["UploadId"]
s3.upload_part(Bucket=bucket, Key="aborted", UploadId=upload, PartNumber=1, Body=b"part")
assert len(s3.list_parts(Bucket=bucket, Key="aborted", UploadId=upload)["Parts"]) == 1
assert [u["Key"] for u in s3.list_multipart_uploads(Bucket=bucket)["Uploads"]] == ["aborted"]
s3.abort_multipart_upload(Bucket=bucket, Key="aborted", UploadId=upload)

# Presigned URLs.
context = None
if endpoint.startswith("https"):
    import ssl
    context = ssl.create_default_context(cafile=os.environ["AWS_CA_BUNDLE"])
signer = boto3.client("s3", endpoint_url=endpoint, config=Config(signature_version="s3v4", s3={"addressing_style": "path"}))
url = signer.generate_presigned_url("get_object", {"Bucket": bucket, "Key": "a b/c+d é", "ResponseContentType": "image/png"})
answer = urllib.request.urlopen(url, context=context)
assert answer.read() == b"x" and answer.headers["Content-Type"] == "image/png"
url = signer.generate_presigned_url("put_object", {"Bucket": bucket, "Key": "presigned"})
urllib.request.urlopen(urllib.request.Request(url, data=b"presigned", method="PUT"), context=context)
assert s3.get_object(Bucket=bucket, Key="presigned")["Body"].read() == b"presigned"

# Lists, page by page, and deletion of what they name.
for n in range(25):
    s3.put_object(Bucket=bucket, Key=f"list/{n % 5}/{n} +é", Body=b"v")
for name in ["list_objects", "list_objects_v2"]:
    pages = s3.get_paginator(name)
    keys = [o["Key"] for p in pages.paginate(Bucket=bucket, Prefix="list/", PaginationConfig={"PageSize": 7}) for o in p["Contents"]]
    assert keys == sorted(f"list/{n % 5}/{n} +é" for n in range(25)), keys
    split = pages.paginate(Bucket=bucket, Prefix="list/", Delimiter="/", PaginationConfig={"PageSize": 2})
    assert [c["Prefix"] for p in split for c in p.get("CommonPrefixes", [])] == [f"list/{n}/" for n in range(5)]
fails("BucketNotEmpty", s3.delete_bucket, Bucket=bucket)
everything = boto3.resource("s3", endpoint_url=endpoint, config=once).Bucket(bucket).objects.all()
answers = everything.delete()
assert not any("Errors" in answer for answer in answers), answers
s3.delete_object(Bucket=bucket, Key="none")
s3.delete_bucket(Bucket=bucket)
fails("404", s3.head_bucket, Bucket=bucket)
