"""minio-py: usage: with_minio.py ENDPOINT"""
import datetime, io, os, sys, urllib.parse, urllib.request
from minio import Minio
from minio.commonconfig import ComposeSource, CopySource
from minio.deleteobjects import DeleteObject
from minio.error import S3Error

url = urllib.parse.urlparse(sys.argv[1])
key, secret = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
s3 = Minio(endpoint=url.netloc, access_key=key, secret_key=secret, secure=url.scheme == "https")
s3.make_bucket(bucket_name="minio-py")
assert s3.bucket_exists(bucket_name="minio-py") and not s3.bucket_exists(bucket_name="minio-none")
large = os.urandom(11 << 20)
for name, value in [("a b/é+", b"value"), ("large", large), ("empty", b"")]:
    s3.put_object(bucket_name="minio-py", object_name=name, data=io.BytesIO(value), length=len(value), part_size=5 << 20, content_type="text/x", metadata={"a": "b"})
    stat = s3.stat_object(bucket_name="minio-py", object_name=name)
    assert stat.size == len(value) and stat.content_type == "text/x" and stat.metadata["x-amz-meta-a"] == "b"
    got = s3.get_object(bucket_name="minio-py", object_name=name)
    assert got.data == value
    got.close()
got = s3.get_object(bucket_name="minio-py", object_name="large", offset=6 << 20, length=10)
assert got.data == large[6 << 20 :][:10]
s3.copy_object(bucket_name="minio-py", object_name="copy", source=CopySource(bucket_name="minio-py", object_name="large"))
sources = [ComposeSource(bucket_name="minio-py", object_name="large"), ComposeSource(bucket_name="minio-py", object_name="a b/é+")]
s3.compose_object(bucket_name="minio-py", object_name="composed", sources=sources)
assert s3.stat_object(bucket_name="minio-py", object_name="composed").size == len(large) + 5
presigned = s3.presigned_get_object(bucket_name="minio-py", object_name="a b/é+", expires=datetime.timedelta(minutes=5))
if url.scheme == "http":
    assert urllib.request.urlopen(presigned).read() == b"value"
names = [o.object_name for o in s3.list_objects(bucket_name="minio-py", recursive=True)]
assert names == ["a b/é+", "composed", "copy", "empty", "large"], names
assert "a b/" in [o.object_name for o in s3.list_objects(bucket_name="minio-py")]
try:
    s3.stat_object(bucket_name="minio-py", object_name="none")
except S3Error as error:
    assert error.code == "NoSuchKey"
errors = list(s3.remove_objects(bucket_name="minio-py", delete_object_list=[DeleteObject(name) for name in names]))
assert not errors, errors
s3.remove_bucket(bucket_name="minio-py")
