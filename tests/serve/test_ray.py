"""Two replicas under Ray Serve on one machine: the same answers, and one of them killed under load."""

import socket
import threading
import time

import httpx
import psutil
import pytest
import torch
from diffusers.utils.remote_utils import remote_decode

from conftest import tiny_pipeline
from pixeldecoder.execution import Execution
from pixeldecoder.serve.service import Settings
from serving import latents

FLUX = dict(scaling_factor=0.3611, shift_factor=0.1159, output_type="pt", return_type="pt")


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    import ray
    from ray import serve

    from pixeldecoder.serve.ray import Replica, deployment

    pipeline = tiny_pipeline()
    pipeline.register_to_config(latent_space="flux")
    folder = tmp_path_factory.mktemp("ray") / "tiny"
    pipeline.save_pretrained(folder)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    replica = Replica((str(folder),), Execution("cpu", "float32"), Settings(token="key"), queue_size=4, max_batch=1)
    serve.run(deployment(replica, replicas=2, cpus=0.5), name="pixeldecoder", route_prefix="/")
    yield f"http://any:key@127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def test_the_words_of_serve_run(monkeypatch):
    from pixeldecoder.serve import ray as served

    monkeypatch.setenv("PIXELDECODER_TOKEN", "key")
    monkeypatch.setattr(served, "deployment", lambda *given: given)
    replica, *numbers = served.build({"decoder": "mine", "device": "cpu", "replicas": "2", "gpus": "0.5"})
    assert (replica.decoders, replica.execution.device, replica.settings.token) == (("mine",), "cpu", "key")
    assert numbers == [2, 1, 0.5]
    with pytest.raises(ValueError, match=r"^cpu, size: expected some of cpus, decoder, device, gpus, replicas$"):
        served.build({"size": 1, "cpu": 2})


@pytest.mark.slow
def test_the_same_answers_though_a_replica_is_killed(url):
    truth, answers, refused = tiny_pipeline(), {}, []

    def ask(seed: int) -> None:
        """As clients are told: again, if it is 429 or 503, or the server of the connection is gone."""
        body = latents(seed, 4, 4).numpy().tobytes()
        query = dict(shape=[1, 16, 4, 4], dtype="float32", output_type="pt", do_scaling=True, seed=seed)
        while True:
            try:
                response = httpx.post(f"{url}/decode", params=query, content=body, timeout=60)
            except httpx.TransportError:
                time.sleep(0.2)
                continue
            if response.status_code == 200:
                answers[seed] = torch.frombuffer(bytearray(response.content), dtype=torch.float32).reshape(
                    1, 3, 128, 128
                )
                return
            refused.append(response.status_code)
            time.sleep(0.2)

    assert httpx.get(url.replace("key", "other") + "/v1/models").status_code == 401
    image = remote_decode(f"{url}/decode?seed=3", latents(3, 4, 4)[None], **FLUX)
    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(40)]
    for thread in threads:
        thread.start()
    while len(answers) < 5:
        time.sleep(0.05)
    ours = psutil.Process().children(recursive=True)
    replicas = [process for process in ours if "ServeReplica:pixeldecoder" in " ".join(process.cmdline())]
    assert len(replicas) == 2
    replicas[0].kill()
    for thread in threads:
        thread.join(240)
    assert (
        sorted(answers) == list(range(40)) and set(refused) <= {429, 500, 503} and 429 in refused
    )  # ours, before Ray's
    for seed, got in answers.items():
        alone = truth(latents(seed, 4, 4), generator=torch.Generator().manual_seed(seed), output_type="latent").images
        assert (got - alone.clamp(-1, 1)).abs().max() < 1e-4, seed
    assert torch.equal(image, answers[3])
