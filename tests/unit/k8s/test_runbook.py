"""The runbook's commands want a cluster; what can be known of them without one is checked: places, names, options."""

import re
import shlex
from importlib.metadata import entry_points
from itertools import groupby
from pathlib import Path

import pytest
import typer
import yaml
from typer.core import TyperGroup

from service.__main__ import GROUP
from service.settings import Settings

ROOT = Path(__file__).resolve().parents[3]
RUNBOOK = (ROOT / "k8s/README.md").read_text("utf-8")
TRAINING = (ROOT / "training/README.md").read_text("utf-8")
# The client's settings have no class of their own; its commands name them.
CLIENTS = ("FLAWLINE_CLIENT_ADMIN_URL", "FLAWLINE_CLIENT_KEY_FILE")
MANIFESTS = "".join(path.read_text("utf-8") for path in sorted((ROOT / "k8s").rglob("*.yaml")))


def commands(text):
    """Return the words of every command in shell blocks, comments left out."""
    found = []
    for line in "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)).splitlines():
        reader = shlex.shlex(line, posix=True, punctuation_chars=True)
        reader.whitespace_split = True
        # An operator of the shell is a word of its own, and ends a command.
        for ends, words in groupby(reader, key=lambda word: set(word) <= set("&|;()<>")):
            found += [] if ends else [list(words)]
    return found


def of(program, text=RUNBOOK):
    """Return the arguments of every command of a program, also where torchrun starts it."""
    starts = [words[words.index("--no-python") + 1 :] if "--no-python" in words else words for words in commands(text)]
    return [words[1:] for words in starts if words[0] == program]


def test_runbook_when_read_then_shows_commands_of_every_program_that_it_wants():
    """The reader of the blocks below finds them."""
    assert all(of(program) for program in ("docker", "kubectl", "kustomize", "flawline"))


@pytest.mark.parametrize("words", of("docker"), ids=" ".join)
def test_image_when_built_then_its_dockerfile_is_there(words):
    """`docker build -f` names a file of ours."""
    if words[0] == "build":
        assert (ROOT / words[words.index("-f") + 1]).is_file()


@pytest.mark.parametrize("words", of("kubectl"), ids=" ".join)
def test_kubectl_when_told_of_a_place_or_a_name_then_it_exists(words):
    """Overlays and files lie there, and secrets, deployments, pods and jobs have the names of the manifests."""
    for option in ("-k", "-f"):
        if "apply" in words and option in words and words[-1] != "-":
            assert (ROOT / words[words.index(option) + 1]).exists()
    names = [word.partition("/")[2] for word in words if re.match(r"(deployment|job|pod)/[a-z-]+$", word)]
    names += [words[words.index("generic") + 1]] if "generic" in words else []
    names += [words[words.index("job") + 1]] if "job" in words else []
    for name in (name.removesuffix("-predictor") for name in names):  # what KServe adds to an InferenceService's
        assert re.search(rf"(?:secretName|name|value): {name}$", MANIFESTS, re.MULTILINE), name


@pytest.mark.parametrize("words", [*of("flawline"), *of("flawline", TRAINING)], ids=" ".join)
def test_flawline_when_told_to_do_something_then_has_the_command_and_its_options(words):
    """The command line understands the words; nothing is done."""
    [group] = [entry for entry in entry_points(group=GROUP) if words[0] in _names(entry.load())]
    command = typer.main.get_command(group.load())

    context = command.make_context("flawline", list(words))
    while isinstance(command, TyperGroup):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)


def _names(commands_of):
    return typer.main.get_command(commands_of).commands


@pytest.mark.parametrize("name", sorted(set(re.findall(r"FLAWLINE_[A-Z_]+[A-Z]", RUNBOOK + TRAINING))))
def test_setting_when_named_then_the_service_has_it(name):
    """Nobody sets a variable that nobody reads."""
    assert name in CLIENTS or name.removeprefix("FLAWLINE_").lower() in Settings.model_fields


def test_overlays_when_listed_then_all_of_them_are():
    """The table at the top names every overlay, and none that is not there."""
    table = RUNBOOK[: RUNBOOK.index("What the base promises")]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    overlays = {path.parent.name for path in (ROOT / "k8s/overlays").glob("*/kustomization.yaml")}

    assert set(re.findall(r"`([\w-]+)`", "".join(rows))) == overlays


def test_metrics_key_when_made_then_is_the_one_that_the_monitor_reads():
    """The secret's name and its entry agree with the ServiceMonitor."""
    [monitor] = yaml.safe_load_all((ROOT / "k8s/monitoring/servicemonitor.yaml").read_text())
    wanted = monitor["spec"]["endpoints"][0]["authorization"]["credentials"]

    assert f"create secret generic {wanted['name']} --from-literal={wanted['key']}=" in RUNBOOK
