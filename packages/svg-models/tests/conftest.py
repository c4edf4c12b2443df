"""What the tests of this package share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

# `import tiny` must also work in the processes that the context parallelism test starts.
sys.path.insert(0, str(Path(__file__).parent))
