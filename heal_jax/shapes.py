"""Static shapes: lengths in buckets, so that few programs are compiled."""

BUCKET = 32  # also a multiple of what vector units work on


def bucket(length: int) -> int:
    """The next multiple of BUCKET, at least one."""
    return max(1, -(-length // BUCKET)) * BUCKET
