"""Callers with keys, and the keys file that knows them."""

import hashlib
import json
from pathlib import Path

ADMIN, CAMERA = {"X-API-Key": "the administrator's"}, {"X-API-Key": "the camera's"}
ONE_LINE = {"X-API-Key": "the other line's administrator's"}
QUALITY, OTHER_QUALITY = {"X-API-Key": "the quality manager's"}, {"X-API-Key": "the other line's quality manager's"}


def write_keys(folder: Path) -> Path:
    """Write keys of administrators and quality managers of all lines, or of one, and of a camera; return the file."""

    def entry(name: str, key: dict[str, str], lines: list[str], *actions: str) -> dict[str, object]:
        digest = hashlib.sha256(key["X-API-Key"].encode()).hexdigest()
        return {"name": name, "sha256": digest, "lines": lines, "actions": actions}

    entries = [
        entry("anna", ADMIN, ["*"], "admin", "read"),
        entry("otto", ONE_LINE, ["other_line"], "admin"),
        entry("camera", CAMERA, ["*"], "inspect"),
        entry("quality", QUALITY, ["demo_line"], "inspect", "choose"),
        entry("quality of the other line", OTHER_QUALITY, ["other_line"], "inspect", "choose"),
    ]
    (folder / "keys.json").write_text(json.dumps(entries))
    return folder / "keys.json"
