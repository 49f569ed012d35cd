"""Runs a site's ClientApp, in the place of Flower's ``flower-superexec``: ``... .runner ADDRESS SOCKET_FOLDER``.

Flower's own would start a process for every message and run in it the app that the server sent. This one takes the
tasks of the site's SuperNode (``--isolation process``, authenticated with the socket folder's secret), runs the app
that is installed here, and never unpacks what came over the wire.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from fedlora.engines.flower.channel import secret_of
from fedlora.engines.flower.client_app import app
from fedlora.engines.flower.worker import die_with

log = logging.getLogger("fedlora.runner")
LOOK = 0.1
ACQUIRE = frozenset({"/flwr.proto.Runtime/AcquireTask"})


def client(address: str, *interceptors: ProtobufClientInterceptor) -> RuntimeHttpClient:
    """A connection to the SuperNode of this machine."""
    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,  # loopback, and authenticated
        root_certificates=None,
        interceptors=list(interceptors),
        retry_invoker=make_simple_http_retry_invoker(),
    )


def wait_for_port(address: str) -> None:
    """Until the SuperNode listens: Flower's own patience grows with every attempt."""
    host, _, port = address.rpartition(":")
    while True:
        try:
            return socket.create_connection((host, int(port)), 1.0).close()
        except OSError:
            time.sleep(LOOK)


def serve(address: str, sockets: Path) -> None:
    """Takes one task after the other."""
    wait_for_port(address)
    auth = SuperExecAuthHttpInterceptor(master_secret=secret_of(sockets), protected_methods=ACQUIRE)
    tasks = client(address, RuntimeVersionHttpInterceptor(component_name="SuperExec"), auth)
    while True:
        found = tasks.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        if found.HasField("task") and found.token:
            version = RuntimeVersionHttpInterceptor(component_name="flwr-clientapp")
            run(client(address, version, RuntimeTokenHttpInterceptor(found.token)))
        else:
            time.sleep(LOOK)


def run(task: RuntimeHttpClient) -> None:
    """One task: its message to the app, the app's answer back."""
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(task))
    heartbeat.start()
    context: Context | None = None
    status, details = SubStatus.FAILED, ""
    try:
        message, context, _, _ = pull_task_input(task)
        try:
            log.info("in: %s", message.metadata.message_id)
            reply = app(message, context)
            log.info("out: %s", message.metadata.message_id)
            status = SubStatus.COMPLETED
        except Exception as problem:
            log.warning("a message could not be answered: %s", problem)
            details = f"{type(problem).__name__}: {problem}"
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, details), reply_to=message)
        push_message(task, reply, context)
    except Exception:
        log.exception("a task was lost")
    finally:
        push_task_output(task, context, status, details)
        if heartbeat.is_running:
            heartbeat.stop()
        task.close()


def main() -> None:
    """Entry point."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    die_with(os.getppid())
    serve(sys.argv[1], Path(sys.argv[2]))


if __name__ == "__main__":
    main()
