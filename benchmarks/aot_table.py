"""Write the table of compiled training programs in `docs/performance.md` from the results of `benchmarks.aot`.

python -m benchmarks.aot_table
"""

import json
import re
import sys
from pathlib import Path

from benchmarks.aot import CONFIGS, RESULTS, milliseconds_at_bounds
from benchmarks.topologies import TARGETS

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
HEADER = """\
| chips | config | matrix units, ms | memory, ms | estimate, ms | temporary, MiB | kernels | all-reduces |
|---|---|---|---|---|---|---|---|
"""


def render() -> str:
    """Return the table: a row for each training program in the committed results, in the order of the targets.

    "(frozen)" is the program after a group of parameters is frozen, "(24)" that for images of 24x24 pixels.
    """
    lines = []
    for target in TARGETS.values():
        path = RESULTS / f"aot_{target.name.replace(':', '-')}.json"
        rows = json.loads(path.read_text()) if path.exists() else []
        trained = [row for row in rows if not row["program"].startswith(("eval", "final")) and row["config"] in CONFIGS]
        for row in sorted(trained, key=lambda row: CONFIGS.index(row["config"])):  # otherwise in the order of a run
            program = row["program"].removeprefix("train").strip("_").replace("_", ", ")
            name = f"{row['config']} ({program})" if program else row["config"]
            arithmetic, memory = milliseconds_at_bounds(row["gflop"], row["hbm_bytes"], target.chip)
            estimate = "unknown" if row["estimate_ms"] is None else f"{row['estimate_ms']:.2f}"
            lines.append(
                f"| {target.name} | {name} | {arithmetic:.2f} | {memory:.2f} | {estimate} "
                f"| {row['temp_bytes'] / 2**20:,.0f} | {row['kernels']} | {row['all_reduces']} |\n"
            )
    return HEADER + "".join(lines)


def main() -> int:
    text = PAGE.read_text()
    PAGE.write_text(re.sub(rf"{re.escape(HEADER)}(\|.*\n)*", lambda _: render(), text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
