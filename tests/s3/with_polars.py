"""polars and deltalake: usage: with_polars.py ENDPOINT"""
import os, sys
import deltalake, polars as pl
from deltalake.exceptions import TableNotFoundError

options = {
    "aws_endpoint_url": sys.argv[1],
    "aws_access_key_id": os.environ["AWS_ACCESS_KEY_ID"],
    "aws_secret_access_key": os.environ["AWS_SECRET_ACCESS_KEY"],
    "aws_region": "us-east-1",
    "aws_allow_http": "true",
}
frame = pl.DataFrame({"n": range(300_000)}).with_columns((pl.col("n") % 5).alias("part"))
frame.write_parquet("s3://polars/frame é.parquet", storage_options=options)
assert pl.read_parquet("s3://polars/frame é.parquet", storage_options=options).equals(frame)
scan = pl.scan_parquet("s3://polars/*.parquet", storage_options=options)
assert scan.filter(pl.col("part") == 2).select(pl.len()).collect().item() == 60_000
# A table is a log whose next entry only one writer can create.
for n in range(4):
    frame.head(100).write_delta("s3://polars/delta", mode="append", storage_options=options)
table = deltalake.DeltaTable("s3://polars/delta", storage_options=options)
assert table.version() == 3 and pl.read_delta("s3://polars/delta", storage_options=options).height == 400
table.optimize.compact()
table.delete("n < 50")
table.vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
assert pl.read_delta("s3://polars/delta", storage_options=options).height == 200
try:
    deltalake.DeltaTable("s3://polars/none", storage_options=options)
except TableNotFoundError:
    pass
else:
    raise AssertionError("there is no such table")
