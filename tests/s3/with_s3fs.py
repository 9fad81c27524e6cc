"""s3fs (Python): usage: with_s3fs.py ENDPOINT"""
import os, sys
import s3fs

s3 = s3fs.S3FileSystem(client_kwargs={"endpoint_url": sys.argv[1], "region_name": "us-east-1"}, use_listings_cache=False)
s3.mkdir("s3fs-python")
s3.pipe({f"s3fs-python/dir/{n} é+": b"%d" % n for n in range(30)})
assert len(s3.ls("s3fs-python/dir")) == 30 and s3.cat("s3fs-python/dir/7 é+") == b"7"
large = os.urandom(12 << 20)
with s3.open("s3fs-python/large", "wb", block_size=5 << 20) as file:
    file.write(large)
with s3.open("s3fs-python/large", "rb") as file:
    file.seek(6 << 20)
    assert file.read(100) == large[6 << 20 :][:100]
assert s3.info("s3fs-python/large")["size"] == len(large)
s3.touch("s3fs-python/empty")
s3.copy("s3fs-python/large", "s3fs-python/copy")
s3.mv("s3fs-python/copy", "s3fs-python/moved")
assert s3.cat("s3fs-python/moved") == large and not s3.exists("s3fs-python/copy")
assert sorted(s3.find("s3fs-python"))[-1] == "s3fs-python/moved"
s3.rm("s3fs-python", recursive=True)
assert not s3.exists("s3fs-python")
