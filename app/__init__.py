"""Instep. An empty environment variable is none: libraries that read theirs when they are imported take it for a value.

HF_HOME= would put the cache into the current folder, HF_ENDPOINT= would ask no host.
"""

import os

_THEIRS = ("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "XDG_CACHE_HOME", "TORCH")

for _name in [name for name, value in os.environ.items() if not value.strip() and name.startswith(_THEIRS)]:
    del os.environ[_name]
