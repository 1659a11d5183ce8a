"""What the teacher said, written down once.

labelling        asks the teacher, and gives back what answers for it
storage          what is kept, in how many bytes; top_k keeps the likeliest tokens of a large vocabulary
cached_teacher   memory-mapped, checksummed, keyed by content; to the trainer the same as a live teacher
shards, index    the files it stands in; store keeps them elsewhere, for other machines
"""

from __future__ import annotations

from distill.cache.cached_teacher import CachedTeacher, build_cache, cache_key
from distill.cache.index import encoded_hash

__all__ = ["CachedTeacher", "build_cache", "cache_key", "encoded_hash"]
