"""What we promise of every Dockerfile: clean to the linter, pinned, not root, labelled, the same wheels tomorrow."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
DOCKER = ROOT / "docker"
FILES = sorted(DOCKER.glob("*Dockerfile"), key=lambda path: path.name)
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")

every_file = pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)


def instructions(file):
    """Return a file's instructions as (word, rest), with continued lines joined and comments left out."""
    lines = [line for line in file.read_text("utf-8").splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in joined if line.strip()]


def final_stage(file):
    """Return the instructions of the stage that becomes the image."""
    all_of_them = instructions(file)
    last = max(number for number, (word, _) in enumerate(all_of_them) if word == "FROM")
    return all_of_them[last:]


def test_images_when_listed_are_service_gpu_service_and_training():
    """Each has its file; a new one gets these promises by being there."""
    assert [file.name for file in FILES] == ["Dockerfile", "gpu.Dockerfile", "training.Dockerfile"]


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
@every_file
def test_dockerfile_when_linted_then_nothing_is_found(file):
    """The linter knows more of shells and layers than we do; an exception says why on its line."""
    told = subprocess.run([HADOLINT, "--no-color", file], capture_output=True, text=True, check=False)

    assert told.returncode == 0, told.stdout + told.stderr


@every_file
def test_dockerfile_when_built_then_ends_with_an_ordinary_user_and_says_what_it_is(file):
    """A user by number, who is not root, labels of the OCI, a stated health, and a signal that drains."""
    stage = final_stage(file)
    words = dict(stage)
    labels = " ".join(rest for word, rest in stage if word == "LABEL")

    assert words["USER"] == "10001:10001"
    assert "HEALTHCHECK" in words
    assert words["STOPSIGNAL"] == "SIGTERM"
    for name in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{name}=" in labels


@every_file
def test_dockerfile_when_built_again_then_installs_the_same_versions(file):
    """Bases have a version that is not `latest`; every install takes the pins, or names its version."""
    text = file.read_text("utf-8")
    bases = re.findall(r"^ARG \w+=([\w./-]+:[\w.-]+)$", text, re.MULTILINE)

    assert len(bases) == 1
    assert re.search(r":[0-9]", bases[0])
    for command in re.findall(r"pip install ([^&\n]*)", text.replace("\\\n", " ")):
        is_pinned = "-c constraints.txt" in command or "==" in command or "--no-deps" in command
        assert is_pinned, command


@every_file
def test_dockerfile_when_asked_for_an_inventory_then_has_a_target_for_it(file):
    """`--target sbom -o .` writes what is inside, as CycloneDX."""
    stages = [rest for word, rest in instructions(file) if word == "FROM"]

    assert "scratch AS sbom" in stages
    assert "COPY --from=inventory /sbom.cdx.json /" in file.read_text("utf-8")


@pytest.mark.parametrize(
    ("name", "runtime", "extras"),
    [("Dockerfile", "service", {"client", "tracing", "s3"}), ("gpu.Dockerfile", "gpu", {"tracing", "s3"})],
)
def test_service_image_when_built_then_holds_no_torch(name, runtime, extras):
    """Only the extras of serving are installed; others of the service are asked for when it is built."""
    text = (DOCKER / name).read_text("utf-8")

    assert re.findall(r"\['(\w+)', \*os\.environ\['EXTRAS'\]\.split\(\)\]", text) == [runtime]
    assert set(re.search(r'^ARG EXTRAS="(.+)"$', text, re.MULTILINE)[1].split()) == extras


def test_gpu_image_when_installed_then_every_package_of_the_extra_is_pinned():
    """The GPU's own pins lie beside its Dockerfile, because no test can install them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        line.partition("==")[0]
        for name in ("constraints.txt", "docker/constraints-gpu.txt")
        for line in (ROOT / name).read_text().splitlines()
        if "==" in line and not line.startswith("#")
    }

    wanted = {re.match(r"[\w-]+", requirement).group() for requirement in project["optional-dependencies"]["gpu"]}
    assert wanted <= pinned
