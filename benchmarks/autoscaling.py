"""The production overlay's autoscaling on one machine: nodes come and go, and every request is answered.

    python -m benchmarks.autoscaling --json autoscaling.json --svg docs/autoscaling.svg

The Serve config is that of k8s/overlays/production, with its placement, resources and autoscaling; a node
is what Ray's own autoscaler (v2) makes of Ray's fake provider: a raylet of its own on this machine, with the
resources and labels of a pod (a GPU in name only). Scaled down, so that two cores suffice: the weights are
the sandbox's, there are fewer nodes and calls for a replica, and times are shorter (`SCALED`).
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from accord import tokens
from accord.cli.common import errors_shown
from accord.client import Client, ClientError, RetryPolicy
from benchmarks.tables import describe, table
from services.config import APP_NAME, GENERATION
from services.rollout.config import ServeEndpoint
from services.rollout.serving import ServeApi
from services.rollout.sources import SourceError

OVERLAY = Path(__file__).resolve().parents[1] / "k8s" / "overlays" / "production"
SCALED = {  # production -> here
    "models nodes": "2 to 8 -> 1 to 3",
    "gateway nodes": "2 to 4 -> 1",
    "calls for a replica (target_ongoing_requests)": "12 -> 3",
    "upscale delay": "20 s -> 4 s",
    "downscale delay": "600 s -> 15 s",
    "idle node kept": "300 s -> 12 s",
}
NODES = (1, 3)
TARGET = 3
DELAYS_S = {"upscale_delay_s": 4, "downscale_delay_s": 15, "metrics_interval_s": 1, "look_back_period_s": 4}
IDLE_S = 12
READY_S = 150.0


@dataclass
class Seen:
    """What was seen at one second."""

    second: float
    clients: int
    nodes: int
    replicas: int
    answered: int
    failed: int


@dataclass
class Clients:
    """Clients that ask one request after the other; how many of them do is changed while they run."""

    address: str
    token: str
    wanted: int = 0
    answered: int = 0
    failed: list[str] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)
    _ended: bool = False
    _threads: list[threading.Thread] = field(default_factory=list)

    def begin(self, most: int) -> None:
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(most)]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._ended = True
        for thread in self._threads:
            thread.join(120)

    def _ask(self, number: int) -> None:
        seed = number * 100_000
        with Client(self.address, token=self.token, retry=RetryPolicy(max_attempts=1)) as client:
            while not self._ended:
                if number >= self.wanted:
                    time.sleep(0.2)
                    continue
                seed += 1
                begun = time.monotonic()
                try:
                    client.generate("two red stars", num_images=1, steps=40, seed=seed, timeout_s=120.0)
                except ClientError as error:
                    self.failed.append(f"{type(error).__name__}: {error}")
                else:
                    self.answered += 1
                    self.latencies_s.append(time.monotonic() - begun)


def serve_config(directory: Path, grpc_port: int) -> dict[str, Any]:
    """The production overlay's Serve config, scaled down; its token file is in `directory`."""
    manifest = yaml.safe_load((OVERLAY / "serve.yaml").read_text(encoding="utf-8"))
    config: dict[str, Any] = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    settings = application["args"]
    most = {"generation": NODES[1], "reward": NODES[1], "gateway": 1}
    for name, replicas in most.items():
        settings[name]["autoscaling"] |= {"min_replicas": 1, "max_replicas": replicas, **DELAYS_S}
        settings[name]["graceful_shutdown_timeout_s"] = 60
    settings["generation"]["autoscaling"]["target_ongoing_requests"] = TARGET
    settings["generation"]["engine"] = {"device": "cpu", "dtype": "float32", "threads": 1}
    settings["generation"]["user_config"] = _table("pkg://accord.shapes/weights/diffusion")
    settings["reward"] |= {"device": "cpu", "grammar": "shapes"}
    settings["reward"]["user_config"] = _table("pkg://accord.shapes/weights/clip")
    settings["gateway"]["tokens"] = str(directory / "tokens.yaml")
    user_config = settings["gateway"]["user_config"]
    user_config.pop("record")
    user_config["limits"]["default"] = {"requests_per_second": 1000, "burst": 1000}
    config["http_options"] |= {"host": "127.0.0.1", "port": _free_port()}
    config["grpc_options"]["port"] = grpc_port
    config["proxy_location"] = (
        "HeadOnly"  # one machine has one port 9000; in production every node has a proxy
    )
    return config


def _table(directory: str) -> dict[str, Any]:
    return {"models": {"champion": directory}, "default": "champion"}


@contextmanager
def cluster(directory: Path) -> Iterator[tuple[str, str]]:
    """A head without CPUs, and an autoscaler; the addresses of Ray and of its dashboard.

    (ray.cluster_utils.AutoscalingCluster does the same, but first ends every Ray of this machine.)
    """
    port, dashboard = _free_port(), _free_port()
    node_types = {
        "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
        "gateway": _node_type({"CPU": 2}, "gateway", 1, 1),
        "models": _node_type({"CPU": 6, "GPU": 1}, "models", *NODES),
    }
    head_id = "f" * 51 + "00000"
    config = {
        "cluster_name": "accord",
        "max_workers": 8,
        "provider": {
            "type": "external",  # by its own name it wants an example file that Ray's wheel lacks
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "disable_node_updaters": True,
            "launch_multiple": True,
            "head_node_id": head_id,
            "gcs_address": f"127.0.0.1:{port}",
        },
        "available_node_types": node_types,
        "head_node_type": "ray.head.default",
        "idle_timeout_minutes": IDLE_S / 60,
        "upscaling_speed": 1.0,
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        **{f"{when}_commands": [] for when in ("initialization", "setup", "head_setup", "worker_setup")},
        **{f"{kind}_start_ray_commands": [] for kind in ("head", "worker")},
    }
    (directory / "autoscaler.json").write_text(json.dumps(config))
    environment = {
        **os.environ,
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": head_id,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": head_id,
        "RAY_AUTH_MODE": "disabled",
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": "65048576",
    }
    command = [
        "ray", "start", "--head", "--block", "--num-cpus=0", "--node-ip-address=127.0.0.1", f"--port={port}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={directory / 'ray'}",
        f"--autoscaling-config={directory / 'autoscaler.json'}", "--disable-usage-stats",
        "--object-store-memory=200000000",
    ]  # fmt: skip
    program = [str(Path(sys.executable).parent / command[0]), *command[1:]]
    with open(directory / "ray.log", "w") as log:
        head = subprocess.Popen(program, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
    except SystemExit:
        for told in (directory / "ray.log", *sorted((directory / "ray").glob("session_2*/logs/monitor.*"))):
            print(f"--- {told.name}\n{told.read_text(errors='replace')[-1500:]}", file=sys.stderr)
        raise
    finally:
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            head.kill()
        _end_nodes(directory / "ray")


def _node_type(resources: dict[str, int], group: str, least: int, most: int) -> dict[str, Any]:
    labels = {"accord-group": group}
    shared = {"object_store_memory": 100_000_000}
    return {
        "resources": {**resources, **shared},
        "labels": labels,
        "node_config": {},
        "min_workers": least,
        "max_workers": most,
    }


def _end_nodes(temp_dir: Path) -> None:
    """The fake nodes outlive their head: ends the processes that name this run's own directory."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (
                str(temp_dir).encode() in (process / "cmdline").read_bytes()
                and int(process.name) != os.getpid()
            ):
                os.kill(int(process.name), signal.SIGKILL)
        except (OSError, ValueError):
            continue


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _until(what: str, condition: Any, timeout_s: float = READY_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(0.5)


def watch(clients: Clients, phases: list[tuple[float, int]], address: str, api: ServeApi) -> list[Seen]:
    """Plays the phases (seconds, clients), and says once a second what there is."""
    import ray

    ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    seen: list[Seen] = []
    begun = time.monotonic()
    for seconds, wanted in phases:
        clients.wanted = wanted
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
            nodes = sum(node["Labels"].get("accord-group") == "models" for node in alive)
            replicas = api.application()["deployments"][GENERATION]["replicas"]
            running = sum(one["state"] == "RUNNING" for one in replicas)
            now = round(time.monotonic() - begun, 1)
            seen.append(Seen(now, wanted, nodes, running, clients.answered, len(clients.failed)))
            print("{:6.1f} s  clients {:2}  nodes {}  replicas {}  answered {}  failed {}".format(
                *vars(seen[-1]).values()), file=sys.stderr)  # fmt: skip
            time.sleep(1.0)
    ray.shutdown()
    return seen


def draw(seen: list[Seen], path: Path) -> None:
    """Load, replicas and nodes over time, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "accord"
    from matplotlib import pyplot

    figure, (load, made) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 4.2), layout="constrained")
    seconds = [one.second for one in seen]
    load.step(seconds, [one.clients for one in seen], where="post", color="#444444")
    load.set_ylabel("clients")
    made.step(seconds, [one.nodes for one in seen], where="post", label="models nodes", color="#1f77b4")
    made.step(
        seconds, [one.replicas for one in seen], where="post", label="generation replicas", color="#d62728",
        linestyle="--",
    )  # fmt: skip
    made.set_ylabel("there are")
    made.set_xlabel("seconds")
    made.set_ylim(0, NODES[1] + 0.5)
    made.legend(frameon=False, loc="lower right")
    for axis in (load, made):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def main(
    calm_s: Annotated[float, typer.Option(help="Few clients, at the beginning.")] = 15.0,
    busy_s: Annotated[float, typer.Option(help="Many clients.")] = 70.0,
    after_s: Annotated[float, typer.Option(help="Few again.")] = 60.0,
    few: Annotated[int, typer.Option(help="Clients when it is calm.")] = 1,
    many: Annotated[int, typer.Option(help="Clients when it is busy.")] = 16,
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write all numbers.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Where to draw the time line.")] = None,
) -> None:
    """Prints what there was at each change, and whether every request was answered."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # as for the head, which only this machine can reach
    for number in (signal.SIGINT, signal.SIGTERM):  # the nodes end with this, however it is stopped
        signal.signal(number, lambda *_: sys.exit(130))
    with errors_shown(), tempfile.TemporaryDirectory(prefix="accord-") as name:
        directory, grpc_port = Path(name), _free_port()
        token = tokens.add(directory / "tokens.yaml", "load", ["generate"])
        with cluster(directory) as (address, dashboard):
            api = ServeApi(ServeEndpoint(url=dashboard, application=APP_NAME))
            config = serve_config(directory, grpc_port)
            _until("the dashboard takes the config", lambda: _try(api.put, config))
            _until("the application runs", lambda: _try(_is_running, api))
            clients = Clients(f"127.0.0.1:{grpc_port}", token)
            clients.begin(many)
            try:
                seen = watch(clients, [(calm_s, few), (busy_s, many), (after_s, few)], address, api)
            finally:
                clients.end()
    print(f"\n{describe('cpu')}\n\n" + "\n".join(f"- {name}: {value}" for name, value in SCALED.items()))
    columns = ("second", "clients", "models nodes", "generation replicas", "answered", "failed")
    rows: list[list[object]] = []
    for before, one in zip([None, *seen], seen, strict=False):
        now = (one.clients, one.nodes, one.replicas)
        if before is None or (before.clients, before.nodes, before.replicas) != now:
            rows.append([f"{one.second:.0f}", *now, one.answered, one.failed])
    print("\n" + table(columns, rows))
    print(f"\n{clients.answered} requests answered, {len(clients.failed)} failed. {clients.failed[:3] or ''}")
    if json_path is not None:
        numbers = {"scaled": SCALED, "seen": [vars(one) for one in seen], "failed": clients.failed}
        json_path.write_text(json.dumps(numbers, indent=1) + "\n")
    if svg is not None:
        draw(seen, svg)
    grew = {one.nodes for one in seen} >= {NODES[0], NODES[1]} and seen[-1].nodes < NODES[1]
    if clients.failed or not grew:
        raise SystemExit("a request was not answered" if clients.failed else "nodes did not come and go")


def _try(action: Any, *arguments: Any) -> bool:
    try:
        return action(*arguments) is not False
    except SourceError:
        return False


def _is_running(api: ServeApi) -> bool:
    return bool(api.application()["status"] == "RUNNING")


if __name__ == "__main__":
    typer.run(main)
