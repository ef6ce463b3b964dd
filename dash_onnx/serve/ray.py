"""The server on a cluster: the same app as a deployment of Ray Serve, in as many replicas.

serve run dash_onnx.serve.ray:app bundles=/models/out replicas=2 threads=2

Each replica is a process that loads the bundles from its own node. Needs the extra [ray].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve
from starlette.applications import Starlette

_BY_SESSION = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


class Arguments(BaseModel):
    """Arguments of `serve run`, or `args` in a file for `serve deploy`.

    Attributes:
        bundles: folders, separated by commas; each bundle is named after its folder.
        policy: policy of requests that name none.
        budget: budget of requests that name none.
        api_key_file: file on every node with the key that clients must send; None requires none.
        parallel: answers at once per replica.
        waiting: requests that may wait in a replica before one is refused.
        threads: threads per replica, which requests as many cores from the cluster.
        replicas: number of replicas, or the minimum if `max_replicas` allows more.
        max_replicas: maximum number; Ray starts more replicas as requests queue up.
        sessions: route requests with the same `x-session-id` header to the same replica while it
            has room, as it holds the K/V of their conversation; requests without the header go to
            any replica, however full. Needs Ray 2.60.
    """

    model_config = ConfigDict(extra="forbid")

    bundles: str
    policy: str = ""
    budget: str | None = None
    api_key_file: str | None = None
    parallel: int = 8
    waiting: int = 32
    threads: int = 2
    replicas: int = 1
    max_replicas: int | None = None
    sessions: bool = False


def app(given: Arguments | dict[str, Any]) -> serve.Application:
    """What `serve run dash_onnx.serve.ray:app` deploys; `serve` passes its arguments unchanged.

    Raises:
        ValidationError: an argument is unknown, or of the wrong type.
    """
    arguments = Arguments.model_validate(given)

    def build() -> Starlette:  # in the replica
        return replica(arguments)

    options: dict[str, Any] = {"num_replicas": arguments.replicas}
    if arguments.max_replicas is not None:
        options = {
            "autoscaling_config": {
                "min_replicas": arguments.replicas,
                "max_replicas": arguments.max_replicas,
                "target_ongoing_requests": arguments.parallel,
            }
        }
    if arguments.sessions:
        options["request_router_config"] = {"request_router_class": _BY_SESSION}
    deployment = serve.deployment(
        name="dash",
        max_ongoing_requests=arguments.parallel + arguments.waiting,
        ray_actor_options={"num_cpus": arguments.threads},
        health_check_period_s=10,
        graceful_shutdown_timeout_s=600,
        **options,
    )
    return deployment(_checked(serve.ingress(build)())).bind()


def _checked(ingress: Any) -> Any:
    """The class of a replica; Ray replaces a replica once its app is unhealthy."""

    class Replica(ingress):
        def check_health(self) -> None:
            if not self.app.state.service.pool.alive:
                raise RuntimeError("the thread that runs a bundle has died")

    return Replica


def replica(arguments: Arguments) -> Starlette:
    """The app of one replica."""
    from dash_onnx.core.text import read_text
    from dash_onnx.serve.app import create_app
    from dash_onnx.serve.limits import Limits
    from dash_onnx.serve.pool import open_bundles

    bundles = open_bundles(
        arguments.bundles.split(","),
        threads=arguments.threads,
        policy=arguments.policy,
        budget=arguments.budget,
    )
    limits = Limits(parallel=arguments.parallel, waiting=arguments.waiting)
    key = (
        None if arguments.api_key_file is None else read_text(Path(arguments.api_key_file)).strip()
    )
    return create_app(bundles, limits, key=key)
