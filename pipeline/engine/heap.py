"""What the processes of a run are told about their heap."""

from __future__ import annotations

# glibc gives every thread that decodes photos a heap of its own, which keeps what is freed: 150 MB more a worker.
ONE_HEAP = {"MALLOC_ARENA_MAX": "1"}
