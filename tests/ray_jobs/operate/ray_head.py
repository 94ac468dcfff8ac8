"""A Ray cluster with its dashboard, until it is told to end: `python ray_head.py PORT DIRECTORY`."""

import signal
import sys

import ray

ray.init(
    address="local",
    num_cpus=2,
    include_dashboard=True,
    dashboard_host="127.0.0.1",
    dashboard_port=int(sys.argv[1]),
    _temp_dir=sys.argv[2],
)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # which ends the cluster
print("ready", flush=True)
while True:
    signal.pause()
