"""Loaded into the process of suite_peft_integration.py with `-p`: puts the stack there that SUITE_STACK names."""

import os

if os.environ["SUITE_STACK"] == "peftc":
    import peftc

    handle = peftc.patch_transformers()
