"""Whatever the OpenAPI page allows, and what it does not, is answered as it says, and never with a fault of ours."""

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import tiny_pipeline
from pixeldecoder.serve.service import Settings
from serving import serving


@pytest.mark.slow
def test_the_schema_is_kept(tmp_path):
    """By schemathesis, with all its checks but one: no schema tells whether bytes are a picture."""
    pipeline = tiny_pipeline()
    pipeline.register_to_config(latent_space="flux")
    with serving(pipeline, settings=Settings(deadline=20), max_pixels=256 * 256) as client:
        command = [
            Path(sys.executable).with_name("schemathesis"), "run", f"{client.base_url}/openapi.json",
            "--exclude-checks", "positive_data_acceptance", "--max-examples", "30", "--seed", "0", "--no-color",
        ]  # fmt: skip
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert client.get("/readyz").status_code == 200
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr
