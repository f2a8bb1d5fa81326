"""The folder that all processes of one run of the tests share, for what is costly to make twice; pytest clears it away.

`tests/conftest.py` says where it lies; it is None where no test runs.
"""

from pathlib import Path

folder: Path | None = None
