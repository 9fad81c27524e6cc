"""duckdb with its extension httpfs: usage: with_duckdb.py ENDPOINT KEY SECRET"""
import importlib.resources, os, sys, urllib.parse
import duckdb

url = urllib.parse.urlparse(sys.argv[1])
extension = next(importlib.resources.files("duckdb_extension_httpfs").joinpath("extensions").glob("**/*.duckdb_extension"))
db = duckdb.connect()
db.execute(f"LOAD '{extension}'")
secret = f"TYPE s3, KEY_ID '{sys.argv[2]}', SECRET '{sys.argv[3]}', REGION 'us-east-1', ENDPOINT '{url.netloc}', URL_STYLE 'path'"
db.execute(f"CREATE SECRET (PROVIDER config, {secret}, USE_SSL {url.scheme == 'https'})")
db.execute("COPY (SELECT range AS n, range % 3 AS part FROM range(500000)) TO 's3://duckdb/one.parquet'")
assert db.execute("SELECT count(*), sum(n) FROM 's3://duckdb/one.parquet'").fetchone() == (500000, 124999750000)
db.execute("COPY (SELECT range AS n, range % 3 AS part FROM range(1000)) TO 's3://duckdb/set' (FORMAT parquet, PARTITION_BY (part))")
assert db.execute("SELECT count(*) FROM 's3://duckdb/set/*/*.parquet' WHERE part = 1").fetchone() == (333,)
assert len(db.execute("SELECT file FROM glob('s3://duckdb/**')").fetchall()) == 4
db.execute("COPY (SELECT 'a,b' AS text) TO 's3://duckdb/a b+é.csv'")
assert db.execute("SELECT text FROM 's3://duckdb/a b+é.csv'").fetchone() == ("a,b",)
