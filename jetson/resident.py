#!/usr/bin/env python3
"""A bundle that stays loaded and answers on a Unix socket, one JSON object a line.

    resident.py --socket /run/edgert/edgert.sock BUNDLE

    {"prompt": "The sun is", "max_tokens": 20}     or "ids": [1, 2, 3] in place of the prompt; and
                                                   temperature, seed, deadline_ms, halt
    {"text": ..., "tokens": [...], "finish_reason": "length"}          or {"error": ...}
    {"puzzles": [[1, 0, ...]]}  of a model that solves
    {"answers": [[1, 3, ...]], "steps": [2], "reasons": ["halted"]}

Connections are served in turn: one model, one answer at a time. Each request starts anew. Under
systemd (Type=notify, WatchdogSec) it says when the model is loaded, and from then on between tokens
and while it waits that it is alive: a step that hangs ends in a restart. SIGTERM ends it behind the
token that is being made.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import edgert

MAX_LINE = 1 << 20
PATIENCE_S = 10.0
"""A client that sends nothing for so long is left, since others wait."""
OPTIONS = ("max_tokens", "temperature", "seed", "deadline_ms", "halt")


class Systemd:
    """What systemd is told, by datagrams to its socket (sd_notify); without one, nothing."""

    def __init__(self, environ: dict[str, str]) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):  # an abstract socket
            self._address = "\0" + self._address[1:]
        asked = environ.get("WATCHDOG_USEC", "")
        mine = environ.get("WATCHDOG_PID") in (None, str(os.getpid()))
        self.interval_s = int(asked) / 2e6 if asked.isdigit() and mine else None
        self._last = 0.0

    def tell(self, state: str) -> None:
        if self._address:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
                out.sendto(state.encode(), self._address)

    def alive(self) -> None:
        """At most once in each half of the watchdog's time."""
        now = time.monotonic()
        if self.interval_s is not None and now - self._last >= self.interval_s:
            self._last = now
            self.tell("WATCHDOG=1")


class Resident:
    def __init__(self, model: edgert.Model, systemd: Systemd) -> None:
        self.model, self.systemd, self.stopping = model, systemd, False

    def stop(self, *_: object) -> None:
        self.stopping = True

    def serve(self, listening: socket.socket) -> None:
        """Answer until `stop`; looks up at least twice a second."""
        listening.settimeout(min(0.5, self.systemd.interval_s or 0.5))
        while not self.stopping:
            self.systemd.alive()
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                continue
            with connection:
                connection.settimeout(listening.gettimeout())
                try:
                    for line in self._lines(connection):
                        answer = json.dumps(self.answer(line)) + "\n"
                        connection.settimeout(PATIENCE_S)
                        connection.sendall(answer.encode())
                        connection.settimeout(listening.gettimeout())
                except OSError as error:  # the client has left, or does not read
                    print(f"connection lost: {error}", file=sys.stderr)

    def _lines(self, connection: socket.socket) -> Iterator[bytes]:
        """Lines as they come, until the client closes, says nothing for long, or says too much."""
        held, heard = b"", time.monotonic()
        while not self.stopping and time.monotonic() - heard < PATIENCE_S:
            self.systemd.alive()
            line, newline, rest = held.partition(b"\n")
            if newline:
                held = rest
                yield line
                heard = time.monotonic()
                continue
            if len(held) > MAX_LINE:
                raise OSError(f"a line of more than {MAX_LINE} bytes")
            try:
                part = connection.recv(1 << 16)
            except TimeoutError:
                continue
            if not part:
                return
            held, heard = held + part, time.monotonic()

    def answer(self, line: bytes) -> dict[str, Any]:
        """One request's answer. What is wrong with it is an answer, too."""
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise edgert.EdgertError("a request is a JSON object")
            return self._solve(request) if "puzzles" in request else self._generate(request)
        except edgert.EdgertError as error:
            return {"error": error.what}
        except (ValueError, TypeError, RecursionError) as error:
            return {"error": f"{type(error).__name__}: {error}"}

    def _generate(self, request: dict[str, Any]) -> dict[str, Any]:
        prompt = request.get("ids", request.get("prompt"))
        if prompt is None:
            raise edgert.EdgertError("a request has a prompt, ids or puzzles")
        chosen = {name: request[name] for name in OPTIONS if request.get(name) is not None}
        with self.model.session() as session:
            stream = session.stream(prompt, **chosen)
            for _ in stream:
                self.systemd.alive()
                if self.stopping:
                    stream.cancel()
            made = stream.result()
        return {"text": made.text, "tokens": made.tokens, "finish_reason": made.finish_reason}

    def _solve(self, request: dict[str, Any]) -> dict[str, Any]:
        solving = self.model.solving(request["puzzles"], halt=request.get("halt"))
        while not solving.done and solving.stopped is None:
            solving.step()
            self.systemd.alive()
            if self.stopping:
                solving.stop()
        found = [solving.answers[index] for index in range(len(solving.ids))]
        return {
            "answers": [None if one.values is None else one.values.tolist() for one in found],
            "steps": [one.steps for one in found],
            "reasons": [one.reason for one in found],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--socket", type=Path, required=True, metavar="FILE")
    parser.add_argument("--threads", type=int, default=0, metavar="N")
    given = parser.parse_args()
    systemd = Systemd(dict(os.environ))
    with edgert.load(given.bundle, threads=given.threads) as model:
        resident = Resident(model, systemd)
        signal.signal(signal.SIGTERM, resident.stop)
        signal.signal(signal.SIGINT, resident.stop)
        given.socket.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            listening.bind(str(given.socket))
            listening.listen(8)
            systemd.tell(f"READY=1\nSTATUS={model.manifest.name} is loaded")
            resident.serve(listening)
        systemd.tell("STOPPING=1")
        given.socket.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
