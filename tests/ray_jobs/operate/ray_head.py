"""A Ray cluster with its dashboard, until it is told to end: `python ray_head.py PORT DIRECTORY`."""

import functools
import signal
import socket
import sys

import ray
from ray._private.parameter import RayParams

# Another Ray of this machine may have the one port that Ray gives its agent, without which no job is taken.
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    agent_port = free.getsockname()[1]
RayParams.__init__ = functools.partialmethod(RayParams.__init__, dashboard_agent_listen_port=agent_port)

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
