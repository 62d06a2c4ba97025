"""Exit 1 when pip's installation report (the argument) names a PyTorch that brings CUDA packages along."""

import json
import re
import sys
from pathlib import Path

report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
for item in report["install"]:
    metadata = item["metadata"]
    brings_cuda = any(re.match(r"(nvidia|cuda|triton)\b", need) for need in metadata.get("requires_dist", ()))
    if metadata["name"] == "torch" and brings_cuda and not metadata["version"].endswith("+cpu"):
        sys.exit(1)
