"""``import peftc.auto`` in a script puts peftc under every model of Transformers; the script stays as it is.

The import calls `peftc.patch_transformers`; `peftc.auto.patch.undo()` takes it back.  Transformers is imported here if
it is not yet.
"""

from .hosts.torch_patch import patch_transformers

patch = patch_transformers()

__all__ = ["patch"]
