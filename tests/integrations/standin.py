"""Runs a launcher as its command does, and compares what the norm is told with the targets of each loss.

    python -m tests.integrations.standin pycil "0 3 5" --norm tbbn --checkout STANDIN -- --config FILE

The second word has the classes known before each task. The last line is JSON: passes told, mixed, compared, left over.
"""

from __future__ import annotations

import json
import sys

from benchmarks.frameworks import Record
from cilnorm.integrations import mammoth, pycil
from cilnorm.integrations.launcher import parse_command


def main() -> None:
    """The command."""
    name, known, *argv = sys.argv[1:]
    module, before = {"mammoth": mammoth, "pycil": pycil}[name], [int(count) for count in known.split()]
    launch = parse_command({"mammoth": mammoth.MAMMOTH, "pycil": pycil.PYCIL}[name], argv)
    record, hook = Record(), module.install(launch)
    record.known = lambda: before[hook.classes().task]
    record.watch()
    launch.run()
    print(json.dumps({"told": record.told, "mixed": record.mixed, "checked": record.checked, "left": record.left}))


if __name__ == "__main__":
    main()
