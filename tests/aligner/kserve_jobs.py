"""What NeMo-Aligner's and PyTriton's own clients get from a reward server; a job of driver.py."""

from __future__ import annotations

from typing import Any

MODEL = "reward_model"


def ask(port: int, texts: list[str], rows: list[list[int]], requests: int) -> dict[str, Any]:
    """Rewards of the same conversations by every client and kind of input; ``requests`` of them at once."""
    import numpy as np
    from nemo_aligner.servers.http_communicator import HTTPCommunicator
    from pytriton.client import ModelClient
    from pytriton.client.exceptions import PyTritonClientInferenceServerError

    sentences = np.array([[text.encode()] for text in texts], np.object_)
    lengths = np.array([[len(row)] for row in rows], np.int64)
    tokens = np.zeros((len(rows), int(lengths.max()) + 3), np.int64)  # padded further than needed
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row

    def rewards(output: dict[str, Any]) -> list[float]:
        found = output["rewards"]
        assert found.dtype == np.float32 and found.shape == (len(texts), 1), found
        return found.flatten().tolist()

    # as RemoteGPTRMClient has it
    communicator = HTTPCommunicator.create_http_communicator_from_dict({MODEL: ("127.0.0.1", port)})
    data = {"tokens": tokens, "sequence_lengths": lengths, "add_EOS": np.zeros((len(rows), 1), bool)}
    futures = [communicator.send_data_to_server(MODEL, data) for _ in range(requests)]
    answers = {"aligner": [rewards(future.result()) for future in futures]}
    communicator.close()
    with ModelClient(f"http://127.0.0.1:{port}", MODEL) as client:
        client.wait_for_model(60)
        config = client.model_config
        names = [tensor.name for tensor in (*config.inputs, *config.outputs)]
        answers["sentences"] = [rewards(client.infer_batch(sentences=sentences))]
        answers["sample"] = [[float(client.infer_sample(sentences=sentence)["rewards"][0]) for sentence in sentences]]
        try:
            client.infer_batch(tokens=tokens, sequence_lengths=lengths + 99)
            error = ""
        except PyTritonClientInferenceServerError as caught:
            error = str(caught)
    return {"rewards": answers, "names": names, "batch": config.max_batch_size, "error": error}
