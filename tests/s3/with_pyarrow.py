"""pyarrow: usage: with_pyarrow.py ENDPOINT"""
import sys, urllib.parse
import pyarrow as pa, pyarrow.dataset as ds, pyarrow.parquet as pq
from pyarrow import fs

url = urllib.parse.urlparse(sys.argv[1])
s3 = fs.S3FileSystem(scheme=url.scheme, endpoint_override=url.netloc, allow_bucket_creation=True, allow_bucket_deletion=True)
s3.create_dir("pyarrow")
table = pa.table({"n": list(range(200_000)), "text": [str(n % 7) for n in range(200_000)]})
pq.write_table(table, "pyarrow/a b/é.parquet", filesystem=s3)
assert pq.read_table("pyarrow/a b/é.parquet", filesystem=s3) == table
ds.write_dataset(table, "pyarrow/set", filesystem=s3, format="parquet", partitioning=ds.partitioning(pa.schema([("text", pa.string())]), flavor="hive"))
read = ds.dataset("pyarrow/set", filesystem=s3, partitioning="hive")
assert read.to_table(filter=ds.field("text") == 3).num_rows == 28_571
large = b"0123456789" * 2_000_000
with s3.open_output_stream("pyarrow/large", metadata={"Content-Type": "text/x"}) as out:
    out.write(large)
with s3.open_input_file("pyarrow/large") as file:
    file.seek(19_999_995)
    assert file.size() == len(large) and file.read() == b"56789" and file.metadata()["Content-Type"] == b"text/x"
s3.create_dir("pyarrow/empty/dir")
assert s3.get_file_info("pyarrow/empty/dir").type == fs.FileType.Directory
s3.copy_file("pyarrow/large", "pyarrow/copy")
s3.move("pyarrow/copy", "pyarrow/moved")
names = sorted(i.path for i in s3.get_file_info(fs.FileSelector("pyarrow")))
assert names == ["pyarrow/a b", "pyarrow/empty", "pyarrow/large", "pyarrow/moved", "pyarrow/set"], names
s3.delete_file("pyarrow/large")
assert s3.get_file_info("pyarrow/large").type == fs.FileType.NotFound
s3.delete_dir_contents("pyarrow")
s3.delete_dir("pyarrow")
