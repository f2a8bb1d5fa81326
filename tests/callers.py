"""Callers with keys, and the keys file that knows them."""

import hashlib
import json
from pathlib import Path

ADMIN, CAMERA = {"X-API-Key": "the administrator's"}, {"X-API-Key": "the camera's"}
ONE_LINE = {"X-API-Key": "the other line's administrator's"}


def write_keys(folder: Path) -> Path:
    """Write keys of an administrator, of one for another line, and of a camera; return the file."""

    def entry(name: str, key: dict[str, str], lines: list[str], *actions: str) -> dict[str, object]:
        digest = hashlib.sha256(key["X-API-Key"].encode()).hexdigest()
        return {"name": name, "sha256": digest, "lines": lines, "actions": actions}

    entries = [
        entry("anna", ADMIN, ["*"], "admin", "read"),
        entry("otto", ONE_LINE, ["other_line"], "admin"),
        entry("camera", CAMERA, ["*"], "inspect"),
    ]
    (folder / "keys.json").write_text(json.dumps(entries))
    return folder / "keys.json"
