"""Print the commands of the README's `bash` blocks that are marked `<!-- ci -->`, one a line."""

import re
import sys
from pathlib import Path

text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
blocks = re.findall(r"<!-- ci -->\n```bash\n(.*?)```", text, re.DOTALL)
lines = [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]
if len(lines) != 2:
    sys.exit(f"README.md: expected two marked commands, found {len(lines)}: mark them with <!-- ci -->")
print("\n".join(lines))  # noqa: T201
