"""vLLM with a process of its own, as it runs by default: the plugin is in it, and the log tells what failed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.engines.models import Llama

_START = """
import sys
from vllm import LLM

if __name__ == "__main__":
    LLM(
        model=sys.argv[1], load_format="streamload", model_loader_extra_config={"uri": sys.argv[2]},
        skip_tokenizer_init=True, enforce_eager=True, max_model_len=64,
        kv_cache_memory_bytes=16 << 20,
    )
"""


def test_the_log_says_why_an_engine_did_not_start(tmp_path: Path, bucket: str) -> None:
    Llama().write(tmp_path / "model", weights=False)
    (tmp_path / "start.py").write_text(_START)
    of_torchrun = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "TORCH_NCCL")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(of_torchrun)}
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(
        [sys.executable, tmp_path / "start.py", tmp_path / "model", f"s3://{bucket}/nothing-here"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    said = [line for line in done.stdout.splitlines() if "Loading weights failed: " in line]
    assert said, done.stdout
    for line in said:
        assert "(Worker" in line
        assert f"Loading weights failed: s3://{bucket}/nothing-here: " in line
