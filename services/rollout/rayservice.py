"""What serves on Kubernetes, changed where KubeRay reads it: the RayService's serveConfigV2.

The operator carries a change of it out in place, within seconds, and tells it to every head and cluster to
come. (What is put to Serve's own REST API is forgotten with the head.)
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import yaml

from accord.config import validate
from accord.errors import AccordError
from services.config import GATEWAY, GENERATION, REWARD, ServeConfig
from services.rollout.config import ServeEndpoint
from services.rollout.sources import SourceError
from services.rollout.user_configs import UserConfigs, with_user_configs

TIMEOUT_S = (10, 30)  # to connect, to be answered
_KIND = ("ray.io", "v1")
_MEANWHILE = "somebody changed it meanwhile: look at it, and try again"


class RayServiceSpec:
    """One RayService; needs the rights to get and patch it (k8s/components/rollout has the role)."""

    def __init__(self, where: ServeEndpoint) -> None:
        """By $KUBECONFIG, ~/.kube/config, or the pod's own account.

        Raises:
            SourceError: there is none of them.
        """
        self._where = where
        self._api = _api(where.context)
        self._seen: str | None = None  # the serveConfigV2 that was read last

    def read(self) -> UserConfigs:
        item = self._get()
        application = self._application(self._config(item))
        self._seen = item["spec"]["serveConfigV2"]
        settings = validate(ServeConfig, dict(application.get("args") or {}), f"args of {self._name}")
        initial = {
            GENERATION: settings.generation.user_config,
            GATEWAY: settings.gateway.user_config,
            REWARD: settings.reward.user_config,
        }
        overrides = {one["name"]: one.get("user_config") for one in application.get("deployments") or []}
        found = [
            overrides.get(name) or initial[name].model_dump(mode="json")
            for name in (GENERATION, GATEWAY, REWARD)
        ]
        return UserConfigs(*found)

    def write(self, configs: UserConfigs) -> None:
        """Changes the user_configs and nothing else; refused when somebody changed them since `read`."""
        item = self._get()
        config = self._config(item)
        # Not by the resourceVersion that was read: the operator's reports of the status change that too.
        if self._seen is not None and item["spec"]["serveConfigV2"] != self._seen:
            raise SourceError(f"cannot change {self._name}: {_MEANWHILE}")
        config["applications"] = [
            with_user_configs(one, configs) if one.get("name") == self._where.application else one
            for one in config["applications"]
        ]
        text = yaml.safe_dump(config, sort_keys=False, width=1000)
        body = {
            "metadata": {"resourceVersion": item["metadata"]["resourceVersion"]},
            "spec": {"serveConfigV2": text},
        }
        with self._errors("change"):
            self._api.patch_namespaced_custom_object(
                *_KIND, self._where.namespace, "rayservices", self._where.rayservice, body,
                _request_timeout=TIMEOUT_S, _content_type="application/merge-patch+json",
            )  # fmt: skip
        self._seen = text

    @property
    def _name(self) -> str:
        return f"the RayService {self._where.rayservice} in the namespace {self._where.namespace}"

    def _get(self) -> dict[str, Any]:
        with self._errors("read"):
            found: dict[str, Any] = self._api.get_namespaced_custom_object(
                *_KIND, self._where.namespace, "rayservices", self._where.rayservice,
                _request_timeout=TIMEOUT_S,
            )  # fmt: skip
        return found

    def _config(self, item: dict[str, Any]) -> dict[str, Any]:
        try:
            config = yaml.safe_load(item["spec"]["serveConfigV2"])
        except (KeyError, yaml.YAMLError):
            config = None
        if not isinstance(config, dict) or not isinstance(config.get("applications"), list):
            raise SourceError(f"{self._name} has no serveConfigV2 that can be read")
        return config

    def _application(self, config: dict[str, Any]) -> dict[str, Any]:
        wanted = self._where.application
        found: dict[str, Any] | None = next(
            (one for one in config["applications"] if one.get("name") == wanted), None
        )
        if found is None:
            raise SourceError(f"{self._name} has no application {wanted!r}")
        return found

    @contextlib.contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            yield
        except AccordError:
            raise
        except ApiException as error:
            advice = {
                401: "the API does not know who we are: renew the credentials of the kubeconfig",
                403: "the account may not: it needs get and patch on it (k8s/components/rollout)",
                404: "it is not there: kubectl get rayservices --all-namespaces",
                409: _MEANWHILE,
            }.get(int(error.status or 0), str(error.reason))
            raise SourceError(f"cannot {doing} {self._name}: {error.status}, {advice}") from None
        except (HTTPError, OSError) as error:
            raise SourceError(
                f"cannot {doing} {self._name}: the Kubernetes API does not answer ({type(error).__name__})"
            ) from None


def _api(context: str) -> Any:
    from kubernetes import client
    from kubernetes import config as untyped

    config: Any = untyped
    configuration = client.Configuration()
    try:
        config.load_kube_config(os.environ.get("KUBECONFIG"), context or None, configuration)
    except config.ConfigException as error:
        inside = not context
        if inside:
            try:
                config.load_incluster_config(client_configuration=configuration)
            except config.ConfigException:
                inside = False
        if not inside:
            raise SourceError(
                f"no Kubernetes cluster to ask: {error}. See that $KUBECONFIG or ~/.kube/config has it"
            ) from None
    configuration.retries = False
    return client.CustomObjectsApi(client.ApiClient(configuration))
