#!/usr/bin/env python3
"""Stands for ``nemo-advrm`` where only the scripts are tested: servers that answer with their node, and an attack."""

from __future__ import annotations

import http.server
import os
import sys
import urllib.request

settings = dict(argument.split("=", 1) for argument in sys.argv[2:])


class Server(http.server.BaseHTTPRequestHandler):
    """Ready from the start; the root says which member this is, where, and whether the caller's token is right."""

    def do_GET(self) -> None:
        right = self.headers.get("Authorization") == f"Bearer {os.environ['NEMO_ADVRM_TOKEN']}"
        text = f"{settings['ensemble.members']} on {os.environ['SLURMD_NODENAME']} {'known' if right else 'unknown'}"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())


if sys.argv[1] == "serve":
    address = (settings["serve.host"], int(settings["serve.port"]))
    http.server.ThreadingHTTPServer(address, Server).serve_forever()
print(f"{sys.argv[1]} on {os.environ['SLURMD_NODENAME']}", settings["run_dir"], settings["trainer.num_nodes"])
for url in settings["ensemble.members"].strip("[]").split(","):
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {os.environ['NEMO_ADVRM_TOKEN']}"})
    print(urllib.request.urlopen(request, timeout=10).read().decode())
