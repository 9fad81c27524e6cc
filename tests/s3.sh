#!/usr/bin/env bash
# The S3 clients that most people have, against a real store: over http, and over TLS through the front.
# tests/s3/all.sh has the others.
set -euo pipefail
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/s3/all.sh" boto3 awscli
