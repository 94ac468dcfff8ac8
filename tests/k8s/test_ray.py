"""What KubeRay's operator and Ray Serve would refuse, or take and do something else with."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.manifests import K8S, Manifest, build, named, of_kind

SERVING = ["base", "overlays/local", "overlays/production", "overlays/everything"]


def _serving(name: str) -> tuple[Manifest, dict[str, Any]]:
    service = named(build(name), "RayService", "accord")
    return service, yaml.safe_load(service["spec"]["serveConfigV2"])


@pytest.mark.parametrize("name", SERVING)
def test_serve_reads_the_config(name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    _, config = _serving(name)
    read = ServeDeploySchema.model_validate(config)
    assert len(read.applications) == 1, "with two, clients and probes would have to name theirs"
    assert read.grpc_options.request_timeout_s


@pytest.mark.parametrize("name", SERVING)
def test_the_services_read_their_config(name: str) -> None:
    from accord.config import validate
    from services.config import GATEWAY, GENERATION, LIMITER, REWARD, SERVICER_FUNCTIONS, ServeConfig

    service, config = _serving(name)
    (application,) = config["applications"]
    read = validate(ServeConfig, application["args"], name)
    assert tuple(config["grpc_options"]["grpc_servicer_functions"]) == SERVICER_FUNCTIONS
    assert {part["name"] for part in application["deployments"]} == {GATEWAY, GENERATION, LIMITER, REWARD}
    largest = read.gateway.user_config.limits.max_request_bytes
    for group in (service["spec"]["rayClusterConfig"]["headGroupSpec"], *_groups(service)):
        environment = {v["name"]: v.get("value") for v in group["template"]["spec"]["containers"][0]["env"]}
        assert int(environment["RAY_SERVE_GRPC_MAX_MESSAGE_SIZE"]) > largest
    (gateway,) = [group for group in _groups(service) if group["groupName"] == "gateway"]
    mounts = [mount["mountPath"] for mount in gateway["template"]["spec"]["containers"][0]["volumeMounts"]]
    assert str(Path(read.gateway.tokens).parent) in mounts, "the gateway could not read who may call"


def test_the_feedback_service_reads_its_config() -> None:
    from accord.config import load_yaml
    from services.feedback.config import FeedbackServiceConfig

    for name in ("base", "overlays/production"):
        manifests = build(name)
        (container,) = named(manifests, "Deployment", "feedback")["spec"]["template"]["spec"]["containers"]
        arguments = container["args"]
        overrides = [value for key, value in itertools.pairwise(arguments) if key == "--set"]
        read = load_yaml(FeedbackServiceConfig, K8S / "base" / "config" / "feedback.yaml", overrides)
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports == {"http": read.port, "grpc": read.grpc_port, "metrics": read.metrics_port}
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert read.tokens is not None
        assert {str(read.state_dir), str(read.tokens.parent), "/runs"} <= mounts
        if name == "overlays/production":
            assert read.url.startswith("postgresql://"), "two pods would each have a SQLite of their own"


def _groups(service: Manifest) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    return groups


@pytest.mark.parametrize("name", SERVING)
def test_every_deployment_fits_a_group(name: str) -> None:
    """A replica that asks for more than any pod has would wait for ever."""
    service, config = _serving(name)
    groups = {
        tuple(group["labels"].items()): group
        for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    }
    free = {labels: _capacity(group) for labels, group in groups.items()}
    for deployment in config["applications"][0]["deployments"]:
        options = deployment["ray_actor_options"]
        labels = tuple(options["label_selector"].items())
        assert labels in free, (
            f"{deployment['name']} is to be placed on {labels}, and no group is labelled so"
        )
        cpus, gpus = free[labels]
        free[labels] = (cpus - options["num_cpus"], gpus - options.get("num_gpus", 0))
    assert all(cpus > -1e-9 and gpus > -1e-9 for cpus, gpus in free.values()), (
        "one of each does not fit in one pod"
    )


def _capacity(group: dict[str, Any]) -> tuple[float, float]:
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    return float(limits["cpu"]), float(limits.get("nvidia.com/gpu", 0))


@pytest.mark.parametrize("name", SERVING)
def test_there_are_nodes_for_all_replicas(name: str) -> None:
    service, config = _serving(name)
    arguments = config["applications"][0]["args"]
    most = {
        group["groupName"]: group["maxReplicas"]
        for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    }
    if name != "overlays/local":  # one node: its second replica stays away
        assert arguments["generation"]["autoscaling"]["max_replicas"] <= most["models"]
        assert arguments["gateway"]["autoscaling"]["max_replicas"] <= most["gateway"]


@pytest.mark.parametrize("name", SERVING)
def test_whoever_stops_waits_for_whom_it_serves(name: str) -> None:
    """request < Serve's limit <= replica's grace < pod's grace <= old cluster's delay; Serve < Envoy."""
    service, config = _serving(name)
    arguments, limit = config["applications"][0]["args"], config["grpc_options"]["request_timeout_s"]
    assert arguments["gateway"]["user_config"]["limits"]["request_timeout_s"] < limit
    for part in ("gateway", "generation", "reward"):
        assert arguments[part]["graceful_shutdown_timeout_s"] >= limit
    cluster = service["spec"]["rayClusterConfig"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        grace = group["template"]["spec"]["terminationGracePeriodSeconds"]
        assert limit < grace <= service["spec"]["rayClusterDeletionDelaySeconds"]
    for policy in of_kind(build(name), "BackendTrafficPolicy"):
        assert int(policy["spec"]["timeout"]["http"]["requestTimeout"].removesuffix("s")) > limit


@pytest.mark.parametrize("name", SERVING)
def test_grpc_reaches_the_service(name: str) -> None:
    """KubeRay puts the head's ports named `serve` or `serve-...`, and no others, into the service."""
    service, config = _serving(name)
    cluster = service["spec"]["rayClusterConfig"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        ports = {
            port["name"]: port["containerPort"]
            for port in group["template"]["spec"]["containers"][0]["ports"]
        }
        assert ports["serve"] == config["http_options"]["port"], (
            "the operator's readiness probe asks this one"
        )
        assert ports["serve-grpc"] == config["grpc_options"]["port"]
    ports = {port["name"]: port for port in service["spec"]["serveService"]["spec"]["ports"]}
    assert ports["serve-grpc"]["port"] == config["grpc_options"]["port"]
    assert ports["serve-grpc"]["appProtocol"] == "kubernetes.io/h2c"
    for route in of_kind(build(name), "GRPCRoute"):
        if route["metadata"]["name"] == "serving":
            backend = route["spec"]["rules"][0]["backendRefs"][0]
            assert backend["name"] == service["spec"]["serveService"]["metadata"]["name"]
            assert backend["port"] == ports["serve-grpc"]["port"]


@pytest.mark.parametrize("name", SERVING)
def test_the_autoscaler_may_restart_no_pod_itself(name: str) -> None:
    """Autoscaler v2 wants restartPolicy Never or unset, and its version from autoscalerOptions alone."""
    cluster = _serving(name)[0]["spec"]["rayClusterConfig"]
    assert cluster["autoscalerOptions"]["version"] == "v2"
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        spec = group["template"]["spec"]
        assert spec.get("restartPolicy", "Never") == "Never"
        assert "RAY_enable_autoscaler_v2" not in [
            variable["name"] for variable in spec["containers"][0].get("env", [])
        ]
    for group in cluster["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_redis_is_named_where_the_operator_wants_it() -> None:
    cluster = _serving("overlays/production")[0]["spec"]["rayClusterConfig"]
    assert cluster["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]
    names = {
        variable["name"] for variable in cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
    }
    assert not names & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD"}


@pytest.mark.parametrize("name", ["jobs", "overlays/production-jobs", "overlays/everything"])
def test_the_operator_takes_the_jobs(name: str) -> None:
    jobs = of_kind(build(name), "RayJob")
    assert {job["metadata"]["labels"]["accord.dev/stage"] for job in jobs} == {
        "collect", "learn-reward", "finetune", "evaluate", "loop",
    }  # fmt: skip
    for job in jobs:
        spec = job["spec"]
        assert len(job["metadata"]["name"]) <= 47
        assert spec["backoffLimit"] > 0
        assert spec["activeDeadlineSeconds"] > 0
        rules = spec.get("deletionStrategy", {}).get("deletionRules", [])
        assert bool(rules) != bool(spec.get("shutdownAfterJobFinishes")), "the two exclude each other"
        _check_deletion(rules, autoscaling=bool(spec["rayClusterSpec"].get("enableInTreeAutoscaling")))


def _check_deletion(rules: list[dict[str, Any]], autoscaling: bool) -> None:
    """KubeRay's validateDeletionRules: one condition a rule, workers before cluster before the job itself."""
    order = ["DeleteWorkers", "DeleteCluster", "DeleteSelf"]
    times: dict[tuple[str, str], dict[str, int]] = {}
    for rule in rules:
        condition = dict(rule["condition"])
        seconds = condition.pop("ttlSeconds")
        ((key, value),) = condition.items()
        assert rule["policy"] not in times.setdefault((key, value), {})
        assert not (autoscaling and rule["policy"] == "DeleteWorkers")
        times[key, value][rule["policy"]] = seconds
    for found in times.values():
        ordered = [found[policy] for policy in order if policy in found]
        assert ordered == sorted(ordered)


@pytest.mark.parametrize("stage", ["collect", "learn-reward", "finetune", "evaluate", "loop"])
def test_a_retry_goes_on_where_the_job_stopped(stage: str) -> None:
    """Name and run directory do not change, and the directory is on storage that outlives the cluster."""
    job = named(build("jobs"), "RayJob", stage)
    entrypoint = job["spec"]["entrypoint"]
    assert entrypoint.split()[:3] == ["python", "-m", f"ray_jobs.{stage.replace('-', '_')}"]
    assert '--run-dir "$ACCORD_RUN_DIR"' in entrypoint
    settings = named(build("base"), "ConfigMap", "accord-job")["data"]
    assert settings["ACCORD_RUN_DIR"].startswith("/runs/")
    cluster = job["spec"]["rayClusterSpec"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        spec = group["template"]["spec"]
        mounts = {mount["mountPath"]: mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
        volume = next(volume for volume in spec["volumes"] if volume["name"] == mounts["/runs"])
        assert volume["persistentVolumeClaim"]["claimName"] == "accord-runs"


@pytest.mark.parametrize("name", ["base", "overlays/production"])
def test_the_jobs_recipe_reads_with_its_settings(name: str) -> None:
    """/app/recipes is the checkout's recipes/ in the image."""
    import shlex

    from accord.recipe import load_recipe

    settings = named(build(name), "ConfigMap", "accord-job")["data"]
    arguments = shlex.split(settings["ACCORD_SETTINGS"])
    assert arguments[::2] == ["--set"] * (len(arguments) // 2)
    recipe = K8S.parent / settings["ACCORD_RECIPE"].removeprefix("/app/")
    load_recipe(recipe, arguments[1::2])


def test_production_has_the_nodes_that_its_recipe_asks_for() -> None:
    from accord.recipe import load_recipe

    settings = named(build("overlays/production"), "ConfigMap", "accord-job")["data"]
    ray = load_recipe(K8S.parent / settings["ACCORD_RECIPE"].removeprefix("/app/")).ray
    for stage in ("collect", "finetune", "evaluate", "loop"):
        job = named(build("overlays/production-jobs"), "RayJob", stage)
        (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        cpus, gpus = _capacity(group)
        assert group["replicas"] * gpus >= max(
            ray.num_workers * ray.gpus_per_worker, ray.generators * ray.gpus_per_generator
        )
        assert cpus >= max(ray.cpus_per_worker, ray.cpus_per_generator)


def test_kueues_quota_holds_the_largest_job() -> None:
    queue = of_kind(build("cluster"), "ClusterQueue")[0]
    quota = {
        r["name"]: r["nominalQuota"] for r in queue["spec"]["resourceGroups"][0]["flavors"][0]["resources"]
    }
    for job in of_kind(build("overlays/production-jobs"), "RayJob"):
        cluster = job["spec"]["rayClusterSpec"]
        wanted: dict[str, float] = {}
        for group in [{"replicas": 1, **cluster["headGroupSpec"]}, *cluster["workerGroupSpecs"]]:
            for name, amount in group["template"]["spec"]["containers"][0]["resources"]["requests"].items():
                wanted[name] = wanted.get(name, 0) + group["replicas"] * float(str(amount).removesuffix("Gi"))
        for name, amount in wanted.items():
            assert amount <= float(str(quota[name]).removesuffix("Gi")), f"{job['metadata']['name']}: {name}"
