"""Instep. What the environment says to libraries is put right here, before any of them is imported.

An empty variable is none: HF_HOME= would put the cache into the current folder, HF_ENDPOINT= would ask no host.
Tokenizers work on one thread: their pool is made at the first prompt, and one that could not be made then, for want of
memory or threads, fails at every prompt after it.
"""

import os

_THEIRS = ("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "XDG_CACHE_HOME", "TORCH", "TOKENIZERS_")

for _name in [name for name, value in os.environ.items() if not value.strip() and name.startswith(_THEIRS)]:
    del os.environ[_name]

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
