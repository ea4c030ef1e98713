"""A stage's rights on the artifacts' bucket, tried.

Enters: the bucket. Leaves: one JSON line. Refuses: a bucket that overwrites, and a role that may delete.
"""

import json
import sys
import time
import uuid
from collections.abc import Callable

import botocore.exceptions
import botocore.session

bucket = sys.argv[1]
s3 = botocore.session.get_session().create_client("s3")
# Under work/, where the bucket's own rules clean up after thirty days.
key = f"work/validation/{uuid.uuid4()}"
start = time.perf_counter()


def refused(call: Callable[..., object], **arguments: object) -> str:
    """The code with which S3 refuses a call; empty when it does not."""
    try:
        call(Bucket=bucket, Key=key, **arguments)
    except botocore.exceptions.ClientError as error:
        return error.response["Error"]["Code"]
    return ""


s3.put_object(Bucket=bucket, Key=key, Body=b"fmops", IfNoneMatch="*")
read = s3.get_object(Bucket=bucket, Key=key)["Body"].read()
if read != b"fmops":
    sys.exit(f"Written b'fmops', read {read!r}.")
if refused(s3.put_object, Body=b"other", IfNoneMatch="*") != "PreconditionFailed":
    sys.exit("An object that exists was overwritten: two writers of one record would not notice each other.")
if refused(s3.delete_object) != "AccessDenied":
    sys.exit("The stages' role may delete artifacts. It must not: see infra/cluster/identities.tf.")
print(json.dumps({"bucket": bucket, "seconds": round(time.perf_counter() - start, 3), "passed": True}))
