"""What we promise of every manifest: it is valid, it runs with nothing that it does not need, and it tells the truth.

Rendered by `kubectl kustomize`, checked against the schemas of several Kubernetes versions, and then against our own
rules, resource by resource. Nothing here needs a cluster, and nothing here was run on one.
"""

import copy
import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from service.settings import Settings

K8S = Path(__file__).resolve().parents[3] / "k8s"
OVERLAYS = sorted(path.parent.name for path in (K8S / "overlays").glob("*/kustomization.yaml"))
VERSIONS = ("1.30", "1.33", "1.36")
TRAINING = ("training", "training-lines", "training-gpus")
SERVING = ("cpu", "gpu", "gpu-mig", "keda", "monitoring")
# Resources that Kubernetes itself does not know; each shape says what it was written from.
SHAPES = {
    shape["properties"]["kind"]["const"]: shape
    for shape in (json.loads(path.read_text("utf-8")) for path in sorted((K8S / "shapes").glob("*.json")))
}

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


@cache
def render(overlay):
    """Return every resource of an overlay."""
    told = subprocess.run(
        ["kubectl", "kustomize", K8S / "overlays" / overlay], capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stderr
    assert "Warning" not in told.stderr, told.stderr
    return [resource for resource in yaml.safe_load_all(told.stdout) if resource]


def pods(overlay):
    """Yield every pod that an overlay starts, with the name of what starts it."""
    for resource in render(overlay):
        spec = resource.get("spec") or {}
        if resource["kind"] in ("Deployment", "Job"):
            yield resource["metadata"]["name"], spec["template"]["spec"]
        elif resource["kind"] in ("Pod", "ServingRuntime"):
            yield resource["metadata"]["name"], spec


def containers(overlay):
    """Yield every container of an overlay with its pod."""
    for _, pod in pods(overlay):
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            yield pod, container


def only(overlay, kind):
    """Return an overlay's one resource of a kind."""
    [resource] = [resource for resource in render(overlay) if resource["kind"] == kind]
    return resource


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_when_rendered_then_is_valid_for_kubernetes(overlay, version):
    """Every field of every built-in resource exists, and has the right type, in old and new clusters."""
    known = [resource for resource in render(overlay) if resource["kind"] not in SHAPES]

    for resource in known:
        kubernetes_validate.validate(resource, version, strict=True)

    assert known


def foreign(overlay):
    """Return the resources of an overlay that Kubernetes itself does not know."""
    return [resource for resource in render(overlay) if resource["kind"] in SHAPES]


@pytest.mark.parametrize("overlay", ["keda", "kserve", "monitoring"])
def test_overlay_when_rendered_then_is_valid_for_operators_too(overlay):
    """Resources of KEDA, KServe and the Prometheus operator have the shapes of their projects."""
    assert foreign(overlay)
    for resource in foreign(overlay):
        jsonschema.validate(resource, SHAPES[resource["kind"]], jsonschema.Draft202012Validator)
        if resource["kind"] == "ServingRuntime":  # a pod in disguise
            parts = {name: resource["spec"][name] for name in ("containers", "volumes")}
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "as-kserve-starts-it"}, "spec": parts}
            kubernetes_validate.validate(pod, VERSIONS[-1], strict=True)


def test_shapes_when_all_overlays_are_rendered_then_each_is_needed():
    """No shape is kept for a resource that nobody writes any more."""
    assert {resource["kind"] for overlay in OVERLAYS for resource in foreign(overlay)} == set(SHAPES)


@pytest.mark.parametrize("overlay", ["keda", "kserve", "monitoring"])
def test_overlay_when_a_field_is_misspelt_then_its_shape_refuses_it(overlay):
    """A shape that lets everything pass would be no check: one more letter anywhere in the spec, and it is refused."""
    for resource in foreign(overlay):
        for name in resource["spec"]:
            wrong = copy.deepcopy(resource)
            wrong["spec"][name + "s"] = wrong["spec"].pop(name)
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(wrong, SHAPES[resource["kind"]], jsonschema.Draft202012Validator)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_when_applied_then_every_namespaced_resource_has_a_namespace(overlay):
    """Nothing lands in the default namespace, where no policy guards it."""
    for resource in render(overlay):
        if resource["kind"] != "Namespace":
            assert resource["metadata"].get("namespace"), resource["metadata"]["name"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_container_when_started_then_may_do_nothing_that_it_does_not_need(overlay):
    """An ordinary user, a read-only root, no capability, no escalation, the runtime's own system-call filter."""
    for pod, container in containers(overlay):
        own, shared = container["securityContext"], pod.get("securityContext", {})
        both = shared | own
        assert both["runAsNonRoot"] is True
        assert both["runAsUser"] >= 10000
        assert both["seccompProfile"] == {"type": "RuntimeDefault"}
        assert own["allowPrivilegeEscalation"] is False
        assert own["readOnlyRootFilesystem"] is True
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert not own.get("privileged")
        assert not any(pod.get(name) for name in ("hostNetwork", "hostPID", "hostIPC"))
        assert not any("hostPath" in volume for volume in pod.get("volumes", ()))


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name != "kserve"])
def test_pod_when_started_then_gets_no_token_and_no_variables_of_neighbours(overlay):
    """The service asks the cluster for nothing; and a Service named flawline would otherwise set FLAWLINE_PORT."""
    for _, pod in pods(overlay):
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_container_when_it_runs_then_its_share_is_bounded_and_its_image_fixed(overlay):
    """CPU and memory have requests and limits, and an image has a version that is not `latest`."""
    for _, container in containers(overlay):
        for bound in ("requests", "limits"):
            assert {"cpu", "memory"} <= container["resources"][bound].keys()
        assert re.fullmatch(r"[a-z0-9./-]+:[0-9][\w.-]*", container["image"])


@pytest.mark.parametrize("overlay", [*SERVING, "kserve"])
def test_service_when_it_starts_loads_or_hangs_then_the_right_probe_sees_it(overlay):
    """Readiness asks whether lines are proven; liveness only whether the process answers, since loading is no fault."""
    for _, container in containers(overlay):
        paths = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
        assert paths["readiness"].endswith("/ready")
        assert paths["startup"].endswith("/live")
        assert paths["liveness"].endswith("/live")
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        ports |= {value: value for value in _port_numbers(container)}
        for kind in ("startup", "readiness", "liveness"):
            assert container[f"{kind}Probe"]["httpGet"]["port"] in ports


@pytest.mark.parametrize("overlay", SERVING)
def test_pod_when_told_to_stop_then_has_time_to_answer_what_it_accepted(overlay):
    """The grace period covers the pause before, the drain, and the longest deadline that a caller may name."""
    settings = _settings(overlay)
    [(_, pod)] = pods(overlay)
    [pause_s] = re.findall(r"sleep\((\d+)\)", pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1])

    drain_s, longest_s = float(settings["FLAWLINE_DRAIN_TIMEOUT_S"]), float(settings["FLAWLINE_MAX_DEADLINE_S"])
    assert drain_s >= longest_s
    assert pod["terminationGracePeriodSeconds"] >= int(pause_s) + drain_s + 5


@pytest.mark.parametrize("overlay", SERVING)
def test_settings_when_mounted_then_the_service_understands_all_of_them(overlay, monkeypatch):
    """Every variable is a setting of the service, with a value that it accepts, and its files lie where volumes do."""
    given = _settings(overlay)
    for name, value in given.items():
        monkeypatch.setenv(name, value)

    settings = Settings()

    assert {name.removeprefix("FLAWLINE_").lower() for name in given} <= set(Settings.model_fields)
    [(_, pod)] = pods(overlay)
    container = pod["containers"][0]
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts[str(settings.store_directory)]["readOnly"] is True
    assert settings.keys_file is not None
    assert mounts[str(settings.keys_file.parent)]["readOnly"] is True
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": settings.port, "health": settings.health_port}


@pytest.mark.parametrize("overlay", SERVING)
def test_traffic_when_sent_to_the_service_then_reaches_its_pods_and_goes_nowhere_else(overlay):
    """Selectors and ports match; the namespace denies everything, and the service is let to be asked and not to ask."""
    service, deployment = only(overlay, "Service"), only(overlay, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    names = {port["name"] for port in deployment["spec"]["template"]["spec"]["containers"][0]["ports"]}
    policies = {r["metadata"]["name"]: r["spec"] for r in render(overlay) if r["kind"] == "NetworkPolicy"}

    for selector in (
        service["spec"]["selector"],
        deployment["spec"]["selector"]["matchLabels"],
        only(overlay, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        policies["flawline-inspections"]["podSelector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= names
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert not any(policy.get("egress") for policy in policies.values())


@pytest.mark.parametrize("overlay", SERVING)
def test_probes_when_callers_must_show_keys_or_certificates_then_are_answered_all_the_same(overlay):
    """They ask a port of their own, which says alive and ready only, and which the network policy leaves open."""
    [(_, container)] = containers(overlay)
    [rule] = next(
        resource["spec"]["ingress"]
        for resource in render(overlay)
        if resource["kind"] == "NetworkPolicy" and resource["metadata"]["name"] == "flawline-probes"
    )

    asked = {container[f"{kind}Probe"]["httpGet"]["port"] for kind in ("startup", "readiness", "liveness")}
    assert asked == {"health"}
    assert rule == {"ports": [{"protocol": "TCP", "port": "health"}]}


def test_kserve_when_applied_alone_then_has_all_that_its_pods_ask_for():
    """Its namespace and store are there, whoever calls needs a key, and exactly its two ports are open."""
    predictor = only("kserve", "InferenceService")
    [(pod, container)] = containers("kserve")
    settings = {variable["name"]: variable["value"] for variable in container["env"]}
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    policies = {r["metadata"]["name"]: r["spec"] for r in render("kserve") if r["kind"] == "NetworkPolicy"}
    opened = {name: policy for name, policy in policies.items() if name != "default-deny"}

    assert only("kserve", "Namespace")["metadata"]["name"] == predictor["metadata"]["namespace"]
    claim, account = only("kserve", "PersistentVolumeClaim"), only("kserve", "ServiceAccount")
    assert predictor["spec"]["predictor"]["model"]["storageUri"] == f"pvc://{claim['metadata']['name']}"
    assert predictor["spec"]["predictor"]["serviceAccountName"] == account["metadata"]["name"]
    assert predictor["spec"]["predictor"]["automountServiceAccountToken"] is False
    assert predictor["spec"]["predictor"]["enableServiceLinks"] is False
    assert {name.removeprefix("FLAWLINE_").lower() for name in settings} <= set(Settings.model_fields)
    keys = mounts[str(Path(settings["FLAWLINE_KEYS_FILE"]).parent)]
    [secret] = [volume["secret"] for volume in pod["volumes"] if volume["name"] == keys["name"]]
    assert secret["secretName"] == "flawline-keys"
    assert keys["readOnly"] is True
    of_pods = {"matchLabels": {"serving.kserve.io/inferenceservice": predictor["metadata"]["name"]}}
    assert all(policy["podSelector"] == of_pods and not policy.get("egress") for policy in opened.values())
    ports = {
        name: [port["port"] for rule in policy["ingress"] for port in rule["ports"]] for name, policy in opened.items()
    }
    assert ports == {
        "flawline-predictor-inspections": [int(settings["FLAWLINE_PORT"])],
        "flawline-predictor-probes": [int(settings["FLAWLINE_HEALTH_PORT"])],
    }
    assert {container[f"{kind}Probe"]["httpGet"]["port"] for kind in ("startup", "readiness", "liveness")} == {8081}


def test_kserve_when_applied_beside_the_base_then_neither_changes_the_other():
    """What both bring is the same, callers come from the same places, and no selector takes the other's pods."""
    of_base, of_kserve = (
        {(resource["kind"], resource["metadata"]["name"]): resource for resource in render(overlay)}
        for overlay in ("cpu", "kserve")
    )
    shared = of_base.keys() & of_kserve.keys()

    assert {kind for kind, _ in shared} == {"Namespace", "NetworkPolicy", "PersistentVolumeClaim", "ServiceAccount"}
    assert all(of_base[key] == of_kserve[key] for key in shared)
    callers = [
        resources["NetworkPolicy", name]["spec"]["ingress"][0]["from"]
        for resources, name in (
            (of_base, "flawline-inspections"),
            (of_kserve, "flawline-predictor-inspections"),
        )
    ]
    assert callers[0] == callers[1]


def _port_numbers(container):
    """Return the ports that a container's own variables open, beside those that it declares."""
    return [int(one["value"]) for one in container.get("env", ()) if one["name"].endswith("_PORT")]


def test_monitor_when_it_scrapes_then_finds_the_service_and_its_port():
    """The ServiceMonitor selects our Service by labels that it has, and a port by a name that it has."""
    monitor, service = only("monitoring", "ServiceMonitor")["spec"], only("monitoring", "Service")
    [endpoint] = monitor["endpoints"]

    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert endpoint["path"] == "/metrics"


def test_job_when_rules_ask_for_it_then_pods_are_scraped_under_that_name():
    """`up` is Prometheus' own and has the job's name only: a rule that asks for another one never fires."""
    asked = set(re.findall(r'job="([^"]+)"', (K8S / "monitoring/rules.yaml").read_text("utf-8")))
    monitor, service = only("monitoring", "ServiceMonitor")["spec"], only("monitoring", "Service")
    trial = yaml.safe_load((K8S.parent / "docker/compose/prometheus.yaml").read_text("utf-8"))

    assert asked == {service["metadata"]["labels"][monitor["jobLabel"]]}
    assert asked == {job["job_name"] for job in trial["scrape_configs"]}


def test_namespace_when_made_then_refuses_pods_that_ask_for_more():
    """The cluster itself enforces the restricted standard."""
    labels = only("cpu", "Namespace")["metadata"]["labels"]

    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize(("overlay", "resource"), [("gpu", "nvidia.com/gpu"), ("gpu-mig", "nvidia.com/mig-1g.10gb")])
def test_gpu_when_asked_for_then_exactly_one_is_held_and_no_second_is_needed_to_roll(overlay, resource):
    """Request and limit agree, nothing else of the device is taken, and a rollout fits on full nodes."""
    deployment = only(overlay, "Deployment")
    resources = deployment["spec"]["template"]["spec"]["containers"][0]["resources"]

    devices = {kind: {name: n for name, n in resources[kind].items() if "/" in name} for kind in ("requests", "limits")}
    assert devices == {"requests": {resource: "1"}, "limits": {resource: "1"}}
    assert deployment["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 0
    assert _settings(overlay)["FLAWLINE_DEVICE"] == "cuda"


def test_kserve_when_a_pod_is_replaced_then_the_new_one_is_ready_first_and_the_old_one_answers_what_it_accepted():
    """A runtime's containers may pause before they stop; how long they may take is its predictor's to say."""
    predictor = only("kserve", "InferenceService")["spec"]["predictor"]
    [container] = only("kserve", "ServingRuntime")["spec"]["containers"]
    given = {variable["name"].removeprefix("FLAWLINE_").lower(): variable["value"] for variable in container["env"]}
    [pause_s] = re.findall(r"sleep\((\d+)\)", container["lifecycle"]["preStop"]["exec"]["command"][-1])

    assert predictor["terminationGracePeriodSeconds"] >= int(pause_s) + Settings(**given).drain_timeout_s + 5
    assert predictor["deploymentStrategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}


def test_keda_when_a_trigger_fails_then_older_versions_fall_back_too():
    """Before 2.18 only AverageValue falls back, by its target's whole part times the number of pods."""
    scaled = only("keda", "ScaledObject")["spec"]

    assert scaled["fallback"]["replicas"] >= scaled["minReplicaCount"]
    for trigger in scaled["triggers"]:
        assert trigger["metricType"] == "AverageValue"
        assert float(trigger["metadata"]["threshold"]).is_integer()


def test_keda_when_it_scales_then_nobody_else_sets_the_number_of_pods():
    """A number in the Deployment would fight with the scaler at every deploy."""
    scaled = only("keda", "ScaledObject")["spec"]

    assert "replicas" not in only("keda", "Deployment")["spec"]
    assert scaled["scaleTargetRef"]["name"] == only("keda", "Deployment")["metadata"]["name"]
    assert scaled["minReplicaCount"] >= 2


def test_training_when_indexed_then_each_line_has_its_index():
    """As many completions as lines; a refused run (exit code 2) is not tried again, a stopped one is."""
    lines = only("training-lines", "ConfigMap")["data"]["LINES"]
    job = only("training-lines", "Job")["spec"]

    assert job["completionMode"] == "Indexed"
    assert job["completions"] == len(lines.split())
    for overlay in TRAINING:
        [rule] = only(overlay, "Job")["spec"]["podFailurePolicy"]["rules"]
        assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])


def test_training_when_two_overlays_are_applied_then_neither_replaces_the_other():
    """Their jobs have different names; each overlay brings one."""
    assert len({only(overlay, "Job")["metadata"]["name"] for overlay in TRAINING}) == len(TRAINING)


def test_training_when_a_node_has_several_gpus_then_torchrun_starts_a_process_for_each():
    """As many processes as GPUs are held; NCCL has room in shared memory, within the pod's own memory."""
    pod = only("training-gpus", "Job")["spec"]["template"]["spec"]
    [container] = pod["containers"]
    devices = {container["resources"][kind]["nvidia.com/gpu"] for kind in ("requests", "limits")}
    [launcher] = [variable["value"] for variable in container["env"] if variable["name"] == "LAUNCHER"]
    [shared] = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"].endswith("/shm")]

    assert devices == {"4"}
    assert launcher.split() == ["torchrun", "--standalone", "--nproc-per-node=gpu", "--no-python"]
    assert [volume["emptyDir"]["medium"] for volume in pod["volumes"] if volume["name"] == shared] == ["Memory"]
    # torchrun waits half a minute for its processes
    assert pod["terminationGracePeriodSeconds"] > 30


@pytest.mark.parametrize(
    ("overlay", "index", "line"),
    [("training", None, "cap"), ("training-lines", "0", "cap"), ("training-lines", "2", "screw")],
)
def test_training_when_a_pod_begins_then_trains_its_own_line_or_goes_on_where_it_stood(tmp_path, overlay, index, line):
    """The script itself, run by a real shell: its line by index, and the last unfinished run where there is one."""
    (tmp_path / "frames" / line / "train" / "good").mkdir(parents=True)
    begin, resume, anew = (
        _shell(tmp_path, overlay, index, line, state) for state in ("none", "unfinished", "finished")
    )

    runs = begin.rpartition(" ")[2]
    assert Path(runs).parent == tmp_path / ".runs" / line
    assert begin == (
        f"flawline train {tmp_path}/frames/{line} --detector inp_former --config small --store {tmp_path} --runs {runs}"
    )
    assert resume == f"flawline train --resume {runs}/{line}/20260101-000000"
    assert anew == begin


@pytest.mark.parametrize("changed", ["DETECTOR", "CONFIG", "FLAWLINE_WEIGHTS", "what CONFIG holds", "frames"])
def test_training_when_it_is_given_something_else_then_does_not_go_on_with_the_run_that_did_not_end(tmp_path, changed):
    """Otherwise what was refused or killed would be tried again with the old settings, for ever and in silence."""
    good, settings = tmp_path / "frames/cap/train/good", tmp_path / "own.yaml"
    good.mkdir(parents=True)
    settings.write_text("detector: inp_former\n")
    given = {"CONFIG": str(settings)}
    _shell(tmp_path, "training", None, "cap", "none", given)
    resumed = _shell(tmp_path, "training", None, "cap", "unfinished", given)

    if changed == "frames":
        (good / "1.png").touch()
    elif changed == "what CONFIG holds":
        settings.write_text("detector: dadf\n")
    else:
        given |= {changed: "another"}
    begun = _shell(tmp_path, "training", None, "cap", "as it is", given)

    assert "--resume" in resumed
    assert "--resume" not in begun


def test_training_when_a_node_has_several_gpus_then_a_run_begins_and_goes_on_under_torchrun(tmp_path):
    """The same script, with torchrun before the command in both cases."""
    (tmp_path / "frames/cap").mkdir(parents=True)
    begin, resume = (_shell(tmp_path, "training-gpus", None, "cap", state) for state in ("none", "unfinished"))

    launcher = "torchrun --standalone --nproc-per-node=gpu --no-python"
    assert begin.startswith(f"{launcher} flawline train {tmp_path}/frames/cap ")
    assert resume.startswith("torchrun --standalone --nproc-per-node=gpu --no-python flawline train --resume ")


def _shell(folder, overlay, index, line, state, given=()):
    """Run a job's script after the last run of what it is given came to a state, and return the command it ends in."""
    [(_, container)] = containers(overlay)
    script = container["args"][0].replace("/store", str(folder)).replace("/frames", f"{folder}/frames")
    made = folder / "runs-of-the-last-shell"
    if state in ("unfinished", "finished"):
        run = Path(made.read_text()) / line / "20260101-000000"
        run.mkdir(parents=True, exist_ok=True)
        if state == "finished":
            (run / "report.html").touch()
    for program in ("flawline", "torchrun"):
        (folder / program).write_text('#!/bin/sh\necho "${0##*/} $@"\n')
        (folder / program).chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", **only(overlay, "ConfigMap")["data"]}
    environment |= {variable["name"]: variable["value"] for variable in container.get("env", ())}
    environment |= {} if index is None else {"JOB_COMPLETION_INDEX": index}
    environment |= dict(given)
    told = subprocess.run(["sh", "-euc", script], env=environment, capture_output=True, text=True, check=True)
    if state == "none":
        made.write_text(told.stdout.strip().rpartition(" ")[2])
    return told.stdout.strip()


def _settings(overlay):
    names = {
        reference["configMapRef"]["name"] for _, container in containers(overlay) for reference in container["envFrom"]
    }
    [data] = [r["data"] for r in render(overlay) if r["kind"] == "ConfigMap" and r["metadata"]["name"] in names]
    return data
