"""Ask a running server from many clients at once, and report times, errors and its memory.

python -m tools.load_test --address http://127.0.0.1:8000/v1 --clients 64 --minutes 10 --pid PID
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np

PICTURE = Path(__file__).parents[1] / "paligemma_jax" / "assets" / "digits.jpg"
PROMPTS = ["ocr", "caption en", "detect 3", "segment 2", "answer en how many digits?"]


@dataclass
class Measured:
    """What the clients saw."""

    statuses: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)  # seconds to the first text
    per_piece: list[float] = field(default_factory=list)  # seconds between pieces, mean of a reply
    total: list[float] = field(default_factory=list)  # seconds
    memory: list[float] = field(default_factory=list)  # MB of the server, each second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--address", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--pid", type=int, help="process of the server, whose memory is reported")
    options = parser.parse_args()
    measured = asyncio.run(run(options))
    report(measured, options.minutes)


async def run(options: argparse.Namespace) -> Measured:
    measured, deadline = Measured(), time.monotonic() + 60 * options.minutes
    watch = asyncio.create_task(watch_memory(options.pid, measured))
    limits = httpx.Limits(max_connections=options.clients)
    async with httpx.AsyncClient(timeout=300, limits=limits) as http:
        clients = [client(n, http, options, deadline, measured) for n in range(options.clients)]
        await asyncio.gather(*clients)
    watch.cancel()
    return measured


async def client(
    number: int,
    http: httpx.AsyncClient,
    options: argparse.Namespace,
    deadline: float,
    measured: Measured,
) -> None:
    """Ask one request after another. One in twenty leaves early, one in twenty is malformed."""
    rng = random.Random(number)
    picture = base64.b64encode(PICTURE.read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{picture}"}}
    while time.monotonic() < deadline:
        kind = rng.random()
        text = {"type": "text", "text": rng.choice(PROMPTS)}
        body = {
            "model": options.model,
            "messages": [{"role": "user", "content": [image, text]}],
            "stream": True,
            "max_tokens": rng.randint(5, 120),
            "temperature": rng.choice([0, 0, 1]),
        }
        if kind < 0.05:
            body["n"] = -1
        status = await ask(http, options.address, body, kind > 0.95, measured)
        expected = "400" if kind < 0.05 else "left" if kind > 0.95 else "200"
        measured.statuses[f"{status}" if status == expected else f"{status}, not {expected}"] += 1
        if status in ("429", "503"):
            await asyncio.sleep(1)


async def ask(
    http: httpx.AsyncClient, address: str, body: dict, leaves: bool, measured: Measured
) -> str:
    """Send one request. Returns its status, or what went wrong."""
    start, times = time.monotonic(), []
    try:
        async with http.stream("POST", f"{address}/chat/completions", json=body) as reply:
            last = ""
            async for line in reply.aiter_lines():
                last = line or last
                if '"content": "' in line and '"role"' not in line:
                    times.append(time.monotonic())
                    if leaves:
                        return "left"
            if reply.status_code == 200 and last != "data: [DONE]":
                return "cut"
            if '"error"' in last and reply.status_code == 200:
                return json.dumps(last)[:80]
            if reply.status_code == 200 and times:
                measured.first.append(times[0] - start)
                measured.total.append(time.monotonic() - start)
                if len(times) > 1:
                    measured.per_piece.append((times[-1] - times[0]) / (len(times) - 1))
            return "left" if leaves and reply.status_code == 200 else str(reply.status_code)
    except httpx.HTTPError as error:
        return type(error).__name__


async def watch_memory(pid: int | None, measured: Measured) -> None:
    while pid:
        status = Path(f"/proc/{pid}/status").read_text()
        kilobytes = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        measured.memory.append(int(kilobytes.split()[1]) / 1e3)
        await asyncio.sleep(1)


def report(measured: Measured, minutes: float) -> None:
    print(f"{measured.statuses.total()} requests in {minutes:g} minutes")
    for status, count in measured.statuses.most_common():
        print(f"  {count} {status}")
    print("| seconds | p50 | p95 | p99 |\n|---|---|---|---|")
    rows = {
        "to the first text": measured.first,
        "between pieces": measured.per_piece,
        "of a reply": measured.total,
    }
    for name, values in rows.items():
        if values:
            p50, p95, p99 = np.percentile(values, [50, 95, 99])
            print(f"| {name} | {p50:.3f} | {p95:.3f} | {p99:.3f} |")
    if measured.memory:
        parts = [part.mean() for part in np.array_split(measured.memory, 5) if len(part)]
        listed = ", ".join(f"{part:.0f}" for part in parts)
        print(f"memory of the server in MB, means of the fifths of the time: {listed}")


if __name__ == "__main__":
    main()
