"""Where docs/formats.md named `latest_verified` before the rooms. It lives in
`distill.checkpoint.manifest`.
"""

from distill.checkpoint.manifest import latest_verified

__all__ = ["latest_verified"]
