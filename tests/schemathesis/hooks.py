"""What schemathesis sends, made harmless: it is to ask a real daemon, not to fill this machine with guests.

One fork, SCHEMATHESIS_FORK, and one template, SCHEMATHESIS_TEMPLATE, are there for it; SCHEMATHESIS_KEPT are ids that must not be removed. What is
not mentioned here goes out as generated.
"""

import os
import zlib
from typing import Any

import requests
import schemathesis

FORK = os.environ["SCHEMATHESIS_FORK"]
TEMPLATE = os.environ["SCHEMATHESIS_TEMPLATE"]
# schemathesis learns ids from answers, and removes what it has learned of.
KEPT = {FORK, TEMPLATE, *os.environ["SCHEMATHESIS_KEPT"].split()}
NONE = "no-such-thing"

jobs: list[str] = []


@schemathesis.hook
def before_call(_context: Any, case: Any, _kwargs: dict[str, Any]) -> None:
    """Points a request at what is there, and takes from it what would go on for minutes."""
    route, path, query, body = case.operation.label, case.path_parameters or {}, case.query or {}, case.body
    # Of a fork that is not there only 404 would be seen; some stay as they are.
    if isinstance(path.get("fork"), str) and not route.startswith("DELETE") and mostly(path["fork"]):
        path["fork"] = FORK
    if route.startswith("DELETE"):
        path.update({name: NONE for name, value in path.items() if value in KEPT})
    if isinstance(path.get("job"), str) and jobs and mostly(path["job"]):
        path["job"] = jobs[0]
    if route.endswith("/files") and isinstance(query.get("path"), str) and mostly(query["path"]):
        query["path"] = "/etc/hostname" if route.startswith("GET") else "/tmp/written"
        # A null is no text in a query.
        for name in [name for name, value in query.items() if value is None or name == "mode"]:
            del query[name]
    if route == "GET /v1/forks/{fork}/logs" and str(query.get("follow")).lower() == "true":
        # An answer without an end; the tests of the SDK follow logs.
        query["follow"] = "false"
    if route == "POST /v1/templates/{tag}/verify":
        verify(path, body)
    if not isinstance(body, dict):
        return
    if route == "POST /v1/forks":
        one_fork(body)
    elif route == "POST /v1/templates" and is_name(body.get("recipe")):
        # A build boots a guest, which takes a minute; the tests of the SDK build.
        body["recipe"] = NONE
    elif route == "PUT /v1/pools/{tag}" and is_number(body.get("size"), 0, 256):
        # Up to 256 machines.
        body["size"] = 0
    elif route == "POST /v1/forks/{fork}/exec" and is_command(body.get("argv")):
        # Ends by itself, whatever words were generated.
        body["argv"] = ["true"]
    elif route == "POST /v1/forks/{fork}/eval" and is_number(body.get("timeout_ms"), 1, 86_400_000):
        body["timeout_ms"] = 1000


@schemathesis.hook
def after_call(_context: Any, case: Any, response: Any) -> None:
    """Forks that were made are ended at once, one in standby comes back; of jobs the first is asked for later."""
    route, url = case.operation.label, response.request.url
    headers = {"Authorization": response.request.headers.get("Authorization", "")}
    if route == "POST /v1/templates/{tag}/verify" and response.status_code == 202:
        jobs.append(response.json()["id"])
    elif route == "POST /v1/forks/{fork}/standby" and response.status_code == 200:
        requests.post(url.removesuffix("standby") + "resume", headers=headers, timeout=60)
    elif route == "POST /v1/forks" and response.status_code == 201:
        for result in response.json()["results"]:
            if fork := result.get("fork"):
                requests.delete(f"{url}/{fork['id']}", headers=headers, timeout=60)


def verify(path: dict[str, Any], body: Any) -> None:
    """One verification is real, of two forks; up to a hundred each would take all day."""
    if not jobs and isinstance(body, dict) and is_number(body.get("count", 2), 2, 100):
        path["tag"], body["count"] = TEMPLATE, 2
    elif is_name(path.get("tag")):
        path["tag"] = NONE


def one_fork(body: dict[str, Any]) -> None:
    """Not more than one fork for each request, of what is there; half of the requests are such that it can be made."""
    if is_name(body.get("template")):
        body["template"] = TEMPLATE
    if is_number(body.get("count"), 2, 1000):
        body["count"] = 1
    if isinstance(body.get("children"), list):
        del body["children"][1:]
    if zlib.crc32(repr(body).encode("utf-8", "replace")) % 2:
        # What generated values rarely are: names of variables, ranges of addresses, mailboxes that were planted.
        for field in ("name", "env", "secrets", "files", "mailboxes", "limits", "network", "children", "count"):
            body.pop(field, None)
        body.pop("from" if isinstance(body.get("template"), str) else "template", None)
        if isinstance(body.get("from"), str):
            body["from"] = FORK


def mostly(text: str) -> bool:
    """Three of four, always the same ones."""
    return zlib.crc32(text.encode("utf-8", "replace")) % 4 != 0


def is_name(text: Any) -> bool:
    return isinstance(text, str) and 0 < len(text) <= 64


def is_number(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_command(words: Any) -> bool:
    return isinstance(words, list) and bool(words) and all(isinstance(word, str) and "\0" not in word for word in words)
