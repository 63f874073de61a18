"""Measures the reward server under load: many clients, mixed lengths, every score compared with the offline score.

Starts ``nemo-advrm serve`` with a tiny random reward model on loopback, sends requests from ``--clients`` connections
for ``--seconds``, and prints requests/s and latencies. Exits with an error when a request fails or a score differs by
more than 1e-4.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

TEXTS = 512
TOLERANCE = 1e-4


def make_model(path: Path) -> None:
    """Write a byte-level reward model with 4 layers of width 64."""
    from nemo_advrm.config.schema import ModelConfig, PrecisionConfig
    from nemo_advrm.data.tokenizers import ByteTokenizer
    from nemo_advrm.engine import checkpoint, runtime
    from nemo_advrm.engine.model import build_model

    runtime.start(accelerator="cpu")
    model, tokenizer = ModelConfig(num_layers=4, hidden_size=64, init_method_std=0.08), ByteTokenizer()
    built = build_model(
        model, PrecisionConfig(), "reward", tokenizer.vocab_size, seed=1, trainable=False, head_init_std=0.3
    )
    checkpoint.save(path, built, meta={"tokenizer": tokenizer.fingerprint, "tokenizer_spec": "byte"})


def make_texts() -> list[str]:
    """Draw texts with the lengths of chat answers: mean about 180 characters, at most 1000."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz     "
    return ["".join(draw.choices(letters, k=min(1000, int(draw.gammavariate(1.6, 110)) + 5))) for _ in range(TEXTS)]


def offline_scores(path: Path, texts: list[str]) -> list[float]:
    """Score one text at a time, without batching."""
    from nemo_advrm.config.schema import Config
    from nemo_advrm.data.tokenizers import build_tokenizer
    from nemo_advrm.engine.scoring import score_sequences
    from nemo_advrm.rewards.local import MegatronReward
    from nemo_advrm.rewards.sources import build, parse
    from nemo_advrm.rewards.token_sequences import encode_rendered

    source = build(parse(str(path), "model"), "offline", Config(), build_tokenizer("byte"))
    assert isinstance(source, MegatronReward)
    rows = [encode_rendered(source.tokenizer, text) for text in texts]
    return [score_sequences(source.model, [row], 0).item() for row in rows]


async def client(
    http: httpx.AsyncClient, number: int, end: float, texts: list[str], scores: list[float], seen: list[float]
) -> int:
    """Send requests of 1 to 4 samples until the end; return the number of samples."""
    draw, samples = random.Random(number), 0
    while time.monotonic() < end:
        chosen = draw.choices(range(len(texts)), k=draw.randint(1, 4))
        started = time.monotonic()
        answer = await http.post("/v1/score", json={"samples": [{"text": texts[i]} for i in chosen]})
        seen.append(time.monotonic() - started)
        if answer.status_code != 200:
            raise SystemExit(f"error: status {answer.status_code}: {answer.text}")
        for i, score in zip(chosen, answer.json()["scores"], strict=True):
            if abs(score - scores[i]) > TOLERANCE:
                raise SystemExit(f"error: text {i} scored {score} instead of {scores[i]}")
        samples += len(chosen)
    return samples


async def load(address: str, clients: int, seconds: float, texts: list[str], scores: list[float]) -> None:
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    seen: list[float] = []
    async with httpx.AsyncClient(base_url=address, limits=limits, timeout=60) as http:
        started = time.monotonic()
        end = started + seconds
        counts = await asyncio.gather(*(client(http, n, end, texts, scores, seen) for n in range(clients)))
        took = time.monotonic() - started
    seen.sort()
    p50, p99 = (seen[min(len(seen) - 1, int(len(seen) * q))] * 1000 for q in (0.5, 0.99))
    print(
        f"{clients} clients, {took:.1f} s: {len(seen)} requests, {sum(counts)} samples, no error, every score within "
        f"{TOLERANCE:g}\n{len(seen) / took:.0f} requests/s  {sum(counts) / took:.0f} samples/s  "
        f"p50 {p50:.0f} ms  p99 {p99:.0f} ms  slowest {seen[-1] * 1000:.0f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        model, run = Path(home) / "model", Path(home) / "run"
        make_model(model)
        texts = make_texts()
        scores = offline_scores(model, texts)
        command = [sys.executable, "-m", "nemo_advrm.cli", "serve", f"run_dir={run}", f"ensemble.members=[{model}]"]
        server = subprocess.Popen([*command, "serve.port=0", "trainer.accelerator=cpu"], env={**os.environ})
        try:
            deadline = time.monotonic() + 120
            while not (run / "server.json").exists():
                if server.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit("error: the server did not start")
                time.sleep(0.1)
            address = json.loads((run / "server.json").read_text())["address"]
            asyncio.run(load(address, options.clients, options.seconds, texts, scores))
            server.send_signal(signal.SIGTERM)
            print(f"server ended with status {server.wait(60)}")
        finally:
            server.kill()
            server.wait(10)


if __name__ == "__main__":
    main()
